"""Test that the memory of a served model is known before anything is built, and is the memory that it then takes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genmodels import models
from genmodels.data.text import CharTokenizer
from genmodels.declarations.minigpt import MiniGPTConfig
from genmodels.engine import model_cache
from genmodels.engine.loader import load
from genmodels.engine.text.completion import complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import SpecError
from genmodels.family import Family, ImageInfo, OptimizerConfig, TextInfo
from genmodels.models.minigpt import MiniGPT, MiniGPTDecoder
from genmodels.nn.latents import GaussianMixture, density_bytes
from genmodels.nn.sampling import Sampler
from genmodels.preflight import servable
from genmodels.registry.store import Registry
from genmodels.sizing.memory import HOST_MEMORY, SERVED_ROWS, Footprint, too_large
from genmodels.sizing.placement import Placement
from genmodels.storage import Storage, open_storage
from services.gateway import model_host
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from tests.support.asgi_client import ask
from tests.support.published_models import build, publish
from tests.support.tiny_jobs import job, make_data, model
from tests.support.watched_hosts import watch

PICTURES = [ImageInfo(channels=1, height=28, width=28), ImageInfo(channels=3, height=33, width=48, num_classes=7)]
MODELS: list[tuple[str, dict[str, Any], Any]] = [
    *(
        (name, {"latent_dim": 8, "width": width, "blocks": blocks, **options}, picture)
        for name, options in (
            ("autoencoder", {}),
            ("autoencoder", {"noise_std": 0.3, "norm": "none"}),
            ("vae", {"likelihood": "gaussian"}),
            ("gan", {}),
        )
        for width, blocks in ((16, 0), (12, 3))
        for picture in PICTURES
    ),
    ("gan", {"latent_dim": 40, "conditional": True}, PICTURES[1]),
    *(
        (
            "minigpt",
            {"n_layer": layers, "n_head": 2, "n_embd": width, "block_size": block, **options},
            TextInfo(vocab_size=65),
        )
        for (layers, width, block), options in itertools.product(
            ((1, 64, 600), (3, 128, 64)),
            (
                {},
                {"positions": "learned", "norm": "layer", "mlp": "relu", "bias": True, "qk_norm": False},
                {"tied_head": True, "mlp": "gelu", "bias": True},
            ),
        )
    ),
    ("minigpt", {"n_layer": 1, "n_embd": 32, "block_size": 16}, TextInfo(vocab_size=5000)),
]
IDS = [f"{name}-{place}" for place, (name, *_) in enumerate(MODELS)]


def built(name: str, config: dict[str, Any], data: Any) -> tuple[Family[Any, Any], Footprint]:
    cls = models.load(name)
    settings = cls.Config.model_validate(config)
    torch.manual_seed(0)
    return cls(settings, data), cls.footprint(settings, data)


def storages(thing: Any, visited: set[int] | None = None) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of all tensors inside an object."""
    visited = set() if visited is None else visited
    if id(thing) in visited:
        return
    visited.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing.untyped_storage().data_ptr(), thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from storages(part, visited)
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from storages(part, visited)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith(("genmodels", "torch.nn")):
        yield from storages(vars(thing), visited)


def held(*things: Any) -> int:
    return sum(dict(itertools.chain.from_iterable(map(storages, things))).values())


class Peak(TorchDispatchMode):
    """Measure the peak bytes of tensors that were made here, without those of given objects."""

    def __init__(self, *things: Any) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {address for address, _ in itertools.chain.from_iterable(map(storages, things))}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if not address or address in self._known:
            return
        size = storage.nbytes()
        self._known.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def largest(name: str) -> dict[str, Any]:
    """Return the upper bound of each integer setting."""
    schema = models.load(name).Config.model_json_schema()["properties"]
    return {field: rules["maximum"] for field, rules in schema.items() if rules.get("type") == "integer"}


@pytest.mark.parametrize(("name", "config", "data"), MODELS, ids=IDS)
def test_what_is_computed_is_what_is_taken(name: str, config: dict[str, Any], data: Any) -> None:
    family, footprint = built(name, config, data)
    assert held(family) == footprint.weights
    if name == "minigpt":
        kept = held(family.decoder(SERVED_ROWS))  # type: ignore[attr-defined]
        assert kept <= footprint.kept <= 1.02 * kept
    taken = peak(family)
    assert taken <= footprint.working <= 8 * taken


@pytest.mark.parametrize(
    ("name", "config", "data"), [MODELS[IDS.index(one)] for one in ("vae-8", "minigpt-17", "minigpt-18")], ids=str
)
def test_the_memory_of_another_dtype_and_number_of_slots(name: str, config: dict[str, Any], data: Any) -> None:
    placement = Placement(dtype="bfloat16", rows=5)
    family, full = built(name, config, data)
    family.to(placement.torch_device, placement.torch_dtype)
    footprint = family.footprint(family.config, family.data, placement)
    assert held(family) == footprint.weights == full.weights / 2
    if name == "minigpt":
        kept = held(family.decoder(placement.rows))  # type: ignore[attr-defined]
        assert kept <= footprint.kept <= 1.02 * kept
        assert footprint.kept < full.kept / 2


