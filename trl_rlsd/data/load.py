"""Rows for RLSDTrainer from datasets as they are: a prompt, the privileged context, and what the rewards read.

    load_rows("openai/gsm8k")
    load_rows("data.jsonl", columns={"prompt": "question", "answer": "target"}, prompt_template="math")
    load_rows(dataset, preset="gsm8k", privileged=("answer",), contamination="drop")
    load_rows("xlangai/spider", database_root="spider/database")
    load_rows("reasoning_gym:chain_sum", size=200, seed=1, max_digits=1)

A preset (`trl_rlsd.data.presets`) says how a dataset's columns are read; without one, `columns` says it.
"""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)

from trl_rlsd.data import CUT_COLUMN
from trl_rlsd.data.contamination import Contamination, clean, contaminated_rows, given_away, prompt_text
from trl_rlsd.data.presets import (
    PRESETS,
    TEMPLATES,
    Field,
    Preset,
    column,
    fitting_presets,
    get_preset,
    preset_of_columns,
    presets_for,
)
from trl_rlsd.data.privileged import KINDS, Documents, as_text, privileged_context
from trl_rlsd.data.reasoning_gym import reasoning_gym_dataset


FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
GYM = "reasoning_gym:"  # begins the name of a source
_GIVEN_AWAY = "given_away"  # why a row is not clean; no column of the rows that are returned
_TEXT = Value("string")
_MESSAGES = List({"role": _TEXT, "content": _TEXT})
# what our columns are called elsewhere, for suggestions
_ELSEWHERE = {
    "prompt": ("question", "problem", "query", "instruction", "input", "text"),
    "answer": ("target", "final_answer", "ground_truth", "solution", "label", "output", "response"),
    "trace": ("solution", "reasoning", "cot", "rationale", "explanation", "response"),
    "query": ("sql", "answer", "target"),
    "schema": ("context", "sql_context", "create_table", "ddl"),
    "tests": ("test_list", "test", "test_cases", "input_output"),
}


def load_rows(
    source: str | Path | Dataset | DatasetDict,
    *,
    preset: str | Preset | None = None,
    columns: Mapping[str, str] | None = None,
    privileged: str | Sequence[str] | Mapping[str, str] | None = None,
    documents: str | Sequence[str] | Documents | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = True,
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    keep: str | Sequence[str] = (),
    contamination: str = "refuse",
    **options: Any,
) -> Dataset:
    """Rows with `prompt`, `privileged_context` and the columns that a reward reads.

    A row with nothing privileged has None there and keeps plain GRPO credit. Rows that have both columns already need
    no preset and keep all their columns.

    Args:
        source: an id on the Hub, a .json, .jsonl, .parquet or .csv file (wildcards work; a CSV file's columns are
            text), a dataset, or `reasoning_gym:` and a name, with `size` (1000), `seed` and its own options.
        preset: a name in `PRESETS`, a [`Preset`], or its dotted path. [the one that knows the id on the Hub]
        columns: our names -> the dataset's columns, without a preset or over one's own: `prompt`, `answer`, `trace`,
            `tests`, `schema`, others that the reward reads. How a preset reads a single column stays.
        privileged: kinds of privileged context, or kinds -> columns. [the preset's; else answer and trace]
        documents: columns with documents; [`Documents`] for files or a budget of tokens, which makes a column
            `privileged_tokens_cut`.
        prompt_template: a name in `TEMPLATES`, or a format string of its fields. [the preset's, else {prompt}]
        split: of a dataset on the Hub; a file has `train` alone. `config`: its configuration.
        limit: the first so many rows only.
        keep: further columns to keep.
        contamination: `"refuse"`, `"drop"` or `"ignore"` rows whose prompt holds privileged text.
        options: what a preset needs, such as `database_root`.

    Raises: ValueError or TypeError, naming what is missing or wrong, and the fix.
    """
    request = Request(
        columns, privileged, documents, prompt_template, system_prompt, conversational, keep, contamination
    )
    if isinstance(source, str) and source.startswith(GYM):
        return _gym_rows(source, request, {"preset": preset, "config": config}, split, limit, options)
    known = presets_for(source) if isinstance(source, str) else []
    presets = [get_preset(preset)] if preset is not None else known if columns is None else []
    config = config or next((p.config for p in presets if p in known), None)
    dataset = _start(read_source(source, split, config), limit, source)
    if not presets and request.shapes_nothing and {"prompt", "privileged_context"} <= set(dataset.column_names):
        return clean(dataset, contaminated_rows(dataset), contamination)
    return make_rows(dataset, make_recipe(dataset, presets, request, options, source))


