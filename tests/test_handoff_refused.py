"""What no layout holds exactly is refused with the reason, before anything changes."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from handoff_attention import keras_attention, torch_attention
from handoff_making import WIDTH, Row, forward, keras_model, vectors
from handoff_models import EXACT, Twin, in_mid_run
from handoff_recurrent import keras_recurrent, nnx_recurrent, torch_recurrent
from handoff_support import marked

from ada2ms.core import State, StateError
from ada2ms.core.hyperparameters import Framework

Array = Any


def twin(framework: str, build: Callable[[], Any], **options: Any) -> Twin:
    return Twin(framework, Row({framework: build}, vectors), **options)


def assert_refused(state: State, other: Twin, message: str) -> list[str]:
    """Why, in one error, after which the other is as it was."""
    before = other.export_state()
    with pytest.raises(StateError, match=message) as caught:
        other.import_state(state)
    after = other.export_state()
    assert before.groups == after.groups
    for name, entry in before.parameters.items():
        for slot, array in entry.slots().items():
            assert np.array_equal(array, after.parameters[name].slots()[slot])
    return caught.value.problems


def test_two_trained_biases_are_no_single_one() -> None:
    """At the adaptivity 1 their sum goes twice as far; at others, s counts their gradients twice, for everything."""
    import torch

    def moved(one_bias: bool, adaptivity: float) -> tuple[Array, Array]:
        torch.manual_seed(0)
        made = twin(
            "torch", lambda: torch_recurrent("LSTM", one_bias=one_bias), adaptivity=adaptivity, weight_decay=0.0
        )
        lstm = made.model.inner
        with torch.no_grad():
            lstm.bias_ih_l0.copy_(torch.linspace(-1, 1, 24))
            lstm.bias_hh_l0.zero_()
        before = lstm.weight_ih_l0.detach().clone()
        made.step(*forward(0))
        bias = lstm.bias_ih_l0 + lstm.bias_hh_l0 - torch.linspace(-1, 1, 24)
        return bias.detach().numpy(), (lstm.weight_ih_l0 - before).detach().numpy()

    (one, weight), (two, same_weight) = moved(True, 1.0), moved(False, 1.0)
    np.testing.assert_allclose(two, 2 * one, rtol=1e-12 if EXACT else 1e-4)
    np.testing.assert_allclose(weight, same_weight, rtol=1e-12 if EXACT else 1e-4)
    (_, weight), (_, other_weight) = moved(True, 0.5), moved(False, 0.5)
    assert np.abs(other_weight / weight - 1).min() > 1e-3


@pytest.mark.keras
def test_two_trained_biases_in_one_are_refused() -> None:
    lstm, one = twin("torch", lambda: torch_recurrent("LSTM")), twin("keras", lambda: keras_recurrent("LSTM"))
    assert_refused(in_mid_run(lstm.export_state()), one, "biases: of '0.lstm.f.bias' two in the state, one here; where")
    assert_refused(in_mid_run(one.export_state()), lstm, "biases: of '0.lstm.f.bias' one in the state, two here; where")


def test_a_frozen_bias_that_is_not_zero_is_not_left_out() -> None:
    """The other is no single bias then; in the same model it goes on."""
    import torch

    model = torch_recurrent("RNN", one_bias=True)
    torch.nn.init.ones_(model.inner.bias_hh_l0)
    state = in_mid_run(twin("torch", lambda: model).export_state())
    assert sorted(state.parameters) == ["0.rnn.input_bias", "0.rnn.kernel", "0.rnn.recurrent_kernel"]
    assert_refused(state, twin("torch", lambda: torch_recurrent("RNN", one_bias=True)), "biases: of '0.rnn.bias'")
    twin("torch", lambda: model).import_state(state)


def test_the_only_bias_of_a_gru_is_that_of_its_inputs() -> None:
    """The recurrent one is multiplied by the reset gate; an LSTM's may be either, since they are added."""
    names = {}
    for kind in ("GRU", "LSTM"):
        model = torch_recurrent(kind)
        model.inner.bias_ih_l0.requires_grad_(False).zero_()
        names[kind] = {x.rpartition(".")[2] for x in twin("torch", model.train).export_state().parameters}
    assert names["GRU"] == {"kernel", "recurrent_kernel", "recurrent_bias"}
    assert names["LSTM"] == {"kernel", "recurrent_kernel", "bias"}


