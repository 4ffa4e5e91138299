"""Time and forwards of an RLSD update against GRPO's, all in one process.

    python tests/benchmarks/update_time.py [--model PATH] [--json FILE]

Sampling is taken out: a rollout function hands over random completions, so that what is timed is the teacher, the
forward, the backward and the optimizer. The runs of the three trainers take turns, and the ratios are of medians.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_rlsd import RLSDConfig, RLSDTrainer
from trl_rlsd.data.reasoning_gym import reasoning_gym_dataset
from trl_rlsd.quickstart import INSTRUCTION, TASK, bundled_model


BARS = {"lambda > 0": 1.20, "lambda = 0": 1.01}
VARIANTS = {
    "grpo": {"credit": "grpo"},
    "lambda > 0": {"rlsd_lambda_decay_steps": 0},
    "lambda = 0": {"rlsd_lambda": 0.0},
}


class StepTimes(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter() - self.started)


def rollout(tokens):
    def generate(prompts, trainer):
        tokenizer = trainer.processing_class
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, len(tokenizer), (len(prompts), tokens), generator=generator).tolist()
        prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * tokens] * len(prompts)}

    return generate


def reward(share):
    """Rewards that differ within the first `share` of the groups and are constant in the others."""

    def verdict(completions, **columns):
        informative = round(share * len(completions))
        return [float(i % 2) if i < informative else 1.0 for i in range(len(completions))]

    return verdict


def run(path, options, variant, data, tokenizer):
    times = StepTimes()
    trainer = RLSDTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward(options.informative),
        RLSDConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=options.rows,
            num_generations=4,
            max_completion_length=options.tokens,
            max_steps=options.steps,
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **VARIANTS[variant],
        ),
        data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[times],
        rollout_func=rollout(options.tokens),
    )
    calls = []
    trainer.model.get_base_model().model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    trainer.train()
    return times.times[1:], len(calls) / options.steps  # the first step warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or id [the quickstart's SmolLM2-135M-Instruct]")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a completion [%(default)s]")
    parser.add_argument("--informative", type=float, default=0.5, help="share of the groups [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each repeat, the first not counted [%(default)s]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    path = options.model or str(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = reasoning_gym_dataset(size=64, seed=0, system_prompt=INSTRUCTION, **TASK)
    times = {name: [] for name in VARIANTS}
    forwards = {}
    for _ in range(options.repeats):
        for name in VARIANTS:
            taken, forwards[name] = run(path, options, name, data, tokenizer)
            times[name] += taken
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": Path(path).name,
        **{name: getattr(options, name) for name in ("rows", "tokens", "informative", "repeats", "steps")},
        "forwards_per_micro_batch": forwards,
        "update_time_ratio": {name: medians[name] / medians["grpo"] for name in BARS},
    }
    print(f"{'':12}{'forwards':>10}{'time / GRPO':>14}{'bar':>8}")
    for name in VARIANTS:
        ratio = medians[name] / medians["grpo"]
        bar = BARS.get(name)
        verdict = "" if bar is None else "pass" if ratio <= bar else "falls short"
        print(f"{name:12}{forwards[name]:>10.2f}{ratio:>14.3f}{bar or '':>8} {verdict}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
