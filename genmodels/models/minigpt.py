"""Mini-GPT: a decoder-only transformer that continues text, token by token.

The plain settings (as in jobs/study.yaml: learned positions, LayerNorm, ReLU, biases, untied head) are GPT-2's
pre-norm block as taught in Karpathy's "Let's build GPT". The defaults are newer settings with better results.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
Rotary positions: Su et al. 2021, https://arxiv.org/abs/2104.09864
QK-norm: Henry et al. 2020, https://arxiv.org/abs/2010.04245
RMSNorm: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.declarations.minigpt import MiniGPTConfig, MiniGPTDeclaration
from genmodels.errors import RequestError
from genmodels.evals.text import IGNORED, evaluate_text
from genmodels.family import (
    EvaluationData,
    EvaluationResult,
    ImageInfo,
    OptimizerConfig,
    Role,
    TextFamily,
    TextInfo,
    slide_window,
)
from genmodels.nn.cuda_graphs import Capture, cuda_graph
from genmodels.nn.fused import normalised, rms_norm, split_heads, swiglu, turn
from genmodels.nn.networks import inference
from genmodels.nn.optim import make_optimizers
from genmodels.nn.sampling import Sampler, SamplingOptions, choose
from genmodels.nn.transfer import to_device
from genmodels.sizing.memory import FLOAT, Footprint, network_bytes
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement

if TYPE_CHECKING:
    from genmodels.family import Batch

ROTARY_BASE = 10_000.0  # wavelengths of the rotary positions: 2 pi to 2 pi * base, in tokens


class MiniGPT(MiniGPTDeclaration, TextFamily[MiniGPTConfig, SamplingOptions]):
    """A mini-GPT over the tokens of one dataset."""

    Request = SamplingOptions
    repeated = "n_layer"

    network: Transformer

    def build_network(self) -> Transformer:
        return Transformer(self.config, self.data.vocab_size)

    @classmethod
    def footprint(
        cls, config: MiniGPTConfig, data: ImageInfo | TextInfo, placement: Placement = DEFAULT_PLACEMENT
    ) -> Footprint:
        assert isinstance(data, TextInfo)
        decoder = MiniGPTDecoder.footprint(config, data.vocab_size, placement)
        return Footprint(network_bytes(cls, config, data, placement.number_bytes), *decoder)

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        loss = NextTokenLoss(self.network)
        outputs = [] if self.network.head is None else [self.network.head]
        return [Role("model", loss, make_optimizers(loss, optimizer, outputs))]

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        with inference(self.network):
            losses = _cross_entropy(self.network(batch["tokens"]), batch["targets"], reduction="none")
        counted = batch["targets"] != IGNORED
        return {"nll": losses.double().sum(), "tokens": counted.sum().double()}

    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return `val_loss` in nats per token, and `val_bits_per_char`: a token is a character."""
        nats = float(sums["nll"] / sums["tokens"])
        return {"val_loss": nats, "val_bits_per_char": nats / math.log(2)}

    def evaluate(self, data: EvaluationData) -> EvaluationResult:
        return evaluate_text(self, data)

    def logits(self, tokens: Tensor) -> Tensor:
        with inference(self.network):
            return self.network(tokens.to(self.network.token_embedding.weight.device)).float()

    def decoder(self, slots: int) -> MiniGPTDecoder:
        return MiniGPTDecoder(self.network, self.block_size, slots)

    def generate(self, prompt: Sequence[int], seed: int, request: SamplingOptions) -> Iterator[int]:
        """Yield tokens by the plain reference: it computes the whole window again for each token.

        Raises:
            RequestError: the prompt is empty.
        """
        if not prompt:
            raise RequestError("prompt is empty; send at least one character to go on from", param="prompt")
        window = list(prompt)
        sampler = Sampler(request, seed, prompt, self.data.vocab_size)
        for _ in range(request.max_tokens):
            window = slide_window(window, self.block_size)
            (token,) = choose(self.logits(torch.tensor([window]))[:, -1], [sampler])
            window.append(token)
            yield token


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, in nats."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        return {"loss": _cross_entropy(self.network(batch["tokens"]), batch["targets"])}


