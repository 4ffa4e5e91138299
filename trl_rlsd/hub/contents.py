"""What of a folder is published, and what stands in the way of it. Nothing here touches the network.

    folder -> {name in the repository: bytes or path}, names left out -> nothing, or a ValueError with a list

Of a folder only known files are taken, so what else a run leaves there (optimizer, rollouts, teacher,
training_args.bin) stays at home. Files that hold text are read here, once: what was checked is what is uploaded.
"""

from __future__ import annotations

import html
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from trl_rlsd.texts import DISTINCTIVE_CHARACTERS, squeeze


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_TOKENIZER_BINARY = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken")
# words of the language: "/tmp/x" may be one of them, a path of this machine is not
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")

_TEACHERS = ("teacher", "teacher_model", "ref", "ref_model")  # "ref" is TRL's adapter for the KL term
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # the last: torch.save
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|wandb_v1_\w{16,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|AKIA[0-9A-Z]{16}(?![A-Za-z0-9]))"
    r"|(?i:wandb|api)[\w-]*key\W{1,6}[0-9a-f]{40}\b"  # W&B's older keys; bare, they look like any commit
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@"
)
_PATH = re.compile(
    r"(?<![\w./:<-])/(?:home|root|Users|tmp|var|mnt|opt|srv|data|scratch|workspace|content|kaggle|media|nfs|gpfs|lustre|"
    r"private|usr|work)/[\w.]|(?<![A-Za-z])[A-Za-z]:\\{1,2}(?:Users|Windows|Temp|Documents and Settings)|file://\S"
)
# all that is looked for in a chat template, which tells a model of folders that its tools have (GPT-OSS: /mnt/data)
_HOME = re.compile(r"(?<![\w./:<-])/(?:home|root|Users)/[\w.]|(?<![A-Za-z])[A-Za-z]:\\{1,2}Users")
_TEMPLATE = re.compile(r"(?:chat_)?template=")
_ABSOLUTE = re.compile(r"/[\w.@+-]+(?:/[\w.@+-]+)+/?|\\\\[\w.-]+\\.+|[A-Za-z]:[\\/][^\n]*")
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")  # Markdown's, as card.text writes it
_SECRET_NAME = re.compile(r"(?:^|_|API)(?:TOKEN|KEY|SECRET|PASSWORD)(?:_|$)", re.IGNORECASE)

Files = dict[str, bytes | Path]


def select(folder: Path) -> tuple[Files, list[str]]:
    """The files of an adapter, or else of a full model, and what else stands in the folder.

    Raises:
        ValueError: there is no whole model in safetensors, or it is a teacher's.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name one that trainer.save_model wrote.")
    if is_teacher(folder.resolve().name):
        raise ValueError(f"{folder} holds a teacher, by its name; publish the folder of the trained model.")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    names += [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*.jinja")]
    weights = _adapter(names) or _model(folder, names)
    if not weights:
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl")) and "model" in name]
        what = f"{pickled[0]} is a pickle, which runs code when it is loaded" if pickled else "it holds no model"
        raise ValueError(
            f"{folder}: {what}; needed are {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, or {MODEL_CONFIG} and "
            f"{MODEL_WEIGHTS}: call trainer.save_model(folder)."
        )
    taken = weights + [name for name in names if _matches(name, _TOKENIZER + _TOKENIZER_BINARY)]
    binary = (*_TOKENIZER_BINARY, "*.safetensors")
    files: Files = {
        name: folder / name if _matches(name, binary) else (folder / name).read_bytes() for name in sorted(taken)
    }
    others = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
    kept = {name.split("/")[0] for name in files}
    return files, sorted(name for name in others if name.rstrip("/") not in kept)


def _adapter(names: list[str]) -> list[str]:
    needed = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    return needed if set(needed) <= set(names) else []


def _model(folder: Path, names: list[str]) -> list[str]:
    if MODEL_CONFIG not in names or ADAPTER_CONFIG in names:
        return []
    shards, in_shards = [MODEL_WEIGHTS], []
    if MODEL_INDEX in names:
        in_shards = sorted(set(json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    # saved in one file over a model that was sharded, it leaves the index; transformers loads the one file
    if in_shards and (MODEL_WEIGHTS in in_shards or MODEL_WEIGHTS not in names):
        missing = [name for name in in_shards if name not in names]
        if missing:
            raise ValueError(f"{folder}/{MODEL_INDEX} names {missing[0]}, which is not there; save the model again.")
        shards = [*in_shards, MODEL_INDEX]
    if not set(shards) <= set(names):
        return []
    return [MODEL_CONFIG, *shards, *(["generation_config.json"] if "generation_config.json" in names else [])]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def is_teacher(name: str) -> bool:
    """Whether a folder, or a part of a tensor's name, is that of weights that score and are not the model."""
    return name in _TEACHERS or name.startswith("rlsd_teacher")


