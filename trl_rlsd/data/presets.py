"""Known datasets: which of their columns make the prompt, the reward's columns and the privileged context.

Column names were checked against the datasets' cards or code that reads them; where that was not possible the preset
says so.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trl_rlsd.data.privileged import KINDS
from trl_rlsd.data.readers import (
    apps_form,
    asserts,
    bird_hint,
    boxed,
    dapo_question,
    database_file,
    database_schema,
    first_correct,
    first_solution,
    first_test,
    function_body,
    ground_truth,
    gsm8k_answer,
    gsm8k_trace,
    humaneval_tests,
    untagged,
    without_image_tags,
)
from trl_rlsd.dotted import find


# what prompts say about the form of the answer, by domain, for the rewards of the same name
_PROGRAM = "Give the whole program in a ```python block."
TEMPLATES = {
    "math": "{prompt}\n\nReason step by step and put the final answer in \\boxed{{}}.",
    "sql": "{prompt}\n\nDatabase schema:\n{schema}\n\nGive the SQL query in a ```sql block.",
    "code": "{prompt}\n\n" + _PROGRAM,
}


@dataclass(frozen=True)
class Field:
    """A value of a row, read from columns of the dataset.

    Args:
        columns: that it is read from.
        read: their values -> its value; None takes the one column as it is.
        optional: further columns for `read`; None where the dataset has no such column.
        options: keywords of `load_rows` that `read` takes too.
        many: `read` returns a list of strings, not a string.
    """

    columns: tuple[str, ...]
    read: Callable[..., Any] | None = None
    optional: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    many: bool = False

    def missing(self, there: Collection[str]) -> list[str]:
        """Its columns that a dataset lacks."""
        return [column for column in self.columns if column not in there]

    def value(self, name: str, row: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Its value in a row, which may lack the optional columns. Raises: ValueError, naming it."""
        values = [row.get(column) for column in (*self.columns, *self.optional)]
        if self.read is None:
            return values[0]
        try:
            return self.read(*values, **{option: options[option] for option in self.options})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, sqlite3.Error) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name!r} cannot be read from {', '.join(map(repr, self.columns))}: {said}") from error


def column(name: str) -> Field:
    """A column taken as it is."""
    return Field((name,))


@dataclass(frozen=True)
class Preset:
    """How rows are made from a dataset's columns.

    Args:
        name: in `PRESETS`.
        fields: all values that a row can be made of, by name; `prompt` is the question.
        kept: the fields that stay in the rows, for rewards and processors.
        kinds: of privileged context: the field of each.
        default_kinds: those that are used unless `load_rows` is told otherwise. Long traces of a model are not among
            them: the teacher would read thousands of tokens more for each prompt.
        template: of the prompt; its placeholders are fields.
        reward: name of a reward that reads these rows, with `reward_options`.
        sources: ids on the Hub.
        config: the configuration to load from the Hub, where there is more than one.
    """

    name: str
    fields: Mapping[str, Field]
    kept: tuple[str, ...]
    kinds: Mapping[str, str]
    default_kinds: tuple[str, ...] = ("answer",)
    template: str = "{prompt}"
    reward: str | None = None
    reward_options: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    config: str | None = None

    def fits(self, there: Collection[str]) -> bool:
        """Whether a dataset with these columns has those that the preset reads by default."""
        names = {"prompt", *self.kept, *(self.kinds[kind] for kind in self.default_kinds)}
        return not any(self.fields[name].missing(there) for name in names)

    def with_column(self, name: str, of: str) -> Preset:
        """With one field read from another column. A new one is kept, unless it is a trace, which is used."""
        old = self.fields.get(name)
        one = old is not None and len((*old.columns, *old.optional)) == 1 and not old.options
        fields = {**self.fields, name: replace(old, columns=(of,), optional=()) if one else column(of)}
        kinds = {**self.kinds, **({name: name} if name in KINDS else {})}
        kept = (*self.kept, name) if old is None and name != "trace" else self.kept
        new = (name,) if name in ("answer", "trace") and name not in self.kinds else ()
        return replace(self, fields=fields, kinds=kinds, kept=kept, default_kinds=(*self.default_kinds, *new))


def presets_for(source: str) -> list[Preset]:
    """The presets that know a dataset of the Hub; several where its configurations differ in columns."""
    return [preset for preset in PRESETS.values() if source.lower() in map(str.lower, preset.sources)]


