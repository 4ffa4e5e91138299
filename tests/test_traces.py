"""Traces and pass rates, sampled from a real HTTP server: what was paid for is kept, whatever goes wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from datasets import Dataset, IterableDataset, load_dataset

from trl_rlsd.data.generate import Endpoint, LocalModel, SourceFailed
from trl_rlsd.data.pass_rate import pass_rate
from trl_rlsd.data.traces import verified_traces, without_tags
from trl_rlsd.rewards.json_schema import JSONSchemaReward


pytest.importorskip("openai")

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """`/v1/chat/completions`. `answer(question, count)` gives the text of the count-th request of a question, a
    status (with a code), a dictionary that goes into the message, or one of "cut" and "html"; or it waits."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.asked, self.answered, self.bodies, self.keys = Counter(), Counter(), [], set()
        self.counting = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients are killed here


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.counting:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.asked[question] += 1
            count = server.asked[question]
        answer = server.answer(question, count)
        if answer == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(answer, int | tuple):
            status, code = answer if isinstance(answer, tuple) else (answer, None)
            self.reply(status, {"error": {"message": f"no, {self.headers['Authorization']}", "code": code}})
            return
        message, finish = ({"content": answer}, "stop") if isinstance(answer, str) else (answer, "stop")
        finish = message.pop("finish_reason", finish)
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
        choices = [] if "none" in message else [choice]
        html = answer == "html"
        with server.counting:  # first: the client may look as soon as it has its reply
            server.answered[question] += 1
        self.reply(200, "<html>" if html else {"id": "1", "object": "chat.completion", "choices": choices})

    def reply(self, status, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serving(answer):
    server = Server(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def endpoint(server, **options):
    defaults = dict(model="m", base_url=server.url, api_key_env=None, retries=0, timeout=5.0, concurrency=4)
    return Endpoint(**{**defaults, **options})


def problems(rows=4):
    return Dataset.from_dict({"prompt": [f"q{i}" for i in range(rows)], "answer": [str(i) for i in range(rows)]})


def right(prompts, completions, answer, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.split()[-1:] == [a]) for text, a in zip(texts, answer, strict=True)]


def nth_is_right(n):
    """Wrong answers first; the n-th is right."""
    return lambda question, count: f"so {question[1:]}" if count >= n else "so -1"


def entries(output):
    return [json.loads(line) for line in Path(f"{output}.journal").read_text().splitlines()]


# ---------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_trace_is_a_completion_that_the_reward_accepts(tmp_path, suffix):
    output = tmp_path / "out" / f"traces{suffix}"
    with serving(lambda question, count: "so 2" if question in ("q2", "q3") else f"it is {question[1:]}") as server:
        rows = verified_traces(problems(), endpoint(server), right, output, samples=2)
    assert rows["trace"] == ["it is 0", "it is 1", "so 2", None]
    assert rows["privileged_context"] == rows["trace"]
    assert rows["answer"] == problems()["answer"]
    written = load_dataset({".jsonl": "json"}.get(suffix, "parquet"), data_files=str(output), split="train")
    assert written.to_list() == rows.to_list()
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.journal"]


def test_a_problem_without_a_trace_keeps_the_privileged_context_that_it_had(tmp_path):
    known = problems().add_column("privileged_context", ["zero", None, "two", "three"])
    with serving(lambda question, count: "so 2" if question == "q3" else f"so {question[1:]}") as server:
        rows = verified_traces(known, endpoint(server), right, tmp_path / "t.jsonl", samples=1)
    assert rows["trace"] == ["so 0", "so 1", "so 2", None]
    assert rows["privileged_context"] == ["so 0", "so 1", "so 2", "three"]


def test_sampling_for_a_problem_ends_with_its_first_trace(tmp_path):
    with serving(lambda question, count: nth_is_right(int(question[1:]) + 1)(question, count)) as server:
        rows = verified_traces(problems(), endpoint(server), right, tmp_path / "t.jsonl", samples=3)
        assert server.asked == {"q0": 1, "q1": 2, "q2": 3, "q3": 3}
    assert rows["trace"] == ["so 0", "so 1", "so 2", None]


def test_the_shortest_accepted_completion_can_be_kept(tmp_path):
    texts = ["long words 0", "0", "so 0", "x"]
    with serving(lambda question, count: texts[count - 1]) as server:
        options = dict(samples=4, keep="shortest")
        rows = verified_traces(problems(1), endpoint(server, concurrency=1), right, tmp_path / "t.jsonl", **options)
        assert server.asked == {"q0": 4}
    assert rows["trace"] == ["0"]


def test_reasoning_that_the_server_keeps_apart_belongs_to_the_trace(tmp_path):
    replies = {
        "q0": {"content": "so 0", "reasoning_content": "hm 7"},
        "q1": {"content": "so 1", "reasoning": "hm"},
        "q2": {"content": None, "reasoning_content": "so 2", "finish_reason": "length"},
    }
    with serving(lambda question, count: dict(replies[question])) as server:
        rows = verified_traces(problems(3), endpoint(server), right, tmp_path / "t.jsonl", samples=1)
    assert rows["trace"][:2] == ["<think>\nhm 7\n</think>\n\nso 0", "<think>\nhm\n</think>\n\nso 1"]
    assert rows["privileged_context"][0] == "hm 7\n\nso 0"
    texts = [entry["text"] for entry in entries(tmp_path / "t.jsonl") if "text" in entry]
    assert "<think>\nso 2\n" in texts, "thinking that was cut off is not closed"


def test_only_the_tags_go():
    assert without_tags("<think>\na < b\n</think>\n\nso <b>c</b>") == "a < b\n\nso <b>c</b>"
    assert without_tags("thought\n</think>\nanswer") == "thought\n\nanswer"


def test_conversations_are_sent_as_they_are_without_the_fields_that_arrow_adds(tmp_path):
    prompts = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q0", "name": "x"}],
        [{"role": "user", "content": "q1"}],
    ]
    seen = []

    def reward(prompts, completions, answer, **columns):
        seen.extend(completions)
        return right(prompts, completions, answer)

    rows = Dataset.from_dict({"prompt": prompts, "answer": ["0", "1"]})
    with serving(nth_is_right(1)) as server:
        source = endpoint(server, temperature=None, max_tokens=7, extra={"min_p": 0.1})
        verified_traces(rows, source, reward, tmp_path / "t.jsonl")
        bodies = sorted(server.bodies, key=lambda body: len(body["messages"]), reverse=True)
    assert [body["messages"] for body in bodies] == prompts
    assert {name: value for name, value in bodies[0].items() if name != "messages"} == {
        "model": "m", "max_tokens": 7, "min_p": 0.1
    }  # fmt: skip
    assert sorted(turn[0]["content"] for turn in seen) == ["so 0", "so 1"]
    assert all(turn[0]["role"] == "assistant" for turn in seen)


