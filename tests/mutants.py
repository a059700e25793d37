"""Wrong variants of the rule, each a small edit of spec.py, and the golden case that tells it from the right one.

`python tests/mutants.py` prints, for each, every case that rejects it.
"""

from mutation import IN_STEP, UPDATE_CALL, mutant, show

GUARD = "d = np.where(d == 0, np.inf, d)"
DENOMINATOR = "d = v_hat ** (a / 2) * s_hat ** ((1 - a) / 2) + eps"
NEW = "new = value * (1 - lr * wd) - lr * m_hat / d"
NUMEL = "numel = sum(p.size for p, x in zip(params, squares, strict=True) if x is not None)"
S_MODEL = "s = group.global_exp_avg_sq[0] = b2 * group.global_exp_avg_sq[0] + (1 - b2) * mean_square"
NO_GRADIENT = "if all(x is None for x in squares):\n"
NO_GRADIENT_HERE = "if g is None or square is None:\n            continue"
SKIPPED = "self.skipped += 1\n            return"
T = "group.step[i] += 1\n        t = group.step[i]"


# The denominator.
near = "magnitudes/eps-near-model"
mutant("eps inside both roots", near, (DENOMINATOR, "d = (v_hat + eps) ** (a / 2) * (s_hat + eps) ** ((1 - a) / 2)"))
mutant("eps inside the common root", near, (DENOMINATOR, "d = np.sqrt(v_hat**a * s_hat ** (1 - a) + eps)"))
mutant("eps in the elementwise root only", near, (DENOMINATOR, "d = (v_hat**0.5 + eps) ** a * s_hat ** ((1 - a) / 2)"))
mutant(
    "eps before bias correction",
    near,
    (DENOMINATOR, "d = (v ** (a / 2) * s ** ((1 - a) / 2) + eps) / bias_correction(b2, t) ** 0.5"),
)
mutant("eps relative to the root", near, (DENOMINATOR, DENOMINATOR.replace(" + eps", " * (1 + eps)")))
mutant("no eps", near, (DENOMINATOR, DENOMINATOR.removesuffix(" + eps")))
mutant(
    "roots mixed arithmetically",
    "basics/adaptivity-0.25-model",
    (DENOMINATOR, "d = a * v_hat**0.5 + (1 - a) * s_hat**0.5 + eps"),
)
mutant(
    "squares mixed arithmetically",
    "basics/adaptivity-0.25-model",
    (DENOMINATOR, "d = np.sqrt(a * v_hat + (1 - a) * s_hat) + eps"),
)
mutant(
    "exponents swapped",
    "basics/adaptivity-0.25-tensor",
    (DENOMINATOR, "d = v_hat ** ((1 - a) / 2) * s_hat ** (a / 2) + eps"),
)
mutant("no root", "basics/adaptivity-0.5-model", (DENOMINATOR, "d = v_hat**a * s_hat ** (1 - a) + eps"))
mutant("adaptivity ignored: AdamW", "basics/adaptivity-0.25-model", (DENOMINATOR, "d = v_hat**0.5 + eps"))
mutant(
    "adaptivity kept from its ends",
    "basics/adaptivity-0-model",
    (DENOMINATOR, f"a = min(max(a, 0.01), 0.99)\n        {DENOMINATOR}"),
)
mutant(
    "0**0 is NaN",
    "magnitudes/zeros-first-0-model",
    (DENOMINATOR, "d = np.exp(a / 2 * np.log(v_hat)) * s_hat ** ((1 - a) / 2) + eps"),
)
mutant("0/0 is NaN", "magnitudes/zeros-eps-zero-model", (GUARD, "pass"))
mutant("no update wherever v = 0", "magnitudes/zeros-forgetful-0-model", (GUARD, "d = np.where(v == 0, np.inf, d)"))

# Weight decay.
mutant(
    "L2 in place of decoupled decay",
    "basics/decay-large-model",
    ("g = c * g.astype(m.dtype)", "g = c * g.astype(m.dtype) + wd * theta"),
    ("(1 - lr * wd)", "1"),
)
mutant(
    "decay after the update",
    "basics/decay-large-model",
    (NEW, "new = (value - lr * m_hat / d) * (1 - lr * wd)"),
)
mutant("decay not scaled by lr", "basics/defaults-model", ("(1 - lr * wd)", "(1 - wd)"))
for count, when in (("group.global_step", "next"), ("0", "first")):  # the count has moved on by then
    edit = ("(1 - lr * wd)", f"(1 - value_at(group.hyper.lr, {count}) * wd)")
    mutant(f"decay by the {when} learning rate", "basics/lr-changing-model", edit)
