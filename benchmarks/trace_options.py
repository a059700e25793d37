"""The command line that the benchmarks of recording share."""

import argparse
import time
from collections.abc import Callable, Mapping


def parsed(description: str | None, defaults: Mapping[str, str]) -> tuple[argparse.Namespace, Callable[[], float]]:
    """The options, and the clock that they choose.

    Args:
        description: what `--help` says.
        defaults: of further options, by their names.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="of the process' threads, on a machine that others use")
    parser.add_argument("--smoke", action="store_true", help="tiny model, once: whether it runs")
    options = parser.parse_args()
    return options, time.process_time if options.cpu_time else time.perf_counter
