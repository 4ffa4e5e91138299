"""RLSDTrainer: GRPOTrainer with token credit from a privileged self-teacher.

The only file that knows TRL's private names; `tests/test_contract.py` states what is expected of each. No TRL method
body is repeated here; these are extended, each through `super()`:

    train                                the self-check of the prompts
    _set_signature_columns_if_needed     the privileged column survives remove_unused_columns
    _generate                            before a batch is generated: what the teacher will read is built and checked
    _generate_and_score_completions      after it: the teacher scores the completions that matter
    _calculate_rewards                   completions and verdicts, for diagnostics and wrong references
    _compute_loss                        hands TRL a copy of the batch, in which ...
    _get_per_token_logps_and_entropies   ... the advantages become token advantages as soon as the student's log-probs
                                         of this very forward are there: TRL reads the advantages after them. With
                                         use_liger_loss that forward takes the fused loss; TRL's body then works on
                                         log-probs without gradient, for its metrics
    log                                  the rlsd/* metrics
    _save/_load_optimizer_and_scheduler  teacher and unused completions travel with the optimizer's state
    token_labels, observe_credit         for subclasses: more that a credit function can read, and what it made of it
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id, maybe_gather_lm_head_ctx

from trl_rlsd import checks, losses
from trl_rlsd.alarms import AlarmCallback
from trl_rlsd.collator import PrivilegedPromptCollator, text_of
from trl_rlsd.config import RLSDConfig
from trl_rlsd.contrast import is_wrong, references_of, right_metric, wrong_references
from trl_rlsd.data import CUT_COLUMN
from trl_rlsd.external import external_teacher
from trl_rlsd.leakage import leak_metrics
from trl_rlsd.metrics import MetricSums
from trl_rlsd.prompt_check import PromptCheck
from trl_rlsd.rollouts import load_rollouts, rollouts_file, save_rollouts, steps_of_batch
from trl_rlsd.spans import CreditSpan, TokenSpan, final_answer_span
from trl_rlsd.teacher import STATE_FILE, Teacher, TeacherCallback, build_teacher, scoring
from trl_rlsd.teacher_pass import TeacherPass, resolve_sharing
from trl_rlsd.token_credit import TokenCredit, counted


logger = get_logger(__name__)


class RLSDTrainer(GRPOTrainer):
    """
    Trainer for RLSD, reinforcement learning from verifiable rewards with token credit from a privileged self-teacher
    ([Self-Distilled RLVR](https://huggingface.co/papers/2604.03128)).

    It takes what [`~trl.GRPOTrainer`] takes, with an [`RLSDConfig`] as `args`, a dataset that has a privileged column
    (`args.privileged_column`), and:

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher of `teacher_model_kind="external"`: a path or model id, or a causal language model with the
            student's vocabulary. No other kind takes one.

    Raises:
        `ValueError` or `TypeError`: at construction, for whatever is knowable then; the message names the field, its
        value and what to do.

    Example:

    ```python
    from trl_rlsd import RLSDConfig, RLSDTrainer

    trainer = RLSDTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=RLSDConfig("out"),
        train_dataset=dataset,  # columns: prompt, solution, privileged_context
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "rlsd"]
    _name = "RLSD"
    _paper = {
        "title": "Self-Distilled RLVR",
        "id": "2604.03128",
        "citation": textwrap.dedent("""\
            @misc{yang2026selfdistilledrlvr,
                title  = {{Self-Distilled RLVR}},
                author = {Chenxu Yang and Chuanyu Qin and Qingyi Si and Minghui Chen and Naibin Gu and Dingyu Yao and
                          Zheng Lin and Weiping Wang and Jiaqi Wang and Nan Duan},
                year   = 2026,
                eprint = {arXiv:2604.03128},
            }"""),
    }

    # Class attributes, so that a trainer made without __init__ (as in TRL's own tests) still runs TRL's methods.
    _rows: list[Mapping[str, Any]] | None = None
    _wanted: bool = False
    _prompts: list | None = None
    _teacher_prompts: tuple[list[list[int]], list[bool]] | None = None
    _verdicts: tuple[list, torch.Tensor] | None = None
    _loss_inputs: dict[str, Any] | None = None
    _fused: losses.FusedLoss | None = None

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: RLSDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *grpo_args,
        teacher_model: str | PreTrainedModel | None = None,
        **grpo_kwargs,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RLSDConfig(f"{model_id.split('/')[-1]}-RLSD")
        if not isinstance(args, RLSDConfig):
            raise TypeError(
                f"args is a {type(args).__name__}; RLSDTrainer needs an RLSDConfig, which takes the same fields and "
                "those of RLSD."
            )
        self._credit = TokenCredit(args)
        self._collator = PrivilegedPromptCollator(
            args.teacher_prompt_template,
            args.privileged_column,
            needs_context=args.teacher_model_kind != "external" or self._credit.credit.contrast,
        )
        self._teacher_is_used, contrast = self._credit.uses_teacher, self._credit.credit.contrast
        checks.check_teacher_model(args.teacher_model_kind, teacher_model, self._teacher_is_used)
        if self._teacher_is_used and self._collator.reads_context:
            checks.check_column(train_dataset, args.privileged_column)
        self._wrong_column = args.contrast_column if contrast else None
        if self._wrong_column is not None:
            checks.check_column(train_dataset, args.contrast_column, "contrast_column")
        checks.check_rewards(reward_funcs, train_dataset, *grpo_args[:1], grpo_kwargs.get("eval_dataset"))

        super().__init__(model, reward_funcs, args, train_dataset, *grpo_args, **grpo_kwargs)

        self._span = CreditSpan(args.credit_span, self._tokenizer)
        self._answer_span = TokenSpan(final_answer_span, self._tokenizer)
        self._credit_metrics, self._eval_metrics = (MetricSums(self.accelerator.device) for _ in range(2))
        if args.use_liger_loss:
            self._prepare_liger_loss()
        if args.alarm_steps:
            self.add_callback(AlarmCallback(args.alarm_thresholds, args.alarm_steps))
        if not self._teacher_is_used:
            return
        self._check_setup()
        self.teacher = self._build_teacher(teacher_model)
        self.add_callback(TeacherCallback(self.teacher))
        self._teacher_pass = self._build_teacher_pass()
        self._prompt_check = PromptCheck(
            self._collator,
            lambda prompts: self._tokenize_prompts(prompts)[0],
            self._tokenizer,
            self.max_completion_length,
            checks.position_limit(
                self.model, self.teacher.model if args.teacher_model_kind == "external" else self.model
            ),
        )

    # ------------------------------------------------------------------ checks, before anything is generated

    def _check_setup(self) -> None:
        row = self.train_dataset[0] if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) else {}
        has_template = bool(self.chat_template or self._tokenizer.chat_template)
        checks.check_processing(self.processing_class, self._is_vlm, has_template, is_conversational(row))
        model_type = self.model.config.get_text_config().model_type
        checks.warn(
            checks.dropout_warning(self.model), checks.sampler_warning(self.args), checks.position_warning(model_type)
        )

    def _sharded(self) -> bool:
        zero_3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.is_fsdp_enabled or zero_3

    def _build_teacher(self, teacher_model: str | PreTrainedModel | None) -> Teacher:
        student, args = self.accelerator.unwrap_model(self.model), self.args
        if teacher_model is not None:
            teacher_model = external_teacher(
                teacher_model,
                student,
                self._tokenizer,
                self.accelerator,
                args,
                dtype=student.dtype,
                attn_implementation=student.config._attn_implementation,
                trust_remote_code=args.trust_remote_code,
            )
        teacher = build_teacher(
            args.teacher_model_kind,
            student,
            is_peft=is_peft_model(student),
            sync_steps=args.teacher_sync_steps,
            update_rate=args.teacher_update_rate,
            offload=args.teacher_offload,
            external=teacher_model,
        )
        checks.warn(
            checks.check_copies(args.teacher_model_kind, teacher.copies, self._sharded(), args.teacher_offload)
        )
        return teacher

    def _prepare_liger_loss(self) -> None:
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if is_peft_model(student) else student
        checks.check_head(student.get_output_embeddings(), self.aux_loss_enabled)
        losses.add_fused_loss(student, maybe_gather_lm_head_ctx)

    def _build_teacher_pass(self) -> TeacherPass:
        scored = self.teacher.model if self.args.teacher_model_kind == "external" else self.model
        share = resolve_sharing(
            self.args.teacher_shared_prefix, self.accelerator.unwrap_model(scored), self._sharded()
        )

        def token_logps(model, ids, mask, tokens):
            return super(RLSDTrainer, self)._get_per_token_logps_and_entropies(model, ids, mask, tokens)[0]

        def most(count: int) -> int:
            return self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max().item()

        return TeacherPass(
            token_logps,
            self.accelerator.autocast,
            self._tokenizer.pad_token_id,
            budget=self.args.teacher_token_budget,
            share=share,
            equalize=most if self._sharded() else None,
        )

    def train(self, *args, **kwargs):
        if self._teacher_is_used and isinstance(self.train_dataset, Dataset) and self.environment_factories is None:
            self._prompt_check.dataset(self.train_dataset)
        return super().train(*args, **kwargs)

    # ------------------------------------------------------------------ data flow

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in (self.args.privileged_column, self._wrong_column):
            if column is not None and column not in self._signature_columns:
                self._signature_columns.append(column)

    def _generate(self, prompts: list):
        # The last moment before samples are paid for, and the first at which the prompts are those that the student
        # will read (with environments, reset() has extended them).
        self._prompts = prompts
        if self._rows is None or not (self._wanted or (self._teacher_is_used and not self._prompt_check.shown)):
            return super()._generate(prompts)
        self._teacher_prompts = self._prompt_check.batch(self._rows, prompts)
        generated = super()._generate(prompts)
        if self.rollout_func is not None:
            self._prompt_check.rollout(prompts, generated[0])
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        # lambda may be 0 now and positive when the batch's last slice is used
        steps = steps_of_batch(self.state.global_step, self._step, self.args)
        self._wanted = self._teacher_is_used and not all(map(self._credit.lambda_is_zero, steps))
        self._rows = inputs
        try:
            batch = super()._generate_and_score_completions(inputs)
            batch |= self.token_labels(batch, inputs)
            if CUT_COLUMN in inputs[0]:
                self._credit_metrics.add({CUT_COLUMN: (sum(row[CUT_COLUMN] or 0 for row in inputs), len(inputs))})
            if self._wanted:
                self._add_spans(batch)
                self._score_with_teacher(batch, *self._teacher_prompts)
            elif self._teacher_is_used:
                self._credit_metrics.add({"skipped": (len(inputs), len(inputs))})
        finally:
            self._rows = self._prompts = self._teacher_prompts = self._verdicts = None
        return batch

    def _calculate_rewards(self, inputs, prompts, completions, ids, *args, **kwargs):
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids, *args, **kwargs)
        self._verdicts = completions, rewards  # of this process, and of all processes by reward function
        metrics = self._credit_metrics if self.model.training else self._eval_metrics
        metrics.add(right_metric(rewards, self._wrong(rewards)) | {"length": (sum(map(len, ids)), len(ids))})
        texts = ([text_of(turns) for turns in column] for column in (completions, prompts))
        metrics.add(leak_metrics(*texts, map(self._collator.readable, inputs), self.args.leak_phrases))
        return rewards

    def token_labels(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors (B, T) for a credit function that is registered with `reads`, such as a step verifier's; none unless
        overridden. `batch` (`completion_ids`, `completion_mask`, ...) and its dataset rows are of this process."""
        return {}

    def observe_credit(self, batch: dict[str, Any], student_logps: torch.Tensor, credited: torch.Tensor) -> None:
        """Called with each micro-batch of training and its credit: (B, T), or (B,) where that is plain GRPO."""

    def _add_spans(self, batch: dict[str, Any]) -> None:
        """Add `answer_span` for the diagnostics, and `credit_span` where one is set, both (B, T)."""
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        batch["answer_span"] = self._answer_span(ids, mask)
        if self._span.find is not None:
            span = batch["credit_span"] = self._span(ids, mask, self.state.global_step)
            self._credit_metrics.add({"no_span": (len(span) - span.any(1).sum(), len(span))})

    def _score_with_teacher(self, batch: dict[str, Any], prompt_ids: list[list[int]], has_context: list[bool]) -> None:
        """Add `teacher_logps` (B, T), `teacher_scored` (B,); with a contrast also `wrong_logps`, `wrong_scored`."""
        started = time.perf_counter()
        ids, mask, rows = batch["completion_ids"], batch["completion_mask"], len(prompt_ids)
        scored = self._credit.needs_teacher(batch, torch.tensor(has_context, device=ids.device))
        contrast, found = self._credit.credit.contrast, None
        if contrast:
            wrong_ids, has_wrong = self._prompt_check.wrong(self._prompts, self._wrong_references())
            found = scored & torch.tensor(has_wrong, device=ids.device)
            self._credit_metrics.add({"no_contrast": ((scored & ~found).sum(), scored.sum())})
            scored = found if self.args.contrast_fallback == "grpo" else scored
            prompt_ids, ids, mask = prompt_ids + wrong_ids, ids.repeat(2, 1), mask.repeat(2, 1)  # one pass for both
        chosen = (torch.cat([scored, found]) if contrast else scored).nonzero().squeeze(1).tolist()
        logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        if chosen or self._sharded():
            with self.teacher.weights(self.model) as model, scoring(model):
                logps = self._teacher_pass(model, prompt_ids, ids, mask, chosen)
        batch["teacher_logps"], batch["teacher_scored"] = logps[:rows], scored
        if contrast:
            batch["wrong_logps"], batch["wrong_scored"] = logps[rows:], found
        if ids.device.type != "cpu":  # kernels are queued: without this the clock would time their launch
            torch.accelerator.synchronize()
        counts = {"no_context": (rows - sum(has_context), rows), "skipped": (rows - scored.sum(), rows)}
        self._credit_metrics.add(counts | {"teacher_seconds": (time.perf_counter() - started, 1)})

    def _wrong_references(self) -> list[str | None]:
        """Of this process's rows; siblings may lie on other processes."""
        if self._wrong_column is not None:
            rows = enumerate(self._rows)
            return [self._collator.text(row, self._wrong_column, "contrast_column", index) for index, row in rows]
        completions, rewards = self._verdicts
        spoken = references_of(list(map(text_of, completions)), self.args.contrast_reference)
        own = self._collator.contexts(self._rows), self.accelerator.process_index * len(self._rows)
        return wrong_references(gather_object(spoken), self._wrong(rewards), self.num_generations, *own)

    def _wrong(self, rewards: torch.Tensor) -> list[bool]:
        return is_wrong(rewards, self.reward_weights, self.args.contrast_reward_below)

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._credit_metrics.add(self._credit.lambdas(self.state.global_step))
        # a copy: the buffered batch is used again when num_iterations > 1, and credit must not be put upon credit
        self._loss_inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
            # with a fused loss TRL's body has worked on log-probs without gradient, for its metrics
            return loss if self._fused is None else self._fused.loss
        finally:
            self._loss_inputs = self._fused = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        inputs, self._loss_inputs = self._loss_inputs, None
        if inputs is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # The first call within TRL's loss is the student's own forward; its log-probs cost nothing more.
        if self.args.use_liger_loss:
            self._fused = self._fused_loss(inputs)
            model = losses.fused_forward(model, self._fused)
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        student_logps = outputs[0].detach()
        losses.check_finite(student_logps, counted(inputs), self.state.global_step)
        credited = inputs["advantages"]
        if not self._credit.is_plain(inputs, self.state.global_step):
            credited = self._token_credit(inputs, student_logps)
            self._credit_metrics.add(self._credit.metrics(inputs, student_logps, credited))
        self.observe_credit(inputs, student_logps, credited)
        inputs["advantages"] = credited
        return outputs

    def _token_credit(self, inputs, student_logps, rows=None) -> torch.Tensor:
        return self._credit(inputs, student_logps, self.state.global_step, rows)

    def _fused_loss(self, inputs: dict[str, Any]) -> losses.FusedLoss:
        mask, steps = counted(inputs), self.current_gradient_accumulation_steps
        uncredited = {**inputs}

        def credit(logps, rows):
            losses.check_finite(logps, mask[rows], self.state.global_step, rows)
            if self._credit.is_plain(uncredited, self.state.global_step):
                return uncredited["advantages"][rows]
            return self._token_credit(uncredited, logps, rows)

        # num_items_in_batch spans the generation batch, of all processes
        window = self.accelerator.num_processes * self.args.steps_per_generation / steps
        factors = losses.row_factors(
            self.args.loss_type,
            mask,
            max_completion_length=self.max_completion_length,
            accumulation_steps=steps,
            num_items=inputs["num_items_in_batch"].clamp(min=1.0) / window,
        )
        ratio = inputs.get("importance_sampling_ratio") if self.use_vllm else None
        return losses.FusedLoss.from_config(self.args, inputs, mask, factors, credit, ratio=ratio)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix, metrics = ("", self._credit_metrics) if self.model.training else ("eval_", self._eval_metrics)
        means = metrics.means(lambda totals: self.accelerator.reduce(totals, reduction="sum"))
        logs.update({f"{prefix}rlsd/{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    # ------------------------------------------------------------------ checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Beside the optimizer's state, not in the student's folder by way of save_pretrained: a checkpoint's model
        # files, and so what is pushed to the Hub, are the student's alone. `save_only_model` leaves both out.
        super()._save_optimizer_and_scheduler(output_dir)
        if self._teacher_is_used and self.args.should_save:
            self.teacher.save(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            # some completions of the last generation are still to be used
            path = rollouts_file(output_dir, self.accelerator.process_index)
            save_rollouts(path, self._step, self._buffered_inputs, self.accelerator.num_processes)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called on resume, once the student's weights are loaded and before training begins.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rollouts = load_rollouts(
            rollouts_file(checkpoint, self.accelerator.process_index),
            self.accelerator.num_processes,
            self.args.steps_per_generation,
            self.accelerator.device,
        )
        if rollouts is not None:
            self._step, self._buffered_inputs = rollouts
        if not self._teacher_is_used or self.teacher.load(checkpoint):
            return
        if os.path.isfile(os.path.join(checkpoint, OPTIMIZER_NAME)):
            raise ValueError(
                f"{checkpoint} has no {STATE_FILE}, so the teacher cannot be restored: it was written by another "
                "trainer, or is incomplete. Resume from another checkpoint; or, to start RLSD from these weights, "
                "pass the folder as `model` instead of resuming."
            )
        logger.warning(f"{checkpoint} was saved without training state: the teacher starts from its weights.")
