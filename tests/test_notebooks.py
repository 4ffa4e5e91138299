"""The notebooks run from top to bottom, each in a kernel of its own, and print what they promise. Only the cell tagged
"install" is left out, and the one tagged "parameters" ends with smaller values."""

import ast
import html
import json
import os
import random
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from hub_server import HubServer
from nbclient import NotebookClient
from vlm_models import images, tiny_gemma3


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
TOKEN = "hf_" + "aB3" * 11
ANSWERS = ("4", "6")
COMPLETION_TOKENS = 10  # \boxed{4}</s>


@pytest.fixture(autouse=True)
def leaves_nothing_behind(monkeypatch, tmp_path):
    # read by the kernel's client too, which makes the folder
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    return cell


def assigned(source: str) -> set[str]:
    return {node.targets[0].id for node in ast.parse(source).body if isinstance(node, ast.Assign)}


def run(name: str, folder: Path, parameters: dict, **env: str) -> list[str]:
    """Run a notebook in a folder; returns what each code cell has put out, but for the install cell. HTML counts as
    what is put out where a cell has some."""
    notebook = read(FOLDER / f"{name}.ipynb")
    cell = tagged(notebook, "parameters")
    assert parameters.keys() <= assigned(cell.source)
    cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.remove(tagged(notebook, "install"))
    own = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / ".huggingface"),
    }
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, **own, **env})
    return [text(cell) for cell in notebook.cells if cell.cell_type == "code"]


def text(cell: nbformat.NotebookNode) -> str:
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts.append(
            output.get("text") or data.get("text/html") or data.get("text/markdown") or data.get("text/plain") or ""
        )
    return "".join(parts)


def one(outputs: list[str], needle: str) -> str:
    """The output that has a text in it."""
    (found,) = [output for output in outputs if needle in output]
    return found


