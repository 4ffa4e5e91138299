"""What of a completion is read as the choice of an option."""

import pickle
import threading
import time

import pytest

from trl_rlsd.rewards.choice import ChoiceReward, choice_reward
from trl_rlsd.rewards.grading import CannotGrade


CITIES = ["Paris", "New York", "New York City", "Lyon"]
with_options = ChoiceReward(options_column="options")


def letters(texts, **options):
    """Of each text, the letters among A to I that are right by it."""
    columns = {name: [value] * len(texts) for name, value in options.items()}
    reward = with_options if options else choice_reward
    of = "ABCDEFGHI"[: len(options["options"]) if options else None]
    graded = {letter: reward(None, texts, answer=[letter] * len(texts), **columns) for letter in of}
    return ["".join(letter for letter in of if graded[letter][i]) for i in range(len(texts))]


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "\\(B\\)",
        "The answer is (B).",
        "The answer is B",
        "the answer is b.",
        "The answer is b because 2 is even.",
        "The answer is B because 2 is even, unlike A.",
        "The answer is B, not A.",
        "The answer is B, I think.",
        "The final answer is: **(B)**",
        "Answer: B)",
        "**Answer:** B",
        "Correct answer: [B]",
        "#### B",
        "<answer>B</answer>",
        "<answer>\nThe answer is B.\n</answer>",
        "\\boxed{B}",
        "$\\boxed{\\text{B}}$",
        "\\boxed{\\textbf{(B)}\\ 12}",
        "\\boxed{42}\nThe answer is (B).",
        "A and C can be ruled out.\n\nB",
        "B\n\nBecause 2 is even, and (A) and (C) are odd.",
        "B. 12",
        "I would go with (B).",
        "So option B is right, it seems.",
        "The correct option is B.",
        "The answer is A. No wait, the answer is B.",
        "The answer is A.\nThe answer is B.\nThe answer is based on the facts above.",
        "<think>The answer is A.</think>The answer is B.",
    ],
)
def test_a_letter_counts_where_it_is_stated(text):
    assert letters([text]) == ["B"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "A dog is an animal, and I like it.",
        "I think A bit of each.",
        "The answer is a bit tricky.",
        "The answer is I do not know.",
        "That is the choice I made.",
        "The best option is A bit of both.",
        "P(A) = 0.5 and so on.",
        "The answer is not A.",
        "(A) is wrong.",
        "Vitamin C helps.",
        "<think>The answer is B.",
        "i.e. the answer is i.e. that",
    ],
)
def test_prose_is_no_choice(text):
    assert letters([text]) == [""]


@pytest.mark.parametrize(
    "text",
    [
        "B or C",
        "The answer is B or C.",
        "answer: A and B",
        "The answer is A, B and C.",
        "\\boxed{A, B}",
        "\\boxed{A/B}",
        "The answer is (A) or (B)",
        "(A) may be, (B) may be",
        "A. 1\nB. 2\nC. 3\nD. 4",
    ],
)
def test_several_options_are_none(text):
    assert letters([text]) == [""]


SOLE = dict(zip("ABCD", ["London", "Paris", "Rome", "Berlin"], strict=True))


@pytest.mark.parametrize("options", [{}, {"options": SOLE}], ids=["letters", "texts"])
@pytest.mark.parametrize(
    "text",
    [
        "B is correct.",
        "So B is the correct answer.",
        "The correct option: B",
        "The correct choice is (B)",
        "The answer would be B.",
        "The answer should be B",
        "Therefore, B.",
        "✅ **B) Paris**",
        "**Correct answer:** ✅ B",
        '{"answer": "B"}',
        "Answer: B.Paris",
        "(A) is wrong. (B) is right.",
        "I choose B.",
        "My choice is B",
        "I'd go with B.",
        "(A) is wrong, (B) is right.",
        "A is not correct, but B is correct.",
        "It is in France. Therefore, B.",
        "Option B is correct.",
        "**B** is the correct answer.",
        "A. London\nB. Paris\nC. Rome\nD. Berlin\n\nB. Paris",
        "Question?\nA. London\nB. Paris\nC. Rome\nD. Berlin\n\nAnswer: B",
        "The correct answer is B because A is correct only in England.",
        "A. London is wrong.\nB. Paris is correct.",
        "The answer is (B) since (A) and (C) are odd.",
        "B is the best answer.",
    ],
)
def test_an_option_that_is_chosen_or_called_correct_is_stated(text, options):
    assert letters([text], **options) == ["B"]


