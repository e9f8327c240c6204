"""Records of ops: what torch must know of one op, each thing written down once.

The modules beside this one define an op as an `Op`, and `functional` calls it. The parameters of an op are the fields
of a NamedTuple, and stand nowhere else::

    class Scale(NamedTuple):
        x: Tensor
        by: float

    SCALE = Op("scale", Scale, outputs=lambda call: torch.empty_like(call.x), launch=_scale)

From a record are made: the schema of ``torch.ops.fastdrop.scale``, the kernels with their checks, the fake kernel that
compilers run, the rule for `vmap`, and two autograd functions, one for the op and one for eager calls that go to the
kernel without the dispatcher. All of it is made at import, so that a call has nothing to look up.

The derivatives are kernels of our own because those of `torch.library.register_autograd` lose the tangents of
forward-mode AD without a word, and refuse to be transformed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..runtime import seeds
from ..runtime.dispatch import can_call_kernel, hide_from_dynamo
from ..runtime.dispatch.compilers import let_inductor_call
from ..runtime.dispatch.ops import below_autograd, fast_apply, register_batching, register_derivative
from . import batching

# Types of parameters. Where torch has no type for one, the annotation says what stands in the schema. A ``P`` gives an
# op two overloads: p as a tensor without axes may change from step to step, and nothing is compiled again.
Maybe = Tensor | None
P = Annotated[float | Tensor, "float", "Tensor"]
Seed = Annotated[Any, "Tensor"]  # `launch` also takes an int
MaybeSeed = Annotated[Any, "Tensor?"]
Sizes = Annotated[Any, "SymInt[]"]
MaybeSizes = Annotated[Any, "SymInt[]?"]
Flags3 = Annotated[Any, "bool[3]"]
Flags4 = Annotated[Any, "bool[4]"]
Flags5 = Annotated[Any, "bool[5]"]
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Maybe: "Tensor?",
    bool: "bool",
    float: "float",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
}
SUFFIXES = ("", ".tensor")  # of the overloads
ON_ANY_DEVICE = ("seed", "p")  # tensors that may lie on another device than the data

library = torch.library.Library("fastdrop", "DEF")


# torch's profiler, if it records shapes, raises for an argument that is an int of 2**63 or more, as seeds may be. It
# does not look into a tuple that holds a text.
UNSEEN = ""


def _one(call: Any) -> int:
    return 1


@dataclasses.dataclass(eq=False)
class Op:
    """An op of ``torch.ops.fastdrop``.

    A "call" is an instance of ``signature``, and "needs" has a bool for each parameter: whether its gradient is wanted.
    """

    name: str
    signature: Any  # a NamedTuple class: data first, then other parameters that may have a gradient, then the rest
    outputs: Callable[[Any], Any]  # the results of a call without their content: the fake kernel
    # The results of a call. Its return annotation is Tensor, or a NamedTuple class that names several results. One that
    # the call does not ask for may be None; the op then gives an empty tensor.
    launch: Callable[..., Any]
    saved: Callable[[Any, Any, Any], Any] | None = None  # (call, results, needs): the NamedTuple that backward needs
    gradients: Callable[..., tuple[Any, ...]] | None = None  # (needs, saved, *grads): of the first parameters
    tangents: Callable[..., Any] | None = None  # (saved, *tangents): forward-mode AD
    saved_for_tangents: Callable[[Any], Any] | None = None  # (call): as ``saved``, where ``tangents`` need more
    linear: bool = False  # in the data, and its own adjoint: a linear op has no other rule for gradients
    # How many of the results, from the first on, have a gradient. None: none has, and calling backward is no error.
    differentiable: Callable[[Any], int] | None = _one
    vmap: Callable[..., Any] = batching.by_sample  # a rule as `batching` describes it
    check: Callable[[Any], None] | None = None  # raises for calls that public functions never make

    def __post_init__(self) -> None:
        self.hints = get_type_hints(self.signature, include_extras=True)
        self.results: Any = get_type_hints(self.launch)["return"]
        self.has_p = "p" in self.hints
        self.seed_at = [*self.hints].index("seed") if "seed" in self.hints else None
        if self.linear:
            self.saved, self.gradients, self.tangents = _all_but_data, self._adjoint, self._linear_tangent
        self._register()
        self.packet: Any = getattr(torch.ops.fastdrop, self.name)
        self.apply: Any = None if self.gradients is None else self._eager()

    def __call__(self, call: Any) -> Any:
        """Calls the op, through torch's dispatcher."""
        by_tensor = self.has_p and isinstance(call.p, Tensor)
        return (self.packet.tensor if by_tensor else self.packet.default)(*call)

    def call_kernel(self, call: Any, wanted: bool, inplace: bool = False) -> Any:
        """The results for eager dense tensors, by the kernel. ``wanted`` says whether a gradient is."""
        if wanted:
            at = self.seed_at
            inputs = call if at is None else (*call[:at], None, *call[at + 1 :])
            return self.apply((call, UNSEEN), inplace, *inputs)
        if not inplace:
            return self.launch(call)
        torch.autograd.graph.increment_version(call[0])
        return self.launch(call, inplace)

    def run(self, call: Any) -> Any:
        """In a backward function: calls the kernel if `can_call_kernel` allows it, otherwise the op."""
        return self.launch(call) if can_call_kernel(call[0]) else self(call)

    # ---- derivatives ----

    def _adjoint(self, needs: Any, saved: Any, dy: Maybe) -> tuple[Any, ...]:
        return () if dy is None else (self.run(self.signature(dy, *saved[1:])),)

    def _linear_tangent(self, saved: Any, dx: Maybe, *_: Any) -> Any:
        return None if dx is None else self(self.signature(dx, *saved[1:]))

    def _eager(self) -> Any:
        """``apply((call, UNSEEN), inplace, *call)`` for eager dense tensors: an autograd function that calls the kernel
        at once. In the place of the seed it is given None.

        It is written in the old style, which costs a quarter of ``setup_context``. It skips the Python code of
        `Function.apply` and of its counterpart in backward. That code looks for functorch and for a ``vjp``, and the
        caller has ruled out both.
        """
        launch, saved_of, gradients, differentiable = self.launch, self.saved, self.gradients, self.differentiable
        assert saved_of is not None
        assert gradients is not None
        assert differentiable is not None
        single, rest = self.results is Tensor, (None,) * len(self.hints)

        def forward(ctx: Any, hidden: Any, inplace: bool, *inputs: Any) -> Any:
            call = hidden[0]
            results = launch(call, inplace) if inplace else launch(call)
            if inplace:
                ctx.mark_dirty(call[0])
            save(ctx, saved_of(call, results, ctx.needs_input_grad[2:]))
            return results if single else results[: differentiable(call)]

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = gradients(ctx.needs_input_grad[2:], unpack_saved(ctx), *grads)
            return None, None, *found, *rest[len(found) :]

        return fast_apply(self._function(forward=forward, backward=backward))

    def _of_op(self) -> Any:
        """The autograd function of the op. Its forward calls the op's next kernel, and it can be transformed.

        Without ``gradients`` it has no backward, and torch then refuses to differentiate the op.
        """
        saved_of, gradients, tangents, wider = self.saved, self.gradients, self.tangents, self.saved_for_tangents
        signature, results_of, differentiable = self.signature, self.results, self.differentiable
        single = results_of is Tensor
        if saved_of is None or gradients is None or differentiable is None:
            return self._function(forward=below_autograd, setup_context=lambda ctx, inputs, output: None)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            call = signature(*inputs[2:])  # the dispatcher leaves out arguments that have their default
            results = output if single else results_of(*output)
            if not single:
                ctx.mark_non_differentiable(*results[differentiable(call) :])
            ctx.rest = (None,) * (len(inputs) - 2)
            saved = saved_of(call, results, ctx.needs_input_grad[-len(ctx.rest) :])
            for_tangents = None if tangents is None else saved if wider is None else wider(call)
            save(ctx, saved, for_tangents)

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            found = gradients(ctx.needs_input_grad[2:], unpack_saved(ctx), *grads)
            return None, None, *found, *ctx.rest[len(found) :]

        def jvp(ctx: Any, _op: Any, _keyset: Any, *given: Any) -> Any:
            assert tangents is not None
            return tangents(unpack_saved(ctx), *given)

        methods = {"forward": below_autograd, "setup_context": setup_context, "backward": backward}
        return self._function(**methods, **({} if tangents is None else {"jvp": jvp}))

    def _function(self, **methods: Any) -> Any:
        static = {name: staticmethod(method) for name, method in methods.items()}
        return type(self.signature.__name__, (torch.autograd.Function,), static)

    # ---- registration ----

    def _register(self) -> None:
        function = self._of_op()
        hide_from_dynamo(self.launch)
        for i, suffix in enumerate(SUFFIXES if self.has_p else SUFFIXES[:1]):
            name = self.name + suffix
            library.define(
                name + schema(self.hints, self.signature, self.results, i), tags=(torch.Tag.pt2_compliant_tag,)
            )
            op = getattr(getattr(torch.ops.fastdrop, self.name), suffix[1:] or "default")
            kernel, fake = self._kernel(self.launch, i), self._kernel(self.outputs, i, fake=True)
            hide_from_dynamo(kernel)
            for device in ("CPU", "CUDA"):
                library.impl(name, kernel, device)
            torch.library.register_fake(f"fastdrop::{name}", called_by_inductor(self.name, fake), lib=library)
            if self.differentiable is None:
                library.impl(name, torch.library.fallthrough_kernel, "Autograd")
            else:
                register_derivative(library, name, op, function)
            register_batching(library, name, op, batching.of_arguments(op, self.signature, self.vmap))

    def _kernel(self, function: Callable[[Any], Any], overload: int, fake: bool = False) -> Any:
        """``function`` as the dispatcher calls it, behind checks of what every op asks of its arguments.

        Public functions have made sure of it, but ops are also called by hand, from saved graphs, and with what hooks
        gave back. `runtime` checks what an argument must be beside others, because the kernels there rely on it.
        """
        types = [_schema_type(hint, overload) for hint in self.hints.values()]
        fields = list(enumerate(zip(self.hints, types, strict=True)))
        tensors = [(i, name, name in ON_ANY_DEVICE) for i, (name, type) in fields[1:] if type.startswith("Tensor")]
        flags = [(i, name, int(type[5:-1])) for i, (name, type) in fields if type.startswith("bool[")]
        signature, data, check = self.signature, fields[0][1][0], self.check
        optional = self.results is not Tensor and Maybe in get_type_hints(self.results).values()

        def kernel(*arguments: Any) -> Any:
            x = arguments[0]
            device = x.device
            if not fake:
                _check_memory(data, x)
            for i, name, on_any_device in tensors:
                other = arguments[i]
                if other is None:
                    continue
                # Beside a tensor without memory torch calls the fake kernel, and its results stay unwritten.
                if other.device != device and (other.is_meta or not on_any_device):
                    raise ValueError(f"{name} must be on {device}, as {data} is, but got one on {other.device}")
                if not fake:
                    _check_memory(name, other)
            for i, name, count in flags:
                if len(arguments[i]) != count:
                    raise ValueError(f"{name} must have {count} entries, but got {len(arguments[i])}")
            call = signature(*arguments)
            if check is not None:
                check(call)
            results = function(call)
            return _without_aliases(arguments, results) if optional else results

        return kernel


