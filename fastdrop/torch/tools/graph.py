"""What follows what in a model's forward pass: the module that a tensor comes from, and those that take it.

Seen by running the model on an example, by tracing it with torch.fx where there is none, and by the order of
`nn.Sequential` where it can't be traced. All of it on a copy in evaluation mode: the model itself is left alone.
"""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..models.rates import rate_name
from ..runtime.context import overriding, without_gradients
from ..runtime.dispatch.compilers import stance_kept
from ..runtime.dispatch.modes import without_function_overrides
from ..runtime.dispatch.ops import tree_leaves

# What an op is, by the file of torch in which its module's class, or one that it derives from, is defined ...
MODULES = {
    "torch.nn.modules.conv": "convolution",
    "torch.nn.modules.batchnorm": "batch norm",
    "torch.nn.modules.rnn": "recurrent",
    "torch.nn.modules.linear": "linear",
    "torch.nn.modules.activation": "pointwise",
    "torch.nn.modules.pooling": "pooling",
    "torch.nn.modules.flatten": "shape",
    "torch.nn.modules.normalization": "norm",
    "torch.nn.modules.instancenorm": "norm",
    "torch.nn.modules.sparse": "embedding",
    "torch.nn.modules.dropout": "dropout",
}
# ... or by the function's name.
FUNCTIONS = {
    "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "batch norm": "batch_norm",
    "linear": "linear matmul __matmul__",
    "pointwise": "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu gelu silu mish tanh tanh_ sigmoid "
    "sigmoid_ hardtanh hardswish hardsigmoid softplus prelu rrelu glu softmax log_softmax logsigmoid contiguous to "
    "type float half bfloat16 double clone",
    "pooling": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d interpolate",
    "shape": "flatten view reshape squeeze unsqueeze permute transpose movedim swapaxes t __get__ unflatten",
    "join": "cat concat concatenate",
    "norm": "layer_norm group_norm instance_norm rms_norm local_response_norm",
    "dropout": "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout feature_dropout_ alpha_dropout "
    "alpha_dropout_ feature_alpha_dropout feature_alpha_dropout_ variational_dropout drop_block2d drop_block3d "
    "stochastic_depth gaussian_dropout",
}
KINDS = {name: kind for kind, names in FUNCTIONS.items() for name in names.split()}


@dataclass(eq=False)
class Op:
    """A module that is taken whole, or a function called by ``path``'s module."""

    path: str
    name: str
    module: nn.Module | None = None
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    sources: list[tuple[Op, int]] = field(default_factory=list)  # the maker of each tensor it takes; which result it is
    users: list[Op] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return KINDS.get(self.name, "other") if self.module is None else _module_kind(self.module)


@dataclass
class Flow:
    """Ops in the order in which they run, those that make the model's outputs, and what kept us from seeing more."""

    ops: list[Op]
    outputs: list[Op]
    limit: str = ""

    @classmethod
    def of(cls, model: nn.Module, example: Any = None) -> Flow:
        """With an example, what the model raises on it is raised; without one, nothing is."""
        shared = model.parameters() if example is None else ()  # what traces computes nothing with parameters
        try:
            twin = copy.deepcopy(model, {id(parameter): parameter for parameter in shared}).eval()
        except Exception as error:  # whatever a model's own __deepcopy__ or train may raise
            return _in_sequences(model, f"the model can't be copied ({_first_line(error)})")
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        state = torch.default_generator.get_state()
        try:
            with stance_kept(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
                if example is not None:
                    return _run(twin, example if isinstance(example, tuple) else (example,))
                try:
                    return _traced(twin)
                except Exception as error:  # whatever its forward raises on fx's proxies
                    limit = f"the model can't be traced ({_first_line(error)}); give an example_input"
                    return _in_sequences(model, limit)
        finally:  # where an exception from a signal kept torch's contexts from it
            torch.default_generator.set_state(state)


def backward(op: Op, through: set[str]) -> Iterator[tuple[Op, int]]:
    """Ops that feed op, and which of their results does, seen through ops of the given kinds; the nearest first."""
    pending = deque(op.sources)
    seen = set(pending)
    while pending:
        source, result = pending.popleft()
        yield source, result
        if source.kind in through:
            pending += (pair for pair in source.sources if pair not in seen)
            seen.update(source.sources)


def forward(op: Op, through: set[str]) -> Iterator[Op]:
    """Ops that op feeds, seen through ops of the given kinds; the nearest first."""
    pending = deque(op.users)
    seen = set(pending)
    while pending:
        user = pending.popleft()
        yield user
        if user.kind in through:
            pending += (further for further in user.users if further not in seen)
            seen.update(user.users)


def _module_kind(module: nn.Module) -> str:
    """What a module is, as the functions of a kind do; "other" for what we know nothing of."""
    if isinstance(module, nn.Identity):
        return "pointwise"
    if isinstance(module, nn.MultiheadAttention):
        return "other"
    for cls in type(module).__mro__:
        if cls.__name__.startswith("Adaptive"):  # pooling; where it comes, there are mostly no pixels any more
            return "other"
        if cls.__module__ in MODULES:
            return MODULES[cls.__module__]
    return "other" if rate_name(module) is None else "dropout"


def _is_whole(module: nn.Module) -> bool:
    """Whether we look at a module as one op. What is unknown is looked into, for the functions that it calls."""
    if _module_kind(module) != "other" or isinstance(module, nn.MultiheadAttention):
        return True
    return type(module).__module__.startswith("torch.nn") and next(module.children(), None) is None


def _connect(op: Op, sources: list[tuple[Op, int]]) -> Op:
    op.sources = sources
    for source, _ in sources:
        source.users.append(op)
    return op


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) < 100 else text[:100] + "..."


