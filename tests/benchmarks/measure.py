"""What the benchmarks share: a clock, a memory gauge, fresh processes, the bars, the JSON."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch


# ratios, each taken within one run; None of them may be looser than what the README says
BARS = {
    "extra forwards per micro-batch, lambda > 0": 1.0,
    "extra forwards per micro-batch, lambda = 0": 0.0,
    "update time RLSD / GRPO, lambda > 0": 1.20,
    "update time RLSD / GRPO, lambda = 0": 1.01,
    "peak memory RLSD / GRPO, LoRA": 1.02,
    "teacher pass shared / whole, 8k tokens": 0.25,
    "peak memory Liger / full logits": 0.35,
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

    On a CPU the resident set's high-water mark, which Linux lets a process reset; meaningful in a fresh process only,
    because freed memory may stay with the process.
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


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_fresh_process(function, *args):
    """The function's result, computed in a process that has imported everything and allocated nothing."""
    return _in_process("fork", function, args)


def in_clean_process(function, *args):
    """The same in a process that starts anew and gives freed memory back: with the Makefile's settings for malloc a
    process keeps what it once had, and its high-water mark counts holes."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MALLOC_")}
    try:
        return _in_process("spawn", function, args)
    finally:
        os.environ.update(kept)


def _in_process(method, function, args):
    context = multiprocessing.get_context(method)
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
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def _answer(pipe, function, args):
    try:
        pipe.send(function(*args))
    except BaseException:
        pipe.send(traceback.format_exc())


def median(values) -> float:
    return statistics.median(values)


def verdict(bar: str, value: float) -> dict:
    """Print a bar and whether it holds."""
    held = value <= BARS[bar]
    print(f"bar: {bar:45} {value:7.3f}  (at most {BARS[bar]:g}: {'pass' if held else 'falls short'})")
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
