"""Order, mix and stage the rows of a dataset by a column that says how difficult they are.

`order_by_difficulty` and `mix` make another dataset, once. [`Curriculum`] decides while training: it ends a stage when
the reward says so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback


logger = get_logger(__name__)


def order_by_difficulty(
    dataset: Dataset,
    column: str = "pass_rate",
    *,
    easiest_first: bool = True,
    high_is_easy: bool = True,
    edges: Sequence[float] = (),
    seed: int = 0,
) -> Dataset:
    """The rows sorted by difficulty. Train on them with `shuffle_dataset=False`; the trainer shuffles otherwise.

    Args:
        column: numbers, none of them missing.
        high_is_easy: as in a pass rate; False for a level of difficulty.
        edges: ascending; they part the values into buckets, `edge <= value < next edge`. Rows of one bucket are
            shuffled, so that small differences of a measured rate do not order them. [each value its own bucket]

    Raises: ValueError.
    """
    values = _values(dataset, column)
    keys = np.digitize(values, _ascending(edges)) if len(edges) else values
    shuffled = np.random.default_rng(seed).permutation(len(values))
    descending = high_is_easy == easiest_first
    return dataset.select(shuffled[np.argsort(-keys[shuffled] if descending else keys[shuffled], kind="stable")])


def mix(
    dataset: Dataset,
    column: str = "pass_rate",
    *,
    edges: Sequence[float],
    weights: Sequence[float],
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Rows drawn so that each bucket of difficulty has its share, shuffled.

    Args:
        column: numbers, none of them missing.
        edges: ascending; n edges part the values into n + 1 buckets, `edge <= value < next edge`.
        weights: the share of each bucket, from the lowest values up; 0 leaves a bucket out.
        size: rows in all. Where a bucket has fewer than its share, its rows repeat, each as often as the others or
            once more. [as many as no bucket has to repeat]

    Raises: ValueError.
    """
    values, bounds = _values(dataset, column), _ascending(edges)
    if len(weights) != len(bounds) + 1 or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"weights={list(weights)}: {len(bounds)} edges make {len(bounds) + 1} buckets; give one weight for each, "
            "none negative and not all 0."
        )
    bucket = np.digitize(values, bounds)
    shares = np.asarray(weights, dtype=float) / sum(weights)
    rows = [np.flatnonzero(bucket == k) for k in range(len(shares))]
    if empty := [k for k, share in enumerate(shares) if share and not len(rows[k])]:
        raise ValueError(
            f"weights[{empty[0]}]={weights[empty[0]]}, but no row's {column!r} lies in that bucket of edges="
            f"{list(edges)}. Set the weight to 0, or move the edges."
        )
    if size is None:
        size = math.floor(min(len(rows[k]) / share for k, share in enumerate(shares) if share) * (1 + 1e-9))
    # by largest remainder, so that the shares sum to size
    counts = np.floor(shares * size).astype(int)
    counts[np.argsort(counts - shares * size, kind="stable")[: size - counts.sum()]] += 1
    rng = np.random.default_rng(seed)
    drawn = [_cycled(rng, rows[k], count) for k, count in enumerate(counts) if count]
    return dataset.select(rng.permutation(np.concatenate(drawn)) if drawn else [])


@dataclass(frozen=True)
class Stage:
    """Rows whose value lies in `at_least <= value < below`, and when they are done with.

    Args:
        at_least: None for no lower bound.
        below: None for no upper bound.
        until: the mean reward that ends the stage.
        max_steps: optimizer steps that end it in any case, counted to the next log.
    """

    at_least: float | None = None
    below: float | None = None
    until: float | None = None
    max_steps: int | None = None

    def holds(self, values: np.ndarray) -> np.ndarray:
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.below is None else self.below
        return (values >= low) & ((values < high) | math.isinf(high))


