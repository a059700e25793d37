"""Ready mappings: the same model of plain layers in each framework, whose names and axes the backends know."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_support import FRAMEWORKS, LR, PAIRS, assert_equal_states, marked

from ada2ms.core import State, StateError

Array = Any


# No two sides of a kernel are equal, so that none can take another's place unseen. Kernels begin as zeros, where others
# would be compiled for seconds: every test gives them values by a state.


def torch_model() -> Any:
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.mix = nn.Conv1d(6, 8, 3, padding="same")
            self.image = nn.Sequential(
                nn.Conv2d(8, 6, (3, 2)),
                nn.Conv2d(6, 6, (1, 3), padding="same", groups=6, bias=False),
                nn.BatchNorm2d(6, eps=1e-3),
                nn.ConvTranspose2d(6, 4, (2, 3), stride=(2, 3)),
                nn.GroupNorm(2, 4, eps=1e-3),
            )
            self.volume = nn.Conv3d(4, 5, (1, 2, 3))
            self.norm = nn.LayerNorm(5, eps=1e-3)
            self.out = nn.Linear(5, 4)

        def forward(self, x: Any) -> Any:
            x = self.mix(self.words(x).transpose(1, 2)).unflatten(2, (4, 4))
            x = self.volume(self.image(x).unsqueeze(2))
            return self.out(self.norm(x.mean((2, 3, 4))))

    return Model().eval()  # BatchNorm by its running statistics


def keras_model() -> Any:
    import keras

    layers = keras.layers

    class Image(layers.Layer):  # type: ignore[misc]
        """A layer of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = [
                layers.Conv2D(6, (3, 2), kernel_initializer="zeros"),
                layers.DepthwiseConv2D((1, 3), padding="same", use_bias=False, depthwise_initializer="zeros"),
                layers.BatchNormalization(),
                layers.Conv2DTranspose(4, (2, 3), strides=(2, 3), kernel_initializer="zeros"),
                layers.GroupNormalization(2, epsilon=1e-3),
            ]

        def build(self, shape: Any) -> None:
            for layer in self.inner:
                layer.build(shape)
                shape = layer.compute_output_shape(shape)
            self.built = True

        def call(self, x: Any) -> Any:
            for layer in self.inner:
                x = layer(x)
            return x

    return keras.Sequential(
        [
            keras.Input((16,), dtype="int32"),
            layers.Embedding(11, 6, embeddings_initializer="zeros"),
            layers.Conv1D(8, 3, padding="same", kernel_initializer="zeros"),
            layers.Reshape((4, 4, 8)),
            Image(),
            layers.Reshape((1, 4, 9, 4)),
            layers.Conv3D(5, (1, 2, 3), kernel_initializer="zeros"),
            layers.GlobalAveragePooling3D(),
            layers.LayerNormalization(epsilon=1e-3),
            layers.Dense(4, kernel_initializer="zeros"),
        ]
    )


