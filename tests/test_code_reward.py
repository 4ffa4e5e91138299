"""code_reward: verdicts, what hostile programs can reach, and what is left of them."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import trl_rlsd.rewards.sandbox as sandboxes
from trl_rlsd.rewards.code import CodeReward, code_reward, extract_program
from trl_rlsd.rewards.grading import CannotGrade
from trl_rlsd.rewards.limits import Limits, Outcome
from trl_rlsd.rewards.sandbox import Bubblewrap, Unsandboxed
from trl_rlsd.rewards.seccomp import seccomp_filter


def why_not() -> str:
    try:
        Bubblewrap().check()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return ""


WHY_NOT = why_not()
isolated = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

SHORT = Limits(wall_seconds=4, cpu_seconds=1, memory_mb=256, file_mb=16, output_kb=512)
INCREMENT = "def f(x):\n    return x + 1\n"
TOTAL = "print(sum(map(int, input().split())))"
# on the command line of every process of a sandbox
MARK = f"mark-{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Marked(Bubblewrap):
    mark: str = MARK

    def run(self, files, command, stdin, limits):
        return super().run(files, [*command, self.mark], stdin, limits)


@pytest.fixture
def unchecked():
    """Of which no sandbox is known to work."""
    sandboxes._check_once.cache_clear()
    yield
    sandboxes._check_once.cache_clear()


def processes(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes() if folder.name.isdecimal() else b""
        except OSError:
            continue
        if mark.encode() in command and int(folder.name) != os.getpid():
            found.append(command.decode(errors="replace"))
    return found


def grades(programs, tests, **options):
    """Of several programs with the same tests; failures are an error here."""
    counted = {}
    options = {"limits": SHORT, "sandbox": Marked(), "workers": 4, **options}
    rewards = CodeReward(**options)(
        None, programs, tests=[tests] * len(programs), log_metric=lambda name, value: counted.update({name: value})
    )
    assert counted == {"code_failures": 0}
    return rewards


def fenced(program: str, language: str = "python") -> str:
    return f"```{language}\n{program}\n```"


def echo(program: str, expected: str) -> bool:
    return grades([program], [{"input": "", "output": expected}]) == [1.0]


@pytest.mark.parametrize(
    "text, program",
    [
        (fenced("a = 1"), "a = 1"),
        (fenced("a = 1") + "\nor better\n" + fenced("a = 2", "py") + "\nIt prints\n" + fenced("2", ""), "a = 2"),
        (fenced("a = 1", ""), "a = 1"),
        ("Here:\n```python\na = 1\nb = 2", "a = 1\nb = 2"),
        ("<think>" + fenced("a = 1") + "</think>\na = 2", "a = 2"),
        ("<think>" + fenced("a = 1"), ""),
        (fenced("int a;", "cpp"), ""),
        ("a = 1", "a = 1"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_python_block_after_the_thinking(text, program):
    assert extract_program(text).strip() == program


def test_finding_the_program_takes_time_linear_in_the_text():
    texts = ["`" * 10**6, "```python\n" * 10**5, "``` " * 250_000, "```" + " " * 10**6, "\n" * 10**6, "x" * 10**6]
    start = time.perf_counter()
    for text in texts:
        extract_program(text)
    assert time.perf_counter() - start < 10


@isolated
def test_all_cases_earn_one_and_some_their_share():
    call = {"fn_name": "f", "inputs": [[1], [2]]}
    method = "class Solution:\n    def pair(self, a, b): return (a, b)"
    rows = [
        (INCREMENT, "assert f(1) == 2\nassert f(-1) == 0", 1.0),
        (INCREMENT, ["assert f(1) == 2", "assert f(1) == 3", "assert f(3) == 4", "f()"], 0.5),
        (INCREMENT + "if __name__ == '__main__':\n    f(input())", "assert f(1) == 2", 1.0),
        (TOTAL, {"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "7"]}, 1.0),
        (TOTAL, {"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "8"], "fn_name": None}, 0.5),
        (TOTAL, json.dumps({"inputs": ["1\n", "x"], "outputs": ["1", "1"]}), 0.5),
        (TOTAL, {"input": ["1 2", "3"], "output": ["3", "4"]}, 0.5),
        (TOTAL, [{"input": "1 2", "output": "3  \n\n"}, {"input": ["5"], "output": ["5"]}], 1.0),
        ("print('a '); print(' b'); exit()", [{"input": "", "output": "a\n b"}], 1.0),
        ("print(3); raise SystemExit(2)", [{"input": "", "output": "3"}], 0.0),
        (INCREMENT, {**call, "outputs": [2, 3]}, 1.0),
        (INCREMENT, {**call, "outputs": [[2], [3]]}, 1.0),
        (INCREMENT, {**call, "outputs": [2, [3]]}, 0.5),
        ("def f(x): return {2}", {**call, "outputs": [[2], [3]]}, 0.0),
        ("def g(x): return x + 1", {**call, "outputs": [2, 3]}, 0.0),
        (method, [{"fn_name": "pair", "input": '[1]\n"x"', "output": '[[1], "x"]'}], 1.0),
    ]
    programs, tests, shares = zip(*rows, strict=True)
    for partial, expected in ((True, list(shares)), (False, [float(share == 1) for share in shares])):
        reward = CodeReward(partial=partial, limits=SHORT)
        assert reward(None, [fenced(program) for program in programs], tests=tests) == expected


@isolated
def test_tests_that_cannot_be_read_are_not_a_wrong_answer():
    unreadable = [
        *("", "# nothing", "def", "[1", "{}", [], {}, 7, [7], [{"input": "1"}], {"inputs": "1", "outputs": "1"}),
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        [{"fn_name": "f", "input": "x", "output": "1"}],
    ]
    counted = {}
    rewards = code_reward(
        None,
        [INCREMENT] * (len(unreadable) + 1),
        tests=[*unreadable, "assert f(1) == 2"],
        log_metric=lambda name, value: counted.update({name: value}),
    )
    assert rewards == [None] * len(unreadable) + [1.0]
    assert counted == {"code_failures": len(unreadable)}


@isolated
def test_a_malformed_completion_is_a_wrong_answer():
    completions = [
        "",
        "I do not know.",
        "```python\n```",
        "x" * 10**6,
        "(" * 10**6,
        "x = " + "-" * 10**6 + "1",
        bytes(range(256)).decode("latin1") * 100,
        "def f(x): return x + 1\x00",
        "def f(x): return '\ud800'",
        "<think>" + fenced(INCREMENT),
        "```" * 10**5,
    ]
    assert grades(completions, "assert f(1) == 2") == [0.0] * len(completions)
    assert grades(["# " + "x" * 10**6 + "\n" + INCREMENT, "print('\\ud800')"], "assert f(1) == 2") == [1.0, 0.0]


# each prints 4, which is right, if nothing stops it
ATTACKS = {
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(1000); print(4)",
    "endless loop that ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that endures": """
