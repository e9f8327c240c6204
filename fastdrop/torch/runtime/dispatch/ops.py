"""Private names of torch by which an op gets derivatives and rules for `vmap`, and by which torch's ops become ours.

`ops` registers the ops of fastdrop with these, `functional` its eager functions, and `models.enable` torch's dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import DispatchKey, DispatchKeySet, Tensor

from .compilers import hide_from_dynamo
from .names import absent, has, named, require
from .tensors import is_eager_dense, is_transformed, knows_transforms

# ---- derivatives ----

_below_autograd_guard = named("torch._C._AutoDispatchBelowAutograd")
_keys_after_autograd = named("torch._C._after_autograd_keyset")
_allow_forward_mode = named("torch.autograd.forward_ad._set_fwd_grad_enabled")
_one_level_function = named("torch.autograd.function._SingleLevelFunction")
_single_level = named("torch._functorch.autograd_function.enable_single_level_autograd_function")
_CAN_GO_BELOW = knows_transforms and has(
    _one_level_function, _below_autograd_guard, _keys_after_autograd, _allow_forward_mode, _single_level
)


def below_autograd(op: Any, keyset: Any, *arguments: Any) -> Any:
    """The op's next kernel. `Function` has turned derivatives off, and outer transforms need them on."""
    outer = is_transformed()
    on = (torch.enable_grad(), _allow_forward_mode(True)) if outer else ()
    with contextlib.ExitStack() as stack:
        for context in (*on, _below_autograd_guard()):
            stack.enter_context(context)
        return op.redispatch(keyset & _keys_after_autograd, *arguments)


FUNCTION_METHODS = ("forward", "setup_context", "backward", "jvp")
_compiled_autograd_key = named(
    "torch.autograd.Function._compiled_autograd_key"
)  # what compiled autograd asks a node for


def register_derivative(
    library: torch.library.Library, name: str, op: Any, function: type[torch.autograd.Function]
) -> None:
    """Gives an op its derivatives. ``function.forward`` takes ``(op, keyset, *arguments)`` for `below_autograd`."""
    if not _CAN_GO_BELOW:
        _register_with_torch(library, op, function)
        return
    # `Function.apply` itself would start again from the outermost transform. The dispatcher goes from one to the next,
    # so each kernel is one level of derivatives.
    methods = {method: staticmethod(getattr(function, method)) for method in FUNCTION_METHODS}
    if has(_compiled_autograd_key):
        methods["_compiled_autograd_key"] = staticmethod(_compiled_autograd_key)
    single: Any = type(function.__name__, (_one_level_function,), methods)
    apply = single.apply

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if not is_transformed():
            return apply(op, keyset, *arguments)
        with _single_level():
            return apply(op, keyset, *arguments)

    hide_from_dynamo(kernel)
    library.impl(name, kernel, "Autograd", with_keyset=True)


def _register_with_torch(library: torch.library.Library, op: Any, function: Any) -> None:
    """The public way. It has no forward mode and takes no transforms."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function.setup_context(ctx, (op, None, *inputs), output)

    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.needs_input_grad = (False, False, *ctx.needs_input_grad)
        return function.backward(ctx, *gradients)[2:]

    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)


def fast_apply(function: type[torch.autograd.Function]) -> Any:
    """The function's ``apply`` without the Python that looks for transforms, and its backward without that too.

    For calls whose tensors are all `is_eager_dense`. It saves two microseconds of twenty for a small tensor.
    """
    backward = getattr(function, "_backward_cls", None)
    if backward is None:
        return function.apply
    backward.apply = function.backward
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_innermost = named("torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter")
_unwrap_batched = named("torch._C._functorch._unwrap_batched")
_add_batch_dim = named("torch._C._functorch._add_batch_dim")
_exclude_keys = named("torch._C._ExcludeDispatchKeyGuard")
_CAN_BATCH = has(_innermost, _unwrap_batched, _add_batch_dim, _exclude_keys)


class Map(NamedTuple):
    """The innermost `torch.vmap` around a call."""

    batch_size: int
    interpreter: Any

    @property
    def randomness(self) -> str:
        """ "error", "same" or "different"."""
        randomness: str = self.interpreter.randomness()
        return randomness

    def is_eager_dense_within(self, *tensors: Tensor) -> bool:
        """Whether nothing but this map surrounds the call, so that kernels may be called at once."""
        with self.interpreter.lower():
            return all(is_eager_dense(x) and not (x.requires_grad and torch.is_grad_enabled()) for x in tensors)

    def unwrap(self, value: Any) -> tuple[Any, int | None]:
        """A value, with its samples along the axis that is returned beside it."""
        if not isinstance(value, Tensor):
            return value, None
        unwrapped: tuple[Any, int | None] = _unwrap_batched(value, self.interpreter.level())
        return unwrapped

    def wrap(self, result: Tensor, axis: int | None) -> Tensor:
        wrapped: Tensor = result if axis is None else _add_batch_dim(result, axis, self.interpreter.level())
        return wrapped

    def below(self, key: str) -> Any:
        """A block whose calls skip the map's kernels for a dispatch key."""
        return _exclude_keys(DispatchKeySet(getattr(DispatchKey, key)))


