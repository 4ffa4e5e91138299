"""RLSDConfig: GRPOConfig and the fields of RLSD. Ranges are checked here and only here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Real

from transformers.trainer_utils import HubStrategy
from trl import GRPOConfig

from trl_rlsd.alarms import check_thresholds
from trl_rlsd.contrast import get_reference
from trl_rlsd.credit import Credit, get_credit
from trl_rlsd.leakage import LEAK_PHRASES
from trl_rlsd.spans import get_span


# The reference stands first and the student's prompt last and verbatim: prompts that end differently would make the
# gain measure the format instead of the reference.
DEFAULT_TEMPLATE = (
    "Here is a verified reference for the problem that follows:\n{privileged_context}\n\n"
    "Work the problem out on your own, without mentioning the reference.\n\n{prompt}"
)

TEACHER_KINDS = ("synced", "live", "ema", "base", "external")

# In these, the importance ratio carries the gradient. At sequence level there is one ratio per sequence, and every
# token's gradient is multiplied by the mean of the token credit: which token earned it is lost.
_RATIO_CARRIES_GRADIENT = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo")


# credit functions that add to advantages, or touch positive ones alone
_NOT_REWEIGHTED = ("rlrt", "opsd", "grpo_opsd", "contrast_additive", "antisd", "sdar")


@dataclass
class RLSDConfig(GRPOConfig):
    """
    Configuration for [`RLSDTrainer`]: everything of [`~trl.GRPOConfig`], and the fields below.

    Raises:
        `ValueError`: a value out of its range, or a combination for which token credit means nothing.
        `TypeError`: a value of the wrong type.
    """

    credit: str = field(
        default="rlsd",
        metadata={
            "help": "Registered credit function: 'rlsd', 'grpo', 'opsd', 'grpo_opsd', 'rlsd_contrast', "
            "'rlsd_gate', 'rlcsd', 'contrast_additive', 'rlrt', 'antisd', 'sdar', or one of your own."
        },
    )
    rlsd_lambda: float = field(
        default=0.5,
        metadata={"help": "Peak of the mixing weight lambda, in [0, 1]. 0 is GRPO."},
    )
    rlsd_lambda_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps in which lambda rises linearly from 0 to its peak."},
    )
    rlsd_lambda_decay_steps: int = field(
        default=50,
        metadata={"help": "Optimizer steps after warm-up in which lambda falls linearly to 0; 0 keeps it constant."},
    )
    rlsd_reweight_clip_range: float = field(
        default=0.2,
        metadata={"help": "eps_w >= 0: a token's weight is clipped to [1 - eps_w, 1 + eps_w]."},
    )
    rlsd_negative_only: bool = field(
        default=False,
        metadata={"help": "Reweight only the completions with a negative advantage."},
    )
    rlsd_lambda_negative: float | None = field(
        default=None,
        metadata={"help": "Peak mixing weight where A < 0, in [0, 1]; None: `rlsd_lambda`."},
    )
    rlsd_reweight_clip_range_negative: float | None = field(
        default=None,
        metadata={"help": "eps_w where A < 0; None: `rlsd_reweight_clip_range`."},
    )
    credit_span: str = field(
        default="all",
        metadata={
            "help": "Where in a completion token credit acts; the other tokens keep the plain advantage: 'all', "
            "'thinking', 'before_answer', or the dotted path of a function text -> (first character, end) or None."
        },
    )
    credit_mean_one: bool = field(
        default=False,
        metadata={
            "help": "Rescale each completion's credit so that its mean over the tokens is the advantage: credit is "
            "moved between tokens, and clipping adds or takes none."
        },
    )
    contrast_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column with a wrong reference, for a credit with contrast. None: a wrong sibling's "
            "(see `contrast_reference`)."
        },
    )
    contrast_reference: str = field(
        default="answer",
        metadata={
            "help": "What of a wrong sibling is the wrong reference: its final 'answer', its whole 'completion', or "
            "the dotted path of a function text -> str or None. It should look like the right references do."
        },
    )
    contrast_reward_below: float = field(
        default=0.5,
        metadata={"help": "A completion whose total reward is below this is wrong."},
    )
    contrast_fallback: str = field(
        default="grpo",
        metadata={
            "help": "Credit of a row without a wrong reference: 'grpo', or 'one_sided', the gain over the student "
            "alone. `rlsd/no_contrast` counts such rows.",
            "choices": ["grpo", "one_sided"],
        },
    )
    leak_phrases: list[str] = field(
        default_factory=lambda: list(LEAK_PHRASES),
        metadata={
            "help": "Phrases that cite a reference: `rlsd/leak_cites` is the share of completions with one that their "
            "prompt does not hold."
        },
    )
    alarm_steps: int = field(
        default=50,
        metadata={"help": "Steps in which the same alarm is given once at most; 0 switches all alarms off."},
    )
    alarm_thresholds: dict[str, float | None] | str | None = field(
        default=None,
        metadata={"help": "Other thresholds by the alarm's name, None to switch one off; see `trl_rlsd.alarms`."},
    )
    teacher_model_kind: str = field(
        default="synced",
        metadata={
            "help": "Whose weights score. 'synced': a snapshot of the student, renewed every `teacher_sync_steps`; "
            "'live': the student as it is; 'ema': its moving average; 'base': the base model (the adapter disabled; "
            "without PEFT a frozen copy of the start); 'external': the trainer's `teacher_model`.",
            "choices": list(TEACHER_KINDS),
        },
    )
    teacher_sync_steps: int = field(
        default=10,
        metadata={"help": "Optimizer steps between two snapshots of a 'synced' teacher, at least 1."},
    )
    teacher_update_rate: float = field(
        default=0.05,
        metadata={"help": "For an 'ema' teacher, in (0, 1]: teacher += rate * (student - teacher) after every step."},
    )
    privileged_column: str = field(
        default="privileged_context",
        metadata={
            "help": "Dataset column with the privileged context: a string or a list of messages. None or '' in a row "
            "leaves that row with plain GRPO credit."
        },
    )
    teacher_prompt_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": "Format string with {prompt} and {privileged_context}, applied to the last user message or to the "
            "whole plain-text prompt."
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the teacher's copy of the trainable weights on the CPU and swap it in to score ('synced', "
            "'ema', 'base'). With LoRA that copy is the adapter alone."
        },
    )
    teacher_token_budget: int = field(
        default=16384,
        metadata={
            "help": "Tokens, padding included, that go through the teacher at once. Lower it where the teacher pass "
            "runs out of memory; a longer row goes alone."
        },
    )
    teacher_shared_prefix: bool | None = field(
        default=None,
        metadata={
            "help": "Encode a privileged prompt once for all of its completions. None: where that saves time; True: "
            "always; False: never. Models that cannot (recurrent or hybrid caches) score whole rows and say so."
        },
    )
    rlsd_log_credit_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between two pages that show a few completions with the credit of each token: "
            "`completions/credit_*.html` in output_dir, and in trackio and W&B where they are on. 0: none. The pages "
            "hold prompts and privileged context. None is written where lambda is 0."
        },
    )
    use_liger_loss: bool = field(
        default=False,
        metadata={
            "help": "Take the loss through Liger's chunked base, with the gradients in the forward, instead of TRL's "
            "fused LM head. Needs liger-kernel."
        },
    )

    def __post_init__(self):
        # Before super(): a mistake in one of our own fields is told without the start-up of Accelerate.
        self._check_ranges()
        super().__post_init__()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("rlsd_lambda", 0.0, 1.0),
            ("rlsd_reweight_clip_range", 0.0, math.inf),
            ("teacher_update_rate", 0.0, 1.0),
            ("contrast_reward_below", -math.inf, math.inf),
            ("rlsd_lambda_negative", 0.0, 1.0),
            ("rlsd_reweight_clip_range_negative", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is None and name.endswith("_negative"):
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number.")
            if not low <= float(value) <= high or math.isinf(value):
                bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"finite and at least {low:g}"
                bounds = bounds if low > -math.inf else "finite"
                raise ValueError(f"{name}={value!r} is out of range; it must be {bounds}.")
        if self.teacher_update_rate == 0:
            raise ValueError(
                "teacher_update_rate=0 never moves the 'ema' teacher; give a rate in (0, 1], or use "
                "teacher_model_kind='base'."
            )
        for name, low in (
            ("rlsd_lambda_warmup_steps", 0),
            ("rlsd_lambda_decay_steps", 0),
            ("teacher_sync_steps", 1),
            ("teacher_token_budget", 1),
            ("alarm_steps", 0),
            ("rlsd_log_credit_steps", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a whole number.")
            if value < low:
                raise ValueError(f"{name}={value!r} is out of range; it must be at least {low}.")
        for name in ("rlsd_negative_only", "credit_mean_one", "teacher_offload", "use_liger_loss"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.teacher_shared_prefix not in (None, True, False):
            raise TypeError(f"teacher_shared_prefix={self.teacher_shared_prefix!r} must be True, False or None.")
        for name in (
            "credit",
            "contrast_reference",
            "credit_span",
            "teacher_model_kind",
            "privileged_column",
            "teacher_prompt_template",
        ):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a string.")
        if self.teacher_model_kind not in TEACHER_KINDS:
            raise ValueError(
                f"teacher_model_kind={self.teacher_model_kind!r} is unknown; choose one of "
                f"{', '.join(map(repr, TEACHER_KINDS))}."
            )
        self._check_names()

    def _check_names(self) -> None:
        if self.contrast_fallback not in ("grpo", "one_sided"):
            raise ValueError(f"contrast_fallback={self.contrast_fallback!r} must be 'grpo' or 'one_sided'.")
        get_reference(self.contrast_reference)
        get_span(self.credit_span)
        if not isinstance(self.leak_phrases, list) or not all(isinstance(p, str) and p for p in self.leak_phrases):
            raise TypeError(f"leak_phrases={self.leak_phrases!r} must be a list of phrases.")
        if isinstance(self.alarm_thresholds, str):  # from the command line
            try:
                self.alarm_thresholds = json.loads(self.alarm_thresholds)
            except json.JSONDecodeError as error:
                raise ValueError(f"alarm_thresholds={self.alarm_thresholds!r} is not JSON: {error}.") from error
        check_thresholds(self.alarm_thresholds)
        self._check_credit(get_credit(self.credit))

    def _check_credit(self, credit: Credit) -> None:
        if credit.contrast and self.contrast_column is None and self.num_generations == 1:
            raise ValueError(
                f"credit={self.credit!r} takes its wrong references from siblings, of which num_generations=1 leaves "
                "none. Raise num_generations, or name a `contrast_column`."
            )
        if self.credit_mean_one and not credit.keeps_sign:
            raise ValueError(
                f"credit_mean_one=True rescales by the mean of the credit, which for credit={self.credit!r} can be 0 "
                "or of the other sign. Use a credit that keeps the sign, or leave it False."
            )
        if credit.evidence == "gate":
            self._check_gate(credit)
        if self.rlsd_negative_only and credit.name in _NOT_REWEIGHTED:
            raise ValueError(
                f"rlsd_negative_only=True is for a credit that reweights advantages; credit={self.credit!r} adds to "
                "them, or touches positive ones alone. Leave it False."
            )
        if self.credit_span != "all" and credit.teacher_rows == "none" and credit.name != "grpo":
            raise ValueError(
                f"credit_span={self.credit_span!r} bounds what a teacher's scores do; credit={self.credit!r} is "
                "registered with teacher_rows='none'. Leave it 'all', or register it with 'all'."
            )

    def _check_gate(self, credit: Credit) -> None:
        only: dict[str, object] = {"credit_span": "all", "rlsd_negative_only": False, "credit_mean_one": False}
        if credit.contrast:
            only["contrast_fallback"] = "one_sided"
        for name, value in only.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with credit={self.credit!r}, a gate: some tokens "
                    f"would get many times what the gate leaves to the others. Set {name}={value!r}."
                )

    def _check_liger_loss(self) -> None:
        if find_spec("liger_kernel") is None:
            raise ValueError(
                "use_liger_loss=True needs liger-kernel, which is not installed: pip install 'trl-rlsd[liger]'. Or "
                "leave it False: the loss then runs through TRL's fused head."
            )
        if self.fp16:
            raise ValueError(
                "use_liger_loss=True does not support fp16=True: it takes its gradients in the forward, before the "
                "gradient scaler has lifted them over float16's smallest numbers. Use bf16=True, or "
                "use_liger_loss=False."
            )
        for name, neutral in (
            ("top_entropy_quantile", 1.0),
            ("entropy_coef", 0.0),
            ("use_adaptive_entropy", False),
            ("off_policy_mask_threshold", None),
        ):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"use_liger_loss=True does not support {name}={getattr(self, name)!r}: the fused loss has its "
                    f"gradients before TRL's body reads that field. Leave {name}={neutral!r}, or use_liger_loss=False."
                )

    def _check_combinations(self) -> None:
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} would upload whole checkpoints, with the teacher's weights "
                "and unused completions in them. Use 'every_save' or 'end', which publish the model alone."
            )
        if self.use_liger_loss:
            self._check_liger_loss()
        credit = get_credit(self.credit)
        if credit.name == "grpo":  # one advantage a row, as TRL has it
            return
        if self.importance_sampling_level == "sequence" and self.loss_type in _RATIO_CARRIES_GRADIENT:
            raise ValueError(
                f"importance_sampling_level='sequence' with loss_type={self.loss_type!r} has one importance ratio per "
                "sequence, through which every token receives the mean of the token credit: the credit would be "
                "computed and then lost. Use importance_sampling_level='token', loss_type='cispo', or credit='grpo'."
            )
        if not credit.keeps_sign:
            why = f"which credit={self.credit!r} gives token by token with either sign"
            if self.loss_type == "vespo":
                raise ValueError(
                    f"loss_type='vespo' weighs a whole sequence by the sign of its advantage, {why}. Use a credit "
                    "that keeps the sign ('rlsd', 'grpo') or another loss_type."
                )
            if self.off_policy_mask_threshold is not None:
                raise ValueError(
                    f"off_policy_mask_threshold={self.off_policy_mask_threshold} drops whole sequences by the sign of "
                    f"their advantage, {why}. Unset it, or use a credit that keeps the sign ('rlsd', 'grpo')."
                )
