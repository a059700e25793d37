"""Which golden case tells which wrong variant of the rule, for `ada2ms check` and docs/conformance.md.

    PYTHONPATH=. python tests/variants.py --write

writes ada2ms/conformance/variants.json, and the table in docs/conformance.md; it takes some two minutes. Without
--write it says whether the table and the named variants are those of today, which takes a second.
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

import mutants_added  # noqa: F401
from mutation import MUTANTS, mutate, rejection

import mutants  # noqa: F401  # these two fill MUTANTS
from ada2ms.core import golden
from ada2ms.core.cases import factors

ROOT = Path(__file__).parents[1]
FILE, PAGE = ROOT / "ada2ms" / "conformance" / "variants.json", ROOT / "docs" / "conformance.md"
BEGIN, END = "<!-- made by tests/variants.py -->\n", "<!-- end -->\n"
SHORT = 30  # steps of a case of the cover
ALWAYS = ("basics/defaults-model", "basics/defaults-tensor", "schedules/cosine-model")

Told = dict[str, list[str]]


def named() -> Told:
    """By case, in the order of the vectors: the variants that are named with it."""
    found: Told = {case.id: [] for case in golden.load()}
    for mutant in MUTANTS:
        found[mutant.case].append(mutant.name)
    return {case: names for case, names in found.items() if names}


def cover() -> Told:
    """Few short cases that tell all variants, and what each tells that those before it do not.

    Every framework can state them, and those of 16 bits, which run in float32 alone, tell what no others do.
    """
    short = [case for case in golden.load() if len(case.gradients) <= SHORT and factors(case) is not None]
    told: dict[str, set[str]] = {case.id: set() for case in short}
    for mutant in MUTANTS:
        module = mutate(*mutant.edits)
        for case in short:
            with suppress(Exception):  # an edit may be one for its own case, and crash in others
                if rejection(module, case):
                    told[case.id].add(mutant.name)
    return fewest(short, told)


def fewest(short: list[golden.Case], told: dict[str, set[str]]) -> Told:
    """The cases of `ALWAYS`, then the one that tells most of what remains, and so on."""
    remaining, found = {mutant.name for mutant in MUTANTS}, {}

    def take(case: str) -> None:
        found[case] = [mutant.name for mutant in MUTANTS if mutant.name in told[case] & remaining]
        remaining.difference_update(told[case])

    for case in ALWAYS:
        take(case)
    for sixteen_bits in (False, True):
        some = [case for case in short if case.compensated is sixteen_bits]
        while remaining & set().union(*(told[case.id] for case in some)):
            take(max(some, key=lambda case: (len(told[case.id] & remaining), -len(case.gradients), case.id)).id)
    assert not remaining, f"no short case tells {remaining}"
    return found


def table(told: Told) -> str:
    """Every case, what it is for and which variants are named with it, as Markdown."""
    lines = ["| case | what it is | wrong variants that it is there to tell |", "| --- | --- | --- |"]
    lines += [f"| `{case.id}` | {case.comment} | {'; '.join(told.get(case.id, []))} |" for case in golden.load()]
    return "\n".join(line.replace(" |  |", " | |") for line in lines) + "\n"


def split(page: str) -> tuple[str, str, str]:
    """What stands before, in and after the part of a page that is made here."""
    before, _, rest = page.partition(BEGIN)
    made, _, after = rest.partition(END)
    return before + BEGIN, made, END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace what is made here")
    told = named()
    before, made, after = split(PAGE.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        FILE.write_text(json.dumps({"named": told, "cover": cover()}, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(before + table(told) + after, encoding="utf-8")
        return 0
    current = json.loads(FILE.read_text(encoding="utf-8"))["named"] == told and made == table(told)
    print("as today" if current else f"{FILE.name} or {PAGE.name} is not what --write makes")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
