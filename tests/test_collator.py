"""The laws of the privileged prompt."""

import logging

import pytest
import torch
from conftest import byte_tokenizer, config, dataset, tiny_llama, trainer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_rlsd.collator import PrivilegedPromptCollator, check_length, teacher_inputs
from trl_rlsd.config import DEFAULT_TEMPLATE


def collator(template=DEFAULT_TEMPLATE, column="privileged_context", **options):
    return PrivilegedPromptCollator(template, column, **options)


text = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
nasty = st.sampled_from(["{prompt}", "{privileged_context}", "{{}}", "{", "}", "{0}", "%s", "\\1"]) | text


@given(nasty)
def test_no_privileged_text_means_exactly_the_students_prompt(prompt):
    messages = [{"role": "user", "content": prompt}]
    for empty in (None, "", []):
        contexts = collator().contexts([{"privileged_context": empty}] * 2)
        prompts, has_context = collator().prompts(contexts, [prompt, messages])
        assert prompts == [prompt, messages]
        assert has_context == [False, False]


@given(nasty, nasty.filter(bool))
def test_braces_in_user_text_are_inert(prompt, context):
    built = collator("a{{{privileged_context}}}b{{c}}{prompt}d").prompt(prompt, context)
    assert built == "a{" + context + "}b{c}" + prompt + "d"


def test_the_template_goes_into_the_last_user_message_alone():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    before = [dict(m) for m in messages]
    built = collator("<{privileged_context}>{prompt}!").prompt(messages, "r")
    assert built == [*messages[:3], {"role": "user", "content": "<r>three!"}]
    assert messages == before, "the student's prompt must not change"


def test_content_parts_keep_their_order():
    parts = [{"type": "image", "image": "x"}, {"type": "text", "text": "what is it?"}]
    built = collator("<{privileged_context}>{prompt}").prompt([{"role": "user", "content": parts}], "a cat")
    assert built[0]["content"] == [{"type": "text", "text": "<a cat>"}, *parts]


def test_privileged_context_may_be_messages():
    one = {"privileged_context": [{"role": "assistant", "content": "4"}]}
    two = {
        "privileged_context": [
            *one["privileged_context"],
            {"role": "user", "content": [{"type": "text", "text": "ok"}]},
        ]
    }
    assert collator().context(one) == "4"
    assert collator().context(two) == "assistant: 4\n\nuser: ok"


@pytest.mark.parametrize(
    "row, error, said",
    [
        ({"prompt": "p", "answer": "4"}, ValueError, r"Row 3 has no column 'privileged_context'.*'prompt', 'answer'"),
        ({"privileged_context": 4}, TypeError, r"row 3 holds int \(4\).*string or a list of messages"),
        ({"privileged_context": ["a", "b"]}, TypeError, "row 3 holds list"),
        ({"privileged_context": [{"role": "user", "content": 3}]}, TypeError, "row 3 holds a message"),
    ],
)
def test_a_bad_row_is_named_with_its_columns(row, error, said):
    with pytest.raises(error, match=said):
        collator().context(row, 3)


def test_a_conversation_without_user_message_is_refused():
    with pytest.raises(ValueError, match="needs a user message"):
        collator().prompt([{"role": "system", "content": "s"}], "r")


@pytest.mark.parametrize(
    "template, said",
    [
        ("{prompt}", "lacks {privileged_context}"),
        ("{privileged_context}", "{prompt} exactly once, not 0"),
        ("{prompt}{prompt}{privileged_context}", "exactly once, not 2"),
        ("{prompt}{privileged_context}{answer}", "'answer'"),
        ("{prompt}{privileged_context}{}", "''"),
        ("{prompt!r}{privileged_context}", "conversion"),
        ("{prompt}{privileged_context", "cannot be parsed"),
    ],
)
def test_a_template_without_its_placeholders_is_refused(template, said):
    with pytest.raises(ValueError, match="teacher_prompt_template=") as error:
        collator(template)
    assert said in str(error.value)


def test_an_external_teacher_may_read_the_students_prompt():
    prompts, scored = collator("{prompt}", needs_context=False).prompts([None], ["p"])
    assert (prompts, scored) == (["p"], [True])


