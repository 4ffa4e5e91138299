"""Two processes on CPU, over gloo: DDP, Accelerate's MULTI_CPU.

`main` is what each of them runs, all variants one after another. Those of `PARITY` are also trained by one process,
here, on the same global batches: completions are drawn by prompt, place in the group and step, not by rank.
"""

import random
import string
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import dataset, lora, run_on_two_ranks, trainer, weights
from datasets import Dataset

from trl_rlsd.metrics import METRICS


SGD = dict(optim="sgd", max_grad_norm=0.0)
CONTRAST = {"credit": "rlsd_contrast", "contrast_reference": "completion"}
# name -> config fields; "split" and "contrast": the four completions of a prompt lie on two ranks
VARIANTS = {
    "default": {},
    "liger": {"use_liger_loss": True},
    "split": {"per_device_train_batch_size": 2, "teacher_shared_prefix": False},
    "split, shared": {"per_device_train_batch_size": 2, "teacher_shared_prefix": True},
    "contrast": {"per_device_train_batch_size": 2, **CONTRAST},
}
# name -> LoRA?, config fields. Every teacher has been updated and has scored since; at the end it lags behind again
PARITY = {
    "synced, lora": (True, {"teacher_sync_steps": 3}),
    "synced, full, num_iterations": (False, {"teacher_sync_steps": 4, "max_steps": 6, "num_iterations": 2}),
    "ema, lora": (True, {"teacher_model_kind": "ema", "teacher_update_rate": 0.3, "gradient_accumulation_steps": 2}),
    "ema, full": (False, {"teacher_model_kind": "ema", "teacher_update_rate": 0.3, "loss_type": "grpo"}),
    "synced, lora, liger": (True, {"teacher_sync_steps": 3, "use_liger_loss": True}),
    "contrast, split groups": (
        True,
        {"teacher_sync_steps": 3, "per_device_train_batch_size": 2, **CONTRAST, "contrast_reward_below": 3.0},
    ),
}
# name -> what the rows of the first rank lack, config fields, share of all rows that no teacher scores. Those of the
# second rank lack nothing; one of its four has no wrong sibling
ODD_RANKS = {
    "no advantage": ("advantage", {}, 0.5),
    "no context": ("context", {}, 0.5),
    "no context, additive credit": ("context", {"credit": "opsd"}, 0.5),
    "neither, contrast": ("both", CONTRAST, 0.625),
    "neither, liger, accumulated": ("both", {"use_liger_loss": True, "gradient_accumulation_steps": 2}, 0.5),
}


def drawn(prompts, trainer):
    """A rollout function whose completions depend on prompt, place in the group and step."""
    first, group = trainer.accelerator.process_index * len(prompts), trainer.num_generations
    ids = []
    for row, prompt in enumerate(prompts, start=first):
        draw = random.Random(f"{prompt}, {row % group}, {trainer.state.global_step}")
        text = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8)))
        ids.append(trainer.processing_class(text)["input_ids"])
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": [[0.0] * len(own) for own in ids]}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def train(t) -> dict:
    """What a run leaves behind, as plain values and tensors."""
    credits, totals = {}, []

    def observe_credit(batch, student_logps, credited):
        credited = credited if credited.ndim == 2 else credited.unsqueeze(1).expand_as(student_logps)
        for row, mask in enumerate(batch["completion_mask"].bool()):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            key = (t.state.global_step, *prompt, *batch["completion_ids"][row][mask].tolist())
            credits[key] = credited[row][mask]

    metrics = t._credit_metrics
    means = metrics.means
    metrics.means = lambda reduce: totals.append(metrics.totals.clone()) or means(reduce)
    t.observe_credit = observe_credit
    before = flat(weights(t.model))
    t.train()
    run = {"before": before, "after": flat(weights(t.model)), "teacher": flat(t.teacher.copy)}
    run |= {"credits": credits, "totals": totals, "logs": t.state.log_history}
    return run | {"kind": t.accelerator.distributed_type.value}


