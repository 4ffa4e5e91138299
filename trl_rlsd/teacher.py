"""Whose weights score: the student's own (live), a copy of them (synced, ema, base), or another model's (external).

A teacher never generates and never learns. All that it owns is, at most, one copy of the *trainable* weights, which
with LoRA is the adapter: a second copy of the base model never exists. To score, the copy's values are exchanged with
the student's in place and exchanged back, so that every holder of the parameters (wrappers, optimizer, compiled code)
goes on holding the same storage, and one parameter more is allocated at a time. (An `ema` of bfloat16 weights is kept
in float32; its rounded values exist once more while it scores.)

This must happen while no graph is alive: autograd refuses to run backward through weights that were written to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback


STATE_FILE = "rlsd_teacher.safetensors"

# LoRA initialisations that take the adapter's first value out of the base weights: without the adapter, what is left
# is not the model that training started from.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Teacher:
    """The live teacher: the student as it is at the moment, and the form that the other kinds fill in.

    Args:
        student: the unwrapped model that is trained, a PEFT model or not.
    """

    copies = False  # whether it keeps weights of its own, apart from the student's

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

    def save(self, folder: str) -> None:
        """Write what `load` needs into a checkpoint's folder."""

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
        # peft 0.21: leaving the block makes the whole adapter trainable, also what its owner had frozen
        requires_grad = [(parameter, parameter.requires_grad) for parameter in self.student.parameters()]
        try:
            with self.student.disable_adapter():
                yield model
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

    Raises:
        ValueError: nothing is trainable.
    """

    copies = True

    def __init__(self, student: nn.Module, kind: str, *, sync_steps: int, update_rate: float, offload: bool):
        super().__init__(student)
        self.kind, self.sync_steps, self.update_rate, self.offload = kind, sync_steps, update_rate, offload
        # listed once: PEFT clears requires_grad while an adapter is disabled
        self.trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError(
                f"teacher_model_kind={kind!r} copies the trainable weights, and the model has none. Unfreeze the "
                "adapter (`PeftModel.from_pretrained(..., is_trainable=True)`) or the model."
            )
        self.copy: dict[str, torch.Tensor] = {}
        self.copied_at = 0
        self.restored = False
        if kind == "base":  # now, before a checkpoint's weights replace those that training starts from
            self._take(0)

    def start(self, step: int) -> None:
        if self.kind != "base" and not self.restored:
            self._take(step)
        self.restored = False  # a second run of the same trainer starts from its own weights

    def step_end(self, step: int) -> None:
        if self.kind == "synced" and step - self.copied_at >= self.sync_steps:
            self._take(step)
        elif self.kind == "ema":
            for name, parameter in self.trainable.items():
                copy = self.copy[name]
                copy.lerp_(parameter.detach().to(copy.device, copy.dtype), self.update_rate)
            self.copied_at = step

    def _take(self, step: int) -> None:
        for name, parameter in self.trainable.items():
            value = parameter.detach()
            if self.kind == "ema":  # in bfloat16 a step of 5 % of a small difference rounds to nothing
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            value = value.to("cpu") if self.offload else value
            if name in self.copy:
                self.copy[name].copy_(value)
            else:
                self.copy[name] = value.clone()
        self.copied_at = step

    @contextmanager
    def weights(self, model: nn.Module) -> Iterator[nn.Module]:
        # a copy of higher precision than the weights (ema of bfloat16) stays as it is, a rounded one is exchanged
        resting = {name: self.copy[name].to(parameter.dtype) for name, parameter in self.trainable.items()}
        exchanged = []
        try:
            for name, parameter in self.trainable.items():
                _exchange(parameter, resting[name])
                exchanged.append(name)
            yield model
        finally:
            for name in exchanged:
                _exchange(self.trainable[name], resting[name])

    def save(self, folder: str) -> None:
        # safetensors wants every tensor on its own storage
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.copy.items()}
        save_file(tensors, os.path.join(folder, STATE_FILE), {"kind": self.kind, "copied_at": str(self.copied_at)})

    def load(self, folder: str) -> bool:
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            return False
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The teacher's weights in {path} cannot be read ({error}). The checkpoint is incomplete: resume from "
                "an earlier one."
            ) from error
        if metadata.get("kind") != self.kind:
            raise ValueError(
                f"{path} holds a teacher of kind {metadata.get('kind')!r}, but teacher_model_kind={self.kind!r}. "
                "Resume with the kind that the run was started with."
            )
        shapes = {name: tuple(p.shape) for name, p in self.trainable.items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            odd = sorted(set(tensors) ^ set(shapes)) or sorted(n for n in shapes if shapes[n] != tensors[n].shape)
            raise ValueError(
                f"{path} holds other weights than the model trains (first difference: {odd[0]!r}). Resume with the "
                "same model and `peft_config` that the run was started with."
            )
        for name, parameter in self.trainable.items():
            self.copy[name] = tensors[name].to("cpu" if self.offload else parameter.device)
        self.copied_at = int(metadata["copied_at"])
        self.restored = True
        return True


@torch.no_grad()
def _exchange(first: torch.Tensor, second: torch.Tensor) -> None:
    value = first.detach().clone()
    first.copy_(second)
    second.copy_(value)


class ExternalTeacher(Teacher):
    """Another model with the student's vocabulary; it is frozen."""

    def __init__(self, student: nn.Module, model: nn.Module):
        super().__init__(student)
        self.model = model
        model.requires_grad_(False)

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
    external: nn.Module | None = None,
) -> Teacher:
    """The teacher of a kind; see `RLSDConfig.teacher_model_kind`."""
    if kind == "live":
        return Teacher(student)
    if kind == "external":
        return ExternalTeacher(student, external)
    if kind == "base" and is_peft:
        return AdapterOffTeacher(student)
    return CopyTeacher(student, kind, sync_steps=sync_steps, update_rate=update_rate, offload=offload)


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
