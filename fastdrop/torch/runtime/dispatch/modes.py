"""Private names of torch for state of a thread: modes, and what is handed on to the threads of autograd's engine.

`runtime.context` sets and reads this state. Where torch lacks a name, context enters modes by ``with``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from .names import has, named, require

# ---- modes ----

push_dispatch_mode = named("torch._C._push_on_torch_dispatch_stack")
pop_dispatch_mode = named("torch._C._pop_torch_dispatch_stack")
can_push_dispatch_modes = has(push_dispatch_mode, pop_dispatch_mode)

push_function_mode = named("torch._C._push_on_torch_function_stack")
pop_function_mode = named("torch._C._pop_torch_function_stack")
count_function_modes = named("torch._C._len_torch_function_stack")
can_push_function_modes = has(push_function_mode, pop_function_mode, count_function_modes)


class _NoDispatchMode:
    def __init__(self) -> None:
        require("Monte Carlo dropout", "torch.utils._python_dispatch.TorchDispatchMode")


# The base class of modes that see each op that is called.
DispatchMode: Any = named("torch.utils._python_dispatch.TorchDispatchMode", _NoDispatchMode)


# Blocks in which no dispatch mode, and no subclass's `__torch_function__`, sees what is called.
without_dispatch_modes: Callable[[], Any] = named("torch._C._DisableTorchDispatch", contextlib.nullcontext)
without_function_overrides: Callable[[], Any] = named("torch._C.DisableTorchFunction", contextlib.nullcontext)


# ---- autograd's threads ----

# torch keeps the caller's context under this key while backward runs, for the engine's threads.
CALLER = "context"

is_handed_on: Callable[[str], bool] = named("torch._C._is_key_in_tls")
handed_on: Callable[[str], Any] = named("torch._C._get_obj_in_tls")
hand_on: Callable[[str, Any], None] = named("torch._C._stash_obj_in_tls")
if not has(is_handed_on, handed_on, hand_on):
    # A backward on the CPU runs in the caller's thread. One on a GPU then runs as if outside of the caller's context.
    is_handed_on = lambda key: False  # noqa: E731
