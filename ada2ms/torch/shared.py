"""The numbers that parameters share: the global second moment s, its count k, and the number of skipped steps.

They lie in `optimizer.state[p]`, beside each parameter's own state: a parameter's copy is the same tensor as that of
every other one that shares it, so that a step updates it once. `tie` makes it so. s and k are shared by the parameters
of the groups with one b2, k alone with scope "tensor"; skipped steps are the whole model's.

Groups that come to have the same b2 after different histories keep their own s, and groups whose b2 is changed go on
from the s that they have, as v does. A group that starts later takes the s of the groups with its b2; where there are
none, the model's s_hat and k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from ada2ms.core.hyperparameters import check
from ada2ms.torch.coefficients import bias_correction
from ada2ms.torch.numbers import compute_dtype, count, count_dtype, counts_on_device, number
from ada2ms.torch.reduce import mean, numel

S, K, SKIPPED = SHARED = ("global_exp_avg_sq", "global_step", "skipped")
State = dict[str, Any]
Groups = Sequence[dict[str, Any]]


_ROUNDING = 2.0**-7  # of a bfloat16: whether two numbers may be one, in a state dict that was cast


@dataclass(frozen=True)
class Tied:
    """What the parameters of each group share.

    Attributes:
        scope: the optimizer's.
        pairs: the distinct (s, k); s is None with scope "tensor", where every parameter has its own.
        of_group: for each group, the index of its pair.
        skipped: the number of skipped steps.
        signatures: of each group, as `signature` tells it; where one has changed, ties may have, too.
    """

    scope: str
    pairs: list[tuple[Tensor | None, Tensor]]
    of_group: list[int]
    skipped: Tensor
    signatures: list[tuple[Any, ...]]


def signature(group: dict[str, Any]) -> tuple[Any, ...]:
    """What of a group decides with whom it shares its numbers, and where these lie."""
    params = group["params"]
    return (
        group["betas"][1],
        group["scope"],
        group["nonfinite"],
        group["capturable"],
        group["fused"],
        params[0].device if params else None,
    )


def make_moments(p: Tensor, state: State, group: dict[str, Any]) -> None:
    """The state of a parameter that has had no update."""
    if group["fused"] and p.is_meta:
        _device_dtype_check_for_fused(p)  # raises
    device = p.device if counts_on_device(group, p.device) else "cpu"
    shared = {key: state.pop(key) for key in SHARED if key in state}
    state["step"] = torch.zeros((), dtype=count_dtype(group["fused"]), device=device)
    state["exp_avg"] = torch.zeros_like(p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format)
    state.update(shared)


def tie(groups: Groups, state: Any, before: Tied | None, *, moves: bool) -> Tied:
    """Ties what parameters share, and completes their state.

    Args:
        groups: the optimizer's.
        state: the optimizer's; is changed.
        before: the ties of this state as they were last; None for a state that was loaded, or copied.
        moves: whether a step follows: parameters with a gradient get their state, and so does one parameter of every
            pair that would have none, since k and s move in every step of the model.

    Raises:
        ValueError: groups have different scopes; nothing has changed.
    """
    return _Tying(groups, state, before).run(moves)


@dataclass
class _Pair:
    s: Tensor | None
    k: Tensor

    def digits(self) -> tuple[int, bool, int]:
        return (
            min(self.k.itemsize, 4),
            self.s is not None and bool(self.s != 0),
            0 if self.s is None else self.s.itemsize,
        )

    def equals(self, other: "_Pair") -> bool:
        return _near(self.k, other.k) and _near(self.s, other.s)


def _furthest(pairs: Sequence[_Pair]) -> _Pair | None:
    """Of several pairs that should be one, that of the most steps; if they are equal, that with the most digits."""
    best = pairs[0] if pairs else None
    for pair in pairs[1:]:
        assert best is not None
        further = pair.digits() > best.digits() if _near(pair.k, best.k) else float(pair.k) > float(best.k)
        best = pair if further else best
    return best


def _near(x: Any, y: Any) -> bool:
    """Whether two numbers are one, up to a rounding of the one with fewer digits."""
    if x is y:
        return True
    rounding = max((torch.finfo(z.dtype).eps for z in (x, y) if isinstance(z, Tensor) and z.itemsize < 4), default=0.0)
    a, b = float(x), float(y)
    return a == b or abs(a - b) <= rounding * max(abs(a), abs(b)) or (a != a and b != b)


class _Tying:
    def __init__(self, groups: Groups, state: Any, before: Tied | None) -> None:
        self.groups, self.state, self.before = groups, state, before
        for name in ("scope", "nonfinite"):
            for i, group in enumerate(groups):
                check(name, group[name])
                if group[name] != groups[0][name]:
                    raise ValueError(
                        f"Invalid {name}: {group[name]!r} of group {i} (must be that of group 0, {groups[0][name]!r}: "
                        "it is the optimizer's)"
                    )
        self.scope = groups[0]["scope"] if groups else "model"
        self.model = self.scope == "model"
        params = [p for group in groups for p in group["params"]]
        double = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        self.s_dtype = torch.float64 if double else torch.float32
        # groups by their b2: a float32 tensor is alike the number that it was made from
        self.classes: list[tuple[Any, list[int]]] = []
        for i, group in enumerate(groups):
            b2 = number(group["betas"][1])
            tensor = isinstance(group["betas"][1], Tensor)
            for other, members in self.classes:
                both = tensor or isinstance(groups[members[0]]["betas"][1], Tensor)
                if other == b2 or (both and np.float32(other) == np.float32(b2)):
                    members.append(i)
                    break
            else:
                self.classes.append((b2, [i]))

    def run(self, moves: bool) -> Tied:
        lacking = self.complete(moves)
        if self.before is None or self.before.scope != self.scope:
            self.convert_scope()
        pairs = self.own()
        self.join(pairs)
        self.part(pairs)
        self.start(pairs, lacking, moves)
        return self.settle(pairs)

    def started(self, i: int) -> list[Tensor]:
        return [p for p in self.groups[i]["params"] if "exp_avg" in self.state.get(p, ())]

    def all_started(self) -> list[tuple[Tensor, State]]:
        return [(p, self.state[p]) for i in range(len(self.groups)) for p in self.started(i)]

    def complete(self, moves: bool) -> bool:
        """Makes the state that is not there yet, in the right types; whether any is of an optimizer without s."""
        lacking = False
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError("Ada2MS does not support sparse gradients")
        for group in self.groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "exp_avg" not in state:
                    if K in state or (moves and p.grad is not None):
                        make_moments(p, self.state.setdefault(p, {}), group)
                    continue
                lacking |= K not in state
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].to(compute_dtype(p.dtype))
                if not (isinstance(state["step"], Tensor) and state["step"].itemsize >= 4):
                    state["step"] = count(state["step"], count_dtype(group["fused"]))
                for key in SHARED:
                    if key in state and not isinstance(state[key], Tensor):
                        dtype = torch.float64 if key == S else count_dtype()
                        state[key] = torch.tensor(float(state[key]), dtype=dtype)
        return lacking

    def convert_scope(self) -> None:
        """Gives a state of the other scope what it needs in this one.

        With scope "tensor" s is the mean of its tensor's v, so that it tells of itself.
        """
        states = [(p, x) for p, x in self.all_started() if S in x]
        if not states or any(p.is_meta for p, _ in states):
            return
        if self.before is not None:
            other = True
        else:
            together = [
                [self.state[p][S] for i in members for p in self.started(i) if S in self.state[p]]
                for _, members in self.classes
            ]
            same = all(x is xs[0] or _near(x, xs[0]) for xs in together for x in xs)
            many = any(len(xs) > 1 for xs in together)
            suspect = not same if self.model else same and many
            other = suspect and self.model == all(_is_mean(x) for _, x in states)
        if other and self.model:
            self.from_tensors(states)
        elif other:
            for _, x in states:
                x[S] = mean([x["exp_avg_sq"]])

    def from_tensors(self, states: list[tuple[Tensor, State]]) -> None:
        """The model's s from those of its tensors: the mean of their s_hat."""
        b2_of = {p: b2 for b2, members in self.classes for i in members for p in self.started(i)}
        total, n = 0.0, 0
        for p, x in states:
            if float(x["step"]) > 0:
                total += numel(p) * float(x[S]) / float(bias_correction(b2_of[p], float(x["step"]), torch.float64))
                n += numel(p)
        ks = {p: float(x[K] if K in x else x["step"]) for p, x in states}
        for b2, members in self.classes:
            k = max([ks[p] for i in members for p in self.started(i) if p in ks] or ks.values())
            s = total / max(n, 1) * float(bias_correction(b2, max(k, 1.0), torch.float64))
            tensor = torch.tensor(s, dtype=torch.float64, device=states[0][1][S].device)
            for i in members:
                for p in self.started(i):
                    self.state[p][S] = tensor

    def own(self) -> list[_Pair | None]:
        """The pair of each group's parameters; of several, which should be one, that which is ahead."""
        found: list[_Pair | None] = []
        for i in range(len(self.groups)):
            distinct: dict[tuple[int, int], _Pair] = {}
            for p in self.started(i):
                x = self.state[p]
                if K in x and (S in x or not self.model):
                    pair = _Pair(x[S] if self.model else None, x[K])
                    distinct.setdefault((id(pair.s), id(pair.k)), pair)
            found.append(_furthest(list(distinct.values())))
        return found

    def join(self, pairs: list[_Pair | None]) -> None:
        """One pair for the groups with one b2: for those whose pairs are equal, those that are behind, and new ones."""
        for _, members in self.classes:
            some = [pair for i in members if (pair := pairs[i]) is not None]
            ahead = _furthest(some)
            if ahead is None:
                continue
            for i in members:
                pair = pairs[i]
                if pair is None or not _near(pair.k, ahead.k) or pair.equals(ahead):
                    pairs[i] = ahead

    def part(self, pairs: list[_Pair | None]) -> None:
        """Where b2 was changed for some groups of a pair, these go on with a copy of it."""
        owner: dict[int, Any] = {}
        copies: dict[tuple[int, Any], _Pair] = {}
        for b2, members in self.classes:
            for i in members:
                pair = pairs[i]
                if pair is not None and owner.setdefault(id(pair.k), b2) != b2:
                    copy = _Pair(None if pair.s is None else pair.s.clone(), pair.k.clone())
                    pairs[i] = copies.setdefault((id(pair.k), b2), copy)

    def start(self, pairs: list[_Pair | None], lacking: bool, moves: bool) -> None:
        """Pairs for those that have none: the model's s_hat and k; of a state without s, mean(v); or zeros."""
        first = next(((b2, pairs[i]) for b2, members in self.classes for i in members if pairs[i] is not None), None)
        states = [x for _, x in self.all_started()]
        for b2, members in self.classes:
            if pairs[members[0]] is not None:
                continue
            pair = self.warm(states) if lacking else self.nothing(members[0])
            if first is not None and first[1] is not None:
                pair = _Pair(first[1].s, first[1].k.clone())
                if pair.s is not None:
                    k = pair.k.double()
                    ratio: Any = bias_correction(b2, k, torch.float64) / bias_correction(first[0], k, torch.float64)
                    pair.s = pair.s * ratio.to(pair.s.device)
            for i in members:
                pairs[i] = pair
        if not self.model:
            for x in states:
                if S not in x:
                    x[S] = mean([x["exp_avg_sq"]]) if lacking else torch.zeros(())
        if moves:
            for _, members in self.classes:
                params = [(p, self.groups[i]) for i in members for p in self.groups[i]["params"]]
                if params and not any(self.started(i) for i in members):
                    p, group = min(params, key=lambda found: found[0].numel())
                    make_moments(p, self.state.setdefault(p, {}), group)

    def nothing(self, i: int) -> _Pair:
        """The pair of what has had no step; where no parameter keeps it (a shard of nothing), that of the last step."""
        if self.before is not None and i < len(self.before.of_group) and not self.groups[i]["params"]:
            return _Pair(*self.before.pairs[self.before.of_group[i]])
        return _Pair(torch.zeros(()) if self.model else None, torch.zeros((), dtype=count_dtype()))

    def warm(self, states: list[State]) -> _Pair:
        """The pair of a state that has v but no s, as AdamW's: of as many steps as any tensor has had."""
        steps = [x["step"].to("cpu", torch.float64) for x in states]
        return _Pair(
            mean([x["exp_avg_sq"] for x in states]) if self.model else None, torch.stack(steps).max().to(count_dtype())
        )

    def settle(self, pairs: list[_Pair | None]) -> Tied:
        """Gives every number its type and its device, and every parameter the numbers of its group."""
        skipped = self.skipped()
        found: dict[int, int] = {}
        tied: list[tuple[Tensor | None, Tensor]] = []
        of_group = []
        for i, (group, pair) in enumerate(zip(self.groups, pairs, strict=True)):
            assert pair is not None
            if id(pair) not in found:
                found[id(pair)] = len(tied)
                device = _device(group)
                home = device if counts_on_device(group, device) else torch.device("cpu")
                s = self.fresh(pair.s, self.s_dtype, device) if self.model and pair.s is not None else None
                tied.append((s, self.count(pair.k, home)))
            of_group.append(found[id(pair)])
            s, k = tied[of_group[i]]
            for p in self.started(i):
                x = self.state[p]
                x[S] = s if s is not None else self.fresh(x.get(S, torch.zeros(())), self.s_dtype, _device(group, p))
                x[K], x[SKIPPED] = k, skipped
        return Tied(self.scope, tied, of_group, skipped, [signature(group) for group in self.groups])

    def skipped(self) -> Tensor:
        distinct = {id(x[SKIPPED]): x[SKIPPED] for _, x in self.all_started() if SKIPPED in x}
        values = list(distinct.values()) or [torch.zeros((), dtype=count_dtype())]
        most = values[0] if len(values) == 1 else max(values, key=float)
        home = torch.device("cpu")
        if self.groups and counts_on_device(self.groups[0], _device(self.groups[0])):
            home = _device(self.groups[0])
        return self.count(most, home)

    def count(self, x: Tensor, device: torch.device) -> Tensor:
        if x.itemsize < 4:
            return count(x, count_dtype(), device)
        return self.fresh(x, x.dtype if x.is_floating_point() else count_dtype(), device)

    def fresh(self, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As it should be; a copy if it is of a state that was loaded, which may belong to someone else, too."""
        return x.detach().to(device, dtype, copy=self.before is None)


def _is_mean(state: State) -> bool:
    x, y = float(state[S]), float(mean([state["exp_avg_sq"]]))
    return abs(x - y) <= _ROUNDING * max(abs(x), abs(y))


def _device(group: dict[str, Any], p: Tensor | None = None) -> torch.device:
    """Where a group's numbers lie: beside its parameters, or on the CPU as long as these are only shapes."""
    if p is None:
        p = group["params"][0] if group["params"] else None
    return torch.device("cpu") if p is None or p.is_meta else p.device