@pytest.mark.parametrize("options", [{}, {"options": SOLE}], ids=["letters", "texts"])
@pytest.mark.parametrize(
    "text",
    [
        "A is a vowel",
        "B or C",
        "A or B is correct",
        "Either A or B is correct.",
        "B is correct. C is correct.",
        "B is not correct",
        "B is incorrect",
        "B is wrong",
        "B isn't correct.",
        "I don't think B is correct.",
        "Is B correct?",
        "If B is correct, fine.",
        "Neither A nor B is correct.",
        "A and B is correct",
        "I choose either A or B.",
        "I choose B or C",
        "I don't choose B.",
        "The correct option: B or C",
        "The answer should be B or C",
        "Therefore, B or C.",
        "My choice is not B",
        "Vitamin C is correct",
        "So A nice day is right",
        "The wrong option is B",
    ],
)
def test_a_doubt_a_denial_and_a_contradiction_state_no_option(text, options):
    assert letters([text], **options) == [""]


LISTS = ["A. {}\nB. {}\nC. {}\nD. {}", "A) {}\n\nB) {}\n\nC) {}\n\nD) {}", "(A) {} (B) {} (C) {} (D) {}"]
LISTS += ["- **A.** {}\n- **B.** {}\n- **C.** {}\n- **D.** {}", "A. {} B. {} C. {} D. {}", "A\nB\nC\nD"]


@pytest.mark.parametrize("options", [{}, {"options": SOLE}], ids=["letters", "texts"])
@pytest.mark.parametrize(
    "asked", ["", "Choose the correct answer:\n", "The correct option is: ", "What is it? Answer: "]
)
@pytest.mark.parametrize("listed", LISTS)
def test_a_list_of_the_options_is_no_answer(listed, asked, options):
    echo = asked + listed.format(*SOLE.values())
    assert letters([echo, f"{echo}\n{echo}", f"{echo}\n\nB"], **options) == ["", "", "B"]


@pytest.mark.parametrize("asked", ["", "Options:\n", "The answer is:\n"])
def test_a_list_of_the_texts_is_no_answer(asked):
    echo = asked + "\n".join(SOLE.values())
    assert letters([echo, f"{echo}\n\nParis"], options=SOLE) == ["", "B"]


@pytest.mark.parametrize(
    "text, chosen",
    [
        ("Paris", "A"),
        ("The answer is paris.", "A"),
        ("The answer is New York.", "B"),
        ("The answer is New York City.", "C"),
        ("The answer is New York, the largest city.", "B"),
        ("The answer is Parisian charm.", ""),
        ("\\boxed{\\text{New York}}", "B"),
        ("It has many bridges.\n\nLyon", "D"),
        ("The answer is (B) New York", "B"),
        ("The answer is B New York", "B"),
        ("The answer is Lyon (D).", "D"),
        ("B. New York\n\nIt lies by the sea.", "B"),
        ("The answer is (A) Lyon", ""),
        ("The answer is Lyon (A).", ""),
        ("The answer is Paris or Lyon.", ""),
        ("The answer is E.", ""),
        ("A. Paris\nB. New York\nC. New York City\nD. Lyon", ""),
    ],
)
def test_where_the_options_are_known_their_texts_count(text, chosen):
    assert letters([text], options=CITIES) == [chosen]


@pytest.mark.parametrize(
    "text, chosen",
    [
        ("The answer is 3.", "A"),
        ("The answer is 3.5.", "B"),
        ("The answer is 3.6.", ""),
        ("The answer is -3.", "C"),
        ("The answer is twenty, because", "D"),
        ("The answer is twenty-one.", ""),
        ("The answer is twenty, or so, because", "E"),
    ],
)
def test_an_option_is_not_the_start_of_another(text, chosen):
    assert letters([text], options=["3", "3.5", "-3", "twenty", "twenty, or so"]) == [chosen]


