"""The settings of the mini-GPT: see `genmodels.models.minigpt`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from genmodels.family import Declaration, TextInfo
from genmodels.schema.base import Section


class MiniGPTConfig(Section):
    """The `model` section. The defaults are modern; jobs/study.yaml has the plain settings."""

    n_layer: int = Field(4, ge=1, le=128, description="transformer blocks")
    n_head: int = Field(4, ge=1, le=256, description="attention heads of each block")
    positions: Literal["learned", "rotary"] = Field("rotary", description="position encoding")
    n_embd: int = Field(  # after those it is checked against
        128, ge=1, le=16_384, description="width of the embeddings; a multiple of n_head"
    )
    block_size: int = Field(128, ge=2, le=65_536, description="the longest context, in tokens")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of activations set to zero in training")
    norm: Literal["layer", "rms"] = Field("rms", description="LayerNorm or RMSNorm")
    mlp: Literal["relu", "gelu", "swiglu"] = Field("swiglu", description="activation of the feed-forward layers")
    qk_norm: bool = Field(True, description="normalise queries and keys, so that attention scores stay bounded")
    tied_head: bool = Field(False, description="the output layer shares the weights of the token embedding")
    bias: bool = Field(False, description="use biases in norms and in all projections except queries, keys and values")

    @field_validator("n_embd")
    @classmethod
    def _heads_share_the_width(cls, n_embd: int, info: ValidationInfo) -> int:
        n_head = info.data.get("n_head")
        if n_head is None:  # it is invalid itself, and has its own error
            return n_embd
        rotary = info.data.get("positions") == "rotary"
        unit = 2 * n_head if rotary else n_head
        if n_embd % unit == 0:
            return n_embd
        need = f"a multiple of n_head ({n_head})" + (" whose heads have an even size, for rotary positions" * rotary)
        near = [size for size in (n_embd // unit * unit, (n_embd // unit + 1) * unit) if size]
        raise ValueError(f"got {n_embd}, expected {need}; write {' or '.join(map(str, near))}")


class MiniGPTDeclaration(Declaration):
    """A mini-GPT over the tokens of one dataset."""

    Config = MiniGPTConfig
    kind = "text"
    metric_names = ("val_loss", "val_bits_per_char")
    evaluation_names = (
        "loss",
        "second_half_loss",
        "bits_per_token",
        "nats_below_bigrams",
        "nats_below_4grams",
        "longest_copied",
        "repetition",
    )
    known_to_fit = MiniGPTConfig(n_layer=8, n_head=16, n_embd=512, block_size=1024), TextInfo(vocab_size=1024)
