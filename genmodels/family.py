"""The contract of a model family.

A family is one file under `genmodels/models/`: it subclasses `ImageFamily` or `TextFamily`, and the spec, the training
loop, checkpoints and serving use it from there. One instance is one model: its networks, their training (`roles`), the
metrics during training (`eval_step`, `eval_metrics`) and after it (`evaluate`), and the answers to requests
(`sample_latents`, `decode`, `logits`, ...).

This module does not import torch, so that specs are checked quickly.
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
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

Batch: TypeAlias = Mapping[str, "Tensor"]
Interpolation = Literal["linear", "spherical"]
PREVIEW_TOKENS = 200


class ImageInfo(Section):
    """The facts of an image dataset that a family needs to build its networks."""

    kind: Literal["image"] = "image"
    channels: int = Field(ge=1, le=1024)
    height: int = Field(ge=1, le=16_384)
    width: int = Field(ge=1, le=16_384)
    num_classes: int | None = Field(None, ge=0, le=65_536)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        return self.channels, self.height, self.width


class TextInfo(Section):
    """The facts of a text dataset that a family needs to build its networks."""

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
    """A part of training with its own loss and optimizers, e.g. a GAN's generator.

    `loss` is a module whose parameters are exactly those that this role trains. The training loop wraps it in
    DistributedDataParallel and calls it as `loss(batch, progress)`, where `progress` is a 0-dim float tensor
    (samples seen / total samples, 0 to 1). The module returns a dict of 0-dim tensors: the optimizers minimise `loss`,
    the other values are logged by name. The loop seeds the global RNG from (seed, step, role, rank) before the call, so
    the module may use it freely. A network of another role must not be a submodule of this loss, and must not collect
    gradients (see `genmodels.models.gan.frozen`).
    """

    name: str
    loss: nn.Module
    optimizers: Sequence[Optimizer]
    compilable: bool = True  # False where the loss differentiates a gradient: torch.compile has no double backward


@dataclass(frozen=True)
class EvaluationData:
    """The data and services for the evaluation of a trained model.

    `train` and `val` are the whole splits as stored. Images: `images`, uint8 (n, C, H, W), and `labels`, int64 (n,), if
    the dataset has classes. Texts: `tokens`, unsigned integers (n,).
    """

    train: Mapping[str, np.ndarray]
    val: Mapping[str, np.ndarray]
    digest: str  # of the dataset
    thorough: bool  # True: minutes, all of val, many samples; False: seconds, as at each publication
    report_progress: Callable[[], None]  # call it every few seconds: a process that reports nothing counts as hung
    # `cached(name, make)` returns the result of `make`, which is computed once for each storage. For slow results that
    # depend on the data alone (the weights of a classifier, a count table); the name must contain all they depend on.
    cached: Callable[[str, Callable[[], bytes]], bytes]


class EvaluationMetric(BaseModel):
    """A metric of a trained model, and the same metric of its baselines."""

    model_config = ConfigDict(frozen=True)

    value: float
    unit: str = ""  # nats, dB; empty for shares, ratios and counts
    baselines: dict[str, float] = Field(default_factory=dict)  # by name: {"PCA, 32 components": 19.2}


Note = str | int | float | list[float] | list[str]


class EvaluationResult(BaseModel):
    """The metrics of one evaluation, and notes on how they were measured."""

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, EvaluationMetric] = Field(default_factory=dict)  # a subset of `evaluation_names`
    notes: dict[str, Note] = Field(default_factory=dict)  # number of examples, which classifier, ...


ConfigT = TypeVar("ConfigT", bound=Section)
RequestT = TypeVar("RequestT", bound=Section)


class Declaration:
    """What a spec of a family is checked against: its settings, its kind of data, and the names of its metrics.

    A family declares them in its own file, or, so that specs are checked without torch, in a file of the same name in
    `genmodels.declarations`.
    """

    Config: ClassVar[type[Section]]
    kind: ClassVar[str]  # "image" or "text": the datasets that it learns from
    metric_names: ClassVar[tuple[str, ...]]  # the metrics of `eval_metrics`; a gate may name each of them
    evaluation_names: ClassVar[tuple[str, ...]] = ()  # the metrics of `evaluate`; a gate may name each of them
    # Settings and data of a model that fits a model host: so does each model whose numbers are not larger.
    known_to_fit: ClassVar[tuple[Section, ImageInfo | TextInfo] | None] = None

    @classmethod
    def family_name(cls) -> str:
        """Return the name for specs: the name of the file that defines the family."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def check_kind(cls, data: ImageInfo | TextInfo) -> None:
        """Raise SpecError if this family does not learn from data of this kind."""
        if data.kind != cls.kind:
            raise SpecError(
                f"data: {cls.family_name()} learns from {cls.kind}s, but this dataset has {data.kind}s; choose another"
            )

    @classmethod
    def check(cls, config: Any, data: ImageInfo | TextInfo) -> None:
        """Raise SpecError (naming `model.<field>`) if this config cannot work on data of this kind and shape."""
        cls.check_kind(data)

    @classmethod
    def surely_fits(cls, config: Section, data: ImageInfo | TextInfo) -> bool:
        """Tell whether a model host certainly has the memory, without building the model; False: it may have."""
        if cls.known_to_fit is None:
            return False
        pairs = zip((config, data), cls.known_to_fit, strict=True)
        return all(_not_larger(ours, fitting) for ours, fitting in pairs)


