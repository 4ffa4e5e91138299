"""Pictures of credit: they show the numbers that train, they change nothing, and text in them is inert."""

import io
import logging
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import assert_same, byte_reward, byte_tokenizer, dataset, lora, tiny_llama, trainer, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import TrainerCallback

from trl_rlsd import RLSDTrainer, cli
from trl_rlsd.credit_log import CreditLog
from trl_rlsd.report.page import CreditPictures, credit_page
from trl_rlsd.report.picture import CreditPicture, Token, strongest, token_texts
from trl_rlsd.report.terminal import rendered


ROOT = Path(__file__).parent.parent
HOSTILE = "</span></pre><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
ESCAPES = "\x1b[31m\x1b]8;;http://evil\x07\x9b2J\u202egnp.exe\u200b\r"


def picture(advantage: float = 1.0, gains=(0.5, -0.5, 0.01, 0.0), texts=("a", " b", "\n", "</s>"), **options):
    sign = math.copysign(1, advantage)
    tokens = []
    for text, gain in zip(texts, gains, strict=True):
        weight = math.exp(sign * gain)
        clipped = min(max(weight, 0.8), 1.2)
        clip = "high" if weight > clipped else "low" if weight < clipped else ""
        tokens.append(Token(text, gain, weight, advantage * (0.5 + 0.5 * clipped), clip))
    defaults = dict(
        student_prompt="<u>1 + 1?<a>",
        teacher_prompt="<u>Reference: 2\n1 + 1?<a>",
        credit="rlsd",
        rewards={"math_reward": 1.0},
        lam=0.5,
        clip_range=0.2,
    )
    return CreditPicture(tuple(tokens), advantage, **(defaults | options))


# ---------------------------------------------------------------- data


@settings(max_examples=200)
@given(st.lists(st.one_of(st.none(), st.integers(-9, 9)), max_size=12))
def test_the_strongest_span_is_the_one_that_trying_all_finds(values):
    start, end = strongest(values)
    spans = [(a, b) for a in range(len(values)) for b in range(a + 1, len(values) + 1) if None not in values[a:b]]
    if not spans:
        assert (start, end) == (0, 0)
    else:
        assert (start, end) in spans
        assert sum(values[start:end]) == max(sum(values[a:b]) for a, b in spans)


def test_tokens_are_the_decoded_text_and_parts_of_a_character_have_their_names():
    tokenizer = byte_tokenizer()
    ids = tokenizer("1 + 1\n= é", add_special_tokens=False)["input_ids"] + [1]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts[:-3]) == "1 + 1\n= "
    assert texts[-2:] == ["é", "</s>"]
    assert texts[-3] == f"⟨{tokenizer.convert_ids_to_tokens(ids[-3])}⟩"
    assert token_texts([], tokenizer) == []


def test_excess_is_credit_in_a_success_and_blame_in_a_failure():
    assert picture(1.0).excess[:2] == pytest.approx([0.1, -0.1], abs=1e-9)
    assert picture(-1.0).excess[:2] == pytest.approx([-0.1, 0.1], abs=1e-9), "a failure blames what lost probability"
    assert (picture(1.0).most.start, picture(1.0).least.start) == (0, 1)
    plain = picture(1.0, gains=(0.0,) * 4)
    assert plain.most is plain.least is None
    outside = replace(picture(1.0).tokens[0], counts=False)
    assert replace(picture(1.0), tokens=(outside, *picture(1.0).tokens[1:])).excess[0] is None


def test_excess_of_a_gate_is_how_far_it_is_open():
    inside = [Token(text, 0.0, None, -credit, plain=-0.1) for text, credit in zip("abc", (0.1, 0.1, 0.8), strict=True)]
    tokens = *inside, Token("d", 0.0, None, -1.0, plain=-1.0)  # outside the span
    one = replace(picture(-1.0), tokens=tokens, credit="rlsd_gate", evidence="gate")
    assert one.excess == pytest.approx([0, 0, 0.7, 0])
    assert (one.most.start, one.most.end) == (2, 3)


def test_the_privileged_part_is_what_the_students_prompt_lacks():
    one = picture()
    start, end = one.privileged
    assert one.teacher_prompt[:start] + one.teacher_prompt[end:] == one.student_prompt
    assert "Reference: 2" in one.teacher_prompt[start:end]
    assert picture(teacher_prompt=None).privileged == (0, 0)


# ---------------------------------------------------------------- what trains is what is shown


class Watched(RLSDTrainer):
    seen: list

    def observe_credit(self, batch, student_logps, credited):
        self.seen.append((dict(batch), student_logps, credited.clone()))