# ---------------------------------------------------------------------- what is never lost


def test_a_second_call_asks_for_nothing(tmp_path):
    with serving(nth_is_right(2)) as server:
        call = lambda **options: verified_traces(  # noqa: E731
            problems(), endpoint(server, **options), right, tmp_path / "t.jsonl", samples=2
        )
        first, asked = call(), server.asked.copy()
        again = call(concurrency=1, timeout=1.0)
        assert server.asked == asked
    assert again.to_list() == first.to_list()


def test_more_samples_are_added_to_those_there_are(tmp_path):
    with serving(nth_is_right(3)) as server:
        for samples in (1, 3):
            rows = verified_traces(problems(), endpoint(server), right, tmp_path / "t.jsonl", samples=samples)
        assert server.asked == {f"q{i}": 3 for i in range(4)}
    assert rows["trace"] == ["so 0", "so 1", "so 2", "so 3"]


# of its own, so that torch is not loaded
SCRIPT = """
import signal
import time
from datasets import Dataset
from trl_rlsd.data.generate import Endpoint
from trl_rlsd.data.traces import verified_traces

# a suite in a shell's background hands down that Ctrl-C is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

def right(prompts, completions, answer, **columns):
    return [float(text.split()[-1:] == [a]) for text, a in zip(completions, answer, strict=True)]

def slow(**columns):
    time.sleep(600)

rows = Dataset.from_dict({{"prompt": [f"q{{i}}" for i in range({rows})], "answer": list(map(str, range({rows})))}})
source = Endpoint(model="m", base_url={url!r}, api_key_env=None, retries=0, timeout=30.0, concurrency={concurrency})
verified_traces(rows, source, {reward}, {output!r}, samples=3)
"""


def start(server, output, *, rows, concurrency, reward="right"):
    code = SCRIPT.format(url=server.url, concurrency=concurrency, rows=rows, reward=reward, output=str(output))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def texts_in(output):
    journal = Path(f"{output}.journal")
    return journal.read_bytes().count(b'"text"') if journal.exists() else 0


