"""The run report: what runs logged is on the page, nothing that they wrote acts on it, and it opens in a browser."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import dataset, trainer

from trl_rlsd.report.curves import DASHES, SECTIONS, running_mean, teacher_share, thinned
from trl_rlsd.report.logs import Run, load_runs
from trl_rlsd.report.run import MAX_PICTURE, run_report


HOSTILE = '"><img src=x onerror=alert(1)>'


def write_run(folder: Path, logs: list[dict], tail: str = "", **record) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs) + tail)
    if record:
        (folder / "rlsd_run.json").write_text(json.dumps({"format": 1, **record}))
    return folder


def rewards(*values, **others) -> list[dict]:
    return [{"step": step, "time": 60.0 * step, "reward": value, **others} for step, value in enumerate(values, 1)]


class Page(HTMLParser):
    """A report read back: its figures, its texts, and its elements with their attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        if dict(attributes).get("id") == "figures":
            self.figures = None

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and getattr(self, "figures", []) is None:
            self.figures = json.loads(data)
        elif self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def traces(self) -> list[dict]:
        return [trace for figure in self.figures for trace in figure["data"]]

    def has(self, steps, values) -> bool:
        return any(
            trace["x"] == list(steps) and trace["y"] == pytest.approx(list(values), rel=1e-5) for trace in self.traces
        )


def report(tmp_path, *folders, **options) -> Page:
    return Page(run_report(folders, tmp_path / "page" / "report.html", **options))


def metric_names() -> list[str]:
    """Every metric that a plot reads."""
    names: list[str] = []

    class Recorder(Run):
        def points(self, *metrics):
            names.extend(metrics)
            return []

    for plots in SECTIONS.values():
        for plot in plots:
            for curve in plot.curves.values():
                curve(Recorder("", [], [], "", 0, {}, None), "")
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------- data in = data on the page


def test_every_number_that_was_logged_is_on_the_page(tmp_path):
    draw = random.Random(0)
    names = [*metric_names(), "rewards/math/mean", "rewards/format/mean", "a metric of one's own"]
    logs = [{"step": step} | {name: draw.uniform(1, 2) for name in names} for step in range(1, 31)]
    evaluations = [{"step": step, "eval_reward": draw.random(), "eval_entropy": draw.random()} for step in (0, 15, 30)]
    page = report(tmp_path, write_run(tmp_path / "run", evaluations[:1] + logs + evaluations[1:]))
    for name in names:
        assert page.has(range(1, 31), [log[name] for log in logs]), name
    assert page.has(range(1, 31), [log["rlsd/clip_low"] + log["rlsd/clip_high"] for log in logs])
    for name in ("eval_reward", "eval_entropy"):
        assert page.has((0, 15, 30), [log[name] for log in evaluations]), name


