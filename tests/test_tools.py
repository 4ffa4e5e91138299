"""Tools and environments: TRL's own tool loop, with Qwen3's chat template and TRL's parser of its tool calls, on the
tiny model. What the model writes is scripted; the tools are called by TRL."""

import importlib.resources
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same, byte_tokenizer, config, dataset, tiny_llama, weights
from datasets import Dataset

from trl_rlsd import RLSDTrainer
from trl_rlsd.rewards.grading import completion_text
from trl_rlsd.train import RLSDScriptArguments, main


ROOT = Path(__file__).parent.parent
QWEN3 = importlib.resources.files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call><|im_end|>'.format
DOUBLE = CALL("double", '{"number": 21}')


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: The number.
    """
    return 2 * number


class Calculator:
    """An environment whose observation is part of the student's prompt, and so must be of the teacher's."""

    def reset(self, **columns):
        return " (observed)"

    def double(self, number: int) -> int:
        """Doubles a number.

        Args:
            number: The number.
        """
        return 2 * number


class Diary(Calculator):
    """An environment with a reward and a privileged context of its own, which notes what happens to it."""

    made = 0

    def __init__(self):
        self.name = f"rollout {Diary.made}"
        Diary.made += 1

    def reset(self, **columns):
        self.events = ["reset"]
        return " (observed)"

    def double(self, number: int) -> int:
        """Doubles a number.

        Args:
            number: The number.
        """
        self.events.append("tool")
        return 2 * number

    def get_reward(self):
        self.events.append("reward")
        return float(self.name[-1])

    def get_privileged_context(self):
        self.events.append("context")
        return f"The diary of {self.name}: {', '.join(self.events)}."


class Fixed(Calculator):
    """An environment with a tool of another name, whose rows hold the privileged context."""

    double = None

    def half(self, number: int) -> float:
        """Halves a number.

        Args:
            number: The number.
        """
        return number / 2


TOOLS = pytest.mark.parametrize(
    "options", [{"tools": [double]}, {"environment_factory": Calculator}], ids=["tools", "environment"]
)


def qwen_tokenizer():
    tokenizer = byte_tokenizer(QWEN3)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(list(TAGS))
    return tokenizer


def model_for(tokenizer, **options):
    return tiny_llama(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=8192, **options
    )


def calls_then_answers(read, row):
    """One call of a tool, and an answer that differs from row to row."""
    return DOUBLE if "<tool_response>" not in read else f"It is 42{'!' * row}<|im_end|>"


def varied(completions, **columns):
    return [i % 4 / 4 for i in range(len(completions))]


def speak(trainer, turn):
    """Script what the model writes: turn(all it has read, number of the row in the call) -> text."""

    def next_turn(prompt_ids, *args, **kwargs):
        read = map(trainer._tokenizer.decode, prompt_ids)
        return [trainer._tokenizer.encode(turn(text, row)) for row, text in enumerate(read)], None

    trainer._generate_single_turn = next_turn


def build(folder, turn=calls_then_answers, *, reward=varied, data=None, **options):
    own = ("tools", "environment_factory", "teacher_model", "eval_dataset")
    given = {name: options.pop(name) for name in own if name in options}
    tokenizer = qwen_tokenizer()
    built = RLSDTrainer(
        model_for(tokenizer),
        reward,
        config(folder, **{"max_steps": 1, "max_completion_length": 256, **options}),
        dataset(conversational=True) if data is None else data,
        processing_class=tokenizer,
        **given,
    )
    speak(built, turn)
    return built


class Record:
    """What a training step has in hand.

    Attributes:
        prompts: of the teacher, decoded; asked: of the student, decoded; forwards: of the teacher, token ids.
        batch, student_logps, credited: of the micro-batch, which is the whole generation batch.
    """

    def __init__(self, built):
        self.forwards, score, decode = [], built._teacher_pass, built._tokenizer.decode
        token_logps, observe = score.token_logps, built.observe_credit

        def watched_pass(model, prompt_ids, ids, mask, *rest):
            self.prompt_ids, self.ids, self.mask = prompt_ids, ids, mask
            self.prompts = [decode(own) for own in prompt_ids]
            return score(model, prompt_ids, ids, mask, *rest)

        def watched_forward(model, ids, mask, *rest, **fields):
            self.forwards += [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
            return token_logps(model, ids, mask, *rest, **fields)

        def watched_credit(batch, student_logps, credited):
            self.batch, self.student_logps, self.credited = dict(batch), student_logps, credited
            self.asked = [
                decode(ids[mask.bool()]) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
            ]
            observe(batch, student_logps, credited)

        built._teacher_pass, score.token_logps, built.observe_credit = watched_pass, watched_forward, watched_credit
        built.train()
        self.own = (self.batch["completion_mask"] * self.batch["tool_mask"]).bool()
        self.of_tools = self.batch["completion_mask"].bool() & ~self.own


def schema(prompt):
    return prompt.split("<tools>\n")[1].split("\n</tools>")[0]


# ---------------------------------------------------------------- the tokens


@TOOLS
def test_the_teacher_reads_the_very_tokens_of_the_rollout_tools_included(tmp_path, options):
    record = Record(build(tmp_path, teacher_shared_prefix=False, credit="opsd", **options))
    rollouts = [ids[mask.bool()].tolist() for ids, mask in zip(record.ids, record.mask, strict=True)]
    expected = [prompt + rollout for prompt, rollout in zip(record.prompt_ids, rollouts, strict=True)]
    assert sorted(record.forwards) == sorted(map(list, expected))
    trained = zip(record.batch["completion_ids"], record.batch["completion_mask"], strict=True)
    assert sorted(rollouts) == sorted(ids[mask.bool()].tolist() for ids, mask in trained)
    tokenizer = qwen_tokenizer()
    texts = {
        tokenizer.decode(tokens[mask])
        for tokens, mask in zip(record.batch["completion_ids"], record.of_tools, strict=True)
    }
    assert len(texts) == 1
    assert "<tool_response>\n42\n</tool_response>" in texts.pop()
    assert (record.batch["teacher_logps"][record.of_tools] != 0).all(), "they are scored, not skipped"


@TOOLS
def test_the_teacher_sees_the_tools_and_observations_that_the_student_sees(tmp_path, options):
    record = Record(build(tmp_path, **options))
    assert '"name": "double"' in schema(record.asked[0])
    assert {schema(prompt) for prompt in record.prompts} == {schema(prompt) for prompt in record.asked}
    for prompt in (*record.prompts, *record.asked):
        assert ("(observed)" in prompt) == ("environment_factory" in options)
    assert all("the answer is" in prompt for prompt in record.prompts)
    assert not any("the answer is" in prompt for prompt in record.asked)


@TOOLS
def test_token_credit_acts_on_the_models_own_tokens_alone(tmp_path, options):
    record = Record(build(tmp_path, **options))
    advantages = record.batch["advantages"].unsqueeze(1).expand_as(record.credited)
    moved = (record.credited != advantages) & record.own & (advantages != 0)
    assert moved.any(1).sum() == 4
    assert (record.credited[record.of_tools] == 0).all()
    assert (record.credited[record.own] != 0).all()


def test_metrics_count_the_models_own_tokens_alone(tmp_path):
    built = build(tmp_path, credit="opsd", tools=[double])
    counted = {}
    add = built._credit_metrics.add
    built._credit_metrics.add = lambda values: (counted.update(values), add(values))
    record = Record(built)
    gains = (record.batch["teacher_logps"] - record.student_logps)[record.own]
    assert counted["gain_mean"][1] == record.own.sum()
    assert float(counted["gain_mean"][0]) == pytest.approx(float(gains.sum()), rel=1e-4)
    assert counted["length"] == (int(record.own.sum()), 4)
    logged = built.state.log_history[0]
    assert logged["rlsd/gain_mean"] == pytest.approx(float(gains.mean()), rel=1e-4)
    assert logged["completions/mean_length"] == pytest.approx(float(record.own.sum() / 4))


@pytest.mark.parametrize("liger", [False, True], ids=["torch", "liger"])
def test_what_tools_wrote_moves_no_weight(tmp_path, liger):
    """Their credit and the teacher's opinion of them may be anything."""
    trained = []
    for value in (0.0, 30.0):
        built = build(tmp_path, tools=[double], credit="grpo_opsd", use_liger_loss=liger)
        score = built._score_with_teacher

        def spoiled(batch, *rest, score=score, value=value):
            score(batch, *rest)
            batch["teacher_logps"] -= value * (1 - batch["tool_mask"])

        built._score_with_teacher = spoiled
        built.train()
        trained.append(weights(built.model))
    assert_same(*trained)


