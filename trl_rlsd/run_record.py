"""What a run leaves of itself beside its model: `metrics.jsonl` and `rlsd_run.json` in its output_dir.

    settings, data, rewards, versions -> rlsd_run.json      when training begins, and again when it ends
    each log, each alarm              -> metrics.jsonl      a line, at once

`trl-rlsd report` draws them, and the model card is made of them. Neither holds a row, a privileged context, a token or
a path: both can be shown to others.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_rlsd.files import write_whole


logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
PREVIOUS_FILE = "metrics.previous.jsonl"  # of a run that was in the folder before
RECORD_FILE = "rlsd_run.json"
FORMAT = 1

LIBRARIES = ("trl-rlsd", "trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "torch")
# fields that say where a run took place and who ran it, not what it was
_PRIVATE = re.compile(
    r"(^|_)token$|output_dir|logging_dir|run_name|hub_|_host|_url|_port|resume_from_checkpoint|trackio|project|local_rank|"
    r"deepspeed|fsdp_config|accelerator_config|_path|cache"
)
# absolute paths, home folders, drives, URLs with a name in them, and keys of the services that runs are logged to
_PLACE = re.compile(r"^(/|~|\\\\|[A-Za-z]:[\\/]|file:)|hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9]{8,}|://[^/]*@")


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write `rlsd_run.json`, whole or not at all."""
    write_whole(Path(folder) / RECORD_FILE, json.dumps(record, indent=2) + "\n")


def settings_of(args: Any, own: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config that somebody chose, and those named in `own` in any case; without whatever names a
    place, a person or a key. Values that JSON cannot hold are left out."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if field.name.startswith("_") or _PRIVATE.search(field.name):
            continue
        if field.name in own or value != _default(field):
            plain = shareable(value)
            settings |= {field.name: plain} if plain is not None or value is None else {}
    return settings


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def shareable(value: Any) -> Any:
    """A value as JSON holds it, without strings that name a place or a key; None where nothing is left."""
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return None if _PLACE.search(value) else getattr(value, "value", value)  # the value of an enumeration
    if isinstance(value, Mapping):
        pairs = {str(key): shareable(own) for key, own in value.items() if not _PRIVATE.search(str(key))}
        return {key: own for key, own in pairs.items() if own is not None}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [own for own in map(shareable, items) if own is not None]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def adapter_settings(config: Any) -> dict[str, Any]:
    """The fields of a PEFT config that somebody chose; modules by the last part of their names, which otherwise are
    one for each layer."""
    chosen = {
        field.name: shareable(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != _default(field) or field.name in ("r", "lora_alpha")
    }
    left_out = ("inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")
    own = {name: value for name, value in chosen.items() if name not in left_out and value is not None}
    if isinstance(own.get("target_modules"), list):
        own["target_modules"] = sorted({name.rpartition(".")[2] for name in own["target_modules"]})
    return own | {"peft_type": config.peft_type.value}


def versions() -> dict[str, str]:
    """Of Python, this package and what it stands on, by their import names."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found


class RunRecorder(TrainerCallback):
    """Writes both files, on the main process; a failure to write is told once and does not end the run.

    Args:
        folder: the run's output_dir.
        describe: () -> the record, less what is counted here (`format`, `versions`, `device`, `steps`, `finished`).
    """

    def __init__(self, folder: str, describe: Callable[[], dict[str, Any]]):
        self.folder = Path(folder)
        self.describe = describe
        self.evaluation: dict[str, Any] = {}  # while one goes on: what is evaluated
        self._writes: bool | None = None  # None: no run has begun
        self._early: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._writes = state.is_world_process_zero
        if self._writes:
            self._guarded(self._begin, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self.write(
            state.global_step, logs | (self.evaluation if any(name.startswith("eval_") for name in logs) else {})
        )

    def on_train_end(self, args, state, control, **kwargs):
        if self._writes:
            self._guarded(self._write_record, state.global_step, True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; what is logged before a run begins, such as an evaluation, waits for it."""
        line = {"step": step, "time": time.time(), **values}
        if self._writes:
            self._guarded(self._append, line)
        elif self._writes is None:
            self._early.append(line)

    def _begin(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS_FILE
        kept = [line for line in read_metrics(self.folder)[0] if line["step"] <= step] if step else []
        if step == 0 and path.is_file():  # another run's, which has begun anew where it should have been resumed, say
            path.replace(path.with_name(PREVIOUS_FILE))
        kept += [{key: shareable(value) for key, value in line.items()} for line in self._early]
        self._early = []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._write_record(step, False)

    def _append(self, line: Mapping[str, Any]) -> None:
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: shareable(value) for key, value in line.items()}) + "\n")

    def _write_record(self, step: int, finished: bool) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        own = {"versions": versions(), "device": device, "steps": step, "finished": finished}
        write_record(self.folder, {"format": FORMAT} | self.describe() | own)

    def _guarded(self, write: Callable, *args) -> None:
        try:
            write(*args)
        except OSError as error:
            self._writes = False
            logger.warning(f"{self.folder}: the run goes on, but no longer writes {METRICS_FILE}: {error}")


def read_metrics(folder: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl by their steps, none where there is no file, and how many are torn."""
    path = Path(folder) / METRICS_FILE
    lines, torn = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):  # of a run that was killed while it wrote
            torn += 1
    return sorted(lines, key=lambda line: line["step"]), torn


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """What `rlsd_run.json` says, None where there is none, it is of another format, or a part is of a wrong type."""
    path = Path(folder) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(record, dict) and record.get("format") == FORMAT and _has_types(record, _PARTS)
    if not known or not _has_types(record.get("dataset") or {}, _DATASET):
        return None
    rewards = record.get("rewards") or []
    return record if all(isinstance(own, dict) and own.keys() >= {"name", "weight"} for own in rewards) else None


_PARTS = {
    "base_model": str,
    "model_class": str,
    "peft": dict,
    "credit": str,
    "settings": dict,
    "dataset": dict,
    "rewards": list,
    "eval_completions": int,
    "versions": dict,
    "device": str,
    "processes": int,
    "finished": bool,
    "steps": int,
}
_DATASET = {"name": str, "rows": int, "columns": list, "eval_rows": int}


def _has_types(values: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    """Whether those that are there are of these types, or null."""
    return all(values.get(name) is None or isinstance(values[name], own) for name, own in types.items())