def nnx_model() -> Any:
    from flax import nnx

    class Model(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            zeros = nnx.initializers.zeros_init()
            conv = partial(nnx.Conv, kernel_init=zeros, rngs=rngs)
            transpose = partial(nnx.ConvTranspose, kernel_init=zeros, rngs=rngs)
            self.words = nnx.Embed(11, 6, embedding_init=zeros, rngs=rngs)
            self.mix = conv(6, 8, (3,))
            self.image = nnx.Sequential(
                conv(8, 6, (3, 2), padding="VALID"),
                conv(6, 6, (1, 3), feature_group_count=6, use_bias=False),
                nnx.BatchNorm(6, use_running_average=True, epsilon=1e-3, rngs=rngs),
                transpose(6, 4, (2, 3), strides=(2, 3), padding="VALID", transpose_kernel=True),
                nnx.GroupNorm(4, num_groups=2, epsilon=1e-3, rngs=rngs),
            )
            self.volume = conv(4, 5, (1, 2, 3), padding="VALID")
            self.norm = nnx.LayerNorm(5, epsilon=1e-3, rngs=rngs)
            self.out = nnx.Linear(5, 4, kernel_init=zeros, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.mix(self.words(x))
            x = self.image(x.reshape(-1, 4, 4, 8))
            return self.out(self.norm(self.volume(x[:, None]).mean((1, 2, 3))))

    return Model(nnx.Rngs(0))


class Modelled:
    """A model of plain layers with Ada2MS, over all of it or over the last layer."""

    def __init__(self, framework: str, *, last_only: bool = False) -> None:
        self.framework = framework
        if framework == "torch":
            from ada2ms.torch import Ada2MS, plain_layers

            self.model = torch_model()
            self.optimizer: Any = Ada2MS((self.model.out if last_only else self.model).parameters(), lr=LR)
            self.mappings = plain_layers(self.model)
        elif framework == "jax":
            pytest.importorskip("flax", reason="flax is not installed")
            from flax import nnx

            from ada2ms.jax import ada2ms
            from ada2ms.jax import plain_layers as layers_of_nnx

            self.model = nnx_model()
            trained = nnx.All(nnx.Param, nnx.PathContains("out")) if last_only else nnx.Param
            self.optimizer = nnx.Optimizer(self.model, ada2ms(LR), wrt=trained)
            self.mappings = layers_of_nnx(self.model)
        else:
            from ada2ms.tf import Ada2MS as KerasAda2MS
            from ada2ms.tf import plain_layers as layers_of_keras

            self.model = keras_model()
            for layer in self.model.layers[:-1]:
                layer.trainable = not last_only
            self.optimizer = KerasAda2MS(LR)
            self.optimizer.build(self.model.trainable_variables)
            self.mappings = layers_of_keras(self.model)

    def export_state(self) -> State:
        if self.framework == "torch":
            from ada2ms.torch import export_state

            return export_state(self.model, self.optimizer, **self.mappings)
        if self.framework == "jax":
            from flax import nnx

            from ada2ms.jax import export_state as export_from_jax

            return export_from_jax(
                nnx.state(self.model, (nnx.Param, nnx.BatchStat)), self.optimizer.opt_state, **self.mappings
            )
        from ada2ms.tf import export_state as export_from_keras

        return export_from_keras(self.model, self.optimizer, **self.mappings)

    def import_state(self, state: State) -> Any:
        if self.framework == "torch":
            from ada2ms.torch import import_state

            return import_state(self.model, self.optimizer, state, **self.mappings)
        if self.framework == "jax":
            from flax import nnx

            from ada2ms.jax import import_state as import_to_jax

            params, self.optimizer.opt_state, report = import_to_jax(
                nnx.state(self.model, (nnx.Param, nnx.BatchStat)), self.optimizer.opt_state, state, **self.mappings
            )
            nnx.update(self.model, params)
            return report
        from ada2ms.tf import import_state as import_to_keras

        return import_to_keras(self.model, self.optimizer, state, **self.mappings)

    def __call__(self, x: Array) -> Array:
        if self.framework == "torch":
            import torch

            return self.model(torch.tensor(x)).detach().numpy()
        if self.framework == "jax":
            from flax import nnx

            return np.asarray(nnx.jit(lambda model, x: model(x))(self.model, x))
        import keras

        return keras.ops.convert_to_numpy(self.model(x))


LAYERS = [
    "0.embedding.table",
    *("1.conv.kernel", "1.conv.bias", "2.conv.kernel", "2.conv.bias", "3.conv.kernel"),
    *("4.norm.scale", "4.norm.bias", "5.conv_transpose.kernel", "5.conv_transpose.bias", "6.norm.scale", "6.norm.bias"),
    *("7.conv.kernel", "7.conv.bias", "8.norm.scale", "8.norm.bias", "9.dense.kernel", "9.dense.bias"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_plain_layers_need_no_mapping_by_hand(first: str, second: str) -> None:
    """The second model, given the first one's state, computes the same."""
    one, two = Modelled(first), Modelled(second)
    words = np.random.default_rng(0).integers(0, 11, (3, 16)).astype(np.int32)
    state = one.export_state()
    assert sorted(state.parameters) == sorted(LAYERS)
    rng = np.random.default_rng(1)
    for entry in state.parameters.values():
        entry.step = 5
        entry.param = rng.standard_normal(entry.exp_avg.shape).astype(np.float32)
        entry.exp_avg = rng.standard_normal(entry.exp_avg.shape).astype(np.float32)
        entry.exp_avg_sq = rng.random(entry.exp_avg.shape).astype(np.float32)
    state.groups[0].global_exp_avg_sq, state.groups[0].global_step = 0.5, 5
    assert sorted(state.extras) == ["4.norm.mean", "4.norm.var"]  # of BatchNorm
    state.extras = {name: x + rng.random(x.shape, np.float32) for name, x in state.extras.items()}
    one.import_state(state)
    report = two.import_state(one.export_state())
    assert_equal_states(state, two.export_state())
    assert two.export_state().groups[0].global_exp_avg_sq == 0.5
    assert all("moving_" in note for note in report.notes)  # Keras' statistics, which do not travel
    assert len(str(report).splitlines()) == len(LAYERS) + len(report.notes) + len(report.extras)
    assert sorted(origin for _, origin in report.extras) == sorted(state.extras)
    assert all(np.array_equal(two.export_state().extras[name], x) for name, x in state.extras.items())
    # Sums of some dozen products in another order, of numbers of about 10
    np.testing.assert_allclose(two(words), one(words), rtol=0, atol=1e-4)
    assert np.ptp(one(words)) > 1


def test_layers_that_are_not_plain_are_named() -> None:
    """And those that are given names are left to the user."""
    from torch import nn

    from ada2ms.torch import plain_layers

    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 4, 2), nn.Bilinear(1, 1, 3), nn.LayerNorm(4))
    with pytest.raises(StateError) as caught:
        plain_layers(model)
    assert [problem.split(",")[0] for problem in caught.value.problems] == ["'1'", "'2'"]
    names = {name: f"mine/{name}" for name, _ in model.named_parameters() if name[0] in "12"}
    mappings = plain_layers(model, names=names, axes={"2.weight": (2, 1, 0)})
    assert mappings["names"] == {
        **names,
        "0.weight": "0.dense.kernel",
        "0.bias": "0.dense.bias",
        "3.weight": "1.norm.scale",
        "3.bias": "1.norm.bias",
    }
    assert mappings["axes"] == {"0.weight": (1, 0), "2.weight": (2, 1, 0)}
    del names["1.bias"]
    with pytest.raises(StateError, match=r"give names= and.*\n.*'1', Bilinear, which has bias$"):
        plain_layers(model, names=names)


@pytest.mark.keras
def test_layers_of_keras_that_are_not_plain_are_named() -> None:
    import keras

    from ada2ms.tf import plain_layers

    layers = keras.layers
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.DepthwiseConv2D(3, depth_multiplier=2), layers.Dense(3)])
    with pytest.raises(StateError, match=r"DepthwiseConv2D, which has .*kernel, .*bias") as caught:
        plain_layers(model)
    assert len(caught.value.problems) == 1
    names = {v.path: v.path for v in model.layers[0].trainable_variables}
    assert set(plain_layers(model, names=names)["names"].values()) == {*names, "0.dense.kernel", "0.dense.bias"}


