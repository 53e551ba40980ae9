"""The autoencoder and denoising autoencoder, and the convolutional networks that image families share."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from genmodels.declarations.autoencoder import AutoencoderConfig
from genmodels.errors import RequestError, SpecError
from genmodels.evals.images import mean_ssim
from genmodels.family import ImageInfo, OptimizerConfig, TextInfo
from genmodels.models.autoencoder import Autoencoder, AutoencoderRequest
from genmodels.nn.networks import ImageDecoder, ImageEncoder, image_sizes, inference, psnr, ssim
from tests.support.image_training import blobs, train

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 40, 24), (1, 8, 9), (2, 33, 17)]
REQUEST = AutoencoderRequest()


def tiny(shape=(1, 12, 8), **settings) -> Autoencoder:
    torch.manual_seed(0)
    channels, height, width = shape
    config = AutoencoderConfig(**{"latent_dim": 5, "width": 4, **settings})
    return Autoencoder(config, ImageInfo(channels=channels, height=height, width=width))


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((28, 28), [(28, 28), (14, 14), (7, 7)]),
        ((40, 24), [(40, 24), (20, 12), (10, 6)]),
        ((8, 9), [(8, 9), (4, 5)]),
        ((256, 256), [(256 >> i, 256 >> i) for i in range(7)]),
    ],
)
def test_sizes_are_halved_down_to_a_few_pixels(size, sizes) -> None:
    assert image_sizes(*size) == sizes


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_encoder_and_decoder_fit_together(shape, norm) -> None:
    encoder = ImageEncoder(shape, 7, width=4, norm=norm)
    decoder = ImageDecoder(7, shape, width=4, norm=norm, skips=True)
    images = torch.rand(2, *shape)
    latents = encoder(images)
    assert latents.shape == (2, 7)
    assert decoder(latents).shape == decoder(latents, encoder.features(images)).shape == images.shape
    assert not list(encoder.buffers())
    assert not list(decoder.buffers())


def test_inference_puts_the_mode_back() -> None:
    network = torch.nn.Dropout()
    for training in (True, False):
        network.train(training)
        with contextlib.suppress(RuntimeError), inference(network):
            assert not network.training
            assert torch.is_inference_mode_enabled()
            raise RuntimeError("what an answer may end in")
        assert network.training is training
        assert not torch.is_inference_mode_enabled()


def test_psnr_of_known_errors() -> None:
    images = torch.zeros(3, 1, 2, 2)
    assert psnr(images, images + torch.tensor([1.0, 0.1, 0]).view(3, 1, 1, 1)) == pytest.approx([0, 20, 100], abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 17)])
def test_ssim_is_that_of_scikit_image_and_has_gradients(shape) -> None:
    targets = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    images = (targets + 0.1 * torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    result = ssim(images.requires_grad_(), targets)
    assert result.shape == (5,)
    assert float(result.detach().mean()) == pytest.approx(mean_ssim(images.detach(), targets), abs=1e-5)
    (gradient,) = torch.autograd.grad(result.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert float(ssim(targets, targets).min()) == pytest.approx(1)


def test_ssim_of_pictures_smaller_than_its_window() -> None:
    flat = torch.full((1, 1, 8, 9), 0.5)
    assert float(ssim(flat, flat)) == pytest.approx(1)
    assert float(ssim(flat, blobs(1, (1, 8, 9)))) < 0.9


def test_weight_of_ssim_makes_pictures_more_alike_in_structure() -> None:
    images = blobs(32, (1, 12, 12))

    def reached(weight: float) -> float:
        model = tiny((1, 12, 12), ssim_weight=weight)
        rows = train(model, 150)
        assert ("dissimilarity" in rows[0]) == (weight > 0)
        return mean_ssim(model.decode(model.encode(images), REQUEST), images)

    assert reached(0.5) > reached(0)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_every_verb_answers_in_shape_and_range(shape, noise_std) -> None:
    model = tiny(shape, noise_std=noise_std)
    images = blobs(6, shape)
    model.network.train()
    model.fit([{"images": images}], seed=0)
    latents = model.encode(images)
    assert latents.shape == (6, 5)
    assert model.latent_dim == 5
    pictures = {
        "decode": model.decode(latents, REQUEST),
        "generate": model.decode(model.sample_latents(6, 0, REQUEST), REQUEST),
        **model.preview({"images": images}, seed=0),
    }
    if noise_std:
        pictures["denoise"] = model.denoise(images + 3)  # beyond [0, 1], as noise may be
        assert torch.equal(pictures["denoise"], model.denoise(torch.ones_like(images)))
    for name, picture in pictures.items():
        assert picture.shape == images.shape, name
        assert picture.dtype == torch.float32, name
        assert 0 <= picture.min() <= picture.max() <= 1, name
    assert model.interpolate(latents[0], latents[1], 4).shape == (4, 5)
    assert ("denoise" in model.verbs) is (noise_std > 0)
    assert model.verbs >= {"generate", "encode", "decode", "reconstruct", "interpolate"}
    assert model.network.training, "answering must not disturb the training loop"


@pytest.mark.parametrize(
    ("settings", "names"), [({}, set()), ({"noise_std": 0.2}, {"denoising"}), ({"loss": "mse"}, set())]
)
def test_loss_falls_and_its_parts_add_up(settings, names) -> None:
    model = tiny(latent_penalty=0.01, **settings)
    rows = train(model, 40)
    assert set(rows[0]) == {"loss", "reconstruction", "latent_square"} | names
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["reconstruction"] + row.get("denoising", 0) + 0.01 * row["latent_square"], rel=1e-5
        )
    first, last = (sum(row["reconstruction"] for row in part) for part in (rows[:5], rows[-5:]))
    entropy = 5 * float(F.binary_cross_entropy(blobs(32), blobs(32))) if model.config.loss == "bce" else 0
    assert last - entropy < 0.6 * (first - entropy)


def test_loss_gives_every_parameter_a_gradient_and_detaches_the_rest() -> None:
    model = tiny(noise_std=0.2)
    (role,) = model.roles(OptimizerConfig())
    losses = role.loss({"images": blobs(4)}, torch.tensor(0.0))
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()
    assert [name for name, parameter in role.loss.named_parameters() if parameter.grad is None] == []
    trained = {id(p) for optimizer in role.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in role.loss.parameters()} == {id(p) for p in model.network.parameters()}


def test_loss_is_float32_under_autocast_and_repeatable() -> None:
    model = tiny(noise_std=0.2)
    (role,) = model.roles(OptimizerConfig())
    result = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = role.loss({"images": blobs(4)}, torch.tensor(0.5))["loss"]
        model.network.zero_grad()
        loss.backward()
        result.append([loss.detach().clone(), *(p.grad.clone() for p in model.network.parameters())])
    assert result[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))


def test_denoiser_learns_to_remove_noise() -> None:
    model = tiny(noise_std=0.3)
    train(model, 150, size=64)
    images = blobs(64)
    sums = model.eval_step({"images": images})
    noisy = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 1)
    assert model.eval_metrics(sums)["val_denoise_psnr"] > float(psnr(noisy, images).mean()) + 3
    assert float(psnr(model.denoise(noisy), images).mean()) == pytest.approx(
        model.eval_metrics(sums)["val_denoise_psnr"], abs=0.3
    )


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_metrics_equal_the_direct_computation(noise_std) -> None:
    model = tiny(noise_std=noise_std)
    train(model, 5)
    images = blobs(10)
    state = torch.get_rng_state()
    sums = [model.eval_step({"images": part}) for part in (images[:4], images[4:])]
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not touch the global RNG"
    assert all(value.dtype == torch.float64 for value in sums[0].values())
    metrics = model.eval_metrics({name: sums[0][name] + sums[1][name] for name in sums[0]})
    assert set(metrics) == set(model.metric_names)

    decoded = model.decode(model.encode(images), REQUEST)
    assert metrics["val_loss"] == pytest.approx(float(F.binary_cross_entropy(decoded, images)), rel=1e-5)
    direct = (10 * torch.log10(1 / (decoded - images).square().mean((1, 2, 3)))).mean()
    assert metrics["val_psnr"] == pytest.approx(float(direct), rel=1e-5)
    if noise_std == 0:
        assert metrics["val_denoise_psnr"] == metrics["val_psnr"]
    assert model.eval_step({"images": images[:4]})["denoise_psnr"] == sums[0]["denoise_psnr"]


def test_generation_needs_the_density_and_carries_it_in_the_assets() -> None:
    model, other = tiny(), tiny()
    with pytest.raises(RequestError, match="no density over latents"):
        model.sample_latents(1, 0, REQUEST)
    assert model.assets() == {}
    assert "samples" not in model.preview({"images": blobs(2)}, 0)
    model.fit(({"images": blobs(20)} for _ in range(3)), seed=0)
    other.load_assets({**model.assets(), "tokenizer.json": b"another's"})
    many = model.sample_latents(8, 5, REQUEST)
    assert torch.equal(other.sample_latents(3, 5, REQUEST), many[:3])
    calm = model.sample_latents(8, 5, AutoencoderRequest(temperature=0.5))
    assert not torch.equal(calm, many)


def test_state_dict_and_assets_rebuild_the_same_answers() -> None:
    model, other = tiny(noise_std=0.1), tiny(noise_std=0.1)
    train(model, 3)
    other.network.load_state_dict(model.network.state_dict())
    mine, theirs = model.probe(), other.probe()
    assert set(mine) == {"decode", "encode", "denoise"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({}, TextInfo(vocab_size=9), "data: autoencoder learns from images, but this dataset has texts"),
        ({}, ImageInfo(channels=1, height=7, width=40), "at least 8 x 8, but they are 7 x 40"),
        (
            {"latent_dim": 65},
            ImageInfo(channels=1, height=8, width=8),
            "model.latent_dim: 65 is more than the 64 numbers",
        ),
    ],
)
def test_what_cannot_work_is_refused(config, data, message) -> None:
    with pytest.raises(SpecError, match=message):
        Autoencoder.check(AutoencoderConfig(**config), data)