# ---- schemas ----


def schema(hints: dict[str, Any], signature: Any, results: Any, overload: int = 0) -> str:
    """An op's schema, but for its name."""
    defaults = signature._field_defaults
    parameters = [
        f"{_schema_type(hint, overload)} {name}" + (f"={_literal(defaults[name])}" if name in defaults else "")
        for name, hint in hints.items()
    ]
    given = "Tensor" if results is Tensor else f"({', '.join(f'Tensor {name}' for name in results._fields)})"
    return f"({', '.join(parameters)}) -> {given}"


def _schema_type(hint: Any, overload: int) -> str:
    if get_origin(hint) is Annotated:
        kinds = get_args(hint)[1:]
        return str(kinds[overload] if len(kinds) > 1 else kinds[0])
    return SCHEMA_TYPES[hint]


def _literal(value: Any) -> str:
    return "None" if value is None else json.dumps(value)


# ---- kernels ----


def _check_memory(name: str, x: Tensor) -> None:
    """Raises if x's storage was made smaller than its shape and strides need. torch gives out its address even then."""
    size = x.element_size()
    bytes = x.untyped_storage().nbytes()
    if bytes >= (x.storage_offset() + x.numel()) * size and x.is_contiguous():
        return
    last = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    if x.numel() and bytes < (x.storage_offset() + last + 1) * size:
        raise ValueError(f"{name} must have memory for its shape, {tuple(x.shape)}, but its storage has {bytes} bytes")