mutant("decay compounded", "basics/decay-large-model", ("(1 - lr * wd)", "math.exp(-lr * wd)"))
mutant("no decay", "basics/decay-large-model", ("(1 - lr * wd)", "1"))
mutant(
    "decay without a gradient",
    "missing/late-model",
    (
        NO_GRADIENT_HERE,
        NO_GRADIENT_HERE.replace("continue", "group.params[i][...] *= 1 - lr * wd\n            continue"),
    ),
)

# Schedules.
lr, a = (
    "lr = value_at(group.hyper.lr, group.global_step)",
    "a = value_at(group.hyper.adaptivity, group.global_step)",
)
mutant("lr one step ahead", "basics/lr-changing-model", (lr, lr.replace("step)", "step + 1)")))
mutant(
    "lr one step behind",
    "basics/lr-changing-model",
    (lr, lr.replace("group.global_step", "max(group.global_step - 1, 0)")),
)
mutant("adaptivity one step ahead", "schedules/linear-model", (a, a.replace("step)", "step + 1)")))
mutant(
    "adaptivity one step behind",
    "schedules/linear-model",
    (a, a.replace("group.global_step", "max(group.global_step - 1, 0)")),
)

# Bias corrections.
k, t = "bias_correction(b2, group.global_step)", "s_hat = s / bias_correction(b2, t)"
mutant("no bias correction of m", "basics/defaults-model", ("m_hat = m / bias_correction(b1, t)", "m_hat = m"))
mutant("no bias correction of v", "basics/defaults-model", ("v_hat = v / bias_correction(b2, t)", "v_hat = v"))
mutant("no bias correction of s", "basics/defaults-model", (k, "1"))
mutant("no bias correction of a tensor's s", "basics/defaults-tensor", (t, "s_hat = s"))
mutant("m corrected one step late", "basics/defaults-model", ("bias_correction(b1, t)", "bias_correction(b1, t + 1)"))
mutant(
    "corrections in single precision",
    "basics/betas-long-model",
    ("-math.expm1(count * math.log(beta)) if beta", "float(1 - np.float32(beta) ** count) if beta"),
)
mutant(
    "s corrected by t", "missing/late-model", ("m_hat = m /", "s_hat = s / bias_correction(b2, t)\n        m_hat = m /")
)
mutant(
    "s corrected by the first tensor's t",
    "missing/alternating-model",
    (k, "bias_correction(b2, max(group.step[0] + (gradients[0][0] is not None), 1))"),
)
mutant("a tensor's s corrected by k", "missing/late-tensor", (t, "s_hat = s / bias_correction(b2, group.global_step)"))
mutant("t shared between tensors", "missing/late-model", (T, "t = group.step[i] = group.global_step"))
mutant(
    "s with b1",
    "basics/defaults-model",
    (S_MODEL, S_MODEL.replace("b2", "b1")),
    (k, "bias_correction(b1, group.global_step)"),
)

# Whose mean.
own = (
    "own = [next(remaining) for _ in group.params]\n            "
    "counted = [(x, p.size) for (_, x), p in zip(own, group.params) if x is not None]\n            "
    "update(group, own, c, mean(sum(x for x, _ in counted), sum(n for _, n in counted)))"
)
fresh = (
    "after = [v if g is None else x.hyper.b2 * v + (1 - x.hyper.b2) * g * g for (g, _), (x, v) in zip(\n"
    f"{IN_STEP}    zip(gradients, squares), [(x, v) for x in self.groups for v in x.exp_avg_sq])]\n"
    f"{IN_STEP}fresh = mean(float(sum(v.sum() for v in after)), sum(v.size for v in after))\n"
    f"{IN_STEP}remaining = iter"
)
per_tensor = "sum(x / max(p.size, 1) for x, p in zip(squares, params) if x is not None), len(squares)"
mutant(
    "each tensor's mean for the model's",
    "basics/adaptivity-0.5-model",
    ('[0.0] * (1 if self.scope == "model" else len(self.params))', "[0.0] * len(self.params)"),
    ('if group.scope == "model":', "if False:"),
    ('if group.scope == "tensor":', "if True:"),
)
mutant(
    "the model's mean for each tensor's",
    "basics/adaptivity-0.5-tensor",
    ("mean(square, theta.size)", "mean_square"),
)
mutant("a mean for each group", "groups/split-model", (UPDATE_CALL, own))
mutant(
    "one s for groups with different b2",
    "groups/memories-model",
    (UPDATE_CALL, UPDATE_CALL.replace(", numel)", ", numel), self.groups[0].hyper.b2")),
    ("mean_square: float\n", "mean_square: float, b2_s: float\n"),
    (S_MODEL, S_MODEL.replace("b2", "b2_s")),
    (k, "bias_correction(b2_s, group.global_step)"),
)
mutant(
    "a mean of the tensors' means",
    "shapes/mixed-model",
    (UPDATE_CALL, UPDATE_CALL.replace("c * total * c, numel", per_tensor)),
)
mutant(
    "a sum for the mean",
    "basics/adaptivity-0.5-model",
    ("return total / numel if numel else 0.0", "return total"),
)
mutant(
    "entries without a gradient in the mean",
    "missing/never-model",
    (NUMEL, "numel = sum(p.size for p in params)"),
)
mutant(
    "s a fresh mean of v",
    "missing/alternating-model",
    ("remaining = iter", fresh),
    (UPDATE_CALL, UPDATE_CALL.replace("mean(c * total * c, numel)", "fresh")),
    (S_MODEL, "s = group.global_exp_avg_sq[0] = mean_square"),
)
mutant(
    "s of the step before",
    "basics/defaults-model",
    (S_MODEL, f"s = group.global_exp_avg_sq[0] or mean_square\n        {S_MODEL.removeprefix('s = ')}"),
)
mutant("an empty tensor as an entry", "shapes/mixed-model", (NUMEL, NUMEL.replace("p.size", "(p.size or 1)")))
mutant(
    "s not averaged",
    "basics/adaptivity-0.5-model",
    (S_MODEL, "s = group.global_exp_avg_sq[0] = mean_square"),
    (k, "1"),
)

