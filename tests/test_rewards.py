"""Rewards and data of the quickstart, against reasoning-gym itself."""

import inspect
import json
import re

import pytest
from conftest import dataset, trainer

from trl_rlsd.rewards import REWARDS, get_reward


pytest.importorskip("reasoning_gym")

from trl_rlsd.data.reasoning_gym import reasoning_gym_dataset
from trl_rlsd.rewards.reasoning_gym import EVALUATED, extract_answer, is_harmless, reasoning_gym_reward, score


SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_problems_are_distinct_and_the_same_for_the_same_seed():
    rows = reasoning_gym_dataset("chain_sum", 100, seed=3, **SUMS)
    questions = [row["prompt"][-1]["content"] for row in rows]
    assert len(set(questions)) == 100
    again = reasoning_gym_dataset("chain_sum", 100, seed=3, **SUMS)
    assert [row["prompt"][-1]["content"] for row in again] == questions
    other = reasoning_gym_dataset("chain_sum", 100, seed=4, **SUMS)
    assert [row["prompt"][-1]["content"] for row in other] != questions


@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic", "number_sorting", "spell_backward", "leg_counting"])
def test_the_privileged_answer_earns_the_full_reward_and_nonsense_does_not(name):
    rows = reasoning_gym_dataset(name, 4, seed=0, system_prompt="Be brief.")
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    answers, problems = rows["privileged_context"], rows["reasoning_gym"]
    for wrap in ("{}", "Let me think.\n<answer>{}</answer>"):
        texts = [wrap.format(answer) for answer in answers]
        assert reasoning_gym_reward(None, texts, reasoning_gym=problems) == [1.0] * 4
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        assert reasoning_gym_reward(None, chats, reasoning_gym=problems) == [1.0] * 4
    assert max(reasoning_gym_reward(None, ["no idea"] * 4, reasoning_gym=problems)) < 1


def test_a_task_with_many_right_answers_has_no_reference():
    rows = reasoning_gym_dataset("graph_color", 3, seed=0)
    assert rows["privileged_context"][:] == [None] * 3


def test_a_scorer_that_fails_is_not_a_wrong_answer(caplog):
    good = reasoning_gym_dataset("chain_sum", 1, **SUMS)[0]
    broken = json.dumps({**json.loads(good["reasoning_gym"]), "metadata": {"source_dataset": "nonesuch"}})
    counted = {}
    rewards = reasoning_gym_reward(
        None,
        [good["privileged_context"]] * 2,
        reasoning_gym=[good["reasoning_gym"], broken],
        log_metric=lambda name, value: counted.update({name: value}),
    )
    assert rewards == [1.0, None]
    assert counted == {"reasoning_gym_failures": 1}
    assert "reasoning_gym_reward failed on 1 of 2" in caplog.text


def test_the_scorers_that_evaluate_what_a_model_wrote_are_known():
    """What an upgrade of reasoning-gym may add."""
    import reasoning_gym.factory as factory

    evaluating = set()
    for name, (kind, _) in factory.DATASETS.items():
        source = inspect.getsource(inspect.getmodule(kind)) if name != "composite" else ""
        scorer = inspect.getsource(kind.score_answer)
        helpers = re.findall(r"self\.(\w+)\(", scorer)
        parts = [scorer, *(inspect.getsource(getattr(kind, h)) for h in helpers if hasattr(kind, h))]
        if any(
            re.search(r"\b(eval|exec|sympify)\((?!entry)|(?<!def )\b(sympy|sp)\.parse_expr\(", part) for part in parts
        ) or ("sympy_parser import parse_expr" in source and any("parse_expr(" in part for part in parts)):
            evaluating.add(name)
    assert evaluating == EVALUATED


@pytest.mark.parametrize(
    "answer, harmless",
    [
        ("2*(3+4)", True),
        ("x**2/2 + exp(x) - C", True),
        ("-sqrt(2)*x^2", True),
        ("[[0, 1], [1, 0]]", True),
        ("['A', 'B']", True),
        ("0 1\n1 0", True),
        ("_ Q _ _\n_ _ _ Q", True),
        ("open('x', 'w')", False),
        ("__import__('os').system('true')", False),
        ("x.__class__", False),
        ("[c for c in ()]", False),
        ("x + '__import__(\"os\")'", False),
        ("(lambda: 1)()", False),
        ("exit()\n1", False),
        ("exec ('1') 2", False),
        ("(" * 10**5, False),
    ],
)
def test_only_arithmetic_reaches_a_scorer_that_evaluates(answer, harmless):
    assert is_harmless(answer) is harmless


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_a_scorer_that_evaluates_sees_right_answers_and_no_program(name, tmp_path):
    entry = json.loads(reasoning_gym_dataset(name, 1, seed=1)[0]["reasoning_gym"])
    right = entry["answer"] or entry["metadata"].get("expression") or entry["metadata"]["valid_answers"][0]
    assert score(f"<answer>{right}</answer>", entry) == 1.0
    touched = tmp_path / "touched"
    assert score(f"<answer>open({str(touched)!r}, 'w')</answer>", entry) == 0.0
    assert not touched.exists()


