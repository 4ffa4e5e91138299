"""Completions and their rewards, written down as they come: whatever ends the process, what was paid for is there."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, are_progress_bars_disabled
from tqdm.auto import tqdm

from trl_rlsd.data.generate import Endpoint, LocalModel, Prompt, RequestFailed
from trl_rlsd.files import replace_file


logger = logging.getLogger(__name__)

Key = tuple[int, int]  # row, number of the completion
RewardFunc = Callable[..., Sequence[float | None]]
Header = Callable[[int], dict[str, Any]]

# completions that a reward gets at one time
_GRADED_AT_ONCE = 32
# ... or sooner, in seconds since the last ones
_GRADED_EVERY = 5.0
_HEADER = b'{"header"'
# what may change in a journal whose completions are graded again
_GRADER = ("reward", "references")
# a reward's options that say how it is run
_RUNNING = ("workers", "timeout")


class Journal:
    """Lines of JSON that are only ever appended: `{"header": ...}`, `{"row", "sample", "text"}` for a completion and
    `{"row", "sample", "reward"}` for its verdict. One process writes at a time. A dataset may grow at its end: a
    header with `"longer"` leaves the verdicts before it as they are.

    Args:
        path: None to keep all in memory.
        header: number of the first rows -> what their completions and verdicts depend on.
        rows: of the dataset.
        keep_from: the least reward whose text is still wanted in memory once it is graded.
        regrade: take a journal whose verdicts are of another reward, without its verdicts.

    Raises:
        ValueError: the file is of other completions, is being written to, or is damaged elsewhere than at its end.
    """

    def __init__(self, path: Path | None, header: Header, rows: int, keep_from: float, regrade: bool = False):
        self.texts: dict[Key, str] = {}
        self.rewards: dict[Key, float] = {}
        self._keep_from, self._lock, self._file = keep_from, threading.Lock(), None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = self._read(self._file, path)
            now, known = header(rows), rows if found is None else found.get("rows", rows)
            longer = known < rows and _same_completions(found, header(known))
            if found is None or _differences(path, found, header(known) if longer else now, regrade):
                self.rewards.clear()
                self._append({"header": now})
            elif longer:
                self._append({"header": now, "longer": True})
        except BlockingIOError:
            self.close()
            raise ValueError(f"Another process is writing to {path}. Let it finish, or end it.") from None
        except BaseException:
            self.close()
            raise
        for key, reward in self.rewards.items():
            self._forget(key, reward)

    def __contains__(self, key: Key) -> bool:
        """Whether there is such a completion."""
        return key in self.texts or key in self.rewards

    def add_text(self, key: Key, text: str) -> None:
        self._append({"row": key[0], "sample": key[1], "text": text})
        self.texts[key] = text

    def add_reward(self, key: Key, reward: float) -> None:
        self._append({"row": key[0], "sample": key[1], "reward": reward})
        self.rewards[key] = reward
        self._forget(key, reward)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()  # unlocks it

    def _forget(self, key: Key, reward: float) -> None:
        if reward < self._keep_from:
            self.texts.pop(key, None)

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, file: IO[bytes], path: Path) -> dict[str, Any] | None:
        """Take up what is there; returns the last header. A last line that was cut off is removed."""
        header, end, line = None, 0, b""
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n") and (header is not None or _HEADER.startswith(line[: len(_HEADER)])):
                    break
                raise ValueError(f"Line {number} of {path} is no JSON. Restore or remove that line.") from None
            end += len(line)
            if header is None and "header" not in entry:
                raise ValueError(f"{path} is no journal: its first line has no 'header'. Give another output.")
            if "header" in entry:
                header = entry["header"]
                if not entry.get("longer"):
                    self.rewards.clear()  # of another grader
            elif "text" in entry:
                self.texts[entry["row"], entry["sample"]] = entry["text"]
            else:
                self.rewards[entry["row"], entry["sample"]] = entry["reward"]
        size = file.seek(0, os.SEEK_END)
        file.truncate(end)
        if end == size and line and not line.endswith(b"\n"):
            file.write(b"\n")  # whole but for this
        return header


def _same_completions(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old.get(name) == new.get(name) for name in {**old, **new} if name not in _GRADER)


def _differences(path: Path, old: dict[str, Any], new: dict[str, Any], regrade: bool) -> bool:
    """Whether the journal's verdicts are another grader's. Raises: ValueError, where that or more may not be."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = ", ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names)
    if set(names) - set(_GRADER):
        raise ValueError(f"{path} holds completions of other settings: {told}. Give another output.")
    if names and not regrade:
        raise ValueError(
            f"{path} holds verdicts of another grader: {told}. Pass regrade=True to grade its completions anew, or "
            "give another output."
        )
    return bool(names)