def parity_run(name: str, processes: int, folder="out") -> dict:
    peft, fields = PARITY[name]
    rows = [row | ({"privileged_context": None} if i % 5 == 0 else {}) for i, row in enumerate(dataset(16))]
    # lambda stays up and most weights are not clipped: the update depends on what exactly the teacher says
    credit = dict(rlsd_lambda_decay_steps=0, rlsd_reweight_clip_range=2.0)
    fields = dict(per_device_train_batch_size=4, max_steps=4, **credit, **SGD, learning_rate=0.1) | fields
    fields["per_device_train_batch_size"] *= 2 // processes
    peft = {"peft_config": lora()} if peft else {}
    return train(trainer(folder, data=Dataset.from_list(rows), rollout_func=drawn, **peft, **fields))


def odd_run(name: str) -> dict:
    lacks, fields, _ = ODD_RANKS[name]
    rows = list(dataset(16))
    if lacks != "advantage":  # not shuffled, the ranks take turns
        turn = fields.get("gradient_accumulation_steps", 1)
        rows = [row | ({"privileged_context": None} if i // turn % 2 == 0 else {}) for i, row in enumerate(rows)]

    def reward(completions, **columns):
        equal = lacks != "context" and dist.get_rank() == 0
        return [0.0 if equal else float(row % 4) for row in range(len(completions))]

    fields = dict(shuffle_dataset=False, learning_rate=0.3, **SGD, **fields)
    return train(trainer("out", peft_config=lora(), data=Dataset.from_list(rows), reward=reward, **fields))


def variant_run(name: str) -> dict:
    def reward(completions, **columns):
        if dist.get_rank() == 0 or len(completions) < 8:
            return [float((i + dist.get_rank()) % 4) for i in range(len(completions))]
        return [0.0, 1.0, 2.0, 3.0, *[1.0] * (len(completions) - 4)]

    def first_rank_is_right(completions, **columns):
        return [1.0 - dist.get_rank()] * len(completions)

    fields = dict(per_device_train_batch_size=8, max_steps=2, learning_rate=0.3, **SGD) | VARIANTS[name]
    t = trainer("out", peft_config=lora(), reward=first_rank_is_right if name == "contrast" else reward, **fields)
    seen, read = [], []
    original, find = t._token_credit, t._wrong_references

    def spy(inputs, logps, rows=None):
        if rows is None:
            gains = (inputs["teacher_logps"] - logps).double()
            mask = (inputs["completion_mask"] * inputs["teacher_scored"].unsqueeze(1)).bool()
            seen.append([gains[mask].sum().item(), mask.sum().item()])
        return original(inputs, logps) if rows is None else original(inputs, logps, rows)

    t._token_credit = spy
    t._wrong_references = lambda *rows: read.append((list(t._verdicts[0]), find(*rows))) or read[-1][1]
    return train(t) | {"seen": seen, "read": read}


def record_collectives() -> list[str]:
    """The names of the collective calls that this process makes from Python from now on."""
    calls = []

    def recorded(name, call):
        return lambda *args, **kwargs: calls.append(name) or call(*args, **kwargs)

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier"):
        setattr(dist, name, recorded(name, getattr(dist, name)))
    return calls


def main() -> None:
    # a collective that one rank alone makes is an error after a minute; transformers 5.23 drops ddp_timeout on the CPU
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    calls, runs = record_collectives(), {}
    for names, run in ((VARIANTS, variant_run), (PARITY, lambda name: parity_run(name, 2)), (ODD_RANKS, odd_run)):
        for name in names:
            calls.clear()
            runs[name] = run(name) | {"collectives": list(calls)}
    torch.save(runs, f"rank{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as t; t.main()"
    return run_on_two_ranks(tmp_path_factory.mktemp("ranks"), script)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {name: parity_run(name, 1, tmp_path_factory.mktemp("alone")) for name in PARITY}


@pytest.mark.parametrize("name", [*VARIANTS, *PARITY, *ODD_RANKS])
def test_every_rank_ends_with_the_same_weights(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert first["kind"] == "MULTI_CPU"
    assert torch.equal(first["after"], second["after"])
    assert torch.equal(first["teacher"], second["teacher"])
    assert not torch.equal(first["after"], first["before"])


@pytest.mark.parametrize("name", PARITY)
def test_two_processes_are_one_with_the_same_global_batch(ranks, alone, name):
    one, two = alone[name], ranks[0][name]
    assert not ranks[0][name]["credits"].keys() & ranks[1][name]["credits"].keys(), "each rank has its own rows"
    credits = ranks[0][name]["credits"] | ranks[1][name]["credits"]
    assert credits.keys() == one["credits"].keys()
    for row, credit in one["credits"].items():
        assert (credits[row] - credit).abs().max() <= 1e-5
    # the token advantages of a row differ, or the teacher would be without effect on what is compared
    assert max(credit.max() - credit.min() for credit in credits.values()) > 0.1
    assert torch.equal(one["before"], two["before"])
    assert (one["after"] - two["after"]).abs().max() <= 1e-5
    assert (one["teacher"] - two["teacher"]).abs().max() <= 1e-5
    for start in (one["before"], one["teacher"]):
        assert (one["after"] - start).abs().max() > 1e-2


@pytest.mark.parametrize("name", PARITY)
def test_two_processes_log_what_one_logs(ranks, alone, name):
    of_a_group = ["reward", "reward_std", "frac_reward_zero_std", "loss", "grad_norm"]
    for one, two in zip(alone[name]["logs"][:-1], ranks[0][name]["logs"][:-1], strict=True):
        names = [n for n in one if n.startswith("rlsd/") or n in of_a_group]
        assert [n for n in two if n in names or n.startswith("rlsd/")] == names
        for metric in set(names) - {"rlsd/teacher_seconds"}:
            assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("name", ODD_RANKS)
def test_ranks_with_unlike_rows_make_the_same_collectives(ranks, name):
    assert ranks[0][name]["collectives"]
    assert ranks[0][name]["collectives"] == ranks[1][name]["collectives"]


@pytest.mark.parametrize("name", ODD_RANKS)
def test_metrics_are_sums_over_counts_of_all_ranks(ranks, name):
    lacks, _, skipped = ODD_RANKS[name]
    logged = ranks[0][name]["logs"], ranks[0][name]["totals"], ranks[1][name]["totals"]
    for logs, *totals in list(zip(*logged, strict=True))[:-1]:  # the last is the run's summary
        assert logs["rlsd/skipped"] == skipped
        assert logs["rlsd/no_context"] == (0 if lacks == "advantage" else 0.5)
        assert not torch.equal(*(total[METRICS.index("skipped")] for total in totals)), "unlike ranks"
        for metric, (value, count) in zip(METRICS, sum(totals).tolist(), strict=True):
            if metric != "length":
                assert (f"rlsd/{metric}" in logs) == (count > 0)
                assert count == 0 or logs[f"rlsd/{metric}"] == pytest.approx(value / count, rel=1e-6)


@pytest.mark.parametrize("name", ["default", "liger"])
def test_metrics_are_the_means_of_all_rows(ranks, name):
    """Sums over counts, not means of means."""
    results = [rank[name] for rank in ranks]
    for step in range(2):
        totals = [sum(result["seen"][step][k] for result in results) for k in range(2)]
        assert results[0]["seen"][step][1] != results[1]["seen"][step][1], "equal counts would hide a mean of means"
        assert results[0]["logs"][step]["rlsd/gain_mean"] == pytest.approx(totals[0] / totals[1], rel=1e-5)
        assert results[0]["logs"][step]["rlsd/skipped"] == 0.25


@pytest.mark.parametrize("first, second", [("default", "liger"), ("split", "split, shared")])
def test_the_update_does_not_depend_on_how_it_is_computed(ranks, first, second):
    start = ranks[0][first]["before"]
    updates = [ranks[0][name]["after"] - start for name in (first, second)]
    assert torch.equal(start, ranks[0][second]["before"])
    assert (updates[0] - updates[1]).norm() <= 1e-4 * updates[0].norm()


def test_the_wrong_sibling_may_lie_on_another_rank(ranks):
    for step in range(2):
        (right, read_by_right), (wrong, read_by_wrong) = (rank["contrast"]["read"][step] for rank in ranks)
        spoken = [text.strip() for text in wrong]
        assert read_by_right == [spoken[0]] * len(right), "the first rank has no wrong completion of its own"
        assert read_by_wrong == [spoken[1], spoken[0]]
    assert ranks[0]["contrast"]["logs"][0]["rlsd/no_contrast"] == 0
