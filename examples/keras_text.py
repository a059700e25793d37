"""A small text classifier with an Embedding, by `model.fit`, on whichever backend Keras runs.

    KERAS_BACKEND=torch python examples/keras_text.py

Tells reviews that praise from reviews that do not, where "not" turns a word into its contrary. The reviews are made
up from a few words, so there is nothing to download. Prints the accuracy on reviews that were not trained on.
"""

import keras
import numpy as np

from ada2ms.keras import Ada2MS

GOOD, BAD = ("good", "clever", "moving", "funny"), ("bad", "dull", "empty", "slow")
OTHER = ("the", "film", "was", "plot", "and", "then", "actors", "rather")
WORDS = {word: i for i, word in enumerate(("", "not", *GOOD, *BAD, *OTHER))}
LENGTH = 12


def reviews(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Word numbers, and 1 where most of the opinions praise."""
    rng = np.random.default_rng(seed)
    x, y = np.zeros((count, LENGTH), "int32"), np.zeros((count, 1), "float32")
    for i in range(count):
        words, score = list(rng.choice(OTHER, 6)), 0
        for _ in range(3):
            praise, negated = rng.random(2) < 0.5
            opinion = ["not"] * int(negated) + [rng.choice(GOOD if praise != negated else BAD)]
            place = rng.integers(len(words) + 1)
            while place > 0 and words[place - 1] == "not":  # it stays before its word
                place -= 1
            words[place:place] = opinion
            score += 1 if praise else -1
        x[i, : len(words)] = [WORDS[word] for word in words]
        y[i] = score > 0
    return x, y


def main() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(len(WORDS), 16),
            keras.layers.Conv1D(32, 2, activation="relu"),  # sees a word and the one before it
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    metric = keras.metrics.BinaryAccuracy(threshold=0.0)
    model.compile(optimizer=Ada2MS(learning_rate=5e-3, adaptivity=0.5), loss=loss, metrics=[metric])
    model.fit(*reviews(2000, seed=1), batch_size=50, epochs=8, verbose=0)
    _, accuracy = model.evaluate(*reviews(500, seed=2), verbose=0)
    print(f"{keras.backend.backend()}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
