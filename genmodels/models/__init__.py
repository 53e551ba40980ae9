"""The model families: one file each. The name of the file is the name of the family; nothing else is registered."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, TypeGuard

from genmodels.errors import SpecError
from genmodels.family import Family
from genmodels.schema.field_errors import nearest, show


def names() -> list[str]:
    """Return the names of all families, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> type[Family[Any, Any]]:
    """Return the family of that name. This imports its file, and torch with it.

    Raises:
        SpecError: there is no such family.
    """
    if name not in names():
        raise SpecError(f"model.family: {unknown_family(name)}")
    module = importlib.import_module(f"{__name__}.{name}")
    families = [item for item in vars(module).values() if _is_family(item) and item.__module__ == module.__name__]
    if len(families) != 1 or families[0].Config.__module__ != module.__name__:
        raise TypeError(
            f"{module.__name__} must define one concrete Family and its Config; it has {len(families)} families"
        )
    return families[0]


def unknown_family(name: object) -> str:
    """Return the message for a name that no family has."""
    return f"got {show(name)}, expected one of {', '.join(names())}{nearest(name, names())}"


def _is_family(item: object) -> TypeGuard[type[Family[Any, Any]]]:
    return isinstance(item, type) and issubclass(item, Family) and not inspect.isabstract(item)
