"""Time, forwards and peak memory of an RLSD update against GRPO's.

    python tests/benchmarks/update_time.py [--device cuda] [--model PATH] [--json FILE]

Sampling is taken out: a rollout function hands over random completions, so that what is timed is the teacher, the
forward, the backward and the optimizer. The trainers take turns in one process; a ratio is the median of those of the
turns, each to GRPO in the same turn, because a machine's speed drifts. Peak memory is of a process of its own each,
also for a model with a vocabulary of 151,936.
"""

import math
import tempfile
import time
import warnings
from pathlib import Path

import torch
from measure import Peak, arguments, in_fresh_process, median, report, verdict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from trl_rlsd import RLSDConfig, RLSDTrainer
from trl_rlsd.data.reasoning_gym import reasoning_gym_dataset
from trl_rlsd.quickstart import INSTRUCTION, TASK, bundled_model


# name -> share of the groups with information, fields
VARIANTS = {
    "grpo": (0.5, {"credit": "grpo"}),
    "rlsd, 50 % informative": (0.5, {"rlsd_lambda_decay_steps": 0}),
    "rlsd, lambda = 0": (0.5, {"rlsd_lambda": 0.0}),
    "rlsd, 25 % informative": (0.25, {"rlsd_lambda_decay_steps": 0}),
    "rlsd, 100 % informative": (1.0, {"rlsd_lambda_decay_steps": 0}),
    "rlsd, 50 %, whole rows": (0.5, {"rlsd_lambda_decay_steps": 0, "teacher_shared_prefix": False}),
}


class StepTimes(TrainerCallback):
    def __init__(self, device):
        self.device = device
        self.times = []

    def _now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(self._now() - self.started)


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


def tokenizer_and_data(path):
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, reasoning_gym_dataset(size=64, seed=0, system_prompt=INSTRUCTION, **TASK)


def model_of(path, vocabulary, layers):
    if vocabulary is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.config.num_hidden_layers = min(layers or math.inf, model.config.num_hidden_layers)
        model.model.layers = model.model.layers[: model.config.num_hidden_layers]
        return model
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=4, **sizes))


class Run:
    """A trainer of a variant. Every `times()` trains it from where it is."""

    def __init__(self, path, options, variant, vocabulary=None, layers=None):
        warnings.filterwarnings("ignore")
        disable_progress_bar()
        tokenizer, data = tokenizer_and_data(path)
        informative, fields = VARIANTS[variant]
        self.clock = StepTimes(options.device)
        self.forwards = []
        self.trainer = RLSDTrainer(
            model_of(path, vocabulary, layers),
            reward(informative),
            RLSDConfig(
                tempfile.mkdtemp(),
                per_device_train_batch_size=options.rows,
                num_generations=options.generations,
                max_completion_length=options.tokens,
                max_steps=options.steps,
                use_cpu=options.device == "cpu",
                bf16=options.device == "cuda",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **fields,
            ),
            data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[self.clock],
            rollout_func=rollout(options.tokens),
        )
        # a shared prompt is encoded in a forward of its own, with a cache to fill
        self.trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda module, args, kwargs: self.forwards.append("prefix" if kwargs.get("use_cache") else "rows"),
            with_kwargs=True,
        )

    def times(self) -> list[float]:
        """Seconds of the steps but the first, which warms up."""
        self.clock.times.clear()
        self.forwards.clear()
        self.trainer.train()
        return self.clock.times[1:]

    def count(self, kind) -> float:
        return self.forwards.count(kind) / len(self.clock.times)


def peak_bytes(path, options, variant, vocabulary):
    """Of the whole model, the optimizer and a step, above what the imports take."""
    options.steps = 1
    with Peak(options.device) as peak:
        Run(path, options, variant, vocabulary).times()
    return peak.bytes


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or id [the quickstart's SmolLM2-135M-Instruct]")
    parser.add_argument("--layers", type=int, help="keep so many for the times [10 on a CPU, all on a GPU]")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch [%(default)s]")
    parser.add_argument("--generations", type=int, default=4, help="of a prompt [%(default)s]")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion [%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="of each repeat, the first not counted [%(default)s]")
    parser.set_defaults(repeats=5)
    options = parser.parse_args()
    path = options.model or str(in_fresh_process(bundled_model))  # this one must not compute before it forks
    memory = {
        (size or "the model's own"): {
            name: in_fresh_process(peak_bytes, path, options, name, size)
            for name in ("grpo", "rlsd, 100 % informative")
        }
        for size in (None, 151_936)
    }
    layers = options.layers or (10 if options.device == "cpu" else None)
    runs = {name: Run(path, options, name, layers=layers) for name in VARIANTS}
    ratios = {name: [] for name in VARIANTS}
    for turn in range(options.repeats):
        seconds = {name: median(runs[name].times()) for name in (VARIANTS if turn % 2 == 0 else reversed(VARIANTS))}
        for name in VARIANTS:
            ratios[name].append(seconds[name] / seconds["grpo"])
    figures = [
        {
            "variant": name,
            "time": median(ratios[name]),
            "time_by_turn": ratios[name],
            "rows": run.count("rows"),
            "prefix": run.count("prefix"),
        }
        for name, run in runs.items()
    ]
    print(f"{'':26}{'time / GRPO':>12}{'by turn':>16}{'forwards per micro-batch':>26}{'of prompts alone':>18}")
    for f in figures:
        spread = f"{min(f['time_by_turn']):.2f} to {max(f['time_by_turn']):.2f}"
        print(f"{f['variant']:26}{f['time']:>12.3f}{spread:>16}{f['rows']:>26.2f}{f['prefix']:>18.2f}")
    of = {f["variant"]: f for f in figures}
    extra = {name: of[name]["rows"] + of[name]["prefix"] - of["grpo"]["rows"] for name in of}
    verdicts = [
        verdict("extra forwards per micro-batch, lambda > 0", extra["rlsd, 50 % informative"]),
        verdict("the same, whole rows", extra["rlsd, 50 %, whole rows"]),
        verdict("extra forwards per micro-batch, lambda = 0", extra["rlsd, lambda = 0"]),
        verdict("update time RLSD / GRPO, lambda > 0", of["rlsd, 50 % informative"]["time"]),
        verdict("update time RLSD / GRPO, lambda = 0", of["rlsd, lambda = 0"]["time"]),
    ]
    for size, peaks in memory.items():
        print(f"vocabulary: {size}")
        ratio = peaks["rlsd, 100 % informative"] / peaks["grpo"]
        figures.append({"vocabulary": size, "peak_memory": ratio})
        verdicts.append(verdict("peak memory RLSD / GRPO, LoRA", ratio))
    report(options, figures, verdicts, model=Path(path).name)


if __name__ == "__main__":
    main()
