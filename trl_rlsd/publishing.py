"""GRPOTrainer whose run leaves a record, and whose pushes hold what is meant for others and nothing else.

transformers pushes the whole output_dir: with `log_completions` training rows are in it, with credit pictures the
privileged context. Here a push is what `hub.publish` lets through.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress
from trl.trainer.utils import get_config_model_id

from trl_rlsd import hub
from trl_rlsd.config import RLSDConfig
from trl_rlsd.hub.rows import texts_of
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

    uploads = HfApi()  # whose single thread keeps pushes in their order
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
            "dataset": {"name": _hub_name(self.dataset_name), "columns": list(self.train_dataset.column_names or ())}
            | rows,
            "rewards": [
                {"name": name, "weight": weight}
                for name, weight in zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
            ],
            "eval_completions": rows["eval_rows"] and rows["eval_rows"] * self.num_generations_eval,
            "processes": self.accelerator.num_processes,
        }

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        own = self.eval_dataset if eval_dataset is None else eval_dataset
        own = self.eval_dataset[own] if isinstance(own, str) else own
        if not isinstance(own, dict):  # with several, transformers calls this for each
            rows = len(own) if isinstance(own, Dataset) else None
            completions = rows and rows * self.num_generations_eval
            batch = self.args.per_device_eval_batch_size * self.accelerator.num_processes
            self.recorder.evaluation = {
                "eval_dataset": metric_key_prefix.removeprefix("eval").removeprefix("_") or None,
                "eval_rows": rows,
                "eval_completions": completions,
                "eval_even": completions is not None and completions % batch == 0,  # TRL logs means of batches
            }
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.recorder.evaluation = {}

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        model_name: str | None = None,
        dataset_name: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
    ) -> hub.Publication | Future | None:
        """
        Save the model and publish it with a card made from this run, in one commit that is read back; see
        [`~trl_rlsd.hub.publish`]. Adapter or model, tokenizer and card are uploaded, and nothing else of output_dir.

        Args: those of [`~transformers.Trainer.push_to_hub`] (`model_name` is the repository's), and for the card
            `dataset_name`, `base_model`, `license` and more `tags`.

        Raises: `ValueError`, where something must not be published, and `PublishError`, where the Hub or the way to
            it failed. The model stays saved in output_dir.
        """
        self.dataset_name = dataset_name or self.dataset_name
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        card = {"base_model": base_model, "license": license}
        record = self._record_now(tags)
        if self.hub_model_id is None:
            name = model_name or self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            # what must not be published is told before a repository is made for it
            with self._staged(self.args.output_dir) as staged:
                self._publish(staged, name if "/" in name else f"owner/{name}", record, dry_run=True, **card)
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        publish = partial(
            self._publish_staged,
            self._staged(self.args.output_dir),
            record,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            commit_message=commit_message or "Upload model trained with RLSD",
            **card,
        )
        return publish() if blocking else self.uploads.run_as_future(publish)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers 5.23: called after a save where push_to_hub is on; the run goes on meanwhile, and afterwards
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        publish = partial(
            self._publish_staged,
            self._staged(checkpoint_folder),  # before a later save deletes the checkpoint
            self._record_now(),
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

        self.push_in_progress = PushInProgress([self.uploads.run_as_future(publish_or_warn)])

    def _staged(self, folder: str) -> TemporaryDirectory:
        """The files of this model in a folder of their own, with the name of the one that they come from. An
        output_dir may hold an adapter of one run and the full model of another."""
        source, other = Path(folder), ("model", "config.json") if is_peft_model(self.model) else ("adapter_",)
        # beside the files, so that links to them can be made
        staged = TemporaryDirectory(dir=self.args.output_dir, prefix=".publishing-")
        target = Path(staged.name) / source.resolve().name
        for path in (*source.glob("*"), *source.glob("additional_chat_templates/*.jinja")):
            place = target / path.relative_to(source)
            if path.suffix in _SHARED and not path.name.startswith((*other, "rlsd_")) and path.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(path, place)
        return staged

    def _publish_staged(self, staged: TemporaryDirectory, record: dict[str, Any], **options) -> hub.Publication:
        with staged as folder:
            return self._publish(folder, self.hub_model_id, record, **options)

    def _publish(self, staged: str, repo_id: str, record: dict[str, Any], **options) -> hub.Publication:
        metrics, texts = read_metrics(self.args.output_dir)[0], self.private_texts()
        (folder,) = Path(staged).iterdir()
        return hub.publish(folder, repo_id, record=record, metrics=metrics, private_texts=texts, **options)

    def _record_now(self, tags: str | list[str] | None = None) -> dict[str, Any]:
        kept = read_record(self.args.output_dir) or {"versions": versions(), "steps": self.state.global_step}
        return kept | self.describe_run() | {"tags": [tags] if isinstance(tags, str) else list(tags or ())}

    def private_texts(self) -> Iterator[str]:
        """What no published file may hold: prompts, privileged contexts and wrong references of the datasets."""
        columns = {"prompt", self.args.privileged_column, self.args.contrast_column}
        for own in (self.train_dataset, self.eval_dataset):
            for dataset in own.values() if isinstance(own, dict) else (own,):
                if isinstance(dataset, Dataset):
                    yield from texts_of(dataset, columns)
                elif dataset is not None:
                    logger.warning("The rows of a streaming dataset are not looked for in what is published.")


def _hub_name(name: str | None) -> str | None:
    return None if name is None or os.path.exists(name) else shareable(name)


def _link_or_copy(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:  # a file system without links
        shutil.copy2(path, place)


# kinds of files of which some may be published; optimizer states, rollouts and pickles are of others
_SHARED = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")

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
