"""One experiment after the other, until what an optimizer computes is known, or what of it is not."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ada2ms.conformance.identification import experiments
from ada2ms.conformance.identification.experiments import Experiment
from ada2ms.conformance.identification.facts import facts
from ada2ms.conformance.identification.findings import describe, nearest
from ada2ms.conformance.identification.fit import Fit, Mode, fit, free_hyper, refine
from ada2ms.conformance.identification.measure import KINDS, Measured, measure
from ada2ms.conformance.identification.precision import describe_precision
from ada2ms.conformance.identification.report import Finding, Identification, spans
from ada2ms.conformance.identification.run import Run, observe
from ada2ms.conformance.identification.search import neighbours, rounded, search
from ada2ms.conformance.identification.subject import CannotRunError, Subject
from ada2ms.core.dialects import OWN, Dialect, Hyper, base, said, values_of

EXACT: Final = {"float64": 1e-9, "float32": 1e-4}  # what arithmetic may leave of an update
COARSE: Final = EXACT["float32"]  # for one that computes a part of it in float32, with float64 parameters
_NEAR: Final = 0.02  # what is left, on average, of updates that a dialect describes
_PROBE: Final = 0.1  # the decay that is given to an optimizer that has none


def identify(make: Callable[..., Any], *, name: str = "", **hyper: Any) -> Identification:
    """Says what an optimizer computes, from its updates.

    Args:
        make: `make(params, **hyper)` returns an `Optimizer` of `ada2ms.conformance`; `params` are NumPy arrays, which
            it may keep and change. Of hyperparameters by the rule's names (lr, b1, weight_decay, ...) it gets those
            given here, and where it takes them, others to try.
        name: what to call it; by default the name of `make`.
        **hyper: hyperparameters that `make` gets.

    Raises:
        CannotRunError: it cannot be made or stepped; the message says why.
    """
    return identify_subject(subject_of(make, name, **hyper))


def subject_of(make: Callable[..., Any], name: str = "", **hyper: Any) -> Subject:
    """A port of Python as `identify` steps it."""
    try:
        signature = dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):  # built-in functions need not tell their arguments
        signature = {}
    takes_all = not signature or any(p.kind is p.VAR_KEYWORD for p in signature.values())
    defaults = {key: p.default for key, p in signature.items()}
    told = {key: float(value) for key, value in {**defaults, **hyper}.items() if _is_number(value)}

    def made(params: list[Any], dtype: str, **other: float) -> Any:
        return make([np.asarray(p, dtype) for p in params], **{**hyper, **other})

    settable = {"weight_decay"} if "weight_decay" in signature or (takes_all and "weight_decay" in hyper) else set()
    called = name or getattr(make, "__qualname__", str(make))
    return Subject(called, made, told, frozenset(settable), ("float64", "float32"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class _Case:
    """What is known so far.

    Attributes:
        subject: the optimizer.
        run: of the main experiment.
        mode: whether the learning rate moves.
        found: what explains it.
        experiment: the main one.
    """

    subject: Subject
    run: Run
    mode: Mode
    found: Measured
    experiment: Experiment
    notes: list[Finding] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """What arithmetic may leave of an update in further experiments."""
        return max(self.run.relative, COARSE) if self.subject.mixed else self.run.relative


def identify_subject(subject: Subject) -> Identification:
    """Says what an optimizer computes, from its updates.

    Raises:
        CannotRunError: it cannot be made or stepped in any dtype; the message says why.
    """
    run, experiment, notes = _first_run(subject)
    found = search(run, base(subject.name, subject.told), subject.told)
    if not found.fits and found.nearly and subject.mixed:
        run = run.allowing(max(run.relative, COARSE))
    found, mode = _of_all_tensors(found, run)
    found = _simplest(_as_told(found, run, mode, subject.told), run, mode, subject.told)
    case = _Case(subject, run, mode, measure(found, run, subject.told), experiment, notes)
    case.unexplained += _left(case.found.fit, "")
    if not case.unexplained:
        _validate(case)
    if not case.unexplained:
        _vary_decay(case)
        _vary_rate(case)
        _vary_dtype(case)
    deviation = _deviation(case)
    result = Identification(subject.name, case.found.dialect, case.found.hyper, run.dtype, deviation)
    if case.found.fit.rough < _NEAR:
        result.findings = describe(case.found, run, mode, subject.told) + case.notes
    result.unexplained = case.unexplained
    if case.unexplained:
        result.facts = facts(subject, run.dtype)
    return result


def _first_run(subject: Subject) -> tuple[Run, Experiment, list[Finding]]:
    """The main experiment in the widest dtype in which it runs, with gradients missing if they may be."""
    reasons: list[CannotRunError] = []
    experiment = experiments.main()
    whole = experiments.without_missing(experiment)
    matrices = experiments.of_matrices(experiment)
    for dtype in [dtype for dtype in subject.dtypes if dtype in EXACT]:
        for given in (experiment, matrices, whole):
            try:
                run = observe(subject, given, dtype, EXACT[dtype])
            except CannotRunError as reason:
                reasons.append(reason)
                continue
            notes = []
            if given is whole:
                words = f"cannot be given: {str(reasons[-1]).removeprefix(subject.name + ' raised ')}"
                notes.append(Finding("missing gradient", words))
            if given is matrices:
                notes.append(Finding("parameters", f"matrices alone: {reasons[-1]}"))
            if dtype != subject.dtypes[0]:
                notes.append(Finding(subject.dtypes[0], f"cannot run: {reasons[0]}"))
            if not any(np.any(u) for tensor in run.updates for u in tensor):
                raise CannotRunError(f"{subject.name} moves nothing, so that nothing shows (is its learning rate 0?)")
            return run, given, notes
    raise reasons[0]


def _of_all_tensors(found: Fit, run: Run) -> tuple[Fit, Mode]:
    """What explains all tensors, given what explains the first; and whether the learning rate moves."""
    if np.median(found.c) < 0:  # a negative learning rate, downhill, is a positive one, uphill
        other: Mode = "free" if np.ptp(found.c) > 0 or np.ptp(found.d) > 0 else "constant"
        uphill = fit(replace(found.dialect, sign=-found.dialect.sign), found.hyper, run, other, (0,))
        found = uphill if uphill.digits <= found.digits else found
    mode: Mode = "free" if np.ptp(found.c) > 0 or np.ptp(found.d) > 0 else "constant"
    whole = fit(found.dialect, found.hyper, run, mode)
    if whole.fits:
        return whole, mode
    tried = [whole]
    near = [(found.dialect, found.hyper), *neighbours(found.dialect, found.hyper)]
    for missing in values_of(found.dialect.family, "missing"):
        for dialect, hyper in near:
            tried.append(fit(replace(dialect, missing=missing), hyper, run, mode))
            if tried[-1].fits:
                return tried[-1], mode
    return min(tried, key=lambda f: f.digits), mode


def _as_told(found: Fit, run: Run, mode: Mode, told: Hyper) -> Fit:
    """With the hyperparameters that were told, where these explain no less."""
    fixed: list[str] = []
    for name, value in told.items():
        if name not in free_hyper(found.dialect, found.hyper) or found.hyper.get(name) == value:
            continue
        fixed.append(name)
        other = fit(found.dialect, {**found.hyper, name: value}, run, mode)
        if other.digits > found.digits:  # gradients that are always clipped show a norm in epsilons alone
            other = rounded(refine(other, run, mode, (), fixed), run, mode, ())
        found = other if other.digits <= found.digits else found
    return found


def _at_told_rate(found: Fit, told: Hyper) -> bool:
    """Whether the learning rate is the told one, if one was told."""
    return "lr" not in told or bool(np.all(np.abs(found.c - 1) < 1e-5))


def _simplest(found: Fit, run: Run, mode: Mode, told: Hyper) -> Fit:
    """With the learning rate that was told, and features as most optimizers have them, where that explains no less."""
    if found.fits and mode == "constant" and not _at_told_rate(found, told):
        for dialect, hyper in neighbours(found.dialect, found.hyper):
            other = fit(dialect, hyper, run, mode)
            if other.fits and _at_told_rate(other, told):
                found = other
                break
    for name in OWN[found.dialect.family]:
        if name in ("decay", "sign"):
            continue
        for value in values_of(found.dialect.family, name):
            if value == getattr(found.dialect, name):
                break
            other = fit(replace(found.dialect, **{name: value}), found.hyper, run, mode)
            if other.digits <= found.digits and (_at_told_rate(other, told) or not _at_told_rate(found, told)):
                found = other
                break
    return found


def _left(found: Fit, where: str) -> list[str]:
    """What a fit does not explain, in words."""
    if found.fits:
        return []
    steps = [i + 1 for i, off in enumerate(found.off) if off > 0]
    return [f"{found.off.max():.0e} of the update at {spans(steps)}{where}"]


def _deviation(case: _Case) -> float:
    """What is left of an update at most, relative to it, under the tolerance as above it."""
    exact = case.run.allowing(0.0)
    return float(fit(case.found.dialect, case.found.hyper, exact.at(case.found.rates), "fixed").off.max())


def _validate(case: _Case) -> None:
    """Longer, with gradients as of training, and once more: what was found must explain that, too."""
    subject, found = case.subject, case.found
    again = observe(subject, case.experiment, case.run.dtype, case.relative)
    if any(not np.array_equal(a, b) for a, b in zip(again.last, case.run.last, strict=True)):
        case.unexplained.append("a second run by the same gradients is another")
    run = observe(subject, experiments.ordinary(), case.run.dtype, case.relative)
    if case.mode == "constant":
        at = run.at([found.hyper.get("lr", 1.0)] * run.steps)
        case.unexplained += _left(fit(found.dialect, found.hyper, at, "fixed"), ", with gradients as of training")
        return
    hyper = {name: value for name, value in found.hyper.items() if name != "lr"}
    later = fit(found.dialect, hyper, run, "free")
    case.unexplained += _left(later, ", with gradients as of training")


def _vary_decay(case: _Case) -> None:
    """An optimizer that takes a decay and has none is given one."""
    subject, found = case.subject, case.found
    if found.hyper.get("weight_decay") or "weight_decay" not in subject.settable:
        return
    try:
        run = observe(subject, case.experiment, case.run.dtype, case.relative, weight_decay=_PROBE)
    except CannotRunError as reason:
        case.notes.append(Finding("weight decay", f"0; with {_PROBE:g} it cannot run: {reason}"))
        return
    at = run.at(found.rates)
    hyper = {**found.hyper, "weight_decay": _PROBE}
    likely = base(subject.name, subject.told).decay  # where it makes no difference
    kinds = dict.fromkeys((likely, *KINDS, "coupled"))
    fits = {kind: fit(replace(found.dialect, decay=kind), hyper, at, "fixed") for kind in kinds}
    best = min(fits, key=lambda kind: fits[kind].digits)
    if not fits[best].fits:
        case.unexplained += _left(fits[best], f", with weight_decay={_PROBE:g}")
        return
    case.found = replace(found, dialect=replace(found.dialect, decay=best), open=())
    same = [kind for kind in fits if kind != best and fits[kind].fits]
    if same:
        evidence = f"cannot be told from: {'; '.join(said('decay', kind) for kind in same)}"
    else:
        near = min((kind for kind in fits if kind != best), key=lambda kind: fits[kind].rough)
        evidence = nearest("decay", near, fits[near])
    case.notes.append(Finding("weight decay", f"0; with {_PROBE:g} it is {said('decay', best)}", evidence))


def _vary_rate(case: _Case) -> None:
    """A learning rate that is set between steps shows what it multiplies."""
    subject, found = case.subject, case.found
    if case.mode != "constant" or "lr" not in found.hyper or "lr" not in subject.settable:
        return
    probe = (
        {} if found.hyper.get("weight_decay") or "weight_decay" not in subject.settable else {"weight_decay": _PROBE}
    )
    experiment = experiments.ordinary(len(experiments.RATES), 2, experiments.RATES)
    try:
        run = observe(subject, experiment, case.run.dtype, case.relative, **probe)
    except CannotRunError as reason:
        case.notes.append(Finding("learning rate", f"cannot be set between steps: {reason}"))
        return
    lr = found.hyper["lr"]
    moving = run.at([lr * factor for factor in experiments.RATES])
    hyper = {**found.hyper, **probe}
    kinds = KINDS if found.dialect.decay in KINDS and hyper.get("weight_decay") else (found.dialect.decay,)
    places = (
        values_of(found.dialect.family, "lr_in_momentum") if "lr_in_momentum" in OWN[found.dialect.family] else (False,)
    )
    tried: list[tuple[Dialect, Hyper, Fit]] = []
    for kind in dict.fromkeys((found.dialect.decay, *kinds)):
        for place in dict.fromkeys((found.dialect.lr_in_momentum, *places)):
            dialect = replace(found.dialect, decay=kind, lr_in_momentum=place)
            decay = hyper.get("weight_decay", 0.0)
            here = {**hyper, "weight_decay": decay * _scale(found.dialect.decay, kind, lr)}
            tried.append((dialect, here, fit(dialect, here, moving, "fixed")))
    dialect, here, best = min(tried, key=lambda x: x[2].digits)
    if best.fits:
        left = {} if probe else {"weight_decay": here.get("weight_decay", 0.0)}
        case.found = replace(found, dialect=dialect, hyper={**found.hyper, **left}, open=())
    elif fit(found.dialect, hyper, run.at([lr] * run.steps), "fixed").fits:
        case.notes.append(Finding("learning rate", "stays as it is when it is set between steps"))
    else:
        case.unexplained += _left(best, ", where the learning rate is set between steps")


def _scale(now: str, other: str, lr: float) -> float:
    """By what a decay is multiplied if it is said as another kind."""
    if now == other or lr == 0:
        return 1.0
    return lr if other == "unscaled" else 1 / lr if now == "unscaled" else 1.0


def _vary_dtype(case: _Case) -> None:
    """The same in float32, and what parameters of 16 bits do."""
    for dtype in case.subject.dtypes:
        try:
            if dtype == "float32" and case.run.dtype == "float64":
                run = observe(case.subject, case.experiment, dtype, EXACT[dtype])
                found = fit(case.found.dialect, case.found.hyper, run.at(case.found.rates), "fixed")
                case.unexplained += _left(found, ", in float32")
            elif dtype not in EXACT:
                case.notes += describe_precision(case.subject, case.found, dtype)
        except CannotRunError as reason:
            case.notes.append(Finding(dtype, f"cannot run: {str(reason).removeprefix(case.subject.name + ' ')}"))
