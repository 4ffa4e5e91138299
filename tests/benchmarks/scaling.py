"""How the time of an RLSD update grows with completions, their length, and the vocabulary.

    python tests/benchmarks/scaling.py [--device cuda] [--json FILE]

A model of four layers (hidden 256) made in code, trained with LoRA; sampling is taken out as in update_time.py. Each
line changes one size of the first, in a process of its own; the ratios are to the first line's medians. `teacher` is
the teacher's share of the update.
"""

import tempfile
import warnings

import torch
from datasets import Dataset
from measure import arguments, in_fresh_process, median, report
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from update_time import StepTimes, reward

from trl_rlsd import RLSDConfig, RLSDTrainer


BASE = {"completions": 8, "tokens": 64, "vocabulary": 32_768}
SIZES = [
    BASE,
    *({**BASE, "completions": n} for n in (16, 32)),
    *({**BASE, "tokens": n} for n in (128, 256)),
    *({**BASE, "vocabulary": n} for n in (65_536, 151_936)),
]
PROMPT, CONTEXT = 64, 64


def tokenizer(vocabulary):
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", padding_side="left")


def text(start, length):
    return " ".join(f"t{3 + (start * 97 + i) % 32_000}" for i in range(length))


def rollout(size):
    def generate(prompts, trainer):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, size["vocabulary"], (len(prompts), size["tokens"]), generator=generator).tolist()
        prompt_ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * size["tokens"]] * len(prompts)}

    return generate


def run(size, options):
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    times = StepTimes(options.device)
    prompts = [text(i, PROMPT) for i in range(16)]
    trainer = RLSDTrainer(
        LlamaForCausalLM(config),
        reward(1.0),
        RLSDConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=size["completions"],
            num_generations=8,
            max_completion_length=size["tokens"],
            max_steps=options.repeats + 1,
            logging_steps=1,
            rlsd_lambda_decay_steps=0,
            use_cpu=options.device == "cpu",
            bf16=options.device == "cuda",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        Dataset.from_dict({"prompt": prompts, "privileged_context": [text(500 + i, CONTEXT) for i in range(16)]}),
        processing_class=tokenizer(size["vocabulary"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[times],
        rollout_func=rollout(size),
    )
    trainer.train()
    teacher = [log["rlsd/teacher_seconds"] for log in trainer.state.log_history if "rlsd/teacher_seconds" in log]
    return median(times.times[1:]), median(teacher[1:])  # the first step warms up


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    figures, base = [], None
    lines = []
    for size in SIZES:
        taken, teacher = in_fresh_process(run, size, options)
        base = taken if base is None else base
        figures.append({**size, "time": taken / base, "teacher_share": teacher / taken})
        lines.append("".join(f"{size[name]:>13,}" for name in BASE) + f"{taken / base:>9.2f}{teacher / taken:>9.0%}")
    print("".join(f"{name:>13}" for name in BASE) + f"{'time':>9}{'teacher':>9}")
    print("\n".join(lines))
    report(options, figures, [], prompt_tokens=PROMPT, context_tokens=CONTEXT)


if __name__ == "__main__":
    main()
