"""The plain specification against TRL's own loss, and the fused twin against the specification."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import config, tiny_llama, trainer
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from trl_rlsd.credit import get_credit, token_advantages
from trl_rlsd.losses import (
    LOSS_TYPES,
    FusedLoss,
    Surrogate,
    SurrogateBatch,
    add_fused_loss,
    check_finite,
    clipped_surrogate,
    fused_forward,
    logit_scale,
    row_factors,
)


B, T, H, V = 5, 7, 6, 23
LENGTHS = [7, 1, 4, 0, 6]  # ragged, one row of a single token, one without any


def draw(dtype=torch.float64, lengths=LENGTHS, seed=0):
    """Everything that a loss can read, with ratios on both sides of every clip."""
    g = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    return SimpleNamespace(
        mask=mask,
        logps=-normal(rows, width).abs() - 0.1,
        drift=normal(rows, width, scale=0.4),
        ref_drift=normal(rows, width, scale=0.3),
        teacher_logps=-normal(rows, width).abs() - 0.1,
        advantages=torch.tensor([1.3, -0.7, 0.0, 0.4, -1.1][:rows], dtype=dtype),
        sampling_ratio=normal(rows, width, scale=0.2).exp(),
        hidden=normal(rows, width, H),
        weight=normal(V, H, scale=0.5),
        bias=normal(V, scale=0.3),
        ids=torch.randint(V, (rows, width), generator=g),
    )


def credited(name, x, logps, rows=None, lam=0.7):
    rows = torch.arange(len(x.mask)) if rows is None else rows
    return token_advantages(
        get_credit(name),
        x.advantages[rows],
        logps,
        x.teacher_logps[rows],
        x.mask[rows],
        lam=lam,
        clip_range=0.2,
        negative_only=False,
    )


# ---------------------------------------------------------------------- the specification is TRL's loss


@pytest.mark.parametrize("extra", ["plain", "off_policy", "all"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_specification_is_trls_loss(tmp_path, loss_type, level, extra):
    """Value and gradient of the log-probs, for (B, T) advantages, against TRL's own body."""
    x = draw(torch.float32, lengths=[7, 1, 4, 2, 6])
    built = trainer(
        tmp_path,
        credit="grpo",
        loss_type=loss_type,
        importance_sampling_level=level,
        delta=1.5 if extra == "all" and loss_type != "cispo" else None,
        epsilon_high=0.28,
        gradient_accumulation_steps=2,
        max_completion_length=T,
    )
    built.current_gradient_accumulation_steps = 2
    advantages = credited("rlsd", x, x.logps)
    old = None if extra == "plain" else x.logps + x.drift
    batch = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": x.ids,
        "completion_mask": x.mask,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(37.0),
    }
    if old is not None:
        batch["old_per_token_logps"] = old
    if extra == "all":
        batch["ref_per_token_logps"] = x.logps + x.ref_drift
        batch["importance_sampling_ratio"] = x.sampling_ratio
        built.use_vllm = True
        built.beta = built.args.beta = 0.1  # set afterwards: no reference model is loaded

    logps = x.logps.clone().requires_grad_()
    built._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.zeros_like(logps), None)
    expected = built._compute_loss(built.model, batch)
    (expected_grad,) = torch.autograd.grad(expected, logps)

    spec = SurrogateBatch(
        x.mask,
        row_factors(
            loss_type,
            x.mask,
            max_completion_length=T,
            accumulation_steps=2,
            num_items=batch["num_items_in_batch"] * 2 / built.args.steps_per_generation,
        ),
        old,
        batch.get("ref_per_token_logps"),
        batch.get("importance_sampling_ratio"),
    )
    loss = clipped_surrogate(logps, advantages, spec, Surrogate.from_config(built.args))
    (grad,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(loss_type):
    x = draw()
    factors = row_factors(loss_type, x.mask, max_completion_length=T)
    batch = SurrogateBatch(x.mask, factors, x.logps + x.drift)
    whole = clipped_surrogate(x.logps, x.advantages, batch, Surrogate(loss_type))
    parts = [torch.tensor([0, 3]), torch.tensor([4]), torch.tensor([2, 1])]
    summed = sum(
        clipped_surrogate(x.logps[rows], x.advantages[rows], batch.rows(rows), Surrogate(loss_type)) for rows in parts
    )
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-14)