# Groups.
for name in ("lr", "b1", "b2", "eps", "weight_decay", "adaptivity"):
    edit = (UPDATE_CALL, f"vars(group.hyper).update({name}=self.groups[0].hyper.{name})\n            {UPDATE_CALL}")
    mutant(f"the first group's {name} for all", "groups/differing-model", edit)

# Missing gradients.
move_k = "for group in self.groups:\n                group.global_step += 1\n            return"
mutant(
    "k moves without any gradient",
    "missing/everything-model",
    (NO_GRADIENT + "            return", NO_GRADIENT + "            " + move_k),
)
mutant("s moves without any gradient", "missing/everything-first-model", (NO_GRADIENT, "if not squares:\n"))
mutant(
    "zeros for a missing gradient",
    "missing/alternating-model",
    (
        NO_GRADIENT_HERE,
        "if g is None or square is None:\n            g, square = np.zeros(group.params[i].shape), 0.0",
    ),
)
mutant(
    "s of a group waits for its gradients",
    "missing/group-model",
    (
        "    b1, b2, eps, wd =",
        "    if all(g is None for g, _ in gradients):\n        return\n    b1, b2, eps, wd =",
    ),
)

# Skipped steps.
zeroed = (
    "self.skipped += 1\n"
    f"{IN_STEP}    gradients = [None if g is None else np.where(np.isfinite(g), g, 0) for g in gradients]\n"
    f"{IN_STEP}    squares = [None if g is None else float(np.sum(g * g)) for g in gradients]\n"
    f"{IN_STEP}    total = sum(x for x in squares if x is not None)"
)
dropped = (
    "self.skipped += 1\n"
    f"{IN_STEP}    gradients = [None if g is None or not np.all(np.isfinite(g)) else g for g in gradients]\n"
    f"{IN_STEP}    squares = [None if g is None else x for g, x in zip(gradients, squares)]\n"
    f"{IN_STEP}    total = sum(x for x in squares if x is not None)\n"
    f"{IN_STEP}    {NUMEL}"
)
counted = f"self.skipped += 1\n{IN_STEP}    " + move_k
t_counted = counted.replace("global_step += 1", "step = [t + 1 for t in group.step]")
decayed = (
    f"for group in self.groups:\n{IN_STEP}        for p in group.params:\n"
    f"{IN_STEP}            p *= 1 - group.hyper.lr(0) * group.hyper.weight_decay\n{IN_STEP}    return"
)
mutant("k moves in skipped steps", "nonfinite/infinite-model", (SKIPPED, counted))
mutant("t moves in skipped steps", "nonfinite/nan-model", (SKIPPED, t_counted))
mutant("zeros for what is not finite", "nonfinite/nan-model", (SKIPPED, zeroed))
mutant("only the tensor is skipped", "nonfinite/nan-tensor", (SKIPPED, dropped))
mutant("nothing is skipped", "nonfinite/nan-tensor", (SKIPPED, "self.skipped += 1"))
for test in ("isnan", "isinf"):
    case = f"nonfinite/{'infinite' if test == 'isnan' else 'nan'}-model"
    mutant(f"skipped by {test} alone", case, ("not math.isfinite(total)", f"math.{test}(total)"))
mutant(
    "skipped without being asked",
    "nonfinite/propagate-model",
    ('self.nonfinite == "skip" and not math.isfinite', "not math.isfinite"),
)
mutant("decay in skipped steps", "nonfinite/nan-model", (SKIPPED, decayed))


if __name__ == "__main__":
    import mutants_added  # noqa: F401

    show()
