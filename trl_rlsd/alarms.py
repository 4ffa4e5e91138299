"""Alarms: what the logged metrics say when the signal is broken, with a sentence of advice.

    log of a step -> the thresholds that it crosses -> one warning each, at most once per interval

Trends compare with the mean of the first logs of this run.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback


logger = get_logger(__name__)

# name -> threshold, of the values that `Alarms` reads off a log
THRESHOLDS = {
    "clip_saturation": 0.5,
    "length_collapse": 0.5,
    "leakage": 0.05,
    "answer_copying": 0.4,
    "no_informative_groups": 0.95,
    "no_wrong_references": 0.95,
    "entropy_collapse": 0.1,
}
ADVICE = {
    "clip_saturation": "{value:.0%} of the token weights are clipped (the paper has 3 to 6 %): the model is small (40 "
    "to 60 % with SmolLM2-135M and a sound prompt), or the teacher's prompt is unlike the student's. Compare the two "
    "in the log (chat template, thinking switch, language), or use a shorter template or another teacher_model_kind.",
    "length_collapse": "completions have shrunk to {value:.0%} of their first length: the policy drifts towards the "
    "teacher's terse style. Lower rlsd_lambda, let it decay (but for a gate), or use a credit with contrast.",
    "leakage": "{value:.0%} of the completions cite, or share their words with, what only the teacher reads. Lower "
    "rlsd_lambda, let it decay (but for a gate), or use a credit that keeps the sign with a small clip range; never "
    "`opsd` for long.",
    "answer_copying": "the final answer, which the teacher has read, holds {value:.0%} more of what the teacher adds "
    "or takes than its share of the tokens. Use credit_span='before_answer' (but for a gate), or privileged context "
    "that shows how, not what.",
    "no_informative_groups": "{value:.0%} of the groups have equal rewards, so that there is nothing to learn from. "
    "Use easier or harder problems, more generations, or check the reward.",
    "no_wrong_references": "{value:.0%} of the rows found no wrong reference and fall back. Check contrast_reference "
    "(is the answer stated in a form that is read?) and contrast_reward_below, or name a contrast_column.",
    "entropy_collapse": "the entropy has fallen to {value:.0%} of its first value: the policy has stopped exploring. "
    "Lower the learning rate, raise the temperature or epsilon_high, or stop here.",
}
_BASELINE_LOGS = 3  # logs that a trend is compared with
_RECENT_LOGS = 3  # logs whose mean must cross, so that one odd batch is no alarm
_GROUPS = 32  # groups among which hardly one may differ: with few of them equal rewards are chance


class Alarms:
    """
    Args:
        thresholds: name -> number, over `THRESHOLDS`; None switches an alarm off.
        interval: steps in which the same alarm is given once at most.
        groups_per_log: groups of completions between two logs.

    Raises: ValueError, for an unknown name.
    """

    def __init__(
        self, thresholds: Mapping[str, float | None] | None = None, interval: int = 50, groups_per_log: float = 1.0
    ):
        check_thresholds(thresholds)
        self.thresholds = {**THRESHOLDS, **(thresholds or {})}
        self.interval = interval
        self.first: dict[str, list[float]] = defaultdict(list)
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT_LOGS))
        self.recent["no_informative_groups"] = deque(maxlen=max(_RECENT_LOGS, math.ceil(_GROUPS / groups_per_log)))
        self.given: dict[str, int] = {}

    def update(self, step: int, logs: Mapping[str, float]) -> dict[str, str]:
        """The alarms that a log gives, name -> sentence."""
        crossed = {}
        for name, value in self._values(logs).items():
            threshold, recent = self.thresholds[name], self.recent[name]
            recent.append(value)
            if threshold is None or len(recent) < recent.maxlen or not self._beyond(name, fmean(recent), threshold):
                continue
            if step - self.given.get(name, -self.interval) >= self.interval:
                self.given[name] = step
                crossed[name] = ADVICE[name].format(value=fmean(recent))
        return crossed

    @staticmethod
    def _beyond(name: str, value: float, threshold: float) -> bool:
        return value < threshold if name.endswith("_collapse") else value > threshold

    def _values(self, logs: Mapping[str, float]) -> dict[str, float]:
        values = {}
        if "rlsd/clip_low" in logs:
            values["clip_saturation"] = logs["rlsd/clip_low"] + logs["rlsd/clip_high"]
        leaks = [logs[f"rlsd/{name}"] for name in ("leak_cites", "leak_overlap") if f"rlsd/{name}" in logs]
        if leaks:
            values["leakage"] = self._above_first("leakage", max(leaks))
        if "rlsd/moved_on_answer" in logs:
            values["answer_copying"] = logs["rlsd/moved_on_answer"] - logs["rlsd/tokens_on_answer"]
        if "rlsd/no_contrast" in logs:
            values["no_wrong_references"] = logs["rlsd/no_contrast"]
        if logs.get("frac_reward_zero_std") is not None:
            values["no_informative_groups"] = logs["frac_reward_zero_std"]
        for name, metric in (("length_collapse", "completions/mean_length"), ("entropy_collapse", "entropy")):
            if logs.get(metric) is not None:
                first = self._first(name, logs[metric])
                values[name] = logs[metric] / first if first > 0 else 1.0
        return values

    def _first(self, name: str, value: float) -> float:
        if len(self.first[name]) < _BASELINE_LOGS:
            self.first[name].append(value)
        return fmean(self.first[name])

    def _above_first(self, name: str, value: float) -> float:
        """A model that cites before training does not leak by training."""
        return value - self._first(name, value)


def check_thresholds(thresholds: object) -> None:
    """Raises: ValueError, for an unknown name; TypeError, for what is no number."""
    if not isinstance(thresholds, Mapping | None):
        raise TypeError(f"alarm_thresholds={thresholds!r} must map names of alarms to numbers, or be None.")
    for name, value in (thresholds or {}).items():
        if name not in THRESHOLDS:
            raise ValueError(f"alarm_thresholds has {name!r}; known are {', '.join(map(repr, THRESHOLDS))}.")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"alarm_thresholds[{name!r}]={value!r} must be a number, or None to switch it off.")


class AlarmCallback(TrainerCallback):
    """Alarms on what a trainer logs; Accelerate's logger speaks on the main process. `record` takes a step and what
    to write down of an alarm."""

    def __init__(
        self,
        thresholds: Any,  # as the config has read them
        interval: int,
        record: Callable[[int, dict[str, str]], None],
    ):
        self.thresholds = thresholds
        self.interval = interval
        self.record = record
        self.alarms: Alarms | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        groups = rows / args.num_generations / args.num_iterations
        self.alarms = Alarms(self.thresholds, self.interval, groups * max(1, state.logging_steps))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.alarms is None:
            return
        for name, sentence in self.alarms.update(state.global_step, logs or {}).items():
            logger.warning(f"Alarm {name} at step {state.global_step}: {sentence}")
            self.record(state.global_step, {"alarm": name, "advice": sentence})
