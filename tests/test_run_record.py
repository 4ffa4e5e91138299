"""What a run leaves of itself: whole, readable after a kill, and without anything that is private."""

import json
import logging

import pytest
from conftest import byte_tokenizer, config, dataset, lora, tiny_llama, trainer

from trl_rlsd.run_record import (
    METRICS_FILE,
    PREVIOUS_FILE,
    RECORD_FILE,
    read_metrics,
    read_record,
    settings_of,
    shareable,
)


def test_a_run_says_what_it_was_and_every_log_is_a_line(tmp_path):
    own = trainer(
        tmp_path,
        peft_config=lora(),
        eval_dataset=dataset(4),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        per_device_eval_batch_size=4,
        alarm_thresholds={"clip_saturation": 0.0},
        max_steps=4,
    )
    own.train()
    record, (lines, torn) = read_record(tmp_path), read_metrics(tmp_path)
    assert torn == 0
    assert [line["step"] for line in lines if "reward" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 2, 4]
    logged = [log for log in own.state.log_history if "reward" in log]
    assert [line["reward"] for line in lines if "reward" in line] == [log["reward"] for log in logged]
    assert [line["alarm"] for line in lines if "alarm" in line] == ["clip_saturation"]
    assert "train_runtime" in lines[-1] or "train_runtime" in lines[-2]
    assert record["finished"] is True
    assert record["steps"] == 4
    assert record["peft"] == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted(["down_proj", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj"]),
    }
    assert record["dataset"] == {
        "name": None, "rows": 16, "columns": ["prompt", "privileged_context"], "eval_rows": 4
    }  # fmt: skip
    assert record["eval_completions"] == 16
    assert record["rewards"] == [{"name": "byte_reward", "weight": 1.0}]
    assert record["settings"]["rlsd_lambda"] == 0.5
    assert record["settings"]["teacher_token_budget"] == 16384
    assert record["settings"]["alarm_thresholds"] == {"clip_saturation": 0.0}
    assert {"python", "trl", "transformers", "peft", "torch"} <= set(record["versions"])


def test_neither_file_holds_rows_contexts_keys_or_places(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    own = trainer(
        tmp_path / "out",
        model=str(tmp_path / "model"),
        processing_class=None,
        hub_token="hf_abcdefghijklmnopqrstuvwxyz",
        run_name="somebody-on-a-machine",
        model_init_kwargs={"dtype": "float32", "token": "hf_abcdefghijklmnopqrstuvwxyz"},
        log_completions=True,
    )
    own.train()
    text = (tmp_path / "out" / METRICS_FILE).read_text() + (tmp_path / "out" / RECORD_FILE).read_text()
    for private in ("the answer is", "+ 1 = ?", "hf_abc", str(tmp_path), "somebody"):
        assert private not in text
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text())["base_model"] is None


@pytest.mark.parametrize(
    "value, shared",
    [
        ("/home/me/data", None),
        ("~/data", None),
        ("C:\\data", None),
        ("hf_abcdefghijklmnopqrstuvwxyz", None),
        ("https://me:secret@host", None),
        ("constant", "constant"),
        (float("nan"), None),
        ({"a": "/x", "b": [1, "/y", 2.5]}, {"b": [1, 2.5]}),
        (object(), None),
        (True, True),
    ],
)
def test_what_names_a_place_or_a_key_is_not_shared(value, shared):
    assert shareable(value) == shared


def test_settings_are_those_that_somebody_chose(tmp_path):
    settings = settings_of(config(tmp_path, beta=0.1, weight_decay=0.3), own=("temperature",))
    assert settings["beta"] == 0.1
    assert settings["weight_decay"] == 0.3
    assert settings["temperature"] == 1.0
    assert "warmup_steps" not in settings
    assert "output_dir" not in settings


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_a_new_one_all(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    trainer(tmp_path, **saving).train()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "rew')  # killed while it wrote
    assert read_metrics(tmp_path)[1] == 1
    trainer(tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines, torn = read_metrics(tmp_path)
    assert ([line["step"] for line in lines if "reward" in line], torn) == ([1, 2, 3, 4], 0)
    trainer(tmp_path, max_steps=1).train()
    assert [line["step"] for line in read_metrics(tmp_path)[0] if "reward" in line] == [1]


def test_what_was_logged_before_a_run_and_what_another_left_are_kept(tmp_path):
    first = trainer(tmp_path, eval_dataset=dataset(3), per_device_eval_batch_size=4, max_steps=1)
    first.evaluate()
    first.train()
    first.evaluate(dataset(2))
    evaluations = [line for line in read_metrics(tmp_path)[0] if "eval_reward" in line]
    assert [(line["step"], line["eval_rows"], line["eval_completions"]) for line in evaluations] == [
        (0, 3, 12), (1, 2, 8)
    ]  # fmt: skip
    trainer(tmp_path, max_steps=2).train()
    assert [line["step"] for line in read_metrics(tmp_path)[0] if "reward" in line] == [1, 2]
    assert "eval_reward" in (tmp_path / PREVIOUS_FILE).read_text()


def test_an_evaluation_says_which_dataset_and_whether_its_batches_were_even(tmp_path):
    both = {"easy": dataset(3), "hard": dataset(2)}
    own = trainer(tmp_path, eval_dataset=both, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8)
    own.train()
    lines = [line for line in read_metrics(tmp_path)[0] if "eval_reward" in line]
    assert [(line["eval_dataset"], line["eval_completions"], line["eval_even"]) for line in lines] == [
        ("easy", 12, False), ("hard", 8, True)
    ]  # fmt: skip
    assert not any("eval_dataset" in line for line in read_metrics(tmp_path)[0] if "reward" in line)


@pytest.mark.parametrize("name, told", [("openai/gsm8k", "openai/gsm8k"), ("data", None), ("/home/me/data", None)])
def test_the_data_is_named_if_its_name_is_no_place(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    own = trainer(tmp_path)
    own.dataset_name = name
    assert own.describe_run()["dataset"]["name"] == told


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / METRICS_FILE).mkdir()
    own = trainer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="trl_rlsd.run_record"):
        own.train()
    assert own.state.global_step == 2
    assert [record.getMessage().count("the run goes on") for record in caplog.records] == [1]


def test_what_is_no_record_is_none(tmp_path):
    assert read_record(tmp_path) is None
    assert read_metrics(tmp_path) == ([], 0)
    (tmp_path / RECORD_FILE).write_text('{"format": 99}')
    assert read_record(tmp_path) is None
    (tmp_path / RECORD_FILE).write_text("{")
    assert read_record(tmp_path) is None
