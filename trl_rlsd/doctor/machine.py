"""What is installed here against what the package asks for, and what there is to train on."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from trl import ModelConfig

from trl_rlsd.config import RLSDConfig
from trl_rlsd.doctor.finding import ERROR, OK, WARNING, Finding
from trl_rlsd.rewards.sandbox import Bubblewrap


PACKAGE = "trl-rlsd"
# what each extra of pyproject.toml is for; one that is not named here is shown without
PURPOSES = {
    "liger": "use_liger_loss",
    "quantization": "load_in_4bit, load_in_8bit",
    "rewards": "the rewards math, choice, sql, json_schema and reasoning_gym",
    "duckdb": "sql_reward on DuckDB",
    "traces": "traces from an endpoint",
    "vision": "images",
    "quickstart": "trl-rlsd quickstart",
    "report": "trl-rlsd report",
    "lab": "trl-rlsd compare",
}
_NOT_A_USERS = ("dev",)
# values of report_to that are the names of their packages
TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow", "swanlab", "clearml")
# Transformers' optimizers that come from it
_BITSANDBYTES = re.compile(r"^(adamw|lion)_8bit|bnb|paged|ademamix")


def examine_machine() -> list[Finding]:
    """Python, the package, what it needs, what it can use, the sandbox, the devices."""
    try:
        own = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        text = "runs from a folder, not installed: versions are not compared. pip install -e . in that folder."
        return [Finding(WARNING, PACKAGE, text), _sandbox(), *devices()]
    requirements = [Requirement(line) for line in own.get_all("Requires-Dist") or ()]
    python = Requirement(f"python{own['Requires-Python'] or ''}")
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        _judged(python, platform.python_version(), ERROR),
        Finding(OK, PACKAGE, own["Version"]),
        *(_judged(requirement, _version(requirement.name), ERROR) for requirement in needed),
        *_extras(requirements),
        _sandbox(),
        *devices(),
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _judged(requirement: Requirement, version: str | None, level: str) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier) or "any"
    fix = f"pip install '{name}{requirement.specifier}'" if name != "python" else "use another Python"
    if version is None:
        return Finding(level, name, f"not installed, {wanted} is needed: {fix}")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(level, name, f"{version}, {wanted} is needed: {fix}")
    return Finding(OK, name, f"{version} ({wanted})")


def _extras(requirements: list[Requirement]) -> Iterator[Finding]:
    """One line an extra. What is missing is no fault: only who uses it needs it."""
    extras: dict[str, list[Requirement]] = defaultdict(list)
    for requirement in requirements:
        marker = str(requirement.marker or "")
        if 'extra == "' in marker and requirement.name != PACKAGE:
            extras[marker.split('extra == "')[1].split('"')[0]].append(requirement)
    for extra, group in extras.items():
        if extra in _NOT_A_USERS:
            continue
        subject, use = f"[{extra}]", f", for {PURPOSES[extra]}" if extra in PURPOSES else ""
        found = {requirement.name: _version(requirement.name) for requirement in group}
        old = [r for r in group if (v := found[r.name]) and not r.specifier.contains(v, prereleases=True)]
        missing = [name for name, version in found.items() if version is None]
        install = f"pip install '{PACKAGE}[{extra}]'"
        if old:
            said = ", ".join(f"{r.name} {found[r.name]} ({r.specifier} is needed)" for r in old)
            yield Finding(WARNING, subject, f"{said}{use}: {install}")
        elif missing:
            yield Finding(OK, subject, f"not installed: {', '.join(missing)}{use}: {install}")
        else:
            yield Finding(OK, subject, ", ".join(f"{name} {version}" for name, version in found.items()))


def lacking(args: RLSDConfig, model: ModelConfig) -> list[Finding]:
    """The packages that a recipe's fields ask for and that are not installed."""
    liger, bits = (f"pip install '{PACKAGE}[{extra}]'" for extra in ("liger", "quantization"))
    asked = [
        (args.use_vllm, "use_vllm", "vllm", "pip install 'trl[vllm]'"),
        (args.use_liger_loss, "use_liger_loss", "liger-kernel", liger),
        (args.use_liger_kernel, "use_liger_kernel", "liger-kernel", liger),
        (model.load_in_4bit, "load_in_4bit", "bitsandbytes", bits),
        (model.load_in_8bit, "load_in_8bit", "bitsandbytes", bits),
        (_BITSANDBYTES.search(args.optim), f"optim={args.optim.value!r}", "bitsandbytes", bits),
        *((name in args.report_to, f"report_to={name!r}", name, f"pip install {name}") for name in TRACKERS),
    ]
    return [
        Finding(ERROR, package, f"not installed, {field} needs it: {command}")
        for wanted, field, package, command in asked
        if wanted and _version(package) is None
    ]


def _sandbox() -> Finding:
    """bubblewrap is there in many containers that do not let it work: it is tried."""
    try:
        Bubblewrap().check()
    except ImportError as error:
        return Finding(OK, "bubblewrap", f"not installed, for code_reward: {error}")
    except RuntimeError as error:
        return Finding(WARNING, "bubblewrap", f"does not work, code_reward will refuse to run: {error}")
    version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return Finding(OK, "bubblewrap", f"{version}, works")


def has_bf16(gpu: Any) -> bool:
    """Of a device's properties. torch's own is_bf16_supported also says yes where bfloat16 is emulated."""
    return gpu.major >= 8


def devices() -> list[Finding]:
    """GPUs, and the CPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        precision = "bf16" if has_bf16(gpu) else "no bf16: fp16: true, dtype: float16"
        text = f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, capability {gpu.major}.{gpu.minor}, {precision}"
        found.append(Finding(OK, f"GPU {index}", text))
    if not found:
        found.append(Finding(OK, "GPU", "no CUDA device: recipes need use_cpu: true, and bf16: false for float32"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = psutil.virtual_memory()
    text = f"{cores} cores, {ram.total / 1e9:.1f} GB of memory, {ram.available / 1e9:.1f} GB of it free"
    return [*found, Finding(OK, "CPU", text)]