@pytest.mark.parametrize("right", ["B", "b", "(B)", "B.", "New York", 1])
@pytest.mark.parametrize(
    "options",
    [
        CITIES,
        dict(zip("ABCD", CITIES, strict=True)),
        {**dict(zip("ABCD", CITIES, strict=True)), "E": None},
        {"label": list("ABCD"), "text": CITIES},
    ],
)
def test_a_reference_is_a_letter_a_text_or_an_index(right, options):
    texts = ["The answer is B.", "The answer is New York.", "The answer is C."]
    assert with_options(None, texts, answer=[right] * 3, options=[options] * 3) == [1.0, 1.0, 0.0]


def test_letters_may_be_digits_and_are_read_before_texts():
    options = [{"label": ["1", "2", "3"], "text": ["3", "1", "2"]}] * 2
    assert with_options(None, ["The answer is 3.", "(1)"], answer=["3", "3"], options=options) == [1.0, 0.0]


def test_an_empty_answer_is_not_an_empty_option():
    assert letters(["", "####", "\\boxed{}", "..."], options=["", "x", "?"]) == [""] * 4


def test_two_options_of_one_text_are_one_answer():
    assert letters(["The answer is (A)."], options=["same", "Same", "other"]) == ["AB"]


@pytest.mark.parametrize("right", ["E", "Rome", 4, -1, True, 1.5, ["A"]])
def test_a_reference_that_is_no_option_is_not_a_wrong_answer(right, caplog):
    counted = {}
    rewards = with_options(
        None, ["B"] * 2, answer=["B", right], options=[CITIES] * 2, log_metric=lambda k, v: counted.update({k: v})
    )
    assert rewards == [1.0, None]
    assert counted == {"choice_failures": 1}
    assert "none of the options A, B, C, D" in caplog.text


@pytest.mark.parametrize("options", ["ABCD", [], {}, {"label": ["A"], "text": []}, ["x"] * 27, None])
def test_options_of_no_known_form_are_not_a_wrong_answer(options):
    assert isinstance(with_options.grade_all(["B"], [{"answer": "B", "options": options}])[0], CannotGrade)


def test_a_row_without_a_reference_is_left_to_other_rewards():
    assert choice_reward(None, ["B", "B"], answer=[None, "B"]) == [None, 1.0]


HOSTILE = [
    "\0" * 10**6,
    "\ud800" * 10**6,
    "(" * 10**6,
    "\n" * 10**6,
    "A\n" * 500_000,
    "A," * 500_000,
    "(A) " * 250_000,
    "####" * 250_000,
    "option " * 140_000,
    "the " * 250_000,
    "answer is " * 100_000,
    "answer: the " * 80_000,
    "answer is " + " " * 10**6,
    "answer: A, " + "," * 10**6,
    "answer: " + "A)" * 500_000,
    "\\boxed{" * 140_000,
    "<answer>" * 120_000,
    "<think>" * 140_000,
    "\\boxed{A",
    "<answer>A",
    "A. Paris\n" * 100_000,
    "A. Paris\nB. New York\n" * 50_000,
    "(A) x " * 160_000,
    "A is correct. B is right. " * 40_000,
    "so " * 300_000,
    "I choose " * 100_000,
    "\n" * 10**6 + "option" + " " * 10**6,
    "A is " + "the " * 250_000,
]


def test_a_megabyte_of_anything_is_graded_within_a_second():
    for text in HOSTILE:
        for reward in (choice_reward, with_options):
            start = time.process_time()
            (grade,) = reward(None, [text], answer=["D"], options=[CITIES])
            assert grade == 0.0
            assert time.process_time() - start < 1, ascii(text[:20])


def test_it_is_pickled_and_called_in_threads():
    reward = pickle.loads(pickle.dumps(with_options))
    assert reward == with_options
    grades = {}
    texts = [f"The answer is {letter}." for letter in "ABCD"] * 25

    def grade(thread):
        options = [[f"{city} {thread}" for city in CITIES]] * 100
        grades[thread] = reward(None, texts, answer=["ABCD"[thread]] * 100, options=options)

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == {i: [float(j % 4 == i) for j in range(100)] for i in range(4)}
