"""The laws of the report on finished runs."""

import json
import math
import random
import struct
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.lab.report import COLOURS, STYLES, WIDTH, draw, steps_to_target, summarise, table


shares = st.floats(0, 1)
NEVER = [0.1] * 9


def curve(values, every=10, **others):
    """`others` are constants, or one value a measurement."""
    columns = {name: value if isinstance(value, list) else [value] * len(values) for name, value in others.items()}
    empty = dict(greedy=None, length=None, entropy=None, leak=None)
    return [
        {"step": every * i, "sampled": value, **empty, **{name: column[i] for name, column in columns.items()}}
        for i, value in enumerate(values)
    ]


def run(method, seed, values, *, steps=80, seconds=(), localisation=None, **others):
    return dict(
        method=method,
        seed=seed,
        steps=steps,
        curve=curve(values, **others),
        step_seconds=list(seconds),
        localisation=localisation,
    )


def ramp(steps):
    """Nine measurements that reach 0.5 at `steps` on a straight line."""
    return [min(1.0, 0.5 * 10 * i / steps) for i in range(9)]


def full_runs():
    """Three seeds of six methods with everything measured; `opsd` collapses, `contrast_additive` never gets there."""
    noise = random.Random(0)
    ends = dict(grpo=0.8, rlsd=0.85, rlsd_contrast=0.9, opsd=0.9, antisd=0.8, contrast_additive=0.4)
    runs = []
    for method, end in ends.items():
        for seed in (1, 2, 3):
            values = [0.2 + (end - 0.2) * min(1, i / 5) + noise.uniform(-0.03, 0.03) for i in range(9)]
            values[6:] = [0.1, 0.05, 0.0] if method == "opsd" else values[6:]
            place = dict(auc=None if method == "grpo" else 0.8 + seed / 100, share=0.04, uniform_share=0.03, rows=9)
            others = dict(greedy=values, length=41.0 + seed, entropy=0.3, leak=[i / 100 for i in range(9)])
            runs.append(run(method, seed, values, seconds=[0.7, 0.8, 2.0], localisation=place, **others))
    return runs


def summary(runs, method, target=0.5, baseline="base"):
    return next(one for one in summarise(runs, target, baseline) if one.method == method)


# ---------------------------------------------------------------------- steps to the target


@given(st.floats(0.01, 1), st.integers(1, 50))
def test_on_a_straight_line_the_crossing_is_exact(target, every):
    line = curve([i / 8 for i in range(9)], every=every)
    assert steps_to_target(line, target) == pytest.approx(target * 8 * every, abs=1e-9)


@pytest.mark.parametrize(
    "values, target, expected",
    [
        ([0.2, 0.69, 0.3, 0.699], 0.7, None),  # never there
        ([0.7, 0.7, 0.2], 0.7, 0),  # there from the start
        ([0.3, 0.8, 0.3, 0.3], 0.5, 4),  # overshoots by more than the next falls short
        ([0.3, 0.8, 0.1, 0.3], 0.5, None),  # one lucky measurement
        ([0.3, 0.8, 0.1, 0.3, 0.7, 0.7], 0.5, 35),  # a lucky one first
        ([0.3, 0.3, 0.8], 0.5, 14),  # the last one counts alone
        ([0.5], 0.5, 0),
        ([0.3, 0.5, 0.5], 0.5, 10),  # touching is reaching
        ([0.8, 0.1, 0.1], 0.5, None),  # luck before training, too
    ],
)
def test_crossings_computed_by_hand(values, target, expected):
    found = steps_to_target(curve(values), target)
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-9)


def test_there_from_the_first_measurement_is_its_step():
    assert steps_to_target(curve([0.1, 0.6, 0.6])[1:], 0.5) == 10