def _not_larger(ours: Section, other: Section) -> bool:
    """Tell whether no integer of a section is larger than the other section's."""
    numbers = {name: value for name, value in dict(other).items() if type(value) is int}
    return all((getattr(ours, name) or 0) <= value for name, value in numbers.items())


class Family(Declaration, ABC, Generic[ConfigT, RequestT]):
    """One model. `network` is what is served, averaged (EMA) and written to `model.safetensors`."""

    Request: ClassVar[type[Section]]  # options of a request that only this family has
    tracked_metrics: ClassVar[tuple[str, ...]] = ()  # columns of training rows whose course an evaluation notes
    sample_verb: ClassVar[str]  # the request for a sample, which each model of the kind answers
    unit: ClassVar[str]  # "images" or "tokens": what training counts
    repeated: ClassVar[str | None] = (
        None  # field of Config with a number of equal blocks: see `genmodels.preflight.parameters`
    )

    config: ConfigT
    data: ImageInfo | TextInfo
    network: nn.Module

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
        """Return the number of tokens in one training example; None if an example is one image."""
        return None

    @classmethod
    def footprint(
        cls, config: ConfigT, data: ImageInfo | TextInfo, placement: Placement = DEFAULT_PLACEMENT
    ) -> Footprint:
        """Compute the memory that such a model needs for serving, without building it.

        Default: the memory of its networks. Override it if serving needs more.
        """
        return Footprint(network_bytes(cls, config, data, placement.number_bytes))

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks by their attributes. Each tensor of a model is a parameter or a buffer of a network."""
        from torch import nn

        return {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of all networks, by names that two models of one config share."""
        return {
            f"{network}.{name}": tensor
            for network, module in self.networks().items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move every network, in place; with `dtype`, change the dtype of its weights."""
        for network in self.networks().values():
            network.to(device, dtype)

    @abstractmethod
    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        """Return the roles, in the order of their steps. Called once, after the networks are on their device."""

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
        """Return sums over one validation batch, float64 of fixed shapes; the loop adds them over batches and ranks."""

    @abstractmethod
    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the metrics in `metric_names` (all begin with `val_`) from the sums over the whole validation set."""

    def evaluate(self, data: EvaluationData) -> EvaluationResult:
        """Measure the trained model as its research field does: before publication, and for `genmodels evaluate`.

        This is too slow for the evaluations during training. It is deterministic on one machine. The metrics are in
        `evaluation_names`; their names do not begin with `val_`, the prefix of `eval_metrics`. Default: no metrics.
        """
        return EvaluationResult()

    def fit(self, batches: Iterable[Batch], seed: int) -> None:
        """Fit the assets that serving needs (e.g. a density over latents) to training batches. Default: nothing."""

    def assets(self) -> dict[str, bytes]:
        """Return the result of `fit` as files (safetensors or JSON). Default: no files."""
        return {}

    def load_assets(self, assets: Mapping[str, bytes]) -> None:
        """Load the files that `assets` returned. Other files (the tokenizer) are ignored."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int | str]:
        """Return the sizes that `GET /v1/models` shows, by the name of the API's field."""

    @property
    @abstractmethod
    def verbs(self) -> frozenset[str]:
        """Return the requests that the model answers.

        Text: `complete`. Images: some of `generate`, `encode`, `decode`, `reconstruct`, `denoise`, `interpolate`.
        """

    @abstractmethod
    def probe(self) -> dict[str, Tensor]:
        """Return outputs for fixed inputs, without randomness.

        The publisher stores them; a model host computes them again and serves only a version that reproduces them.
        """


class ImageFamily(Family[ConfigT, RequestT]):
    """A family of image models. Images are float32 (n, C, H, W) in [0, 1]; latents are (n, latent_dim)."""

    kind = "image"
    sample_verb = "generate"
    unit = "images"
    data: ImageInfo

    @property
    def num_classes(self) -> int:
        """Return the number of classes that a request may name as `label`; 0: requests have no label."""
        return 0

    @property
    @abstractmethod
    def latent_dim(self) -> int: ...

    @property
    def sizes(self) -> dict[str, int | str]:
        size = f"{self.data.width}x{self.data.height}"
        sizes: dict[str, int | str] = {"size": size, "channels": self.data.channels, "latent_dim": self.latent_dim}
        return {**sizes, "num_classes": self.num_classes} if self.num_classes else sizes

    @abstractmethod
    def sample_latents(self, n: int, seed: int, request: RequestT) -> Tensor:
        """Draw latents (n, latent_dim). Row i depends on (seed, i) and the request alone, not on n."""

    @abstractmethod
    def decode(self, latents: Tensor, request: RequestT) -> Tensor:
        """Return the images of latents: (n, latent_dim) -> (n, C, H, W) in [0, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images: (n, C, H, W) -> (n, latent_dim). Only if `verbs` has `encode`."""
        raise NotImplementedError

    def denoise(self, images: Tensor) -> Tensor:
        """Return clean images of noisy images, (n, C, H, W) both. Only if `verbs` has `denoise`."""
        raise NotImplementedError

    @abstractmethod
    def interpolate(self, start: Tensor, end: Tensor, steps: int, method: Interpolation | None = None) -> Tensor:
        """Return the path from `start` to `end`, (latent_dim,) both: (steps, latent_dim).

        Args:
            method: None: the method that suits the latent space.
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
    """Return the tokens that the network still sees: all, if they fit; else the last half block, from position 0 on.

    The rule is the same for all position encodings; it costs one prefill for each half block of text.
    """
    return window if len(window) <= block_size else window[-(block_size // 2) :]


class Decoder(Protocol):
    """A fixed number of slots, each with one sequence and the network's state (keys and values) of its tokens.

    The result for a slot has the same bits whatever the other slots hold, and in whichever slot the sequence is.
    """

    chunk: int  # maximum number of tokens of one prefill

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read 1 to `chunk` tokens of one sequence, the first at position `start`; return logits (n, vocab_size)."""
        ...

    def step(self, tokens: Sequence[int | None], positions: Sequence[int]) -> Tensor:
        """Read one token of each slot, None for an unused slot; return logits (slots, vocab_size).

        The rows of unused slots have no meaning.
        """
        ...


class TextFamily(Family[ConfigT, RequestT]):
    """A family that continues sequences of token ids. The engine turns text into tokens and back."""

    kind = "text"
    sample_verb = "complete"
    unit = "tokens"
    data: TextInfo

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Return the number of tokens that the network sees at once."""

    @property
    def sequence_length(self) -> int:
        return self.block_size

    @property
    def sizes(self) -> dict[str, int | str]:
        return {"block_size": self.block_size, "vocab_size": self.data.vocab_size}

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Return unnormalised log-probabilities of the next token: (n, t), t <= block_size -> (n, t, vocab_size)."""

    @abstractmethod
    def generate(self, prompt: Sequence[int], seed: int, request: RequestT) -> Iterator[int]:
        """Yield the continuation of a prompt (at least one token), token by token; it depends on the arguments alone.

        This is the plain reference: one sequence at a time, without a cache. The engine's answers are equal to it.
        After block_size tokens the window moves on by `slide_window`.
        """

    @abstractmethod
    def decoder(self, slots: int) -> Decoder:
        """Return the decoder that the engine uses for many sequences at once."""

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
