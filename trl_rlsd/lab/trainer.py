"""RLSDTrainer on the built-in task, where the first wrong token is known."""

from __future__ import annotations

from typing import Any

import torch

from trl_rlsd.lab.start import END
from trl_rlsd.lab.task import labels
from trl_rlsd.trainer import RLSDTrainer


class LabTrainer(RLSDTrainer):
    """RLSDTrainer that gives credit functions the labels `decisive` and `first_wrong`, and measures where the blame of
    failed completions goes.

    Attributes:
        localisation: of the failed completions of the first steps, see [`Localisation`].
        localised_steps: how many steps that are. Early ones, in which all methods still have about the same policy.
    """

    localised_steps = 10

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.localisation = Localisation()

    def token_labels(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        texts = [
            "".join(self.processing_class.convert_ids_to_tokens(row[keep.bool()]))
            for row, keep in zip(ids, mask, strict=True)
        ]
        named = labels(
            [row["prompt"] for row in rows],
            [text.removesuffix(END) for text in texts],
            [text.endswith(END) for text in texts],
            ids.size(1),
        )
        return {name: label.to(ids.device) for name, label in named.items()}

    def observe_credit(self, batch: dict[str, Any], student_logps: torch.Tensor, credited: torch.Tensor) -> None:
        if self.state.global_step >= self.localised_steps:
            return
        mask, first_wrong = batch["completion_mask"].bool(), batch["first_wrong"]
        if credited.ndim == 1:
            credited = credited.unsqueeze(1).expand(mask.shape)
        failed = (batch["advantages"] < 0) & first_wrong.any(1)
        self.localisation.add(credited[failed], mask[failed], first_wrong[failed])


class Localisation:
    """How well the credit within failed completions finds the first wrong token: sums over completions.

    - `auc`: the chance that the first wrong token has more blame (-A_t) than another token of its completion; equal
      blame counts half, so GRPO has 0.5 and a credit that blames it alone has 1.
    - `share`: the part of a completion's blame that sits on it; GRPO has 1 / length, which `uniform_share` states.
    """

    def __init__(self):
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, credited: torch.Tensor, mask: torch.Tensor, first_wrong: torch.Tensor) -> None:
        """Shapes: (B, T) each, `mask` and `first_wrong` bool, one first wrong token a row."""
        blame = -credited.double()
        own = blame[first_wrong].unsqueeze(1)
        others = mask & ~first_wrong
        beaten = ((own > blame) + 0.5 * (own == blame)).masked_fill(~others, 0.0).sum(1) / others.sum(1)
        beaten = beaten.nan_to_num(0.5)  # a completion of one token
        positive = blame.clamp(min=0.0).masked_fill(~mask, 0.0)
        share = positive[first_wrong] / positive.sum(1).clamp(min=1e-12)
        uniform = 1.0 / mask.sum(1)
        self.sums += torch.tensor([len(blame), beaten.sum(), share.sum(), uniform.sum()])

    def result(self) -> dict[str, float] | None:
        """The means over completions, and how many those are (`rows`); None without any."""
        rows, *sums = self.sums.tolist()
        if not rows:
            return None
        names = ("auc", "share", "uniform_share")
        return {"rows": int(rows), **{name: value / rows for name, value in zip(names, sums, strict=True)}}