@pytest.mark.keras
def test_a_gru_that_resets_before_the_product_is_another_layer() -> None:
    state = in_mid_run(twin("torch", lambda: torch_recurrent("GRU")).export_state())
    other = twin("keras", lambda: keras_recurrent("GRU", reset_after=False))
    assert_refused(state, other, "layers: the first that differs is 0: 'gru' in the state, 'gru_reset_before' here")


@pytest.mark.keras
def test_a_direction_is_not_taken_for_a_layer() -> None:
    """Two layers of 8 units, and two directions of one, have the same shapes."""
    from torch import nn

    both = nn.RNN(WIDTH, WIDTH, bidirectional=True, bias=False)
    import keras

    layers = [keras.layers.SimpleRNN(WIDTH, use_bias=False, return_sequences=True) for _ in range(2)]
    stack = twin("keras", lambda: keras_model(lambda x: layers[1](layers[0](x))))
    assert_refused(
        in_mid_run(twin("torch", lambda: both).export_state()), stack, "is 1: 'rnn_backwards' in the state, 'rnn' here"
    )


@pytest.mark.keras
def test_heads_and_widths_that_differ_are_named_on_both_sides() -> None:
    import keras

    state = in_mid_run(twin("torch", lambda: torch_attention()).export_state())
    four = twin("keras", lambda: keras_model(lambda x: keras.layers.MultiHeadAttention(4, 2)(x, x)))
    problems = assert_refused(state, four, r"query/kernel' \(in the state '0.attention.query.kernel'\) has \(8, 4, 2\)")
    assert all("in the state (" in problem for problem in problems)
    assert len(problems) == 7  # all but the bias of the outputs
    back = assert_refused(
        in_mid_run(four.export_state()), twin("torch", lambda: torch_attention()), "'attention.in_proj_weight'"
    )
    assert back[0].endswith("has (24, 8), of which (8, 2, 4) for '0.attention.query.kernel'; in the state (8, 4, 2)")
    narrow = twin("torch", lambda: torch_recurrent("LSTM", bias=False))
    wide = twin("keras", lambda: keras_recurrent("LSTM", use_bias=False, units=7))
    wide_state = in_mid_run(wide.export_state())
    assert_refused(
        wide_state, narrow, r"weight_ih_l0.* has \(24, 8\), of which \(8, 6\) for '0.lstm.i.kernel'; in .*\(8, 7\)"
    )


@pytest.mark.keras
def test_a_tensor_with_its_own_global_second_moment_is_not_cut() -> None:
    """But where another has the same one in another order, it goes on: the gates of an LSTM."""
    packed = twin("torch", lambda: torch_attention(), scope="tensor")
    state = in_mid_run(packed.export_state())
    apart = twin("keras", lambda: keras_attention(), scope="tensor")
    assert_refused(
        state, apart, "scope: .* is but a part of the tensor .*, and with scope='tensor' each tensor has one"
    )
    assert_refused(in_mid_run(apart.export_state()), packed, "scope: 'attention.in_proj_weight' .* consists of several")

    gru, other = (twin("torch", lambda: torch_recurrent("GRU", bias=False), scope="tensor") for _ in range(2))
    keras_gru = twin("keras", lambda: keras_recurrent("GRU", use_bias=False), scope="tensor")
    state = in_mid_run(gru.export_state())
    assert sorted(state.parameters)[0] == "0.gru.n.kernel+0.gru.r.kernel+0.gru.z.kernel"
    for each in (gru, other, keras_gru):
        each.import_state(state)
        for seed in range(2):
            each.step(*forward(seed))
    found = [each.export_state() for each in (gru, other, keras_gru)]
    for name, entry in found[0].parameters.items():
        for slot, array in entry.slots().items():
            assert np.array_equal(array, found[1].parameters[name].slots()[slot])
            np.testing.assert_allclose(
                found[2].parameters[name].slots()[slot], array, rtol=0, atol=1e-12 if EXACT else 1e-6
            )