def test_layers_of_flax_that_are_not_plain_are_named() -> None:
    pytest.importorskip("flax", reason="flax is not installed")
    from flax import nnx

    from ada2ms.jax import plain_layers

    turned = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.ConvTranspose(2, 2, (3,), rngs=nnx.Rngs(0)))
    with pytest.raises(StateError, match="'layers/1', ConvTranspose, which has kernel, bias"):
        plain_layers(turned)
    names = {"layers/1/kernel": "turned", "layers/1/bias": "turned bias"}
    assert plain_layers(turned, names=names)["names"] == {
        **names,
        "layers/0/kernel": "0.dense.kernel",
        "layers/0/bias": "0.dense.bias",
    }


def test_layers_of_flax_that_are_shared() -> None:
    """Each has one number, that of where it was set first, and the name that `nnx.state` has for it."""
    pytest.importorskip("flax", reason="flax is not installed")
    from flax import nnx

    from ada2ms.jax import ada2ms, export_state, plain_layers

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.second = nnx.Linear(2, 2, rngs=rngs)
            self.first = self.second  # a layer, under a name that comes first by the alphabet
            self.table = nnx.Embed(4, 2, rngs=rngs)
            self.head = nnx.Linear(2, 4, rngs=rngs)
            self.head.kernel = self.table.embedding  # a parameter
            self.more = nnx.List([self.second, self.table])
            self.head.owner = self  # a circle

    model = Model(nnx.Rngs(0))
    mappings = plain_layers(model)
    assert mappings["names"] == {
        "first/kernel": "0.dense.kernel",
        "first/bias": "0.dense.bias",
        "head/kernel": "1.embedding.table",
        "head/bias": "2.dense.bias",
    }
    params = nnx.state(model, nnx.Param)
    state = export_state(params, ada2ms().init(params), **mappings)
    assert sorted(state.parameters) == sorted(mappings["names"].values())


@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_parameters_that_are_not_trained_stay_behind(framework: str) -> None:
    """Layers keep their numbers, whichever of them the optimizer has."""
    made = Modelled(framework, last_only=True)
    state = made.export_state()
    assert sorted(state.parameters) == ["9.dense.bias", "9.dense.kernel"]
    for entry in state.parameters.values():  # as no fresh model has them
        entry.param += 1.5
    other = Modelled(framework, last_only=True)
    assert len(other.import_state(state).rows) == 2
    assert_equal_states(state, other.export_state())


def test_layers_that_share_a_weight() -> None:
    from torch import nn

    from ada2ms.torch import Ada2MS, export_state, plain_layers

    model = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)])
    model[1].weight = model[0].weight
    state = export_state(model, Ada2MS(model.parameters()), **plain_layers(model))
    assert list(state.parameters) == ["0.embedding.table"]


def code(page: str, section: str) -> list[str]:
    """The first two pieces of Python of a page's section."""
    text = Path(__file__).parents[1].joinpath(page).read_text().partition(section)[2]
    return [part.partition("```")[0] for part in text.split("```python\n")[1:3]]


def test_the_readme_hands_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its two pieces of code, as they stand there, and on the page that says more."""
    first, second = code("README.md", "## Move a run between frameworks")
    assert code("docs/handoff.md", "# ") == [first, second]
    monkeypatch.chdir(tmp_path)
    one, two = Modelled("torch"), Modelled("jax")
    exec(first, {"model": one.model, "optimizer": one.optimizer})
    exec(second, {"model": two.model})
    assert "words/embedding" in capsys.readouterr().out
    words = np.arange(48, dtype=np.int32).reshape(3, 16) % 11
    np.testing.assert_allclose(two(words), one(words), rtol=0, atol=1e-5)
