"""The privileged context of a row: how parts combine, what of documents fits a budget, what a prompt gives away."""

import pytest
from conftest import byte_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from trl_rlsd.data.contamination import contaminated_rows, given_away
from trl_rlsd.data.privileged import KINDS, Documents, as_text, longest_start, privileged_context


def words(text: str) -> list[str]:
    """A tokenizer: a token for each word."""
    return text.split()


def test_one_part_stands_bare_and_several_have_headings_in_a_fixed_order():
    assert privileged_context({"answer": " 72 "}) == "72"
    both = privileged_context({"answer": "72", "trace": "48/2 = 24", "schema": None})
    assert both == "Worked solution:\n48/2 = 24\n\nFinal answer:\n72"
    everything = privileged_context({kind: f"the {kind}" for kind in reversed(KINDS)})
    assert [everything.index(f"the {kind}") for kind in KINDS] == sorted(
        everything.index(f"the {kind}") for kind in KINDS
    )


def test_nothing_to_tell_is_none():
    assert privileged_context({}) is None
    assert privileged_context({"answer": None, "trace": " \n", "documents": ""}) is None


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"'hint' is not a kind.*documents, schema, tests, trace, answer"):
        privileged_context({"hint": "x"})


@pytest.mark.parametrize(
    "value, text",
    [
        (None, None),
        ("7", "7"),
        (7, "7"),
        (0, "0"),
        (["assert a", "assert b"], "assert a\nassert b"),
        ({"ä": [1]}, '{"ä": [1]}'),
    ],
)
def test_values_of_any_type_become_text(value, text):
    assert as_text(value) == text


PAGE = "One two three.\n\nFour five six. Seven eight nine.\n\nTen."


@pytest.mark.parametrize(
    "budget, kept",
    [
        (10, PAGE),
        (9, "One two three.\n\nFour five six. Seven eight nine."),
        (8, "One two three."),
        (3, "One two three."),
        (2, "One two"),
    ],
)
def test_text_beyond_the_budget_is_cut_after_a_paragraph(budget, kept):
    documents = Documents("page", budget=budget, tokenizer=words)
    assert documents.read({"page": PAGE}) == (kept, 10 - len(words(kept)))


def test_a_single_long_paragraph_is_cut_after_a_sentence_a_word_or_a_character():
    assert longest_start("A b. C d e. F g.", 5, words) == "A b. C d e."
    assert longest_start("A b c d", 3, words) == "A b c"
    assert longest_start("abcdef", 4, list) == "abcd"
    assert longest_start("abc", 0, list) == ""


@settings(max_examples=200)
@given(st.text(alphabet="ab .\n", max_size=60), st.integers(1, 20), st.sampled_from([words, list]))
def test_what_is_kept_is_a_start_of_the_text_within_the_budget(text, budget, tokenizer):
    kept, cut = Documents("d", budget=budget, tokenizer=tokenizer).read({"d": text})
    assert text.strip().startswith(kept or "")
    assert len(tokenizer(kept or "")) <= budget
    assert len(tokenizer(kept or "")) + cut == len(tokenizer(text.strip()))


def test_a_budget_counts_a_tokenizers_tokens_without_special_ones():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<pad> <pad> $A", special_tokens=[("<pad>", 0)])
    assert len(tokenizer.encode("12345")) == 7
    assert longest_start("1234567890", 5, tokenizer) == "12345"


def test_a_processor_counts_with_its_tokenizer():
    class Processor:
        tokenizer = byte_tokenizer()
        __hash__ = None

        def __call__(self, text):
            raise AssertionError("makes tensors, not tokens")

    assert Documents("d", budget=5, tokenizer=Processor()).read({"d": "1234567890"}) == ("12345", 5)


