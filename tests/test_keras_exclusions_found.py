"""What weight decay leaves out, where the variables of now are not those of before: found by name, or else said."""

import re
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from ada2ms.tf import Ada2MS
from ada2ms.tf.exclusions import Exclusions

pytestmark = pytest.mark.keras


def net(*names: str) -> Any:
    return keras.Sequential([keras.Input((3,)), *[layers.Dense(3, name=name) for name in names]], name="net")


def blocks(*numbers: int) -> list[str]:
    return [f"block_{i}/{name}" for i in numbers for name in ("kernel", "bias")]


def excluded(optimizer: Any) -> list[str]:
    return sorted(optimizer._trainable_variables[i].path for i in optimizer._excluded)


def configured_again(optimizer: Any, variables: list[Any]) -> list[str]:
    other = Ada2MS.from_config(optimizer.get_config())
    other.build(variables)
    return excluded(other)


@pytest.mark.parametrize("how", ["var_list", "a name", "a path"])
def test_names_that_a_user_has_numbered_stay_what_they_are(how: str) -> None:
    """Though the next training is of as many variables: one block is frozen for it, and another no longer is."""
    model = net("block_1", "block_2", "block_3")
    first, second, third = model.layers
    given = Ada2MS(weight_decay=0.1)
    arguments = {
        "var_list": {"var_list": second.trainable_variables},
        "a name": {"var_names": ["block_2"]},
        "a path": {"var_names": ["block_2/(bias|kernel)$"]},
    }
    given.exclude_from_weight_decay(**arguments[how])
    given.build([*first.trainable_variables, *second.trainable_variables])
    assert configured_again(given, [*second.trainable_variables, *third.trainable_variables]) == sorted(
        v.path for v in second.trainable_variables
    )


@keras.saving.register_keras_serializable("test_exclusions_found")
class Block(layers.Dense):  # type: ignore[misc]
    """Named by a user as Keras would: `Block(name="block_1")`."""


def test_names_of_a_user_may_be_like_those_of_keras() -> None:
    given = Exclusions(var_list=("block_2/kernel",)).built(blocks(1, 2), {2})
    keras.backend.clear_session()
    now = blocks(2, 3)
    assert (given.found(now), given.in_doubt(now)) == ({0}, [])
    by_name = Exclusions(var_names=("block_1", "block_2")).built(blocks(1, 2, 3), {0, 1, 2, 3})
    assert (by_name.found(blocks(2, 3, 4)), by_name.in_doubt(blocks(2, 3, 4))) == ({0, 1}, blocks(1))
    made = [Block(3) for _ in range(4)]  # and now Keras has counted to three itself, so that either may be meant
    assert made[-1].name == "block_3"
    assert (given.found(now), given.in_doubt(now)) == ({2}, ["block_2/kernel"])


def test_a_layer_of_another_place_is_not_taken() -> None:
    backbone, head = net("dense"), layers.Dense(1, name="dense")
    x = keras.Input((3,))
    model = keras.Model(x, head(backbone(x)))
    given = Ada2MS()
    given.exclude_from_weight_decay(var_list=[backbone.trainable_variables[0]])
    given.build(model.trainable_variables)
    assert len(excluded(given)) == 1
    backbone.trainable = False
    assert configured_again(given, model.trainable_variables) == []


