"""Quantised bases: every teacher scores on the 4-bit weights as they are, and leaves them as they are."""

import pytest
import torch
from conftest import assert_same, byte_reward, byte_tokenizer, config, dataset, differs, lora, tiny_llama, weights
from test_teacher import score, shift
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_rlsd import RLSDTrainer, checks
from trl_rlsd.config import TEACHER_KINDS
from trl_rlsd.teacher import scoring


pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install trl-rlsd[quantization]")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
DOUBLE = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
# TRL's own defaults; bitsandbytes puts a model on the GPU wherever there is one
ON_GPU = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True}
GPU = pytest.mark.gpu


@pytest.fixture(autouse=True)
def place(request, monkeypatch):
    """Without this, the tests for the CPU would load their models onto a GPU that is there."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


def qlora(path, out, kind, quantization=NF4, peft_config=None, **options):
    external = {"teacher_model": tiny_llama(seed=5)} if kind == "external" else {}
    return RLSDTrainer(
        path,
        byte_reward,
        config(out, teacher_model_kind=kind, teacher_sync_steps=2, **options),
        dataset(),
        processing_class=byte_tokenizer(),
        quantization_config=quantization,
        peft_config=peft_config or lora(),
        **external,
    )


def quantized(model):
    """The weights that bitsandbytes has quantised, by name."""
    return {n: p for n, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}


def stored(model):
    """What lies in memory for each of them, apart from its bytes' values."""
    return {n: (type(p).__name__, p.dtype, p.shape, p.data_ptr()) for n, p in quantized(model).items()}


def bytes_of(model):
    return sum(p.nbytes for p in model.parameters())


def spy_on_teacher(built):
    """Calls `look` within every layer's forward while the teacher scores. Returns what was seen."""
    seen, teacher_pass = [], built._teacher_pass

    def look(*_):
        seen.append((stored(built.model), bytes_of(built.model)))

    def spied(*args):
        hooks = [m.register_forward_hook(look) for m in built.model.modules() if hasattr(m, "base_layer")]
        try:
            return teacher_pass(*args)
        finally:
            for hook in hooks:
                hook.remove()

    built._teacher_pass = spied
    return seen


def trains_on_a_base_that_stays(built, kind):
    before = {name: p.detach().clone() for name, p in quantized(built.model).items()}
    layout, size, start = stored(built.model), bytes_of(built.model), weights(built.model)
    assert len(before) == 14  # the linear layers of two blocks; embeddings and LM head stay as they are
    seen = spy_on_teacher(built)
    built.train()
    assert_same(before, quantized(built.model))
    assert stored(built.model) == layout
    assert bool(seen) == (kind != "external")  # whose teacher is another model
    assert all(during == (layout, size) for during in seen), "a weight was dequantised or replaced to score"
    assert differs(start, weights(built.model)), "nothing was trained"
    assert all(abs(log["rlsd/gain_mean"]) > 0.01 for log in built.state.log_history[:2])


@pytest.mark.parametrize(
    "kind, quantization",
    [*((kind, NF4) for kind in TEACHER_KINDS), ("ema", DOUBLE), ("base", INT8)],
    ids=[*TEACHER_KINDS, "ema-double", "base-int8"],
)
def test_training_leaves_the_quantised_base_bit_for_bit_also_while_a_teacher_scores(
    tmp_path, path, kind, quantization
):
    trains_on_a_base_that_stays(qlora(path, tmp_path, kind, quantization), kind)


