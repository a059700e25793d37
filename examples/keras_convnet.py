"""A small convnet on handwritten digits, by `model.fit`, on whichever backend Keras runs.

    KERAS_BACKEND=jax python examples/keras_convnet.py

Prints the adaptivity after each epoch, and the accuracy on digits that were not trained on. A run that goes on from the
model that was saved half-way ends with the same numbers. Needs scikit-learn, which the digits come with.
"""

import tempfile
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ada2ms.core import NO_DECAY, Cosine
from ada2ms.keras import Ada2MS, Ada2MSLogger

EPOCHS, BATCH = 8, 32


def main() -> None:
    keras.utils.set_random_seed(0)
    digits = load_digits()
    images = digits.images[..., None].astype("float32") / 16
    x, x_test, y, y_test = train_test_split(images, digits.target, test_size=0.2, random_state=0)

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    # From AdamW to momentum SGD in the course of the training. Biases are not decayed.
    adaptivity = Cosine(1.0, 0.0, steps=EPOCHS * len(x) // BATCH)
    optimizer = Ada2MS(learning_rate=2e-3, adaptivity=adaptivity, groups=[NO_DECAY])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    half = EPOCHS // 2
    options = {"batch_size": BATCH, "verbose": 0, "shuffle": False}  # in one order, to compare
    first = model.fit(x, y, epochs=half, callbacks=[Ada2MSLogger()], **options)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "half.keras"))
        resumed = keras.saving.load_model(Path(folder, "half.keras"))
    second = model.fit(x, y, initial_epoch=half, epochs=EPOCHS, callbacks=[Ada2MSLogger()], **options)
    resumed.fit(x, y, initial_epoch=half, epochs=EPOCHS, **options)
    adaptivities = first.history["adaptivity"] + second.history["adaptivity"]
    print("adaptivity:", " ".join(f"{a:.2f}" for a in adaptivities))
    pairs = zip(model.get_weights(), resumed.get_weights(), strict=True)
    print(f"resumed half-way, largest difference {max(float(np.abs(p - q).max()) for p, q in pairs)}")
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"{keras.backend.backend()}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
