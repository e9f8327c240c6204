"""Recurrent layers with variational dropout: each mask stays the same for the whole sequence.

`VariationalLSTM` and `VariationalGRU` are torch's layers with three masks: on the input of each layer, on the hidden
state between steps, and on the output. torch's fused kernels run the layers unless the hidden state is dropped between
steps by a mask for each sequence, which they can't do; then `recurrence` runs the steps one by one.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ...core.random import keep_scale, threshold
from ..runtime.dispatch import hide_from_dynamo
from ..runtime.dispatch.modules import flat_weights_of
from .base import SourceOptions, is_traced, trace_call
from .recurrence import Inputs, Steps, run_steps
from .structured import VariationalDropout

__all__ = ["VariationalGRU", "VariationalLSTM"]

States = tuple[Tensor, ...]  # the hidden state and, for an LSTM, the cell state


class _Variational(nn.RNNBase):
    """What both layers share. Each rate is a module, so that schedulers, `audit` and `mc_dropout` find it."""

    shared: bool = False  # whether masks are those of the whole batch; also for layers that were saved before it was

    def _set_rates(
        self,
        dropout_input: float,
        dropout_recurrent: float,
        dropout_output: float,
        shared: bool,
        source: SourceOptions,
    ) -> None:
        if source.get("layout") is not None:
            raise ValueError(f"{type(self).__name__} takes no layout, because it has whole sequences and states only")
        self.shared = shared
        self.dropout_input = VariationalDropout(dropout_input, 0, **source)
        self.dropout_recurrent = VariationalDropout(dropout_recurrent, 0)
        self.dropout_output = VariationalDropout(dropout_output, 0)
        self.dropout_recurrent.own_source = self.dropout_output.own_source = self.dropout_input.own_source

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(f"{type(self).__name__} can't be scripted: call eval() and use torch.jit.trace")

    def forward(self, input: Any, hx: Any = None) -> Any:
        if is_traced(self, input):
            return trace_call(self, input, hx)
        rates = self.dropout_input, self.dropout_recurrent, self.dropout_output
        unfit = isinstance(input, Tensor) and (
            input.dim() not in (2, 3) or not input.numel()
        )  # torch raises or returns early
        if unfit or not any(map(_drops, rates)):
            return super().forward(input, hx)
        y, end = self._run(input, hx if hx is None or self.mode == "LSTM" else (hx,))
        return y, self._unwrap_states(end)

    def _run(self, input: Any, begin: States | None) -> tuple[Any, States]:
        """Runs layer by layer. Inside, time is the first axis, and the rows of a packed sequence stay packed."""
        flat = flat_weights_of(self) or [weight for own in self.all_weights for weight in own]
        packed = input if isinstance(input, PackedSequence) else None
        sizes = None if packed is None else packed.batch_sizes
        single = packed is None and input.dim() == 2
        x = input if packed is None else packed.data
        if single:
            x = x.unsqueeze(0 if self.batch_first else 1)
        if begin is None:
            begin = self._zeros(x, sizes)
        elif single:
            begin = tuple(state.unsqueeze(1) for state in begin)
        elif packed is not None:
            begin = _reorder_batch(begin, packed.sorted_indices)
        self.check_forward_args(x, self._unwrap_states(begin), sizes)
        if packed is None and self.batch_first:
            x = x.transpose(0, 1)

        directions = 2 if self.bidirectional else 1
        per_layer = len(flat) // self.num_layers
        end = []
        for layer in range(self.num_layers):
            states = tuple(state[layer * directions :][:directions] for state in begin)
            weights: list[Any] = flat[layer * per_layer :][:per_layer]
            x, states = self._layer(self._drop_held(self.dropout_input, x, packed), states, weights, packed)
            end.append(states)
        x = self._drop_held(self.dropout_output, x, packed)
        last = tuple(torch.cat(layers) for layers in zip(*end, strict=True))
        if packed is not None:
            return packed._replace(data=x), _reorder_batch(last, packed.unsorted_indices)
        if single:
            return x.squeeze(1), tuple(state.squeeze(1) for state in last)
        return x.transpose(0, 1) if self.batch_first else x, last

    def _drop_held(self, rate: VariationalDropout, x: Tensor, packed: PackedSequence | None) -> Tensor:
        """x with one mask for all steps, of the whole batch or drawn for the batch in the caller's order."""
        if self.shared and _drops(rate):
            rows = x if x.dim() == 2 or x.is_contiguous() else x.transpose(0, 1)
            y: Tensor = rate(rows.reshape(-1, x.shape[-1])).view(rows.shape)
            return y if rows is x else y.transpose(0, 1)
        if packed is None or not _drops(rate):
            dropped: Tensor = rate(x)
            return dropped
        padded, lengths = pad_packed_sequence(PackedSequence(x, packed.batch_sizes))
        (padded,) = _reorder_batch((padded,), packed.unsorted_indices)
        (padded,) = _reorder_batch((rate(padded),), packed.sorted_indices)
        return pack_padded_sequence(padded, lengths).data

    def _zeros(self, x: Tensor, sizes: Tensor | None) -> States:
        layers, batch, width = self.get_expected_hidden_size(x, sizes)
        hidden = x.new_zeros(layers, batch, width)
        return (hidden, x.new_zeros(layers, batch, self.hidden_size)) if self.mode == "LSTM" else (hidden,)

    def _unwrap_states(self, states: States) -> Any:
        return states if self.mode == "LSTM" else states[0]

    def _layer(
        self, x: Tensor, begin: States, weights: list[Tensor], packed: PackedSequence | None
    ) -> tuple[Tensor, States]:
        """One layer's output and last states, in all its directions."""
        if self.shared and _drops(self.dropout_recurrent):  # W (m h) = (W m) h, if m is the same for all h
            of_direction = len(weights) // len(begin[0])
            weights = [
                self.dropout_recurrent(weight) if i % of_direction == 1 else weight for i, weight in enumerate(weights)
            ]
        if self.shared or not _drops(self.dropout_recurrent):
            fused = getattr(torch, self.mode.lower())
            options = self._unwrap_states(begin), weights, self.bias, 1, 0.0, self.training, self.bidirectional
            y, *end = fused(x, *options, False) if packed is None else fused(x, packed.batch_sizes, *options)
            return y, tuple(end)
        per_direction = len(weights) // len(begin[0])
        runs = []
        for direction in range(len(begin[0])):
            states = tuple(state[direction] for state in begin)
            own = weights[direction * per_direction :][:per_direction]
            runs.append(self._recurrence(x, states, own, packed, direction == 1))
        end = zip(*(last for _, last in runs), strict=True)
        return torch.cat([y for y, _ in runs], -1), tuple(torch.stack(states) for states in end)

    def _recurrence(
        self, x: Tensor, begin: States, weights: list[Tensor], packed: PackedSequence | None, reverse: bool
    ) -> tuple[Tensor, States]:
        """One direction, step by step. At step t the first ``sizes[t]`` sequences of the batch still run."""
        sizes = [x.shape[1]] * x.shape[0] if packed is None else packed.batch_sizes.tolist()
        mask = self.dropout_recurrent(torch.ones_like(begin[0]).unsqueeze(0))
        dropped = (mask if packed is None else _reorder_batch((mask,), packed.sorted_indices)[0]).squeeze(0) == 0.0
        w_ih, w_hh, *rest = weights
        b_ih, b_hh = rest[:2] if self.bias else (None, None)
        is_lstm = self.mode == "LSTM"
        if is_lstm and b_ih is not None and b_hh is not None:
            b_ih, b_hh = b_ih + b_hh, None
        steps = Steps(is_lstm, sizes, reverse, keep_scale(threshold(self.dropout_recurrent.p)))
        rows, cell = x.reshape(-1, x.shape[-1]), begin[1] if is_lstm else None
        w_hr = rest[-1] if self.proj_size else None
        y, *last = run_steps(steps, dropped, Inputs(rows, begin[0], cell, w_ih, w_hh, b_ih, b_hh, w_hr))
        return y.reshape(*x.shape[:-1], -1), tuple(last)