import os
while True:
    try: os.fork()
    except OSError: pass""",
    "thread bomb": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(1000,)).start()""",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))",
    "memory bomb of many processes": """
import os, time
os.fork()
x = bytearray(180 * 10**6)
time.sleep(1000)""",
    "gigabytes of stdout": "import os\nwhile True: os.write(1, b'x' * 10**6)",
    "gigabytes of stderr": "import os\nwhile True: os.write(2, b'x' * 10**6)",
    "huge file": "file = open('x', 'wb')\nwhile True: file.write(b'x' * 10**6)",
    "many files": "for i in range(10**6): open(f'/tmp/{i}', 'wb').write(b'x' * 10**6)\nprint(4)",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**6): x = [x]
repr(x)
print(4)""",
    "crash": "import ctypes\nctypes.string_at(0)\nprint(4)",
    "stops itself": "import os\nos.kill(os.getpid(), 19)\nprint(4)",
    "kills the runner": "import os\nos.kill(os.getppid(), 9)\nprint(4)",
    "kills all": "import os\nos.kill(-1, 9)\nprint(4)",
}


@isolated
def test_hostile_programs_are_wrong_within_their_limits_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start = time.perf_counter()
    rewards = grades([*ATTACKS.values(), "print(4)"], [{"input": "", "output": "4"}])
    assert rewards == [0.0] * len(ATTACKS) + [1.0]
    # all of them at once: 18 programs, 4 at a time, 4 s each, and the time of a busy machine
    assert time.perf_counter() - start < 40
    assert processes(MARK) == []
    assert list(tmp_path.iterdir()) == []


@isolated
def test_a_daemon_ends_with_its_program_and_holds_nothing_up():
    daemon = """
