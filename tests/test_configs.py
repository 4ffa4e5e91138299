"""Every file in configs/, through the real parser: two steps with a tiny model, on rows with the columns it names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import byte_tokenizer, tiny_llama
from datasets import Dataset
from vlm_models import images, tiny_qwen3_vl

from trl_rlsd.data.load import load_rows
from trl_rlsd.rewards import get_reward
from trl_rlsd.train import launcher_arguments, load_splits, main, make_parser


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [config for config in RECIPES if config.stem != "tools_sqlite"]  # in test_tools.py, with tool calls
TINY = {
    "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
    "max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "gradient_accumulation_steps": 1, "lora_r": 4, "use_vllm": False, "dtype": "float32",
}  # fmt: skip
SCHEMA = {"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}}
# real problems in the columns that the configs' datasets have; a completion that solves the first
ROWS = {
    "math_gsm8k": (
        [
            {
                "question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many?",
                "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 72",
            },
            {"question": "A robe takes 2 bolts of blue and half that of white. How many?", "answer": "2+1=3\n#### 3"},
        ],
        "48 + 24 = 72, so \\boxed{72}.",
    ),
    "code_mbpp": (
        [
            {
                "task_id": 2,
                "text": "Write a function to find the shared elements of two lists.",
                "code": "def similar(a, b):\n    return set(a) & set(b)",
                "test_list": ["assert set(similar([3, 4, 5], [5, 4, 7])) == {4, 5}"],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
        ],
        "```python\ndef similar(a, b):\n    return [x for x in a if x in b]\n```",
    ),
    "sql_synthetic": (
        [
            {
                "id": 1,
                "sql_prompt": "How much was sold by each seller?",
                "sql_context": "CREATE TABLE sale (seller TEXT, amount INT); "
                "INSERT INTO sale VALUES ('Ann', 3), ('Bo', 4), ('Ann', 5);",
                "sql": "SELECT seller, SUM(amount) FROM sale GROUP BY seller;",
                "sql_explanation": "Amounts are summed by seller.",
            }
        ],
        "```sql\nSELECT seller, TOTAL(amount) FROM sale GROUP BY 1\n```",
    ),
    "json_extraction": (
        [
            {
                "text": "Total due: 12.50 EUR",
                "schema": json.dumps(SCHEMA),
                "reference": '{"total": 12.5, "currency": "EUR"}',
            }
        ],
        '{"currency": "EUR", "total": 12.50}',
    ),
    "choice_handbook": (
        [{"question": "Who signs travel above 500 EUR? A. the team lead  B. the director", "letter": "B"}],
        "That is the director's.\nAnswer: B",
    ),
    "reasoning_gym": (None, None),
    "qwen3_vl_8b_paper": (
        [
            {"problem": f"<image>How many dots are there? ({i})", "answer": f"{i}", "images": images(1, (64, 64), i)}
            for i in range(2)
        ],
        "I count none: \\boxed{0}.",
    ),
}

for name in ("multi_node", "t4_qlora_1b7", "gpu24_lora_4b", "gpu80_lora_8b_liger", "fsdp2_full_8b"):
    ROWS[name] = ROWS["math_gsm8k"]
for name in ("quickstart_cpu", "quickstart_grpo", "quickstart_opsd"):
    ROWS[name] = (None, None)
ROWS["long_documents"] = (
    [{"question": "Who signs? A. the team lead  B. the director", "letter": "B", "documents": "handbook.md"}],
    "Answer: B",
)
# what keeps a recipe from a CPU, or its documents from a tiny model's positions
HERE = {
    "t4_qlora_1b7": {"fp16": False},
    "long_documents": {"dataset_options": {"documents": {"files": ["documents"], "budget": 2000}}},
}
NEEDS = {"t4_qlora_1b7": "bitsandbytes", "gpu80_lora_8b_liger": "liger_kernel", "quickstart": "reasoning_gym"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a tiny model, and what the configs say is yours."""
    tiny_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "handbook.md").write_text("Travel above 500 EUR is signed by the director.\n\n" + "Also this. " * 300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_config_is_tried():
    assert [config.stem for config in CONFIGS] == sorted(ROWS)


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.stem)
def test_a_header_says_what_it_shows_the_hardware_the_command_and_what_came_out(config):
    header = config.read_text().split("model_name_or_path")[0]
    text = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    assert len(header.split("#\n")[0].split()) >= 8  # what it shows, before the command
    assert f"\n#   trl-rlsd train --config configs/{config.name}" in header
    hardware = text.split("Hardware: ")[1]
    assert re.search(r"\d GB", hardware)
    assert "by `trl-rlsd doctor`" in hardware or "Measured: " in text  # how the figure was got
    assert ("NOT RUN" in text) != ("Measured: " in text)


def test_the_index_has_every_recipe_once():
    index = (ROOT / "configs/README.md").read_text()
    assert sorted(re.findall(r"\((\w+\.yaml)\)", index)) == [config.name for config in RECIPES]


