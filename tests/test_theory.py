"""What the gain is, and what the credit functions do to a policy: exact on small categorical models, no sampling."""

import itertools

import pytest
import torch

from trl_rlsd.credit import get_credit, signed_weight, token_advantages
from trl_rlsd.credit.gain import DEAD_ZONE


def distributions(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).softmax(-1)


# ---------------------------------------------------------------------- 1. gains add up to a belief change

REFERENCES, VOCABULARY, LENGTH = 3, 4, 5


def teacher_table():
    """P_T(next token | reference, previous token); the row VOCABULARY stands for the beginning."""
    return distributions(REFERENCES, VOCABULARY + 1, VOCABULARY, seed=1)


def beliefs(table, prior, tokens):
    """P(reference | tokens so far), before each token and after the last."""
    belief, steps, previous = prior.clone(), [prior.clone()], VOCABULARY
    for token in tokens:
        belief = belief * table[:, previous, token]
        belief = belief / belief.sum()
        steps.append(belief)
        previous = token
    return steps


@pytest.mark.parametrize("tokens", list(itertools.product(range(VOCABULARY), repeat=2)))
def test_the_gains_of_the_mixture_telescope_to_the_belief_in_the_reference(tokens):
    """A student that is the mixture of the teacher over references: prod_t P_T / P_S = P(r | y) / P(r)."""
    tokens = (*tokens, 1, 3, 0)
    table, prior = teacher_table(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    steps, previous, total = beliefs(table, prior, tokens), VOCABULARY, torch.zeros(REFERENCES, dtype=torch.float64)
    other_total, calibration = total.clone(), 0.0
    other = distributions(LENGTH, VOCABULARY, seed=2)  # any other student
    for t, token in enumerate(tokens):
        mixture = (steps[t] * table[:, previous, token]).sum()
        total += table[:, previous, token].log() - mixture.log()
        other_total += table[:, previous, token].log() - other[t, token].log()
        calibration += (mixture / other[t, token]).log()
        previous = token
    expected = (steps[-1] / prior).log()
    assert (total - expected).abs().max() < 1e-12
    # the sum of gains is a gauge of miscalibration: it misses by sum_t log(mixture / student), whatever the reference
    assert (other_total - expected - calibration).abs().max() < 1e-12
    assert abs(calibration) > 1e-3


# ---------------------------------------------------------------------- 2. means over the student's own tokens


def test_the_means_of_weight_and_gain_are_known():
    student, teacher = distributions(50, seed=3), distributions(50, seed=4)
    gains = teacher.log() - student.log()
    weight, _ = signed_weight(gains.unsqueeze(1), torch.ones(50, dtype=torch.float64), 1e9)
    inverse, _ = signed_weight(gains.unsqueeze(1), -torch.ones(50, dtype=torch.float64), 1e9)
    kl = (student * (student / teacher).log()).sum()
    chi_squared = ((student - teacher) ** 2 / teacher).sum()
    assert (student * weight.squeeze(1)).sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (student * gains).sum().item() == pytest.approx(-kl.item(), abs=1e-12)
    assert (student * inverse.squeeze(1)).sum().item() == pytest.approx(1.0 + chi_squared.item(), abs=1e-12)


def test_clipping_shifts_the_balance_of_praise_and_blame():
    student = distributions(50, seed=5)
    teacher = (student.log() + 0.4 * torch.randn(50, generator=torch.Generator().manual_seed(6))).softmax(-1)
    gains = (teacher.log() - student.log()).unsqueeze(1)
    means = []
    for sign in (1.0, -1.0):
        weight, clipped = signed_weight(gains, torch.full((50,), sign, dtype=torch.float64), 0.2)
        means.append((student.unsqueeze(1) * clipped).sum().item())
        share = student[(weight != clipped).squeeze(1)].sum().item()
        assert 0.3 < share < 0.8
    assert means[0] < 1 - 1e-3 < 1 + 1e-3 < means[1], "less praise, more blame"


# ---------------------------------------------------------------------- 3. and 4. what a policy drifts to


def push(name, logits, teacher, wrong=None, *, lam=0.5, chance=0.5):
    """The exact expected gradient of the logits for a token on which the reward does not depend: a completion is right
    (A = 1) or wrong (A = -1) with even chances, whatever the token."""
    student = logits.softmax(-1)
    size = len(student)
    advantages = torch.cat([torch.ones(size), -torch.ones(size)]).double()
    extra = {} if wrong is None else {"wrong_logps": wrong.log().repeat(2).unsqueeze(1)}
    credited = token_advantages(
        get_credit(name),
        advantages,
        student.log().repeat(2).unsqueeze(1),
        teacher.log().repeat(2).unsqueeze(1),
        torch.ones(2 * size, 1),
        lam=lam,
        clip_range=0.2,
        negative_only=False,
        **extra,
    ).squeeze(1)
    mean = chance * credited[:size] + (1 - chance) * credited[size:]
    return student * (mean - (student * mean).sum())


def test_to_first_order_rlsd_is_grpo_plus_distillation_by_the_reverse_kl():
    """push = lam * |A| * -grad KL(S || T) + O(gain^2); GRPO pushes such a token nowhere."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    errors = []
    for size in (1e-2, 1e-3):
        teacher = (logits + size * noise).softmax(-1)
        own = logits.clone().requires_grad_()
        student = own.softmax(-1)
        (student * (student.log() - teacher.log())).sum().backward()
        distillation = -0.5 * own.grad
        errors.append((push("rlsd", logits, teacher) - distillation).norm().item() / distillation.norm().item())
    assert errors[0] < 1e-3
    assert errors[1] < errors[0] / 50, "the error is of a higher order (odd terms cancel between A and -A)"
    assert push("grpo", logits, logits.softmax(-1)).abs().max() < 1e-16


def drift(name, start, teacher, steps=400, rate=1.0, decay=0, **options):
    """The probability of the first token after so many steps."""
    logits = torch.tensor(start, dtype=torch.float64).log()
    teacher = torch.tensor(teacher, dtype=torch.float64)
    for step in range(steps):
        lam = 0.5 * max(1 - step / decay, 0) if decay else 0.5
        logits = logits + rate * push(name, logits, teacher, lam=lam, **options)
    return logits.softmax(-1)[0].item()


def test_a_style_that_the_teacher_prefers_is_learned_though_no_reward_asks_for_it():
    start, teacher = [0.41, 0.59], [0.6, 0.4]
    assert drift("grpo", start, teacher) == pytest.approx(0.41, abs=1e-12)
    constant, decayed = drift("rlsd", start, teacher), drift("rlsd", start, teacher, decay=50)
    assert constant == pytest.approx(0.6, abs=1e-3), "to where the teacher is, and no further"
    assert 0.42 < decayed < constant
    both_like_it = torch.tensor(teacher, dtype=torch.float64)
    assert drift("rlsd_contrast", start, teacher, wrong=both_like_it) == pytest.approx(0.41, abs=1e-12)


def test_a_teacher_that_follows_drags_the_style_to_the_end_unless_lambda_decays():
    """A live or synced teacher keeps its preference over the student, so there is nowhere to arrive."""
    ends = []
    for decay in (0, 50):
        logits = torch.tensor([0.41, 0.59], dtype=torch.float64).log()
        for step in range(400):
            teacher = (logits + torch.tensor([0.5, 0.0])).softmax(-1)
            lam = 0.5 * max(1 - step / decay, 0) if decay else 0.5
            logits = logits + 0.4 * push("rlsd", logits, teacher, lam=lam)
        ends.append(logits.softmax(-1)[0].item())
    assert ends[0] > 0.95
    assert 0.42 < ends[1] < 0.7


def test_a_rare_leak_stays_rare_under_rlsd_and_takes_over_under_distillation():
    """The clip bounds what a step can do to the log-odds by rate * lam * eps_w * P; the gain has no bound."""
    start, teacher = [7e-4, 1 - 7e-4], [0.99, 0.01]
    assert drift("grpo", start, teacher) == pytest.approx(7e-4, rel=1e-9)
    assert drift("opsd", start, teacher, rate=2.0) > 0.98
    assert drift("rlsd", start, teacher, rate=2.0) < 1e-3


def of_two_tokens(name, liked, wrongly_liked=None, fact=0.5, token=0.3, **knobs):
    """The exact mean and mean square of what pushes the first logit of two tokens, (2,) each. Completions are a fact,
    which alone decides the verdict, and a token of two values. The student has the fact right with `fact` and writes
    the token's first value with `token`; the teacher with 0.99 and `liked`, and after a wrong reference with 0.01 and
    `wrongly_liked`, by default the same: a style that any reference brings."""
    values = torch.tensor(list(itertools.product((1.0, 0.0), repeat=2)), dtype=torch.float64)  # 1: right, first value
    wrongly_liked = liked if wrongly_liked is None else wrongly_liked
    of_student = torch.tensor([fact, token], dtype=torch.float64)
    student, teacher, wrong = (
        torch.where(values == 1, p, 1 - p)
        for p in (of_student, torch.tensor([0.99, liked]).double(), torch.tensor([0.01, wrongly_liked]).double())
    )
    chance = student.prod(1)
    advantages = (values[:, 0] - fact) / (fact * (1 - fact)) ** 0.5
    knobs = {"lam": 0.9, "clip_range": 0.2, "negative_only": False, **knobs}
    if get_credit(name).contrast:
        knobs["wrong_logps"] = wrong.log()
    mask = torch.ones_like(student)
    credited = token_advantages(get_credit(name), advantages, student.log(), teacher.log(), mask, **knobs)
    pushes = credited * (values - of_student)
    return chance @ pushes, chance @ pushes**2


def growth(name, token, liked, wrongly_liked=None):
    """Of the log-odds of a token that no verdict depends on."""
    (_, pushed), _ = of_two_tokens(name, liked, wrongly_liked, token=token)
    return pushed.item() / (token * (1 - token))


def test_a_gate_takes_noise_off_what_the_verdict_does_not_depend_on_and_little_off_what_decides():
    (fact, idle), (_, noise) = of_two_tokens("grpo", liked=0.3)
    (gated_fact, gated_idle), (_, gated_noise) = of_two_tokens("rlsd_gate", liked=0.3)
    assert (idle.item(), gated_idle.item()) == pytest.approx((0, 0), abs=1e-12)
    assert 0.6 * fact < gated_fact < 0.8 * fact
    assert gated_noise == pytest.approx(0.01 * noise.item(), rel=1e-6)
    _, (_, rlsd_noise) = of_two_tokens("rlsd", liked=0.3, lam=1.0)
    assert rlsd_noise == pytest.approx(noise.item(), rel=1e-6), "where the teacher says nothing RLSD changes nothing"


def blame_of_failures(gains, name="rlsd_gate"):
    """With lambda 1, for rows of gains."""
    gains, knobs = torch.as_tensor(gains).double(), {"lam": 1.0, "clip_range": 0.2, "negative_only": False}
    failed, student = -torch.ones(len(gains)), torch.zeros_like(gains)
    if get_credit(name).contrast:
        knobs["wrong_logps"] = student
    return -token_advantages(get_credit(name), failed, student, gains, torch.ones_like(gains), **knobs)


def test_blame_is_the_first_rejections_and_what_follows_from_it_has_none():
    """The teacher, who knows better, dislikes the consequences of a mistake as well."""
    gains = [[0.0, -6.0, -6.0, -6.0]]
    (blame,) = blame_of_failures(gains)
    assert blame[1] > 0.99
    assert blame[[0, 2, 3]].max() < 0.01
    (rlsd,) = blame_of_failures(gains, "rlsd")
    assert rlsd[1:].tolist() == pytest.approx([1.2] * 3)


def test_the_first_rejection_is_that_of_speculative_decoding():
    """Counted over all ways in which a verifier can accept and reject the tokens."""
    accept = torch.tensor([0.9, 0.2, 0.6, 1.0], dtype=torch.float64)  # min(1, T/S)
    counted = torch.zeros(4, dtype=torch.float64)
    for accepted in itertools.product((True, False), repeat=4):
        if not all(accepted):
            counted[accepted.index(False)] += torch.where(torch.tensor(accepted), accept, 1 - accept).prod()
    torch.testing.assert_close(blame_of_failures((accept.log() - DEAD_ZONE).unsqueeze(0))[0], counted)


def test_small_differences_all_along_a_completion_take_no_blame_from_a_mistake_and_large_ones_do():
    noise = torch.randn(50, 2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for scatter, least, most in ((0.05, 0.99, 1.0), (0.15, 0.03, 0.1), (0.3, 0.0, 0.01)):
        gains = scatter * noise
        gains[:, 1000] -= 6.0
        assert least <= blame_of_failures(gains)[:, 1000].mean() <= most


def test_a_rare_leak_that_any_reference_provokes_is_not_praised_but_one_that_the_right_one_provokes_is():
    """Not to leak is blamed only where the teacher leaks in more than 1 - exp(-1/4) = 22 % of the cases."""
    for token, liked in ((7e-4, 0.2), (1e-3, 0.05), (0.01, 0.12)):
        assert growth("grpo", token, liked) == pytest.approx(0, abs=1e-9)
        assert growth("rlsd", token, liked) > 0.1
        assert growth("rlsd_gate", token, liked) == pytest.approx(0, abs=1e-9)
        assert growth("rlsd_gate", token, liked, wrongly_liked=token) > 0.3
    assert growth("rlsd_gate", 7e-4, 0.5) > 0.001


def test_a_gate_drifts_less_than_rlsd_to_a_style_that_any_reference_brings():
    for token, liked in ((0.3, 0.9), (0.3, 0.02), (0.41, 0.6)):
        side = 1 if liked > token else -1
        assert 0 <= growth("rlsd_gate", token, liked) * side < 0.1 * growth("rlsd", token, liked) * side
