"""Time and peak memory of three ways from hidden states to the loss and its gradients.

    python tests/benchmarks/loss_paths.py [--device cuda] [--json FILE]

full     logits of every token, log-softmax, gather
trl      TRL's fused head, the default path: log-probs and entropies in tiles, the loss, tiles again for the gradient
liger    use_liger_loss: log-probs, credit, loss and gradients chunk by chunk, then TRL's tiles for the entropies
liger-   the same without the entropy metric

The head is frozen, as with LoRA; `trained head` rows also take its gradient. Each path runs in a process of its own.
"""

import torch
from measure import Peak, arguments, in_fresh_process, median, report, seconds, verdict
from trl.kernels import ChunkedLogProbFunction

from trl_rlsd.credit import get_credit, token_advantages
from trl_rlsd.losses import FusedLoss, Surrogate, SurrogateBatch, clipped_surrogate, entropies, row_factors


VOCABULARY = 151_936  # Qwen's
PATHS = ("full", "trl", "liger", "liger-")
ROWS = 8
CPU_SIZES = [(1024, 128, False), (1024, 512, False), (1024, 128, True), (2048, 128, False), (4096, 64, False)]
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
    distribution = logits.float().log_softmax(-1)
    logps = distribution.gather(2, batch["ids"].unsqueeze(2)).squeeze(2)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(-1)
    return _surrogate(logps, batch), entropy


def trl(hidden, weight, batch):
    flat, ids = hidden.reshape(-1, hidden.size(2)), batch["ids"].reshape(-1)
    outputs = ChunkedLogProbFunction.apply(flat, weight, None, ids, 1.0, 8192, None, 1.0, ("log_probs", "entropy"))
    return _surrogate(outputs[0].view_as(batch["ids"]), batch), outputs[1]


def _surrogate(logps, batch):
    rows = torch.arange(len(logps), device=logps.device)
    credited = credit(batch)(logps.detach(), rows)
    return clipped_surrogate(logps, credited, surrogate_batch(batch), Surrogate())


def liger(hidden, weight, batch, with_entropies=True):
    fused = FusedLoss(
        batch["ids"], surrogate_batch(batch), Surrogate(), credit(batch), 1.0, entropies if with_entropies else None
    )
    fused.take(hidden, weight, None)
    return fused.loss, fused.entropy


def run(path, hidden_size, tokens, trained, device, repeats):
    """Median seconds, peak bytes above the inputs, and the loss, to see that all paths compute the same."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = (torch.randn(VOCABULARY, hidden_size, device=device) / hidden_size**0.5).to(dtype).requires_grad_(trained)
    shape = (ROWS, tokens // ROWS)
    hidden = torch.randn(*shape, hidden_size, device=device, dtype=dtype).requires_grad_()
    batch = {
        "ids": torch.randint(VOCABULARY, shape, device=device),
        "mask": torch.ones(shape, dtype=torch.long, device=device),
        "advantages": torch.randn(ROWS, device=device),
        "teacher_logps": -12 + torch.randn(shape, device=device),
    }
    function = {"full": full, "trl": trl, "liger": liger, "liger-": lambda *a: liger(*a, with_entropies=False)}[path]

    def step():
        hidden.grad = weight.grad = None
        loss, _ = function(hidden, weight, batch)
        loss.backward()
        return loss

    with Peak(device) as peak:
        loss = step().item()
    times = [seconds(step, device) for _ in range(repeats)]
    return {"seconds": median(times), "peak_bytes": peak.bytes, "loss": loss}


def main():
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    figures, verdicts = [], []
    print(f"vocabulary {VOCABULARY:,}; time and peak memory as ratios to full logits")
    print(
        f"{'hidden':>7}{'tokens':>8}  {'head':8}" + "".join(f"{path + ' time':>13}{'memory':>8}" for path in PATHS[1:])
    )
    for hidden, tokens, trained in GPU_SIZES if options.device == "cuda" else CPU_SIZES:
        size = (hidden, tokens, trained, options.device, options.repeats)
        results = {path: in_fresh_process(run, path, *size) for path in PATHS}
        base = results["full"]
        assert all(abs(r["loss"] - base["loss"]) < 1e-2 for r in results.values()), results
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
    worst = max(f["ratios"]["liger"]["memory"] for f in figures if not f["trained_head"])
    verdicts.append(verdict("peak memory Liger / full logits", worst))
    report(options, figures, verdicts, vocabulary=VOCABULARY)


if __name__ == "__main__":
    main()
