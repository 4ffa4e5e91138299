"""What the phases of a step cost: measured, predicted for sizes that were held out, and predicted for GPUs.

    python tests/benchmarks/step_cost.py [--json FILE]
    python tests/benchmarks/step_cost.py --prediction [--network 25e9 ...]    no measurement, other assumptions

Real steps of Llamas made in code, on a CPU in float32: transformers' `generate` to a known length, the teacher pass,
the update. Rates are fitted to one list of sizes (cost_model.py); the error is that on the other list, of which every
size is outside the fitted range in at least one dimension. Each size is run in processes of its own, one for its times
and one for its peak memory.
"""

import argparse
import tempfile
import time
import warnings
from dataclasses import fields, replace

import torch
from cost_model import (
    KINDS,
    MEMORY,
    MODELS,
    PHASES,
    Architecture,
    Cluster,
    Job,
    Load,
    fit,
    memory,
    predict,
    price,
    share,
    work,
)
from datasets import Dataset
from measure import Peak, arguments, in_fresh_process, median, report
from peft import LoraConfig
from scaling import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback
from update_time import StepTimes, reward

from trl_rlsd import RLSDConfig, RLSDTrainer


RANK = 16
BASE = {
    "hidden": 256,
    "layers": 4,
    "vocabulary": 8192,
    "completions": 16,
    "group": 8,
    "tokens": 48,
    "prompt": 32,
    "context": 32,
    "informative": 0.5,
    "lora": True,
    "checkpointing": False,
}
FITTED = [
    BASE,
    *({**BASE, "hidden": n} for n in (128, 384)),
    *({**BASE, "layers": n} for n in (2, 6)),
    *({**BASE, "tokens": n} for n in (16, 96)),
    {**BASE, "vocabulary": 16_384},
    {**BASE, "completions": 32},
    {**BASE, "completions": 8, "group": 4},
    {**BASE, "group": 4, "context": 128},
    {**BASE, "context": 256, "informative": 1.0},
    {**BASE, "prompt": 128},
    {**BASE, "lora": False},
    {**BASE, "lora": False, "hidden": 384, "layers": 2, "vocabulary": 16_384},
    {**BASE, "checkpointing": True},
]
HELD_OUT = [
    {**BASE, "hidden": 512},
    {**BASE, "layers": 8},
    {**BASE, "vocabulary": 32_768},
    {**BASE, "tokens": 160},
    {**BASE, "completions": 48, "group": 16},
    {**BASE, "context": 768},
    {**BASE, "prompt": 192, "informative": 1.0},
    {**BASE, "lora": False, "hidden": 512, "checkpointing": True},
    {**BASE, "hidden": 512, "layers": 8, "vocabulary": 32_768, "completions": 8, "group": 4, "tokens": 64},
]


# peaks are taken where what they are made of changes
PEAKS = ("hidden", "vocabulary", "tokens", "lora", "checkpointing")
GPUS = (1, 8, 64, 256)
SETUPS = {
    "LoRA, DDP": {"rank": 16, "sharded": False},
    "full, FSDP2": {"rank": None, "sharded": True},
}


class TimedTrainer(RLSDTrainer):
    """Adds up the seconds of sampling; the teacher's are a metric of the trainer."""

    sampled = ()

    # TRL 1.16: sampling alone; tokenizing, decoding and rewards lie outside of it
    def _generate_single_turn(self, *args, **kwargs):
        started = time.perf_counter()
        generated = super()._generate_single_turn(*args, **kwargs)
        self.sampled = (*self.sampled, time.perf_counter() - started)
        return generated