def test_on_the_sampling_policy_the_loss_is_minus_the_mean_advantage():
    x = draw(lengths=[4, 4])
    factors = row_factors("grpo", x.mask, max_completion_length=4)
    loss = clipped_surrogate(x.logps, x.advantages, SurrogateBatch(x.mask, factors), Surrogate("grpo"))
    assert loss.item() == pytest.approx(-(1.3 - 0.7) / 2, abs=1e-12)


@pytest.mark.parametrize("rubbish", [5.0, -200.0, math.inf, math.nan])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_pads_are_inert_in_the_loss_and_its_gradient(loss_type, rubbish):
    """In the student's log-probs, and in the old and the reference ones, from which an exp can overflow."""
    x = draw()
    factors = row_factors(loss_type, x.mask, max_completion_length=T)
    surrogate = Surrogate(loss_type, beta=0.1)
    results = []
    for spoilt in (None, "student", "old", "reference"):
        logps, old, ref = (
            tensor.masked_fill(x.mask == 0, rubbish) if spoilt == name else tensor
            for name, tensor in (
                ("student", x.logps),
                ("old", x.logps + x.drift),
                ("reference", x.logps + x.ref_drift),
            )
        )
        logps = logps.clone().requires_grad_()
        loss = clipped_surrogate(logps, x.advantages, SurrogateBatch(x.mask, factors, old, ref), surrogate)
        loss.backward()
        results.append((loss.detach(), logps.grad))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="loss_type='ppo' is unknown"):
        Surrogate("ppo")
    with pytest.raises(ValueError, match="importance_sampling_level='row'"):
        Surrogate("grpo", "row")


# ---------------------------------------------------------------------- the twin is the specification


