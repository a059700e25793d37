"""A model of Hugging Face, with layers of its own, and its twin in flax.nnx: what `names` and `axes` it takes."""

from typing import Any

import numpy as np
import pytest
from handoff_models import in_mid_run
from handoff_support import LR

pytestmark = pytest.mark.slow  # `import transformers` takes longer than the test
WIDTH, HEADS, WORDS = 8, 2, 11


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=6,
        n_embd=WIDTH,
        n_head=HEADS,
        n_layer=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def twin() -> Any:
    """With attributes that are called as GPT-2's are, so that most of its layers match by their paths."""
    import jax.numpy as jnp
    from flax import nnx

    class Block(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.ln_1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.ln_2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
            self.c_fc = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.c_proj = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x: Any, mask: Any) -> Any:
            x = x + self.attn(self.ln_1(x), mask=mask)
            return x + self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x)), approximate=True))

    class GPT(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.wte = nnx.Embed(WORDS, WIDTH, rngs=rngs)
            self.wpe = nnx.Embed(6, WIDTH, rngs=rngs)
            self.h = nnx.List([Block(rngs) for _ in range(2)])
            self.ln_f = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

        def __call__(self, words: Any) -> Any:
            x = self.wte(words) + self.wpe(jnp.arange(words.shape[1]))
            mask = nnx.make_causal_mask(words)
            for block in self.h:
                x = block(x, mask)
            return self.wte.attend(self.ln_f(x))

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.transformer = GPT(rngs)

        def __call__(self, words: Any) -> Any:
            return self.transformer(words)

    return Model(nnx.Rngs(0))


def mappings_of_gpt2(model: Any) -> dict[str, Any]:
    """Its `Conv1D` is a Linear whose weight is not transposed; in the attention it is three in one."""
    from ada2ms.torch import plain_layers

    mappings: dict[str, Any] = dict(plain_layers(model, names="auto"))
    names, axes = mappings["names"], mappings["axes"]
    for i in range(model.config.n_layer):
        block = f"transformer.h.{i}"
        for here, there in (("weight", "kernel"), ("bias", "bias")):
            names[f"{block}.attn.c_attn.{here}"] = [
                f"{block}.attn.attention.{x}.{there}" for x in ("query", "key", "value")
            ]
            names[f"{block}.attn.c_proj.{here}"] = f"{block}.attn.attention.out.{there}"
            for layer in ("c_fc", "c_proj"):
                names[f"{block}.mlp.{layer}.{here}"] = f"{block}.{layer}.dense.{there}"
        axes[f"{block}.attn.c_attn.weight"] = lambda w: [x.reshape(WIDTH, HEADS, -1) for x in np.split(w, 3, axis=1)]
        axes[f"{block}.attn.c_attn.bias"] = lambda b: [x.reshape(HEADS, -1) for x in np.split(b, 3)]
        axes[f"{block}.attn.c_proj.weight"] = lambda w: [w.reshape(HEADS, -1, WIDTH)]
    return mappings


def test_gpt2_goes_on_in_flax() -> None:
    """The same logits, and the same parameters after a step; to some dozen roundings of float32."""
    import jax
    import torch
    from flax import nnx

    from ada2ms.jax import ada2ms, plain_layers
    from ada2ms.jax import export_state as export_from_jax
    from ada2ms.jax import import_state as import_to_jax
    from ada2ms.torch import Ada2MS, export_state, import_state

    model = gpt2()
    optimizer, mappings = Ada2MS(model.parameters(), lr=LR), mappings_of_gpt2(model)
    state = in_mid_run(export_state(model, optimizer, **mappings))
    import_state(model, optimizer, state, **mappings)
    words = np.random.default_rng(0).integers(0, WORDS, (2, 6))

    other = twin()
    graph, params = nnx.split(other, nnx.Param)
    rule, there = ada2ms(LR), plain_layers(other, names="auto")
    assert len(there["names"]) == 2 + 2 * (2 + 8 + 2 + 4) + 2
    params, opt_state, _ = import_to_jax(params, rule.init(params), state, **there)
    logits = model(torch.tensor(words)).logits
    np.testing.assert_allclose(nnx.merge(graph, params)(words), logits.detach().numpy(), rtol=0, atol=1e-5)

    (logits**2).mean().backward()
    optimizer.step()
    grads = jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(words) ** 2).mean()))(params)
    updates, opt_state = jax.jit(rule.update)(grads, opt_state, params)
    params = jax.tree.map(lambda p, u: p + u, params, updates)
    expected, found = export_state(model, optimizer, **mappings), export_from_jax(params, opt_state, **there)
    for name, entry in expected.parameters.items():
        for slot, array in entry.slots().items():
            np.testing.assert_allclose(found.parameters[name].slots()[slot], array, rtol=0, atol=1e-5, err_msg=name)