def test_a_killed_run_goes_on_and_pays_for_nothing_twice(tmp_path):
    """Four requests are under way when the process is killed; every other one was answered, and is asked once."""
    output, rows, answers = tmp_path / "t.jsonl", 10, 13
    allowed, release, counting, given = threading.Event(), threading.Event(), threading.Lock(), []

    def answer(question, count):
        with counting:
            held = len(given) >= answers and not allowed.is_set()
            given.append(question)
        if held:
            release.wait(60)
            return "cut"
        return "so -1" if question != "q7" else "so 7"

    with serving(answer) as server:
        process = start(server, output, rows=rows, concurrency=4)
        wait_for(lambda: len(given) == answers + 4 and texts_in(output) == answers)
        process.kill()
        process.communicate()
        release.set()
        allowed.set()
        assert not output.exists()
        found = verified_traces(problems(rows), endpoint(server), right, output, samples=3)
        assert server.answered == {f"q{i}": 1 if i == 7 else 3 for i in range(rows)}
        assert sum(server.asked.values()) == sum(server.answered.values()) + 4
    assert found["trace"] == [None] * 7 + ["so 7"] + [None] * 2


def test_what_arrives_while_the_reward_is_busy_is_kept(tmp_path):
    output = tmp_path / "t.jsonl"
    with serving(nth_is_right(1)) as server:
        process = start(server, output, rows=40, concurrency=4, reward="slow")
        wait_for(lambda: texts_in(output) == 40)
        process.kill()
        process.communicate()
        assert not any("reward" in entry for entry in entries(output)), "it was busy with the first of them"
        rows = verified_traces(problems(40), endpoint(server), right, output, samples=3, regrade=True)
        assert sum(server.asked.values()) == 40
    assert None not in rows["trace"]


def test_ctrl_c_waits_for_the_requests_under_way_and_keeps_them(tmp_path):
    output, release = tmp_path / "t.jsonl", threading.Event()

    def answer(question, count):
        release.wait(60)
        return "so -1"

    with serving(answer) as server:
        process = start(server, output, rows=10, concurrency=3)
        wait_for(lambda: sum(server.asked.values()) == 3)
        process.send_signal(signal.SIGINT)
        time.sleep(2.0)  # in which a loaded machine comes to hear of it
        release.set()
        _, errors = process.communicate(timeout=30)
        assert b"KeyboardInterrupt" in errors
        assert sum(server.asked.values()) == 3
        assert texts_in(output) == 3


def test_a_torn_last_line_is_no_completion_and_a_whole_one_is(tmp_path):
    output = tmp_path / "t.jsonl"
    with serving(nth_is_right(1)) as server:
        verified_traces(problems(2), endpoint(server, concurrency=1), right, output)
        journal = Path(f"{output}.journal")
        lines = journal.read_bytes().splitlines(keepends=True)
        assert [next(iter(json.loads(line).keys() - {"row", "sample"})) for line in lines] == [
            "header", "text", "text", "reward", "reward"
        ]  # fmt: skip
        # q1's completion was cut off within its line: it is asked for again
        journal.write_bytes(b"".join(lines[:2]) + lines[2][:-5])
        assert verified_traces(problems(2), endpoint(server), right, output)["trace"] == ["so 0", "so 1"]
        assert server.asked == {"q0": 1, "q1": 2}
        # only the end of the line is missing: the completion is there
        journal.write_bytes(b"".join(lines[:3])[:-1])
        for _ in range(2):
            assert verified_traces(problems(2), endpoint(server), right, output)["trace"] == ["so 0", "so 1"]
        assert server.asked == {"q0": 1, "q1": 2}
        # a header that was cut off
        journal.write_bytes(lines[0][:10])
        assert verified_traces(problems(2), endpoint(server), right, output)["trace"] == ["so 0", "so 1"]
        assert server.asked == {"q0": 2, "q1": 3}
        assert all("\n" not in line for line in map(json.dumps, entries(output)))


def test_a_damaged_journal_is_refused_and_left_alone(tmp_path):
    output = tmp_path / "t.jsonl"
    journal = Path(f"{output}.journal")
    with serving(nth_is_right(1)) as server:
        verified_traces(problems(2), endpoint(server), right, output)
        lines = journal.read_bytes().splitlines(keepends=True)
        for damaged, message in [
            (lines[0] + b"{\n" + lines[1], "Line 2 of .* is no JSON"),
            (lines[1], "is no journal"),
            (b"my notes", "Line 1 of .* is no JSON"),
        ]:
            journal.write_bytes(damaged)
            with pytest.raises(ValueError, match=message):
                verified_traces(problems(2), endpoint(server), right, output)
            assert journal.read_bytes() == damaged


