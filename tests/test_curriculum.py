"""Difficulty: order, shares, and stages that follow the reward of a real training run."""

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_on_two_ranks, tiny_llama, trainer
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.data.curriculum import Curriculum, Layout, Progress, Stage, mix, order_by_difficulty


ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Accelerate collects garbage whenever training begins: half a second among all that torch has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def rated(rates):
    return Dataset.from_dict({"row": list(range(len(rates))), "pass_rate": rates})


# ---------------------------------------------------------------------- order and shares


def test_the_easiest_come_first_or_last():
    rows = rated([0.5, 1.0, 0.0, 0.75])
    assert order_by_difficulty(rows)["row"] == [1, 3, 0, 2]
    assert order_by_difficulty(rows, easiest_first=False)["row"] == [2, 0, 3, 1]
    levels = rows.rename_column("pass_rate", "level")
    assert order_by_difficulty(levels, "level", high_is_easy=False)["row"] == [2, 0, 3, 1]
    assert order_by_difficulty(levels, "level", high_is_easy=False, easiest_first=False)["row"] == [1, 3, 0, 2]


def test_rows_of_one_bucket_are_shuffled_and_buckets_are_not():
    rows = rated([i / 40 for i in range(40)])
    ordered = order_by_difficulty(rows, edges=[0.25, 0.5])["row"]
    assert [set(ordered[:20]), set(ordered[20:30]), set(ordered[30:])] == [
        set(range(20, 40)), set(range(10, 20)), set(range(10))
    ]  # fmt: skip
    assert ordered[:20] != sorted(ordered[:20], reverse=True)
    assert order_by_difficulty(rows, edges=[0.25, 0.5])["row"] == ordered
    assert order_by_difficulty(rows, edges=[0.25, 0.5], seed=1)["row"] != ordered


def test_each_bucket_has_its_share_and_no_row_repeats():
    rows = rated([0.0] * 10 + [0.5] * 30 + [1.0] * 20)
    mixed = mix(rows, edges=[0.1, 0.9], weights=[0, 2, 1])
    assert Counter(mixed["pass_rate"]) == {0.5: 30, 1.0: 15}
    assert len(set(mixed["row"])) == 45
    assert mixed["pass_rate"] != sorted(mixed["pass_rate"])
    assert mix(rows, edges=[0.1, 0.9], weights=[0, 2, 1])["row"] == mixed["row"]
    assert mix(rows, edges=[0.1, 0.9], weights=[0, 2, 1], seed=1)["row"] != mixed["row"]