@pytest.mark.parametrize("share", [False, True], ids=["whole", "shared"])
def test_the_same_prompt_and_weights_give_gain_0_after_tools_too(tmp_path, share):
    options = {"environment_factory": Calculator}
    teacher = {"teacher_model": model_for(qwen_tokenizer()), "teacher_model_kind": "external"}
    built = build(tmp_path, teacher_prompt_template="{prompt}", teacher_shared_prefix=share, **teacher, **options)
    record = Record(built)
    assert record.student_logps[record.own].abs().mean() > 0.1
    gains = (record.batch["teacher_logps"] - record.student_logps)[record.own]
    torch.testing.assert_close(gains, torch.zeros_like(gains), atol=1e-4, rtol=0)


def test_a_tool_result_that_is_too_long_leaves_a_rollout_that_is_scored_like_any_other(tmp_path):
    """TRL takes it back, and the rollout ends with the call."""

    def read(number: int) -> str:
        """Reads a page.

        Args:
            number: Its number.
        """
        return "words " * (1 if number else 1000)

    def turn(text, row):
        return CALL("read", f'{{"number": {row % 2}}}') if "<tool_response>" not in text else "Read.<|im_end|>"

    record = Record(build(tmp_path, turn, tools=[read], teacher_shared_prefix=False))
    assert record.of_tools.any(1).tolist().count(False) == 2
    assert torch.isfinite(record.batch["teacher_logps"]).all()
    assert (record.batch["teacher_logps"][record.own] != 0).all()
    rollouts = [ids[mask.bool()].tolist() for ids, mask in zip(record.ids, record.mask, strict=True)]
    assert sorted(record.forwards) == sorted(p + r for p, r in zip(record.prompt_ids, rollouts, strict=True))


