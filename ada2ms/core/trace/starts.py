"""What parts two runs before their first step: parameters of other values, of other types, or by other names."""

import math
from typing import Final

import numpy as np

from ada2ms.core.dialects import rounded
from ada2ms.core.trace.pair import Pair, relative
from ada2ms.core.trace.sketch import Array, distance, precision
from ada2ms.core.trace.verdict import Verdict, some

_NARROW: Final = 2.0**-12  # half an ulp of types that are wider than 16 bits is less


def start(pair: Pair, apart: Array, norm: Array, bad: Array) -> Verdict:
    """Other values before the first step."""
    names = [pair.names[k] for k in np.flatnonzero(bad)]
    x, y = pair.sketches("value", 0)
    moved = [k for k in np.flatnonzero(bad) if x[k, 0] > 0 and relative(x[k, 0], y[k, 0]) <= pair.same_values]
    if moved and len(moved) == len(names):
        turned = [k for k in moved if _transposed(pair, pair.names[k])]
        if turned:
            cause = f"{some([pair.names[k] for k in turned])} look transposed: the same numbers with axes exchanged"
            look = [f"axes= for {some([pair.names[k] for k in turned])} (plain_layers knows them for plain layers)"]
            return Verdict("parted", cause, "start", 1, "transposed", look=look, parameters=names)
        cause = f"{some(names)} have the same norm and another order of entries"
        return Verdict(
            "parted",
            cause,
            "start",
            1,
            "order",
            parameters=names,
            look=["axes= and names=: whether these are the same parameters, in the same layout"],
        )
    if exchanged := _exchanged(pair, bad):
        each = ", ".join(f"{here} of B is {there} of A" for here, there in exchanged[:3])
        rest = len(exchanged) - 3
        cause = f"weights of other parameters: {each}" + (f" and {rest} more" if rest > 0 else "")
        look = ["by which names weights were carried over, and names=: whether layers have the same order in both"]
        return Verdict("parted", cause, "start", 1, "exchanged", look=look, parameters=names)
    if found := _rounded(pair, names):
        who, kind = found
        cause = f"{some(names)} of {who} are those of the other run, rounded to {kind}"
        look = [f"a checkpoint or a model that was cast to {kind} on the way"]
        return Verdict("parted", cause, "start", 1, "rounded", look=look, parameters=names)
    cause = f"{len(names)} of {len(pair.names)} parameters start from other values: {some(names)}"
    look = ["the initialisation: copy the weights of one run to the other (export_state and import_state do)"]
    if len(names) < len(pair.names):
        look.append("layers whose initialisation differs between the frameworks, such as the bias or the embedding")
    return Verdict("parted", cause, "start", 1, "initial values", look=look, parameters=names)


def _transposed(pair: Pair, name: str) -> bool:
    x, y = (step.full.get("value", {}).get(name) for step in pair.steps[0])
    if x is None or y is None or x.ndim < 2 or x.size != y.size:
        return False
    orders = [tuple(reversed(range(x.ndim))), (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)]
    turned = [x.transpose(order) for order in orders]
    flat = y.reshape(-1)
    allowed = pair.same_values * float(np.linalg.norm(flat))
    return any(float(np.linalg.norm(t.reshape(-1) - flat)) <= allowed for t in turned)


def _exchanged(pair: Pair, bad: Array) -> list[tuple[str, str]]:
    """Parameters of B whose values are those of another parameter of A; of those that hold more than one number."""
    x, y = pair.sketches("value", 0)
    places = np.flatnonzero(bad)
    found = []
    for j in places:
        shape = pair.a.parameters[pair.ia[j]].shape
        if not y[j, 0] > 0 or _is_flat(y[j]):
            continue
        for k in places:
            same = k != j and pair.a.parameters[pair.ia[k]].shape == shape
            if same and float(distance(x[k][None], y[j][None])[0]) <= pair.same_values * y[j, 0]:
                found.append((pair.names[j], pair.names[k]))
                break
    return found


def _is_flat(row: Array) -> bool:
    """Whether a tensor is likely to hold one number alone, as a new normalisation does: every sum is a whole multiple.

    Sums of equal entries are that entry times whole numbers of one parity.
    """
    sums = np.abs(row[1:])
    least = float(sums[sums > 0].min(initial=np.inf))
    return not math.isfinite(least) or bool(np.allclose(sums / least, np.round(sums / least), atol=1e-3))


def _rounded(pair: Pair, names: list[str]) -> tuple[str, str] | None:
    """Which run's values are those of the other, rounded to 16 bits, and to which."""
    steps = pair.steps[0]
    for who, here, there in (("B", 1, 0), ("A", 0, 1)):
        for kind in ("bfloat16", "float16"):
            each = [[steps[side].full.get("value", {}).get(name) for side in (here, there)] for name in names]
            if all(x is not None and y is not None and np.array_equal(x, rounded(y, kind)) for x, y in each):
                return who, kind
    return None


def types(pair: Pair) -> Verdict | None:
    """Parameters that are kept in 16 bits in one run alone."""
    found = {types: names for types, names in pair.types().items() if max(map(precision, types)) > _NARROW}
    if not found:
        return None
    names = [name for each in found.values() for name in each]
    sentences = [f"{some(each)} are {here} in A and {there} in B" for (here, there), each in found.items()]
    look = [
        "in which type parameters are kept: steps that are smaller than half an ulp of 16 bits are lost without a "
        "float32 copy of the weights",
        "--arithmetic: says that the coarser type is meant",
    ]
    return Verdict("parted", "; ".join(sentences), "start", 1, "types", look=look, parameters=names)
