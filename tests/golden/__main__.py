"""`python -m tests.golden`; see the package."""

import argparse
import sys
from collections.abc import Sequence

from ada2ms.core import golden

from . import __doc__ as description
from . import maker


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where something is wrong with the vectors, 2 where mpmath is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="make them again and compare byte for byte")
    action.add_argument("--write", action="store_true", help="make them again and replace the files")
    try:
        if parser.parse_args(arguments).write:
            maker.write()
        problems = maker.check()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(golden.load())} golden cases in {len(golden.shipped()) - 1} files, as the oracle makes them")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
