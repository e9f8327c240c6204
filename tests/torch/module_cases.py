"""Modules that the tests of the torch face share, stand-ins for timm's and torchvision's among them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import torch
from torch import nn


class Calls(nn.Module):
    """A model out of a function of its modules and its input."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


class DropPath(nn.Module):
    """timm's, by name."""

    def __init__(self, drop_prob=0.1):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class StochasticDepth(nn.Module):
    """torchvision's, by name."""

    def __init__(self, p=0.1, mode="row"):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x):
        return x


class DropBlock2d(DropPath):
    """timm's, by name; torchvision's has p."""


def one_layer(cls, size=64):
    """A recurrent layer with dropout that does nothing, of which torch itself warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(size, size, 1, dropout=0.3)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_and_loaded}
