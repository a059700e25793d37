"""The rule in arithmetic of 50 digits: what the golden vectors are made with.

Written from the equations, one entry at a time, and independently of `ada2ms.core.spec`, which it judges: bias
corrections are not powers of beta but the same moving average taken of ones, roots are exponentials of logarithms,
decay is a part of the step, and plain lists stand for tensors. Gradients are clipped one by one, before everything
else, and numbers of 16 bits are fractions with a limited numerator. Needs mpmath (the extra `dev`).
"""

import math
import struct
from fractions import Fraction
from typing import Any, Final

Data = dict[str, Any]
# Of a type: significant bits, the exponent of its smallest number above 0, its largest number, its code in `struct`.
FORMATS: Final = {
    "float16": (11, -24, Fraction(2**16 - 2**5), "e"),
    "bfloat16": (8, -133, Fraction(2**128 - 2**120), "f"),
}


class _Average:
    """An exponential moving average that starts at 0, and the weight it has gathered: 1 - beta**updates."""

    def __init__(self, mp: Any) -> None:
        self.value, self.weight = mp.mpf(0), mp.mpf(0)

    def move(self, beta: Any, x: Any) -> None:
        self.value += (1 - beta) * (x - self.value)
        self.weight += (1 - beta) * (1 - self.weight)

    def corrected(self) -> Any:
        return self.value / self.weight


class _Tensor:
    def __init__(self, mp: Any, data: Data, compensated: bool) -> None:
        self.dtype = data.get("dtype")
        values = data["values"] if self.dtype is None else [_value(x, self.dtype) for x in data["values"]]
        self.theta = [mp.mpf(x) for x in values]
        self.rest = [mp.mpf(0) for _ in values] if compensated and self.dtype else None
        self.m = [_Average(mp) for _ in values]
        self.v = [_Average(mp) for _ in values]
        self.s = _Average(mp)  # used with scope "tensor"
        self.t = 0


class _Group:
    def __init__(self, mp: Any, data: Data, compensated: bool) -> None:
        self.tensors = [_Tensor(mp, p, compensated) for p in data["params"]]
        self.lr, self.adaptivity = data["lr"], data["adaptivity"]
        self.b1, self.b2, self.eps, self.wd = (mp.mpf(data[name]) for name in ("b1", "b2", "eps", "weight_decay"))
        self.s = _Average(mp)  # used with scope "model"
        self.k = 0


def expected(case: Data) -> list[Data]:
    """Parameters and state after each of the steps named in `case["record"]`, rounded to the nearest double at the end.

    Args:
        case: a golden case as plain data, with floats as floats.

    Raises:
        ImportError: mpmath is not installed.
    """
    mp = _mpmath()
    groups = [_Group(mp, data, case.get("compensated", False)) for data in case["groups"]]
    tensors = [(group, tensor) for group in groups for tensor in group.tensors]
    skipped, records = 0, []
    with mp.workdps(50):
        for number, row in enumerate(case["gradients"], start=1):
            gradients = [None if g is None else [mp.mpf(x) for x in g] for g in row]
            entries = [x for g in gradients if g is not None for x in g]
            if case["nonfinite"] == "skip" and not all(mp.isfinite(x) for x in entries):
                skipped += 1
            elif any(g is not None for g in gradients):
                if case.get("max_norm") is not None:
                    gradients, entries = _clipped(mp, gradients, entries, mp.mpf(case["max_norm"]))
                _step(mp, case["scope"], groups, list(zip(tensors, gradients, strict=True)), entries, number)
            if number in case["record"]:
                records.append(
                    {"step": number, "skipped": skipped, "groups": [_record(g, case["scope"]) for g in groups]}
                )
    return records


def _step(mp: Any, scope: str, groups: list[_Group], rows: list[Any], entries: list[Any], number: int) -> None:
    lr = {group: mp.mpf(group.lr[number - 1] if isinstance(group.lr, list) else group.lr) for group in groups}
    a = {group: _adaptivity(mp, group.adaptivity, group.k) for group in groups}
    for group in groups:
        group.s.move(group.b2, _mean_square(mp, entries))
        group.k += 1
    for (group, tensor), gradient in rows:
        if gradient is None:
            continue
        tensor.s.move(group.b2, _mean_square(mp, gradient))
        tensor.t += 1
        s = (group if scope == "model" else tensor).s.corrected()
        for i, g in enumerate(gradient):
            tensor.m[i].move(group.b1, g)
            tensor.v[i].move(group.b2, g**2)
            v = tensor.v[i].corrected()
            # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
            d = _power(mp, v, a[group] / 2) * _power(mp, s, (1 - a[group]) / 2) + group.eps
            change = tensor.m[i].corrected() / d if d else 0  # without eps, and where nothing has moved: no update
            _move(mp, tensor, i, lr[group] * group.wd, lr[group] * change)