def test_one_process_writes_a_journal(tmp_path):
    release, seen = threading.Event(), []

    def answer(question, count):
        release.wait(60)
        return f"so {question[1:]}"

    with serving(answer) as server:
        run = lambda: seen.append(verified_traces(problems(1), endpoint(server), right, tmp_path / "t.jsonl"))  # noqa: E731
        first = threading.Thread(target=run)
        first.start()
        wait_for(lambda: server.asked["q0"] == 1)
        with pytest.raises(ValueError, match=r"Another process is writing to .*t\.jsonl\.journal"):
            run()
        release.set()
        first.join()
        assert server.asked == {"q0": 1}
    assert seen[0]["trace"] == ["so 0"]


# ---------------------------------------------------------------------- what does not belong together


@dataclass(frozen=True)
class Graded:
    """A reward with options and required columns."""

    wanted: int = 1
    required_columns: ClassVar = ("answer",)

    @property
    def __name__(self):
        return "graded_reward"

    def __call__(self, prompts, completions, answer, **columns):
        return [float(text.count(a) == self.wanted) for text, a in zip(completions, answer, strict=True)]


def test_a_journal_of_other_settings_is_refused_by_name(tmp_path):
    output, other = tmp_path / "t.jsonl", problems().to_dict()
    with serving(nth_is_right(1)) as server:
        verified_traces(problems(), endpoint(server), Graded(), output)
        asked = server.asked.copy()
        changed = [
            (problems(), endpoint(server, model="n"), Graded(), "model was 'm' and is now 'n'"),
            (problems(), endpoint(server, temperature=0.5), Graded(), "temperature was 1.0 and is now 0.5"),
            (problems(), endpoint(server, extra={"min_p": 0.1}), Graded(), r"extra\.min_p was None and is now 0\.1"),
            (problems(3), endpoint(server), Graded(), "rows was 4 and is now 3"),
            (problems(6).select([1, 2, 3, 4, 5]), endpoint(server), Graded(), "rows was 4 and is now 5.*prompts was"),
            (problems().select([1, 0, 2, 3]), endpoint(server), Graded(), "prompts was"),
            (problems(), endpoint(server), right, r"reward was 'Graded\(\)' and is now 'right'"),
            (problems(), endpoint(server), Graded(2), "wanted=2.*regrade=True"),
            (Dataset.from_dict({**other, "answer": ["0"] * 4}), endpoint(server), Graded(), "references was.*regrade"),
        ]
        before = Path(f"{output}.journal").read_bytes()
        for rows, source, reward, message in changed:
            with pytest.raises(ValueError, match=message):
                verified_traces(rows, source, reward, output)
        assert Path(f"{output}.journal").read_bytes() == before
        moved = endpoint(server, base_url=server.url + "/", concurrency=1, timeout=9.0)
        verified_traces(problems(), moved, Graded(), output)
        assert server.asked == asked


def test_a_dataset_that_was_appended_to_goes_on(tmp_path):
    output = tmp_path / "t.jsonl"
    with serving(nth_is_right(1)) as server:
        for rows in (2, 4, 4, 5):
            found = verified_traces(problems(rows), endpoint(server), Graded(), output)
            assert found["trace"] == [f"so {i}" for i in range(rows)]
        assert server.asked == {f"q{i}": 1 for i in range(5)}, "each prompt is paid for once"
        assert [e["header"]["rows"] for e in entries(output) if "header" in e] == [2, 4, 5]
        assert sum("reward" in entry for entry in entries(output)) == 5, "no verdict is given twice"
        with pytest.raises(ValueError, match="rows was 5 and is now 4"):
            verified_traces(problems(4), endpoint(server), Graded(), output)
        with pytest.raises(ValueError, match=r"wanted=2.*regrade=True"):
            verified_traces(problems(6), endpoint(server), Graded(2), output)
        other = Dataset.from_dict({"prompt": [f"q{i}" for i in range(6)], "answer": ["x"] + ["1"] * 5})
        with pytest.raises(ValueError, match=r"references was.*regrade=True"):
            verified_traces(other, endpoint(server), Graded(), output)
        anew = verified_traces(problems(6), endpoint(server), Graded(2), output, samples=1, regrade=True)
        assert anew["trace"] == [None] * 6, "the verdicts of the old reward are gone"
        assert server.asked == {f"q{i}": 1 for i in range(6)}


