"""Wrong variants of what the rule's second version has added: clipping, and 16 bits that keep what rounding loses."""

from mutation import IN_STEP, UPDATE_CALL, mutant

# Clipping.
CLIP = "c = clip_factor(total, self.max_norm)"
QUOTIENT = "c = max_norm / math.sqrt(total)"
AT_MOST_1 = "return 1.0 if c > 1 else c"
UNLESS = "max_norm in (None, math.inf) or total == 0"
CLIPPED = "clipped = [None if x is None else c * x * c for x in squares]"
MEAN = "mean(c * total * c, numel)"
G = "g = c * g.astype(m.dtype)"
M, V = "m[...] = b1 * m + (1 - b1) * g", "v[...] = b2 * v + (1 - b2) * g * g"
TOTAL = "total = sum(x for x in squares if x is not None)\n        "
sometimes, of_a_tensor = "clip/sometimes-model", "clip/sometimes-tensor"

largest = (
    "largest = max(float(np.max(np.abs(g), initial=0)) for g in gradients if g is not None)\n"
    f"{IN_STEP}c = clip_factor(largest**2, self.max_norm)"
)
cut_off = (
    "limit = self.max_norm or math.inf\n"
    f"{IN_STEP}gradients = [None if g is None else np.clip(g, -limit, limit) for g in gradients]\n"
    f"{IN_STEP}squares = [None if g is None else float(np.sum(g * g)) for g in gradients]\n"
    f"{IN_STEP}{TOTAL}c = 1.0"
)
each_tensor = (
    "each = [1.0 if x is None else clip_factor(x, self.max_norm) for x in squares]\n"
    f"{IN_STEP}gradients = [None if g is None else g * x for g, x in zip(gradients, each)]\n"
    f"{IN_STEP}squares = [None if x is None else x * y * y for x, y in zip(squares, each)]\n"
    f"{IN_STEP}{TOTAL}c = 1.0"
)
each_group = (
    "counts = [len(group.params) for group in self.groups]\n"
    f"{IN_STEP}ends = np.cumsum(counts)\n"
    f"{IN_STEP}own = [sum(x for x in squares[end - n : end] if x is not None) for n, end in zip(counts, ends)]\n"
    f"{IN_STEP}each = [clip_factor(x, self.max_norm) for n, x in zip(counts, own) for _ in range(n)]\n"
    f"{IN_STEP}gradients = [None if g is None else g * x for g, x in zip(gradients, each)]\n"
    f"{IN_STEP}squares = [None if x is None else x * y * y for x, y in zip(squares, each)]\n"
    f"{IN_STEP}{TOTAL}c = 1.0"
)
with_the_last = (
    "self.last = [y if x is None else x for x, y in zip(squares, getattr(self, 'last', squares))]\n"
    f"{IN_STEP}c = clip_factor(sum(x for x in self.last if x is not None), self.max_norm)"
)
decided_late = "math.isnan(clip_factor(total, self.max_norm))"
zero_by_zero = "c = math.nan if total == 0 else max_norm / math.sqrt(total)"
mutant("no clip", "clip/always-model", (CLIP, "c = 1.0"))
mutant("always scaled to the norm", "clip/never-model", (AT_MOST_1, "return c"))
mutant("scaled up where the norm is not reached", sometimes, (AT_MOST_1, "return 1.0 if c < 1 else c"))
mutant("1e-6 added to the norm", "clip/tiny-model", (QUOTIENT, "c = max_norm / (math.sqrt(total) + 1e-6)"))
mutant("the largest entry for the norm", sometimes, (CLIP, largest))
mutant("the mean square for the norm", sometimes, (CLIP, CLIP.replace("total", "mean(total, numel)")))
mutant("the norm squared", sometimes, (QUOTIENT, "c = max_norm / total"))
mutant("entries cut off, and no vector scaled", sometimes, (CLIP, cut_off))
mutant("each tensor clipped by its own norm", "clip/one-tensor-larger-model", (CLIP, each_tensor))
mutant(
    "scope tensor: each clipped by its own norm",
    "clip/one-tensor-larger-tensor",
    (CLIP, f"if self.scope == 'tensor':\n{IN_STEP}    {each_tensor.replace(IN_STEP, IN_STEP + '    ')}"),
)
mutant("each group clipped by its own norm", "clip/groups-model", (CLIP, each_group))
mutant(
    "the first group's norm for all",
    "clip/groups-model",
    (CLIP, each_group.replace("(counts, own)", "(counts, own[:1] * len(own))")),
)
mutant("s before clipping", sometimes, (MEAN, "mean(total, numel)"))
mutant("s scaled once", sometimes, (MEAN, "mean(c * total, numel)"))
mutant("a tensor's s before clipping", of_a_tensor, (CLIPPED, "clipped = squares"))
mutant("a tensor's s scaled once", of_a_tensor, (CLIPPED, CLIPPED.replace(" * c for", " for")))
mutant("m alone clipped", sometimes, (V, V.replace("g * g", "(g / c) * (g / c)")), (MEAN, "mean(total, numel)"))
mutant("v before clipping", sometimes, (V, V.replace("g * g", "(g / c) * (g / c)")))
mutant("v scaled once", sometimes, (V, V.replace("g * g", "(g / c) * g")))
mutant("m before clipping", sometimes, (M, M.replace("* g", "* (g / c)")))
mutant(
    "the update scaled, and not the gradient",
    sometimes,
    (G, G.replace("c * ", "")),
    (MEAN, "mean(total, numel)"),
    ("- lr * m_hat / d", "- c * lr * m_hat / d"),
)
mutant(
    "0/0 where all gradients are 0",
    "clip/zeros-model",
    (UNLESS, "max_norm in (None, math.inf)"),
    (QUOTIENT, zero_by_zero),
)
mutant("the last gradient for one that is missing", "clip/missing-model", (CLIP, with_the_last))
mutant("c is 1 for a NaN", "clip/propagate-nan-tensor", (AT_MOST_1, "return c if c < 1 else 1.0"))
mutant("c is 1 for infinity", "clip/propagate-infinite-tensor", (UNLESS, f"{UNLESS} or total == math.inf"))
mutant("skipped by what is clipped", "clip/skip-infinite-model", ("not math.isfinite(total)", decided_late))

