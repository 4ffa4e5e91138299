"""RLSDTrainer: GRPOTrainer with token credit from a privileged self-teacher.

The only file that knows TRL's private names; `tests/test_contract.py` states what is expected of each. No TRL method
body is repeated here; these are extended, each through `super()`:

    train                                the self-check of the prompts
    _set_signature_columns_if_needed     the privileged column survives remove_unused_columns
    _generate                            before a batch is generated: what the teacher will read is built and checked
    _generate_and_score_completions      after it: the teacher scores the completions that matter
    _compute_loss                        hands TRL a copy of the batch, in which ...
    _get_per_token_logps_and_entropies   ... the advantages become token advantages as soon as the student's log-probs
                                         of this very forward are there: TRL reads the advantages after them
    log                                  the rlsd/* metrics
    _save/_load_optimizer_and_scheduler  teacher and unused completions travel with the optimizer's state
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from trl_rlsd.checks import check_column, check_teacher_model, dropout_warning, position_warning, sampler_warning
from trl_rlsd.collator import PrivilegedPromptCollator, check_length, teacher_inputs
from trl_rlsd.config import RLSDConfig
from trl_rlsd.credit import clipped_weight, gain, get_credit, lambda_at, token_advantages
from trl_rlsd.metrics import MetricSums, credit_metrics
from trl_rlsd.rollouts import load_rollouts, rollouts_file, save_rollouts
from trl_rlsd.teacher import STATE_FILE, CopyTeacher, TeacherCallback, build_teacher, load_external, scoring


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
    _teacher_prompts: tuple[list[list[int]], list[bool]] | None = None
    _uncredited: dict[str, Any] | None = None
    _prompts_shown = False
    _rollout_checked = False

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
        self._credit = get_credit(args.credit)
        self._collator = PrivilegedPromptCollator(
            args.teacher_prompt_template, args.privileged_column, needs_context=args.teacher_model_kind != "external"
        )
        self._teacher_is_used = self._credit.teacher_rows != "none"
        check_teacher_model(args.teacher_model_kind, teacher_model, self._teacher_is_used)
        if self._teacher_is_used and self._collator.reads_context:
            check_column(train_dataset, args.privileged_column)

        super().__init__(model, reward_funcs, args, train_dataset, *grpo_args, **grpo_kwargs)

        self._credit_metrics = MetricSums(self.accelerator.device)
        if not self._teacher_is_used:
            return
        self._check_setup()
        student = self.accelerator.unwrap_model(self.model)
        external = self._prepare_external(teacher_model) if teacher_model is not None else None
        self.teacher = build_teacher(
            args.teacher_model_kind,
            student,
            is_peft=is_peft_model(student),
            sync_steps=args.teacher_sync_steps,
            update_rate=args.teacher_update_rate,
            offload=args.teacher_offload,
            external=external,
        )
        self._check_teacher()
        self.add_callback(TeacherCallback(self.teacher))

    # ------------------------------------------------------------------ checks, before anything is generated

    def _check_setup(self) -> None:
        if self._is_vlm:
            raise ValueError(
                f"{type(self.processing_class).__name__} is a processor: token credit for vision-language models is "
                "not supported yet. Pass the tokenizer for text-only training, or credit='grpo'."
            )
        row = self.train_dataset[0] if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) else {}
        if is_conversational(row) and not (self.chat_template or self._tokenizer.chat_template):
            raise ValueError(
                "processing_class has no chat template, but the dataset's prompts are conversational. Set "
                "`tokenizer.chat_template`, or give plain-text prompts."
            )
        model_type = self.model.config.get_text_config().model_type
        for warning in (dropout_warning(self.model), sampler_warning(self.args), position_warning(model_type)):
            if warning:
                logger.warning(warning)

    def _sharded(self) -> bool:
        zero_3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.is_fsdp_enabled or zero_3

    def _check_teacher(self) -> None:
        if self._sharded() and isinstance(self.teacher, CopyTeacher):
            raise ValueError(
                f"teacher_model_kind={self.args.teacher_model_kind!r} with FSDP or ZeRO-3: a copy of sharded weights "
                "is not supported yet. Use 'live', 'base' with LoRA, or 'external'; or DDP or ZeRO-2."
            )
        if self.args.teacher_offload and not isinstance(self.teacher, CopyTeacher):
            logger.warning(
                f"teacher_offload=True has no effect: teacher_model_kind={self.args.teacher_model_kind!r} keeps no "
                "copy of the weights."
            )

    def _prepare_external(self, teacher_model: str | PreTrainedModel) -> PreTrainedModel:
        student = self.accelerator.unwrap_model(self.model)
        teacher_model = load_external(
            teacher_model,
            student,
            self._tokenizer,
            dtype=student.dtype,
            attn_implementation=student.config._attn_implementation,
            trust_remote_code=self.args.trust_remote_code,
        )
        add_fused_lm_head(
            teacher_model.get_base_model() if is_peft_model(teacher_model) else teacher_model,
            temperature=self.temperature,
            cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
        )
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher_model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(teacher_model, self.accelerator)
        return self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

    def train(self, *args, **kwargs):
        if self._teacher_is_used and isinstance(self.train_dataset, Dataset) and self.environment_factories is None:
            self._check_dataset(self.train_dataset)
        return super().train(*args, **kwargs)

    def _check_dataset(self, dataset: Dataset) -> None:
        """The self-check at the start: the first row with privileged context is rendered and shown, and the row with
        most text must fit into the model."""
        rows = dataset.select_columns([c for c in ("prompt", self._collator.column) if c in dataset.column_names])
        first, longest = self._collator.first_and_longest(rows)
        if first is None:
            logger.warning(
                f"No row of the dataset has privileged context in {self._collator.column!r}: every row will be "
                "trained with plain GRPO credit."
            )
            return
        prompts, _ = self._collator.prompts([rows[longest]], [rows[longest]["prompt"]])
        check_length([len(self._tokenize_prompts(prompts)[0][0])], self.max_completion_length, self._positions())
        prompt = [rows[first]["prompt"]]
        teacher_prompts, _ = self._collator.prompts([rows[first]], prompt)
        ids = [self._tokenize_prompts(prompts)[0][0] for prompts in (prompt, teacher_prompts)]
        self._show_prompts(rows[first], *ids)

    def _show_prompts(self, row: Mapping[str, Any], student_ids: list[int], teacher_ids: list[int]) -> None:
        self._prompts_shown = True
        student, teacher = self._tokenizer.decode(student_ids), self._tokenizer.decode(teacher_ids)
        if self._collator.reads_context:
            # encoded and decoded like the prompts, so that what a tokenizer drops is dropped here too
            context = self._tokenizer.encode(self._collator.context(row), add_special_tokens=False)
            self._collator.check_rendered(self._tokenizer.decode(context), student, teacher)
        logger.info(f"The student reads:\n{student}\nThe teacher reads:\n{teacher}")

    def _positions(self) -> int | None:
        models = [self.model] if self.args.teacher_model_kind != "external" else [self.model, self.teacher.model]
        limits = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models]
        return min((limit for limit in limits if limit), default=None)

    # ------------------------------------------------------------------ data flow

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._teacher_is_used and self.args.privileged_column not in self._signature_columns:
            self._signature_columns.append(self.args.privileged_column)

    def _generate(self, prompts: list):
        # The last moment before samples are paid for, and the first at which the prompts are those that the student
        # will read (with environments, reset() has extended them).
        rows, student_ids = self._rows, None
        if rows is not None:
            teacher_prompts, has_context = self._collator.prompts(rows, prompts)
            teacher_ids = self._tokenize_prompts(teacher_prompts)[0]
            check_length([len(ids) for ids in teacher_ids], self.max_completion_length, self._positions())
            self._teacher_prompts = (teacher_ids, has_context)
            if not self._prompts_shown and any(has_context):
                student_ids = self._tokenize_prompts(prompts)[0]
                first = has_context.index(True)
                self._show_prompts(rows[first], student_ids[first], teacher_ids[first])
        generated = super()._generate(prompts)
        if rows is not None and self.rollout_func is not None and not self._rollout_checked:
            self._check_rollout(prompts, student_ids, generated[0])
        return generated

    def _check_rollout(self, prompts: list, student_ids: list[list[int]] | None, rollout_ids: list[list[int]]) -> None:
        self._rollout_checked = True
        student_ids = student_ids or self._tokenize_prompts(prompts)[0]
        if any(list(a) != list(b) for a, b in zip(rollout_ids, student_ids, strict=True)):
            logger.warning(
                "`rollout_func` samples from another prompt than the one that the trainer renders. The teacher reads "
                "the trainer's, so the gain also measures that difference: render the prompt in `rollout_func` as "
                "the trainer does (same chat template, tools and chat_template_kwargs)."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.model.training and self._teacher_is_used):
            return super()._generate_and_score_completions(inputs)
        # lambda may be 0 now and positive when the batch's last slice is used
        wanted = not self._credit.uses_lambda or any(self._lambda(step) > 0 for step in self._steps_of_batch())
        self._rows = inputs if wanted or not self._prompts_shown else None
        try:
            batch = super()._generate_and_score_completions(inputs)
            if wanted:
                self._score_with_teacher(batch, *self._teacher_prompts)
            else:
                self._credit_metrics.add({"skipped": (len(inputs), len(inputs))})
        finally:
            self._rows = self._teacher_prompts = None
        return batch

    def _steps_of_batch(self) -> range:
        """The optimizer steps, from now on, in which slices of the batch that is generated now can be used."""
        accumulation = self.args.gradient_accumulation_steps
        uses = self.args.steps_per_generation * self.num_iterations
        aligned = uses % accumulation == 0 and self._step % accumulation == 0
        now = self.state.global_step
        return range(now, now + (uses - 1) // accumulation + (1 if aligned else 2))

    def _lambda(self, step: int) -> float:
        return lambda_at(
            step,
            peak=self.args.rlsd_lambda,
            warmup_steps=self.args.rlsd_lambda_warmup_steps,
            decay_steps=self.args.rlsd_lambda_decay_steps,
        )

    def _score_with_teacher(self, batch: dict[str, Any], prompt_ids: list[list[int]], has_context: list[bool]) -> None:
        """Add `teacher_logps` (B, T) and `teacher_scored` (B,) to the batch.

        Scored are the rows with context, with a token that counts, and, if the credit is a multiple of the advantage,
        with an advantage that is not 0. The others are never run through the model.
        """
        started = time.perf_counter()
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        scored = torch.tensor(has_context, device=ids.device) & self._credited_mask(batch).any(dim=1)
        if self._credit.teacher_rows == "nonzero_advantage":
            scored &= self._informative(batch["advantages"])
        chosen = scored.nonzero().squeeze(1)
        logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        chunks = list(chosen.split(self.args.per_device_train_batch_size)) if len(chosen) else []
        own = len(chunks)
        if self._sharded():  # every forward is a collective call: a rank with fewer rows runs its first row again
            most = self.accelerator.gather(torch.tensor([own], device=ids.device)).max().item()
            chunks += [torch.zeros(1, dtype=torch.long, device=ids.device)] * (most - own)
        if chunks:
            with self.teacher.weights(self.model) as model, scoring(model):
                for position, rows in enumerate(chunks):
                    inputs = teacher_inputs(
                        [prompt_ids[row] for row in rows.tolist()], ids[rows], mask[rows], self._tokenizer.pad_token_id
                    )
                    scores, _, _ = self._get_per_token_logps_and_entropies(model, *inputs, ids.size(1))
                    if position < own:
                        logps[rows] = scores.float()
        batch["teacher_logps"], batch["teacher_scored"] = logps, scored
        rows = len(prompt_ids)
        without = rows - sum(has_context)
        if ids.device.type != "cpu":  # kernels are queued: without this the clock would time their launch
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - started
        self._credit_metrics.add(
            {"no_context": (without, rows), "skipped": (rows - len(chosen), rows), "teacher_seconds": (seconds, 1)}
        )

    def _informative(self, advantages: torch.Tensor) -> torch.Tensor:
        """The rows (B,) whose advantage the credit multiplies. The mean of a group of equal rewards misses them by a
        rounding error, which TRL divides by a standard deviation of about 1e-4: 8 rewards of 0.1 give A = -7e-5."""
        rounding = 1e-6 if self.args.scale_rewards == "none" else 1e-3
        if self.args.rlsd_negative_only:
            return advantages < -rounding
        return advantages.abs() > rounding

    def _credited_mask(self, batch: dict[str, Any]) -> torch.Tensor:
        return batch["completion_mask"] * batch.get("tool_mask", 1)

    def _compute_loss(self, model, inputs):
        lam = self._lambda(self.state.global_step)
        training = self.model.training
        if self._credit.uses_lambda and training:
            self._credit_metrics.add({"lambda": (lam, 1)})
        # With lambda 0 the batch stays as GRPO made it, (B,) advantages included: the same run, bit for bit.
        plain = self._credit.name == "grpo" or (self._credit.uses_lambda and lam == 0)
        if plain or not training or (self._teacher_is_used and "teacher_logps" not in inputs):
            return super()._compute_loss(model, inputs)
        # a copy: the buffered batch is used again when num_iterations > 1, and credit must not be put upon credit
        inputs = dict(inputs)
        self._uncredited = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._uncredited = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._uncredited is not None:
            # The first call within TRL's loss is the student's own forward; its log-probs cost nothing more.
            inputs, self._uncredited = self._uncredited, None
            inputs["advantages"] = self._token_credit(inputs, outputs[0].detach())
        return outputs

    def _token_credit(self, inputs: dict[str, Any], student_logps: torch.Tensor) -> torch.Tensor:
        advantages, mask, clip_range = (
            inputs["advantages"],
            self._credited_mask(inputs),
            self.args.rlsd_reweight_clip_range,
        )
        teacher_logps, scored = inputs.get("teacher_logps", student_logps), inputs.get("teacher_scored")
        if scored is not None:
            counted = mask * scored.unsqueeze(1)
            gains = gain(student_logps, teacher_logps, counted)
            weights = clipped_weight(gains, advantages, clip_range)
            self._credit_metrics.add(credit_metrics(advantages, gains, *weights, counted))
        return token_advantages(
            self._credit,
            advantages,
            student_logps,
            teacher_logps,
            mask,
            scored,
            lam=self._lambda(self.state.global_step),
            clip_range=clip_range,
            negative_only=self.args.rlsd_negative_only,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._teacher_is_used:
            means = self._credit_metrics.means(lambda totals: self.accelerator.reduce(totals, reduction="sum"))
            logs.update({f"rlsd/{name}": value for name, value in means.items()})
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