def test_documents_come_from_several_columns_lists_and_files(tmp_path):
    (tmp_path / "rules.md").write_text("\ufeffRule ä.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("File a.")
    documents = Documents(["page", "pages"], ["rules.md", "path"], tmp_path)
    row = {"page": "First.", "pages": ["Second.", None, "Third."], "path": ["a.txt"]}
    assert documents.read(row) == ("First.\n\nSecond.\n\nThird.\n\nRule ä.\n\nFile a.", 0)
    assert documents.read({"page": None, "pages": [], "path": None}) == ("Rule ä.", 0)
    assert Documents("page").read({"page": " "}) == (None, 0)


def test_a_file_that_changed_is_read_again(tmp_path):
    file = tmp_path / "a.txt"
    documents = Documents(files="a.txt", root=tmp_path)
    for text in ("old", "a newer one"):
        file.write_text(text)
        assert documents.read({}) == (text, 0)


@pytest.mark.parametrize(
    "path, said",
    [
        ("none.txt", "there is no document 'none.txt'"),
        ("../secret.txt", "'../secret.txt' is outside of root"),
        ("/etc/hostname", "'/etc/hostname' is outside of root"),
        ("binary", "'binary'.*is not UTF-8"),
        (7, "column 'path' holds 7"),
        ([["a"]], "column 'path' holds"),
    ],
)
def test_a_document_that_cannot_be_read_is_named(tmp_path, path, said):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (root / "binary").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=said):
        Documents(files="path", root=root).read({"path": path})


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "neither columns nor files"),
        ({"columns": "d", "budget": 5}, "a budget needs a tokenizer"),
        ({"columns": "d", "budget": 5, "tokenizer": "gpt2"}, "tokenizer='gpt2'.*Pass AutoTokenizer"),
        ({"columns": "d", "budget": 0, "tokenizer": words}, r"budget=0.*from 1 on"),
    ],
)
def test_impossible_documents_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        Documents(**arguments)


TRACE = "Natalia sold 48/2 = 24 clips in May, so altogether she sold 48+24 = 72 clips in April and May."


@pytest.mark.parametrize(
    "prompt, text",
    [
        (f"How many?\n{TRACE}", TRACE),
        (f"How many? {TRACE.upper().replace(' ', chr(10))}", TRACE),
        ("Note: " + TRACE.replace("Natalia", "She") + " How many?", TRACE),  # most of it
        ("What is 2+2? Answer: 4", "4"),
        ("The answer is **4**. Explain.", "4"),
        ("So \\boxed{4}.", "4"),
        ("#### 72", "72"),
        ("Choose. Answer is A", "A"),
        ("the solution: x = 3, why?", "x = 3"),
    ],
)
def test_a_prompt_that_holds_the_privileged_text_is_found(prompt, text):
    assert given_away(prompt, {"clean": "something else entirely", "answer": text})[0] == "answer"


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("What is 4 + 4 - 4?", "4"),  # by chance
        ("Answer: 4.5 is wrong. Why?", "4"),
        ("Answer: 42 is wrong. Why?", "4"),
        ("The answer is a positive integer.", "A"),
        ("End with 'Answer: $Answer'.", "4"),
        ("Natalia sold clips to 48 of her friends in April, and half as many in May. How many altogether?", TRACE),
        ("Natalia sold 48/2 = 24 clips in May. How many altogether?", TRACE),
        ("anything", None),
        ("anything", " "),
    ],
)
def test_what_a_prompt_shares_by_chance_is_not(prompt, text):
    assert given_away(prompt, {"answer": text}) is None


def test_contaminated_rows_are_listed_with_their_reasons():
    rows = Dataset.from_dict(
        {
            "prompt": [
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
                [{"role": "system", "content": "The answer is 4."}, {"role": "user", "content": "2+2?"}],
            ],
            "privileged_context": ["4", "4"],
        }
    )
    (leak,) = contaminated_rows(rows)
    assert (leak.row, leak.name) == (1, "privileged_context")
    assert str(leak) == "row 1 (privileged_context: the prompt states 'answer is 4')"


def test_prompts_and_contexts_may_be_messages_of_any_form():
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{TRACE} How many?"}]}]
    context = [{"role": "assistant", "content": TRACE}]
    assert contaminated_rows([{"prompt": parts, "x": context}, {"prompt": parts, "x": None}], ["x"])[0].row == 0
    assert contaminated_rows([{"prompt": parts, "x": [{"role": "assistant", "content": None}]}], ["x"]) == []
