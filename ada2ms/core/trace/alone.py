"""One run alone: whether its updates follow from its gradients by the rule that its optimizer claims."""

from dataclasses import replace

from ada2ms.core.dialects import base
from ada2ms.core.trace.explain import Fit, spoken
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.speech import Speech, Voice, speech
from ada2ms.core.trace.verdict import Verdict, some


def judge(trace: Trace) -> Verdict:
    """Acquits or convicts the optimizer of a run.

    The first steps, of which entries are recorded, are compared with what every dialect of the catalogue would have
    done with the same gradients, for each parameter with the hyperparameters of its own group. "Only rounding" then
    means: the updates are those of the optimizer's own rule.
    """
    found = speech(trace)
    if found is None:
        why = (
            "the optimizer had been used before"
            if trace.about.get("started")
            else "no entries were recorded, of finite gradients"
        )
        why = why if trace.steps else "it has no steps"
        look = ["record from the first step of a new optimizer, with full=3 or more"]
        return Verdict("cannot tell", f"there is nothing to judge by: {why}", look=look)
    name = str(trace.about.get("optimizer", "the optimizer"))
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    evidence = []
    for voice in found.voices:
        whose = _whose(voice, found)
        if voice.fit.fits:
            evidence.append(f"{name}'s updates{whose} in {steps} are those of {_said(voice)}")
        else:
            left = f"{voice.fit.deviation:.1e} of an update is left"
            evidence.append(f"the nearest to those{whose} is {spoken(voice.fit)}, and {left}")
    evidence += _rates(found)
    odd = [voice.names for voice in found.voices if not voice.fit.fits]
    faults = [fault for voice in found.voices if voice.fit.fits if (fault := _fault(voice, found, name))]
    if faults:
        step, kind, _ = min(faults)
        own = spoken(Fit(base(name, found.voices[0].run[0].hyper[0]), 0, 0, 1, [], 0))
        cause = f"{name} does not compute {own}: " + "; ".join(words for _, _, words in faults)
        return Verdict("parted", cause, "update", step, kind, evidence, look=["the optimizer and its wrappers"])
    if odd:
        of = "" if len(found.voices) == 1 else f" of {some(odd[0])}"
        cause = f"the updates{of} of {name} are none of the catalogue's"
        return Verdict("cannot tell", cause, evidence=evidence, look=["clipping and other wrappers of the optimizer"])
    return Verdict("only rounding", evidence[0], evidence=evidence[1:], notes=_few(found))


def _fault(voice: Voice, found: Speech, name: str) -> tuple[int, str, str] | None:
    """In what a voice is not what its optimizer claims: the step, one word, and a sentence."""
    hyper = voice.run[0].hyper[0]
    own = base(name, hyper)
    own = own if voice.fit.dialect.changed else replace(own, changed=())
    differences = own.differences(voice.fit.dialect, hyper, hyper)
    at = _first_odd(voice.fit) if "lr" in hyper else 0
    kinds = [key for key in vars(own) if getattr(own, key) != getattr(voice.fit.dialect, key)] or ["lr"]
    whose = _whose(voice, found)
    if at:
        factor = f"{voice.fit.factors[at - 1]:.4g} of the rule's: the learning rate?"
        differences.append(f"from step {at} on the updates{whose} are {factor}")
    if not differences:
        return None
    return at or 1, kinds[0], ("" if at else f"{whose.removeprefix(' of ')}: " * bool(whose)) + "; ".join(differences)


def _first_odd(found: Fit) -> int:
    """The first step whose update is not of the size that its learning rate gives; 0 if there is none."""
    bound = max(1e-3, found.noise)
    return next((i + 1 for i, c in enumerate(found.factors) if abs(c - 1) > bound), 0)


def _whose(voice: Voice, found: Speech) -> str:
    return "" if len(found.voices) == 1 else f" of {some(voice.names)}"


def _said(voice: Voice) -> str:
    return f"{spoken(voice.fit)}, to {voice.fit.deviation:.1e}"


def _rates(found: Speech) -> list[str]:
    """The learning rates that updates show, where none was told."""
    sentences = []
    for voice in found.voices:
        if "lr" not in voice.run[0].hyper[0]:
            rates = ", ".join(f"{c:.6g}" for c in voice.fit.factors)
            sentences.append(f"no learning rate was told; the updates{_whose(voice, found)} show {rates}")
    return sentences


def _few(found: Speech) -> list[str]:
    return ["one step tells little: the decay rates show from the second on"] if found.steps < 2 else []