class _MapOfTorch(NamedTuple):
    """What a rule is told that torch calls by itself."""

    batch_size: int

    def is_eager_dense_within(self, *tensors: Tensor) -> bool:
        return False


def innermost_map() -> Map:
    """The map around a call that comes by a key of ``torch.vmap``."""
    if not _CAN_BATCH:
        raise RuntimeError(f"dropout under torch.vmap needs a seed here: torch {torch.__version__} lacks {absent}")
    interpreter = _innermost()
    return Map(interpreter.batch_size(), interpreter)


def register_batching(library: torch.library.Library, name: str, op: Any, rule: Callable[..., Any]) -> None:
    """Gives an op its rule for vmap: ``rule(map, axes, *arguments)`` returns results and their axes.

    `torch.library.register_vmap` does the same with trees, in twice the time.
    """
    if not _CAN_BATCH:
        torch.library.register_vmap(
            op, lambda info, axes, *values: rule(_MapOfTorch(info.batch_size), axes, *values), lib=library
        )
        return

    def kernel(*arguments: Any) -> Any:
        interpreter = _innermost()
        around = Map(interpreter.batch_size(), interpreter)
        values, axes = zip(*map(around.unwrap, arguments), strict=True)
        with around.below("FuncTorchBatched"):
            if all(axis is None for axis in axes):
                return op(*values)
            results, result_axes = rule(around, axes, *values)
        if isinstance(results, Tensor):
            return around.wrap(results, result_axes)
        return tuple(map(around.wrap, results, result_axes))

    hide_from_dynamo(kernel)
    library.impl(name, kernel, "FuncTorchBatched")


_interpreters = named("torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters")
_vmap_interpreter = named("torch._functorch.pyfunctorch.VmapInterpreter", ())


def count_drawing_maps() -> int:
    """How many maps around the call draw anew for each of what they map."""
    if _interpreters is None or not is_transformed():
        return 0
    return sum(isinstance(one, _vmap_interpreter) and one.randomness() == "different" for one in _interpreters())


# ---- what torch's ops are ----


def argument_names(op: Any) -> list[str]:
    """Of an op's schema; none if torch does not tell."""
    schema = getattr(op, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def writes_to_arguments(op: Any) -> bool:
    """Whether an op writes to what it is given. False if torch does not tell."""
    schema = getattr(op, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_unmarked_random(op: Any) -> bool:
    """Whether an op draws, by a seed that it is given, and torch does not mark it as random."""
    return str(op.overloadpacket) == "aten._cudnn_init_dropout_state"


# Attention as torch composes it of other ops, and what checks its arguments in torch's words.
composed_attention = getattr(
    torch.ops.aten, "_scaled_dot_product_attention_math", torch.ops.aten.scaled_dot_product_attention
)

# What `torch.ops` is made of, as classes.
OpOverload: Any = named("torch._ops.OpOverload", type(torch.ops.aten.dropout.default))
OpOverloadPacket: Any = named("torch._ops.OpOverloadPacket", type(torch.ops.aten.dropout))


# ---- torch's own dropout, for `enable` ----

TRANSFORMS = "FuncTorchDynamicLayerFrontMode"  # the key of calls in transforms

_ENABLING = (
    "torch._C._functorch.peek_interpreter_stack",
    "torch._subclasses.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
    "torch._guards.TracingContext",
)


def check_overridable(*ops: Any) -> None:
    """Raises if torch lacks what `enable` needs. Asked before anything of torch is changed."""
    for name in ("_op_dk", "_dispatch_cache"):
        if not all(hasattr(op, name) for op in ops):
            absent.append(f"torch._ops.OpOverload.{name}")
            require("fastdrop.torch.enable()", absent[-1])
    require("fastdrop.torch.enable()", *_ENABLING)


def call_as_torch(op: Any, *arguments: Any, **options: Any) -> Tensor:
    """What torch does with an op that it composes of others, unless a kernel overrides it."""
    result: Tensor = op._op_dk(DispatchKey.CompositeImplicitAutograd, *arguments, **options)
    return result


def kernel_in_transforms(op: Any) -> Callable[..., Any]:
    """What torch does in a transform with an op, unless a kernel overrides it."""
    kernel, keys = torch.library.get_kernel(op, TRANSFORMS), DispatchKeySet(getattr(DispatchKey, TRANSFORMS))
    return lambda *arguments: kernel.call_boxed(keys, *arguments)


def forget_kernels(op: Any) -> None:
    """Has tracing look for an op's kernels again."""
    op._dispatch_cache.clear()


# ---- trees ----


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    elif not isinstance(tree, (tuple, list)):
        return [tree]
    return [leaf for part in tree for leaf in _leaves(part)]


def _map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map_only(kind, function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(_map_only(kind, function, value) for value in tree)
    return function(tree) if isinstance(tree, kind) else tree


# What is in tuples, lists, dicts and the like, and the same with those of one class replaced.
tree_leaves: Callable[[Any], list[Any]] = named("torch.utils._pytree.tree_leaves", _leaves)
tree_map_only: Callable[..., Any] = named("torch.utils._pytree.tree_map_only", _map_only)