def described(size) -> tuple[Architecture, Load]:
    hidden = size["hidden"]
    arch = Architecture(size["layers"], hidden, 3 * hidden, hidden // 64, hidden // 128, 64, size["vocabulary"])
    lengths = {name: size[name] for name in ("completions", "tokens", "prompt", "context", "group", "checkpointing")}
    groups = round(size["informative"] * size["completions"] / size["group"])
    # without Triton TRL's fused head reads prompts too
    return arch, Load(**lengths, informative=groups, rank=RANK if size["lora"] else None, scores_prompts=True)


def text(first, start, length):
    # no word may begin like a special token, which would be cut out of it: t0, t1
    return " ".join(f"t{first + (start * 97 + i) % 3000}" for i in range(length))


def trainer_of(size, steps, clock):
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    arch, load = described(size)
    prompts, contexts = (
        [text(first, i, load.prompt if first == 2000 else load.context) for i in range(32)] for first in (2000, 5000)
    )
    config = LlamaConfig(
        vocab_size=arch.vocabulary,
        hidden_size=arch.hidden,
        intermediate_size=arch.intermediate,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        pad_token_id=0,
        eos_token_id=1,
    )
    trainer = TimedTrainer(
        LlamaForCausalLM(config),
        reward(size["informative"]),
        RLSDConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=load.completions,
            num_generations=load.group,
            max_completion_length=load.tokens,
            generation_kwargs={"min_new_tokens": load.tokens},
            teacher_prompt_template="{privileged_context} {prompt}",
            max_steps=steps,
            logging_steps=1,
            rlsd_lambda_decay_steps=0,
            alarm_steps=0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=load.checkpointing,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        Dataset.from_dict({"prompt": prompts, "privileged_context": contexts}),
        processing_class=tokenizer(arch.vocabulary),
        peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if size["lora"]
        else None,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    assert {len(ids) for ids in trainer.processing_class(prompts)["input_ids"]} == {load.prompt}
    assert {len(ids) for ids in trainer.processing_class(contexts)["input_ids"]} == {load.context}
    return trainer


def phase_seconds(size, options):
    """Medians of the steps but the first, which warms up."""
    clock = StepTimes("cpu")
    trainer = trainer_of(size, options.repeats + 1, clock)
    trainer.train()
    teacher = [log["rlsd/teacher_seconds"] for log in trainer.state.log_history if "rlsd/teacher_seconds" in log]
    steps = list(zip(trainer.sampled, teacher, clock.times, strict=True))[1:]
    return {
        "generation": median(sampled for sampled, _, _ in steps),
        "teacher": median(scored for _, scored, _ in steps),
        "update": median(whole - sampled - scored for sampled, scored, whole in steps),
    }


def peak_bytes(size):
    """Of the model and two steps; the optimizer's state is there from the second."""
    with Peak("cpu") as peak:
        trainer_of(size, 2, StepTimes("cpu")).train()
    return peak.bytes


def measured(sizes, held_out, options):
    found = []
    for size in sizes:
        taken = in_fresh_process(phase_seconds, size, options)
        found.append({"size": size, "held_out": held_out, "seconds": taken, "teacher_share": share(taken)})
        if size == BASE or any(size[name] != BASE[name] for name in PEAKS):
            found[-1]["peak"] = in_fresh_process(peak_bytes, size)
    return found


def with_predictions(figures) -> tuple[dict[str, float], dict[str, float]]:
    """Fit to what is not held out, and add to every figure what follows from that."""
    counted = [work(*described(f["size"])) for f in figures]
    held = [memory(*described(f["size"])) for f in figures]
    fitted = [i for i, f in enumerate(figures) if not f["held_out"]]
    rates = fit([(counted[i][phase], figures[i]["seconds"][phase]) for i in fitted for phase in PHASES], KINDS)
    factors = fit([(held[i], figures[i]["peak"]) for i in fitted if "peak" in figures[i]], MEMORY)
    for figure, phases, parts in zip(figures, counted, held, strict=True):
        figure["predicted_seconds"] = {phase: price(phases[phase], rates) for phase in PHASES}
        figure["predicted_share"] = share(figure["predicted_seconds"])
        figure["predicted_peak"] = price(parts, factors)
    return rates, factors


def errors(figures) -> dict[str, dict[str, float]]:
    """Median and worst of the absolute errors: relative, and of the teacher's share in points."""
    found = {phase: [f["predicted_seconds"][phase] / f["seconds"][phase] - 1 for f in figures] for phase in PHASES}
    found["step"] = [sum(f["predicted_seconds"].values()) / sum(f["seconds"].values()) - 1 for f in figures]
    found["peak memory"] = [f["predicted_peak"] / f["peak"] - 1 for f in figures if "peak" in f]
    found["teacher's share, points"] = [f["predicted_share"] - f["teacher_share"] for f in figures]
    return {
        name: {"median": median(map(abs, values)), "worst": max(map(abs, values))} for name, values in found.items()
    }


def print_measured(figures, found):
    print(f"{'':>44}{'measured / predicted seconds':>45}{'teacher':>13}{'peak MB':>15}")
    for figure in figures:
        size = figure["size"]
        changed = ", ".join(f"{name} {value}" for name, value in size.items() if value != BASE[name]) or "base"
        times = "".join(f"{figure['seconds'][p]:>8.3f}/{figure['predicted_seconds'][p]:<7.3f}" for p in PHASES)
        shares = f"{figure['teacher_share']:>7.1%}/{figure['predicted_share']:<6.1%}"
        peaks = f"{figure['peak'] / 1e6:>8.0f}/{figure['predicted_peak'] / 1e6:<6.0f}" if "peak" in figure else ""
        print(f"{'held out: ' * figure['held_out'] + changed:<44.44}{times}{shares}{peaks}")
    for kind, of in found.items():
        print(f"errors, {kind}:", ", ".join(f"{n} {e['median']:.1%} (worst {e['worst']:.1%})" for n, e in of.items()))


def predictions(job, cluster) -> list[dict]:
    return [
        {"setup": name, "model": model, "gpus": gpus, "seconds": predict(arch, replace(job, **setup), cluster, gpus)}
        for name, setup in SETUPS.items()
        for model, arch in MODELS.items()
        for gpus in GPUS
    ]


def print_predictions(found):
    print("predicted, not measured: the teacher's share of a step (its seconds / those of the step)")
    print(f"{'':20}" + "".join(f"{f'{gpus} GPUs':>20}" for gpus in GPUS))
    for name in SETUPS:
        for model in MODELS:
            cells = [f["seconds"] for f in found if (f["setup"], f["model"]) == (name, model)]
            texts = (f"{share(c):.1%} ({c['teacher']:.1f}/{sum(c.values()):.0f})" if c else "no room" for c in cells)
            print(f"{name:14}{model:6}" + "".join(f"{cell:>20}" for cell in texts))


def sensitivity(job, cluster, found) -> dict[str, float]:
    """The largest change of the share in any cell, in points, when a utilisation is half or half as much again."""
    changes = {}
    for name in ("train_utilisation", "forward_utilisation", "decode_utilisation"):
        for factor in (0.5, 1.5):
            other = predictions(job, replace(cluster, **{name: factor * getattr(cluster, name)}))
            pairs = [
                (share(a["seconds"]), share(b["seconds"])) for a, b in zip(found, other, strict=True) if a["seconds"]
            ]
            changes[f"{name} x {factor}"] = max((b - a for a, b in pairs), key=abs)
    return changes


def assumptions(parser):
    for kind in (Cluster, Job):
        group = parser.add_argument_group(f"assumptions: {kind.__name__.lower()}")
        for field in fields(kind):
            if field.name in ("rank", "sharded"):  # the setups differ in these
                continue
            how = (
                {"action": argparse.BooleanOptionalAction} if field.default is True else {"type": type(field.default)}
            )
            if field.name == "copy":
                how["choices"] = ("gpu", "cpu", "none")
            group.add_argument(f"--{field.name}", default=field.default, help=f"[{field.default}]", **how)


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--prediction", action="store_true", help="measure nothing")
    assumptions(parser)
    options = parser.parse_args()
    if options.device != "cpu":
        print("step_cost measures on a CPU only: its sizes would keep no GPU busy")
        return
    figures, more = [], {}
    if not options.prediction:
        figures = measured(FITTED, False, options) + measured(HELD_OUT, True, options)
        rates, factors = with_predictions(figures)
        found = {
            kind: errors([f for f in figures if f["held_out"] == held])
            for kind, held in (("fitted", False), ("held out", True))
        }
        print_measured(figures, found)
        more = {"rates": rates, "memory_factors": factors, "errors": found}
    cluster, job = (
        kind(**{f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)})
        for kind in (Cluster, Job)
    )
    found = predictions(job, cluster)
    print_predictions(found)
    print("assumed:", job, cluster)
    changes = sensitivity(job, cluster, found)
    print("largest change of a share, points:", ", ".join(f"{n}: {100 * c:+.1f}" for n, c in changes.items()))
    report(options, figures, [], predictions=found, sensitivity=changes, **more)


if __name__ == "__main__":
    main()