def test_partial_credit_can_be_left_out():
    problem = reasoning_gym_dataset("gsm_symbolic", 1)[0]
    texts, columns = [problem["privileged_context"], "-99"], {"reasoning_gym": [problem["reasoning_gym"]] * 2}
    given = reasoning_gym_reward(None, texts, **columns)
    assert given[0] == 1.0
    assert 0 < given[1] < 1
    assert get_reward("reasoning_gym_reward", {"partial": False})(None, texts, **columns) == [1.0, 0.0]


def test_rows_of_another_task_are_left_to_other_rewards():
    problem = reasoning_gym_dataset("chain_sum", 1, **SUMS)[0]
    scores = reasoning_gym_reward(
        None, [problem["privileged_context"], "x"], reasoning_gym=[problem["reasoning_gym"], None]
    )
    assert scores == [1.0, None]
    assert json.loads(problem["reasoning_gym"])["metadata"]["source_dataset"] == "chain_sum"


@pytest.mark.parametrize(
    "text, reference, answer",
    [
        ("3 + 4 = 7", "7", "7"),
        ("it is -3.", "-3", "-3"),
        ("1,024 apples", "1024", "1024"),
        ("\\boxed{288}\n\nCheck: it took 3 steps.", "288", "288"),
        ("**Answer: 288** (rounded to 0 decimals)", "288", "288"),
        ("The answer is 288. That is 2 times as many.", "288", "288"),
        ("The answer is 3 + 4 = 7.", "7", "7"),
        ("Answer: $1,585.50", "1585.50", "1585.50"),
        ("The answer is unknown, 5 is a guess", "5", "5"),
        ("The answer is **Yes**.", "Yes", "Yes"),
        ("\\boxed{Yes}", "Yes", "Yes"),
        ("no number", "7", None),
        ("<answer> 5 </answer> or 6", "5", "5"),
        (" cba ", "cba", "cba"),
        ("", "cba", None),
    ],
)
def test_what_is_read_as_the_answer(text, reference, answer):
    assert extract_answer(text, reference) == answer


@pytest.mark.parametrize(
    "name, size, options, said",
    [
        ("nonesuch", 4, {}, "cannot make 'nonesuch'"),
        ("chain_sum", 4, {"digits": 3}, "cannot make 'chain_sum'.*digits"),
        ("chain_sum", 300, SUMS, "gave 200 distinct problems.*fewer than size=300"),
    ],
)
def test_what_reasoning_gym_cannot_make_is_named(name, size, options, said):
    with pytest.raises(ValueError, match=said):
        reasoning_gym_dataset(name, size, **options)


def test_rewards_are_found_by_name_and_path():
    assert get_reward("reasoning_gym_reward") is reasoning_gym_reward
    needs = {"soft_overlong_punishment": {"max_completion_len": 8, "soft_punish_cache": 4}}
    needs["cosine_scaled_reward"] = {"max_len": 8}
    assert all(callable(get_reward(name, needs.get(name))) for name in REWARDS)
    overlong = get_reward("soft_overlong_punishment", needs["soft_overlong_punishment"])
    assert overlong(completion_ids=[[1] * 4, [1] * 6, [1] * 9]) == [0.0, -0.5, -1.0]
    with pytest.raises(ValueError, match="'soft_overlong_punishment' needs the option 'soft_punish_cache'"):
        get_reward("soft_overlong_punishment", {"max_completion_len": 8})
    assert get_reward("json.dumps") is json.dumps
    for name in ("nonesuch", "json.nonesuch", "no_such_module.f"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            get_reward(name)


def test_a_rewards_needs_are_asked_before_anything_is_generated(tmp_path):
    class Needs:
        __name__ = "needs"
        required_columns = ("tests",)

        def __call__(self, **columns):
            raise AssertionError("nothing may be generated")

    with pytest.raises(ValueError, match=r"needs needs the column 'tests'.*'prompt', 'privileged_context'"):
        trainer(tmp_path, reward=Needs())

    ready = dataset().add_column("tests", ["1"] * 16)
    with pytest.raises(ValueError, match="needs the column 'tests'"):
        trainer(tmp_path, reward=Needs(), data=ready, eval_dataset=dataset())

    class Broken(Needs):
        required_columns = ()

        def check(self):
            raise RuntimeError("no sandbox here")

    with pytest.raises(RuntimeError, match="no sandbox here"):
        trainer(tmp_path, reward=[Broken()])


def test_an_option_with_fields_of_its_own_may_give_some_of_them():
    from trl_rlsd.rewards.limits import Limits

    assert get_reward("code_reward", {"limits": {"wall_seconds": 3}}).limits == Limits(wall_seconds=3)
    with pytest.raises(ValueError, match=r"Limits\.wall_seconds is -1"):
        get_reward("code_reward", {"limits": {"wall_seconds": -1}})


def test_a_type_is_no_reward_and_has_no_options():
    with pytest.raises(ValueError, match="Limits' has no option 'seconds'; it has none"):
        get_reward("trl_rlsd.rewards.limits.Limits", {"seconds": 1})
