"""What the golden cases are, by theme; `build.py` says what one is made of."""

import math

from ada2ms.core.schedules import Constant, Cosine, Exponential, Linear

from . import clipping, sixteen_bits
from .build import Data, Shape, both, case, group


def themes() -> dict[str, tuple[str, list[Data]]]:
    """Each file's comment and cases, whose ids begin with the file's name."""
    themes = {
        "basics": ("Hyperparameters, one at a time.", _basics()),
        "magnitudes": ("Gradients of all sizes, and eps.", _magnitudes()),
        "shapes": ("Tensors of all shapes.", _shapes()),
        "groups": ("Parameter groups.", _groups()),
        "missing": ("Tensors without a gradient.", _missing()),
        "nonfinite": ("Gradients that are not finite.", _nonfinite()),
        "schedules": ("Schedules of the adaptivity and of the learning rate.", _schedules()),
        "long": ("A thousand steps.", _long()),
        "clip": ("Gradients that are clipped by their norm over the model.", clipping.cases()),
        "compensated": ("Parameters of 16 bits that keep what rounding loses.", sixteen_bits.cases()),
    }
    return {
        theme: (comment, [{**data, "id": f"{theme}/{data['id']}"} for data in cases])
        for theme, (comment, cases) in themes.items()
    }


def _basics() -> list[Data]:
    defaults = group(lr=1e-3, b2=0.999, weight_decay=1e-2)
    warm_up = [1e-3, 4e-3, 2e-2, 2e-2, 5e-2, 0.0, 1e-2, 3e-3, 1e-3, 1e-2]
    cases = both("defaults", "the defaults of every backend", defaults)
    for a in (0, 0.25, 0.5, 1):
        cases += both(f"adaptivity-{a}", f"adaptivity {a}", group(adaptivity=a))
    cases += [
        case("decay-large", "lr*wd = 0.45", group(lr=0.5, weight_decay=0.9), flags="decay"),
        case(
            "decay-above-one", "lr*wd = 1.8: decay alone turns the sign", group(lr=1.5, weight_decay=1.2), flags="decay"
        ),
        case("decay-none", "no weight decay", group(weight_decay=0), flags="decay"),
        case("lr-zero", "a learning rate of 0: the state moves, the parameters do not", group(lr=0), flags="lr"),
        *both("lr-changing", "warm-up, a step at 0, decay", group(lr=warm_up), flags="lr"),
        *both("b1-zero", "no first moment", group(b1=0), flags="beta"),
        *both("b2-zero", "no memory of squares", group(b2=0, eps=1e-2), flags="beta"),
        case("betas-zero", "neither", group(b1=0, b2=0, eps=1e-2), flags="beta"),
        *both("betas-long", "both 0.9999", group(b1=0.9999, b2=0.9999), flags="beta"),
        case("adamw-b2-long", "b2 = 0.9999 at adaptivity 1", group(b2=0.9999, adaptivity=1), flags="beta"),
    ]
    return cases


def _magnitudes() -> list[Data]:
    def zero_first(step: int, tensor: int, x: float) -> float:
        return 0.0 if step <= 3 or (step == 7 and tensor == 0) else x

    def sparse(step: int, tensor: int, x: float) -> float:
        """Some entries never move, others from step 3 on; everything is 0 at first and in step 6."""
        return x if x > (-0.1 if step > 3 else 0.15) * 3.0**-tensor and step not in (1, 6) else 0.0

    cases = both("zeros", "nothing but zeros: weight decay alone", gradient=lambda *_: 0.0, flags="zero")
    cases += [
        case(
            "zeros-eps-zero",
            "nothing but zeros, without eps",
            group(eps=0),
            gradient=lambda *_: 0.0,
            flags="zero eps=0",
        )
    ]
    for a in (0, 0.5, 1):
        cases += both(
            f"zeros-first-{a}", "three steps of zeros first", group(adaptivity=a), gradient=zero_first, flags="zero"
        )
        without = group(adaptivity=a, eps=0)
        cases += both(
            f"zeros-sparse-{a}", "zeros in between, without eps", without, gradient=sparse, flags="zero eps=0"
        )
        forgetful = group(adaptivity=a, eps=0, b2=0)
        cases += [
            case(f"zeros-forgetful-{a}", "v = 0 while m is not", forgetful, gradient=sparse, flags="zero eps=0 beta")
        ]
    cases += both(
        "tiny",
        "eps far above the root",
        group(lr=10, weight_decay=0.01),
        gradient=lambda _, __, x: 1e-12 * x,
        flags="tiny eps",
    )
    for a in (0, 1):
        near = group(adaptivity=a, eps=1e-12)
        cases += [case(f"tiny-eps-{a}", "eps near the root", near, gradient=lambda _, __, x: 1e-12 * x, flags="eps")]
    cases += both("eps-near", "eps near the root", group(eps=0.1), flags="eps")
    cases += [
        case("eps-near-adamw", "eps near the root, at adaptivity 1", group(eps=0.1, adaptivity=1), flags="eps"),
        case("eps-near-sgd", "eps near the root, at adaptivity 0", group(eps=0.1, adaptivity=0), flags="eps"),
        case("eps-far", "eps far above the root", group(eps=10, lr=1, weight_decay=0.01), flags="eps"),
    ]
    for a in (0, 0.5, 1):
        cases += both(
            f"huge-{a}", f"1e15, adaptivity {a}", group(adaptivity=a), gradient=lambda _, __, x: 1e15 * x, flags="huge"
        )
    cases += both(
        "sign", "the sign changes at every step", gradient=lambda step, _, x: (-1) ** step * abs(x), flags="sign"
    )
    cases += both(
        "one-tensor-larger", "one tensor's gradients are 1000 times the other's", gradient=lambda _, i, x: 3000**i * x
    )
    cases += [case("growing", "gradients grow threefold per step", gradient=lambda step, _, x: 3.0**step * x)]
    return cases


