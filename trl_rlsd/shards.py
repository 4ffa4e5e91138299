"""Weights of which every process holds a piece: FSDP2's DTensor parameters and DeepSpeed ZeRO-3's `ds_tensor`.

A forward gathers the pieces of one layer at a time. So whoever writes into the pieces decides what the next forward
reads, provided that the gathered copies which earlier forwards have left are dropped (`drop_gathered`): the root of an
FSDP2 model, its LM head and ZeRO-3's small parameters stay gathered. No function here gathers a parameter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


Tensors = Mapping[str, torch.Tensor]

ABOUT = "about.json"

# What torch.compile and activation checkpointing put into the names of parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A parameter's name as it was before the model was prepared for training."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this process holds a piece of the parameter."""
    return isinstance(parameter, DTensor) or _is_zero_3(parameter)


def piece(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter, or of a copy of it: a view, without gradient. Of a ZeRO-3 parameter it
    is flat and may end in padding; of a parameter that is not sharded it is the whole."""
    held = held_as(parameter)
    return held.to_local() if isinstance(held, DTensor) else held


def held_as(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor to copy for a copy of this process's piece: it still tells which piece that is."""
    return (parameter.ds_tensor if _is_zero_3(parameter) else parameter).detach()


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape that `save` writes: that of the whole parameter, flat for ZeRO-3."""
    return (parameter.ds_numel,) if _is_zero_3(parameter) else tuple(parameter.shape)


def check(name: str, parameter: torch.Tensor) -> None:
    """Refuse ZeRO-3 parameters whose forward reads another storage than `ds_tensor`, or whose pieces several groups
    of processes hold.

    Raises: ValueError.
    """
    if not _is_zero_3(parameter):
        return
    fix = "Leave that option out of the DeepSpeed config, or use teacher_model_kind='live' or 'external'."
    if parameter.ds_secondary_tensor is not None:
        raise ValueError(f"{name} has a second partition (zero_hpz_partition_size), which forwards read. {fix}")
    if getattr(parameter.ds_tensor.final_location, "value", None) == "nvme":
        raise ValueError(f"{name} rests on NVMe (offload_param), where its copy cannot be exchanged. {fix}")
    if parameter.ds_zero_partition_world_size != distributed.get_world_size():
        raise ValueError(f"{name} is sharded over a part of the processes (mics_shard_size). {fix}")


def drop_gathered(model: nn.Module, parameters: Iterable[torch.Tensor] = ()) -> None:
    """Let the next forward gather anew: all that FSDP2 keeps of a model, and of ZeRO-3 these parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in filter(_is_zero_3, parameters):
        parameter.partition()  # nothing happens to those that are not gathered


def gather_head(head: nn.Module | None) -> None:
    """Let the fused loss read a whole LM head, whose gradient FSDP2 then reduces.

    TRL 1.16 reads the head's weights without calling it, so a head that FSDP2 shards as a unit of its own (Accelerate
    does where it does not find the last norm beside it, as in Qwen3-VL) is not gathered by itself. What TRL then takes
    instead, `full_tensor()`, leaves the gradient unreduced: every process would train its part of the head on its own
    rows alone.
    """
    if isinstance(head, FSDPModule):
        head.unshard()


def save(
    folder: Path, parameters: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor], about: dict
) -> None:
    """Write the copies of sharded parameters, every process its pieces; all of them call this. The folder is there
    whole or not at all. It can be read by another number of processes."""
    staged = folder.with_name(f"{folder.name}.tmp")
    checkpoint.save(_entries(parameters, copies), checkpoint_id=staged)  # returns once all have written
    if distributed.get_rank() == 0:
        (staged / ABOUT).write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    distributed.barrier()


def header(folder: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """What `save` was told about the copies, and the shapes of the whole parameters.

    Raises: ValueError where the folder is torn.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
        stored = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, UnpicklingError, json.JSONDecodeError) as error:
        raise ValueError(str(error)) from error
    return about, {name: tuple(entry.size) for name, entry in stored.items()}


def load(folder: Path, parameters: Tensors, copies: Tensors) -> None:
    """Fill the copies with the pieces that this process holds, however they were cut when they were saved; all
    processes call this.

    Raises: ValueError, on every process, where the folder is torn.
    """
    try:
        checkpoint.load(_entries(parameters, copies), checkpoint_id=folder)
    except CheckpointException as error:
        raise ValueError(str(error)) from error


def _is_zero_3(parameter: torch.Tensor) -> bool:
    return getattr(parameter, "ds_tensor", None) is not None


def _entries(parameters: Tensors, copies: Tensors) -> dict[str, torch.Tensor]:
    return {name: _entry(parameter, copies[name]) for name, parameter in parameters.items()}


def _entry(parameter: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """A copy as torch.distributed.checkpoint knows pieces: as DTensor."""
    if not _is_zero_3(parameter):
        return copy
    # ZeRO-3 cuts the flat parameter into equal pieces and pads the last ones; `Shard(0)` cuts at the same places.
    mesh = DeviceMesh.from_group(distributed.group.WORLD, copy.device.type)
    valid = parameter.ds_numel - distributed.get_rank() * copy.numel()
    return DTensor.from_local(
        copy[: max(0, min(valid, copy.numel()))], mesh, [Shard(0)], shape=(parameter.ds_numel,), stride=(1,)
    )