class Transformer(nn.Module):
    """Token ids (n, t) -> logits (n, t, vocab_size)."""

    def __init__(self, config: MiniGPTConfig, vocab_size: int) -> None:
        super().__init__()
        learned = config.positions == "learned"
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = _norm(config)
        self.head = None if config.tied_head else nn.Linear(config.n_embd, vocab_size, bias=config.bias)
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self._initialise(config.n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens)
        rotation = None
        if self.position_embedding is None:
            rotation = rotations(positions, self.head_size)[:, None, None].expand(-1, 2, self.n_head, -1).contiguous()
        else:
            x = x + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x, rotation)
        if self.head is None:
            return project(x, self.norm, self.token_embedding.weight, None)
        return project(x, self.norm, self.head.weight, self.head.bias)

    def _initialise(self, n_layer: int) -> None:
        """Initialise as GPT-2: normal 0.02, with output layers scaled so that the residual stream keeps its size."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention | MLP):
                nn.init.normal_(module.output.weight, std=0.02 / math.sqrt(2 * n_layer))


class Block(nn.Module):
    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        x = x + self.attention(x, self.attention_norm, rotation)
        return x + self.mlp(x, self.mlp_norm)


class Attention(nn.Module):
    """Causal self-attention with n_head heads."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=config.bias)
        self.n_head = config.n_head
        self.qk_norm, self.rotary = config.qk_norm, config.positions == "rotary"
        self.dropout = config.dropout

    def forward(self, x: Tensor, norm: nn.Module, rotation: Tensor | None) -> Tensor:
        projected = project(x, norm, self.query_key_value(), None).unflatten(-1, (3, self.n_head, -1))
        query, key, value = split_heads(projected, rotation, normalise=self.qk_norm)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (n, n_head, t, head_size)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        y = self.output(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)

    def query_key_value(self) -> Tensor:
        """Return the weights of the three projections as those of one, (3 * n_embd, n_embd).

        With rotary positions, the numbers of queries and keys that turn together become neighbours: in both alike, so
        that scores are the same.
        """
        weights = [self.query.weight, self.key.weight, self.value.weight]
        if self.rotary:
            weights[:2] = [neighbours(weight, self.n_head) for weight in weights[:2]]
        return torch.cat(weights)