def _without_aliases(arguments: tuple[Any, ...], results: Any) -> tuple[Tensor, ...]:
    """Results as an op must give them: each is a tensor, and none is another result or an argument."""
    seen, given = {id(value) for value in arguments}, []
    for result in results:
        if result is None:
            result = arguments[0].new_empty(0)
        elif id(result) in seen:
            result = result.clone()
        seen.add(id(result))
        given.append(result)
    return tuple(given)


def called_by_inductor(name: str, fake: Any) -> Any:
    """A fake kernel that tells inductor, when a compiler first runs it, to call the op as it is."""

    @functools.wraps(fake)
    def called(*arguments: Any) -> Any:
        let_inductor_call(f"fastdrop::{name}")
        return fake(*arguments)

    return called


# ---- autograd ----


def save(ctx: Any, saved: Any, for_tangents: Any = None) -> None:
    """Saves a NamedTuple for backward: its tensors as autograd wants it, other values as they are."""
    ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in saved])
    ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
    ctx.saved_type = type(saved)
    ctx.set_materialize_grads(False)
    if for_tangents is not None:
        ctx.save_for_forward(*[value if isinstance(value, Tensor) else None for value in for_tangents])


def unpack_saved(ctx: Any) -> Any:
    """The NamedTuple that `save` was given."""
    values = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    return ctx.saved_type(*values)


def saved_mask(words: Maybe, seed: Any) -> Maybe:
    """What backward has the mask from: the words if there are any, otherwise the seed, as a tensor."""
    if words is not None:
        return words
    return seed if seed is None or isinstance(seed, Tensor) else seeds.as_tensor(seed)


def _all_but_data(call: Any, results: Any, needs: Any) -> Any:
    return type(call)(None, *call[1:])