@dataclass(frozen=True)
class Timed(Graded):
    key: str = field(default="k", repr=False)
    marks: list = field(default_factory=list)
    timeout: float = 1.0
    workers: int | None = None


def test_how_a_reward_is_run_does_not_change_its_verdicts(tmp_path):
    output = tmp_path / "t.jsonl"
    with serving(nth_is_right(1)) as server:
        call = lambda reward: verified_traces(problems(), endpoint(server), reward, output)  # noqa: E731
        call(Timed())
        call(Timed(timeout=9.0, workers=2, key="secret"))
        assert entries(output)[0]["header"]["reward"] == "Timed()"
        with pytest.raises(ValueError, match=r"now 'Timed\(wanted=2, marks=\[1\]\)'.*regrade=True"):
            call(Timed(wanted=2, marks=[1], workers=3))


def test_completions_can_be_graded_anew_by_another_reward(tmp_path):
    output = tmp_path / "t.jsonl"
    with serving(lambda question, count: f"{question[1:]} {question[1:]}") as server:
        assert verified_traces(problems(), endpoint(server), Graded(), output, samples=1)["trace"] == [None] * 4
        anew = verified_traces(problems(), endpoint(server), Graded(2), output, samples=1, regrade=True)
        assert anew["trace"] == ["0 0", "1 1", "2 2", "3 3"]
        again = verified_traces(problems(), endpoint(server), Graded(2), output, samples=1)
        assert again["trace"] == anew["trace"]
        # killed before it had graded anew: the verdicts of the old reward are not taken for the new one's
        journal = Path(f"{output}.journal")
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-4]))
        again = verified_traces(problems(), endpoint(server), Graded(2), output, samples=1)
        assert again["trace"] == anew["trace"]
        assert sum(server.asked.values()) == 4


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "t.jsonl").write_text("mine")
    source = Endpoint("m", "http://127.0.0.1:1/v1", api_key_env=None)
    for name, message in (("t.jsonl", "exists, without a journal"), ("t.csv", r"must end in \.jsonl or \.parquet")):
        with pytest.raises(ValueError, match=message):
            verified_traces(problems(), source, right, tmp_path / name)
    assert (tmp_path / "t.jsonl").read_text() == "mine"
    with pytest.raises(ValueError, match="has a column 'trace' already"):
        verified_traces(problems().add_column("trace", ["x"] * 4), source, right, tmp_path / "u.jsonl")
    messages = [[{"role": "user", "content": "x"}]] * 4
    with pytest.raises(TypeError, match="'privileged_context' holds messages"):
        verified_traces(problems().add_column("privileged_context", messages), source, right, tmp_path / "u.jsonl")
    for column in ("pass_rate", "pass_rate_samples"):
        with pytest.raises(ValueError, match=f"has a column '{column}' already"):
            pass_rate(problems().add_column(column, ["x"] * 4), source, right)


