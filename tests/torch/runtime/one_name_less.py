"""What fastdrop.torch does in a torch that lacks one of its private names. Run by `test_dispatch` in child processes.

``python -m tests.torch.runtime.one_name_less NAME ...`` prints one line of JSON for each name: what each check gave. A
fork of the process imports fastdrop.torch with a `dispatch` that asks for another name, which no torch has. The empty
name takes nothing away: its results are those that the others must equal.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.util
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastdrop

DISPATCH = "fastdrop.torch.runtime.dispatch"
COMPILERS = re.compile(r"_guards|_dynamo\.(guards|source)|functorch\.config|SKIP")  # names for compiled code


class WithoutName(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports `dispatch` with a name that it asks torch for replaced."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith(DISPATCH):
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=fullname == DISPATCH)

    def is_package(self, fullname):
        return fullname == DISPATCH

    def get_source(self, fullname):
        folder = Path(fastdrop.__file__).parent / "torch" / "runtime" / "dispatch"
        _, _, module = fullname[len(DISPATCH) :].rpartition(".")
        source = (folder / f"{module or '__init__'}.py").read_text()
        if self.name:
            source = re.sub(
                rf"(?<![\w.]){re.escape(self.name)}\b|(?<=\.){re.escape(self.name)}\b", self.missing, source
            )
        return source

    @property
    def missing(self) -> str:
        return self.name + "_gone"


def numbers(*tensors) -> list[float]:
    return [float(f"{number:.7g}") for x in tensors for number in x.detach().double().flatten().tolist()]


def leaf(*shape):
    return torch.linspace(-1.0, 2.0, torch.Size(shape).numel()).reshape(shape).requires_grad_()


def with_gradient(function, x):
    y = function(x)
    y.backward(torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape))
    return numbers(y, x.grad)


def checks(fdt):
    """Name and function of each."""
    dropped = {"seed": 7}

    def plain():
        return with_gradient(lambda x: fdt.dropout(x, 0.3, **dropped), leaf(1000))

    def drawn():
        torch.manual_seed(3)
        return with_gradient(lambda x: fdt.dropout(x, 0.3) + fdt.dropout(x, 0.3, store="seed"), leaf(1000))

    def in_place():
        x = leaf(40)
        with contextlib.suppress(RuntimeError):  # torch's own refusal of a leaf
            fdt.dropout(x, 0.3, inplace=True, **dropped)
            return "wrote to a leaf"
        with torch.no_grad():
            part = x.detach().clone()[3:]
            return numbers(x, fdt.dropout(part, 0.3, inplace=True, **dropped), part)

    def twice():
        x = leaf(40)
        (first,) = torch.autograd.grad(fdt.dropout(x * x, 0.3, **dropped).sum(), x, create_graph=True)
        return numbers(*torch.autograd.grad(first.sum(), x))

    def gaussian():
        return with_gradient(lambda x: fdt.gaussian_dropout(x, 0.3, **dropped), leaf(40))

    def blocks():
        return with_gradient(lambda x: fdt.drop_block2d(x, 0.3, 3, **dropped), leaf(2, 3, 8, 8))

    def fused():
        return with_gradient(lambda x: fdt.bias_act_dropout(x, x[0], 0.3, "gelu", **dropped), leaf(8, 16))

    def attention():
        def attend(x):
            return fdt.scaled_dot_product_attention(x, x, x, dropout_p=0.3, **dropped)

        return with_gradient(attend, leaf(2, 6, 8))

    def mapped():
        x = leaf(4, 20).detach()
        return numbers(torch.vmap(lambda row: fdt.dropout(row, 0.3, **dropped), randomness="same")(x))

    def mapped_drawing():
        torch.manual_seed(3)
        return numbers(torch.vmap(lambda row: fdt.dropout(row, 0.3), randomness="different")(leaf(4, 20).detach()))

    def nested():
        parts = [leaf(3, 4).detach(), leaf(5, 4).detach()]
        results = []
        for layout in (torch.strided, torch.jagged):
            y = fdt.dropout(torch.nested.nested_tensor(parts, layout=layout), 0.3, **dropped)
            results += y.unbind()
        return numbers(*results)

    def weights():
        torch.manual_seed(3)
        linear, lstm = fdt.DropConnect(nn.Linear(6, 4), p=0.3), fdt.DropConnect(nn.LSTM(6, 4), p=0.3)
        variational = fdt.VariationalLSTM(6, 4, dropout_input=0.3)
        x = leaf(5, 2, 6)
        return numbers(linear(x), lstm(x)[0], variational(x)[0], *torch.autograd.grad(lstm(x)[0].sum(), x))

    def models():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.3), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        )
        fused = fdt.fuse(model)
        if "torch lacks" in str(fused):
            raise RuntimeError(str(fused))
        torch.manual_seed(4)
        y = model(leaf(2, 5, 16))
        rows = [
            len(fdt.convert(model).rows),
            len(fdt.fold_scaling(nn.Sequential(nn.Dropout(), nn.Linear(4, 4)).eval()).rows),
        ]
        return numbers(y, torch.tensor([*rows, len(fused.rows)]))

    def sampled():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 6), fdt.Dropout(0.3), nn.Linear(6, 2)).eval()
        return numbers(fdt.mc_predict(model, leaf(4, 6).detach(), samples=6, seed=5).mean)

    def audited():
        report = fdt.audit(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)), leaf(2, 4).detach())
        return str(report)

    return (
        plain, drawn, in_place, twice, gaussian, blocks, fused, attention, mapped, mapped_drawing, nested, weights,
        models, sampled, audited,
    )  # fmt: skip


def compiled(fdt):
    torch.manual_seed(3)

    def program(x):
        return fdt.dropout(x.sin(), 0.3) + F.dropout(x, 0.3)

    with fdt.enabled():
        return with_gradient(torch.compile(program, backend="aot_eager"), leaf(8, 8))


def torchs_dropout():
    """Of torch itself: a NaN stays where all is dropped."""
    torch.manual_seed(3)
    x = torch.tensor([float("nan"), 1.0])
    return repr(F.dropout(x, 1.0)), F.dropout(torch.ones(50), 0.3).tolist(), F.alpha_dropout(x, 0.5).tolist()[1:]


def enabling(fdt):
    """Works, or refuses and leaves torch as it is; blocks of it too."""
    before = torchs_dropout()
    told = set()
    for begin, end in ((fdt.enable, fdt.disable), (fdt.enabled().__enter__, None)):
        try:
            begin()
        except RuntimeError as error:
            told.add(f"RuntimeError: {error}")
        else:
            told.add("works" if F.dropout(torch.tensor([float("nan")]), 1.0).item() == 0.0 else "is without effect")
            if end is None:
                continue
            end()
        if torchs_dropout() != before:
            return "changed torch's dropout"
    return ", ".join(sorted(told))


def results(name: str) -> dict[str, str | list[float]]:
    sys.meta_path.insert(0, WithoutName(name))
    warnings.simplefilter("ignore")
    import fastdrop.torch as fdt

    found = {}
    takes_a_compiler = COMPILERS.search(name or " ".join(sys.argv))
    for check in (*checks(fdt), *([compiled] if takes_a_compiler else [])):
        try:
            found[check.__name__] = check(fdt) if check is compiled else check()
        except Exception as error:
            found[check.__name__] = f"{type(error).__name__}: {error}"
    found["enabling"] = enabling(fdt)
    return found


def main() -> None:
    torch.set_num_threads(1)
    # What each fork would import again. fastdrop.torch is not there yet.
    fastdrop.dropout(np.ones(8, np.float32), 0.5)
    warnings.simplefilter("ignore")
    torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    if any(map(COMPILERS.search, sys.argv[1:])):
        torch.compile(torch.sin, backend="eager")(torch.ones(2))
        torch.compiler.reset()
    gc.collect()
    gc.freeze()  # else each child's collections look through all of torch, and copy its pages
    for name in sys.argv[1:]:
        sys.stdout.flush()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            line = json.dumps({"name": name, **results(name)})
        except BaseException as error:
            line = json.dumps({"name": name, "import": f"{type(error).__name__}: {error}"})
        print(line, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
