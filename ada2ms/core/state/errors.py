"""What is wrong with a state, as a whole."""

from collections.abc import Iterable
from typing import Any


class StateError(ValueError):
    """A state that is not valid, or does not fit where it should go; the message lists every reason.

    Args:
        what: what cannot be done.
        problems: the reasons, each a sentence.
    """

    def __init__(self, what: str, problems: Iterable[str]) -> None:
        self.what, self.problems = what, list(problems)
        super().__init__("\n  - ".join([f"{what}:", *self.problems]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.problems)
