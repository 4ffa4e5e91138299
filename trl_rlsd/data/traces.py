"""Privileged context that a model wrote and a reward has accepted."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset, Value

from trl_rlsd.data.generate import Endpoint, LocalModel
from trl_rlsd.data.journal import GradedSamples, RewardFunc, check_output, journal_of, write_dataset


_TAGS = re.compile(r"\s*</?think>\s*")


def verified_traces(
    dataset: Dataset,
    source: Endpoint | LocalModel,
    reward: RewardFunc,
    output: str | Path,
    *,
    samples: int = 4,
    keep: str = "first",
    threshold: float = 1.0,
    regrade: bool = False,
) -> Dataset:
    """The dataset with a trace for each problem that the model solved, sampled and graded; written to `output`.

    Two columns are added: `trace`, an accepted completion as the model wrote it, and `privileged_context`, the same
    without its thinking tags, for the trainer. Where no completion was accepted, `trace` is None, and a row keeps the
    privileged context that it had, such as its answer; without one it has None, and plain GRPO credit.

    Each completion is written to `OUTPUT.journal` when it arrives, and its verdict when it is graded. The same
    call goes on from there, after a kill or a lost connection too: nothing that has arrived is asked for again, and
    what failed is tried again. More `samples` may be asked for then, and rows be added behind the others. At most the
    requests under way are lost.

    Args:
        dataset: with `prompt` (text or messages without images) and the columns that the reward reads. Rows with None
            in the first column that the reward requires are not sampled.
        reward: of TRL's form; it gets prompts, completions and the rows' columns, and cannot be asynchronous.
        output: a .jsonl or .parquet file.
        samples: completions of a problem at most.
        keep: `"first"` accepted completion, which ends sampling for its problem, or the `"shortest"` of all.
        threshold: the least reward that is accepted.
        regrade: grade a journal's completions anew, where the reward or its columns have changed.

    Raises:
        ValueError, TypeError: before anything is sampled: an argument, a column, a journal of other settings.
        SourceFailed: the server refuses every request.
    """
    if keep not in ("first", "shortest") or samples < 1:
        raise ValueError(f"keep={keep!r}, samples={samples}: keep is 'first' or 'shortest', samples 1 or more.")
    output = check_output(output)
    there = getattr(dataset, "column_names", None) or []
    if "trace" in there:
        raise ValueError("The dataset has a column 'trace' already: dataset.rename_column('trace', ...).")
    known = list(dataset["privileged_context"]) if "privileged_context" in there else None
    if not all(context is None or isinstance(context, str) for context in known or []):
        raise TypeError("The column 'privileged_context' holds messages; here it must be text: rename it.")
    with GradedSamples(dataset, source, reward, journal_of(output), threshold=threshold, regrade=regrade) as drawn:
        if keep == "shortest":
            drawn.draw([(row, sample) for row in drawn.rows for sample in range(samples)], "traces")
        else:
            for sample in range(samples):
                solved = {row for row, _ in drawn.accepted}
                keys = [(row, sample) for row in drawn.rows if row not in solved]
                drawn.draw(keys, f"traces, round {sample + 1} of {samples}")
        traces = _traces(drawn, samples, keep)
        drawn.summary("Traces", f"{len(traces)} of {len(dataset)} rows have one")
    dataset = _with_traces(dataset, [traces.get(row) for row in range(len(dataset))], known)
    write_dataset(dataset, output)
    return dataset


def _with_traces(dataset: Dataset, traces: list[str | None], known: list[str | None] | None) -> Dataset:
    if known is not None:
        dataset = dataset.remove_columns("privileged_context")
    pairs = zip(traces, known or [None] * len(traces), strict=True)
    contexts = [old if trace is None else without_tags(trace) for trace, old in pairs]
    dataset = dataset.add_column("trace", traces, feature=Value("string"))
    return dataset.add_column("privileged_context", contexts, feature=Value("string"))


def without_tags(trace: str) -> str:
    """A trace without the tags around its thinking; the thinking stays. Templates give the tags a meaning of their
    own, also within a prompt."""
    return _TAGS.sub("\n\n", trace).strip()


def _traces(drawn: GradedSamples, samples: int, keep: str) -> dict[int, str]:
    """By row."""
    traces: dict[int, str] = {}
    for row, sample in sorted(drawn.accepted):
        text = drawn.journal.texts[row, sample]
        shorter = keep == "shortest" and row in traces and len(text) < len(traces[row])
        if sample < samples and (row not in traces or shorter):
            traces[row] = text
    return traces
