"""`fuse` changes layers so that dropout and its neighbours are one pass or skip what is dropped; `unfuse` undoes it.

A module changes its class where it stands, as in `convert`: to a subclass whose forward takes the parameters of the
modules inside and calls the functions of `functional.fused` in place of these modules.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...nn.base import Rated
from ...nn.residual import LayerDrop, SkipResidual
from ...runtime.dispatch.modules import TorchDropout, children_of
from ..rates import rate_name
from ..reasons import functional_rows, reach, why_left, why_lent
from ..report import Report, Row, describe
from ..source.owners import Owners
from . import peft_layers, residual_layers, transformers_layers
from .rules import Fused, change_class, changed_code, original_class, restore_class
from .torch_layers import (
    FusedSequential,
    FusedTransformerDecoderLayer,
    FusedTransformerEncoderLayer,
    find_runs,
)

__all__ = ["fuse", "unfuse", "would_fuse"]

UNKNOWN = "not in a part that is known"


def fuse(model: nn.Module, *, batch_norm_on_kept: bool = False) -> Report:
    """Makes one pass of dropout and the operations around it, or skips what is dropped; in place, with a report.

    It changes these parts of a model:

    * `torch.nn.Sequential`: a Linear, perhaps ReLU, GELU or SiLU, and Dropout, one after the other, at any position;
    * `torch.nn.Sequential`: Linear, perhaps an element-wise activation, `BatchwiseDropout` (or `Dropout` with
      ``noise_shape=(1, None)``) and Linear, by `fastdrop.torch.batchwise_linear`;
    * `torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``: bias, activation and dropout; bias, dropout,
      residual and norm; attention by `fastdrop.torch.scaled_dot_product_attention`;
    * BERT and GPT-2 of transformers, from 5.4 on: their layers likewise, and attention of the implementations "sdpa"
      and "eager". Dropout of the embeddings stays what it is;
    * LoRA of peft around `torch.nn.Linear`, by `fastdrop.torch.lora_linear`: one active adapter of LoRA itself, neither
      merged nor disabled, without a bias, and of the base layer's dtype or under autocast;
    * residual blocks of timm (ViT's, Swin's, ConvNeXt's, EfficientNet's) and torchvision (Swin's, ConvNeXt's,
      EfficientNet's) with ``DropPath`` or ``StochasticDepth`` by sample: their branches run on kept samples only, by
      `fastdrop.torch.skip_residual`. Samples are kept as under `convert`, and results are the same up to rounding. But
      dropout inside a branch draws for fewer samples, and after the block itself, so its masks differ.

    A module remains the same object with the same parameters, ``state_dict``, hooks, mode and p. The dropout modules
    inside may be torch's or fastdrop's; both drop by fastdrop as long as the module around them is fused. Masks are
    those of the unfused module under `convert` and, for attention, `enable`, because each dropout takes its number from
    torch's generator in the same order.

    The original forward runs in evaluation, and while adapters are merged, disabled or of another dtype. It also runs
    if a module inside gets hooks or another class later on. Once a user asks GPT-2 for attentions or hidden states,
    transformers puts hooks into its blocks, and their original forward runs from then on.

    Subclasses of torch's classes are fused too if they inherit the methods that are replaced; subclasses of other
    packages' classes are not. Modules stay as they are, and the report gives the reason, if a method was replaced on
    the object or on its class, or if a module inside that would not be called has hooks, is quantised or is
    parametrised. Call `fuse` again after changing a model: it fuses the modules that are new. ``torch.jit.script``
    takes fused modules of torch as if they were not fused; for those of other packages call `unfuse` first. Apply
    wrappers that find layers by the name of their class before `fuse`, and ``fully_shard`` after it.

    Parameters
    ----------
    model : Module
    batch_norm_on_kept : bool
        Whether residual blocks with batch norm in a branch, such as EfficientNet's, are fused too. In training, batch
        norm then sees the kept samples only: its result and its running statistics differ from the original block's,
        which normalises over all samples before it drops some. By default such blocks are left.

    Returns
    -------
    Report
        Prints as a table: the path of each module, what it was, and what it is now or why it was left.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8), nn.Dropout(0.1))
    >>> print(fdt.fuse(model))
    module       before      after
    (the model)  Sequential  FusedSequential: 0 + 1 + 2, 3 + 4
    >>> model(torch.randn(4, 8)).shape
    torch.Size([4, 8])
    """
    rows: list[Row] = []
    owners = Owners(model)
    in_other_rows: set[int] = set()  # modules inside one that has a row
    for path, module in model.named_modules():
        known = _fused_class(module)
        if known is FusedSequential:
            rows += _fuse_sequence(path, module)
            in_other_rows.update(map(id, module.children()))
        elif known is not None:
            name = type(module).__name__
            reason = changed_code(module, known) or known.obstacle(module)
            reason = reason or ("" if batch_norm_on_kept else known.batch_norm_obstacle(module))
            in_other_rows.update(map(id, known.parts(module)))
            if reason:
                rows.append(Row(path, name, None, reason))
            elif not isinstance(module, Fused):
                change_class(module, known)
                rows.append(Row(path, name, type(module).__name__))
        elif rate_name(module) is not None and id(module) not in in_other_rows:
            rows.append(_row_left(path, module, why_lent(owners, module) or f"{UNKNOWN}; {reach(module)}"))
        if not isinstance(module, Fused):
            rows += functional_rows(path, module, owners)
    return Report(rows)


def _fused_class(module: nn.Module) -> Any:
    """The fused class for a module: for torch's layers and their subclasses, and for some classes of other packages."""
    original = original_class(module)
    for known in (FusedSequential, FusedTransformerEncoderLayer, FusedTransformerDecoderLayer):
        if issubclass(original, known.original):
            return known
    theirs = transformers_layers.fused_class(original) or peft_layers.fused_class(original)
    return theirs or residual_layers.fused_class(original, module)


def would_fuse(owner: Any, inner: nn.Module | None = None) -> bool:
    """Whether `fuse` has a module drop by fastdrop: itself, or the module ``inner`` in it."""
    known = _fused_class(owner)
    if known is None or isinstance(owner, Fused) or changed_code(owner, known):
        return False
    if known is FusedSequential:
        children = [*children_of(owner).values()]
        runs = find_runs(owner, range(len(children)))
        return any(child is inner and not isinstance(run, str) for child, run in zip(children, runs, strict=True))
    if known.obstacle(owner) or known.batch_norm_obstacle(owner):
        return False
    return inner is None or any(part is inner for part in known.parts(owner))


def _fuse_sequence(path: str, sequence: Any) -> list[Row]:
    """A row for the sequence if it changes, and one for each of its modules that drops and is left."""
    name, reason = type(sequence).__name__, changed_code(sequence, FusedSequential)
    runs = find_runs(sequence, range(len(children_of(sequence))))
    parts = dict.fromkeys(" + ".join(run.names) for run in runs if not isinstance(run, str))
    rows = []
    if parts and not reason and not isinstance(sequence, Fused):
        change_class(sequence, FusedSequential)
        rows.append(Row(path, name, f"{type(sequence).__name__}: {', '.join(parts)}"))
    for (inner, module), run in zip(children_of(sequence).items(), runs, strict=True):
        why = f"in a {name}: {reason}" if reason else run
        if rate_name(module) is not None and isinstance(why, str):
            rows.append(_row_left(f"{path}.{inner}" if path else inner, module, why))
    return rows


def _row_left(path: str, module: nn.Module, reason: str) -> Row:
    before = describe(module) if isinstance(module, TorchDropout | Rated) else type(module).__name__
    by_itself = isinstance(module, nn.MultiheadAttention | nn.RNNBase)
    if isinstance(module, SkipResidual | LayerDrop):
        reason = "it computes only what it keeps"
    return Row(path, before, None, why_left(module) if by_itself else reason)


def unfuse(model: nn.Module) -> Report:
    """Undoes `fuse`: every module it changed has its old class again.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Report
        Prints as a table: the path of each module, what it was, and what it is now.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    >>> _ = fdt.fuse(model)
    >>> print(fdt.unfuse(model))
    module       before           after
    (the model)  FusedSequential  Sequential
    """
    rows = []
    for path, module in model.named_modules():
        before = type(module)
        if isinstance(module, Fused):
            after, reason = (
                (type(module).__name__, "") if restore_class(module) else (None, "its class was changed since")
            )
            rows.append(Row(path, before.__name__, after, reason))
    return Report(rows)