class Float64Torch:
    """torch, in which float32 means float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def liger_in_float64(monkeypatch):
    """Liger 0.8.5 accumulates in float32 whatever it is given. Lifted to float64, its tiling, our chunks, credit and
    gradients can be compared with the specification to far below float32's rounding."""
    ppo = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo")
    monkeypatch.setattr(ppo, "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def batch_of(x, loss_type, everything):
    factors = row_factors(loss_type, x.mask, max_completion_length=T, accumulation_steps=2, num_items=11.0)
    factors = factors.to(x.logps.dtype)
    if not everything:
        return SurrogateBatch(x.mask, factors)
    return SurrogateBatch(x.mask, factors, x.logps + x.drift, x.logps + x.ref_drift, x.sampling_ratio)


def both(x, surrogate, credit, *, bias, everything, temperature=0.8):
    """Loss and gradients of hidden states, head and bias: the specification over full logits, and the twin."""
    batch = batch_of(x, surrogate.loss_type, everything)
    results = []
    for fused in (False, True):
        leaves = [x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()]
        leaves += [x.bias.clone().requires_grad_()] if bias else []
        if fused:
            request = FusedLoss(x.ids, batch, surrogate, lambda p, rows: credited(credit, x, p, rows), temperature)
            request.take(*leaves, *([] if bias else [None]))
            loss, logps = request.loss, request.logps
        else:
            logits = leaves[0] @ leaves[1].T + (leaves[2] if bias else 0.0)
            logps = (logits / temperature).log_softmax(-1).gather(2, x.ids.unsqueeze(2)).squeeze(2)
            loss = clipped_surrogate(logps, credited(credit, x, logps), batch, surrogate)
        (loss * 3.0).backward()
        results.append((loss.detach(), logps.detach() * x.mask, *(leaf.grad for leaf in leaves)))
    return results


def assert_equal(results, tolerance):
    for name, spec, fused in zip(("loss", "logps", "hidden", "weight", "bias"), *results, strict=False):
        error = ((fused - spec).abs().max() / spec.abs().max().clamp(min=1e-3)).item()
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("chunk_tokens", [1, 2 * T, 2048], ids=["one row", "two rows", "all rows"])
@pytest.mark.parametrize("credit", ["rlsd", "grpo", "opsd", "grpo_opsd"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_fused_loss_is_the_specification(request, monkeypatch, dtype, loss_type, credit, chunk_tokens):
    if dtype == torch.float64:
        request.getfixturevalue("liger_in_float64")
    monkeypatch.setattr("trl_rlsd.losses._CHUNK_TOKENS", chunk_tokens)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for everything in (False, True):
        for level in ("token", "sequence"):
            surrogate = Surrogate(
                loss_type,
                level,
                epsilon_high=0.28,
                beta=0.1 * everything,
                delta=1.5 if everything and loss_type != "cispo" else None,
            )
            results = both(draw(dtype), surrogate, credit, bias=everything, everything=everything)
            assert_equal(results, tolerance)


@pytest.mark.parametrize("lengths", [[3], [1, 1, 1], [2, 5, 3, 1, 4], [0, 0]], ids=str)
def test_the_fused_loss_takes_any_ragged_batch(liger_in_float64, lengths):
    if max(lengths) == 0:
        x = draw(lengths=[1, 1])
        x.mask = torch.zeros_like(x.mask)
    else:
        x = draw(lengths=lengths)
    assert_equal(both(x, Surrogate("dapo"), "rlsd", bias=False, everything=False), 1e-9)


def test_a_vocabulary_and_a_length_beyond_ligers_tiles(monkeypatch, liger_in_float64):
    ppo = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo")
    monkeypatch.setattr(ppo, "_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE", 5)
    monkeypatch.setattr(ppo, "_SELECTIVE_LOGPROB_SEQ_CHUNK_SIZE", 3)
    assert_equal(both(draw(), Surrogate("grpo"), "rlsd", bias=True, everything=True), 1e-9)


def test_a_frozen_head_gets_no_gradient_and_changes_nothing():
    x = draw(torch.float32)
    grads = []
    for trainable in (True, False):
        hidden = x.hidden.clone().requires_grad_()
        weight = x.weight.clone().requires_grad_(trainable)
        fused = FusedLoss(x.ids, batch_of(x, "dapo", False), Surrogate(), lambda p, rows: credited("rlsd", x, p, rows))
        fused.take(hidden, weight, None)
        fused.loss.backward()
        assert (weight.grad is not None) == trainable
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_pads_of_the_hidden_states_are_inert():
    x = draw(torch.float32)
    grads = []
    for rubbish in (0.0, math.nan, math.inf):
        hidden = x.hidden.masked_fill(x.mask.unsqueeze(2) == 0, rubbish).requires_grad_()
        weight = x.weight.clone().requires_grad_()
        fused = FusedLoss(x.ids, batch_of(x, "dapo", False), Surrogate(), lambda p, rows: credited("rlsd", x, p, rows))
        fused.take(hidden, weight, None)
        fused.loss.backward()
        grads.append((fused.loss.detach(), hidden.grad, weight.grad))
        assert torch.isfinite(hidden.grad).all()
    for other in grads[1:]:
        for first, second in zip(grads[0], other, strict=True):
            assert torch.equal(first, second)


def test_shapes_that_do_not_fit_are_refused():
    x = draw(torch.float32)
    fused = FusedLoss(x.ids[:, :-1], batch_of(x, "dapo", False), Surrogate(), lambda p, rows: p)
    with pytest.raises(ValueError, match="do not fit completions"):
        fused.take(x.hidden, x.weight, None)


def test_nan_is_raised_with_step_and_row():
    x = draw(torch.float32)
    logps = x.logps.clone()
    logps[3] = math.nan  # a row without tokens: nothing of it counts
    check_finite(logps, x.mask, 12)
    logps[2, 1] = -math.inf
    with pytest.raises(ValueError, match=r"Step 12: .* -inf at row 2 of the micro-batch, token 1"):
        check_finite(logps, x.mask, 12)
    with pytest.raises(ValueError, match="row 7 of"):
        check_finite(logps[2:3], x.mask[2:3], 12, torch.tensor([7]))


# ---------------------------------------------------------------------- heads


def granite(**options):
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=3.0, **options))


TINY = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
)


