"""What a trainer, and the command line, publish: the model and its card, whatever else lies in output_dir."""

import logging
import threading

import pytest
import torch
from conftest import assert_same, config, dataset, lora, tiny_llama, trainer, weights
from datasets import Dataset
from hub_server import TOKEN
from peft import PeftModel
from test_hub import ADAPTER_FILES, logits
from transformers import TrainerCallback

from trl_rlsd import cli


FILES = {*ADAPTER_FILES, ".gitattributes", "training_curves.png"}


def named_llama():
    """A base that is known by its id, as one that was loaded from the Hub."""
    model = tiny_llama()
    model.config._name_or_path = "tiny/base"
    return model


def run(tmp_path, **options):
    """A run whose output_dir holds all that must not be published."""
    defaults = dict(
        model=named_llama(),
        peft_config=lora(),
        hub_token=TOKEN,
        log_completions=True,
        rlsd_log_credit_steps=1,
        save_strategy="steps",
        save_steps=1,
        eval_dataset=dataset(4),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        per_device_eval_batch_size=4,
    )
    return trainer(tmp_path / "adapter", **(defaults | options))


def test_push_to_hub_publishes_the_adapter_and_its_card_alone(hub, tmp_path):
    own = run(tmp_path)
    own.train()
    assert (tmp_path / "adapter" / "checkpoint-2" / "rlsd_teacher.safetensors").exists()
    published = own.push_to_hub(dataset_name="tiny/sums", license="apache-2.0")
    head = hub.repos["me/adapter"].branches["main"]
    assert published.commit == head.oid
    assert set(head.files) == FILES
    everything = b"\n".join(head.files.values())
    for private in ("the answer is 1", "1 + 1 = ?", str(tmp_path), TOKEN, "teacher_A"):
        assert private.encode() not in everything
    card = head.files["README.md"].decode()
    for said in (
        "base_model: tiny/base", "tiny/sums", "license: apache-2.0", "- rlsd", "- trl", "2604.03128", "byte_reward",
        "rlsd_lambda", "16 completions",
    ):  # fmt: skip
        assert said in card, said
    (tmp_path / "there").mkdir()
    for name, content in head.files.items():
        (tmp_path / "there" / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "there")
    torch.testing.assert_close(logits(loaded), logits(own.model), atol=1e-6, rtol=0)


def test_every_save_is_published_without_what_resumes_it(hub, tmp_path):
    own = run(tmp_path, push_to_hub=True, hub_always_push=True)
    own.train()
    own.push_in_progress.wait_until_done()
    commits = hub.repos["me/adapter"].commits().values()
    assert {commit.title for commit in commits} >= {"Training in progress, step 1", "Training in progress, step 2"}
    for commit in commits:
        assert set(commit.files) <= FILES
        assert b"the answer is 1" not in b"".join(commit.files.values())


def test_a_hub_that_fails_does_not_end_a_run(hub, tmp_path, caplog):
    straight = run(tmp_path / "straight")
    straight.train()
    own = run(tmp_path, push_to_hub=True, hub_always_push=True)
    hub.fail("POST", "/commit/", status=403, times=100)
    with caplog.at_level(logging.WARNING, logger="trl_rlsd.publishing"):
        own.train()
        own.push_in_progress.wait_until_done()
    assert_same(weights(straight.model), weights(own.model))
    assert any("was not published, the run goes on" in record.getMessage() for record in caplog.records)
    assert set(hub.repos["me/adapter"].branches["main"].files) == {".gitattributes"}


def test_a_privileged_context_in_what_would_be_published_makes_no_repository(hub, tmp_path):
    rows = dataset().map(lambda row: {"privileged_context": "a secret that no card may hold"})
    own = run(
        tmp_path, data=rows, teacher_prompt_template="{privileged_context}: a secret that no card may hold\n{prompt}"
    )
    own.train()
    with pytest.raises(ValueError, match=r"README\.md"):
        own.push_to_hub()
    assert hub.repos == {}
    assert hub.requests == []


def test_what_another_run_left_in_output_dir_is_not_published(hub, tmp_path):
    adapter = run(tmp_path)
    adapter.train()
    adapter.save_model()
    full = run(tmp_path, model=tiny_llama(seed=3), peft_config=None)
    full.train()
    full.push_to_hub()
    files = hub.repos["me/adapter"].branches["main"].files
    assert "model.safetensors" in files
    assert "adapter_model.safetensors" not in files
    assert not list((tmp_path / "adapter").glob(".publishing-*"))


def test_a_checkpoint_is_published_also_if_it_is_deleted_meanwhile(hub, tmp_path):
    own = run(tmp_path, push_to_hub=True, save_total_limit=1, max_steps=3)
    released = threading.Event()
    hub.on_request = lambda method, path: released.wait(20) if "/commit/" in path else None
    threading.Timer(2, released.set).start()
    own.train()
    assert [path.name for path in (tmp_path / "adapter").glob("checkpoint-*")] == ["checkpoint-3"]
    released.set()
    own.push_in_progress.wait_until_done()
    titles = {commit.title for commit in hub.repos["me/adapter"].commits().values()}
    assert "Training in progress, step 1" in titles


def test_a_push_speaks_as_transformers_does(hub, tmp_path):
    heard = []

    class Hears(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            heard.append(state.global_step)

    own = run(tmp_path, save_strategy="no", callbacks=[Hears()])
    own.train()
    with pytest.raises(TypeError, match="finetuned_from"):
        own.push_to_hub(finetuned_from="x")
    published = own.push_to_hub(blocking=False, tags=["math"], model_name="sums").result()
    assert heard == [2]
    assert published.url.endswith("me/adapter"), "the repository that init_hf_repo has made"
    assert "- math" in hub.repos["me/adapter"].branches["main"].files["README.md"].decode()


def test_every_dataset_of_a_run_is_looked_for(tmp_path):
    own = run(tmp_path, eval_dataset={"one": dataset(4), "two": dataset(8, conversational=True)}, hub_token=None)
    texts = list(own.private_texts())
    assert texts.count("3 + 3 = ?") == 3
    assert texts.count("the answer is 6") == 3
    assert "7 + 7 = ?" in texts


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_would_publish_checkpoints_are_refused(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would upload whole checkpoints"):
        config(tmp_path, push_to_hub=True, hub_strategy=strategy)
    assert config(tmp_path, hub_strategy=strategy).push_to_hub is False


def test_the_command_line_lists_and_then_publishes(hub, tmp_path, capsys, monkeypatch):
    own = run(tmp_path, eval_strategy="no", eval_on_start=False)
    own.train()
    own.save_model()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["publish", str(tmp_path / "adapter"), "--repo-id", "me/named"]
    assert cli.main([*command, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "Would be published" in listed
    assert "adapter_model.safetensors" in listed
    assert "checkpoint-2" in listed.split("Not published:")[1]
    assert hub.requests == []
    assert cli.main([*command, "--private"]) == 0
    assert "Published, commit" in capsys.readouterr().out
    assert hub.repos["me/named"].private
    Dataset.from_dict({"note": ["Self-Distilled RLVR is the method's name"]}).to_json(tmp_path / "rows.jsonl")
    before = len(hub.requests)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(
        '{"note": "Self-Distilled RLVR is the method\'s name"}'
    )
    assert cli.main([*command, "--dataset", str(tmp_path / "rows.jsonl")]) == 1
    assert "tokenizer_config.json" in capsys.readouterr().err
    assert len(hub.requests) == before
    hub.tokens.clear()
    assert cli.main(command) == 1
    assert "401" in capsys.readouterr().err
