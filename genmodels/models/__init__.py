"""The model families: one file each. The name of the file is the name of the family; nothing else is registered.

What specs are checked against may be in `genmodels.declarations`, so that a check does not import torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from types import ModuleType
from typing import Any, TypeGuard

from genmodels import declarations
from genmodels.errors import SpecError
from genmodels.family import Declaration, Family
from genmodels.schema.field_errors import nearest, show


def names() -> list[str]:
    """Return the names of all families, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> type[Family[Any, Any]]:
    """Return the family of that name. This imports its file, and torch with it.

    Raises:
        SpecError: there is no such family.
    """
    _check_name(name)
    module = importlib.import_module(f"{__name__}.{name}")
    families = [item for item in _defined(module) if _is_family(item)]
    if len(families) != 1 or families[0].Config.__module__.rpartition(".")[2] != name:
        raise TypeError(
            f"{module.__name__} must define one concrete Family and its Config; it has {len(families)} families"
        )
    return families[0]


def declaration(name: str) -> type[Declaration]:
    """Return what a spec of that family is checked against.

    This imports the file in `genmodels.declarations`; if there is none, the family.

    Raises:
        SpecError: there is no such family.
    """
    _check_name(name)
    path = f"{declarations.__name__}.{name}"
    if importlib.util.find_spec(path) is None:
        return load(name)
    (declared,) = (item for item in _defined(importlib.import_module(path)) if _is_declaration(item))
    return declared


def unknown_family(name: object) -> str:
    """Return the message for a name that no family has."""
    return f"got {show(name)}, expected one of {', '.join(names())}{nearest(name, names())}"


def _check_name(name: str) -> None:
    if name not in names():
        raise SpecError(f"model.family: {unknown_family(name)}")


def _defined(module: ModuleType) -> list[object]:
    """Return what a module defines, without what it imports."""
    return [item for item in vars(module).values() if getattr(item, "__module__", None) == module.__name__]


def _is_declaration(item: object) -> TypeGuard[type[Declaration]]:
    return isinstance(item, type) and issubclass(item, Declaration)


def _is_family(item: object) -> TypeGuard[type[Family[Any, Any]]]:
    return isinstance(item, type) and issubclass(item, Family) and not inspect.isabstract(item)
