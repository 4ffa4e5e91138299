"""Runs inside the sandbox: a program on each of its cases, each in a process of its own.

Reads a job from stdin, JSON: `program`, its source; `cases`, each with `stdin`, or with `test`, code that raises where
the program is wrong, or with `call` and `args`, a function and its arguments; `stop`, whether to end at the first case
that fails; `output`, the bytes of an answer. Prints "ready" when the first process is there, then a line of JSON for
each case as it ends: what the program printed or returned; null where it failed. Which answers are right is not known
here, tests apart.

This file stands alone: it is sent to the sandbox, which need not have the package.
"""

import builtins
import json
import os
import signal
import sys
import time
import types
from contextlib import suppress


# all other processes that it may signal are the program's
ALONE = os.environ.pop("OWN_PID_NAMESPACE", None) == "1"


def main() -> None:
    with open(0, "rb", closefd=False) as stdin:
        job = json.loads(stdin.read())
    report = os.dup(1)
    for number in range(len(job["cases"])):
        answer = answer_of(job, number, report)
        with open(report, "w", closefd=False) as lines:
            lines.write(json.dumps(answer) + "\n")
        if answer is None and job["stop"]:
            break


def answer_of(job: dict, number: int, report: int) -> str | None:
    case, limit, folder = job["cases"][number], job["output"], str(number)
    os.mkdir(folder)
    stdin, stdout, result = nameless(case.get("stdin", "")), nameless(), nameless()
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        if number == 0:
            os.write(report, b"ready\n")
        os.setsid()
        for fd in (report, writes):
            os.close(fd)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.chdir(folder)
        sys.argv = ["program.py"]
        attempt(job["program"], case, reads, result)
        sys.exit()  # as any program ends: output flushed, threads joined
    # made after the fork: the program's process does not hold it, but can read it from the pipe
    token = os.urandom(16).hex()
    os.write(writes, token.encode())
    status = wait_for(child)
    if "stdin" in case:
        answer = content(stdout, limit) if status == 0 else None
    else:
        answer = content(result, limit)
        answer = answer[len(token) :] if answer and answer.startswith(token) else None
    for fd in (stdin, stdout, result, reads, writes):
        os.close(fd)
    return answer


def attempt(program: str, case: dict, token: int, result: int) -> None:
    """In the program's process; what is used after the program ran is put back first."""
    code = compile(program, "program.py", "exec")
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # python -S has none
    # a program with functions to test may have a main part; it is not to run
    name = "__main__" if "stdin" in case else "program"
    module = sys.modules[name] = types.ModuleType(name)
    originals, read, write, kill = dict(vars(builtins)), os.read, os.write, os.kill
    exec(code, vars(module))
    if "stdin" in case:
        return
    vars(builtins).update(originals)
    value = None
    if "test" in case:
        exec(compile(case["test"], "test.py", "exec"), vars(module))
    else:
        owner = module if hasattr(module, case["call"]) else module.Solution()
        value = getattr(owner, case["call"])(*case["args"])
    write(result, read(token, 32) + json.dumps(value).encode())
    kill(os.getpid(), signal.SIGKILL)  # neither exit handlers nor threads matter any more


def nameless(text: str = "") -> int:
    """A file that no process finds by its name, at its beginning."""
    fd = os.open("nameless", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("nameless")
    with open(fd, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "replace"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def content(fd: int, limit: int) -> str | None:
    if os.fstat(fd).st_size > limit:
        return None
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def wait_for(child: int) -> int:
    """Its exit code, once it and what it left running is gone."""
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        for _ in range(1000 if ALONE else 1):  # until process 1 has reaped them
            # without a process namespace, what changed its process group survives
            os.kill(-1 if ALONE else -child, signal.SIGKILL)
            time.sleep(0.001)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