@dataclass(frozen=True)
class Request:
    """What `load_rows` was asked for, of any source."""

    columns: Mapping[str, str] | None = None
    privileged: str | Sequence[str] | Mapping[str, str] | None = None
    documents: str | Sequence[str] | Documents | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    conversational: bool = True
    keep: str | Sequence[str] = ()
    contamination: str = "refuse"

    def __post_init__(self):
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        if self.contamination not in ("refuse", "drop", "ignore"):
            raise ValueError(f"contamination={self.contamination!r} is none of 'refuse', 'drop' and 'ignore'.")
        if self.system_prompt and not self.conversational:
            raise ValueError("system_prompt needs conversational=True. Or write it into prompt_template.")

    @property
    def shapes_nothing(self) -> bool:
        return replace(self, contamination="refuse") == Request()


@dataclass(frozen=True)
class Recipe:
    """How a row is made; called with a row of the dataset and its number."""

    preset: Preset
    kinds: tuple[str, ...]
    template: str
    documents: Documents | None
    request: Request
    options: Mapping[str, Any]

    @property
    def placeholders(self) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]

    @property
    def computed(self) -> dict[str, Field]:
        """The kept columns that are made anew."""
        return {name: self.preset.fields[name] for name in self.preset.kept if self.preset.fields[name].read}

    @property
    def read(self) -> dict[str, Field]:
        """The fields that are read of each row. Columns kept as they are do not count: no image is decoded."""
        names = [*self.placeholders, *(self.preset.kinds[kind] for kind in self.kinds)]
        return {name: self.preset.fields[name] for name in names} | self.computed

    def untouched(self, there: Collection[str]) -> dict[str, str]:
        """The columns that are kept as they are, by their names in the rows."""
        fields = {name: self.preset.fields[name] for name in self.preset.kept if name not in self.computed}
        columns = {name: (*field.columns, *field.optional)[0] for name, field in fields.items()}
        return {name: c for name, c in columns.items() if c in there} | {name: name for name in self.request.keep}

    def features(self, there: Features) -> Features:
        """The types of what a call returns: the first rows alone may not tell them."""
        prompt = self.preset.fields["prompt"]
        asked = None if prompt.read else there[prompt.columns[0]]
        talks = self.request.conversational
        features = {
            "prompt": _TEXT if not talks else _MESSAGES if asked is None or isinstance(asked, Value) else asked,
            "privileged_context": _TEXT,
            CUT_COLUMN: Value("int64"),
            _GIVEN_AWAY: _TEXT,
        }
        return Features(features | {name: List(_TEXT) if f.many else _TEXT for name, f in self.computed.items()})

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            values = {name: field.value(name, row, self.options) for name, field in self.read.items()}
            parts = {kind: as_text(values[self.preset.kinds[kind]]) for kind in self.kinds}
            parts["documents"], cut = self.documents.read(row) if self.documents else (None, 0)
            prompt = self._prompt(values)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
        leak = None if self.request.contamination == "ignore" else given_away(prompt_text(prompt), parts)
        return {
            "prompt": prompt,
            "privileged_context": privileged_context(parts),
            CUT_COLUMN: cut,
            _GIVEN_AWAY: leak and ": ".join(leak),
            **{name: values[name] for name in self.computed},
        }

    def _prompt(self, values: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        question, system = values["prompt"], self.request.system_prompt
        before = [{"role": "system", "content": system}] if system else []
        if not question or (isinstance(question, str) and not question.strip()):
            raise ValueError(f"the prompt is empty ({_quoted(self.preset.fields['prompt'].columns)}).")
        if isinstance(question, list):  # messages already
            if not self.request.conversational or self.template != "{prompt}":
                raise ValueError("the prompt is a conversation: it takes no prompt_template and is not made plain.")
            if system and any(message["role"] == "system" for message in question):
                raise ValueError("the prompt has a system message already. Leave system_prompt out.")
            return [*before, *question]
        text = self.template.format(**{name: as_text(values[name]) or "" for name in self.placeholders})
        if not self.request.conversational:
            return text
        return [*before, {"role": "user", "content": text}]


def make_recipe(
    dataset: Dataset, presets: Sequence[Preset], request: Request, options: Mapping[str, Any], source: Any
) -> Recipe:
    """How the rows of a dataset are made; of several presets the first that its columns fit.

    Raises: ValueError or TypeError, where they cannot be made so.
    """
    there = dataset.column_names
    if presets:
        preset = next((p for p in presets if p.fits(there)), presets[0])
        for name, value in (request.columns or {}).items():
            preset = preset.with_column(name, value)
    else:
        preset = _own_preset(there, request.columns, source)
    preset, kinds = _privileged(preset, request)
    documents = request.documents
    if documents is not None and not isinstance(documents, Documents):
        documents = Documents(documents)
    template = preset.template if request.prompt_template is None else request.prompt_template
    recipe = Recipe(preset, kinds, TEMPLATES.get(template, template), documents, request, dict(options))
    _check_template(recipe)
    _check_columns(recipe, dataset.features, source)
    needed = {option for field in recipe.read.values() for option in field.options}
    if missing := sorted(needed - set(options)):
        raise ValueError(f"Preset {preset.name!r} needs {missing[0]}=: load_rows(..., {missing[0]}='path').")
    if unknown := sorted(set(options) - needed):
        raise TypeError(f"load_rows() has no argument {unknown[0]!r}, and preset {preset.name!r} does not take it.")
    return recipe


def make_rows(dataset: Dataset, recipe: Recipe) -> Dataset:
    """The rows. Raises: ValueError, where none has privileged context, or a prompt gives it away."""
    there = dataset.column_names
    read = {c for field in recipe.read.values() for c in (*field.columns, *field.optional)}
    read |= {*recipe.documents.columns, *recipe.documents.files} if recipe.documents else set()
    source = dataset.select_columns([c for c in there if c in read])
    made = source.map(
        recipe,
        with_indices=True,
        remove_columns=source.column_names,
        features=recipe.features(dataset.features),
        load_from_cache_file=False,  # it knows neither the documents' files nor the version of this package
        desc="Making rows",
    )
    asked = ["privileged_context"] if recipe.kinds or recipe.documents else []
    if empty := [name for name in (*recipe.computed, *asked) if all(value is None for value in made[name])]:
        raise ValueError(
            f"No row has {empty[0]}: preset {recipe.preset.name!r} finds none in {_quoted(source.column_names)}. Is "
            f"it right? Name columns in columns=, kinds in privileged= (now {_quoted(recipe.kinds) or 'none'})."
        )
    leaks = [Contamination(i, *said.split(": ", 1)) for i, said in enumerate(made[_GIVEN_AWAY]) if said is not None]
    counts = recipe.documents is not None and recipe.documents.budget is not None
    made = made.remove_columns([_GIVEN_AWAY] if counts else [_GIVEN_AWAY, CUT_COLUMN])
    kept = [
        dataset.select_columns([c]) if c == name else dataset.select_columns([c]).rename_column(c, name)
        for name, c in recipe.untouched(there).items()
    ]
    return clean(concatenate_datasets([made, *kept], axis=1), leaks, recipe.request.contamination)


def read_source(source: str | Path | Dataset | DatasetDict, split: str, config: str | None = None) -> Dataset:
    """A split from the Hub, of files, or of datasets in memory.

    Raises:
        ValueError: there is no such file or split. TypeError: a stream.
    """
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise TypeError(
            f"{type(source).__name__}: load_rows reads all rows to check them, and a stream has no end. Load it "
            "without streaming, or take a part: Dataset.from_list(list(stream.take(10_000)))."
        )
    if isinstance(source, Dataset):
        return source
    if not isinstance(source, DatasetDict):
        suffix = Path(source).suffix.lower()
        if suffix not in FORMATS:
            return load_dataset(str(source), name=config, split=split)
        files = sorted(glob.glob(str(source)))
        if not files:
            raise ValueError(f"source={str(source)!r}: there is no such file (looked from {os.getcwd()}).")
        how = _as_it_stands(files) if suffix == ".csv" else {}
        source = load_dataset(FORMATS[suffix], data_files=files, **how)
    if split not in source:
        raise ValueError(f"split={split!r} is not there; there is {_quoted(source)}.")
    return source[split]


def _as_it_stands(files: list[str]) -> dict[str, Any]:
    """Read a CSV file's cells as text: 007 would become 7.0, and the word None nothing at all."""
    with open(files[0], encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    return {"features": Features(dict.fromkeys(header, _TEXT)), "keep_default_na": False, "na_values": [""]}


def _start(dataset: Dataset, limit: int | None, source: Any) -> Dataset:
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give a number of rows from 1 on, or None for all.")
    if not len(dataset):
        raise ValueError(f"{_called(source)} has no rows.")
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _gym_rows(
    source: str, request: Request, others: dict[str, Any], split: str, limit: int | None, options: dict[str, Any]
) -> Dataset:
    plain = Request(system_prompt=request.system_prompt, contamination=request.contamination)
    refused = [name for name, value in others.items() if value is not None]
    refused += [name for name, value in vars(request).items() if value != getattr(plain, name)]
    refused += ["split"] if split != "train" else []
    if refused:
        raise ValueError(f"{refused[0]} does not apply to source={source!r}, whose rows come ready. Leave it out.")
    options = {"size": limit or 1000, "system_prompt": request.system_prompt, **options}
    rows = _start(reasoning_gym_dataset(source.removeprefix(GYM), **options), limit, source)
    return clean(rows, contaminated_rows(rows), request.contamination)


def _own_preset(there: Collection[str], columns: Mapping[str, str] | None, source: Any) -> Preset:
    if "documents" in (columns or {}):
        raise ValueError("columns has 'documents', which is an argument of its own: documents='column'.")
    if "prompt" not in (columns or {}) and "prompt" not in there:
        raise _missing(["prompt"] if columns else ["prompt", "answer"], there, source)
    if columns:
        return preset_of_columns({"prompt": "prompt", **columns})
    return preset_of_columns({c: c for c in there if c != "privileged_context"}, only_read=("prompt",))


def _privileged(preset: Preset, request: Request) -> tuple[Preset, tuple[str, ...]]:
    """The kinds to use, and the preset with the columns that they were given."""
    chosen = request.privileged
    if isinstance(chosen, Mapping):
        fields = {f"privileged {kind}": column(c) for kind, c in chosen.items()}
        preset = replace(preset, fields={**preset.fields, **fields}, kinds=dict(zip(chosen, fields, strict=True)))
    kinds = preset.default_kinds if chosen is None else (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if "documents" in kinds and request.documents is None:
        raise ValueError("privileged has 'documents', but there are none. Name their columns: documents='column'.")
    kinds = tuple(kind for kind in kinds if kind != "documents")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"privileged={chosen!r}: {kind!r} is not a kind; the kinds are {_quoted(KINDS)}.")
        if kind not in preset.kinds:
            raise ValueError(
                f"privileged={chosen!r}: preset {preset.name!r} has no {kind!r}; it has "
                f"{_quoted(preset.kinds) or 'none'}. Name its column: privileged={{{kind!r}: 'column'}}."
            )
    if not kinds and chosen is None and request.documents is None:
        raise ValueError(
            "Nothing is privileged. Name kinds and their columns: privileged={'answer': 'column'}, or documents=; "
            "privileged=() makes rows for plain GRPO."
        )
    return preset, kinds


def _check_template(recipe: Recipe) -> None:
    try:
        parts = [part[1:] for part in Formatter().parse(recipe.template) if part[1] is not None]
        wrong = [name for name, spec, conversion in parts if name not in recipe.preset.fields or spec or conversion]
    except ValueError as error:
        parts, wrong = [], [str(error)]
    if wrong or "prompt" not in [name for name, _, _ in parts]:
        fault = f"{wrong[0]!r} is no field" if wrong else "{prompt} is missing"
        raise ValueError(
            f"prompt_template={recipe.template!r}: {fault}. Use {{prompt}} and other fields of preset "
            f"{recipe.preset.name!r} ({_quoted(recipe.preset.fields)}), or a name ({_quoted(TEMPLATES)}). Double the "
            "braces that are meant literally."
        )


def _check_columns(recipe: Recipe, there: Features, source: Any) -> None:
    request, documents = recipe.request, recipe.documents
    named = [*request.keep, *(request.privileged.values() if isinstance(request.privileged, Mapping) else ())]
    if documents:
        named += [*documents.columns, *(f for f in documents.files if not Path(documents.root, f).is_file())]
    if lost := [c for c in named if c not in there]:
        raise ValueError(f"{_called(source)} has no column {lost[0]!r}, which was named; it has {_quoted(there)}.")
    fields = recipe.read | {name: recipe.preset.fields[name] for name in recipe.preset.kept}
    if missing := [name for name, field in fields.items() if field.missing(there)]:
        raise _missing(missing, there, source, recipe.preset)
    if clash := {*recipe.features(there), *recipe.preset.kept} & set(request.keep):
        raise ValueError(f"keep has {clash.pop()!r}, which the rows have anyway, or have another of. Leave it out.")
    for name in (c for field in fields.values() for c in (*field.columns, *field.optional)):
        kind = getattr(there.get(name), "dtype", None)
        if isinstance(kind, str) and kind.startswith(("timestamp", "date")):
            raise ValueError(
                f"Column {name!r} of {_called(source)} was read as {kind}, and its text is lost. Give it as text: a "
                "string column of a Parquet file or of a dataset; in JSON, what looks like a date becomes one."
            )


def _missing(names: Sequence[str], there: Collection[str], source: Any, preset: Preset | None = None) -> ValueError:
    """What to say where columns are not there: which are, and what map would fit."""
    wanted = {name: preset.fields[name].missing(there) if preset else [name] for name in names}
    lost = {c: _guess(name, c, there) for name, columns in reversed(wanted.items()) for c in columns}
    reader = f"preset {preset.name!r} reads" if preset and preset.name in PRESETS else "the rows are made of"
    fits = [repr(p.name) for p in fitting_presets(there)]
    fit = f"These fit preset={' or '.join(fits)}. " if fits else ""
    guesses = {name: lost[columns[0]] for name, columns in wanted.items()}
    return ValueError(
        f"{_called(source)} has no column {_quoted([*lost][::-1])}, which {reader}; it has {_quoted(there)}. "
        f"{fit}Name them: columns={guesses}."
    )


def _guess(name: str, wanted: str, there: Collection[str]) -> str:
    folded = {c.casefold(): c for c in there}
    others = (wanted.casefold(), name, *_ELSEWHERE.get(name, ()))
    close = (near for other in others for near in get_close_matches(other, folded, n=1, cutoff=0.75))
    exact = (other for other in others if other in folded)
    return folded.get(next(exact, None) or next(close, None), "...")


def _called(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "The dataset"


def _quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))
