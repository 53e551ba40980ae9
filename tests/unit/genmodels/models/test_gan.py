"""The GAN: its roles, penalties and logged values, classes, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from genmodels.declarations.gan import GANConfig
from genmodels.errors import RequestError, SpecError
from genmodels.evals.distances import frechet_distance, moments
from genmodels.family import ImageInfo, OptimizerConfig, TextInfo
from genmodels.models import gan
from genmodels.models.gan import GAN, GANRequest, discriminator_loss, gradient_penalty

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 64, 64), (3, 40, 24), (1, 13, 9)]
REQUEST = GANRequest()
NOW = torch.tensor(0.5)


def tiny(shape=(1, 16, 12), num_classes: int | None = 3, **settings) -> GAN:
    torch.manual_seed(0)
    channels, height, width = shape
    info = ImageInfo(channels=channels, height=height, width=width, num_classes=num_classes)
    return GAN(GANConfig(**{"latent_dim": 5, "width": 4, **settings}), info)


def blobs(n: int, shape=(1, 16, 12), seed: int = 0) -> dict[str, torch.Tensor]:
    """Return smooth images with classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, shape[0], 3, 2, generator=generator)
    return {"images": F.interpolate(coarse, shape[1:], mode="bilinear"), "labels": torch.arange(n) % 3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("conditional", [False, True])
def test_every_verb_answers_in_shape_and_range(shape, conditional) -> None:
    model = tiny(shape, conditional=conditional)
    latents = model.sample_latents(4, 0, REQUEST)
    assert latents.shape == (4, model.latent_dim)
    assert model.latent_dim == (8 if conditional else 5)
    images = model.decode(latents, REQUEST)
    assert images.shape == (4, *shape)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    path = model.interpolate(latents[0], latents[1], 6)
    assert path.shape == (6, model.latent_dim)
    torch.testing.assert_close(path[[0, -1]], latents[:2])
    assert model.verbs == {"generate", "decode", "interpolate"}
    assert model.discriminator(torch.rand(4, *shape), torch.zeros(4, dtype=torch.long)).shape == (4,)
    assert model.preview({"images": torch.rand(3, *shape)}, 0)["samples"].shape == (3, *shape)


@pytest.mark.parametrize("loss", ["relativistic", "non-saturating"])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_role_moves_its_own_network_and_leaves_nothing_on_the_other(loss, conditional) -> None:
    model = tiny(loss=loss, conditional=conditional)
    networks = {"discriminator": model.discriminator, "generator": model.network}
    roles = model.roles(OptimizerConfig())
    assert [role.name for role in roles] == list(networks)
    assert [role.compilable for role in roles] == [False, True]
    for role in roles:
        (other,) = (network for name, network in networks.items() if name != role.name)
        own = list(networks[role.name].parameters())
        assert {id(p) for p in role.loss.parameters()} == {id(p) for p in own}
        optimized = [id(p) for o in role.optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(optimized) == sorted(id(p) for p in own)
        values = role.loss(blobs(6), NOW)
        values["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
        assert any(p.grad.abs().max() > 0 for p in own if p.grad is not None)
        assert all(p.grad is None and p.requires_grad for p in other.parameters())
        assert [name for name, value in values.items() if value.requires_grad] == ["loss"]
        role.loss.zero_grad()


@pytest.mark.parametrize("loss", ["relativistic", "non-saturating"])
def test_a_few_steps_are_finite_and_move_both(loss) -> None:
    model = tiny(loss=loss, conditional=True)
    before = [p.clone() for p in (*model.network.parameters(), *model.discriminator.parameters())]
    roles = model.roles(OptimizerConfig(betas=(0.0, 0.99)))
    for step in range(5):
        for role in roles:
            torch.manual_seed(step)
            values = role.loss(blobs(6, seed=step), NOW)
            role.loss.zero_grad()
            values["loss"].backward()
            for optimizer in role.optimizers:
                optimizer.step()
            assert all(value.detach().isfinite() for value in values.values())
    after = (*model.network.parameters(), *model.discriminator.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The loop looks for unused parameters for the sake of a fixed order of sums; DDP says that there are none.
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
@pytest.mark.parametrize("conditional", [False, True])
def test_gradients_under_ddp_are_those_without(process_group, conditional) -> None:
    model = tiny(conditional=conditional)
    for role in model.roles(OptimizerConfig()):
        gradients = []
        for call in (role.loss, DistributedDataParallel(role.loss, find_unused_parameters=True)):
            for _ in range(2):
                role.loss.zero_grad()
                torch.manual_seed(1)
                call(blobs(6), NOW)["loss"].backward()
            gradients.append([p.grad.clone() for p in role.loss.parameters()])
        torch.testing.assert_close(*gradients)


def test_penalties_are_float32_under_autocast() -> None:
    model = tiny(conditional=True)
    drawing, judging = (role.loss for role in reversed(model.roles(OptimizerConfig())))
    values = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values[enabled] = judging(blobs(8), NOW) | {"generator": drawing(blobs(8), NOW)["loss"]}
        assert all(value.dtype == torch.float32 for value in values[enabled].values())
    torch.testing.assert_close(values[True]["r1"], values[False]["r1"], rtol=0, atol=0)
    torch.testing.assert_close(values[True]["generator"], values[False]["generator"], rtol=0.05, atol=0)


def test_gradient_penalty_by_hand() -> None:
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], requires_grad=True)
    images = torch.arange(8.0).view(2, 1, 2, 2)
    # logit = sum(w x^2): its gradient is 2 w x
    penalty = gradient_penalty(lambda x: (weight * x.flatten(1).square()).sum(1), images)
    expected = (2 * weight * images.flatten(1)).square().sum(1).mean()
    assert penalty.item() == pytest.approx(expected.item())
    assert penalty.item() == pytest.approx((16 + 4 + 324 + 64 + 400 + 36 + 1764) / 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 8 * weight.detach() * images.flatten(1).square().mean(0))


def test_the_penalties_weigh_half_each_on_their_share() -> None:
    batch = blobs(8)
    model = tiny(gradient_penalty=6.0, penalty_share=0.25)
    values = model.roles(OptimizerConfig())[0].loss(batch, NOW)
    expected = values["adversarial"] + 3 * (values["r1"] + values["r2"])
    torch.testing.assert_close(values["loss"].detach(), expected)
    torch.testing.assert_close(values["r1"], gradient_penalty(model.discriminator, batch["images"][:2]).detach())


def test_the_relativistic_loss_is_symmetric_and_sees_only_differences() -> None:
    real, fake = torch.randn(2, 9)
    forth, back = discriminator_loss(real, fake, "relativistic"), discriminator_loss(fake, real, "relativistic")
    torch.testing.assert_close(discriminator_loss(-fake, -real, "relativistic"), forth)
    torch.testing.assert_close(discriminator_loss(real + 5, fake + 5, "relativistic"), forth)
    torch.testing.assert_close(back - forth, (real - fake).mean())  # softplus(x) - softplus(-x) = x
    assert discriminator_loss(real, real, "relativistic").item() == pytest.approx(math.log(2))
    saturating = F.binary_cross_entropy_with_logits
    expected = saturating(real, torch.ones(9)) + saturating(fake, torch.zeros(9))
    torch.testing.assert_close(discriminator_loss(real, fake, "non-saturating"), expected)


@pytest.mark.parametrize(("loss", "offset"), [("relativistic", 7.0), ("non-saturating", 0.0)])
def test_accuracies_count_what_lies_on_its_side_of_the_border(loss, offset, monkeypatch) -> None:
    model = tiny(loss=loss)
    logits = torch.tensor([1.0, 2.0, 3.0, -4.0, -3.0, -2.0, -1.0, 2.0]) + offset  # border: -0.25 and 0 (+ offset)
    monkeypatch.setattr(model.discriminator, "forward", lambda x, labels=None: logits + 0 * x.flatten(1).sum(1))
    judging = model.roles(OptimizerConfig())[0].loss
    monkeypatch.setattr(gan, "gradient_penalty", lambda critic, images: torch.zeros(()))
    values = judging(blobs(4), NOW)
    assert (values["accuracy_real"], values["accuracy_fake"]) == (0.75, 0.75)
    assert values["real_logit"].item() == pytest.approx(offset + 0.5)


def test_row_i_of_the_latents_depends_on_seed_and_i_alone() -> None:
    for conditional in (False, True):
        model = tiny(conditional=conditional)
        many = model.sample_latents(9, 4, REQUEST)
        torch.testing.assert_close(model.sample_latents(3, 4, REQUEST), many[:3], rtol=0, atol=0)
        assert not torch.equal(model.sample_latents(3, 5, REQUEST), many[:3])
    noise, classes = many[:, :5], many[:, 5:]
    half = model.sample_latents(9, 4, GANRequest(temperature=0.5))
    torch.testing.assert_close(half, torch.cat((noise / 2, classes), dim=1))
    assert torch.equal(classes.sum(1), torch.ones(9))
    assert len(classes.argmax(1).unique()) > 1


def test_a_label_is_the_class_of_every_image() -> None:
    model = tiny(conditional=True)
    asked = GANRequest(label=2)
    latents = model.sample_latents(5, 0, asked)
    assert latents[:, 5:].tolist() == [[0, 0, 1]] * 5
    assert torch.equal(latents[:, :5], model.sample_latents(5, 0, REQUEST)[:, :5])
    others = model.sample_latents(5, 0, GANRequest(label=0))
    assert torch.equal(model.decode(others, asked), model.decode(latents, REQUEST))
    assert not torch.equal(model.decode(others, REQUEST), model.decode(latents, REQUEST))
    half_way = model.interpolate(latents[0], others[0], 3)[1]
    torch.testing.assert_close(half_way[5:], torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize(("conditional", "says"), [(True, "0 to 2"), (False, "no classes")])
def test_a_label_that_there_is_not_is_refused(conditional, says) -> None:
    model = tiny(conditional=conditional)
    for ask in (lambda r: model.sample_latents(1, 0, r), lambda r: model.decode(torch.zeros(1, model.latent_dim), r)):
        with pytest.raises(RequestError) as caught:
            ask(GANRequest(label=3))
        assert caught.value.param == "label"
        assert says in caught.value.message


def test_training_tells_the_classes_to_both_networks() -> None:
    model = tiny(conditional=True)
    judging, drawing = (role.loss for role in model.roles(OptimizerConfig()))
    batch = blobs(6)
    others = batch | {"labels": (batch["labels"] + 1) % 3}
    for loss in (judging, drawing):
        result = []
        for one in (batch, others):
            torch.manual_seed(0)
            result.append(loss(one, NOW)["loss"].item())
        assert result[0] != result[1]


def test_what_it_cannot_learn_is_refused() -> None:
    info = ImageInfo(channels=1, height=28, width=28)
    for config, data, field in [
        (GANConfig(), TextInfo(vocab_size=65), "data"),
        (GANConfig(conditional=True), info, "model.conditional"),
        (GANConfig(), ImageInfo(channels=1, height=28, width=7), "model.family"),
        (GANConfig(latent_dim=1000), info, "model.latent_dim"),
    ]:
        with pytest.raises(SpecError) as caught:
            GAN(config, data)
        assert str(caught.value).startswith(f"{field}:")


def test_frechet_distance_by_closed_form_and_from_added_sums() -> None:
    random = np.random.default_rng(0)
    a, b = (torch.from_numpy(random.normal(size=(50, 4)) @ random.normal(size=(4, 4)) + i) for i in range(2))
    whole = frechet_distance(moments(a), moments(b))
    parts = sum(moments(part) for part in a.split(7))
    assert frechet_distance(parts, moments(b)) == pytest.approx(whole)
    covariances = [torch.cov(x.T, correction=0) for x in (a, b)]
    # trace((A B)^1/2): the product of two covariances has real eigenvalues, none below 0
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * cross
    assert whole == pytest.approx(expected.item())
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)
    # one dimension: (difference of means)^2 + (difference of standard deviations)^2
    line = torch.tensor([[-1.0], [1.0]])
    assert frechet_distance(moments(line), moments(3 * line + 4)) == pytest.approx(16 + 4)


def test_the_measure_adds_up_however_the_images_are_cut() -> None:
    model, batch = tiny(conditional=True), blobs(40)
    state = torch.get_rng_state()
    whole = model.eval_step(batch)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts = [model.eval_step({name: x[index] for name, x in batch.items()}) for index in order.split(11)]
    assert torch.equal(torch.get_rng_state(), state), "a measure must not touch the global random numbers"
    assert {name: len(x) for name, x in whole.items()} == {"real_even": 65, "real_odd": 65, "fake": 65}
    for name, expected in whole.items():
        assert expected.dtype == torch.float64
        torch.testing.assert_close(sum(part[name] for part in parts), expected, rtol=1e-5, atol=1e-5)
    assert whole["fake"][0, 0] == whole["real_even"][0, 0] + whole["real_odd"][0, 0] == 40
    assert set(model.eval_metrics(whole)) == set(model.metric_names)


def test_the_measure_ranks_real_before_blurred_before_noise() -> None:
    model = tiny()
    real, other = blobs(300)["images"], blobs(300, seed=1)["images"]
    fakes = {
        "real": other,
        "blurred": F.avg_pool2d(other, 9, stride=1, padding=4, count_include_pad=False),
        "collapsed": other[:1].expand(300, -1, -1, -1),
        "noise": torch.rand(real.shape, generator=torch.Generator().manual_seed(2)),
    }
    sums = {name: moments(model.features(images)) for name, images in fakes.items()}
    scores = {name: frechet_distance(moments(model.features(real)), result) for name, result in sums.items()}
    assert 2 * scores["real"] < scores["blurred"] < scores["noise"]
    assert 2 * scores["real"] < scores["collapsed"]
    halves = [moments(model.features(half)) for half in real.split(150)]
    assert frechet_distance(*halves) / 2 == pytest.approx(scores["real"], rel=0.6)


def test_the_features_are_the_same_for_every_model_and_no_part_of_it() -> None:
    model = tiny()
    before = model.features(blobs(2)["images"])
    torch.manual_seed(99)
    again = GAN(model.config, model.data)
    assert torch.equal(again.features(blobs(2)["images"]), before)
    assert before.dtype == torch.float64
    assert not any("features" in name for name in model.network.state_dict())
