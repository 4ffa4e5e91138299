"""The teacher pass: which completions are scored together, and which prompts are encoded once for several.

    rows that matter -> plan (micro-batches under a token budget) -> forwards of the teacher -> log-probs (B, T)

The completions of a group have the same privileged prompt. Scored whole, G rows cost G * (P' + T) tokens; with the
prompt's keys and values computed once and read by all of them, P' + G * T. Nothing in the result depends on the order
of the rows, nor on which of them were packed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature

import torch
from accelerate.logging import get_logger
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from trl_rlsd import spans
from trl_rlsd.collator import left_padded, teacher_inputs
from trl_rlsd.images import RowImages, forward_fields


logger = get_logger(__name__)

# What a further forward costs beside its tokens, in tokens: on an accelerator a small forward waits for its kernels to
# be launched. The value for the CPU is where tests/benchmarks/teacher_pass.py breaks even; the other is an estimate.
_OVERHEAD = {"cpu": 16}
_OVERHEAD_ACCELERATOR = 1024


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the teacher together. With `shared` every group of rows has one prompt, encoded once."""

    groups: tuple[tuple[int, ...], ...]
    shared: bool

    @property
    def rows(self) -> list[int]:
        return [row for group in self.groups for row in group]


def plan(
    prompt_ids: Sequence[Sequence[int]],
    lengths: Sequence[int],
    rows: Iterable[int],
    *,
    budget: int,
    share: bool | None = False,
    overhead: int = 0,
) -> list[MicroBatch]:
    """Micro-batches that hold every row once, none above the budget unless a row or prompt alone is.

    Args:
        prompt_ids, lengths: of all rows, the teacher's prompt and the number of completion tokens.
        rows: those to be scored.
        budget: tokens that the rows of one forward read, padding and prompts included.
        share: whether prompts that several rows have in common are encoded once; None: where that costs less.
        overhead: what a forward costs beside its tokens, in tokens.
    """
    rows = list(rows)
    whole = _pack_rows(prompt_ids, lengths, rows, budget)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(prompt_ids[row]), []).append(row)
    several = [group for prompt, group in groups.items() if len(group) > 1 and len(prompt) > 1]
    if share is False or not several:
        return whole
    single = [row for group in groups.values() if group not in several for row in group]
    mixed = _pack_groups(prompt_ids, lengths, several, budget) + _pack_rows(prompt_ids, lengths, single, budget)
    if share:
        return mixed
    costs = [sum(_cost(batch, prompt_ids, lengths, budget, overhead) for batch in option) for option in (mixed, whole)]
    return mixed if costs[0] < costs[1] else whole


def _pack(units: list, size: Callable[[list], int], budget: int) -> list[list]:
    """Greedy, in the order given; `size` of a list of units is its padded number of tokens."""
    packed: list[list] = []
    for unit in units:
        if packed and size([*packed[-1], unit]) <= budget:
            packed[-1].append(unit)
        else:
            packed.append([unit])
    return packed


def _pack_rows(prompt_ids, lengths, rows, budget) -> list[MicroBatch]:
    # longest first: neighbours are alike, so little is padding, and what does not fit fails at once
    order = sorted(rows, key=lambda row: (-(len(prompt_ids[row]) + lengths[row]), row))

    def size(batch):
        return len(batch) * (max(len(prompt_ids[row]) for row in batch) + max(lengths[row] for row in batch))

    return [MicroBatch(tuple((row,) for row in batch), shared=False) for batch in _pack(order, size, budget)]


def _pack_groups(prompt_ids, lengths, groups, budget) -> list[MicroBatch]:
    order = sorted(groups, key=lambda group: (-len(prompt_ids[group[0]]), group[0]))

    def size(batch):  # what each row reads, so that the keys and values of a long prompt are counted for every row
        longest = max(len(prompt_ids[group[0]]) for group in batch)
        return sum(map(len, batch)) * (longest + 1 + max(lengths[row] for group in batch for row in group))

    return [MicroBatch(tuple(map(tuple, batch)), shared=True) for batch in _pack(order, size, budget)]