def test_a_plot_without_data_is_left_out(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run", rewards(0.1, 0.2)))
    assert len(page.figures) == 1
    assert "Lambda" not in page.text
    assert "Entropy" not in page.text


def test_no_plot_has_more_curves_than_there_are_dashes():
    assert max(len(plot.curves) for plots in SECTIONS.values() for plot in plots) <= len(DASHES)


def test_runs_differ_in_colour_and_in_symbol(tmp_path):
    page = report(tmp_path, *(write_run(tmp_path / f"run{i}", rewards(0.1, 0.2)) for i in range(5)))
    looks = {trace["legendgroup"]: trace["marker"] for trace in page.traces if "marker" in trace}
    assert len({look["color"] for look in looks.values()}) == len({look["symbol"] for look in looks.values()}) == 5


def test_the_axis_of_a_constant_holds_it(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run", [{"step": step, "learning_rate": 5e-4} for step in (1, 2)]))
    assert page.figures[0]["layout"]["yaxis"]["range"] == pytest.approx([0, 7.5e-4], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_running_mean_is_of_the_last_steps_and_of_nothing_later(steps):
    points = [(step, float(step**2 % 17)) for step in (1, 2, 4, 5, 9, 10, 11, 30)]
    for (at, mean), (step, _) in zip(running_mean(points, steps), points, strict=True):
        own = [value for other, value in points if step - steps < other <= step]
        assert at == step
        assert mean == pytest.approx(sum(own) / len(own), abs=1e-9)


@pytest.mark.parametrize("count", [1000, 1001, 5000, 12_345])
def test_thinning_keeps_peaks_and_ends_and_makes_nothing_up(count):
    draw = random.Random(count)
    points = [(step, draw.random()) for step in range(count)]
    kept = thinned(points)
    assert len(kept) <= 1000
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert {points[0], points[-1], *(pick(points, key=lambda one: one[1]) for pick in (min, max))} <= set(kept)


@pytest.mark.parametrize(
    "accumulated, per_generation, iterations, every",
    [(1, 1, 1, 1), (2, 2, 1, 1), (2, 8, 1, 1), (4, 2, 1, 1), (2, 2, 3, 1), (2, 8, 1, 4), (1, 4, 1, 2), (4, 4, 2, 6)],
)
def test_the_teachers_share_is_that_of_the_clock(accumulated, per_generation, iterations, every):
    """A trainer in which a micro-batch takes 1 s, generation 2 s and the teacher 0.5 s; then idle from step 24 on."""
    batch, logs, seconds, taught = per_generation * iterations, [], 0.0, []
    for micro in range(48 * accumulated):
        step, teaches = micro // accumulated + 1, micro < 24 * accumulated
        if micro % batch == 0:
            seconds += 2.0 + 0.5 * teaches
            taught += [0.5] * teaches
        seconds += 1.0
        if (micro + 1) % (accumulated * every) == 0:
            log = {"step": step, "step_time": seconds / every}
            logs.append(log | ({"rlsd/teacher_seconds": sum(taught) / len(taught)} if taught else {}))
            seconds, taught = 0.0, []
    names = ("gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    settings = dict(zip(names, (accumulated, per_generation, iterations), strict=True))
    shares = teacher_share(Run("", logs, [], "", 0, {"settings": settings}, None))
    broken_off = teacher_share(
        Run("", [log for log in logs if log["step"] < 24], [], "", 0, {"settings": settings}, None)
    )
    expected = 0.5 / (2.5 + batch)
    assert [share for step, share in shares if step <= 24] == pytest.approx([expected] * (len(shares) // 2), rel=1e-6)
    assert broken_off == shares[: len(broken_off)]
    assert [share for step, share in shares if step > 24] == [0] * (len(shares) // 2)


def test_a_real_run_generates_where_the_teachers_share_says(tmp_path):
    """TRL's clock and its batches are as `teacher_share` has them: one batch in four micro-batches, two steps."""
    options = dict(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4, eval_strategy="steps")
    run = trainer(tmp_path / "run", data=dataset(32), eval_dataset=dataset(4), eval_steps=4, **options)
    run.train()
    run.save_state()
    (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
    (read,) = load_runs([tmp_path / "run"])
    assert read.source == "trainer_state.json"
    assert [step for step, _ in read.points("step_time")] == [1, 2, 3, 4]
    seconds = dict(read.points("rlsd/teacher_seconds"))
    assert list(seconds) == [1, 3]
    read.record["settings"] = {name: options[name] for name in ("gradient_accumulation_steps", "steps_per_generation")}
    shares, times = dict(teacher_share(read)), dict(read.points("step_time"))
    assert shares == pytest.approx(
        {step: seconds[step] / (times[step] + times[step + 1]) for step in (1, 3)}, rel=1e-6
    )
    page = report(tmp_path, tmp_path / "run")
    for metric in ("reward", "entropy", "rlsd/lambda", "eval_reward", "grad_norm"):
        points = read.points(metric)
        assert points
        assert page.has(*zip(*points, strict=True)), metric


# ---------------------------------------------------------------------- words


def test_evaluations_are_told_before_and_after_with_their_number(tmp_path):
    logs = [{"step": 0, "eval_reward": 0.25}, *rewards(0.3, 0.4), {"step": 2, "eval_reward": 0.75}]
    page = report(tmp_path, write_run(tmp_path / "run", logs, eval_completions=256))
    assert "0.25 (step 0) → 0.75 (step 2), of 256 completions each" in page.text


def evaluated(step, reward, dataset=None, rows=4, even=True, **others) -> dict:
    about = {"eval_dataset": dataset, "eval_rows": rows, "eval_completions": 4 * rows, "eval_even": even}
    return {"step": step, "eval_reward": reward, **about, **others}


def test_several_evaluation_datasets_are_told_and_drawn_apart(tmp_path):
    logs = [evaluated(step, own + step, name, rows, **{f"eval_{name}_loss": own, f"eval_{name}_runtime": 1.0})
            for step in (0, 2) for name, rows, own in (("easy", 4, 0.5), (HOSTILE, 8, 0.25))]  # fmt: skip
    page = report(tmp_path, write_run(tmp_path / "run", logs))
    assert f"easy: 0.5 (step 0) → 2.5 (step 2), of 16 completions each; {HOSTILE}: 0.25" in page.text
    assert "0.25 (step 0) → 2.25 (step 2), of 32 completions each" in page.text
    assert page.has((0, 2), (0.5, 2.5))
    assert page.has((0, 2), (0.25, 2.25))
    assert len(page.figures) == 2  # reward and loss; what a log says of its evaluation is no curve
    reward = page.figures[0]["data"]
    assert reward[0]["name"] == "run, evaluation easy"
    assert len({trace["line"]["dash"] for trace in reward}) == len(reward) == 2


@pytest.mark.parametrize("other", [{"dataset": "other"}, {"rows": 8}])
def test_evaluations_of_different_rows_are_not_compared(tmp_path, other):
    page = report(tmp_path, write_run(tmp_path / "run", [evaluated(0, 0.25), evaluated(2, 0.75, **other)]))
    assert "→" not in page.text
    assert "16 completions, 4 rows" not in page.text
    assert "4 rows, 16 completions: 0.25 (step 0), of 16 completions each; " in page.text
    assert "0.75 (step 2), of" in page.text


def test_datasets_are_told_apart_by_the_measures_of_transformers_too(tmp_path):
    logs = [{"step": step, "eval_reward": own, f"eval_{name}_runtime": 1.0, f"eval_{name}_loss": 0.0}
            for step in (1, 2) for name, own in (("easy", 0.5), ("hard", 0.25))]  # fmt: skip
    (tmp_path / "run").mkdir()
    state = {"global_step": 2, "log_history": logs}
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    (run,) = load_runs([tmp_path / "run"])
    rewards = {name: own.points("eval_reward") for name, own in run.evaluations.items()}
    assert rewards == {"easy": [(1, 0.5), (2, 0.5)], "hard": [(1, 0.25), (2, 0.25)]}
    assert run.points("eval_loss") == [(1, 0.0), (1, 0.0), (2, 0.0), (2, 0.0)]


def test_means_of_uneven_batches_are_told_and_the_share_of_right_is_exact(tmp_path):
    logs = [evaluated(step, 0.5, even=False, **{"eval_rlsd/right": 0.25}) for step in (0, 2)]
    text = report(tmp_path, write_run(tmp_path / "run", logs)).text
    assert "0.5 (step 2), of 16 completions each, as means of batches, the last of which was smaller" in text
    assert text.count("means of batches") == 1


def test_the_summary_has_no_lucky_first_log_as_its_best(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run", rewards(9, 1, 1, 1, 2, 2, 2, 2)), smooth=4)
    assert "Best running mean 3 (step 4)" in page.text
    assert "Reward, running mean at the end 2" in page.text


def test_settings_that_differ_are_told_apart_from_those_that_do_not(tmp_path):
    both = dict(base_model="Qwen/Qwen3-1.7B", finished=True, rewards=[{"name": "math", "weight": 0.5}])
    peft = {"peft_type": "LORA", "r": 16}
    first = write_run(tmp_path / "a", rewards(1), settings={"beta": 0.0, "seed": 1}, peft=peft, **both)
    second = write_run(tmp_path / "b", rewards(1), settings={"beta": 0.1, "seed": 1}, peft={**peft, "r": 32}, **both)
    differing, same = report(tmp_path, first, second).text.split("Settings that differ")[1].split("Settings that all")
    assert "beta 0.0 0.1" in differing
    assert "peft.r 16 32" in differing
    assert "seed" not in differing
    assert "seed 1 1" in same
    assert "rewards 0.5 × math 0.5 × math" in same


def test_alarms_are_marked_on_every_plot_and_listed_with_their_advice(tmp_path):
    logs = [*rewards(1, 2, entropy=1.0), {"step": 2, "time": 1.0, "alarm": "leakage", "advice": "lower rlsd_lambda"}]
    page = report(tmp_path, write_run(tmp_path / "run", logs))
    assert "run 2 leakage lower rlsd_lambda" in page.text
    for figure in page.figures:
        assert [trace["x"] for trace in figure["data"] if trace.get("text") == ["leakage"]] == [[2]]


def test_each_plot_is_told_in_words_and_numbers(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "run", rewards(0.5, -1.25, 2.0, 1.0)))
    (place,) = [attributes for _, attributes in page.elements if "data-figure" in attributes]
    assert place["aria-label"] == "Reward over optimizer steps. run from 0.5 to 1."
    assert "run 4 0.5 at 1 -1.25 at 2 2 at 3 1 at 4" in page.text


def test_names_are_the_folders_own_as_far_as_they_are_unique(tmp_path):
    folders = [write_run(tmp_path / name, rewards(1)) for name in ("a/out", "b/out", "grpo")]
    assert [run.name for run in load_runs(folders)] == ["a/out", "b/out", "grpo"]


# ---------------------------------------------------------------------- what runs leave when they break off


def test_null_nan_and_torn_lines_do_not_break_a_curve(tmp_path):
    logs = rewards(0.1, None, math.nan, math.inf, 0.5)
    page = report(tmp_path, write_run(tmp_path / "run", logs, tail='{"step": 6, "rew'))
    assert page.has((1, 5), (0.1, 0.5))
    assert "run: a line that cannot be read was passed over in metrics.jsonl" in page.text


@pytest.mark.parametrize("record", [
    {"settings": [1]}, {"finished": [1]}, {"settings": {"gradient_accumulation_steps": 0.5}}, {"dataset": "x"},
    {"settings": {"gradient_accumulation_steps": 1e308, "steps_per_generation": -1}},
    {"settings": {"max_steps": 10**400}, "eval_completions": 10**400}, {"processes": "x", "device": [1]},
])  # fmt: skip
def test_a_malformed_record_does_not_break_the_report(tmp_path, record):
    logs = rewards(0.1, 0.2, **{"step_time": 1.0, "rlsd/teacher_seconds": 0.1})
    logs += [{"step": 2, "eval_reward": 1.0}]
    assert report(tmp_path, write_run(tmp_path / "run", logs, **record)).has((1, 2), (0.1, 0.2))


def test_numbers_beyond_floats_are_no_points(tmp_path):
    logs = [*rewards(0.1, 10**400, 0.5), {"step": 10**400, "reward": 1.0}]
    page = report(tmp_path, write_run(tmp_path / "run", logs))
    assert page.has((1, 3), (0.1, 0.5))
    assert "a line that cannot be read" in page.text


def test_without_metrics_the_newest_trainer_state_is_read(tmp_path):
    for steps in (9, 10, 8):
        folder = tmp_path / "run" / f"checkpoint-{steps}"
        folder.mkdir(parents=True)
        state = {"global_step": steps, "log_history": [{"step": steps, "loss": float(steps)}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "trainer_state.json").write_text('{"global_step": 11, "log_')
    page = report(tmp_path, tmp_path / "run")
    assert page.has([10], [10.0])
    assert "run: no metrics.jsonl; drawn from checkpoint-10/trainer_state.json" in page.text


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "time": 5.0, "alarm": "leakage", "advice": "-"}\n'])
def test_a_folder_without_logs_is_told_what_was_looked_for(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"holds no logs.*metrics\.jsonl.*checkpoint-\*/trainer_state\.json"):
        run_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_no_folder_a_missing_one_and_one_given_twice_are_refused(tmp_path):
    run = write_run(tmp_path / "run", rewards(1))
    for folders, message in (([], "no runs"), ([tmp_path / "x"], "is no folder"), ([run, run], "given twice")):
        with pytest.raises(ValueError, match=message):
            run_report(folders, tmp_path / "report.html")
    with pytest.raises(ValueError, match="smooth=0"):
        run_report([run], tmp_path / "report.html", smooth=0)


def test_the_newest_credit_pictures_are_shown_unless_they_are_too_large(tmp_path):
    run = write_run(tmp_path / "run", rewards(1))
    (run / "completions").mkdir()
    for step in (90, 100, 20):
        (run / "completions" / f"credit_{step:05d}.html").write_text(f"<p>pictures of step {step}</p>")
    frames = [attributes for tag, attributes in report(tmp_path, run).elements if tag == "iframe"]
    assert [frame["srcdoc"] for frame in frames] == ["<p>pictures of step 100</p>"]
    assert frames[0]["sandbox"] == "allow-scripts"
    (run / "completions" / "credit_00100.html").write_text("x" * (MAX_PICTURE + 1))
    page = report(tmp_path, run)
    assert "iframe" not in dict(page.elements)
    assert "credit_00100.html is too large" in page.text


@pytest.mark.slow
def test_three_runs_of_5000_steps_make_a_page_of_less_than_12_mb(tmp_path):
    draw, names = random.Random(0), metric_names()
    for i in range(3):
        logs = [{"step": step} | {name: draw.random() for name in names} for step in range(1, 5001)]
        write_run(tmp_path / f"run{i}", logs)
    path = run_report([tmp_path / f"run{i}" for i in range(3)], tmp_path / "report.html")
    assert path.stat().st_size < 12e6
    assert max(len(trace["x"]) for trace in Page(path).traces) <= 1000
    assert "thinned out" in Page(path).text


# ---------------------------------------------------------------------- whatever the runs wrote is inert


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report of two runs that try to act on it by every name and text that is theirs."""
    folder = tmp_path_factory.mktemp("hostile")
    script = "</script><script>alert(1)</script>"
    names = {"entropy": 1.0, script: 2.0, "<img src=x onerror=alert(1)>": 3.0, f"rewards/{script}/mean": 1.0}
    logs = rewards(0.25, 0.5, 0.75, **names, **{"rewards/b/mean": 1.0, "%{x}<a href='javascript:alert(1)'>": 4.0})
    logs += [{"step": 2, "time": 1.0, "alarm": HOSTILE, "advice": HOSTILE}]
    record = dict(settings={script: HOSTILE}, device=HOSTILE, rewards=[{"name": script, "weight": 1}], finished=False)
    runs = [write_run(folder / '<img src=x onerror="alert(1)">', logs, **record)]
    runs += [write_run(folder / "second", rewards(0.1, 0.2, 0.3))]
    (runs[0] / "completions").mkdir()
    picture = "<p id=p>before</p><script>document.getElementById('p').textContent = 'ran'; parent.alert(1)</script>"
    (runs[0] / "completions" / "credit_00002.html").write_text(picture)
    return run_report(runs, folder / "report.html")


def test_the_page_has_no_element_of_the_runs(hostile):
    page = Page(hostile)
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert {"img", "a", "base", "object", "embed"}.isdisjoint(tag for tag, _ in page.elements)
    assert page.text.count(HOSTILE) == 4  # the device, a setting, an alarm and its advice, as text
    assert all("<" not in trace.get("name", "") + "".join(trace.get("text", ())) for trace in page.traces)


@pytest.fixture(scope="module")
def opened(chromium, hostile):
    """The hostile report on a narrow, dark screen without a network, and what happened while it opened."""
    context = chromium.new_context(viewport={"width": 400, "height": 800}, color_scheme="dark", offline=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.happened = []
    page.on("console", lambda message: page.happened.append(message.text))
    page.on("pageerror", lambda error: page.happened.append(str(error)))
    page.on("dialog", lambda dialog: (page.happened.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.happened.append(request.url))
    page.goto(hostile.as_uri())
    page.locator("#s1").scroll_into_view_if_needed()
    page.locator("[data-figure='0'] .main-svg").first.wait_for()
    yield page
    context.close()


def test_it_opens_without_a_request_an_error_or_a_dialog(opened, hostile):
    opened.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    for place in opened.locator("[data-figure]").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for()
    opened.locator("iframe").scroll_into_view_if_needed()
    # its own script ran, under this page's policy, and did not reach this page
    opened.frame_locator("iframe").get_by_text("ran", exact=True).wait_for()
    reached = [text for text in opened.happened if text != hostile.as_uri()]
    assert len(reached) == 1, reached
    assert "sandbox" in reached[0] or "cross-origin" in reached[0]
    assert opened.locator("img").count() == 0


def test_no_button_sends_the_data_anywhere(opened):
    titles = opened.locator(".modebar-btn").evaluate_all("all => all.map((one) => one.dataset.title)")
    assert set(titles) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


def test_a_pointer_and_the_arrow_keys_show_the_values(opened):
    place = opened.locator("[data-figure='0']")
    place.scroll_into_view_if_needed()
    place.locator(".nsewdrag").first.hover(force=True)
    place.locator(".hoverlayer text").first.wait_for()
    assert "0.5" in place.locator(".hoverlayer").text_content()
    opened.mouse.move(0, 0)
    place.focus()
    opened.keyboard.press("End")
    place.locator(".hoverlayer").get_by_text("0.75").first.wait_for()
    assert '<img src=x onerror="alert(1)">' in place.locator(".hoverlayer").text_content()
    opened.keyboard.press("ArrowLeft")
    place.locator(".hoverlayer").get_by_text("0.5").first.wait_for()


def test_the_legend_switches_a_run_off_in_all_plots_drawn_or_not(opened):
    lines = "() => [...document.querySelectorAll('.js-plotly-plot')].flatMap((place) => place.data)"
    lines += ".filter((one) => one.legendgroup === 'run0' && one.visible !== false).length"
    assert opened.evaluate(lines) > 0
    opened.get_by_role("checkbox").first.focus()
    opened.keyboard.press("Space")
    assert opened.evaluate(lines) == 0
    opened.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    last = opened.locator("[data-figure]").last
    last.scroll_into_view_if_needed()
    last.locator(".main-svg").first.wait_for()
    assert opened.evaluate(lines) == 0
    opened.get_by_role("checkbox").first.click()
    assert opened.evaluate(lines) > 0


def test_plots_follow_the_colour_scheme_and_the_page_fits_a_narrow_screen(opened):
    ink = "() => document.querySelector('.js-plotly-plot').layout.font.color"
    assert opened.evaluate(ink) == "#ececf1"
    opened.emulate_media(color_scheme="light")
    opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert opened.evaluate(ink) == "#1b1b1f"
    opened.emulate_media(color_scheme="dark")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 400
