"""The teacher pass: what is packed together, what is encoded once, and that neither can be seen in the result."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import config, lora, tiny_llama, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from trl.trainer.utils import add_fused_lm_head

from trl_rlsd.teacher import scoring
from trl_rlsd.teacher_pass import TeacherPass, plan, resolve_sharing, why_not_shared


V, PAD = 64, 0
SMALL = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
SHARING = {
    "every head its own": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "grouped queries": LlamaConfig(**SMALL),
    "one key-value head": Qwen2Config(**{**SMALL, "num_key_value_heads": 1}),
    "normed queries": Qwen3Config(**SMALL),
    "experts": Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
    ),
    "sliding window": MistralConfig(**SMALL, sliding_window=6),
    "sliding window longer than a prompt": MistralConfig(**SMALL, sliding_window=40),
    "sliding and full, soft-capped": Gemma2Config(**SMALL, sliding_window=5, query_pre_attn_scalar=8),
    "sliding and full": Gemma3TextConfig(
        **SMALL, sliding_window=7, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "sinks": GptOssConfig(
        **{**SMALL, "intermediate_size": 16}, num_local_experts=4, num_experts_per_tok=2, sliding_window=5
    ),
    "latent keys and values": DeepseekV3Config(
        **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=2,
    ),
    "linear biases": FalconConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, initializer_range=0.3
    ),
    "learned positions": GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, eos_token_id=2
    ),
}


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).float()
    add_fused_lm_head(model, temperature=0.9)
    return model


def token_logps(model, ids, mask, tokens):
    """What TRL's method does with a text model."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-tokens] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -tokens:]


def draw(prompts=((20, 4), (13, 3), (27, 1), (2, 2), (1, 2)), longest=9, seed=0):
    """Groups of rows with one prompt each, (length, rows), in mixed order, with completions of many lengths."""
    g = torch.Generator().manual_seed(seed)
    prompt_ids = []
    for length, rows in prompts:
        ids = torch.randint(3, V, (length,), generator=g).tolist()
        prompt_ids += [ids] * rows
    prompt_ids = [prompt_ids[i] for i in torch.randperm(len(prompt_ids), generator=g)]
    lengths = torch.randint(1, longest + 1, (len(prompt_ids),), generator=g)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    ids = torch.randint(3, V, mask.shape, generator=g).masked_fill(mask == 0, PAD)
    return prompt_ids, ids, mask


def score(model, batch, rows=None, share=False, budget=10_000, seen=None):
    prompt_ids, ids, mask = batch

    def watched(model, *args):
        if seen is not None:
            seen.append(tuple(args[0].shape))
        return token_logps(model, *args)

    teacher_pass = TeacherPass(watched, nullcontext, PAD, budget=budget, share=share)
    with scoring(model):
        return teacher_pass(model, prompt_ids, ids, mask, range(len(ids)) if rows is None else rows)


def alone(model, batch):
    """Every row by itself, without padding of any kind: what all the ways to score it must give."""
    prompt_ids, ids, mask = batch
    logps = torch.zeros(ids.shape)
    with scoring(model):
        for row, prompt in enumerate(prompt_ids):
            n = int(mask[row].sum())
            whole = torch.cat([torch.tensor(prompt), ids[row, :n]]).unsqueeze(0)
            logps[row, :n] = token_logps(model, whole, torch.ones_like(whole), n)
    return logps


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_a_shared_prompt_gives_what_scoring_rows_alone_gives(name, attention):
    if attention == "sdpa" and name in ("sliding and full, soft-capped", "sinks"):
        pytest.skip("eager is all that it has on a CPU")
    options = copy.deepcopy(SHARING[name])
    options._attn_implementation = attention
    model, batch = build(options), draw()
    if name == "learned positions":  # rows that share nothing are padded, which shifts such positions (a warning)
        batch = draw(prompts=((20, 4), (13, 3), (2, 2)))
    assert why_not_shared(model) is None
    expected = alone(model, batch)
    assert expected.std() > 0.3, "log-probs that hardly differ would prove nothing"
    shared = score(model, batch, share=True)
    assert (shared - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", [name for name in SHARING if name != "learned positions"])
def test_packed_rows_give_what_scoring_them_alone_gives(name):
    model, batch = build(SHARING[name]), draw()
    assert (score(model, batch) - alone(model, batch)).abs().max() < 1e-4


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 30, 64, 200, 100_000])
def test_the_budget_cannot_be_seen_in_the_result(budget, share):
    model, batch = build(SHARING["sliding window"]), draw()
    assert (score(model, batch, share=share, budget=budget) - alone(model, batch)).abs().max() < 1e-4


