"""Which parameters share which numbers, after whatever was done to groups and state; see `ada2ms.torch.shared`.

A group goes on with the s and k that it had in the last step, whatever parameters it has now; if its b2 is changed too,
as v does. Only where that is unknown, after a load or in a group made of others' parameters, what lies with the
parameters is asked: the pair of the most steps. Groups of one b2 share a pair, unless they have different histories. A
group that has no pair, or one that is behind the model's steps, takes that of a group with its b2; where there is none,
the model's s_hat and k.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ada2ms.torch.coefficients import bias_correction
from ada2ms.torch.numbers import as_tensor, compute_dtype, count, count_dtype, number
from ada2ms.torch.reduce import mean, numel
from ada2ms.torch.shared import (
    SHARED,
    SKIPPED,
    Groups,
    K,
    Pair,
    S,
    State,
    Tied,
    check_alike,
    fit_compensation,
    home,
    make_moments,
    signature,
)

_ROUNDING = 2.0**-7  # of a bfloat16: whether s may be mean(v), in a state dict that was cast
_AVERAGED = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def tie(groups: Groups, state: Any, before: Tied | None, *, moves: bool) -> Tied:
    """Ties what parameters share, and completes their state.

    Args:
        groups: the optimizer's.
        state: the optimizer's; is changed.
        before: the ties of this state as they were last; None for a state that was loaded, or copied.
        moves: whether a step follows: parameters with a gradient get their state, and so does one parameter of every
            pair that would have none, since k and s move in every step of the model.

    Raises:
        ValueError: groups have different scopes, or one parameter has two s; nothing has changed.
    """
    return _Tying(groups, state, before).run(moves)


class _Tying:
    def __init__(self, groups: Groups, state: Any, before: Tied | None) -> None:
        self.groups, self.state, self.before = groups, state, before
        check_alike(groups)
        self.scope = groups[0]["scope"] if groups else "model"
        self.model = self.scope == "model"
        # A tensor of float32 is alike the number that it was made from.
        self.b2s = [float(np.float32(number(group["betas"][1]))) for group in groups]
        self.classes: dict[Any, list[int]] = defaultdict(list)
        for i, b2 in enumerate(self.b2s):
            self.classes[b2 if self.model else None].append(i)
        self.check_parameters()
        self.params = list(dict.fromkeys(p for group in groups for p in group["params"]))
        double = any(p.dtype in (torch.float64, torch.complex128) for p in self.params)
        self.s_dtype = torch.float64 if double else torch.float32
        lost = (
            before is not None and before.held and self.params and not any(K in state.get(p, ()) for p in self.params)
        )
        self.last = None if before is None or before.scope != self.scope or lost else before
        self.known: dict[tuple[int, int], Any] = {}  # of the last step: what each pair's groups had in common,
        self.had: dict[int, Pair] = {}  # and the pair of each group
        if self.last is not None:
            self.known = {_identity(pair): b2 for pair, b2 in zip(self.last.pairs, self.last.b2s, strict=True)}
            of_groups = zip(self.last.groups, self.last.of_group, strict=True)
            self.had = {id(group): self.last.pairs[i] for group, i in of_groups}

    def check_parameters(self) -> None:
        """Raises where a parameter would have an s of two b2."""
        if len(self.classes) < 2:
            return
        found: dict[Tensor, int] = {}
        for i, group in enumerate(self.groups):
            for p in group["params"]:
                other = found.setdefault(p, i)
                if self.b2s[other] != self.b2s[i]:
                    raise ValueError(
                        f"Invalid params: a parameter of shape {tuple(p.shape)} is in groups {other} and {i}, whose "
                        f"betas[1] are {self.b2s[other]:.6g} and {self.b2s[i]:.6g} (must be one: a parameter has one s)"
                    )

    def run(self, moves: bool) -> Tied:
        lacking = self.complete(moves)
        self.convert_scope()
        pairs = [self.own(i) for i in range(len(self.groups))]
        self.drop_behind(pairs)
        self.join(pairs)
        self.part(pairs)
        self.start(pairs, lacking)
        if moves:
            self.keep(pairs)
        return self.settle(pairs, moves)

    def started(self, i: int) -> list[Tensor]:
        return [p for p in self.groups[i]["params"] if "exp_avg" in self.state.get(p, ())]

    def all_started(self) -> list[tuple[Tensor, State]]:
        return [(p, x) for p in self.params if "exp_avg" in (x := self.state.get(p, {}))]

    def complete(self, moves: bool) -> bool:
        """Makes the state that is not there yet, in the right types; whether any is of an optimizer without s."""
        lacking = False
        if any(p.grad is not None and p.grad.layout != torch.strided for p in self.params):
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
                    if state[key].dtype is not compute_dtype(p.dtype):
                        state[key] = state[key].to(compute_dtype(p.dtype))
                fit_compensation(p, state, group)
                if not (isinstance(state["step"], Tensor) and state["step"].itemsize >= 4):
                    state["step"] = count(state["step"], count_dtype(group["fused"]))
                for key in SHARED:
                    x = state.get(key)
                    if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
                        state[key] = count(x, torch.float64 if key == S else count_dtype())
        return lacking

    def convert_scope(self) -> None:
        """Gives a state of the other scope what it needs in this one."""
        if self.before is not None and self.before.scope == self.scope:
            return
        states = [(p, x) for p, x in self.all_started() if S in x and K in x]
        if not states or any(p.is_meta for p, _ in states):
            return
        scope = self.scope_of([x for _, x in states]) if self.before is None else self.before.scope
        if scope == "tensor" and self.model:
            self.from_tensors(states)
        elif scope == "model" and not self.model:
            for _, x in states:
                if not _is_mean(x):
                    x[S] = mean([x["exp_avg_sq"]])

    def scope_of(self, states: Sequence[State]) -> str:
        """The scope in which a state that was loaded came about.

        With scope "tensor" all share k, and s is the mean of each tensor's v. If copies of k are apart, the numbers are
        asked whether they fit one scope alone.
        """
        by_k: dict[int, list[State]] = defaultdict(list)
        for x in states:
            by_k[id(x[K])].append(x)
        together = [some for some in by_k.values() if len(some) > 1]
        if together:
            if all(x[S] is some[0][S] for some in together for x in some):
                return "model"
            return self.scope if all(map(_alike, together)) else "tensor"
        if len(states) > 1 and len({id(x.get(SKIPPED)) for x in states}) == 1 and SKIPPED in states[0]:
            return "model"  # nothing came apart, so that each pair is one parameter's
        of_b2: dict[float, list[State]] = defaultdict(list)
        for i, b2 in enumerate(self.b2s):
            of_b2[b2] += [x for p in self.started(i) if S in (x := self.state[p])]
        alike = all(map(_alike, of_b2.values()))
        if alike == self.model or alike == all(_is_mean(x) for x in states):
            return self.scope
        return "model" if alike else "tensor"

    def from_tensors(self, states: list[tuple[Tensor, State]]) -> None:
        """The model's s from those of its tensors: the mean of their s_hat, by their entries."""
        total, n = 0.0, 0
        exact = {p: self.b2(members) for members in self.classes.values() for i in members for p in self.started(i)}
        for p, x in states:
            if float(x["step"]) > 0:
                total += numel(p) * float(x[S]) / float(bias_correction(exact[p], float(x["step"]), torch.float64))
                n += numel(p)
        k = max(1.0, *(float(x[K]) for _, x in states))
        for members in self.classes.values():
            s = total / max(n, 1) * float(bias_correction(self.b2(members), k, torch.float64))
            tensor = torch.tensor(s, dtype=torch.float64, device=states[0][1][S].device)
            for p in (p for i in members for p in self.started(i)):
                self.state[p][S] = tensor

    def b2(self, members: Sequence[int]) -> float:
        return float(number(self.groups[members[0]]["betas"][1]))

    def own(self, i: int) -> Pair | None:
        """The pair that a group had; else, of those of its parameters, that of the most steps."""
        found: dict[tuple[int, int], Pair] = {}
        entries: dict[tuple[int, int], int] = defaultdict(int)
        for p in self.started(i):
            x = self.state[p]
            if K in x and (S in x or not self.model):
                pair = (x[S] if self.model else None, x[K])
                found.setdefault(_identity(pair), pair)
                entries[_identity(pair)] += p.numel()
        had = self.had.get(id(self.groups[i]))
        if had is not None and (not found or not self.known.keys().isdisjoint(found)):
            return had
        if len(found) < 2:
            return next(iter(found.values()), None)

        def rank(pair: Pair) -> tuple[Any, ...]:
            of_this_b2 = self.known.get(_identity(pair)) == self.b2s[i]
            return of_this_b2, _digits(pair), entries[_identity(pair)]

        most = max(found.values(), key=lambda pair: float(pair[1]))
        return max((pair for pair in found.values() if _near(pair[1], most[1])), key=rank)

    def drop_behind(self, pairs: list[Pair | None]) -> None:
        """Pairs of fewer steps than the model has had, as of a group that was away: they start anew."""
        some = {_identity(pair): pair for pair in pairs if pair is not None}
        if len(some) < 2 or some.keys() <= self.known.keys():  # all of which the last step counted
            return
        most = max((pair[1] for pair in some.values()), key=float)
        for i, pair in enumerate(pairs):
            if pair is not None and not _near(pair[1], most):
                pairs[i] = None

    def join(self, pairs: list[Pair | None]) -> None:
        """One pair for the groups with one b2: for those whose pairs are equal, and those that have none."""
        for members in self.classes.values():
            some = {_identity(pair): pair for i in members if (pair := pairs[i]) is not None}
            if not some:
                continue
            ranked = list(some.values())
            if not some.keys() <= self.known.keys():
                ranked.sort(key=_digits, reverse=True)
            distinct: list[Pair] = []
            ones: dict[tuple[int, int], Pair] = {}
            for pair in ranked:
                one = next((other for other in distinct if self.are_one(pair, other)), None)
                if one is None:
                    distinct.append(pair)
                ones[_identity(pair)] = one or pair
            for i in members:
                pair_of_i = pairs[i]
                pairs[i] = distinct[0] if pair_of_i is None else ones[_identity(pair_of_i)]

    def are_one(self, pair: Pair, other: Pair) -> bool:
        """Whether two pairs of groups with one b2 are the same one, apart or not; not if the last step had both."""
        both_known = _identity(pair) in self.known and _identity(other) in self.known
        return not both_known and _near(pair[1], other[1]) and _near(pair[0], other[0])

    def part(self, pairs: list[Pair | None]) -> None:
        """Copies where groups of several b2 have one pair, and where pairs have a number in common."""
        owner: dict[int, Any] = {}
        copies: dict[Any, Pair] = {}
        for b2, members in self.classes.items():
            for i in members:
                if (pair := pairs[i]) is None:
                    continue
                own = _identity(pair), b2
                if any(owner.setdefault(id(x), own) != own for x in pair if x is not None):
                    s, k = pair
                    pairs[i] = copies.setdefault(own, (None if s is None else s.clone(), k.clone()))

    def start(self, pairs: list[Pair | None], lacking: bool) -> None:
        """Pairs for those that have none: the model's s_hat and k; of a state without s, mean(v); or zeros."""
        states = [x for _, x in self.all_started()]
        everyone = ((pairs[i], members) for members in self.classes.values() for i in members)
        models = next(((pair, members) for pair, members in everyone if pair is not None), None)
        for members in self.classes.values():
            if pairs[members[0]] is not None:
                continue
            if models is not None:
                (s, k), others = models
                if s is not None:
                    t, b2s = k.double(), (self.b2(members), self.b2(others))
                    new, old = (as_tensor(bias_correction(b2, t, torch.float64)) for b2 in b2s)
                    s = s * (new / old).to(s.device)
                pair: Pair = s, k.clone()
            elif lacking:
                pair = self.warm(states)
            else:
                zero = torch.zeros((), dtype=count_dtype(), device="cpu")
                pair = zero.clone() if self.model else None, zero
            for i in members:
                pairs[i] = pair
        if not self.model:
            for x in states:
                if S not in x:
                    x[S] = mean([x["exp_avg_sq"]])

    def warm(self, states: Sequence[State]) -> Pair:
        """The pair of a state that has v but no s, as AdamW's: of as many steps as any tensor has had."""
        steps = [x["step"].to("cpu", torch.float64) for x in states]
        s = mean([x["exp_avg_sq"] for x in states]) if self.model else None
        return s, torch.stack(steps).max().to(count_dtype())

    def keep(self, pairs: Sequence[Pair | None]) -> None:
        """State for one parameter of each pair that has none, if there is one that could be trained."""
        groups_of: dict[int, list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            groups_of[id(pair)].append(i)
        for members in groups_of.values():
            if any(self.started(i) for i in members):
                continue
            some = [(p, self.groups[i]) for i in members for p in self.groups[i]["params"] if _can_be_averaged(p)]
            if some:
                p, group = min(some, key=lambda found: (not found[0].requires_grad, found[0].numel()))
                make_moments(p, self.state.setdefault(p, {}), group)

    def settle(self, pairs: Sequence[Pair | None], moves: bool) -> Tied:
        """Gives every number its type and its device, and every parameter the numbers of its group."""
        skipped = self.skipped()
        found: dict[tuple[int, int], int] = {}
        tied: list[Pair] = []
        b2s: list[Any] = []
        of_group = []
        for i, (group, pair) in enumerate(zip(self.groups, pairs, strict=True)):
            assert pair is not None
            s, k = pair
            if _identity(pair) not in found:
                found[_identity(pair)] = len(tied)
                s = None if s is None else self.fresh(s, self.s_dtype, home(group))
                tied.append((s, self.count(k, home(group, of_counts=True))))
                b2s.append(self.b2s[i] if self.model else None)
            of_group.append(found[_identity(pair)])
            s, k = tied[of_group[i]]
            for p in self.started(i):
                x = self.state[p]
                x[S] = self.fresh(x[S], self.s_dtype, home(group, p)) if s is None else s
                x[K], x[SKIPPED] = k, skipped
        held = any(self.started(i) for i in range(len(self.groups)))
        moves |= self.before is not None and self.before.moved
        signatures = [signature(group) for group in self.groups]
        return Tied(self.scope, list(self.groups), tied, b2s, of_group, skipped, held, moves, signatures)

    def skipped(self) -> Tensor:
        distinct = {id(x[SKIPPED]): x[SKIPPED] for _, x in self.all_started() if SKIPPED in x}
        values = list(distinct.values()) or [torch.zeros((), dtype=count_dtype(), device="cpu")]
        if not distinct and self.last is not None:
            values = [self.last.skipped]
        most = values[0] if len(values) == 1 else max(values, key=float)
        return self.count(most, home(self.groups[0], of_counts=True) if self.groups else torch.device("cpu"))

    def count(self, x: Tensor, device: torch.device) -> Tensor:
        return count(x, count_dtype(), device) if x.itemsize < 4 else self.fresh(x, x.dtype, device)

    def fresh(self, x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As it should be, itself if it is so; a copy if it was loaded, and may belong to someone else, too."""
        return x.to(device, dtype) if self.before is not None else x.detach().to(device, dtype, copy=True)


def _identity(pair: Pair) -> tuple[int, int]:
    return id(pair[0]), id(pair[1])


def _digits(pair: Pair) -> tuple[int, bool, int]:
    s, k = pair
    return min(k.itemsize, 4), s is not None and bool(s != 0), 0 if s is None else s.itemsize


def _near(x: Any, y: Any) -> bool:
    """Whether two numbers are one, up to a rounding of the one with fewer digits."""
    if x is y:
        return True
    rounding = max((torch.finfo(z.dtype).eps for z in (x, y) if isinstance(z, Tensor) and z.itemsize < 4), default=0.0)
    a, b = float(x), float(y)
    return a == b or abs(a - b) <= rounding * max(abs(a), abs(b)) or (a != a and b != b)


def _alike(states: Sequence[State]) -> bool:
    return all(_near(x[S], states[0][S]) for x in states)


def _is_mean(state: State) -> bool:
    x, y = float(state[S]), float(mean([state["exp_avg_sq"]]))
    return abs(x - y) <= _ROUNDING * max(abs(x), abs(y))


def _can_be_averaged(p: Tensor) -> bool:
    """Whether moments can be made of it, which are no parameter's of a quantised model, or of shapes without values."""
    plain = type(p) in (Tensor, nn.Parameter) or hasattr(p, "device_mesh")
    return plain and not p.is_meta and p.dtype in _AVERAGED
