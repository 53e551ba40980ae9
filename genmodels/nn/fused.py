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


def rotate(x: Tensor, rotation: Tensor, *, normalise: bool) -> Tensor:
    """Turn adjacent pairs of numbers by the angles of their positions, after an RMS norm over the last dimension.

    Args:
        x: (..., 2 * n).
        rotation: complex numbers of modulus 1, of a shape that expands to (..., n).
        normalise: False leaves out the norm.
    """
    if torch.compiler.is_compiling():
        return _turn_real(rms_norm(x) if normalise else x, rotation)
    return _Rotate.apply(x, rotation, normalise)


def swiglu(x: Tensor) -> Tensor:
    """Compute silu(gate) * value (Shazeer 2020) of gates and values side by side: (..., 2 * n) -> (..., n)."""
    if torch.compiler.is_compiling():
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    return _SwiGLU.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, scale = _normalised(x.float())
        ctx.save_for_backward(y, scale)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return _norm_gradient(gradient.float(), y, scale).to(gradient.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, normalise: bool) -> Tensor:
        y, scale = _normalised(x.float()) if normalise else (x.float(), None)
        y = _turn(y, rotation)  # in bfloat16 distant positions would be equal
        if normalise:
            ctx.save_for_backward(rotation, y, scale)
        else:
            ctx.save_for_backward(rotation)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rotation, *normalised = ctx.saved_tensors
        result = gradient.float()
        if normalised:
            result = _norm_gradient(result, *normalised)  # turned vectors have the same products
        return _turn(result, rotation.conj()).to(gradient.dtype), None, None


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


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x over its root mean square, and the factor (..., 1)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = squares.div_(x.shape[-1]).add_(EPSILON).rsqrt_()
    return x * scale, scale


def _norm_gradient(gradient: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of x from that of y = x * scale, where the scale follows from x."""
    along = (gradient * y).mean(dim=-1, keepdim=True)
    return torch.addcmul(gradient, y, along, value=-1).mul_(scale)


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply adjacent pairs, as complex numbers, with the rotations."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


def _turn_real(x: Tensor, rotation: Tensor) -> Tensor:
    """Do the same without complex numbers, which compilers do not fuse."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = torch.view_as_real(rotation).unbind(-1)
    turned = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
