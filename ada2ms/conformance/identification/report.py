"""What an identification has found, in words and as data."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ada2ms.core.dialects import FAMILIES, Dialect, Hyper


@dataclass
class Finding:
    """One thing that an optimizer does.

    Attributes:
        feature: which, such as "epsilon".
        words: what it does.
        evidence: how it shows: by how much the nearest other answer is off.
    """

    feature: str
    words: str
    evidence: str = ""


@dataclass
class Identification:
    """What an optimizer computes.

    Attributes:
        name: the optimizer's.
        dialect: which explains most.
        hyper: its hyperparameters, as measured.
        dtype: in which it was found.
        deviation: what is left of an update, relative to it.
        findings: what it does.
        unexplained: what the dialect does not explain; with any of it, nothing is explained.
        facts: what is seen without a dialect, where something is unexplained.
    """

    name: str
    dialect: Dialect
    hyper: Hyper
    dtype: str
    deviation: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def explained(self) -> bool:
        """Whether nothing is unexplained."""
        return not self.unexplained

    @property
    def status(self) -> int:
        """The exit status of the command: 0 explained, 1 not."""
        return 0 if self.explained else 1

    def says(self, feature: str) -> str:
        """What it does in one thing; empty if nothing was found."""
        return next((found.words for found in self.findings if found.feature == feature), "")

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "explained": self.explained}

    def __str__(self) -> str:
        family = FAMILIES[self.dialect.family]
        if self.explained:
            to = f"{self.deviation:.0e} of each update" if self.deviation else "rounding"
            lines = [f"{self.name} is explained, to {to} in {self.dtype}: {family}"]
        else:
            lines = [f"{self.name} is not explained. What comes nearest: {family}"]
        width = max((len(found.feature) for found in self.findings), default=0)
        for found in self.findings:
            evidence = f"  ({found.evidence})" if found.evidence else ""
            lines.append(f"  {found.feature:{width}}  {found.words}{evidence}")
        lines += [f"  unexplained: {sentence}" for sentence in self.unexplained]
        lines += [f"  seen: {sentence}" for sentence in self.facts]
        return "\n".join(lines)


def spans(steps: list[int]) -> str:
    """Steps in words: "step 3", "steps 1-4, 7"."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    words = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
    return f"step{'s' * (len(steps) > 1)} {words}"
