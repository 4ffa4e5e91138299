"""Whose weights score: the student's own (live), a copy of them (synced, ema, base), or another model's (external).

A teacher never generates and never learns. All that it owns is, at most, one copy of the *trainable* weights, which
with LoRA is the adapter: a second copy of the base model never exists. To score, the copy's values are exchanged with
the student's in place and exchanged back, so that every holder of the parameters (wrappers, optimizer, compiled code)
goes on holding the same storage, and one parameter more is allocated at a time. (An `ema` of bfloat16 weights is kept
in float32; its rounded values exist once more while it scores.) Of sharded weights every process copies and exchanges
the pieces that it holds (`shards.py`); the forwards gather the teacher layer by layer, as they do the student.

This must happen while no graph is alive: autograd refuses to run backward through weights that were written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from trl_rlsd import files, shards


STATE_FILE = "rlsd_teacher.safetensors"
STATE_FOLDER = "rlsd_teacher"  # of sharded weights

# LoRA initialisations that take the adapter's first value out of the base weights: without the adapter, what is left
# is not the model that training started from.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Teacher:
    """The live teacher: the student as it is at the moment, and the form that the other kinds fill in.

    Args:
        student: the unwrapped model that is trained, a PEFT model or not.
    """

    copies = False  # whether it keeps weights of its own, apart from the student's
    model: nn.Module | None = None  # where it is another model

    def __init__(self, student: nn.Module):
        self.student = student

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model to score with, its weights those of the teacher until the block ends. `model` is the student as
        the caller runs it (it may be a wrapper)."""
        yield model

    def start(self, step: int) -> None:
        """A run begins, or goes on after `load`, at this step."""

    def step_end(self, step: int) -> None:
        """`step` optimizer steps are done."""

    def save(self, folder: str, *, write: bool = True) -> None:
        """Write what `load` needs into a checkpoint's folder. Every process calls this; `write` tells whether this one
        writes what all of them hold whole."""

    def load(self, folder: str) -> bool:
        """Restore what `save` wrote. Returns False where the folder holds no teacher.

        Raises:
            ValueError: the file is torn, or belongs to another kind of teacher or another set of weights.
        """
        return True


class AdapterOffTeacher(Teacher):
    """The `base` teacher of a PEFT model: the base model, that is the same weights with the adapter disabled. For an
    adapter that was trained before, that is the model under it, not the model that this training starts from.

    Raises:
        ValueError: disabling this adapter does not give the base model.
    """

    def __init__(self, student: nn.Module):
        super().__init__(student)
        for name in student.active_adapters:
            config = student.peft_config[name]
            fix = (
                "Use teacher_model_kind='synced', 'ema' or 'live', or pass the original model as `teacher_model` with "
                "teacher_model_kind='external'."
            )
            if getattr(config, "bias", "none") != "none":
                raise ValueError(
                    f"teacher_model_kind='base' disables the adapter, but with bias={config.bias!r} the adapter "
                    f"{name!r} also trains the base model's biases, which stay as trained. Set bias='none'. {fix}"
                )
            init = str(getattr(config, "init_lora_weights", "")).lower()
            if init.startswith(_CHANGES_BASE):
                raise ValueError(
                    f"teacher_model_kind='base' disables the adapter, but init_lora_weights={init!r} of adapter "
                    f"{name!r} has moved a part of the base weights into it. {fix}"
                )

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[nn.Module]:
        # PEFT sets requires_grad on what the modules hold at the moment: with FSDP2 that must be the shards
        shards.drop_gathered(model)
        # peft 0.21: leaving the block makes the whole adapter trainable, also what its owner had frozen
        requires_grad = [(parameter, parameter.requires_grad) for parameter in self.student.parameters()]
        try:
            with self.student.disable_adapter():
                try:
                    yield model
                finally:
                    shards.drop_gathered(model)
        finally:
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)