def name_base_model(
    files: Files, base_model: str | None, folder: Path, record: Mapping[str, Any] | None
) -> str | None:
    """Put the base model's id where a config names it, in the copy that is uploaded, and return the id; None for a
    full model whose base is not known.

    Raises:
        ValueError: an adapter's base is known by a local path alone, or config and record disagree.
    """
    config = _json(files, ADAPTER_CONFIG if ADAPTER_CONFIG in files else MODEL_CONFIG)
    field = "base_model_name_or_path" if ADAPTER_CONFIG in files else "_name_or_path"
    named, of_record = config.get(field), (record or {}).get("base_model")
    # a relative folder such as out/checkpoint-100 looks like an id, and the record knows that it was none
    was_local = record is not None and "base_model" in record and of_record is None

    def on_hub(name: Any) -> bool:
        return is_hub_id(name) and not (was_local and name == named) and not _is_folder(name, folder)

    if not base_model:
        own = named if on_hub(named) else None
        if own and of_record and own != of_record:
            raise ValueError(
                f"{field} is {own!r}, rlsd_run.json says base_model {of_record!r}; pass the right one as base_model=."
            )
        base_model = own or of_record
    if not base_model and ADAPTER_CONFIG in files:
        why = "which is a local folder" if is_hub_id(named) else "which is no model of the Hub"
        raise ValueError(
            f"{ADAPTER_CONFIG}: base_model_name_or_path is {named!r}, {why}; pass base_model= "
            "(--base-model) with the id that others can load, e.g. 'Qwen/Qwen3-1.7B'."
        )
    if base_model and not is_hub_id(base_model):
        raise ValueError(f"base_model={base_model!r} is no id of a model on the Hub, such as 'Qwen/Qwen3-1.7B'.")
    for name in (ADAPTER_CONFIG, MODEL_CONFIG, "tokenizer_config.json"):
        if name in files:
            _replace_base(files, name, base_model, on_hub)
    return base_model


def is_hub_id(name: Any) -> bool:
    """Whether a name can be a repository's."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)?", name))


def _is_folder(name: str, folder: Path) -> bool:
    """Whether a name is a folder's, from here or from where the model may have been trained."""
    return any((place / name).is_dir() for place in (Path(), folder, *folder.resolve().parents))


def _replace_base(files: Files, name: str, base_model: str | None, on_hub: Callable[[Any], bool]) -> None:
    config = _json(files, name)
    for field in ("base_model_name_or_path", "_name_or_path", "name_or_path"):
        if field not in config or config[field] == base_model:
            continue
        if name == ADAPTER_CONFIG or not on_hub(config[field]):
            config[field] = base_model
            files[name] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _json(files: Files, name: str) -> dict[str, Any]:
    try:
        content = files[name]
        return json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error}); save the model and its tokenizer again.") from None


