"""The laws of token credit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.credit import (
    Credit,
    gain,
    get_credit,
    lambda_at,
    mean_one,
    register_credit,
)
from trl_rlsd.credit import token_advantages as run


CENTRED = ["rlsd_contrast", "rlcsd", "contrast_additive"]
CONTRASTS = [*CENTRED, "rlsd_gate"]
NAMES = ["rlsd", "grpo", "opsd", "grpo_opsd", "rlrt", "antisd", "sdar", *CONTRASTS]
KEEP_SIGN = ["rlsd", "grpo", "rlsd_contrast", "rlcsd", "rlrt", "rlsd_gate"]
NO_LAMBDA = ["grpo", "opsd"]
LN2 = math.log(2.0)
KNOBS = {"lam": 0.5, "clip_range": 0.2, "negative_only": False}
WHOLLY = {**KNOBS, "lam": 1.0}


def token_advantages(credit, advantages, student, teacher, mask, scored=None, **options):
    """A contrast's wrong reference moves each token by another amount than the right one."""
    if credit.contrast and "wrong_logps" not in options:
        options["wrong_logps"] = 0.5 * (student + teacher.flip(0))
    return run(credit, advantages, student, teacher, mask, scored, **options)


@st.composite
def batches(draw):
    """Rows of every kind: A of either sign and 0, one token or several, all masked, huge gains, bfloat16."""
    rows, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    student, teacher = (-scale * torch.rand(rows, tokens, generator=generator) for _ in range(2))
    sign = torch.tensor(draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=rows, max_size=rows)))
    advantages = sign * torch.rand(rows, generator=generator) * 2
    lengths = torch.tensor(draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows)))
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    return advantages, student.to(dtype), teacher.to(dtype), mask


knobs = st.fixed_dictionaries({"lam": st.floats(0, 1), "clip_range": st.floats(0, 5), "negative_only": st.booleans()})


def test_credit_functions_say_what_they_need():
    declared = {name: get_credit(name) for name in NAMES}
    assert {name for name in NAMES if not declared[name].uses_lambda} == set(NO_LAMBDA)
    assert {name for name in NAMES if declared[name].keeps_sign} == set(KEEP_SIGN)
    assert {name for name in NAMES if declared[name].contrast} == set(CONTRASTS)
    every_row = dict.fromkeys(["opsd", "grpo_opsd", "contrast_additive", "antisd", "sdar"], "all")
    rows = dict.fromkeys(NAMES, "nonzero_advantage") | every_row | {"grpo": "none", "rlrt": "positive_advantage"}
    assert {name: declared[name].teacher_rows for name in NAMES} == rows
    weighed = {"rlsd": "gain", "rlsd_contrast": "contrast", "rlrt": "reversed", "rlsd_gate": "gate"}
    assert {name: declared[name].evidence for name in NAMES if declared[name].evidence} == weighed


@given(batches(), st.sampled_from([name for name in NAMES if name not in NO_LAMBDA]))
def test_lambda_zero_is_grpo_bit_for_bit(batch, name):
    advantages, student, teacher, mask = batch
    credited = token_advantages(get_credit(name), *batch, **{**KNOBS, "lam": 0.0})
    expected = advantages.unsqueeze(1).expand(mask.shape).masked_fill(mask == 0, 0.0)
    assert torch.equal(credited, expected.to(credited.dtype))


@given(batches(), st.sampled_from(KEEP_SIGN), knobs)
def test_what_keeps_the_sign_never_turns_the_verdict_over(batch, name, options):
    advantages, _, _, mask = batch
    assert get_credit(name).keeps_sign
    credited = token_advantages(get_credit(name), *batch, **options)
    product = credited * advantages.unsqueeze(1)
    assert (product[mask.bool()] >= 0).all()
    may_be_zero = {"rlcsd": True, "rlsd_gate": options["lam"] == 1}
    if not may_be_zero.get(name, options["lam"] == 1 and options["clip_range"] >= 1):
        strict = mask.bool() & (advantages != 0).unsqueeze(1)
        assert (product[strict] > 0).all()


