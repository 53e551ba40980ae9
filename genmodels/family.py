"""The contract of a model family.

A family is one file under `genmodels/models/`: it subclasses `ImageFamily` or `TextFamily`, and the spec, the training
loop, checkpoints and serving pick it up from there. One instance is one model: its networks, how they are trained
(`roles`), how they are judged while they learn (`measure`, `metrics`) and afterwards (`evaluate`), and how they answer
(`sample_latents`, `decode`, `logits`, ...).

Importing this module does not load torch, so that specs can be checked quickly.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from genmodels.errors import SpecError
from genmodels.schema.base import Section
from genmodels.sizing.memory import Footprint, network_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

Batch: TypeAlias = Mapping[str, "Tensor"]
Interpolation = Literal["linear", "spherical"]
PREVIEW_TOKENS = 200


class ImageInfo(Section):
    """What a family must know of an image dataset to build its networks."""

    kind: Literal["image"] = "image"
    channels: int = Field(ge=1, le=1024)
    height: int = Field(ge=1, le=16_384)
    width: int = Field(ge=1, le=16_384)
    num_classes: int | None = Field(None, ge=0, le=65_536)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return self.channels, self.height, self.width


class TextInfo(Section):
    """What a family must know of a text dataset to build its networks."""

    kind: Literal["text"] = "text"
    vocab_size: int = Field(ge=1, le=2**21)  # there are fewer characters


DataInfo = Annotated[ImageInfo | TextInfo, Field(discriminator="kind")]


class OptimizerConfig(Section):
    """The optimizer's part of a spec's `train` section."""

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices, AdamW for all other parameters"
    )
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate of AdamW")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.99), strict=False, description="decay rates of AdamW's two moving averages"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    muon_learning_rate: float = Field(
        0.02, gt=0, description="highest learning rate of the matrices when optimizer is muon"
    )


@dataclass(frozen=True)
class Role:
    """One player of training: what it minimises and with which optimizers.

    `loss` is a module whose parameters are exactly what this role trains. The training loop wraps it in
    DistributedDataParallel and calls it as `loss(batch, progress)`, where `progress` is a 0-dim float tensor
    (samples seen / samples in all, 0 to 1). It returns a dict of 0-dim tensors: `loss` is minimised, the rest is
    logged by name. The global RNG is seeded by (seed, step, rank) before the call, so it may use it freely.
    Networks of other roles that a loss only looks through must not be registered as its submodules, and must not
    collect gradients (`requires_grad_(False)` during the forward pass).
    """

    name: str
    loss: nn.Module
    optimizers: Sequence[Optimizer]
    compilable: bool = True  # False where the loss differentiates a gradient: torch.compile has no double backward


@dataclass(frozen=True)
class EvaluationData:
    """What a trained model is evaluated with.

    `train` and `val` are the whole of each split as it is stored: of pictures `images`, uint8 (n, C, H, W), and
    `labels`, int64 (n,), where there are classes; of texts `tokens`, unsigned integers (n,).
    """

    train: Mapping[str, np.ndarray]
    val: Mapping[str, np.ndarray]
    digest: str  # of the dataset
    thorough: bool  # take minutes: all of val, many samples; False: seconds, as at each publication
    report_progress: Callable[[], None]  # to be called every few seconds: what does not tick is taken for a hang
    # What depends on the data alone and takes its time (a judge's weights, a count table): kept under a name that says
    # all it depends on, made at most once in a storage. `cached(name, make)` gives the result of `make`.
    cached: Callable[[str, Callable[[], bytes]], bytes]


class EvaluationMetric(BaseModel):
    """A figure, and the same figure of what it is to be compared with."""

    model_config = ConfigDict(frozen=True)

    value: float
    unit: str = ""  # nats, dB; nothing for shares, ratios and counts
    baselines: dict[str, float] = Field(default_factory=dict)  # by what it is of: {"PCA, 32 components": 19.2}


Note = str | int | float | list[float] | list[str]


class EvaluationResult(BaseModel):
    """What an evaluation found."""

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, EvaluationMetric] = Field(default_factory=dict)  # of `evaluation_names`, those that apply
    notes: dict[str, Note] = Field(default_factory=dict)  # without which they mean nothing: how many, which judge


ConfigT = TypeVar("ConfigT", bound=Section)
RequestT = TypeVar("RequestT", bound=Section)


class Family(ABC, Generic[ConfigT, RequestT]):
    """One model. `network` is what is served, averaged (EMA) and written to `model.safetensors`."""

    Config: ClassVar[type[Section]]
    Request: ClassVar[type[Section]]  # options of a generation request that only this family knows
    metric_names: ClassVar[tuple[str, ...]]  # what `metrics` returns; a gate may name any of them
    evaluation_names: ClassVar[tuple[str, ...]] = ()  # what `evaluate` may find; a gate may name any of these as well
    tracked_metrics: ClassVar[tuple[str, ...]] = ()  # columns of training's rows whose course an evaluation shows
    kind: ClassVar[str]  # "image" or "text": which datasets it learns from
    unit: ClassVar[str]  # "images" or "tokens": what training counts
    repeated: ClassVar[str | None] = (
        None  # field of Config with a number of equal blocks: see `genmodels.preflight.parameters`
    )

    config: ConfigT
    data: ImageInfo | TextInfo
    network: nn.Module

    @classmethod
    def family_name(cls) -> str:
        """The name used in specs: that of the file the family lives in."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def check_kind(cls, data: ImageInfo | TextInfo) -> None:
        """Raise SpecError if this family does not learn from data of this kind."""
        if data.kind != cls.kind:
            raise SpecError(
                f"data: {cls.family_name()} learns from {cls.kind}s, but this dataset has {data.kind}s; choose another"
            )

    @classmethod
    def check(cls, config: ConfigT, data: ImageInfo | TextInfo) -> None:
        """Raise SpecError (naming `model.<field>`) if this config cannot work on data of this kind and shape."""
        cls.check_kind(data)

    def __init__(self, config: ConfigT, data: ImageInfo | TextInfo) -> None:
        """Build the networks on the CPU, initialised from the global RNG.

        Raises:
            SpecError: see `check`.
        """
        self.check(config, data)
        self.config, self.data = config, data
        self.network = self.build_network()

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Return the served network for `config` and `data`."""

    @property
    def sequence_length(self) -> int | None:
        """Tokens in one training example; None where an example is one image."""
        return None

    @classmethod
    def footprint(cls, config: ConfigT, data: ImageInfo | TextInfo) -> Footprint:
        """Compute the memory that such a model takes where it is served, without building it.

        Default: that of its networks; a family says what it takes beside them.
        """
        return Footprint(network_bytes(cls, config, data))

    def to(self, device: torch.device) -> None:
        """Move every network, in place."""
        from torch import nn

        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)

    @abstractmethod
    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        """The players, in the order they take their step. Called once, after the networks are on their device."""

    @abstractmethod
    def preview(self, examples: Batch, seed: int) -> dict[str, Tensor]:
        """Return outputs to look at during training, by name.

        Args:
            examples: validation examples; the same ones each time.

        Returns:
            Images (n, C, H, W) in [0, 1], or token ids (n,); `Dataset.preview_file` turns each into a file.
        """

    @abstractmethod
    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over one validation batch, float64, of any fixed shape: the loop adds them over batches and ranks."""

    @abstractmethod
    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The `val_*` figures from the sums over the whole validation set; exactly those in `metric_names`."""

    def evaluate(self, data: EvaluationData) -> EvaluationResult:
        """Measure the trained model as its researchers would: before it is published, and whenever somebody asks.

        Too costly for every evaluation in training; deterministic on one machine. Names stand in `evaluation_names`
        and do not begin with `val_`, which is for `metrics`. Default: nothing.
        """
        return EvaluationResult()

    def fit(self, batches: Iterable[Batch], seed: int) -> None:
        """Fit what serving needs beside the weights (a density over latents) on training batches. Default: nothing."""

    def assets(self) -> dict[str, bytes]:
        """What `fit` found, as files (safetensors or JSON). Default: none."""
        return {}

    def load_assets(self, assets: Mapping[str, bytes]) -> None:
        """Take over what `assets` gave. Names of others (the tokenizer's) are ignored."""

    @property
    @abstractmethod
    def verbs(self) -> frozenset[str]:
        """What an endpoint answers: `complete`, or of `generate encode decode reconstruct denoise interpolate`."""

    @abstractmethod
    def probe(self) -> dict[str, Tensor]:
        """Outputs for fixed inputs, no randomness: the publisher stores them, a host recomputes and compares them."""


class ImageFamily(Family[ConfigT, RequestT]):
    """A family that answers with images. Images are float32 (n, C, H, W) in [0, 1]; latents are (n, latent_dim)."""

    kind = "image"
    unit = "images"
    data: ImageInfo

    @property
    def num_classes(self) -> int:
        """Number of classes of which a request may name one, as `label`; 0: requests have no label."""
        return 0

    @property
    @abstractmethod
    def latent_dim(self) -> int: ...

    @abstractmethod
    def sample_latents(self, n: int, seed: int, request: RequestT) -> Tensor:
        """(n, latent_dim); row i depends on (seed, i) and the request alone, not on n."""

    @abstractmethod
    def decode(self, latents: Tensor, request: RequestT) -> Tensor:
        """Images of latents: (n, latent_dim) -> (n, C, H, W) in [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images: (n, C, H, W) -> (n, latent_dim). Only where `verbs` has `encode`."""
        raise NotImplementedError

    def denoise(self, images: Tensor) -> Tensor:
        """Clean images of noisy ones, (n, C, H, W) both. Only where `verbs` has `denoise`."""
        raise NotImplementedError

    @abstractmethod
    def interpolate(self, start: Tensor, end: Tensor, steps: int, method: Interpolation | None = None) -> Tensor:
        """The way from `start` to `end`, (latent_dim,) both: (steps, latent_dim).

        Args:
            method: None: as the latent space wants it.
        """

    def preview(self, examples: Batch, seed: int) -> dict[str, Tensor]:
        request, images = self.Request(), examples["images"]
        pictures = {"samples": self.decode(self.sample_latents(len(images), seed, request), request)}  # type: ignore[arg-type]
        if "reconstruct" in self.verbs:
            pictures["reconstructions"] = self.decode(self.encode(images), request)  # type: ignore[arg-type]
        return pictures

    def probe(self) -> dict[str, Tensor]:
        import torch

        request: Any = self.Request()
        latents = torch.linspace(-1, 1, 2 * self.latent_dim).view(2, -1)
        outputs = {"decode": self.decode(latents, request)}
        if "encode" in self.verbs:
            outputs["encode"] = self.encode(
                torch.linspace(0, 1, 2 * math.prod(self.data.shape)).view(2, *self.data.shape)
            )
        return outputs


def slide_window(window: list[int], block_size: int) -> list[int]:
    """What is still seen of a text: all that fits, else its last half block, which begins again at position 0.

    One rule for all kinds of positions, whose cost is one prefill for each half block of text.
    """
    return window if len(window) <= block_size else window[-(block_size // 2) :]


class Decoder(Protocol):
    """A fixed number of sequences, each in its slot, with what a network keeps of the tokens that it has read.

    What is computed for a slot does not depend, to the bit, on the other slots or on which slot it is.
    """

    chunk: int  # the most tokens of one prefill

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read 1 to `chunk` tokens of one sequence, the first at position `start`: logits after each, (n, vocab)."""
        ...

    def step(self, tokens: Sequence[int | None], positions: Sequence[int]) -> Tensor:
        """Read one token of each slot, None where there is none: logits (slots, vocab_size), rows of None are void."""
        ...


class TextFamily(Family[ConfigT, RequestT]):
    """A family that continues sequences of token ids; text and tokenizer are the engine's."""

    kind = "text"
    unit = "tokens"
    data: TextInfo

    @property
    @abstractmethod
    def block_size(self) -> int:
        """The longest sequence the network sees at once, in tokens."""

    @property
    def sequence_length(self) -> int:
        return self.block_size

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """(n, t) token ids, t <= block_size -> (n, t, vocab_size) unnormalised log-probabilities of the next token."""

    @abstractmethod
    def generate(self, prompt: Sequence[int], seed: int, request: RequestT) -> Iterator[int]:
        """The continuation of a prompt (at least one token), token by token; depends on the arguments alone.

        The plain reference, one sequence at a time with nothing kept, that the engine's answers are equal to. Beyond
        block_size it goes on as `slide_window` says.
        """

    @abstractmethod
    def decoder(self, slots: int) -> Decoder:
        """What the engine runs for many sequences at once."""

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset({"complete"})

    def preview(self, examples: Batch, seed: int) -> dict[str, Tensor]:
        """Return `sample`: the continuation of the first token of the first example."""
        import torch

        prompt, request = examples["tokens"][0, :1].tolist(), self.Request()
        tokens = list(itertools.islice(self.generate(prompt, seed, request), PREVIEW_TOKENS))  # type: ignore[arg-type]
        return {"sample": torch.tensor(tokens)}

    def probe(self) -> dict[str, Tensor]:
        import torch

        length = min(self.block_size, 64)
        return {"logits": self.logits(torch.arange(length).remainder(self.data.vocab_size).view(1, -1))}
