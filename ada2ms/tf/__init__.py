"""Ada2MS for Keras 3, on its TensorFlow, JAX and torch backends: write it wherever `keras.optimizers.AdamW` stands.

    import keras
    from ada2ms.tf import Ada2MS

    model.compile(optimizer=Ada2MS(learning_rate=1e-3), loss="mse")

After this import, `model.compile(optimizer="ada2ms")` works too.
"""

from ada2ms._extras import require

require("keras", "tf")

try:
    import keras
except ModuleNotFoundError as error:  # of Keras' backend
    raise ImportError(
        f"ada2ms.tf needs a backend of Keras, and {error.name} is not installed: install it, or choose another by the "
        "environment variable KERAS_BACKEND (tensorflow, jax or torch)",
        name=error.name,
    ) from None

if int(keras.__version__.partition(".")[0]) < 3:
    raise ImportError(
        f"ada2ms.tf needs Keras 3, not Keras {keras.__version__} or tf_keras: pip install 'ada2ms[tf]'", name="keras"
    )

from ada2ms.tf.callback import Ada2MSLogger
from ada2ms.tf.layers import plain_layers
from ada2ms.tf.measurements import measure
from ada2ms.tf.optimizer import Ada2MS
from ada2ms.tf.receipt import export_gradients
from ada2ms.tf.trace import Recorder
from ada2ms.tf.transfer import arguments, export_state, import_state

__all__ = [
    "Ada2MS",
    "Ada2MSLogger",
    "Recorder",
    "arguments",
    "export_gradients",
    "export_state",
    "import_state",
    "measure",
    "plain_layers",
]
