"""The lab: the task's labels, oracle and control, measuring without disturbing, comparisons that go on."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same, byte_reward, config, dataset, trainer, weights
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_rlsd import RLSDConfig, register_credit
from trl_rlsd.credit import get_credit, token_advantages
from trl_rlsd.lab import compare, configs, start
from trl_rlsd.lab.builtin import builtin_settings, run_builtin, with_other
from trl_rlsd.lab.compare import Run, begin, compare_builtin, finish, unfinished
from trl_rlsd.lab.configs import load_configs
from trl_rlsd.lab.measure import MeasureCallback, read_curve
from trl_rlsd.lab.start import END, PAD, Corpus, character_tokenizer, start_model
from trl_rlsd.lab.task import (
    CITE,
    TEMPLATE,
    ChainTask,
    after_filler,
    chain_reward,
    labels,
    problem_of,
    prompt_of,
    results_of,
    solve,
    walk,
)
from trl_rlsd.lab.trainer import LabTrainer, Localisation


ROOT = Path(__file__).parent.parent


TASKS = [
    ChainTask(),
    ChainTask(chain_length=3, filler_share=0.0, side_computations=2),
    ChainTask(chain_length=2, filler_share=0.5),
    ChainTask(chain_length=3, side_computations=2, hard_side_share=0.5, operands=3),
]
PROMPT, RIGHT = "9A-6B*9C+8D+1=", "A9-6=3mB3*9=7C7+8=5lk5*2>0D5+1=6#6"


def perfect(task, prompt, rng):
    """A completion without a mistake, with the task's filler."""
    (value, *operands), operators = problem_of(prompt)
    text = ""
    for step, right in enumerate(solve(problem_of(prompt))):
        text += f"{'ABCDEFGH'[step]}{value}{operators[step]}{operands[step]}={right}{task.filler(rng)}"
        value = right
    return f"{text}{task.side(rng, task.side_computations * task.chain_length)}#{value}"


# ---------------------------------------------------------------- the task


@pytest.mark.parametrize("task", TASKS)
def test_a_completion_without_a_mistake_has_no_wrong_token_and_the_reward(task):
    rng = random.Random(0)
    for row in task.problems(20, "train"):
        text = perfect(task, row["prompt"], rng)
        decisive, wrong = walk(row["prompt"], text)
        assert wrong is None
        results = row["privileged_context"][1::2]
        assert "".join(text[i] for i in decisive) == results + row["answer"]
        assert chain_reward([text], [row["answer"]]) == [1.0]
        assert results_of(text) == row["privileged_context"]


@pytest.mark.parametrize("task", TASKS)
def test_the_first_change_outside_of_filler_is_the_first_wrong_token(task):
    rng = random.Random(1)
    for row in task.problems(10, "train"):
        text = perfect(task, row["prompt"], rng)
        filler = {i for at in range(len(text)) for i in range(at, after_filler(text, at)) if text[at].islower()}
        for at in sorted(set(range(len(text))) - filler):
            assert walk(row["prompt"], text[:at] + "<" + text[at + 1 :])[1] == at
        for at in filler:
            if text[at].isdigit():
                other = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
                assert walk(row["prompt"], other) == walk(row["prompt"], text)


def test_each_kind_of_mistake_is_found_where_it_is():
    assert walk(PROMPT, RIGHT) == ([5, 12, 18, 31, 33], None)
    second = RIGHT.replace("B3*9=7", "B3*9=8").replace("C7+8=5", "C8+8=6").replace("5D5+1=6#6", "5D6+1=7#7")
    assert walk(PROMPT, second.replace("lk5*2>0D5", "lk5*2>0D6"))[1] == 12  # what follows from it is right in itself
    assert walk(PROMPT, RIGHT.replace("C7", "C6"))[1] == 14  # an operand that is not the last result
    assert walk(PROMPT, RIGHT.replace("+1=6#6", "+1=6#7"))[1] == 33
    assert walk(PROMPT, RIGHT + "x")[1] == len(RIGHT)
    assert walk(PROMPT, "A9-6=3" + CITE + "#6")[1] == 6
    assert walk(PROMPT, RIGHT[:9], ended=True)[1] == 9  # the end is the wrong token
    assert walk(PROMPT, RIGHT[:9], ended=False)[1] is None  # cut off: no token of its own is wrong
    for cut in range(RIGHT.index("D")):
        assert walk(PROMPT, RIGHT[:cut], ended=False)[1] is None
        assert walk(PROMPT, RIGHT[:cut], ended=True)[1] == cut