def fitting_presets(there: Collection[str]) -> list[Preset]:
    """The presets whose every column a dataset has, the one with most of them first."""
    columns = {
        name: {c for field in preset.fields.values() for c in (*field.columns, *field.optional)}
        for name, preset in PRESETS.items()
    }
    fitting = [name for name in PRESETS if columns[name] <= set(there)]
    return [PRESETS[name] for name in sorted(fitting, key=lambda name: -len(columns[name]))]


def preset_of_columns(columns: Mapping[str, str], only_read: Collection[str] = ("prompt", "trace")) -> Preset:
    """Of our names -> a dataset's columns, each taken as it is; those that are not only read are kept."""
    kinds = {kind: kind for kind in KINDS if kind in columns}
    kept = tuple(name for name in columns if name not in only_read)
    default = tuple(kind for kind in ("answer", "trace") if kind in kinds)
    return Preset("columns", {name: column(c) for name, c in columns.items()}, kept, kinds, default)


def get_preset(preset: str | Preset) -> Preset:
    """A preset by name or by the dotted path of one of your own.

    Raises: ValueError, where there is none.
    """
    if isinstance(preset, Preset):
        return preset
    if preset in PRESETS:
        return PRESETS[preset]
    fix = f"Give one of {', '.join(PRESETS)}, a Preset, or the dotted path of one."
    try:
        found = find(preset)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"preset={preset!r} cannot be loaded: {error}. {fix}") from error
    if not isinstance(found, Preset):
        raise ValueError(f"preset={preset!r} is not a preset. {fix}")
    return found


def _math(name: str, prompt: Field, answer: Field, trace: Field | None = None, **more: Any) -> Preset:
    fields = {"prompt": prompt, "answer": answer, **({"trace": trace} if trace else {})}
    images = {column: Field((), optional=(column,)) for column in more.pop("images", ())}
    return Preset(
        name,
        {**fields, **images},
        kept=("answer", *images),
        kinds={kind: kind for kind in ("answer", "trace") if kind in fields},
        template=TEMPLATES["math"],
        reward="math_reward",
        **more,
    )


def _sql(name: str, fields: Mapping[str, Field], **more: Any) -> Preset:
    fields = {"prompt": column("question"), **fields}
    if "schema" in more["kept"]:
        more["reward_options"] = {"schema_column": "schema"}
    else:
        fields["database"] = Field(("db_id",), database_file, options=("database_root",))
        fields["schema"] = Field(("db_id",), database_schema, options=("database_root",))
    kinds = {"answer": "query", "schema": "schema", **({"trace": "trace"} if "trace" in fields else {})}
    return Preset(name, fields, kinds=kinds, reward="sql_reward", **{"template": TEMPLATES["sql"], **more})


def _code(name: str, fields: Mapping[str, Field], template: str, **more: Any) -> Preset:
    kinds = {"answer": "solution", "tests": "tests"}
    return Preset(name, fields, ("tests",), kinds, template=f"{template}\n\n{_PROGRAM}", reward="code_reward", **more)


def _mbpp(config: str, text: str, setup: str) -> Preset:
    # the texts do not name the function: the first test does
    fields = {
        "prompt": column(text),
        "solution": column("code"),
        "tests": Field(("test_list",), asserts, (setup,), many=True),
        "first_test": Field(("test_list",), first_test),
    }
    template = "{prompt}\n\nOne of the tests:\n```python\n{first_test}\n```"
    return _code(f"mbpp_{config}", fields, template, sources=("google-research-datasets/mbpp",), config=config)


