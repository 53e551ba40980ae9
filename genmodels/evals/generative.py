"""Compare generated images with real images, in the features of a classifier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genmodels.evals.classifier import FeatureClassifier, load_or_train
from genmodels.evals.distances import NEIGHBOURS, frechet_distance, kernel_distance, moments, nearest, neighbours
from genmodels.evals.images import evenly_spaced, pictures
from genmodels.family import EvaluationData, EvaluationMetric, EvaluationResult, Note

REAL = "real against real"
MAX_IMAGES = 10_000  # images of each kind
MAX_NEAREST, THOROUGH_NEAREST = 500, 5_000  # images whose nearest training image is searched
PART = 256  # images drawn at a time


def evaluate(data: EvaluationData, draw: Callable[[int], tuple[Tensor, Tensor | None]]) -> EvaluationResult:
    """Compute the `evaluation_names` of a generator, each with the metric of as many real images as its baseline.

    These real images are a part of the training set that the classifier is not trained on, so that they are as new to
    it as the validation images, with which both are compared.

    Args:
        draw: returns n images (n, C, H, W) in [0, 1], and the requested classes (n,), or None without classes.
    """
    train, val = data.train["images"], data.val["images"]
    n = min(len(val), len(train) // 4, MAX_IMAGES)
    if n < 2:
        return EvaluationResult(notes={"pictures": n})
    k = min(NEIGHBOURS, n - 1)
    aside = evenly_spaced(len(train), n)
    classifier = load_or_train(data, np.setdiff1d(np.arange(len(train)), aside))
    shown = evenly_spaced(len(val), n)
    accuracy = classifier.accuracy(data)
    fakes, requested = draw(n)
    real, held, fake = (classifier.features(x) for x in (pictures(val[shown]), pictures(train[aside]), fakes))
    data.report_progress()

    metrics = _distances(real, held, fake) | _neighbourhoods(real, held, fake, k, data)
    if classifier.knows_classes:
        metrics |= _classes(classifier, fakes, requested, data, aside)
    metrics["nearest_train"] = _nearest(train, val[shown], fakes, data)
    notes: dict[str, Note] = {
        "pictures": n,
        "neighbours": k,
        "classifier": classifier.sha256,
        "classifier_accuracy": accuracy,
        "classifier_learned": "the classes" if classifier.knows_classes else "which way round a picture is",
    }
    if classifier.knows_classes:
        notes["classes"] = _histogram(classifier.classes(fakes), _num_classes(data)).tolist()
    return EvaluationResult(metrics=metrics, notes=notes)


def _distances(real: Tensor, held: Tensor, fake: Tensor) -> dict[str, EvaluationMetric]:
    reference = moments(real)
    distance, floor = (frechet_distance(reference, moments(x)) for x in (fake, held))
    kernel, kernel_floor = (kernel_distance(real, x) for x in (fake, held))
    return {
        "frechet": EvaluationMetric(value=distance, baselines={REAL: floor}),
        "frechet_ratio": EvaluationMetric(value=distance / max(floor, 1e-12), baselines={REAL: 1.0}),
        "kid": EvaluationMetric(value=kernel, baselines={REAL: kernel_floor}),
    }


def _neighbourhoods(
    real: Tensor, held: Tensor, fake: Tensor, k: int, data: EvaluationData
) -> dict[str, EvaluationMetric]:
    of_fake = neighbours(real, fake, k)
    data.report_progress()
    of_held = neighbours(real, held, k)
    data.report_progress()
    return {
        name: EvaluationMetric(value=value, baselines={REAL: getattr(of_held, name)})
        for name, value in vars(of_fake).items()
    }


def _classes(
    classifier: FeatureClassifier, fakes: Tensor, requested: Tensor | None, data: EvaluationData, aside: np.ndarray
) -> dict[str, EvaluationMetric]:
    """Compute `class_ratio` and, with requested classes, `label_accuracy`.

    `class_ratio` is the factor by which the class with the largest error is too frequent or too rare, at best 1; half
    an image is added to each class, so that a missing class gives a finite number. `label_accuracy` is the share of
    images of the requested class.
    """
    count, labels = _num_classes(data), torch.from_numpy(data.train["labels"])
    predicted, truth = classifier.classes(fakes), _histogram(labels, count) + 0.5
    held = classifier.classes(pictures(data.train["images"][aside]))

    def ratio(classes: Tensor) -> float:
        share = _histogram(classes, count) + 0.5
        quotient = (share / share.sum()) / (truth / truth.sum())
        return float(torch.maximum(quotient, 1 / quotient).max())

    metrics = {"class_ratio": EvaluationMetric(value=ratio(predicted), baselines={REAL: ratio(held)})}
    if requested is not None:
        right = float((predicted == requested).double().mean())
        metrics["label_accuracy"] = EvaluationMetric(
            value=right, baselines={"real pictures": classifier.accuracy(data)}
        )
    return metrics


def _nearest(train: np.ndarray, val: np.ndarray, fakes: Tensor, data: EvaluationData) -> EvaluationMetric:
    """Compute the mean distance to the nearest training image, for a pixel (root of the mean square).

    A value far below its baseline means that the images are copies.
    """
    count = min(THOROUGH_NEAREST if data.thorough else MAX_NEAREST, len(fakes), len(val))
    pairs = ((fakes[:count], "fake"), (pictures(val[evenly_spaced(len(val), count)]), "real"))
    best = {name: torch.full((count,), torch.inf) for _, name in pairs}
    for first in range(0, len(train), MAX_IMAGES):
        part = pictures(train[first : first + MAX_IMAGES]).flatten(1)
        for images, name in pairs:
            best[name] = torch.minimum(best[name], nearest(images.flatten(1), part))
        data.report_progress()
    pixels = train[0].size ** 0.5
    value, reference = (float(best[name].mean()) / pixels for name in ("fake", "real"))
    return EvaluationMetric(value=value, baselines={"validation pictures": reference})


def _histogram(labels: Tensor, count: int) -> Tensor:
    return torch.bincount(labels, minlength=count).double()


def _num_classes(data: EvaluationData) -> int:
    return int(data.train["labels"].max()) + 1
