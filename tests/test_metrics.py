"""The laws of the credit diagnostics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.credit import gain, signed_weight
from trl_rlsd.metrics import (
    TOKEN_METRICS,
    MetricSums,
    factor_metrics,
    gain_metrics,
    place_metrics,
    sign_agreement,
    weight_metrics,
)


def credit_metrics(advantages, student_logps, teacher_logps, mask, *, clip_range):
    gains = gain(student_logps, teacher_logps, mask)
    weights = signed_weight(gains, advantages, clip_range)
    return gain_metrics(advantages, gains, mask) | weight_metrics(advantages, *weights, mask)


def batch(seed, rows=6, tokens=5):
    g = torch.Generator().manual_seed(seed)
    student, teacher = -3 * torch.rand(rows, tokens, generator=g), -3 * torch.rand(rows, tokens, generator=g)
    mask = (torch.rand(rows, tokens, generator=g) > 0.3).long()
    return torch.randn(rows, generator=g), student, teacher, mask


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_sums_and_counts_of_parts_add_up_to_those_of_the_whole(seed, cut):
    whole = credit_metrics(*batch(seed), clip_range=0.2)
    parts = [
        credit_metrics(*(tensor[rows] for tensor in batch(seed)), clip_range=0.2)
        for rows in (slice(None, cut), slice(cut, None))
    ]
    for name in TOKEN_METRICS:
        for position in range(2):
            total = parts[0][name][position] + parts[1][name][position]
            assert total.item() == pytest.approx(whole[name][position].item(), abs=1e-4)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_masked_counts_nowhere(poison):
    advantages, student, teacher, mask = batch(3)
    clean = credit_metrics(advantages, student, teacher, mask, clip_range=0.2)
    dirty = credit_metrics(
        advantages,
        student.masked_fill(mask == 0, poison),
        teacher.masked_fill(mask == 0, poison),
        mask,
        clip_range=0.2,
    )
    assert all(clean[name][0] == dirty[name][0] and clean[name][1] == dirty[name][1] for name in TOKEN_METRICS)
    empty = credit_metrics(advantages, student, teacher, torch.zeros_like(mask), clip_range=0.2)
    assert all(value.item() == 0 and count.item() == 0 for value, count in empty.values())


def test_values_computed_by_hand():
    # gains 0.1 and -1 with A = 1, 0 and -0.1 with A = -1
    student = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
    teacher = torch.tensor([[-0.9, -2.0], [-2.0, -2.1]])
    metrics = credit_metrics(torch.tensor([1.0, -1.0]), student, teacher, torch.ones(2, 2), clip_range=0.2)
    means = {name: (value / count).item() for name, (value, count) in metrics.items()}
    assert means["gain_mean"] == pytest.approx(-0.25, abs=1e-6)
    k3 = [math.exp(g) - 1 - g for g in (0.1, -1.0, 0.0, -0.1)]
    assert means["kl"] == pytest.approx(sum(k3) / 4, abs=1e-6)
    assert means["weight_mean_pos"] == pytest.approx((math.exp(0.1) + 0.8) / 2, abs=1e-6)
    assert means["weight_mean_neg"] == pytest.approx((1 + math.exp(0.1)) / 2, abs=1e-6)
    assert (means["clip_low"], means["clip_high"]) == (0.25, 0.0)


def test_the_kl_estimate_is_the_exact_divergence_in_expectation():
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    exact = (student.exp() * (student - teacher)).sum().item()
    # every token of the vocabulary once, weighted by the student's probability
    estimates = [
        credit_metrics(torch.ones(1), s.view(1, 1), t.view(1, 1), torch.ones(1, 1), clip_range=0.2)["kl"][0].item()
        for s, t in zip(student, teacher, strict=True)
    ]
    assert sum(p * e for p, e in zip(student.exp().tolist(), estimates, strict=True)) == pytest.approx(exact, abs=1e-6)


# ---------------------------------------------------------------------- where the credit lies


def test_plain_credit_lies_evenly_and_moves_nothing():
    advantages, mask = torch.tensor([1.0, -2.0]), torch.ones(2, 8)
    credited = advantages.unsqueeze(1).expand(2, 8)
    answer = torch.zeros(2, 8, dtype=torch.bool)
    answer[:, 6:] = True
    means = {
        name: (part / whole).item()
        for name, (part, whole) in place_metrics(credited, advantages.unsqueeze(1), mask).items()
    }
    assert means == {f"credit_quarter_{quarter}": 0.25 for quarter in (1, 2, 3, 4)}
    places = place_metrics(credited, advantages.unsqueeze(1), mask, answer)
    assert (places["credit_on_answer"][0] / places["credit_on_answer"][1]).item() == 0.25
    assert places["moved_on_answer"] == (0.0, 0.0)


@given(st.integers(0, 2**31))
def test_the_quarters_are_of_each_completion_and_add_up(seed):
    advantages, student, _, mask = batch(seed)
    credited = student.masked_fill(mask == 0, math.nan)
    places = place_metrics(credited.nan_to_num(7.0), advantages.unsqueeze(1), mask)
    total = sum(places[f"credit_quarter_{quarter}"][0].item() for quarter in (1, 2, 3, 4))
    assert total == pytest.approx(student.abs().masked_fill(mask == 0, 0.0).sum().item(), rel=1e-5)


def test_what_the_teacher_moves_is_found_on_the_answer():
    credited = torch.tensor([[1.0, 1.0, 1.0, 1.5], [-1.0, -0.5, -1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    answer = torch.tensor([[False, False, False, True], [False, False, False, True]])
    part, whole = place_metrics(credited, torch.tensor([[1.0], [-1.0]]), mask, answer)["moved_on_answer"]
    assert (part.item(), whole.item()) == (0.5, 1.0)


def test_the_factors_of_a_gate_are_counted_by_sign():
    credited = torch.tensor([[2.0, 0.2, 0.2, 9.0], [-0.1, -1.0, -0.1, -0.4], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    factors = factor_metrics(credited, torch.tensor([2.0, -1.0, 0.0]), mask)
    assert {name: (value.item(), count.item()) for name, (value, count) in factors.items()} == {
        "weight_mean_pos": (pytest.approx(1.2), 3),
        "weight_mean_neg": (pytest.approx(1.6), 4),
        "weight_max_pos": (pytest.approx(1.0), 1),
        "weight_max_neg": (pytest.approx(1.0), 1),
    }


def test_what_a_gate_opens_for_is_what_the_teacher_moves():
    """Not what it takes from all the others."""
    credited = torch.tensor([[0.1] * 90 + [1.0] * 10])
    answer = torch.tensor([[False] * 90 + [True] * 10])
    part, whole = place_metrics(credited, torch.full((1, 100), 0.1), torch.ones(1, 100), answer)["moved_on_answer"]
    assert part == whole > 0


def test_two_references_agree_where_they_move_a_token_the_same_way():
    right, wrong = torch.tensor([[1.0, -1.0, 2.0, 0.0, 3.0]]), torch.tensor([[2.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    part, whole = sign_agreement(right, wrong, mask)["sign_agreement"]
    assert (part.item(), whole.item()) == (1.0, 3.0)


def test_the_sum_of_gains_is_per_completion_by_the_sign_of_its_advantage():
    student, teacher = torch.full((4, 2), -2.0), torch.full((4, 2), -1.5)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]])
    metrics = credit_metrics(torch.tensor([1.0, 1.0, 1.0, -1.0]), student, teacher, mask, clip_range=0.2)
    assert [value.item() for value in metrics["gain_sum_pos"]] == [1.5, 2.0]
    assert [value.item() for value in metrics["gain_sum_neg"]] == [1.0, 1.0]


def test_clipping_is_told_by_the_sign_of_the_advantage():
    student, teacher = torch.full((2, 4), -2.0), torch.tensor([[-1.0, -2.0, -2.0, -3.0]] * 2)
    metrics = credit_metrics(torch.tensor([1.0, -1.0]), student, teacher, torch.ones(2, 4), clip_range=0.2)
    for name in ("clip_low_pos", "clip_high_pos", "clip_low_neg", "clip_high_neg"):
        assert [value.item() for value in metrics[name]] == [1.0, 4.0]


def test_the_length_trend_is_relative_to_the_first_three_logs():
    sums = MetricSums(torch.device("cpu"))
    trends = []
    for lengths in ([10, 20], [30], [15], [5, 5]):
        sums.add({"length": (sum(lengths), len(lengths))})
        trends.append(sums.means(lambda totals: totals)["length_trend"])
    assert trends == pytest.approx([1.0, 30 / 22.5, 15 / 20, 5 / 20])
    assert "length_trend" not in sums.means(lambda totals: totals), "nothing was counted"