_PRESETS = (
    _math(
        "gsm8k",
        column("question"),
        Field(("answer",), gsm8k_answer),
        Field(("answer",), gsm8k_trace),
        default_kinds=("answer", "trace"),
        sources=("openai/gsm8k",),
        config="main",
    ),
    # Hendrycks' MATH: the answer stands in the solution. EleutherAI's has one configuration for each subject.
    _math(
        "math",
        column("problem"),
        Field(("solution",), boxed),
        column("solution"),
        default_kinds=("answer", "trace"),
        sources=("EleutherAI/hendrycks_math", "Dahoas/MATH"),
    ),
    # the answer in a column of its own
    _math(
        "math_answer",
        column("problem"),
        column("answer"),
        column("solution"),
        default_kinds=("answer", "trace"),
        sources=("HuggingFaceH4/MATH-500", "agentica-org/DeepScaleR-Preview-Dataset"),
    ),
    # traces: the generations of DeepSeek-R1 that were verified, thousands of tokens long
    _math(
        "openr1_math",
        column("problem"),
        column("answer"),
        Field(("generations", "correctness_math_verify"), first_correct, ("correctness_llama",)),
        sources=("open-r1/OpenR1-Math-220k",),
    ),
    # answers only; this one holds each problem about a hundred times, open-r1's holds it once
    _math(
        "dapo_math",
        Field(("prompt",), dapo_question),
        Field(("reward_model",), ground_truth),
        sources=("BytedTsinghua-SIA/DAPO-Math-17k",),
    ),
    _math(
        "dapo_math_processed",
        Field(("prompt",), dapo_question),
        column("solution"),
        sources=("open-r1/DAPO-Math-17k-Processed",),
        config="all",
    ),
    # The paper's data (arXiv:2604.03128) as its authors published it: their code reads problem, answer and images, and
    # takes the answer as privileged context. The name of a column with traces is not confirmed: give it in `columns`.
    _math(
        "rlsd_mmfinereason",
        Field(("problem",), without_image_tags),
        column("answer"),
        images=("images",),
        sources=("iieycx/rlsd-train-MMFineReason-123K",),
    ),
    # where that comes from; traces: outputs of Qwen3-VL-235B-A22B-Thinking, 2,910 tokens on average
    _math(
        "mmfinereason",
        Field(("question",), without_image_tags),
        column("answer"),
        Field(("qwen3vl_235b_thinking_response",), untagged),
        images=("image",),
        sources=tuple(
            f"OpenDataArena/MMFineReason-{part}" + end
            for part in ("SFT-123K", "1.8M")
            for end in ("", "-Qwen3-VL-235B-Thinking")
        ),
    ),
    _sql(
        "synthetic_text_to_sql",
        {
            "prompt": column("sql_prompt"),
            "query": column("sql"),
            "schema": column("sql_context"),
            "trace": column("sql_explanation"),
        },
        kept=("query", "schema"),
        default_kinds=("answer", "trace"),
        sources=("gretelai/synthetic_text_to_sql",),
    ),
    # Tables without rows: on them most queries have the same, empty result, whatever they ask for. Such rows have no
    # reward (`empty_reference` of SQLReward); those that count do, and any 0 is right there.
    _sql(
        "sql_create_context",
        {"query": column("answer"), "schema": column("context")},
        kept=("query", "schema"),
        sources=("b-mc2/sql-create-context",),
    ),
    # Spider and BIRD: their databases are no part of the dataset; the folder with them is `database_root`
    _sql("spider", {"query": column("query")}, kept=("query", "database"), sources=("xlangai/spider",)),
    _sql(
        "bird",
        {"query": column("SQL"), "hint": Field((), bird_hint, ("evidence",))},
        kept=("query", "database"),
        template=TEMPLATES["sql"].replace("{prompt}", "{prompt}{hint}"),
        sources=("birdsql/bird23-train-filtered", "xu3kev/BIRD-SQL-data-train"),
    ),
    _mbpp("full", "text", "test_setup_code"),
    _mbpp("sanitized", "prompt", "test_imports"),
    # on the Hub it is a script, which datasets>=4 does not run: give files
    _code(
        "apps",
        {
            "prompt": column("question"),
            "solution": Field(("solutions",), first_solution, ("starter_code",)),
            "tests": column("input_output"),
            "form": Field((), apps_form, ("starter_code",)),
        },
        "{prompt}{form}",
        sources=("codeparrot/apps",),
    ),
    # For evaluation: it has a test split only. The solution is the body alone: the prompt shows the rest.
    _code(
        "humaneval",
        {
            "prompt": column("prompt"),
            "solution": Field(("canonical_solution",), function_body),
            "tests": Field(("test", "entry_point"), humaneval_tests),
        },
        "Complete this function:\n```python\n{prompt}\n```",
        sources=("openai/openai_humaneval",),
    ),
)
PRESETS = {preset.name: preset for preset in _PRESETS}
