"""Wrong references: where they come from, and what the trainer makes of them."""

import math

import pytest
import torch
from conftest import config, dataset, differs, lora, trainer, weights
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.collator import text_of
from trl_rlsd.contrast import get_reference, is_wrong, references_of, right_metric, wrong_references
from trl_rlsd.rewards.answer import final_answer


CONTRASTS = ["rlsd_contrast", "rlcsd", "contrast_additive", "rlsd_gate"]


# ---------------------------------------------------------------------- final answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}, that is all", r"\frac{1}{2}"),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{never closed", None),
        ("<answer> 7 apples </answer>", "7 apples"),
        ("48/2 = 24\n#### 24", "24"),
        ("The answer is **B**.", "B"),
        ("Answer: -3.5", "-3.5"),
        ("The answer is: 42", "42"),
        ("**Answer**: 4", "4"),
        ("**Answer:** 4", "4"),
        ("the answer isn't clear", None),
        ("<think>the answer is 3</think>The answer is 4.", "4"),
        ("<think>the answer is 3", None),
        ("the answer is 2</think>nothing more", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_final_answer_is_read(text, answer):
    assert final_answer(text) == answer


def test_references_are_found_by_name():
    assert get_reference("completion")(" all of it ") == "all of it"
    assert get_reference("trl_rlsd.rewards.answer.final_answer") is final_answer
    for name in ("anwser", "trl_rlsd.nonesuch.function", "trl_rlsd.contrast.__doc__"):
        with pytest.raises(ValueError, match="contrast_reference="):
            get_reference(name)
    messages = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant"}]
    assert text_of(messages) == "a"


# ---------------------------------------------------------------------- whose reference


def test_a_row_gets_a_wrong_siblings_reference():
    answers = ["1", "2", "3", "1", "9", "9", "9", "8"]
    wrong = [False, True, True, False] + [True] * 4
    right = ["1"] * 4 + ["7"] * 4
    assert wrong_references(answers, wrong, 4, right) == ["2", "3", "2", "2", "8", "8", "8", "9"]


def test_there_may_be_none():
    assert wrong_references(["1", "1"], [False, False], 2, ["1", "1"]) == [None, None], "all are right"
    assert wrong_references(["1", "2"], [False, True], 2, ["1", "1"]) == ["2", None], "the only wrong one"
    assert wrong_references([None, "1"], [True, False], 2, ["1", "1"]) == [None, None], "it states no answer"
    assert wrong_references([" 1. 5", "3"], [True, False], 2, ["1.5", "1.5"]) == [None, None], "it says what is right"
    with pytest.raises(ValueError, match="groups of 2"):
        wrong_references(["1"] * 3, [True] * 3, 2, ["1"] * 3)


def test_a_process_asks_for_its_own_rows():
    answers, wrong = ["1", "2", "3", "4"], [False, True, True, True]
    whole = wrong_references(answers, wrong, 4, ["1"] * 4)
    assert wrong_references(answers, wrong, 4, ["1"] * 2, first=2) == whole[2:]


def test_one_answer_in_three_wordings_is_no_contrast():
    texts = ["The answer is: 42", "The answer is 42.", "Answer: **42**", "the answer is 7"]
    assert wrong_references(references_of(texts, "answer"), [True] * 4, 4, ["9"] * 4) == ["7", "7", "7", "42"]


def length(text):
    return len(text)


def test_a_reference_that_is_no_text_is_named():
    with pytest.raises(TypeError, match=r"contrast_reference='test_contrast.length' returned 3 for row 0"):
        references_of(["abc"], "test_contrast.length")


def test_wrong_is_what_earns_too_little_in_all_and_could_be_judged():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, nan], [nan, nan]])
    assert is_wrong(rewards, torch.tensor([1.0, 0.2]), 0.5) == [False, True, True, False]


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=6, max_size=6))
def test_it_is_never_the_rows_own_and_always_a_wrong_one_of_its_group(rows):
    answers, wrong = [answer for answer, _ in rows], [bad for _, bad in rows]
    chosen = wrong_references(answers, wrong, 3, ["a"] * 6)
    for row, reference in enumerate(chosen):
        group = range(row - row % 3, row - row % 3 + 3)
        candidates = {answers[i] for i in group if wrong[i]} - {answers[row], "a", None}
        assert (reference is None) == (not candidates)
        assert reference is None or reference in candidates


