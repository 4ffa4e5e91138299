"""Pictures of credit while training: a few completions of every N-th step, as one page beside TRL's completion tables.

generation batch -> what only it knows (teacher's prompts, rewards), kept by row
micro-batch with its credit -> pictures of some of its rows -> at the step's end a page, and what runs are logged to
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import isnan
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase, TrainerCallback

from trl_rlsd.config import RLSDConfig
from trl_rlsd.credit import gain
from trl_rlsd.images import TeacherPrompts
from trl_rlsd.report.page import CreditPictures
from trl_rlsd.report.picture import CreditPicture, Token, token_texts
from trl_rlsd.spans import lengths
from trl_rlsd.token_credit import Batch, TokenCredit, counted, scored_tokens


logger = get_logger(__name__)

ROW = "picture_row"  # a row's place in its generation batch, which is shuffled and cut before it is used
_OF_A_SIDE = 2  # completions of a page with A > 0, and as many with A < 0


class CreditLog(TrainerCallback):
    """
    Args:
        credit: the trainer's.
        tokenizer: decodes prompts and completions.
        writes: whether this process writes; its own rows are shown.
    """

    def __init__(self, credit: TokenCredit, tokenizer: PreTrainedTokenizerBase, writes: bool):
        self.credit = credit
        self.args: RLSDConfig = credit.args
        self.tokenizer = tokenizer
        self.every = self.args.rlsd_log_credit_steps if writes else 0
        self.all: CreditPictures | None = None  # every row is taken while this is a list
        self._chosen: list[CreditPicture] = []
        # of the generation batch in use
        self._teacher: TeacherPrompts | None = None
        self._wrong: TeacherPrompts | None = None
        self._rewards: Sequence[Mapping[str, float]] = ()

    @property
    def is_on(self) -> bool:
        return self.every > 0 or self.all is not None

    @contextmanager
    def taking(self) -> Iterator[CreditPictures]:
        """All rows that are met within the block, as pictures; what a run beside it goes on with is kept from it."""
        kept = self._teacher, self._wrong, self._rewards
        self.all = CreditPictures()
        try:
            yield self.all
        finally:
            self.all = None
            self._teacher, self._wrong, self._rewards = kept

    def keep(
        self,
        batch: Batch,
        teacher: TeacherPrompts | None,
        wrong: TeacherPrompts | None,
        rewards: Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        """A generation batch is there: keep its teacher prompts and rewards; returns what marks its rows."""
        self._teacher, self._wrong, self._rewards = teacher, wrong, rewards
        ids = batch["completion_ids"]
        return {ROW: torch.arange(len(ids), device=ids.device)}

    def observe(self, step: int, batch: Batch, student_logps: torch.Tensor, credited: torch.Tensor) -> None:
        """A micro-batch and its credit, (B, T), or (B,) where that is plain GRPO. `step`: optimizer steps done."""
        if self.all is not None:
            self.all += self.pictures(step, batch, student_logps, credited)
        elif self.every and (step + 1) % self.every == 0 and "teacher_scored" in batch:
            self._choose(step, batch, student_logps, credited)

    def _choose(self, step: int, batch: Batch, student_logps: torch.Tensor, credited: torch.Tensor) -> None:
        """Rows of either sign of A, until there are enough of both."""
        for sign in (1, -1):
            missing = _OF_A_SIDE - sum(one.advantage * sign > 0 for one in self._chosen)
            found = (batch["teacher_scored"] & (batch["advantages"] * sign > 0)).nonzero().squeeze(1)
            if missing > 0 and len(found):
                self._chosen += self.pictures(step, batch, student_logps, credited, found[:missing].tolist())

    def on_step_end(self, args, state, control, **kwargs):
        chosen, self._chosen = CreditPictures(self._chosen), []
        if not chosen:
            return
        title = f"Token credit at step {state.global_step}"
        path = Path(args.output_dir) / "completions" / f"credit_{state.global_step:05d}.html"
        try:
            chosen.save(path, title)
        except OSError as error:
            logger.warning(f"The run goes on without {path}: {error}")
        for backend in _backends(args.report_to):
            backend.log({"rlsd/credit": backend.Html(chosen.html(title))})

    def on_train_begin(self, args, state, control, **kwargs):
        self._chosen = []

    def pictures(
        self,
        step: int,
        batch: Batch,
        student_logps: torch.Tensor,
        credited: torch.Tensor,
        rows: Sequence[int] | None = None,
    ) -> list[CreditPicture]:
        """Pictures of some rows of a micro-batch, of all by default."""
        rows = range(len(batch["completion_ids"])) if rows is None else rows
        mask, values = counted(batch), self._values(step, batch, student_logps)
        if credited.ndim == 1:
            credited = credited.unsqueeze(1).expand(mask.shape)
        # a completion that is masked whole, because it was cut off, is shown all the same
        ids = batch["completion_ids"]
        whole = lengths((ids != self.tokenizer.pad_token_id).long())
        ends = [end or other for end, other in zip(lengths(batch["completion_mask"]), whole, strict=True)]
        return [self._picture(row, step, batch, mask[row], values, credited[row], ends[row]) for row in rows]

    def _values(self, step: int, batch: Batch, student_logps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gain, plain credit, weight, the same clipped, where they are of use, (B, T); nothing without a teacher."""
        if "teacher_scored" not in batch:
            return {}
        scored = scored_tokens(batch)
        gains = gain(student_logps, batch["teacher_logps"], scored)
        plain = self.credit.plain(batch, step).expand(gains.shape)
        values = {"gain": gains, "scored": scored.bool(), "plain": plain}
        if (weights := self.credit.weights(batch, gains, scored)) is not None:
            acts = values["scored"] & batch.get("credit_span", values["scored"])
            values |= dict(zip(("weight", "clipped"), weights, strict=True), acts=acts)
        return values

    def _picture(self, row, step, batch, mask, values, credited, end) -> CreditPicture:
        advantage = batch["advantages"][row].item()
        own = {name: value[row, :end].tolist() for name, value in values.items()}
        texts = token_texts(batch["completion_ids"][row, :end].tolist(), self.tokenizer)
        tokens = [
            _token(text, credit, bool(counts), {name: value[index] for name, value in own.items()})
            for index, (text, credit, counts) in enumerate(
                zip(texts, credited[:end].tolist(), mask[:end].tolist(), strict=True)
            )
        ]
        return CreditPicture(
            tokens=tuple(tokens),
            advantage=advantage,
            student_prompt=self.tokenizer.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]),
            credit=self.credit.credit.name,
            keeps_sign=self.credit.credit.keeps_sign,
            evidence=self.credit.credit.evidence,
            step=step + 1,
            **self._of_row(batch, row),
            **self._knobs(batch["advantages"][row : row + 1], step),
        )

    def _of_row(self, batch: Batch, row: int) -> dict[str, Any]:
        """What the generation batch knew of a row; nothing where the batch comes from a checkpoint."""
        place = int(batch[ROW][row]) if ROW in batch else len(self._rewards)
        if place >= len(self._rewards):
            return {"teacher_prompt": None, "rewards": {}}
        scored = self._teacher is not None and "teacher_scored" in batch and bool(batch["teacher_scored"][row])
        found = scored and self._wrong is not None and bool(batch["wrong_scored"][row])
        prompt = self.tokenizer.decode(self._teacher.ids[place]) if scored else None
        wrong = self.tokenizer.decode(self._wrong.ids[place]) if found else None
        rewards = {name: None if isnan(value) else value for name, value in self._rewards[place].items()}
        return {"teacher_prompt": prompt, "wrong_prompt": wrong, "rewards": rewards}

    def _knobs(self, advantage: torch.Tensor, step: int) -> dict[str, Any]:
        peak = self.args.rlsd_lambda_negative if advantage.item() < 0 else None
        clip_range = torch.as_tensor(self.credit.clip_range(advantage)).item()
        return {
            "lam": self.credit.lam(step, peak) if self.credit.credit.uses_lambda else None,
            "clip_range": clip_range if self.credit.credit.evidence not in (None, "gate") else None,
        }


def _token(text: str, credit: float, counts: bool, own: Mapping[str, Any]) -> Token:
    scored, acts = own.get("scored", False), own.get("acts", False)
    weight, clipped = (own["weight"], own["clipped"]) if acts else (None, None)
    clip = "" if weight is None or weight == clipped else "low" if weight < clipped else "high"
    return Token(text, own["gain"] if scored else None, weight, credit, clip, counts, own.get("plain"))


def _backends(report_to: Sequence[str]) -> list[Any]:
    """What the run is logged to and can show a page: W&B where a run is open, trackio where it is new enough."""
    modules = [import_module(name) for name in ("wandb", "trackio") if name in report_to]
    return [m for m in modules if hasattr(m, "Html") and (m.__name__ != "wandb" or m.run is not None)]


@contextmanager
def randomness_kept() -> Iterator[None]:
    """What is drawn within the block from torch, numpy or `random` changes nothing of what is drawn afterwards."""
    state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)
