"""Checkpoints: a resumed run is the uninterrupted one, and the student's files are the student's alone."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import assert_same, dataset, differs, lora, tiny_llama, trainer, weights
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from trl_rlsd.config import TEACHER_KINDS


PEFT = pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
STEPS = 5


def build(folder, kind, peft, **options):
    external = {"teacher_model": tiny_llama(seed=5)} if kind == "external" else {}
    return trainer(
        folder,
        peft_config=lora(lora_dropout=0.1) if peft else None,
        teacher_model_kind=kind,
        teacher_sync_steps=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        **external,
        **options,
    )


@PEFT
@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_resume_after_any_step_equals_the_straight_run_bit_for_bit(tmp_path, kind, peft):
    straight = build(tmp_path, kind, peft)
    straight.train()
    for step in range(1, STEPS):
        resumed = build(tmp_path / "resumed", kind, peft)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(weights(straight.model), weights(resumed.model))
        if kind in ("synced", "ema"):
            assert_same(straight.teacher.copy, resumed.teacher.copy)
            assert straight.teacher.copied_at == resumed.teacher.copied_at


def test_weights_that_are_saved_under_other_names_are_found(tmp_path):
    """transformers 5.23 saves the experts of a mixture one by one, and on resume looks for them stacked."""

    def mixture():
        torch.manual_seed(0)
        tiny = dict(vocab_size=258, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, head_dim=8)
        heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4)
        ids = dict(num_experts_per_tok=2, initializer_range=0.3, pad_token_id=0, eos_token_id=1)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**tiny, **heads, **ids))

    straight = build(tmp_path, "synced", False, model=mixture())
    straight.train()
    resumed = build(tmp_path / "resumed", "synced", False, model=mixture())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(straight.model), weights(resumed.model))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "teacher_offload": True},
        {"num_iterations": 2},
        {"steps_per_generation": 2},
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"num_iterations": 2, "credit": "grpo"},
    ],
    ids=lambda options: "-".join(options),
)
def test_resume_is_exact_also_while_completions_are_left_to_use(tmp_path, options):
    """TRL 1.16 by itself forgets the completions that a checkpoint leaves unused, and generates anew."""
    straight = build(tmp_path, "synced", False, **options)
    straight.train()
    for step in range(1, STEPS):
        resumed = build(tmp_path / "resumed", "synced", False, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(weights(straight.model), weights(resumed.model))


def test_unused_completions_of_another_layout_are_left(tmp_path, caplog):
    build(tmp_path, "synced", False, steps_per_generation=4).train()
    resumed = build(tmp_path, "synced", False, steps_per_generation=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "new ones are generated" in caplog.text
    assert resumed.state.global_step == STEPS


def test_the_teachers_state_is_what_makes_the_difference(tmp_path):
    """Without it the resumed run would differ: the tests above would not pass by chance."""
    straight = build(tmp_path, "synced", False)
    straight.train()
    resumed = build(tmp_path / "resumed", "synced", False)
    resumed.teacher.load = lambda folder: True  # the teacher then starts from the resumed student
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert differs(weights(straight.model), weights(resumed.model))


def test_a_synced_teacher_is_renewed_at_its_steps(tmp_path):
    build(tmp_path, "synced", True).train()
    files = [load_file(tmp_path / f"checkpoint-{step}" / "rlsd_teacher.safetensors") for step in range(1, STEPS + 1)]
    renewed = [differs(a, b) for a, b in pairwise(files)]
    assert renewed == [True, False, True, False]  # between steps 1-2, 2-3, 3-4, 4-5


@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_the_students_files_hold_the_students_adapter_alone(tmp_path, kind):
    built = build(tmp_path, kind, True)
    built.train()
    built.save_model(str(tmp_path / "final"))
    student = weights(built.model)
    for folder in (tmp_path / f"checkpoint-{STEPS}", tmp_path / "final"):
        folders = [path.name for path in folder.iterdir() if path.is_dir()]
        assert folders == [], "an adapter in a folder of its own"
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == len(student)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        loaded = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
        assert list(loaded.peft_config) == ["default"]
        assert_same(weights(loaded), student)
    assert not (tmp_path / "final" / "rlsd_teacher.safetensors").exists()


def test_a_checkpoint_has_the_same_files_as_grpos_and_the_teachers(tmp_path):
    build(tmp_path / "rlsd", "synced", False).train()
    build(tmp_path / "grpo", "synced", False, credit="grpo").train()
    files = [{p.name for p in (tmp_path / run / "checkpoint-1").iterdir()} for run in ("rlsd", "grpo")]
    assert files[0] - files[1] == {"rlsd_teacher.safetensors"}
    assert files[1] <= files[0]


def test_a_checkpoint_of_a_run_without_a_teacher_is_refused(tmp_path):
    build(tmp_path, "synced", False, credit="grpo").train()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no rlsd_teacher.safetensors.*pass the folder as `model`"):
        build(tmp_path, "synced", False).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", ["synced", "base"])
def test_a_checkpoint_of_the_model_alone_can_be_resumed(tmp_path, kind, caplog):
    build(tmp_path, kind, False, save_only_model=True).train()
    resumed = build(tmp_path, kind, False, save_only_model=True)
    start = weights(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "saved without training state" in caplog.text
    if kind == "base":
        assert_same(resumed.teacher.copy, start)


def test_a_grpo_run_can_be_continued_as_a_model(tmp_path):
    """What the message above advises works."""
    build(tmp_path, "synced", False, credit="grpo").train()
    from conftest import byte_tokenizer

    built = trainer(tmp_path, model=str(tmp_path / "checkpoint-2"), processing_class=byte_tokenizer(), max_steps=1)
    built.train()
    assert isinstance(built, GRPOTrainer)
    assert torch.isfinite(torch.tensor(built.state.log_history[0]["loss"]))
    assert dataset()[0]["privileged_context"]