TWO = ["a/d/kernel", "b/d/kernel", "c/kernel"]
ONE = ["a/d/kernel", "c/kernel", "c/bias"]
CASES = {
    # (excluded before, variables before, variables now): (excluded now, in doubt)
    "two places": (["a/d/kernel"], TWO, ["d/kernel", "d/kernel"], [], ["a/d/kernel"]),
    "one of two places": (["a/d/kernel"], TWO, ["d/kernel", "x/kernel", "y/bias"], [], ["a/d/kernel"]),
    "both of two": (TWO[:2], TWO, ["d/kernel", "x/bias"], ["d/kernel"], []),
    "one place": (["c/e/kernel"], ["c/e/kernel", *TWO[:2]], ["e/kernel", "b/d/kernel"], ["e/kernel"], []),
    "two places now": (ONE[:1], ONE, ["d/kernel", "d/kernel"], [], ["a/d/kernel"]),
    "its beginning is still there": (ONE[:1], ONE, ["a/e/kernel", "d/kernel"], [], ["a/d/kernel"]),
    "the place of another": (
        ["a/d/kernel", "d/kernel"],
        ["a/d/kernel", "d/kernel", "e"],
        ["d/kernel", "x"],
        [0],
        ONE[:1],
    ),
    "twice": (["d/kernel"], ["d/kernel", "e"], ["d/kernel", "d/kernel", "f"], [0, 1], ["d/kernel"]),
    "another beginning": (["d/kernel"], ["d/kernel", "e/kernel"], ["net/d/kernel"], ["net/d/kernel"], []),
    "frozen": (["a/d/kernel"], TWO, TWO[1:], [], []),
    "frozen, and another": (["a/d/kernel"], TWO, [*TWO[1:], "x/kernel", "y/bias"], [], ["a/d/kernel"]),
    "numbered by Keras": (["m/dense/bias"], ["m/dense/bias", "m/dense_1/bias"], ["dense_5/bias"], [], ["m/dense/bias"]),
    "and as many": (["m/dense/bias"], ["m/dense/bias", "m/dense_1/bias"], ["dense_5/bias", "dense_6/bias"], [0], []),
    "of two directions": (["forward_lstm/bias"], ["forward_lstm/bias", "e"], ["forward_lstm_2/bias", "e"], [0], []),
    "numbered by the user": (["b_1/bias"], ["b_1/bias", "b_2/bias"], ["b_2/bias", "b_3/bias"], [], ["b_1/bias"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_path_is_found_only_where_nothing_else_can_be_meant(case: str) -> None:
    before, variables, now, expected, doubtful = CASES[case]
    given = Exclusions(var_list=tuple(before)).built(variables, {variables.index(x) for x in before})
    assert given.found(now) == {i if isinstance(i, int) else now.index(i) for i in expected}
    assert given.in_doubt(now) == doubtful


def test_regular_expressions_go_for_the_paths_of_now() -> None:
    given = Exclusions(var_names=("bias$", "^net/out/")).built(["net/a/kernel", "net/a/bias", "net/out/kernel"], {1, 2})
    now = ["net/a/kernel", "net/b/bias", "net/c/bias", "net/out/kernel"]
    assert (given.found(now), given.in_doubt(now)) == ({1, 2, 3}, [])
    # One that matches nothing any more: what it matched is found by its path.
    without_scope = ["b/kernel", "b/bias", "out/kernel", "c/bias"]
    assert (given.found(without_scope), given.in_doubt(without_scope)) == ({1, 2, 3}, [])
    assert given.in_doubt(["b/kernel"]) == ["net/a/bias", "net/out/kernel"]


def test_what_is_not_found_is_said() -> None:
    variables = net("one", "two").trainable_variables
    given = Ada2MS(name="mine")
    given.exclude_from_weight_decay(var_list=variables[:1], var_names=["two/bias"])
    given.build(variables)
    message = (
        r"mine: weight decay was to exclude ['net/one/kernel'], which in this optimizer's variables are nowhere, or "
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        assert configured_again(given, net("other", "two").trainable_variables) == ["net/two/bias"]
    said = next(str(w.message) for w in caught if "mine" in str(w.message))
    assert "excluded are ['net/two/bias']" in said
    assert "call exclude_from_weight_decay again" in said


@keras.saving.register_keras_serializable("test_exclusions_found")
class Model(keras.Model):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.first, self.last = layers.Dense(3), layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.last(self.first(x))


@pytest.mark.parametrize("built", [False, True])
def test_a_model_saved_before_its_optimizer_is_built(built: bool, tmp_path: Path) -> None:
    """Layers are numbered anew, and nothing but their paths tells which: that is said, where it can be."""
    keras.backend.clear_session()
    model = Model()
    model(np.ones((2, 3), "float32"))
    optimizer = Ada2MS(0.125)
    optimizer.exclude_from_weight_decay(var_list=[model.first.bias])
    if built:
        optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save(tmp_path / "model.keras")
    assert any("Build the optimizer first" in str(w.message) for w in caught) == (not built)
    for _ in range(3):
        layers.Dense(1)
    if built:
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert excluded(loaded.optimizer) == [loaded.first.bias.path]
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = keras.saving.load_model(tmp_path / "model.keras")
            loaded.optimizer.build(loaded.trainable_variables)
        said = r"exclude \['.*dense/bias'\], which in this optimizer's variables are nowhere"
        assert any(re.search(said, str(w.message)) for w in caught)
        assert excluded(loaded.optimizer) == []


def test_names_that_last_need_no_optimizer_that_is_built() -> None:
    optimizer = Ada2MS()
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="stem")], name="net")
    optimizer.exclude_from_weight_decay(var_list=model.trainable_variables[1:])
    assert configured_again(optimizer, model.trainable_variables) == ["net/stem/bias"]
    optimizer.exclude_from_weight_decay(var_names=["dense"])
    optimizer.get_config()
