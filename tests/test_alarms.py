"""Each alarm is given by a run that provokes it, once an interval, and by no healthy run."""

import logging
import re
from itertools import pairwise

import pytest
import torch
from conftest import byte_tokenizer, config, lora, tiny_llama, trainer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.alarms import ADVICE, THRESHOLDS, Alarms
from trl_rlsd.leakage import cites, leak_metrics, ngrams, overlap


def says(texts):
    """A rollout function whose completions are texts(step, row)."""

    def generate(prompts, trainer):
        tokenizer, step = trainer.processing_class, trainer.state.global_step
        ids = [tokenizer(texts(step, row))["input_ids"] for row in range(len(prompts))]
        return {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(own) for own in ids],
        }

    return generate


def varied(completions, **columns):
    return [float(row % 2) for row in range(len(completions))]


def equal(completions, **columns):
    return [1.0] * len(completions)


def words(step, row):
    return f"row {row} of step {step} says nothing much"


def after_the_dot(text):
    return text.find(".") + 2, len(text)


SECRET = "turn the left valve by ninety degrees and wait for the lamp"
SECRETS = Dataset.from_dict({"prompt": ["what is to be done?"] * 16, "privileged_context": [SECRET] * 16})
# alarm -> the run that provokes it
PROVOKED = {
    # a random model's teacher says something else about every token
    "clip_saturation": dict(reward=varied, rollout_func=says(words)),
    "length_collapse": dict(
        reward=varied,
        rollout_func=says(lambda step, row: words(step, row)[: 30 if step < 3 else 8]),
        rlsd_reweight_clip_range=1e9,
    ),
    "leakage": dict(
        reward=varied,
        data=SECRETS,
        rollout_func=says(lambda step, row: words(step, row) if step < 3 else f"{row}: {SECRET}"),
    ),
    "answer_copying": dict(
        reward=varied,
        rollout_func=says(lambda step, row: f"{words(step, row)[:20]}. The answer is {row}"),
        credit_span="test_alarms.after_the_dot",
    ),
    "no_informative_groups": dict(reward=equal, rollout_func=says(words), max_steps=34),
    "no_wrong_references": dict(reward=varied, rollout_func=says(words), credit="rlsd_contrast"),
    # the reward pays for one letter alone; at this rate the policy moves towards it within a few steps
    "entropy_collapse": dict(
        reward=lambda completions, **columns: [float("a" in text) for text in completions],
        rollout_func=says(lambda step, row: "aaab"[row % 4] * 24),
        model=lambda: tiny_llama(initializer_range=0.05),
        peft_config=None,
        learning_rate=3e-2,
        max_steps=24,
        alarm_thresholds={"entropy_collapse": 0.6},
    ),
}


def alarms_of(caplog, tmp_path, **options):
    defaults = dict(max_completion_length=64, max_steps=8, peft_config=lora(), rlsd_lambda_decay_steps=0)
    options = {name: value() if name == "model" else value for name, value in options.items()}
    built = trainer(tmp_path, **{**defaults, **options})
    with caplog.at_level(logging.WARNING, logger="trl_rlsd.alarms"):
        built.train()
    spoken = [record.getMessage() for record in caplog.records if record.name == "trl_rlsd.alarms"]
    return [re.search(r"Alarm (\w+) at step", text).group(1) for text in spoken]


@pytest.mark.parametrize("name", PROVOKED)
def test_each_alarm_is_given_by_a_run_that_provokes_it(caplog, tmp_path, name):
    given_alarms = alarms_of(caplog, tmp_path, **PROVOKED[name])
    assert given_alarms.count(name) == 1, "once an interval"


def test_a_healthy_run_gives_none(caplog, tmp_path):
    """A teacher that is near the student, lengths that vary, and half of the groups alike."""

    def half(completions, **columns):
        half.step += 1
        return [float(row % 2 == 0 or half.step % 2 == 0) for row in range(len(completions))]

    half.step = 0
    options = dict(
        reward=half,
        rollout_func=says(lambda step, row: words(step, row)[: 24 + 5 * (step % 3)]),
        model=lambda: tiny_llama(initializer_range=0.05),
        learning_rate=1e-4,
        max_steps=40,
    )
    assert alarms_of(caplog, tmp_path, **options) == []


