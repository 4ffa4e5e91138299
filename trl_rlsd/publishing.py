"""GRPOTrainer whose run leaves a record, and whose pushes hold what is meant for others and nothing else.

transformers pushes the whole output_dir: with `log_completions` training rows are in it, with credit pictures the
privileged context. Here a push is what `hub.publish` lets through.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api
from trl.trainer.utils import get_config_model_id

from trl_rlsd import hub
from trl_rlsd.collator import text_of
from trl_rlsd.config import RLSDConfig
from trl_rlsd.resumable import ResumableTrainer
from trl_rlsd.run_record import (
    RunRecorder,
    adapter_settings,
    read_metrics,
    read_record,
    settings_of,
    shareable,
    versions,
)


logger = get_logger(__name__)


class PublishingTrainer(ResumableTrainer):
    """[`ResumableTrainer`] with a record and a model card of its own."""

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

    push_in_progress: PushInProgress | None  # transformers', set here
    dataset_name: str | None = None  # the data's id on the Hub, for the record and the card

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorder = RunRecorder(self.args.output_dir, self.describe_run)
        self.add_callback(self.recorder)

    def describe_run(self) -> dict[str, Any]:
        """What `rlsd_run.json` says of this run; see [`RunRecorder`]."""
        base_model = get_config_model_id(self.model.config)
        student = self.accelerator.unwrap_model(self.model)
        rows = {
            name: len(dataset) if isinstance(dataset, Dataset) else None
            for name, dataset in (("rows", self.train_dataset), ("eval_rows", self.eval_dataset))
        }
        return {
            "base_model": None if not base_model or os.path.isdir(base_model) else shareable(base_model),
            "model_class": type(student.get_base_model() if is_peft_model(student) else student).__name__,
            "peft": adapter_settings(student.active_peft_config) if is_peft_model(student) else None,
            "credit": self.args.credit,
            "settings": settings_of(self.args, own=_SHOWN),
            "dataset": {"name": self.dataset_name, "columns": list(self.train_dataset.column_names or ())} | rows,
            "rewards": [
                {"name": name, "weight": weight}
                for name, weight in zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
            ],
            "eval_completions": rows["eval_rows"] and rows["eval_rows"] * self.num_generations_eval,
            "processes": self.accelerator.num_processes,
        }

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> hub.Publication | Future | None:
        """
        Save the model and publish it with a card made from this run, in one commit that is read back; see
        [`~trl_rlsd.hub.publish`]. Adapter or model, tokenizer and card are uploaded, and nothing else of output_dir.

        Args: those of [`~transformers.Trainer.push_to_hub`]; `kwargs` may have `dataset_name`, `base_model` and
            `license`, for the card.

        Raises: `ValueError`, where something must not be published, and `PublishError`, where the Hub or the way to
            it failed. The model stays saved in output_dir.
        """
        self.dataset_name = kwargs.pop("dataset_name", self.dataset_name)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            # what must not be published is told before a repository is made for it
            self._publish(name if "/" in name else f"owner/{name}", self._record_now(), dry_run=True, **kwargs)
            self.init_hf_repo(token=token, private=private)
        options = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        options |= {"private": self.args.hub_private_repo if private is None else private, **kwargs}
        if commit_message:
            options["commit_message"] = commit_message
        self._finish_current_push()
        publish = partial(self._publish, self.hub_model_id, self._record_now(), **options)
        return publish() if blocking else hf_api().run_as_future(publish)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers 5.23: called after a save where push_to_hub is on; the run goes on meanwhile, and afterwards
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        publish = partial(
            self._publish,
            self.hub_model_id,
            self._record_now(),
            folder=checkpoint_folder,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            private=self.args.hub_private_repo,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )

        def publish_or_warn():
            try:
                publish()
            except (OSError, RuntimeError, ValueError) as error:
                logger.warning(f"{checkpoint_folder} was not published, the run goes on: {error}")

        self.push_in_progress = PushInProgress([hf_api().run_as_future(publish_or_warn)])

    def _publish(self, repo_id: str, record: dict[str, Any], folder: str | None = None, **options) -> hub.Publication:
        metrics, texts = read_metrics(self.args.output_dir)[0], self.private_texts()
        folder = folder or self.args.output_dir
        return hub.publish(folder, repo_id, record=record, metrics=metrics, private_texts=texts, **options)

    def _record_now(self) -> dict[str, Any]:
        kept = read_record(self.args.output_dir) or {"versions": versions(), "steps": self.state.global_step}
        return kept | self.describe_run()

    def private_texts(self) -> Iterator[str]:
        """What no published file may hold: prompts, privileged contexts and wrong references of the datasets."""
        columns = ("prompt", self.args.privileged_column, self.args.contrast_column)
        for dataset in (self.train_dataset, self.eval_dataset):
            if not isinstance(dataset, Dataset):  # a stream is not read once more
                continue
            for column in set(columns) & set(dataset.column_names):
                for value in dataset[column]:
                    turns = [{"content": value}] if isinstance(value, str) else value or ()
                    # a system message is written once, and may stand in the chat template too
                    yield from (text_of([turn]) for turn in turns if turn.get("role") != "system")


# of a run's settings these are told whatever their value
_SHOWN = (
    *RLSDConfig.__annotations__,
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "beta",
    "epsilon",
    "epsilon_high",
    "loss_type",
    "scale_rewards",
    "bf16",
    "fp16",
    "seed",
)
