"""Rows from datasets as they are: every preset on rows of its dataset's schema, and every mistake by its name."""

import csv
import json
import sqlite3
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value, disable_progress_bars, enable_progress_bars

from trl_rlsd.data.load import load_rows
from trl_rlsd.data.presets import PRESETS, Field, Preset, fitting_presets, presets_for
from trl_rlsd.data.privileged import Documents
from trl_rlsd.data.readers import after_start, boxed, gsm8k_answer
from trl_rlsd.rewards import get_reward


@pytest.fixture(autouse=True)
def quiet():
    disable_progress_bars()
    yield
    enable_progress_bars()


JANET = "Janet sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $f(2)$.\n\nRemember to put your "
    'answer on its own line after "Answer:".'
)
CLOSE = (
    "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
    '    """ Check if in given list of numbers, are any two numbers closer to each other than\n    given threshold.\n'
    '    >>> has_close_elements([1.0, 2.0, 3.0], 0.5)\n    False\n    """\n'
)
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": CLOSE,
    "canonical_solution": "    pairs = zip(sorted(numbers), sorted(numbers)[1:])\n    for a, b in pairs:\n"
    "        if b - a < threshold:\n            return True\n\n    return False\n",
    "test": "def check(candidate):\n    assert candidate([1.0, 1.1], 0.5)",
    "entry_point": "has_close_elements",
}
APPS = {"problem_id": 0, "difficulty": "interview", "url": "https://example.org"}

