"""The arithmetic of evaluations against other implementations, and the feature classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import euclidean_distances, polynomial_kernel
from torch import Tensor

from genmodels.declarations.gan import GANDeclaration
from genmodels.evals import classifier, distances, filters, generative
from genmodels.evals.distances import frechet_distance, kernel_distance, moments, nearest, neighbours
from genmodels.evals.images import components, evenly_spaced, mean_psnr, mean_ssim, pictures
from genmodels.nn.networks import psnr
from tests.support.evaluation_data import CLASSES, Bench, shapes

BENCH = Bench()  # one judge for all tests of a data set
SHAPES = shapes()


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ROWS", 7)  # so that matrices are cut


def points(n: int, shift: float = 0.0, d: int = 5, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng((seed, n))
    return (random.standard_normal((n, d)) @ random.standard_normal((d, d)) + shift).astype(np.float32)


def test_frechet_distance_is_that_of_scipy_s_root() -> None:
    a, b = points(40).astype(np.float64), points(50, 0.7).astype(np.float64)
    covariances = [np.cov(x, rowvar=False, bias=True) for x in (a, b)]
    cross = np.real(np.trace(sqrtm(covariances[0] @ covariances[1])))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * cross
    result = frechet_distance(moments(torch.from_numpy(a)), moments(torch.from_numpy(b)))
    assert result == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(torch.from_numpy(a)), moments(torch.from_numpy(a))) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_that_of_scikit_learn_s_kernel() -> None:
    a, b = points(23), points(31, 0.4)
    within = [polynomial_kernel(x, degree=3, coef0=1).astype(np.float64) for x in (a, b)]
    expected = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within)
    expected -= 2 * polynomial_kernel(a, b, degree=3, coef0=1).mean()
    assert kernel_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_a_plain_matrix_of_distances(k: int) -> None:
    real, fake = points(60, seed=1), points(45, 0.5, seed=2)

    def reach(x: np.ndarray) -> np.ndarray:
        return np.sort(euclidean_distances(x), axis=1)[:, k]  # of each row the first is the point itself

    between = euclidean_distances(real, fake)
    within = between < reach(real)[:, None]
    result = neighbours(torch.from_numpy(real), torch.from_numpy(fake), k)
    assert result.precision == pytest.approx(within.any(0).mean())
    assert result.recall == pytest.approx((between < reach(fake)).any(1).mean())
    assert result.density == pytest.approx(within.sum(0).mean() / k)
    assert result.coverage == pytest.approx((between.min(1) < reach(real)).mean())
    assert 0 < result.recall < 1, "else nothing is compared"
    assert nearest(torch.from_numpy(real), torch.from_numpy(fake)).numpy() == pytest.approx(between.min(1), rel=1e-4)


def test_components_are_those_of_the_singular_vectors() -> None:
    shown = evenly_spaced(120, 20)
    train, val = (pictures(SHAPES.split(name).images).flatten(1).double().numpy() for name in ("train", "val"))
    val = val[shown]
    axes = np.linalg.svd(train - train.mean(0))[2][:6]
    through = (val - train.mean(0)) @ axes.T @ axes + train.mean(0)
    through = torch.from_numpy(through.clip(0, 1)).view(20, 1, 16, 16)
    result, similar = components(BENCH.evaluation_data(SHAPES), 6, shown)
    targets = torch.from_numpy(val).view(20, 1, 16, 16)
    assert result == pytest.approx(float(psnr(through, targets).mean()), abs=1e-3)
    assert similar == pytest.approx(mean_ssim(through.float(), targets.float()), abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 12), (1, 8, 9)])
def test_similarity_falls_with_noise(shape: tuple[int, int, int]) -> None:
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    assert mean_ssim(images, images) == pytest.approx(1)
    much, little = (filters.noisy(images, std) for std in (0.2, 0.02))
    assert mean_ssim(much, images) < mean_ssim(little, images) < 1


# ---- the judge


def appointed(data=SHAPES) -> classifier.FeatureClassifier:
    return classifier.load_or_train(BENCH.evaluation_data(data), np.arange(0, len(data.split("train")), 2))


@pytest.mark.slow
def test_a_judge_learns_the_classes_and_is_the_same_each_time() -> None:
    first = appointed()
    assert first.knows_classes
    assert first.accuracy(BENCH.evaluation_data(SHAPES)) > 0.6, "by chance 0.25"
    again = classifier.load_or_train(Bench().evaluation_data(SHAPES), np.arange(0, 480, 2))
    assert again.sha256 == first.sha256
    images = pictures(SHAPES.split("train").images[::2])
    features = first.features(images)
    assert features.mean(0).abs().max() < 1e-3
    assert features.std(0).median() == pytest.approx(1, abs=1e-3)
    assert (first.classes(images).numpy() == SHAPES.split("train").labels[::2]).mean() > 0.9


def test_a_judge_is_kept_and_learns_only_what_it_may() -> None:
    bench, data = Bench(), shapes(train=120, val=20)
    learn_from = np.arange(0, 120, 2)
    weights = classifier.load_or_train(bench.evaluation_data(data), learn_from).sha256
    spoiled = shapes(train=120, val=20)
    spoiled.split("train").images[1::2] = 0  # what was put aside
    spoiled.digest = data.digest
    assert classifier.load_or_train(Bench().evaluation_data(spoiled), learn_from).sha256 == weights
    assert classifier.load_or_train(bench.evaluation_data(data), learn_from).sha256 == weights
    assert len(bench.made) == 1


def test_without_classes_a_judge_learns_which_way_round_a_picture_is() -> None:
    data = shapes(train=120, val=40, labelled=False, channels=3)
    result = classifier.load_or_train(BENCH.evaluation_data(data), np.arange(0, 120, 2))
    assert not result.knows_classes
    assert result.features(pictures(data.split("val").images)).shape == (40, classifier.FEATURES)


# ---- sets of pictures


def drawn(images: Tensor, labels: np.ndarray | None = None):
    """Return a generator that draws these images."""
    return lambda n: (images[:n], None if labels is None else torch.from_numpy(labels[:n]))


def measured(images: Tensor, labels: np.ndarray | None = None) -> dict[str, float]:
    result = generative.evaluate(BENCH.evaluation_data(SHAPES), drawn(images, labels))
    assert set(result.metrics) <= set(GANDeclaration.evaluation_names)
    return {name: metric.value for name, metric in result.metrics.items()}


def test_real_pictures_pass_for_real_and_copies_are_seen() -> None:
    train = SHAPES.split("train")
    real = measured(pictures(train.images), train.labels)
    assert real["frechet_ratio"] < 2
    assert real["coverage"] > 0.8
    assert real["class_ratio"] < 1.3
    assert real["label_accuracy"] > 0.9
    assert real["nearest_train"] == pytest.approx(0, abs=1e-3)


def test_a_missing_class_is_seen() -> None:
    train = SHAPES.split("train")
    some = measured(pictures(train.images[train.labels != 1]))
    assert some["class_ratio"] > 5
    assert some["frechet_ratio"] > 2
    assert some["coverage"] < 0.85
    assert some["precision"] > 0.8, "what there is is real"


def test_one_picture_again_and_again_is_seen() -> None:
    one = measured(pictures(SHAPES.split("train").images[:1]).repeat(120, 1, 1, 1))
    assert one["recall"] < 0.1
    assert one["coverage"] < 0.2
    assert one["class_ratio"] > CLASSES / 2


def test_noise_is_seen() -> None:
    noise = measured(torch.rand(120, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert noise["precision"] < 0.1
    assert noise["frechet_ratio"] > 10
    assert noise["nearest_train"] > 0.3


def test_real_against_real_stands_beside() -> None:
    result = generative.evaluate(BENCH.evaluation_data(SHAPES), drawn(torch.zeros(200, 1, 16, 16)))
    assert result.notes["pictures"] == 120
    assert result.notes["classes"]
    assert sum(result.notes["classes"]) == 120
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage", "class_ratio"):
        (reference,) = result.metrics[name].baselines.values()
        assert np.isfinite(reference)
    assert result.metrics["coverage"].baselines[generative.REAL] > 0.9
    assert result.metrics["frechet_ratio"].value == pytest.approx(
        result.metrics["frechet"].value / result.metrics["frechet"].baselines[generative.REAL]
    )


def test_two_pictures_can_be_compared_and_one_cannot() -> None:
    zeros = drawn(torch.zeros(200, 1, 16, 16))
    few = generative.evaluate(BENCH.evaluation_data(shapes(train=32, val=2)), zeros)
    assert few.notes["neighbours"] == 1
    assert generative.evaluate(BENCH.evaluation_data(shapes(train=32, val=1)), zeros).metrics == {}


# ---- filters


@pytest.mark.parametrize("channels", [1, 3])
def test_every_filter_does_better_than_nothing(channels: int) -> None:
    """Some filters misread other memory layouts of an image, and then do worse."""
    targets = pictures(shapes(train=6, val=2, channels=channels).split("train").images)
    noise = mean_psnr(filters.noisy(targets, 0.3).clamp(0, 1), targets)
    best: dict[str, float] = {}
    for name, function in filters._candidates(0.3):
        result = max(filters._score(function, targets, 0.3, clamped) for clamped in (False, True))
        best[name] = max(result, best.get(name, 0.0))
    assert set(best) == {"gaussian", "median", "total variation", "non-local means", "bilateral", "wavelet"}
    assert {name for name, result in best.items() if result <= noise} == set()


def test_the_best_filter_is_found_on_training_pictures_and_kept() -> None:
    bench, shown = Bench(), evenly_spaced(120, 8)
    data = bench.evaluation_data(SHAPES)
    name, result = filters.best_filter(data, 0.3, shown)
    targets = pictures(SHAPES.split("val").images[shown])
    assert result > mean_psnr(filters.noisy(targets, 0.3).clamp(0, 1), targets)
    assert filters.best_filter(data, 0.3, shown) == (name, result)
    assert len(bench.made) == 1
    assert bench.reports > 10
