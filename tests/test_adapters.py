"""PEFT methods: which of them the teachers score exactly, and which are refused by name."""

import pytest
import torch
from conftest import assert_same, differs, lora, tiny_llama, trainer, weights
from peft import (
    AdaptionPromptConfig,
    BOFTConfig,
    CPTConfig,
    IA3Config,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_rlsd.teacher import scoring


IDS = torch.arange(2, 30).unsqueeze(0)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # stacked: one parameter for all experts of a layer
SMALL = dict(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0,
    eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def tied():
    return tiny_llama(tie_word_embeddings=True)


def biased():
    return tiny_llama(attention_bias=True)


def qwen3_moe():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32, head_dim=8))


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, sliding_window=None))


def peft(config, **options):
    return config(**{"task_type": "CAUSAL_LM", **options})


# name -> the base model, the adapter's config
SUPPORTED = {
    "dora": (tiny_llama, lora(use_dora=True)),
    "rslora": (tiny_llama, lora(use_rslora=True)),
    "several_targets": (tiny_llama, lora(target_modules=["q_proj", "v_proj", "down_proj"])),
    "embeddings": (tiny_llama, lora(target_modules=["q_proj", "embed_tokens"])),
    "modules_to_save": (tiny_llama, lora(modules_to_save=["lm_head", "embed_tokens"])),
    "modules_to_save_tied": (tied, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tokens": (tiny_llama, lora(trainable_token_indices=[5, 6, 7, 20])),
    "target_parameters": (tiny_llama, lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"])),
    "bias": (biased, lora(bias="lora_only")),
    "pissa": (tiny_llama, lora(init_lora_weights="pissa")),
    "ia3": (tiny_llama, peft(IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "vera": (tiny_llama, peft(VeraConfig, r=4, target_modules=["q_proj"])),
    "boft": (tiny_llama, peft(BOFTConfig, boft_block_size=4, target_modules=["q_proj"])),
    "prompt_tuning": (tiny_llama, peft(PromptTuningConfig, num_virtual_tokens=3)),
    "prefix_tuning": (tiny_llama, peft(PrefixTuningConfig, num_virtual_tokens=3)),
    "qwen3_moe_experts": (qwen3_moe, lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "mixtral_experts": (mixtral, lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
}
WITHOUT_BASE = ("bias", "pissa")
RARE = ("embeddings", "target_parameters", "pissa", "ia3", "vera", "boft", "prefix_tuning", "mixtral_experts")


def each(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in names]
    )


def build(folder, name, kind, **options):
    model, config = SUPPORTED[name]
    return trainer(folder, model=model(), peft_config=config, teacher_model_kind=kind, **options)


def fused(model):
    """Log-probs (1, T) as trainer and teacher take them."""
    with scoring(model):
        return model(IDS, labels=IDS, fused_lm_head=True).log_probs[:, -IDS.size(1) + 1 :]


def plain(model):
    """From the definition; prompt tuning puts tokens before the text, so the last ones count."""
    with scoring(model):
        logits = model(IDS).logits[:, -IDS.size(1) : -1]
    return logits.log_softmax(-1).gather(2, IDS[:, 1:].unsqueeze(2)).squeeze(2)


def state_of(model):
    return (
        model.active_adapters if hasattr(model, "active_adapters") else None,
        [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
    )


@each(SUPPORTED)
def test_teachers_of_an_adapter_score_exactly_and_resume_exactly(tmp_path, name):
    straight = build(tmp_path, name, "synced", save_strategy="steps", save_steps=1)
    start, first = weights(straight.model), plain(straight.model)
    straight.train()
    model, student = straight.model, plain(straight.model)
    assert not torch.allclose(student, first, atol=1e-3), "nothing was trained"
    before, copy = state_of(model), {name: value.clone() for name, value in straight.teacher.copy.items()}
    assert_same(copy, start)
    with straight.teacher.weights(model):
        assert_same(weights(model), copy)
        torch.testing.assert_close(fused(model), plain(model), rtol=0, atol=1e-4)
        assert not torch.equal(fused(model), student)
    assert state_of(model) == before
    torch.testing.assert_close(fused(model), student, rtol=0, atol=1e-4)  # the student is back, and its gain zero

    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert not any((tmp_path / "checkpoint-1" / part).is_dir() for part in ("teacher", "default"))
    if name != "boft":  # whose saved form is not that of its parameters
        assert sum(value.numel() for value in saved.values()) >= sum(value.numel() for value in start.values())
    resumed = build(tmp_path / "resumed", name, "synced")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(model), weights(resumed.model))
    assert_same(straight.teacher.copy, resumed.teacher.copy)


@each([name for name in SUPPORTED if name not in WITHOUT_BASE])
def test_the_base_teacher_is_the_model_under_the_adapter(tmp_path, name):
    untouched = plain(SUPPORTED[name][0]())
    built = build(tmp_path, name, "base", max_steps=1)
    built.train()
    before = state_of(built.model)
    with built.teacher.weights(built.model) as model:
        torch.testing.assert_close(fused(model), untouched, rtol=0, atol=1e-4)
    assert state_of(built.model) == before
    assert not torch.allclose(fused(built.model), untouched, atol=1e-3)


@pytest.mark.parametrize("name", WITHOUT_BASE)
def test_a_base_that_the_adapter_has_moved_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="teacher_model_kind='base' disables the adapter, but"):
        build(tmp_path, name, "base")


@pytest.mark.parametrize(
    "model, peft_config, message",
    [
        (tiny_llama, peft(AdaptionPromptConfig, adapter_len=3, adapter_layers=1), "ADAPTION_PROMPT"),
        (tiny_llama, peft(CPTConfig, cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]), "CPT"),
        (tiny_llama, peft(MultitaskPromptTuningConfig, num_virtual_tokens=3, num_tasks=2), "MULTITASK_PROMPT_TUNING"),
        (tiny_llama, peft(PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8), "P_TUNING.*not save"),
        (tiny_llama, peft(PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True), "prefix_projection"),
        (tied, lora(trainable_token_indices=[5, 6]), "trainable_token_indices reaches the LM head"),
        (tiny_llama, lora(trainable_token_indices={"lm_head": [5, 6]}), "trainable_token_indices reaches the LM head"),
        # these two by TRL itself
        (tiny_llama, lora(target_modules=["q_proj", "lm_head"]), "adapter to `lm_head` is not supported"),
        (
            tied,
            peft(TrainableTokensConfig, token_indices=[5], target_modules=["embed_tokens"]),
            "adapter to `lm_head` is not supported",
        ),
    ],
    ids=["adaption", "cpt", "multitask", "p_tuning", "projection", "tokens_tied", "tokens_head", "lora_head", "alone"],
)
def test_adapters_that_would_be_scored_or_resumed_wrongly_are_refused_by_name(tmp_path, model, peft_config, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model(), peft_config=peft_config)


def test_other_adapters_of_a_model_are_left_alone(tmp_path):
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False, target_modules=["q_proj"]))
    others = {name: p.detach().clone() for name, p in model.named_parameters() if ".other." in name}
    built = trainer(tmp_path, model=model, teacher_model_kind="synced", teacher_sync_steps=10)
    start = weights(built.model)
    assert not any(".other." in name for name in start)
    built.train()
    assert_same(others, {name: p.detach() for name, p in built.model.named_parameters() if ".other." in name})
    assert differs(start, weights(built.model))
    assert built.model.active_adapters == ["default"]
    with built.teacher.weights(built.model):
        assert_same(weights(built.model), start)


def test_the_routers_loss_reads_the_students_pass_alone(tmp_path):
    """With plain GRPO credit a run with a teacher's passes learns bit for bit what one without them learns."""
    runs = []
    for skips in (False, True):
        built = trainer(
            tmp_path,
            model=qwen3_moe(),
            peft_config=SUPPORTED["qwen3_moe_experts"][1],
            router_aux_loss_coef=0.1,
        )
        built._credit.is_plain = lambda *_: True  # what a teacher says is thrown away
        built._credit.lambda_is_zero = lambda _, skips=skips: skips
        built.train()
        logs = built.state.log_history[:2]
        assert [log["rlsd/skipped"] for log in logs] == [skips] * 2
        runs.append((weights(built.model), [log["aux_loss"] for log in logs]))
    assert all(loss > 0 for loss in runs[0][1])
    assert runs[0][1] == runs[1][1]
    assert_same(runs[0][0], runs[1][0])
