"""Images in prompts: what a processor gives beside the token ids, kept by row and put together for a forward.

    prompt with images -> token ids (placeholders expanded) and fields (pixel values, grids, token types) of that row
    fields of some rows -> the arguments of one forward, for prompts of any length

Processors index a batch's pixel values by patch, tile, image or row, each in its own way. The fields of one row are
all of that row, whatever they are indexed by; so rows are processed one by one, and joined again as they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.nn.functional import pad
from trl import is_conversational, prepare_multimodal_messages


# one value a token of the prompt; TRL 1.16 gives the completion zeros
_TOKEN_FIELDS = ("token_type_ids", "mm_token_type_ids")
# per image or row, however many pixels it has: dimensions that differ between rows are padded with zeros, as the
# processors do within a batch
_PADDED = ("pixel_values", "pixel_attention_mask")
_IMAGE_FIELDS = (
    *_PADDED,
    "image_grid_thw",
    "image_sizes",
    "image_position_ids",
    "spatial_shapes",
    "num_images",
    "num_tiles",
)


@dataclass(frozen=True)
class RowImages:
    """The images of one prompt, as a processor has made them.

    Attributes:
        fields: its outputs for this prompt alone, on the CPU: `pixel_values`, `image_grid_thw`, `mm_token_type_ids`,
            ... A field of `_TOKEN_FIELDS` is (1, P), the others have the images, tiles, or patches in front.
        count: how many images the prompt has.
    """

    fields: Mapping[str, torch.Tensor]
    count: int


@dataclass(frozen=True)
class TeacherPrompts:
    """What the teacher reads before the completions of a batch; one entry a row.

    Attributes:
        ids: token ids.
        images: what the processor made of the prompt's images, None without any.
        useful: whether scoring the row is of use.
    """

    ids: list[list[int]]
    images: list[RowImages | None]
    useful: list[bool]


def row_images(images: Sequence[Sequence | None] | None, fields: Mapping[str, Any]) -> RowImages | None:
    """The images of a prompt that was tokenized alone; None where it has none.

    Args:
        images: a list of the one prompt's images, or None.
        fields: what the processor gave beside ids and mask, as tensors, arrays, or lists of these.
    """
    count = sum(len(own or ()) for own in images or ())
    if not count:
        return None
    tensors = {k: v if isinstance(v, torch.Tensor) else torch.from_numpy(np.asarray(v)) for k, v in fields.items()}
    return RowImages(tensors, count)


def forward_fields(
    rows: Sequence[RowImages | None], prompt_width: int, completion_ids: torch.Tensor
) -> dict[str, torch.Tensor | list[int]]:
    """The multimodal arguments of `_get_per_token_logps_and_entropies` for rows that go through the model together,
    none of them without images, or all of them; empty in the latter case.

    Shapes: token fields become (B, prompt_width + T), padded on the left as the prompts are; `completion_ids` (B, T).

    Raises:
        ValueError: rows with and without images.
    """
    own = [row for row in rows if row is not None]
    if not own:
        return {}
    if len(own) < len(rows):
        raise ValueError(f"{len(rows) - len(own)} of {len(rows)} rows have no images: score them apart from the rest.")
    fields: dict[str, Any] = {"num_images": [row.count for row in own]}
    for name in own[0].fields:
        values = [row.fields[name] for row in own]
        if name in _TOKEN_FIELDS:
            width = completion_ids.size(1)
            values = [pad(value, (prompt_width - value.size(1), width)) for value in values]
        elif name in _PADDED:
            values = _evened(values)
        fields[name] = torch.cat(values).to(completion_ids.device)
    pixels = [row.fields["pixel_values"] for row in own]
    if "spatial_shapes" in fields or (pixels[0].ndim == 4 and sum(map(len, pixels)) != sum(fields["num_images"])):
        fields["num_tiles"] = [len(value) for value in pixels]
    return fields


def _evened(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one shape but for the first dimension, zeros added behind."""
    sizes = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    return [
        pad(value, [n for size, own in zip(sizes[::-1], value.shape[:0:-1], strict=True) for n in (0, size - own)])
        for value in values
    ]


def prompt_with_images(row: Mapping[str, Any]) -> Any:
    """The prompt of a dataset row with the images of its column `image` or `images` in their places, as TRL does."""
    images = list(_images_of(row))
    if not images or not is_conversational(row):
        return row["prompt"]
    return prepare_multimodal_messages(row["prompt"], images=images)


def with_image_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their images as lists in `images`, empty where there are none: TRL 1.16 hands None on to processors,
    which refuse it, among rows with images and where no row of a batch has any."""
    if not any(name in row for row in rows for name in ("image", "images")):
        return rows
    return [{**row, "images": list(_images_of(row))} for row in rows]


def _images_of(row: Mapping[str, Any]) -> Sequence:
    return row.get("images") or ([row["image"]] if row.get("image") is not None else [])


def lacks_images(dataset: Any) -> bool | None:
    """Whether some rows of a dataset have no image where others may; None where that is not known before they are
    read: of a stream, and of images within prompts."""
    if dataset is None:
        return False
    if not isinstance(dataset, Dataset):
        return None
    name = next((name for name in ("images", "image") if name in dataset.column_names), None)
    column = None if name is None else dataset.data.column(name)
    if column is None:
        content = dataset.features["prompt"] if "prompt" in dataset.column_names else None
        return None if "Image" in repr(content) or "bytes" in repr(content) else False
    if column.null_count == len(column):
        return False
    lengths = pc.min(pc.list_value_length(column)).as_py() if name == "images" else 1
    return column.null_count > 0 or lengths == 0


def same_prompt(first: Any, second: Any) -> bool:
    """Whether two prompts are the same, pixels included; False where images cannot be compared."""
    try:
        return bool(first == second)
    except ValueError:  # arrays
        return False


def with_images_in_every_forward(fields: dict[str, Any], batch_size: int | None) -> tuple[dict[str, Any], int | None]:
    """TRL 1.16 gives a forward whose rows have no images the pixel values of none, which models refuse. Such fields
    are left out; where a batch is scored in chunks, they become large enough for each to have an image.

    Args:
        fields: the multimodal arguments of a batch.
        batch_size: rows of a chunk, None for all.
    """
    counts = fields.get("num_images")
    if not counts:
        return fields, batch_size
    if not any(counts):
        return {name: value for name, value in fields.items() if name not in _IMAGE_FIELDS}, batch_size
    rows = batch_size or len(counts)
    while not all(any(counts[start : start + rows]) for start in range(0, len(counts), rows)):
        rows *= 2
    return fields, rows
