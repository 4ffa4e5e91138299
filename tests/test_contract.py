"""What trainer.py and resumable.py expect of TRL's and transformers' private parts. A red test names what an upgrade
changed."""

import inspect

import pytest
import torch
from conftest import byte_tokenizer, config, dataset, lora, tiny_llama, trainer
from transformers import Trainer
from trl import GRPOTrainer

from trl_rlsd import RLSDTrainer
from trl_rlsd.resumable import ResumableTrainer


# name -> what is expected of it
PRIVATE = {
    "_tag_names": "list of model-card tags, class attribute",
    "_name": "the method's name in the model card, class attribute",
    "_paper": "title, id and citation in the model card, class attribute",
    "_generate": "(prompts): called once a batch with the prompts that the student reads, before anything is sampled",
    "_generate_and_score_completions": "(inputs: list of rows) -> dict of tensors with B rows, plus 0-dim ones",
    "_calculate_rewards": "(inputs, prompts, completions, ids) -> rewards of all processes (N, functions), in order",
    "_compute_loss": "(model, inputs): reads inputs['advantages'], (B,) or (B, T), after the student's forward",
    "_get_per_token_logps_and_entropies": "(model, ids, mask, logits_to_keep) -> (log-probs (B, T), ...)",
    "_tokenize_prompts": "(prompts) -> (token ids per prompt, ...), template, tools and kwargs applied",
    "_set_signature_columns_if_needed": "sets _signature_columns",
    "_signature_columns": "columns that remove_unused_columns keeps",
    "_save_optimizer_and_scheduler": "(output_dir): called for every checkpoint that is not save_only_model",
    "_load_optimizer_and_scheduler": "(checkpoint): called on resume, after the weights, before on_train_begin",
    "_step": "micro-batches done; 0 after a resume",
    "_buffered_inputs": "the batches of the last generation, list of dicts of tensors and lists; None after a resume",
    "_save_checkpoint": "(model, trial): writes a checkpoint, then deletes older ones",
    "_save_rng_state": "(output_dir): the last that every process writes, before older checkpoints are deleted",
    "_load_from_checkpoint": "(resume_from_checkpoint, model): loads the weights by name",
    "_load_best_model": "(): loads the weights of state.best_model_checkpoint by name",
    "_init_training_state": "(max_steps, steps per epoch, epochs, ...) -> (epochs, batches) that are done",
    "_get_train_sampler": "(...) -> what draws the order of the rows, an epoch's with each iteration",
    "_push_from_checkpoint": "(checkpoint_folder): called after a save where push_to_hub is on",
    "_finish_current_push": "(): waits for push_in_progress",
    "_get_output_dir": "(trial) -> the folder that checkpoints are written to",
    "_batch_environments": "the name of each row's environment; `_tokenize_prompts` pairs prompts with them",
    "_env_tools": "{environment name: tools}: every public method of an environment but reset and get_reward",
    "_sync_tool_dicts": "for each row of the batch the tools that may be called, by name",
    "_async_tool_dicts": "the same, of async ones",
    "_environment_pool": "{name: instances}, one of each kind after construction",
    "_tokenizer": "the tokenizer, also where processing_class is a processor",
    "_is_vlm": "whether processing_class is a processor",
    "_attn_implementation": "of a model's config",
}
# what is imported from inside the libraries
SUBMODULES = [
    "accelerate.commands.launch.launch_command",
    "accelerate.commands.launch.launch_command_parser",
    "accelerate.logging.get_logger",
    "accelerate.utils.DistributedType",
    "accelerate.utils.gather_object",
    "accelerate.utils.is_peft_model",
    "transformers.cache_utils.Cache",
    "transformers.cache_utils.DynamicLayer",
    "transformers.cache_utils.DynamicSlidingWindowLayer",
    "transformers.trainer.SCHEDULER_NAME",
    "transformers.trainer.TRAINER_STATE_NAME",
    "transformers.trainer_callback.PrinterCallback",
    "transformers.trainer_callback.ProgressCallback",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR",
    "transformers.trainer_utils.HubStrategy",
    "transformers.utils.ModelOutput",
    "transformers.utils.PushInProgress",
    "trl.cli.accelerate_config.resolve_accelerate_config_argument",
    "trl.data_utils.is_conversational",
    "trl.kernels.ChunkedLogProbFunction",
    "trl.models.utils.prepare_deepspeed",
    "trl.models.utils.prepare_fsdp",
    "trl.trainer.utils.add_fused_lm_head",
    "trl.trainer.utils.create_model_from_path",
    "trl.trainer.utils.get_config_model_id",
    "trl.trainer.utils.maybe_gather_lm_head_ctx",
]
METHODS = [name for name in PRIVATE if callable(getattr(GRPOTrainer, name, None))]