def test_a_larger_size_repeats_rows_evenly():
    mixed = mix(rated([0.0] * 4 + [1.0] * 4), edges=[0.5], weights=[3, 1], size=20)
    counts = Counter(mixed["row"])
    assert sorted(counts[row] for row in range(4)) == [3, 4, 4, 4]
    assert sorted(counts[row] for row in range(4, 8)) == [1, 1, 1, 2]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.none() | st.integers(0, 50),
)  # fmt: skip
def test_shares_are_right_to_one_row(sizes, weights, size):
    weights = [weight + (k == 0) for k, weight in enumerate(weights[: len(sizes)])]
    rows = rated([float(k) for k, count in enumerate(sizes) for _ in range(count)])
    mixed = mix(rows, edges=[k + 0.5 for k in range(len(sizes) - 1)], weights=weights, size=size)
    counts = Counter(mixed["pass_rate"])
    if size is None:
        assert set(Counter(mixed["row"]).values()) <= {1}
    else:
        assert len(mixed) == size
    for k, weight in enumerate(weights):
        assert abs(counts[float(k)] - weight / sum(weights) * len(mixed)) < 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda rows: order_by_difficulty(rows, "level"), "no column 'level'.*'row', 'pass_rate'"),
        (lambda rows: order_by_difficulty(rows.add_column("t", ["x"] * 4), "t"), "'t'.*must hold numbers"),
        (lambda rows: order_by_difficulty(rated([0.5, None, float("nan")])), "no value in 2 of 3 rows.*filter"),
        (lambda rows: order_by_difficulty(rows, edges=[0.5, 0.5]), "edges=.*must be ascending"),
        (lambda rows: mix(rows, edges=[0.5], weights=[1]), "1 edges make 2 buckets"),
        (lambda rows: mix(rows, edges=[0.5], weights=[0, 0]), "not all 0"),
        (lambda rows: mix(rows, edges=[0.5], weights=[2, -1]), "none negative"),
        (lambda rows: mix(rows, edges=[-1], weights=[1, 1]), r"weights\[0\]=1, but no row's 'pass_rate'"),
        (lambda rows: Curriculum([]), "a curriculum needs a stage"),
        (lambda rows: Curriculum([Stage(until=0.5), Stage()], window=0), "window=0"),
        (lambda rows: Curriculum([Stage(), Stage()]), "Stage 1 of 2, .* has no end"),
        (lambda rows: Curriculum([Stage(until=0.5)]), "Stage 1 of 1, .* nothing follows it"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(rated([0.0, 0.25, 0.5, 1.0]))


# ---------------------------------------------------------------------- when a stage ends

ONE_BY_ONE = Layout(prompts=1, repeats=4, uses=1, accumulation=1, generations=100, ahead=1)
TWO = (Stage(until=0.5), Stage())


def starts(rewards, stages=TWO, window=2, layout=ONE_BY_ONE):
    progress = Progress()
    for step, reward in rewards:
        progress = progress.after(step, reward, stages, window, layout)
    return progress.starts


def test_a_stage_ends_when_the_mean_of_a_whole_window_reaches_its_reward():
    assert starts([(1, 0.9)]) == (0,), "the window is not full"
    assert starts([(1, 0.9), (2, 0.0)]) == (0,)
    assert starts([(1, 0.9), (2, 0.1)]) == (0, 3), "the generation after step 2 was drawn already"
    assert starts([(1, 0.0), (2, 0.4), (3, 0.5)]) == (0,)
    assert starts([(1, 0.0), (2, 0.4), (3, 0.6)]) == (0, 4)
    assert starts([(1, 0.9), (2, float("nan")), (3, 0.9)]) == (0, 4), "a log without a verdict does not count"


def test_the_reward_of_a_stage_is_not_that_of_the_stage_before():
    three = (Stage(until=0.5), Stage(until=0.5), Stage())
    ends_at_2 = [(1, 1.0), (2, 1.0)]
    assert starts([*ends_at_2, (3, 1.0)], three) == (0, 3), "step 3 still trains on the first stage"
    assert starts([*ends_at_2, (3, 1.0), (4, 1.0)], three) == (0, 3)
    assert starts([*ends_at_2, (3, 1.0), (4, 1.0), (5, 1.0)], three) == (0, 3, 6)
    assert starts([*ends_at_2, (4, 1.0), (5, 1.0)], three) == (0, 3), "the log of steps 3 and 4 is of both"
    assert starts([*ends_at_2, (4, 1.0), (5, 1.0), (6, 1.0)], three) == (0, 3, 7)


def test_a_stage_that_is_never_learned_ends_after_its_steps():
    three = (Stage(until=0.5, max_steps=3), Stage(max_steps=2), Stage())
    assert starts([(step, 0.0) for step in range(1, 3)], three) == (0,)
    assert starts([(step, 0.0) for step in range(1, 4)], three) == (0, 4)
    assert starts([(step, 0.0) for step in range(1, 7)], three) == (0, 4, 7), "steps 5 and 6 are of the second stage"


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 40)
)  # fmt: skip
def test_a_stage_begins_behind_what_is_drawn_and_at_the_next_generation(n, uses, accumulation, generations, ahead, t):
    """Against the trainer's loop, written out: micro-batches of an epoch in steps, the last one short."""
    layout = Layout(n, 4, uses, accumulation, generations, ahead)
    done, left = 0, generations * uses
    for _ in range(t):
        taken = min(accumulation, left)
        done, left = done + taken, left - taken or generations * uses
    assert layout.micro_batches(t) == done
    assert (layout.next_free(t) - 1) * uses < done + ahead <= layout.next_free(t) * uses


# ---------------------------------------------------------------------- in training


class Seen:
    """The rows of each generation, by the step that it was made in; the reward of easy rows is high."""

    __name__ = "seen"

    def __init__(self):
        self.rows, self.high = [], 0.9

    def __call__(self, completions, row, pass_rate, trainer_state, **columns):
        self.rows.append((trainer_state.global_step, list(row)))
        return [self.high if rate >= 0.5 else 0.1 for rate in pass_rate]


def data(rows=12):
    """The first half is easy."""
    return Dataset.from_dict(
        {
            "prompt": [f"{i} + {i} = ?" for i in range(rows)],
            "privileged_context": [str(2 * i) for i in range(rows)],
            "row": list(range(rows)),
            "pass_rate": [1 - i / rows for i in range(1, rows + 1)],
        }
    )


STAGES = (Stage(at_least=0.5, until=0.8), Stage(below=0.5))


def run(folder, *, curriculum=None, rows=12, resume=None, **options):
    seen = Seen()
    curriculum = curriculum or Curriculum(STAGES, window=2)
    defaults = dict(max_steps=7, max_completion_length=2, num_generations=2, per_device_train_batch_size=2)
    built = trainer(folder, data=data(rows), reward=seen, callbacks=[curriculum], **{**defaults, **options})
    built.train(resume_from_checkpoint=resume)
    return seen.rows, curriculum


