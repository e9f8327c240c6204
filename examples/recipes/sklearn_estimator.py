"""An estimator for scikit-learn in plain NumPy, with the uncertainty of its predictions.

You want this if torch is more than you need: `fd.dropout` and `fd.dropout_backward` are all that a network in NumPy
takes. The estimator has scikit-learn's interface, so `clone`, `cross_val_score` and pipelines work. It has one method
more: `predict_uncertainty` predicts many times with dropout on and returns the mean and the standard deviation.

    python examples/recipes/sklearn_estimator.py --quick
"""

import argparse

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.model_selection import cross_val_score
from sklearn.utils.validation import check_is_fitted, validate_data

import fastdrop as fd


class DropoutRegressor(RegressorMixin, BaseEstimator):
    """Two layers with dropout between them, trained by Adam on the squared error of whole batches."""

    def __init__(self, hidden=64, p=0.1, epochs=300, rate=0.01, random_state=0):
        self.hidden, self.p, self.epochs, self.rate, self.random_state = hidden, p, epochs, rate, random_state

    def fit(self, X, y):
        X, y = validate_data(self, X, y, dtype=np.float32, y_numeric=True)
        generator = np.random.default_rng(self.random_state)
        sizes = (X.shape[1], self.hidden), (self.hidden,), (self.hidden,), ()
        self.weights_ = [generator.normal(0, 0.5, size).astype(np.float32) for size in sizes]
        means, squares = ([np.zeros_like(w) for w in self.weights_] for _ in range(2))
        masks = fd.Stream(self.random_state)  # a new mask at each call, the same sequence for the same seed
        for step in range(1, self.epochs + 1):
            before = X @ self.weights_[0] + self.weights_[1]
            hidden, mask = fd.dropout(np.maximum(before, 0), self.p, rng=masks)
            error = (hidden @ self.weights_[2] + self.weights_[3] - y) / len(y)
            grad = fd.dropout_backward(np.outer(error, self.weights_[2]), mask) * (before > 0)
            grads = X.T @ grad, grad.sum(0), hidden.T @ error, error.sum()
            for w, g, mean, square in zip(self.weights_, grads, means, squares, strict=True):
                mean += 0.1 * (g - mean)
                square += 0.001 * (g * g - square)
                w -= self.rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        return self

    def _forward(self, X, p=0.0, rng=None):
        hidden, _ = fd.dropout(np.maximum(X @ self.weights_[0] + self.weights_[1], 0), p, rng=rng)
        return hidden @ self.weights_[2] + self.weights_[3]

    def predict(self, X):
        check_is_fitted(self)
        return self._forward(validate_data(self, X, dtype=np.float32, reset=False))

    def predict_uncertainty(self, X, samples=100, random_state=0):
        """Mean and standard deviation of predictions with dropout on."""
        check_is_fitted(self)
        X, masks = validate_data(self, X, dtype=np.float32, reset=False), fd.Stream(random_state)
        drawn = np.stack([self._forward(X, self.p, masks) for _ in range(samples)])
        return drawn.mean(0), drawn.std(0, ddof=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    epochs = 200 if parser.parse_args().quick else 2000

    generator = np.random.default_rng(1)
    X = generator.uniform(-1, 1, (200, 3))
    y = np.sin(3 * X[:, 0]) + X[:, 1] ** 2 + 0.1 * generator.normal(size=200)
    model = DropoutRegressor(epochs=epochs)
    scores = cross_val_score(model, X, y, cv=3)
    print("R2 in three folds:", ", ".join(f"{score:.2f}" for score in scores))
    assert scores.min() > 0.7

    model.fit(X, y)
    assert np.array_equal(clone(model).fit(X, y).predict(X), model.predict(X))  # random_state decides all masks
    far = 3 * X
    mean, deviation = model.predict_uncertainty(X)
    print(f"deviation where data was: {deviation.mean():.2f}, three times as far out:", end=" ")
    print(f"{model.predict_uncertainty(far)[1].mean():.2f}")
    assert np.abs(mean - model.predict(X)).mean() < deviation.mean()
    assert model.predict_uncertainty(far)[1].mean() > deviation.mean()


if __name__ == "__main__":
    main()