class Curriculum(TrainerCallback):
    """Stages of rising difficulty for GRPOTrainer and RLSDTrainer, each ended by the training reward.

        curriculum = Curriculum([Stage(at_least=0.6, until=0.8), Stage(at_least=0.2, until=0.6), Stage()])
        RLSDTrainer(..., train_dataset=dataset, callbacks=[curriculum])

    It takes the place of the trainer's sampler and keeps its layout: groups, `steps_per_generation` and
    `num_iterations` are as without it. Within a stage each row comes once before any comes again, shuffled unless
    `shuffle_dataset=False`; a stage with fewer rows than a generation has prompts repeats some at once. An epoch is
    only a number of steps.

    Rewards are read where the trainer logs them, so a stage can end every `logging_steps` steps; it is followed by one
    generation more of its rows (with `dataloader_num_workers`, by as many as are fetched ahead). Rewards of a log
    that is not of the present stage alone do not count.

    The stage follows from the log that a checkpoint holds, and the rows from the stage: a resumed run draws what the
    uninterrupted one would have. For that, `save_steps` must be a multiple of `logging_steps`, and is refused
    otherwise: TRL forgets what it has not logged.

    Args:
        stages: the first one first; every one but the last needs an end, `until` or `max_steps`.
        column: of difficulty; numbers, none of them missing.
        metric: what `until` is compared with, as the trainer logs it: "reward", "rewards/math_reward/mean", ...
        window: logs to average; a stage lasts at least as many, unless `max_steps` ends it.
        seed: of the order within stages. [the trainer's]

    Raises: ValueError, here for the stages; when training begins, for the data and the trainer's arguments; and at
        the first log of rewards, where it has no `metric`.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        column: str = "pass_rate",
        metric: str = "reward",
        window: int = 5,
        seed: int | None = None,
    ):
        self.stages, self.column, self.metric, self.window, self.seed = tuple(stages), column, metric, window, seed
        if not self.stages or window < 1:
            raise ValueError(
                f"stages={stages!r}, window={window}: a curriculum needs a stage, and a window of 1 or more."
            )
        for number, stage in enumerate(self.stages, 1):
            ends = stage.until is not None or stage.max_steps is not None
            if ends == (number == len(self.stages)):
                raise ValueError(
                    f"Stage {number} of {len(self.stages)}, {stage}, "
                    + ("has an end, but nothing follows it." if ends else "has no end: set until or max_steps.")
                )
        self._progress: Progress | None = None
        self._sampler: CurriculumSampler | None = None

    @property
    def stage(self) -> int:
        """The number of the stage that the rewards have reached; the first is 0."""
        return 0 if self._progress is None else len(self._progress.starts) - 1

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        _check_arguments(args, state, train_dataloader)
        values = _values(dataset, self.column)
        rows = [np.flatnonzero(stage.holds(values)) for stage in self.stages]
        for number, (stage, own) in enumerate(zip(self.stages, rows, strict=True), 1):
            if not len(own):
                raise ValueError(
                    f"Stage {number} of {len(self.stages)}, {stage}, holds no row: {self.column!r} goes from "
                    f"{values.min():g} to {values.max():g}. Move its bounds, or leave it out."
                )
        layout = Layout.of(args, len(dataset))
        seed = args.seed if self.seed is None else self.seed
        self._sampler = CurriculumSampler(layout, rows, seed=seed, shuffle=args.shuffle_dataset)
        self._progress = Progress()
        for entry in state.log_history:  # of the run that is resumed
            self._read(entry, entry["step"], layout)
        train_dataloader.set_sampler(self._sampler)
        unused = len(values) - len(np.unique(np.concatenate(rows)))
        logger.info(f"Curriculum: stages of {', '.join(str(len(own)) for own in rows)} rows; {unused} rows in none.")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._sampler.epoch = state.global_step // self._sampler.layout.steps_per_epoch

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._sampler is None:
            return
        before = self.stage
        self._read(logs or {}, state.global_step, self._sampler.layout)
        if self.stage > before:
            logger.info(f"Curriculum: stage {self.stage + 1} of {len(self.stages)} follows step {state.global_step}.")

    def _read(self, logs: dict, step: int, layout: Layout) -> None:
        if self.metric not in logs and "reward" not in logs:  # of an evaluation, or of the end
            return
        if self.metric not in logs and not self._progress.step:
            there = ", ".join(repr(name) for name in sorted(logs) if name.startswith("reward"))
            raise ValueError(
                f"metric={self.metric!r} is not in the trainer's log, so no stage could end. Give one of {there}."
            )
        reward = logs.get(self.metric, math.nan)  # steps count for `max_steps` without it too
        self._progress = self._progress.after(step, reward, self.stages, self.window, layout)
        self._sampler.starts = self._progress.starts


@dataclass(frozen=True)
class Layout:
    """How the trainer parts its data: an epoch into generations, these into micro-batches, and steps over them.

    Args:
        prompts: of one generation, of all processes.
        repeats: completions of one prompt.
        uses: micro-batches from one generation to the next.
        accumulation: micro-batches of one optimizer step.
        generations: of one epoch.
        ahead: micro-batches that the dataloader may have drawn beyond those of the steps done.
    """

    prompts: int
    repeats: int
    uses: int
    accumulation: int
    generations: int
    ahead: int

    @classmethod
    def of(cls, args, rows: int) -> Layout:
        prompts = args.generation_batch_size // args.num_generations
        if rows < prompts:
            raise ValueError(f"train_dataset has {rows} rows, fewer than the {prompts} prompts of one generation.")
        return cls(
            prompts=prompts,
            repeats=args.num_generations,
            uses=args.steps_per_generation * args.num_iterations,
            accumulation=args.gradient_accumulation_steps,
            generations=rows // prompts,
            # accelerate 1.15 keeps one batch back, to know which is the last; torch's workers are given theirs early
            ahead=1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2),
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.generations * self.uses / self.accumulation)

    def micro_batches(self, steps: int) -> int:
        """Done after that many optimizer steps; the last step of an epoch may be a short one."""
        epoch, rest = divmod(steps, self.steps_per_epoch)
        return epoch * self.generations * self.uses + rest * self.accumulation

    def next_free(self, steps: int) -> int:
        """The first generation whose rows cannot have been drawn when that many steps are done."""
        return math.ceil((self.micro_batches(steps) + self.ahead) / self.uses)


@dataclass(frozen=True)
class Progress:
    """What the log says of the stages: a function of it alone.

    Args:
        starts: the first generation of each stage that has begun.
        step: of the last log with a reward.
        begun: the step of the first log that followed a stage's start: from there on `max_steps` counts.
        rewards: the logs of the present stage.
    """

    starts: tuple[int, ...] = (0,)
    step: int = 0
    begun: int | None = 0
    rewards: tuple[float, ...] = ()

    def after(self, step: int, reward: float, stages: Sequence[Stage], window: int, layout: Layout) -> Progress:
        """With one log more, of the steps since the last one."""
        stage = stages[len(self.starts) - 1]
        if layout.micro_batches(self.step) < self.starts[-1] * layout.uses:  # rows of the stage before are in it
            return Progress(self.starts, step, None)
        begun = self.step if self.begun is None else self.begun
        rewards = self.rewards if math.isnan(reward) else (*self.rewards, reward)[-window:]
        reached = stage.until is not None and len(rewards) == window and fmean(rewards) >= stage.until
        too_long = stage.max_steps is not None and step - begun >= stage.max_steps
        if reached or too_long:
            return Progress((*self.starts, layout.next_free(step)), step, None)
        return Progress(self.starts, step, begun, rewards)


class CurriculumSampler(Sampler):
    """Rows in the order of TRL's sampler, chosen by stage when they are drawn.

    A generation's rows depend on nothing but its number and the stages' starts, so that every process draws the same.
    """

    def __init__(self, layout: Layout, rows: list[np.ndarray], *, seed: int, shuffle: bool):
        self.layout, self.epoch = layout, 0
        self.starts: tuple[int, ...] = (0,)
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        self._order: Callable[[int, int], np.ndarray] = lru_cache(maxsize=2)(self._one_pass)

    def __len__(self) -> int:
        layout = self.layout
        return layout.generations * layout.uses * layout.prompts * layout.repeats

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.layout.generations
        for generation in range(first, first + self.layout.generations):
            rows = self.rows(generation)
            for _ in range(self.layout.uses):
                for row in rows:
                    yield from [row] * self.layout.repeats

    def rows(self, generation: int) -> list[int]:
        """Of one generation, each once."""
        stage = bisect_right(self.starts, generation) - 1
        count = len(self._rows[stage])
        first = (generation - self.starts[stage]) * self.layout.prompts
        return [
            int(self._order(stage, place // count)[place % count])
            for place in range(first, first + self.layout.prompts)
        ]

    def _one_pass(self, stage: int, number: int) -> np.ndarray:
        rows = self._rows[stage]
        return np.random.default_rng([self._seed, stage, number]).permutation(rows) if self._shuffle else rows


def _check_arguments(args, state, train_dataloader) -> None:
    if not isinstance(train_dataloader.dataset, Dataset) or not hasattr(train_dataloader, "set_sampler"):
        raise ValueError(
            f"A curriculum draws rows by number: train_dataset must be a datasets.Dataset (it is a "
            f"{type(train_dataloader.dataset).__name__}) and its dataloader Accelerate's own (it is a "
            f"{type(train_dataloader).__name__})."
        )
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=True: a resumed curriculum would begin its epoch again. Set it to False.")
    if args.logging_strategy == "no":
        raise ValueError("logging_strategy='no': a curriculum reads the reward from the log. Use 'steps'.")
    # the state has both in steps, also where they were given as parts of the run
    if args.save_strategy == args.logging_strategy == "steps" and state.save_steps % state.logging_steps:
        raise ValueError(
            f"save_steps={state.save_steps} is no multiple of logging_steps={state.logging_steps}: a checkpoint "
            "between two logs lacks rewards, and the run resumed from it would draw other rows. Change one of them."
        )


def _values(dataset: Dataset, column: str) -> np.ndarray:
    """A column as float64. Raises: ValueError, where it is missing, is not of numbers, or has gaps."""
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {column!r} (column); it has {', '.join(map(repr, dataset.column_names))}. "
            "Name another, measure one with `pass_rate`, or, where the trainer has removed it, set "
            "remove_unused_columns=False."
        )
    try:
        values = np.array([math.nan if value is None else value for value in dataset[column]], dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Column {column!r} (column) must hold numbers: {error}.") from error
    if missing := int(np.isnan(values).sum()):
        raise ValueError(
            f"Column {column!r} (column) has no value in {missing} of {len(values)} rows. Leave them out: "
            f"dataset.filter(lambda row: row[{column!r}] is not None)."
        )
    return values


def _ascending(edges: Sequence[float]) -> np.ndarray:
    bounds = np.asarray(edges, dtype=float)
    if np.isnan(bounds).any() or (np.diff(bounds) <= 0).any():
        raise ValueError(f"edges={list(edges)} must be ascending numbers.")
    return bounds


def _cycled(rng: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    passes = [rng.permutation(rows) for _ in range(math.ceil(count / len(rows)))]
    return np.concatenate(passes)[:count]
