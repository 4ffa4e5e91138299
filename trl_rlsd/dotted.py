"""A user's function by its dotted path, for fields that a YAML file can hold."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def load(field: str, name: str, known: str, form: str) -> Callable:
    """The function at `package.module.function`.

    Raises: ValueError, where there is none; the message names field, value, known names and the form of a function.
    """
    fix = f"Give {known}, or the dotted path of a function {form}."
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}={name!r} cannot be loaded: {error}. {fix}") from error
    if not callable(found):
        raise ValueError(f"{field}={name!r} is not a function. {fix}")
    return found
