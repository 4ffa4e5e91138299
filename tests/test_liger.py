"""use_liger_loss in the trainer: the same update and the same metrics as the default path, and what is refused."""

import math

import pytest
import torch
from conftest import byte_tokenizer, config, dataset, lora, tiny_llama, trainer, weights
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_rlsd.losses import LOSS_TYPES


pytest.importorskip("liger_kernel")


def varied(completions, **kwargs):
    return [float(i % 4) for i in range(len(completions))]


def train(tmp_path, liger, model=None, **options):
    """Weights after two steps of plain gradient descent, the updates of which can be compared, and the log."""
    defaults = dict(optim="sgd", learning_rate=0.3, reward=varied, max_grad_norm=0.0, use_liger_loss=liger)
    built = trainer(tmp_path, model=model() if model else None, **{**defaults, **options})
    before = weights(built.model)
    built.train()
    after = weights(built.model)
    return before, after, [log for log in built.state.log_history if "grad_norm" in log]


def assert_the_same_update(tmp_path, tolerance=1e-5, **options):
    peft = options.pop("peft", False)
    before, default, default_log = train(tmp_path, False, **(dict(peft_config=lora()) if peft else {}), **options)
    _, liger, liger_log = train(tmp_path, True, **(dict(peft_config=lora()) if peft else {}), **options)
    size = max((default[name] - before[name]).abs().max().item() for name in before)
    assert size > 1e-3, "nothing was learned, so nothing is compared"
    error = max((default[name] - liger[name]).abs().max().item() for name in before)
    assert error <= tolerance * size, (error, size)
    assert len(default_log) == len(liger_log) == 2
    for first, second in zip(default_log, liger_log, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if first[name] is None:
                assert second[name] is None
            elif "seconds" not in name and "time" not in name:
                assert second[name] == pytest.approx(first[name], rel=max(tolerance, 1e-4) * 10, abs=1e-4), name


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_update_is_the_default_paths(tmp_path, loss_type, peft):
    assert_the_same_update(tmp_path, loss_type=loss_type, peft=peft)


def with_a_tool(prompts, trainer):
    """The middle of every completion is a tool's: read, but neither sampled nor trained."""
    ids = torch.randint(3, 250, (len(prompts), 8), generator=torch.Generator().manual_seed(3)).tolist()
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": ids,
        "logprobs": [[0.0] * 8] * len(prompts),
        "env_mask": [[1, 1, 1, 0, 0, 1, 1, 1]] * len(prompts),
    }


def tied_llama():
    return tiny_llama(tie_word_embeddings=True)


@pytest.mark.parametrize("credit", ["grpo", "opsd", "grpo_opsd"])
def test_with_every_credit_function(tmp_path, credit):
    assert_the_same_update(tmp_path, credit=credit, peft=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=2),
        dict(gradient_accumulation_steps=2, steps_per_generation=4),
        dict(num_iterations=2),
        dict(gradient_checkpointing=True, peft=True),
        dict(beta=0.1, peft=True),
        dict(beta=0.1, peft=True, use_bias_correction_kl=False),
        dict(delta=1.1, num_iterations=2, learning_rate=1.0),
        dict(temperature=0.6),
        dict(rlsd_lambda=0.0),
        dict(rlsd_lambda_warmup_steps=1),
        dict(importance_sampling_level="sequence", loss_type="cispo"),
        dict(mask_truncated_completions=True, max_completion_length=24),
        dict(per_device_train_batch_size=8),
        dict(cast_lm_head_to_fp32=True),
        dict(model=tied_llama),
        dict(rollout_func=with_a_tool, num_iterations=2),
    ],
    ids=lambda options: " ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()),
)
def test_with_what_grpo_trainer_does(tmp_path, options):
    assert_the_same_update(tmp_path, **options)


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_under_bf16_autocast(tmp_path, peft):
    """The two heads round at different places; neither may be further from the float32 update than the other."""

    def update(liger, bf16):
        peft_config = lora() if peft else None
        before, after, _ = train(tmp_path, liger, bf16=bf16, max_steps=1, peft_config=peft_config)
        return torch.cat([(after[name] - before[name]).flatten() for name in before])

    exact, default, liger = update(False, False), update(False, True), update(True, True)
    errors = [((rounded - exact).norm() / exact.norm()).item() for rounded in (default, liger)]
    assert errors[0] > 0
    assert errors[1] < 1.2 * errors[0], errors


def test_evaluation_runs_through_the_default_path(tmp_path):
    built = trainer(
        tmp_path, use_liger_loss=True, eval_dataset=dataset(4), eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    built.train()
    assert all(math.isfinite(log["eval_loss"]) for log in built.state.log_history if "eval_loss" in log)


def test_the_model_generates_and_saves_as_before(tmp_path):
    built = trainer(tmp_path, use_liger_loss=True, peft_config=lora(), max_steps=1)
    built.train()
    built.save_model(str(tmp_path / "saved"))
    ids = byte_tokenizer()("3 + 3 = ?", return_tensors="pt").input_ids
    assert built.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


# ---------------------------------------------------------------------- refused


def test_it_needs_liger_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_rlsd.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"use_liger_loss=True needs liger-kernel.*pip install"):
        config(tmp_path, use_liger_loss=True)
    config(tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True},
        {"off_policy_mask_threshold": 1.0},
        {"fp16": True},
    ],
    ids=str,
)
def test_what_the_fused_loss_cannot_do_is_refused(tmp_path, option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"use_liger_loss=True does not support {name}=.*use_liger_loss=False"):
        config(tmp_path, use_liger_loss=True, **option)
    config(tmp_path, **option)


def test_a_head_that_is_trained_beside_the_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs a plain linear LM head.*modules_to_save.*use_liger_loss=False"):
        trainer(tmp_path, use_liger_loss=True, peft_config=lora(modules_to_save=["lm_head"]))


def test_a_head_with_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        trainer(tmp_path, use_liger_loss=True, peft_config=lora(target_modules=["q_proj", "lm_head"]))


SMALL = dict(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def test_soft_capped_logits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        trainer(tmp_path, use_liger_loss=True, model=Gemma2ForCausalLM(Gemma2Config(**SMALL)))


def test_the_routers_loss_is_refused(tmp_path):
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=True)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **sizes))
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        trainer(tmp_path, use_liger_loss=True, model=model, router_aux_loss_coef=0.01)


@pytest.mark.parametrize("liger", [True, False], ids=["liger", "default"])
def test_nan_from_the_head_is_raised_with_step_and_row(tmp_path, liger):
    built = trainer(tmp_path, use_liger_loss=liger, reward=varied, max_steps=2)
    original = built.model.model.forward
    calls = []

    def broken(*args, **kwargs):
        outputs = original(*args, **kwargs)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                outputs.last_hidden_state[2, -3] = math.nan
        return outputs

    built.model.model.forward = broken
    with pytest.raises(ValueError, match="Step 1: the LM head gives a log-prob of nan at row 2 of the micro-batch"):
        built.train()
    assert built.state.global_step == 1