@pytest.mark.parametrize("credit", ["rlsd", "opsd", "rlsd_contrast", "rlsd_gate", "grpo"])
def test_a_picture_has_the_numbers_that_train(tmp_path, credit, monkeypatch):
    monkeypatch.setattr("conftest.RLSDTrainer", Watched)
    fallback = "one_sided" if credit == "rlsd_gate" else "grpo"
    own = trainer(
        tmp_path, credit=credit, contrast_reward_below=3.0, contrast_reference="completion", contrast_fallback=fallback
    )
    own.seen = []
    taken = own.credit_pictures(own.train_dataset.select(range(2)))
    assert len(taken) == 8
    assert len(own.seen) == 2
    pictures = iter(taken)
    for batch, student_logps, credited in own.seen:
        for row in range(4):
            one, length = next(pictures), int(batch["completion_mask"][row].sum())
            assert len(one.tokens) == length
            ids = batch["completion_ids"][row, :length].tolist()
            assert [token.text for token in one.tokens] == token_texts(ids, own.processing_class)
            own_credit = credited[row] if credited.ndim == 1 else credited[row, :length]
            shown = torch.tensor([token.credit for token in one.tokens])
            torch.testing.assert_close(shown, own_credit.expand(length).float(), atol=1e-6, rtol=0)
            assert one.advantage == pytest.approx(batch["advantages"][row].item(), abs=1e-6)
            if credit == "grpo" or not batch["teacher_scored"][row]:
                assert one.teacher_prompt is None
                assert {token.gain for token in one.tokens} == {None}
                continue
            gains = (batch["teacher_logps"] - student_logps)[row, :length]
            torch.testing.assert_close(torch.tensor([t.gain for t in one.tokens]), gains, atol=1e-5, rtol=0)
            assert one.teacher_prompt.count("the answer is") == 1
            assert one.student_prompt == one.teacher_prompt[-len(one.student_prompt) :]
            assert set(one.rewards) == {"byte_reward"}
            for token in one.tokens:
                if credit in ("opsd", "rlsd_gate"):
                    assert token.weight is None
                    plain = one.advantage * (0.5 if credit == "rlsd_gate" else 1)
                    assert token.plain == pytest.approx(plain, abs=1e-6)
                elif token.weight is not None:
                    factor = 0.5 + 0.5 * min(max(token.weight, 0.8), 1.2)
                    assert token.credit == pytest.approx(one.advantage * factor, abs=1e-5)
                    assert token.clip == ("high" if token.weight > 1.2 else "low" if token.weight < 0.8 else "")


def test_looking_changes_nothing_of_a_run(tmp_path):
    straight = trainer(tmp_path / "a", peft_config=lora())
    straight.train()
    looked = trainer(tmp_path / "b", peft_config=lora(), rlsd_log_credit_steps=1)
    looked.credit_pictures(looked.train_dataset.select(range(2)))
    looked.train()
    assert_same(weights(straight.model), weights(looked.model))
    logs = [
        {
            name: value
            for name, value in log.items()
            if "seconds" not in name and "time" not in name and "per_" not in name
        }
        for log in straight.state.log_history
    ]
    for log, again in zip(logs, looked.state.log_history, strict=True):
        assert {name: again[name] for name in log} == log


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}])
def test_a_step_leaves_a_page_beside_trls_tables(tmp_path, options):
    own = trainer(tmp_path, rlsd_log_credit_steps=2, max_steps=4, log_completions=True, **options)
    own.train()
    names = {path.name for path in (tmp_path / "completions").iterdir()}
    assert {name for name in names if name.startswith("credit_")} == {"credit_00002.html", "credit_00004.html"}
    assert "completions_00004.parquet" in names
    page = (tmp_path / "completions" / "credit_00004.html").read_text()
    assert "Token credit at step 4" in page
    assert "Better than its group" in page
    assert "Worse than its group" in page
    assert 2 <= page.count("<article") <= 4
    assert page.count("What the teacher read") == page.count("<article")


def test_no_page_is_written_once_lambda_is_gone(tmp_path):
    trainer(tmp_path, rlsd_log_credit_steps=1, max_steps=3, rlsd_lambda_decay_steps=2).train()
    assert [path.name for path in sorted((tmp_path / "completions").iterdir())] == [
        "credit_00001.html", "credit_00002.html"
    ]  # fmt: skip


