"""What a training step costs one rank: seconds of generation, teacher pass and update, and bytes of memory.

    Architecture, Load -> work (FLOPs, bytes, operators, by phase) -> seconds at given rates

`work` counts and knows no machine; `price` values the counts at rates, on this machine those that `fit` finds in
measured steps. `predict` values them for a cluster of GPUs, where nothing has been measured: every number in `Cluster`
is an assumption. All completions are of one length, so stragglers are not in here; nor are rewards and data.

FLOPs are 2 for a multiply-add. Attention counts the causal half. Of a dense decoder like Llama.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls
from scipy.stats import binom

from trl_rlsd.memory import TILE, Architecture


PHASES = ("generation", "teacher", "update")
# What work is counted in, and what a rate is therefore the price of.
KINDS = {
    "forward_flops": "multiplications and additions of linear layers in forwards over many tokens",
    "backward_flops": "the same of backwards",
    "attention_flops": "the same of attention, in both",
    "logits": "logits, each made and reduced",
    "elements": "values that element-wise operators read or write",
    "operators": "calls of an operator, however small",
    "decode_flops": "multiplications and additions of forwards of one token a sequence",
    "weight_bytes": "weights that such a forward reads",
    "cache_bytes": "keys and values that it reads",
    "state_bytes": "weights, gradients and optimizer state, passed over once",
}
LAYER_OPERATORS, ADAPTER_OPERATORS, DECODE_OPERATORS = 55, 42, 40  # of transformers' Llama; of LoRA on 7 linear layers
OPTIMIZER_PASSES = 10  # AdamW reads 4 tensors and writes 3, clipping reads 2 and writes 1
EXCHANGE_PASSES = 12  # the teacher's copy is exchanged and exchanged back, each a clone and two copies


MODELS = {
    "1B": Architecture(16, 2048, 8192, 32, 8, 64, 128_256, tied=True, source="Llama-3.2-1B"),
    "8B": Architecture(32, 4096, 14_336, 32, 8, 128, 128_256, source="Llama-3.1-8B"),
    "32B": Architecture(64, 5120, 27_648, 40, 8, 128, 152_064, source="Qwen2.5-32B"),
    "70B": Architecture(80, 8192, 28_672, 64, 8, 128, 128_256, source="Llama-3.1-70B"),
}


@dataclass(frozen=True)
class Load:
    """A step of one rank. `rank` is LoRA's; None trains every weight."""

    completions: int
    tokens: int
    prompt: int
    context: int
    group: int
    informative: int  # groups that the teacher scores
    rank: int | None = 16
    checkpointing: bool = True
    micro_batch: int | None = None  # completions of one forward of the update; None: all
    budget: int = 16_384  # teacher_token_budget
    shared: bool | None = None  # teacher_shared_prefix
    overhead: int = 16  # of a forward, in tokens, when None chooses: that of trl_rlsd.teacher_pass
    scores_prompts: bool = False  # TRL's fused head skips what has no label only where there is Triton
    bytes: int = 4  # of a value in a forward

    def trainable(self, arch: Architecture) -> int:
        return arch.parameters if self.rank is None else arch.adapter(self.rank)


# ------------------------------------------------------------------ work