def parameters(name):
    return list(inspect.signature(getattr(GRPOTrainer, name)).parameters)


def test_the_methods_have_the_signatures_that_are_extended():
    assert parameters("_generate") == ["self", "prompts"]
    assert parameters("_generate_and_score_completions") == ["self", "inputs"]
    assert parameters("_compute_loss") == ["self", "model", "inputs"]
    assert parameters("_tokenize_prompts") == ["self", "prompts"]
    assert parameters("_set_signature_columns_if_needed") == ["self"]
    assert parameters("_save_optimizer_and_scheduler") == ["self", "output_dir"]
    assert parameters("_load_optimizer_and_scheduler") == ["self", "checkpoint"]
    assert parameters("_save_checkpoint") == ["self", "model", "trial"]
    assert parameters("_push_from_checkpoint") == ["self", "checkpoint_folder"]
    assert parameters("_save_rng_state") == ["self", "output_dir"]
    names = parameters("_get_per_token_logps_and_entropies")
    assert names[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]


def test_the_constructor_starts_with_the_arguments_that_are_named():
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert names[:5] == ["self", "model", "reward_funcs", "args", "train_dataset"]
    assert "teacher_model" not in names


def test_no_name_of_ours_shadows_one_of_trls():
    extended = {"__init__", "train", "log", *METHODS}
    ours = {name for kind in (RLSDTrainer, ResumableTrainer) for name, value in vars(kind).items() if callable(value)}
    ours -= extended
    assert not {name for name in ours if hasattr(GRPOTrainer, name)}
    attributes = vars(trainer_attributes())
    own = {
        "_privileged",
        "_loss_inputs",
        "_fused",
        "_teacher_pass",
        "_prompt_check",
        "_credit",
        "_collator",
        "_credit_metrics",
    }
    assert (own | {"_teacher_is_used", "teacher"}).isdisjoint(attributes)


def trainer_attributes():
    from trl import GRPOConfig

    args = GRPOConfig("unused", use_cpu=True, bf16=False, report_to=[])
    return GRPOTrainer(tiny_llama(), lambda **k: [], args, dataset(), processing_class=byte_tokenizer())


@pytest.mark.parametrize("peft", [False, True])
def test_the_loss_reads_the_advantages_after_the_students_forward(tmp_path, peft, monkeypatch):
    built = trainer(tmp_path, peft_config=lora() if peft else None, credit="grpo", max_steps=1)
    order = []

    class Watched(dict):
        def __getitem__(self, key):
            if key == "advantages":
                order.append("advantages")
            return super().__getitem__(key)

    loss, forward = GRPOTrainer._compute_loss, built._get_per_token_logps_and_entropies
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: loss(self, model, Watched(inputs)))

    def watched_forward(*args, **kwargs):
        order.append("forward")
        return forward(*args, **kwargs)

    built._get_per_token_logps_and_entropies = watched_forward
    built.train()
    assert order[0] == "forward"
    assert order.count("forward") == 1
    assert "advantages" in order[1:]