# ---------------------------------------------------------------------- in the trainer


def spoken(prompts, trainer):
    """Completions that state an answer; the reward calls 3 right."""
    tokenizer = trainer.processing_class
    texts = [f"answer: {i % 4}" for i in range(len(prompts))]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": ids,
        "logprobs": [[0.0] * len(own) for own in ids],
    }


def verdict(completions, **columns):
    return [float(text == "answer: 3") for text in completions]


def build(tmp_path, **options):
    defaults = dict(rollout_func=spoken, reward=verdict, peft_config=lora(), max_completion_length=9, max_steps=1)
    if options.get("credit") == "rlsd_gate":
        defaults["contrast_fallback"] = "one_sided"  # the other is refused
    return trainer(tmp_path, **{**defaults, **options})


def scored(built):
    """The batches after scoring, and the prompts that were read."""
    batches, prompts = [], []
    score, run = built._score_with_teacher, built._teacher_pass.__call__

    def watch(batch, *args):
        score(batch, *args)
        batches.append(batch)

    def read(model, prompt_ids, ids, mask, rows, images):
        prompts.append({row: built.processing_class.decode(prompt_ids[row]) for row in rows})
        return run(model, prompt_ids, ids, mask, rows, images)

    built._score_with_teacher, built._teacher_pass = watch, read
    built.train()
    return batches, prompts


@pytest.mark.parametrize("credit", CONTRASTS)
@pytest.mark.parametrize("liger", [False, True], ids=["default", "liger"])
def test_the_trainer_learns_with_a_contrast(tmp_path, credit, liger):
    built = build(tmp_path, credit=credit, use_liger_loss=liger, max_steps=2)
    plain = build(tmp_path, credit="grpo", use_liger_loss=liger, max_steps=2)
    built.train()
    plain.train()
    assert differs(weights(built.model), weights(plain.model)), "as if there were no contrast"
    logs = [log for log in built.state.log_history if "rlsd/no_contrast" in log]
    assert len(logs) == 2
    assert all(log["rlsd/no_contrast"] == 0 for log in logs)


def test_both_references_stand_in_the_same_template_and_only_they_differ(tmp_path):
    built = build(tmp_path, credit="rlsd_contrast", logging_steps=1)
    (batch,), (prompts,) = scored(built)
    rows = len(batch["advantages"])
    assert sorted(prompts) == list(range(2 * rows)), "both passes are one"
    for row in range(rows):
        right, wrong = prompts[row], prompts[rows + row]
        own = f"{row % 4}"
        truth = built.train_dataset[0]["privileged_context"][:13]
        assert truth in right
        assert truth not in wrong
        before, after = right.split("the answer is")[0], right.split("the answer is")[1].lstrip(" 0123456789")
        reference = wrong.removeprefix(before).removesuffix(after).strip()
        assert reference in "012"
        assert reference != own
    assert batch["wrong_scored"].all()
    assert not torch.equal(batch["wrong_logps"], batch["teacher_logps"])


@pytest.mark.parametrize("credit", CONTRASTS)
def test_the_credit_is_the_functions_of_both_log_probs(tmp_path, credit):
    from trl_rlsd.credit import get_credit, token_advantages

    built = build(tmp_path, credit=credit)
    seen = []
    original = built._token_credit

    def spy(inputs, logps, rows=None):
        seen.append((dict(inputs), logps, original(inputs, logps, rows)))
        return seen[-1][2]

    built._token_credit = spy
    built.train()
    ((inputs, logps, credited),) = seen
    expected = token_advantages(
        get_credit(credit), inputs["advantages"], logps, inputs["teacher_logps"], inputs["completion_mask"],
        lam=0.5, clip_range=0.2, negative_only=False, wrong_logps=inputs["wrong_logps"],
    )  # fmt: skip
    assert torch.equal(credited, expected)
    assert not torch.equal(credited, inputs["advantages"].unsqueeze(1).expand_as(credited))


def one_wrong(completions, **columns):
    return [float(i % 4 != 0) for i in range(len(completions))]