def test_truncated_rollouts_that_are_masked_need_no_teacher(tmp_path):
    def turn(text, row):
        return DOUBLE if "<tool_response>" not in text else "42" + ("" if row % 2 else "<|im_end|>")

    built = build(tmp_path, turn, tools=[double], mask_truncated_completions=True, credit="opsd")
    record = Record(built)
    assert record.batch["teacher_scored"].tolist().count(True) == 2
    assert not record.credited[~record.batch["teacher_scored"]].any()


@TOOLS
def test_a_contrast_works_with_tools_and_environments(tmp_path, options):
    """TRL pairs every prompt that it tokenizes with an environment, also those with a wrong reference."""
    built = build(
        tmp_path,
        lambda read, row: f"{row}<|im_end|>",
        credit="rlsd_contrast",
        contrast_reference="completion",
        **options,
    )
    record = Record(built)
    assert record.batch["wrong_scored"].any()
    assert torch.isfinite(record.batch["wrong_logps"]).all()


# ---------------------------------------------------------------- what is read from texts


def test_what_a_tool_wrote_is_no_leak_and_quoting_it_is_none(tmp_path):
    secret = "the seven brown foxes jumped over nine lazy dogs"

    def look(number: int) -> str:
        """Looks it up.

        Args:
            number: Where.
        """
        return secret

    def turn(text, row):
        return CALL("look", '{"number": 1}') if "<tool_response>" not in text else f"I read: {secret}<|im_end|>"

    rows = dataset(conversational=True).map(lambda row: {"privileged_context": f"It says that {secret} again"})
    built = build(tmp_path, turn, tools=[look], data=rows)
    built.train()
    assert built.state.log_history[0]["rlsd/leak_overlap"] == 0


def test_a_span_is_looked_for_in_what_the_model_wrote(tmp_path):
    """A tool's text may state an answer, too."""

    def page(number: int) -> str:
        """Reads a page.

        Args:
            number: Its number.
        """
        return "The answer is somewhere. Answer: none of it."

    def turn(text, row):
        asked = "<tool_response>" in text
        return "So the answer is 42.<|im_end|>" if asked else CALL("page", '{"number": 1}')

    built = build(tmp_path, turn, tools=[page], credit_span="before_answer")
    record = Record(built)
    decode = built._tokenizer.decode
    for ids, answer, span in zip(
        record.batch["completion_ids"], record.batch["answer_span"], record.batch["credit_span"], strict=True
    ):
        assert decode(ids[answer]).startswith("answer is 42.")
        assert decode(ids[span & ~answer]).endswith("So the ")
        assert not (span & answer).any()
    for spans in (record.batch["answer_span"], record.batch["credit_span"]):
        assert not (spans & record.of_tools).any()


