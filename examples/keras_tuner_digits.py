"""Which adaptivity? A search by KerasTuner: `KERAS_BACKEND=jax python examples/keras_tuner_digits.py`.

Trains a small network on handwritten digits with several adaptivities and learning rates. A search that is stopped
after its first trial and goes on has the same trials as one that was never stopped. (On Keras' TensorFlow backend
KerasTuner needs tensorboard as well.)
"""

import tempfile

import keras
import keras_tuner

from ada2ms.demo.digits import load
from ada2ms.keras import Ada2MS


def build(hp):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    rate = hp.Float("learning_rate", 1e-2, 1e-1, sampling="log")
    optimizer = Ada2MS(rate, adaptivity=hp.Float("adaptivity", 0.0, 1.0, step=0.25))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def search(folder, trials):
    """The hyperparameters of each trial, with its accuracy on digits that were not trained on."""
    data = load()
    tuner = keras_tuner.RandomSearch(build, "val_accuracy", max_trials=trials, seed=1, directory=folder)
    test = data.test_images, data.test_labels
    tuner.search(data.train_images, data.train_labels, validation_data=test, epochs=2, batch_size=64, verbose=0)
    return [(trial.hyperparameters.values, float(trial.score)) for _, trial in sorted(tuner.oracle.trials.items())]


def main() -> None:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as stopped:
        trials = search(whole, 3)
        search(stopped, 1)
        resumed = search(stopped, 3)
    for values, score in trials:
        print(f"adaptivity {values['adaptivity']}, learning rate {values['learning_rate']:.4f}: {score:.3f}")
    print(f"resumed, the same trials: {resumed == trials}")
    print(f"{keras.backend.backend()}: accuracy {max(score for _, score in trials):.3f}")


if __name__ == "__main__":
    main()