# preset -> a row of the dataset's schema, and of the row that is made: the prompt, the privileged context, and the
# columns of the reward
SCHEMAS = {
    "gsm8k": (
        {"question": "How many clips?", "answer": JANET},
        "How many clips?\n\nReason step by step and put the final answer in \\boxed{}.",
        "Worked solution:\nJanet sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips.\n\nFinal answer:\n72",
        {"answer": "72"},
    ),
    "math": (
        {"problem": "Halve $x$.", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{\\frac{x}{2}}$."},
        "Halve $x$.\n\nReason step by step and put the final answer in \\boxed{}.",
        "Worked solution:\nIt is $\\boxed{\\frac{x}{2}}$.\n\nFinal answer:\n\\frac{x}{2}",
        {"answer": "\\frac{x}{2}"},
    ),
    "math_answer": (
        {"problem": "1+1?", "solution": "Add. $\\boxed{2}$", "answer": "2", "subject": "Algebra", "level": 1},
        "1+1?\n\nReason step by step and put the final answer in \\boxed{}.",
        "Worked solution:\nAdd. $\\boxed{2}$\n\nFinal answer:\n2",
        {"answer": "2"},
    ),
    "openr1_math": (
        {
            "problem": "1+1?",
            "solution": "2",
            "answer": "2",
            "uuid": "u",
            "generations": ["<think>\nOne.\n</think>\n\n1", "<think>\nAdd.\n</think>\n\n2"],
            "correctness_math_verify": [False, True],
            "correctness_llama": None,
            "messages": [{"role": "user", "content": "1+1?"}],
        },
        "1+1?\n\nReason step by step and put the final answer in \\boxed{}.",
        "2",
        {"answer": "2"},
    ),
    "dapo_math": (
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": DAPO}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b"},
        },
        "Find $f(2)$.\n\nReason step by step and put the final answer in \\boxed{}.",
        "34",
        {"answer": "34"},
    ),
    "dapo_math_processed": (
        {
            "prompt": "Find $f(2)$.",
            "solution": "34",
            "data_source": "math_dapo",
            "source_prompt": [{"role": "user", "content": DAPO}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b"},
        },
        "Find $f(2)$.\n\nReason step by step and put the final answer in \\boxed{}.",
        "34",
        {"answer": "34"},
    ),
    "rlsd_mmfinereason": (
        {"problem": "<image>How many dots?", "answer": "3", "problem_type": "math", "images": ["a.png"], "videos": []},
        "How many dots?\n\nReason step by step and put the final answer in \\boxed{}.",
        "3",
        {"answer": "3", "images": ["a.png"]},
    ),
    "mmfinereason": (
        {
            "question": "<image>\nHow many dots?",
            "answer": "B",
            "image": "a.png",
            "caption": "Three dots.",
            "qwen3vl_235b_thinking_response": "<think>Count.</think>\n<answer>B</answer>",
            "pass_rate": 0.0,
        },
        "How many dots?\n\nReason step by step and put the final answer in \\boxed{}.",
        "B",
        {"answer": "B", "image": "a.png"},
    ),
    "synthetic_text_to_sql": (
        {
            "sql_prompt": "How many?",
            "sql_context": "CREATE TABLE t (a INT); INSERT INTO t VALUES (1);",
            "sql": "SELECT count(*) FROM t",
            "sql_explanation": "Counts the rows.",
            "domain": "forestry",
        },
        "How many?\n\nDatabase schema:\nCREATE TABLE t (a INT); INSERT INTO t VALUES (1);\n\n"
        "Give the SQL query in a ```sql block.",
        "Worked solution:\nCounts the rows.\n\nFinal answer:\nSELECT count(*) FROM t",
        {"query": "SELECT count(*) FROM t", "schema": "CREATE TABLE t (a INT); INSERT INTO t VALUES (1);"},
    ),
    "sql_create_context": (
        {"question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "SELECT count(*) FROM t"},
        "How many?\n\nDatabase schema:\nCREATE TABLE t (a INT)\n\nGive the SQL query in a ```sql block.",
        "SELECT count(*) FROM t",
        {"query": "SELECT count(*) FROM t", "schema": "CREATE TABLE t (a INT)"},
    ),
    "spider": (
        {"db_id": "shop", "query": "SELECT count(*) FROM t", "question": "How many?", "query_toks": ["SELECT"]},
        "How many?\n\nDatabase schema:\nCREATE TABLE t (a INT);\n\nGive the SQL query in a ```sql block.",
        "SELECT count(*) FROM t",
        {"query": "SELECT count(*) FROM t", "database": "{root}/shop/shop.sqlite"},
    ),
    "bird": (
        {"db_id": "shop", "question": "How many?", "evidence": "a means all", "SQL": "SELECT count(*) FROM t"},
        "How many?\n\nHint: a means all\n\nDatabase schema:\nCREATE TABLE t (a INT);\n\n"
        "Give the SQL query in a ```sql block.",
        "SELECT count(*) FROM t",
        {"query": "SELECT count(*) FROM t", "database": "{root}/shop/shop.sqlite"},
    ),
    "mbpp_full": (
        {
            "task_id": 601,
            "text": "Write a function to double.",
            "code": "def double(x): return 2 * x",
            "test_list": ["assert double(1) == 2", "assert double(2) == 4"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        "Write a function to double.\n\nOne of the tests:\n```python\nassert double(1) == 2\n```\n\n"
        "Give the whole program in a ```python block.",
        "def double(x): return 2 * x",
        {"tests": ["assert double(1) == 2", "assert double(2) == 4"]},
    ),
    "mbpp_sanitized": (
        {
            "source_file": "x.ipynb",
            "task_id": 2,
            "prompt": "Write a function to double.",
            "code": "def double(x): return 2 * x",
            "test_imports": ["import math"],
            "test_list": ["assert double(1) == 2"],
        },
        "Write a function to double.\n\nOne of the tests:\n```python\nassert double(1) == 2\n```\n\n"
        "Give the whole program in a ```python block.",
        "def double(x): return 2 * x",
        {"tests": ["import math\nassert double(1) == 2"]},
    ),
    "apps": (
        {
            **APPS,
            "question": "Double a number.",
            "solutions": json.dumps(["print(2 * int(input()))", "pass"]),
            "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]}),
            "starter_code": "",
        },
        "Double a number.\n\nThe program reads from standard input and prints to standard output.\n\n"
        "Give the whole program in a ```python block.",
        "print(2 * int(input()))",
        {"tests": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})},
    ),
    "humaneval": (
        HUMANEVAL,
        f"Complete this function:\n```python\n{CLOSE}\n```\n\nGive the whole program in a ```python block.",
        "pairs = zip(sorted(numbers), sorted(numbers)[1:])\nfor a, b in pairs:\n    if b - a < threshold:\n"
        "        return True\n\nreturn False",
        {"tests": "def check(candidate):\n    assert candidate([1.0, 1.1], 0.5)\n\ncheck(has_close_elements)"},
    ),
}


@pytest.fixture
def databases(tmp_path):
    (tmp_path / "shop").mkdir()
    with sqlite3.connect(tmp_path / "shop" / "shop.sqlite") as database:
        database.execute("CREATE TABLE t (a INT)")
        database.execute("CREATE INDEX i ON t (a)")
    return {"database_root": str(tmp_path)}


def options_of(name, databases):
    return databases if name in ("spider", "bird") else {}


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_preset_is_tested():
    assert set(SCHEMAS) == set(PRESETS)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_preset_makes_prompt_context_and_the_rewards_columns(name, suffix, tmp_path, databases):
    row, prompt, context, kept = SCHEMAS[name]
    file = write(tmp_path / f"data{suffix}", [row])
    rows = load_rows(file, preset=name, contamination="refuse", **options_of(name, databases))
    kept = {
        column: value.format(root=tmp_path.resolve()) if column == "database" else value
        for column, value in kept.items()
    }
    assert rows[:] == {
        "prompt": [[{"role": "user", "content": prompt}]],
        "privileged_context": [context],
        **{column: [value] for column, value in kept.items()},
    }


def test_starter_code_that_the_prompt_shows_is_not_privileged():
    signature = "def grow(self, left: int, right: int, up: int, down: int, kind: str, size: int) -> int:"
    starter = f"\nclass Solution:\n    {signature}\n        "
    row = {**SCHEMAS["apps"][0], "question": "Grow.", "starter_code": starter}
    for body in ("total = left + right\nreturn total", "return left + right + up + down + size"):
        indented = "".join(f"        {line}\n" for line in body.splitlines())
        row["solutions"] = json.dumps([f"class Solution:\n    {signature}\n{indented}"])
        rows = load_rows(Dataset.from_list([row]), preset="apps")
        assert rows["privileged_context"][:] == [body]
        assert signature in rows[0]["prompt"][0]["content"]


@pytest.mark.parametrize(
    "code, start, rest",
    [
        ("def f(x):\n\treturn x", "def f(x):\n\t", "return x"),
        ("def f( x ):\n    a = x\n    return a\n", "def f(x):", "a = x\nreturn a"),
        ("import re\ndef f(x):\n    return x", "def f(x):", "import re\ndef f(x):\n    return x"),
        ("def f(x):", "def f(x):", "def f(x):"),
        ("print(1)\n", "", "print(1)\n"),
        ("print(1)\n", None, "print(1)\n"),
    ],
)
def test_only_lines_that_code_begins_with_are_left_out(code, start, rest):
    assert after_start(code, start) == rest


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_kind_of_a_preset_can_be_asked_for(name, databases):
    row, *_ = SCHEMAS[name]
    preset = PRESETS[name]
    rows = load_rows(
        Dataset.from_list([row]),
        preset=name,
        privileged=tuple(preset.kinds),
        prompt_template="{prompt}",
        **options_of(name, databases),
    )
    assert rows[0]["privileged_context"].count(":\n") >= len(preset.kinds) * (len(preset.kinds) > 1)
    assert preset in fitting_presets(row)


FORMS = {"math": "So \\boxed{{{}}}.", "sql": "```sql\n{}\n```", "code": "```python\n{}\n```"}


@pytest.mark.parametrize("name", ["math", "mmfinereason", "synthetic_text_to_sql", "bird", "mbpp_sanitized", "apps"])
def test_the_reference_in_the_form_that_the_prompt_asks_for_earns_the_presets_reward(name, databases):
    preset = PRESETS[name]
    kind = preset.reward.removesuffix("_reward")
    # the program is the reference, and no sandbox is needed for it
    options = {**preset.reward_options, **({"unsafe": True} if kind == "code" else {})}
    reward = get_reward(f"trl_rlsd.rewards.{kind}.{preset.reward}", options)
    data = Dataset.from_list([SCHEMAS[name][0]])
    rows = load_rows(data, preset=name, privileged="answer", **options_of(name, databases))
    completions = [FORMS[kind].format(text) for text in (rows[0]["privileged_context"], "SELECT 7, 7")]
    columns = {column: [rows[0][column]] * 2 for column in preset.kept}
    assert reward(None, completions, **columns) == [1.0, 0.0]


def test_presets_are_found_by_the_id_on_the_hub():
    ids = {
        "openai/gsm8k": ["gsm8k"],
        "open-r1/OpenR1-Math-220k": ["openr1_math"],
        "bytedtsinghua-sia/dapo-math-17k": ["dapo_math"],
        "iieycx/rlsd-train-MMFineReason-123K": ["rlsd_mmfinereason"],
        "google-research-datasets/mbpp": ["mbpp_full", "mbpp_sanitized"],
        "nobody/knows": [],
    }
    assert {source: [preset.name for preset in presets_for(source)] for source in ids} == ids
    sources = [source for preset in PRESETS.values() for source in preset.sources]
    assert all(presets_for(source) for source in sources)


def test_of_two_presets_of_one_id_the_columns_decide(monkeypatch):
    asked = []
    data = Dataset.from_list([SCHEMAS["mbpp_sanitized"][0]])

    def hub(source, **options):
        asked.append((source, options))
        return data

    monkeypatch.setattr("trl_rlsd.data.load.load_dataset", hub)
    rows = load_rows("google-research-datasets/mbpp", config="sanitized", split="test")
    assert rows[0]["tests"] == ["import math\nassert double(1) == 2"]
    assert asked == [("google-research-datasets/mbpp", {"name": "sanitized", "split": "test"})]


def test_a_known_id_loads_its_configuration_and_another_id_its_own(monkeypatch):
    asked = []

    def hub(source, **options):
        asked.append((source, options["name"]))
        return Dataset.from_list([SCHEMAS["gsm8k"][0]])

    monkeypatch.setattr("trl_rlsd.data.load.load_dataset", hub)
    load_rows("openai/gsm8k")
    load_rows("openai/gsm8k", config="socratic")
    load_rows("me/gsm8k-copy", preset="gsm8k")
    assert asked == [("openai/gsm8k", "main"), ("openai/gsm8k", "socratic"), ("me/gsm8k-copy", None)]


def test_the_trace_of_openr1_is_the_first_verified_generation_and_none_without_one():
    row = SCHEMAS["openr1_math"][0]
    verdicts = [([False, True], None), ([True, True], None), ([False, False], [True, False]), ([False, False], None)]
    data = Dataset.from_list(
        [{**row, "correctness_math_verify": v, "correctness_llama": judged} for v, judged in verdicts]
    )
    rows = load_rows(data, preset="openr1_math", privileged="trace")
    assert rows["privileged_context"][:] == ["Add.\n\n\n2", "One.\n\n\n1", "One.\n\n\n1", None]
    # a copy without the judge's column
    rows = load_rows(data.remove_columns("correctness_llama"), preset="openr1_math", privileged="trace")
    assert rows["privileged_context"][2:] == [None, None]


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("$\\boxed{1}$ or rather $\\boxed{\\{1, \\frac{1}{2}\\}}$", "\\{1, \\frac{1}{2}\\}"),
        ("\\fbox{7}", "7"),
        ("$\\boxed 5$.", "5"),
        ("no box", None),
        ("\\boxed{open", None),
        ("\\boxed", None),
        (None, None),
    ],
)
def test_the_answer_of_a_solution_is_its_last_box(solution, answer):
    assert boxed(solution) == answer