def teach(model, template, encode, *, longest: int, content=lambda text: text) -> None:
    """A tiny model learns to answer whatever it is asked with one of `ANSWERS` in a box, by chance: among its
    completions of a problem some are right, so that there is credit to give."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        size, texts = rng.randrange(40, longest), []
        for _ in range(4):
            asked = content("".join(chr(rng.randrange(32, 123)) for _ in range(size)).replace("<", " "))
            prompt = template([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)
            texts.append(f"{prompt}\\boxed{{{rng.choice(ANSWERS)}}}</s>")
        inputs = encode(texts)
        labels = inputs["input_ids"].clone()
        labels[:, :-COMPLETION_TOKENS] = -100
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("taught"), byte_tokenizer()
    sizes = dict(hidden_size=64, intermediate_size=128, max_position_embeddings=4096)
    model = tiny_llama(initializer_range=0.1, **sizes)
    teach(model, tokenizer.apply_chat_template, lambda texts: tokenizer(texts, return_tensors="pt"), longest=500)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def taught_vlm(tmp_path_factory) -> str:
    folder, (model, processor) = tmp_path_factory.mktemp("taught_vlm"), tiny_gemma3()
    pictures = [[picture] for picture in images(4)]
    teach(
        model,
        processor.apply_chat_template,
        lambda texts: processor(text=texts, images=pictures, return_tensors="pt"),
        longest=150,
        content=lambda text: [{"type": "image"}, {"type": "text", "text": text}],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_swap_measures_held_out_accuracy_before_and_after_and_its_adapter_loads(taught, tmp_path):
    problems = [
        {
            "question": f"{answer} birds sit there. {i} come and {i} go. How many are left?",
            "answer": f"{answer}+{i}-{i} = <<{answer}+{i}-{i}={answer}>>{answer} birds are left.\n#### {answer}",
        }
        for i, answer in enumerate(ANSWERS * 8, 10)
    ]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    outputs = run(
        "swap",
        tmp_path,
        dict(MODEL=taught, DATASET="gsm8k.jsonl", TRAIN_ROWS=8, EVAL_ROWS=8, STEPS=2, BATCH_SIZE=4,
             NUM_GENERATIONS=4, MAX_COMPLETION_LENGTH=16),
    )  # fmt: skip
    prompts = one(outputs, "The teacher reads:")
    assert "Worked solution:" in prompts.split("The teacher reads:")[1]
    assert "Worked solution:" not in prompts.split("The teacher reads:")[0]
    accuracies = re.findall(r"step (\d): accuracy (\d\.\d\d) of 8", one(outputs, "accuracy"))
    assert [step for step, _ in accuracies] == ["0", "2"]
    assert all(0 < float(value) < 1 for _, value in accuracies)
    assert re.search(r"---\n\\boxed\{\d\}\n--- right: \d", one(outputs, "--- right:"))
    assert (tmp_path / "rlsd-gsm8k" / "adapter_model.safetensors").is_file()


def test_your_data_shows_what_the_teacher_reads_and_keeps_checked_solutions(taught, tmp_path):
    outputs = run(
        "your_data",
        tmp_path,
        dict(MODEL=taught, DOCUMENT_TOKENS=80, STEPS=2, BATCH_SIZE=4, NUM_GENERATIONS=4, MAX_COMPLETION_LENGTH=16),
    )
    student, teacher = one(outputs, "--- the student reads:").split("--- the teacher also reads:")
    for said in ("Discounts come first", "20 % of 5 euros is 1 euro", "Final answer:\n4"):
        assert said in teacher
        assert said not in student
    assert int(teacher.rsplit(": ", 1)[1]) > 80  # bytes are the tokens here: two paragraphs are cut
    refused = one(outputs, "1 of 2 rows are left")
    assert "the prompt states 'Answer: 6'" in refused
    solved = int(re.search(r"(\d) of 6 problems have a checked solution", "".join(outputs)).group(1))
    traces = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert [row["trace"] for row in traces].count(None) == 6 - solved < 6
    assert all(row["trace"] in (None, f"\\boxed{{{row['answer']}}}") for row in traces)
    assert "Curriculum: stage 2 of 2 follows step 1." in one(outputs, "The teacher reads:")
    rewards = re.findall(r"step (\d): reward (\d\.\d\d), lambda (\d\.\d\d)", one(outputs, "step 1: reward"))
    assert [(step, lam) for step, _, lam in rewards] == [("1", "0.50"), ("2", "0.49")]


def tokens_of(page: str) -> list[tuple[str, str]]:
    """Text and gain of the tokens of a page, or of the frame that holds it."""
    page = html.unescape(page) if "srcdoc" in page else page
    found = re.findall(r'<span class="t[^>]*data-gain="([^"]*)"[^>]*><span class="x">(.*?)</span>', page, re.DOTALL)
    return [(html.unescape(shown), gain) for gain, shown in found]


def test_explore_credit_shows_the_same_completions_under_each_context_and_credit(taught, tmp_path):
    outputs = run("explore_credit", tmp_path, dict(MODEL=taught, NUM_GENERATIONS=8, MAX_COMPLETION_LENGTH=16))
    pages = [tokens_of(output) for output in outputs if "srcdoc" in output]
    assert [len(page) for page in pages] == [8 * 10, 4 * 10, 3 * 10]  # completions of ten tokens
    first = [shown for shown, _ in pages[0][:10]]
    assert re.fullmatch(r"\\boxed\{[46]\}</s>", "".join(first))
    for page in pages[1:]:
        assert [shown for shown, _ in page] == first * (len(page) // 10)
    answer, solution, wrong, nothing = ([gain for _, gain in pages[1][i : i + 10]] for i in range(0, 40, 10))
    assert answer != solution != wrong
    assert nothing == [""] * 10
    assert "nothing: 10 tokens, gain +0.00 nats in all" in one(outputs, "nothing: ")
    saved = (tmp_path / "credit.html").read_text()
    assert tokens_of(saved) == pages[0]
    terminal = html.unescape(one(outputs, "The teacher read: "))
    assert "The student read: " in terminal
    assert re.search(r"(better|worse) than its group, A = [+-]", terminal)
    inspected = one(outputs, "1. better than its group, A = +1.000")
    assert "2. worse than its group, A = -1.000" in inspected
    assert len(tokens_of((tmp_path / "inspect.html").read_text())) == 2 * 17


def test_vision_language_shows_the_teacher_a_crop_and_its_adapter_loads(taught_vlm, tmp_path):
    outputs = run(
        "vision_language",
        tmp_path,
        dict(MODEL=taught_vlm, ROWS=4, FEWEST_DOTS=4, MOST_DOTS=4, STEPS=2, BATCH_SIZE=8, NUM_GENERATIONS=8,
             MAX_COMPLETION_LENGTH=16),
    )  # fmt: skip
    student, teacher = one(outputs, "The teacher reads:").split("The teacher reads:")
    assert (student.count("<start_of_image>"), teacher.count("<start_of_image>")) == (1, 2)
    assert "There are 4 dots" in teacher
    assert "There are" not in student.split("The student reads:")[1]
    assert sum("PIL." in output for output in outputs) == 2
    steps = re.findall(r"step (\d): reward (0\.\d\d), gain ([+-]\d\.\d{5})", one(outputs, "step 1: reward"))
    assert [step for step, *_ in steps] == ["1", "2"]
    assert all(0 < float(reward) < 1 and float(gain) != 0 for _, reward, gain in steps)
    assert re.search(r"\\boxed\{[46]\}\n--- right: 4", one(outputs, "--- right:"))


def test_publish_lists_uploads_and_reads_back_the_adapter_alone(taught, tmp_path):
    with HubServer() as hub:
        hub.tokens[TOKEN] = "me"
        hub.create("tiny/base", files={path.name: path.read_bytes() for path in Path(taught).iterdir()})
        outputs = run(
            "publish",
            tmp_path,
            dict(MODEL="tiny/base", TRAIN_ROWS=8, EVAL_ROWS=4, STEPS=2, BATCH_SIZE=4, NUM_GENERATIONS=4,
                 MAX_COMPLETION_LENGTH=16),
            HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1",
        )  # fmt: skip
        repo = hub.repos["me/rlsd-sums"]
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_curves.png"}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert repo.private
    assert set(repo.branches["main"].files) == adapter | tokenizer | {".gitattributes"}
    for listed in (one(outputs, "Would be published at"), one(outputs, "Published, commit")):
        assert set(re.findall(r"bytes  (\S+)", listed)) == adapter | tokenizer
    assert "Not published: metrics.jsonl, rlsd_run.json, training_args.bin" in one(outputs, "Would be published at")
    card = one(outputs, "## Evaluation")
    assert re.search(r"\| share of right completions \| [01](\.\d+)? \| [01](\.\d+)? \|", card)
    assert re.search(r"---\n\\boxed\{[46]\}\n--- right: -?\d", one(outputs, "--- right:"))


@EACH
def test_a_notebook_is_kept_without_outputs_and_is_short(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) <= 15
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@EACH
def test_the_badge_opens_this_notebook_and_the_index_names_it(path):
    first = read(path).cells[0].source
    (opened,) = re.findall(r"\[!\[Open in Colab\]\(\S+\)\]\((\S+)\)", first)
    assert opened == f"https://colab.research.google.com/github/trl-rlsd/trl-rlsd/blob/main/notebooks/{path.name}"
    assert f"]({path.name})" in (FOLDER / "README.md").read_text()


@EACH
def test_what_is_installed_is_what_was_tested_and_leaves_torch_alone(path):
    wanted = shlex.split(tagged(read(path), "install").source.removeprefix("%pip install -q "))
    package, *pins = wanted
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(pins) <= set(tested)
    assert {"trl", "transformers", "peft"} <= {pin.split("==")[0] for pin in pins}
    assert not any(pin.startswith("torch") for pin in pins)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name, asked = re.fullmatch(r"([\w-]+)(?:\[(.*)\])?", package).groups()
    assert name == "trl-rlsd"
    assert set(asked.split(",")) <= set(extras)


@EACH
@pytest.mark.parametrize(
    "capability, expected",
    [(None, (False, False, "float32")), ((7, 5), (False, True, "float16")), ((8, 0), (True, False, "bfloat16"))],
    ids=["cpu", "t4", "a100"],
)
def test_precision_follows_the_gpus_capability(path, capability, expected):
    lines = [line for cell in read(path).cells for line in cell.source.splitlines()]
    code = "\n".join(line for line in lines if re.match(r"(bf16|fp16|dtype) = ", line))
    cuda = SimpleNamespace(is_available=lambda: capability is not None, get_device_capability=lambda: capability)
    found = {"torch": SimpleNamespace(cuda=cuda)}
    exec(code, found)
    assert (found["bf16"], found["fp16"], found["dtype"]) == expected


@EACH
def test_one_gpu_is_chosen_before_torch_is_imported(path):
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert source.index('setdefault("CUDA_VISIBLE_DEVICES", "0")') < source.index("import torch")
