"""Reward of Python programs, by tests or by what they print, in a sandbox."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from trl_rlsd.rewards.answer import after_thinking
from trl_rlsd.rewards.fences import last_block
from trl_rlsd.rewards.grading import CannotGrade, Reward, grade_or_error
from trl_rlsd.rewards.limits import Limits, Outcome
from trl_rlsd.rewards.pool import cores
from trl_rlsd.rewards.sandbox import Bubblewrap, Sandbox, Unsandboxed


@dataclass(frozen=True)
class CodeReward(Reward):
    """1 where a completion's Python program passes all its cases, else 0; or the share of them that it passes.

    The program is the last block fenced as Python, else the last fenced as nothing, else the whole text; a fence that
    was never closed ends with the text. Only what follows a thinking block is read. Each case runs the program in a
    fresh process and folder of one sandbox, cases of a completion one after the other, completions in parallel. A case
    is passed in one of three ways, by what the row's tests are:

    - a string of Python, or a list of them: code that uses the program's names and raises where they are wrong;
    - `{"inputs": [...], "outputs": [...]}` (or `input` and `output`), or a list of `{"input": ..., "output": ...}`:
      the program reads one as stdin and prints the other, and exits with 0. Spaces at the ends of lines and of the
      whole do not count, all else does: 0.5 is not 0.50;
    - the same with `fn_name`: a function of the program, or a method of its class `Solution`, takes the list of
      arguments (or a string of JSON, an argument a line) and returns what equals the output as JSON.

    Dicts and lists may be JSON in a string, as datasets have them.

    What a program cannot do in the second and third way is to fake an answer: outputs never enter the sandbox. In the
    first, tests and program share a process. Exiting early, printing, replaced builtins and handlers of any kind earn
    nothing, but a program that overloads `==`, redefines a name that the tests use, or searches its own process for
    the tests and for the token that tells that they ended, passes. Prefer the others where a reward will be gamed.

    Args:
        column: of the tests.
        partial: the share of cases passed; otherwise the first case that fails ends the run.
        limits: of one completion's program, with all of its cases. One that never ends costs `cpu_seconds` of a core
            where it computes, and `wall_seconds` of a worker where it waits.
        sandbox: where programs run. [`Bubblewrap()`]
        unsafe: run programs with the rights of this process and no isolation; see `Unsandboxed`.
        workers: completions graded at a time. [the cores, shared with the other ranks of this machine; 8 at most]
    """

    column: str = "tests"
    partial: bool = False
    limits: Limits = field(default_factory=Limits)
    sandbox: Sandbox | None = None
    unsafe: bool = False
    workers: int | None = None

    kind: ClassVar[str] = "code"

    def __post_init__(self):
        if self.unsafe and self.sandbox is not None:
            raise ValueError(f"CodeReward has unsafe=True and sandbox={self.sandbox!r}; give one of them.")

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self) -> None:
        """
        Raises: ImportError, RuntimeError or CannotGrade, where programs cannot be run here, saying why and what to do.
        """
        self._sandbox.check()
        if self._grade("print(1)", [{"input": "", "output": "1"}]) != 1:
            raise RuntimeError(f"{self.limits} are too tight: `print(1)` does not pass. Raise them.")

    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        self._sandbox.check()
        executor = ThreadPoolExecutor(self.workers or cores())
        try:
            grade = partial(grade_or_error, self._grade)
            return list(executor.map(grade, texts, [row[self.column] for row in rows]))
        finally:
            executor.shutdown(cancel_futures=True)

    @property
    def _sandbox(self) -> Sandbox:
        return self.sandbox or (Unsandboxed() if self.unsafe else Bubblewrap())

    def _grade(self, text: str, tests: Any) -> float:
        cases = list(read_cases(tests))
        if not cases:
            raise ValueError("the row has no tests")
        program = extract_program(text)
        if not program.strip():
            return 0.0
        job = {
            "program": program,
            "cases": [case.job for case in cases],
            "stop": not self.partial,
            "output": int(self.limits.output_kb * 1024),
        }
        command = ["python3", "-W", "ignore", "runner.py"]
        outcome = self._sandbox.run({"runner.py": _runner()}, command, json.dumps(job), self.limits)
        answers = _answers(outcome)
        passed = sum(answer is not None and case.passed(answer) for case, answer in zip(cases, answers, strict=False))
        return passed / len(cases) if self.partial else float(passed == len(cases))


class Case(NamedTuple):
    """One test of a program: what of it enters the sandbox, and the verdict on an answer, which is made outside."""

    job: dict[str, Any]
    passed: Callable[[str], bool]


def extract_program(text: str) -> str:
    """The program in a completion, see [`CodeReward`]; "" where there is none."""
    text = after_thinking(text)
    if text is None:
        return ""
    for languages in (("python", "py", "python3"), ("",)):
        if (block := last_block(text, *languages)) is not None:
            return block
    return "" if "```" in text else text


def read_cases(tests: Any) -> Iterator[Case]:
    """The cases of a row's tests, see [`CodeReward`].

    Raises: ValueError or TypeError, saying what is wrong with them.
    """
    if isinstance(tests, str) and tests.lstrip().startswith(("{", "[")):
        tests = json.loads(tests)
    if isinstance(tests, Mapping):
        tests = _items(tests)
    for test in [tests] if isinstance(tests, str) else tests:
        yield _case(test)


def _items(tests: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs = tests.get("inputs", tests.get("input")), tests.get("outputs", tests.get("output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("tests that are a dict need lists `inputs` and `outputs` of the same length")
    function = tests.get("fn_name")
    items = [{"fn_name": function, "input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    if function and all(isinstance(output, list) and len(output) == 1 for output in outputs):
        # in some rows of APPS and TACO, the list is not what the function returns but holds it
        items = [{**item, "or": item["output"][0]} for item in items]
    return items


def _case(test: Any) -> Case:
    if isinstance(test, str):
        if not ast.parse(test).body:  # a syntax error here would fail every program
            raise ValueError(f"the test {test!r} has no statement")
        return Case({"test": test}, passed=lambda answer: True)  # an answer says that the test ended
    if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
        raise TypeError(f"a test is a string of Python or has `input` and `output`, not {str(test)[:80]!r}")
    arguments, output = test["input"], test["output"]
    if not test.get("fn_name"):
        lines = _lines(_joined(output))
        return Case({"stdin": _joined(arguments)}, passed=lambda answer: _lines(answer) == lines)
    if isinstance(arguments, str):
        arguments, output = [json.loads(line) for line in arguments.splitlines()], json.loads(output)
    accepted = [output, test["or"]] if "or" in test else [output]
    return Case({"call": test["fn_name"], "args": list(arguments)}, passed=lambda answer: _value(answer) in accepted)


def _value(answer: str) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):  # too long a number, too deep a list
        return object()


def _joined(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _answers(outcome: Outcome) -> list[str | None]:
    """Of the cases that were run, in order.

    Raises: CannotGrade, where no process was made to run the first in.
    """
    ready, _, reports = outcome.stdout.partition("\n")
    if ready != "ready":
        ended = outcome.reason or f"exit {outcome.exit_code}"
        raise CannotGrade(f"the sandbox did not come to run a program ({ended}): {outcome.stderr.strip()}")
    answers = []
    for line in reports.splitlines(keepends=True):
        if not line.endswith("\n"):  # cut off by a limit
            break
        answers.append(json.loads(line))
    return answers


@cache
def _runner() -> str:
    return Path(__file__).with_name("code_runner.py").read_text()


code_reward = CodeReward()