@given(batches(), st.sampled_from(KEEP_SIGN), knobs)
def test_zero_advantage_stays_zero(batch, name, options):
    advantages, *rest = batch
    credited = token_advantages(get_credit(name), torch.zeros_like(advantages), *rest, **options)
    assert torch.equal(credited, torch.zeros_like(credited))


@given(batches(), st.sampled_from(NAMES), knobs, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_pads_are_inert_even_when_they_hold_nan_or_inf(batch, name, options, poison):
    advantages, student, teacher, mask = batch
    clean = token_advantages(get_credit(name), *batch, **options)
    wrong = 0.5 * (student + teacher.flip(0))
    poisoned = [logps.masked_fill(mask == 0, poison) for logps in (student, teacher)]
    if get_credit(name).contrast:
        options = {**options, "wrong_logps": wrong.masked_fill(mask == 0, poison)}
    assert torch.equal(token_advantages(get_credit(name), advantages, *poisoned, mask, **options), clean)
    assert (clean[mask == 0] == 0).all()


@given(batches(), st.sampled_from(NAMES), knobs)
def test_credit_is_finite_float32_at_least_and_without_gradient(batch, name, options):
    advantages, student, teacher, mask = batch
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    credited = token_advantages(get_credit(name), advantages, student, teacher, mask, **options)
    assert credited.shape == mask.shape
    assert torch.isfinite(credited).all()
    assert credited.dtype in (torch.float32, torch.float64)
    assert not credited.requires_grad


@given(batches(), st.sampled_from(NAMES), knobs)
def test_rows_that_no_teacher_scored_keep_the_plain_advantage(batch, name, options):
    advantages, student, teacher, mask = batch
    scored = torch.arange(len(advantages)) % 2 == 0
    teacher = teacher.masked_fill(~scored.unsqueeze(1), math.nan)
    if get_credit(name).contrast:
        options = {**options, "wrong_logps": student}
    credited = token_advantages(get_credit(name), advantages, student, teacher, mask, scored, **options)
    plain = advantages.unsqueeze(1).expand(mask.shape).masked_fill(mask == 0, 0.0)
    assert torch.equal(credited[~scored], plain[~scored].to(credited.dtype))


@given(batches(), st.sampled_from(["rlsd", "rlsd_contrast", "rlrt"]), knobs)
def test_multiplicative_credit_stays_within_the_clip_range(batch, name, options):
    advantages, _, _, mask = batch
    credited = token_advantages(get_credit(name), *batch, **options)
    factor = credited / advantages.unsqueeze(1)
    factor = factor[mask.bool() & (advantages != 0).unsqueeze(1)]
    lam, eps = options["lam"], options["clip_range"]
    assert (factor >= 1 - lam * eps - 1e-5).all()
    assert (factor <= 1 + lam * eps + 1e-5).all()


def gates(gains, contrasts=None):
    """Of `rlsd_gate`, with lambda 1, for a success and a failure with the same gains. By default the contrast is so
    large that the gain alone counts."""
    teacher = torch.tensor([gains] * 2, dtype=torch.float64)
    wrong = teacher - (50.0 if contrasts is None else torch.tensor([contrasts] * 2, dtype=torch.float64))
    verdicts, student = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.zeros_like(teacher)
    arguments = {**WHOLLY, "wrong_logps": wrong}
    praise, blame = run(get_credit("rlsd_gate"), verdicts, student, teacher, torch.ones_like(teacher), **arguments)
    return praise.tolist(), (-blame).tolist()


def test_the_gate_equals_the_formula_computed_by_hand():
    # beyond the dead zone of 1/4, T/S is 2, 1/2, 1, 1/4
    praise, blame = gates([LN2 + 0.25, -LN2 - 0.25, 0.2, -2 * LN2 - 0.25])
    assert praise == pytest.approx([1 / 2, 0, 0, 0])
    assert blame == pytest.approx([0, 1 / 2, 0, 3 / 4 * 1 / 2])
    praise, blame = gates([9.0, 9.0, LN2 + 0.25, -9.0], [LN2 + 0.25, 0.0, 9.0, 9.0])
    assert praise == pytest.approx([1 / 2, 0, 1 / 2, 0]), "of gain and contrast the smaller"
    assert blame[:3] == [0, 0, 0], "a contrast does not matter for blame"


def test_infinite_gains_support_and_reject_for_certain():
    student = torch.tensor([[-1.0, -math.inf, -1.0], [-1.0, -1.0, -1.0]])
    teacher = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -math.inf, -math.inf]])
    credited = run(
        get_credit("rlsd_gate"), torch.tensor([1.0, -1.0]), student, teacher, torch.ones(2, 3),
        wrong_logps=torch.full((2, 3), -math.inf).where(teacher.isfinite(), teacher), **WHOLLY,
    )  # fmt: skip
    torch.testing.assert_close(credited, torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]))