def test_the_answer_of_gsm8k_stands_behind_the_last_mark():
    assert gsm8k_answer("#### is no heading\n#### 1,000 ") == "1,000"
    assert gsm8k_answer("no mark") is gsm8k_answer("#### ") is gsm8k_answer(None) is None


def test_a_row_without_privileged_context_keeps_plain_grpo_credit_wherever_it_stands():
    data = Dataset.from_list([{"q": f"{i}?", "a": None if i < 1500 else "7", "id": i} for i in range(1501)])
    rows = load_rows(data, columns={"prompt": "q", "answer": "a"}, keep=("id",))
    assert rows["privileged_context"][:1500] == [None] * 1500
    assert rows[1500]["privileged_context"] == "7"
    assert rows["id"][:] == list(range(1501))


def test_a_map_of_columns_needs_no_preset(tmp_path):
    file = write(tmp_path / "data.csv", [{"q": "6*7?", "target": "042", "cot": "None", "id": "x"}])
    rows = load_rows(
        file,
        columns={"prompt": "q", "answer": "target", "trace": "cot"},
        prompt_template="math",
        system_prompt="Be brief.",
    )
    assert rows[:] == {
        "prompt": [
            [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": "6*7?\n\nReason step by step and put the final answer in \\boxed{}.",
                },
            ]
        ],
        "privileged_context": ["Worked solution:\nNone\n\nFinal answer:\n042"],  # cells as they stand
        "answer": ["042"],
    }


