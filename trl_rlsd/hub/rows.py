"""The texts of a dataset's rows, which no published file may hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from datasets import Dataset

from trl_rlsd.collator import text_of


def texts_of(dataset: Dataset, columns: Collection[str] | None = None) -> Iterator[str]:
    """The texts and messages in some columns, by default in all. System messages are left out: they are written once,
    and may stand in the chat template too."""
    for column in dataset.column_names:
        if columns is not None and column not in columns:
            continue
        for value in dataset[column]:
            turns = [{"content": value}] if isinstance(value, str) else value if isinstance(value, list) else ()
            yield from (text_of([turn]) for turn in turns if isinstance(turn, dict) and turn.get("role") != "system")