class CopyTeacher(Teacher):
    """A teacher with its own copy of the trainable weights: `synced`, `ema`, and `base` without PEFT.

    Args:
        student: as for [`Teacher`].
        kind: `"synced"`, `"ema"` or `"base"`.
        sync_steps: `synced`: optimizer steps from one snapshot to the next.
        update_rate: `ema`: teacher += rate * (student - teacher) after every step. The average is taken parameter by
            parameter, in float32, also for the factors of a LoRA pair.
        offload: keep the copy on the CPU.
        sharded: the student's weights are, or will be when training begins, sharded. Parameters are then listed, and
            `base` copied, when a run begins: FSDP2 replaces the parameters that the model was built with.

    Raises:
        ValueError: nothing is trainable.
    """

    copies = True

    def __init__(
        self,
        student: nn.Module,
        kind: str,
        *,
        sync_steps: int,
        update_rate: float,
        offload: bool,
        sharded: bool = False,
    ):
        super().__init__(student)
        self.kind, self.sync_steps, self.update_rate, self.offload = kind, sync_steps, update_rate, offload
        self.sharded = sharded
        # noted once: PEFT clears requires_grad while an adapter is disabled
        self.names = [shards.plain_name(name) for name, p in student.named_parameters() if p.requires_grad]
        if not self.names:
            raise ValueError(
                f"teacher_model_kind={kind!r} copies the trainable weights, and the model has none. Unfreeze the "
                "adapter (`PeftModel.from_pretrained(..., is_trainable=True)`) or the model."
            )
        self.trainable: dict[str, nn.Parameter] = {}
        self.copy: dict[str, torch.Tensor] = {}
        self.copied_at = 0
        self.restored = False
        if kind == "base" and not sharded:
            # now, before a checkpoint's weights replace those that training starts from
            self._list()
            self._take(0)

    def start(self, step: int) -> None:
        self._list()
        if not self.restored and (self.kind != "base" or not self.copy):
            self._take(step)
        self.restored = False  # a second run of the same trainer starts from its own weights

    @torch.no_grad()
    def step_end(self, step: int) -> None:
        if self.kind == "synced" and step - self.copied_at >= self.sync_steps:
            self._take(step)
        elif self.kind == "ema":
            for name, parameter in self.trainable.items():
                copy = shards.piece(self.copy[name])
                copy.lerp_(shards.piece(parameter).to(copy.device, copy.dtype), self.update_rate)
            self.copied_at = step

    def _list(self) -> None:
        """The parameters, as the model holds them now that it is prepared for training."""
        shards.drop_gathered(self.student)
        held = {shards.plain_name(name): parameter for name, parameter in self.student.named_parameters()}
        self.trainable = {name: held[name] for name in self.names}
        for name, parameter in self.trainable.items():
            shards.check(name, parameter)

    @torch.no_grad()
    def _take(self, step: int) -> None:
        for name, parameter in self.trainable.items():
            if name in self.copy:
                shards.piece(self.copy[name]).copy_(shards.piece(parameter))
            else:
                self.copy[name] = self._copied(parameter)
        self.copied_at = step

    def _copied(self, parameter: nn.Parameter) -> torch.Tensor:
        value = shards.held_as(parameter)
        # in bfloat16 a step of 5 % of a small difference rounds to nothing
        dtype = torch.promote_types(value.dtype, torch.float32) if self.kind == "ema" else value.dtype
        return value.to("cpu" if self.offload else value.device, dtype, copy=True)

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[nn.Module]:
        # a copy of higher precision than the weights (ema of bfloat16) stays as it is, a rounded one is exchanged
        resting = {
            name: shards.piece(self.copy[name]).to(parameter.dtype) for name, parameter in self.trainable.items()
        }
        exchanged = []
        shards.drop_gathered(model, self.trainable.values())
        try:
            for name, parameter in self.trainable.items():
                _exchange(shards.piece(parameter), resting[name])
                exchanged.append(name)
            yield model
        finally:
            for name in exchanged:  # the piece is asked for again: FSDP2's first forward may move it
                _exchange(shards.piece(self.trainable[name]), resting[name])
            shards.drop_gathered(model, self.trainable.values())

    def save(self, folder: str, *, write: bool = True) -> None:
        about = {"kind": self.kind, "copied_at": str(self.copied_at)}
        if self._is_sharded():
            shards.save(Path(folder, STATE_FOLDER), self.trainable, self.copy, about)
        elif write:
            # safetensors wants every tensor on its own storage
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.copy.items()}
            files.replace_file(Path(folder, STATE_FILE), lambda path: save_file(tensors, path, about))

    def load(self, folder: str) -> bool:
        self._list()
        path = Path(folder, STATE_FOLDER)
        if not path.exists():
            path = Path(folder, STATE_FILE)
        if not path.exists():
            if self.kind == "base" and not self.copy:
                raise ValueError(
                    f"{folder} holds no teacher, and the sharded weights that training started from are gone. Resume "
                    "from a checkpoint with training state, or pass the folder as `model` instead of resuming."
                )
            return False
        about, shapes = _readable(path, shards.header if path.is_dir() else _header, path)
        self._check_saved(path, about, shapes)
        copy = {name: self._copied(parameter) for name, parameter in self.trainable.items()}
        if path.is_dir():
            _readable(path, shards.load, path, self.trainable, copy)
        else:
            _readable(path, _load_whole, path, copy)
        self.copy, self.copied_at, self.restored = copy, int(about["copied_at"]), True
        return True

    def _check_saved(self, path: Path, about: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
        if about.get("kind") != self.kind:
            raise ValueError(
                f"{path} holds a teacher of kind {about.get('kind')!r}, but teacher_model_kind={self.kind!r}. "
                "Resume with the kind that the run was started with."
            )
        expected = {name: shards.whole_shape(parameter) for name, parameter in self.trainable.items()}
        if shapes != expected:
            odd = sorted(set(shapes) ^ set(expected)) or sorted(n for n in shapes if shapes[n] != expected[n])
            raise ValueError(
                f"{path} holds other weights than the model trains (first difference: {odd[0]!r}). Resume with the "
                "same model, `peft_config` and way of sharding that the run was started with."
            )
        if self._is_sharded() and path.is_file():
            raise ValueError(
                f"{path} was saved by a run whose weights were not sharded. Resume without FSDP or ZeRO-3, or pass "
                "the checkpoint's folder as `model` instead of resuming."
            )

    def _is_sharded(self) -> bool:
        return any(map(shards.is_sharded, self.trainable.values()))


def _readable(path: Path, read: Callable, *args):
    try:
        return read(*args)
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(
            f"The teacher's weights in {path} cannot be read ({error}). The checkpoint is incomplete: resume from "
            "an earlier one."
        ) from error


def _header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a dict
        return file.metadata() or {}, shapes


def _load_whole(path: Path, copy: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, tensor in copy.items():
            tensor.copy_(file.get_tensor(name))


@torch.no_grad()
def _exchange(first: torch.Tensor, second: torch.Tensor) -> None:
    value = first.clone()
    first.copy_(second)
    second.copy_(value)


class ExternalTeacher(Teacher):
    """Another model with the student's vocabulary; it is frozen."""

    def __init__(self, student: nn.Module, model: nn.Module):
        super().__init__(student)
        # DeepSpeed's engine gathers by hooks of its module, as for the student; its `config` is DeepSpeed's
        self.engine = model if type(model).__module__.startswith("deepspeed.") else None
        self.model = model if self.engine is None else self.engine.module
        self.model.requires_grad_(False)

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self.model


class TeacherCallback(TrainerCallback):
    """Tells the teacher when training begins and when an optimizer step is done.

    transformers 5.23: a checkpoint's weights and state are loaded before `on_train_begin`; `on_step_end` runs before
    the checkpoint of that step is written.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def on_train_begin(self, args, state, control, **kwargs):
        self.teacher.start(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.teacher.step_end(state.global_step)


def build_teacher(
    kind: str,
    student: nn.Module,
    *,
    is_peft: bool,
    sync_steps: int,
    update_rate: float,
    offload: bool,
    sharded: bool = False,
    external: nn.Module | None = None,
) -> Teacher:
    """The teacher of a kind; see `RLSDConfig.teacher_model_kind`."""
    if kind == "live":
        return Teacher(student)
    if kind == "external":
        return ExternalTeacher(student, external)
    if kind == "base" and is_peft:
        return AdapterOffTeacher(student)
    return CopyTeacher(student, kind, sync_steps=sync_steps, update_rate=update_rate, offload=offload, sharded=sharded)


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; afterwards every module is in the mode that it had before, also after an exception.

    Without eval mode the gain would measure dropout: with a LoRA dropout of 0.05 two identical passes differ by up to
    0.14 nats (tiny Llama, TRL 1.16).
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