def test_labels_lie_on_tokens():
    tokenizer = character_tokenizer()
    ids = tokenizer([RIGHT + END, "A9-6=4" + END], padding=True, padding_side="right", return_tensors="pt").input_ids
    named = labels([PROMPT, PROMPT], [RIGHT, "A9-6=4"], [True, True], ids.size(1))
    assert tokenizer.decode(ids[0][named["decisive"][0]]) == "37566"
    assert not named["first_wrong"][0].any()
    assert named["first_wrong"][1].nonzero().flatten().tolist() == [5]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == RIGHT


def test_splits_hold_different_problems_and_are_the_same_every_time():
    task = ChainTask(chain_length=2)
    splits = {name: task.problems(200, name)["prompt"] for name in ("train", "validation", "test")}
    assert not set(splits["train"]) & (set(splits["validation"]) | set(splits["test"]))
    assert not set(splits["validation"]) & set(splits["test"])
    assert ChainTask(chain_length=2).problems(200, "train")["prompt"] == splits["train"]
    assert ChainTask(chain_length=2, seed=1).problems(200, "train")["prompt"] != splits["train"]
    assert all(prompt_of(problem_of(prompt)) == prompt for prompt in splits["train"])
    with pytest.raises(ValueError, match="'dev' is not one of 'test', 'validation', 'train'"):
        task.problems(1, "dev")


@pytest.mark.parametrize("base", [0.2, 0.33, 0.7])
def test_the_share_of_hard_facts_gives_the_base_accuracy(base):
    task = ChainTask(base_accuracy=base)
    share = len(task.hard) / 300
    assert abs((1 - 0.75 * share) ** 4 - base) < 4 * 0.75 / 300  # facts are whole
    assert all(task.hard[fact] != solve(([fact[0], fact[2]], [fact[1]]))[0] for fact in task.hard)


def test_the_corpus_keeps_to_the_form_and_within_the_length():
    for task in TASKS:
        for seed in range(100):
            prompt, text = task.write(random.Random(seed))
            assert len(text) < task.max_completion_length
            at = walk(prompt.split(">")[-1], text)[1]
            assert at is None or text[at].isdigit() or text[at] == CITE


def test_side_computations_can_be_drawn_from_the_hard_facts_alone():
    rng, facts = random.Random(0), {}
    for share in (0.0, 1.0):
        task = ChainTask(side_computations=2, hard_side_share=share)
        written = re.findall(r"[a-z](\d)([-+*])(\d)>", task.side(rng, 500))
        facts[share] = [(int(a), op, int(b)) in task.hard for a, op, b in written]
    assert len(facts[1.0]) == 500
    assert all(facts[1.0])
    assert 0.1 < sum(facts[0.0]) / 500 < 0.6


def test_few_operands_make_few_facts():
    task = ChainTask(chain_length=3, side_computations=2, operands=3)
    written = [task.write(random.Random(seed))[1] for seed in range(200)]
    facts = {(int(a), op, int(b)) for text in written for a, op, b in re.findall(r"(\d)([-+*])(\d)[=>]", text)}
    assert {b for _, _, b in facts} == {0, 1, 2}
    assert len(facts) == 90, "all of them are met"
    assert set(task.hard) < facts


def test_a_curriculum_leads_to_the_tasks_own_side_computations():
    task = ChainTask(side_computations=4)
    early = [task.write(random.Random(seed), progress=0.0)[1] for seed in range(50)]
    late = [task.write(random.Random(seed), progress=1.0)[1] for seed in range(50)]
    assert max(text.count(">") for text in early) == 4, "one a step at most"
    assert any(text.count(">") == 16 for text in late)


