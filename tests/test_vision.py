"""Images: the teacher sees what the student sees, and what it is shown beside that."""

import pytest
import torch
from conftest import assert_same, byte_tokenizer, config, dataset, differs, lora, tiny_llama, trainer, weights
from datasets import Dataset
from vlm_models import TINY_VLMS, image_dataset, images

from trl_rlsd import RLSDTrainer
from trl_rlsd.context import opened
from trl_rlsd.images import RowImages, forward_fields, lacks_images, prompt_with_images


MODELS = pytest.mark.parametrize("name", TINY_VLMS)


def varied(completions, **columns):
    return [float(i % 3) for i in range(len(completions))]


def build(folder, name="qwen2_5_vl", data=None, peft_config=None, teacher_model=None, **options):
    model, processor = TINY_VLMS[name]()
    defaults = dict(num_generations=2, max_completion_length=6, rlsd_lambda_decay_steps=0)
    return RLSDTrainer(
        model,
        varied,
        config(folder, **{**defaults, **options}),
        image_dataset() if data is None else data,
        processing_class=processor,
        peft_config=peft_config,
        teacher_model=teacher_model,
    )


def watched(built):
    """What was read of every generation batch, what became of it, and the gains of every micro-batch."""
    read, batches, gains = [], [], []
    run, score, credit = built._teacher_pass, built._score_with_teacher, built._token_credit

    def teacher_pass(model, prompt_ids, ids, mask, rows, images):
        read.append((prompt_ids, images, rows))
        return run(model, prompt_ids, ids, mask, rows, images)

    def score_with_teacher(batch, privileged):
        score(batch, privileged)
        batches.append(batch)

    def token_credit(inputs, student_logps, rows=None):
        scored = inputs["teacher_scored"].unsqueeze(1) * inputs["completion_mask"]
        gains.append((inputs["teacher_logps"] - student_logps) * scored)
        return credit(inputs, student_logps, rows)

    built._teacher_pass, built._score_with_teacher, built._token_credit = (
        teacher_pass,
        score_with_teacher,
        token_credit,
    )
    built.train()
    return read, batches, torch.cat([gain.flatten() for gain in gains])


def image_tokens(built, ids):
    return ids.count(built.processing_class.image_token_id)


@MODELS
@pytest.mark.parametrize("mixed", [False, True], ids=["images", "mixed"])
def test_the_same_prompt_and_images_give_no_gain(tmp_path, name, mixed):
    built = build(
        tmp_path,
        name,
        image_dataset(mixed=mixed),
        teacher_model=TINY_VLMS[name]()[0],
        teacher_model_kind="external",
        teacher_prompt_template="{prompt}",
        credit="opsd",
        learning_rate=0.0,
    )
    read, batches, gains = watched(built)
    assert all(batch["teacher_scored"].all() for batch in batches)
    assert {own is not None for _, images, _ in read for own in images} == ({False, True} if mixed else {True})
    assert gains.abs().max() < 2e-5


@MODELS
def test_the_teacher_sees_the_students_images_and_the_reference(tmp_path, name):
    built = build(tmp_path, name, image_dataset(images_column="images"))
    student = []
    generate = built._generate_single_turn
    built._generate_single_turn = lambda ids, *rest: student.extend(map(list, ids)) or generate(ids, *rest)
    read, batches, gains = watched(built)
    teacher = [list(ids) for prompt_ids, _, _ in read for ids in prompt_ids]
    assert len(teacher) == len(student)
    for own, students in zip(teacher, student, strict=True):
        assert len(own) > len(students)
        assert image_tokens(built, own) == image_tokens(built, students) > 0
    assert gains.abs().max() > 0.05


