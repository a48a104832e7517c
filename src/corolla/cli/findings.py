"""What `corolla doctor` finds, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    GOOD = "good"
    WEAK = "weak"  # works, but slower or with less
    MISSING = "missing"  # Corolla does not work without
    BROKEN = "broken"  # stands in the swarm's way


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` says what to do where it is not good."""

    name: str
    value: str
    verdict: Verdict = Verdict.GOOD
    advice: str = ""

    @property
    def fatal(self) -> bool:
        return self.verdict in (Verdict.MISSING, Verdict.BROKEN)


_COLORS = {Verdict.GOOD: "green", Verdict.WEAK: "yellow", Verdict.MISSING: "red", Verdict.BROKEN: "red"}


def show(findings: Sequence[Finding], conclusion: str) -> None:
    """The findings as a table on standard output, and one sentence below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")  # an address is to be copied whole
    for finding in findings:
        lines = Text(finding.value)
        if finding.advice:
            lines.append(f"\n{finding.advice}", style="bold")
        table.add_row(Text(finding.verdict, style=_COLORS[finding.verdict]), Text(finding.name), lines)
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(conclusion))
