"""From a micro-batch to token advantages: which rows need a teacher, what the credit function reads, what is counted.

    batch (advantages, teacher_logps, ...) + log-probs of the student's own forward -> token advantages (B, T)

A batch is what TRL's trainer buffers, with `teacher_logps` (B, T) and `teacher_scored` (B,); with a contrast also
`wrong_logps` (B, T) and `wrong_scored` (B,); with a span `credit_span` (B, T); and the labels that a credit reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from trl_rlsd import losses
from trl_rlsd.config import RLSDConfig
from trl_rlsd.credit import gain, get_credit, informative, lambda_at, mean_one, signed_weight, token_advantages
from trl_rlsd.images import TeacherPrompts
from trl_rlsd.metrics import factor_metrics, gain_metrics, place_metrics, sign_agreement, weight_metrics


Batch = Mapping[str, torch.Tensor]


class TokenCredit:
    """The credit function of a config, with its knobs.

    Attributes:
        credit: the registered function.
        uses_teacher: whether it needs one at all.
    """

    def __init__(self, args: RLSDConfig):
        self.args = args
        self.credit = get_credit(args.credit)
        self.uses_teacher = self.credit.teacher_rows != "none"

    def lam(self, step: int, peak: float | None = None) -> float:
        """Lambda at an optimizer step; of another peak if given."""
        return lambda_at(
            step,
            peak=self.args.rlsd_lambda if peak is None else peak,
            warmup_steps=self.args.rlsd_lambda_warmup_steps,
            decay_steps=self.args.rlsd_lambda_decay_steps,
        )

    def lambdas(self, step: int) -> dict[str, tuple[float, int]]:
        """The lambdas in force, as metrics."""
        peaks = {"lambda": self.args.rlsd_lambda, "lambda_negative": self.args.rlsd_lambda_negative}
        if not self.credit.uses_lambda:
            return {}
        return {name: (self.lam(step, peak), 1) for name, peak in peaks.items() if peak is not None}

    def lambda_is_zero(self, step: int) -> bool:
        """Whether the step is plain GRPO."""
        peaks = (self.args.rlsd_lambda, self.args.rlsd_lambda_negative)
        return self.credit.uses_lambda and all(self.lam(step, peak) == 0 for peak in peaks)

    def is_plain(self, batch: Batch, step: int) -> bool:
        """Whether the batch stays as GRPO made it, (B,) advantages included: lambda 0 is the same run, bit for bit."""
        if self.credit.name == "grpo" or self.lambda_is_zero(step):
            return True
        return self.uses_teacher and "teacher_logps" not in batch

    def needs_teacher(self, batch: Batch, has_context: torch.Tensor) -> torch.Tensor:
        """The rows to score: those with context, with a token that counts and on which credit acts, and whose
        advantage the credit function has a use for. Shapes: (B,) bool, both."""
        advantages, tokens = batch["advantages"], counted(batch).bool()
        if "credit_span" in batch:
            tokens = tokens & batch["credit_span"]
        needed = has_context & tokens.any(dim=1)
        if self.credit.teacher_rows in ("nonzero_advantage", "positive_advantage"):
            needed &= informative(advantages, self.args.scale_rewards != "none")
        if self.credit.teacher_rows == "positive_advantage":
            needed &= advantages > 0
        if self.args.rlsd_negative_only:
            needed &= advantages < 0
        if self.credit.uses_lambda and self.args.rlsd_lambda == 0:
            needed &= advantages < 0
        if self.credit.uses_lambda and self.args.rlsd_lambda_negative == 0:
            needed &= advantages >= 0
        return needed

    def __call__(
        self, batch: Batch, student_logps: torch.Tensor, step: int, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token advantages (B, T) of a micro-batch, or of those of its `rows` whose log-probs are given.

        Raises: ValueError, see [`token_advantages`], with the step.
        """
        if missing := [name for name in self.credit.reads if name not in batch]:
            raise ValueError(
                f"The credit function {self.credit.name!r} reads the token labels {', '.join(map(repr, missing))}, "
                "which the trainer does not give: return them from a subclass's `token_labels`."
            )
        if rows is not None:
            batch = {name: value[rows] for name, value in batch.items() if name in {*_ROWWISE, *self.credit.reads}}
        advantages, mask = batch["advantages"], counted(batch)
        acts = batch.get("teacher_scored")
        contrast = {}
        if self.credit.contrast:
            found = batch["wrong_scored"]
            # without a wrong reference the student takes its place, which is the one-sided gain
            contrast["wrong_logps"] = torch.where(found.unsqueeze(1), batch["wrong_logps"], student_logps)
            acts = acts & found if self.args.contrast_fallback == "grpo" else acts
        if "credit_span" in batch:
            acts = batch["credit_span"] if acts is None else batch["credit_span"] & acts.unsqueeze(1)
        try:
            credited = token_advantages(
                self.credit,
                advantages,
                student_logps,
                batch.get("teacher_logps", student_logps),
                mask,
                acts,
                lam=self._by_sign(advantages, self.lam(step), self.lam(step, self.args.rlsd_lambda_negative)),
                clip_range=self.clip_range(advantages),
                negative_only=self.args.rlsd_negative_only,
                **contrast,
                **{name: batch[name] for name in self.credit.reads},
            )
        except ValueError as error:
            where = "" if rows is None else f", of rows {rows.tolist()} of the micro-batch"
            raise ValueError(f"Step {step}{where}: {error}") from error
        if not self.args.credit_mean_one:
            return credited
        if acts is not None:
            mask = mask * (acts if acts.ndim == 2 else acts.unsqueeze(1))
        return mean_one(credited, advantages, mask)

    def clip_range(self, advantages: torch.Tensor) -> float | torch.Tensor:
        """eps_w, or (B, 1) where it differs by the sign of A."""
        own = self.args.rlsd_reweight_clip_range_negative
        return self._by_sign(advantages, self.args.rlsd_reweight_clip_range, own)

    @staticmethod
    def _by_sign(advantages, positive, negative) -> float | torch.Tensor:
        if negative is None or negative == positive:
            return positive
        return torch.where(advantages < 0, negative, positive).unsqueeze(1)

    def weights(
        self, batch: Batch, gains: torch.Tensor, scored: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The weights that the credit function makes of its evidence, and the same clipped, both (B, T); None for one
        without. `gains`, `scored` (B, T): of the tokens that the teacher has scored."""
        evidence = {"gain": gains, "reversed": -gains}.get(self.credit.evidence)
        if self.credit.evidence == "contrast":
            found = scored * batch["wrong_scored"].unsqueeze(1)
            contrast = gain(batch["wrong_logps"], batch["teacher_logps"], found)
            evidence = torch.where(batch["wrong_scored"].unsqueeze(1), contrast, gains)
        if evidence is None:
            return None
        return signed_weight(evidence, batch["advantages"], self.clip_range(batch["advantages"]))

    def plain(self, batch: Batch, step: int) -> torch.Tensor:
        """What credit is compared with, (B, T) or (B, 1): A, or with a gate what it leaves of A where it is closed."""
        advantages = batch["advantages"]
        own = advantages.unsqueeze(1)
        if self.credit.evidence != "gate":
            return own
        lam = self._by_sign(advantages, self.lam(step), self.lam(step, self.args.rlsd_lambda_negative))
        return torch.where(scored_tokens(batch).bool(), (1.0 - lam) * own, own)

    def metrics(self, batch: Batch, student_logps: torch.Tensor, credited: torch.Tensor, step: int) -> dict:
        """See [`gain_metrics`], [`weight_metrics`], [`factor_metrics`], [`place_metrics`]; empty where no teacher has
        scored."""
        if "teacher_scored" not in batch:
            return {}
        advantages, scored = batch["advantages"], scored_tokens(batch)
        gains = gain(student_logps, batch["teacher_logps"], scored)
        values = place_metrics(credited, self.plain(batch, step), counted(batch), batch.get("answer_span"))
        if self.credit.contrast:
            found = scored * batch["wrong_scored"].unsqueeze(1)
            values |= sign_agreement(gains, gain(student_logps, batch["wrong_logps"], found), found)
        values |= gain_metrics(advantages, gains, scored)
        if (weights := self.weights(batch, gains, scored)) is not None:
            values |= weight_metrics(advantages, *weights, scored * batch.get("credit_span", 1))
        elif self.credit.evidence == "gate":
            values |= factor_metrics(credited, advantages, scored)
        return values


def scored_rows(
    credit: TokenCredit,
    batch: Batch,
    right: TeacherPrompts,
    wrong: TeacherPrompts | None,
    score: Callable[..., torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor | int, torch.Tensor | int]]]:
    """What the teacher says of a batch's completions, and how many rows it did not score and why, as metrics.

    Args:
        right, wrong: what it reads before them; `wrong` for a contrast, in the same pass.
        score: prompt ids, images, completion ids, mask, row numbers -> log-probs (rows, T), 0 in the other rows.

    Shapes: `teacher_logps` (B, T) in nats, `teacher_scored` (B,); with a contrast also `wrong_logps`, `wrong_scored`.
    """
    ids, mask, rows = batch["completion_ids"], batch["completion_mask"], len(right.ids)
    scored = credit.needs_teacher(batch, torch.tensor(right.useful, device=ids.device))
    counts = {"no_context": (rows - sum(right.useful), rows)}
    prompt_ids, images, chosen = right.ids, right.images, scored
    if wrong is not None:
        found = scored & torch.tensor(wrong.useful, device=ids.device)
        counts["no_contrast"] = ((scored & ~found).sum(), scored.sum())
        scored = found if credit.args.contrast_fallback == "grpo" else scored
        prompt_ids, images, chosen = prompt_ids + wrong.ids, images + wrong.images, torch.cat([scored, found])
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    logps = score(prompt_ids, images, ids, mask, chosen.nonzero().squeeze(1).tolist())
    scores = {"teacher_logps": logps[:rows], "teacher_scored": scored}
    if wrong is not None:
        scores |= {"wrong_logps": logps[rows:], "wrong_scored": found}
    return scores, counts | {"skipped": (rows - scored.sum(), rows)}


def fused_loss(
    credit: TokenCredit,
    token_credit: Callable[..., torch.Tensor],
    inputs: Batch,
    step: int,
    *,
    accumulation_steps: int,
    window: float,
) -> losses.FusedLoss:
    """The fused loss of a micro-batch, with token credit chunk by chunk.

    Args:
        token_credit: batch, log-probs, rows -> token advantages.
        window: micro-batches of all processes that `num_items_in_batch` counts the tokens of, per optimizer step.
    """
    args, mask, uncredited = credit.args, counted(inputs), {**inputs}

    def credited(logps, rows):
        losses.check_finite(logps, mask[rows], step, rows)
        if credit.is_plain(uncredited, step):
            return uncredited["advantages"][rows]
        return token_credit(uncredited, logps, rows)

    factors = losses.row_factors(
        args.loss_type,
        mask,
        max_completion_length=args.max_completion_length,
        accumulation_steps=accumulation_steps,
        num_items=inputs["num_items_in_batch"].clamp(min=1.0) / window,
    )
    ratio = inputs.get("importance_sampling_ratio") if args.use_vllm else None
    return losses.FusedLoss.from_config(args, inputs, mask, factors, credited, ratio=ratio)


def counted(batch: Batch) -> torch.Tensor:
    """The tokens that the loss counts, (B, T): of the completion, and not a tool's."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def scored_tokens(batch: Batch) -> torch.Tensor:
    """Of the tokens that the loss counts those that the teacher has scored, (B, T)."""
    return counted(batch) * batch["teacher_scored"].unsqueeze(1)


_ROWWISE = {
    "advantages",
    "completion_mask",
    "tool_mask",
    "teacher_logps",
    "teacher_scored",
    "wrong_logps",
    "wrong_scored",
    "credit_span",
}