@MODELS
def test_a_privileged_image_is_the_teachers_alone(tmp_path, name):
    built = build(tmp_path, name, image_dataset(image_context=True))
    read, batches, gains = watched(built)
    (prompt_ids, images, rows), *_ = read
    tokens = built.processing_class.tokenizer
    assert [own.count for own in images] == [2] * len(images)
    text = tokens.decode(prompt_ids[rows[0]])
    before, between = text.split("look here: ")
    assert image_tokens(built, tokens.encode(before)) == 0
    image, after = between.split("the answer is")
    assert image_tokens(built, tokens.encode(image)) > 0, "it stands where the context has it"
    assert image_tokens(built, tokens.encode(after)) > 0, "and the question's comes with the question"
    assert gains.abs().max() > 0.05


@MODELS
def test_what_a_row_is_packed_with_changes_nothing(tmp_path, name):
    data = image_dataset(mixed=True, images_column="images")
    built = build(tmp_path, name, data, teacher_model_kind="live")
    ids = torch.randint(5, 200, (8, 5))
    read = built._prompt_check.batch(built._collator.contexts(list(data)), list(map(prompt_with_images, data)))
    prompts = read.ids, read.images
    mask = torch.ones_like(ids)
    together = built._teacher_logps(*prompts, ids, mask, list(range(8)))
    for row in range(8):
        alone = built._teacher_logps(*prompts, ids, mask, [row])
        assert torch.allclose(alone[row], together[row], atol=2e-5)
        assert (alone[[other for other in range(8) if other != row]] == 0).all()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_other_pixels_are_another_score(tmp_path, name):
    built = build(tmp_path, name, image_dataset(image_context=True), teacher_model_kind="live")
    row = built.train_dataset[0]
    prompts = built._prompt_check.batch(built._collator.contexts([row]), [prompt_with_images(row)])
    ids = torch.randint(5, 200, (1, 5))
    (own,) = prompts.images
    pixels = own.fields["pixel_values"].clone()
    first = len(pixels) // 4  # the privileged image stands in front
    pixels[:first] = -pixels[:first]
    other = RowImages({**own.fields, "pixel_values": pixels}, own.count)
    scores = [built._teacher_logps(prompts.ids, [images], ids, torch.ones_like(ids), [0]) for images in (own, other)]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_every_teacher_trains_with_images(tmp_path, name, peft):
    kind = {"qwen2_5_vl": "ema", "qwen3_vl": "synced", "internvl": "base", "gemma3": "live"}[name]
    adapter = lora(target_modules=["q_proj", "v_proj"]) if peft else None
    built = build(
        tmp_path,
        name,
        peft_config=adapter,
        teacher_model_kind=kind,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
    )
    start = weights(built.model)
    built.train()
    assert differs(start, weights(built.model))
    metrics = [log for log in built.state.log_history if "rlsd/gain_mean" in log]
    assert len(metrics) == 4
    assert all(abs(log["rlsd/gain_mean"]) > 0 for log in metrics)


@pytest.mark.parametrize(
    "name, peft", [("qwen2_5_vl", False), ("internvl", False), ("qwen3_vl", False), ("gemma3", True)]
)
def test_a_resumed_run_equals_the_straight_one_with_images_left_to_use(tmp_path, name, peft):
    """transformers 5.23 by itself does not find the weights of a Qwen2.5-VL or InternVL checkpoint."""

    def started(folder):
        adapter = lora(target_modules=["q_proj", "v_proj"]) if peft else None
        options = dict(num_iterations=2, max_steps=3, save_strategy="steps", save_steps=1)
        return build(folder, name, peft_config=adapter, **options)

    straight, resumed = started(tmp_path), started(tmp_path / "resumed")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(straight.model), weights(resumed.model))
    assert_same(straight.teacher.copy, resumed.teacher.copy)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_fused_loss_makes_the_same_update(tmp_path, name):
    updates = []
    for fused in (False, True):
        # Adam would make a step of any size of what rounding leaves of a gradient that is 0, as the keys' biases' are
        built = build(tmp_path, name, use_liger_loss=fused, max_steps=1, optim="sgd")
        start = weights(built.model)
        built.train()
        updates.append({key: value - start[key] for key, value in weights(built.model).items()})
    for key, update in updates[0].items():
        assert torch.allclose(update, updates[1][key], atol=1e-6), key
    assert max(update.abs().max() for update in updates[0].values()) > 1e-4


