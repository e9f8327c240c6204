"""The LoRA layer of peft around `nn.Linear`, whose dropout then keeps nothing. `fuse` finds it by `fused_class`.

The original forward still runs if adapters are merged or disabled, if several are active, and if nothing drops.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ...functional.lora import lora_linear
from ...functional.plan import autocast_dtype
from . import rules
from .rules import DROPOUTS, Fused

__all__ = ["fused_class"]

LINEAR = ("peft.tuners.lora.layer", "Linear")


class _LoraLinear(Fused):
    """The base layer and its only active adapter by `lora_linear`."""

    ARGUMENTS = "self x args kwargs"

    @classmethod
    def obstacle(cls, module: Any) -> str:
        active = _active(module)
        if len(active) != 1:
            return f"{len(active)} adapters are active, not one"
        (name,) = active
        lora_A, lora_B, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if type(drop) is nn.Identity:
            return "its adapter has no dropout"
        reason = (
            rules.module_obstacle("base_layer", module.base_layer, nn.Linear)
            or rules.module_obstacle("lora_A", lora_A, nn.Linear)
            or rules.module_obstacle("lora_B", lora_B, nn.Linear)
            or rules.module_obstacle("lora_dropout", drop, *DROPOUTS)
        )
        if not reason and (getattr(module, "use_dora", {}).get(name) or name in getattr(module, "lora_variant", ())):
            reason = "its adapter is a variant of LoRA, such as DoRA"
        if not reason and (lora_A.bias is not None or lora_B.bias is not None):
            reason = "its adapter has a bias"
        return reason

    @classmethod
    def parts(cls, module: Any) -> Iterable[nn.Module]:
        return module.modules()  # type: ignore[no-any-return]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        if args or kwargs or layer.disable_adapters or layer.merged or self.obstacle(self):
            return super().forward(x, *args, **kwargs)
        (name,) = _active(layer)
        base, drop = layer.base_layer, layer.lora_dropout[name]
        tensors = x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight
        options = rules.options_of(drop)
        if not drop.training or options["p"] == 0.0 or not _can_fuse(*tensors):
            return super().forward(x)
        return lora_linear(*tensors, layer.scaling[name], options["p"])


def _active(module: Any) -> list[str]:
    """The active adapters that the layer has."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _can_fuse(x: Any, *parameters: Tensor | None) -> bool:
    """Whether they are dense and on one device, and of one dtype unless autocast makes them so."""
    if not rules.can_fuse_input(x):
        return False
    casts = autocast_dtype(x) is not None
    return all(
        given is None
        or (type(given) is nn.Parameter and given.device == x.device and (casts or given.dtype is x.dtype))
        for given in parameters
    )


def fused_class(original: type[nn.Module]) -> type[Fused] | None:
    """The fused class for a class of peft, which need not be installed; None if there is none."""
    return _LoraLinear if (original.__module__, original.__qualname__) == LINEAR else None
