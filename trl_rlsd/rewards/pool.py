"""Processes that a grader may hang, exhaust or crash: each call has a time limit, and its process a memory limit.

Graders of what a model wrote cannot be trusted to end: computer algebra on `10**10**10` does not, and a signal reaches
the main thread alone. So they run in processes that are killed and replaced. loky starts them without importing the
user's script again, which need not have a `__main__` guard then; pebble keeps the time of each call.
"""

from __future__ import annotations

import atexit
import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any


# of address space, not of use: an interpreter with sympy maps 0.3 GiB
MEMORY_LIMIT = 4 * 2**30
_LOADING = 60.0  # seconds
_starting = threading.Lock()


def run_all(
    function: Callable[..., Any],
    calls: Sequence[tuple],
    *,
    timeout: float,
    workers: int | None = None,
    imports: tuple[str, ...] = (),
) -> list[Any | Exception]:
    """`function(*call)` of every call, in order; where it raised, its process died or its time was up, the exception.

    Args:
        function: of a module's top level; it and its arguments travel by pickle.
        timeout: seconds of one call, counted from when a process takes it.
        workers: processes; they are kept for the next time. [the cores, shared with the other ranks of this machine]
        imports: modules that processes load when they start, so that no call's time goes by on them.
    """
    workers = workers or cores()
    with _starting:  # two threads must not make two pools
        pool, loaded = _pool(os.getpid(), workers)
        if missing := [module for module in imports if module not in loaded]:
            loaded += missing  # of which processes that start from here on learn
            for _ in range(workers):
                pool.schedule(_load, args=(missing,), timeout=_LOADING)
    futures = [pool.schedule(function, args=call, timeout=timeout) for call in calls]
    results: list[Any | Exception] = []
    for future in futures:
        try:
            results.append(future.result())
        except FutureTimeout:
            results.append(TimeoutError(f"no result within {timeout:g} s"))
        except Exception as error:
            results.append(error)
    return results


@cache
def _pool(process: int, workers: int):
    """The pool of this process (a fork has none of its parent's threads), and the modules that its processes load."""
    from loky.backend import get_context
    from pebble import ProcessPool

    loaded: list[str] = []
    pool = ProcessPool(workers, initializer=_begin, initargs=(loaded,), context=get_context("loky"))
    atexit.register(_close, process, pool)
    return pool, loaded


def _close(process: int, pool) -> None:
    if os.getpid() == process:
        pool.stop()
        pool.join()


def cores() -> int:
    """Cores of this process, shared with the other ranks of this machine; at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(len(os.sched_getaffinity(0)) // ranks, 8))


def _begin(modules: Sequence[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _load(modules)


def _load(modules: Sequence[str]) -> None:
    for module in modules:
        with suppress(BaseException):  # the call says what is wrong; here it would break the pool
            import_module(module)
