"""Residual blocks of timm and torchvision whose branches then run on kept samples only, by `skip_residual`.

`fuse` finds a block's class by `fused_class`: by name, because the packages need not be installed. Each class here says
which branches a block has, and which module drops each of them.

The original forward still runs in evaluation, if nothing drops, and if a module that drops was changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...functional.residual import skip_residual
from ...nn.structured import DropPath, StochasticDepth
from ..classes import THIRD_PARTY_CLASSES
from ..report import class_name
from . import rules
from .rules import Fused

__all__ = ["fused_class"]

DROPS = (DropPath, StochasticDepth)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's norms that compute statistics over the batch, and are no subclasses of torch's.
TIMM_BATCH_NORMS = {"EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "InplaceAbn"}


class Branch(NamedTuple):
    """A branch of a block: the attribute of the module that drops it, and what is computed before that module.

    ``run`` is called with the block and samples. If ``takes_arguments``, it also gets the arguments of the block.
    """

    drop: str
    run: Callable[..., Tensor]
    takes_arguments: bool = False


class _Residual(Fused):
    """A block that computes ``x + drop(branch(x))`` once or more often."""

    BRANCHES: ClassVar[tuple[Branch, ...]]
    SKIP: ClassVar[str] = ""  # the attribute that says whether a block has a residual at all
    ADDS_IN_PLACE: ClassVar[bool] = False  # whether x is added to the branch's result, which then keeps its dtype

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if cls.SKIP and not getattr(module, cls.SKIP):
            return "it has no residual"
        for name in cls._drops():
            if reason := _drop_obstacle(name, getattr(module, name)):
                return reason
        return ""

    @classmethod
    def batch_norm_obstacle(cls, module: Any) -> str:
        name = _batch_norm_in(module)
        if not name or isinstance(module, Fused):
            return ""
        return (
            f"its batch norm {name} would compute statistics from kept samples only; "
            "fdt.fuse(model, batch_norm_on_kept=True) accepts that"
        )

    @classmethod
    def parts(cls, module: Any) -> Iterable[nn.Module]:
        found = (getattr(module, name, None) for name in cls._drops())
        return [part for part in found if part is not None]

    @classmethod
    def _drops(cls) -> list[str]:
        return [branch.drop for branch in cls.BRANCHES]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not rules.can_fuse_input(args[0]) or not self._is_dropping() or self.obstacle(self):
            return super().forward(*args, **kwargs)
        x, *others = args
        along, shared = self._arguments(x, *others, **kwargs)
        for branch in self.BRANCHES:
            x = _add_branch(self, x, branch, along, shared)
        return x

    def _is_dropping(self) -> bool:
        return any(part.training and type(part) is not nn.Identity for part in self.parts(self))

    def _arguments(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The other arguments of the forward: those that have the axis of samples, and those that all samples share."""
        return (), {}


def _batch_norm_in(block: nn.Module) -> str:
    """The path of the first module that computes statistics over a batch; "" if there is none."""
    path: str
    for path, part in block.named_modules():
        if isinstance(part, BATCH_NORMS) or type(part).__name__ in TIMM_BATCH_NORMS:
            return path
    return ""


def _drop_obstacle(name: str, drop: Any) -> str:
    """Why a branch with this module can't skip samples."""
    if type(drop) is nn.Identity:
        return rules.call_obstacle(name, drop)
    cls = type(drop)
    if cls not in DROPS and THIRD_PARTY_CLASSES.get((cls.__module__, cls.__qualname__)) not in DROPS:
        return f"{name} is a {class_name(cls, *DROPS)}, not a known one"
    if getattr(drop, "mode", "row") != "row":
        return f"{name} drops the whole batch at once"
    return rules.call_obstacle(name, drop)


