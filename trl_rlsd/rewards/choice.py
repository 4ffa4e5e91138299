"""Reward of multiple-choice answers: a letter, or an option's text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase
from typing import Any, ClassVar, NamedTuple

from trl_rlsd.rewards.answer import STATEMENT, after_thinking, final_answer
from trl_rlsd.rewards.grading import CannotGrade, Reward, one_by_one
from trl_rlsd.texts import squeeze


# an answer stands at the end
_READ = 10_000
_STATEMENTS = 20
# in place of a label, where an answer names more than one
_SEVERAL = ""
_MARKS = " .:,;)]-–—"
# letter -> text, None where only the letter is known
Options = Mapping[str, str | None]
_LETTERS: Options = dict.fromkeys(ascii_uppercase)
# LaTeX, Markdown, JSON and ticks around a letter: \text{B}, $\mathbf{(B)}$, \(B\), **B**, "B", ✅ B
_MARKUP = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|tt)?(?=\s*\{)|\\[ ,;:!()\[\]]|\*\*|[{}$`\"“”✅✔☑\uFE0F]")
_LEAD = re.compile(
    r"(?i)(?:(?:the|correct|best|right|final|most|likely|probably|clearly|definitely|either|option|choice|letter|is)"
    r"\b[\s:]*+)*+"
)
# what may follow an option in a statement: it tells "A, because" from "A bit" and "3" from "3.5"
_END = r"(?=\s*+(?:$|[;:!?()\]/&+]|\.(?!\w)|,(?!\d)|[-–—]\s)|\s+(?:and|as|because|but|is|not|or|since|which)\b)"
_JOINED = re.compile(r"[\s)\]]*+(?:,|/|&|\+|\band\b|\bor\b)[\s/,]*+(?:(?:and|or)\b\s*)*+", re.I)
_BRACKETS = re.compile(r"\s*\(([^()]*)\)")
_DENIED = re.compile(r"\b(?:not|never|neither|nor|wrong|incorrect|false|eliminate|rule[sd]? out)\b|n['’]t\b", re.I)
# before an option: "the correct option: B", {"answer": "B"}; "I'd go with B"; "Therefore, B." and nothing else
_CUE = re.compile(
    r"(?i)(?<!wrong )(?<!incorrect )\b(?:answer|option|choice)\s*(?:(?:would|should|must|will|has to)\s+be\b|is\b|:):?"
    r"|(?<!if )\bI(?:\s+would|\s+will|['’]d|['’]ll)?\s+(?:choose|chose|pick|select|go\s+with)\b"
    r"|(?P<conclusion>\b(?:so|therefore|thus|hence|conclusion)\b)[,:]?"
)
_UNCHOSEN = re.compile(r"[^.,;]{0,80}?\b(?:is|was)\s*(?:n['’]t|not|wrong|incorrect|false)\b", re.I)
# what follows an option that is stated correct: not asked for, nor right under a condition or about something
_CORRECT = (
    r"\s+(?:is|(?:must|would|should)\s+be)\s+(?:(?:the|therefore|thus|clearly|indeed|most|likely|only|best)\s+){0,3}"
    r"(?:(?:correct|right)\b(?!\s*\?|\s+(?:if|when|only|unless|about|angle))|(?:answer|option|choice)\b(?!\s*\?))"
)
# what may stand before it: not the "Vitamin" of "Vitamin C is correct"
_BEFORE = (
    r"(?:^|[.,;:!?)\n]|\b(?:so|therefore|thus|hence|that|and|but|only|because|since|option|choice))\s{0,4}(?<!\w)"
)
_CLAUSE = re.compile(r"[.;!?\n]|\bbut\b|\b(?:correct|right|wrong|incorrect|false)\b(?!\s+(?:that|to)\b)", re.I)
# no claim of one option: "if B is correct", "A and B is correct"
_UNSURE = re.compile(
    r"(?i)\b(?:if|whether|either|or|might|may|maybe|perhaps|could|suppose|assum\w+|unless|both)\b"
    r"|\b(?-i:[A-Z0-9])\)?\s*(?:,|/|&|\band\b)[\s(]*$"
)
# an explanation, where the texts of a list's options are not known
_EXPLAINED = re.compile(r"\b(?:and|or|as|because|but|is|are|may|not|since|which|unlike|while|wrong|correct)\b", re.I)


@dataclass(frozen=True)
class ChoiceReward(Reward):
    """1 where a completion's answer is the right option, else 0.

    An answer is a letter ("B", "(B)", "B. Paris", "option B", `\\boxed{\\text{B}}`) or, where the options are known,
    an option's text. It is read where it is stated: in a box, else in `<answer>` tags, else after `####`, "answer is"
    or "answer:", else after "the option is", "I choose" or "therefore". Where none of these states an option, it is
    the only option called correct ("B is right"), else the first or last line, if that is an option and nothing else,
    or the only option that the text marks as one: "(B)", "option B", a line that begins with "B.". The last statement
    of a kind counts; one of several options ("B or C"), or of a letter beside another option's text, is wrong. A
    statement may be in lower case; the "a" and "I" of prose are no options. A list of options is no answer. Only what
    follows a thinking block is read.

    Not read: an answer in prose with none of these marks ("it must be Paris"), and right answers of several letters.

    Args:
        column: of the right option: its letter; with `options_column` also its text, or its index, an int from 0.
        options_column: of the options: a list of texts (A, B, ...), a dict of letter -> text (None: no such option),
            or `{"label": [...], "text": [...]}`. Without it, the options are the letters A to Z.
    """

    column: str = "answer"
    options_column: str | None = None

    kind: ClassVar[str] = "choice"

    @property
    def required_columns(self) -> tuple[str, ...]:
        return (self.column,) if self.options_column is None else (self.column, self.options_column)

    def grade_all(self, texts: list[str], rows: list[dict[str, Any]]) -> list[float | Exception]:
        return one_by_one(self._grade, texts, rows)

    def _grade(self, text: str, row: dict[str, Any]) -> float:
        options = None if self.options_column is None else read_options(row[self.options_column])
        return grade(text, row[self.column], options)


def grade(text: str, right: str | int, options: dict[str, str] | None = None) -> float:
    """See [`ChoiceReward`]; `options` are letter -> text. Raises: CannotGrade, where `right` is none of them."""
    known = options or _LETTERS
    wanted, chosen = right_option(right, known), chosen_option(text, known)
    # a benchmark may list a text twice
    return float(chosen is not None and (chosen == wanted or _same(known[chosen], known[wanted])))


def read_options(options: Any) -> dict[str, str]:
    """Options in any form that [`ChoiceReward`] takes, as letter -> text.

    Raises: CannotGrade, where they are in none of them.
    """
    if isinstance(options, Mapping) and {"label", "text"} <= options.keys():
        labels, texts = options["label"], options["text"]
    elif isinstance(options, Mapping):
        labels = [label for label, text in options.items() if text is not None]
        texts = [options[label] for label in labels]
    elif isinstance(options, Sequence) and not isinstance(options, str):
        labels, texts = ascii_uppercase[: len(options)], options
    else:
        labels = texts = ()
    if not labels or len(labels) != len(texts):
        raise CannotGrade(
            f"the options are {str(options)[:80]!r}; they must be a list of at most 26 texts, a dict of letter -> "
            "text, or {'label': [...], 'text': [...]} of equal lengths"
        )
    return {str(label).strip(): str(text) for label, text in zip(labels, texts, strict=True)}


def right_option(right: str | int, options: Options) -> str:
    """The letter of a reference: a letter, an option's text or an index from 0, in this order.

    Raises: CannotGrade, where it is none of them.
    """
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(options):
        return list(options)[right]
    found = _lone(right, options) if isinstance(right, str) else None
    if found is None:
        texts = [text for text in options.values() if text is not None]
        raise CannotGrade(
            f"the reference {str(right)[:80]!r} is none of the options {', '.join(options)}"
            + (f" nor one of their texts {str(texts)[:200]}" if texts else "; name options_column to compare texts")
        )
    return found


def chosen_option(text: str, options: Options) -> str | None:
    """The letter of the option that a completion's text chooses; None where it chooses none or several."""
    text = after_thinking(text)
    if text is None:
        return None
    text = text[:-_READ] + _without_lists(text[-_READ:], options)
    for statement in _statements(text):
        stated = _stated(" ".join(_MARKUP.sub(" ", statement).split()), options)
        if stated is not None:
            return stated or None
    text = _MARKUP.sub(" ", text[-_READ:])
    found = (read(text, options) for read in (_cued, _called_correct, _marked))
    return next((label for label in found if label is not None), None) or None