def teacher_forwards(load: Load) -> list[tuple[int, int, int]]:
    """(rows, new tokens, tokens before them that are in the cache) of every forward: `trl_rlsd.teacher_pass.plan` for
    equal lengths. With shared prompts P' + G * (T + 1) tokens a group, the last of a prompt going with each row."""
    prompt, rows = load.prompt + load.context, load.informative * load.group
    whole_row = prompt + load.tokens
    most = max(1, load.budget // whole_row)
    whole = [(n, whole_row, 0) for n in _portions(rows, most)]
    shared = []
    for groups in _portions(load.informative, max(1, load.budget // (load.group * (whole_row + 1)))):
        shared.append((groups, prompt - 1, 0))
        shared += [(n, load.tokens + 1, prompt - 1) for n in _portions(groups * load.group, most)]
    if load.shared is None and load.group > 1:
        # as plan() counts them, the prompt's last token twice
        cost = {name: sum(n * new + load.overhead for n, new, _ in f) for name, f in (("s", shared), ("w", whole))}
        return shared if cost["s"] + load.informative < cost["w"] else whole
    return shared if load.shared and load.group > 1 else whole


def _portions(count: int, most: int) -> list[int]:
    return [most] * (count // most) + ([count % most] if count % most else [])


def forward(arch: Architecture, load: Load, rows: int, new: int, past: int, scored: int) -> Counter:
    """`new` tokens of `rows` sequences after `past` cached ones; the head reads `scored` of all these tokens."""
    tokens, adapter = rows * new, 0 if load.rank is None else arch.adapter(load.rank)
    return Counter(
        forward_flops=2 * (arch.blocks + adapter) * tokens + 2 * arch.head * scored,
        attention_flops=4 * arch.layers * arch.heads * arch.head_size * tokens * (past + new / 2),
        logits=scored * arch.vocabulary,
        elements=arch.layers * (arch.elements + _adapter_elements(arch, load)) * tokens,
        operators=arch.layers * _layer_operators(load) if tokens else 0,
    )


def _layer_operators(load: Load) -> int:
    return LAYER_OPERATORS + (0 if load.rank is None else ADAPTER_OPERATORS)


def _adapter_elements(arch: Architecture, load: Load) -> int:
    return 0 if load.rank is None else 3 * sum(o for _, o in arch.linear)  # its output, scaled, added


def backward(arch: Architecture, load: Load, rows: int, length: int, scored: int) -> Counter:
    """Gradients of the inputs, and of the weights that are trained; what is computed a second time for them is
    forward work: the head's logits (the fused head keeps none) and, with checkpointing, the layers."""
    tokens, full = rows * length, load.rank is None
    adapter = 0 if full else arch.adapter(load.rank)
    once = forward(arch, load, rows, length, 0, 0)
    again = forward(arch, load, 0, 0, 0, scored)
    weights = arch.blocks * (2 if full else 1) + 2 * adapter
    done = Counter(
        forward_flops=again["forward_flops"],
        backward_flops=2 * weights * tokens + 2 * arch.head * scored * (2 if full else 1),
        attention_flops=2 * once["attention_flops"],
        logits=scored * arch.vocabulary,
        elements=2 * once["elements"],
        operators=2 * once["operators"],
    )
    return _sum([done, once]) if load.checkpointing else done


def generation(arch: Architecture, load: Load) -> Counter:
    """The prompts of all completions, then one forward for each token but the first."""
    rows, steps = load.completions, max(load.tokens - 1, 0) if load.completions else 0
    prefill = forward(arch, load, rows, load.prompt, 0, rows)
    adapter = 0 if load.rank is None else arch.adapter(load.rank)
    weights, read = arch.blocks + arch.head + adapter, steps * load.prompt + steps * (steps + 1) / 2
    decode = Counter(
        decode_flops=rows * (2 * weights * steps + 4 * arch.layers * arch.heads * arch.head_size * read),
        weight_bytes=load.bytes * weights * steps,
        cache_bytes=load.bytes * arch.cache * rows * read,
        logits=rows * arch.vocabulary * steps,
        elements=arch.layers * (arch.elements + _adapter_elements(arch, load)) * rows * steps,
        operators=steps * (arch.layers * _layer_operators(load) + DECODE_OPERATORS),
    )
    return _sum([prefill, decode])


def teacher(arch: Architecture, load: Load) -> Counter:
    forwards = [forward(arch, load, n, new, past, _scored(load, n, new, past)) for n, new, past in _scoring(load)]
    return _sum([*forwards, Counter(state_bytes=4 * EXCHANGE_PASSES * load.trainable(arch) if forwards else 0)])


def _scoring(load: Load) -> list[tuple[int, int, int]]:
    return teacher_forwards(load) if load.informative and load.tokens else []


def _scored(load: Load, rows: int, new: int, past: int) -> int:
    if not past and new < load.tokens + load.prompt + load.context:  # a prompt alone: its keys and values are wanted
        return 0
    return rows * (new - 1 if load.scores_prompts else load.tokens)


def update(arch: Architecture, load: Load) -> Counter:
    length = load.prompt + load.tokens
    done = []
    for rows in _portions(load.completions, load.micro_batch or max(load.completions, 1)):
        scored = rows * (length - 1 if load.scores_prompts else load.tokens)
        done += [forward(arch, load, rows, length, 0, scored), backward(arch, load, rows, length, scored)]
    return _sum([*done, Counter(state_bytes=4 * OPTIMIZER_PASSES * load.trainable(arch) if done else 0)])


def work(arch: Architecture, load: Load) -> dict[str, Counter]:
    return {"generation": generation(arch, load), "teacher": teacher(arch, load), "update": update(arch, load)}


def _sum(parts: list[Counter]) -> Counter:
    total = Counter()
    for part in parts:
        total.update(part)
    return total


# ------------------------------------------------------------------ memory


MEMORY = {
    "state": "weights, gradients, optimizer, the teacher's copy",
    "activations": "what the backward needs of a micro-batch",
    "logits": "the largest tile of logits in TRL's fused head",
    "process": "the rest, in processes",
}


def activations(arch: Architecture, load: Load, rows: int) -> int:
    """Bytes."""
    return load.bytes * arch.activations(rows * (load.prompt + load.tokens), load.checkpointing)


def memory(arch: Architecture, load: Load) -> Counter:
    """Bytes of a process that trains alone, in the precision of `load`, at the head's backward, where all is alive."""
    rows = min(load.micro_batch or load.completions, load.completions)
    scored = rows * (load.prompt + load.tokens if load.scores_prompts else load.tokens)
    frozen = 0 if load.rank is None else arch.parameters
    return Counter(
        state=load.bytes * (frozen + 5 * load.trainable(arch)),
        activations=activations(arch, load, rows),
        logits=load.bytes * min(scored, TILE[0]) * min(arch.vocabulary, TILE[1]),
        process=1,
    )


# ------------------------------------------------------------------ rates


def price(counts: dict[str, float], rates: dict[str, float]) -> float:
    return sum(rates[kind] * amount for kind, amount in counts.items())


def share(taken: dict[str, float]) -> float:
    """The teacher's, of the step."""
    return taken["teacher"] / sum(taken.values())


def fit(measured: list[tuple[dict[str, float], float]], kinds: Iterable[str]) -> dict[str, float]:
    """Rates, none negative, with the least sum of squared *relative* errors: a small step counts like a large one."""
    matrix = np.array([[counts.get(kind, 0) / value for kind in kinds] for counts, value in measured])
    scale = np.where(matrix.any(axis=0), matrix.max(axis=0), 1)  # FLOPs are 1e12, operators 1e3
    rates, _ = nnls(matrix / scale, np.ones(len(measured)))
    return dict(zip(kinds, (rates / scale).tolist(), strict=True))


# ------------------------------------------------------------------ GPUs: assumptions, nothing here is measured


@dataclass(frozen=True)
class Cluster:
    """Assumed, for H100 SXM: data sheet figures, and guesses of how much of them is reached."""

    flops: float = 989e12  # bf16, dense
    bandwidth: float = 3.35e12
    memory: float = 80e9
    usable_memory: float = 0.9
    per_node: int = 8
    link: float = 450e9  # NVLink, each direction
    network: float = 50e9  # a GPU's share between nodes
    host: float = 50e9  # to the CPU's memory
    train_utilisation: float = 0.4
    forward_utilisation: float = 0.45
    decode_utilisation: float = 0.6  # of the bandwidth
    operator: float = 5e-6  # a kernel's launch, hidden behind kernels that are longer
    decode_step: float = 3e-3  # an engine's scheduling and sampling
    reduction: float = 10e-6  # the latency of an all-reduce among the GPUs of one engine
    overlap: bool = True  # weights are gathered, and gradients reduced, behind the computation

    def transfer(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather or reduce-scatter to or from `size` bytes; an all-reduce is both. Rings through
        every GPU of a node share its network cards, so that a node sends at `per_node * network`."""
        rate = self.link if ranks <= self.per_node else min(self.link, self.per_node * self.network)
        return size * (ranks - 1) / ranks / rate

    def computed(self, done: Counter, utilisation: float) -> float:
        flops = done["forward_flops"] + done["backward_flops"] + done["attention_flops"]
        return max(flops / (self.flops * utilisation), done["operators"] * self.operator)

    def together(self, computing: float, communicating: float) -> float:
        return max(computing, communicating) if self.overlap else computing + communicating


@dataclass(frozen=True)
class Job:
    """A step of all ranks. Sharded (FSDP2): what is trained in float32, gathered in bfloat16; sampling by an engine on
    1 to 8 GPUs of a node, with bfloat16 weights of its own, that gives its memory back (vLLM, colocated). Not sharded
    (DDP): sampling from the weights that are there. The teacher's copy of what is trained: "gpu", "cpu" or "none"."""

    prompts: int = 256
    group: int = 8
    tokens: int = 2048
    prompt: int = 256
    context: int = 256
    informative: float = 0.5
    rank: int | None = None
    sharded: bool = True
    copy: str = "gpu"
    micro_batch: int = 4
    budget: int = 16_384
    decode_rows: int = 256  # completions that a GPU samples at once, at most

    def load(self, ranks: int) -> Load:
        """Of the rank with the most to score, for which the others wait."""
        if self.prompts % ranks:
            raise ValueError(f"prompts={self.prompts} on {ranks} ranks: give every rank as many whole groups.")
        groups = self.prompts // ranks
        return Load(
            groups * self.group,
            self.tokens,
            self.prompt,
            self.context,
            self.group,
            math.ceil(slowest(groups, self.informative, ranks) - 1e-9),
            self.rank,
            micro_batch=min(self.micro_batch, groups * self.group),
            budget=self.budget,
            shared=False if self.sharded else None,  # as trl_rlsd.teacher_pass does
            overhead=1024,
            bytes=2,
        )


def slowest(groups: int, informative: float, ranks: int) -> float:
    """Expected number of informative groups on the rank that has most of them, each being informative by chance."""
    return float(sum(1 - binom.cdf(range(groups), groups, informative) ** ranks))


def resident(arch: Architecture, job: Job, ranks: int) -> dict[str, float]:
    """Bytes on a GPU in every phase."""
    parts, trainable = ranks if job.sharded else 1, job.load(ranks).trainable(arch)
    frozen = 0 if job.rank is None else arch.parameters
    return {
        "weights": (2 * frozen + 4 * trainable) / parts,
        "gradients": 4 * trainable / parts,
        "optimizer": 8 * trainable / parts,
        "teacher": 4 * trainable / parts if job.copy == "gpu" else 0.0,
    }


def working(arch: Architecture, job: Job, load: Load) -> dict[str, float]:
    """Bytes on a GPU beside these while the teacher scores, and while the weights are updated."""
    # two layers in flight; the fused head gathers the head in the weights' own precision
    gathered = 2 * 2 * arch.blocks / arch.layers + 4 * arch.head if job.sharded else 0
    fused = gathered + 2 * math.prod(TILE)
    gradient = 4 * arch.head + 2 * arch.blocks / arch.layers if load.rank is None else 0  # before it is reduced
    read = max((rows * new for rows, new, _ in _scoring(load)), default=0)
    cached = max((rows * new for rows, new, past in _scoring(load) if not past), default=0)
    rows, length = load.micro_batch, load.prompt + load.tokens
    return {
        "teacher": fused + 2 * arch.elements * read + 2 * arch.cache * cached,
        "update": fused + gradient + activations(arch, load, rows) + 4 * arch.hidden * rows * length,
    }


def fitting(arch: Architecture, job: Job, cluster: Cluster, ranks: int) -> tuple[Load, float] | None:
    """The load with micro-batches as large as memory allows, and the bytes that are left for sampling; None if not
    even a single row fits."""
    load = job.load(ranks)
    left = cluster.memory * cluster.usable_memory - sum(resident(arch, job, ranks).values())
    while working(arch, job, load)["update"] > left and load.micro_batch > 1:
        load = replace(load, micro_batch=load.micro_batch // 2)
    while working(arch, job, load)["teacher"] > left and load.budget > load.prompt + load.context + load.tokens:
        load = replace(load, budget=load.budget // 2)
    return (load, left) if max(working(arch, job, load).values()) <= left else None


def sampling(arch: Architecture, job: Job, cluster: Cluster, ranks: int, load: Load, left: float) -> float | None:
    """Seconds of generation with the best number of GPUs to an engine; None if no completion fits beside the weights.
    Every decoded token waits for weights and cache to be read, or for its FLOPs."""
    best = None
    for size in (n for n in (1, 2, 4, 8) if n == 1 or (job.sharded and ranks % n == 0 and n <= cluster.per_node)):
        free = left - (2 * arch.parameters / size if job.sharded else 0)
        fits = int(free * size / (2 * arch.cache * (load.prompt + load.tokens)))
        rows = min(size * load.completions, size * job.decode_rows, fits)
        if rows < 1:
            continue
        done = generation(arch, replace(load, completions=rows))
        reading = (done["weight_bytes"] + done["cache_bytes"]) / (cluster.bandwidth * cluster.decode_utilisation)
        computing = done["decode_flops"] / (cluster.flops * cluster.forward_utilisation)
        reductions = cluster.reduction + cluster.transfer(2 * 2 * rows * arch.hidden, size)
        waiting = cluster.decode_step + (2 * arch.layers * reductions if size > 1 else 0)
        prefill = done["forward_flops"] + done["attention_flops"]
        prefill /= cluster.flops * cluster.forward_utilisation * size
        taken = max(reading, computing) / size + (load.tokens - 1) * waiting + prefill
        taken *= size * load.completions / rows  # those that wait start as others end
        taken += cluster.transfer(2 * arch.parameters, ranks) if job.sharded else 0
        best = taken if best is None else min(best, taken)
    return best


def predict(arch: Architecture, job: Job, cluster: Cluster, ranks: int) -> dict[str, float] | None:
    """Seconds of each phase of a step; None if it does not fit into memory."""
    fits = fitting(arch, job, cluster, ranks)
    sampled = None if fits is None else sampling(arch, job, cluster, ranks, *fits)
    if sampled is None:
        return None
    load = fits[0]
    return {
        "generation": sampled,
        "teacher": scoring(arch, job, cluster, ranks, load),
        "update": updating(arch, job, cluster, ranks, load),
    }


def scoring(arch: Architecture, job: Job, cluster: Cluster, ranks: int, load: Load) -> float:
    forwards = _scoring(load)
    if not forwards:
        return 0.0
    gather = cluster.transfer(2 * arch.parameters, ranks) if job.sharded else 0
    copied = 4 * load.trainable(arch) / (ranks if job.sharded else 1)
    # on the CPU: there and back for each exchange
    exchange = {"gpu": EXCHANGE_PASSES / cluster.bandwidth, "cpu": 4 / cluster.host, "none": 0}[job.copy] * copied
    for rows, new, past in forwards:
        done = forward(arch, load, rows, new, past, _scored(load, rows, new, past))
        exchange += cluster.together(cluster.computed(done, cluster.forward_utilisation), gather)
    return exchange


def updating(arch: Architecture, job: Job, cluster: Cluster, ranks: int, load: Load) -> float:
    trainable, length = load.trainable(arch), load.prompt + load.tokens
    gather = cluster.transfer(2 * arch.parameters, ranks) if job.sharded else 0
    scatter = cluster.transfer(2 * trainable, ranks) if job.sharded else 0
    taken = 4 * OPTIMIZER_PASSES * trainable / (ranks if job.sharded else 1) / cluster.bandwidth
    for rows in _portions(load.completions, load.micro_batch):
        ahead = forward(arch, load, rows, length, 0, rows * load.tokens)
        back = backward(arch, load, rows, length, rows * load.tokens)
        taken += cluster.together(cluster.computed(ahead, cluster.train_utilisation), gather)
        taken += cluster.together(cluster.computed(back, cluster.train_utilisation), gather + scatter)
    return taken + (0 if job.sharded else 2 * cluster.transfer(4 * trainable, ranks))  # DDP: once a step, not hidden
