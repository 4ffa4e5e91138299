"""Accelerate's FSDP on CPU over gloo: import this before a trainer is built.

Accelerate 1.15 takes up FSDP for accelerators alone (`AcceleratorState.__init__`), though torch's `fully_shard` runs
on CPU. What is changed here is the one value that it asks for; what follows is Accelerate's own: preparing and
wrapping the model, clipping, saving and loading.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


_init = AcceleratorState.__init__


def _as_if_on_accelerators(self, *args, **kwargs):
    if not AcceleratorState._shared_state:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)


AcceleratorState.__init__ = _as_if_on_accelerators
