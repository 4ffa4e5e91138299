"""Files and model folders that are there whole or not at all, however a process ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text, in the place of what was there; its folder is made if need be."""
    replace_file(path, lambda staged: staged.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, in the place of what was there; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = _beside(path)
    write(staged)
    staged.replace(path)


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder's files. Of two processes that make the same one, the first one's stays."""
    staged = _beside(folder)
    fill(staged)
    try:
        staged.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staged)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}")
