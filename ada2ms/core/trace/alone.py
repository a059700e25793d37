"""One run alone: whether its updates follow from its gradients by the rule that its optimizer claims."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from ada2ms.core.dialects import claimed, is_claim
from ada2ms.core.trace.explain import Fit, spoken
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.speech import Speech, Voice, speech
from ada2ms.core.trace.verdict import Verdict, some

Key = TypeVar("Key")


def judge(trace: Trace) -> Verdict:
    """Acquits or convicts the optimizer of a run.

    The first steps, of which entries are recorded, are compared with what every dialect of the catalogue would have
    done with the same gradients, for each parameter with the hyperparameters of its own group. "Only rounding" then
    means: the updates are those of the optimizer's own rule.
    """
    found = speech(trace)
    if found is None:
        why = "no entries were recorded, of finite gradients" if trace.steps else "it has no steps"
        why = "the optimizer had been used before" if trace.steps and trace.about.get("started") else why
        look = ["record from the first step of a new optimizer, with full=3 or more"]
        return Verdict("cannot tell", f"there is nothing to judge by: {why}", look=look)
    name = str(trace.about.get("optimizer", "the optimizer"))
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    evidence = []
    for words, voices in _by((spoken(voice.fit), voice) for voice in found.voices):
        whose, off = _whose(voices, found), max(voice.fit.deviation for voice in voices)
        if voices[0].fit.fits:
            evidence.append(f"{name}'s updates{whose} in {steps} are those of {words}, to {off:.1e}")
        else:
            evidence.append(f"the nearest to those{whose} is {words}, and {off:.1e} of an update is left")
    evidence += _rates(found)
    odd = [voice for voice in found.voices if not voice.fit.fits]
    faults = _by((fault, voice) for voice in found.voices if voice.fit.fits and (fault := _fault(voice, name)))
    if faults:
        step, kind, _ = min(fault for fault, _ in faults)
        own = spoken(Fit(claimed(name, found.voices[0].run[0].hyper[0]), 0, 0, 1, [], 0))
        sentences = [_sentence(words, _whose(voices, found)) for (_, _, words), voices in faults]
        cause = f"{name} does not compute {own}: " + some(sentences, between="; ")
        return Verdict("parted", cause, "update", step, kind, evidence, look=["the optimizer and its wrappers"])
    if odd:
        cause = f"the updates{_whose(odd, found)} of {name} are none of the catalogue's"
        return Verdict("cannot tell", cause, evidence=evidence, look=["clipping and other wrappers of the optimizer"])
    return Verdict("only rounding", evidence[0], evidence=evidence[1:], notes=_few(found))


def _by(pairs: Iterable[tuple[Key, Voice]]) -> list[tuple[Key, list[Voice]]]:
    """Voices of which the same is said together."""
    found: dict[Key, list[Voice]] = {}
    for key, voice in pairs:
        found.setdefault(key, []).append(voice)
    return list(found.items())


def _fault(voice: Voice, name: str) -> tuple[int, str, str] | None:
    """In what a voice is not what its optimizer claims: the step, one word, and a sentence, with "{}" for whose it is.

    What nobody told, such as an Optax optimizer's weight decay, is as updates show it; so is the rule itself.
    """
    hyper = voice.run[0].hyper[0]
    untold = tuple(pair for pair in voice.fit.dialect.changed if pair[0] not in hyper)
    own = replace(claimed(name, hyper) if is_claim(name, hyper) else voice.fit.dialect, changed=untold)
    differences = own.differences(voice.fit.dialect, hyper, hyper)
    at = _first_odd(voice.fit) if "lr" in hyper else 0
    kinds = [key for key in vars(own) if getattr(own, key) != getattr(voice.fit.dialect, key)] or ["lr"]
    if at:
        factor = f"{voice.fit.factors[at - 1]:.4g} of the rule's: the learning rate?"
        differences.append(f"from step {at} on the updates{{}} are {factor}")
    return (at or 1, kinds[0], "; ".join(differences)) if differences else None


def _sentence(words: str, whose: str) -> str:
    return words.format(whose) if "{}" in words else f"{whose.removeprefix(' of ')}: " * bool(whose) + words


def _first_odd(found: Fit) -> int:
    """The first step whose update is not of the size that its learning rate gives; 0 if there is none."""
    bound = max(1e-3, found.noise)
    return next((i + 1 for i, c in enumerate(found.factors) if abs(c - 1) > bound), 0)


def _whose(voices: list[Voice], found: Speech) -> str:
    return "" if len(voices) == len(found.voices) else f" of {some([x for voice in voices for x in voice.names])}"


def _rates(found: Speech) -> list[str]:
    """The learning rates that updates show, where none was told."""
    sentences = []
    for voice in found.voices:
        if "lr" not in voice.run[0].hyper[0]:
            rates = ", ".join(f"{c:.6g}" for c in voice.fit.factors)
            sentences.append(f"no learning rate was told; the updates{_whose([voice], found)} show {rates}")
    return sentences


def _few(found: Speech) -> list[str]:
    return ["one step tells little: the decay rates show from the second on"] if found.steps < 2 else []
