"""Hugging Face's GPT-2 in mid-run to flax.nnx: `python examples/handoff_huggingface.py` takes some seconds.

A small GPT-2 of random weights, without a download, learns to count in torch. Half-way its parameters and optimizer
state go to a model of flax.nnx, which trains on; so does GPT-2 itself, to compare with.
"""

import argparse

import numpy as np
import optax
import torch
from flax import nnx
from transformers import GPT2Config, GPT2LMHeadModel

import ada2ms.jax
import ada2ms.torch

WIDTH, HEADS, LAYERS, WORDS, TIME = 16, 2, 2, 11, 8
SETTINGS = {"vocab_size": WORDS, "n_positions": TIME, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS}
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Block(nnx.Module):
    """Attributes are called as GPT-2's are, where its layers are known, so that these match by their paths."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.c_fc = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.c_proj = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask=mask)
        return x + self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x)), approximate=True))  # GPT-2's GELU is that by tanh


class GPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.wpe = nnx.Embed(TIME, WIDTH, rngs=rngs)
        self.h = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.ln_f = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)

    def __call__(self, words):
        x = self.wte(words) + self.wpe(np.arange(words.shape[1]))
        mask = nnx.make_causal_mask(words)
        for block in self.h:
            x = block(x, mask)
        return self.wte.attend(self.ln_f(x))


class Twin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.transformer = GPT(rngs)

    def __call__(self, words):
        return self.transformer(words)


def mappings_of_gpt2(model):
    """Its Conv1D, which `plain_layers` does not know, is a Linear with a weight of (inputs, outputs).

    That of the attention is query, key and value in one.
    """
    names, axes = {}, {}
    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        for here, there in (("weight", "kernel"), ("bias", "bias")):
            parts = [f"{block}.attn.attention.{x}.{there}" for x in ("query", "key", "value")]
            names[f"{block}.attn.c_attn.{here}"] = parts
            names[f"{block}.attn.c_proj.{here}"] = f"{block}.attn.attention.out.{there}"
            for layer in ("c_fc", "c_proj"):
                names[f"{block}.mlp.{layer}.{here}"] = f"{block}.{layer}.dense.{there}"
        axes[f"{block}.attn.c_attn.weight"] = lambda w: [x.reshape(WIDTH, HEADS, -1) for x in np.split(w, 3, axis=1)]
        axes[f"{block}.attn.c_attn.bias"] = lambda b: [x.reshape(HEADS, -1) for x in np.split(b, 3)]
        axes[f"{block}.attn.c_proj.weight"] = lambda w: [w.reshape(HEADS, -1, WIDTH)]
    mappings = ada2ms.torch.plain_layers(model, names="auto")
    return {"names": mappings["names"] | names, "axes": mappings["axes"] | axes}


def batch(step):
    """Words that count on from a random one, and those that follow each."""
    counting = np.random.default_rng(step).integers(0, WORDS, (16, 1)) + np.arange(TIME + 1)
    return counting[:, :-1] % WORDS, counting[:, 1:] % WORDS


def train_in_torch(model, optimizer, steps):
    for step in steps:
        words, targets = map(torch.tensor, batch(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(words).logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()


@nnx.jit
def update(model, optimizer, words, targets):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(words), targets).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="half in torch, half in flax (default: %(default)s)")
    half = parser.parse_args().steps // 2

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SETTINGS, **WITHOUT_DROPOUT, bos_token_id=0, eos_token_id=0))
    optimizer = ada2ms.torch.Ada2MS(model.parameters(), lr=2**-7)
    mappings = mappings_of_gpt2(model)
    train_in_torch(model, optimizer, range(half))
    state = ada2ms.torch.export_state(model, optimizer, **mappings)  # .save(file), if it is to go elsewhere

    twin = Twin(nnx.Rngs(0))
    there = ada2ms.jax.plain_layers(twin, names="auto")
    options = ada2ms.jax.arguments(state, there["names"])
    going_on = nnx.Optimizer(twin, ada2ms.jax.ada2ms(**options), wrt=nnx.Param)
    params = nnx.state(twin, nnx.Param)
    params, going_on.opt_state, report = ada2ms.jax.import_state(params, going_on.opt_state, state, **there)
    nnx.update(twin, params)
    print(f"{len(report.rows)} parameters handed over")
    words, _ = batch(half)
    logits = model(torch.tensor(words)).logits.detach().numpy()
    print(f"logits, largest difference {np.abs(twin(words) - logits).max():.1e}")

    for step in range(half, 2 * half):
        loss = update(twin, going_on, *batch(step))
    train_in_torch(model, optimizer, range(half, 2 * half))
    stayed = ada2ms.torch.export_state(model, optimizer, **mappings)
    found = ada2ms.jax.export_state(nnx.state(twin, nnx.Param), going_on.opt_state, **there, options=options)
    pairs = [
        (found.parameters[name].slots()[slot], array)
        for name, entry in stayed.parameters.items()
        for slot, array in entry.slots().items()
    ]
    print(f"loss after {2 * half} steps {loss:.3f}")
    print(f"from the run that stayed in torch, largest difference {max(np.abs(a - b).max() for a, b in pairs):.1e}")


if __name__ == "__main__":
    main()