def check(files: Mapping[str, bytes | Path], *, private_texts: Iterable[str] = (), token: str | None = None) -> None:
    """Refuse what must not leave the machine: teacher weights, pickles, keys, paths, rows of the dataset.

    Raises:
        ValueError: with a line for each thing found. Keys and private texts are not repeated in it.
    """
    squeezed = {squeeze(text) for text in private_texts}
    private = {text for text in squeezed if len(text) >= DISTINCTIVE_CHARACTERS}
    secrets, places = _secrets(token), _places()
    found: list[str] = []
    for name, content in files.items():
        if isinstance(content, Path):
            found += _in_binary(name, content)
        elif not name.endswith(".png"):  # drawn by us, of numbers
            found += _in_text(name, content, private, secrets, places)
    if found:
        raise ValueError("Nothing was uploaded. In the way is:\n" + "\n".join(f"  - {line}" for line in found))


def _in_binary(name: str, path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE):
        yield f"{name} is a pickle, which runs code when it is loaded; save the model as safetensors."
    elif name.endswith(".safetensors"):
        yield from _in_weights(name, path)


def _in_weights(name: str, path: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as weights:
            tensors, notes = weights.keys(), weights.metadata() or {}
    except SafetensorError as error:
        yield f"{name} cannot be read as safetensors ({error}); save the model again."
        return
    teachers = [tensor for tensor in tensors if any(map(is_teacher, tensor.split(".")))]
    if teachers:
        yield (
            f"{name} holds teacher or reference weights ({len(teachers)} tensors, such as {teachers[0]}); save the "
            "trained adapter alone: model.save_pretrained(folder, selected_adapters=['default'])."
        )
    for key, value in notes.items():
        if _SECRET.search(f"{key}={value}") or _PATH.search(value):
            yield f"{name}: the metadata {key!r} holds a key or a path; save the model without it."


def _in_text(name: str, content: bytes, private: set[str], secrets: set[str], places: list[str]) -> Iterator[str]:
    try:
        strings = list(_strings(name, content.decode("utf-8")))
    except ValueError as error:
        yield f"{name} cannot be read ({error}); save the model and its tokenizer again."
        return
    if name == "README.md":  # as it is written, and as it is read
        strings.append(html.unescape(_ESCAPED.sub(r"\1", strings[0])))
    whole = "\n".join(strings)
    if (key := _SECRET.search(whole)) or any(secret in whole for secret in secrets):
        start = f" ({key.group()[:5]}...)" if key else ", the value of an environment variable or of this login"
        yield f"{name} holds what looks like a key{start}; remove it, and revoke the key if others saw it."
    path = next((place for place in places if re.search(re.escape(place) + r"[/\\]\w", whole)), None)
    if path is None and name not in _VOCABULARY:
        path = next(filter(None, (_path_in(name, string) for string in strings)), None)
    if path is not None:
        shown = path if len(path) < 80 else path[:40] + "..."
        yield f"{name} holds a path of a machine ({shown}); put an id of the Hub there, or remove it."
    squeezed = squeeze(whole)
    leaked = sum(text in squeezed for text in private)
    if leaked:
        yield f"{name} holds {leaked} of the dataset's prompts or privileged contexts; remove them from it."


def _path_in(name: str, string: str) -> str | None:
    """A string that is a path, or what stands in it from the path's start on."""
    if name.endswith(".json") and _ABSOLUTE.fullmatch(string.split("=", 1)[-1]):
        return string
    template = name.endswith(".jinja") or _TEMPLATE.match(string)
    found = (_HOME if template else _PATH).search(string)
    return string[found.start() :].split()[0] if found else None


def _strings(name: str, text: str) -> Iterator[str]:
    """A text's own strings: of JSON the values as `key=value`, unescaped, as whoever loads them reads them."""
    if not name.endswith(".json"):
        yield text
        return
    stack: list[Any] = [json.loads(text)]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            for key, value in node.items():
                stack.append(f"{key}={value}" if isinstance(value, str) else key)
                if not isinstance(value, str):
                    stack.append(value)


def _secrets(token: str | None) -> set[str]:
    """The keys that this process knows of."""
    known = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)} | {token, get_token()}
    return {value for value in known if value and len(value) >= 16}


def _places() -> list[str]:
    """Folders that only this machine has."""
    places = (str(Path.home()), os.getcwd(), tempfile.gettempdir())
    return [place.rstrip("/\\") for place in places if len(place) > 3]