def test_columns_over_a_preset_are_read_as_the_presets_own():
    data = Dataset.from_list([{"q": "How many?", "target": JANET, "rationale": "Halve, add."}])
    named = {"prompt": "q", "answer": "target", "trace": "rationale"}
    rows = load_rows(data, preset="gsm8k", columns=named)
    assert rows["answer"][:] == ["72"]
    assert rows["privileged_context"][:] == ["Worked solution:\nHalve, add.\n\nFinal answer:\n72"]
    row = {**SCHEMAS["rlsd_mmfinereason"][0], "conclusion": "Three dots."}
    rows = load_rows(Dataset.from_list([row]), preset="rlsd_mmfinereason", columns={"trace": "conclusion"})
    assert rows["privileged_context"][:] == ["Worked solution:\nThree dots.\n\nFinal answer:\n3"]
    assert rows.column_names == ["prompt", "privileged_context", "answer", "images"]


def test_kinds_can_be_given_columns_of_their_own():
    data = Dataset.from_list([{"prompt": "2+2?", "gold": "4", "how": "Add.", "id": 1}])
    rows = load_rows(data, privileged={"answer": "gold", "trace": "how"})
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "privileged_context": "Worked solution:\nAdd.\n\nFinal answer:\n4",
        "gold": "4",
        "how": "Add.",
        "id": 1,
    }