# Parameters of 16 bits.
VALUE = "value = widen(theta) if compensation is None else widen(theta) + widen(compensation)"
KEPT = "compensation[...] = rounded(lost(new, widen(theta)), theta.dtype)"
ROUNDED = "theta[...] = rounded(new, theta.dtype)"
HAS_ONE = "self.compensated and p.itemsize == 2"
FINITE = "finite = np.isfinite(theta)"
TO_BFLOAT16 = "bits + 0x7FFF + (bits >> 16 & 1) >> 16"
TO_FLOAT16 = "            return x.astype(dtype)"
small, small_float16 = "compensated/small-bfloat16-model", "compensated/small-float16-model"

added_late = (
    "theta[...] = rounded(new, theta.dtype)\n"
    "        if compensation is not None:\n"
    "            theta[...] = rounded(widen(theta) + widen(compensation), theta.dtype)"
)
float16_toward_0 = (
    "            near = x.astype(dtype)\n"
    "            below = np.nextafter(near, np.float16(0)) if dtype == np.float16 else near\n"
    "            return np.where(np.abs(near) > np.abs(x), below, near)"
)
wide_too = (
    "new = widen(rounded(new, BFLOAT16)) if compensation is None else new\n"
    "        theta[...] = rounded(new, theta.dtype)"
)
of_16_bits = "[(x, p) for x, p in zip(squares, params) if x is not None and p.itemsize == 2]"
apart = f"mean(sum(x for x, _ in {of_16_bits}), sum(p.size for _, p in {of_16_bits}))"
mutant("no compensation", small, (KEPT, "pass"))
mutant("no compensation of float16", small_float16, (HAS_ONE, "self.compensated and p.dtype == BFLOAT16"))
mutant("no compensation of bfloat16", small, (HAS_ONE, "self.compensated and p.dtype == np.float16"))
mutant("the compensation not used", small, (VALUE, "value = widen(theta)"))
mutant("added after rounding", small, (VALUE, "value = widen(theta)"), (ROUNDED, added_late))
mutant("the remainder's sign turned", small, (KEPT, KEPT.replace("lost(new", "-lost(new")))
mutant(
    "the remainder of the parameter before",
    small_float16,
    (ROUNDED, f"before = widen(theta)\n        {ROUNDED}"),
    (KEPT, KEPT.replace("lost(new, widen(theta))", "lost(new, before)")),
)
mutant(
    "the remainder not decayed",
    "compensated/decay-large-bfloat16-model",
    ("new = value * (1 - lr * wd)", "new = value - widen(theta) * lr * wd"),
)
mutant(
    "the remainder of the value without decay",
    "compensated/decay-float16-model",
    (KEPT, KEPT.replace("lost(new", "lost(value - lr * m_hat / d")),
)
mutant("bfloat16 rounded toward 0", small, (TO_BFLOAT16, "bits >> 16"))
mutant("bfloat16 rounded away from 0", small, (TO_BFLOAT16, "bits + 0xFFFF >> 16"))
mutant("float16 rounded toward 0", small_float16, (TO_FLOAT16, float16_toward_0))
mutant("a remainder of infinity", "compensated/overflow-model", (FINITE, "finite = np.isfinite(new)"))
mutant("a remainder of a NaN", "compensated/propagate-model", (FINITE, "finite = ~np.isinf(theta)"))
mutant("wide parameters rounded", "compensated/mixed-model", (ROUNDED, wide_too))
mutant("s of 16 bits apart", "compensated/mixed-model", (UPDATE_CALL, UPDATE_CALL.replace(MEAN, apart)))