def _continued_rows(batch: MicroBatch, prompt_ids, lengths, budget: int) -> int:
    """How many rows read their prompts' keys and values at once."""
    longest = max(len(prompt_ids[group[0]]) for group in batch.groups)
    return max(1, budget // (longest + max(lengths[row] for row in batch.rows)))


def _prefix_tokens(groups, prompt_ids) -> int:
    return len(groups) * max(len(prompt_ids[group[0]]) for group in groups)


def _completion_tokens(groups, lengths) -> int:
    rows = [row for group in groups for row in group]
    return len(rows) * (1 + max(lengths[row] for row in rows))


def _cost(batch: MicroBatch, prompt_ids, lengths, budget: int, overhead: int) -> int:
    if batch.shared:
        prefix, completions = _prefix_tokens(batch.groups, prompt_ids), _completion_tokens(batch.groups, lengths)
        continuations = -(-len(batch.rows) // _continued_rows(batch, prompt_ids, lengths, budget))
        return prefix + completions + (1 + continuations) * overhead
    longest = max(len(prompt_ids[row]) for row in batch.rows) + max(lengths[row] for row in batch.rows)
    return len(batch.rows) * longest + overhead


class TeacherPass:
    """Scores completions after the teacher's prompts.

    Args:
        token_logps: model, ids (n, L), mask (n, L), T, and the fields of images by name -> log-probs (n, T) in nats of
            the last T tokens.
        autocast: a context for forwards that `token_logps` does not make.
        pad_token_id: the tokenizer's.
        budget: tokens of one forward, see `plan`.
        share: see `plan`.
        equalize: the number of forwards of this process -> the most of any process. For sharded weights, where every
            forward is a collective call: a process with fewer makes idle ones.
    """

    def __init__(
        self,
        token_logps: Callable[..., torch.Tensor],
        autocast: Callable[[], AbstractContextManager],
        pad_token_id: int,
        *,
        budget: int,
        share: bool | None,
        equalize: Callable[[int], int] | None = None,
    ):
        self.token_logps = token_logps
        self.autocast = autocast
        self.pad_token_id = pad_token_id
        self.budget = budget
        self.share = share
        self.equalize = equalize

    def plan(self, prompt_ids, lengths, rows, device: torch.device) -> list[MicroBatch]:
        overhead = _OVERHEAD.get(device.type, _OVERHEAD_ACCELERATOR)
        # prefill and completions are two forwards; processes could not agree on how many they make
        share = False if self.equalize is not None else self.share
        return plan(prompt_ids, lengths, rows, budget=self.budget, share=share, overhead=overhead)

    def __call__(
        self,
        model: torch.nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        ids: torch.Tensor,
        mask: torch.Tensor,
        rows: Sequence[int],
        images: Sequence[RowImages | None] | None = None,
    ) -> torch.Tensor:
        """Log-probs (B, T) in float32, in nats; 0 in the rows that are not to be scored, and at pads.

        Shapes: `prompt_ids` B lists; completion `ids`, `mask` (B, T), padded on the right; `rows` their numbers;
        `images` of the B prompts, for a model that reads some.
        """
        lengths = spans.lengths(mask)
        logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        prompts = prompt_ids, images or [None] * len(prompt_ids)
        # apart: no processor's fields say of a batch which rows have images
        for with_images in (False,) if images is None else (False, True):
            batches = self.plan(
                prompt_ids, lengths, [row for row in rows if (prompts[1][row] is not None) == with_images], ids.device
            )
            # before the first forward, which with sharded weights is a collective call itself
            idle = 0 if self.equalize is None else self.equalize(len(batches)) - len(batches)
            for batch in batches:
                if batch.shared:
                    scored = self._shared(model, prompt_ids, ids, mask, batch, lengths)
                else:
                    scored = self._whole(model, *prompts, ids, mask, batch, lengths)
                for chosen, scores in scored:
                    logps[chosen, : scores.size(1)] = scores.float()
            for _ in range(idle):
                list(self._whole(model, *prompts, ids, mask, _idle(prompts[1], with_images), [1] * len(ids)))
        return logps * mask

    def _whole(self, model, prompt_ids, images, ids, mask, batch, lengths):
        chosen, width = batch.rows, max(lengths[row] for row in batch.rows)
        prompts = [prompt_ids[row] for row in chosen]
        inputs = teacher_inputs(prompts, ids[chosen, :width], mask[chosen, :width], self.pad_token_id)
        fields = forward_fields([images[row] for row in chosen], inputs[0].size(1) - width, ids[chosen, :width])
        yield chosen, self.token_logps(model, *inputs, width, **fields)

    def _shared(self, model, prompt_ids, ids, mask, batch, lengths):
        # The last token of a prompt goes with the completions: it predicts the first of them.
        prompts = [prompt_ids[group[0]] for group in batch.groups]
        prefix_ids, prefix_mask = left_padded([p[:-1] for p in prompts], self.pad_token_id, ids, mask)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        with self.autocast():
            model(
                input_ids=prefix_ids,
                attention_mask=prefix_mask,
                position_ids=_positions(prefix_mask),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        owners = [(row, number) for number, group in enumerate(batch.groups) for row in group]
        owners.sort(key=lambda owner: -lengths[owner[0]])
        most = _continued_rows(batch, prompt_ids, lengths, self.budget)
        for start in range(0, len(owners), most):
            chosen = [row for row, _ in owners[start : start + most]]
            prompt = torch.tensor([number for _, number in owners[start : start + most]], device=ids.device)
            width = max(lengths[row] for row in chosen)
            last = torch.tensor([[prompt_ids[row][-1]] for row in chosen], dtype=ids.dtype, device=ids.device)
            own_mask = torch.cat([torch.ones_like(last), mask[chosen, :width]], dim=1)
            whole_mask = torch.cat([prefix_mask[prompt], own_mask], dim=1)
            positions = _positions(whole_mask)[:, -own_mask.size(1) :]

            def continued(prompt=prompt, whole_mask=whole_mask, positions=positions, **inputs):
                return model(
                    **{**inputs, "attention_mask": whole_mask},
                    position_ids=positions,
                    past_key_values=_expanded(cache, prompt),
                )

            yield chosen, self.token_logps(continued, torch.cat([last, ids[chosen, :width]], dim=1), own_mask, width)


def _idle(images: Sequence[RowImages | None], with_images: bool) -> MicroBatch:
    """A row whose forward calls the same modules as the other processes'."""
    row = next((row for row, own in enumerate(images) if (own is not None) == with_images), None)
    if row is None:
        kind, other = ("with", "without") if with_images else ("without", "with")
        raise RuntimeError(
            f"With sharded weights all processes must run the same modules, but in this batch one scores rows {kind} "
            f"images and this one has only rows {other}. Give all rows images, or none, or use DDP or ZeRO-2."
        )
    return MicroBatch(((row,),), shared=False)


class _PrefixLayer(DynamicLayer):
    """A layer's prefix, read by several rows. It is repeated while its layer runs and never extended, so there is no
    copy per row that outlives the layer's forward."""

    def __init__(self, layer: DynamicLayer, prompt: torch.Tensor):
        super().__init__()
        self.layer, self.prompt, self.is_sliding = layer, prompt, layer.is_sliding
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(self, key_states, value_states, *args, **kwargs):
        def joined(prefix, states):
            if len(prefix) == 1:
                return torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=-2)
            # a layer may lie on another device than the ids
            return torch.cat([prefix[self.prompt.to(prefix.device)], states], dim=-2)

        return joined(self.layer.keys, key_states), joined(self.layer.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.layer.get_seq_length()


def _expanded(cache: DynamicCache, prompt: torch.Tensor) -> Cache:
    return Cache(layers=[_PrefixLayer(layer, prompt) for layer in cache.layers])


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that start at the first token, wherever the padding is."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def resolve_sharing(share: bool | None, model: torch.nn.Module, sharded: bool) -> bool | None:
    """`teacher_shared_prefix`, or False, with a warning, where the model or its sharding does not allow it."""
    if share is False:
        return False
    reason = why_not_shared(model)
    if reason is None and sharded:
        reason = "its weights are sharded, and every process must make the same forwards"
    if reason is None:
        return share
    logger.warning(f"The teacher scores every completion after the whole prompt, the model cannot share it: {reason}.")
    return False


def why_not_shared(model: torch.nn.Module) -> str | None:
    """Why a model's prompts cannot be encoded once for several rows; None where they can.

    Known to be exact: layers of full and of sliding-window attention, with any number of key-value heads. What keeps
    another state (recurrent, hybrid, convolutional, shared between layers), or rotates positions by the length of the
    whole text, is left out.
    """
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
        return "its adapter puts tokens of its own before the prompt"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base.config, "vision_config"):
        return "it reads images"
    missing = {"past_key_values", "position_ids", "logits_to_keep"} - set(signature(type(base).forward).parameters)
    if missing:
        return f"its forward takes no {', '.join(sorted(missing))}"
    config = base.config.get_text_config(decoder=True)
    odd = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if odd:
        return f"its cache has layers of another kind ({', '.join(sorted(kind.__name__ for kind in odd))})"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it attends in chunks"
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    lengthwise = {part.get("rope_type") for part in nested} & {"dynamic", "longrope"}
    if lengthwise:
        return f"its rotary positions depend on the text's length (rope_type={lengthwise.pop()!r})"
    return None