def test_token_advantages_of_one_value_per_row_are_sequence_advantages(tmp_path):
    built = trainer(tmp_path, credit="grpo")
    built.current_gradient_accumulation_steps = 1
    ids = torch.arange(20, 28).repeat(4, 1)
    batch = {
        "prompt_ids": torch.full((4, 3), 5), "prompt_mask": torch.ones(4, 3, dtype=torch.long),
        "completion_ids": ids, "completion_mask": torch.ones_like(ids), "num_items_in_batch": torch.tensor(32.0),
    }  # fmt: skip
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0])
    losses = [
        built._compute_loss(built.model, {**batch, "advantages": a})
        for a in (advantages, advantages.unsqueeze(1).expand(4, 8))
    ]
    assert torch.equal(*losses)


def test_extra_tensors_of_b_rows_travel_with_their_rows(tmp_path):
    """A tensor added to the scored batch is shuffled and split with the completions."""
    built = trainer(tmp_path, credit="grpo", gradient_accumulation_steps=4, max_steps=1)
    score, loss, seen = built._generate_and_score_completions, built._compute_loss, []

    def add(inputs):
        batch = score(inputs)
        batch["tagged"] = batch["completion_ids"].sum(dim=1)
        return batch

    def check(model, inputs):
        seen.append(torch.equal(inputs["tagged"], inputs["completion_ids"].sum(dim=1)))
        return loss(model, inputs)

    built._generate_and_score_completions, built._compute_loss = add, check
    built.train()
    assert seen == [True] * 4


def test_prompts_reach_generate_before_anything_is_sampled(tmp_path):
    built = trainer(tmp_path, credit="grpo", max_steps=1)
    order = []
    for name in ("_generate", "_generate_single_turn", "_calculate_rewards"):
        original = getattr(built, name)

        def watched(*args, name=name, original=original, **kwargs):
            order.append(name)
            return original(*args, **kwargs)

        setattr(built, name, watched)
    built.train()
    assert order == ["_generate", "_generate_single_turn", "_calculate_rewards"]


def test_training_state_is_loaded_after_the_weights_and_before_training_begins(tmp_path):
    options = dict(credit="grpo", save_strategy="steps", save_steps=1, max_steps=2)
    trainer(tmp_path, **options).train()
    from transformers import TrainerCallback

    order = []

    class Begin(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            order.append("on_train_begin")

        def on_step_end(self, *args, **kwargs):
            order.append("on_step_end")

    built = trainer(tmp_path, callbacks=[Begin()], **options)
    for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save_optimizer_and_scheduler"):
        original = getattr(built, name)

        def watched(*args, name=name, original=original, **kwargs):
            order.append(name)
            return original(*args, **kwargs)

        setattr(built, name, watched)
    built.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert order == [
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "on_train_begin",
        "on_step_end",
        "_save_optimizer_and_scheduler",
    ]


def test_the_trainer_runs_without_our_init():
    """TRL's own tests build trainers with object.__new__ and call methods that pass through `_generate`."""
    bare = object.__new__(RLSDTrainer)
    assert bare._privileged is None
    assert bare._loss_inputs is None
    assert inspect.getattr_static(Trainer, "_save_optimizer_and_scheduler")


def test_private_attributes_are_there(tmp_path):
    built = trainer(tmp_path, args=config(tmp_path, credit="grpo"))
    built._set_signature_columns_if_needed()
    elsewhere = {
        "_attn_implementation",
        "_batch_environments",
        "_environment_pool",
        "_env_tools",
        "_sync_tool_dicts",
        "_async_tool_dicts",
    }
    missing = [name for name in PRIVATE if name not in elsewhere and not hasattr(built, name)]
    assert missing == []
    assert built._signature_columns == ["prompt", "image", "images", "privileged_context"]
    assert isinstance(built.model.config._attn_implementation, str)
    assert built._step == 0