@given(st.lists(shares, min_size=1, max_size=9), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_target_is_never_reached_earlier(values, first, second):
    low, high = (steps_to_target(curve(values), target) for target in sorted((first, second)))
    assert high is None or (low is not None and low <= high + 1e-9)


# ---------------------------------------------------------------------- against the baseline


def test_the_same_runs_under_another_name_have_ratio_one_and_difference_zero():
    ends = {1: 21.0, 2: 37.0, 3: 64.0}
    runs = [run(method, seed, ramp(end), seconds=[1, 2]) for method in ("base", "same") for seed, end in ends.items()]
    for one in summarise(runs, 0.5, "base"):
        assert (one.ratio.value, one.ratio.interval, one.ratio.bound) == (1, (1, 1), "")
        assert (one.difference.value, one.difference.interval) == (0, (0, 0))
        assert one.greedy_difference is None, "greedy was not measured"
        assert one.seconds_ratio == 1


def test_what_a_seed_adds_to_both_methods_does_not_widen_the_difference():
    lucky = {1: 0.0, 2: 0.2, 3: 0.4, 4: 0.1}
    runs = [run("base", seed, [0.1 + luck] * 9) for seed, luck in lucky.items()]
    runs += [run("better", seed, [0.3 + luck] * 9) for seed, luck in lucky.items()]
    better = summary(runs, "better")
    assert better.difference.value == pytest.approx(0.2, abs=1e-9)
    assert better.difference.interval == pytest.approx((0.2, 0.2), abs=1e-9)
    low, high = better.sampled.interval
    assert high - low > 0.1


def test_what_a_seed_multiplies_for_both_methods_does_not_widen_the_ratio():
    slow = {1: 1.0, 2: 2.0, 3: 3.5}
    runs = [run("base", seed, ramp(20 * factor)) for seed, factor in slow.items()]
    runs += [run("fast", seed, ramp(10 * factor)) for seed, factor in slow.items()]
    fast = summary(runs, "fast")
    assert fast.ratio.value == pytest.approx(0.5, abs=1e-9)
    assert fast.ratio.interval == pytest.approx((0.5, 0.5), abs=1e-9)
    low, high = fast.steps.interval
    assert high - low > 5


def test_only_seeds_that_both_have_are_compared():
    runs = [run("base", seed, ramp(end)) for seed, end in ((1, 20), (2, 40), (7, 80))]
    runs += [run("other", seed, ramp(end)) for seed, end in ((2, 60), (1, 30), (9, 10))]
    other = summary(runs, "other")
    assert (other.pairs, other.seeds) == (2, 3)
    assert other.ratio.value == pytest.approx(1.5, abs=1e-9)
    assert other.steps.value == pytest.approx(100 / 3, abs=1e-9)
    strangers = [run("base", 1, ramp(20)), run("other", 2, ramp(20))]
    alone = summary(strangers, "other")
    assert (alone.pairs, alone.ratio, alone.difference) == (0, None, None)


def test_without_a_baseline_nothing_is_compared():
    runs = [run(method, 1, ramp(20), seconds=[1.0]) for method in ("a", "b")]
    for one in summarise(runs, 0.5, None):
        assert (one.ratio, one.difference, one.seconds_ratio, one.pairs) == (None, None, None, 0)
    assert "ratio" not in table(summarise(runs, 0.5, None), 0.5, None)


# ---------------------------------------------------------------------- runs that never got there


@pytest.mark.parametrize(
    "own, base, bound, value",
    [
        ((ramp(40), NEVER), (ramp(20), ramp(20)), ">=", 3.0),
        ((ramp(40), ramp(40)), (ramp(20), NEVER), "<=", 0.8),
        ((NEVER, NEVER), (ramp(20), ramp(20)), ">=", 4.0),
        ((ramp(20), ramp(20)), (NEVER, NEVER), "<=", 0.25),
    ],
)
def test_a_run_that_never_got_there_makes_a_bound_in_its_direction(own, base, bound, value):
    runs = [run("base", i, values) for i, values in enumerate(base)]
    runs += [run("own", i, values) for i, values in enumerate(own)]
    found = summary(runs, "own").ratio
    assert (found.bound, found.value) == (bound, pytest.approx(value, abs=1e-9))
    assert f"{bound}{value:.2f}" in table(summarise(runs, 0.5, "base"), 0.5, "base")


@pytest.mark.parametrize("together", [True, False])
def test_with_runs_of_both_sides_that_never_got_there_there_is_no_ratio(together):
    runs = [run("base", 1, NEVER), run("base", 2, ramp(20))]
    runs += [run("own", 1, NEVER if together else ramp(20)), run("own", 2, ramp(20) if together else NEVER)]
    assert all(one.ratio is None for one in summarise(runs, 0.5, "base"))


def test_a_mean_with_an_unfinished_run_is_a_lower_bound():
    one = summary([run("base", 1, ramp(20)), run("base", 2, NEVER), run("base", 3, ramp(20))], "base")
    assert (one.reached, one.seeds, one.steps.bound) == (2, 3, ">=")
    assert one.steps.value == pytest.approx(40, abs=1e-9)
    none = summary([run("base", seed, NEVER) for seed in (1, 2)], "base")
    assert (none.reached, none.steps.value, none.steps.bound, none.steps.interval) == (0, 80, ">=", None)
    text = table([one, none], 0.5, "base")
    assert ">=40 [" in text
    assert "|>=80|" in text.replace(" ", "")


# ---------------------------------------------------------------------- values and intervals


def test_one_seed_has_no_interval_and_two_have_themselves():
    one = summary([run("base", 1, [0.2] * 9, greedy=0.3)], "base", target=0.1)
    assert (one.sampled.interval, one.greedy.interval, one.steps.interval, one.difference.interval) == (None,) * 4
    two = summary([run("base", 1, [0.2] * 9), run("base", 2, [0.6] * 9)], "base")
    assert two.sampled.value == pytest.approx(0.4, abs=1e-9)
    assert two.sampled.interval == pytest.approx((0.2, 0.6), abs=1e-9)


@given(st.lists(shares, min_size=2, max_size=5))
def test_an_interval_lies_within_the_seeds_and_around_the_value(ends):
    found = summary([run("base", seed, [end] * 3) for seed, end in enumerate(ends)], "base").sampled
    low, high = found.interval
    assert min(ends) - 1e-9 <= low <= found.value + 1e-9
    assert found.value - 1e-9 <= high <= max(ends) + 1e-9


def test_neither_chance_nor_the_order_of_seeds_changes_a_number():
    runs = [run(m, seed, ramp(11 + seed * k % 67)) for k, m in ((29, "base"), (41, "own")) for seed in range(1, 8)]
    first = summarise(runs, 0.5, "base")
    assert summarise(runs, 0.5, "base") == first
    shuffled = [*runs[:7][::-1], *runs[7:][::-1]]
    assert summarise(shuffled, 0.5, "base") == first


def test_methods_keep_the_order_of_first_appearance():
    runs = [run(method, seed, ramp(20)) for seed in (1, 2) for method in ("z", "a", "m")]
    assert [one.method for one in summarise(runs, 0.5, "m")] == ["z", "a", "m"]


@pytest.mark.parametrize("measured, window", [(1, 1), (2, 1), (5, 1), (6, 2), (8, 2), (9, 3), (10, 3), (30, 3)])
def test_late_is_the_last_three_measurements_or_the_last_third(measured, window):
    values = [i / 100 for i in range(measured)]
    late = sum(values[-window:]) / window
    one = summary([run("base", 1, values, greedy=values, length=values, entropy=values, leak=values)], "base")
    found = [one.sampled.value, one.greedy.value, one.length, one.entropy, one.leak]
    assert found == pytest.approx([late] * 5, abs=1e-9)


def test_a_collapse_shows_between_the_peak_and_the_end():
    greedy = [[0.3, 0.8, 0.6, 0.1, 0.1, 0.1], [0.3, 0.6, 0.6, 0.1, 0.1, 0.1]]
    runs = [run("base", seed, NEVER[:6], greedy=values) for seed, values in enumerate(greedy)]
    one = summary(runs, "base")
    assert one.peak_greedy == pytest.approx(0.7, abs=1e-9)  # of the mean curve, not of a seed
    assert one.greedy.value == pytest.approx(0.1, abs=1e-9)


def test_leak_seconds_and_localisation_computed_by_hand():
    place = [dict(auc=None, share=0.1, uniform_share=0.2), dict(auc=0.9, share=0.3, uniform_share=0.2), None]
    leak = [[0, 0.5, 0], [0, 0.1, 0.02], [0, 0, 0.04]]
    runs = [
        run("own", i, NEVER[:3], seconds=[1, 9, 2][: i + 1], localisation=place[i], leak=leak[i]) for i in range(3)
    ]
    one = summary([*runs, run("base", 1, NEVER[:3], seconds=[2, 2, 8])], "own")
    assert (one.auc, one.share, one.uniform_share) == (0.9, pytest.approx(0.2, abs=1e-9), 0.2)
    assert (one.leak, one.highest_leak) == (pytest.approx(0.02, abs=1e-9), 0.5)
    assert (one.seconds, one.seconds_ratio) == (1.5, 0.75)  # the median of 1, 1, 9, 1, 9, 2


# ---------------------------------------------------------------------- the table


def test_the_table_is_aligned_and_narrow():
    text = table(summarise(full_runs(), 0.7, "grpo"), 0.7, "grpo")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 8
    assert len({tuple(i for i, letter in enumerate(row) if letter == "|") for row in rows}) == 1
    assert max(map(len, text.splitlines())) <= 150


def test_a_column_without_any_value_is_left_out():
    bare = table(summarise([run("base", 1, ramp(20))], 0.5, None), 0.5, None)
    header = [name.strip() for name in bare.splitlines()[0].strip("|").split("|")]
    assert header == ["method", "seeds", "steps to 50", "sampled"]
    mixed = [run("base", 1, ramp(20)), run("own", 1, ramp(20), leak=0.0)]
    header, _, base, own = table(summarise(mixed, 0.5, None), 0.5, None).splitlines()[:4]
    assert [row.split("|")[-2].strip() for row in (header, base, own)] == ["max", "-", "0.0"]


def test_the_foot_tells_the_number_of_seeds():
    runs = [run("a", 1, ramp(20)), run("b", 1, ramp(20)), run("b", 2, NEVER), run("c", 1, NEVER)]
    assert "n = 1 or 2 seeds" in table(summarise(runs, 0.5, None), 0.5, None)


def test_accuracies_are_printed_in_percent_and_differences_with_their_sign():
    runs = [run("base", 1, [0.3] * 9, greedy=0.25), run("own", 1, [0.5] * 9, greedy=0.5)]
    rows = table(summarise(runs, 0.9, "base"), 0.9, "base").splitlines()
    cells = [
        dict(zip(*(map(str.strip, row.split("|")) for row in (rows[0], line)), strict=True)) for line in rows[2:4]
    ]
    assert [(row["sampled"], row["diff"], row["greedy"]) for row in cells] == [("30", "+0", "25"), ("50", "+20", "50")]


@given(st.data())
def test_nan_reaches_neither_table_nor_json(data):
    maybe = st.one_of(st.none(), st.just(math.nan), shares)
    column = st.lists(maybe, min_size=4, max_size=4)
    runs = []
    for method in ("base", "own"):
        for seed in range(data.draw(st.integers(1, 3))):
            others = {name: data.draw(column) for name in ("greedy", "length", "entropy", "leak")}
            place = st.fixed_dictionaries(dict.fromkeys(("auc", "share", "uniform_share"), maybe))
            values = data.draw(st.lists(shares, min_size=4, max_size=4))
            seconds = data.draw(st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=2))
            runs.append(run(method, seed, values, seconds=seconds, localisation=data.draw(place), **others))
    summaries = summarise(runs, data.draw(st.floats(0.01, 1)), "base")
    json.dumps([asdict(one) for one in summaries], allow_nan=False)
    text = table(summaries, 0.5, "base")
    assert not any(word in text for word in ("nan", "inf", "None"))