@pytest.mark.parametrize("credit", ["grpo", "opsd"])
def test_the_twins_of_the_quickstart_differ_in_credit_and_folder_alone(credit):
    own, twin = (
        (ROOT / f"configs/quickstart_{name}.yaml").read_text().split("model_name_or_path")[1].splitlines()
        for name in ("cpu", credit)
    )
    different = {a: b for a, b in zip(own, twin, strict=True) if a != b}
    assert different == {
        "credit: rlsd": f"credit: {credit}",
        "output_dir: rlsd-quickstart": f"output_dir: rlsd-quickstart-{credit}",
    }


def test_the_quickstarts_can_be_compared(monkeypatch):
    pytest.importorskip("matplotlib")
    from trl_rlsd.lab.configs import load_configs

    loaded = load_configs([str(ROOT / f"configs/quickstart_{name}.yaml") for name in ("grpo", "opsd", "cpu")])
    assert [content["credit"] for content in loaded.values()] == ["grpo", "opsd", "rlsd"]


def test_the_held_out_problems_of_the_quickstart_are_not_trained_on(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.syspath_prepend(ROOT)
    train, test = (
        {row["prompt"][-1]["content"] for row in rows} for rows in load_splits("configs.chain_sum.splits").values()
    )
    assert (len(train), len(test), len(train & test)) == (144, 48, 0)


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.stem)
def test_every_key_is_a_field_or_the_launchers(config):
    *_, from_file, _ = make_parser(launches=True).parse_args_and_config(
        ["--config", str(config)], return_remaining_strings=True, separate_remaining_strings=True
    )
    launcher_arguments(from_file)


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.stem)
def test_a_recipe_with_lora_has_no_dropout_that_the_teacher_lacks(config):
    lines = yaml.safe_load(config.read_text())
    assert lines.get("lora_dropout") == (0.0 if lines.get("use_peft") else None)


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.stem)
def test_qwen3_thinks_only_where_there_are_tokens_for_it_and_the_recipe_says_so(config):
    lines = yaml.safe_load(config.read_text())
    thinks = re.search(r"/Qwen3-[\d.]+B$", lines["model_name_or_path"])
    told = "enable_thinking: false" in config.read_text()
    assert told == bool(thinks)
    off = (lines.get("chat_template_kwargs") or {}).get("enable_thinking") is False
    assert off == bool(thinks and lines["max_completion_length"] < 2048)


