"""Random rows, the fitted density, and interpolation."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from genmodels.nn.latents import MAX_FIT, GaussianMixture, first_rows, lerp, slerp, standard_normal


@pytest.fixture(scope="module")
def two_clouds() -> torch.Tensor:
    """Return points: three quarters around (5, 0, 0) with spread 0.5, a quarter around (-5, 0, 0) with spread 0.1."""
    noise = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    centres = torch.tensor([[5.0, 0, 0]]).repeat(2000, 1)
    centres[::4] *= -1
    noise *= 0.5
    noise[::4] *= 0.2
    return centres + noise


@pytest.fixture(scope="module")
def density(two_clouds: torch.Tensor) -> GaussianMixture:
    return GaussianMixture.fit(two_clouds, 2, seed=0)


def test_density_finds_the_clouds_and_samples_them(density: GaussianMixture) -> None:
    heavy = int(density.weights.argmax())
    assert density.weights.sort().values == pytest.approx([0.25, 0.75], abs=0.01)
    assert density.means[heavy] == pytest.approx([5, 0, 0], abs=0.1)
    covariances = density.scales @ density.scales.mT
    assert covariances[heavy].diagonal() == pytest.approx([0.25] * 3, rel=0.15)
    assert covariances[1 - heavy].diagonal()[1:] == pytest.approx([0.01] * 2, rel=0.3)

    sample = density.sample(4000, seed=1)
    right = sample[:, 0] > 0
    assert float(right.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert sample[right].std(0) == pytest.approx([0.5] * 3, rel=0.1)


def test_row_depends_on_seed_and_place_alone(density: GaussianMixture) -> None:
    for draw in (lambda n, seed: density.sample(n, seed), lambda n, seed: standard_normal(n, 3, seed)):
        many = draw(9, 7)
        assert torch.equal(draw(4, 7), many[:4])
        assert torch.equal(draw(9, 7), many)
        assert len(torch.unique(many, dim=0)) == 9
        assert not torch.isin(draw(9, 8), many).any()
    assert standard_normal(0, 3, 0).shape == density.sample(0, 0).shape == (0, 3)


def test_standard_normal_is_standard_and_takes_any_seed() -> None:
    draws = standard_normal(3000, 4, seed=2**64 - 1, temperature=0.5)
    assert draws.dtype == torch.float32
    assert draws.mean(0) == pytest.approx([0] * 4, abs=0.04)
    assert draws.std(0) == pytest.approx([0.5] * 4, abs=0.03)
    assert torch.equal(standard_normal(1, 2, -1), standard_normal(1, 2, 2**64 - 1))


def test_temperature_zero_gives_component_means(density: GaussianMixture) -> None:
    for row in density.sample(20, seed=3, temperature=0):
        assert torch.cdist(row[None], density.means).min() < 1e-6


def test_bytes_round_trip_and_fit_is_repeatable(density: GaussianMixture, two_clouds: torch.Tensor) -> None:
    data = density.to_bytes()
    assert torch.equal(GaussianMixture.from_bytes(data).sample(50, 4), density.sample(50, 4))
    assert GaussianMixture.fit(two_clouds, 2, seed=0).to_bytes() == data


def test_linear_maps_of_latents_of_any_scale_are_fitted(two_clouds: torch.Tensor) -> None:
    stretched = two_clouds * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([0, 100.0, 0])
    sample = GaussianMixture.fit(stretched, 2, seed=0).sample(2000, 0)
    assert sample.std(0) == pytest.approx(stretched.std(0), rel=0.1)
    assert sample.mean(0)[1] == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(
    "points", [torch.ones(1, 5), torch.ones(3, 5), torch.ones(200, 5), torch.eye(5)[:2], torch.eye(8)]
)
def test_few_or_coinciding_latents_give_a_proper_density(points: torch.Tensor) -> None:
    sample = GaussianMixture.fit(points, 10, seed=0).sample(50, 0)
    assert torch.isfinite(sample).all()
    assert sample.mean(0) == pytest.approx(points.mean(0), abs=0.3)


@pytest.mark.parametrize("points", [torch.empty(0, 3), torch.full((4, 3), torch.nan), torch.full((4, 3), torch.inf)])
def test_no_latents_or_no_numbers_are_refused(points: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least one latent and finite values"):
        GaussianMixture.fit(points, 2, seed=0)


def test_fit_of_the_most_latents_takes_seconds_of_cpu() -> None:
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(2 * MAX_FIT, 32, generator=torch.Generator().manual_seed(0)) @ mixing
    start = time.process_time()
    density = GaussianMixture.fit(latents, 30, seed=0)
    assert time.process_time() - start < 20  # typically under 3; the bound allows for any machine
    assert density.scales.shape == (30, 32, 32)


def test_first_rows_asks_for_no_more_than_it_needs() -> None:
    asked = []

    def chunks():
        for i in range(10):
            asked.append(i)
            yield torch.full((4, 2), float(i))

    assert first_rows(chunks(), limit=10)[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert asked == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one batch"):
        first_rows([])


@pytest.mark.parametrize("interpolate", [lerp, slerp])
def test_interpolations_include_both_ends(interpolate) -> None:
    start, end = torch.tensor([1.0, 2, 3]), torch.tensor([-2.0, 0.5, 1])
    path = interpolate(start, end, 5)
    assert path.shape == (5, 3)
    assert path.dtype == torch.float32
    assert path[0] == pytest.approx(start, abs=1e-6)
    assert path[-1] == pytest.approx(end, abs=1e-6)
    assert interpolate(start, end, 1).shape == (1, 3)


def test_lerp_goes_straight_and_slerp_along_the_circle() -> None:
    start, end = torch.tensor([2.0, 0]), torch.tensor([0.0, 2])
    assert lerp(start, end, 3)[1] == pytest.approx([1, 1])
    assert slerp(start, end, 3)[1] == pytest.approx([2**0.5, 2**0.5])
    angles = np.degrees(np.arctan2(*slerp(start, end, 4).flip(1).T.numpy()))
    assert angles == pytest.approx([0, 30, 60, 90], abs=1e-4)


@pytest.mark.parametrize(
    "end", [torch.tensor([2.0, 2]), torch.tensor([-1.0, -1]), torch.zeros(2), torch.tensor([1.0, 1])]
)
def test_slerp_without_an_angle_goes_straight(end: torch.Tensor) -> None:
    start = torch.ones(2)
    assert torch.equal(slerp(start, end, 4), lerp(start, end, 4))


def test_a_sample_converts_only_the_components_that_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion of the whole density took longer than all draws of a request."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.rand(32, 8, 8, generator=draw).tril()
    density = GaussianMixture(torch.full((32,), 1 / 32), torch.rand(32, 8, generator=draw), scales)
    converted: list[int] = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: converted.append(tensor.numel()) or double(tensor))
    rows = density.sample(3, 1)
    assert sum(converted) <= 32 + 3 * (8 + 8 * 8)
    monkeypatch.undo()
    assert torch.equal(density.sample(1, 1), rows[:1])