def test_a_baseline_that_began_at_the_target_is_no_divisor():
    there = [0.9] * 9
    runs = [run("base", seed, there) for seed in (1, 2)] + [run("own", seed, ramp(20)) for seed in (1, 2)]
    assert summary(runs, "own").ratio is None
    half = [run("base", 1, there), run("base", 2, ramp(20)), *runs[2:]]
    found = summary(half, "own").ratio
    assert (found.value, found.interval) == (pytest.approx(2, abs=1e-9), None)


# ---------------------------------------------------------------------- the picture


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws, and returns the figure."""
    from matplotlib import pyplot

    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: None)

    def drawn(runs, target=0.7):
        draw(runs, summarise(runs, target, None), target, tmp_path / "report.png", "title")
        return pyplot.gcf()

    yield drawn
    close("all")


def test_the_picture_is_a_png_of_the_told_width(tmp_path):
    runs, path = full_runs(), tmp_path / "report.png"
    draw(runs, summarise(runs, 0.7, "grpo"), 0.7, path, "title")
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", head[16:20])[0] == WIDTH


def test_a_method_looks_alike_in_every_panel_and_unlike_the_others(figure):
    panels = figure(full_runs()).axes
    looks = [
        {line.get_label(): (line.get_color(), line._dash_pattern) for line in axes.lines if len(line.get_xdata()) > 2}
        for axes in panels[:3]
    ]
    methods = [text.get_text() for text in panels[3].texts]
    assert len(methods) == 6
    for panel in looks:
        assert {method: panel.get(method) for method in methods} == {method: looks[0][method] for method in methods}
    dots = [(line.get_color(), line._dash_pattern) for line in panels[3].lines[::2]]
    assert dots == [looks[0][method] for method in methods]
    assert len({color for color, _ in dots}) == 6
    assert len({str(pattern) for _, pattern in dots}) == len(STYLES)
    assert len({(i % len(COLOURS), i % len(STYLES)) for i in range(35)}) == 35


def test_a_band_spans_the_seeds_around_their_mean(figure):
    panel = figure([run("a", 1, [0.2, 0.4]), run("a", 2, [0.4, 0.8])]).axes[0]
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([0.3, 0.6], abs=1e-9)
    band = panel.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.2, 0.8)


def test_bounds_are_hollow(figure):
    runs = full_runs()
    panel = figure(runs).axes[3]
    hollow = [line.get_markerfacecolor() == "white" for line in panel.lines[1::2]]
    assert hollow == [bool(one.steps.bound) for one in summarise(runs, 0.7, None)]
    assert any(hollow)
    assert not all(hollow)


@pytest.mark.parametrize(
    "others, label", [(dict(leak=0.0, length=9.0), "leak"), (dict(length=9.0), "length"), ({}, "")]
)
def test_length_is_drawn_where_no_leak_was_measured(figure, others, label):
    panel = figure([run("a", 1, [0.5], **others)]).axes[2]
    assert label in panel.get_ylabel()
    assert [len(line.get_xdata()) for line in panel.lines] == [1 if others else 0]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "runs, target, baseline, told",
    [
        ([], 0.5, None, "no runs.*pass at least one"),
        ([run("a", 3, NEVER), run("b", 3, NEVER), run("a", 3, NEVER)], 0.5, None, "'a', seed 3 is there twice"),
        ([run("a", 1, [])], 0.5, None, "'a', seed 1 has no measurements"),
        ([run("a", 1, NEVER)], 0.0, None, r"target must lie in \(0, 1\], got 0.0"),
        ([run("a", 1, NEVER)], 70, None, r"target must lie in \(0, 1\], got 70"),
        ([run("a", 1, NEVER)], math.nan, None, "got nan"),
        ([run("a", 1, NEVER), run("a", 2, NEVER[:7])], 0.5, None, r"seed 2 and seed 1 .*\[70, 80\]; measure all"),
        ([run("a", 1, [0.1, math.nan])], 0.5, None, "'a', seed 1 has sampled=nan at step 10"),
        ([run("a", 1, [0.1, None])], 0.5, None, "sampled=None at step 10"),
        ([run("a", 1, [0.1, 71.0])], 0.5, None, "sampled=71.0 at step 10"),
        ([run("a", 1, NEVER[:3], every=-10)], 0.5, None, r"do not ascend, \[0, -10, -20\]"),
        ([run("a", 1, NEVER)], 0.5, "grpo", r"'grpo' has no runs; pass one of \['a'\]"),
    ],
)
def test_bad_input_is_named_with_its_fix(runs, target, baseline, told):
    with pytest.raises(ValueError, match=told):
        summarise(runs, target, baseline)


@pytest.mark.parametrize("values, target", [([], 0.5), (NEVER, 1.1), (NEVER, -0.1), ([2.0], 0.5)])
def test_a_crossing_is_not_sought_in_bad_input(values, target):
    with pytest.raises(ValueError):
        steps_to_target(curve(values), target)


def test_greedy_differences_are_paired_too():
    runs = [run("a", seed, [0.1 * seed] * 9, greedy=0.1 * seed) for seed in (1, 2, 3)]
    runs += [run("b", seed, [0.1 * seed] * 9, greedy=0.1 * seed + 0.25) for seed in (1, 2, 3)]
    _, b = summarise(runs, 0.9, "a")
    assert b.greedy_difference.value == pytest.approx(0.25, abs=1e-9)
    assert b.greedy_difference.interval == pytest.approx((0.25, 0.25), abs=1e-9)
