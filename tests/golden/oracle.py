"""The rule in arithmetic of 50 digits: what the golden vectors are made with.

Written from the equations, one entry at a time, and independently of `ada2ms.core.spec`, which it judges: bias
corrections are not powers of beta but the same moving average taken of ones, roots are exponentials of logarithms,
decay is a part of the step, and plain lists stand for tensors. Needs mpmath (the extra `dev`).
"""

from typing import Any

Data = dict[str, Any]


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
    def __init__(self, mp: Any, values: list[float]) -> None:
        self.theta = [mp.mpf(x) for x in values]
        self.m = [_Average(mp) for _ in values]
        self.v = [_Average(mp) for _ in values]
        self.s = _Average(mp)  # used with scope "tensor"
        self.t = 0


class _Group:
    def __init__(self, mp: Any, data: Data) -> None:
        self.tensors = [_Tensor(mp, p["values"]) for p in data["params"]]
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
    groups = [_Group(mp, data) for data in case["groups"]]
    tensors = [(group, tensor) for group in groups for tensor in group.tensors]
    skipped, records = 0, []
    with mp.workdps(50):
        for number, row in enumerate(case["gradients"], start=1):
            gradients = [None if g is None else [mp.mpf(x) for x in g] for g in row]
            entries = [x for g in gradients if g is not None for x in g]
            if case["nonfinite"] == "skip" and not all(mp.isfinite(x) for x in entries):
                skipped += 1
            elif any(g is not None for g in gradients):
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
            tensor.theta[i] -= lr[group] * (group.wd * tensor.theta[i] + change)


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
    return {
        "params": [[_double(x) for x in tensor.theta] for tensor in group.tensors],
        "exp_avg": [[_double(x.value) for x in tensor.m] for tensor in group.tensors],
        "exp_avg_sq": [[_double(x.value) for x in tensor.v] for tensor in group.tensors],
        "step": [tensor.t for tensor in group.tensors],
        "global_exp_avg_sq": [_double(x.value) for x in averages],
        "global_step": group.k,
    }


def _double(x: Any) -> float:
    """The double nearest to x: the quotient of two integers is correctly rounded, whatever mpmath's own rounding."""
    if x != x:  # NaN, which has no mantissa
        return float("nan")
    mantissa, exponent = x.man_exp
    mantissa = -abs(int(mantissa)) if x < 0 else int(mantissa)  # versions of mpmath differ in whose the sign is
    return float(mantissa * 2**exponent) if exponent >= 0 else mantissa / 2**-exponent


def _mpmath() -> Any:
    try:
        import mpmath  # type: ignore[import-untyped]  # here: only whoever makes or checks vectors needs it
    except ImportError:
        raise ImportError(
            "making or checking golden vectors needs mpmath, which is not installed: pip install 'ada2ms[dev]'",
            name="mpmath",
        ) from None
    return mpmath.mp
