"""Credit pictures in a terminal. Colours are those of the page; where there are none, an underline is more credit and
the table below says which tokens stand out."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from trl_rlsd.report.picture import CreditPicture, Token
from trl_rlsd.texts import collapse, visible


# (light, strong) of Okabe-Ito's blue and vermilion, on which black and white are both readable
_MORE = ("#a9d3ea", "#0072b2")
_LESS = ("#f6c9a5", "#d55e00")
_ROWS = 3  # tokens of either kind in the table


def rendered(pictures: Sequence[CreditPicture], *, prompts: bool = True) -> RenderableType:
    """What `rich` prints: a legend, and each completion with its prompts, its tokens and those that stand out."""
    if not pictures:
        return Text("There is no completion to show.")
    return Group(_legend(), *(_panel(number, picture, prompts) for number, picture in enumerate(pictures, 1)))


def _legend() -> Text:
    return Text.assemble(
        ("more", Style(color="black", bgcolor=_MORE[0], underline=True)),
        " than an even share of the credit (of the blame where A < 0; of a gate: how far it is open), ",
        ("less", Style(color="black", bgcolor=_LESS[0])),
        "; strong where the weight was clipped. gain: log-probability with the privileged context, minus without it.",
    )


def _panel(number: int, picture: CreditPicture, prompts: bool) -> Panel:
    verdict = "better than" if picture.advantage > 0 else "worse than" if picture.advantage < 0 else "no better than"
    title = f"{number}. {verdict} its group, A = {picture.advantage:+.3f}"
    facts = [
        f"{name} {'no verdict' if value is None else format(value, '.3g')}" for name, value in picture.rewards.items()
    ]
    facts += [f"credit {picture.credit}"]
    facts += [f"lambda {picture.lam:.3g}"] if picture.lam is not None else []
    parts: list[RenderableType] = []
    if prompts:
        parts += [_prompt("The student read", picture.student_prompt, (0, 0))]
        if picture.teacher_prompt is not None:
            parts += [_prompt("The teacher read", picture.teacher_prompt, picture.privileged)]
    parts += [_tokens(picture), _table(picture)]
    return Panel(
        Group(*parts),
        title=Text(title),
        subtitle=Text(visible(" · ".join(facts))),
        title_align="left",
        box=box.ROUNDED,
    )


def _prompt(label: str, text: str, marked: tuple[int, int]) -> Text:
    start, end = marked
    pieces = [visible(collapse(piece)) for piece in (text[:start], text[start:end], text[end:])]
    return Text.assemble((f"{label}: ", "bold"), pieces[0], (pieces[1], "reverse"), pieces[2], "\n")


def _tokens(picture: CreditPicture) -> Text:
    largest = max((abs(value) for value in picture.excess if value is not None), default=0.0)
    text = Text()
    for token, excess in zip(picture.tokens, picture.excess, strict=True):
        text.append(visible(token.text).replace("\n", "↵\n"), style=_style(token, excess, largest))
    return text


def _style(token: Token, excess: float | None, largest: float) -> Style:
    if excess is None:
        return Style(dim=True, italic=True)
    if abs(excess) <= 0.02 * largest:
        return Style()
    light, strong = _MORE if excess > 0 else _LESS
    ink, ground = ("white", strong) if token.clip else ("black", light)
    return Style(color=ink, bgcolor=ground, underline=excess > 0)


def _table(picture: CreditPicture) -> Table:
    blame = picture.keeps_sign and picture.advantage < 0
    table = Table(box=box.SIMPLE, title=f"Most and least {'blame' if blame else 'credit'}", title_justify="left")
    for name in ("token", "", "gain", "weight", "credit"):
        table.add_column(name, justify="left" if name == "" else "right")
    excess = picture.excess
    # clipped tokens have equal credit: their weights tell them apart
    order = sorted(
        (index for index, value in enumerate(excess) if value is not None),
        key=lambda index: (-excess[index], -(picture.tokens[index].weight or 0.0), index),
    )
    for index in dict.fromkeys([*order[:_ROWS], *order[-_ROWS:]]):
        token = picture.tokens[index]
        clip = {"high": " (cut)", "low": " (raised)", "": ""}[token.clip]
        table.add_row(
            str(index + 1),
            Text(visible(repr(token.text))),
            "-" if token.gain is None else f"{token.gain:+.3f}",
            "-" if token.weight is None else f"{token.weight:.3f}{clip}",
            f"{token.credit:+.4f}",
        )
    return table