def test_texts_survive_the_tokenizer_and_the_loss_is_on_completions():
    tokenizer = character_tokenizer()
    corpus = Corpus(ChainTask(), tokenizer, 4)
    batch = corpus.collate(list(corpus))
    for ids, target in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids[target != -100])
        assert text.endswith(END)
        assert "=" not in tokenizer.decode(ids[target == -100]).rstrip(PAD)[:-1]
    assert all(len(tokenizer(text)["input_ids"]) == len(text) for text in (PROMPT, RIGHT))


@pytest.mark.parametrize(
    "field, value",
    [
        ("chain_length", 9),
        ("filler_share", 1.0),
        ("side_computations", -1),
        ("hard_side_share", 1.5),
        ("operands", 0),
        ("base_accuracy", 0.0),
    ],
)
def test_a_tasks_ranges_are_told(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} is out of range"):
        ChainTask(**{field: value})


def test_a_task_needs_problems_enough_to_keep_splits_apart():
    with pytest.raises(ValueError, match="chain_length=2 and operands=3 leave 810 problems, too few"):
        ChainTask(chain_length=2, operands=3)
    task = ChainTask(chain_length=3, operands=3)  # 7,290 of them
    train, test = (set(task.problems(2000, split)["prompt"]) for split in ("train", "test"))
    assert not train & test
    assert len(train) > 1000


# ---------------------------------------------------------------- credit and localisation


def batch():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    student, teacher = -torch.rand(3, 6), -torch.rand(3, 6)
    decisive = torch.zeros(3, 6, dtype=torch.bool)
    first_wrong = decisive.clone()
    decisive[0, [1, 4]], first_wrong[1, 2] = True, True
    return torch.tensor([1.0, -0.5, -0.5]), student, teacher, mask, {"decisive": decisive, "first_wrong": first_wrong}


def credited(name, lam, **options):
    advantages, student, teacher, mask, named = batch()
    named = named if get_credit(name).reads else {}
    knobs = {"lam": lam, "clip_range": 10.0, "negative_only": False, **named, **options}
    return token_advantages(get_credit(name), advantages, student, teacher, mask, **knobs)


def test_the_oracle_pays_what_decided_and_blames_the_first_wrong_token():
    grpo = credited("grpo", 1.0)
    assert torch.equal(credited("oracle", 0.0), grpo)
    full = credited("oracle", 1.0)
    assert full[0].tolist() == [0, 1, 0, 0, 1, 0]
    assert full[1].tolist() == [0, 0, -0.5, 0, 0, 0]
    assert torch.equal(full[2], grpo[2]), "a row without labels stays with GRPO"
    torch.testing.assert_close(credited("oracle", 0.9), 0.1 * grpo + 0.9 * full)


