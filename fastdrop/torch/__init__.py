"""Dropout for torch at the speed of memory: one bit kept per element, torch's own generator, torch's own behaviour.

>>> import torch, fastdrop.torch as fdt
>>> x = torch.ones(4, 8, requires_grad=True)
>>> y = fdt.dropout(x, 0.25, seed=0)
>>> int((y > 0).sum())
24
"""

try:
    from .convert import Report, convert, revert
    from .functional import dropout
    from .modules import Dropout
    from .override import disable, enable, enabled
except ImportError as error:
    raise ImportError(f'fastdrop.torch needs torch 2.11 or later: pip install "fastdrop[torch]" ({error})') from error

__all__ = ["Dropout", "Report", "convert", "disable", "dropout", "enable", "enabled", "revert"]
