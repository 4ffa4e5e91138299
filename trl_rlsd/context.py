"""What a privileged context may be: text, or text with images.

    a column's value, or what an environment returns -> a text, a list of content parts, or None

Messages become one text, or one list of parts: the context goes into the student's last user message and takes no
turn of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import iscoroutinefunction
from io import BytesIO
from typing import Any


Part = dict[str, Any]
Context = str | list[Part]


def read_context(value: Any, source: str, *, images: bool = False) -> Context | None:
    """The context that a value holds; None where it holds none (None, `""`, `[]`).

    One message gives its content, several give `role: content` blocks. Text parts that stand together become one, and
    keys without a value are dropped: a table of a dataset fills every part with the keys of all.

    Args:
        value: a string, a list of messages with 'content', or a list of content parts.
        source: where it comes from, for error messages.
        images: whether the model reads images.

    Raises:
        TypeError: it holds something else, or images that the model does not read.
    """
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, Sequence) or not all(
        isinstance(m, Mapping) and {"content", "type"} & set(m) for m in value
    ):
        raise TypeError(
            f"{source} holds {type(value).__name__} ({value!r:.80}). It must be a string or a list of messages with "
            "'content'; convert it, e.g. with `dataset.map`."
        )
    parts: list[Part] = []
    if all("content" in message for message in value):
        for message in value:
            if len(value) > 1:
                parts.append(_text(f"{chr(10) * 2 if parts else ''}{message.get('role', 'message')}: "))
            parts += _parts(message["content"], source, images)
    else:
        parts = _parts(value, source, images)
    parts = merged(parts)
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts or None


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _parts(content: Any, source: str, images: bool) -> list[Part]:
    if isinstance(content, str):
        return [_text(content)]
    parts = []
    for part in content if isinstance(content, Sequence) else [content]:
        given = {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
        if given.get("type") == "text" and isinstance(given.get("text"), str):
            parts.append(_text(given["text"]))
        elif given.get("type") == "image" and "image" in given and images:
            parts.append({"type": "image", "image": given["image"]})
        elif given.get("type") == "image" and "image" in given:
            raise TypeError(
                f"{source} holds an image, but processing_class is a tokenizer. Pass the processor of a "
                "vision-language model, or take the image out."
            )
        else:
            raise TypeError(
                f"{source} holds a message whose content is neither a string nor a list of text and image parts: "
                f"{content!r:.80}."
            )
    return parts


def merged(parts: Iterable[Part]) -> list[Part]:
    """The parts, neighbouring texts joined and empty ones left out."""
    joined: list[Part] = []
    for part in parts:
        if part["type"] != "text":
            joined.append(part)
        elif joined and joined[-1]["type"] == "text":
            joined[-1] = _text(joined[-1]["text"] + part["text"])
        elif part["text"]:
            joined.append(_text(part["text"]))
    return joined


def texts_in(context: Context | None) -> list[str]:
    """The texts of a context, between its images."""
    if context is None or isinstance(context, str):
        return [context] if context else []
    return [part["text"] for part in context if part["type"] == "text"]


def text_in(context: Context | None) -> str | None:
    """The text of a context without its images; None for no context."""
    return None if context is None else "\n".join(texts_in(context))


def images_in(context: Context | None) -> int:
    """How many images a context has."""
    return sum(part["type"] == "image" for part in context) if isinstance(context, list) else 0


def opened(part: Part) -> Part:
    """An image part with its image decoded: a nested column of a dataset holds bytes or a path.

    Raises:
        TypeError: it holds neither: datasets 5.2 keeps of a nested image that `map` returns its attributes alone.
    """
    image = part.get("image")
    if not isinstance(image, Mapping):
        return part
    if not (image.get("bytes") or image.get("path")):
        raise TypeError(
            f"An image part of a privileged context holds no pixels ({image!r:.80}). Declare the column's features "
            "when the dataset is made, with `datasets.Image()` for the image, e.g. `dataset.map(..., features=...)`."
        )
    from PIL import Image  # torch alone is needed for text

    return {**part, "image": Image.open(BytesIO(image["bytes"]) if image.get("bytes") else image["path"])}


# What an environment may define next to TRL's `get_reward`. Called once per rollout that is trained on, after the
# reward: what it returns is the rollout's own privileged context.
ENVIRONMENT_METHOD = "get_privileged_context"


def gives_context(environment: Any) -> bool:
    """Whether an environment has privileged context of its own.

    Raises:
        TypeError: its method is async, or no method.
    """
    method = getattr(environment, ENVIRONMENT_METHOD, None)
    if method is None:
        return False
    if not callable(method) or iscoroutinefunction(method):
        raise TypeError(
            f"{type(environment).__name__}.{ENVIRONMENT_METHOD} must be a plain method without arguments that returns "
            "a string, a list of messages or content parts, or None; it is "
            f"{'async' if callable(method) else type(method).__name__}."
        )
    return True


def environment_context(environment: Any, *, images: bool = False) -> Context | None:
    """What an environment says after its rollout. Raises: TypeError, see `read_context`."""
    source = f"{type(environment).__name__}.{ENVIRONMENT_METHOD}()"
    return read_context(getattr(environment, ENVIRONMENT_METHOD)(), source, images=images)
