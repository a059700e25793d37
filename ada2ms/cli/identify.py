"""`ada2ms identify`: what does an optimizer compute?

It steps any optimizer of torch, Keras, Optax or your own by designed gradients, and says in words what its updates
are: where epsilon stands, what decay does, how moments are corrected, and what cannot be explained. Exit status: 0,
explained; 1, something is not; 2, it cannot be run.
"""

import argparse
import json
import sys
from typing import Any

from ada2ms.cli.arguments import reported
from ada2ms.conformance.identification.subject import CannotRunError


def add(commands: Any) -> None:
    """Adds `identify` to the command line."""
    parser = commands.add_parser(
        "identify",
        help="what an optimizer computes, in words",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples: ada2ms identify torch.optim:AdamW\n"
        "          ada2ms identify optax:adamw --set weight_decay=0.1\n"
        "          ada2ms identify mymodule:make_optimizer",
    )
    parser.set_defaults(run=reported(run, CannotRunError))
    parser.add_argument(
        "optimizer",
        help="module:name of a class or function: of torch, gets the parameters first; of Keras and Optax, returns the "
        "optimizer; of NumPy, gets arrays and returns an object with step(gradients) and params",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of it, by its own name or the rule's; may be given again",
    )
    parser.add_argument("--framework", choices=("torch", "keras", "optax", "numpy"), help="what it is, if not seen")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Prints what an optimizer computes."""
    from ada2ms.cli.subjects import load
    from ada2ms.conformance.identification.identify import identify_subject

    found = identify_subject(load(arguments.optimizer, arguments.set, arguments.framework))
    print(json.dumps(found.data(), indent=1) if arguments.json else found)
    sys.stdout.flush()
    return found.status
