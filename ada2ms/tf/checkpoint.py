"""Checkpoints of Keras that need no program to be read, and the state of `ada2ms.core.state`."""

from pathlib import Path

import keras

from ada2ms.core.state import State, StateError
from ada2ms.tf.layers import plain_layers
from ada2ms.tf.transfer import export_state


def read(path: Path) -> State:
    """The state in a file of `model.save("run.keras")`, which describes the model and its optimizer as well.

    Parameters are called and laid out as by `plain_layers`: their paths are others once a model has been saved and
    loaded. Layers of one's own must be registered (`keras.saving.register_keras_serializable`); lambdas are refused.

    Raises:
        FileNotFoundError: there is no such file.
        StateError: it cannot be loaded, has no optimizer of which a state could be made, or layers that are not plain.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}")
    try:
        model = keras.saving.load_model(path)
    except Exception as error:  # of many kinds: zip's, JSON's, HDF5's, Keras' own
        raise StateError(
            f"Cannot read {str(path)!r}", [f"keras.saving.load_model: {type(error).__name__}: {error}"]
        ) from None
    if getattr(model, "optimizer", None) is None:
        raise StateError(f"Cannot read {str(path)!r}", ["its model was not compiled: it has no optimizer"])
    return export_state(model, model.optimizer, **plain_layers(model))
