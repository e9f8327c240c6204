"""Private names of torch that tell in which checkpoints code runs.

A checkpoint of `torch.utils.checkpoint` runs a part of forward, and in backward runs it again. Both times it has the
same object: its `_CheckpointFrame`, or the node of its autograd function if it is reentrant. Frames of the stack have
it, and so has the hook of the innermost checkpoint on saved tensors. Checkpoints of libraries are found if they are
autograd functions like torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from .compilers import current_backward, is_recomputed
from .modules import outer_saved_tensor_hooks

__all__ = ["checkpoints_around", "is_computed_again", "may_be_checkpointed"]


def may_be_checkpointed() -> bool:
    """Whether `checkpoints_around` may find anything. It takes a hundredth of the time."""
    hooked: bool = outer_saved_tensor_hooks(False) is not None
    return hooked or not torch.is_grad_enabled() or current_backward() != -1


def checkpoints_around() -> Iterator[tuple[Any, Any]]:
    """The checkpoints that the code that asks runs in, innermost first: an object that is the same in both passes, and
    None in forward, otherwise what tells one recomputation from the next."""
    held = _of_hook(outer_saved_tensor_hooks(False))
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        code = frame.f_code
        if code.co_name in ("checkpoint", "forward", "backward", "unpack_hook"):
            one = _of_frame(frame, code)
            if one is not None:
                found.append(one)
                if one[1] is not None:
                    break
        frame = frame.f_back
    if held is not None and all(checkpoint is not held for checkpoint, _ in found):
        yield held, None  # `torch.distributed._composable.checkpoint` has no frame in forward
    yield from found


def _of_frame(frame: FrameType, code: CodeType) -> tuple[Any, Any] | None:
    name, is_torchs = code.co_name, code.co_filename == torch.utils.checkpoint.__file__
    if is_torchs and name == "checkpoint":
        generator = frame.f_locals.get("gen")
        inside = getattr(generator, "gi_frame", None)
        checkpoint = None if inside is None else inside.f_locals.get("new_frame")
        return None if checkpoint is None else (checkpoint, None)
    if is_torchs and name == "unpack_hook":
        checkpoint = frame.f_locals.get("frame")
        return None if checkpoint is None else (checkpoint, frame.f_locals.get("gid", 0))
    if name in ("forward", "backward") and "checkpoint" in code.co_qualname.lower() and code.co_argcount:
        node = frame.f_locals.get(code.co_varnames[0])
        if isinstance(node, FunctionCtx):
            return node, current_backward() if name == "backward" else None
    return None


def _of_hook(hooks: Any) -> Any:
    """The checkpoint whose hooks on saved tensors these are."""
    pack: Any = None if hooks is None else hooks[0]
    code = getattr(pack, "__code__", None)
    if code is None or code.co_filename != torch.utils.checkpoint.__file__ or "frame" not in code.co_freevars:
        return None
    return pack.__closure__[code.co_freevars.index("frame")].cell_contents


def is_computed_again() -> bool:
    """Whether a checkpoint computes the code that asks again, be it one that `checkpoints_around` does not know."""
    return is_recomputed(sys._getframe(1))