class MLP(nn.Module):
    """The feed-forward part. The hidden size of SwiGLU is 2/3 of the others', so that it has as many parameters."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        hidden = hidden_size(config)
        self.input = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.gate = nn.Linear(config.n_embd, hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.output = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        if self.gate is None:
            hidden = project(x, norm, self.input.weight, self.input.bias)
            hidden = F.relu(hidden) if self.kind == "relu" else F.gelu(hidden)
        else:
            bias = None if self.gate.bias is None else torch.cat((self.gate.bias, self.input.bias))
            hidden = swiglu(project(x, norm, torch.cat((self.gate.weight, self.input.weight)), bias))
        return F.dropout(self.output(hidden), self.dropout, self.training)


class MiniGPTDecoder:
    """A copy of a network's weights, arranged for decoding, with the keys and values of a fixed number of sequences.

    It computes on the device and in the dtype of the weights; norms, rotations and the residual stream are float32.

    The bits of an answer must not depend on the other requests. A matrix product of another height may round
    differently. So each product with weights has `chunk` rows, or `slots` rows, or a smaller height that gives equal
    bits in a trial when the decoder is made (with MKL the multiples of 4: one sequence then takes 0.7 of the time).

    Attention joins no sequences. It is computed only for the slots up to the last one in use and for positions up to
    the longest sequence, in steps of 32; masked positions add exact zeros. If a trial shows other bits (with MKL: heads
    of 5 to 15 numbers), it is computed for all slots and all positions. It does not use the fused kernel, whose result
    depends on a sequence's place in the batch (seen on CPU with queries of length 1). Padding tokens write to a
    position of their own after the window, which no real token sees.

    On a GPU the shapes are static: heights and lengths double from one to the next, attention has the height of the
    products, and the step of each pair is captured as a CUDA graph.

    Args:
        static: use the static shapes. Default: only on a GPU.
        capture: makes the graph of a function; None: no graphs. Default: `cuda_graph` on a GPU.
    """

    chunk = 32  # tokens of one prefill

    @classmethod
    def footprint(cls, config: MiniGPTConfig, vocab_size: int, placement: Placement) -> tuple[int, int]:
        """Return the bytes that a decoder keeps, and the bytes that a pass needs in addition."""
        width, kept, rows = config.n_embd, _rounded_up(config.block_size + 1), max(placement.rows, cls.chunk)
        hidden, inputs = hidden_size(config), 2 if config.mlp == "swiglu" else 1
        layer = 4 * width**2 + (inputs + 1) * hidden * width + 2 * placement.rows * kept * width  # keys and values
        biases = inputs * hidden + (5 if config.norm == "layer" else 2) * width if config.bias else 0
        head = vocab_size * (width + config.bias)
        tables = vocab_size * width + head
        attention = 3 * rows * config.n_head * kept  # mask, scores, probabilities
        passing = attention + rows * (3 * inputs * hidden + 8 * width + 16 * vocab_size)
        making = 3 * width * max(3 * width, inputs * hidden, vocab_size)  # a matrix, and what it is made from
        working = max(passing, making)
        rotations = FLOAT * kept * width // config.n_head
        positions = placement.number_bytes * kept * width if config.positions == "learned" else rotations
        return placement.number_bytes * (tables + config.n_layer * (layer + biases)) + positions, FLOAT * working

    @torch.inference_mode()
    def __init__(
        self,
        network: Transformer,
        block_size: int,
        slots: int,
        *,
        static: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        embedding, head = network.token_embedding.weight, network.head
        device, kept = embedding.device, _rounded_up(block_size + 1)
        self._padding, self._device, self._slots = block_size, device, slots
        self._n_head = cast(Block, network.blocks[0]).attention.n_head
        self._embedding = embedding.clone()
        self._positions, self._rotations = None, None
        if network.position_embedding is None:
            self._rotations = rotations(torch.arange(kept, device=device), network.head_size)[:, None, None]
        else:
            self._positions = F.pad(network.position_embedding.weight, (0, 0, 0, kept - block_size))
        self._layers = [_DecoderLayer(cast(Block, block), slots, kept) for block in network.blocks]
        self._head = _Projection(
            network.norm, embedding if head is None else head.weight, None if head is None else head.bias
        )
        on_gpu = device.type == "cuda"
        self._choose_shapes(kept, static=on_gpu if static is None else static)
        self._replays: dict[tuple[int, _Attended], Callable[[Tensor], Tensor]] = {}
        if capture or on_gpu:
            self._replays = self._captured(capture or cuda_graph)

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read 1 to `chunk` tokens of one sequence, the first at position `start`; return logits (n, vocab_size)."""
        if start == 0:
            self._forget(slot)
        missing, end = self.chunk - len(tokens), start + len(tokens)
        positions = [*range(start, end), *[self._padding] * missing]
        attended = _Attended(slot, 1, self.chunk, _at_least(end, self._prefill_lengths))
        return self._run([*tokens, *[0] * missing], positions, attended)[: len(tokens)]

    def step(self, tokens: Sequence[int | None], positions: Sequence[int]) -> Tensor:
        """Read one token of each slot, None for an unused slot; return logits (slots, vocab_size).

        The rows of unused slots have no meaning.
        """
        used = [slot for slot, token in enumerate(tokens) if token is not None]
        for slot in used:
            if positions[slot] == 0:
                self._forget(slot)
        places = [self._padding if token is None else at for token, at in zip(tokens, positions, strict=True)]
        length = _at_least(max(positions[slot] for slot in used) + 1, self._lengths)
        attended = _Attended(0, _at_least(used[-1] + 1, self._counts), 1, length)
        height = _at_least(used[-1] + 1, self._heights)
        logits = self._run([token or 0 for token in tokens[:height]], places[:height], attended)
        return F.pad(logits, (0, 0, 0, self._slots - height))

    def _choose_shapes(self, kept: int, *, static: bool) -> None:
        """Choose the heights of a step, and the numbers of slots and positions of its attention, by trials."""
        slots = self._slots
        self._prefill_lengths = _doubled(32, kept) if static else range(32, kept + 1, 32)
        self._lengths: Sequence[int] = self._prefill_lengths
        self._counts: Sequence[int] = _doubled(4, slots) if static else range(1, slots + 1)
        lengths = self._lengths if static else _lengths(kept)
        counts = self._counts if static else sorted({1, min(2, slots), min(3, slots), slots})
        if not self._layers[0].has_equal_attention(counts, lengths):
            self._lengths, self._counts, self._heights = [kept], [slots], [slots]
            return
        self._heights = self._equal_heights(self._counts if static else range(4, slots, 4))
        if static:
            self._counts = self._heights

    def _equal_heights(self, heights: Sequence[int]) -> list[int]:
        """Return, ascending, the heights with which a step gives the same bits as with all rows, and `slots`.

        They are determined by trial, because they depend on the matrix library.
        """
        slots = self._slots
        tokens = [token % len(self._embedding) for token in range(slots)]

        def logits(height: int) -> Tensor:
            attended = _Attended(0, height, 1, self._lengths[0])
            return self._run(tokens[:height], [0] * height, attended)

        self._replays = {}
        full = logits(slots)
        return [*(height for height in heights if height < slots and torch.equal(logits(height), full[:height])), slots]

    def _captured(self, capture: Capture) -> dict[tuple[int, _Attended], Callable[[Tensor], Tensor]]:
        """Capture the step of each static shape, once, before the first request."""
        replays = {}
        for height, length in itertools.product(self._heights, self._lengths):
            attended = _Attended(0, height, 1, length)
            tokens = torch.arange(height).remainder(len(self._embedding))
            example = torch.stack((tokens, torch.full((height,), min(length, self._padding) - 1)))
            step = partial(self._logits, attended=attended)
            replays[height, attended] = capture(step, to_device(example, self._device))
        for slot in range(self._slots):
            self._forget(slot)
        return replays

    @torch.inference_mode()
    def _forget(self, slot: int) -> None:
        for layer in self._layers:
            layer.forget(slot)

    @torch.inference_mode()
    def _run(self, tokens: list[int], positions: list[int], attended: _Attended) -> Tensor:
        """Return the logits after each token: (rows, vocab_size)."""
        inputs = to_device(torch.tensor([tokens, positions]), self._device)
        replay = self._replays.get((len(tokens), attended))
        return replay(inputs) if replay else self._logits(inputs, attended)

    def _logits(self, inputs: Tensor, attended: _Attended) -> Tensor:
        """Compute the logits after each token from tokens and positions: (2, rows) -> (rows, vocab_size), float32."""
        ids, places = inputs
        x, rotation = _cast(self._embedding[ids], torch.float32), None
        if self._rotations is not None:
            rotation = self._rotations[places]
        elif self._positions is not None:
            x = x + self._positions[places]
        places = places[: attended.count * attended.t]
        mask = _mask(places, attended, self._n_head, self._embedding.dtype)
        for layer in self._layers:
            x = layer.forward(x, rotation, places, mask, attended)
        return _cast(self._head(x), torch.float32)


