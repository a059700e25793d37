"""Checkpoints of flax and Orbax as `ada2ms state` reads them: what `export_state` makes of the same, or one error."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import train, tree
from state_support import assert_equal

from ada2ms.cli import main
from ada2ms.core import State, StateError
from ada2ms.jax import ada2ms, export_state, import_state
from ada2ms.jax.checkpoint import read

serialization = pytest.importorskip("flax.serialization", reason="flax is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

SHAPES = {"bias": (2,), "kernel": (3, 2), "scale": ()}
Write = Callable[[Path, Any], Path]


def msgpack(folder: Path, content: Any) -> Path:
    file = folder / "run.msgpack"
    file.write_bytes(serialization.to_bytes(jax.device_get(content)))
    return file


def standard(folder: Path, content: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", content, force=True)
    return folder / "run"


def pytree(folder: Path, content: Any) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", content, force=True)
    return folder / "run"


def step_of_a_manager(folder: Path, content: Any) -> Path:
    with ocp.CheckpointManager(folder / "runs") as manager:
        manager.save(3, args=ocp.args.StandardSave(content))
        manager.wait_until_finished()
    return folder / "runs" / "3"


def items_of_a_manager(folder: Path, content: Any) -> Path:
    with ocp.CheckpointManager(folder / "parts") as manager:
        items = {name: ocp.args.StandardSave(x) for name, x in content.items()}
        manager.save(3, args=ocp.args.Composite(**items, about=ocp.args.JsonSave({"loss": 1.0})))
        manager.wait_until_finished()
    return folder / "parts" / "3"


WRITERS = (msgpack, standard, pytree, step_of_a_manager, items_of_a_manager)


OPTIMIZERS = {
    "adamw": optax.chain(optax.clip(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 9))),
    "ada2ms": ada2ms(0.1, nonfinite="skip"),
    "compensated": ada2ms(0.1, compensated=True),
}


@cache
def trained(kind: str) -> tuple[Any, Any]:
    """Parameters and state after three steps."""
    dtype = jnp.bfloat16 if kind == "compensated" else np.float32
    params = {"layers": [tree(0, dtype, SHAPES), tree(1, dtype, SHAPES)]}
    return train(OPTIMIZERS[kind], params, [jax.tree.map(lambda p, i=i: p * 0.5 + i, params) for i in range(3)])


def plain(state: State) -> State:
    """Without notes, which say where a state came from."""
    return replace(state, notes=[])


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_is_what_export_state_makes_of_the_run(
    write: Write, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, opt_state = trained(kind)
    path = write(
        tmp_path, {"params": params, "opt_state": opt_state, "average": params, "clock": {"step": np.int32(3)}}
    )
    to = tmp_path / "run.safetensors"
    assert main(["state", "convert", str(path), str(to)]) == 0
    shown = capsys.readouterr().out
    assert "Hyperparameters" in shown
    assert "Not read: 'average' of the checkpoint" in shown
    assert_equal(plain(State.load(to)), plain(export_state(params, opt_state)))
    fresh = jax.tree.map(jnp.zeros_like, params)
    found, found_state, _ = import_state(fresh, OPTIMIZERS[kind].init(fresh), State.load(to))
    jax.tree.map(np.testing.assert_array_equal, (found, found_state), (params, opt_state))


class Unsorted(NamedTuple):
    """JAX has its leaves in this order, Orbax in that of the alphabet."""

    weight: Any
    bias: Any


LAYERS = [{"w": np.ones(2, np.float32)} for _ in range(12)]  # the text "10" comes before "2"
NUMBERED = dict(enumerate(LAYERS))
TEXT = {str(i): layer for i, layer in enumerate(LAYERS)}
DIFFERING = ("steps", "s", "rows of s")  # of leaves without gradients, of scope "tensor", and of groups with another b2


def with_numbers_that_differ(kind: str, params: Any) -> dict[str, Any]:
    state = ada2ms().init(params)
    each = jnp.arange(1, len(state.steps) + 1)
    shape = (-1, 1) if kind == "rows of s" else (-1,)
    state = state._replace(steps=each) if kind == "steps" else state._replace(s=each.astype(np.float32).reshape(shape))
    return {"params": jax.tree.map(lambda p: p, params), "opt_state": state}


@pytest.mark.parametrize("kind", DIFFERING)
@pytest.mark.parametrize("params", [LAYERS, NUMBERED, TEXT], ids=["list", "numbered", "text"])
def test_flax_keeps_which_leaf_has_which_number(kind: str, params: Any, tmp_path: Path) -> None:
    content = with_numbers_that_differ(kind, params)
    state, expected = read(msgpack(tmp_path, content)), export_state(*content.values())
    assert_equal(plain(state), plain(expected))
    assert state.groups == expected.groups
    found = [state.parameters[f"{i}/w"] for i in sorted(range(12), key=str if params is TEXT else int)]
    numbers = {"steps": [x.step for x in found], "s": [x.global_exp_avg_sq for x in found]}
    numbers["rows of s"] = [group.global_exp_avg_sq for group in state.groups]
    assert numbers[kind] == list(range(1, 13))


@pytest.mark.parametrize("kind", DIFFERING)
def test_what_does_not_keep_which_leaf_has_which_number_is_refused(kind: str, tmp_path: Path) -> None:
    """But for lists, and where all have the same."""
    unsorted = Unsorted(np.ones(3, np.float32), np.ones(2, np.float32))
    for write, params in ((standard, NUMBERED), (standard, unsorted), (msgpack, unsorted)):
        with pytest.raises(StateError, match="in an order that it does not keep"):
            read(write(tmp_path, with_numbers_that_differ(kind, params)))
    content = with_numbers_that_differ(kind, LAYERS)
    assert_equal(plain(read(standard(tmp_path, content))), plain(export_state(*content.values())))
    state = read(standard(tmp_path, {"params": unsorted, "opt_state": ada2ms().init(unsorted)}))
    assert {name: entry.exp_avg.shape for name, entry in state.parameters.items()} == {"weight": (3,), "bias": (2,)}


@pytest.mark.parametrize("write", [msgpack, standard])
def test_a_model_of_nnx_with_running_statistics(write: Write, tmp_path: Path) -> None:
    """They are extras; boxes of arrays are no part of a name."""
    from flax import nnx

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    optimizer = nnx.Optimizer(model, ada2ms(0.1), wrt=nnx.Param)
    content = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    if write is msgpack:  # which takes dicts alone
        content = {name: nnx.to_pure_dict(x) for name, x in content.items()}
    state = read(write(tmp_path, content))
    extras = {f"layers/1/{name}": f"layers/1/{name}" for name in ("mean", "var")}
    expected = export_state(nnx.state(model, (nnx.Param, nnx.BatchStat)), optimizer.opt_state, extras=extras)
    assert_equal(plain(state), plain(expected))
    assert set(state.extras) == set(extras)
    assert state.parameters["layers/0/kernel"].param.any()


def test_moments_without_values(tmp_path: Path) -> None:
    _, opt_state = trained("ada2ms")
    state = read(msgpack(tmp_path, opt_state))
    assert all(entry.param is None for entry in state.parameters.values())
    assert "The checkpoint has no values of the parameters" in state.notes


MOMENTS = {"count": np.int32(1), "mu": {"w": np.ones(2)}, "nu": {"w": np.ones(2)}}
OURS = {**MOMENTS, "s": np.float32(1), "skipped": np.int32(0), "steps": np.int32([1])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"params": {"w": np.ones(2)}}, "it has 0 states of Ada2MS or Adam in it (must be 1); its keys are ['params']"),
        ([1, 2], "it has 0 states"),
        ({"a": MOMENTS, "b": MOMENTS}, "it has 2 states"),
        ({**MOMENTS, "nu_max": {"w": np.ones(2)}}, "(must be the fields of a state of Ada2MS or Adam)"),  # amsgrad
        ({**MOMENTS, "s": np.float32(1)}, "(must be the fields of a state of Ada2MS or Adam)"),
        ({"a": {"w": np.ones(2)}, "b": {"w": np.ones(2)}, "c": MOMENTS}, "any of ['a', 'b'] (one must be 'params')"),
        ({**MOMENTS, "mu": {"w": "text"}}, "mu of 'w' is not of floating-point numbers"),
        ({**MOMENTS, "mu": {"w": np.ones(2, np.int32)}}, "mu of 'w' is not of floating-point numbers"),
        ({**MOMENTS, "nu": {"w": np.ones(3)}}, "nu has other names or shapes than mu"),
        ({**MOMENTS, "nu": {"v": np.ones(2)}}, "nu has other names or shapes than mu"),
        ({**MOMENTS, "mu": {}, "nu": {}}, "of no parameter"),
        ({**MOMENTS, "count": np.ones(3)}, "count is array([1., 1., 1.]) (must be numbers of the shape ())"),
        ({**OURS, "steps": np.int32([1, 2])}, "(must be numbers of the shape (1,))"),
        ({**OURS, "s": np.ones((2, 1))}, "(must be numbers of the shape () or (1,) or (1, 1))"),
        ({**OURS, "compensation": {"v": np.ones(2)}}, "compensation has other names or shapes than mu"),
        ({**OURS, "compensation": {"w": np.ones(3)}}, "compensation has other names or shapes than mu"),
        ({**OURS, "steps": np.int32([-1])}, "-1"),
    ],
)
def test_trees_that_are_something_else(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(StateError) as error:
        read(msgpack(tmp_path, content))
    assert str(error.value).startswith("Cannot read ")
    assert message in str(error.value)


def test_files_and_folders_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one sentence, and nothing is written."""
    params, opt_state = trained("ada2ms")
    content = {"params": params, "opt_state": opt_state}
    whole, folder, step = (write(tmp_path, content) for write in (msgpack, standard, step_of_a_manager))
    cut, damaged, empty, lost = (tmp_path / name for name in ("cut.msgpack", "damaged", "empty", "lost"))
    cut.write_bytes(whole.read_bytes()[:-9])
    foreign = tmp_path / "foreign.msgpack"
    foreign.write_bytes(b"not a checkpoint")
    empty.mkdir()
    shutil.copytree(folder, damaged)
    (damaged / "_METADATA").write_text("{")
    standard(tmp_path / "one", {"w": np.ones(2)}).rename(lost)  # of several arrays, Orbax reads on in threads
    (lost / "manifest.ocdbt").unlink()
    before = sorted(tmp_path.rglob("*"))
    for file, to, message in (
        (cut, "a.safetensors", "flax.serialization.msgpack_restore: "),
        (foreign, "a.safetensors", "Cannot read"),
        (tmp_path / "none.msgpack", "a.safetensors", "There is no file or folder"),
        (tmp_path / "none", "a.safetensors", "its suffix must be one of"),
        (empty, "a.safetensors", "no tree of Orbax is in it"),
        (step.parent, "a.safetensors", "in its folders ['3'] (of a manager, give one step's)"),
        (damaged, "a.safetensors", "orbax.checkpoint: "),
        (lost, "a.safetensors", "orbax.checkpoint: "),
        (whole, "a.pt", "from JAX to torch"),
        (folder, "a.msgpack", "from JAX to JAX"),
    ):
        assert main(["state", "convert", str(file), str(tmp_path / to)]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