def _shapes() -> list[Data]:
    mixed: tuple[Shape, ...] = ((), (0,), (1,), (2, 2), (2, 0, 3), (1, 2, 1, 2))
    return [
        *both("scalar", "one tensor of rank 0", group(()), flags="scalar"),
        *both("four-axes", "one tensor of rank 4", group((2, 1, 3, 2)), record=(1, 2, 10)),
        *both("empty-only", "nothing but an empty tensor", group((0,)), flags="empty"),
        *both("mixed", "ranks 0 to 4, empty ones among them", group(*mixed), record=(1, 2, 10), flags="scalar empty"),
        *both("seven", "one axis", group((7,)), record=(1, 2, 10)),
    ]


def _groups() -> list[Data]:
    split = (group((2, 2), weight_decay=1), group((2,), (), weight_decay=0))
    differing = (
        group((2,), lr=0.02, b1=0.8, b2=0.9, eps=1e-2, weight_decay=2, adaptivity=0.75),
        group((3,), (), lr=0.005, b1=0.95, b2=0.99, eps=1e-8, weight_decay=0, adaptivity=0.25),
        group((1, 2), lr=0.01, b1=0.5, b2=0.6, eps=1e-4, weight_decay=0.5, adaptivity=Linear(1, 0, 6)),
    )
    memories = (group((2,), b2=0.5, adaptivity=0.25), group((2,), b2=0.999, adaptivity=0.25))
    rates = (group((3,), lr=[0.03, 0.02, 0.01] + [0.005] * 7), group((2,), lr=[0.001 * i for i in range(1, 11)]))
    ends = (group((3,), adaptivity=0), group((2,), adaptivity=1))
    schedules = (group((2,), adaptivity=Linear(0, 1, 4)), group((2,), adaptivity=Cosine(1, 0.5, 8)))
    warm_up = [0.001, 0.002, 0.004, 0.008, 0.016, 0.016, 0.008, 0.0, 0.004, 0.002]
    scaled = (
        group((2, 1), lr=warm_up, weight_decay=2),
        group((2,), (), lr=[4 * x for x in warm_up], weight_decay=0, b1=0.5, eps=1e-3),
        group((1, 2), lr=[x / 8 for x in warm_up], weight_decay=2, b2=0.6, adaptivity=Linear(1, 0, 6)),
    )
    waiting = (group((2,)), group((2,), lr=0.04, b2=0.5), group((), weight_decay=0, b2=0.5, adaptivity=1))
    return [
        *both("split", "with and without weight decay", *split, flags="groups decay"),
        *both("differing", "every hyperparameter differs", *differing, record=(1, 2, 5, 10), flags="groups schedule"),
        *both("memories", "b2 differs: one mean, two averages of it", *memories, flags="groups"),
        *both("rates", "learning rates change, each group its own way", *rates, flags="groups lr"),
        case("ends", "one group adaptive, the other not", *ends, flags="groups"),
        case("schedules", "each group its own schedule", *schedules, flags="groups schedule"),
        *both(
            "scaled", "one changing learning rate, times a factor in each group", *scaled, flags="groups lr schedule"
        ),
        *both(
            "waiting",
            "a group is missing at first, another later, and steps are skipped",
            *waiting,
            nonfinite="skip",
            gradient=lambda step, tensor, x: math.nan if step == 4 and tensor == 0 else x,
            missing=lambda step, tensor: (tensor == 1 and step <= 2) or (tensor == 2 and step in (6, 7)),
            flags="groups missing nonfinite",
        ),
    ]


