"""JSON in completions: where it stands, whether its schema holds, and what is no JSON."""

import json
import pickle
import threading
import time

import pytest
from datasets import Dataset


pytest.importorskip("jsonschema_rs")

from trl_rlsd.checks import check_rewards
from trl_rlsd.rewards.fences import fenced_blocks, last_block
from trl_rlsd.rewards.grading import CannotGrade
from trl_rlsd.rewards.json_schema import JSONSchemaReward, find_json, grade, json_schema_reward


POINT = json.dumps({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})
ANY = "true"


@pytest.mark.parametrize(
    "text, found",
    [
        ('{"x": 1}', {"x": 1}),
        (" 42\n", 42),
        ('It is {"x": 1}.', {"x": 1}),
        ('First {"x": 1}, then {"x": 2}!', {"x": 2}),
        ('Not {this}, but {"x": {"y": [1, 2]}} (see {there}).', {"x": {"y": [1, 2]}}),
        ('In [0, 1) it is {"x": "}"}.', {"x": "}"}),
        ('Of 5" it is {"x": "\\"{"}.', {"x": '"{'}),
        ("<answer>[1]</answer>", [1]),
        ('Mind {[}, or [0, 1): {"x": 1}', {"x": 1}),
        ('```json\n{"x": 1}\n```\nas {"x": 2} is wrong', {"x": 1}),
        ('```json\n{"x": 1}\n```\n```json\n{"x": 2}\n```', {"x": 2}),
        ('```json\n{"x": 1}\n```\n```python\n{"x": 2}\n```', {"x": 1}),
        ('```json\n{"x": 1}\n```\n```json\n{"x":', {"x": 1}),
        ('```\n{"x": 1}\n```', {"x": 1}),
        ('Answer: ```JSON\n{"x": 1}```', {"x": 1}),
        ('```json {"x": 1} ```', {"x": 1}),
        ('```json\n{"x": 1}', {"x": 1}),
        ('```json\n{"x": "```sql```"}\n```', {"x": "```sql```"}),
        ('<think>{"x": 1}</think>{"x": 2}', {"x": 2}),
        ('{"x": 1, "x": 2}', {"x": 2}),
        ("[" * 2000 + "]" * 2000 + '{"x": 1}', {"x": 1}),
    ],
)
def test_what_is_read_as_the_json(text, found):
    assert find_json(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "no JSON",
        "{'x': 1}",
        '{"x": 1,}',
        '{"x": 1',
        "```json\n```",
        "```json\n{x}\n```",
        '<think>{"x": 1}',
        "NaN",
        "[Infinity]",
        "[1e400]",
        "9" * 5000,
        "[" * 10**5 + "]" * 10**5,
        '"\ud800"',
        '"\\ud800"',
        '["\0"]',
    ],
)
def test_what_is_no_json_is_wrong_under_every_schema(text):
    assert grade(text, ANY) == 0.0
    assert grade(text, '{"type": ["string", "number", "array", "object"]}') == 0.0


def test_valid_json_is_right_and_any_other_wrong():
    texts = ['{"x": 1}', '{"x": "1"}', "{}", "[1]", '{"x": 1.0, "y": null}', '{"x": true}']
    assert json_schema_reward(None, texts, schema=[POINT] * 6) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert json_schema_reward(None, texts[:2], schema=[json.loads(POINT)] * 2) == [1.0, 0.0]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert json_schema_reward(None, chats, schema=[POINT] * 6) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_one_schema_serves_all_rows():
    reward = JSONSchemaReward(schema=POINT)
    assert reward(None, ['{"x": 1}', "{}"]) == [1.0, 0.0]
    assert reward(None, ['{"x": 1}', "{}"], schema=[None, ANY]) == [1.0, 0.0], "the option counts, not the column"
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_the_columns_that_are_required_are_those_that_are_read():
    with_answer = dict(answer_column="answer")
    for options, columns in [
        ({}, ("schema",)),
        (with_answer, ("schema", "answer")),
        ({"schema": POINT}, ()),
        ({"schema": POINT, **with_answer}, ("answer",)),
    ]:
        reward = JSONSchemaReward(**options)
        assert reward.required_columns == columns
        rows = {"prompt": ["q"], **{name: ['{"x": 1}'] for name in columns}}
        check_rewards(reward, Dataset.from_dict(rows))
        assert reward(None, ['{"x": 1}'], **{name: rows[name] for name in columns}) == [1.0]
        for name in columns:
            with pytest.raises(ValueError, match=f"needs the column '{name}'"):
                check_rewards([reward], Dataset.from_dict(rows).remove_columns(name))


