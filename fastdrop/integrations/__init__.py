"""fastdrop in libraries that train models: a module for each, named as the library.

Importing this package imports none of them. `fastdrop info` lists `INTEGRATIONS`.

>>> from fastdrop.integrations import INTEGRATIONS
>>> sorted(INTEGRATIONS)
['lightning', 'transformers']
"""

from __future__ import annotations

__all__ = ["INTEGRATIONS"]

INTEGRATIONS: dict[str, tuple[str, ...]] = {  # module in this package: the distributions of which it needs one
    "lightning": ("lightning", "pytorch-lightning"),
    "transformers": ("transformers",),
}