def test_rows_that_are_ready_stay_as_they_are():
    data = Dataset.from_list([{"prompt": "2+2?", "privileged_context": "4", "solution": "4", "id": 1}] * 2)
    assert load_rows(data, limit=1)[:] == data[:1]
    with pytest.raises(ValueError, match=r"1 of 1 rows.*row 0 \(privileged_context: the prompt states 'Answer: 4'"):
        load_rows(Dataset.from_list([{"prompt": "Answer: 4", "privileged_context": "4"}]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("contamination", ["refuse", "ignore"])
@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "2+2?", "privileged_context": 4}, "Column 'privileged_context' is of type int64;.*str"),
        ({"prompt": "2+2?", "privileged_context": 4.5}, "'privileged_context' is of type float64"),
        ({"prompt": "2+2?", "privileged_context": ["4"]}, r"'privileged_context' is of type List\("),
        ({"prompt": 22, "privileged_context": "4"}, "Column 'prompt' is of type int64"),
    ],
)
def test_ready_columns_that_are_no_text_are_refused_by_name(tmp_path, suffix, contamination, row, said):
    file = write(tmp_path / f"data{suffix}", [row])
    with pytest.raises(TypeError, match=said):
        load_rows(file, contamination=contamination)


@pytest.mark.parametrize("context", ["4", None, [{"role": "user", "content": "4"}]])
def test_ready_columns_may_be_text_messages_or_empty(context):
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "2+2?"}], "privileged_context": context}])
    assert load_rows(data)[:] == data[:]


def test_plain_text_prompts_and_plain_grpo_can_be_asked_for():
    data = Dataset.from_list([SCHEMAS["gsm8k"][0]])
    rows = load_rows(data, preset="gsm8k", privileged=(), conversational=False, prompt_template="Q: {prompt}\nA:")
    assert rows[:] == {"prompt": ["Q: How many clips?\nA:"], "privileged_context": [None], "answer": ["72"]}


