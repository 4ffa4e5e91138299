"""The math reward, and the processes that it judges in."""

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from trl_rlsd.rewards import get_reward
from trl_rlsd.rewards.answer import final_answer
from trl_rlsd.rewards.pool import run_all


pytest.importorskip("math_verify")
pytest.importorskip("pebble")

from trl_rlsd.rewards.grading import CannotGrade
from trl_rlsd.rewards.math import MathReward, grade, math_reward


@pytest.mark.parametrize(
    "text, reference",
    [
        ("\\boxed{\\frac12}", "0.5"),
        ("so \\boxed{3\\sqrt2}", "3\\sqrt{2}"),
        ("I first had \\boxed{3}, no: \\boxed{4}", "4"),
        ("answer: [0,1)", "[0, 1)"),
        ("\\boxed{\\{1,2\\}}", "{2,1}"),
        ("\\boxed{(-\\infty,3)\\cup(4,\\infty)}", "(-\\infty, 3) \\cup (4, \\infty)"),
        ("#### 72", "48 / 2 = 24, 48 + 24 = 72\n#### 72"),
        ("The answer is $5$ cm.", "5 cm"),
        ("\\boxed{12345}", "12\\,345"),
        ("The answer is 1,024.", "1024"),
        ("\\boxed{50\\%}", "0.5"),
        ("\\boxed{x=5}", "5"),
        ("**Answer:** 4", "4"),
        ("The answer is $\\frac{2}{6}$.", "$\\frac{1}{3}$"),
        ("thus it is 4", "4"),
        ("The answer is 18 dollars.", "18"),
        ("The answer is $18 dollars per day.", "18"),
        ("\\boxed{1,234 cupcakes}", "1234"),
        ("\\boxed{18\\text{ dollars}}", "$18"),
        ("The answer is **42**!", "42"),
        ("\\fbox{42}", "42"),
        ("最终答案：42。", "42"),
        ("The answer would be 42.", "42"),
        ("\\boxed{48 + 24 = 72}", "72"),
        ("\\boxed{1.5 \\times 10^3}", "1500"),
        ("\\boxed{2^{10}}", "1024"),
        ("\\boxed{3\\frac{1}{2}}", "3.5"),
        ("\\boxed{\\frac{34}{2}}", "17"),
        ("\\boxed{-\\sqrt{16}}", "-4"),
        ("\\boxed{x = 1 \\text{ or } x = 2}", "1 or 2"),
        ("<think>\\boxed{3}</think> \\boxed{4}", "The solution is \\boxed{4}."),
        ("well, \\boxed{3}</think> <answer> 4 </answer>", "4"),
    ],
)
def test_equal_answers_are_right_however_they_are_written(text, reference):
    assert grade(text, reference) == 1.0


@pytest.mark.parametrize(
    "text, reference",
    [
        ("answer: [0,1]", "[0,1)"),
        ("\\boxed{}", "4"),
        ("\\boxed{4", "4"),
        ("", "4"),
        ("0.333", "1/3"),
        ("<think>\\boxed{4}", "4"),
        ("<think>\\boxed{4}</think>", "4"),
        ("\\boxed{4} <think> or", "4"),
        ("\x00\udcff\ufffd", "4"),
        ("\\boxed{4} and then \\boxed{5}", "4"),
        ("\\boxed{17 \\times 3}", "51"),
        ("\\boxed{48 + 24}", "72"),
        ("\\boxed{\\frac{48 + 24}{1}}", "72"),
        ("\\boxed{2 \\cdot (3 \\cdot 17)}", "102"),
        ("\\boxed{\\begin{pmatrix} 1 & 2 \\end{pmatrix}}", "3"),
        ("\\boxed{\\frac12 + \\frac13}", "\\frac56"),
        ("\\boxed{10!}", "3628800"),
        ("\\boxed{\\binom{10}{3}}", "120"),
        ("\\boxed{\\int_0^1 x^2 dx}", "\\frac13"),
        ("\\boxed{\\sum_{i=1}^{100} i}", "5050"),
        ("\\boxed{x=41 \\lor x=42}", "42"),
        ("\\boxed{41 \\\\ 42}", "42"),
        ("\\boxed{41 or 42}", "42"),
        ("\\boxed{\\text{18 cats}}", "17"),
    ],
)
def test_other_answers_and_no_answers_are_wrong(text, reference):
    assert grade(text, reference) == 0.0


def test_a_reference_that_is_no_expression_is_compared_as_text_only_when_told_to():
    with pytest.raises(CannotGrade, match="'east'"):
        grade("\\boxed{seat}", "east")
    assert grade("\\boxed{seat}", "east", exact_fallback=True) == 0.0
    assert grade("The answer is East.", "east", exact_fallback=True) == 1.0


HOSTILE = {
    "endless": "\\boxed{10^{10^{10^{10}}}}",
    "huge factorial": "\\boxed{(10**10**10)!}",
    "megabyte": "x" * 10**6 + " \\boxed{4}",
    "open boxes": "\\boxed{" * 10**5,
    "nested boxes": "\\boxed{" * 10**5 + "}" * 10**5,
    "open parentheses": "$" + "(" * 10**5,
    "open tags": "<answer>" * 10**5,
    "blank answers": "answer is" + "\n" * 10**6,
    "many digits": "\\boxed{" + "9" * 5000 + "}",
    "junk": "\x00\udcff" * 1000,
    "empty": "",
    "after them": "\\boxed{4}",
}


