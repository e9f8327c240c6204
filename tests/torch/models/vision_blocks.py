"""Stand-ins of timm's and torchvision's residual blocks, which CI doesn't install.

Each has the name, the attributes and, in substance, the forward of the real block around parts that are small.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

VIT, SWIN, CONVNEXT = (f"timm.models.{name}" for name in ("vision_transformer", "swin_transformer", "convnext"))
EFFICIENT, DROP = "timm.models._efficientnet_blocks", "timm.layers.drop"
T_SWIN, T_CONVNEXT, T_EFFICIENT = (
    f"torchvision.models.{name}" for name in ("swin_transformer", "convnext", "efficientnet")
)
DEPTH = "torchvision.ops.stochastic_depth"
WIDTH, HEADS = 8, 2
TOKENS, IMAGES, IMAGES_LAST = (6, 5, WIDTH), (6, WIDTH, 4, 3), (6, 4, 3, WIDTH)
SHAPES: dict[type[nn.Module], tuple[int, ...]] = {}  # what each block takes


def theirs(module: str, shape: tuple[int, ...] = ()) -> Callable[[type], type]:
    """Puts a class under the name of its package."""

    def rename(cls: type) -> type:
        cls.__module__ = cls.forward.__module__ = module  # type: ignore[attr-defined]
        if shape:
            SHAPES[cls] = shape
        return cls

    return rename


def register(monkeypatch, *classes: type) -> None:
    """Makes classes ones that pickle finds."""
    for cls in classes:
        parts = cls.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[cls.__module__], cls.__name__, cls)


def mask(x, shape, p):
    return x.new_empty(shape).bernoulli_(1 - p)


@theirs(DROP)
class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = mask(x, (len(x),) + (1,) * (x.dim() - 1), self.drop_prob)
        return x * (kept / (1 - self.drop_prob) if self.scale_by_keep else kept)


@theirs(DEPTH)
class StochasticDepth(nn.Module):
    def __init__(self, p, mode="row"):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input):
        if self.p == 0.0 or not self.training:
            return input
        return input * mask(input, (len(input),) + (1,) * (input.dim() - 1), self.p) / (1 - self.p)


def path(p):
    return DropPath(p) if p else nn.Identity()


# ---- parts ----


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, attn_mask=None, is_causal=False):
        # Like timm's attention in windows, it can't take an empty batch.
        q, k, v = self.qkv(x).reshape(*x.shape[:-1], 3, HEADS, -1).flatten(1, -4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


def conv(kernel_size=1, groups=1):
    return nn.Conv2d(WIDTH, WIDTH, kernel_size, padding=kernel_size // 2, groups=groups)


def norm(batch):
    """What an EfficientNet has, or a norm in which samples don't influence each other."""
    return nn.BatchNorm2d(WIDTH) if batch else nn.GroupNorm(2, WIDTH)


# ---- timm ----


@theirs(VIT, TOKENS)
class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = nn.LayerNorm(WIDTH), Attention(), nn.PReLU(), path(p)
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(WIDTH), mlp(), nn.Identity(), path(p)

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


@theirs(VIT, TOKENS)
class ResPostBlock(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attn, self.norm1, self.drop_path1 = Attention(), nn.LayerNorm(WIDTH), path(p)
        self.mlp, self.norm2, self.drop_path2 = mlp(), nn.LayerNorm(WIDTH), path(p)

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal)))
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x


@theirs(SWIN, IMAGES_LAST)
class SwinTransformerBlock(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(WIDTH), Attention(), path(p)
        self.norm2, self.mlp, self.drop_path2 = nn.LayerNorm(WIDTH), mlp(), path(p)

    def _attn(self, x):
        return self.attn(x.roll(1, 1)).roll(-1, 1)

    def forward(self, x):
        B, H, W, C = x.shape
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        x = x.reshape(B, -1, C)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        x = x.reshape(B, H, W, C)
        return x


@theirs(CONVNEXT, IMAGES)
class ConvNeXtBlock(nn.Module):
    def __init__(self, p, use_conv_mlp=False, gamma=True):
        super().__init__()
        self.use_conv_mlp, self.conv_dw, self.shortcut = use_conv_mlp, conv(3, WIDTH), nn.Identity()
        self.norm = norm(False) if use_conv_mlp else nn.LayerNorm(WIDTH)
        self.mlp = conv() if use_conv_mlp else mlp()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1, WIDTH)) if gamma else None
        self.drop_path = path(p)

    def forward(self, x):
        shortcut = x
        x = self.conv_dw(x)
        if self.use_conv_mlp:
            x = self.norm(x)
            x = self.mlp(x)
        else:
            x = x.permute(0, 2, 3, 1)
            x = self.norm(x)
            x = self.mlp(x)
            x = x.permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        x = self.drop_path(x) + self.shortcut(shortcut)
        return x