def test_a_contrast_shows_the_same_images_with_both_references(tmp_path):
    data = image_dataset().add_column("wrong", [f"the answer is {2 * i + 1}" for i in range(8)])
    built = build(tmp_path, "qwen3_vl", data, credit="rlsd_contrast", contrast_column="wrong", max_steps=1)
    read, batches, _ = watched(built)
    ((prompt_ids, images, rows),) = read
    half = len(prompt_ids) // 2
    for right in range(half):
        assert image_tokens(built, prompt_ids[right]) == image_tokens(built, prompt_ids[right + half]) > 0
        assert images[right].count == images[right + half].count
    assert any(row >= half for row in rows)
    assert (batches[0]["wrong_logps"] - batches[0]["teacher_logps"]).abs().max() > 1e-2


def test_images_need_a_model_that_sees_them(tmp_path):
    data = image_dataset(image_context=True).remove_columns("image")
    with pytest.raises(TypeError, match="holds an image, but processing_class is a tokenizer"):
        trainer(tmp_path, model=tiny_llama(), data=data, processing_class=byte_tokenizer()).train()


@MODELS
def test_a_template_that_drops_privileged_images_is_refused_before_generation(tmp_path, name):
    model, processor = TINY_VLMS[name]()
    whole = "{% for part in m['content'] %}"
    assert whole in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        whole, "{% for part in m['content'] if part['type'] == 'text' %}"
    )
    data = image_dataset(image_context=True).remove_columns("image")
    built = RLSDTrainer(model, varied, config(tmp_path), data, processing_class=processor)
    generated = []
    built._generate_single_turn = lambda *args, **kwargs: generated.append(1)
    with pytest.raises(ValueError, match="image"):
        built.train()
    assert generated == []


def test_plain_text_takes_no_privileged_images(tmp_path):
    data = image_dataset(image_context=True).remove_columns(["image", "prompt"]).add_column("prompt", ["q"] * 8)
    with pytest.raises(ValueError, match="plain-text prompt takes no privileged images"):
        build(tmp_path, "qwen3_vl", data).train()


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3"])
def test_batches_and_micro_batches_may_be_without_images(tmp_path, name):
    """TRL 1.16 by itself fails: on a batch in which no row has an image, and on a part of one."""
    data = image_dataset(rows=4, mixed=True)
    built = build(
        tmp_path,
        name,
        data,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        max_steps=2,
        num_generations=2,
    )
    read, _, gains = watched(built)
    assert {tuple(own is not None for own in images) for _, images, _ in read} == {(True,) * 2, (False,) * 2}
    built = build(
        tmp_path, name, data, per_device_train_batch_size=1, gradient_accumulation_steps=3, steps_per_generation=4
    )
    read, *_ = watched(built)
    assert {own is not None for _, images, _ in read for own in images} == {True, False}


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_dataset_tells_whether_rows_lack_images(column):
    assert lacks_images(image_dataset(images_column=column)) is False
    assert lacks_images(image_dataset(images_column=column, mixed=True)) is True
    assert lacks_images(image_dataset(images_column=column).to_iterable_dataset()) is None
    assert lacks_images(dataset()) is False
    empty = [[], images(1)]
    assert lacks_images(Dataset.from_dict({"prompt": ["a", "b"], "images": empty})) is True
    within = [[{"role": "user", "content": [{"type": "image", "image": images(1)[0]}]}]]
    assert lacks_images(Dataset.from_dict({"prompt": within})) is None


def test_an_image_that_lost_its_pixels_is_named():
    with pytest.raises(TypeError, match=r"holds no pixels.*features"):
        opened({"type": "image", "image": {"mode": "RGB", "size": [8, 8]}})


def test_rows_with_and_without_images_are_never_put_together():
    with pytest.raises(ValueError, match="1 of 2 rows have no images"):
        forward_fields([RowImages({"pixel_values": torch.ones(1, 2)}, 1), None], 3, torch.ones(2, 4))