import os, signal, time
if os.path.exists('/tmp/daemon'):  # left by the case before
    try:
        os.kill(int(open('/tmp/daemon').read()), 0)
        print('alive')
    except ProcessLookupError:
        print(4)
elif os.fork():
    os.wait()
    while not os.path.exists('/tmp/daemon'): time.sleep(0.01)
    print(4)
else:
    os.setsid()
    if os.fork(): os._exit(0)
    with open('/tmp/started', 'w') as file: file.write(str(os.getpid()))
    os.rename('/tmp/started', '/tmp/daemon')
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if {closed}: os.closerange(0, 256)
    time.sleep(1000)
"""
    programs = [daemon.format(closed=closed) for closed in (True, False)]
    start = time.perf_counter()
    assert grades(programs, [{"input": "", "output": "4"}] * 2) == [1.0, 1.0]
    assert time.perf_counter() - start < SHORT.wall_seconds
    assert processes(MARK) == []


@isolated
def test_nothing_is_left_when_the_trainer_is_killed():
    mark = f"mark-{uuid.uuid4().hex}"
    grader = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_code_reward import CodeReward, Marked
CodeReward(sandbox=Marked(mark={mark!r}))(None, ["import time; time.sleep(1000)"], tests=[[dict(input="", output="")]])
"""
    process = subprocess.Popen([sys.executable, "-c", grader], cwd=Path(__file__).parent.parent)

    def until(condition):
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        return condition()

    # the grader, bubblewrap, process 1, the runner and the program
    assert until(lambda: len(processes(mark)) == 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert until(lambda: processes(mark) == [])


@isolated
def test_a_program_reaches_neither_files_nor_environment_nor_network(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o644)
    monkeypatch.setenv("SECRET", "key")
    look = """
import glob, os
for read in (lambda: open({path!r}).read(), lambda: os.environ['SECRET'], lambda: os.environb[b'SECRET'].decode()):
    try: print(read())
    except (OSError, KeyError) as error: print('denied')
print(glob.glob('/proc/*/environ'), glob.glob('/home/*'), glob.glob('/mnt/*'), glob.glob('/root/*'))
print(os.path.exists('/etc/passwd'), os.path.exists('/etc/hostname'), len(os.environ) < 12)
"""
    assert echo(look.format(path=str(secret)), "denied\n" * 3 + "[] [] [] []\nFalse False True")
    # the file is there
    assert grades([look.format(path=str(secret))], [{"input": "", "output": ""}], unsafe=True, sandbox=None) == [0.0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"""
import socket
for address in (('127.0.0.1', {server.getsockname()[1]}), ('1.1.1.1', 53)):
    try:
        socket.create_connection(address, timeout=1)
        print('connected')
    except OSError:
        print('denied')
"""
        assert echo(connect, "denied\ndenied")


@isolated
def test_a_program_writes_nowhere_but_in_its_folder():
    name = f"mark-{uuid.uuid4().hex}"
    folders = ["/", "/usr", "/usr/lib", "/dev", "/dev/shm", "/var/tmp", "/etc", "/packages", sys.base_prefix + "/lib"]
    program = f"""
import os
for folder in {folders}:
    try:
        open(folder + '/{name}', 'w').write('x')
        print('wrote')
    except OSError:
        pass
open('{name}', 'w').write('x')
print(os.getcwd().startswith('/tmp/'), open('{name}').read(), os.listdir())
"""
    # a fresh folder for the second case
    expected = {"input": "", "output": f"True x ['{name}']"}
    assert grades([program], [expected] * 2) == [1.0]
    assert not any(Path(folder, name).exists() for folder in [*folders, "/tmp", "/tmp/0"])


@isolated
def test_a_program_has_no_privileges_and_none_of_the_filtered_system_calls():
    program = f"""
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
calls = dict(unshare=(0x10000000,), memfd_create=(b'x', 0), shmget=(0, 4096, 0o600), ptrace=(0, 0, 0, 0))
for name, arguments in calls.items() if {bool(seccomp_filter())} else []:
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) != -1 or ctypes.get_errno() != errno.EPERM:
        print(name, 'is permitted')
if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) != -1:
    print('mounted')
if libc.capset(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522)), ctypes.byref((ctypes.c_uint32 * 6)(1))) != -1:
    print('has a capability')
try:
    os.kill(1, 9)
except PermissionError:
    pass
print('alive')
"""
    assert echo(program, "alive")


# with f wrong, none may pass `assert f(1) == 2`
FORGERIES = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "def f(x): raise SystemExit(0)",
    "import os\ndef f(x): os._exit(0)",
    "print('ready'); print('\"null\"'); print('null')\ndef f(x): print('\"null\"', flush=True)",
    "import atexit, os\natexit.register(lambda: os._exit(0))\natexit.register(print, 'null')\ndef f(x): pass",
    "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(x): pass",
    "import os\nos.write = lambda *a: 0\nos.read = lambda *a: b''\nos.kill = print\ndef f(x): pass",
    "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = AssertionError\ndef f(x): pass",
    "import sys\nsys.excepthook = lambda *a: sys.exit(0)\ndef f(x): pass",
    "import sys\nsys.modules['__main__'].__dict__.clear()\ndef f(x): pass",
    """
import os
def f(x):
    for fd in range(256):
        try: os.write(fd, b'ready\\n"null"\\n')
        except OSError: pass""",
    "import os\nos.closerange(0, 256)\ndef f(x): pass",
    "import os\nif os.fork(): os._exit(0)\ndef f(x): pass",
    "import os\ndef f(x):\n    if os.fork(): os._exit(0)",
    "import os\nos.kill(os.getppid(), 9)\ndef f(x): pass",
    "import threading, os\nthreading.Timer(0.1, os._exit, [0]).start()\ndef f(x): threading.Event().wait()",
    "import signal, os\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.1)\ndef f(x): signal.pause()",
    "try:\n    raise Exception\nexcept BaseException:\n    pass\ndef f(x):\n    try: assert False\n    except: pass",
]


@isolated
@pytest.mark.parametrize(
    "tests",
    ["assert f(1) == 2", {"fn_name": "f", "inputs": [[1]], "outputs": [2]}, [{"input": "", "output": "2"}]],
    ids=["code", "call", "stdin"],
)
def test_a_verdict_cannot_be_forged_by_exits_prints_handlers_or_replaced_builtins(tests):
    assert grades(FORGERIES, tests) == [0.0] * len(FORGERIES)


@isolated
def test_each_limit_says_that_it_ended_the_run():
    def run(program, wall_seconds=20):
        return Bubblewrap().run({}, ["python3", "-c", program], "", replace(SHORT, wall_seconds=wall_seconds))

    assert run("print(1); import sys; print(2, file=sys.stderr); sys.exit(3)") == Outcome("1\n", "2\n", 3)
    sleep = "import os, time\nos.write(1, b'1')\n{}\ntime.sleep(1000)"
    assert run(sleep.format(""), wall_seconds=1) == Outcome("1", "", None, "timeout")
    assert run(sleep.format("os.closerange(0, 3)"), wall_seconds=1) == Outcome("1", "", None, "timeout")
    assert run(ATTACKS["memory bomb of many processes"]).reason == "memory"
    outcome = run(ATTACKS["gigabytes of stdout"])
    assert outcome.reason == "output"
    assert len(outcome.stdout) < 2 * SHORT.output_kb * 1024
    assert "MemoryError" in run(ATTACKS["memory bomb"]).stderr
    assert "File too large" in run(ATTACKS["huge file"]).stderr
    assert "No space left" in run(ATTACKS["many files"]).stderr


@isolated
def test_packages_are_seen_where_they_are_given(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "extra.py").write_text("value = 7")
    programs = ["import extra; print(extra.value)"]
    tests = [{"input": "", "output": "7"}]
    assert grades(programs, tests) == [0.0]
    assert grades(programs, tests, sandbox=Marked(packages=str(tmp_path))) == [1.0]
    assert grades(programs, tests, sandbox=Unsandboxed(packages=str(tmp_path))) == [1.0]


@isolated
def test_rewards_are_in_order_in_any_thread_and_through_pickle():
    reward = pickle.loads(pickle.dumps(CodeReward(limits=SHORT, sandbox=Marked(), workers=3)))
    programs = [f"import time; time.sleep({(9 - i) / 50}); print({i})" for i in range(10)]
    tests = [[{"input": "", "output": str(i - i % 2)}] for i in range(10)]
    results = []
    threads = [threading.Thread(target=lambda: results.append(reward(None, programs, tests=tests))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0, 0.0] * 5] * 2


@dataclass(frozen=True)
class Broken:
    outcome: Outcome | Exception

    def check(self):
        pass

    def run(self, files, command, stdin, limits):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    "outcome",
    [CannotGrade("gone"), OSError("gone"), Outcome("", "no python3", 127), Outcome("", "", None, "timeout")],
)
def test_a_sandbox_that_fails_is_not_a_wrong_answer(outcome):
    counted = {}
    rewards = CodeReward(sandbox=Broken(outcome))(
        None, [TOTAL], tests=[[{"input": "1", "output": "1"}]], log_metric=lambda *metric: counted.update([metric])
    )
    assert rewards == [None]
    assert counted == {"code_failures": 1}


