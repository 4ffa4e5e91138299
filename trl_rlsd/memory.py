"""How much memory a run takes: an estimate, part by part, from the model's sizes and the config. Nothing is loaded.

    Sizes (of the model), Setup (of the run) -> bytes of each part, by phase -> the peak of one process

A process holds the resident parts all the time, and in each phase what that phase works on: the peak is the resident
parts and the largest phase. On a CPU in float32 two constants are fitted to measured peaks (tests/benchmarks/
step_cost.py, whose model of a step is built on `Architecture`); for a GPU they are read off the code, not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


# TRL 1.16: tokens and vocabulary of a tile of the fused head
TILE = (4096, 32_768)
# liger-kernel 0.8: of a tile of its chunked loss, always float32
LIGER_TILE = (2048, 4096)
# Without Triton the head's tile is several in float32, and freed pieces stay around: fitted on a CPU.
CPU_ACTIVATIONS, CPU_TILES = 1.175, 8
# of a process before it has a model: Python and the libraries; on a GPU, CUDA's context and workspaces (assumed)
CPU_PROCESS, GPU_PROCESS = 600e6, 800e6


@dataclass(frozen=True)
class Architecture:
    """The shape of a dense decoder like Llama. `source`: the model that has it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    source: str = ""

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)]
        return attention + [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]

    @property
    def blocks(self) -> int:
        return self.layers * sum(i * o for i, o in self.linear)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Without the norms, which are less than 0.1 %."""
        return self.blocks + self.head * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers but the head."""
        return self.layers * rank * sum(i + o for i, o in self.linear)

    @property
    def cache(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    @property
    def elements(self) -> int:
        """Values that one layer makes of one token."""
        return sum(o for _, o in self.linear) + 5 * self.hidden + 2 * self.intermediate

    def activations(self, tokens: int, checkpointing: bool) -> int:
        """Values that the backward of so many tokens needs: with checkpointing the inputs of all layers, and one
        layer and its gradients."""
        layers = self.hidden * self.layers + 2 * self.elements if checkpointing else self.elements * self.layers
        return layers * tokens


@dataclass(frozen=True)
class Sizes:
    """Of the model that is trained, counted on itself. `parameters`: without an adapter's; `linear`: those of linear
    layers but the head, which quantisation reaches; `trainable`: an adapter's, or all."""

    architecture: Architecture
    parameters: int
    linear: int
    trainable: int

    @property
    def full(self) -> bool:
        return self.trainable >= self.parameters


@dataclass(frozen=True)
class Setup:
    """A run, as far as memory goes. Bytes are those of one value.

    Args:
        rows, sampled: completions of a process: of one forward of the update, and those that are sampled at once.
        prompt, context: tokens of the longest student's prompt, and what the teacher's is longer by.
        weights: of the base; `linear` of its linear layers (0.5 and the scales in 4 bits), `trained` of what trains.
        compute: of activations: 2 under autocast or with weights of 16 bits.
        optimizer: of the optimizer's state of one trained value.
        teacher: whether one scores. `copy`: copies of what is trained that it keeps on the device: 1, or 0.
        others: bytes of models beside: a reference model, an external teacher.
        shards: processes that share each weight; `processes`: all of them.
        engine: vLLM's share of a GPU (colocated), 0 without; None where another machine samples.
    """

    rows: int
    sampled: int
    tokens: int
    prompt: int
    context: int
    weights: float = 4
    linear: float = 4
    trained: float = 4
    compute: float = 4
    optimizer: float = 8
    teacher: bool = True
    copy: int = 1
    others: float = 0
    checkpointing: bool = True
    liger: bool = False
    budget: int = 16_384
    shards: int = 1
    processes: int = 1
    engine: float | None = 0


def resident(sizes: Sizes, setup: Setup, *, gpu: bool) -> dict[str, float]:
    """Bytes that a process holds all the time."""
    frozen = 0 if sizes.full else sizes.linear * setup.linear + (sizes.parameters - sizes.linear) * setup.weights
    trained = sizes.trainable * setup.trained
    parts = {
        "frozen weights": frozen,
        "trained weights": trained,
        "optimizer state": sizes.trainable * setup.optimizer,
        "teacher's copy": setup.copy * trained,
        "other models": setup.others,
    }
    parts = {name: size / setup.shards for name, size in parts.items()}
    # DDP keeps buckets as large as the gradients, from its first step on
    parts["DDP's buckets"] = trained if setup.processes > 1 and setup.shards == 1 else 0
    parts["process"] = GPU_PROCESS if gpu else CPU_PROCESS
    return {name: size for name, size in parts.items() if size}


def phases(sizes: Sizes, setup: Setup, *, gpu: bool) -> dict[str, dict[str, float]]:
    """Bytes that each phase adds to the resident ones while it lasts."""
    arch, length = sizes.architecture, setup.prompt + setup.tokens
    gathered = _gathered(sizes, setup)
    # one linear layer at a time is taken out of 4 or 8 bits
    unpacked = 4 * max(i * o for i, o in arch.linear) if setup.linear < min(setup.weights, 2) else 0
    generation = {"KV cache": setup.weights * arch.cache * setup.sampled * length}
    generation["logits of a token"] = 3 * 4 * setup.sampled * arch.vocabulary
    if setup.engine != 0:
        generation = {}
    row = setup.prompt + setup.context + setup.tokens
    scored = min(max(setup.budget, row), setup.sampled * row)
    update = setup.rows * length
    factor = 1 if gpu else CPU_ACTIVATIONS
    each = {
        "generation": _nonzero(generation | {"gathered weights": gathered, "unpacked weights": unpacked}),
        "teacher pass": _nonzero({
            "activations": factor * setup.compute * arch.elements * scored,
            "KV cache": setup.compute * arch.cache * scored,
            "head": head(sizes, setup, setup.sampled * setup.tokens if gpu else scored, gpu=gpu, trains=False),
            "gathered weights": gathered,
            "unpacked weights": unpacked,
        }),
        "update": _nonzero({
            "gradients": sizes.trainable * setup.trained / setup.shards,
            "activations": factor * setup.compute * arch.activations(update, setup.checkpointing),
            # Triton's fused head skips what has no label, the others score prompts too
            "head": head(sizes, setup, setup.rows * setup.tokens if gpu else update, gpu=gpu, trains=True),
            "weights in 16 bits": _cast(sizes, setup),
            "gathered weights": gathered,
            "unpacked weights": unpacked,
        }),
    }  # fmt: skip
    return each if setup.teacher else {name: parts for name, parts in each.items() if name != "teacher pass"}


def head(sizes: Sizes, setup: Setup, tokens: int, *, gpu: bool, trains: bool) -> float:
    """Bytes of the largest tile of logits, and of gradients in float32 of what the head reads and of its weights."""
    arch, full = sizes.architecture, trains and sizes.full
    hidden = 4 * arch.hidden * tokens if trains else 0
    if setup.liger and trains:
        return 3 * 4 * math.prod(LIGER_TILE) + hidden + (4 * arch.head if full else 0)
    tile = setup.compute * min(tokens, TILE[0]) * min(arch.vocabulary, TILE[1])
    if not gpu:
        return CPU_TILES * tile
    return tile + hidden + setup.compute * arch.hidden * TILE[1] + (4 * arch.head if full else 0)


def _gathered(sizes: Sizes, setup: Setup) -> float:
    """FSDP2 and ZeRO-3: two layers in flight in 16 bits, the head in the weights' own precision."""
    arch = sizes.architecture
    return (2 * 2 * arch.blocks / arch.layers + setup.weights * arch.head) if setup.shards > 1 else 0


def _cast(sizes: Sizes, setup: Setup) -> float:
    """Float32 weights as autocast has them: all at once where they are trained, or needed by the backward of a graph
    without checkpoints; else those of a layer."""
    weights = setup.trained if sizes.full else setup.linear
    if setup.compute >= weights or setup.shards > 1:
        return 0
    whole = sizes.full or not setup.checkpointing
    return setup.compute * sizes.linear / (1 if whole else sizes.architecture.layers)


def peak(sizes: Sizes, setup: Setup, *, gpu: bool) -> tuple[float, str]:
    """Bytes of one process at the highest point, and the phase in which that is."""
    lasting = sum(resident(sizes, setup, gpu=gpu).values())
    taken = {name: sum(parts.values()) for name, parts in phases(sizes, setup, gpu=gpu).items()}
    phase = max(taken, key=taken.get)
    return lasting + taken[phase], phase


def engine(sizes: Sizes, setup: Setup, length: int) -> float:
    """Bytes without which vLLM does not start: the weights in 16 bits or as they are quantised, and the cache of one
    sequence of `length` tokens. Its activations are not in it."""
    linear = min(2, setup.linear) * sizes.linear
    return linear + 2 * (sizes.parameters - sizes.linear) + 2 * sizes.architecture.cache * length


def room(memory: float, setup: Setup) -> float:
    """Bytes of a GPU that are left beside vLLM's engine, and not lost to fragments (5 %)."""
    return memory * (0.95 - (setup.engine or 0))


def _nonzero(parts: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}
