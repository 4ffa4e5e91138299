"""What the teacher pass costs by the length of the privileged context: prompts encoded once, or rows scored whole.

    python tests/benchmarks/teacher_pass.py [--device cuda] [--json FILE]

One group of completions with one privileged prompt. On a CPU a model of one layer (hidden 512, 8 heads, 4 key-value
heads), the parts of which cost what they cost in any model of that width; on a GPU the shape of Qwen3-0.6B in
bfloat16. The two ways take turns in one process; memory is taken in processes of their own.
"""

from contextlib import nullcontext

import torch
from measure import Peak, arguments, in_fresh_process, median, report, seconds, verdict
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_rlsd.teacher import scoring
from trl_rlsd.teacher_pass import TeacherPass


BAR_LENGTH = 8192


def build(device):
    torch.manual_seed(0)
    if device == "cuda":
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
        )
        model = Qwen3ForCausalLM(config).to(device, torch.bfloat16)
    else:
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=40_960,
            initializer_range=0.1,  # log-probs that differ enough for a deviation to be seen
        )
        model = LlamaForCausalLM(config)
    add_fused_lm_head(model)
    return model


def token_logps(model, ids, mask, tokens):
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-tokens] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -tokens:]


def passes(length, options):
    """The model, and a function for each way to score one group."""
    model = build(options.device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 1000, (length,), generator=generator).tolist()
    lengths = torch.randint(options.tokens // 2, options.tokens + 1, (options.group,), generator=generator)
    mask = (torch.arange(options.tokens) < lengths.unsqueeze(1)).long().to(options.device)
    ids = torch.randint(3, 1000, mask.shape, generator=generator).to(options.device) * mask

    def way(share):
        scorer = TeacherPass(token_logps, nullcontext, 0, budget=options.budget, share=share)

        def score():
            with scoring(model):
                return scorer(model, [prompt] * options.group, ids, mask, range(options.group))

        return score

    plan = TeacherPass(token_logps, nullcontext, 0, budget=options.budget, share=None).plan(
        [prompt] * options.group, lengths.tolist(), range(options.group), torch.device(options.device)
    )
    return {"whole": way(False), "shared": way(True)}, plan[0].shared


def times(length, options):
    ways, chosen = passes(length, options)
    taken, scores = {name: [] for name in ways}, {}
    for _ in range(options.repeats):
        for name, score in ways.items():
            taken[name].append(seconds(lambda name=name, score=score: scores.update({name: score()}), options.device))
    deviation = (scores["whole"] - scores["shared"]).abs().max().item()
    assert deviation < (1e-4 if options.device == "cpu" else 0.5), deviation  # float32, bfloat16
    return {name: median(values) for name, values in taken.items()} | {"deviation": deviation, "chosen": chosen}


def memory(length, options, name):
    score = passes(length, options)[0][name]
    with Peak(options.device) as peak:
        score()
    return peak.bytes


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 4096, BAR_LENGTH, 16384])
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt [%(default)s]")
    parser.add_argument("--tokens", type=int, default=512, help="of a completion, at most [%(default)s]")
    parser.add_argument("--budget", type=int, default=16384, help="teacher_token_budget [%(default)s]")
    options = parser.parse_args()
    figures, verdicts = [], []
    print(f"{options.group} completions of up to {options.tokens} tokens; ratios of shared to whole")
    print(f"{'privileged':>11}{'time':>8}{'memory':>8}  chosen by default")
    for length in options.lengths:
        taken = in_fresh_process(times, length, options)
        peaks = {name: in_fresh_process(memory, length, options, name) for name in ("whole", "shared")}
        ratio, chosen = taken["shared"] / taken["whole"], "shared" if taken["chosen"] else "whole"
        memory_ratio = peaks["shared"] / peaks["whole"]
        print(f"{length:>11}{ratio:>8.3f}{memory_ratio:>8.2f}  {chosen}", flush=True)
        figure = {"tokens": length, "time": ratio, "memory": memory_ratio, "deviation": taken["deviation"]}
        figures.append({**figure, "chosen": chosen})
        if options.device == "cuda":
            figures[-1]["seconds"] = taken
        if length == BAR_LENGTH:
            verdicts.append(verdict("teacher pass shared / whole, 8k tokens", ratio))
    report(options, figures, verdicts)


if __name__ == "__main__":
    main()