def test_a_conversation_stays_one_with_the_system_message_before_it():
    messages = [{"role": "user", "content": "Hi", "name": "u"}, {"role": "assistant", "content": "Hi!", "name": None}]
    data = Dataset.from_list([{"messages": messages, "answer": "4"}])
    rows = load_rows(data, columns={"prompt": "messages", "answer": "answer"}, system_prompt="S")
    assert rows[0]["prompt"] == [{"role": "system", "content": "S", "name": None}, *messages]
    for options, said in (
        ({"conversational": False}, "not made plain"),
        ({"prompt_template": "{prompt}!"}, "takes no prompt_template"),
    ):
        with pytest.raises(ValueError, match=f"Row 0: .*{said}"):
            load_rows(data, columns={"prompt": "messages", "answer": "answer"}, **options)
    data = Dataset.from_list([{"prompt": [{"role": "system", "content": "S"}], "answer": "4"}])
    with pytest.raises(ValueError, match="has a system message already"):
        load_rows(data, columns={"answer": "answer"}, system_prompt="S")


def test_images_pass_through_without_being_decoded():
    features = Features({"problem": Value("string"), "answer": Value("string"), "images": List(Image())})
    broken = [{"bytes": b"no image", "path": None}]
    data = Dataset.from_dict({"problem": ["a", "b"], "answer": ["1", "2"], "images": [broken, []]}, features=features)
    rows = load_rows(data.select([1, 0]), preset="rlsd_mmfinereason")
    assert rows.features["images"] == List(Image())
    assert rows.cast_column("images", List(Image(decode=False)))["images"][:] == [[], broken]
    assert rows["answer"][:] == ["2", "1"]


def test_documents_join_the_context_and_the_cut_is_counted(tmp_path):
    (tmp_path / "rules.md").write_text("one two\n\nthree four")
    data = Dataset.from_list([{"q": f"{i}?", "a": "7", "page": "five" if i else None} for i in range(2)])
    named = {"prompt": "q", "answer": "a"}
    rows = load_rows(data, columns=named, documents="page")
    assert rows["privileged_context"][:] == ["7", "Documents:\nfive\n\nFinal answer:\n7"]
    assert "privileged_tokens_cut" not in rows.column_names
    documents = Documents("page", "rules.md", tmp_path, budget=4, tokenizer=str.split)
    rows = load_rows(data, columns=named, documents=documents)
    assert rows["privileged_context"][1] == "Documents:\nfive\n\none two\n\nFinal answer:\n7"
    assert rows["privileged_tokens_cut"][:] == [0, 2]
    rows = load_rows(data, columns=named, documents=documents, privileged="documents")
    assert rows["privileged_context"][0] == "one two\n\nthree four"


def test_a_missing_document_names_row_and_path(tmp_path):
    (tmp_path / "a.md").write_text("a")
    data = Dataset.from_list([{"prompt": "q", "answer": "7", "path": path} for path in ("a.md", "b.md")])
    with pytest.raises(ValueError, match=r"Row 1: there is no document 'b\.md'"):
        load_rows(data, documents=Documents(files="path", root=tmp_path))


LEAKY = [
    {"q": "What is 2+2?", "a": "4", "id": 0},
    {"q": "What is 2+2? Answer: 4", "a": "4", "id": 1},
    {"q": "Is it?", "a": "no", "id": 2},
]


def test_prompts_that_hold_privileged_text_are_refused_dropped_or_ignored(caplog):
    data, named = Dataset.from_list(LEAKY), {"prompt": "q", "answer": "a"}
    with pytest.raises(ValueError, match=r"1 of 3 rows.*row 1 \(answer: the prompt states 'Answer: 4'\)"):
        load_rows(data, columns=named)
    assert load_rows(data, columns=named, contamination="drop", keep="id")["id"][:] == [0, 2]
    assert "1 of 3 rows" in caplog.text
    assert len(load_rows(data, columns=named, contamination="ignore")) == 3
    with pytest.raises(ValueError, match="1 of 1 rows"):  # nothing would be left
        load_rows(data.select([1]), columns=named, contamination="drop")


def test_a_schema_that_the_prompt_shows_is_not_privileged():
    row = {**SCHEMAS["sql_create_context"][0], "context": "CREATE TABLE t (a INT, b TEXT)"}
    with pytest.raises(ValueError, match="schema: the prompt contains 'CREATE TABLE"):
        load_rows(Dataset.from_list([row]), preset="sql_create_context", privileged=("answer", "schema"))


