"""The command line, on real processes."""

import itertools
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from conftest import assert_same, byte_tokenizer, dataset, tiny_llama
from datasets import DatasetDict
from huggingface_hub import utils as hub
from peft import PeftModel
from safetensors.torch import load_file
from transformers import logging as transformers_logging

from trl_rlsd import cli
from trl_rlsd.train import load_splits, main, make_parser


ROOT = Path(__file__).parent.parent
FAST = {
    "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
    "max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """A user's folder: model, data as a file, a module with a reward and a dataset function, a config file."""
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    dataset().to_json(tmp_path / "data.jsonl")
    dataset().to_parquet(tmp_path / "data.parquet")
    (tmp_path / "mine.py").write_text(
        "from datasets import Dataset\n"
        "def reward(completions, **columns):\n"
        "    return [float(len(set(text)) % 5) for text in completions]\n"
        "def data():\n"
        "    return Dataset.from_dict({'prompt': ['a', 'b'], 'privileged_context': ['c', 'd']})\n"
        "def wrong():\n"
        "    return 3\n"
    )
    lines = {
        "model_name_or_path": str(tmp_path / "model"), "dataset_name": "data.jsonl", "reward_funcs": ["mine.reward"],
        "output_dir": "out", "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", **FAST,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(lines))  # JSON is YAML
    return tmp_path


def command(project, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "trl_rlsd", *arguments], cwd=project, env=env, capture_output=True, text=True
    )


