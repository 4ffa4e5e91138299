"""Tiny vision-language models with their processors, and datasets with images, built in code as in conftest.

Each function returns (model, processor): the real model and processor classes, two text layers of 32 channels, a byte
vocabulary, weights large enough for another image or another prompt to move the log-probs by tenths of a nat.

No torchvision: the image processors are transformers' PIL ones. Its video processors exist with torchvision alone, so
the processors that want one are subclassed here without it; nothing else of them is changed.
"""

from collections.abc import Callable

import numpy as np
import torch
from conftest import byte_tokenizer, tiny_text
from datasets import Dataset, Features, List, Value
from datasets import Image as Feature
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)


# As in Qwen's own templates, a part with an `image` key is an image, also if its value is None and its type "text".
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_template(image: str) -> str:
    return CHAT_TEMPLATE.replace("IMAGE", image)


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer with special tokens, each an attribute of that name, as processors look them up."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(extra=tuple(special.values())).backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=special,
    )


def _text(tokenizer: PreTrainedTokenizerFast, **options) -> dict:
    return tiny_text(len(tokenizer), **options)


def _vision(**options) -> dict:
    """Of a vision tower that sees images or tiles of 28 x 28 pixels in 16 patches."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return {**sizes, "image_size": 28, "patch_size": 7, **options}


class _Qwen2_5VLProcessor(Qwen2_5_VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


class _Qwen3VLProcessor(Qwen3VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


class _InternVLProcessor(InternVLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=4, chat_template=None):
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template=chat_template)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )


def _qwen_config(tokenizer: PreTrainedTokenizerFast, text: dict, vision: dict) -> dict:
    return dict(
        text_config=text,
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=32,
            initializer_range=0.3,
            **vision,
        ),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def tiny_qwen2_5_vl(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """One image token for every 28 x 28 pixels; an image of 28 x 28 to 112 x 112 pixels keeps its size."""
    tokenizer = _qwen_tokenizer()
    text = _text(tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1]})
    vision = dict(patch_size=14, fullatt_block_indexes=[1], window_size=56)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_qwen_config(tokenizer, text, vision)))
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    images = Qwen2VLImageProcessorPil(size=sizes, patch_size=14)
    return model, _Qwen2_5VLProcessor(images, tokenizer, chat_template=chat_template(QWEN_IMAGE))


def tiny_qwen3_vl(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """One image token for every 32 x 32 pixels, up to 16."""
    tokenizer = _qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = _text(tokenizer, head_dim=8, rope_parameters=rope)
    vision = dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0])
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_qwen_config(tokenizer, text, vision)))
    sizes = {"shortest_edge": 32 * 32, "longest_edge": 16 * 32 * 32}
    images = Qwen2VLImageProcessorPil(size=sizes, patch_size=16)
    return model, _Qwen3VLProcessor(images, tokenizer, chat_template=chat_template(QWEN_IMAGE))


def tiny_internvl(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Tiles of 28 x 28 pixels and 4 image tokens: one for a square image, up to 3 and a thumbnail for a long one."""
    tokenizer = _tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = _vision(initializer_range=0.3)
    text = dict(model_type="qwen2", layer_types=["full_attention"] * 2, **_text(tokenizer))
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.context_image_token_id,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=3)
    return model, _InternVLProcessor(images, tokenizer, 4, chat_template=chat_template("<IMG_CONTEXT>"))


def tiny_idefics3(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """pixel_values (rows, images, channels, height, width), padded with empty images; 4 tokens for every image."""
    tokenizer = _tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    vision = _vision(initializer_range=0.3)
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config=dict(model_type="llama", **_text(tokenizer)),
            vision_config=vision,
            image_token_id=tokenizer.image_token_id,
            scale_factor=2,
        )
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    return model, Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=chat_template("<image>"))


def tiny_gemma3(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Images of 28 x 28 pixels and 4 tokens, which see one another; one layer of sliding attention."""
    tokenizer = _tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    text = _text(
        tokenizer,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = _vision(vision_use_head=False)
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=tokenizer.image_token_id,
            boi_token_index=tokenizer.boi_token_id,
            eoi_token_index=tokenizer.eoi_token_id,
            initializer_range=0.3,
        )
    )
    # transformers 5.23 starts this projection at zero: no image would change anything
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = chat_template("<start_of_image>")
    return model, Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


TINY_VLMS: dict[str, Callable[..., tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "internvl": tiny_internvl,
    "idefics3": tiny_idefics3,
    "gemma3": tiny_gemma3,
}


def images(n: int, size: tuple[int, int] = (28, 28), seed: int = 0) -> list[Image.Image]:
    """Noise of a (width, height)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


# (width, height): 6, 1, 4 and 3 tokens in the Qwen models; 3, 1, 1 and 4 tiles of 4 tokens in internvl; 4 tokens each
# in the others. In the Qwen models the first and third take fewer positions than tokens.
SIZES = [(56, 84), (28, 28), (56, 56), (84, 28)]

# Without declared features, datasets 5.2 stores an image inside messages as a struct of bytes, not as an Image.
MESSAGES = List(
    {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string"), "image": Feature()})}
)


def image_dataset(
    rows: int = 8, mixed: bool = False, images_column: str = "image", image_context: bool = False
) -> Dataset:
    """Prompts as messages, one image (`image`) or one and two by turns (`images`), and a privileged context.

    mixed: every second row has no image (None).
    image_context: the privileged context is messages, an image between two texts, in place of a text. Read back, every
        part has all keys (`text` of an image and `image` of a text are None), and the image is a PIL one.
    """
    pictures = [images(1 + i % 2, SIZES[i % len(SIZES)], seed=i) for i in range(rows)]
    if images_column == "image":
        pictures = [several[0] for several in pictures]
    if mixed:
        pictures = [None if i % 2 else picture for i, picture in enumerate(pictures)]
    feature = Feature() if images_column == "image" else List(Feature())
    context = [f"the answer is {2 * i}" for i in range(rows)]
    if image_context:
        context = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look here: "},
                        {"type": "image", "image": images(1, SIZES[(i + 1) % len(SIZES)], seed=100 + i)[0]},
                        {"type": "text", "text": text},
                    ],
                }
            ]
            for i, text in enumerate(context)
        ]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"{i} + {i} = ?"}] for i in range(rows)],
            images_column: pictures,
            "privileged_context": context,
        },
        features=Features(
            {
                "prompt": List({"role": Value("string"), "content": Value("string")}),
                images_column: feature,
                "privileged_context": MESSAGES if image_context else Value("string"),
            }
        ),
    )
