"""A user's function by its dotted path, for fields that a YAML file can hold."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def find(path: str) -> Any:
    """What stands at `package.module.name`; None where the path has no dot.

    Raises: ImportError or AttributeError, where there is no such module or name.
    """
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name) if module else None


def load(field: str, name: str, known: str, form: str) -> Callable:
    """The function at `package.module.function`.

    Raises: ValueError, where there is none; the message names field, value, known names and the form of a function.
    """
    fix = f"Give {known}, or the dotted path of a function {form}."
    try:
        found = find(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}={name!r} cannot be loaded: {error}. {fix}") from error
    if not callable(found):
        raise ValueError(f"{field}={name!r} is not a function. {fix}")
    return found
