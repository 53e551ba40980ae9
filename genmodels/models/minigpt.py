"""Mini-GPT: a decoder-only transformer that continues text, token by token.

The plain settings (as in jobs/study.yaml: learned positions, LayerNorm, ReLU, biases, untied head) are GPT-2's
pre-norm block as taught in Karpathy's "Let's build GPT". The defaults are what has proved better since.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
Rotary positions: Su et al. 2021, https://arxiv.org/abs/2104.09864
QK-norm: Henry et al. 2020, https://arxiv.org/abs/2010.04245
RMSNorm: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from genmodels.errors import RequestError, SpecError
from genmodels.family import ImageInfo, OptimizerConfig, Role, Section, TextFamily, TextInfo, keep_half
from genmodels.networks import inference
from genmodels.optim import make_optimizers
from genmodels.sampling import Sampler, SamplingOptions, choose

if TYPE_CHECKING:
    from genmodels.family import Batch

ROTARY_BASE = 10_000.0  # wavelengths of the rotary positions: 2 pi to 2 pi * base, in tokens


class MiniGPTConfig(Section):
    """The `model` section. The defaults are modern; jobs/study.yaml spells out the plain settings."""

    n_layer: int = Field(4, ge=1, le=128)
    n_head: int = Field(4, ge=1, le=256)
    positions: Literal["learned", "rotary"] = "rotary"
    n_embd: int = Field(128, ge=1, le=16_384)  # after those it is checked against
    block_size: int = Field(128, ge=2, le=65_536, description="the longest context, in tokens")
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: Literal["layer", "rms"] = "rms"
    mlp: Literal["relu", "gelu", "swiglu"] = "swiglu"
    qk_norm: bool = Field(True, description="normalise queries and keys, which keeps attention scores bounded")
    tied_head: bool = Field(False, description="the head uses the token embedding's weights")
    bias: bool = Field(False, description="biases in norms and in all projections except queries, keys and values")

    @field_validator("n_embd")
    @classmethod
    def _heads_share_the_width(cls, n_embd: int, info: ValidationInfo) -> int:
        n_head = info.data.get("n_head")
        if n_head is None:  # wrong itself, and reported as such
            return n_embd
        rotary = info.data.get("positions") == "rotary"
        unit = 2 * n_head if rotary else n_head
        if n_embd % unit == 0:
            return n_embd
        need = f"a multiple of n_head ({n_head})" + (" whose heads have an even size, for rotary positions" * rotary)
        near = [size for size in (n_embd // unit * unit, (n_embd // unit + 1) * unit) if size]
        raise ValueError(f"got {n_embd}, expected {need}; write {' or '.join(map(str, near))}")


class MiniGPT(TextFamily[MiniGPTConfig, SamplingOptions]):
    """A mini-GPT over the tokens of one dataset."""

    Config = MiniGPTConfig
    Request = SamplingOptions
    metric_names = ("val_loss", "val_bits_per_char")

    network: Transformer

    @classmethod
    def check(cls, config: MiniGPTConfig, data: ImageInfo | TextInfo) -> None:
        if not isinstance(data, TextInfo):
            raise SpecError(f"model.family: minigpt learns from text, but data.dataset holds {data.kind}s; name a text")

    def __init__(self, config: MiniGPTConfig, data: ImageInfo | TextInfo) -> None:
        self.check(config, data)
        assert isinstance(data, TextInfo)
        self.config = config
        self.data = data
        self.network = Transformer(config, data.vocab_size)

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        loss = NextTokenLoss(self.network)
        outputs = [] if self.network.head is None else [self.network.head]
        return [Role("model", loss, make_optimizers(loss, optimizer, outputs))]

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        with inference(self.network):
            losses = _cross_entropy(self.network(batch["tokens"]), batch["targets"], reduction="none")
        counted = batch["targets"] != IGNORED
        return {"nll": losses.double().sum(), "tokens": counted.sum().double()}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`val_loss` in nats per token; `val_bits_per_char`, as a token is a character."""
        nats = float(sums["nll"] / sums["tokens"])
        return {"val_loss": nats, "val_bits_per_char": nats / math.log(2)}

    def logits(self, tokens: Tensor) -> Tensor:
        with inference(self.network):
            return self.network(tokens.to(self.network.token_embedding.weight.device)).float()

    def decoder(self, slots: int) -> MiniGPTDecoder:
        return MiniGPTDecoder(self.network, self.block_size, slots)

    def generate(self, prompt: Sequence[int], seed: int, request: SamplingOptions) -> Iterator[int]:
        """The plain reference: the whole window anew for each token, one sequence at a time.

        Raises:
            RequestError: the prompt is empty.
        """
        if not prompt:
            raise RequestError("prompt is empty; send at least one character to go on from", param="prompt")
        window = list(prompt)
        sampler = Sampler(request, seed, prompt, self.data.vocab_size)
        for _ in range(request.max_tokens):
            window = keep_half(window, self.block_size)
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
        self.head_size = config.n_embd // config.n_head
        self._initialise(config.n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens)
        rotation = None
        if self.position_embedding is None:
            rotation = rotations(positions, self.head_size)
        else:
            x = x + self.position_embedding(positions)
        return self._logits(x, rotation, [None] * len(self.blocks), None)

    def decode(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerCache], visible: Tensor) -> Tensor:
        """Logits after tokens that follow what the layers keep of earlier ones: (n, t) -> (n, t, vocab_size).

        Args:
            positions: (n, t); where each token stands in its sequence.
            layers: one for each block, of the same n sequences.
            visible: (n, 1, t, kept); which of the kept positions each token sees.
        """
        x, rotation = self.token_embedding(tokens), None
        if self.position_embedding is None:
            rotation = rotations(positions, self.head_size).unsqueeze(2)  # the same for each head
        else:
            x = x + self.position_embedding(positions.clamp_max(self.position_embedding.num_embeddings - 1))
        return self._logits(x, rotation, layers, visible)

    def _logits(
        self, x: Tensor, rotation: Tensor | None, layers: Sequence[LayerCache | None], visible: Tensor | None
    ) -> Tensor:
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rotation, layer, visible)
        x = self.norm(x)
        return F.linear(x, self.token_embedding.weight) if self.head is None else self.head(x)

    def _initialise(self, n_layer: int) -> None:
        """As in GPT-2: normal 0.02; what layers add to the residual stream is scaled so that the sum keeps its size."""
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

    def forward(
        self, x: Tensor, rotation: Tensor | None, layer: LayerCache | None, visible: Tensor | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, layer, visible)
        return x + self.mlp(self.mlp_norm(x))


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
        self.qk_norm = config.qk_norm
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rotation: Tensor | None, layer: LayerCache | None, visible: Tensor | None
    ) -> Tensor:
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        if self.qk_norm:
            query, key = (F.rms_norm(part, part.shape[-1:]) for part in (query, key))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if layer is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        else:
            y = _attend(query, *layer.keep(key, value), visible)
        y = self.output(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)

    def _heads(self, x: Tensor) -> Tensor:
        """(n, t, n_embd) -> (n, n_head, t, head_size)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    """The feed-forward part; SwiGLU's hidden size is 2/3 of the others', which makes the parameters equal."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        hidden = 4 * config.n_embd if config.mlp != "swiglu" else -(-8 * config.n_embd // 24) * 8
        self.input = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.gate = nn.Linear(config.n_embd, hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.output = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.input(x)
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * hidden
        else:
            hidden = F.relu(hidden) if self.kind == "relu" else F.gelu(hidden)
        return F.dropout(self.output(hidden), self.dropout, self.training)


def _attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Attention written out. The fused kernel's result for a sequence depends on its place in the batch (seen on CPU
    with queries of length 1), so that an answer would depend on which slot its sequence got."""
    scores = query @ keys.mT / math.sqrt(query.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ values


@dataclass(frozen=True)
class LayerCache:
    """Keys and values that one block has computed for n sequences, each (n, n_head, kept, head_size)."""

    keys: Tensor
    values: Tensor
    places: tuple[Tensor, Tensor]  # (n, 1) and (n, t): row and position of each token that comes now

    def keep(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of new tokens, (n, n_head, t, head_size); all there are now."""
        rows, positions = self.places
        self.keys[rows, :, positions] = key.transpose(1, 2)
        self.values[rows, :, positions] = value.transpose(1, 2)
        return self.keys, self.values


