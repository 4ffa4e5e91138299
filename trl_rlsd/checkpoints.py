"""Whether a checkpoint is whole, and which one a run goes on from.

transformers 5.23 writes a checkpoint's files in place, one after another, every process its own, and deletes old
checkpoints file by file. A process that is killed meanwhile, or a full disk, leaves a folder that looks like any
other: `resume_from_checkpoint=True` takes it where it has the highest number. (Its marker for such folders,
`checkpoint-is-incomplete.txt`, is written on SIGTERM alone and read nowhere.) So:

    saving   a checkpoint is written into an empty folder; where that fails, the error says what is left
    seal     once the files of all processes are there, and before older checkpoints are deleted, a manifest lists them
    choose   a checkpoint whose files are not those of its manifest is passed over, or refused where it was asked for

Sizes are compared, not contents: this finds what a killed process or a full disk leaves, not a disk that returns other
bytes than were written. Nothing is forced to the disk (fsync), so a power failure may still tear what was sealed last.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_rlsd.files import write_whole


logger = get_logger(__name__)

MANIFEST = "rlsd_checkpoint.json"
_SENTINEL = "checkpoint-is-incomplete.txt"  # of transformers' enable_jit_checkpoint


@contextmanager
def saving(folder: str, accelerator: Accelerator, saves: bool) -> Iterator[None]:
    """A checkpoint is written within this block; `saves` is `args.should_save`.

    What an earlier run left in the folder goes first: files of other processes, or of another teacher, would be sealed
    with the new ones.
    """
    if saves:
        _clear(Path(folder))
    accelerator.wait_for_everyone()
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # torch.save raises the second
        error.add_note(_what_is_left(Path(folder)))
        raise


def seal(folder: str, accelerator: Accelerator, saves: bool, later: tuple[str, ...] = ()) -> None:
    """List a checkpoint's files, once every process has written its own.

    Args:
        later: JSON files that are written after this, besides the trainer's state.
    """
    accelerator.wait_for_everyone()
    if not saves:
        return
    root = Path(folder)
    files = {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    manifest = {"processes": accelerator.num_processes, "files": files, "later": [*later, TRAINER_STATE_NAME]}
    write_whole(root / MANIFEST, json.dumps(manifest, indent=2))


def choose(resume: str | bool | None, output_dir: str, accelerator: Accelerator, saves: bool) -> str | bool | None:
    """What to give `Trainer.train` as `resume_from_checkpoint`: a checkpoint that is whole, the same on every process.

    Raises:
        ValueError: the checkpoint that was asked for is incomplete, or, with True, every one that there is.
    """
    if not resume:
        return resume
    asked = None if resume is True else Path(resume)
    folders = _newest_first(Path(output_dir) if asked is None else asked.parent)
    faults = _agreed(folders if asked in (None, *folders) or not asked.is_dir() else [*folders, asked], saves)
    whole = [folder for folder, why in faults.items() if why is None]
    if asked is None:
        if not faults:
            return True  # transformers says that there is none
        chosen = whole[0] if whole else None
        torn = ", ".join(f"{folder.name} ({faults[folder]})" for folder in takewhile(lambda f: f != chosen, faults))
        if chosen is None:
            raise ValueError(
                f"resume_from_checkpoint=True: no checkpoint in {output_dir} is complete: {torn}. Start "
                "without it, or with the folder of one whose weights are whole as `model`."
            )
        if torn:
            logger.warning(f"Resuming from {chosen}. Passed over, because they are incomplete: {torn}.")
    elif why := faults.get(asked):
        instead = f"Resume from {whole[0]}, the newest complete one" if whole else "No other one there is complete"
        raise ValueError(
            f"resume_from_checkpoint={resume!r}: the checkpoint is incomplete: {why}. {instead}; or, if you have "
            f"changed its files yourself, delete its {MANIFEST}."
        )
    _warn_of_processes(chosen if asked is None else asked, accelerator.num_processes)
    return str(chosen) if asked is None else resume


def restore_renamed(model: PreTrainedModel, folder: str) -> None:
    """Load the weights that a checkpoint holds under other names than the model does.

    transformers 5.23 saves Qwen2.5-VL, InternVL, Gemma3, mixtures of experts and others under names of older versions,
    and its Trainer looks for the model's own when it resumes: with full fine-tuning such a run would begin anew, with
    a warning (huggingface/transformers#43701, #48805). For a moment the weights exist twice.
    """
    names: set[str] = set()
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    if names - model.state_dict().keys():
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def fault(folder: Path) -> str | None:
    """What is torn or missing in a checkpoint; None where it is whole.

    Without a manifest (written by another trainer, or with `save_only_model`) the trainer's state alone is read, the
    file that transformers writes last.
    """
    if (folder / _SENTINEL).exists():
        return f"{_SENTINEL} is there"
    try:
        manifest = _manifest(folder)
    except ValueError:  # after a power failure
        return f"{MANIFEST} is torn"
    for name, size in manifest["files"].items():
        if not (path := folder / name).is_file():
            return f"{name} is missing"
        # fewer bytes, not other ones: on a network disk the manifest may list what was seen too early
        if (found := path.stat().st_size) < size:
            return f"{name} is torn ({found} of {size} bytes)"
    for name in manifest["later"]:
        try:
            json.loads((folder / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is torn"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {"files": {}, "later": [TRAINER_STATE_NAME]}


def _clear(folder: Path) -> None:
    if folder.is_dir():
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # first: what is left of it must not look whole
        shutil.rmtree(folder)


def _newest_first(root: Path) -> list[Path]:
    names = [path for path in root.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in names}
    return sorted((path for path in names if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)


def _agreed(folders: list[Path], saves: bool) -> dict[Path, str | None]:
    """The faults of checkpoints, the same on every process.

    Only processes that write checkpoints are asked, with `save_on_each_node` one on each machine: others may not see
    the files, or on a network disk not all of them yet.
    """
    views = [view for view in gather_object([{f: fault(f) for f in folders} if saves else None]) if view is not None]
    missing = "it is missing on another machine"
    return {f: next(filter(None, (view.get(f, missing) for view in views)), None) for f in views[0]}


def _warn_of_processes(folder: Path, processes: int) -> None:
    before = _manifest(folder).get("processes", processes)
    if before != processes:
        logger.warning(
            f"{folder} was written by {before} processes, this run has {processes}. Weights, optimizer and teacher go "
            "on; unused completions are generated anew, and a process without a random state of its own starts from "
            "the seed. The place in the data is right if a step takes as many prompts as before "
            "(per_device_train_batch_size * processes * gradient_accumulation_steps)."
        )


def _what_is_left(folder: Path) -> str:
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    whole = next((path for path in _newest_first(folder.parent) if path != folder and fault(path) is None), None)
    resume = f"go on from {whole.name} with resume_from_checkpoint=True" if whole else "start anew"
    return (
        f"{folder} is incomplete; {free / 1e6:.1f} MB are free there. Once the cause is gone (a full disk: "
        f"`save_total_limit` keeps fewer checkpoints; a quota; another process that has ended), {resume}."
    )
