"""The laws of teacher weights: whose weights score, what they cost, and that the student gets all back."""

import pytest
import torch
from conftest import assert_same, byte_tokenizer, dataset, differs, lora, tiny_llama, trainer, weights
from peft import IA3Config, LNTuningConfig, PromptTuningConfig

from trl_rlsd.teacher import CopyTeacher, build_teacher, scoring


KINDS = ["synced", "live", "ema", "base", "external"]
OPTIONS = {"sync_steps": 3, "update_rate": 0.25, "offload": False}
PEFT = pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])


def copy_teacher(kind, peft=False, **options):
    from peft import get_peft_model

    student = get_peft_model(tiny_llama(), lora()) if peft else tiny_llama()
    teacher = build_teacher(kind, student, is_peft=peft, **{**OPTIONS, **options})
    teacher.start(0)
    return student, teacher


def shift(model, amount=0.5):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount


@PEFT
@pytest.mark.parametrize("offload", [False, True])
def test_synced_keeps_the_snapshot_until_the_next_sync(peft, offload):
    student, teacher = copy_teacher("synced", peft, offload=offload)
    start = weights(student)
    for step in (1, 2):
        shift(student)
        teacher.step_end(step)
        moved = weights(student)
        with teacher.weights(student) as model:
            assert_same(weights(model), start)
        assert_same(weights(student), moved)
    shift(student)
    teacher.step_end(3)
    with teacher.weights(student) as model:
        assert_same(weights(model), weights(student))
        assert differs(weights(model), start)


