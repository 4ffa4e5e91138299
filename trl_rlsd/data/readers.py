"""How presets read values: of columns -> the value, None where there is none."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from textwrap import dedent
from typing import Any


def gsm8k_answer(solution: str | None) -> str | None:
    """What follows `####`."""
    _, mark, answer = (solution or "").rpartition("####")
    return answer.strip() or None if mark else None


def gsm8k_trace(solution: str | None) -> str | None:
    """What stands before `####`, without the calculator's annotations such as `<<48/2=24>>`."""
    return re.sub(r"<<.*?>>", "", (solution or "").partition("####")[0]).strip() or None


def boxed(solution: str | None) -> str | None:
    """The content of the last `\\boxed{...}` (or `\\fbox`, or `\\boxed 5`) of a solution, with balanced braces."""
    _, box, rest = re.sub(r"\\fbox\b", r"\\boxed", solution or "").rpartition("\\boxed")
    rest = rest.lstrip()
    if not box or not rest:
        return None
    if rest[0] != "{":
        return re.match(r"[^$\s]*", rest).group() or None
    depth = 0
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:end].strip() or None
    return None


def first_correct(generations: list | None, by_rule: list | None, by_model: list | None = None) -> str | None:
    """The first generation that math-verify, or else the judge, found right; None where neither found one."""
    for verdicts in (by_rule, by_model):
        for generation, correct in zip(generations or [], verdicts or [], strict=False):
            if correct:
                return untagged(generation)
    return None


def untagged(text: str | None) -> str | None:
    """A model's output without `<think>` tags: in a user's message they are special tokens out of their place."""
    return re.sub(r"</?think>", "", text or "").strip() or None


def without_image_tags(question: str | None) -> str | None:
    """TRL puts a conversation's images before its first user message."""
    return (question or "").replace("<image>", "").strip() or None


def ground_truth(reward_model: Mapping[str, Any] | str | None) -> str | None:
    """The answer in a column of verl's form."""
    return reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else reward_model


_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


def dapo_question(prompt: str | list[Mapping[str, str]] | None) -> str | None:
    """The problem alone, without DAPO's instruction on the form of the answer."""
    if isinstance(prompt, list) and len(prompt) != 1:
        raise ValueError(f"it has {len(prompt)} messages, not one. Name it in columns= without this preset.")
    text = prompt[0]["content"] if isinstance(prompt, list) else prompt or ""
    return text.strip().removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER).strip() or None


def bird_hint(evidence: str | None) -> str:
    return f"\n\nHint: {evidence.strip()}" if evidence and evidence.strip() else ""


def database_file(db_id: str, database_root: str | Path) -> str:
    """`<database_root>/<db_id>/<db_id>.sqlite`, as Spider and BIRD lay their databases out.

    Raises: ValueError, where it is not there.
    """
    file = Path(database_root, db_id, f"{db_id}.sqlite")
    if Path(db_id).name != db_id or not file.is_file():
        raise ValueError(f"there is no database {file} (database_root={str(database_root)!r}, db_id={db_id!r}).")
    return str(file.resolve())


def database_schema(db_id: str, database_root: str | Path) -> str:
    """The CREATE statements of a database; see [`database_file`]."""
    return _schema(database_file(db_id, database_root))


@lru_cache(maxsize=512)
def _schema(file: str) -> str:
    with closing(sqlite3.connect(f"{Path(file).as_uri()}?mode=ro", uri=True)) as database:
        statements = database.execute(
            "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
        )
        return "\n".join(f"{sql};" for (sql,) in statements)


def asserts(tests: list[str] | None, setup: str | list[str] | None = None) -> list[str] | None:
    """Tests that run on their own: each one behind the lines that set it up."""
    before = "\n".join(setup) if isinstance(setup, list) else setup or ""
    return [f"{before}\n{test}" if before.strip() else test for test in tests or []] or None


def first_test(tests: list[str] | None) -> str | None:
    return tests[0] if tests else None


def apps_form(starter_code: str | None) -> str:
    """What APPS expects of a program: the completed starter code, or one that reads and prints."""
    if starter_code and starter_code.strip():
        return f"\n\nComplete this code:\n```python\n{starter_code.strip()}\n```"
    return "\n\nThe program reads from standard input and prints to standard output."


def first_solution(solutions: str | None, starter_code: str | None = None) -> str | None:
    """Of a JSON list, as APPS has it, what follows the starter code; empty where a problem has none."""
    solution = next(iter(json.loads(solutions or "[]")), None)
    return solution and after_start(solution, starter_code)


def after_start(code: str, start: str | None) -> str:
    """Code without the first lines that the prompt shows, white space aside; all of it where it begins otherwise."""
    lines, shown = (["".join(line.split()) for line in text.strip().splitlines()] for text in (code, start or ""))
    if not shown or lines[: len(shown)] != shown or len(lines) == len(shown):
        return code
    return function_body("\n".join(code.strip().splitlines()[len(shown) :]))


def function_body(code: str | None) -> str | None:
    """Without its indentation."""
    return dedent((code or "").strip("\n")).rstrip() or None


def humaneval_tests(test: str, entry_point: str) -> str:
    return f"{test}\n\ncheck({entry_point})"
