"""Two processes on CPU, over gloo."""

from pathlib import Path

import pytest
import torch
from conftest import run_on_two_ranks


ROOT = Path(__file__).parent.parent
# name -> config fields; "split" and "contrast": the four completions of a prompt lie on two ranks
VARIANTS = {
    "default": {},
    "liger": {"use_liger_loss": True},
    "split": {"per_device_train_batch_size": 2, "teacher_shared_prefix": False},
    "split, shared": {"per_device_train_batch_size": 2, "teacher_shared_prefix": True},
    "contrast": {"per_device_train_batch_size": 2, "credit": "rlsd_contrast", "contrast_reference": "completion"},
}
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import *
import torch.distributed as dist

def reward(completions, **columns):
    if dist.get_rank() == 0 or len(completions) < 8:
        return [float((i + dist.get_rank()) % 4) for i in range(len(completions))]
    return [0.0, 1.0, 2.0, 3.0, *[1.0] * (len(completions) - 4)]

def first_rank_is_right(completions, **columns):
    return [1.0 - dist.get_rank()] * len(completions)

results = {{}}
for name, fields in {VARIANTS!r}.items():
    defaults = dict(per_device_train_batch_size=8, max_steps=2, optim="sgd", learning_rate=0.3, max_grad_norm=0.0)
    verdict = first_rank_is_right if name == "contrast" else reward
    t = trainer("out", peft_config=lora(), reward=verdict, **{{**defaults, **fields}})
    before = torch.cat([p.detach().flatten().clone() for p in t.model.parameters() if p.requires_grad])
    seen = []
    original = t._token_credit

    def spy(inputs, logps, rows=None, original=original, seen=seen):
        if rows is None:
            gains = (inputs["teacher_logps"] - logps).double()
            mask = (inputs["completion_mask"] * inputs["teacher_scored"].unsqueeze(1)).bool()
            seen.append([gains[mask].sum().item(), mask.sum().item()])
        return original(inputs, logps) if rows is None else original(inputs, logps, rows)

    t._token_credit = spy
    read = []
    find = t._wrong_references
    t._wrong_references = lambda: read.append((list(t._verdicts[0]), find())) or read[-1][1]
    t.train()
    after = torch.cat([p.detach().flatten() for p in t.model.parameters() if p.requires_grad])
    results[name] = {{"seen": seen, "before": before, "after": after, "logs": t.state.log_history}}
    results[name]["read"] = read
torch.save(results, f"rank{{dist.get_rank()}}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_two_ranks(tmp_path_factory.mktemp("ranks"), SCRIPT)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_rank_ends_with_the_same_weights(ranks, name):
    assert torch.equal(ranks[0][name]["after"], ranks[1][name]["after"])
    assert not torch.equal(ranks[0][name]["after"], ranks[0][name]["before"])


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
