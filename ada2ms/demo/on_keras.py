"""The network in Keras 3, on whichever backend Keras runs, trained by that backend's own autodiff."""

from typing import Any

import keras
import numpy as np

from ada2ms.core import State
from ada2ms.demo.digits import Array
from ada2ms.tf import export_state, import_state, plain_layers


def network(weights: list[Array]) -> keras.Model:
    """Convolutions, then dense layers, of the given weights.

    They replace zeros, since JAX takes seconds to compile what draws random numbers.
    """
    kernels = weights[::2]
    dtype = str(kernels[0].dtype)
    layers: list[keras.Layer] = [keras.Input((8, 8, 1), dtype=dtype)]
    for i, kernel in enumerate(kernels):
        if kernel.ndim == 4:
            layers.append(
                keras.layers.Conv2D(
                    kernel.shape[-1], 3, padding="same", activation="silu", kernel_initializer="zeros", dtype=dtype
                )
            )
            layers.append(keras.layers.AveragePooling2D(2, dtype=dtype))
        else:
            if i == 0 or kernels[i - 1].ndim == 4:
                layers.append(keras.layers.Flatten(dtype=dtype))
            activation = "silu" if kernel is not kernels[-1] else None
            # Not Dense, which on torch multiplies float64 in float32, up to Keras 3.15 at least.
            dense = keras.layers.EinsumDense(
                "bi,io->bo",
                kernel.shape[-1],
                bias_axes="o",
                activation=activation,
                kernel_initializer="zeros",
                dtype=dtype,
            )
            layers.append(dense)
    model = keras.Sequential(layers)
    model.set_weights(weights)
    return model


class KerasTrainer:
    """A `Trainer`, by a custom training loop, since `fit` does not hand out gradients."""

    def __init__(self, weights: list[Array], optimizer: keras.optimizers.Optimizer) -> None:
        self.model = network(weights)
        self.optimizer = optimizer
        optimizer.build(self.model.trainable_variables)
        make = {"tensorflow": self._on_tensorflow, "jax": self._on_jax, "torch": self._on_torch}
        self._train = make[keras.backend.backend()]()

    def step(self, images: Array, labels: Array) -> tuple[float, list[Array]]:
        loss, gradients = self._train(images, labels)
        return float(loss), [np.array(keras.ops.convert_to_numpy(g)) for g in gradients]

    def parameters(self) -> list[Array]:
        return [np.array(w) for w in self.model.get_weights()]

    def predict(self, images: Array) -> Array:
        logits: Array = keras.ops.convert_to_numpy(self.model(images))
        likeliest: Array = logits.argmax(-1)
        return likeliest

    def export_state(self) -> State:
        return export_state(self.model, self.optimizer, **plain_layers(self.model))

    def import_state(self, state: State) -> None:
        import_state(self.model, self.optimizer, state, **plain_layers(self.model))

    @staticmethod
    def _loss(labels: Any, logits: Any) -> Any:
        losses = keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        return keras.ops.mean(losses)

    def _on_tensorflow(self) -> Any:
        import tensorflow as tf

        @tf.function  # type: ignore[untyped-decorator]
        def train(images: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = self._loss(labels, self.model(images, training=True))
            gradients = tape.gradient(loss, self.model.trainable_variables)
            self.optimizer.apply(gradients, self.model.trainable_variables)
            return loss, gradients

        return lambda images, labels: train(tf.constant(images), tf.constant(labels))

    def _on_torch(self) -> Any:
        import torch

        def train(images: Array, labels: Array) -> Any:
            self.model.zero_grad()
            loss = self._loss(keras.ops.convert_to_tensor(labels), self.model(images, training=True))
            loss.backward()
            gradients = [v.value.grad for v in self.model.trainable_variables]
            with torch.no_grad():
                self.optimizer.apply(gradients, self.model.trainable_variables)
            return loss.detach(), gradients

        return train

    def _on_jax(self) -> Any:
        import jax

        def loss_of(trainable: Any, images: Any, labels: Any) -> Any:
            logits, _ = self.model.stateless_call(trainable, [], images, training=True)
            return self._loss(labels, logits)

        @jax.jit
        def update(trainable: Any, state: Any, images: Any, labels: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(trainable, images, labels)
            trainable, state = self.optimizer.stateless_apply(state, gradients, trainable)
            return trainable, state, loss, gradients

        def train(images: Array, labels: Array) -> Any:
            trainable = [v.value for v in self.model.trainable_variables]
            state = [v.value for v in self.optimizer.variables]
            trainable, state, loss, gradients = update(trainable, state, images, labels)
            for variables, values in ((self.model.trainable_variables, trainable), (self.optimizer.variables, state)):
                for variable, value in zip(variables, values, strict=True):
                    variable.assign(value)
            return loss, gradients

        return train
