"""GRPOTrainer whose run leaves a record, and whose pushes hold what is meant for others and nothing else.

transformers pushes the whole output_dir: with `log_completions` training rows are in it, with credit pictures the
privileged context. Here a push is what `hub.publish` lets through.
"""

from __future__ import annotations

import os
import textwrap
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from trl.trainer.utils import get_config_model_id

from trl_rlsd.config import RLSDConfig
from trl_rlsd.resumable import ResumableTrainer
from trl_rlsd.run_record import RunRecorder, adapter_settings, settings_of, shareable


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