def _clipped(mp: Any, gradients: list[Any], entries: list[Any], limit: Any) -> tuple[list[Any], list[Any]]:
    """The gradients, and all their entries, as a vector that is at most as long as the limit."""
    length = mp.sqrt(mp.fsum(x**2 for x in entries))
    if length <= limit or mp.isinf(limit):  # the former not of a NaN
        return gradients, entries
    scaled = [None if g is None else [x * (limit / length) for x in g] for g in gradients]
    return scaled, [x for g in scaled if g is not None for x in g]


def _move(mp: Any, tensor: _Tensor, i: int, decay: Any, change: Any) -> None:
    """Takes from an entry, with what rounding took before, its share `decay` and the change."""
    if tensor.rest is None:
        tensor.theta[i] -= decay * tensor.theta[i] + change
        return
    start = tensor.theta[i] + tensor.rest[i]
    end = start * (1 - decay) - change  # infinity stays, also without decay
    tensor.theta[i] = _nearest(mp, end, tensor.dtype)
    tensor.rest[i] = _nearest(mp, end - tensor.theta[i], tensor.dtype) if mp.isfinite(tensor.theta[i]) else mp.mpf(0)


def _nearest(mp: Any, x: Any, dtype: str | None) -> Any:
    """The nearest number of a type of 16 bits; of two, the one whose numerator is even."""
    if not mp.isfinite(x) or x == 0:
        return x
    digits, smallest, largest, _ = FORMATS[str(dtype)]
    mantissa, exponent = x.man_exp
    unit = Fraction(2) ** max(int(mantissa).bit_length() + int(exponent) - digits, smallest)
    rounded = round(_fraction(x) / unit) * unit
    if abs(rounded) > largest:
        return mp.inf if x > 0 else -mp.inf
    return mp.mpf(rounded.numerator) / rounded.denominator


def _value(bits: int, dtype: str) -> float:
    data = bits.to_bytes(2, "little")
    value: float = struct.unpack("<e", data)[0] if dtype == "float16" else struct.unpack("<f", b"\0\0" + data)[0]
    return value


def _bits(x: Any, dtype: str) -> int:
    if x != x:
        return {"float16": 0x7E00, "bfloat16": 0x7FC0}[dtype]
    data = struct.pack("<" + FORMATS[dtype][3], float(x))
    return int.from_bytes(data[-2:], "little")


def _mean_square(mp: Any, entries: list[Any]) -> Any:
    return mp.fsum(x**2 for x in entries) / max(len(entries), 1)


def _power(mp: Any, x: Any, y: Any) -> Any:
    """x**y for x, y >= 0, with 0**0 = 1."""
    if y == 0:
        return mp.mpf(1)
    return mp.exp(y * mp.log(x)) if x else mp.mpf(0)


def _adaptivity(mp: Any, adaptivity: float | Data, count: int) -> Any:
    if not isinstance(adaptivity, dict):
        return mp.mpf(adaptivity)
    number = {name: mp.mpf(value) for name, value in adaptivity.items() if name != "schedule"}
    if adaptivity["schedule"] == "constant":
        return number["value"]
    if adaptivity["schedule"] == "exponential":
        progress = 1 - mp.exp(-mp.log(2) * count / number["half_life"])
    else:
        progress = min(count / number["steps"], mp.mpf(1))
        if adaptivity["schedule"] == "cosine":
            progress = mp.sin(mp.pi / 2 * progress) ** 2  # half of 1 - cos(pi*progress)
    return number["start"] + (number["end"] - number["start"]) * progress


def _record(group: _Group, scope: str) -> Data:
    averages = [group.s] if scope == "model" else [tensor.s for tensor in group.tensors]
    rests = [tensor.rest and [_bits(x, str(tensor.dtype)) for x in tensor.rest] for tensor in group.tensors]
    return {
        "params": [
            [_bits(x, tensor.dtype) if tensor.dtype else _double(x) for x in tensor.theta] for tensor in group.tensors
        ],
        **({"compensation": rests} if any(rest is not None for rest in rests) else {}),
        "exp_avg": [[_double(x.value) for x in tensor.m] for tensor in group.tensors],
        "exp_avg_sq": [[_double(x.value) for x in tensor.v] for tensor in group.tensors],
        "step": [tensor.t for tensor in group.tensors],
        "global_exp_avg_sq": [_double(x.value) for x in averages],
        "global_step": group.k,
    }


def _double(x: Any) -> float:
    """The double nearest to x: the quotient of two integers is correctly rounded, whatever mpmath's own rounding."""
    if x != x or abs(x) == math.inf:  # without a mantissa
        return float(x)
    exact = _fraction(x)
    return exact.numerator / exact.denominator


def _fraction(x: Any) -> Fraction:
    mantissa, exponent = x.man_exp
    mantissa = -abs(int(mantissa)) if x < 0 else int(mantissa)  # versions of mpmath differ in whose the sign is
    return Fraction(mantissa) * Fraction(2) ** exponent


def _mpmath() -> Any:
    try:
        import mpmath  # type: ignore[import-untyped]  # here: only whoever makes or checks vectors needs it
    except ImportError:
        raise ImportError(
            "making or checking golden vectors needs mpmath, which is not installed: pip install 'ada2ms[dev]'",
            name="mpmath",
        ) from None
    return mpmath.mp