@theirs(EFFICIENT, IMAGES)
class ConvBnAct(nn.Module):
    def __init__(self, p, batch=False, has_skip=True):
        super().__init__()
        self.has_skip, self.conv, self.bn1, self.aa, self.drop_path = has_skip, conv(3), norm(batch), nn.SiLU(), path(p)

    def forward(self, x):
        shortcut = x
        x = self.conv(x)
        x = self.bn1(x)
        x = self.aa(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


@theirs(EFFICIENT, IMAGES)
class DepthwiseSeparableConv(nn.Module):
    def __init__(self, p, batch=False, s2d=False):
        super().__init__()
        self.has_skip, self.drop_path = True, path(p)
        self.conv_s2d, self.bn_s2d = (conv(), norm(batch)) if s2d else (None, None)
        self.conv_dw, self.bn1, self.aa, self.se = conv(3, WIDTH), norm(batch), nn.SiLU(), nn.Identity()
        self.conv_pw, self.bn2 = conv(), norm(batch)

    def forward(self, x):
        shortcut = x
        if self.conv_s2d is not None:
            x = self.conv_s2d(x)
            x = self.bn_s2d(x)
        x = self.conv_dw(x)
        x = self.bn1(x)
        x = self.aa(x)
        x = self.se(x)
        x = self.conv_pw(x)
        x = self.bn2(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


@theirs(EFFICIENT, IMAGES)
class InvertedResidual(nn.Module):
    def __init__(self, p, batch=False, s2d=False):
        super().__init__()
        self.has_skip, self.drop_path = True, path(p)
        self.conv_s2d, self.bn_s2d = (conv(), norm(batch)) if s2d else (None, None)
        self.conv_pw, self.bn1, self.conv_dw, self.bn2 = conv(), norm(batch), conv(3, WIDTH), norm(batch)
        self.aa, self.se, self.conv_pwl, self.bn3 = nn.SiLU(), nn.Hardtanh(), conv(), norm(batch)

    def forward(self, x):
        shortcut = x
        if self.conv_s2d is not None:
            x = self.conv_s2d(x)
            x = self.bn_s2d(x)
        x = self.conv_pw(x)
        x = self.bn1(x)
        x = self.conv_dw(x)
        x = self.bn2(x)
        x = self.aa(x)
        x = self.se(x)
        x = self.conv_pwl(x)
        x = self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


@theirs(EFFICIENT, IMAGES)
class EdgeResidual(nn.Module):
    def __init__(self, p, batch=False):
        super().__init__()
        self.has_skip, self.drop_path = True, path(p)
        self.conv_exp, self.bn1, self.aa, self.se = conv(3), norm(batch), nn.SiLU(), nn.Hardtanh()
        self.conv_pwl, self.bn2 = conv(), norm(batch)

    def forward(self, x):
        shortcut = x
        x = self.conv_exp(x)
        x = self.bn1(x)
        x = self.aa(x)
        x = self.se(x)
        x = self.conv_pwl(x)
        x = self.bn2(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


# ---- torchvision ----


class _Swin(nn.Module):
    def __init__(self, p, mode="row"):
        super().__init__()
        self.norm1, self.attn, self.stochastic_depth = nn.LayerNorm(WIDTH), Attention(), StochasticDepth(p, mode)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp()


@theirs(T_SWIN, IMAGES_LAST)
class TorchvisionSwin(_Swin):
    def forward(self, x):
        x = x + self.stochastic_depth(self.attn(self.norm1(x)))
        x = x + self.stochastic_depth(self.mlp(self.norm2(x)))
        return x


@theirs(T_SWIN, IMAGES_LAST)
class SwinTransformerBlockV2(_Swin):
    def forward(self, x):
        x = x + self.stochastic_depth(self.norm1(self.attn(x)))
        x = x + self.stochastic_depth(self.norm2(self.mlp(x)))
        return x


TorchvisionSwin.__name__ = TorchvisionSwin.__qualname__ = "SwinTransformerBlock"  # timm's class has that name here
TorchvisionSwin.forward.__qualname__ = "SwinTransformerBlock.forward"


class Permute(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


@theirs(T_CONVNEXT, IMAGES)
class CNBlock(nn.Module):
    def __init__(self, p, mode="row"):
        super().__init__()
        self.block = nn.Sequential(
            conv(7, WIDTH), Permute([0, 2, 3, 1]), nn.LayerNorm(WIDTH), *mlp(), Permute([0, 3, 1, 2])
        )
        self.layer_scale = nn.Parameter(torch.ones(WIDTH, 1, 1) / 2)
        self.stochastic_depth = StochasticDepth(p, mode)

    def forward(self, input):
        result = self.layer_scale * self.block(input)
        result = self.stochastic_depth(result)
        result += input
        return result


class _MBConv(nn.Module):
    def __init__(self, p, batch=False, use_res_connect=True):
        super().__init__()
        self.block = nn.Sequential(conv(3), norm(batch), nn.SiLU(), conv(), norm(batch))
        self.stochastic_depth, self.use_res_connect = StochasticDepth(p), use_res_connect


@theirs(T_EFFICIENT, IMAGES)
class MBConv(_MBConv):
    def forward(self, input):
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


@theirs(T_EFFICIENT, IMAGES)
class FusedMBConv(_MBConv):
    def forward(self, input):
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result