def test_train_runs_a_config_file_through_the_launcher(project):
    flags = ["--rlsd_lambda", "0.3", "--accelerate_config", "single_gpu", "--cpu", "--mixed_precision", "no"]
    done = command(project, "train", "--config", "run.yaml", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'rlsd/lambda': '0.3'" in done.stdout
    loaded = PeftModel.from_pretrained(tiny_llama(), project / "out")
    assert list(loaded.peft_config) == ["default"]
    saved = load_file(project / "out" / "adapter_model.safetensors")
    assert any(bool((tensor != 0).any()) for name, tensor in saved.items() if "lora_B" in name), "nothing was trained"


def test_launcher_keys_may_stand_in_the_config_file(project, monkeypatch, capsys):
    lines = json.loads((project / "run.yaml").read_text())
    launcher = {"accelerate_config": "single_gpu", "num_machines": 1, "mixed_precision": "no"}
    (project / "run.yaml").write_text(json.dumps({**lines, "max_steps": 1, **launcher}))
    monkeypatch.setattr("accelerate.commands.launch.launch_command", (launched := []).append)
    monkeypatch.chdir(project)
    assert cli.main(["train", "--config", "run.yaml", "--cpu"]) == 0
    assert (launched[0].num_machines, launched[0].mixed_precision, launched[0].cpu) == (1, "no", True)
    assert launched[0].config_file.endswith("single_gpu.yaml")
    main(launched[0].training_script_args)  # what is left for the script: the launcher's keys stand in its config too
    assert (project / "out" / "adapter_model.safetensors").is_file()
    (project / "run.yaml").write_text(json.dumps({**lines, "rlsd_lamda": 0.3}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", "run.yaml"])
    assert stop.value.code != 0
    assert "rlsd_lamda" in capsys.readouterr().err


def test_what_holds_among_several_processes_is_not_asked_of_the_launcher(project, monkeypatch):
    """Two processes with two completions each make one group of four."""
    monkeypatch.setattr("accelerate.commands.launch.launch_command", (launched := []).append)
    monkeypatch.chdir(project)
    flags = ["--per_device_train_batch_size", "2", "--num_processes", "2"]
    assert cli.main(["train", "--config", "run.yaml", *flags]) == 0
    assert launched[0].training_script_args == ["--config", "run.yaml", *flags[:2]]
    with pytest.raises(ValueError, match=r"generation_batch_size \(2\) must be divisible"):
        main(["--config", "run.yaml", *flags[:2]])


def test_a_mistake_in_the_config_is_told_with_its_field(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(ValueError, match=r"rlsd_lambda=3\.0 is out of range; it must be in \[0, 1\]"):
        main(["--config", "run.yaml", "--rlsd_lambda", "3"])


@pytest.mark.parametrize("name", ["data.parquet", "mine.data"])
def test_data_comes_from_files_and_functions(project, monkeypatch, name):
    monkeypatch.chdir(project)
    main(["--config", "run.yaml", "--dataset_name", name, "--max_steps", "1"])
    assert (project / "out" / "adapter_model.safetensors").is_file()


def test_every_field_of_the_config_is_a_flag():
    actions = {action.dest for action in make_parser()._actions}
    from trl_rlsd import RLSDConfig

    assert {name for name, f in RLSDConfig.__dataclass_fields__.items() if f.init} <= actions


@pytest.mark.parametrize(
    "options, error, said",
    [
        (["--dataset_name", "absent.jsonl"], ValueError, "there is no such file"),
        (["--dataset_name", "mine.absent"], ValueError, "dotted path of a function"),
        (["--dataset_name", "mine.wrong"], TypeError, "returned int"),
        (["--dataset_train_split", "test"], ValueError, "dataset_train_split='test' is not a split.*it has train"),
        (["--reward_funcs", "mine.absent"], ValueError, "reward 'mine.absent' cannot be loaded"),
        (["--reward_funcs", "absent"], ValueError, "neither a registered reward.*reasoning_gym_reward"),
        (["--privileged_column", "answer"], ValueError, "no column 'answer'"),
    ],
)
def test_bad_input_is_named_before_training(project, monkeypatch, options, error, said):
    monkeypatch.chdir(project)
    with pytest.raises(error, match=said):
        main(["--config", "run.yaml", *options])


def test_splits_of_a_function_keep_their_names(monkeypatch, tmp_path):
    (tmp_path / "splits_module.py").write_text("def both():\n    return {'train': 1, 'test': 2}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_splits("splits_module.both") == {"train": 1, "test": 2}
    assert not isinstance(load_splits("splits_module.both"), DatasetDict)


def test_resume_from_the_newest_checkpoint(project, monkeypatch):
    monkeypatch.chdir(project)
    saving = [
        "--config",
        "run.yaml",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--lr_scheduler_type",
        "constant",
    ]
    main([*saving, "--output_dir", "straight", "--max_steps", "3"])
    main([*saving, "--max_steps", "2"])
    main([*saving, "--max_steps", "3", "--resume_from_checkpoint", "true"])
    first, second = (load_file(project / run / "adapter_model.safetensors") for run in ("straight", "out"))
    assert_same(first, second)
    assert (project / "out" / "checkpoint-3" / "rlsd_teacher.safetensors").is_file()


def test_help_and_version_answer(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in ("quickstart", "report", "publish")), ["--version"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
    assert "trl-rlsd 0.1.0" in capsys.readouterr().out


def test_quickstart_runs_on_any_model(tmp_path):
    """The whole quickstart on the tiny model, for two steps: files, reload, report. Whether a reward rises on the real
    model is shown by running it, not here."""
    quickstart = pytest.importorskip("trl_rlsd.quickstart")
    pytest.importorskip("reasoning_gym")
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    summary = quickstart.run(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), steps=2)
    assert summary["held_out"] == 48
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]
    assert all("rlsd/lambda" in line for line in lines if "reward" in line)
    assert (out / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_the_quickstart_leaves_the_process_as_talkative_as_it_was(tmp_path):
    """It can be called from a notebook, whose own bars, warnings and log records must come through afterwards."""
    quickstart = pytest.importorskip("trl_rlsd.quickstart")
    logger = logging.getLogger("trl_rlsd")

    def state():
        bars = not datasets.are_progress_bars_disabled(), not hub.are_progress_bars_disabled()
        heard = logger.handlers, logger.propagate, logger.level, list(warnings.filters)
        return *bars, transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity(), *heard

    def switched(datasets_bars, hub_bars, transformers_bars):
        log = transformers_logging
        (log.enable_progress_bar if transformers_bars else log.disable_progress_bar)()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
        (datasets.enable_progress_bars if datasets_bars else datasets.disable_progress_bars)()

    before = state()
    try:
        for bars in itertools.product((True, False), repeat=3):
            switched(*bars)
            was = state()
            assert was[:3] == bars
            with pytest.raises(OSError, match="no-such-model"):
                quickstart.run(model=str(tmp_path / "no-such-model"), output_dir=str(tmp_path / "out"))
            assert state() == was
    finally:
        switched(*before[:3])


def test_plain_text_models_get_plain_text_prompts(tmp_path):
    quickstart = pytest.importorskip("trl_rlsd.quickstart")
    pytest.importorskip("reasoning_gym")
    rows = quickstart.reasoning_gym_dataset(size=2, seed=0, **quickstart.TASK)
    assert isinstance(quickstart._render_for(byte_tokenizer(None), rows)[0]["prompt"], str)
    no_system = byte_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    assert [m["role"] for m in quickstart._render_for(no_system, rows)[0]["prompt"]] == ["user"]
    assert [m["role"] for m in quickstart._render_for(byte_tokenizer(), rows)[0]["prompt"]] == ["system", "user"]


def test_compare_runs_configs_through_the_launcher_and_goes_on_where_it_was(project, monkeypatch, capsys):
    lines = json.loads((project / "run.yaml").read_text())
    lines = {**lines, "dataset_test_split": "train", "contrast_reward_below": 2.0, "mixed_precision": "no"}
    lines |= {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1}  # a step without new completions
    for name, fields in {"grpo": {"credit": "grpo"}, "rlsd": {}}.items():
        (project / f"{name}.yaml").write_text(json.dumps({**lines, **fields}))
    flags = ["--config", "grpo.yaml", "--config", "rlsd.yaml", "--seeds", "1", "--every", "1", "--held-out", "4"]
    done = command(project, "compare", *flags, "--cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    out = project / "compare-output"
    for name in ("grpo", "rlsd"):
        assert f"{name} seed 1" in done.stdout
        result = json.loads((out / name / "seed-1" / "result.json").read_text())
        assert [point["step"] for point in result["curve"]] == [0, 1, 2]
        assert len(result["step_seconds"]) == 2
        assert result["settings"]["config"]["credit" if name == "grpo" else "use_peft"]
    assert (out / "comparison.png").is_file()
    assert (out / "comparison.md").read_text().strip() in done.stdout

    monkeypatch.chdir(project)
    assert cli.main(["compare", *flags, "--cpu"]) == 0
    assert "seed 1" not in capsys.readouterr().out, "finished runs are read, not trained anew"

    (project / "rlsd.yaml").write_text(json.dumps({**lines, "rlsd_lambda": 0.3}))
    assert cli.main(["compare", *flags, "--cpu"]) == 1
    assert "rlsd/seed-1 holds a run of other settings (rlsd_lambda=None, now 0.3)" in capsys.readouterr().err


def test_compare_tells_flags_of_the_wrong_kind_and_a_run_that_fails(project, capsys):
    for flags, said in (
        (["--config", "run.yaml", "--chain-length", "3"], "--chain-length belongs to the built-in task"),
        (["--no-such-flag"], "--no-such-flag"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", *flags])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    # the file has no test split
    done = command(project, "compare", "--config", "run.yaml", "--seeds", "1", "--cpu", "--mixed_precision", "no")
    assert done.returncode == 1
    assert "1 of 1 runs failed" in done.stderr
    assert "dataset_test_split='test' is not a split of the dataset; it has train" in done.stderr
    assert "Traceback" not in done.stderr