@dataclass(frozen=True)
class _Attended:
    """The slots of the new tokens, and the positions that they see."""

    first: int  # slot
    count: int  # slots
    t: int  # new tokens of each
    length: int  # positions


class _DecoderLayer:
    """One block, with its keys and values of all sequences."""

    def __init__(self, block: Block, slots: int, kept: int) -> None:
        attention, mlp = block.attention, block.mlp
        weights = attention.query_key_value().unflatten(0, (3, attention.n_head, -1)).transpose(0, 1)
        self._shape = weights.shape[:3]  # n_head, 3, head_size
        self._query_key_value = _Projection(block.attention_norm, weights.flatten(0, 2), None)
        self._qk_norm, self._output = attention.qk_norm, _Linear(attention.output.weight, attention.output.bias)
        inputs = [mlp.input] if mlp.gate is None else [mlp.gate, mlp.input]
        biases: list[Tensor] = [linear.bias for linear in inputs if linear.bias is not None]
        self._hidden = _Projection(
            block.mlp_norm, torch.cat([linear.weight for linear in inputs]), torch.cat(biases) if biases else None
        )
        self._kind, self._down = mlp.kind, _Linear(mlp.output.weight, mlp.output.bias)
        n_head, _, head_size = self._shape
        self._kept = weights.new_zeros(slots, n_head, 2, kept, head_size)  # each sequence's keys lie together

    def forget(self, slot: int) -> None:
        """Clear a slot for another sequence: a number that is not finite would spoil it even if it is masked."""
        self._kept[slot] = 0

    def forward(self, x: Tensor, rotation: Tensor | None, places: Tensor, mask: Tensor, attended: _Attended) -> Tensor:
        """Compute (rows, n_embd) -> (rows, n_embd). The rows after those of the attended slots are padding."""
        x = x + self._output(self._attend(self._query_key_value(x), rotation, places, mask, attended))
        return x + self._down(_activate(self._hidden(x), self._kind))

    def _attend(
        self, projected: Tensor, rotation: Tensor | None, places: Tensor, mask: Tensor, attended: _Attended
    ) -> Tensor:
        n_head, _, head_size = self._shape
        projected = projected.unflatten(-1, self._shape)  # (rows, n_head, 3, head_size)
        turned = _cast(projected[:, :, :2], torch.float32)
        if self._qk_norm:
            turned, _ = normalised(turned)
        if rotation is not None:
            turned = turn(turned, rotation)
        if self._qk_norm or rotation is not None:
            projected[:, :, :2] = turned
        count, t, length, rows = attended.count, attended.t, attended.length, len(places)
        new = projected[:rows].view(count, t, *projected.shape[1:])
        sequences = self._kept[attended.first : attended.first + count]
        owners = torch.arange(count, device=places.device)[:, None]
        sequences[owners, :, :, places.view(count, t)] = new[:, :, :, 1:]
        keys, values = sequences[:, :, :, :length].flatten(0, 1).unbind(1)
        query = new[:, :, :, 0].transpose(1, 2).reshape(count * n_head, t, head_size)
        attention = _weigh(query, keys, values, mask).view(count, n_head, t, head_size)
        return F.pad(attention.transpose(1, 2).reshape(rows, -1), (0, 0, 0, len(projected) - rows))

    @torch.inference_mode()
    def has_equal_attention(self, counts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Try whether a token's attention is the same to the bit, however many slots and masked positions it covers.

        Args:
            counts: of slots, ascending.
            lengths: ascending.
        """
        _, n_head, _, _, head_size = self._kept.shape
        fill = torch.arange(head_size * lengths[-1] * 2, device=self._kept.device, dtype=torch.float32)
        self._kept[:] = 0
        self._kept[:, :, :, : lengths[-1]] = fill.mul_(0.7).sin_().view(lengths[-1], 2, head_size).transpose(0, 1)

        def attend(count: int, length: int, visible: int) -> Tensor:
            places = torch.full((count,), visible - 1, device=self._kept.device)
            mask = _mask(places, _Attended(0, count, 1, length), n_head, self._kept.dtype)
            keys, values = self._kept[:count, :, :, :length].flatten(0, 1).unbind(1)
            query = self._kept[:count, :, 0, 0].reshape(count * n_head, 1, head_size)
            return _weigh(query, keys, values, mask).view(count, n_head, head_size)

        def is_equal(shortest: int, visible: int) -> bool:
            alone = attend(counts[0], shortest, visible)[:1]
            shapes = [(count, length) for count in counts for length in lengths if length >= shortest]
            return all(torch.equal(attend(*shape, visible), alone.expand(shape[0], -1, -1)) for shape in shapes)

        equal = all(is_equal(shortest, visible) for shortest in lengths for visible in {1, shortest - 1, shortest})
        self._kept.zero_()
        return equal


def _weigh(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Compute the attention of queries (n, t, head_size) to (n, length, head_size): (n, t, head_size)."""
    scores = torch.baddbmm(mask, query, keys.mT, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), values)


