"""`trl-rlsd doctor`: what it finds on broken machines and in broken recipes, and whether its estimate is true."""

import importlib.metadata as metadata
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import byte_tokenizer, tiny_llama, tiny_text
from datasets import Dataset
from transformers import LlamaConfig, MambaConfig
from trl import ModelConfig

from trl_rlsd.doctor import ACCURACY, doctor, machine
from trl_rlsd.doctor.estimate import architecture_of, empty_model, launch_options, sizes_of
from trl_rlsd.memory import CPU_PROCESS, Architecture, Setup, Sizes, engine, peak, phases, resident, room
from trl_rlsd.rewards.sandbox import Bubblewrap
from trl_rlsd.train import launcher_arguments


ROOT = Path(__file__).parent.parent
FIELDS = {
    "model_name_or_path": "model", "dataset_name": "rows.jsonl", "reward_funcs": ["mine.reward"], "output_dir": "out",
    "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
    "report_to": "none",
}  # fmt: skip
# Llama-3.1-70B
BIG = {
    "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip


MINE = """
from datasets import Dataset, IterableDataset
def reward(completions, **columns):
    return [0.0] * len(completions)
def missing_key():
    return {}["of mine"]
def fails():
    assert False, "boo"
def no_rows():
    return Dataset.from_dict({"prompt": [], "privileged_context": []})
def empty_stream():
    return IterableDataset.from_generator(lambda: iter([]))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe that is right; the folder of its model holds no weights."""
    LlamaConfig(**tiny_text(258), architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i} + {i} = ?", "privileged_context": f"the answer is {2 * i}"} for i in range(8)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("{}['k']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "mine", None)  # so that it is forgotten afterwards
    del sys.modules["mine"]
    return tmp_path


