"""The networks in which dropout saves work, each with the same network as others build it, and random data.

A function takes the drop probability and returns a network and its loss. It imports torch, so import it only where
torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastdrop.torch as fdt

from .models import SEED, Network

WIDTH, HEADS, BLOCKS = 256, 4, 4
SAMPLES, TOKENS = 32, 64
RANK, ADAPTERS, LORA_WIDTH, LORA_TOKENS = 16, 3, 1024, 2048
STEPS, SEQUENCES = 64, 32


class Attention(nn.Module):
    """The branch ``attention(norm(x))`` of a pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Masked(nn.Module):
    """``x + StochasticDepth(branch(x))``: the branch runs on all samples."""

    def __init__(self, branch: nn.Module, p: float) -> None:
        super().__init__()
        self.branch, self.drop = branch, fdt.StochasticDepth(p, "row")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop(self.branch(x))
        return y


def encoder(rates: Sequence[float], residual: Callable[[nn.Module, float], nn.Module]) -> Network:
    """Pre-norm blocks, 256 wide, of 4 heads and 1,024 hidden units, one for each rate; 32 x 64 tokens."""
    torch.manual_seed(SEED)
    blocks: list[nn.Module] = []
    for p in rates:
        mlp = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        blocks += [residual(Attention(), p), residual(nn.Sequential(nn.LayerNorm(WIDTH), *mlp), p)]
    x = torch.randn(SAMPLES, TOKENS, WIDTH)
    return nn.Sequential(*blocks), lambda model: model(x).square().mean()


class Adapted(nn.Module):
    """Frozen projections to query, key and value of one input, each with a LoRA adapter."""

    def __init__(self, drop: Callable[[], nn.Module] | None, p: float) -> None:
        super().__init__()
        self.p, self.drop = p, None if drop is None else drop()
        self.base = nn.ModuleList(nn.Linear(LORA_WIDTH, LORA_WIDTH) for _ in range(ADAPTERS))
        self.base.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(LORA_WIDTH, RANK, bias=False) for _ in range(ADAPTERS))
        self.up = nn.ModuleList(nn.Linear(RANK, LORA_WIDTH, bias=False) for _ in range(ADAPTERS))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            layers: Any = base, down, up
            total = total + self._layer(x, *layers).sum()
        return total

    def _layer(self, x: Tensor, base: nn.Linear, down: nn.Linear, up: nn.Linear) -> Tensor:
        if self.drop is None:
            return fdt.lora_linear(x, base.weight, base.bias, down.weight, up.weight, 2.0, self.p)
        y: Tensor = base(x) + up(down(self.drop(x))) * 2.0
        return y


def lora(drop: Callable[[], nn.Module] | None, p: float) -> Network:
    """Three adapters of rank 16 on 2,048 tokens, 1,024 wide. Without ``drop`` they are `lora_linear`'s."""
    torch.manual_seed(SEED)
    model = Adapted(drop, p)
    x = torch.randn(LORA_TOKENS, LORA_WIDTH, requires_grad=True)
    return model, lambda model: model(x)


def recurrent(build: Callable[..., nn.Module], hidden: int, **options: Any) -> Network:
    """One recurrent layer as wide as its input; 32 sequences of 64 steps."""
    torch.manual_seed(SEED)
    x = torch.randn(STEPS, SEQUENCES, hidden, requires_grad=True)
    return build(hidden, hidden, **options), lambda model: model(x)[0].square().mean()


def perceptron(batch: int, drop: Callable[[], nn.Module]) -> Network:
    """784-2048-2048-10 with dropout after both hidden layers."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), drop(), nn.Linear(2048, 2048), nn.ReLU(), drop(), nn.Linear(2048, 10)
    )
    x, labels = torch.randn(batch, 784), torch.randint(10, (batch,))
    return model, lambda model: nn.functional.cross_entropy(model(x), labels)