@pytest.mark.parametrize(("accuracy", "group", "groups"), [(0.9, 8, 1), (0.3, 4, 1), (0.2, 4, 2)])
def test_few_groups_a_step_are_no_alarm(accuracy, group, groups):
    """As often as chance has it: the share of groups with equal rewards among so few."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        alarms = Alarms(groups_per_log=groups)
        for step in range(100):
            right = (torch.rand(groups, group, generator=generator) < accuracy).float().mean(1)
            equal_share = ((right == 0) | (right == 1)).float().mean().item()
            assert alarms.update(step, {"frac_reward_zero_std": equal_share}) == {}


def test_alarms_can_be_switched_off_and_moved(caplog, tmp_path):
    assert alarms_of(caplog, tmp_path, **PROVOKED["clip_saturation"], alarm_steps=0) == []
    caplog.clear()
    off = alarms_of(caplog, tmp_path, **PROVOKED["clip_saturation"], alarm_thresholds={"clip_saturation": None})
    assert "clip_saturation" not in off
    caplog.clear()
    often = alarms_of(caplog, tmp_path, **PROVOKED["clip_saturation"], alarm_steps=2)
    assert often.count("clip_saturation") == 3, "at steps 3, 5 and 7"


def test_every_alarm_has_a_threshold_advice_and_a_run():
    assert set(THRESHOLDS) == set(ADVICE) == set(PROVOKED)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="alarm_thresholds has 'clipping'; known are 'clip_saturation'"):
        config(tmp_path, alarm_thresholds={"clipping": 0.1})
    with pytest.raises(TypeError, match="'leakage'"):
        config(tmp_path, alarm_thresholds={"leakage": "much"})
    with pytest.raises(ValueError, match="is not JSON"):
        config(tmp_path, alarm_thresholds="{leakage}")
    with pytest.raises(TypeError, match="must map names"):
        config(tmp_path, alarm_thresholds="3")
    assert config(tmp_path, alarm_thresholds='{"leakage": 0.2}').alarm_thresholds == {"leakage": 0.2}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 20))
def test_the_same_alarm_is_given_once_an_interval_at_most(values, interval):
    alarms = Alarms(interval=interval, groups_per_log=32)
    steps = [s for s, v in enumerate(values) if alarms.update(s, {"frac_reward_zero_std": v})]
    assert all(later - earlier >= interval for earlier, later in pairwise(steps))


# ---------------------------------------------------------------------- leakage


def test_the_overlap_is_the_share_of_runs_of_words_that_only_the_context_has():
    prompt = "what is to be done?"
    assert overlap(SECRET, SECRET, prompt) == 1.0
    assert overlap("the answer is that I do not know it", SECRET, prompt) == 0.0
    half = "Turn the LEFT valve, by ninety: then nothing else at all"  # 2 of its 7 runs of five words
    assert overlap(half, SECRET, prompt) == pytest.approx(2 / 7)
    assert overlap(SECRET, SECRET, f"{prompt} {SECRET}") == 0.0, "the student was told"
    assert overlap("51", "51", prompt) is None, "an answer is shorter than a run of words"
    assert ngrams("a b c", 2) == {("a", "b"), ("b", "c")}


def test_citing_counts_unless_the_prompt_does_it_too():
    phrases = ["the reference"]
    assert cites("As The Reference says, 4.", "2 + 2?", phrases)
    assert not cites("As the reference says, 4.", "Use the reference.", phrases)
    assert leak_metrics(["the reference"] * 3, ["a", "b", "the reference"], ["4", None, "4"], phrases) == {
        "leak_overlap": (0, 0),
        "leak_cites": (1, 2),
    }


@pytest.mark.parametrize("fields", [{}, {"rlsd_lambda": 0.0}, {"credit": "grpo"}], ids=str)
def test_the_trainer_logs_both_whatever_the_credit(tmp_path, fields):
    built = trainer(
        tmp_path, data=SECRETS, reward=varied, rollout_func=says(lambda step, row: SECRET if row else "the reference"),
        max_completion_length=64, max_steps=1, processing_class=byte_tokenizer(), **fields,
    )  # fmt: skip
    built.train()
    log = built.state.log_history[0]
    assert log["rlsd/leak_cites"] == 0.25
    assert log["rlsd/leak_overlap"] == 1.0


def test_grpo_does_not_mind_what_the_column_holds(tmp_path):
    numbers = Dataset.from_dict({"prompt": ["a"] * 8, "privileged_context": list(range(8))})
    built = trainer(tmp_path, credit="grpo", data=numbers, max_steps=1)
    built.train()
    assert "rlsd/leak_cites" not in built.state.log_history[0]
