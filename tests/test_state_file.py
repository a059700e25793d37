"""The file of a state: whole, checked, readable by every later version."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from state_support import FIXTURE, FIXTURE_2, assert_equal, entry, per_tensor, written, written_2

from ada2ms.core import State, StateError
from ada2ms.core.state import Group

pytest.importorskip("safetensors", reason="safetensors is not installed")


@pytest.mark.parametrize("make", [written, written_2, per_tensor])
def test_what_is_saved_is_loaded(make: Any, tmp_path: Path) -> None:
    make().save(tmp_path / "a.safetensors")
    assert_equal(State.load(tmp_path / "a.safetensors"), make())
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_of_the_first_format_is_read() -> None:
    """Never write this file again: later versions must read what this one wrote."""
    assert_equal(State.load(FIXTURE), written())


def test_a_file_of_the_second_format_is_read() -> None:
    """Nor this one. The first format had none of what is new in it."""
    assert_equal(State.load(FIXTURE_2), written_2())
    first = State.load(FIXTURE)
    assert (first.max_norm, first.compensated, first.extras) == (None, False, {})
    assert all(entry.compensation is None for entry in first.parameters.values())


def test_arrays_that_are_not_contiguous_are_saved_as_they_are(tmp_path: Path) -> None:
    state = State({"a": entry((3, 4))}, [Group(["a"], {}, 0.5, 3)])
    state.parameters["a"].exp_avg = np.asfortranarray(state.parameters["a"].exp_avg)
    state.parameters["a"].param = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2].T
    state.save(tmp_path / "a.safetensors")
    assert_equal(State.load(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_complex_arrays_of_every_layout_are_saved_as_they_are(shape: tuple[int, ...], tmp_path: Path) -> None:
    e = entry(shape, "complex64")
    for slot, array in e.slots().items():
        setattr(e, slot, np.asfortranarray(array))
    state = State({"a": e}, [Group(["a"], {}, 0.5, 3)])
    state.save(tmp_path / "a.safetensors")
    assert_equal(State.load(tmp_path / "a.safetensors"), state)
    if e.exp_avg_sq.size:
        e.exp_avg_sq[...] = -1j
        with pytest.raises(StateError, match=r"'a': Invalid exp_avg_sq: an entry is -1.0"):
            State({"a": e}, state.groups)


@pytest.mark.parametrize("fixture", [FIXTURE, FIXTURE_2], ids=["1", "2"])
def test_every_damage_is_found(fixture: Path, tmp_path: Path) -> None:
    whole = fixture.read_bytes()
    file = tmp_path / "damaged.safetensors"
    for length in range(0, len(whole), 29):
        file.write_bytes(whole[:length])
        with pytest.raises(StateError, match="not a whole safetensors file"):
            State.load(file)
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StateError, match="Cannot read"):
            State.load(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros(2)}, file)
    with pytest.raises(StateError, match="not a state of Ada2MS"):
        State.load(file)
    save_file({"weight": np.zeros(2)}, file, {"format": "ada2ms-state", "format_version": "3"})
    with pytest.raises(StateError, match="its format version is '3'; readable: 1, 2"):
        State.load(file)
    with pytest.raises(FileNotFoundError, match="no file"):
        State.load(tmp_path / "none.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    written().save(file)

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        per_tensor().save(file)
    assert_equal(State.load(file), written())
    assert os.listdir(tmp_path) == ["a.safetensors"]
