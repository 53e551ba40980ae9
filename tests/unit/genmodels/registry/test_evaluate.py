"""Test the evaluation metrics of each family; how they are stored, checked by a gate, and shown."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal

from genmodels import checkpoint, models
from genmodels.checkpoint import CheckpointRef, Manifest
from genmodels.data import open_dataset
from genmodels.data.images import ImageData
from genmodels.declarations.autoencoder import AutoencoderConfig
from genmodels.declarations.gan import GANConfig
from genmodels.declarations.vae import VAEConfig
from genmodels.errors import DataError, ModelNotFound, SpecError
from genmodels.family import EvaluationMetric, EvaluationResult, Family, OptimizerConfig, TextFamily
from genmodels.metrics import EVALUATION_METRIC
from genmodels.models.autoencoder import Autoencoder
from genmodels.models.gan import GAN
from genmodels.models.vae import VAE
from genmodels.registry import evaluations
from genmodels.registry.evaluate import evaluate, training
from genmodels.registry.gate import check_gate
from genmodels.registry.removal import delete_version
from genmodels.registry.store import Registry
from genmodels.runs.store import Run
from genmodels.spec.sections import Gate, ModelSpec
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.train.publish import publish_run
from tests.support.asgi_client import ask
from tests.support.evaluation_data import Bench, shapes
from tests.support.published_models import LINEAGE, build, publish, write
from tests.support.run_parts import write_metrics
from tests.support.storages import MemoryStorage, upload
from tests.support.tiny_jobs import job, make_data, model

BENCH = Bench()
SHAPES = shapes()


def learned(family: Family[Any, Any], data: ImageData, steps: int, **settings: Any) -> Family[Any, Any]:
    """Return a model after a few steps of every role in turn."""
    split, random = data.split("train"), np.random.default_rng(0)
    roles = family.roles(OptimizerConfig(**{"learning_rate": 3e-3, **settings}))
    for step in range(steps):
        index = random.choice(len(split), 32)
        batch = {name: torch.from_numpy(values) for name, values in split.take(index, index).items()}
        for role in roles:
            torch.manual_seed(step)
            for optimizer in role.optimizers:
                optimizer.zero_grad()
            role.loss(batch, torch.tensor(step / steps))["loss"].backward()
            for optimizer in role.optimizers:
                optimizer.step()
    return family


def values(family: Family[Any, Any], data: ImageData = SHAPES) -> dict[str, float]:
    return {name: metric.value for name, metric in family.evaluate(BENCH.evaluation_data(data)).metrics.items()}


def passed(metric: str, actual: dict[str, float], **bound: float) -> bool:
    result = check_gate(Gate(metric=metric, **bound), actual)
    assert result is not None
    return result.passed


# ---- every family


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 16, True), (3, 12, False)])
@pytest.mark.parametrize("name", [name for name in models.names() if models.load(name).kind == "image"])
def test_an_image_family_measures_what_it_says(name: str, shape: tuple[int, int, bool]) -> None:
    channels, side, labelled = shape
    data = shapes(train=100, val=16, side=side, channels=channels, labelled=labelled)
    family, _ = build(name, pictures=data.info)
    before = torch.random.get_rng_state()
    bench = Bench()
    actual = family.evaluate(bench.evaluation_data(data))
    assert set(actual.metrics) <= set(family.evaluation_names)
    assert not any(name.startswith("val_") for name in family.evaluation_names)
    for measure in actual.metrics.values():
        assert all(map(math.isfinite, (measure.value, *measure.baselines.values())))
    assert actual.notes["pictures"] == 16
    assert bench.reports > 0
    assert family.evaluate(bench.evaluation_data(data)) == actual
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(family.evaluate(bench.evaluation_data(data, thorough=True)).metrics) == set(actual.metrics)
    assert EvaluationResult.model_validate_json(actual.model_dump_json()) == actual


@pytest.mark.parametrize("name", models.names())
def test_names_of_measures_and_metrics_differ(name: str) -> None:
    family = models.load(name)
    assert not set(family.evaluation_names) & set(family.metric_names)


# ---- VAE


def vae(**settings: Any) -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(**{"latent_dim": 6, "width": 8, "kl_warmup": 0.0, **settings}), SHAPES.info)


def test_the_likelihood_is_that_of_torch_s_distributions() -> None:
    family = learned(vae(), SHAPES, 20)
    assert isinstance(family, VAE)
    images = torch.from_numpy(SHAPES.split("val").take(np.arange(5), np.arange(5))["images"]).round()
    actual = family._bounds(images, 16, torch.Generator().manual_seed(0), lambda: None)
    family.network.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mean, log_variance = family.network.posterior(images)
        noise = torch.cat([torch.randn(8, 5, 6, generator=generator) for _ in range(2)])
        posterior = Normal(mean, (log_variance / 2).exp())
        latents = mean + noise * posterior.scale
        weights: list[Tensor] = []
        for z in latents:
            likelihood = Independent(Bernoulli(logits=family.network.decoder(z)), 3).log_prob(images)
            weights.append(likelihood + (Normal(0, 1).log_prob(z) - posterior.log_prob(z)).sum(1))
    expected = math.log(16) - torch.stack(weights).logsumexp(0)
    assert torch.allclose(actual[:, 0].float(), expected, atol=1e-3)


def test_a_vae_without_latents_has_a_bound_that_is_exact() -> None:
    family = vae()
    for parameter in family.network.encoder.head.parameters():
        parameter.data.zero_()
    for parameter in family.network.decoder.stem.parameters():
        parameter.data.zero_()
    actual = values(family)
    assert actual["kl"] == actual["active_units"] == 0
    assert actual["nll"] == pytest.approx(actual["reconstruction"], rel=1e-6)
    assert actual["nll"] == pytest.approx(actual["negative_elbo"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "says"),
    [("bernoulli", "not a likelihood"), ("bernoulli-binarized", "black or white"), ("gaussian", "density")],
)
def test_a_gate_refuses_a_collapsed_vae(likelihood: str, says: str) -> None:
    sound = learned(vae(likelihood=likelihood), SHAPES, 100, learning_rate=1e-2)
    collapsed = learned(vae(likelihood=likelihood, beta=1e4), SHAPES, 60)
    actual, of_collapsed = sound.evaluate(BENCH.evaluation_data(SHAPES)), values(collapsed)
    assert says in str(actual.notes["binarisation"])
    assert actual.notes["likelihood"] == likelihood
    bound = actual.metrics["nll"].baselines["each pixel its mean"]
    for metric, limits in (("active_units", {"min": 2}), ("nll", {"max": bound})):
        assert passed(metric, {metric: actual.metrics[metric].value}, **limits)
        assert not passed(metric, of_collapsed, **limits)
    assert actual.metrics["nll"].value < actual.metrics["negative_elbo"].value, "many draws make a tighter bound"


def test_a_pixel_on_its_own_has_the_likelihood_of_its_mean() -> None:
    family = vae()
    train, val = (torch.from_numpy(SHAPES.arrays(name)["images"] / 255).float() for name in ("train", "val"))
    expected = (
        F.binary_cross_entropy(train.mean(0).clamp(1e-3, 0.999).expand_as(val), val, reduction="none").sum() / 120
    )
    actual = family.evaluate(BENCH.evaluation_data(SHAPES)).metrics["nll"].baselines["each pixel its mean"]
    assert actual == pytest.approx(float(expected), rel=1e-5)


# ---- autoencoder


@pytest.mark.slow
def test_a_gate_refuses_an_autoencoder_that_lost_to_what_needs_no_training() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(latent_dim=8, width=8, noise_std=0.3)
    family = Autoencoder(config, SHAPES.info)
    untrained = values(family)
    trained = values(learned(family, SHAPES, 100, learning_rate=1e-2))
    assert not passed("pca_gain", untrained, min=-3)
    assert passed("pca_gain", trained, min=-3)
    assert not passed("denoise_gain", untrained, min=0)
    assert passed("denoise_gain", trained, min=0)
    assert trained["denoise_psnr_half"] > trained["denoise_psnr"] > trained["denoise_psnr_beyond"]
    baselines = family.evaluate(BENCH.evaluation_data(SHAPES)).metrics["denoise_psnr"].baselines
    assert baselines["noisy"] == pytest.approx(-20 * math.log10(0.3), abs=0.1)
    assert baselines["noisy"] < baselines["noisy, clamped"] < max(baselines.values())


def test_without_noise_no_denoising_is_measured() -> None:
    family = Autoencoder(AutoencoderConfig(latent_dim=4, width=4), SHAPES.info)
    assert set(values(family)) == {"psnr", "ssim", "pca_gain"}


# ---- GAN


def gan(data: ImageData = SHAPES, **settings: Any) -> GAN:
    torch.manual_seed(0)
    return GAN(GANConfig(**{"latent_dim": 16, "width": 8, **settings}), data.info)


def saturated() -> GAN:
    """Return a model whose gradient is gone."""
    family = gan(loss="non-saturating", gradient_penalty=0.0)
    return learned(family, SHAPES, 10, learning_rate=0.3)


def one_picture() -> GAN:
    """Return a model that ignores its noise."""
    family = learned(gan(), SHAPES, 10)
    assert isinstance(family, GAN)
    family.network.stem.weight.data.zero_()
    return family


class Honest(GAN):
    """Draw training pictures, as a perfect generator would."""

    def decode(self, latents: Tensor, request: Any) -> Tensor:
        index = (latents[:, 0].sigmoid() * 480).long()
        return torch.from_numpy(SHAPES.arrays("train")["images"] / np.float32(255)).float()[index]


@pytest.mark.parametrize("spoiled", [saturated, one_picture])
def test_a_gate_refuses_a_spoiled_gan(spoiled: Any) -> None:
    sound, actual = values(Honest(gan().config, SHAPES.info)), values(spoiled())
    for metric, limits in (("coverage", {"min": 0.6}), ("frechet_ratio", {"max": 5}), ("class_ratio", {"max": 2})):
        assert passed(metric, sound, **limits), (metric, sound)
        assert not passed(metric, actual, **limits), (metric, actual)


def test_a_conditional_gan_is_asked_for_every_class() -> None:
    actual = gan(conditional=True).evaluate(BENCH.evaluation_data(SHAPES))
    assert 0 <= actual.metrics["label_accuracy"].value <= 1
    assert "label_accuracy" not in values(gan())


# ---- kept with a version

FOUND = EvaluationResult(
    metrics={
        "nll": EvaluationMetric(value=98.5, unit="nats", baselines={"each pixel its mean": 203.75}),
        "odd": EvaluationMetric(value=math.nan),
    },
    notes={"draws": 64},
)


def test_evaluations_are_kept_with_their_version(storage: Storage) -> None:
    version, store = publish(storage, "shapes", "vae"), Registry(storage)
    assert evaluations.newest(store, "shapes", 1) is None
    first = store.record_evaluation(version, FOUND, thorough=False, seconds=1.5, publication=True)
    store.record_evaluation(version, EvaluationResult(), thorough=True, seconds=0, publication=True)
    assert storage.list("models/shapes/evaluations/") == ["models/shapes/evaluations/00000001/publication.json"]
    (kept,) = evaluations.evaluations(store, "shapes", 1)
    assert (kept.id, kept.notes, kept.data_digest) == ("publication", {"draws": 64}, LINEAGE.data_digest)
    assert kept.metrics["nll"] == FOUND.metrics["nll"]
    assert math.isnan(kept.metrics["odd"].value)
    second = store.record_evaluation(version, EvaluationResult(), thorough=True, seconds=2)
    assert [one.id for one in evaluations.evaluations(store, "shapes", 1)] == [first.id, second.id]
    assert evaluations.newest(store, "shapes", 1) == second

    publish(storage, "shapes", "vae", step=2)
    delete_version(store, "shapes", 1)
    assert storage.list("models/shapes/evaluations/") == []
    with pytest.raises(ModelNotFound):
        store.record_evaluation(version, FOUND, thorough=True, seconds=1)
    assert storage.list("models/shapes/evaluations/") == []


def test_what_several_make_is_one_s(storage: Storage) -> None:
    def slow() -> bytes:
        assert evaluations.cached(storage, "table.json", lambda: b"the other's") == b"the other's"
        return b"mine"

    assert evaluations.cached(storage, "table.json", slow) == b"the other's"
    assert evaluations.cached(storage, "table.json", pytest.fail) == b"the other's"


KEY = "evaluation-cache/table.json.checked"


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: b"",
        lambda stored: stored[:-1],
        lambda stored: stored + b" ",
        lambda stored: stored[:-1] + b"X",
        lambda stored: b"0" + stored[1:],
        lambda stored: stored[64:],
    ],
    ids=["empty", "cut", "longer", "flipped", "other digest", "no digest"],
)
def test_what_is_damaged_is_made_again(storage: Storage, damage: Callable[[bytes], bytes]) -> None:
    assert evaluations.cached(storage, "table.json", lambda: b"[1, 2]") == b"[1, 2]"
    storage.put(KEY, damage(storage.get(KEY)[0]))
    assert evaluations.cached(storage, "table.json", lambda: b"[1, 2]") == b"[1, 2]"
    assert evaluations.cached(storage, "table.json", pytest.fail) == b"[1, 2]"


def test_what_a_release_before_kept_unchecked_is_made_again(storage: Storage) -> None:
    storage.put("evaluation-cache/table.json", b"[1, 2")
    assert evaluations.cached(storage, "table.json", lambda: b"[1, 2]") == b"[1, 2]"
    assert storage.get("evaluation-cache/table.json")[0] == b"[1, 2"  # that release may still run


# ---- at publication


@pytest.fixture
def tiny_spec(tmp_path: Path) -> ModelSpec:
    entry = model(make_data(tmp_path), "vae", max_steps=3)
    return job("tiny", entry | {"serve": {"gate": {"metric": "nll", "max": 1e6}}}).models[0]


def gated(spec: ModelSpec, **gate: Any) -> ModelSpec:
    return spec.model_copy(update={"serve": spec.serve.model_copy(update={"gate": Gate(**gate)})})


def saved(spec: ModelSpec, steps: int = 2) -> Run:
    """Return a run with checkpoints of a real model on real data."""
    storage = MemoryStorage()
    dataset = open_dataset(spec.data)
    run = Run(storage, "tiny-00000000", spec.name)
    run.start_attempt(1, None, 1)
    for step in range(1, steps + 1):
        with checkpoint.scratch_folder() as name:
            folder = Path(name)
            write(folder, *build("vae", seed=step, pictures=dataset.info))
            lineage = LINEAGE.model_copy(update={"data_digest": dataset.digest})
            files = checkpoint.describe_files(folder)
            manifest = Manifest(step=step, samples=step, metrics={"val_loss": 9.0 - step}, lineage=lineage, files=files)
            prefix = run.checkpoint_prefix(CheckpointRef(attempt=1, step=step))
            upload(storage, prefix, folder, manifest, lambda: None)
    return run


def test_a_published_version_is_evaluated_and_judged_by_what_was_found(tiny_spec: ModelSpec) -> None:
    run = saved(tiny_spec)
    result = publish_run(run, tiny_spec, 1)
    assert (result.outcome, result.version, result.step) == ("succeeded", 1, 2), result.message
    store = Registry(run.storage)
    (kept,) = evaluations.evaluations(store, "vae", 1)
    assert (kept.id, kept.thorough, kept.notes["likelihood"]) == ("publication", False, "bernoulli")
    assert kept.seconds > 0
    assert result.metrics["val_loss"] == 7.0
    assert result.metrics["nll"] == kept.metrics["nll"].value
    assert result.gate is not None
    assert result.gate.reason == f"nll {result.metrics['nll']:.4g} is <= 1e+06"
    assert store.version("vae", 1).gate == result.gate
    again = publish_run(run, tiny_spec, 2)
    assert again.version == 1
    assert len(evaluations.evaluations(store, "vae", 1)) == 1


def test_what_its_evaluation_condemns_is_not_published(tiny_spec: ModelSpec) -> None:
    run = saved(tiny_spec)
    result = publish_run(run, gated(tiny_spec, metric="active_units", min=1e3), 1)
    assert (result.outcome, result.cause, result.version) == ("failed", "gate", None)
    assert result.message.startswith("not published: active_units ")
    assert "nll" in result.metrics, "what was found is told"
    assert run.storage.list("models/") == []


def test_publishing_shows_that_it_gets_on(tiny_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.train.publish.HEARTBEAT_SECONDS", 0.0)
    run = saved(tiny_spec, steps=1)
    publish_run(run, tiny_spec, 1)
    heartbeat = run.heartbeat(1)
    assert heartbeat is not None
    assert (heartbeat.phase, heartbeat.step) == ("publishing", 3)
    assert heartbeat.progress_count > 5


def test_where_the_data_has_gone_only_a_gate_that_needs_it_stands_in_the_way(tiny_spec: ModelSpec) -> None:
    run = saved(tiny_spec)
    pictures = Path(tiny_spec.data.path or "")
    next(pictures.glob("*.png")).unlink()
    with pytest.raises(DataError, match="the content has changed since vae was trained on it"):
        publish_run(run, tiny_spec, 1)
    pictures.rename(pictures.with_name("elsewhere"))
    with pytest.raises(DataError, match="does not exist"):
        publish_run(run, tiny_spec, 1)
    result = publish_run(run, gated(tiny_spec, metric="val_loss", max=9), 1)
    assert (result.outcome, result.metrics) == ("succeeded", {"val_loss": 7.0})
    assert evaluations.evaluations(Registry(run.storage), "vae", 1) == []


def test_an_evaluation_says_what_training_cost_and_how_it_went(tmp_path: Path) -> None:
    (spec,) = job("tiny", model(make_data(tmp_path), "gan")).models
    storage = MemoryStorage()
    family = build("gan", pictures=open_dataset(spec.data).info)[0]
    run, course = Run(storage, "tiny-00000000", spec.name), "discriminator_accuracy_real"
    run.start_attempt(1, None, 2)
    assert training(family, run, CheckpointRef(attempt=1, step=9), LINEAGE) == {
        "parameters": sum(weight.numel() for weight in family.network.parameters()), "steps": 9, "workers": 1
    }  # fmt: skip
    write_metrics(
        run, 1, [{"step": step, "samples": 4 * step, "seconds": step / 2, course: step} for step in range(20)]
    )
    notes = training(family, run, CheckpointRef(attempt=1, step=15), LINEAGE)
    assert (notes["images_seen"], notes["training_seconds"]) == (60, 9.5)
    assert notes[f"{course}_over_time"] == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]
    assert "training_loss" not in notes


def test_of_a_text_model_tokens_are_told_and_the_last_loss(tmp_path: Path) -> None:
    (spec,) = job("tiny", model(make_data(tmp_path), "minigpt")).models
    run, family = Run(MemoryStorage(), "tiny-00000000", spec.name), build("minigpt")[0]
    assert isinstance(family, TextFamily)
    run.start_attempt(1, None, 1)
    write_metrics(run, 1, [{"step": 4, "samples": 8, "seconds": 1.0, "loss": 2.5}])
    notes = training(family, run, CheckpointRef(attempt=1, step=4), LINEAGE)
    assert (notes["tokens_seen"], notes["training_loss"]) == (8 * family.block_size, 2.5)


def test_a_gate_may_name_a_measure(tmp_path: Path) -> None:
    entry = model(make_data(tmp_path), "gan")
    job("tiny", entry | {"serve": {"gate": {"metric": "coverage", "min": 0.5}}})
    with pytest.raises(SpecError, match=r"got 'coverag', expected one of val_frechet, .*; did you mean 'coverage'\?"):
        job("tiny", entry | {"serve": {"gate": {"metric": "coverag", "min": 0.5}}})


# ---- asked for, and shown


@pytest.mark.slow
def test_evaluate_on_the_command_line(tiny_spec: ModelSpec, tmp_path: Path) -> None:
    from services.local.platform import submit

    storage = open_storage((tmp_path / "storage").as_uri())
    name = submit(storage, job("tiny", model(tmp_path, "vae", max_steps=3)))
    run = saved(tiny_spec, steps=1)
    folder = tmp_path / "files"
    folder.mkdir()
    ref = CheckpointRef(attempt=1, step=1)
    manifest = checkpoint.fetch(run.storage, run.checkpoint_prefix(ref), folder)
    store = Registry(storage)
    store.promote(
        "vae", "production", store.publish(Run(storage, name, "vae"), ref, manifest, folder, None).version, ""
    )

    def evaluate_there(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.cli.main", "evaluate", *arguments, "--storage", storage.url]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = evaluate_there("vae", "--json")
    assert done.returncode == 0, done.stderr
    (kept,) = evaluations.evaluations(store, "vae", 1)
    shown = json.loads(done.stdout)
    assert shown["metrics"]["nll"]["value"] == kept.metrics["nll"].value
    assert (shown["id"], shown["thorough"], shown["notes"]["draws"]) == (kept.id, False, 64)
    assert kept.metrics["nll"].value == pytest.approx(
        evaluate(Run(storage, name, "vae"), ref, tiny_spec, manifest.lineage, folder).metrics["nll"].value
    )
    done = evaluate_there("vae@7")
    assert (done.returncode, done.stderr) == (
        1,
        "error: model 'vae' has no version 7; aliases: production; versions: 1\n",
    )


def test_the_endpoint_shows_the_newest_evaluation(file_storage: Storage) -> None:
    version = publish(file_storage, "shapes", "vae")
    store = Registry(file_storage)
    store.record_evaluation(version, FOUND, thorough=False, seconds=1, publication=True)
    host = ModelHost(file_storage.url, pin=["shapes"])
    app = create_app(host)
    shown = ask(app, "GET", "/v1/models/shapes").json()["evaluation"]
    assert shown["metrics"] == {
        "nll": {"value": 98.5, "unit": "nats", "baselines": {"each pixel its mean": 203.75}},
        "odd": {"value": None, "unit": "", "baselines": {}},
    }
    assert (shown["id"], shown["thorough"], shown["notes"]) == ("publication", False, {"draws": 64})
    assert EVALUATION_METRIC.labels("shapes", "vae", "1", "nll")._value.get() == 98.5
    store.record_evaluation(
        version, EvaluationResult(metrics={"nll": EvaluationMetric(value=97)}), thorough=True, seconds=1
    )
    host.watch()
    assert EVALUATION_METRIC.labels("shapes", "vae", "1", "nll")._value.get() == 97
    assert ask(app, "GET", "/v1/models/shapes@1").json()["evaluation"]["metrics"]["nll"]["value"] == 97


def test_an_untrained_picture_has_no_evaluation(file_storage: Storage) -> None:
    publish(file_storage, "shapes", "vae")
    assert "evaluation" not in ask(create_app(ModelHost(file_storage.url)), "GET", "/v1/models/shapes").json()