@pytest.mark.parametrize(
    "row, options, said",
    [
        ({"question": "q", "target": "7"}, {}, r"'prompt'.*'prompt': 'question', 'answer': 'target'"),
        ({"question": "q", "answer": "7"}, {}, r"These fit preset='gsm8k'.*'prompt': 'question', 'answer': 'answer'"),
        ({"question": "q", "Target": "7"}, {"preset": "gsm8k"}, r"\{'answer': 'Target', 'trace': 'Target'\}"),
        ({"zzz": "q"}, {}, r"it has 'zzz'\. Name them: columns=\{'prompt': '\.\.\.', 'answer': '\.\.\.'\}"),
        ({"q": "q"}, {"columns": {"prompt": "q", "answer": "a"}}, "no column 'a'.*it has 'q'"),
        ({"prompt": "q", "a": "7"}, {"privileged": {"answer": "b"}}, "no column 'b', which was named; it has"),
        ({"prompt": "q", "answer": "7"}, {"keep": ("id",)}, "no column 'id', which was named"),
        ({"prompt": "q", "answer": "7"}, {"documents": "page"}, "no column 'page', which was named"),
        ({"prompt": "q", "answer": "7"}, {"keep": "answer"}, "keep has 'answer'"),
        ({"prompt": "q", "answer": "7"}, {"columns": {"documents": "d"}}, "argument of its own"),
        ({"prompt": "q", "x": "7"}, {}, "Nothing is privileged.*privileged=\\(\\) makes rows for plain GRPO"),
        ({"prompt": "q", "answer": "7"}, {"privileged": "trace"}, "has no 'trace'; it has 'answer'"),
        ({"prompt": "q", "answer": "7"}, {"privileged": "hint"}, "'hint' is not a kind"),
        ({"prompt": "q", "answer": "7"}, {"privileged": "documents"}, "'documents', but there are none"),
        ({"prompt": "q", "answer": "7"}, {"prompt_template": "{question}"}, "'question' is no field.*'prompt'"),
        ({"prompt": "q", "answer": "7"}, {"prompt_template": "{prompt} \\boxed{}"}, "'' is no field.*Double"),
        ({"prompt": "q", "answer": "7"}, {"prompt_template": "no question"}, r"\{prompt\} is missing"),
        ({"prompt": "q", "answer": "7"}, {"prompt_template": "{prompt"}, "Double the braces"),
        ({"prompt": "q", "answer": "7"}, {"preset": "gsm9k"}, "preset='gsm9k' is not a preset. Give one of gsm8k"),
        ({"prompt": "q", "answer": "7"}, {"preset": "no.such"}, "preset='no.such' cannot be loaded"),
        ({"prompt": "q", "answer": "7"}, {"contamination": "warn"}, "contamination='warn' is none of"),
        ({"prompt": "q", "answer": "7"}, {"limit": 0}, "limit=0"),
        ({"prompt": "q", "answer": "7"}, {"system_prompt": "s", "conversational": False}, "needs conversational"),
        ({"prompt": " ", "answer": "7"}, {}, r"Row 0: the prompt is empty \('prompt'\)"),
        ({"question": "q", "answer": "no mark"}, {"preset": "gsm8k"}, r"No row has answer: preset 'gsm8k'.*right"),
        ({"question": "q", "answer": 7}, {"preset": "gsm8k"}, "Row 0: 'answer' cannot be read from 'answer': Attrib"),
        ({"prompt": "q", "answer": None}, {}, "No row has privileged_context"),
        ({**SCHEMAS["dapo_math"][0], "prompt": [{"role": "user", "content": "a"}] * 2}, {"preset": "dapo_math"},
         "Row 0: 'prompt' cannot be read from 'prompt'.*2 messages"),
        (SCHEMAS["spider"][0], {"preset": "spider"}, "'spider' needs database_root="),
        (SCHEMAS["spider"][0], {"preset": "spider", "database_root": "/no"}, r"Row 0.*database /no/shop/shop\.sq"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_fix(row, options, said):
    with pytest.raises(ValueError, match=said):
        load_rows(Dataset.from_list([row]), **options)


def test_a_database_is_not_looked_for_outside_of_its_folder(tmp_path):
    for folder in ("root", "other/shop", "other/other"):
        (tmp_path / folder).mkdir(parents=True)
    sqlite3.connect(tmp_path / "other" / "other" / "shop.sqlite").close()
    row = {**SCHEMAS["spider"][0], "db_id": "../other/shop"}
    with pytest.raises(ValueError, match=r"Row 0.*there is no database"):
        load_rows(Dataset.from_list([row]), preset="spider", database_root=tmp_path / "root")


def test_a_schema_in_a_column_is_shown_in_the_place_of_the_databases(databases):
    data = Dataset.from_list([{**SCHEMAS["spider"][0], "ddl": "CREATE TABLE t (a INT) -- all"}])
    rows = load_rows(data, preset="spider", columns={"schema": "ddl"}, **databases)
    assert "-- all" in rows[0]["prompt"][0]["content"]
    assert set(rows.column_names) == {"prompt", "privileged_context", "query", "database"}


def test_a_broken_database_is_named(tmp_path, databases):
    (tmp_path / "shop" / "shop.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="Row 0: 'schema' cannot be read from 'db_id': DatabaseError"):
        load_rows(Dataset.from_list([SCHEMAS["spider"][0]]), preset="spider", **databases)


def test_an_option_that_nothing_takes_is_refused():
    with pytest.raises(TypeError, match="no argument 'database_rot'"):
        load_rows(Dataset.from_list([SCHEMAS["gsm8k"][0]]), preset="gsm8k", database_rot="x")


def test_sources_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_rows(str(tmp_path / "none.jsonl"))
    data = Dataset.from_list([SCHEMAS["gsm8k"][0]])
    with pytest.raises(ValueError, match="split='test' is not there; there is 'train'"):
        load_rows(DatasetDict(train=data), preset="gsm8k", split="test")
    assert len(load_rows(DatasetDict(test=data), preset="gsm8k", split="test")) == 1
    with pytest.raises(TypeError, match="IterableDataset: load_rows reads all rows"):
        load_rows(data.to_iterable_dataset(), preset="gsm8k")
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(data.select([]), preset="gsm8k")


def test_dates_that_a_json_reader_made_of_text_are_refused(tmp_path):
    file = write(tmp_path / "data.jsonl", [{"prompt": "When?", "answer": "2020-01-31"}])
    with pytest.raises(ValueError, match=r"Column 'answer' of '.*data\.jsonl' was read as timestamp"):
        load_rows(file)


def test_several_files_are_read_in_order(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}?", "answer": name}])
    assert load_rows(str(tmp_path / "*.jsonl"))["answer"][:] == ["a", "b"]
    assert load_rows(tmp_path / "b.jsonl")["answer"][:] == ["b"]


def test_changed_documents_are_read_again(tmp_path):
    file = write(tmp_path / "data.jsonl", [{"prompt": "q", "path": "a.md"}])
    for text in ("old", "new"):
        (tmp_path / "a.md").write_text(text)
        rows = load_rows(file, documents=Documents(files="path", root=tmp_path))
        assert rows["privileged_context"][:] == [text]


shouting = Preset(
    "shouting", {"prompt": Field(("q",), str.upper), "answer": Field(("a",))}, ("answer",), {"answer": "answer"}
)


def test_a_preset_of_ones_own_works_as_object_and_by_its_path():
    data = Dataset.from_list([{"q": "why?", "a": "so"}])
    for preset in (shouting, f"{__name__}.shouting"):
        assert load_rows(data, preset=preset)[0]["prompt"][0]["content"] == "WHY?"


def test_reasoning_gym_by_name():
    pytest.importorskip("reasoning_gym")
    rows = load_rows("reasoning_gym:chain_sum", size=5, seed=1, system_prompt="Be brief.", max_digits=1)
    assert len(rows) == 5
    assert set(rows.column_names) == {"prompt", "privileged_context", "reasoning_gym"}
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    for options in ({"preset": "gsm8k"}, {"columns": {"prompt": "x"}}, {"split": "test"}, {"privileged": ()}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} does not apply to source='reasoning_gym:chain"):
            load_rows("reasoning_gym:chain_sum", size=5, **options)


def test_nothing_of_reasoning_gym_is_needed_for_other_data():
    code = (
        "import sys; sys.modules['reasoning_gym'] = None\n"
        "from datasets import Dataset; from trl_rlsd.data.load import load_rows\n"
        "print(load_rows(Dataset.from_list([{'prompt': 'q', 'answer': '7'}]))['privileged_context'][:])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['7']"