@pytest.mark.keras
def test_layers_of_keras_that_no_layout_holds_are_named() -> None:
    import keras

    from ada2ms.tf import plain_layers

    layers = keras.layers
    attention = layers.MultiHeadAttention(2, 4)
    model = keras_model(lambda x: attention(x, x))
    attention.query_dense.enable_lora(1)
    with pytest.raises(
        StateError, match=r"MultiHeadAttention, which has .*query/lora_kernel_a, .*query/lora_kernel_b$"
    ):
        plain_layers(model)
    summed = keras_model(layers.EinsumDense("btw,two->bo", (5,)))
    summed.layers[1].equation = "btw,two->b"  # over an axis of the kernel alone, which Keras refuses as yet
    with pytest.raises(StateError, match=r"EinsumDense, which has .*kernel"):
        plain_layers(summed)


@pytest.mark.keras
def test_a_scale_of_lora_in_keras_is_in_the_names() -> None:
    import keras

    from ada2ms.tf import plain_layers

    scaled = keras.layers.Dense(WIDTH)
    model = keras_model(scaled)
    if "lora_alpha" not in inspect.signature(scaled.enable_lora).parameters:
        pytest.skip("this Keras scales no LoRA")
    scaled.enable_lora(2, lora_alpha=4)
    assert {"0.dense.lora_a_scaled", "0.dense.lora_b_scaled"} < set(plain_layers(model)["names"].values())


def test_layers_of_flax_that_no_layout_holds_are_named() -> None:
    pytest.importorskip("flax", reason="flax is not installed")
    from flax import nnx

    from ada2ms.jax import plain_layers

    class Cell(nnx.LSTMCell):  # type: ignore[misc]
        """With a gate whose place nobody knows."""

        def __init__(self) -> None:
            super().__init__(2, 3, rngs=nnx.Rngs(0))
            self.peephole = nnx.Param(np.zeros(3))

    with pytest.raises(StateError, match="'cell', Cell, which has peephole"):
        plain_layers(nnx.RNN(Cell()))
    turned = nnx.LinearGeneral((2, 3), 4, axis=(-1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(StateError, match="LinearGeneral, which has kernel, bias"):
        plain_layers(turned)
    residual = nnx.SimpleCell(3, 3, residual=True, rngs=nnx.Rngs(0))
    assert plain_layers(residual)["names"]["dense_i/kernel"] == "0.rnn_residual.kernel"
    backwards = nnx.RNN(nnx.GRUCell(2, 3, rngs=nnx.Rngs(0)), reverse=True)
    assert plain_layers(backwards)["names"]["cell/dense_h/kernel"][0] == "0.gru_backwards.r.recurrent_kernel"


def test_a_gru_of_flax_has_one_bias() -> None:
    pytest.importorskip("flax", reason="flax is not installed")
    state = in_mid_run(twin("torch", lambda: torch_recurrent("GRU")).export_state())
    assert_refused(
        state, twin("jax", lambda: nnx_recurrent("GRUCell")), "biases: of '0.gru.n.bias' two in the state, one here"
    )


@pytest.mark.parametrize("framework", [marked(name) for name in ("torch", "keras", "optax")])
@pytest.mark.parametrize("model", [{"w": np.zeros(2)}, [np.zeros(2)], None], ids=["dictionary", "list", "None"])
def test_plain_layers_of_what_is_no_model(framework: Framework, model: Any) -> None:
    backend = {"torch": "torch", "keras": "tf", "optax": "jax"}[framework]
    with pytest.raises(TypeError, match=f"Invalid model: {type(model).__name__} .must be a "):
        importlib.import_module(f"ada2ms.{backend}").plain_layers(model)
