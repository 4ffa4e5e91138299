"""What the benchmarks share: a clock, a memory gauge, fresh processes, the bars, the JSON."""

import argparse
import ctypes
import gc
import json
import multiprocessing
import platform
import statistics
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


# ratios, each taken within one run; None of them may be looser than what the README says
BARS = {
    "extra forwards per micro-batch, lambda > 0": 1.0,
    "the same, whole rows": 1.0,
    "extra forwards per micro-batch, lambda = 0": 0.0,
    "update time RLSD / GRPO, lambda > 0": 1.20,
    "update time RLSD / GRPO, lambda = 0": 1.01,
    "peak memory RLSD / GRPO, LoRA": 1.02,
    "teacher pass shared / whole, 8k tokens": 0.25,
    "peak memory Liger / full logits, head frozen": 0.35,
    "peak memory Liger / full logits, head trained": 0.35,
}


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken [%(default)s]")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"CPU, {line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def seconds(function, device: str) -> float:
    """One call's time; on a GPU by events, so that queued kernels are counted."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Peak:
    """Bytes at the highest point of a block, above what was there when it began.

    On a CPU the resident set's high-water mark, which Linux lets a process reset; for a fresh process that measures
    nothing else, because freed memory may stay with it, and it is made to return memory at once from then on.
    """

    def __init__(self, device: str):
        self.device = device

    def __enter__(self):
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            _return_memory_at_once()
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *exception):
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.total = torch.cuda.max_memory_allocated()
        else:
            self.total = _status("VmHWM")
        self.bytes = self.total - self.before


def _return_memory_at_once() -> None:
    """glibc's defaults, whatever MALLOC_* says: with the Makefile's settings a process keeps what it once had, so that
    a peak would be hidden by what was freed before it, and its high-water mark would count holes."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_mmap_max = -1, -2, -3, -4
    for option, value in (
        (m_mmap_max, 65_536),
        (m_mmap_threshold, 131_072),
        (m_trim_threshold, 131_072),
        (m_top_pad, 0),
    ):
        libc.mallopt(option, value)
    libc.malloc_trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_fresh_process(function, *args):
    """The function's result, computed in a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}{args} ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(result, Failed):
        raise RuntimeError(result.traceback)
    return result


@dataclass
class Failed:
    traceback: str


def _answer(pipe, function, args):
    try:
        pipe.send(function(*args))
    except BaseException:
        pipe.send(Failed(traceback.format_exc()))


def median(values) -> float:
    return statistics.median(values)


def verdict(bar: str, value: float) -> dict:
    """Print a bar and whether it holds."""
    held = value <= BARS[bar]
    print(f"bar: {bar:46} {value:7.3f}  (at most {BARS[bar]:g}: {'pass' if held else 'falls short'})")
    return {"bar": bar, "value": value, "at_most": BARS[bar], "passes": held}


def report(options, figures: list[dict], verdicts: list[dict], **more) -> None:
    """Write the JSON, if asked for."""
    if options.json is None:
        return
    libraries = ("torch", "transformers", "trl", "peft", "liger-kernel")
    result = {
        "device": device_name(options.device),
        "versions": {name: version(name) for name in libraries},
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "device")},
        **more,
        "figures": figures,
        "bars": verdicts,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {options.json}")