@pytest.fixture
def told(project, capsys):
    """Run on the recipe with other fields: the exit status, and the JSON."""

    def run(**changed):
        lines = {name: value for name, value in {**FIELDS, **changed}.items() if value is not None}
        (project / "run.yaml").write_text(yaml.safe_dump(lines))
        status = doctor(["--config", "run.yaml", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


def lines_of(said, subject):
    return [(finding["level"], finding["text"]) for finding in said["findings"] if finding["subject"] == subject]


def errors(said):
    return [f["subject"] for f in said["findings"] if f["level"] == "ERROR"]


# ------------------------------------------------------------------ the machine


def test_a_package_that_is_too_old_is_an_error_that_says_what_to_install(monkeypatch):
    true_version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.15.0" if name == "trl" else true_version(name))
    by_subject = {finding.subject: finding for finding in machine.examine_machine()}
    assert by_subject["trl"].level == "ERROR"
    assert re.search(r"1\.15\.0.*is needed: pip install 'trl.*>=1\.16", by_subject["trl"].text)
    assert by_subject["peft"].level == "OK"


def test_a_missing_optional_package_is_no_error_and_its_command_is_told(monkeypatch):
    true_version = metadata.version

    def version(name):
        if name == "liger-kernel":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "bitsandbytes" else true_version(name)

    monkeypatch.setattr(metadata, "version", version)
    by_subject = {finding.subject: finding for finding in machine.examine_machine()}
    liger, quantization = by_subject["[liger]"], by_subject["[quantization]"]
    assert (liger.level, quantization.level) == ("OK", "WARNING")
    assert "not installed: liger-kernel" in liger.text
    assert "pip install 'trl-rlsd[liger]'" in liger.text
    assert "bitsandbytes 0.1" in quantization.text


@pytest.mark.parametrize("error, level", [(ImportError("apt-get install it"), "OK"), (RuntimeError("no"), "WARNING")])
def test_a_sandbox_that_is_missing_is_no_fault_and_one_that_does_not_work_is_told(monkeypatch, error, level):
    def check(self):
        raise error

    monkeypatch.setattr(Bubblewrap, "check", check)
    (finding,) = [finding for finding in machine.examine_machine() if finding.subject == "bubblewrap"]
    assert finding.level == level
    assert str(error) in finding.text


def test_a_gpu_is_told_with_the_precision_that_it_has(monkeypatch):
    t4 = SimpleNamespace(name="Tesla T4", total_memory=15_800_000_000, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: t4)
    finding = machine.devices()[0]
    assert "Tesla T4, 15.8 GB, capability 7.5, no bf16: fp16: true" in finding.text


@pytest.mark.parametrize("major, warned", [(7, True), (8, False)])
def test_a_gpu_without_bfloat16_is_warned_of_where_the_recipe_wants_it(told, monkeypatch, major, warned):
    gpu = SimpleNamespace(name="a GPU", total_memory=15_800_000_000, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    _, said = told(bf16=True)
    assert any("bf16 is emulated" in text for _, text in lines_of(said, "config")) == warned


def test_without_a_gpu_the_cpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    gpu, cpu = machine.devices()
    assert "no CUDA device" in gpu.text
    assert re.match(r"\d+ cores, [\d.]+ GB of memory", cpu.text)


# ------------------------------------------------------------------ the recipe


def test_a_right_recipe_shows_both_prompts_and_fits(told):
    status, said = told()
    assert (status, errors(said)) == (0, [])
    student, teacher = said["prompts"].split("The teacher reads:\n")
    assert student == "The student reads:\n0 + 0 = ?\n"
    assert "the answer is 0" in teacher
    assert teacher.endswith("0 + 0 = ?")
    (level, text) = lines_of(said, "memory")[0]
    assert level == "OK"
    assert "fits" in text


def test_no_weights_are_read(told, project):
    assert not list((project / "model").glob("*.safetensors"))
    assert told()[0] == 0


def test_a_missing_column_is_an_error_and_the_rest_is_examined_all_the_same(told):
    status, said = told(privileged_column="reference")
    assert (status, errors(said)) == (1, ["prompts"])
    assert "train_dataset has no column 'reference' (privileged_column)" in lines_of(said, "prompts")[0][1]
    assert said["memory"]["peak"] > 0


@pytest.mark.parametrize(
    "changed, subject, text",
    [
        ({"rlsd_lambda": 2.0}, "config", "rlsd_lambda=2.0 is out of range"),
        ({"num_generations": 3}, "config", "num_generations"),
        ({"no_such_field": 1}, "config", "no_such_field"),
        ({"model_name_or_path": None}, "config", "model_name_or_path is not set"),
        ({"dataset_name": "nothing.there"}, "dataset", "was read as the dotted path of a function"),
        ({"reward_funcs": None}, "rewards", "reward_funcs is not set"),
        ({"reward_funcs": ["choice_reward"]}, "rewards", "answer"),
        ({"reward_options": {"math_reward": {}}}, "rewards", "which is not in reward_funcs"),
        ({"use_peft": True, "lora_target_modules": "nothing"}, "memory", "Target modules"),
        ({"max_completion_length": 500}, "prompts", "more than the model's 512 positions"),
        ({"dtype": "float64"}, "memory", "dtype='float64' is not supported. Give one of float32"),
        ({"teacher_model_kind": "external"}, "teacher", "In a recipe teacher_model is teacher_model_name_or_path"),
        ({"teacher_model_name_or_path": "model"}, "teacher", "Set teacher_model_kind='external'"),
        ({"dataset_name": "none.jsonl"}, "dataset", "none.jsonl"),
        ({"dataset_name": ["a", "b"]}, "dataset", "AttributeError: 'list' object"),
        ({"dataset_name": "mine.missing_key"}, "dataset", "KeyError: 'of mine'"),
        ({"dataset_name": "mine.fails"}, "dataset", "AssertionError: boo"),
        ({"reward_funcs": ["broken.reward"]}, "rewards", "KeyError: 'k'"),
    ],
)
def test_what_is_wrong_is_told_and_no_traceback(told, changed, subject, text):
    status, said = told(**changed)
    assert (status, errors(said)) == (1, [subject])
    assert any(text in line for level, line in lines_of(said, subject) if level == "ERROR")


def test_a_config_that_is_not_there_or_no_yaml_is_told(project, capsys):
    assert doctor(["--config", "none.yaml", "--json"]) == 1
    assert "none.yaml" in lines_of(json.loads(capsys.readouterr().out), "config")[0][1]
    assert doctor(["--json", "--config"]) == 1
    assert "--config names no file" in lines_of(json.loads(capsys.readouterr().out), "config")[0][1]
    (project / "bad.yaml").write_text("a: [1\nb: 2")
    assert doctor(["--config", "bad.yaml", "--json"]) == 1
    assert "ParserError" in lines_of(json.loads(capsys.readouterr().out), "config")[0][1]


ROW = {"privileged_context": "c"}


@pytest.mark.parametrize(
    "rows, subject, text",
    [
        ([], "dataset", "dataset_name='rows.jsonl' has no rows"),
        ([{"prompt": None, **ROW}], "prompts", "prompt=None of row 0 is empty"),
        ([{"prompt": [], **ROW}], "prompts", "prompt=[] of row 0 is empty"),
        ([{"prompt": "a", **ROW}, {"prompt": "", **ROW}], "prompts", "prompt='' of row 1 is empty"),
        ([{"prompt": [{"role": "user"}], **ROW}], "prompts", "A message of the prompt of row 0 has no content"),
        ([{"question": "a", **ROW}], "prompts", "no column 'prompt'; its columns are question, privileged_context"),
    ],
)
def test_rows_without_a_prompt_to_read_are_told(told, project, rows, subject, text):
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, said = told()
    assert (status, errors(said)) == (1, [subject])
    assert any(text in line for _, line in lines_of(said, subject))


@pytest.mark.parametrize("name", ["no_rows", "empty_stream"])
def test_a_function_that_gives_no_rows_is_told(told, name):
    status, said = told(dataset_name=f"mine.{name}")
    assert (status, errors(said)) == (1, ["prompts"])
    assert lines_of(said, "prompts") == [("ERROR", "The dataset has no rows.")]


@pytest.mark.parametrize(
    "changed, package, command",
    [
        ({"use_vllm": True}, "vllm", "pip install 'trl[vllm]'"),
        ({"use_liger_loss": True}, "liger-kernel", "pip install 'trl-rlsd[liger]'"),
        ({"load_in_4bit": True, "use_peft": True}, "bitsandbytes", "pip install 'trl-rlsd[quantization]'"),
        ({"optim": "paged_adamw_8bit"}, "bitsandbytes", "pip install 'trl-rlsd[quantization]'"),
        ({"report_to": ["trackio"]}, "trackio", "pip install trackio"),
    ],
)
def test_what_a_recipe_uses_and_is_not_installed_is_an_error(told, monkeypatch, changed, package, command):
    true_version = metadata.version
    here = True

    def version(name):
        if name == package and not here:
            raise metadata.PackageNotFoundError(name)
        return "9" if name == package else true_version(name)

    monkeypatch.setattr(metadata, "version", version)
    assert lines_of(told(**changed)[1], package) == []
    here = False
    status, said = told(**changed)
    assert (status, errors(said)) == (1, [package])
    ((_, text),) = lines_of(said, package)
    assert f"{next(iter(changed))}" in text
    assert text.endswith(command)


def test_code_of_a_models_own_is_run_where_it_is_trusted(told, project, monkeypatch):
    """And nobody is asked at the terminal."""
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked"))
    (project / "model/own_config.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (project / "model/own_model.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .own_config import OwnConfig\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = project / "model/config.json"
    own = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    content = {**json.loads(path.read_text()), "model_type": "own", "architectures": ["OwnModel"], "auto_map": own}
    path.write_text(json.dumps(content))
    status, said = told(trust_remote_code=True)
    assert (status, errors(said)) == (0, [])
    assert said["memory"]["parameters"] > 0
    status, said = told()
    assert (status, "model" in errors(said)) == (1, True)
    assert "trust_remote_code=True" in lines_of(said, "model")[0][1]


def test_a_dataset_that_cannot_be_fetched_is_no_error_of_the_recipe(told):
    status, said = told(dataset_name="nobody/no-rows")
    assert (status, errors(said)) == (0, [])
    ((level, text),) = lines_of(said, "dataset")
    assert level == "WARNING"
    assert "'nobody/no-rows' cannot be read from here" in text


def test_a_tokenizer_that_documents_are_cut_with_may_be_out_of_reach_too(told, project):
    (project / "a.md").write_text("a")
    options = {"documents": {"files": ["a.md"], "budget": 9}, "columns": {"prompt": "prompt"}}
    status, said = told(model_name_or_path="nobody/no-model", dataset_options=options)
    assert (status, errors(said)) == (0, [])
    assert lines_of(said, "dataset")[0][0] == "WARNING"


def test_a_teacher_that_cannot_be_fetched_is_no_error_of_the_recipe_but_the_memory_is_not_known(told):
    status, said = told(teacher_model_kind="external", teacher_model_name_or_path="nobody/no-model")
    assert (status, errors(said), said["memory"]) == (0, [], None)
    ((level, text),) = lines_of(said, "teacher")
    assert level == "WARNING"
    assert "'nobody/no-model' is not here and cannot be fetched" in text


def test_a_model_that_cannot_be_fetched_is_no_error_of_the_recipe_but_its_memory_is_not_known(told):
    status, said = told(model_name_or_path="nobody/no-model")
    assert (status, errors(said), said["memory"]) == (0, [], None)
    assert lines_of(said, "model")[0][0] == "WARNING"
    assert "'nobody/no-model' is not here and cannot be fetched" in lines_of(said, "model")[0][1]


def test_a_model_of_another_kind_is_not_weighed_and_that_is_told(told, project):
    MambaConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, architectures=["MambaForCausalLM"]
    ).save_pretrained(project / "model")
    status, said = told()
    assert (status, said["memory"]) == (0, None)
    assert "no num_attention_heads" in lines_of(said, "memory")[0][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a recipe for GPUs is right where there is one")
def test_a_recipe_for_gpus_is_examined_where_there_is_none(told):
    status, said = told(use_cpu=None, bf16=None)
    assert (status, errors(said)) == (0, [])
    assert any("there is no GPU here" in text for _, text in lines_of(said, "config"))
    assert {row["device"]: row["verdict"] for row in said["memory"]["devices"]} == dict.fromkeys(
        ("T4, 16 GB", "24 GB", "40 GB", "80 GB"), "fits"
    )


def test_a_model_that_is_too_large_in_float32_fits_as_qlora_on_the_largest(told, project):
    LlamaConfig(**tiny_text(**BIG), architectures=["LlamaForCausalLM"]).save_pretrained(project / "model")
    for_a_gpu = {"use_cpu": None, "bf16": None, "dtype": "bfloat16"}
    _, full = told(**for_a_gpu)
    _, lora = told(**for_a_gpu, use_peft=True, lora_target_modules="all-linear", load_in_4bit=True)
    assert full["memory"]["parameters"] == pytest.approx(70.55e9, rel=1e-3)
    assert {row["verdict"] for row in full["memory"]["devices"]} == {"does not fit"}
    verdicts = {row["device"]: row["verdict"] for row in lora["memory"]["devices"]}
    assert (verdicts["40 GB"], verdicts["80 GB"]) == ("does not fit", "fits")


def test_a_recipe_that_does_not_fit_here_is_an_error_that_says_what_to_lower(told, project):
    LlamaConfig(**tiny_text(**BIG), architectures=["LlamaForCausalLM"]).save_pretrained(project / "model")
    status, said = told()
    assert (status, errors(said)) == (1, ["memory"])
    (line,) = [text for level, text in lines_of(said, "memory") if level == "ERROR"]
    assert re.search(r"does not fit\. The update takes most: lower per_device_train_batch_size", line)


def test_what_a_person_reads_has_the_same_lines(project, capsys):
    (project / "run.yaml").write_text(yaml.safe_dump({**FIELDS, "privileged_column": "x[bold]y"}))
    assert doctor(["--config", "run.yaml"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "'x[bold]y'" in printed  # no markup of the user's
    assert ACCURACY.split(";")[0] in printed


# ------------------------------------------------------------------ the estimate


def test_the_estimate_is_within_a_quarter_of_every_peak_that_was_measured():
    """On a CPU in float32; figures of tests/benchmarks/step_cost.py. Half of the rows were scored, all are assumed."""
    figures = json.loads((ROOT / "tests/benchmarks/results/step_cost_cpu.json").read_text())["figures"]
    errors = []
    for figure in (figure for figure in figures if "peak" in figure):
        size = figure["size"]
        hidden, names = size["hidden"], ("tokens", "prompt", "context", "checkpointing")
        arch = Architecture(size["layers"], hidden, 3 * hidden, hidden // 64, hidden // 128, 64, size["vocabulary"])
        trainable = arch.adapter(16) if size["lora"] else arch.parameters
        setup = Setup(size["completions"], size["completions"], **{name: size[name] for name in names})
        needs, _ = peak(Sizes(arch, arch.parameters, arch.blocks, trainable), setup, gpu=False)
        errors.append((needs - CPU_PROCESS) / figure["peak"] - 1)
    assert len(errors) == 14
    assert -0.1 < min(errors) < max(errors) < 0.25


def test_the_sizes_are_those_of_the_model_that_is_built():
    model = tiny_llama(tie_word_embeddings=True)
    sizes = sizes_of(model, ModelConfig(use_peft=True, lora_target_modules=["all-linear"], lora_r=4))
    assert sizes.trainable == sizes.architecture.adapter(4)
    assert sizes.parameters == sum(p.numel() for p in tiny_llama(tie_word_embeddings=True).parameters())
    assert sizes.linear == sizes.architecture.blocks
    assert architecture_of(model.config).tied


def test_tied_weights_are_counted_once_without_weights_too(project):
    tied = LlamaConfig(**tiny_text(258, tie_word_embeddings=True), architectures=["LlamaForCausalLM"])
    tied.save_pretrained("model")
    assert empty_model("model").num_parameters() == tiny_llama(tie_word_embeddings=True).num_parameters()


ARCH = Architecture(32, 4096, 14_336, 32, 8, 128, 128_256)
FULL = Sizes(ARCH, ARCH.parameters, ARCH.blocks, ARCH.parameters)
LORA = replace(FULL, trainable=ARCH.adapter(16))
SETUP = Setup(4, 32, 1024, 256, 256, compute=2)


def whole(sizes, **changed):
    return peak(sizes, replace(SETUP, **changed), gpu=True)[0]


@pytest.mark.parametrize(
    "less, more",
    [
        ({"checkpointing": True}, {"checkpointing": False}),
        ({"copy": 0}, {"copy": 1}),
        ({"rows": 1}, {"rows": 64}),
        ({"optimizer": 2}, {"optimizer": 8}),
        ({"shards": 8, "processes": 8}, {"shards": 1}),
        ({"processes": 1}, {"processes": 8}),
        ({"others": 0}, {"others": 1e10}),
    ],
)
def test_what_takes_more_memory_is_estimated_at_more(less, more):
    assert whole(FULL, **less) < whole(FULL, **more)


def test_without_a_teacher_no_pass_of_one_is_counted():
    assert set(phases(LORA, SETUP, gpu=True)) - set(phases(LORA, replace(SETUP, teacher=False), gpu=True)) == {
        "teacher pass"
    }


def test_four_bits_hold_the_linear_weights_alone_with_their_scales():
    whole_bits = resident(LORA, replace(SETUP, weights=2, linear=2), gpu=True)["frozen weights"]
    four_bits = resident(LORA, replace(SETUP, weights=2, linear=0.5625), gpu=True)["frozen weights"]
    assert whole_bits - four_bits == pytest.approx(ARCH.blocks * (2 - 0.5625), rel=1e-9)


def test_sharding_divides_what_is_resident_and_gathers_layers():
    alone, sharded = (replace(SETUP, processes=n, shards=n) for n in (1, 8))
    for name, size in resident(FULL, alone, gpu=True).items():
        part = resident(FULL, sharded, gpu=True)[name]
        assert part == pytest.approx(size if name == "process" else size / 8, rel=1e-9)
    assert phases(FULL, sharded, gpu=True)["update"]["gathered weights"] > 0


def test_ligers_chunks_take_less_than_the_fused_heads_tiles():
    setup = replace(SETUP, rows=16)
    fused, liger = (phases(LORA, replace(setup, liger=on), gpu=True)["update"]["head"] for on in (False, True))
    assert liger < fused


def test_what_vllm_takes_of_a_gpu_is_not_there_for_the_rest():
    assert room(80e9, replace(SETUP, engine=0.3)) == pytest.approx(0.65 * 80e9, rel=1e-9)
    assert "generation" in phases(LORA, SETUP, gpu=True)
    assert phases(LORA, replace(SETUP, engine=0.3), gpu=True)["generation"] == {}


def test_vllm_needs_the_weights_and_the_cache_of_its_longest_sequence():
    weights, token = 2 * ARCH.parameters, 2 * ARCH.cache
    assert engine(FULL, SETUP, 8192) == pytest.approx(weights + 8192 * token, rel=1e-9)
    four_bits = replace(SETUP, linear=0.5)
    assert engine(LORA, four_bits, 0) == pytest.approx(weights - 1.5 * ARCH.blocks, rel=1e-9)


def test_vllm_without_a_longest_sequence_is_warned_of_and_may_not_start(told, project):
    long = {"max_position_embeddings": 1_000_000, "num_hidden_layers": 32, "hidden_size": 4096}
    LlamaConfig(**tiny_text(258, **long), architectures=["LlamaForCausalLM"]).save_pretrained(project / "model")
    colocated = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5}
    colocated |= {"use_cpu": None, "bf16": None, "use_peft": True, "dtype": "bfloat16"}
    verdicts = {}
    for length in (None, 64):
        _, said = told(**colocated, vllm_max_model_length=length)
        warned = [text for level, text in lines_of(said, "vLLM") if level == "WARNING"]
        assert len(warned) == (length is None)
        assert all("vllm_max_model_length is not set" in text and "1000000 positions" in text for text in warned)
        verdicts[length] = {row["device"]: row["verdict"] for row in said["memory"]["devices"]}["80 GB"]
    assert verdicts == {None: "vLLM may not start", 64: "fits"}
    assert lines_of(told(**{**colocated, "vllm_mode": "server"})[1], "vLLM") == []


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("fsdp2", [], {"num_processes": 8, "sharded": True}),
        ("zero3", ["--num_processes", "4"], {"num_processes": 4, "sharded": True}),
        ("zero2", [], {"num_processes": 8, "sharded": False}),
        ("multi_gpu", [], {"num_processes": 8, "sharded": False}),
    ],
)
def test_the_launchers_file_says_whether_weights_are_sharded(name, arguments, expected):
    given = launcher_arguments(["--accelerate_config", name, *arguments])
    assert launch_options(launch_command_parser().parse_args([*given, "script"])) == expected