def in_groups(rows, size=2):
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    assert all(len(set(group)) == 1 for group in groups), "one prompt's completions belong together"
    return [group[0] for group in groups]


def test_the_reward_moves_training_to_the_next_stage(tmp_path):
    seen, curriculum = run(tmp_path)
    rows = [in_groups(rows)[0] for _, rows in seen]
    assert [step for step, _ in seen] == list(range(7))
    assert [row < 6 for row in rows] == [True] * 3 + [False] * 4, "two logs, and the generation that was drawn"
    assert len(set(rows)) == 7, "no row comes twice before all have come"
    assert rows != sorted(rows)
    assert curriculum.stage == 1


def test_without_the_reward_it_stays(tmp_path):
    stages = (replace(STAGES[0], until=0.95), STAGES[1])
    seen, curriculum = run(tmp_path, curriculum=Curriculum(stages, window=2))
    assert all(row < 6 for _, rows in seen for row in rows)
    assert curriculum.stage == 0


def test_another_metric_can_decide(tmp_path):
    curriculum = Curriculum(STAGES, window=2, metric="rewards/seen/mean")
    assert run(tmp_path, curriculum=curriculum)[1].stage == 1


def test_a_metric_that_is_not_logged_is_refused_at_the_first_log(tmp_path):
    seen = Seen()
    curriculum = Curriculum((replace(STAGES[0], max_steps=3), STAGES[1]), metric="rewards/sen/mean")
    built = trainer(tmp_path, data=data(), reward=seen, callbacks=[curriculum], max_steps=7, max_completion_length=2)
    with pytest.raises(ValueError, match=r"metric='rewards/sen/mean'.*'reward'.*'rewards/seen/mean'") as error:
        built.train()
    assert "loss" not in str(error.value)
    assert built.state.global_step == 1


def reading(curriculum, layout=ONE_BY_ONE):
    """The stage after each of a list of logs."""
    curriculum._progress, curriculum._sampler = Progress(), SimpleNamespace(starts=(0,), layout=layout)

    def after(logs):
        for step, entry in logs:
            curriculum.on_log(None, SimpleNamespace(global_step=step), None, logs=entry)
        return curriculum.stage

    return after


def test_steps_end_a_stage_also_where_the_metric_is_logged_but_sometimes():
    curriculum = Curriculum([Stage(until=0.5, max_steps=3), Stage()], metric="own")
    after = reading(curriculum)
    assert after([(1, {"reward": 0.0, "own": 0.0}), (2, {"reward": 0.0})]) == 0
    assert after([(3, {"eval_reward": 1.0}), (3, {"train_loss": 0.0})]) == 0, "these are not of training steps"
    assert after([(3, {"reward": 0.0})]) == 1


def test_without_shuffling_the_datasets_order_stays(tmp_path):
    seen, _ = run(tmp_path, shuffle_dataset=False)
    assert [in_groups(rows)[0] for _, rows in seen] == [0, 1, 2, 6, 7, 8, 9]


def test_a_pass_over_a_stage_is_followed_by_another_in_another_order(tmp_path):
    stages = (Stage(at_least=0.5, max_steps=100), Stage())
    seen, _ = run(tmp_path, curriculum=Curriculum(stages), rows=8, max_steps=12)
    rows = [in_groups(rows)[0] for _, rows in seen]
    passes = [rows[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]
    other, _ = run(tmp_path, curriculum=Curriculum(stages, seed=9), rows=8, max_steps=12)
    assert [in_groups(rows)[0] for _, rows in other] != rows


LAYOUTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "two generations a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "short last steps": {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "rows": 5, "max_steps": 8},
    "used again": {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 12},
    "many steps": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "rows": 16, "max_steps": 12},
    "epochs": {"rows": 4, "max_steps": 10},
    "workers": {"dataloader_num_workers": 1, "max_steps": 9},
    "one process of many rows": {"per_device_train_batch_size": 6},
    "streaks": {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "rows": 8},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_stages_and_resumed_runs_are_right_in_every_layout(tmp_path, name):
    options = {"credit": "grpo", **LAYOUTS[name]}
    straight, curriculum = run(tmp_path, save_strategy="steps", save_steps=1, **options)
    half = options.get("rows", 12) / 2 - 1
    stages = []
    for _, rows in straight:
        hard = {row > half for row in in_groups(rows)}
        assert len(hard) == 1, "a generation is of one stage"
        stages.append(hard.pop())
    assert stages == sorted(stages)
    assert set(stages) == {False, True}
    assert curriculum.stage == 1
    steps = options.get("max_steps", 7)
    for step in (1, 3, steps - 2):
        resumed, again = run(tmp_path / "resumed", resume=str(tmp_path / f"checkpoint-{step}"), **options)
        assert again.stage == 1
        assert resumed, "something was generated after this checkpoint"
        assert resumed == straight[-len(resumed) :]
        assert resumed[0][0] >= step
        assert len([one for one in straight if one[0] >= step]) == len(resumed)