def _without_lists(text: str, options: Options) -> str:
    """A text without the lists of options in it: who repeats the question has not answered."""
    pattern, labels = _readers(tuple(options.items())).listed
    runs: list[dict[str, re.Match]] = [{}]
    for item in pattern.finditer(text):
        label, last = labels[item.lastindex - 1], list(runs[-1].values())[-1:]
        if options[label] is None and _EXPLAINED.search(item[0]):
            continue
        if label in runs[-1] or (last and text[last[0].end() : item.start()].strip(" \t\n,;|*•>-")):
            runs.append({})
        runs[-1][label] = item
    for first, *_, last in (run.values() for run in reversed(runs) if len(run) > 1):
        text = text[: first.start()] + "\n" + text[last.end() :]
    return text


def _cued(text: str, options: Options) -> str | None:
    """The option after the last cue that has one."""
    for cue in list(_CUE.finditer(text))[: -_STATEMENTS - 1 : -1]:
        statement = " ".join(text[cue.end() :].lstrip().partition("\n")[0].split())
        found = (_lone if cue["conclusion"] else _stated)(statement, options)
        if found is not None and not _UNCHOSEN.match(statement):
            return found
    return None


def _called_correct(text: str, options: Options) -> str | None:
    """The only option that is stated to be correct."""
    found, (pattern, labels) = set(), _readers(tuple(options.items())).correct
    for stated in pattern.finditer(text):
        before = _CLAUSE.split(text[max(0, stated.start() - 200) : stated.start("option")])[-1]
        if not _DENIED.search(before) and not _UNSURE.search(before):
            found.add(labels[stated.lastindex - 2])
    return (found.pop() if len(found) == 1 else _SEVERAL) if found else None