def test_what_a_tool_wrote_last_is_no_answer():
    """TRL 1.16 leaves it last where there was no room for another turn."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    assert completion_text([call, {"role": "tool", "name": "double", "content": "42"}]) == ""
    assert completion_text([call, {"role": "tool", "content": "41"}, {"role": "assistant", "content": "42"}]) == "42"


# ---------------------------------------------------------------- environments with a privileged context


@pytest.fixture
def diaries():
    Diary.made = 0


def without_context(rows=16):
    return dataset(rows, conversational=True).remove_columns("privileged_context")


@pytest.mark.usefixtures("diaries")
def test_an_environment_gives_the_context_of_each_rollout_at_its_end_to_the_teacher_alone(tmp_path):
    def turn(text, row):
        return DOUBLE if row % 2 and "<tool_response>" not in text else "42<|im_end|>"

    built = build(tmp_path, turn, reward=None, data=without_context(), environment_factory=Diary, credit="opsd")
    record = Record(built)
    environments = built.environments
    for row, (environment, prompt) in enumerate(zip(environments, record.prompts, strict=True)):
        assert environment.events == ["reset", *["tool"] * (row % 2), "reward", "context"]
        assert f"The diary of {environment.name}: {', '.join(environment.events)}." in prompt
        assert prompt.count("The diary of") == 1
        assert "(observed)" in prompt
    assert len({environment.name for environment in environments}) == 4, "one for each rollout"
    assert not any("diary" in prompt.lower() for prompt in record.asked)
    assert all("(observed)" in prompt for prompt in record.asked)
    assert record.batch["teacher_scored"].all()


@pytest.mark.usefixtures("diaries")
def test_environments_are_used_again_with_the_context_of_the_last_rollout(tmp_path):
    built = build(tmp_path, reward=None, data=without_context(), environment_factory=Diary, max_steps=3)
    built.train()
    assert Diary.made == 4
    assert all(environment.events == ["reset", "tool", "reward", "context"] for environment in built.environments)


@pytest.mark.usefixtures("diaries")
def test_the_model_can_neither_see_nor_call_what_gives_the_context(tmp_path):
    """TRL takes every public method but `reset` and `get_reward` for a tool: this one would hand over the answer."""

    def turn(text, row):
        return CALL("get_privileged_context", "{}") if "<tool_response>" not in text else "Well.<|im_end|>"

    record = Record(build(tmp_path, turn, reward=None, data=without_context(), environment_factory=Diary))
    assert not any("get_privileged_context" in schema(prompt) for prompt in (*record.asked, *record.prompts))
    tokenizer = qwen_tokenizer()
    for ids in record.batch["completion_ids"]:
        written = tokenizer.decode(ids)
        assert "get_privileged_context not found" in written
        assert "diary" not in written


@pytest.mark.usefixtures("diaries")
def test_neither_grpo_nor_evaluation_asks_for_the_context(tmp_path):
    grpo = build(tmp_path, reward=None, data=without_context(), environment_factory=Diary, credit="grpo")
    grpo.train()
    assert all("context" not in environment.events for environment in grpo.environments)
    options = {"environment_factory": Diary, "eval_dataset": without_context(4), "per_device_eval_batch_size": 4}
    built = build(tmp_path, reward=None, data=without_context(), **options)
    built.evaluate()
    assert all(environment.events[-1] == "reward" for environment in built.environments)


@pytest.mark.usefixtures("diaries")
def test_a_rollout_without_a_context_keeps_grpos_credit(tmp_path):
    class Silent(Diary):
        def get_privileged_context(self):
            context = super().get_privileged_context()
            return {"0": None, "1": "", "2": context, "3": [{"role": "user", "content": context}]}[self.name[-1]]

    record = Record(build(tmp_path, reward=None, data=without_context(), environment_factory=Silent))
    assert ["The diary of" in prompt for prompt in record.prompts] == [False, False, True, True]
    advantages = record.batch["advantages"].unsqueeze(1)
    moved = ((record.credited != advantages) & record.own).any(1)
    assert moved.tolist() == record.batch["teacher_scored"].tolist()
    assert moved.sum() == 2


@pytest.mark.usefixtures("diaries")
def test_environments_of_one_run_differ_in_tools_and_in_where_the_context_comes_from(tmp_path):
    kinds = {"diary": Diary, "fixed": Fixed}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "environment": ["diary", "fixed"][i % 2],
            "privileged_context": [None, "the column says 7"][i % 2],
        }
        for i in range(8)
    ]
    options = {"per_device_train_batch_size": 8, "shuffle_dataset": False, "credit": "opsd"}

    def turn(text, row):
        tool = "half" if '"name": "half"' in text else "double"
        return CALL(tool, '{"number": 21}') if "<tool_response>" not in text else f"{row}<|im_end|>"

    built = build(tmp_path, turn, data=Dataset.from_list(rows), environment_factory=kinds, **options)
    record = Record(built)
    for environment, prompt in zip(built.environments, record.prompts, strict=True):
        if type(environment) is Diary:
            assert f"The diary of {environment.name}" in prompt
            assert '"name": "double"' in prompt
            assert '"name": "half"' not in prompt
        else:
            assert "the column says 7" in prompt
            assert '"name": "half"' in prompt
            assert '"name": "double"' not in prompt
    assert {type(environment) for environment in built.environments} == {Diary, Fixed}
    assert record.batch["teacher_scored"].all()
    results = "".join(qwen_tokenizer().decode(ids) for ids in record.batch["completion_ids"])
    assert results.count("10.5") == results.count("\n42\n") == 4


def test_rows_whose_environment_has_no_method_need_the_column(tmp_path):
    data = without_context()
    with pytest.raises(ValueError, match="no column 'privileged_context'"):
        build(tmp_path, data=data, environment_factory=Calculator)
    data = data.add_column("environment", ["fixed"] * len(data))
    with pytest.raises(ValueError, match="no column 'privileged_context'"):
        build(tmp_path, data=data, environment_factory={"diary": Diary, "fixed": Fixed})


def test_an_async_method_is_refused_before_anything_is_generated(tmp_path):
    class Later(Diary):
        async def get_privileged_context(self):
            return "later"

    with pytest.raises(TypeError, match=r"Later.*get_privileged_context"):
        build(tmp_path, reward=None, data=without_context(), environment_factory=Later)


@pytest.mark.usefixtures("diaries")
@pytest.mark.parametrize("value", [7, [7]], ids=str)
def test_a_context_of_another_type_names_the_environment(tmp_path, value):
    class Wrong(Diary):
        def get_privileged_context(self):
            return value

    built = build(tmp_path, reward=None, data=without_context(), environment_factory=Wrong)
    with pytest.raises(TypeError, match="Wrong"):
        built.train()


def test_an_environment_that_shows_the_column_to_the_student_is_refused(tmp_path):
    class Leaky(Calculator):
        def reset(self, privileged_context, **columns):
            return f" ({privileged_context}, as the reference says)"

    rows = dataset(conversational=True)
    rows = rows.map(lambda row: {"privileged_context": row["privileged_context"] + " exactly"})
    built = build(tmp_path, environment_factory=Leaky, data=rows)
    generated = []
    built._generate_single_turn = lambda *args, **kwargs: generated.append(1)
    with pytest.raises(ValueError, match="is in the student's prompt already"):
        built.train()
    assert generated == []


# ---------------------------------------------------------------- the recipe: a database


SALES = "CREATE TABLE sale (seller TEXT, amount INT); INSERT INTO sale VALUES ('Ann', 3), ('Bo', 4), ('Ann', 5);"
TOTALS = "SELECT seller, SUM(amount) FROM sale GROUP BY seller"


@pytest.fixture
def database(monkeypatch):
    pytest.importorskip("pebble")
    monkeypatch.syspath_prepend(ROOT)
    from configs.sqlite_environment import SQLiteEnvironment

    def make(query=TOTALS, schema=SALES):
        environment = SQLiteEnvironment()
        environment.shown = environment.reset(query=query, schema=schema, prompt="How much by each seller?")
        return environment

    return make


def test_a_database_answers_and_judges_the_last_query_that_runs(database):
    environment = database()
    assert "CREATE TABLE sale (seller TEXT, amount INT)" in environment.shown
    assert "Ann" not in environment.shown
    assert environment.get_reward() == 0
    assert environment.query("SELECT * FROM sale") == "Ann | 3\nBo | 4\nAnn | 5"
    assert environment.get_reward() == 0
    assert environment.query("SELECT seller FROM sale WHERE amount > 9") == "No rows."
    environment.query("SELECT seller, TOTAL(amount) FROM sale GROUP BY 1")
    assert environment.get_reward() == 1
    assert environment.query("SELECT nope FROM sale") == "Error: failed: OperationalError: no such column: nope"
    assert environment.get_reward() == 1


def test_a_databases_context_is_the_reference_its_result_and_the_last_failure(database):
    environment = database()
    right = f"A right query:\n{TOTALS}\n\nIts result:\nAnn | 8\nBo | 4"
    assert environment.get_privileged_context() == right
    environment.query("SELECT nope FROM sale \ud800")
    context = environment.get_privileged_context()
    assert context.startswith(right + "\n\nThe last query failed:\nSELECT nope FROM sale ?\nError: ")
    context.encode()
    environment.query("SELECT 1")
    assert environment.get_privileged_context() == right


def test_databases_are_apart_and_begin_anew_with_reset(database):
    one, other = database(), database("SELECT 2", "CREATE TABLE other (x); INSERT INTO other VALUES (2);")
    one.query(TOTALS)
    assert "no such table: sale" in other.query("SELECT * FROM sale")
    assert (one.get_reward(), other.get_reward()) == (1, 0)
    one.reset(query=TOTALS, schema=SALES)
    assert one.get_reward() == 0
    assert "failed" not in one.get_privileged_context()


@pytest.mark.parametrize(
    "query, schema",
    [("DELETE FROM sale", SALES), ("SELECT 1 WHERE 0", SALES), (TOTALS, "CREATE TABLE sale (seller ENUM('a');")],
    ids=["no query", "no rows", "broken script"],
)
def test_a_row_without_a_reference_has_neither_reward_nor_context(database, query, schema):
    environment = database(query, schema)
    environment.query("SELECT 1")
    assert environment.get_reward() is None
    assert environment.get_privileged_context() is None


@pytest.mark.parametrize(
    "sql, said",
    [
        ("DROP TABLE sale", "not authorized"),
        ("ATTACH 'x.db' AS x", "not authorized"),
        ("SELECT 1; DROP TABLE sale", "one statement"),
        ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c", "more than max_rows=100"),
        ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c", "interrupted"),
        # one step of SQLite's machine that takes minutes
        ("SELECT instr(printf('%.*c', 900000, 'a'), printf('%.*c', 450000, 'a') || 'b')", "no result within"),
    ],
)
def test_hostile_queries_end_and_change_nothing(database, monkeypatch, sql, said):
    module = sys.modules["configs.sqlite_environment"]
    monkeypatch.setattr(module, "REWARD", replace(module.REWARD, timeout=0.5))
    environment = database()
    started = time.monotonic()
    reply = environment.query(sql)
    assert reply.startswith("Error: ")
    assert said in reply
    assert time.monotonic() - started < 10
    assert environment.query("SELECT COUNT(*) FROM sale") == "3"


def test_what_a_database_says_is_bounded(database):
    reply = database().query("SELECT printf('%.*c', 900000, 'x')")
    assert reply == f"{'x' * 1000}\n(cut)"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The config, on rows with the dataset's columns and a tiny model."""
    pytest.importorskip("pebble")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    tokenizer = qwen_tokenizer()
    model_for(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [
        {
            "id": i,
            "sql_prompt": "How much by each seller?",
            "sql_context": SALES,
            "sql": TOTALS,
            "sql_explanation": "Sums.",
        }
        for i in range(8)
    ]
    Dataset.from_list(rows).to_parquet("rows.parquet")
    lines = yaml.safe_load((ROOT / "configs/tools_sqlite.yaml").read_text())
    assert lines["dataset_name"] == "gretelai/synthetic_text_to_sql"
    lines |= {
        "model_name_or_path": "model", "dataset_name": "rows.parquet", "use_cpu": True, "bf16": False, "lora_r": 4,
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 1, "max_steps": 2,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "model_revision": "main",
        "dataset_options": {"preset": "synthetic_text_to_sql", **lines["dataset_options"]},
    }  # fmt: skip

    def run(**options):
        Path("config.yaml").write_text(yaml.safe_dump({**lines, **options}))
        main(["--config", "config.yaml"])

    return run


def test_the_recipe_trains_where_the_model_calls_no_tool(recipe, capfd):
    header = (ROOT / "configs/tools_sqlite.yaml").read_text().split("model_name_or_path")[0]
    assert "--config configs/tools_sqlite.yaml" in header
    assert "NOT RUN" in header
    recipe(max_completion_length=8)
    printed = capfd.readouterr().out
    assert printed.count("'rlsd/lambda'") >= 2
    assert "'rewards/SQLiteEnvironment/mean': '0'" in printed
    assert "'rlsd/no_context': '0'" in printed
    assert Path("rlsd-tools/adapter_model.safetensors").is_file()


def test_the_recipe_trains_on_rollouts_with_queries(recipe, capfd, monkeypatch):
    queries = [
        TOTALS,
        "SELECT * FROM sale",
        "SELECT SUM(x) FROM sale",
        "SELECT seller, TOTAL(amount) FROM sale GROUP BY 1",
    ]

    def turn(trainer, prompt_ids, *args, **kwargs):
        tokenizer = trainer.processing_class
        read = map(tokenizer.decode, prompt_ids)
        texts = [
            "Done.<|im_end|>" if "<tool_response>" in text else CALL("query", f'{{"sql": "{queries[row]}"}}')
            for row, text in enumerate(read)
        ]
        return list(map(tokenizer.encode, texts)), None

    monkeypatch.setattr(RLSDTrainer, "_generate_single_turn", turn)
    recipe()
    printed = capfd.readouterr().out
    assert printed.count("'rewards/SQLiteEnvironment/mean': '0.5'") == 2
    assert printed.count("'tools/call_frequency': '1'") == 2
    assert printed.count("'tools/failure_frequency': '0'") == 2
    assert printed.count("'rlsd/skipped': '0'") == 2
    assert "'rlsd/weight_mean_pos'" in printed


def test_tools_and_environments_stand_in_a_config_by_their_dotted_paths(recipe, tmp_path, capfd, monkeypatch):
    (tmp_path / "toolbox.py").write_text(
        "def reward(completions, **columns):\n"
        "    return [float(i % 2) for i in range(len(completions))]\n"
        "def add(a: int, b: int) -> int:\n"
        '    """Adds.\n\n    Args:\n        a: One.\n        b: The other.\n    """\n'
        "    return a + b\n"
    )
    seen = []

    def turn(trainer, prompt_ids, *args, **kwargs):
        seen.append(trainer.processing_class.decode(prompt_ids[0]))
        return [trainer.processing_class.encode("5<|im_end|>")] * len(prompt_ids), None

    monkeypatch.setattr(RLSDTrainer, "_generate_single_turn", turn)
    recipe(tools=["toolbox.add"], environment_factory=None, reward_funcs=["toolbox.reward"], max_steps=1)
    assert '"name": "add"' in seen[-1]
    assert '"name": "query"' not in seen[-1]
    recipe(tools=["toolbox.add"], reward_funcs=["toolbox.reward"], max_steps=1)
    assert '"name": "add"' in seen[-1]
    assert '"name": "query"' in seen[-1]
    with pytest.raises(ValueError, match=r"tools='toolbox\.absent' cannot be loaded"):
        recipe(tools=["toolbox.absent"])
    with pytest.raises(ValueError, match=r"environment_factory='toolbox\.Absent' cannot be loaded"):
        recipe(environment_factory="toolbox.Absent")
    with pytest.raises(ValueError, match="reward_funcs is not set"):
        recipe(environment_factory=None)
    # by name, for rows that have one
    names = {"database": "configs.sqlite_environment.SQLiteEnvironment"}
    assert RLSDScriptArguments(environment_factory=json.dumps(names)).environment_factory == names
    with pytest.raises(ValueError, match=r"environment=None.*Expected one of: \['database'\]"):
        recipe(environment_factory=names)