def _mask(places: Tensor, attended: _Attended, n_head: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores, (count * n_head, t, length): a token sees its own and earlier positions."""
    later = torch.arange(attended.length, device=places.device) > places[:, None]
    mask = torch.zeros(later.shape, device=places.device, dtype=dtype).masked_fill_(later, -torch.inf)
    mask = mask.view(attended.count, 1, attended.t, attended.length).expand(-1, n_head, -1, -1)
    return mask.reshape(-1, attended.t, attended.length)


class _Linear:
    """A copy of a linear layer, without a module's cost."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight.clone(), None if bias is None else bias.clone()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(_cast(x, self.weight.dtype), self.weight, self._bias)


class _Projection(_Linear):
    """A norm and the linear layer after it; the layer contains the norm's weights."""

    def __init__(self, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        self._eps = norm.eps if isinstance(norm, nn.LayerNorm) else None  # None: an RMS norm
        dtype, weight = weight.dtype, weight.float()  # the product is rounded once
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            shift = weight @ norm.bias.float()
            bias = shift if bias is None else bias + shift
        super().__init__((weight * norm.weight).to(dtype), None if bias is None else bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        normal = normalised(x)[0] if self._eps is None else F.layer_norm(x, x.shape[-1:], eps=self._eps)
        return super().__call__(normal)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype; in that dtype already, without the cost of a call into torch."""
    return x if x.dtype == dtype else x.to(dtype)


def _activate(hidden: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.relu(hidden) if kind == "relu" else F.gelu(hidden)


def hidden_size(config: MiniGPTConfig) -> int:
    """Return the hidden size of the feed-forward part."""
    return 4 * config.n_embd if config.mlp != "swiglu" else -(-8 * config.n_embd // 24) * 8


def _rounded_up(length: int) -> int:
    """Round up to a multiple of 32: attention over such lengths gives equal bits, over other lengths it does not."""
    return -(-length // 32) * 32


def _doubled(first: int, last: int) -> list[int]:
    """Return first, 2 * first, 4 * first, ... up to `last`, which is included."""
    sizes = [last]
    while first < last:
        sizes.insert(-1, first)
        first *= 2
    return sizes


def _at_least(wanted: int, sizes: Sequence[int]) -> int:
    """Return the smallest of ascending sizes that is not below `wanted`."""
    return sizes[bisect.bisect_left(sizes, wanted)]


def _lengths(kept: int) -> list[int]:
    """Return lengths of attention to try: short ones, where matrix libraries change their kernels, and the longest."""
    return [*(length for length in (32, 64, 96, 160, 256) if length < kept), kept]


def project(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a norm and the linear layer after it: (..., n_embd) -> (..., rows of the weights)."""
    if isinstance(norm, nn.RMSNorm):  # its gains go to the weights, which are smaller than the activations
        return F.linear(rms_norm(x), weight * norm.weight, bias)
    return F.linear(norm(x), weight, bias)


def rotations(positions: Tensor, head_size: int) -> Tensor:
    """Return the rotations of rotary positions as complex numbers: (..., t) -> (..., t, head_size / 2)."""
    exponents = torch.arange(head_size // 2, device=positions.device, dtype=torch.float32) / (head_size // 2)
    angles = positions.float()[..., None] * ROTARY_BASE**-exponents
    return torch.polar(torch.ones_like(angles), angles)


def neighbours(weight: Tensor, n_head: int) -> Tensor:
    """Order the rows of each head of a projection so that numbers i and i + head_size / 2 become neighbours."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the loss in nats: the mean over targets that are not `IGNORED`, or each one (n * t,)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def _norm(config: MiniGPTConfig) -> nn.Module:
    return nn.RMSNorm(config.n_embd) if config.norm == "rms" else nn.LayerNorm(config.n_embd, bias=config.bias)