@pytest.mark.parametrize("share", [True, False])
def test_the_order_of_the_rows_cannot_be_seen_in_the_result(share):
    model, (prompt_ids, ids, mask) = build(SHARING["grouped queries"]), draw()
    expected = score(model, (prompt_ids, ids, mask), share=share, budget=80)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    moved = score(model, ([prompt_ids[i] for i in order], ids[order], mask[order]), share=share, budget=80)
    assert (moved - expected[order]).abs().max() < 1e-5


def test_rows_that_are_not_scored_are_zero_and_cost_nothing():
    model, batch = build(SHARING["grouped queries"]), draw()
    seen = []
    logps = score(model, batch, rows=[1, 4], share=False, seen=seen)
    others = [row for row in range(len(logps)) if row not in (1, 4)]
    assert torch.equal(logps[others], torch.zeros_like(logps[others]))
    assert sum(rows for rows, _ in seen) == 2
    assert (logps[[1, 4]] - alone(model, batch)[[1, 4]]).abs().max() < 1e-4


def test_a_prompt_is_encoded_once_for_its_group():
    model, batch = build(SHARING["grouped queries"]), draw(prompts=((50, 8),), longest=4)
    tokens = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score(model, batch, share=False)
    whole, tokens[:] = sum(tokens), []
    score(model, batch, share=True)
    assert whole == 8 * 54
    assert sum(tokens) == 49 + 8 * 5


def test_the_prefix_is_not_extended_by_a_forward_that_reads_it():
    """A group in several forwards: each continues from the prompt, not from the completions before."""
    model, batch = build(SHARING["grouped queries"]), draw(prompts=((50, 8),), longest=4)
    seen = []
    split = score(model, batch, share=True, budget=2 * 54, seen=seen)
    assert [rows for rows, _ in seen] == [2, 2, 2, 2]
    assert (split - alone(model, batch)).abs().max() < 1e-4


# ---------------------------------------------------------------------- what is shared, and what cannot be


def test_sharing_is_chosen_where_it_saves_tokens():
    long, short = [3] * 500, [4] * 3

    def shared(prompts, lengths, **options):
        batches = plan(prompts, lengths, range(len(prompts)), budget=10_000, share=None, **options)
        return [batch.shared for batch in batches]

    assert shared([long] * 8, [20] * 8) == [True]
    assert shared([long, long[:-1]], [20] * 2) == [False]  # nothing in common
    assert shared([short] * 2, [20] * 2, overhead=100) == [False]  # 2 tokens saved for a forward more
    assert shared([long] * 2, [20] * 2, overhead=1000) == [False]
    assert shared([long] * 8, [20] * 8, overhead=1000) == [True]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            Mamba2Config(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8),
            "no ",
        ),
        (
            JambaConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, num_experts=2, use_mamba_kernels=False),
            "cache has layers of another kind",
        ),
        (
            Qwen3NextConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
            "cache has layers of another kind",
        ),
        (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "cache has layers of another kind"),
        (
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            "depend on the text's length",
        ),
    ],
    ids=["mamba2", "jamba", "qwen3-next", "lfm2", "dynamic rope"],
)
def test_architectures_that_keep_another_state_fall_back_and_say_so(config, reason, caplog):
    model = AutoModelForCausalLM.from_config(config)
    assert reason in why_not_shared(model)
    assert resolve_sharing(None, model, sharded=False) is False
    assert caplog.text.count("scores every completion after the whole prompt") == 1
    assert resolve_sharing(False, model, sharded=False) is False
    assert caplog.text.count("scores every completion after the whole prompt") == 1


def test_sharded_weights_fall_back(caplog):
    assert resolve_sharing(True, build(SHARING["grouped queries"]), sharded=True) is False
    assert "every process must make the same forwards" in caplog.text
    assert resolve_sharing(None, build(SHARING["grouped queries"]), sharded=False) is None


