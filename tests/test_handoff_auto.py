"""Layers that are called by their paths: `names="auto"`, in models that have the same ones."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from handoff_making import TIME, WIDTH, Row, new, vectors
from handoff_models import EXACT, Twin, in_mid_run
from handoff_support import PAIRS

from ada2ms.core import StateError


def torch_model() -> Any:
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.ModuleList([nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)])
            self.norm = nn.LayerNorm(WIDTH, eps=1e-5)

        def forward(self, x: Any) -> Any:
            return self.norm(x + self.fc[1](self.fc[0](x).tanh()))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.rnn = nn.LSTM(WIDTH, 4, batch_first=True, bidirectional=True)
            for bias in (self.rnn.bias_hh_l0, self.rnn.bias_hh_l0_reverse):
                nn.init.zeros_(bias).requires_grad_(False)
            self.position = nn.Parameter(self.blocks[0].norm.weight.new_zeros(TIME, WIDTH))

        def forward(self, x: Any) -> Any:
            x = x + self.position
            for block in self.blocks:
                x = block(x)
            return self.rnn(x)[0]

    return Model()


def keras_model() -> Any:
    """With attributes in another order."""
    import keras

    layers = keras.layers

    class Block(layers.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm = layers.LayerNormalization(epsilon=1e-5)
            self.fc = [layers.Dense(6, activation="tanh"), layers.Dense(WIDTH)]

        def call(self, x: Any) -> Any:
            return self.norm(x + self.fc[1](self.fc[0](x)))

    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.position = self.add_weight(shape=(TIME, WIDTH), name="position", initializer="zeros")
            self.rnn = layers.Bidirectional(layers.LSTM(4, return_sequences=True))
            self.blocks = [Block(), Block()]

        def call(self, x: Any) -> Any:
            x = x + self.position
            for block in self.blocks:
                x = block(x)
            return self.rnn(x)

    model = Model()
    model(vectors(0)[0])
    return model


def nnx_model() -> Any:
    from flax import nnx

    class Block(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, **new())
            self.fc = nnx.List([nnx.Linear(WIDTH, 6, **new()), nnx.Linear(6, WIDTH, **new())])

        def __call__(self, x: Any) -> Any:
            return self.norm(x + self.fc[1](nnx.tanh(self.fc[0](x))))

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.blocks = nnx.List([Block(), Block()])
            self.position = nnx.Param(np.zeros((TIME, WIDTH)))
            cells = [nnx.OptimizedLSTMCell(WIDTH, 4, **new("recurrent_kernel_init")) for _ in range(2)]
            self.rnn = nnx.Bidirectional(*(nnx.RNN(cell, rngs=nnx.Rngs(0)) for cell in cells), rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            x = x + self.position
            for block in self.blocks:
                x = block(x)
            return self.rnn(x)

    return Model()


AUTO = {"names": "auto"}
ROW = Row(
    {"torch": torch_model, "keras": keras_model, "jax": nnx_model},
    vectors,
    given={"torch": AUTO, "keras": AUTO, "jax": AUTO},
)
BLOCK = [f"{layer}.{role}" for layer in ("fc.0.dense", "fc.1.dense") for role in ("kernel", "bias")]
NAMES = {
    "position",
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in (*BLOCK, "norm.norm.scale", "norm.norm.bias")),
    *(
        f"rnn.{way}.{gate}.{role}"
        for way in ("0.lstm", "1.lstm_backwards")
        for gate in "ifgo"
        for role in ("kernel", "recurrent_kernel", "bias")
    ),
}


# JAX compiles for half a minute what torch shows as well.
SELDOM = [
    pytest.param(*pair, marks=[pytest.mark.keras, pytest.mark.slow]) for pair in (("keras", "jax"), ("jax", "keras"))
]


@pytest.mark.parametrize(
    ("first", "second"), [*(pair for pair in PAIRS if {*pair.values} != {"keras", "jax"}), *SELDOM]
)
def test_layers_are_called_by_their_paths(first: str, second: str) -> None:
    one, two = twin(first), twin(second)
    state = in_mid_run(one.export_state())
    assert set(state.parameters) == NAMES
    for each in (one, two):
        each.import_state(state)
    x, _ = vectors(5)
    assert np.ptp(one(x)) > 0.1
    np.testing.assert_allclose(two(x), one(x), rtol=0, atol=1e-12 if EXACT else 1e-5)


@cache
def twin(framework: str) -> Twin:
    return Twin(framework, ROW)


def test_paths_that_do_not_match_are_listed() -> None:
    from torch import nn

    from ada2ms.torch import Ada2MS, export_state, import_state, plain_layers

    one, two = nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ModuleDict({"b": nn.Linear(2, 2)})
    state = export_state(one, Ada2MS(one.parameters()), **plain_layers(one, names="auto"))
    with pytest.raises(StateError) as caught:
        import_state(two, Ada2MS(two.parameters()), state, **plain_layers(two, names="auto"))
    assert sorted(caught.value.problems) == [
        "missing: 'b.bias' (in the state 'b.dense.bias')",
        "missing: 'b.weight' (in the state 'b.dense.kernel')",
        "superfluous: 'a.dense.bias' is no parameter here",
        "superfluous: 'a.dense.kernel' is no parameter here",
    ]


def test_the_frameworks_own_layers_are_not_known_by_their_names() -> None:
    """What a parameter of theirs means, its name alone does not say."""
    from torch import nn

    from ada2ms.torch import plain_layers

    with pytest.raises(StateError, match="'', Bilinear, which has weight, bias"):
        plain_layers(nn.Bilinear(2, 2, 2), names="auto")