def test_the_control_deals_out_the_same_weights_within_each_completion():
    plain, shuffled = credited("rlsd", 1.0), credited("rlsd_shuffled", 1.0)
    torch.testing.assert_close(plain.sort(dim=1).values, shuffled.sort(dim=1).values)
    assert not torch.equal(plain, shuffled)
    assert torch.equal(shuffled == 0, plain == 0), "pads stay pads"
    assert torch.equal(shuffled, credited("rlsd_shuffled", 1.0))
    state = torch.random.get_rng_state()
    credited("rlsd_shuffled", 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_wrong_reference_of_the_lab_is_another_problems():
    problems = TASK.problems(3, "train")
    assert with_other(problems, None) is problems
    references = problems["privileged_context"]
    assert with_other(problems, "other")["other"] == [references[2], references[0], references[1]]


def test_localisation_of_even_credit_is_chance_and_of_the_oracle_all():
    advantages, *_, mask, named = batch()
    row = slice(1, 2)
    for name, lam, auc, share in (("grpo", 0.0, 0.5, 1 / 6), ("oracle", 1.0, 1.0, 1.0)):
        place = Localisation()
        assert place.result() is None
        place.add(credited(name, lam)[row], mask[row].bool(), named["first_wrong"][row])
        expected = {"rows": 1, "auc": auc, "share": share, "uniform_share": 1 / 6}
        assert place.result() == pytest.approx(expected, abs=1e-6)


def test_localisation_ranks_blame_not_size():
    place = Localisation()
    first_wrong = torch.tensor([[False, True, False, False]])
    # praise, however much, is no blame; two of three others have less blame
    place.add(torch.tensor([[5.0, -1.0, -2.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool), first_wrong)
    assert place.result() == pytest.approx({"rows": 1, "auc": 2 / 3, "share": 1 / 3, "uniform_share": 0.25})


# ---------------------------------------------------------------- labels through the trainer


@register_credit("reads_labels", teacher_rows="none", reads=("mine",))
def reads_labels_credit(advantages, student_logps, teacher_logps, mask, *, mine, **knobs):
    return advantages.unsqueeze(1) * mine


def test_a_credit_function_gets_the_labels_that_it_reads_and_an_error_without_them(tmp_path):
    with pytest.raises(ValueError, match=r"'reads_labels' reads the token labels 'mine'.*token_labels"):
        trainer(tmp_path, credit="reads_labels").train()
    seen = []
    for liger in (False, True):
        built = trainer(tmp_path, credit="reads_labels", use_liger_loss=liger, max_steps=1)
        built.token_labels = lambda batch, rows: {"mine": torch.arange(32.0).view(4, 8)[: len(rows)]}
        built.observe_credit = lambda batch, logps, credit: seen.append(
            (batch["advantages"].clone(), batch["mine"].clone(), credit.clone(), batch["completion_mask"])
        )
        built.train()
    assert len(seen) == 2
    for advantages, mine, credit, mask in seen:  # rows were shuffled, each with its own labels
        torch.testing.assert_close(credit, advantages.unsqueeze(1) * mine * mask)
        assert set(mine[:, 0].tolist()) == {0.0, 8.0, 16.0, 24.0}


def test_grpo_is_observed_as_one_advantage_a_row(tmp_path):
    built, shapes = trainer(tmp_path, credit="grpo", max_steps=1), []
    built.observe_credit = lambda batch, logps, credit: shapes.append((credit.shape, logps.shape))
    built.train()
    assert shapes == [((4,), (4, 8))]


# ---------------------------------------------------------------- measuring


def measured(tmp_path, every, **options):
    """A run of four steps, with its measurements."""
    callbacks = [MeasureCallback(tmp_path / "curve.jsonl", every)] if every else []
    built = trainer(
        tmp_path,
        callbacks=callbacks,
        eval_dataset=dataset(6),
        per_device_eval_batch_size=4,
        num_generations_eval=1,
        contrast_reward_below=3.0,
        **{"max_steps": 4, **options},
    )
    for callback in callbacks:
        callback.trainer = built
    return built


def test_measuring_changes_nothing_of_the_training(tmp_path):
    (tmp_path / "b").mkdir()
    plain = measured(tmp_path / "a", 0)
    plain.train()
    watched = measured(tmp_path / "b", 1)
    watched.train()
    assert_same(weights(plain.model), weights(watched.model))
    rewards = [[log["reward"] for log in run.state.log_history if "reward" in log] for run in (plain, watched)]
    assert rewards[0] == rewards[1]
    assert len(rewards[1]) == 4, "every step is logged"
    assert not any("eval_reward" in log for log in watched.state.log_history)


def test_a_measurement_is_the_share_of_right_completions(tmp_path):
    built = measured(tmp_path, 2)
    seen = []
    sampled = []

    def watched(completions, **columns):
        seen.append(completions)
        sampled.append(built.generation_config.do_sample)
        return byte_reward(completions)

    built.reward_funcs[0] = watched
    built.train()
    assert sampled[:5] == [True, True, False, False, True], "before training: sampled, greedy; then training samples"
    curve = read_curve(tmp_path / "curve.jsonl")
    assert [point["step"] for point in curve] == [0, 2, 4]
    right = sum(value >= 3 for texts in seen[:2] for value in byte_reward(texts))  # two batches: four rows and two
    assert curve[0]["sampled"] == pytest.approx(right / 6)
    greedy = sum(value >= 3 for texts in seen[2:4] for value in byte_reward(texts))
    assert curve[0]["greedy"] == pytest.approx(greedy / 6)
    assert curve[0]["leak"] == 0.0
    assert 0 < curve[0]["length"] <= 8
    assert curve[0]["entropy"] > 0


def test_a_resumed_run_keeps_the_measurements_up_to_its_checkpoint(tmp_path):
    whole = measured(tmp_path, 1, save_strategy="steps", save_steps=2)
    whole.train()
    before = read_curve(tmp_path / "curve.jsonl")
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"step": 5, "samp')  # the line that a kill cut off
    resumed = measured(tmp_path, 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert read_curve(tmp_path / "curve.jsonl") == before


# ---------------------------------------------------------------- comparing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(start.RECIPE, "hidden_size", 32)
    return tmp_path


SMALL = dict(steps=2, every=1, problems=2, generations=4, held_out=8)
TASK = ChainTask(chain_length=2)


def test_the_start_is_made_once_and_trains(cache):
    folder = start_model(TASK, 30)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert start_model(TASK, 30) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert start_model(TASK, 31) != folder
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert model.num_parameters() < 1_000_000
    corpus = Corpus(TASK, tokenizer, 32)
    batch = corpus.collate(list(corpus))
    with torch.no_grad():
        trained, untrained = model(**batch).loss, LlamaForCausalLM(model.config)(**batch).loss
    assert trained < untrained - 0.2


def test_a_run_on_the_built_in_task_reports_all_that_a_table_needs(cache):
    folder = str(start_model(TASK, 30))
    for method in ("oracle", "rlsd_contrast", "rlsd_gate", "rlsd_shuffled"):
        settings = builtin_settings(method, TASK, **SMALL)
        result = run_builtin(settings, folder, 3, str(cache / method))
        assert (result["method"], result["seed"], result["steps"]) == (method, 3, 2)
        assert [point["step"] for point in result["curve"]] == [0, 1, 2]
        assert len(result["step_seconds"]) == len(result["rewards"]) == 2
        assert json.loads(json.dumps(result)) == result


def test_the_lab_trains_as_the_trainer_does(cache):
    """Labels and watching change nothing: LabTrainer's weights are RLSDTrainer's."""
    from trl_rlsd import RLSDTrainer

    folder, ended = start_model(TASK, 30), []
    for kind in (LabTrainer, RLSDTrainer):
        built = kind(
            LlamaForCausalLM.from_pretrained(folder),
            chain_reward,
            config(cache, max_completion_length=20, teacher_prompt_template=TEMPLATE, temperature=1.0),
            TASK.problems(16, "train"),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        )
        built.train()
        ended.append(weights(built.model))
    assert_same(*ended)


@pytest.mark.slow
def test_a_comparison_writes_table_and_picture_and_goes_on_where_it_was(cache, capsys):
    out = cache / "out"
    options = dict(task=TASK, jobs=1, pretraining_steps=30, target=0.5, **SMALL)
    text = compare_builtin(str(out), ("grpo", "rlsd"), 1, **options)
    assert "grpo" in text
    assert "rlsd" in text
    assert (out / "comparison.md").read_text() == text + "\n"
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert {entry["method"] for entry in json.loads((out / "comparison.json").read_text())} == {"grpo", "rlsd"}
    assert "[2/2]" in capsys.readouterr().out

    results = [out / method / "seed-1" / compare.RESULT for method in ("grpo", "rlsd")]
    curve = json.loads(results[1].read_text())["curve"]
    kept = results[0].stat().st_mtime_ns
    results[1].unlink()  # an interruption before the second was done
    again = compare_builtin(str(out), ("grpo", "rlsd"), 1, **options)
    assert results[0].stat().st_mtime_ns == kept
    assert json.loads(results[1].read_text())["curve"] == curve
    assert "[2/2] rlsd seed 1" in capsys.readouterr().out
    assert again.count("\n") == text.count("\n")
    with pytest.raises(ValueError, match=r"other settings \(learning_rate=0.0003, now 0.1\).*Choose another"):
        compare_builtin(str(out), ("grpo", "rlsd"), 1, **options, learning_rate=0.1)


def test_an_unknown_method_is_told_before_anything_is_trained(cache):
    with pytest.raises(ValueError, match=r"credit='grop' is not a registered.*grpo"):
        compare_builtin(str(cache / "out"), ("grpo", "grop"), 1, task=TASK)
    assert not (cache / "cache").exists()


def test_a_failed_run_costs_no_other_runs_result(tmp_path):
    runs = [Run(name, 1, {"steps": 2}, tmp_path / name) for name in ("a", "b", "c")]
    for run in runs:
        begin(run)

    def fails():
        raise FloatingPointError("it diverged")

    value = {"curve": [{"sampled": 0.1}], "settings": {}}
    results = [(runs[0], fails), (runs[1], lambda: value), (runs[2], lambda: value)]
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed; the others are kept.\na seed 1: .*it diverged"):
        finish(iter(results), 3, 0)
    assert unfinished(runs) == runs[:1]
    # the failed run may have left a checkpoint: its folder is not for a run of other settings either
    with pytest.raises(ValueError, match=r"a holds a run of other settings \(steps=2, now 3\)"):
        unfinished([Run("a", 1, {"steps": 3}, tmp_path / "a")])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ("grpo", "grpo")}, "methods has grpo more than once"),
        ({"baseline": "grop"}, "baseline='grop' is not one of the methods: grpo, rlsd"),
        ({"target": 70}, r"target=70 is out of range.*\(0, 1\]"),
        ({"seeds": 0}, "seeds=0 is out of range"),
        ({"every": 0}, "every=0 is out of range"),
        ({"steps": 0}, "steps=0 is out of range"),
        ({"held_out": 4096}, "held_out=4096 is out of range; it must be at most 2048"),
    ],
)
def test_options_are_checked_before_the_start_is_made(cache, options, message):
    with pytest.raises(ValueError, match=message):
        compare_builtin(str(cache / "out"), **{"methods": ("grpo", "rlsd"), "seeds": 1, "task": TASK, **options})
    assert not (cache / "cache").exists()


