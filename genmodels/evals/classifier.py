"""Feature classifier: a small frozen classifier, whose features show differences between sets of images.

It is trained on the classes of the dataset, on demand, from a fixed seed; without classes it is trained to tell the
orientation of an image (four of them; Gidaris et al. 2018). The features of a network that was trained on the dataset
show a missing class; those of a network trained on photographs say little about digits or clothes. So a Frechet
distance in these features is not FID, and two distances compare only under the same classifier
(`FeatureClassifier.sha256`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.evals.images import evenly_spaced, pictures
from genmodels.family import EvaluationData
from genmodels.nn.networks import image_sizes, inference

RECIPE = 1  # raise it with each change to the training below: cached classifiers have it in their names
FEATURES = 64
WIDTH = 16  # channels at half size
BATCH = 128
MAX_STEPS, PASSES = 800, 100  # passes over the data, if that is less
LEARNING_RATE = 3e-3
SEED = 0
ORIENTATIONS = 4
REPORT_EVERY = 50  # steps
STATISTICS_IMAGES = 10_000  # images from which the features' mean and scale are computed


@dataclass(frozen=True)
class FeatureClassifier:
    """A trained classifier."""

    network: Classifier
    sha256: str  # of its weights
    knows_classes: bool

    def features(self, images: Tensor) -> Tensor:
        """Return float32 features (n, FEATURES) of images (n, C, H, W) in [0, 1].

        Over training images each feature has mean 0 and variance 1.
        """
        return self._all(images, self.network.features)

    def classes(self, images: Tensor) -> Tensor:
        """Return the class of each image, int64: (n, C, H, W) -> (n,)."""
        return self._all(images, self.network).argmax(1)

    def accuracy(self, data: EvaluationData) -> float:
        """Return the share of validation images that it classifies correctly."""
        images, labels = pictures(data.val["images"]), data.val.get("labels")
        if labels is None:
            images, targets = _turned(images, torch.arange(len(images)) % ORIENTATIONS)
        else:
            targets = torch.from_numpy(labels)
        return float((self.classes(images) == targets).double().mean())

    def _all(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with inference(self.network):
            return torch.cat([function(part) for part in images.split(BATCH)])


class Classifier(nn.Module):
    """Images (n, C, H, W) in [0, 1] -> logits (n, classes)."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        sizes = image_sizes(*shape[1:])
        channels = [shape[0], *(WIDTH * 2 ** min(i, 2) for i in range(len(sizes) - 1))]
        halvings = (nn.Sequential(nn.Conv2d(*pair, 3, stride=2, padding=1), nn.SiLU()) for pair in pairwise(channels))
        flat = channels[-1] * math.prod(sizes[-1])
        self.encoder = nn.Sequential(*halvings, nn.Flatten(), nn.Linear(flat, FEATURES), nn.SiLU())
        self.head = nn.Linear(FEATURES, classes)
        self.mean, self.scale = nn.Buffer(torch.zeros(FEATURES)), nn.Buffer(torch.ones(FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def features(self, images: Tensor) -> Tensor:
        return (self.encoder(images) - self.mean) / self.scale


def load_or_train(data: EvaluationData, learn_from: np.ndarray) -> FeatureClassifier:
    """Return the feature classifier of a dataset: from the cache, else newly trained.

    Args:
        learn_from: (n,) indices of the training images that it is trained on; it never sees the others.
    """
    labels = data.train.get("labels")
    shape = data.train["images"].shape[1:]
    classes = int(labels.max()) + 1 if labels is not None else ORIENTATIONS
    name = f"classifier-{data.digest[:16]}-{RECIPE}-{len(learn_from)}.safetensors"
    weights = data.cached(name, lambda: _train(data, learn_from, shape, classes))
    network = _new(shape, classes)
    network.load_state_dict(safetensors.torch.load(weights))
    return FeatureClassifier(network, hashlib.sha256(weights).hexdigest(), labels is not None)


def _train(data: EvaluationData, learn_from: np.ndarray, shape: tuple[int, int, int], classes: int) -> bytes:
    images, labels = data.train["images"], data.train.get("labels")
    steps = max(1, min(MAX_STEPS, PASSES * len(learn_from) // BATCH))
    order = np.random.default_rng(SEED)
    network = _new(shape, classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        index = order.choice(learn_from, BATCH)
        batch = pictures(images[index])
        if labels is None:
            batch, targets = _turned(batch, torch.from_numpy(order.integers(ORIENTATIONS, size=BATCH)))
        else:
            targets = torch.from_numpy(labels[index])
        loss = F.cross_entropy(network(batch), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % REPORT_EVERY == 0:
            data.report_progress()
    examples = pictures(images[learn_from[evenly_spaced(len(learn_from), STATISTICS_IMAGES)]])
    with inference(network):
        features = torch.cat([network.features(part) for part in examples.split(BATCH)])
    network.mean.copy_(features.mean(0))
    network.scale.copy_(features.std(0).clamp_min(1e-6))
    return safetensors.torch.save(network.state_dict())


def _new(shape: tuple[int, int, int], classes: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers alone
        torch.manual_seed(SEED)
        return Classifier(shape, classes)


def _turned(images: Tensor, ways: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image as it is, mirrored, upside down, or both; this works for every shape."""
    turned = torch.stack([images, images.flip(3), images.flip(2), images.flip(2, 3)])
    return turned[ways, torch.arange(len(images))], ways