def test_pages_go_where_the_run_is_logged(tmp_path, monkeypatch):
    logged = {}
    for name in ("wandb", "trackio"):
        module = SimpleNamespace(__name__=name, run=object(), Html=lambda page: ("html", page))
        module.log = lambda values, name=name: logged.setdefault(name, values)
        monkeypatch.setitem(sys.modules, name, module)
    log = trainer(tmp_path, rlsd_log_credit_steps=2)._credit_log
    log._chosen = [picture()]
    log.on_step_end(
        SimpleNamespace(output_dir=tmp_path, report_to=["wandb", "trackio"]), SimpleNamespace(global_step=2), None
    )
    assert set(logged) == {"wandb", "trackio"}
    assert all(values["rlsd/credit"][1].startswith("<!DOCTYPE html>") for values in logged.values())


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "completions").write_text("a file where the folder should be")
    own = trainer(tmp_path, rlsd_log_credit_steps=1)
    with caplog.at_level(logging.WARNING, logger="trl_rlsd.credit_log"):
        own.train()
    assert own.state.global_step == 2
    assert any("The run goes on without" in record.getMessage() for record in caplog.records)


def test_a_resumed_run_shows_completions_whose_prompts_it_no_longer_has(tmp_path):
    options = dict(num_iterations=2, save_strategy="steps", save_steps=1, max_steps=2, rlsd_log_credit_steps=2)
    trainer(tmp_path, **options).train()
    page = tmp_path / "completions" / "credit_00002.html"
    assert "What the teacher read" in page.read_text()
    page.unlink()
    trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    text = page.read_text()
    assert 'data-gain="-' in text
    assert "What the teacher read is not kept in the checkpoint" in text
    assert "The teacher has not scored" not in text
    assert "What the teacher read, <mark>" not in text


def test_looking_within_a_run_leaves_its_pages_and_its_loss_alone(tmp_path):
    """Between two uses of the same completions, and between two micro-batches of a step."""

    class Looks(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            own["trainer"].credit_pictures([{"prompt": "9 + 9 = ?", "privileged_context": "OTHER"}])

        on_step_end = on_substep_end

    def reward(completions, **columns):
        return [value + random.random() + numpy.random.rand() for value in byte_reward(completions)]

    options = dict(
        reward=reward, num_iterations=2, gradient_accumulation_steps=2, max_steps=4, rlsd_log_credit_steps=1
    )
    logs, pages, own = [], [], {}
    for name, callbacks in (("straight", []), ("looked", [Looks()])):
        random.seed(0), numpy.random.seed(0)
        own["trainer"] = trainer(tmp_path / name, callbacks=callbacks, **options)
        own["trainer"].train()
        logs.append([(log["loss"], log["grad_norm"]) for log in own["trainer"].state.log_history if "loss" in log])
        pages.append([path.read_text() for path in sorted((tmp_path / name / "completions").iterdir())])
    assert logs[0] == logs[1]
    assert pages[0] == pages[1]
    assert len(pages[0]) == 4


def test_after_a_run_the_credit_of_another_step_can_be_seen(tmp_path):
    own = trainer(tmp_path, rlsd_lambda_decay_steps=1)
    own.train()
    assert "lambda is 0 at this step" in own.credit_pictures(own.train_dataset.select([0])).html()
    again = own.credit_pictures(own.train_dataset.select([0]), step=0)
    assert {one.lam for one in again} == {0.5}
    assert any(one.scored for one in again)
    assert own.state.global_step == 2


def test_the_legend_says_what_a_weight_is_taken_of_and_a_contrast_shows_both_prompts(tmp_path):
    data = dataset(2).add_column("wrong", ["the answer is 7", "the answer is 8"])
    for credit, said in (("rlsd", "exp(± gain)"), ("rlrt", "exp(± minus the gain)"), ("rlsd_contrast", "contrast")):
        own = trainer(tmp_path, credit=credit, data=data, contrast_column="wrong")
        pictures = own.credit_pictures(data)
        assert said in pictures.html()
        wrong = {
            one.wrong_prompt is not None and "the answer is" in one.wrong_prompt for one in pictures if one.scored
        }
        assert wrong == {credit == "rlsd_contrast"}


def test_completions_that_are_masked_whole_are_shown_as_such(tmp_path):
    own = trainer(tmp_path, mask_truncated_completions=True)
    (one, *_) = own.credit_pictures(own.train_dataset.select([0]))
    assert len(one.tokens) == 8
    assert not one.counting
    assert "No token counts" in CreditPictures([one]).html()


def test_a_page_is_written_whatever_the_locale(tmp_path):
    script = "from trl_rlsd.report.page import CreditPictures; CreditPictures([]).save('page.html')"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True)
    assert "−" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_trackio_that_knows_no_pages_gets_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(__name__="trackio"))
    log = trainer(tmp_path, rlsd_log_credit_steps=2)._credit_log
    log._chosen = [picture()]
    log.on_step_end(SimpleNamespace(output_dir=tmp_path, report_to=["trackio"]), SimpleNamespace(global_step=2), None)
    assert (tmp_path / "completions" / "credit_00002.html").exists()


