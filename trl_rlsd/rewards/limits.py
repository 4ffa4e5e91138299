"""One run of a command under limits of time, memory and output, with nothing of it left running afterwards.

No code of ours runs between fork and exec (`preexec_fn`): the process that grades has threads and CUDA.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from trl_rlsd.rewards.grading import CannotGrade


_STDERR_KEPT = 4096
# a program can allocate some hundred MB between two looks at its memory
_LOOK_EVERY = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What one run may use; a program that wants more is ended.

    Args:
        wall_seconds: of the whole run, with all the processes that it starts.
        cpu_seconds: of each process, rounded up.
        memory_mb: of address space in each process, and of memory in all of them together.
        processes: processes and threads at one time; the runner of the tests is one.
        file_mb: of a file, and of all files together.
        output_kb: of stdout and stderr together.
    """

    wall_seconds: float = 20.0
    cpu_seconds: float = 5.0
    memory_mb: int = 1024
    processes: int = 64
    file_mb: int = 64
    output_kb: int = 4096

    def __post_init__(self):
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"Limits.{field.name} is {getattr(self, field.name)!r}; it must be positive.")


@dataclass(frozen=True)
class Outcome:
    """What a run printed and how it ended.

    Args:
        stdout: all of it, or what had arrived when a limit was passed.
        stderr: its end.
        exit_code: None where the run was ended; else the command's, 128 + the signal where that killed it.
        reason: of a run that was ended: "timeout", "memory" or "output".
    """

    stdout: str
    stderr: str
    exit_code: int | None
    reason: str | None = None


def prlimit(limits: Limits, *more: str) -> list[str]:
    """The command line that sets the limits which the kernel keeps, in front of a command's own."""
    memory, file = int(limits.memory_mb * 2**20), int(limits.file_mb * 2**20)
    cpu = math.ceil(limits.cpu_seconds)  # then a signal that can be caught; a second later, one that cannot
    options = [
        f"--cpu={cpu}:{cpu + 1}",
        f"--as={memory}",
        f"--fsize={file}",
        "--core=0",
        "--nofile=256",
        "--msgqueue=0",
    ]
    return ["prlimit", *options, *more]


def run_limited(
    argv: Sequence[str],
    stdin: str,
    limits: Limits,
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
) -> Outcome:
    """Run a command until it has ended, or one of the limits that are kept here: wall time, memory and output.

    Raises: CannotGrade, where it cannot be started.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            argv, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe,
            env=env, pass_fds=pass_fds, cwd=cwd, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise CannotGrade(f"{argv[0]} cannot be started: {error}") from error
    with process:
        try:
            stdout, stderr, reason = _converse(process, stdin.encode("utf-8", "replace"), limits)
        finally:
            _end(process)
    return Outcome(
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr[-_STDERR_KEPT:].decode("utf-8", "replace"),
        exit_code=None if reason else process.returncode,
        reason=reason,
    )


def _converse(process: subprocess.Popen, data: bytes, limits: Limits) -> tuple[bytes, bytes, str | None]:
    """What the process printed until it ended or passed a limit, and which limit."""
    printed = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    unsent, now = memoryview(data), time.monotonic()
    deadline, look = now + limits.wall_seconds, now + _LOOK_EVERY
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for fd in printed:
            selector.register(fd, selectors.EVENT_READ)
        while any(fd in selector.get_map() for fd in printed):
            ready = selector.select(max(0.0, min(look, deadline) - time.monotonic()))
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    unsent = unsent[_sent(key.fd, unsent) :]
                    if not unsent:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif chunk := os.read(key.fd, 1 << 16):
                    printed[key.fd] += chunk
                else:
                    selector.unregister(key.fd)
            now = time.monotonic()
            if reason := _passed(limits, process.pid, now, deadline, look, sum(map(len, printed.values()))):
                break
            if now >= look:
                look = now + _LOOK_EVERY
                if not ready and process.poll() is not None:  # something that it started holds the pipes open
                    break
    if not reason:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            reason = "timeout"
    stdout, stderr = map(bytes, printed.values())
    return stdout, stderr, reason


def _passed(limits: Limits, pid: int, now: float, deadline: float, look: float, printed: int) -> str | None:
    if printed > limits.output_kb * 1024:
        return "output"
    if now >= deadline:
        return "timeout"
    if now >= look and sum(map(_memory, _descendants(pid))) > limits.memory_mb * 2**20:
        return "memory"
    return None


def _sent(fd: int, data: memoryview) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)


def _end(process: subprocess.Popen) -> None:
    """Descendants first: bubblewrap then reaps them and ends by itself. Were it killed first, its sandbox would die a
    moment later, and wait for the system's init, of which containers often have none."""
    for patience in (2.0, 0.0):
        if process.poll() is not None:
            return
        descendants = list(_descendants(process.pid))
        if not patience:
            process.kill()
        for pid in descendants:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience or None)


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):  # it may end at any moment
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _memory(pid: int) -> int:
    """Bytes that are in memory and no file's."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * _PAGE