def test_whatever_is_written_has_a_verdict_within_its_limit_and_the_others_have_theirs(caplog):
    counted = {}
    began = time.perf_counter()
    rewards = MathReward(timeout=4, workers=2)(
        None, list(HOSTILE.values()), answer=["4"] * len(HOSTILE), log_metric=lambda *item: counted.update([item])
    )
    got = dict(zip(HOSTILE, rewards, strict=True))
    assert got.pop("endless") is None
    assert got.pop("megabyte") == got.pop("after them") == 1.0
    assert set(got.values()) == {0.0}
    assert counted == {"math_failures": 1}
    assert "no result within 4 s" in caplog.text
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize(
    "text", [HOSTILE[name] for name in ("open boxes", "nested boxes", "open tags", "blank answers")]
)
def test_an_answer_is_read_in_linear_time(text):
    began = time.perf_counter()
    final_answer(text)
    assert time.perf_counter() - began < 5


def test_results_are_in_order_from_any_thread_and_after_pickling():
    reward = pickle.loads(pickle.dumps(MathReward(workers=2)))
    assert reward == MathReward(workers=2)

    def grades(shift):
        texts = [[{"role": "assistant", "content": f"\\boxed{{{i}}}"}] for i in range(20)]
        return reward(None, texts, answer=[str(i if i % 3 else i + shift) for i in range(20)])

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(grades, [1, 2])
    assert first == second == [float(i % 3 > 0) for i in range(20)]


def test_a_row_without_a_reference_is_left_to_other_rewards():
    counted = {}
    rewards = math_reward(None, ["4", "4"], answer=[None, "4"], log_metric=lambda *item: counted.update([item]))
    assert rewards == [None, 1.0]
    assert counted == {"math_failures": 0}


def test_a_missing_column_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"needs the column 'answer'.*'solution'"):
        math_reward(None, ["4"], solution=["4"])
    assert MathReward(column="solution")(None, ["4"], solution=["4"]) == [1.0]


def test_options_are_given_by_name():
    assert get_reward("math_reward") is math_reward
    assert get_reward("math_reward", {"timeout": 9.0}) == MathReward(timeout=9.0)
    with pytest.raises(ValueError, match=r"no option 'limit'.*timeout"):
        get_reward("math_reward", {"limit": 9.0})
    assert math_reward.__name__ == "math_reward"


def test_a_crash_fails_one_call_and_the_processes_are_replaced():
    results = run_all(os.kill, [(0, 0)], timeout=5, workers=1)
    assert results == [None]
    died, exited, slept, sane = run_all(_do, [("die",), ("exit",), ("sleep",), ("nothing",)], timeout=1, workers=1)
    assert isinstance(died, Exception)
    assert isinstance(exited, Exception)
    assert isinstance(slept, TimeoutError)
    assert sane == "nothing"


def test_processes_load_what_calls_need_before_a_calls_time_runs_also_those_that_replace_others():
    loaded = "[name in __import__('sys').modules for name in ('tabnanny', 'pyclbr')]"
    call = partial(run_all, eval, timeout=5, workers=1)
    (process,) = call([("__import__('os').getpid()",)])
    assert call([(loaded,)], imports=("tabnanny", "no_such_module")) == [[True, False]]
    assert call([(loaded,)], imports=("pyclbr", "no_such_module")) == [[True, True]]
    assert call([("__import__('os').getpid()",)]) == [process], "all reward functions share the processes"
    assert call([(loaded,), ("__import__('os')._exit(1)",), (loaded,)])[::2] == [[True, True]] * 2


def test_memory_is_limited():
    (result,) = run_all(_do, [("eat",)], timeout=20, workers=1)
    assert isinstance(result, MemoryError)


def _do(what):
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "sleep":
        time.sleep(60)
    if what == "eat":
        return len(bytearray(5 * 2**30))
    return what


SCRIPT = """
import os, sys, threading, time
from trl_rlsd.rewards.math import math_reward
print("started", flush=True)
def work():
    print(math_reward(None, ["\\\\boxed{4}"], answer=["4"]), flush=True)
thread = threading.Thread(target=work)
thread.start(); thread.join()
if "stay" in sys.argv: time.sleep(60)
"""


def _workers(marker: str) -> list[int]:
    """Processes with the marker in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environment:
                if marker.encode() in environment.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("end", ["itself", "killed"])
def test_a_script_needs_no_main_guard_and_leaves_no_process(tmp_path, end):
    script, marker = tmp_path / "script.py", f"RLSD_TEST_MARK={os.getpid()}-{end}"
    script.write_text(SCRIPT)
    name, value = marker.split("=")
    process = subprocess.Popen(
        [sys.executable, script, *(["stay"] if end == "killed" else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, name: value, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == "started\n"
    assert process.stdout.readline() == "[1.0]\n"
    if end == "killed":
        process.kill()
    assert process.wait(timeout=30) == (-signal.SIGKILL if end == "killed" else 0)
    if end == "itself":
        assert process.stdout.read() == ""
        assert process.stderr.read() == ""
    deadline = time.monotonic() + 20
    while (left := _workers(marker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