# ---------------------------------------------------------------- the page and the terminal


def hostile() -> CreditPictures:
    bad = HOSTILE + ESCAPES
    one = picture(
        texts=(bad, HOSTILE, ESCAPES, "</s>"),
        student_prompt=f"a{bad}b",
        teacher_prompt=f"a{bad}{bad}b",
        rewards={bad: 1.0},
        credit=bad,
    )
    return CreditPictures([one, picture(-0.7, credit=bad)])


def test_the_page_holds_no_markup_and_no_control_character_of_a_text():
    page = credit_page(hostile(), title=HOSTILE + ESCAPES)
    assert HOSTILE not in page
    assert page.count("<script") == 1
    assert "<img" not in page
    assert not {character for character in ESCAPES if not character.isprintable()} & set(page)
    assert re.search(r"https?://(?!evil)", page) is None, "nothing is loaded"


def test_the_terminal_gets_no_escape_sequence_of_a_text():
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(rendered(hostile()))
    assert not set("\x1b\x07\x9b\u202e\r") & set(out.getvalue())
    assert "␛[31m" in out.getvalue()
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="truecolor").print(rendered(hostile()))
    assert "\x1b[31m" not in out.getvalue()
    assert "\x1b]8" not in out.getvalue()


def test_the_terminal_shows_tokens_values_and_prompts():
    out = io.StringIO()
    Console(file=out, width=100).print(CreditPictures([picture(1.0), picture(-0.7)]))
    text = out.getvalue()
    for said in ("A = +1.000", "A = -0.700", "The student read: <u>1 + 1?<a>", "Reference: 2", "1.649 (cut)", "blame"):
        assert said in text


def test_the_page_works_in_a_browser(browser, tmp_path):
    """Hovering and the arrow keys show values, colours follow the choice, both schemes have their colours."""
    path = CreditPictures([picture(1.0), picture(-0.7)]).save(tmp_path / "credit.html")
    backgrounds = {}
    for scheme in ("light", "dark"):
        with browser(path, color_scheme=scheme) as page:
            tokens, readout = page.locator("#c1 .t"), page.locator("#readout")
            tokens.nth(0).hover()
            values = "gain +0.500 nats · weight 1.649, cut to the upper bound · credit +1.1000, 1.100 times A"
            assert readout.inner_text() == f'token 1 · "a" · {values}'
            tokens.nth(0).focus()
            page.keyboard.press("ArrowRight")
            assert readout.inner_text().startswith('token 2 · " b" · gain -0.500 nats · weight 0.607, raised to')
            page.keyboard.press("End")
            assert readout.inner_text().startswith('token 4 · "</s>"')
            page.locator("#c2 ~ p button").first.click()
            assert "token 2 " in readout.inner_text(), "the most blamed is jumped to"
            colour = "element => getComputedStyle(element).backgroundImage"
            by_credit = tokens.nth(0).evaluate(colour)
            assert tokens.nth(0).evaluate(colour) != tokens.nth(1).evaluate(colour)
            page.get_by_label("gain").check()
            assert page.locator("#c2 .t").nth(0).evaluate(colour) == tokens.nth(0).evaluate(colour), "equal gains"
            page.get_by_label("credit").check()
            assert page.locator("#c2 .t").nth(0).evaluate(colour) != tokens.nth(0).evaluate(colour) == by_credit
            lines = "element => getComputedStyle(element).borderBottomStyle"
            assert [tokens.nth(i).evaluate(lines) for i in (0, 1)] == ["solid", "dotted"], "not by colour alone"
            backgrounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.locator("#theme").click()
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != backgrounds[scheme]
    assert backgrounds["light"] != backgrounds["dark"]


def test_hostile_text_does_nothing_in_a_browser(browser, tmp_path):
    path = hostile().save(tmp_path / "credit.html", title=HOSTILE)
    with browser(path) as page:
        page.locator("#c1 .t").nth(0).hover()
        assert "<script>" in page.locator("#readout").inner_text(), "it is shown as text"
        for summary in page.locator("summary").all():
            summary.click()
        assert page.title() == HOSTILE
        assert page.locator("script").count() == 1
        assert page.locator("img").count() == 0


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(browser, tmp_path):
    (tmp_path / "cell.html").write_text(f"<meta charset=utf-8>{hostile()._repr_html_()}")
    with browser(tmp_path / "cell.html") as page:
        frame = page.frame_locator("iframe")
        frame.locator("#c2 .t").nth(0).hover()
        assert "gain +0.500 nats" in frame.locator("#readout").inner_text()
        assert page.title() != "taken"


