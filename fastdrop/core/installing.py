"""The words with which a message says how to install fastdrop. Every message that does takes them from here.

The distribution is called fastdrop-kernels. PyPI's ``fastdrop`` is another project, a file server that is imported by
the same name.
"""

from __future__ import annotations

DISTRIBUTION = "fastdrop-kernels"
IS_PUBLISHED = False  # on PyPI; until it is, messages name the source folder


def how_to_install(extra: str = "") -> str:
    """The command that installs fastdrop with an extra, or with several (``"torch,demo"``).

    >>> how_to_install("torch")
    "pip install '.[torch]' in fastdrop's source folder"
    """
    extras = f"[{extra}]" if extra else ""
    if IS_PUBLISHED:
        return f"pip install '{DISTRIBUTION}{extras}'"
    return f"pip install '.{extras}' in fastdrop's source folder"