def _drops(rate: VariationalDropout) -> bool:
    return rate.training and rate.p > 0.0


def _reorder_batch(states: States, order: Tensor | None) -> States:
    """States with the batch, which is axis 1, in another order."""
    return states if order is None else tuple(state.index_select(1, order) for state in states)


class VariationalLSTM(_Variational, nn.LSTM):
    """`torch.nn.LSTM` with variational dropout: each mask stays the same for the whole sequence.

    There are three kinds of masks, each with a rate of its own:

    * on the input of each layer, the same for both directions
    * on the hidden state of each layer and direction, before the product that leads to the next step's gates
    * on the output of the last layer

    Each call draws new masks, with other decisions for each sequence of the batch. Kept elements are multiplied by
    ``1 / (1 - p)``. The cell state and the returned states are never dropped.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size, device, dtype : as in torch
        As in `torch.nn.LSTM`, the last four by name only. ``dropout_input`` takes the place of its ``dropout``.
    dropout_input, dropout_recurrent, dropout_output : float
        Drop probabilities, 0 to 1. Each is the p of a submodule of the same name, a `VariationalDropout`. Change
        ``.dropout_input.p``, or put one of the submodules into evaluation.
    shared : bool
        Makes the same decisions for all sequences of the batch. torch's fused layers then run, because the mask of the
        hidden state can be applied to the columns of its weights. Gradients are noisier: a batch of B sequences
        averages over B masks otherwise, and over one mask here. A dropped state that is infinite becomes NaN.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : None
        Must be None, because the layer has whole sequences and states only.

    Raises
    ------
    ValueError
        For a probability out of range, and what `torch.nn.LSTM` raises.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    The three submodules draw from one stream.

    Shapes, initial states, unbatched and packed sequences, parameters and ``state_dict`` are those of `torch.nn.LSTM`.
    torch's forward runs in evaluation and if all rates are 0. A mask belongs to a sequence, whatever its place in a
    packed batch: under the same seed a padded and a packed batch give the same numbers. Masks are drawn in this order:
    layer by layer the input, then forward and backward direction; last the output.

    Stored for backward for the masks, whatever the length: 1/8 byte per sequence and feature for input and output
    masks, and 1 byte per sequence and hidden feature of each direction for the recurrent mask. With ``shared`` it is
    1/8 byte per feature of each mask, and a copy of the weights of the hidden state.

    With ``dropout_recurrent`` and without ``shared`` torch's fused layers can't run. The steps then run one by one in
    Python, and so do those of backward, but each direction of a layer is one autograd function, which computes all that
    it can for all steps at once. It keeps 7 numbers per step, sequence and hidden feature, and a GRU's 6. Under
    autocast, transforms and tracers, and in gradients of gradients, the steps are composed of torch's ops, which takes
    longer. `DropConnect` drops recurrent connections and uses the fused layers. ``torch.compile`` doesn't compile the
    function that calls the layer, but the other functions that it calls, as with torch's layers.

    Sources: Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016;
    Merity, Keskar, Socher, "Regularizing and optimizing LSTM language models", 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> lstm = fdt.VariationalLSTM(4, 8, dropout_input=0.3, dropout_output=0.5)
    >>> y, (h, c) = lstm(torch.ones(10, 2, 4))
    >>> dropped = y == 0
    >>> y.shape, bool((dropped == dropped[0]).all())
    (torch.Size([10, 2, 8]), True)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        dropout_input: float = 0.0,
        dropout_recurrent: float = 0.0,
        dropout_output: float = 0.0,
        shared: bool = False,
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
        )
        self._set_rates(dropout_input, dropout_recurrent, dropout_output, shared, source)


class VariationalGRU(_Variational, nn.GRU):
    """`torch.nn.GRU` with variational dropout: each mask stays the same for the whole sequence.

    The recurrent mask is on the hidden state where it is multiplied by weights. The hidden state that the update gate
    carries over is not dropped.

    Parameters
    ----------
    input_size, hidden_size, num_layers, bias, batch_first, bidirectional, device, dtype : as in torch
        As in `torch.nn.GRU`, the last three by name only.
    dropout_input, dropout_recurrent, dropout_output : float
        Drop probabilities, 0 to 1: of each layer's input, of the hidden state before its product, of the last output.
    shared : bool
        Makes the same decisions for all sequences of the batch, so that torch's fused layers can run.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its masks.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : None
        Must be None, because the layer has whole sequences and states only.

    Raises
    ------
    ValueError
        For a probability out of range, and what `torch.nn.GRU` raises.

    See Also
    --------
    VariationalLSTM : says more about these parameters, about memory and sources.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> gru = fdt.VariationalGRU(4, 8, dropout_recurrent=0.3)
    >>> gru
    VariationalGRU(
      4, 8
      (dropout_input): VariationalDropout(p=0.0, time_axis=0, inplace=False, store='bits')
      (dropout_recurrent): VariationalDropout(p=0.3, time_axis=0, inplace=False, store='bits')
      (dropout_output): VariationalDropout(p=0.0, time_axis=0, inplace=False, store='bits')
    )
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        dropout_input: float = 0.0,
        dropout_recurrent: float = 0.0,
        dropout_output: float = 0.0,
        shared: bool = False,
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        self._set_rates(dropout_input, dropout_recurrent, dropout_output, shared, source)


# Compilers leave recurrent layers alone. They would compile the steps one by one, and again for each length.
hide_from_dynamo(_Variational.forward)