# ---------------------------------------------------------------- trl-rlsd inspect


@pytest.fixture
def model(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    # trl-rlsd inspect sets them for its process
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return tmp_path / "model"


def test_inspect_shows_given_completions_as_right_and_as_wrong(model, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(CreditPictures, "save", lambda self, path, title="": shown.extend(self) or path)
    own = ["--prompt", "What is 3+4?", "--context", "It is 7.", "--completion", "3+4 is 7", "so 8"]
    assert cli.main(["inspect", "--model_name_or_path", "model", *own]) == 0
    assert [one.advantage for one in shown] == [1.0, -1.0, 1.0, -1.0]
    assert ["".join(t.text for t in one.tokens) for one in shown[::2]] == ["3+4 is 7</s>", "so 8</s>"]
    assert shown[0].student_prompt == "<|user|>What is 3+4?</s><|assistant|>"
    assert shown[0].teacher_prompt.startswith("<|user|>Here is a verified reference")
    assert "It is 7." in shown[0].teacher_prompt
    assert [token.gain for token in shown[0].tokens] == [token.gain for token in shown[1].tokens]
    assert "better than its group" in capsys.readouterr().out
    shown.clear()
    assert cli.main(["inspect", "--model_name_or_path", "model", *own, "--verdict", "wrong", "--credit", "opsd"]) == 0
    assert [(one.advantage, one.credit) for one in shown] == [(-1.0, "opsd")] * 2


def test_inspect_looks_at_a_trained_adapter(model, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(CreditPictures, "save", lambda self, path, title="": shown.append(list(self)) or path)
    own = trainer(tmp_path / "run", model="model", processing_class=None, peft_config=lora(), max_steps=4)
    own.train()
    own.save_model(str(tmp_path / "adapter"))
    given = ["--prompt", "What is 3+4?", "--context", "It is 7.", "--completion", "3+4 is 7"]
    for path, kind in (("adapter", "synced"), ("adapter", "live"), ("model", "live")):
        assert cli.main(["inspect", "--model_name_or_path", path, "--teacher_model_kind", kind, *given]) == 0
    gains = [[token.gain for token in pictures[0].tokens] for pictures in shown]
    assert gains[0] == pytest.approx(gains[1], abs=1e-5), "student and teacher both have the adapter"
    assert gains[0] != pytest.approx(gains[2], abs=1e-2)


def test_inspect_takes_an_external_teacher_and_forgets_a_configs_reward_weights(model, tmp_path):
    given = ["--prompt", "What is 3+4?", "--context", "7", "--completion", "7", "--html", "page.html"]
    teacher = ["--teacher_model_kind", "external", "--teacher_model_name_or_path", "model"]
    arguments = ["--model_name_or_path", "model", *given, *teacher, "--reward_weights", "1", "2"]
    assert cli.main(["inspect", *arguments]) == 0
    assert (tmp_path / "page.html").exists()


def test_inspect_samples_and_rewards_rows_of_a_config(model, tmp_path, capsys):
    (tmp_path / "rewards_to_inspect.py").write_text("from conftest import byte_reward as reward\n")
    dataset(conversational=True).to_json("data.jsonl")
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: model\ndataset_name: data.jsonl\nreward_funcs: [rewards_to_inspect.reward]\n"
        "num_generations: 4\n"
        "per_device_train_batch_size: 1\nmax_completion_length: 8\nbf16: true\n"
        "accelerate_config: multi_gpu\nuse_liger_loss: true\noutput_dir: out\n"
    )
    assert cli.main(["inspect", "--config", "run.yaml", "--rows", "2", "--html", "pages/credit.html"]) == 0
    page = (tmp_path / "pages" / "credit.html").read_text()
    assert page.count("<article") == 4
    assert "pages/credit.html" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "a", "--completion", "b"], "--prompt needs --context too"),
        (["--prompt", "a", "--context", "b"], "--prompt needs --completion too"),
        ([], "reward_funcs is not set"),
        (["--prompt", "a", "--context", "b", "--completion", "c", "--rlsd_lambda", "3"], "rlsd_lambda=3.0 is out of"),
    ],
)
def test_inspect_tells_what_is_missing(model, capsys, arguments, said):
    assert cli.main(["inspect", "--model_name_or_path", "model", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_credit_log_is_off_by_default(tmp_path):
    own = trainer(tmp_path)
    assert not own._credit_log.is_on
    assert isinstance(own._credit_log, CreditLog)