def _add_branch(block: Any, x: Tensor, branch: Branch, along: tuple[Tensor, ...], shared: dict[str, Any]) -> Tensor:
    """``x + drop(branch(x))``"""
    drop = getattr(block, branch.drop)
    if not branch.takes_arguments:
        along, shared = (), {}

    dtypes: list[torch.dtype] = []

    def run(rows: Tensor, *others: Tensor) -> Tensor:
        if rows.shape[0] or _batch_norm_in(block):
            y = branch.run(block, rows, *others, **shared)
        else:  # timm's attention in windows can't take an empty batch, so it gets a sample whose result isn't used
            y = branch.run(block, x[:1].detach(), **shared)[:0]
        dtypes.append(y.dtype)
        return y

    if type(drop) is nn.Identity:
        return x + run(x, *along)
    options = {"training": drop.training, "scale_by_keep": getattr(drop, "scale_by_keep", True), "along": along}
    y: Tensor = skip_residual(x, run, rules.rate_of(drop), **options)
    return y.to(dtypes[0]) if block.ADDS_IN_PLACE else y


def _in_order(*names: str) -> Callable[..., Tensor]:
    """A branch that calls submodules one after the other; those that are None are left out."""

    def run(block: Any, x: Tensor) -> Tensor:
        for name in names:
            part = getattr(block, name)
            x = x if part is None else part(x)
        return x

    return run


# ---- timm ----


def _attention_after_norm(block: Any, x: Tensor, attn_mask: Tensor | None = None, **shared: Any) -> Tensor:
    y: Tensor = block.ls1(block.attn(block.norm1(x), attn_mask=attn_mask, **shared))
    return y


def _attention_before_norm(block: Any, x: Tensor, attn_mask: Tensor | None = None, **shared: Any) -> Tensor:
    y: Tensor = block.norm1(block.attn(x, attn_mask=attn_mask, **shared))
    return y