def phi():
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**TINY, bos_token_id=1, eos_token_id=2))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def cohere():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.5, bos_token_id=1, eos_token_id=2))


def vision_language():
    """Text alone through the language half of a vision-language model, whose backbone holds another one."""
    text = {
        **TINY,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 1e4},
    }
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=V - 1, video_token_id=V - 2)
    return Qwen2_5_VLForConditionalGeneration(config)


HEADS = {
    "vision-language": vision_language,
    "bias": phi,
    "untied": lambda: tiny_llama(V, tie_word_embeddings=False),
    "tied": lambda: tiny_llama(V, tie_word_embeddings=True),
    "divided logits": granite,
    "multiplied logits": cohere,
}


@pytest.mark.parametrize("head", HEADS)
def test_the_fused_forward_is_the_specification_over_the_models_logits(head):
    """Through a whole model: every weight's gradient, for heads that share or scale."""
    x = draw(torch.float32)
    prompt = torch.randint(1, V, (B, 3), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([prompt, x.ids], 1)
    mask = torch.cat([torch.ones_like(prompt), x.mask], 1)
    batch = batch_of(x, "dapo", False)
    grads = []
    for fused in (False, True):
        model = HEADS[head]()
        if fused:
            add_fused_loss(model, lambda *parts: nullcontext())
            request = FusedLoss(
                x.ids, batch, Surrogate(), lambda p, rows: credited("rlsd", x, p, rows), temperature=0.7
            )
            output = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, fused_loss=request)
            loss = output.loss
            assert output.log_probs.shape == (B, ids.size(1) - 1)
        else:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, 2:-1]
            logps = (logits / 0.7).log_softmax(-1).gather(2, x.ids.unsqueeze(2)).squeeze(2)
            loss = clipped_surrogate(logps, credited("rlsd", x, logps), batch, Surrogate())
        loss.backward()
        grads.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        error = (grads[1][name] - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error < 1e-4, (name, error)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fsdp_takes_the_fused_loss_in_the_forward(process_group, dtype):
    """FSDP2 over one process: it casts and rebuilds what it finds in a forward's arguments."""
    x = draw(torch.float32)
    ids = torch.cat([torch.ones(B, 3, dtype=torch.long), x.ids], 1)
    losses = []
    for sharded in (False, True):
        model = tiny_llama(V, tie_word_embeddings=False).to(torch.float32 if sharded else dtype)
        add_fused_loss(model, lambda *parts: nullcontext())
        if sharded:
            policy = MixedPrecisionPolicy(param_dtype=dtype)
            for layer in (*model.model.layers, model):
                fully_shard(layer, mp_policy=policy)
        fused = FusedLoss(x.ids, batch_of(x, "dapo", True), Surrogate(), lambda p, r: credited("rlsd", x, p, r))
        fused_forward(model, fused)(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        fused.loss.backward()
        losses.append((fused.loss.item(), fused.batch.factors.dtype))
        assert all(p.grad is not None for p in model.parameters())
    assert losses[1][1] == losses[0][1] == torch.float32
    if dtype == torch.float32:
        assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)


def test_soft_capped_logits_are_refused():
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30.0.*use_liger_loss=False"):
        logit_scale(Gemma2Config())
    assert logit_scale(config) == 1.0
