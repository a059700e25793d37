"""What is said of two traces, or of one: stage, step, cause, evidence, and what to look at."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Outcome = Literal["only rounding", "parted", "cannot tell"]
STATUS: Final[dict[str, int]] = {"only rounding": 0, "parted": 1, "cannot tell": 2}
STAGES: Final = ("data", "start", "value", "forward", "statistics", "gradient", "hyperparameters", "update")
_MOST: Final = 8  # sentences of a kind that are printed


@dataclass
class Verdict:
    """What two traces, or one, come to.

    Attributes:
        outcome: "only rounding", "parted" or "cannot tell".
        stage: of STAGES, where they part; empty if they do not.
        step: at which, counted from 1; 0 if they do not.
        cause: in one sentence.
        evidence: what was seen, with sizes.
        agrees: what agrees before it.
        look: what to look at.
        notes: what differs and does not matter, or could not be compared.
        parameters: those that part.
        kind: the cause in one or two words, for programs.
        also: what is seen besides and does not follow from the cause: of later stages, in the same step.
        place: the first module, or whatever was recorded by this name, whose output or input differs; empty if it is
            not known.
    """

    outcome: Outcome
    cause: str
    stage: str = ""
    step: int = 0
    kind: str = ""
    evidence: list[str] = field(default_factory=list)
    agrees: list[str] = field(default_factory=list)
    look: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    place: str = ""

    @property
    def status(self) -> int:
        """The exit status: 0, 1 or 2."""
        return STATUS[self.outcome]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "status": self.status}

    def __str__(self) -> str:
        where = f" at step {self.step}, in the stage {self.stage!r}" if self.stage else ""
        lines = [f"{self.outcome.capitalize()}{where}: {self.cause}"]
        for title, sentences in (
            ("also", self.also),
            ("evidence", self.evidence),
            ("agrees", self.agrees),
            ("look at", self.look),
            ("notes", self.notes),
        ):
            for i, sentence in enumerate(_shown(sentences)):
                lines.append(f"  {title + ':' if i == 0 else '':10} {sentence}")
        return "\n".join(lines)


def _shown(sentences: list[str]) -> list[str]:
    """Of many sentences the first; JSON has all."""
    rest = len(sentences) - _MOST
    return sentences if rest <= 1 else [*sentences[:_MOST], f"and {rest} more (--json has all)"]


def joined(found: Sequence[Verdict]) -> Verdict | None:
    """What is found in one step as one verdict: the first stage's, with the causes of that stage together.

    Of many causes the first; all of them are evidence then.
    """
    if not found:
        return None
    first = found[0]
    causes = list(dict.fromkeys(verdict.cause for verdict in found if verdict.stage == first.stage))
    for verdict in found[1:]:
        if verdict.stage != first.stage:
            first.also.append(f"in the stage {verdict.stage!r}: {verdict.cause}")
            continue
        first.evidence += [sentence for sentence in verdict.evidence if sentence not in first.evidence]
        first.look += [sentence for sentence in verdict.look if sentence not in first.look]
        first.parameters += [name for name in verdict.parameters if name not in first.parameters]
    first.cause = some(causes, between="; ")
    first.evidence = [*(causes if first.cause != "; ".join(causes) else []), *first.evidence]
    return first


def some(names: list[str], most: int = 4, between: str = ", ") -> str:
    """Names for a sentence, not too many."""
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