class _TimmBlock(_Residual):
    """Of the vision transformer."""

    ARGUMENTS = "self x attn_mask is_causal"
    NAMES = "drop_path1 ls1 attn norm1 drop_path2 ls2 mlp norm2"
    BRANCHES = (
        Branch("drop_path1", _attention_after_norm, takes_arguments=True),
        Branch("drop_path2", _in_order("norm2", "mlp", "ls2")),
    )

    def _arguments(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        # A mask of fewer axes has none of samples: it has (heads,) queries and keys.
        if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[0] != 1:
            return (attn_mask,), {"is_causal": is_causal}
        return (), {"attn_mask": attn_mask, "is_causal": is_causal}


class _TimmResPostBlock(_TimmBlock):
    NAMES = "drop_path1 norm1 attn drop_path2 norm2 mlp"
    BRANCHES = (
        Branch("drop_path1", _attention_before_norm, takes_arguments=True),
        Branch("drop_path2", _in_order("mlp", "norm2")),
    )


class _TimmSwinBlock(_Residual):
    ARGUMENTS = "self x"
    NAMES = "shape drop_path1 _attn norm1 reshape drop_path2 mlp norm2"
    BRANCHES = (
        Branch("drop_path1", lambda block, x: block._attn(block.norm1(x))),
        Branch("drop_path2", lambda block, x: block.mlp(block.norm2(x.flatten(1, 2))).view_as(x)),
    )


class _TimmConvNeXtBlock(_Residual):
    ARGUMENTS = "self x"
    NAMES = "conv_dw use_conv_mlp norm mlp permute gamma mul reshape drop_path shortcut"

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if type(module.shortcut) is not nn.Identity:
            return f"its shortcut is a {class_name(type(module.shortcut))}"
        reason: str = rules.call_obstacle("its shortcut", module.shortcut) or super().obstacle(module)
        return reason

    @staticmethod
    def _branch(block: Any, x: Tensor) -> Tensor:
        x = block.conv_dw(x)
        if block.use_conv_mlp:
            x = block.mlp(block.norm(x))
        else:
            x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x if block.gamma is None else x.mul(block.gamma.reshape(1, -1, 1, 1))

    BRANCHES = (Branch("drop_path", _branch),)


class _TimmConvBnAct(_Residual):
    ARGUMENTS = "self x"
    NAMES = "conv bn1 aa has_skip drop_path"
    SKIP = "has_skip"
    BRANCHES = (Branch("drop_path", _in_order("conv", "bn1", "aa")),)


class _TimmSeparableConv(_TimmConvBnAct):
    NAMES = "conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2 has_skip drop_path"
    BRANCHES = (Branch("drop_path", _in_order("conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2")),)


class _TimmInvertedResidual(_TimmConvBnAct):
    NAMES = "conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 has_skip drop_path"
    BRANCHES = (
        Branch(
            "drop_path",
            _in_order("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3"),
        ),
    )


class _TimmEdgeResidual(_TimmConvBnAct):
    NAMES = "conv_exp bn1 aa se conv_pwl bn2 has_skip drop_path"
    BRANCHES = (Branch("drop_path", _in_order("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2")),)


# ---- torchvision ----


class _SwinBlock(_Residual):
    ARGUMENTS = "self x"
    NAMES = "stochastic_depth attn norm1 mlp norm2"
    BRANCHES = (
        Branch("stochastic_depth", _in_order("norm1", "attn")),
        Branch("stochastic_depth", _in_order("norm2", "mlp")),
    )


class _SwinBlockV2(_Residual):
    ARGUMENTS = "self x"
    NAMES = "stochastic_depth norm1 attn norm2 mlp"
    BRANCHES = (
        Branch("stochastic_depth", _in_order("attn", "norm1")),
        Branch("stochastic_depth", _in_order("mlp", "norm2")),
    )


class _CNBlock(_Residual):
    """Of ConvNeXt."""

    ARGUMENTS = "self input"
    NAMES = "layer_scale block stochastic_depth"
    ADDS_IN_PLACE = True
    BRANCHES = (Branch("stochastic_depth", lambda block, x: block.layer_scale * block.block(x)),)


class _MBConv(_Residual):
    """Of EfficientNet."""

    ARGUMENTS = "self input"
    NAMES = "block use_res_connect stochastic_depth"
    SKIP = "use_res_connect"
    ADDS_IN_PLACE = True
    BRANCHES = (Branch("stochastic_depth", _in_order("block")),)


FUSED_CLASSES: dict[tuple[str, str], type[_Residual]] = {
    ("timm.models.vision_transformer", "Block"): _TimmBlock,
    ("timm.models.vision_transformer", "ResPostBlock"): _TimmResPostBlock,
    ("timm.models.swin_transformer", "SwinTransformerBlock"): _TimmSwinBlock,
    ("timm.models.convnext", "ConvNeXtBlock"): _TimmConvNeXtBlock,
    ("timm.models._efficientnet_blocks", "ConvBnAct"): _TimmConvBnAct,
    ("timm.models._efficientnet_blocks", "DepthwiseSeparableConv"): _TimmSeparableConv,
    ("timm.models._efficientnet_blocks", "InvertedResidual"): _TimmInvertedResidual,
    ("timm.models._efficientnet_blocks", "EdgeResidual"): _TimmEdgeResidual,
    ("torchvision.models.swin_transformer", "SwinTransformerBlock"): _SwinBlock,
    ("torchvision.models.swin_transformer", "SwinTransformerBlockV2"): _SwinBlockV2,
    ("torchvision.models.convnext", "CNBlock"): _CNBlock,
    ("torchvision.models.efficientnet", "MBConv"): _MBConv,
    ("torchvision.models.efficientnet", "FusedMBConv"): _MBConv,
}


def fused_class(original: type[nn.Module], module: nn.Module) -> type[Fused] | None:
    """The fused class for a block of timm or torchvision; None if there is none, or if none of its branches drops."""
    known = FUSED_CLASSES.get((original.__module__, original.__qualname__))
    if known is None or all(type(part) is nn.Identity for part in known.parts(module)):
        return None
    return known
