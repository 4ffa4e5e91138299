"""Credit pictures as one HTML page: no network, no script but its own, and text from prompts and models is inert."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trl_rlsd.files import write_whole
from trl_rlsd.report.picture import CreditPicture, Span, Token
from trl_rlsd.texts import collapse, visible


class CreditPictures(list[CreditPicture]):
    """Pictures that show themselves: in a notebook, with `rich.print`, and as a page by `save`."""

    def html(self, title: str = "Token credit") -> str:
        """The page."""
        return credit_page(self, title)

    def save(self, path: str | Path, title: str = "Token credit") -> Path:
        """Write the page, in the place of what was there; its folder is made if need be."""
        write_whole(Path(path), self.html(title))
        return Path(path)

    def _repr_html_(self) -> str:
        # a frame of its own: the notebook's styles and scripts and the page's do not meet
        source = html.escape(self.html(), quote=True)
        return f'<iframe sandbox="allow-scripts" width="100%" height="640" srcdoc="{source}"></iframe>'

    def __rich__(self) -> Any:
        from trl_rlsd.report.terminal import rendered

        return rendered(self)


def credit_page(pictures: Sequence[CreditPicture], title: str = "Token credit") -> str:
    """One self-contained HTML page: each token coloured by its credit, gain or weight, with the values on hover or by
    the arrow keys, and the prompts that were read.

    Colours are relative to the largest value of the page. Text is escaped; the page's policy lets no script run but
    its own, and nothing be loaded.
    """
    (template, script), scales = _template(), _scales(pictures)
    weighed = [picture for picture in pictures if any(token.weight is not None for token in picture.tokens)]
    evidence = {picture.evidence for picture in weighed if picture.evidence is not None}
    return template.render(
        title=visible(title),
        pictures=[_view(picture, scales) for picture in pictures],
        script=script,
        digest=digest(script),
        additive=any(not picture.keeps_sign for picture in pictures),
        gated=any(picture.evidence == "gate" for picture in pictures),
        evidence=[_EVIDENCE[name] for name in sorted(evidence)],
        clip_range=next((picture.clip_range for picture in pictures if picture.clip_range is not None), None),
    )


def digest(script: str) -> str:
    """By which a page's policy lets a script run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# what a weight is taken of
_EVIDENCE = {"gain": "gain", "reversed": "minus the gain", "contrast": "contrast"}


@cache
def _template():
    loader = PackageLoader("trl_rlsd", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible
    # byte for byte what stands in the page, or the browser refuses to run it
    script = loader.get_source(environment, "credit.js")[0].strip()
    return environment.get_template("credit.html"), script


def _scales(pictures: Sequence[CreditPicture]) -> dict[str, float]:
    """The value that has the full colour, by what is shown."""
    values: dict[str, list[float]] = {"credit": [], "gain": [], "weight": []}
    for picture in pictures:
        for token, excess in zip(picture.tokens, picture.excess, strict=True):
            if token.counts:
                values["credit"].append(abs(excess) / _unit(picture))
                values["gain"].append(abs(token.gain or 0.0))
                values["weight"].append(_log(token.weight))
    return {name: max([*own, 1e-9]) for name, own in values.items()}


def _unit(picture: CreditPicture) -> float:
    """Credit is shown as a multiple of |A|, so that completions with small and large A compare."""
    return abs(picture.advantage) if picture.keeps_sign and picture.advantage else 1.0


def _log(weight: float | None) -> float:
    # beyond a factor of 4 all weights look alike: they are clipped long before
    return 0.0 if weight is None else min(abs(weight - 1.0) if weight >= 1 else abs(1 / max(weight, 0.25) - 1), 3.0)


def _view(picture: CreditPicture, scales: dict[str, float]) -> dict[str, Any]:
    """What the template shows of a picture."""
    start, end = picture.privileged
    teacher = picture.teacher_prompt
    return {
        "picture": picture,
        "tokens": [
            _token(token, excess, picture, scales)
            for token, excess in zip(picture.tokens, picture.excess, strict=True)
        ],
        "student": visible(collapse(picture.student_prompt)),
        "teacher": None if teacher is None else [visible(collapse(t)) for t in _cut(teacher, start, end)],
        "wrong": None if picture.wrong_prompt is None else visible(collapse(picture.wrong_prompt)),
        "most": _span(picture, picture.most),
        "least": _span(picture, picture.least),
        "clipped": [sum(token.clip == side for token in picture.tokens) for side in ("low", "high")],
    }


def _cut(text: str, start: int, end: int) -> tuple[str, str, str]:
    return text[:start], text[start:end], text[end:]


def _token(token: Token, excess: float | None, picture: CreditPicture, scales: dict[str, float]) -> dict[str, Any]:
    shades = {
        "credit": 0.0 if excess is None else excess / _unit(picture) / scales["credit"],
        "gain": (token.gain or 0.0) / scales["gain"],
        "weight": 0.0 if token.weight is None else _log(token.weight) / scales["weight"] * _side(token.weight),
    }
    text = visible(token.text).replace("\n", "↵\n").replace("\t", "⇥\t")
    ends_line = text.endswith("\n")  # the mark of a clipped token stands before its line break
    return {
        "token": token,
        "text": text[:-1] if ends_line else text,
        "ends_line": ends_line,
        "times": f"{token.credit / picture.advantage:.3f}" if picture.keeps_sign and picture.advantage else "",
        "shades": {name: f"{value:.3f}" for name, value in shades.items()},
    }


def _side(weight: float) -> int:
    return 1 if weight >= 1 else -1


def _span(picture: CreditPicture, span: Span | None) -> dict[str, Any] | None:
    if span is None:
        return None
    text = "".join(token.text for token in picture.tokens[span.start : span.end])
    return {"span": span, "text": visible(text).replace("\n", "↵")}