def journal_of(output: Path) -> Path:
    """Beside the output; not with its suffix, so that `*.jsonl` does not find it."""
    return output.with_name(f"{output.name}.journal")


def check_output(output: str | Path) -> Path:
    """Raises: ValueError, where a dataset cannot or should not be written there."""
    output = Path(output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"output={str(output)!r} must end in .jsonl or .parquet.")
    if output.exists() and not journal_of(output).exists():
        raise ValueError(f"output={str(output)!r} exists, without a journal of its own. Give another, or remove it.")
    return output


def write_dataset(dataset: Dataset, output: Path) -> None:
    """Whole, in the place of what was there."""
    if output.suffix == ".parquet":
        replace_file(output, dataset.to_parquet)
    else:
        replace_file(output, lambda staged: dataset.to_json(staged, force_ascii=False))


class GradedSamples:
    """Completions of a dataset's prompts and their rewards, sampled and graded as far as the journal lacks them.

    Args:
        dataset: with a column `prompt`, text or messages; its other columns go to the reward, as TRL passes them.
        source: where completions come from.
        reward: of TRL's form.
        journal: its path, None for none.
        threshold: the least reward of a completion that is accepted.
        keep_texts: whether the accepted texts stay in memory.
        regrade: see [`Journal`].

    Raises: TypeError, ValueError; what the reward's own `check` raises.
    """

    def __init__(
        self,
        dataset: Dataset,
        source: Endpoint | LocalModel,
        reward: RewardFunc,
        journal: Path | None,
        *,
        threshold: float,
        keep_texts: bool = True,
        regrade: bool = False,
    ):
        _check(dataset, reward)
        self.dataset, self.source, self.reward, self.threshold = dataset, source, reward, threshold
        self.prompts = [_prompt(row, prompt) for row, prompt in enumerate(dataset["prompt"])]
        required = getattr(reward, "required_columns", ())
        references = dataset[required[0]] if required else self.prompts
        self.rows = [row for row, reference in enumerate(references) if reference is not None]
        keep_from = threshold if keep_texts else math.inf
        self.journal = Journal(journal, self._header, len(dataset), keep_from, regrade)
        self.accepted = {key for key, reward in self.journal.rewards.items() if reward >= threshold}
        self.failed = 0
        self.first_failure: RequestFailed | str | None = None
        if self.journal.texts or self.journal.rewards:
            logger.info("%s goes on with %d verdicts of earlier calls.", journal, len(self.journal.rewards))

    def _header(self, rows: int) -> dict[str, Any]:
        prompts = _digest(self.prompts[:rows])
        header = {**self.source.settings, "reward": _name(self.reward), "rows": rows, "prompts": prompts}
        if required := getattr(self.reward, "required_columns", ()):
            header["references"] = _digest([list(self.dataset[column])[:rows] for column in required])
        return json.loads(json.dumps(header, default=str))  # as it is read again

    def __enter__(self) -> GradedSamples:
        return self

    def __exit__(self, *error: object) -> None:
        self.journal.close()

    def draw(self, keys: Iterable[Key], title: str) -> None:
        """Sample what has no completion, grade what has no verdict. Failures are counted; the next call, of this
        method or of another process, tries them again."""
        journal, keys = self.journal, [key for key in keys if key not in self.journal.rewards]
        missing = [key for key in keys if key not in journal]
        waiting = [key for key in keys if key in journal]
        seeds = [row * 1_000_003 + sample for row, sample in missing]
        arrivals = self.source.complete(
            [self.prompts[row] for row, _ in missing], seeds, lambda i, text: journal.add_text(missing[i], text)
        )
        hidden = not keys or are_progress_bars_disabled()
        with closing(arrivals), tqdm(total=len(keys), desc=title, unit="completion", disable=hidden) as bar:
            for start in range(0, len(waiting), _GRADED_AT_ONCE):
                self._grade(waiting[start : start + _GRADED_AT_ONCE], bar)
                bar.update(len(waiting[start : start + _GRADED_AT_ONCE]))
            waiting, graded_at = [], time.monotonic()
            for index, result in arrivals:
                bar.update()
                if isinstance(result, RequestFailed):
                    self._fail(result)
                else:
                    waiting.append(missing[index])
                if len(waiting) == _GRADED_AT_ONCE or time.monotonic() - graded_at > _GRADED_EVERY:
                    self._grade(waiting, bar)
                    waiting, graded_at = [], time.monotonic()
            self._grade(waiting, bar)

    def summary(self, title: str, kept: str) -> None:
        """Log the counts."""
        rejected = len(self.journal.rewards) - len(self.accepted)
        logger.info("%s: %s; %d completions accepted, %d rejected.", title, kept, len(self.accepted), rejected)
        if self.failed:
            logger.warning(
                "%s: %d completions failed; the next call tries them again. The first: %s",
                title, self.failed, self.first_failure,
            )  # fmt: skip

    def _grade(self, keys: list[Key], bar: tqdm) -> None:
        """Of completions that the journal has; what the reward cannot judge has failed."""
        rewards = self._rewards(keys) if keys else []
        for key, reward in zip(keys, rewards, strict=True):
            if reward is None or math.isnan(reward):
                self._fail(f"{_name(self.reward)} could not judge a completion of row {key[0]}")
            else:
                self.journal.add_reward(key, float(reward))
                if reward >= self.threshold:
                    self.accepted.add(key)
        kept = len(self.accepted)
        bar.set_postfix({"kept": kept, "rejected": len(self.journal.rewards) - kept, "failed": self.failed})

    def _rewards(self, keys: list[Key]) -> Sequence[float | None]:
        rows = self.dataset.select([row for row, _ in keys])
        columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", "completion")}
        prompts, texts = [self.prompts[row] for row, _ in keys], [self.journal.texts[key] for key in keys]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        rewards = self.reward(prompts=prompts, completions=completions, **columns)
        if len(rewards) != len(keys):
            raise ValueError(f"{_name(self.reward)} gave {len(rewards)} rewards for {len(keys)} completions.")
        return rewards

    def _fail(self, why: RequestFailed | str) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or why