@PEFT
def test_ema_is_the_moving_average_of_the_weights(peft):
    student, teacher = copy_teacher("ema", peft)
    expected = weights(student)
    for step in (1, 2, 3):
        shift(student)
        teacher.step_end(step)
        expected = {name: value + 0.25 * (weights(student)[name] - value) for name, value in expected.items()}
    with teacher.weights(student) as model:
        for name, value in weights(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_ema_of_bfloat16_weights_does_not_round_small_steps_away():
    student = tiny_llama().to(torch.bfloat16)
    teacher = CopyTeacher(student, "ema", sync_steps=1, update_rate=0.001, offload=False)
    teacher.start(0)
    name = "model.norm.weight"  # ones: a step of 0.001 of a difference of 0.5 is below bfloat16's 0.0078
    shift(student)
    for step in range(100):
        teacher.step_end(step)
    assert teacher.copy[name][0].item() == pytest.approx(1 + 0.5 * (1 - 0.999**100), abs=1e-4)
    moved = weights(student)
    with teacher.weights(student):
        assert student.get_parameter(name)[0].item() == pytest.approx(1.0469, abs=1e-3)  # rounded to bfloat16
    assert_same(weights(student), moved)
    assert teacher.copy[name][0].item() == pytest.approx(1 + 0.5 * (1 - 0.999**100), abs=1e-4)


@PEFT
def test_base_stays_the_model_that_training_started_from(peft):
    student, teacher = copy_teacher("base", peft)
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        before = student.eval()(ids).logits
        shift(student)
        teacher.step_end(1)
        assert not torch.allclose(student(ids).logits, before, atol=1e-2)
        with teacher.weights(student) as model, scoring(model):
            # a fresh LoRA adds nothing, so the first logits are the base model's
            torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "peft_config",
    [
        lora(use_dora=True),
        lora(modules_to_save=["norm"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["dora", "modules_to_save", "ia3", "ln_tuning", "prompt_tuning"],
)
def test_base_and_synced_hold_for_other_peft_methods(tmp_path, peft_config):
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        untouched = tiny_llama().eval()(ids).logits
    for kind in ("base", "synced"):
        built = trainer(tmp_path, peft_config=peft_config, teacher_model_kind=kind, teacher_sync_steps=100)
        with scoring(built.model):
            start = built.model(ids).logits
        built.train()
        with built.teacher.weights(built.model) as model, scoring(model):
            logits = model(ids).logits
        expected = untouched if kind == "base" else start
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        with scoring(built.model):
            assert not torch.allclose(built.model(ids).logits, start, atol=1e-4), "nothing was trained"


@PEFT
@pytest.mark.parametrize("kind", ["synced", "live", "ema", "base"])
def test_everything_is_restored_even_after_an_exception(kind, peft):
    student, teacher = copy_teacher(kind, peft)
    for name, parameter in student.named_parameters():
        if "q_proj" in name:
            parameter.requires_grad_(False)  # frozen by its owner, adapter or not
    shift(student)
    student.train()
    odd = next(m for m in student.modules() if isinstance(m, torch.nn.Linear))
    odd.eval()  # a module that its owner put into eval mode stays there
    before = weights(student)
    modes = [m.training for m in student.modules()]
    flags = [p.requires_grad for p in student.parameters()]
    storages = [p.data_ptr() for p in student.parameters()]
    with pytest.raises(RuntimeError, match="boom"), teacher.weights(student) as model, scoring(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("boom")
    assert_same(weights(student), before)
    assert [m.training for m in student.modules()] == modes
    assert [p.requires_grad for p in student.parameters()] == flags
    assert [p.data_ptr() for p in student.parameters()] == storages
    if peft:
        assert student.active_adapters == ["default"]


@pytest.mark.parametrize("kind", ["synced", "live", "ema", "base"])
def test_with_lora_the_teacher_owns_no_more_than_a_copy_of_the_adapter(kind):
    student, teacher = copy_teacher(kind, peft=True)
    adapter = sum(p.numel() for p in student.parameters() if p.requires_grad)
    owned = sum(t.numel() for t in getattr(teacher, "copy", {}).values())
    assert owned == (adapter if kind in ("synced", "ema") else 0)
    assert adapter < 0.5 * sum(p.numel() for p in student.parameters())


def test_offloaded_weights_rest_on_the_cpu_and_average_like_the_others():
    _, here = copy_teacher("ema")
    student, away = copy_teacher("ema", offload=True)
    for teacher in (here, away):
        shift(teacher.student)
        teacher.step_end(1)
    assert all(t.device.type == "cpu" for t in away.copy.values())
    assert_same(here.copy, away.copy)


@pytest.mark.parametrize("kind", ["synced", "ema", "base"])
def test_saved_teachers_come_back_bit_for_bit(tmp_path, kind):
    student, teacher = copy_teacher(kind)
    shift(student)
    teacher.step_end(2)
    teacher.save(str(tmp_path))
    other_student, other = copy_teacher(kind)
    shift(other_student, -3.0)
    other.start(0)
    assert other.load(str(tmp_path))
    other.start(2)  # what happens next on resume: it must not take a new snapshot
    assert_same(other.copy, teacher.copy)
    assert other.copied_at == teacher.copied_at
    # a second run of the same trainer begins anew
    other.start(0)
    assert kind == "base" or differs(other.copy, teacher.copy)


def test_a_torn_or_foreign_teacher_file_is_named(tmp_path):
    _, teacher = copy_teacher("synced")
    assert not teacher.load(str(tmp_path))
    teacher.save(str(tmp_path))
    with pytest.raises(ValueError, match="holds a teacher of kind 'synced', but teacher_model_kind='ema'"):
        copy_teacher("ema")[1].load(str(tmp_path))
    with pytest.raises(ValueError, match="holds other weights than the model trains"):
        copy_teacher("synced", peft=True)[1].load(str(tmp_path))
    file = tmp_path / "rlsd_teacher.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"rlsd_teacher.safetensors cannot be read.*incomplete"):
        teacher.load(str(tmp_path))


def score(built, prompts, completions, mask=None):
    """Teacher log-probs as the trainer computes them, for chosen prompts and completions."""
    completions = torch.tensor(completions)
    mask = torch.ones_like(completions) if mask is None else torch.tensor(mask)
    rows = list(range(len(completions)))
    return built._teacher_logps(prompts, [None] * len(rows), completions, mask, rows)


@PEFT
@pytest.mark.parametrize("kind", KINDS)
def test_same_prompt_and_weights_mean_gain_zero(tmp_path, kind, peft):
    external = {"teacher_model": tiny_llama()} if kind == "external" else {}
    built = trainer(
        tmp_path,
        peft_config=lora(lora_dropout=0.3) if peft else None,
        teacher_model_kind=kind,
        temperature=0.7,
        **external,
    )
    if peft and kind in ("synced", "live", "ema"):  # a fresh adapter adds nothing, and its dropout would not be seen
        shift(built.model, 0.05)
    built.teacher.start(0)
    built.model.train()  # as during training: with dropout on
    prompts, completions = [[5, 6, 7], [8, 9]], [[20, 21, 22, 23]] * 2
    teacher = score(built, prompts, completions)
    assert built.model.training
    # the student's log-probs from the definition, full logits and all
    with torch.no_grad(), scoring(built.model):
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            logits = built.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
            student = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(teacher[row], student, rtol=0, atol=1e-5)


def test_a_neighbours_length_changes_nothing(tmp_path):
    built = trainer(tmp_path)
    built.teacher.start(0)
    alone = score(built, [[5, 6, 7]], [[20, 21, 22]])
    together = score(built, [[5, 6, 7], list(range(2, 60))], [[20, 21, 22, 0], [30] * 4], [[1, 1, 1, 0], [1] * 4])
    torch.testing.assert_close(together[:1, :3], alone, rtol=0, atol=1e-5)


def test_the_external_teacher_is_another_model_and_stays_frozen(tmp_path):
    other = tiny_llama(seed=5)
    built = trainer(tmp_path, teacher_model=other, teacher_model_kind="external", teacher_prompt_template="{prompt}")
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    start = weights(built.model)
    built.train()
    assert_same(dict(other.named_parameters()), before)
    assert differs(weights(built.model), start)
    assert built.state.log_history[0]["rlsd/kl"] > 0.1  # it does say something else than the student


def test_an_external_teacher_may_be_a_path(tmp_path):
    folder = tmp_path / "teacher"
    tiny_llama(seed=5).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    data = dataset().remove_columns("privileged_context")
    options = {"teacher_model_kind": "external", "teacher_prompt_template": "{prompt}", "credit": "opsd"}
    trained = []
    for teacher_model in (str(folder), tiny_llama(seed=5)):
        built = trainer(tmp_path, teacher_model=teacher_model, data=data, **options)
        built.train()
        trained.append(weights(built.model))
    assert_same(*trained)


def test_a_student_with_dropout_is_warned_of(tmp_path, caplog):
    trainer(tmp_path, peft_config=lora(lora_dropout=0.1))
    assert "disable_dropout=True" in caplog.text
    caplog.clear()
    trainer(tmp_path, peft_config=lora(lora_dropout=0.1), disable_dropout=True)
    assert "disable_dropout=True" not in caplog.text


def test_a_sampler_that_reshapes_the_distribution_is_warned_of(tmp_path, caplog):
    trainer(tmp_path, top_p=0.9)
    assert "top_p=0.9" in caplog.text