@given(batches(), knobs)
def test_a_gate_keeps_credit_between_its_even_share_and_the_advantage(batch, options):
    advantages, student, teacher, mask = batch
    counts = mask.bool() & (advantages != 0).unsqueeze(1)
    for wrong in (student, teacher, teacher.flip(0)):
        credited = run(get_credit("rlsd_gate"), *batch, wrong_logps=wrong, **options)
        factor = (credited / advantages.unsqueeze(1)).masked_fill(~counts, 0.0)
        assert (factor[counts] >= 1 - options["lam"] - 1e-5).all()
        assert (factor <= 1 + 1e-5).all()
    blame = run(get_credit("rlsd_gate"), *batch, wrong_logps=student, **WHOLLY)
    failed = advantages < 0
    assert (blame.abs().sum(1)[failed] <= advantages.abs()[failed] * (1 + 1e-4)).all(), "one token is blamed at most"


def test_what_is_outside_the_span_keeps_its_advantage_and_rejects_nothing():
    student, teacher = torch.zeros(1, 3), torch.tensor([[-5.0, -LN2 - 0.25, 0.0]])
    span, verdict = torch.tensor([[False, True, True]]), torch.tensor([-2.0])
    options = {**WHOLLY, "wrong_logps": student}
    credited = run(get_credit("rlsd_gate"), verdict, student, teacher, torch.ones(1, 3), span, **options)
    torch.testing.assert_close(credited, -2 * torch.tensor([[1.0, 0.5, 0.0]]))


@given(batches(), st.sampled_from(["rlsd", "rlsd_contrast"]), knobs)
def test_negative_only_leaves_the_right_completions_alone(batch, name, options):
    advantages, _, _, mask = batch
    credited = token_advantages(get_credit(name), *batch, **{**options, "negative_only": True})
    right = advantages > 0
    plain = advantages.unsqueeze(1).expand(mask.shape).masked_fill(mask == 0, 0.0)
    torch.testing.assert_close(credited[right], plain[right].to(credited.dtype), rtol=1e-6, atol=0)


def test_rlsd_equals_the_formula_computed_by_hand():
    # gains +0.1, -0.1, +1; A = 2: weights 1.10517, 0.90484, clipped 1.2; A = -2: 0.90484, 1.10517, clipped 0.8
    student = torch.tensor([[-1.0, -1.0, -2.0]] * 2)
    teacher = torch.tensor([[-0.9, -1.1, -1.0]] * 2)
    credited = token_advantages(
        get_credit("rlsd"), torch.tensor([2.0, -2.0]), student, teacher, torch.ones(2, 3), **KNOBS
    )
    expected = [[2.105171, 1.904837, 2.2], [-1.904837, -2.105171, -1.8]]
    torch.testing.assert_close(credited, torch.tensor(expected), rtol=1e-5, atol=0)


def test_opsd_is_the_gain_and_the_hybrid_adds_it():
    student, teacher = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.5, -1.0]])
    advantages, mask = torch.tensor([1.0]), torch.ones(1, 2)
    opsd = token_advantages(get_credit("opsd"), advantages, student, teacher, mask, **KNOBS)
    hybrid = token_advantages(get_credit("grpo_opsd"), advantages, student, teacher, mask, **KNOBS)
    assert opsd.tolist() == [[-0.5, 2.0]]
    assert hybrid.tolist() == [[0.75, 2.0]]