def _check(dataset: Dataset, reward: RewardFunc) -> None:
    """Raises: TypeError, ValueError, before anything is paid for."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; completions belong to numbered rows, so it must be a "
            "datasets.Dataset. Take a split, or as many rows of a stream as you need: Dataset.from_list(list(...))."
        )
    for column in ("prompt", *getattr(reward, "required_columns", ())):
        if column not in dataset.column_names:
            raise ValueError(
                f"The dataset has no column {column!r}; its columns are {', '.join(map(repr, dataset.column_names))}."
            )
    if inspect.iscoroutinefunction(reward):
        raise TypeError(f"{_name(reward)} is asynchronous; give a function that waits for its verdicts.")
    if callable(own := getattr(reward, "check", None)):
        own()


def _prompt(row: int, prompt: Any) -> Prompt:
    """As a server takes it: Arrow gives each message the keys of all, and servers refuse `"tool_calls": null`."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise TypeError(
            f"The prompt of row {row} is a {type(prompt).__name__}; it must be text or a list of messages."
        )
    return [{name: value for name, value in message.items() if value is not None} for message in prompt]


def _name(reward: Callable) -> str:
    """Of a dataclass, with the options that it was given, but for those that say how it is run."""
    if not is_dataclass(reward) or isinstance(reward, type):
        return getattr(reward, "__name__", type(reward).__name__)
    shown = [field for field in fields(reward) if field.repr and field.name not in _RUNNING]
    options = {field.name: (repr(getattr(reward, field.name)), repr(_default(field))) for field in shown}
    given = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
    return f"{type(reward).__name__}({', '.join(given)})"


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