def test_mistakes_are_told_before_anything_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with serving(nth_is_right(1)) as server:
        good = endpoint(server)
        cases = [
            (dict(keep="longest"), "keep='longest'"),
            (dict(samples=0), "samples=0"),
            (dict(source=endpoint(server, api_key_env="NO_SUCH_KEY")), "api_key_env='NO_SUCH_KEY'.*api_key_env=None"),
            (
                dict(dataset=problems().rename_column("answer", "a"), reward=Graded()),
                "no column 'answer'.*'prompt', 'a'",
            ),
            (dict(dataset=problems().rename_column("prompt", "p")), "no column 'prompt'"),
        ]
        for change, message in cases:
            arguments = {"dataset": problems(), "source": good, "reward": right, "output": tmp_path / "t.jsonl"}
            with pytest.raises(ValueError, match=message):
                verified_traces(**{**arguments, **change})
        with pytest.raises(TypeError, match=r"IterableDataset.*numbered rows"):
            verified_traces(IterableDataset.from_generator(lambda: iter([])), good, right, tmp_path / "t.jsonl")
        with pytest.raises(TypeError, match="row 1 is a NoneType"):
            none = Dataset.from_dict({"prompt": ["q", None], "answer": ["0", "1"]})
            verified_traces(none, good, right, tmp_path / "t.jsonl")

        async def later(**columns):
            return []

        with pytest.raises(TypeError, match="later is asynchronous"):
            verified_traces(problems(), good, later, tmp_path / "t.jsonl")
        for field in ("concurrency", "retries", "timeout"):
            with pytest.raises(ValueError, match=f"{field}=-1 must be"):
                endpoint(server, **{field: -1})
        with pytest.raises(ValueError, match="samples=0"):
            pass_rate(problems(), good, right, samples=0)
        assert not server.asked


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "fault", [500, 400, "cut", "html", "slow", {"none": 1}, {"content": "so 1", "finish_reason": "content_filter"}],
    ids=str,
)  # fmt: skip
def test_what_fails_is_counted_and_tried_again_by_the_next_call(tmp_path, caplog, fault):
    broken, release = threading.Event(), threading.Event()

    def answer(question, count):
        if question != "q1" or broken.is_set():
            return f"so {question[1:]}"
        if fault == "slow":
            release.wait(10)
            return "so 1"
        return dict(fault) if isinstance(fault, dict) else fault

    call = lambda: verified_traces(  # noqa: E731
        problems(3), endpoint(server, timeout=0.5 if fault == "slow" else 10.0), right, tmp_path / "t.jsonl", samples=1
    )
    with serving(answer) as server:
        assert call()["trace"] == ["so 0", None, "so 2"]
        assert "1 completions failed; the next call tries them again" in caplog.text
        broken.set()
        release.set()
        assert call()["trace"] == ["so 0", "so 1", "so 2"]
        assert server.asked == {"q0": 1, "q1": 2, "q2": 1}


@pytest.mark.parametrize("fault", [429, 503, "cut"])
def test_passing_faults_are_retried(tmp_path, fault):
    with serving(lambda question, count: fault if count == 1 else f"so {question[1:]}") as server:
        rows = verified_traces(problems(1), endpoint(server, retries=2), right, tmp_path / "t.jsonl", samples=1)
        assert server.asked == {"q0": 2}
    assert rows["trace"] == ["so 0"]


@pytest.mark.parametrize(
    "status, told",
    [
        (401, "api_key_env"),
        (403, "api_key_env"),
        (404, "model"),
        (402, "the account"),
        ((429, "insufficient_quota"), "the account"),
    ],
)
def test_a_refusal_stops_at_once_loses_nothing_and_keeps_the_key(tmp_path, monkeypatch, caplog, status, told):
    monkeypatch.setenv("TEST_KEY", KEY)
    output, mended = tmp_path / "t.jsonl", threading.Event()
    refused = lambda question: int(question[1:]) >= 5 and not mended.is_set()  # noqa: E731
    with serving(lambda question, count: status if refused(question) else f"so {question[1:]}") as server:
        source = endpoint(server, api_key_env="TEST_KEY", concurrency=2, retries=2)
        with pytest.raises(SourceFailed, match=f"refuses model 'm'.*Error code: 4.*Check {told}") as error:
            verified_traces(problems(20), source, right, output, samples=1)
        assert len(server.asked) <= 5 + 2 * source.concurrency, "no more is asked for"
        assert server.keys == {f"Bearer {KEY}"}
        assert texts_in(output) == 5
        mended.set()
        rows = verified_traces(problems(20), source, right, output, samples=1)
        assert None not in rows["trace"]
        assert set(server.answered.values()) == {1}
    assert "<key>" in str(error.value), "the server repeats the key in its message"
    for text in (str(error.value), repr(source), caplog.text, Path(f"{output}.journal").read_text()):
        assert KEY not in text


def test_a_server_that_is_gone_is_given_up(tmp_path):
    with serving(lambda question, count: 500) as server:
        with pytest.raises(SourceFailed, match=f"20 requests in a row failed at {server.url}; the last: Internal"):
            verified_traces(problems(200), endpoint(server), right, tmp_path / "t.jsonl")
        assert sum(server.asked.values()) <= 20 + 2 * 4


def test_an_ungraded_completion_is_a_failure_and_is_graded_again_for_nothing(tmp_path, caplog):
    output, able = tmp_path / "t.jsonl", []

    def reward(prompts, completions, answer, **columns):
        grades = right(prompts, completions, answer)
        return [None if a == "1" and not able else grade for a, grade in zip(answer, grades, strict=True)]

    with serving(nth_is_right(1)) as server:
        rows = verified_traces(problems(), endpoint(server), reward, output, samples=1)
        assert rows["trace"] == ["so 0", None, "so 2", "so 3"]
        assert "reward could not judge a completion of row 1" in caplog.text
        able.append(True)
        rows = verified_traces(problems(), endpoint(server), reward, output, samples=1)
        assert rows["trace"] == ["so 0", "so 1", "so 2", "so 3"]
        assert set(server.asked.values()) == {1}