# one token with log S = -2, log T+ = -1, log T- = -1.5: gain 1, contrast 0.5
BY_HAND = {
    # A = 2                                                        A = -2
    "rlsd": (2 * (0.5 + 0.5 * 1.2), -2 * (0.5 + 0.5 * 0.8)),
    "rlsd_contrast": (2 * (0.5 + 0.5 * 1.2), -2 * (0.5 + 0.5 * 0.8)),
    "rlrt": (2 * (0.5 + 0.5 * 0.8), -2.0),
    "rlsd_gate": (2 * (0.5 + 0.5 * (1 - math.exp(-0.25))), -2 * 0.5),
    "rlcsd": (2 + 0.5 * math.tanh(25), -2 + 0.5 * math.tanh(25)),
    "contrast_additive": (2 + 0.5 * 0.2, -2 + 0.5 * 0.2),
    "antisd": (2 - 0.25 * (math.log(1 + math.e) - LN2), -2 - 0.25 * (math.log(1 + math.e) - LN2)),
    "sdar": (2 + 0.5 / (1 + math.exp(-5)), -2 + 0.5 / (1 + math.exp(-5))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_formula_equals_what_is_computed_by_hand(name):
    student, teacher, wrong = (torch.full((2, 1), value) for value in (-2.0, -1.0, -1.5))
    extra = {"wrong_logps": wrong} if get_credit(name).contrast else {}
    credited = run(get_credit(name), torch.tensor([2.0, -2.0]), student, teacher, torch.ones(2, 1), **KNOBS, **extra)
    assert credited.squeeze(1).tolist() == pytest.approx(BY_HAND[name], rel=1e-6)


@given(batches(), knobs)
def test_a_contrast_with_the_students_own_log_probs_is_one_sided(batch, options):
    advantages, student, teacher, mask = batch
    one_sided = run(get_credit("rlsd"), *batch, **options)
    assert torch.equal(run(get_credit("rlsd_contrast"), *batch, wrong_logps=student, **options), one_sided)


@given(batches(), st.sampled_from(CENTRED), knobs)
def test_two_references_that_say_the_same_give_grpo(batch, name, options):
    advantages, student, teacher, mask = batch
    credited = run(get_credit(name), *batch, wrong_logps=teacher, **options)
    plain = advantages.unsqueeze(1).expand(mask.shape).masked_fill(mask == 0, 0.0)
    torch.testing.assert_close(credited, plain.to(credited.dtype), rtol=1e-6, atol=1e-7)


def test_the_additive_contrast_teaches_a_group_in_which_all_failed():
    student, teacher, wrong = (torch.full((1, 1), value) for value in (-2.0, -1.0, -1.5))
    nothing = torch.zeros(1)
    for name in NAMES:
        extra = {"wrong_logps": wrong} if get_credit(name).contrast else {}
        credited = run(get_credit(name), nothing, student, teacher, torch.ones(1, 1), **KNOBS, **extra)
        assert (credited != 0).item() == (name not in KEEP_SIGN), name


@given(batches(), st.sampled_from(["rlsd", "rlsd_contrast", "rlcsd"]), knobs)
def test_mean_one_moves_credit_and_adds_none(batch, name, options):
    advantages, _, _, mask = batch
    credited = token_advantages(get_credit(name), *batch, **options)
    moved = mean_one(credited, advantages, mask)
    assert (moved * advantages.unsqueeze(1) >= 0).all()
    for row in range(len(advantages)):
        keep = mask[row].bool()
        if credited[row].abs().sum() > 0:
            assert moved[row][keep].mean().item() == pytest.approx(advantages[row].item(), rel=1e-4)
        else:
            assert torch.equal(moved[row], credited[row])


def test_the_token_that_is_not_finite_is_named_though_a_function_may_spoil_its_row():
    @register_credit("cumulated")
    def cumulated(advantages, student_logps, teacher_logps, mask, **knobs):
        return advantages.unsqueeze(1) * gain(student_logps, teacher_logps, mask).sum(1, keepdim=True).expand(2, 4)

    student, teacher = torch.full((2, 4), -1.0), torch.full((2, 4), -2.0)
    teacher[1, 2] = math.nan
    for name in ("rlsd", "cumulated"):
        with pytest.raises(ValueError, match=r"gave nan at row 1, token 2 .*teacher log-prob nan"):
            run(get_credit(name), torch.tensor([1.0, -1.0]), student, teacher, torch.ones(2, 4), **KNOBS)


def test_lambda_and_clip_range_may_differ_by_the_sign():
    student, teacher = torch.full((2, 1), -2.0), torch.full((2, 1), -1.0)
    lam, clip_range = torch.tensor([[0.5], [1.0]]), torch.tensor([[0.2], [0.4]])
    credited = run(
        get_credit("rlsd"), torch.tensor([2.0, -2.0]), student, teacher, torch.ones(2, 1), lam=lam,
        clip_range=clip_range, negative_only=False,
    )  # fmt: skip
    assert credited.squeeze(1).tolist() == pytest.approx([2.2, -1.2], rel=1e-6)


@given(batches())
def test_same_log_probs_mean_no_gain(batch):
    _, student, _, mask = batch
    assert torch.equal(gain(student, student, mask), torch.zeros(mask.shape, dtype=gain(student, student, mask).dtype))


@given(st.floats(0, 1), st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_lambda_stays_between_zero_and_its_peak(peak, warmup, decay, step):
    assert 0 <= lambda_at(step, peak=peak, warmup_steps=warmup, decay_steps=decay) <= peak


def test_lambda_follows_the_paper():
    paper = [lambda_at(s, peak=0.5, warmup_steps=0, decay_steps=50) for s in (0, 25, 50, 1000)]
    assert paper == [0.5, 0.25, 0.0, 0.0]
    warm = [lambda_at(s, peak=0.4, warmup_steps=4, decay_steps=2) for s in range(8)]
    assert warm == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.2, 0.0, 0.0])
    assert lambda_at(10**6, peak=0.5, warmup_steps=0, decay_steps=0) == 0.5


def test_a_users_function_is_found_by_name_and_cannot_take_a_name_twice():
    @register_credit("half_of_it", teacher_rows="none")
    def half(advantages, student_logps, teacher_logps, mask, **options):
        return 0.5 * advantages.unsqueeze(1).expand(student_logps.shape)

    ones = torch.ones(1, 2)
    assert token_advantages(get_credit("half_of_it"), torch.tensor([4.0]), ones, ones, ones).tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match="registered already"):
        register_credit("half_of_it")(half)
    with pytest.raises(ValueError, match="teacher_rows='some'"):
        register_credit("other", teacher_rows="some")
    with pytest.raises(ValueError, match="give keeps_sign and uses_lambda, too"):
        register_credit("other", evidence="gate", keeps_sign=True)
    with pytest.raises(ValueError, match=r"grpo, grpo_opsd, half_of_it"):
        get_credit("nonesuch")


def test_mistakes_of_a_users_function_are_named():
    ones = torch.ones(2, 3)
    wrong_shape = Credit("wrong", lambda a, s, t, m, **k: a, "all", False, False)
    with pytest.raises(ValueError, match=r"'wrong' returned \(2,\), not \(2, 3\)"):
        token_advantages(wrong_shape, torch.ones(2), ones, ones, ones)
    diverged = Credit("log", lambda a, s, t, m, **k: (s - 1).log(), "all", False, False)
    with pytest.raises(ValueError, match="row 0, token 0"):
        token_advantages(diverged, torch.ones(2), ones, ones, ones)
    turned = Credit("turned", lambda a, s, t, m, **k: -a.unsqueeze(1) * m, "all", True, False)
    with pytest.raises(ValueError, match=r"'turned' is registered with keeps_sign=True, but gave -1.0 at row 0"):
        token_advantages(turned, torch.ones(2), ones, ones, ones)
    with pytest.raises(ValueError, match="contrast=True needs a teacher"):
        register_credit("no_teacher", teacher_rows="none", contrast=True)
    with pytest.raises(ValueError, match="Expected advantages"):
        token_advantages(get_credit("rlsd"), torch.ones(2), ones, torch.ones(2, 4), ones, **KNOBS)
