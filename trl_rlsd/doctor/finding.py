"""What the doctor says: one line, with what to do where something is to be done."""

from __future__ import annotations

from dataclasses import dataclass


OK, WARNING, ERROR = "OK", "WARNING", "ERROR"


@dataclass(frozen=True)
class Finding:
    level: str
    subject: str
    text: str
