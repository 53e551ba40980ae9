"""Whether a model host has the memory to serve a model: told from its spec, before it is queued, trained or built."""

from __future__ import annotations

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo, ImageInfo, TextInfo
from genmodels.memory import HOST_MEMORY, too_large
from genmodels.spec import ModelSpec

# What data hardly ever exceeds: what fits with these fits with any.
LARGE: dict[str, DataInfo] = {
    "image": ImageInfo(channels=3, height=256, width=256, num_classes=1000),
    "text": TextInfo(vocab_size=10_000),
}


def check(spec: ModelSpec, data: DataInfo | None, budget: int = HOST_MEMORY) -> None:
    """Refuse a model that no host can serve.

    Args:
        data: what is known of its data; where that is nothing, the smallest there is stands in for it.

    Raises:
        SpecError: it is too large; names the setting, and what would be right.
    """
    if problem := refusal(spec, data or _smallest(spec), budget):
        raise SpecError(problem)


def refusal(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> str | None:
    """Why no host can serve a model; None where one can."""
    family = models.load(spec.family)
    try:
        found = too_large(spec.model, lambda config: family.footprint(config, data), budget)
    except Exception:  # it cannot be built for such data: whoever builds it says why
        return None
    return f"model.{found[0]}: {found[1]}" if found else None


def _smallest(spec: ModelSpec) -> DataInfo:
    if models.load(spec.family).kind == "text":
        return TextInfo(vocab_size=1)
    side = spec.data.image_size or 8
    return ImageInfo(channels=1, height=side, width=side, num_classes=1)