def test_a_reward_that_raises_loses_nothing(tmp_path):
    def reward(**columns):
        raise RuntimeError("broken")

    output = tmp_path / "t.jsonl"
    with serving(nth_is_right(1)) as server:
        with pytest.raises(RuntimeError, match="broken"):
            verified_traces(problems(), endpoint(server), reward, output, samples=1)
        rows = verified_traces(problems(), endpoint(server), right, output, samples=1, regrade=True)
        assert set(server.asked.values()) == {1}
    assert None not in rows["trace"]
    with pytest.raises(ValueError, match="gave 1 rewards for 4 completions"):
        verified_traces(problems(), endpoint(server), lambda **c: [1.0], output, samples=1, regrade=True)


def test_a_reward_that_needs_no_column_grades_every_row(tmp_path):
    pytest.importorskip("jsonschema_rs")
    reward = JSONSchemaReward(schema='{"type": "integer"}')
    rows = Dataset.from_dict({"prompt": ["q0", "q1"]})
    with serving(lambda question, count: {"q0": "7", "q1": "no"}[question]) as server:
        assert verified_traces(rows, endpoint(server), reward, tmp_path / "t.jsonl")["trace"] == ["7", None]
        assert pass_rate(rows, endpoint(server), reward, samples=1)["pass_rate"] == [1.0, 0.0]


def test_rows_without_a_reference_are_not_paid_for(tmp_path):
    rows = Dataset.from_dict({"prompt": ["q0", "q1"], "answer": ["0", None]})
    with serving(nth_is_right(1)) as server:
        assert verified_traces(rows, endpoint(server), Graded(), tmp_path / "t.jsonl")["trace"] == ["so 0", None]
        assert server.asked == {"q0": 1}


def test_an_empty_completion_is_a_wrong_answer_that_was_paid_for(tmp_path):
    with serving(lambda question, count: {"content": None}) as server:
        for _ in range(2):
            rows = pass_rate(problems(1), endpoint(server), right, samples=2, output=tmp_path / "p.jsonl")
        assert server.asked == {"q0": 2}
    assert rows["pass_rate"] == [0.0]


def test_the_bar_counts_what_is_kept_rejected_and_failed(tmp_path, capfd):
    replies = {"q0": "so 0", "q1": "so 1", "q2": "so -1", "q3": 500}
    with serving(lambda question, count: replies[question]) as server:
        verified_traces(problems(), endpoint(server), right, tmp_path / "t.jsonl", samples=1)
    bar = capfd.readouterr().err
    assert "traces, round 1 of 1: 100%" in bar
    assert "kept=2, rejected=1, failed=1" in bar


def test_prompts_that_the_server_refuses_do_not_end_the_run(tmp_path):
    with serving(lambda question, count: 400 if int(question[1:]) < 25 else f"so {question[1:]}") as server:
        rows = verified_traces(problems(26), endpoint(server), right, tmp_path / "t.jsonl", samples=1)
    assert rows["trace"] == [None] * 25 + ["so 25"]


def test_a_full_disk_stops_the_run():
    def full(index, text):
        raise OSError("no space left")

    with serving(nth_is_right(1)) as server:
        with pytest.raises(OSError, match="no space left"):
            list(endpoint(server, concurrency=2).complete(["q0"] * 20, [0] * 20, full))
        assert sum(server.asked.values()) <= 4, "no more is paid for"


def test_half_an_emoji_is_no_text_and_loses_nothing(tmp_path):
    with serving(lambda question, count: "\ud83d so 0") as server:
        rows = verified_traces(problems(1), endpoint(server), right, tmp_path / "t.parquet")
    assert rows["trace"] == ["? so 0"]


# ---------------------------------------------------------------------- pass rates


def test_the_pass_rate_is_the_share_of_graded_completions_that_pass(tmp_path):
    def reward(prompts, completions, answer, **columns):
        return [None if text == "?" else float(text == "yes") for text in completions]

    replies = {"q0": ["yes", "no", "yes", "yes"], "q1": ["no"] * 4, "q2": ["yes", "?", "no", "?"], "q3": ["?"] * 4}
    with serving(lambda question, count: replies[question][count - 1]) as server:
        rows = pass_rate(problems(), endpoint(server), reward, samples=4)
    assert rows["pass_rate"] == [0.75, 0.0, 0.5, None]
    assert rows["pass_rate_samples"] == [4, 4, 2, 0]


