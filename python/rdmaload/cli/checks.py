"""What `rdmaload doctor` found out, one finding per line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """One finding.

    >>> Check("memory", "warn", "1.0 GB", "free some").line()
    'warn  memory: 1.0 GB; free some'
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    advice: str = ""
    """What to do next; empty where nothing needs doing."""

    def line(self) -> str:
        """The finding for people."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.status:<4}  {self.name}: {self.value}{advice}"

    def to_json(self) -> dict[str, str]:
        return {
            "name": self.name,
            "status": self.status,
            "value": self.value,
            "advice": self.advice,
        }