def test_shapes_are_told_without_what_torch_would_load_for_them() -> None:
    program = """
        import sys
        from genmodels import models
        from genmodels.family import ImageInfo, TextInfo

        for name in models.names():
            cls = models.load(name)
            data = TextInfo(vocab_size=9) if cls.kind == "text" else ImageInfo(channels=1, height=28, width=28)
            assert cls.footprint(cls.Config(), data).weights > 0
        print(*sorted({"torch._inductor", "torch._dynamo", "sympy"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"


def test_a_density_is_counted_at_its_largest() -> None:
    latents = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    for components in (1, 20):
        density = GaussianMixture.fit(latents, components, seed=0)
        assert held(density) == density_bytes(components, 8)
    fewer = GaussianMixture.fit(latents, 500, seed=0)  # 300 latents allow fewer components
    assert held(fewer) < density_bytes(500, 8)


@pytest.mark.parametrize("name", models.names())
def test_the_largest_models_are_measured_without_memory(name: str) -> None:
    cls = models.load(name)
    pictures, text = ImageInfo(channels=3, height=256, width=256, num_classes=9), TextInfo(vocab_size=10_000)
    with Peak() as watched:
        for settings in [*({field: value} for field, value in largest(name).items()), largest(name)]:
            with contextlib.suppress(ValidationError):  # n_head above n_embd
                config = cls.Config.model_validate(settings)
                footprint = cls.footprint(config, text if cls.kind == "text" else pictures)
    assert footprint.total > 5 * HOST_MEMORY  # all settings at their upper bounds
    assert watched.most < 2**20


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_no_square_of_a_window_stands_in_memory(positions: str) -> None:
    """In serving and in training, the peak memory grows with the window, not with its square."""
    taken = []
    for block in (1024, 4096):
        settings = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": block, "positions": positions}
        family = MiniGPT(MiniGPTConfig.model_validate(settings), TextInfo(vocab_size=9))
        with Peak(family) as serving:
            decoder = family.decoder(SERVED_ROWS)
            decoder.prefill(0, [1] * 32, block - 32)
            decoder.step([1, *[None] * 15], [block - 1, *[0] * 15])
        with Peak(family) as training:
            tokens = torch.zeros(1, block, dtype=torch.long)
            (role,) = family.roles(OptimizerConfig())
            role.loss({"tokens": tokens, "targets": tokens}, torch.tensor(0.0))["loss"].backward()
        taken.append((serving.most, training.most))
    for small, large in zip(*taken, strict=True):
        assert large < 6 * small


def version_with(storage: Storage, model: str, step: int, **claims: Any) -> None:
    """Publish a version, and then change its `config.json`."""
    version = publish(storage, model, "minigpt", step=step, alias=None)
    key = f"models/{model}/versions/{version.version:08d}.json"
    document = json.loads(storage.get(key)[0])
    old = storage.get(f"models/{model}/blobs/{version.files['config.json'].sha256}")[0]
    content = json.loads(old)
    content["config"] |= claims.pop("config", {})
    content["data"] |= claims.pop("data", {})
    new = json.dumps(content).encode()
    sha256 = hashlib.sha256(new).hexdigest()
    storage.put(f"models/{model}/blobs/{sha256}", new)
    document["files"]["config.json"] = {"size": len(new), "sha256": sha256}
    storage.put(key, json.dumps(document).encode())
    Registry(storage).promote(model, "production", version.version, "test")


CLAIMS = [
    {"config": {"block_size": 65_536}},
    {"config": {"n_layer": 128, "n_embd": 16_384}},
    {"config": {"n_layer": 128}},
    {"config": {"n_embd": 512}},
    {"config": {"positions": "learned", "block_size": 16_384}},
    {"config": {"mlp": "gelu", "bias": True}},
    {"config": {"n_layer": 10**30}},
    {"data": {"vocab_size": 2**21}},
    {"data": {"vocab_size": 10**400}},
]


@pytest.mark.parametrize("claims", CLAIMS, ids=str)
def test_what_is_too_large_or_not_what_its_weights_are_is_refused_before_it_takes_memory(
    tmp_path: Path, claims: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_host, "_watch", lambda _: None)
    storage = open_storage(tmp_path.as_uri())
    publish(storage, "play", "minigpt")
    host = ModelHost(storage.url, memory=100 * 2**20, pin=["play"])
    version_with(storage, "play", 2, **claims)
    for part in (MiniGPTDecoder, Sampler):  # neither is made
        monkeypatch.setattr(part, "__init__", lambda *_, **__: 1 / 0)
    with Peak() as watched:
        watch(host)
    assert watched.most < 2**20
    (refused,) = host._watcher.refused.values()
    assert re.search(r"of memory, and the budget is|model\.safetensors: |config\.json: ", refused.reason)
    monkeypatch.undo()
    body = {"model": "play", "prompt": "x", "max_tokens": 2}
    answer = ask(create_app(host), "POST", "/v1/completions", body)
    assert (answer.status_code, answer.headers["x-genmodels-version"]) == (200, "play@1")


def test_room_is_made_before_a_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are evicted to make room are gone when the next model's files are fetched."""
    monkeypatch.setattr(model_host, "_watch", lambda _: None)
    storage = open_storage(tmp_path.as_uri())
    for name in ("a", "b"):
        publish(storage, name, "minigpt", alias=None, block_size=1000)
    host = ModelHost(storage.url, memory=int(1.5 * size_of(block_size=1000)))
    there: list[list[str]] = []
    monkeypatch.setattr(
        model_cache, "load", lambda *arguments: there.append(list(host._cache._entries)) or load(*arguments)
    )
    app = create_app(host)
    for name in ("a@1", "b@1", "a@1"):
        assert ask(app, "POST", "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1}).status_code == 200
    assert there == [[], [], []]


def size_of(**settings: Any) -> int:
    family, _ = build("minigpt", **settings)
    return family.footprint(family.config, family.data).total


def test_the_setting_at_fault_is_named_with_what_would_be_right() -> None:
    text, pictures = TextInfo(vocab_size=65), ImageInfo(channels=3, height=128, width=128)
    for family, values, data, setting in (
        ("minigpt", {"block_size": 65_536}, text, "block_size"),
        ("minigpt", {"n_layer": 128, "n_embd": 1024}, text, "n_layer"),
        ("minigpt", {"n_embd": 16_384, "n_head": 128}, text, "n_embd"),
        ("vae", {"width": 512}, pictures, "width"),
        ("gan", {"width": 512, "blocks": 8}, pictures, "width"),
    ):
        cls = models.load(family)
        config: Any = cls.Config.model_validate(values)

        def measure(config: Any, cls: Any = cls, data: Any = data) -> Footprint:
            return cls.footprint(config, data)

        problem = too_large(config, measure)
        assert problem is not None, (family, values)
        name, message = problem
        assert name == setting
        most = re.fullmatch(rf"got {getattr(config, name)}: it takes .* GiB .*; write at most (\d+)", message)
        assert most, message
        right = cls.Config.model_validate({**config.model_dump(), name: int(most[1])})
        assert too_large(right, measure) is None
    everything = MiniGPTConfig.model_validate(largest("minigpt"))
    name, message = too_large(everything, lambda config: MiniGPT.footprint(config, text)) or ("", "")
    assert re.search("; lower it, and n_\\w+ and n_\\w+$", message)


@pytest.mark.parametrize("vocab_size", [200_000, 1_000_000, 2**21])
def test_a_vocabulary_at_fault_is_named(tmp_path: Path, vocab_size: int) -> None:
    make_data(tmp_path)
    entry = model(tmp_path, "minigpt")
    entry["model"] |= {"n_embd": 1024, "n_head": 8}
    (spec,) = job("x", entry).models
    with pytest.raises(SpecError, match=rf"^data: the text has {vocab_size:,} different .* \(vocab_size\), which take"):
        servable.check(spec, TextInfo(vocab_size=vocab_size))
    servable.check(spec, TextInfo(vocab_size=65))
    entry["model"] |= {"n_layer": 128, "n_embd": 2048}
    (spec,) = job("x", entry).models
    with pytest.raises(SpecError, match=r"^model\.n_layer"):
        servable.check(spec, TextInfo(vocab_size=65))


def test_a_spec_is_judged_by_its_data(tmp_path: Path) -> None:
    make_data(tmp_path)
    entry = model(tmp_path, "vae")
    entry["model"] |= {"width": 512, "blocks": 8}
    entry["data"]["image_size"] = 8
    (small,) = job("x", entry).models
    servable.check(small, ImageInfo(channels=1, height=8, width=8))
    with pytest.raises(
        SpecError, match=r"^model\.width: got 512: it takes 24\.\d GiB of memory to serve, .* at most 64"
    ):
        servable.check(small, ImageInfo(channels=3, height=256, width=256))


def peak(family: Any) -> int:
    """Return the peak bytes that the largest requests take."""
    if family.kind == "text":
        tokenizer = CharTokenizer("".join(map(chr, range(48, 48 + family.data.vocab_size))))
        model = TextModel("m@1", family, tokenizer)
        fill = {"prompt": "0" * (family.block_size - 1), "n": SERVED_ROWS, "max_tokens": 2, "seed": 0, "top_p": 0.9}
        with Peak(family) as making:
            batcher = model.batcher  # made at the first access
        with Peak(family, batcher) as watched:
            list(complete(model, CompletionRequest.model_validate(fill)))
        return max(watched.most, making.most - making.now)
    request: Any = family.Request()
    with Peak(family) as watched:
        family.decode(torch.zeros(SERVED_ROWS, family.latent_dim), request)
        for verb in {"encode", "denoise"} & family.verbs:
            getattr(family, verb)(torch.zeros(SERVED_ROWS, *family.data.shape))
    return watched.most
