"""What commands have in common: arguments from text to values, and errors in one line."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields

from ada2ms.core import schedules
from ada2ms.core.hyperparameters import Scheduled, check


def adaptivity(text: str) -> Scheduled:
    """A number in [0, 1], or the kind and the fields of a schedule, such as `linear:1:0:200`, `exponential:1:0:50`."""
    kind, *values = text.split(":")
    try:
        if kind not in schedules.KINDS:
            try:
                number = float(text)
            except ValueError:
                kinds = ", ".join(schedules.KINDS)
                raise ValueError(f"must be a number in [0, 1], or one of {kinds} with its fields") from None
            check("adaptivity", number)
            return number
        names = [field.name for field in fields(schedules.KINDS[kind])]
        if len(values) != len(names):
            raise ValueError(f"must be {':'.join([kind, *names])}")
        given = {name: int(x) if name == "steps" else float(x) for name, x in zip(names, values, strict=True)}
        return schedules.from_dict({"schedule": kind, **given})
    except (TypeError, ValueError) as error:
        _, _, allowed = str(error).partition(" (")  # of an error that names the value itself
        reason = allowed.removesuffix(")") or str(error)
        raise argparse.ArgumentTypeError(f"Invalid adaptivity: {text!r} ({reason})") from None


def whole_number(argument: str, smallest: int) -> Callable[[str], int]:
    """Reads whole numbers from `smallest` on, which is 0 or 1."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            allowed = "a whole number above 0" if smallest else "a whole number, at least 0"
            raise argparse.ArgumentTypeError(f"Invalid {argument}: {text!r} (must be {allowed})")
        return int(text)

    return read


def reported(
    action: Callable[[argparse.Namespace], int], *errors: type[Exception]
) -> Callable[[argparse.Namespace], int]:
    """The action of a command, with these errors in one line and the exit status 2."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return action(arguments)
        except errors as error:
            print(error, file=sys.stderr)
            return 2

    return run
