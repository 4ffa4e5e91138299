"""RLSDTrainer: GRPOTrainer with token credit from a privileged self-teacher.

With `resumable.py` the only file that knows TRL's private names; `tests/test_contract.py` states what is expected of
each. No TRL method body is repeated here; these are extended, each through `super()`:

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
    token_labels, observe_credit         for subclasses: more that a credit function can read, and what it made of it
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id, maybe_gather_lm_head_ctx

from trl_rlsd import checks, losses, shards
from trl_rlsd.alarms import AlarmCallback
from trl_rlsd.collator import PrivilegedPromptCollator, text_of, tools_text
from trl_rlsd.config import RLSDConfig
from trl_rlsd.context import ENVIRONMENT_METHOD, Context, gives_context
from trl_rlsd.contrast import is_wrong, references_of, right_metric, wrong_references
from trl_rlsd.credit_log import CreditLog, randomness_kept
from trl_rlsd.external import external_teacher
from trl_rlsd.images import (
    RowImages,
    lacks_images,
    row_images,
    same_prompt,
    with_image_lists,
    with_images_in_every_forward,
)
from trl_rlsd.leakage import leak_metrics
from trl_rlsd.metrics import MetricSums
from trl_rlsd.privileged_batch import PrivilegedBatch
from trl_rlsd.prompt_check import PromptCheck
from trl_rlsd.publishing import PublishingTrainer
from trl_rlsd.report.page import CreditPictures
from trl_rlsd.rollouts import steps_of_batch
from trl_rlsd.spans import CreditSpan, TokenSpan, final_answer_span
from trl_rlsd.teacher import Teacher, TeacherCallback, build_teacher, scoring
from trl_rlsd.teacher_pass import TeacherPass, resolve_sharing
from trl_rlsd.token_credit import TokenCredit, counted, fused_loss, scored_rows


logger = get_logger(__name__)


class RLSDTrainer(PublishingTrainer):
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

    # Class attributes, so that a trainer made without __init__ (as in TRL's own tests) still runs TRL's methods.
    _privileged: PrivilegedBatch | None = None
    _wanted: bool = False
    _verdicts: tuple[list, torch.Tensor] | None = None
    _tool_mask: list[list[int]] | None = None
    _loss_inputs: dict[str, Any] | None = None
    _fused: losses.FusedLoss | None = None
    # TRL's, changed here
    tools: list[Callable]
    log_multimodal: bool
    _batch_environments: Sequence[str | None]

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
        reads_column = self._teacher_is_used and self._collator.reads_context
        if reads_column and grpo_kwargs.get("environment_factory") is None:
            checks.check_column(train_dataset, args.privileged_column)
        self._wrong_column = args.contrast_column if contrast else None
        if self._wrong_column is not None:
            checks.check_column(train_dataset, args.contrast_column, "contrast_column")
        checks.check_rewards(reward_funcs, train_dataset, *grpo_args[:1], grpo_kwargs.get("eval_dataset"))

        super().__init__(model, reward_funcs, args, train_dataset, *grpo_args, **grpo_kwargs)

        checks.mend_quantized(self.model, fp16=args.fp16)
        self._hide_context_method()
        self._span = CreditSpan(args.credit_span, self._tokenizer)
        self._answer_span = TokenSpan(final_answer_span, self._tokenizer)
        self._credit_metrics, self._eval_metrics = (MetricSums(self.accelerator.device) for _ in range(2))
        if args.use_liger_loss:
            self._prepare_liger_loss()
        self._credit_log = CreditLog(self._credit, self._tokenizer, self.accelerator.is_main_process)
        self.add_callback(self._credit_log)
        if args.alarm_steps:
            self.add_callback(AlarmCallback(args.alarm_thresholds, args.alarm_steps, self.recorder.write))
        if not self._teacher_is_used:
            return
        self._check_setup()
        self.teacher = self._build_teacher(teacher_model)
        self.add_callback(TeacherCallback(self.teacher))
        self._teacher_pass = self._build_teacher_pass()
        self._prompt_check = PromptCheck(
            self._collator,
            self._tokenized,
            self._tokenizer,
            self.max_completion_length,
            checks.position_limit(self.model, self.teacher.model or self.model),
        )

    # ------------------------------------------------------------------ checks, before anything is generated

    def _check_setup(self) -> None:
        self._collator.images = self._is_vlm
        if self._is_vlm and self.accelerator.num_processes > 1:
            lacking = [lacks_images(dataset) for dataset in (self.train_dataset, self.eval_dataset)]
            checks.warn(checks.check_mixed_images(lacking, self.weights_are_sharded))
            # TRL 1.16 gathers a batch's images on those processes whose batch has some
            self.log_multimodal = self.log_multimodal and not any(lacks is not False for lacks in lacking)
        pools = self._environment_pool.values() if self.environment_factories is not None else ()
        if self._collator.reads_context and not all(gives_context(pool[0]) for pool in pools):
            checks.check_column(self.train_dataset, self.args.privileged_column)
        row = self.train_dataset[0] if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) else {}
        checks.check_template(self.chat_template or self.processing_class.chat_template, is_conversational(row))
        checks.check_adapter(self.model)
        checks.warn(
            checks.dropout_warning(self.model),
            checks.sampler_warning(self.args),
            checks.position_warning(self.model.config.get_text_config().model_type),
            checks.check_quantized(self.model, self.args.teacher_model_kind, self.args.use_vllm),
        )

    def _hide_context_method(self) -> None:
        # TRL 1.16: every public method of an environment but `reset` and `get_reward` is a tool. The model must not be
        # told of this one; `_generate` keeps it from calling it, whatever the credit.
        self.tools = [tool for tool in self.tools if tool.__name__ != ENVIRONMENT_METHOD]
        for name, tools in self._env_tools.items() if self.environment_factories is not None else ():
            self._env_tools[name] = [tool for tool in tools if tool.__name__ != ENVIRONMENT_METHOD]

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
            sharded=self.weights_are_sharded,
            external=teacher_model,
        )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        checks.warn(checks.check_copies(args.teacher_model_kind, teacher.copies, plugin, args.teacher_offload))
        checks.check_storage(self.weights_are_sharded and teacher.copies, args.save_on_each_node)
        return teacher

    def _prepare_liger_loss(self) -> None:
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if is_peft_model(student) else student
        checks.check_head(student.get_output_embeddings(), self.aux_loss_enabled)
        losses.add_fused_loss(student, maybe_gather_lm_head_ctx)

    def _build_teacher_pass(self) -> TeacherPass:
        scored = self.model if self.teacher.model is None else self.teacher.model
        scored = self.accelerator.unwrap_model(scored)
        share = resolve_sharing(self.args.teacher_shared_prefix, scored, self.weights_are_sharded)

        def token_logps(model, ids, mask, tokens, **images):
            return super(RLSDTrainer, self)._get_per_token_logps_and_entropies(model, ids, mask, tokens, **images)[0]

        def most(count: int) -> int:
            return self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max().item()

        return TeacherPass(
            token_logps,
            self.accelerator.autocast,
            self._tokenizer.pad_token_id,
            budget=self.args.teacher_token_budget,
            share=share,
            equalize=most if self.weights_are_sharded else None,
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

    def _tokenized(self, prompts: list) -> tuple[list[list[int]], list[RowImages | None]]:
        """Token ids and images of prompts, as TRL makes them of the student's."""
        if not self._is_vlm:
            return self._tokenize_prompts(prompts)[0], [None] * len(prompts)
        environments: Sequence = self._batch_environments if self.environment_factories else [None] * len(prompts)
        ids, images, last = [], [], None
        try:
            for prompt, environment in zip(prompts, environments, strict=True):
                if last is not None and same_prompt(last, (prompt, environment)):  # completions of one group
                    ids.append(ids[-1])
                    images.append(images[-1])
                    continue
                last = prompt, environment
                self._batch_environments = [environment]  # TRL pairs the prompts that it tokenizes with these
                own_ids, own_images, fields = self._tokenize_prompts([prompt])
                ids.append(list(own_ids[0]))
                images.append(row_images(own_images, fields))
        finally:
            self._batch_environments = environments
        return ids, images

    def prompt_ids(self, prompts: list) -> list[list[int]]:
        """The token ids that the student reads, for a `rollout_func`: same chat template, tools and options."""
        return self._tokenized(prompts)[0]

    def _generate(self, prompts: list):
        # The last moment before samples are paid for, and the first at which the prompts are those that the student
        # will read (with environments, reset() has extended them).
        for tools in (*self._sync_tool_dicts, *self._async_tool_dicts) if self.tools else ():
            tools.pop(ENVIRONMENT_METHOD, None)
        privileged = self._privileged
        if privileged is not None and (self._wanted or not self._prompt_check.shown):
            privileged.read(prompts, self.environments)
        *generated, images, tool_images = super()._generate(prompts)
        self._tool_mask = generated[2]
        if privileged is not None and self.rollout_func is not None:
            self._prompt_check.rollout(prompts, generated[0])
        if privileged is not None and tool_images:
            privileged.images_by_tools = list(map(bool, tool_images))
        # TRL 1.16: rows without images are None among those with some, which the processors refuse
        return *generated, images and [own or [] for own in images], tool_images

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = with_image_lists(inputs) if self._is_vlm else inputs
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        # lambda may be 0 now and positive when the batch's last slice is used
        steps = steps_of_batch(self.state.global_step, self._step, self.args)
        self._wanted = self._teacher_is_used and not all(map(self._credit.lambda_is_zero, steps))
        if self._teacher_is_used:
            self._privileged = PrivilegedBatch(inputs, self._collator, self._prompt_check)
            self._credit_metrics.add(self._privileged.cut)
        try:
            batch = super()._generate_and_score_completions(inputs)
            batch |= self.token_labels(batch, inputs)
            if self._wanted:
                self._add_spans(batch)
                self._score_with_teacher(batch, self._privileged)
            elif self._teacher_is_used:
                self._credit_metrics.add({"skipped": (len(inputs), len(inputs))})
            if self._credit_log.is_on:
                teacher = self._privileged.teacher if self._wanted else None
                wrong = self._privileged.contrast if self._wanted else None
                batch |= self._credit_log.keep(batch, teacher, wrong, self._own_rewards(len(inputs)))
        finally:
            self._privileged = self._verdicts = None
        return batch

    def _calculate_rewards(self, inputs, prompts, completions, ids, *args, **kwargs):
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids, *args, **kwargs)
        self._verdicts = completions, rewards  # of this process, and of all processes by reward function
        metrics = self._credit_metrics if self.model.training else self._eval_metrics
        lengths = list(map(len, ids) if self._tool_mask is None else map(sum, self._tool_mask))
        metrics.add(right_metric(rewards, self._wrong(rewards)) | {"length": (sum(lengths), len(lengths))})
        if self._privileged is not None and self._wanted:
            self._privileged.ask_environments()
        contexts = self._privileged.texts if self._privileged else map(self._collator.readable, inputs)
        # what a tool wrote the student has read, as it has its prompt
        read = [f"{text_of(p)}\n{tools_text(c)}" for p, c in zip(prompts, completions, strict=True)]
        metrics.add(leak_metrics(list(map(text_of, completions)), read, list(contexts), self.args.leak_phrases))
        return rewards

    def token_labels(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors (B, T) for a credit function that is registered with `reads`, such as a step verifier's; none unless
        overridden. `batch` (`completion_ids`, `completion_mask`, ...) and its dataset rows are of this process."""
        return {}

    def observe_credit(self, batch: dict[str, Any], student_logps: torch.Tensor, credited: torch.Tensor) -> None:
        """Called with each micro-batch of training and its credit: (B, T), or (B,) where that is plain GRPO."""

    def _add_spans(self, batch: dict[str, Any]) -> None:
        """Add `answer_span` for the diagnostics, and `credit_span` where one is set, both (B, T)."""
        ids, mask = batch["completion_ids"], counted(batch)
        batch["answer_span"] = self._answer_span(ids, mask)
        if self._span.find is not None:
            span = batch["credit_span"] = self._span(ids, mask, self.state.global_step)
            self._credit_metrics.add({"no_span": (len(span) - span.any(1).sum(), len(span))})

    def _score_with_teacher(self, batch: dict[str, Any], privileged: PrivilegedBatch) -> None:
        """Add `teacher_logps` (B, T), `teacher_scored` (B,); with a contrast also `wrong_logps`, `wrong_scored`."""
        started, right, wrong = time.perf_counter(), privileged.teacher, None
        if self._credit.credit.contrast:
            wrong = privileged.wrong(self._wrong_references(privileged))
        scores, counts = scored_rows(self._credit, batch, right, wrong, self._teacher_logps)
        batch.update(scores)
        if batch["completion_ids"].device.type != "cpu":  # without this the clock would time the kernels' launch
            torch.accelerator.synchronize()
        self._credit_metrics.add(counts | {"teacher_seconds": (time.perf_counter() - started, 1)})

    def _teacher_logps(self, prompt_ids, images, ids, mask, rows: list[int]) -> torch.Tensor:
        if not rows and not self.weights_are_sharded:
            return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        with self.teacher.weights(self.model) as model, scoring(model):
            return self._teacher_pass(model, prompt_ids, ids, mask, rows, images if self._is_vlm else None)

    def _wrong_references(self, privileged: PrivilegedBatch) -> Sequence[Context | None]:
        """Of this process's rows; siblings may lie on other processes."""
        if self._wrong_column is not None:
            return privileged.column(self._wrong_column, "contrast_column")
        completions, rewards = self._verdicts
        spoken = gather_object(references_of(list(map(text_of, completions)), self.args.contrast_reference))
        first = self.accelerator.process_index * len(completions)
        return wrong_references(spoken, self._wrong(rewards), self.num_generations, privileged.right, first)

    def _own_rewards(self, rows: int) -> list[dict[str, float]]:
        """Of this process's rows, by reward function; nan where one gave none."""
        first = self.accelerator.process_index * rows
        own = self._verdicts[1][first : first + rows].tolist()
        return [dict(zip(self.reward_func_names, values, strict=True)) for values in own]

    def _wrong(self, rewards: torch.Tensor) -> list[bool]:
        return is_wrong(rewards, self.reward_weights, self.args.contrast_reward_below)

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._credit_metrics.add(self._credit.lambdas(self.state.global_step))
        # a copy: the buffered batch is used again when num_iterations > 1, and credit must not be put upon credit
        self._loss_inputs = dict(inputs)
        if self.is_fsdp_enabled:
            shards.gather_head(self.accelerator.unwrap_model(self.model).get_output_embeddings())
        try:
            loss = super()._compute_loss(model, self._loss_inputs)
            # with a fused loss TRL's body has worked on log-probs without gradient, for its metrics
            return loss if self._fused is None else self._fused.loss
        finally:
            self._loss_inputs = self._fused = None

    def _get_per_token_logps_and_entropies(self, model, ids, mask, logits_to_keep, batch_size=None, *args, **kwargs):
        inputs, self._loss_inputs = self._loss_inputs, None
        kwargs, batch_size = with_images_in_every_forward(kwargs, batch_size)
        args = ids, mask, logits_to_keep, batch_size, *args
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
            self._credit_metrics.add(self._credit.metrics(inputs, student_logps, credited, self.state.global_step))
        self.observe_credit(inputs, student_logps, credited)
        self._credit_log.observe(self.state.global_step, inputs, student_logps, credited)
        inputs["advantages"] = credited
        return outputs

    def _token_credit(self, inputs, student_logps, rows=None) -> torch.Tensor:
        return self._credit(inputs, student_logps, self.state.global_step, rows)

    def _fused_loss(self, inputs: dict[str, Any]) -> losses.FusedLoss:
        steps = self.current_gradient_accumulation_steps
        # num_items_in_batch spans the generation batch, of all processes
        window = self.accelerator.num_processes * self.args.steps_per_generation / steps
        own = self._credit, self._token_credit, inputs, self.state.global_step
        return fused_loss(*own, accumulation_steps=steps, window=window)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix, metrics = ("", self._credit_metrics) if self.model.training else ("eval_", self._eval_metrics)
        means = metrics.means(lambda totals: self.accelerator.reduce(totals, reduction="sum"))
        logs.update({f"{prefix}rlsd/{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    def credit_pictures(self, rows: Iterable[dict[str, Any]], step: int | None = None) -> CreditPictures:
        """See the credit before anything is trained: `num_generations` completions of each dataset row are sampled,
        rewarded and scored as in training, with the lambda of `step`, by default the current one (0 after a long run).
        Nothing is updated, no metric counts them, and torch, numpy and `random` draw afterwards what they would have
        drawn; environments and vLLM's sampler have states of their own. Takes a forward's memory for a whole group.
        Every process calls this, with as many rows, and has its own pictures.

        ```python
        trainer.credit_pictures(dataset.select(range(2))).save("credit.html")
        ```
        """
        names = ("_metrics", "_logs", "_credit_metrics", "state", "_span", "current_gradient_accumulation_steps")
        kept = {name: self.__dict__[name] for name in names if name in self.__dict__}
        training = self.model.training
        try:
            self.__dict__.update(copy.deepcopy(kept))
            self.current_gradient_accumulation_steps = 1
            self.state.global_step = self.state.global_step if step is None else step
            with randomness_kept(), torch.no_grad(), self._credit_log.taking() as taken:
                for row in rows:
                    self.model.train()
                    batch = self._generate_and_score_completions([dict(row) for _ in range(self.num_generations)])
                    self._compute_loss(self.model, batch)
        finally:
            self.__dict__.update(kept)
            self.model.train(training)
        return taken
