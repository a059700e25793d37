"""Optimizers of the Ada2MS project: checks, what any optimizer computes, a demo, a comparison, states, and traces."""

import argparse
import sys
from collections.abc import Sequence

from ada2ms import __version__
from ada2ms.cli import check, compare, demo, identify, state, trace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 2 where something is missing, or an argument is wrong."""
    parser = argparse.ArgumentParser(prog="ada2ms", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ada2ms {__version__}")
    commands = parser.add_subparsers(required=True)
    for command in (check, identify, demo, compare, state, trace):
        command.add(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    return status