# ---- by running ----


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Flow:
    recorder = _Recorder(model)
    with without_gradients(), overriding(recorder):
        result = model(*inputs)
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    limit = "scripted modules can't be looked into" if scripted else ""
    return Flow(recorder.ops, [op for op, _ in recorder.makers(result)], limit)


class _Recorder(TorchFunctionMode):
    """Writes down who makes each tensor: hooks for modules, the mode for functions called between them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._made: dict[int, tuple[Op, int]] = {}
        self._kept: list[Tensor] = []  # so that no tensor gets the id of one that is gone
        self._callers = [""]
        self._whole = 0  # how many of the modules that run are taken whole
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            module.register_forward_pre_hook(self._entering(path, _is_whole(module)))
            module.register_forward_hook(self._leaving(path, _is_whole(module)), with_kwargs=True)

    def makers(self, tensors: Any) -> list[tuple[Op, int]]:
        leaves = tree_leaves(tensors)
        return [self._made[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in self._made]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._whole:
            return result
        op = Op(self._callers[-1], getattr(func, "__name__", str(func)), None, func, args, kwargs or {})
        return self._record(op, (args, kwargs), result)

    def _entering(self, path: str, whole: bool) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._callers.append(path)
            self._whole += whole

        return hook

    def _leaving(self, path: str, whole: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            self._callers.pop()
            self._whole -= whole
            if whole and not self._whole:
                return self._record(Op(path, type(module).__name__, module), (args, kwargs), result)
            return None

        return hook

    def _record(self, op: Op, given: Any, result: Any) -> Any:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            return result
        _connect(op, self.makers(given))
        self.ops.append(op)
        if op.kind == "dropout" and isinstance(result, Tensor):
            # In evaluation it gives back what it was given, which others may take as well.
            with without_function_overrides():
                result = result.view_as(result)
            made = [result]
        for i, tensor in enumerate(made):
            self._made[id(tensor)] = op, i
        self._kept += made
        return result


# ---- by tracing ----


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_whole(m)


def _traced(model: nn.Module) -> Flow:
    graph = _Tracer().trace(model)
    flow = Flow([], [])
    made: dict[fx.Node, tuple[Op, int]] = {}
    for node in graph.nodes:
        sources = [made[source] for source in node.all_input_nodes if source in made]
        if node.op == "output":
            flow.outputs = [op for op, _ in sources]
        elif node.op == "call_module":
            module = model.get_submodule(node.target)
            op = Op(node.target, type(module).__name__, module)
            made[node] = op, 0
            flow.ops.append(_connect(op, sources))
        elif node.target is operator.getitem and sources and _returns_several(node.args[0], sources[0][0]):
            made[node] = sources[0][0], node.args[1]
        elif node.op in ("call_function", "call_method"):
            name = node.target if node.op == "call_method" else node.target.__name__
            caller = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
            name = "__get__" if name == "getattr" else name  # as the same is called where it runs
            op = Op(caller, name, None, node.target, node.args, node.kwargs)
            made[node] = op, 0
            flow.ops.append(_connect(op, sources))
    return flow


def _returns_several(node: fx.Node, op: Op) -> bool:
    """Whether indexing what a node returns picks one of several results, and not a part of a tensor."""
    return node.op == "call_module" and isinstance(op.module, nn.RNNBase | nn.LSTMCell | nn.MultiheadAttention)


# ---- by the order in nn.Sequential ----


def _in_sequences(model: nn.Module, limit: str) -> Flow:
    flow = Flow([], [], limit)
    inner = {id(child) for module in model.modules() if isinstance(module, nn.Sequential) for child in module}
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential) and id(module) not in inner:
            last: list[tuple[Op, int]] = []
            for below, part in _flattened(path, module):
                op = _connect(Op(below, type(part).__name__, part), last)
                flow.ops.append(op)
                last = [(op, 0)]
            if module is model:
                flow.outputs = [op for op, _ in last]
    return flow


def _flattened(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _flattened(f"{path}.{name}" if path else name, child)
    else:
        yield path, module
