"""GRPOTrainer whose resumed run is the run that was not interrupted.

    checkpoint = weights, optimizer, random states, and: the teacher, completions that are still to be used, a manifest
    resume     = a checkpoint that is whole -> weights by their names, dtypes, the teacher, the place in the data

Nothing here knows of credit. With `trainer.py` the only file that knows private names of TRL and transformers; each
override is there for something that transformers 5.23 or TRL 1.16 does otherwise, and `tests/test_durability.py` and
`tests/test_resume.py` say what.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from trl_rlsd import checkpoints
from trl_rlsd.rollouts import load_rollouts, rollouts_file, save_rollouts
from trl_rlsd.teacher import STATE_FILE, STATE_FOLDER, Teacher


logger = get_logger(__name__)


class ResumableTrainer(GRPOTrainer):
    """[`~trl.GRPOTrainer`] with checkpoints that are whole or known to be torn, and exact resumes.

    `train(resume_from_checkpoint=True)` takes the newest checkpoint that is whole.

    Raises:
        `ValueError`: from `train`, where the checkpoint that was asked for is torn; the message names the file and the
        newest whole checkpoint.
    """

    _train_sampler: torch.utils.data.Sampler | None = None
    teacher: Teacher | None = None  # set by a subclass that has one

    @property
    def weights_are_sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        zero_3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.is_fsdp_enabled or zero_3

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        saves = self.args.should_save
        resume = checkpoints.choose(resume_from_checkpoint, self.args.output_dir, self.accelerator, saves)
        return super().train(resume, *args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # TRL 1.16 draws an order of the rows for each epoch, and after a resume would begin with the first one again
        for _ in range(epochs if self._train_sampler is not None else 0):
            next(iter(self._train_sampler), None)
        # transformers 5.23 asks whether it is done after a step only: a finished run, resumed, would train one more
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _save_checkpoint(self, model, trial) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with checkpoints.saving(folder, self.accelerator, self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations) != 0:
            # some completions of the last generation are still to be used
            path = rollouts_file(output_dir, self.accelerator.process_index)
            save_rollouts(path, self._step, self._buffered_inputs, self.accelerator.num_processes)
        # Beside the optimizer's state, not in the student's folder by way of save_pretrained: a checkpoint's model
        # files, and so what is pushed to the Hub, are the student's alone. `save_only_model` leaves both out.
        if self.teacher is not None:
            self.teacher.save(output_dir, write=self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        # transformers 5.23: the last that every process writes, before older checkpoints are deleted
        super()._save_rng_state(output_dir)
        later = ("entropy_ctrl_state.json",) if self.use_adaptive_entropy else ()  # TRL 1.16
        checkpoints.seal(output_dir, self.accelerator, self.args.should_save, later)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with self._restoring(resume_from_checkpoint, model or self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._restoring(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    @contextmanager
    def _restoring(self, folder: str, model: torch.nn.Module) -> Iterator[None]:
        """Mends what is loaded within the block: dtypes, and weights under other names."""
        loaded = self.accelerator.unwrap_model(model)
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        yield
        if self.weights_are_sharded:
            return
        # peft 0.21 reads adapters back in float32; TRL 1.16 trains those of a quantised base in bfloat16
        for name, parameter in loaded.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        checkpoints.restore_renamed(loaded, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Called on resume, once the weights are loaded and before training begins.
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
        if self.teacher is None or self.teacher.load(checkpoint):
            return
        if os.path.isfile(os.path.join(checkpoint, SCHEDULER_NAME)):
            raise ValueError(
                f"{checkpoint} has no {STATE_FILE} nor {STATE_FOLDER}, so the teacher cannot be restored: it was "
                "written by another trainer, or is incomplete. Resume from another checkpoint; or, to start RLSD from "
                "these weights, pass the folder as `model` instead of resuming."
            )
        logger.warning(f"{checkpoint} was saved without training state: the teacher starts from its weights.")
