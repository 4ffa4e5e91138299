"""Time and peak memory of three ways from hidden states to the loss and its gradients.

    python tests/benchmarks/loss_paths.py [--device cuda] [--json FILE]

full     logits of every token, then TRL's selective_log_softmax and entropy_from_logits
trl      TRL's fused head, the default path: log-probs and entropies in tiles, the loss, tiles again for the gradient
liger    use_liger_loss: log-probs, credit, loss and gradients chunk by chunk, then TRL's tiles for the entropies
liger-   the same without the entropy metric

The head is frozen, as with LoRA; `trained` rows also take its gradient. Time and memory are taken in processes of
their own.
"""

import torch
from measure import Peak, arguments, in_fresh_process, median, report, seconds, verdict
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from trl_rlsd.credit import get_credit, token_advantages
from trl_rlsd.losses import FusedLoss, Surrogate, SurrogateBatch, clipped_surrogate, row_factors


VOCABULARY = 151_936  # Qwen's
PATHS = ("full", "trl", "liger", "liger-")
ROWS = 8
CPU_SIZES = [(1024, 128, False), (1024, 256, False), (1024, 128, True), (2048, 128, False), (4096, 64, False)]
GPU_SIZES = [
    (hidden, tokens, trained)
    for hidden in (1024, 2048, 4096)
    for tokens in (1024, 4096, 16384)
    for trained in (False, True)
]


def credit(batch):
    def of(logps, rows):
        knobs = dict(lam=0.5, clip_range=0.2, negative_only=False)
        parts = (batch["advantages"][rows], logps, batch["teacher_logps"][rows], batch["mask"][rows])
        return token_advantages(get_credit("rlsd"), *parts, **knobs)

    return of


def surrogate_batch(batch):
    return SurrogateBatch(batch["mask"], row_factors("dapo", batch["mask"], max_completion_length=1))


def full(hidden, weight, batch):
    logits = hidden @ weight.T
    logps = selective_log_softmax(logits, batch["ids"])
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return _surrogate(logps, batch), entropy


def trl(hidden, weight, batch):
    flat, ids = hidden.reshape(-1, hidden.size(2)), batch["ids"].reshape(-1)
    outputs = ChunkedLogProbFunction.apply(flat, weight, None, ids, 1.0, 8192, None, 1.0, ("log_probs", "entropy"))
    return _surrogate(outputs[0].view_as(batch["ids"]), batch), outputs[1]


def _surrogate(logps, batch):
    rows = torch.arange(len(logps), device=logps.device)
    credited = credit(batch)(logps.detach(), rows)
    return clipped_surrogate(logps, credited, surrogate_batch(batch), Surrogate())


def liger(hidden, weight, batch, with_entropy=True):
    fused = FusedLoss(batch["ids"], surrogate_batch(batch), Surrogate(), credit(batch), with_entropy=with_entropy)
    fused.take(hidden, weight, None)
    return fused.loss, fused.entropy


def step_of(path, hidden_size, tokens, trained, device):
    """A function that takes the loss and its gradients once."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # what the head holds costs nothing; to draw 600 million numbers would cost more than the measurement
    block = (torch.randn(VOCABULARY // 32, hidden_size, device=device) / hidden_size**0.5).to(dtype)
    weight = block.repeat(32, 1).requires_grad_(trained)
    shape = (ROWS, tokens // ROWS)
    hidden = torch.randn(*shape, hidden_size, device=device, dtype=dtype).requires_grad_()
    batch = {
        "ids": torch.randint(VOCABULARY, shape, device=device),
        "mask": torch.ones(shape, dtype=torch.long, device=device),
        "advantages": torch.randn(ROWS, device=device),
        "teacher_logps": -12 + torch.randn(shape, device=device),
    }
    function = {"full": full, "trl": trl, "liger": liger, "liger-": lambda *a: liger(*a, with_entropy=False)}[path]

    def step():
        hidden.grad = weight.grad = None
        loss, _ = function(hidden, weight, batch)
        loss.backward()
        return hidden.grad.float().norm().item()

    return step


def memory(size):
    """Peak bytes above the inputs, and the gradient's size, to see that all paths compute the same."""
    step = step_of(*size)
    with Peak(size[-1]) as peak:
        gradient = step()
    return {"peak_bytes": peak.bytes, "gradient": gradient}


def times(size, repeats):
    step = step_of(*size)
    step()  # warms up
    return {"seconds": median([seconds(step, size[-1]) for _ in range(repeats)])}


def run(repeats, *size):
    return in_fresh_process(memory, size) | in_fresh_process(times, size, repeats)


def main():
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    figures, verdicts = [], []
    print(f"vocabulary {VOCABULARY:,}; time and peak memory as ratios to full logits")
    print(
        f"{'hidden':>7}{'tokens':>8}  {'head':8}" + "".join(f"{path + ' time':>13}{'memory':>8}" for path in PATHS[1:])
    )
    for hidden, tokens, trained in GPU_SIZES if options.device == "cuda" else CPU_SIZES:
        size = (hidden, tokens, trained, options.device)
        results = {path: run(options.repeats, path, *size) for path in PATHS}
        base = results["full"]
        tolerance = 1e-3 if options.device == "cpu" else 2e-2  # float32, bfloat16
        assert all(abs(r["gradient"] / base["gradient"] - 1) < tolerance for r in results.values()), results
        ratios = {
            path: {
                "time": results[path]["seconds"] / base["seconds"],
                "memory": results[path]["peak_bytes"] / base["peak_bytes"],
            }
            for path in PATHS
        }
        line = "".join(f"{ratios[path]['time']:>13.2f}{ratios[path]['memory']:>8.2f}" for path in PATHS[1:])
        print(f"{hidden:>7}{tokens:>8}  {'trained' if trained else 'frozen':8}{line}", flush=True)
        figures.append({"hidden": hidden, "tokens": tokens, "trained_head": trained, "ratios": ratios})
        if options.device == "cuda":
            figures[-1]["measured"] = results
    for trained in (False, True):
        worst = max(f["ratios"]["liger"]["memory"] for f in figures if f["trained_head"] == trained)
        verdicts.append(verdict(f"peak memory Liger / full logits, head {'trained' if trained else 'frozen'}", worst))
    report(options, figures, verdicts, vocabulary=VOCABULARY)


if __name__ == "__main__":
    main()
