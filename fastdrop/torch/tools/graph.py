"""The order of the layers in a model's forward pass: which module or function makes each tensor, and which take it.

`audit` asks `LayerGraph.of`. With an example input it runs the model. Without one, torch.fx traces the model, and if
that fails, the order within each `nn.Sequential` is known. It works on a copy in evaluation mode and leaves the model
itself as it is.
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
from ..nn.residual import LayerDrop, SkipResidual
from ..runtime.context import overriding, without_gradients
from ..runtime.dispatch.compilers import stance_kept
from ..runtime.dispatch.modes import without_function_overrides
from ..runtime.dispatch.ops import tree_leaves

# The kind of a step, by the file of torch that defines its module's class or a base class of that ...
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
class Step:
    """A module that is one step of the model, or a function that the module at ``path`` calls."""

    path: str
    name: str
    module: nn.Module | None = None
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    # For each tensor that it takes: the step that made it, and the position among that step's results.
    sources: list[tuple[Step, int]] = field(default_factory=list)
    users: list[Step] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return KINDS.get(self.name, "other") if self.module is None else _module_kind(self.module)


@dataclass
class LayerGraph:
    """The steps in the order in which they run, those that make the model's outputs, and why there aren't more."""

    steps: list[Step]
    outputs: list[Step]
    limit: str = ""

    @classmethod
    def of(cls, model: nn.Module, example: Any = None) -> LayerGraph:
        """The graph of a model. With an example it raises what the model raises; without one it raises nothing."""
        shared = model.parameters() if example is None else ()  # tracing computes nothing with parameters
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
                    return _trace(twin)
                except Exception as error:  # whatever its forward raises on fx's proxies
                    limit = f"the model can't be traced ({_first_line(error)}); give an example_input"
                    return _in_sequences(model, limit)
        finally:  # in case an exception from a signal ended torch's contexts early
            torch.default_generator.set_state(state)


def backward(step: Step, through: set[str]) -> Iterator[tuple[Step, int]]:
    """The steps before a step, the nearest first, and which results of them it takes. Looks past given kinds."""
    pending = deque(step.sources)
    seen = set(pending)
    while pending:
        source, result = pending.popleft()
        yield source, result
        if source.kind in through:
            pending += (pair for pair in source.sources if pair not in seen)
            seen.update(source.sources)


def forward(step: Step, through: set[str]) -> Iterator[Step]:
    """The steps after a step, the nearest first. Looks past given kinds."""
    pending = deque(step.users)
    seen = set(pending)
    while pending:
        user = pending.popleft()
        yield user
        if user.kind in through:
            pending += (further for further in user.users if further not in seen)
            seen.update(user.users)


def _module_kind(module: nn.Module) -> str:
    """The kind of a module, the same as that of functions that do the same; "other" if it is unknown."""
    if isinstance(module, nn.Identity):
        return "pointwise"
    if isinstance(module, nn.MultiheadAttention | SkipResidual | LayerDrop):
        return "other"
    for cls in type(module).__mro__:
        if cls.__name__.startswith("Adaptive"):  # adaptive pooling: after it there are mostly no pixels any more
            return "other"
        if cls.__module__ in MODULES:
            return MODULES[cls.__module__]
    return "other" if rate_name(module) is None else "dropout"


def _is_whole(module: nn.Module) -> bool:
    """Whether a module is one step. Modules of unknown kind are not: the functions that they call are steps."""
    if _module_kind(module) != "other" or isinstance(module, nn.MultiheadAttention):
        return True
    return type(module).__module__.startswith("torch.nn") and next(module.children(), None) is None


def _connect(step: Step, sources: list[tuple[Step, int]]) -> Step:
    step.sources = sources
    for source, _ in sources:
        source.users.append(step)
    return step


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) < 100 else text[:100] + "..."


# ---- by running ----


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> LayerGraph:
    recorder = _Recorder(model)
    with without_gradients(), overriding(recorder):
        result = model(*inputs)
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    limit = "scripted modules can't be looked into" if scripted else ""
    return LayerGraph(recorder.steps, [step for step, _ in recorder.makers(result)], limit)


class _Recorder(TorchFunctionMode):
    """Notes which step makes each tensor: hooks see modules, the function mode sees functions called between them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._made: dict[int, tuple[Step, int]] = {}
        self._kept: list[Tensor] = []  # so that no new tensor gets the id of an old one
        self._callers = [""]
        self._whole = 0  # how many modules that are one step are running
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            module.register_forward_pre_hook(self._entering(path, _is_whole(module)))
            module.register_forward_hook(self._leaving(path, _is_whole(module)), with_kwargs=True)

    def makers(self, tensors: Any) -> list[tuple[Step, int]]:
        leaves = tree_leaves(tensors)
        return [self._made[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in self._made]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._whole:
            return result
        step = Step(self._callers[-1], getattr(func, "__name__", str(func)), None, func, args, kwargs or {})
        return self._record(step, (args, kwargs), result)

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
                return self._record(Step(path, type(module).__name__, module), (args, kwargs), result)
            return None

        return hook

    def _record(self, step: Step, given: Any, result: Any) -> Any:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            return result
        _connect(step, self.makers(given))
        self.steps.append(step)
        if step.kind == "dropout" and isinstance(result, Tensor):
            # In evaluation dropout returns its input, which other steps may take as well. A view tells them apart.
            with without_function_overrides():
                result = result.view_as(result)
            made = [result]
        for i, tensor in enumerate(made):
            self._made[id(tensor)] = step, i
        self._kept += made
        return result


# ---- by tracing ----


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_whole(m)


def _trace(model: nn.Module) -> LayerGraph:
    traced = _Tracer().trace(model)
    graph = LayerGraph([], [])
    made: dict[fx.Node, tuple[Step, int]] = {}
    for node in traced.nodes:
        sources = [made[source] for source in node.all_input_nodes if source in made]
        if node.op == "output":
            graph.outputs = [step for step, _ in sources]
        elif node.op == "call_module":
            module = model.get_submodule(node.target)
            step = Step(node.target, type(module).__name__, module)
            made[node] = step, 0
            graph.steps.append(_connect(step, sources))
        elif node.target is operator.getitem and sources and _returns_several(node.args[0], sources[0][0]):
            made[node] = sources[0][0], node.args[1]
        elif node.op in ("call_function", "call_method"):
            name = node.target if node.op == "call_method" else node.target.__name__
            caller = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
            name = "__get__" if name == "getattr" else name  # the name that it has when the model runs
            step = Step(caller, name, None, node.target, node.args, node.kwargs)
            made[node] = step, 0
            graph.steps.append(_connect(step, sources))
    return graph


def _returns_several(node: fx.Node, step: Step) -> bool:
    """Whether indexing what a node returns picks one of several results, and not a part of a tensor."""
    return node.op == "call_module" and isinstance(step.module, nn.RNNBase | nn.LSTMCell | nn.MultiheadAttention)


# ---- by the order in nn.Sequential ----


def _in_sequences(model: nn.Module, limit: str) -> LayerGraph:
    graph = LayerGraph([], [], limit)
    inner = {id(child) for module in model.modules() if isinstance(module, nn.Sequential) for child in module}
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential) and id(module) not in inner:
            last: list[tuple[Step, int]] = []
            for below, part in _flatten(path, module):
                step = _connect(Step(below, type(part).__name__, part), last)
                graph.steps.append(step)
                last = [(step, 0)]
            if module is model:
                graph.outputs = [step for step, _ in last]
    return graph


def _flatten(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _flatten(f"{path}.{name}" if path else name, child)
    else:
        yield path, module