def test_the_error_of_a_run_is_the_processes_own_not_the_launchers():
    log = (
        "[rank0]: ValueError: dataset_name is not set. Give one.\n"
        "subprocess.CalledProcessError: Command '[...]' returned non-zero exit status 1.\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert configs._error(log) == "ValueError: dataset_name is not set. Give one."
    assert configs._error("Killed") == "Killed"


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_resumed(tmp_path):
    assert configs._last_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert configs._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_configs_that_cannot_be_compared_are_refused(tmp_path):
    common = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "reward_funcs": ["r"]}
    for name, fields in {"a": {}, "b": {"credit": "grpo"}, "c": {"dataset_name": "e.jsonl"}}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**common, **fields}))
    (tmp_path / "longer.yaml").write_text(json.dumps({**common, "max_steps": 9}))
    (tmp_path / "default.yaml").write_text(json.dumps({**common, "dataset_test_split": "test"}))
    longer, default = str(tmp_path / "longer.yaml"), str(tmp_path / "default.yaml")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.yaml").write_text(json.dumps(common))
    (tmp_path / "empty.yaml").write_text("")
    a, b, c, deep, empty = (str(tmp_path / f"{n}.yaml") for n in ("a", "b", "c", "deep/a", "empty"))
    assert list(load_configs([a, b, default])) == ["a", "b", "default"], "a default may be written out"
    for paths, message in (
        ([a, c], "dataset_name='e.jsonl' in c, 'd.jsonl' in a: a comparison needs the same start"),
        ([a, longer], "max_steps=9 in longer, -1 in a"),
        ([a, deep], "another config is named 'a', too"),
        ([a, str(tmp_path / "none.yaml")], "there is no such file"),
        ([empty], "holds no fields"),
    ):
        with pytest.raises(ValueError, match=message):
            load_configs(paths)


def test_lab_methods_are_ordinary_configs():
    from trl_rlsd.lab.builtin import METHODS

    for fields in METHODS.values():
        RLSDConfig("x", use_cpu=True, bf16=False, report_to=[], **fields)


KILLED = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from trl_rlsd.lab import compare
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=compare._worker)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 60)
time.sleep(60)
"""


@pytest.mark.slow
def test_runs_end_with_a_comparison_that_is_killed():
    killed = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(killed.stdout.readline())
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