@pytest.mark.parametrize("config", RECIPES, ids=lambda config: config.stem)
def test_vllm_on_the_same_gpus_has_a_longest_sequence_that_holds_a_completion(config):
    lines = yaml.safe_load(config.read_text())
    if lines.get("use_vllm"):
        assert lines["vllm_max_model_length"] >= 2 * lines["max_completion_length"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_trains(project, config, capfd, monkeypatch):
    if "code_reward" in config.read_text() and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    for recipe, package in NEEDS.items():
        if config.stem.startswith(recipe):
            pytest.importorskip(package)
    monkeypatch.syspath_prepend(ROOT)  # configs.chain_sum
    lines = yaml.safe_load(config.read_text())
    rows, solution = ROWS[config.stem]
    here = HERE.get(config.stem, {})
    options = (lines.get("dataset_options") or {}) | here.get("dataset_options", {})
    if config.stem == "qwen3_vl_8b_paper":
        # its processor needs torchvision to be loaded by name: a tiny one without takes its place
        model, processor = tiny_qwen3_vl()
        model.save_pretrained("model")
        monkeypatch.setattr(
            "trl.trainer.grpo_trainer.AutoProcessor.from_pretrained", lambda *args, **kwargs: processor
        )
    if rows is None and options:
        options["size"] = 4
    elif rows is not None:
        Dataset.from_list(rows * 4).to_parquet("rows.parquet")
        if lines["dataset_name"].count("/"):  # on the Hub, where its id names the preset
            rows_there = load_rows("rows.parquet", **({"preset": _preset(lines["dataset_name"])} | options))
            options = {"preset": _preset(lines["dataset_name"])} | options
        else:
            rows_there = None
        lines["dataset_name"] = "rows.parquet"
    (project / "config.yaml").write_text(
        yaml.safe_dump({**lines, **TINY, **here, "model_name_or_path": "model", "dataset_options": options or None})
    )
    main(["--config", "config.yaml"])
    printed = capfd.readouterr().out
    logged = {"grpo": "'step_time'", "opsd": "'rlsd/teacher_seconds'"}.get(lines.get("credit"), "'rlsd/lambda'")
    assert printed.count(logged) >= 2
    weights = "adapter_model" if lines.get("use_peft") else "model"
    assert (project / lines["output_dir"] / f"{weights}.safetensors").is_file()
    name = lines["reward_funcs"][0]
    assert f"'rewards/{name}/mean'" in printed
    assert f"'{name.removesuffix('_reward')}_failures': '0'" in printed
    if config.stem in ("choice_handbook", "long_documents"):
        assert "'rlsd/privileged_tokens_cut'" in printed
    if rows is not None and rows_there is not None:
        reward = get_reward(name, (lines.get("reward_options") or {}).get(name))
        columns = {column: [rows_there[0][column]] * 2 for column in rows_there.column_names}
        assert reward(completions=[solution, "no idea"], prompts=None, **_less(columns)) == [1.0, 0.0]


def test_a_function_is_asked_once_for_both_splits(project, monkeypatch):
    (project / "splits_of_mine.py").write_text(
        "from datasets import Dataset\n"
        "calls = []\n"
        "def data():\n"
        "    calls.append(1)\n"
        "    rows = Dataset.from_dict({'prompt': ['a'] * 8, 'privileged_context': ['c'] * 8, 'answer': ['1'] * 8})\n"
        "    return {'train': rows, 'test': rows}\n"
    )
    monkeypatch.syspath_prepend(project)
    lines = {**TINY, "model_name_or_path": "model", "dataset_name": "splits_of_mine.data", "output_dir": "out"}
    lines |= {"reward_funcs": ["math_reward"], "eval_strategy": "steps", "eval_steps": 100}
    (project / "config.yaml").write_text(yaml.safe_dump(lines))
    main(["--config", "config.yaml"])
    import splits_of_mine

    assert splits_of_mine.calls == [1]


def test_options_stand_in_a_config_or_are_json_on_the_command_line(project, capfd):
    rows = [{"problem": f"{i} + 1", "solution": str(i + 1), "pass_rate": i / 8} for i in range(8)]
    Dataset.from_list(rows).to_json("rows.jsonl")
    given = {
        "dataset_options": {"columns": {"prompt": "problem", "answer": "solution"}, "keep": ["pass_rate"]},
        "reward_options": {"math_reward": {"timeout": 9}},
        "curriculum": {"stages": [{"at_least": 0.5, "max_steps": 1}, {}], "window": 1},
    }
    lines = {**TINY, "model_name_or_path": "model", "dataset_name": "rows.jsonl", "reward_funcs": ["math_reward"]}
    (project / "config.yaml").write_text(yaml.safe_dump({**lines, "output_dir": "out"}))
    main(
        [
            "--config",
            "config.yaml",
            *(part for name, value in given.items() for part in (f"--{name}", json.dumps(value))),
        ]
    )
    assert "'math_failures': '0'" in capfd.readouterr().out


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("reward_options", "{x", "reward_options='{x' is not JSON"),
        ("curriculum", "[1]", r"curriculum='\[1\]' must map names to values"),
        ("reward_options", '{"code_reward": {}}', "reward_options names 'code_reward', which is not in reward_funcs"),
        ("reward_options", '{"math_reward": {"time": 1}}', "'math_reward' has no option 'time'; it has column"),
        ("dataset_options", '{"preset": "gsm9k"}', "gsm9k.*gsm8k"),
        ("curriculum", '{"stages": [{"from": 1}]}', "curriculum=.*unexpected keyword argument 'from'"),
    ],
)
def test_a_wrong_option_is_named_before_a_model_is_loaded(project, name, value, said):
    Dataset.from_list([{"question": "1 + 1", "answer": "#### 2"}]).to_json("rows.jsonl")
    lines = {**TINY, "model_name_or_path": "model", "dataset_name": "rows.jsonl", "reward_funcs": ["math_reward"]}
    lines |= {"dataset_options": {"preset": "gsm8k"}, "output_dir": "out"}
    (project / "config.yaml").write_text(yaml.safe_dump(lines))
    with pytest.raises(ValueError, match=said):
        main(["--config", "config.yaml", f"--{name}", value])


def _less(columns):
    return {name: values for name, values in columns.items() if name != "prompt"}


def _preset(source):
    from trl_rlsd.data.presets import presets_for

    return presets_for(source)[0].name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap")
def test_graders_with_processes_of_their_own_work_on_two_ranks(project):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}", "tests": "assert f(1) == 2"} for i in range(8)]
    Dataset.from_list(rows).to_json("rows.jsonl")
    lines = {
        **TINY, "model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": "out",
        "dataset_options": {"preset": "gsm8k", "keep": ["tests"]}, "reward_funcs": ["math_reward", "code_reward"],
        "accelerate_config": str(Path(__file__).parent.parent / "configs" / "accelerate" / "multi_cpu.yaml"),
    }  # fmt: skip
    (project / "config.yaml").write_text(yaml.safe_dump(lines))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "trl_rlsd", "train", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'epoch': '0.5'" in done.stdout, "two steps take four of eight prompts with two processes, two with one"
    assert "'math_failures': '0'" in done.stdout
    assert "'code_failures': '0'" in done.stdout