def _statements(text: str) -> Iterator[str]:
    """What is stated as the answer, the last first."""
    text = text[-_READ:]
    yield from STATEMENT.split(final_answer(text) or "")[: -_STATEMENTS - 1 : -1]
    for statement in list(STATEMENT.finditer(text))[: -_STATEMENTS - 1 : -1]:
        yield text[statement.end() :].partition("\n")[0]


def _stated(statement: str, options: Options) -> str | None:
    """The option that a statement begins with; None where it begins with none."""
    if (found := _lone(statement, options)) is not None:
        return found
    found, rest = _leading(statement, options)
    if found is None:
        found, rest = _leading(statement[_LEAD.match(statement).end() :], options)
    if found is None:
        return None
    joined = _JOINED.match(rest)
    if joined and _leading(rest[joined.end() :], options)[0] not in (None, found):
        return _SEVERAL
    in_brackets = _BRACKETS.match(rest)
    beside = _lone(in_brackets[1], options) if in_brackets else _leading_text(rest.lstrip(_MARKS), options)[0]
    return found if beside in (None, found) or _same(options[beside], options[found]) else _SEVERAL


def _marked(text: str, options: Options) -> str | None:
    """The option that stands on the last or first line alone, or is the only one marked as an option."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in lines[-1:] + lines[:1]:
        if (found := _lone(line, options)) is not None:
            return found
    in_text, on_line = _readers(tuple(options.items())).marked
    marked = set()
    for line in lines:
        if not _DENIED.search(line):
            marked.update(in_text.findall(line))
            label = on_line.match(line)
            if label and (options[label[1]] is None or _leading_text(label[2], options)[0] == label[1]):
                marked.add(label[1])
    return marked.pop() if len(marked) == 1 else None


def _lone(text: str, options: Options) -> str | None:
    """The option whose letter or text this is, and nothing else."""
    letter = text.strip(_MARKS + "([*'!?").casefold()
    for label in options:
        if label.casefold() == letter:
            return label
    for form in (squeeze, _bare):
        wanted = form(text)
        for label, option in options.items():
            if wanted and option is not None and form(option) == wanted:
                return label
    return None


def _leading(text: str, options: Options) -> tuple[str | None, str]:
    """The option that a text begins with, by its text or its letter, and the rest."""
    found, rest = _leading_text(text, options)
    if found is not None:
        return found, rest
    letter = _readers(tuple(options.items())).letter.match(text)
    if letter is None:
        return None, text
    found = next(label for label in options if label.casefold() == letter["label"].casefold())
    rest = text[letter.end() :]
    # "B looks right" may be an answer, "A bit" and "I think" are not
    sure = letter["word"] is None or (letter["label"].isupper() and found not in ("A", "I"))
    return (found, rest) if sure or _leading_text(rest, options)[0] == found else (None, text)


def _leading_text(text: str, options: Options) -> tuple[str | None, str]:
    """The option with the longest text that a text begins with, and the rest."""
    pattern, labels = _readers(tuple(options.items())).texts
    found = pattern.match(text)
    return (labels[found.lastindex - 1], text[found.end() :]) if found else (None, text)


class _Readers(NamedTuple):
    texts: tuple[re.Pattern, list[str]]  # a group for each of the labels
    letter: re.Pattern
    marked: tuple[re.Pattern, re.Pattern]  # anywhere in a line; at its start
    listed: tuple[re.Pattern, list[str]]  # what may be of a list
    correct: tuple[re.Pattern, list[str]]  # stated to be correct


@lru_cache(maxsize=1024)
def _readers(options: tuple[tuple[str, str | None], ...]) -> _Readers:
    letters = "|".join(sorted((re.escape(label) for label, _ in options), key=len, reverse=True))
    known = {label.casefold() for label, _ in options}
    texts = [(label, " ".join(_MARKUP.sub(" ", text).split())) for label, text in options if text]
    # longest first: "New York" is not "New York City"; an option "B" under the letter A is its text only where alone
    texts = sorted((x for x in texts if x[1] and x[1].casefold() not in known), key=lambda x: len(x[1]), reverse=True)
    longest_first = "|".join(f"({re.escape(text)})" for _, text in texts) or r"(?!)"
    correct = [(label, rf"[(\[]?{re.escape(label)}[)\].]?") for label, _ in options]
    correct += [(label, rf"(?i:{re.escape(text)})") for label, text in texts]
    each = "|".join(f"({form})" for _, form in correct)
    listed = "|".join(f"({_item(label, text, letters)})" for label, text in options)
    return _Readers(
        listed=(re.compile(listed, re.MULTILINE), [label for label, _ in options]),
        correct=(re.compile(rf"(?i:{_BEFORE})(?P<option>)(?:{each})(?i:{_CORRECT})"), [label for label, _ in correct]),
        texts=(re.compile(rf"(?:{longest_first}){_END}", re.I), [label for label, _ in texts]),
        letter=re.compile(
            rf"(?i)[(\[]?\s*(?P<label>{letters})(?![\w'’]|-\w)(?:\s*[)\]]|{_END}|(?-i:\.(?=[A-Z][a-z]))|(?P<word>\s))"
        ),
        marked=(
            # not the (A) of P(A), "the choice I made", "the best option is A bit"
            re.compile(
                r"(?:(?<!\w)\(\s*|\b(?:[Oo]ption|[Cc]hoice)\s+(?:\(?(?!I\s\w)|is:?\s+\(?(?![AI]\s\w)))"
                rf"({letters})\b"
            ),
            re.compile(rf"[\s#>•-]*+\(?({letters})[.):]\s+(.*)"),
        ),
    )


def _item(label: str, text: str | None, letters: str) -> str:
    """The pattern of an option in a list: "A. London", "(A) London" before "(B)", "A" or "London" alone on a line."""
    label, ends = re.escape(label), rf"(?=[ \t.,;|*]*(?:$|[(\[*]*(?:{letters})[).:\]]))"
    start, end = r"(?:^|(?<=:[ \t]))[ \t>*•-]{0,8}[(\[]?", r"[ \t.)\]*]{0,8}$"
    if text is None:
        inline, alone = rf"\(?\b{label}[.)][ \t]+[^\n()]{{1,80}}?{ends}", rf"{label}(?:[.):\]]\**[ \t]+[^\n]*$|{end})"
        return rf"{inline}|{start}{alone}"
    words = r"\s+".join(map(re.escape, text.split())) or r"(?!)"
    return rf"(?<!\w)[(\[*]{{0,4}}{label}[).:\]*]+[ \t]*\**(?i:{words})\**{ends}|{start}(?:{label}|(?i:{words})){end}"


def _bare(text: str) -> str:
    return squeeze(_MARKUP.sub("", text)).strip("'*").rstrip(".,;:!?")


def _same(text: str | None, other: str | None) -> bool:
    return text is not None and other is not None and squeeze(text) == squeeze(other)


choice_reward = ChoiceReward()
