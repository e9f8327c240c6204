"""Dropout for torch at the speed of memory: one bit kept per element, torch's own generator, torch's own behaviour.

>>> import torch, fastdrop.torch as fdt
>>> x = torch.ones(4, 8, requires_grad=True)
>>> y = fdt.dropout(x, 0.25, seed=0)
>>> int((y > 0).sum())
24
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from .functional.attention import scaled_dot_product_attention
    from .functional.batchwise import batchwise_linear
    from .functional.blocks import drop_block2d, drop_block3d
    from .functional.dropout import alpha_dropout, drop_connect, dropout, gaussian_dropout
    from .functional.fused import (
        bias_act_dropout,
        bias_dropout_add,
        dropout_add,
        dropout_add_layer_norm,
        dropout_add_rms_norm,
        softmax_dropout,
    )
    from .functional.gated import geglu_dropout, swiglu_dropout
    from .functional.lora import lora_linear
    from .functional.parts import cells_of
    from .functional.residual import skip_residual
    from .functional.structured import (
        dropout1d,
        dropout2d,
        dropout3d,
        feature_alpha_dropout,
        stochastic_depth,
        variational_dropout,
    )
    from .functional.tokens import token_dropout
    from .nn.dropout import (
        AlphaDropout,
        Dropout,
        Dropout1d,
        Dropout2d,
        Dropout3d,
        FeatureAlphaDropout,
        GaussianDropout,
    )
    from .nn.recurrent import VariationalGRU, VariationalLSTM
    from .nn.residual import LayerDrop, SkipResidual
    from .nn.structured import (
        BatchwiseDropout,
        DropBlock2d,
        DropBlock3d,
        DropPath,
        StochasticDepth,
        VariationalDropout,
    )
    from .nn.tokens import TokenDropout
    from .nn.weights import DropConnect, EmbeddingDropout
    from .tools.same_masks import multi_sample, same_masks
except ImportError as error:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        from ..core.installing import how_to_install

        raise ImportError(f"fastdrop.torch needs torch 2.11 or later: {how_to_install('torch')}") from error
    import torch

    raise ImportError(f"fastdrop.torch does not work with torch {torch.__version__}: {error}") from error

if TYPE_CHECKING:
    from .models.convert import convert, revert
    from .models.enable import disable, enable, enabled, explain_attention
    from .models.fold import fold_scaling
    from .models.fuse.fuse import fuse, unfuse
    from .models.report import Report
    from .tools.audit import AuditReport, audit
    from .tools.check_masks import check_masks
    from .tools.monte_carlo import Prediction, mc_dropout, mc_predict
    from .tools.named_masks import NamedMasks, name_masks
    from .tools.scheduler import DropoutScheduler
    from .tools.step_report import report
    from .tools.step_table import DropoutRow, StepReport

# What works on whole models is imported at its first use: a quarter of this package, which many programs never call.
_AT_FIRST_USE = {
    "models.convert": ("convert", "revert"),
    "models.enable": ("disable", "enable", "enabled", "explain_attention"),
    "models.fold": ("fold_scaling",),
    "models.fuse.fuse": ("fuse", "unfuse"),
    "models.report": ("Report",),
    "tools.audit": ("AuditReport", "audit"),
    "tools.check_masks": ("check_masks",),
    "tools.monte_carlo": ("Prediction", "mc_dropout", "mc_predict"),
    "tools.named_masks": ("NamedMasks", "name_masks"),
    "tools.scheduler": ("DropoutScheduler",),
    "tools.step_report": ("report",),
    "tools.step_table": ("DropoutRow", "StepReport"),
}
_MODULE_OF = {name: module for module, names in _AT_FIRST_USE.items() for name in names}


if not TYPE_CHECKING:  # or to a type checker the module would have any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AlphaDropout",
    "AuditReport",
    "BatchwiseDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutRow",
    "DropoutScheduler",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "LayerDrop",
    "NamedMasks",
    "Prediction",
    "Report",
    "SkipResidual",
    "StepReport",
    "StochasticDepth",
    "TokenDropout",
    "VariationalDropout",
    "VariationalGRU",
    "VariationalLSTM",
    "alpha_dropout",
    "audit",
    "batchwise_linear",
    "bias_act_dropout",
    "bias_dropout_add",
    "cells_of",
    "check_masks",
    "convert",
    "disable",
    "drop_block2d",
    "drop_block3d",
    "drop_connect",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "enable",
    "enabled",
    "explain_attention",
    "feature_alpha_dropout",
    "fold_scaling",
    "fuse",
    "gaussian_dropout",
    "geglu_dropout",
    "lora_linear",
    "mc_dropout",
    "mc_predict",
    "multi_sample",
    "name_masks",
    "report",
    "revert",
    "same_masks",
    "scaled_dot_product_attention",
    "skip_residual",
    "softmax_dropout",
    "stochastic_depth",
    "swiglu_dropout",
    "token_dropout",
    "unfuse",
    "variational_dropout",
]