def test_prompt_tuning_falls_back_and_trains(tmp_path, caplog):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    built = trainer(tmp_path, peft_config=peft_config, teacher_shared_prefix=True, max_steps=1)
    assert "puts tokens of its own before the prompt" in caplog.text
    built.train()


def test_processes_with_fewer_micro_batches_make_idle_forwards():
    """Of sharded weights every forward is a collective call."""
    model, batch = build(SHARING["grouped queries"]), draw()
    seen = []

    def watched(model, *args):
        seen.append(args[0].shape)
        return token_logps(model, *args)

    teacher_pass = TeacherPass(watched, nullcontext, PAD, budget=60, share=True, equalize=lambda own: own + 3)
    with scoring(model):
        logps = teacher_pass(model, *batch, range(len(batch[1])))
        own = len(teacher_pass.plan(batch[0], batch[2].sum(1).tolist(), range(len(batch[1])), torch.device("cpu")))
        assert len(seen) == own + 3
        assert (logps - alone(model, batch)).abs().max() < 1e-4
        seen.clear()
        teacher_pass(model, *batch, [])  # a process without any row to score
    assert len(seen) == 3


# ---------------------------------------------------------------------- plans


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=1, max_size=20),
    st.integers(1, 300),
    st.sampled_from([True, False, None]),
    st.integers(0, 50),
)
def test_every_row_is_planned_once_and_within_the_budget(rows, budget, share, overhead):
    prompts = {n: [n] * (1 + 7 * n) for n in range(6)}
    prompt_ids = [prompts[n] for n, _ in rows]
    lengths = [length for _, length in rows]
    batches = plan(prompt_ids, lengths, range(len(rows)), budget=budget, share=share, overhead=overhead)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        if len(batch.groups) > 1:
            width = max(len(prompt_ids[row]) for row in batch.rows)
            longest = max(lengths[row] for row in batch.rows)
            assert len(batch.rows) * (width + longest) <= budget
        for group in batch.groups:
            assert len({tuple(prompt_ids[row]) for row in group}) == 1
        assert not (batch.shared and share is False)


# ---------------------------------------------------------------------- in the trainer


def captured(built):
    batches = []
    original = built._score_with_teacher

    def spy(batch, *rest):
        original(batch, *rest)
        batches.append({k: v.clone() for k, v in batch.items() if k.startswith("teacher_")})

    built._score_with_teacher = spy
    built.train()
    return batches


@pytest.mark.parametrize("kind", ["synced", "live", "ema", "base", "external"])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_every_teacher_shares_its_prompts(tmp_path, kind, peft):
    def options():
        extra = {"teacher_model": tiny_llama(seed=5)} if kind == "external" else {}
        return dict(
            teacher_model_kind=kind, peft_config=lora() if peft else None, gradient_accumulation_steps=2, **extra
        )

    whole = captured(trainer(tmp_path, teacher_shared_prefix=False, **options()))
    shared = captured(trainer(tmp_path, teacher_shared_prefix=True, **options()))
    assert len(whole) == len(shared) == 2
    for first, second in zip(whole, shared, strict=True):
        assert first["teacher_scored"].any()
        assert torch.equal(first["teacher_scored"], second["teacher_scored"])
        assert (first["teacher_logps"] - second["teacher_logps"]).abs().max() < 1e-4


def test_scoring_with_a_shared_prompt_works_with_gradient_checkpointing_and_bf16_autocast(tmp_path):
    """Rounding differs; neither way may be further from the float32 scores than the other."""

    def scores(share, bf16):
        options = dict(gradient_checkpointing=True, bf16=bf16, max_steps=1, peft_config=lora())
        return captured(trainer(tmp_path, teacher_shared_prefix=share, **options))[0]["teacher_logps"]

    exact, whole, shared = scores(False, False), scores(False, True), scores(True, True)
    errors = [(rounded - exact).norm().item() for rounded in (whole, shared)]
    assert errors[0] > 0
    assert errors[1] < 1.2 * errors[0], errors


def test_bad_budgets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_token_budget=0 is out of range"):
        config(tmp_path, teacher_token_budget=0)
    with pytest.raises(TypeError, match=r"teacher_token_budget=1\.5"):
        config(tmp_path, teacher_token_budget=1.5)
    with pytest.raises(TypeError, match="teacher_shared_prefix='always'"):
        config(tmp_path, teacher_shared_prefix="always")
