"""The tiny vision-language models see their images; and datasets and TRL treat images as the package takes it for
granted, so that an upgrade which changes that fails here first."""

import numpy as np
import pytest
import torch
from conftest import byte_reward
from datasets import Dataset
from PIL import Image
from torch.nn.functional import pad
from trl import GRPOConfig, GRPOTrainer, prepare_multimodal_messages
from vlm_models import TINY_VLMS, image_dataset, images


MODELS = pytest.mark.parametrize("name", TINY_VLMS)
TOKEN_FIELDS = {"token_type_ids", "mm_token_type_ids"}


def prompt(text: str, pictures: list[Image.Image]) -> list[dict]:
    return prepare_multimodal_messages([{"role": "user", "content": text}], pictures)


def logps(model, processor, prompts: list[list[dict]]) -> torch.Tensor:
    """Of the whole vocabulary after each prompt (B, V)."""
    inputs = processor.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    with torch.no_grad():
        return model(**inputs).logits[:, -1].log_softmax(-1)


def grpo(folder, name: str, data: Dataset) -> GRPOTrainer:
    model, processor = TINY_VLMS[name]()
    args = GRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return GRPOTrainer(model, byte_reward, args, data, processing_class=processor)


@MODELS
def test_another_image_is_another_distribution(name):
    model, processor = TINY_VLMS[name]()
    first, second = (logps(model, processor, [prompt("what?", images(1, (56, 84), seed))]) for seed in (0, 1))
    assert (first - second).abs().max() > 0.2


@MODELS
def test_padding_changes_nothing(name):
    model, processor = TINY_VLMS[name]()
    sizes = [(28, 28), (56, 84), (84, 28)]
    prompts = [prompt("?" * i, images(i, size, i)) for i, size in enumerate(sizes)]  # 0, 1 and 2 images
    alone = torch.cat([logps(model, processor, [own]) for own in prompts])
    assert torch.allclose(logps(model, processor, prompts), alone, atol=2e-5)


@MODELS
def test_rows_tokenized_one_by_one_are_trls_batch(tmp_path, name):
    trainer = grpo(tmp_path, name, data := image_dataset(4, images_column="images"))
    rows = [data[i // 2] for i in range(8)]
    batch = trainer._generate_and_score_completions(rows)
    width, completion = batch["prompt_ids"].size(1), batch["completion_ids"].size(1)
    own: dict[str, list[torch.Tensor]] = {}
    for row, ids, mask in zip(rows, batch["prompt_ids"], batch["prompt_mask"], strict=True):
        tokens, _, fields = trainer._tokenize_prompts([prompt(row["prompt"][0]["content"], row["images"])])
        assert tokens[0] == ids[mask.bool()].tolist()
        for key, value in fields.items():
            value = torch.from_numpy(np.asarray(value))
            if key in TOKEN_FIELDS:
                value = pad(value, (width - value.size(1), completion))
            elif name == "idefics3":  # (1, images, ...), padded to the most images of a row
                value = pad(value, (0, 0) * (value.ndim - 2) + (0, 2 - value.size(1)))
            own.setdefault(key, []).append(value)
    assert "pixel_values" in own
    for key, values in own.items():
        assert torch.equal(torch.cat(values), batch[key]), key
    tiles = [len(value) for value in own["pixel_values"]]
    assert batch.get("num_tiles", tiles) == tiles
    assert batch["num_images"] == [len(row["images"]) for row in rows]


# TRL 1.16, transformers 5.23: the processor takes no None for a row without images. Were this to pass, nothing would
# have to be done any more for datasets of which some rows have no image.
@pytest.mark.parametrize("column", ["image", "images"])
def test_trl_cannot_mix_rows_with_and_without_images(tmp_path, column):
    trainer = grpo(tmp_path, "qwen3_vl", image_dataset(4, mixed=True, images_column=column))
    with pytest.raises(TypeError, match="NoneType"):
        trainer.train()


def test_an_image_in_messages_keeps_its_place_and_its_pixels():
    (message,) = image_dataset(2, image_context=True)[0]["privileged_context"]
    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
    before, picture, _ = message["content"]
    assert before["image"] is None, "every part has the keys of all"
    assert picture["text"] is None
    assert isinstance(picture["image"], Image.Image)
    assert np.array_equal(picture["image"], images(1, (28, 28), seed=100)[0])


def test_without_declared_features_an_image_in_messages_is_bytes():
    data = Dataset.from_dict({"context": [prompt("look", images(1))]})
    picture, text = data[0]["context"][0]["content"]
    assert set(picture["image"]) == {"bytes", "path"}
    assert text["image"] is None


# datasets 5.2 writes an object that it does not know, beside parts with other keys, as the JSON of its attributes. No
# image is left to read: whoever reads such a column can only say so.
def test_mapped_into_messages_without_declared_features_an_image_is_lost():
    data = image_dataset(1).map(lambda row: {"context": prompt("look", [row["image"]])})
    picture = data[0]["context"][0]["content"][0]
    assert isinstance(picture["image"], dict)
    assert not {"bytes", "path"} & set(picture["image"])
