"""Reward of JSON that a schema describes, by jsonschema-rs (https://github.com/Stranger6667/jsonschema)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from trl_rlsd.rewards.answer import after_thinking
from trl_rlsd.rewards.fences import last_block
from trl_rlsd.rewards.grading import CannotGrade, Reward
from trl_rlsd.rewards.pool import run_all


# of a text that is not JSON as a whole
_READ = 200_000
_BRACKET = re.compile(r"[\[{]")
# what matters inside of brackets: a string is skipped whole; linear, nothing is tried twice (`*+`)
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*+"|\\.|[\[\]{}]')
_CLOSED_BY = {"[": "]", "{": "}"}
_CLOSING = frozenset("]}")


@dataclass(frozen=True)
class JSONSchemaReward(Reward):
    """1 where a completion's JSON is valid against the schema and, if asked for, equals a reference; else 0.

    The JSON is the last closed ```` ```json ```` block, else one that runs to the end, else a block without a
    language; else the whole text; else the last array or object in its last 200,000 characters. Only what follows a
    thinking block is read. NaN and Infinity are not JSON. Refused as well: numbers beyond the range of a float,
    integers of more than 4,300 digits, lone surrogates, and nesting deeper than about 900. Of a repeated key, the last
    value counts.

    The draft is the one that `$schema` names, else 2020-12; `format` is asserted up to draft 7 alone, as the drafts
    say. Patterns are matched in linear time, without look-around and back-references. Nothing is fetched: a `$ref`
    must point into the schema. A row whose schema cannot be compiled has no reward.

    Args:
        schema_column: of the schema, best as a JSON string: from dicts, `datasets` makes one type that has the keys of
            all rows, None where a row had none. So a dict that holds None for a key is refused.
        schema: one schema for all rows, as a JSON string, in place of the column.
        answer_column: of a reference, a JSON string or a value; the completion's JSON must equal it.
        fields: compare only these fields of the reference, each a key, an index or several with dots between
            ("user.name", "items.0"). All must be equal: 1 equals 1.0, but not true or "1".
        timeout: seconds to judge one completion; a completion that takes longer has no reward.
        workers: processes to judge in. [the cores]

    Raises: ValueError, where `schema` is no schema, or `fields` are no tuple or stand without `answer_column`.
    """

    schema_column: str = "schema"
    schema: str | None = None
    answer_column: str | None = None
    fields: tuple[str, ...] = ()
    timeout: float = 5.0
    workers: int | None = None

    kind: ClassVar[str] = "json_schema"
    packages: ClassVar[tuple[str, ...]] = ("jsonschema_rs", "pebble", "loky")

    def __post_init__(self):
        if isinstance(self.fields, str):
            raise ValueError(f"fields={self.fields!r} is one string: write a tuple, ({self.fields!r},).")
        if self.fields and self.answer_column is None:
            raise ValueError(f"fields={self.fields} compare with a reference: name its column in answer_column.")
        if self.schema is not None:
            try:
                validator(self.schema)
            except CannotGrade as error:
                raise ValueError(f"schema: {error}") from error

    @property
    def required_columns(self) -> tuple[str, ...]:
        schema = (self.schema_column,) if self.schema is None else ()
        return schema if self.answer_column is None else (*schema, self.answer_column)

    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        _library()
        schemas = [row[self.schema_column] if self.schema is None else self.schema for row in rows]
        # in tuples: a row may have a reference of None
        references = [(row[self.answer_column],) if self.answer_column else () for row in rows]
        calls = [(*call, self.fields) for call in zip(texts, schemas, references, strict=True)]
        return run_all(grade, calls, timeout=self.timeout, workers=self.workers, imports=("jsonschema_rs",))


def grade(text: str, schema: str | dict | bool, reference: tuple = (), fields: Sequence[str] = ()) -> float:
    """See [`JSONSchemaReward`]; `reference` holds one value or none.

    Raises: CannotGrade, where the schema cannot be compiled, or the reference is not JSON or lacks one of the fields.
    """
    valid = validator(schema if isinstance(schema, str) else _dump(schema)).is_valid
    pairs = _wanted(_reference(*reference), fields) if reference else []
    try:
        found = find_json(text)
        if not valid(found):
            return 0.0
        return float(all(_equal(_field(found, field), right) for field, right in pairs))
    except (ValueError, LookupError, RecursionError):  # no JSON, a field less, a lone surrogate
        return 0.0


def find_json(text: str) -> Any:
    """The JSON in a completion's text, as Python values, in time linear in the text.

    Raises: ValueError or RecursionError, where there is none; see [`JSONSchemaReward`].
    """
    text = after_thinking(text) or ""
    for language in ("json", ""):
        if (block := last_block(text, language)) is not None:
            return _DECODER.decode(block)
    end = text[-_READ:]
    for candidate in (text, *(end[slice(*span)] for span in reversed(_balanced(end)))):
        try:
            return _DECODER.decode(candidate)
        except (ValueError, RecursionError):
            pass
    raise ValueError("the text has no JSON")


@lru_cache(maxsize=256)
def validator(schema: str):
    """The compiled validator of a JSON Schema in text.

    Raises:
        CannotGrade: it is no schema, points out of itself or has patterns that cannot be matched in linear time.
    """
    jsonschema_rs = _library()
    try:
        return jsonschema_rs.validator_for(
            schema, retriever=_refuse_reference, pattern_options=jsonschema_rs.RegexOptions()
        )
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        raise CannotGrade(f"{schema[:80]!r} cannot be used as a JSON Schema: {error}") from error


def _library():
    try:
        import jsonschema_rs
    except ImportError as error:
        raise ImportError(
            "json_schema_reward needs jsonschema-rs, which is not installed: pip install 'trl-rlsd[rewards]'"
        ) from error
    return jsonschema_rs


def _refuse_reference(uri: str):
    raise ValueError(f"{uri} is outside of the schema; copy it into its $defs")


def _balanced(text: str) -> list[tuple[int, int]]:
    """Where brackets open and close again, in order, without those that lie inside of another."""
    spans: list[tuple[int, int]] = []
    first = _BRACKET.search(text)
    while first:
        opened: list[tuple[str, int]] = []
        for token in _TOKEN.finditer(text, first.start()):
            bracket = token[0]
            if bracket in _CLOSED_BY:
                opened.append((_CLOSED_BY[bracket], token.start()))
            elif bracket in _CLOSING:
                closing, start = opened.pop()
                if bracket == closing:
                    while spans and spans[-1][0] > start:
                        spans.pop()
                    spans.append((start, token.end()))
                if not opened:
                    break
        # outside of brackets, a quotation mark does not begin a string
        first = None if opened else _BRACKET.search(text, token.end())
    return spans


def _dump(schema: Any) -> str:
    if _holds_none(schema):
        raise CannotGrade(
            "the schema has None for a key, as `datasets` fills in where the dicts of the rows differ; store the "
            "schemas as JSON strings"
        )
    return json.dumps(schema)


def _holds_none(schema: Any) -> bool:
    if isinstance(schema, dict):
        return any(value is None or _holds_none(value) for value in schema.values())
    return isinstance(schema, list) and any(map(_holds_none, schema))


def _reference(reference: Any) -> Any:
    if reference is None:
        raise CannotGrade("the row has no reference; JSON's null is the string 'null'")
    if not isinstance(reference, str):
        return reference
    try:
        return json.loads(reference)
    except ValueError as error:
        raise CannotGrade(f"the reference {reference[:80]!r} is not JSON: {error}") from error


def _wanted(reference: Any, fields: Sequence[str]) -> list[tuple[str | None, Any]]:
    try:
        return [(field, _field(reference, field)) for field in fields or (None,)]
    except LookupError as error:
        raise CannotGrade(f"the reference {str(reference)[:80]!r} lacks one of the fields {fields}") from error


def _field(value: Any, path: str | None) -> Any:
    """What stands at a path of keys and indices; at None, the value itself."""
    for key in () if path is None else path.split("."):
        if isinstance(value, dict):
            value = value[key]
        elif isinstance(value, list) and key.isdecimal():
            value = value[int(key)]
        else:
            raise LookupError(key)
    return value


def _equal(value: Any, right: Any) -> bool:
    if isinstance(value, dict) and isinstance(right, dict):
        return value.keys() == right.keys() and all(_equal(value[key], right[key]) for key in right)
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_equal, value, right))
    return isinstance(value, bool) == isinstance(right, bool) and value == right


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number[:20]} is beyond the range of a float")
    return value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)

json_schema_reward = JSONSchemaReward()