def test_a_second_run_of_a_trainer_begins_anew(tmp_path):
    seen, curriculum = Seen(), Curriculum(STAGES, window=2)
    options = dict(max_steps=5, max_completion_length=2, num_generations=2, per_device_train_batch_size=2)
    built = trainer(tmp_path, data=data(), reward=seen, callbacks=[curriculum], **options)
    built.train()
    first, seen.rows, seen.high = seen.rows, [], 0.2
    built.train()
    assert seen.rows[:3] == first[:3]
    assert curriculum.stage == 0
    assert all(row < 6 for _, rows in seen.rows for row in rows)


def test_the_curriculum_changes_nothing_but_the_rows(tmp_path):
    """The same rows in the same order, drawn by TRL's own sampler, give the same weights."""
    weights, seen = [], []
    for callbacks in ([], [Curriculum([Stage()])]):
        rewards = Seen()
        options = dict(max_steps=3, shuffle_dataset=False, gradient_accumulation_steps=2, num_iterations=2)
        built = trainer(tmp_path, model=tiny_llama(), data=data(), reward=rewards, callbacks=callbacks, **options)
        built.train()
        seen.append(rewards.rows)
        weights.append(torch.cat([p.detach().flatten() for p in built.model.parameters()]))
    assert seen[0] == seen[1]
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "curriculum, options, message",
    [
        (Curriculum([Stage()], column="level"), {}, "no column 'level'"),
        (Curriculum([Stage(at_least=2.0, until=1.0), Stage()]), {}, "Stage 1 of 2, .* holds no row.*from 0 to 0.9"),
        (Curriculum([Stage()]), {"ignore_data_skip": True}, "ignore_data_skip=True"),
        (Curriculum([Stage()]), {"logging_strategy": "no"}, "logging_strategy='no'"),
        (Curriculum([Stage()]), {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2},
         "save_steps=3 is no multiple of logging_steps=2"),
        (Curriculum([Stage()]), {"save_strategy": "steps", "save_steps": 0.3, "logging_steps": 2, "max_steps": 10},
         "save_steps=3 is no multiple of logging_steps=2"),
        (Curriculum([Stage()]), {"per_device_train_batch_size": 26}, "12 rows, fewer than the 13 prompts"),
        (Curriculum([Stage()]), {"remove_unused_columns": True}, "no column 'pass_rate'.*remove_unused_columns=False"),
    ],
)  # fmt: skip
def test_what_a_curriculum_cannot_follow_is_refused_when_training_begins(tmp_path, curriculum, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, curriculum=curriculum, **options)


def test_checkpoints_that_fall_on_logs_are_accepted(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", logging_steps=2)
    assert run(tmp_path, save_steps=4, **options)[0]
    assert run(tmp_path, **{**options, "save_strategy": "no", "save_steps": 3})[0], "nothing is saved between logs"


def test_a_stream_has_no_rows_to_choose_from(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(data().to_list()))
    built = trainer(tmp_path, data=stream, reward=Seen(), callbacks=[Curriculum([Stage()])])
    with pytest.raises(ValueError, match=r"must be a datasets\.Dataset \(it is a IterableDataset"):
        built.train()


SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_curriculum import *
import torch.distributed as dist

# two processes share the completions of a prompt
options = dict(num_generations=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, credit="grpo")
straight, curriculum = run("out", save_strategy="steps", save_steps=1, **options)
resumed = [run("again", resume=f"out/checkpoint-{{step}}", **options)[0] for step in (3,)]
torch.save((straight, resumed, curriculum.stage), f"rank{{dist.get_rank()}}.pt")
"""


@pytest.mark.slow
def test_two_processes_draw_the_same_groups_also_when_resumed(tmp_path):
    straight, resumed, stages = zip(*run_on_two_ranks(tmp_path, SCRIPT), strict=True)
    assert stages == (1, 1)
    for (step, first), (_, second) in zip(*straight, strict=True):
        groups = np.reshape(first + second, (-1, 4))
        assert (groups == groups[:, :1]).all()
        assert len(groups) == 2
        assert {row < 6 for row in first + second} == {step < 3}
    for own, runs in zip(straight, resumed, strict=True):
        for again in runs:
            assert again == own[-len(again) :]
