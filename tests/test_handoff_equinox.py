"""Models of equinox, whose layers have the same names in a state as those of torch."""

from typing import Any

import numpy as np
import pytest
from handoff_models import in_mid_run
from handoff_support import LR

from ada2ms.core import StateError
from support import settings


def torch_model() -> Any:
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding="same")
            self.act = nn.PReLU()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.cell = nn.LSTMCell(8, 6)
            self.heads = nn.ModuleList([nn.Linear(6, 3)])
            nn.init.zeros_(self.cell.bias_hh).requires_grad_(False)

        def forward(self, words: Any) -> Any:
            x = self.act(self.conv(self.table(words).T[None])[0].T)
            x = self.norm(x + self.attention(x[None], x[None], x[None])[0][0])
            state = None
            for each in x:
                state = self.cell(each[None], state)
            return self.heads[0](state[0][0])

    return Model().double()


def equinox_model() -> Any:
    """Of zeros, since what draws random numbers is compiled for seconds."""
    import jax
    import jax.numpy as jnp

    eqx = pytest.importorskip("equinox")

    def zeros(x: Any) -> Any:
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(zeros, eqx.filter_eval_shape(random_model))


def random_model() -> Any:
    import jax
    import jax.numpy as jnp

    eqx = pytest.importorskip("equinox")
    nn, key = eqx.nn, jax.random.key(0)
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}

    class Model(eqx.Module):  # type: ignore[misc]
        table: Any
        conv: Any
        act: Any
        attention: Any
        norm: Any
        cell: Any
        heads: list[Any]

        def __call__(self, words: Any) -> Any:
            x = self.act(self.conv(jax.vmap(self.table)(words).T).T)
            x = jax.vmap(self.norm)(x + self.attention(x, x, x))
            state = jnp.zeros(6), jnp.zeros(6)
            for each in x:
                state = self.cell(each, state)
            return self.heads[0](state[0])

    return Model(
        nn.Embedding(11, 8, key=key),
        nn.Conv1d(8, 8, 3, padding="SAME", key=key),
        nn.PReLU(jnp.zeros((), float)),
        nn.MultiheadAttention(2, 8, **biases, key=key),
        nn.LayerNorm(8),
        nn.LSTMCell(8, 6, key=key),
        [nn.Linear(6, 3, key=key)],
    )


def test_a_run_goes_from_torch_to_equinox_and_back() -> None:
    import torch

    from ada2ms.torch import Ada2MS, export_state, import_state, plain_layers

    eqx = pytest.importorskip("equinox")
    import jax
    import optax

    from ada2ms import jax as ours

    words, target = np.arange(5) * 3 % 11, np.array([1.0, -1.0, 0.5])
    one = torch_model()
    optimizer = Ada2MS([p for p in one.parameters() if p.requires_grad], lr=LR)
    state = in_mid_run(export_state(one, optimizer, **plain_layers(one)))
    import_state(one, optimizer, state, **plain_layers(one))

    with settings("jax", "float64", "cpu"):
        model = equinox_model()
        params, static = eqx.partition(model, eqx.is_array)
        rule = ours.ada2ms(LR)
        mappings = ours.plain_layers(model)
        params, opt_state, report = ours.import_state(params, rule.init(params), state, **mappings)
        assert set(mappings["names"]) == {name for name, *_ in report.rows}
        found = jax.jit(lambda params: eqx.combine(params, static)(words))(params)
        np.testing.assert_allclose(found, one(torch.tensor(words)).detach().numpy(), rtol=0, atol=1e-12)

        @jax.jit
        def update(params: Any, opt_state: Any) -> Any:
            grads = jax.grad(lambda params: ((eqx.combine(params, static)(words) - target) ** 2).mean())(params)
            return rule.update(grads, opt_state, params)

        updates, opt_state = update(params, opt_state)
        there = ours.export_state(optax.apply_updates(params, updates), opt_state, **mappings)
    ((one(torch.tensor(words)) - torch.tensor(target)) ** 2).mean().backward()
    optimizer.step()
    here = export_state(one, optimizer, **plain_layers(one))
    for name, entry in here.parameters.items():
        for slot, array in entry.slots().items():
            np.testing.assert_allclose(there.parameters[name].slots()[slot], array, rtol=0, atol=1e-9, err_msg=name)


def test_layers_of_equinox_by_their_names() -> None:
    """Those that are not known are named; a GRU has two biases in one gate alone."""
    import jax

    eqx = pytest.importorskip("equinox")

    from ada2ms.jax import plain_layers

    nn, key = eqx.nn, jax.random.key(0)
    turned = nn.Sequential([nn.Linear(2, 2, key=key), nn.ConvTranspose1d(2, 2, 3, key=key)])
    with pytest.raises(StateError, match="'layers/1', ConvTranspose1d, which has weight, bias"):
        plain_layers(turned)
    names = plain_layers(nn.GRUCell(2, 3, key=key), names="auto")["names"]
    assert names["bias"] == ("gru.r.bias", "gru.z.bias", "gru.n.input_bias")
    assert names["bias_n"] == "gru.n.recurrent_bias"
    assert plain_layers(turned.layers[0])["axes"] == {"weight": (1, 0)}
    assert plain_layers(nn.MLP(2, 2, 2, 1, key=key), names="auto")["names"]["layers/1/weight"] == "1.dense.kernel"