def test_a_pass_rate_goes_on_from_its_journal(tmp_path):
    output = tmp_path / "p.parquet"
    up = threading.Event()
    with serving(lambda question, count: "so 0" if question == "q0" or up.is_set() else 500) as server:
        rows = pass_rate(problems(2), endpoint(server), right, samples=3, output=output)
        assert rows["pass_rate"] == [1.0, None]
        up.set()
        rows = pass_rate(problems(2), endpoint(server), right, samples=3, output=output)
        assert rows["pass_rate"] == [1.0, 0.0]
        assert rows["pass_rate_samples"] == [3, 3]
        assert server.answered == {"q0": 3, "q1": 3}
    assert load_dataset("parquet", data_files=str(output), split="train").to_list() == rows.to_list()


# ---------------------------------------------------------------------- a model in this process


@pytest.fixture(scope="module")
def local():
    options = dict(temperature=1.0, max_tokens=6, batch_size=3)
    return lambda tokenizer=None, **changes: LocalModel(
        tiny_llama(), tokenizer or byte_tokenizer(), **{**options, **changes}
    )


def completions(source, prompts, seeds):
    kept = {}
    arrived = dict(source.complete(prompts, seeds, kept.__setitem__))
    assert kept == arrived
    return [arrived[i] for i in range(len(prompts))]


def test_a_local_model_repeats_itself_for_the_same_seeds_and_no_others(local):
    prompts, seeds = ["one", "three", "one", "2"], [0, 1, 2, 3]
    source = local()
    torch.manual_seed(5)
    first = completions(source, prompts, seeds)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after), "the caller's random numbers are left alone"
    assert completions(local(), prompts, seeds) == first
    assert completions(local(), prompts, [4, 5, 6, 7]) != first
    assert completions(local(seed=1), prompts, seeds) != first


def test_padding_changes_no_completion(local):
    prompts, tokenizer = ["a", "a much longer prompt", "of three"], byte_tokenizer()
    tokenizer.padding_side = "right"
    together = completions(local(temperature=0.0, tokenizer=tokenizer), prompts, [0, 1, 2])
    alone = completions(local(temperature=0.0, batch_size=1), prompts, [0, 1, 2])
    assert tokenizer.padding_side == "right"
    assert together == alone
    assert len(set(together)) == 3


def test_a_local_model_reads_the_chat_template(local):
    plain = "<|user|>q</s><|assistant|>"
    conversation = [{"role": "user", "content": "q"}]
    greedy = local(temperature=0.0, max_tokens=12)
    tokenizer = byte_tokenizer()
    inputs = tokenizer(plain, return_tensors="pt")["input_ids"]
    expected = tiny_llama().generate(inputs, do_sample=False, max_new_tokens=12)[:, inputs.shape[1] :]
    assert completions(greedy, [conversation], [0]) == tokenizer.batch_decode(expected, skip_special_tokens=True)
    thinking_off = local(temperature=0.0, max_tokens=12, chat_template_kwargs={"no_think": True})
    assert completions(thinking_off, [conversation], [0]) != completions(greedy, [conversation], [0])


def test_a_model_on_disk_is_the_loaded_one(tmp_path, local):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    source = LocalModel(str(tmp_path), max_tokens=6, batch_size=3)
    assert completions(source, ["one", "two"], [0, 1]) == completions(local(), ["one", "two"], [0, 1])
    assert source.settings["model"] == str(tmp_path)


def test_a_local_model_measures_a_pass_rate_and_stays_in_training_mode(tmp_path):
    source = LocalModel(tiny_llama().train(), byte_tokenizer(), max_tokens=4, batch_size=4)
    short = lambda completions, **columns: [float(len(text.encode()) % 2) for text in completions]  # noqa: E731
    rows = pass_rate(problems(3), source, short, samples=6, output=tmp_path / "p.jsonl")
    texts = {(e["row"], e["sample"]): e["text"] for e in entries(tmp_path / "p.jsonl") if "text" in e}
    expected = [sum(len(texts[row, k].encode()) % 2 for k in range(6)) / 6 for row in range(3)]
    assert rows["pass_rate"] == expected
    assert len({texts[0, k] for k in range(6)}) > 1, "samples of one prompt differ"
    assert source.model.training
