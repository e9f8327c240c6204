"""A network in NumPy with dropout between its layers: the model of demo.py, and an example of how fastdrop is used.

Rectifiers and dropout work in place, so a hidden layer keeps only its activations and its mask for backward.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.contenders import numpy_dropout, numpy_dropout_backward
from fastdrop import PackedMask, SeededMask, Stream, dropout, dropout_backward

Array = NDArray[Any]

MOMENTUM = 0.9


class Dropout(Protocol):
    def forward(self, h: Array) -> Array: ...
    def backward(self, dh: Array) -> Array: ...


class FastDropout:
    """fastdrop, in place: keeps one bit per element. p = 0 does nothing and keeps nothing."""

    def __init__(self, p: float, rng: Stream) -> None:
        self.p, self.rng = p, rng
        self.mask: PackedMask | SeededMask | None = None

    def forward(self, h: Array) -> Array:
        h, self.mask = dropout(h, self.p, rng=self.rng, out=h)
        return h

    def backward(self, dh: Array) -> Array:
        return dropout_backward(dh, self.mask, out=dh)


class NumpyDropout:
    """The same layer as people write it without a library: keeps a byte per element."""

    def __init__(self, p: float, rng: np.random.Generator) -> None:
        self.p, self.rng = p, rng

    def forward(self, h: Array) -> Array:
        h, self.keep = numpy_dropout(h, self.p, self.rng)
        return h

    def backward(self, dh: Array) -> Array:
        return numpy_dropout_backward(dh, self.keep, self.p)


class MLP:
    """Rectified layers with a dropout layer after each, a linear layer, cross-entropy, momentum.

    Parameters
    ----------
    widths : tuple of int
        Inputs, hidden layers, classes.
    dropouts : list of Dropout, one per hidden layer
    rng : numpy.random.Generator
        Draws the weights.
    """

    def __init__(self, widths: tuple[int, ...], dropouts: list[Dropout], rng: np.random.Generator) -> None:
        self.dropouts = dropouts
        self.weights = [
            rng.standard_normal((n, m), np.float32) * np.float32(np.sqrt(2 / n))  # He et al. 2015
            for n, m in itertools.pairwise(widths)
        ]
        self.biases = [np.zeros(m, np.float32) for m in widths[1:]]
        self.speeds = [np.zeros_like(parameter) for parameter in self._parameters()]

    def _parameters(self) -> list[Array]:
        return self.weights + self.biases

    def step(self, x: Array, labels: Array, rate: float) -> None:
        """One step of gradient descent on a batch."""
        hidden = [x]
        for weight, bias, drop in zip(self.weights, self.biases, self.dropouts, strict=False):
            h = hidden[-1] @ weight
            h += bias
            np.maximum(h, 0, out=h)
            hidden.append(drop.forward(h))
        d = _softmax(hidden[-1] @ self.weights[-1] + self.biases[-1])
        d[np.arange(len(labels)), labels] -= 1
        d /= np.float32(len(labels))

        weight_gradients: list[Array] = []
        bias_gradients: list[Array] = []
        for layer in reversed(range(len(self.weights))):
            weight_gradients.insert(0, hidden[layer].T @ d)
            bias_gradients.insert(0, d.sum(axis=0))
            if layer:
                d = self.dropouts[layer - 1].backward(d @ self.weights[layer].T)
                d *= hidden[layer] > 0
        for parameter, speed, gradient in zip(
            self._parameters(), self.speeds, weight_gradients + bias_gradients, strict=True
        ):
            speed *= MOMENTUM
            gradient *= rate
            speed -= gradient
            parameter += speed

    def evaluate(self, x: Array, labels: Array) -> tuple[float, float]:
        """Mean cross-entropy and accuracy, without dropout."""
        h = x
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = np.maximum(h @ weight + bias, 0)
        probabilities = _softmax(h @ self.weights[-1] + self.biases[-1])
        likelihood = probabilities[np.arange(len(labels)), labels]
        loss = -np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).mean()
        return float(loss), float((probabilities.argmax(axis=1) == labels).mean())


def _softmax(z: Array) -> Array:
    e: Array = np.exp(z - z.max(axis=1, keepdims=True))
    e /= e.sum(axis=1, keepdims=True)
    return e