def test_one_schema_leaves_a_row_without_a_reference_to_other_rewards():
    reward = JSONSchemaReward(schema=POINT, answer_column="answer")
    assert reward(None, ['{"x": 1}'] * 2, answer=[None, '{"x": 1}']) == [None, 1.0]


@pytest.mark.parametrize(
    "completion, equal",
    [
        ('{"user": {"name": "Ada"}, "items": [2]}', 1.0),
        ('{"user": {"name": "Ada", "age": 3}, "items": [2.0, 5], "more": 1}', 1.0),
        ('{"user": {"name": "ada"}, "items": [2]}', 0.0),
        ('{"user": {"name": "Ada"}, "items": ["2"]}', 0.0),
        ('{"user": {"name": "Ada"}, "items": []}', 0.0),
        ('{"user": "Ada", "items": [2]}', 0.0),
        ("{}", 0.0),
        ("7", 0.0),
    ],
)
def test_chosen_fields_must_all_equal_the_references(completion, equal):
    reward = JSONSchemaReward(schema=ANY, answer_column="answer", fields=("user.name", "items.0"))
    reference = {"user": {"name": "Ada", "age": 36}, "items": [2, 3]}
    assert reward(None, [completion] * 2, answer=[json.dumps(reference), reference]) == [equal] * 2


@pytest.mark.parametrize(
    "completion, reference, equal",
    [
        ("1", "1.0", 1.0),
        ("true", "1", 0.0),
        ("0", "false", 0.0),
        ("null", "null", 1.0),
        ("null", "0", 0.0),
        ('"1"', "1", 0.0),
        ('{"a": 1, "b": [true]}', '{"b": [true], "a": 1}', 1.0),
        ('{"a": 1, "b": [1]}', '{"b": [true], "a": 1}', 0.0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
    ],
)
def test_without_fields_the_whole_must_be_equal(completion, reference, equal):
    assert grade(completion, ANY, (reference,)) == equal


@pytest.mark.parametrize(
    "schema, said",
    [
        ("{", "cannot be used"),
        ("3", "cannot be used"),
        ('{"type": "nope"}', "cannot be used"),
        ('{"$ref": "https://example.invalid/schema.json"}', "outside of the schema"),
        ('{"$ref": "file:///etc/passwd"}', "outside of the schema"),
        ('{"pattern": "(?=a)b"}', "regex"),
        ({"type": "object", "const": None}, "store the schemas as JSON strings"),
    ],
)
def test_a_schema_that_cannot_be_used_is_not_a_wrong_answer(schema, said, caplog):
    counted = {}
    rewards = json_schema_reward(
        None, ["{}"] * 2, schema=[schema, ANY], log_metric=lambda k, v: counted.update({k: v})
    )
    assert rewards == [None, 1.0]
    assert counted == {"json_schema_failures": 1}
    assert said in caplog.text


@pytest.mark.parametrize("reference", ["{", None, '{"b": 1}', "7"])
def test_a_reference_that_cannot_be_read_is_not_a_wrong_answer(reference):
    reward = JSONSchemaReward(answer_column="answer", fields=("a",))
    assert reward(None, ["{}", "junk"], schema=[ANY] * 2, answer=[reference] * 2) == [None, None]


def test_a_row_without_a_schema_is_left_to_other_rewards():
    assert json_schema_reward(None, ["{}", "{}"], schema=[None, ANY]) == [None, 1.0]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"schema": '{"type": "nope"}'}, "cannot be used as a JSON Schema"),
        ({"fields": ("a",)}, "answer_column"),
        ({"fields": "name", "answer_column": "answer"}, r"\('name',\)"),
    ],
)
def test_wrong_options_are_named_when_they_are_given(options, said):
    with pytest.raises(ValueError, match=said):
        JSONSchemaReward(**options)


