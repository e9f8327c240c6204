"""Private names of torch that tell about modules: base classes, children, hooks, and what a recurrent layer runs on.

`nn.weights`, `models` and `tools` look into the modules of others with these.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .names import named

# ---- classes ----

_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)  # fmt: skip
_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip

# For isinstance and issubclass: torch's dropout modules, and its norms that may keep running statistics.
TorchDropout: Any = named("torch.nn.modules.dropout._DropoutNd", functools.reduce(operator.or_, _DROPOUTS))
TorchNorm: Any = named("torch.nn.modules.batchnorm._NormBase", functools.reduce(operator.or_, _NORMS))

# Methods in which torch's transformer layers drop, beside forward.
_BLOCKS = ("_sa_block", "_mha_block", "_ff_block")
ENCODER_BLOCKS = tuple(name for name in _BLOCKS if hasattr(nn.TransformerEncoderLayer, name))
DECODER_BLOCKS = tuple(name for name in _BLOCKS if hasattr(nn.TransformerDecoderLayer, name))

UNSCRIPTED = "__jit_unused_properties__"  # where TorchScript looks for a class's properties to leave out
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # what wrappers call a module
CHILDREN = "_modules"  # where code may look for a module's children, beside children()

# ---- contents ----


def children_of(module: nn.Module) -> dict[str, Any]:
    """By name. One child may have several names."""
    try:
        return module._modules
    except AttributeError:
        below = module.named_modules(remove_duplicate=False)
        return {name: child for name, child in below if name and "." not in name}


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict itself, so that a buffer may be put back. A copy, if torch does not give it."""
    try:
        return module._buffers
    except AttributeError:
        return dict(module.named_buffers(recurse=False, remove_duplicate=False))


_bare = nn.Module()
can_have_twins = hasattr(_bare, "_parameters") and hasattr(_bare, "_modules")


def make_twin(module: nn.Module, parameter: Callable[[Tensor | None], Any], child: Callable[[nn.Module], Any]) -> Any:
    """A module with the attributes and buffers of another, and with other parameters and children."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).update(
        _parameters={name: parameter(own) for name, own in module._parameters.items()},
        _modules={name: None if own is None else child(own) for name, own in module._modules.items()},
    )
    return twin


def uncompiled(module: nn.Module) -> nn.Module:
    """What `torch.compile` was given, if it made this module."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def is_compiled(module: nn.Module) -> bool:
    """Whether a compiled program runs in a module's place."""
    return uncompiled(module) is not module or getattr(module, "_compiled_call_impl", None) is not None


# ---- hooks ----

_has_global_hook = named("torch.nn.modules.module._has_any_global_hook")
MAY_BE_LEFT_OUT = "_fastdrop_may_be_left_out"  # on hooks that need not be called where their module isn't


def forward_hooks_of(module: nn.Module) -> list[Any]:
    """Those of one module, around its forward."""
    return [*_hooks(module, "_forward_hooks"), *_hooks(module, "_forward_pre_hooks")]


def hook_obstacle(module: nn.Module, gradients: bool = True) -> str:
    """Says if a module, or all modules, have hooks, which would not be called if its call was left out."""
    kinds = ["_forward_hooks", "_forward_pre_hooks", *(["_backward_hooks", "_backward_pre_hooks"] * gradients)]
    for kind in kinds:
        if not hasattr(module, kind):
            return f"may have hooks: torch lacks {kind}, which tells"
        if any(not hasattr(hook, MAY_BE_LEFT_OUT) for hook in getattr(module, kind).values()):
            return "has hooks"
    if gradients and _has_global_hook is None:
        return "may have hooks: torch lacks torch.nn.modules.module._has_any_global_hook, which tells"
    return "has hooks" if gradients and _has_global_hook() else ""


def _hooks(module: nn.Module, kind: str) -> list[Any]:
    return list(getattr(module, kind, {}).values())


# torch asks the innermost hooks alone. With this, ours ask those around them.
outer_saved_tensor_hooks: Callable[[bool], Any] = named(
    "torch._C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)

# ---- recurrent layers and attention ----


def flat_weights_of(module: Any) -> list[Tensor] | None:
    """The weights that a recurrent layer runs on, a list beside its parameters. None if it runs on the parameters."""
    if not can_have_twins:
        return None
    try:
        module._update_flat_weights()
        weights: list[Tensor] = module._flat_weights
    except AttributeError:
        return None
    return weights


def run_on_flat_weights(module: Any, weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    """A recurrent layer on other weights, in a twin: another thread may run the layer itself."""
    twin = make_twin(module, lambda parameter: parameter, lambda child: child)
    vars(twin)["_flat_weights"] = weights
    return twin(*args, **kwargs)


def _additive_mask(
    mask: Tensor | None, name: str, other_type: Any, other_name: str, dtype: torch.dtype, check_other: bool = True
) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


# (mask, its name, the other's dtype, the other's name, dtype, check): attention's mask as numbers that are added.
additive_mask: Callable[..., Tensor | None] = named("torch.nn.functional._canonical_mask", _additive_mask)