@given(st.lists(st.lists(st.integers(2, 99), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 5))
def test_the_last_columns_are_the_sampled_ids_as_they_are(prompts, tokens):
    completions = torch.randint(0, 99, (len(prompts), tokens))
    mask = torch.randint(0, 2, completions.shape)
    ids, attention = teacher_inputs(prompts, completions, mask, pad_token_id=0)
    assert ids.shape == attention.shape == (len(prompts), max(map(len, prompts)) + tokens)
    assert torch.equal(ids[:, ids.size(1) - tokens :], completions)
    assert torch.equal(attention[:, ids.size(1) - tokens :], mask)
    for row, prompt in enumerate(prompts):
        assert ids[row, : ids.size(1) - tokens][-len(prompt) :].tolist() == prompt
        assert attention[row, : ids.size(1) - tokens].sum() == len(prompt)


def test_rows_and_completions_that_do_not_match_raise():
    with pytest.raises(ValueError, match="1 teacher prompts for 2 completions"):
        teacher_inputs([[1]], torch.ones(2, 3), torch.ones(2, 3), 0)


def test_a_prompt_that_leaves_no_room_is_named():
    check_length([10, 20], 12, 32)
    check_length([10, 20], 12, None)
    with pytest.raises(ValueError, match=r"row 1 has 21 tokens.*32 positions"):
        check_length([10, 21], 12, 32)


def test_teacher_and_student_share_template_tools_and_kwargs(tmp_path):
    """What RLSDTrainer makes of a row is TRL's own rendering of the privileged messages."""
    built = trainer(tmp_path, data=dataset(conversational=True), chat_template_kwargs={"no_think": True}, max_steps=1)
    row = built.train_dataset[0]
    teacher_prompts, _ = built._collator.prompts([row["privileged_context"]], [row["prompt"]])
    ids = built._tokenize_prompts(teacher_prompts)[0][0]
    expected = "<|user|>" + DEFAULT_TEMPLATE.format(prompt="0 + 0 = ?", privileged_context="the answer is 0")
    assert built.processing_class.decode(ids) == expected + "</s><|assistant|><no-think>"


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("conversational", [False, True])
def test_the_self_check_shows_both_prompts_once(tmp_path, conversational):
    handler = Records()
    logger = logging.getLogger("trl_rlsd")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        trainer(tmp_path, data=dataset(conversational=conversational)).train()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    shown = [m for m in handler.messages if "The teacher reads" in m]
    assert len(shown) == 1
    student, teacher = shown[0].split("The teacher reads:")
    assert "0 + 0 = ?" in student
    assert "the answer is 0" not in student
    assert "the answer is 0" in teacher


def counted_generations(tmp_path, data, **options):
    """Train, expecting a ValueError; returns it and how often completions were generated before."""
    built = trainer(tmp_path, data=data, **options)
    generated = []
    original = built._generate_single_turn
    built._generate_single_turn = lambda *a, **k: generated.append(1) or original(*a, **k)
    with pytest.raises(ValueError) as error:
        built.train()
    return str(error.value), len(generated)


def test_a_chat_template_that_drops_the_context_is_refused_before_generation(tmp_path):
    blind = byte_tokenizer("{% for m in messages %}{{ m['content'][-9:] }}{% endfor %}")
    said, generated = counted_generations(tmp_path, dataset(conversational=True), processing_class=blind)
    assert "does not reach the teacher's prompt" in said
    assert generated == 0


def test_a_student_that_sees_the_context_is_refused_before_generation(tmp_path):
    leaking = Dataset.from_dict(
        {"prompt": ["The full solution is: six times seven is forty-two. Solve."] * 4}
    ).add_column("privileged_context", ["six times  seven\nis forty-two"] * 4)
    said, generated = counted_generations(tmp_path, leaking)
    assert "is in the student's prompt already" in said
    assert generated == 0


def test_a_short_answer_may_occur_in_the_question(tmp_path):
    data = Dataset.from_dict({"prompt": ["4 - 0 = ?"] * 4, "privileged_context": ["4"] * 4})
    trainer(tmp_path, data=data, max_steps=1).train()


def test_a_prompt_beyond_the_models_positions_is_refused_before_generation(tmp_path):
    rows = dataset().to_dict()
    rows["privileged_context"][11] = "x" * 600
    said, generated = counted_generations(tmp_path, Dataset.from_dict(rows))
    assert "tokens; with max_completion_length=8" in said
    assert "512 positions" in said
    assert generated == 0


def test_an_unlabelled_row_of_a_stream_is_refused_before_generation(tmp_path):
    def rows():
        yield {"prompt": "p"}

    from datasets import IterableDataset

    said, generated = counted_generations(tmp_path, IterableDataset.from_generator(rows))
    assert "Row 0 has no column 'privileged_context'" in said
    assert generated == 0


def test_conversational_data_needs_a_chat_template(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        trainer(tmp_path, data=dataset(conversational=True), processing_class=byte_tokenizer(None))


def test_other_columns_survive_remove_unused_columns(tmp_path):
    built = trainer(tmp_path, args=config(tmp_path, remove_unused_columns=True, max_steps=1), model=tiny_llama())
    built.train()
    assert built.state.log_history[0]["rlsd/no_context"] == 0