def test_patterns_are_matched_in_linear_time():
    schema = '{"type": "string", "pattern": "^(a+)+$"}'
    start = time.process_time()
    assert grade(json.dumps("a" * 10**6 + "!"), schema) == 0.0
    assert grade(json.dumps("a" * 10**6), schema) == 1.0
    assert time.process_time() - start < 1


def test_json_in_prose_is_read_near_its_end():
    far = " so" * 70_000
    assert grade(f'{{"x": 1}}{far[:100_000]}', POINT) == 1.0
    assert grade(f'{{"x": 1}}{far}', POINT) == 0.0
    assert grade(json.dumps({"x": 1, "y": far}), POINT) == 1.0


HOSTILE = [
    "[" * 10**6,
    "{" * 10**6,
    '{"a":' * 200_000,
    '["' * 500_000,
    '"\\' * 500_000,
    '["' + '\\"' * 500_000,
    "[1," * 300_000,
    "[]" * 500_000,
    "[[],[" * 200_000,
    "[)" * 500_000,
    "[}" * 500_000,
    '["a' * 300_000,
    "[" * 800 + "1," * 500_000,
    "```" * 300_000,
    "```json\n" * 125_000,
    "```json\n" + "[" * 10**6,
    "\n" * 10**6,
    "9" * 10**6,
    "[" + "9" * 10**6 + "]",
    "\0" * 10**6,
    "\ud800" * 10**6,
    "</think>" * 120_000,
]


def test_a_megabyte_of_anything_is_graded_within_a_second():
    for text in HOSTILE:
        start = time.process_time()
        assert grade(text, POINT) == 0.0
        assert time.process_time() - start < 1, ascii(text[:20])


def test_hostile_completions_do_not_touch_their_neighbours():
    texts = [*HOSTILE[:3], '{"x": 1}', "9" * 10**6, '{"x": 2}', ""]
    reward = JSONSchemaReward()
    assert reward(None, texts, schema=[POINT] * 7) == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def test_it_is_called_in_threads():
    grades = {}

    def call(thread):
        texts = [json.dumps({"x": i if i % 4 == thread else "no"}) for i in range(20)]
        grades[thread] = json_schema_reward(None, texts, schema=[POINT] * 20)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == {i: [float(j % 4 == i) for j in range(20)] for i in range(4)}


def test_a_failure_of_a_row_says_why():
    (failure,) = json_schema_reward.grade_all(["{}"], [{"schema": '{"type": 3}'}])
    assert isinstance(failure, CannotGrade)
    assert '{"type": 3}' in str(failure)


@pytest.mark.parametrize(
    "text, blocks",
    [
        ("no block", []),
        ("```sql\nSELECT 1\n```", [("sql", "SELECT 1", True)]),
        ("```SQL title\nSELECT 1\n```", [("sql", "title\nSELECT 1", True)]),
        ("````\n```sql\nx\n```\n````", [("", "```sql\nx\n```", True)]),
        ("  ```sql\r\n1\r\n  ```\r\n", [("sql", "1\r", True)]),
        ("```a\n1\n```\n```b\n2", [("a", "1", True), ("b", "2", False)]),
        ("use ```x``` here", []),
        ("```sql", [("sql", "", False)]),
        ("```\n1\n```</answer>", [("", "1", True)]),
    ],
)
def test_fenced_blocks_are_read_as_models_write_them(text, blocks):
    assert fenced_blocks(text) == blocks


def test_a_closed_block_counts_before_one_that_is_cut_off():
    text = "```sql\n1\n```\n```sql\n2\n```\n```sql\n3"
    assert last_block(text, "sql") == "2"
    assert last_block("```sql\n3", "sql", "") == "3"
    assert last_block(text, "json") is None