class MiniGPTDecoder:
    """Keys and values of a fixed number of sequences.

    All shapes are fixed: a matrix product of another height rounds differently, and an answer must not depend on who
    else asks. Tokens that pad a shape write to a position of their own behind the window, which no real token sees.
    """

    chunk = 32  # tokens of one prefill

    def __init__(self, network: Transformer, block_size: int, slots: int) -> None:
        self._network, self._padding = network, block_size
        weight = network.token_embedding.weight
        n_head = weight.shape[1] // network.head_size
        kept = -(-(block_size + 1) // 32) * 32  # whole vectors, whose products are faster
        shape = (len(network.blocks), 2, slots, n_head, kept, network.head_size)
        self._kept = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self._order = torch.arange(kept, device=weight.device)

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read up to `chunk` tokens of one sequence, the first at position `start`: logits after the last, (vocab,)."""
        missing = self.chunk - len(tokens)
        ids = torch.tensor([[*tokens, *[0] * missing]])
        positions = torch.tensor([[*range(start, start + len(tokens)), *[self._padding] * missing]])
        return self._run(slice(slot, slot + 1), ids, positions)[0, len(tokens) - 1]

    def step(self, tokens: Sequence[int | None], positions: Sequence[int]) -> Tensor:
        """The next token of each slot, None where there is none: logits (slots, vocab_size), rows of None are void."""
        ids = torch.tensor([[token or 0] for token in tokens])
        places = torch.tensor(
            [[self._padding if token is None else at] for token, at in zip(tokens, positions, strict=True)]
        )
        return self._run(slice(None), ids, places)[:, 0]

    def _run(self, slots: slice, tokens: Tensor, positions: Tensor) -> Tensor:
        tokens, positions = tokens.to(self._order.device), positions.to(self._order.device)
        rows = self._order[: len(tokens), None]
        layers = [LayerCache(*layer[:, slots].unbind(0), (rows, positions)) for layer in self._kept]
        visible = self._order <= positions[:, None, :, None]
        with inference(self._network):
            return self._network.decode(tokens, positions, layers, visible).float().cpu()


def rotations(positions: Tensor, head_size: int) -> Tensor:
    """The angles' cosines and sines for rotary positions, float32: (..., t) -> (2, ..., t, head_size / 2)."""
    exponents = torch.arange(head_size // 2, device=positions.device, dtype=torch.float32) / (head_size // 2)
    angles = positions.float()[..., None] * ROTARY_BASE**-exponents
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (i, i + head_size / 2) of (..., t, head_size) by its angle, so that scores see distances only."""
    cosine, sine = rotation
    first, second = x.float().chunk(2, dim=-1)  # in bf16 far positions would fall together
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1).to(x.dtype)


IGNORED = -1  # a target that does not count: padding of a text's last window


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats; over the mean of all that count, or each by itself (n * t,)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def _norm(config: MiniGPTConfig) -> nn.Module:
    return nn.RMSNorm(config.n_embd) if config.norm == "rms" else nn.LayerNorm(config.n_embd, bias=config.bias)