@pytest.mark.parametrize("fp16, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_an_adapter_under_fp16_is_float32_whose_gradients_can_be_unscaled(tmp_path, path, fp16, dtype):
    """TRL makes it bfloat16. On a T4 the scaler's `unscale_` refuses that; on a CPU there is none to refuse."""
    model = qlora(path, tmp_path, "synced").model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    checks.mend_quantized(model, fp16=fp16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def gain(built, kind, path):
    """The largest, for the same prompt and weights."""
    shift(
        built.model, 0.05
    )  # a fresh adapter adds nothing, and a teacher without it would not be told from one with it
    built.teacher.start(0)
    built.model.train()
    prompts, completions = [[5, 6, 7], [9, 8, 9]], [[20, 21, 22, 23]] * 2
    with built.accelerator.device:
        teacher = score(built, prompts, completions)
        ids = torch.cat([torch.tensor(prompts), torch.tensor(completions)], dim=1)
    model = built.model
    if kind == "base":  # the base by itself, as it is loaded without an adapter
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4, dtype=built.model.dtype)
        checks.mend_quantized(model, fp16=False)
    with scoring(model), built.accelerator.autocast():
        logits = model(ids).logits[:, 2:-1].float()
    student = logits.log_softmax(-1).gather(2, ids[:, 3:].unsqueeze(2)).squeeze(2)
    return (teacher - student).abs().max().item()


@pytest.mark.parametrize("kind", ["live", "synced", "base"])
def test_same_prompt_and_weights_mean_gain_zero_on_a_quantised_base(tmp_path, path, kind):
    assert gain(qlora(path, tmp_path, kind), kind, path) < 1e-5


@GPU
@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_on_a_gpu_the_quantised_base_stays_and_the_gain(tmp_path, path, kind):
    trains_on_a_base_that_stays(qlora(path, tmp_path, kind, DOUBLE, **ON_GPU), kind)
    if kind in ("live", "synced", "base"):
        # bfloat16 logits of the plain forward against the fused head's
        assert gain(qlora(path, tmp_path, kind, **ON_GPU), kind, path) < 0.1


def gradients(model):
    ids = torch.arange(2, 30).unsqueeze(0)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_scoring_leaves_the_gradient_through_the_base_as_it_was(tmp_path, path):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights for inference at the first forward in eval mode."""
    built = qlora(path, tmp_path, "live")
    shift(built.model, 0.05)
    built.model.train()
    before = gradients(built.model)
    with built.teacher.weights(built.model) as model, scoring(model):
        model(torch.arange(2, 30).unsqueeze(0))
    assert_same(before, gradients(built.model))
    layers = [m for m in built.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14
    assert not any(m.support_avx512bf16_for_cpu for m in layers)


@pytest.mark.parametrize("kind", ["synced", "ema"])
def test_a_resumed_run_on_a_quantised_base_ends_with_the_same_weights(tmp_path, path, kind):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    straight = qlora(path, tmp_path, kind, **options)
    straight.train()
    resumed = qlora(path, tmp_path / "resumed", kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {p.dtype for p in weights(resumed.model).values()} == {torch.bfloat16}  # TRL's choice for quantised bases
    assert_same(weights(straight.model), weights(resumed.model))
    assert_same(straight.teacher.copy, resumed.teacher.copy)
    assert differs(straight.teacher.copy, weights(straight.model))


@pytest.mark.parametrize(
    "peft_config",
    [lora(use_dora=True), lora(modules_to_save=["lm_head"])],
    ids=["dora", "modules_to_save"],
)
def test_other_adapters_train_on_a_quantised_base(tmp_path, path, peft_config):
    # TRL's defaults; TRL makes what is trained bfloat16, which an LM head can be only where the base is
    options = {"bf16": True, "gradient_checkpointing": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trains_on_a_base_that_stays(qlora(path, tmp_path, "synced", peft_config=peft_config, **options), "synced")


def test_the_fused_loss_of_a_quantised_base_is_trls(tmp_path, path):
    pytest.importorskip("liger_kernel")
    losses = []
    for use_liger_loss in (False, True):
        built = qlora(path, tmp_path, "synced", use_liger_loss=use_liger_loss, max_steps=1)
        built.train()
        losses.append([built.state.log_history[0][name] for name in ("loss", "grad_norm")])
    # the adapter is bfloat16 (TRL's choice for quantised bases), and so is its gradient
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_log_probs_in_8_bits_depend_on_their_neighbours_unless_the_threshold_is_zero(tmp_path, path, caplog):
    ids = torch.arange(2, 122).view(4, 30)
    for threshold, depends in ((6.0, True), (0.0, False)):
        caplog.clear()
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        model = qlora(path, tmp_path, "live", quantization).model
        with scoring(model):
            moved = model(ids).logits[:1] - model(ids[:1]).logits
        assert (moved.abs().max().item() > 0.01) == depends
        assert ("Set llm_int8_threshold=0.0" in caplog.text) == depends


def test_merging_an_adapter_into_4_bits_moves_the_base_and_vllm_is_warned_of(tmp_path, path):
    built = qlora(path, tmp_path, "base")
    shift(built.model, 0.05)
    with pytest.raises(ValueError, match=r"teacher_model_kind='base'.*not the base"):
        checks.check_quantized(built.model, "base", use_vllm=True)
    assert "base model moves" in checks.check_quantized(built.model, "synced", use_vllm=True)
    assert checks.check_quantized(built.model, "base", use_vllm=False) is None
    before = {name: p.detach().clone() for name, p in quantized(built.model).items()}
    built.model.merge_adapter()  # what TRL does to send the weights to vLLM
    built.model.unmerge_adapter()
    assert differs(before, quantized(built.model))
