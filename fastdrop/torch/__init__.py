"""Dropout for torch at the speed of memory: one bit kept per element, torch's own generator, torch's own behaviour.

>>> import torch, fastdrop.torch as fdt
>>> x = torch.ones(4, 8, requires_grad=True)
>>> y = fdt.dropout(x, 0.25, seed=0)
>>> int((y > 0).sum())
24
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('fastdrop.torch needs torch: pip install "fastdrop[torch]"') from error

from .convert import Report, convert, revert
from .functional import dropout
from .modules import Dropout
from .override import disable, enable, enabled

__all__ = ["Dropout", "Report", "convert", "disable", "dropout", "enable", "enabled", "revert"]