def test_without_an_isolator_nothing_runs(tmp_path, monkeypatch, unchecked):
    monkeypatch.setenv("PATH", str(tmp_path))
    reward = CodeReward()
    for call in (reward.check, lambda: reward(None, [INCREMENT], tests=["assert f(1) == 2"])):
        with pytest.raises(ImportError, match=r"bwrap is not installed.*apt-get install bubblewrap.*unsafe=True"):
            call()


def test_a_kernel_that_forbids_namespaces_is_named(tmp_path, monkeypatch, unchecked):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reward = CodeReward()
    for call in (reward.check, lambda: reward(None, [INCREMENT], tests=["assert f(1) == 2"])):
        with pytest.raises(RuntimeError, match=r"No permissions to create new namespace.*user namespaces"):
            call()


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel binds all users but root")
def test_a_limit_that_the_kernel_does_not_keep_is_an_error(monkeypatch, unchecked):
    monkeypatch.setattr(sandboxes, "_is_root", lambda: False)
    with pytest.raises(RuntimeError, match="does not keep the limit of 8 processes"):
        Bubblewrap().check()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit of util-linux is missing")
def test_unsafe_has_limits_and_a_clean_environment_and_must_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SECRET", "key")
    programs = [
        "import os; print('SECRET' in os.environ); open('x', 'w')",
        "while True: pass",
        "import time; time.sleep(1000)",
        "x = bytearray(10**9)",
    ]
    limits = Limits(wall_seconds=3, cpu_seconds=1, memory_mb=256)
    assert CodeReward().unsafe is False
    rewards = CodeReward(unsafe=True, limits=limits)(None, programs, tests=[[{"input": "", "output": "False"}]] * 4)
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    assert list(tmp_path.iterdir()) == []
    assert processes(str(tmp_path)) == []
    with pytest.raises(ValueError, match="unsafe=True and sandbox"):
        CodeReward(unsafe=True, sandbox=Bubblewrap())


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"Limits.memory_mb is 0"):
        Limits(memory_mb=0)


@isolated
def test_limits_under_which_nothing_passes_are_found_before_training():
    CodeReward(limits=SHORT).check()
    with pytest.raises(RuntimeError, match=r"Limits\(.*output_kb=0.001.* are too tight"):
        CodeReward(limits=replace(SHORT, output_kb=0.001)).check()
    for limits in (replace(SHORT, processes=1), replace(SHORT, memory_mb=2), replace(SHORT, file_mb=0.001)):
        with pytest.raises(CannotGrade, match="did not come to run a program"):
            CodeReward(limits=limits).check()
