"""The table of a soak: a row for each attack, as markdown and as JSON."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak.exchange import KINDS, Outcome
from benchmarks.soak.probe import HANG_S, Answers

MANY = 20  # problems of one attack that are shown


@dataclass
class Row:
    """What one attack met. `problems` are what must not happen; without any, the attack was withstood."""

    attack: str
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probes: Answers = field(default_factory=Answers)

    def add(self, outcome: Outcome) -> None:
        """Count one request."""
        self.counts[outcome.kind] += 1
        if outcome.problem:
            self.problems.append(outcome.problem)

    def probed(self, answers: Answers) -> None:
        """Take what the probe measured during the attack."""
        self.probes = answers
        self.notes.append(f"slowest probe {answers.slowest_s:.2f} s of {answers.asked}")

    def all_problems(self) -> list[str]:
        """Return the problems, those of the probe included."""
        slow = f"/health/live took more than {HANG_S:.0f} s, {self.probes.hangs} times: {self.probes.slowest_s:.1f} s"
        failures = self.probes.failures
        failed = f"/health/live failed {len(failures)} times: {', '.join(failures[:3])}"
        found = [(self.probes.hangs, slow), (len(failures), failed)]
        return self.problems + [said for number, said in found if number]

    def cells(self) -> list[str]:
        """Return the row of the markdown table."""
        numbers = [sum(self.counts.values()), *(self.counts[kind] for kind in KINDS), self.probes.hangs]
        return [self.attack, *map(str, numbers), "; ".join(self.notes)]


def markdown(rows: list[Row], title: str) -> str:
    """Return the table, and the problems below it."""
    header = ["attack", "requests", *KINDS, "hangs", "note"]
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header))]
    lines += [_line(row.cells()) for row in rows]
    problems = [f"- {row.attack}: {problem}" for row in rows for problem in row.all_problems()[:MANY]]
    return "\n".join([*lines, "", "## Problems", "", *(problems or ["None."])]) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def write(rows: list[Row], title: str, folder: Path) -> str:
    """Write soak.md and soak.json into `folder`; return the markdown."""
    text = markdown(rows, title)
    (folder / "soak.md").write_text(text)
    records = [
        {"attack": row.attack, "requests": sum(row.counts.values())}
        | {kind: row.counts[kind] for kind in KINDS}
        | {"hangs": row.probes.hangs, "slowest_probe_s": round(row.probes.slowest_s, 3)}
        | {"notes": row.notes, "problems": row.all_problems()}
        for row in rows
    ]
    (folder / "soak.json").write_text(json.dumps(records, indent=1) + "\n")
    return text