def _missing() -> list[Data]:
    three = group((2,), (3,), ())
    two_groups = (
        group((2,), (), b2=0.9, adaptivity=0.25),
        group((3,), b2=0.99, weight_decay=0, adaptivity=Linear(1, 0, 8)),
    )
    rates = (group((2,), lr=[0.002 * i for i in range(1, 11)]), group((2,), (), lr=[0.02] * 5 + [0.005] * 5))

    def alternating(step: int, tensor: int) -> bool:
        return (step + tensor) % 3 == 0

    def late(step: int, tensor: int) -> bool:
        return tensor == 1 and step <= 4

    def never(step: int, tensor: int) -> bool:
        return tensor == 1

    def second_group(step: int, tensor: int) -> bool:
        return tensor == 2 and step in (1, 2, 5, 6, 7)

    def every(step: int, tensor: int) -> bool:
        return step in (4, 5)

    def every_first(step: int, tensor: int) -> bool:
        return step == 1 or (step == 5 and tensor != 1) or step == 8

    fading = group((2,), (3,), (), adaptivity=Linear(1, 0, 7))
    return [
        *both("alternating", "each tensor is missing in every third step", three, missing=alternating, flags="missing"),
        *both("late", "one tensor has its first gradient in step 5", three, missing=late, flags="missing"),
        *both("never", "one tensor never has a gradient", three, missing=never, flags="missing"),
        *both(
            "group",
            "a whole group is missing: its s moves on",
            *two_groups,
            missing=second_group,
            flags="missing groups schedule",
        ),
        *both("rates", "missing under changing learning rates", *rates, missing=alternating, flags="missing groups lr"),
        *both("everything", "steps 4 and 5 have no gradient", fading, missing=every, flags="missing-all schedule"),
        *both(
            "everything-first",
            "the first step has none",
            fading,
            missing=every_first,
            flags="missing missing-all schedule",
        ),
        case("nothing-ever", "no step has a gradient", missing=lambda *_: True, flags="missing-all"),
    ]


def _nonfinite() -> list[Data]:
    fading = group(adaptivity=Linear(1, 0, 6))
    two_groups = (group((2,), b2=0.9, adaptivity=0.25), group((2,), (), adaptivity=Cosine(0, 1, 6)))

    def nan(step: int, tensor: int, x: float) -> float:
        return math.nan if step in (4, 5) and tensor == 1 else x

    def infinite(step: int, tensor: int, x: float) -> float:
        return math.copysign(math.inf, x) if step in (1, 6) and tensor == 0 else x

    def missing(step: int, tensor: int) -> bool:
        return (step + tensor) % 3 == 0

    def finite(step: int, tensor: int, x: float) -> float:
        return 1e15 * x

    options: Data = {"nonfinite": "skip", "record": (1, 3, 4, 5, 6, 10)}
    return [
        *both("nan", "NaN in one tensor, two steps in a row", gradient=nan, flags="nonfinite", **options),
        *both(
            "infinite",
            "infinities of both signs, in the first step too",
            fading,
            gradient=infinite,
            flags="nonfinite schedule",
            **options,
        ),
        *both(
            "missing",
            "NaN where other tensors are missing",
            *two_groups,
            gradient=nan,
            missing=missing,
            flags="nonfinite missing groups schedule",
            **options,
        ),
        case("finite", "huge but finite: nothing is skipped", gradient=finite, flags="huge", **options),
        *both("propagate", "NaN in one tensor, and no guard", gradient=nan, flags="propagate", record=(1, 3, 4, 5, 10)),
    ]


def _schedules() -> list[Data]:
    rates = [0.002 * i for i in range(1, 6)] + [0.01, 0.008, 0.005, 0.002, 0.0]
    options: Data = {"flags": "schedule", "record": (1, 2, 5, 6, 7, 10)}
    return [
        *both("linear", "to the end at 6 and beyond", group(adaptivity=Linear(1, 0, 6)), **options),
        case("linear-up", "from SGD to AdamW", group(adaptivity=Linear(0, 1, 6)), **options),
        case("linear-one", "over a single step", group(adaptivity=Linear(0.9, 0.2, 1)), **options),
        *both("cosine", "to the end at 6 and beyond", group(adaptivity=Cosine(1, 0, 6)), **options),
        case("cosine-part", "between 0.2 and 0.7", group(adaptivity=Cosine(0.2, 0.7, 9)), **options),
        *both("exponential", "a half-life that is not whole", group(adaptivity=Exponential(1, 0, 2.5)), **options),
        case("exponential-part", "towards 0.75", group(adaptivity=Exponential(0.1, 0.75, 1)), **options),
        case("constant", "a schedule that does not change", group(adaptivity=Constant(0.3)), **options),
        case(
            "two",
            "learning rate and adaptivity",
            group(lr=rates, adaptivity=Linear(1, 0, 6)),
            **{**options, "flags": "schedule lr"},
        ),
    ]


def _long() -> list[Data]:
    options: Data = {"flags": "long", "steps": 1000, "record": (1, 10, 100, 500, 1000)}
    slow = group((2,), lr=1e-3, b1=0.99, b2=0.9999, weight_decay=0.1, adaptivity=Cosine(1, 0.25, 900))
    return [
        case("defaults", "two tensors", group((), (2,), lr=1e-3, b2=0.999, weight_decay=0.1), **options),
        case("slow", "slow averages under a cosine", slow, **{**options, "flags": "long beta schedule"}),
        case(
            "defaults", "two tensors", group((), (1,), lr=1e-3, b2=0.999, weight_decay=0.1), scope="tensor", **options
        ),
    ]