@pytest.mark.parametrize("fallback", ["grpo", "one_sided"])
def test_a_row_without_a_wrong_reference_falls_back_as_told_and_is_counted(tmp_path, fallback):
    built = build(tmp_path, credit="rlsd_contrast", reward=one_wrong, contrast_fallback=fallback)
    credit, seen = built._token_credit, []
    built._token_credit = lambda inputs, logps: (
        seen.append((dict(inputs), logps, credit(inputs, logps))) or seen[-1][2]
    )
    built.train()
    ((inputs, logps, credited),) = seen
    lone = int(inputs["advantages"].argmin())  # the only wrong one of its group
    assert inputs["wrong_scored"].tolist() == [i != lone for i in range(4)]
    plain = inputs["advantages"][lone].expand(credited.size(1)) * inputs["completion_mask"][lone]
    if fallback == "grpo":
        assert torch.equal(credited[lone], plain)
        assert not inputs["teacher_scored"][lone], "its right reference is not read either"
    else:
        gain = inputs["teacher_logps"][lone] - logps[lone]
        weight = (-gain).exp().clamp(0.8, 1.2)
        torch.testing.assert_close(credited[lone], plain * (0.5 + 0.5 * weight), rtol=1e-5, atol=1e-7)
    assert built.state.log_history[0]["rlsd/no_contrast"] == 0.25


def test_a_column_can_hold_the_wrong_reference(tmp_path):
    data = dataset().add_column("wrong", ["the answer is none"] * 16)
    built = build(tmp_path, credit="rlsd_contrast", contrast_column="wrong", data=data)
    (batch,), (prompts,) = scored(built)
    rows = len(batch["advantages"])
    for row in torch.nonzero(batch["wrong_scored"]).flatten().tolist():
        assert "the answer is none" in prompts[rows + row]


def test_a_wrong_reference_that_does_not_fit_into_the_model_is_left_out(tmp_path):
    data = Dataset.from_dict(
        {"prompt": ["a"] * 8, "privileged_context": ["b"] * 8, "wrong": ["short", "long" * 200] * 4}
    )
    built = build(
        tmp_path, credit="rlsd_contrast", contrast_column="wrong", data=data, per_device_train_batch_size=8,
        num_generations=4, shuffle_dataset=False, reward=lambda completions, **c: [float(i % 2) for i in range(8)],
    )  # fmt: skip
    (batch,), _ = scored(built)
    assert sorted(batch["wrong_scored"].tolist()) == [False] * 4 + [True] * 4


def test_lambda_zero_reads_no_reference_at_all(tmp_path):
    built = build(tmp_path, credit="rlsd_contrast", rlsd_lambda=0.0)
    batches, prompts = scored(built)
    assert batches == prompts == []


# ---------------------------------------------------------------------- bad input


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="num_generations=1 leaves none"):
        config(tmp_path, credit="rlcsd", num_generations=1)
    with pytest.raises(ValueError, match="contrast_fallback='drop'"):
        config(tmp_path, contrast_fallback="drop")
    with pytest.raises(ValueError, match="contrast_reference='answers'"):
        config(tmp_path, contrast_reference="answers")
    with pytest.raises(ValueError, match="credit_mean_one=True"):
        config(tmp_path, credit="opsd", credit_mean_one=True)
    not_with_a_gate = dict(
        contrast_fallback="grpo", credit_mean_one=True, credit_span="thinking", rlsd_negative_only=True
    )
    for name, value in not_with_a_gate.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} does not go with credit='rlsd_gate', a gate"):
            config(tmp_path, **{"credit": "rlsd_gate", "contrast_fallback": "one_sided", name: value})
    for credit in ("rlrt", "opsd", "contrast_additive"):
        with pytest.raises(ValueError, match="rlsd_negative_only=True is for a credit that reweights"):
            config(tmp_path, credit=credit, rlsd_negative_only=True)
    with pytest.raises(TypeError, match="leak_phrases='the reference'"):
        config(tmp_path, leak_phrases="the reference")
    with pytest.raises(ValueError, match=r"rlsd_lambda_negative=2.0 is out of range"):
        config(tmp_path, rlsd_lambda_negative=2.0)
    with pytest.raises(ValueError, match=r"no column 'nowhere' \(contrast_column\)"):
        trainer(tmp_path, credit="rlcsd", contrast_column="nowhere")
    assert config(tmp_path, contrast_column="nowhere").contrast_column == "nowhere"


def test_right_counts_what_a_reward_could_judge():
    rewards = torch.tensor([[1.0], [0.0], [math.nan], [0.6]])
    wrong = is_wrong(rewards, torch.ones(1), 0.5)
    assert right_metric(rewards, wrong) == {"right": (2, 3)}
