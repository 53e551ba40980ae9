"""Parts of a transformer as single operations: their backward passes by hand take few kernels and keep few tensors.

On a CPU the parts that autograd puts together from elementary operations take long next to the matrix products of a
small model. A compiler gets the elementary operations: it fuses them itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension (Zhang & Sennrich 2019), computed in float32."""
    if torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:])
    return _RMSNorm.apply(x)


def split_heads(x: Tensor, rotation: Tensor | None, *, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each (n, t, n_head, 2 * m), of a projection (n, t, 3, n_head, 2 * m).

    Args:
        rotation: for rotary positions (Su et al. 2021): complex numbers of modulus 1, (t, 2, n_head, m), by which
            adjacent pairs of numbers of queries and keys are turned.
        normalise: take an RMS norm of each query and key first (Henry et al. 2020).
    """
    if rotation is None and not normalise:
        query, key, value = x.unbind(2)
        return query, key, value
    if not torch.compiler.is_compiling():
        return _SplitHeads.apply(x, rotation, normalise)
    turned = rms_norm(x[:, :, :2]) if normalise else x[:, :, :2]
    if rotation is not None:
        turned = _turn_real(turned, rotation)
    query, key = turned.unbind(2)
    return query, key, x[:, :, 2]


def swiglu(x: Tensor) -> Tensor:
    """Compute silu(gate) * value (Shazeer 2020) of gates and values side by side: (..., 2 * n) -> (..., n)."""
    if torch.compiler.is_compiling():
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    return _SwiGLU.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, scale = normalised(x.float())
        ctx.save_for_backward(y, scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return _norm_gradient(gradient.float(), y, scale).to(gradient.dtype)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor | None, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
        turned, scale = x[:, :, :2].float(), None  # in bfloat16 distant positions would be equal
        if normalise:
            turned, scale = normalised(turned)
        if rotation is not None:
            turned = turn(turned, rotation)
        ctx.save_for_backward(rotation, turned if normalise else None, scale)
        query, key = turned.to(x.dtype).unbind(2)
        return query, key, x[:, :, 2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rotation, turned, scale = ctx.saved_tensors
        result = torch.stack(gradients, dim=2)
        part = result[:, :, :2].float()  # in float32 it is the same memory, which changes in place
        if scale is not None:
            _norm_gradient(part, turned, scale, out=part)  # turned vectors have the same products
        if rotation is not None:
            pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)))
            pairs.mul_(rotation.conj())
        if result.dtype != torch.float32:
            result[:, :, :2] = part
        return result, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_gate, of_value = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return result


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x over its root mean square, and the factor (..., 1)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = squares.div_(x.shape[-1]).add_(EPSILON).rsqrt_()
    return x * scale, scale


def _norm_gradient(gradient: Tensor, y: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the gradient of x from that of y = x * scale, where the scale follows from x."""
    along = (gradient * y).mean(dim=-1, keepdim=True)
    return torch.addcmul(gradient, y, along, value=-1, out=out).mul_(scale)


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply adjacent pairs, as complex numbers, with the rotations."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


def _turn_real(x: Tensor, rotation: Tensor) -> Tensor:
    """Do the same without complex numbers, which compilers do not fuse."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = torch.view_as_real(rotation).unbind(-1)
    turned = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
