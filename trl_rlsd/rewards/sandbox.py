"""Where programs run that nobody trusts: in namespaces of their own by bubblewrap, or wherever an adapter sends them.

`Bubblewrap` gives a program no network, no environment, no file of this machine but /usr and a Python installation
(read-only), a working directory in memory, and limits that bind where the trainer runs as root too. Once `run`
returns, none of the program's processes and files are left, whatever it did.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from trl_rlsd.rewards.grading import CannotGrade
from trl_rlsd.rewards.limits import Limits, Outcome, prlimit, run_limited
from trl_rlsd.rewards.seccomp import seccomp_filter


_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    # the same program gets the same verdict
    "PYTHONHASHSEED": "0",
    # a thread for each core of a large machine would pass the limits
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Sandbox(Protocol):
    """What a reward needs of an isolator; write one to run programs elsewhere. It is picklable and used by several
    threads at a time."""

    def check(self) -> None:
        """Raise, saying what to do, where programs cannot be run here. Called before a training and at each batch:
        repeated calls are to be cheap."""

    def run(self, files: Mapping[str, str], command: Sequence[str], stdin: str, limits: Limits) -> Outcome:
        """Run a command in a new, private working directory that holds the files.

        Args:
            files: contents by name.
            command: `python3` as its first word is the sandbox's Python, 3.11 or later.

        Raises: CannotGrade, where the sandbox failed; whatever the command does is an outcome.
        """


@dataclass(frozen=True)
class Bubblewrap:
    """Runs commands in bubblewrap 0.7 or later (Debian, Ubuntu, Fedora: the package `bubblewrap`), with util-linux.

    It needs user namespaces, or where this process is root, the right to mount: as root, programs run as another user,
    of no name, for the kernel limits the processes of all but root. A program sees neither /proc nor /sys.

    Not limited but by time is what the kernel keeps for many empty files, pipes and sockets. On machines other than
    x86_64 and aarch64 system calls are not filtered, so that memfds and System V memory are not limited either.

    Args:
        python: an interpreter, 3.11 or later; its `bin` and `lib` are what programs see. [the one under this process,
            without the packages of its environment]
        packages: a folder of packages that programs may import, such as one made by `pip install --target`,
            readable to all users. [none: the standard library alone]
    """

    python: str | None = None
    packages: str | None = None

    def check(self) -> None:
        """
        Raises:
            ImportError: bubblewrap or util-linux is missing.
            RuntimeError: the kernel does not permit it here, or does not enforce the limits; with its message.
        """
        _check_once(self)

    def run(self, files: Mapping[str, str], command: Sequence[str], stdin: str, limits: Limits) -> Outcome:
        """See [`Sandbox`]."""
        python = _interpreter(self.python)
        with ExitStack() as stack:
            open_fds: list[int] = []
            argv = [_find("bwrap"), *self._room(python, limits)]
            for name, text in files.items():
                argv += ["--perms", "0444", "--file", _unnamed(text.encode(), stack, open_fds), f"/tmp/{name}"]
            if denied := seccomp_filter():
                argv += ["--seccomp", _unnamed(denied, stack, open_fds)]
            argv += ["--remount-ro", "/", "--chdir", "/tmp", "--", *_INIT]
            if _is_root():
                user = str(_new_user())
                argv += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
            argv += [*prlimit(limits, f"--nproc={limits.processes}"), *_with(python, command)]
            return run_limited(argv, stdin, limits, env=self._environment(), pass_fds=open_fds)

    def _environment(self) -> dict[str, str]:
        own = {"HOME": "/tmp", "OWN_PID_NAMESPACE": "1"}
        return _ENVIRONMENT | own | ({"PYTHONPATH": "/packages"} if self.packages else {})

    def _room(self, python: Path, limits: Limits) -> list[str]:
        """bubblewrap's options for namespaces, privileges and file systems."""
        namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        options = [*namespaces, "--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        # RLIMIT_NPROC never binds root, in no user namespace: setpriv makes it another user
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if _is_root() else ["--unshare-user"]
        options += ["--ro-bind", "/usr", "/usr"]
        for name in ("/bin", "/sbin", "/lib", "/lib64"):
            options += _same(name)
        for file in ("/etc/ld.so.cache", "/etc/alternatives"):
            options += [*_parents(file), "--ro-bind-try", file, file]
        for folder in (python.parent, python.parent.parent / "lib", python.parent.parent / "lib64"):
            if not folder.is_relative_to("/usr"):
                options += [*_parents(folder), "--ro-bind-try", str(folder), str(folder)]
        if self.packages:
            options += ["--ro-bind", str(Path(self.packages).absolute()), "/packages"]
        for device in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
            options += [*_parents(device), "--dev-bind", device, device]
        return [*options, "--perms", "1777", "--size", str(int(limits.file_mb * 2**20)), "--tmpfs", "/tmp"]


@dataclass(frozen=True)
class Unsandboxed:
    """Runs commands as this user, with limits and a clean environment, but nothing else between them and the machine.

    A program can read, send and delete whatever this user can, end this user's processes, and leave processes and
    files behind; processes and their total file space are not limited. Only for programs that you would run yourself.

    Args:
        python: an interpreter, 3.11 or later. [the one under this process, without the packages of its environment]
        packages: a folder of packages that programs may import. [none]
    """

    python: str | None = None
    packages: str | None = None

    def check(self) -> None:
        """
        Raises: ImportError, where util-linux is missing.
        """
        _find("prlimit")

    def run(self, files: Mapping[str, str], command: Sequence[str], stdin: str, limits: Limits) -> Outcome:
        """See [`Sandbox`]."""
        with tempfile.TemporaryDirectory(prefix="trl-rlsd-", ignore_cleanup_errors=True) as folder:
            for name, text in files.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            environment = _ENVIRONMENT | {"HOME": folder}
            if self.packages:
                environment["PYTHONPATH"] = str(Path(self.packages).absolute())
            argv = [*prlimit(limits), *_with(_interpreter(self.python), command)]
            return run_limited(argv, stdin, limits, env=environment, cwd=folder)


# Process 1 of the sandbox waits for the command, and all others end with it. It stays bubblewrap's own user, because
# bubblewrap, which gave up its privileges, ends no other's where the trainer was killed. bubblewrap has a process 1 of
# its own, but leaves that one for the system's init to reap, and containers often have none.
_INIT = ["sh", "-c", '"$@"; exit $?', "sh"]

# What a probe prints: the processes that it could start until it was stopped.
_PROBE = """
import os, sys, time
started = 0
try:
    while started < int(sys.argv[1]):
        if not os.fork():
            time.sleep(60)
        started += 1
except OSError:
    pass
print(started)
"""


@cache
def _check_once(sandbox: Bubblewrap) -> None:
    for program in ("bwrap", "prlimit", "setpriv"):
        _find(program)
    limits = Limits(processes=8)
    try:
        outcome = sandbox.run({}, ["python3", "-c", _PROBE, str(limits.processes)], "", limits)
    except CannotGrade as error:
        raise RuntimeError(str(error)) from error
    if outcome.exit_code != 0:
        raise RuntimeError(
            f"bubblewrap cannot run programs here: {outcome.stderr.strip() or outcome.reason!r}. Unprivileged users "
            "need user namespaces (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_"
            "userns, user.max_user_namespaces); containers need the right to create them, and as root to mount "
            f"(docker run --privileged). {_OTHERWISE}"
        )
    if not 0 < int(outcome.stdout) < limits.processes:
        raise RuntimeError(
            f"The kernel does not keep the limit of {limits.processes} processes: a program could start "
            f"{outcome.stdout.strip()} more. User namespaces count their own from Linux 5.14 on. {_OTHERWISE}"
        )


_OTHERWISE = (
    "Or run programs elsewhere with CodeReward(sandbox=...), or, if you trust them, with no isolation at all: "
    "CodeReward(unsafe=True)."
)


def _find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        package = {"bwrap": "bubblewrap"}.get(program, "util-linux")
        raise ImportError(
            f"{program} is not installed, and programs of a model run in no other sandbox here: apt-get install "
            f"{package}. {_OTHERWISE}"
        )
    return path


def _is_root() -> bool:
    """Root of the machine; that of a rootless container is a user as any other."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]


def _new_user() -> int:
    """One that runs nothing else, as processes are counted by user; never from `random`, which training seeds alike
    on all ranks."""
    return 2**20 + secrets.randbelow(2**30)


def _interpreter(python: str | None) -> Path:
    found = shutil.which(python or sys.executable)
    if found is None:
        raise ValueError(f"python={python or sys.executable!r} is no program; give the path of an interpreter.")
    return Path(found).resolve()


def _with(python: Path, command: Sequence[str]) -> list[str]:
    """-s -S -P: neither the packages of this machine nor the program's folder come before the standard library."""
    return [str(python), "-s", "-S", "-P", *command[1:]] if command[0] == "python3" else list(command)


def _unnamed(content: bytes, stack: ExitStack, open_fds: list[int]) -> str:
    """The descriptor of a file without a name."""
    file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.seek(0)
    open_fds.append(file.fileno())
    return str(file.fileno())


def _parents(path: str | Path) -> list[str]:
    """bubblewrap makes a mount's parents readable to its own user alone, which the program's is not."""
    return [option for parent in [*Path(path).parents][-2::-1] for option in ("--perms", "0755", "--dir", str(parent))]


def _same(path: str) -> list[str]:
    """A link or a folder, as on this machine."""
    if os.path.islink(path):
        return ["--symlink", os.readlink(path), path]
    return ["--ro-bind-try", path, path]
