"""What type checkers say of the public API. `make lint` checks this file with strict mypy; it is not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray

import fastdrop as fd
import fastdrop.torch as fdt

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

Floats = NDArray[np.float32]


def arrays(x: Floats, training: bool, store: str) -> None:
    y, mask = fd.dropout(x, 0.5, training=training, rng=0)
    assert_type(y, Floats)
    assert_type(mask, fd.PackedMask | Any)
    print(mask.kept, mask.to_bool().all())
    assert_type(fd.dropout_backward(y, mask), Floats)
    assert_type(fd.apply_mask([1.0, 2.0], None), NDArray[Any])
    assert_type(fd.dropout([1.0, 2.0])[0], NDArray[Any])
    assert_type(fd.dropout(x, store=store), tuple[NDArray[Any], Any])
    print(mask.seed)  # type: ignore[union-attr]
    fd.dropout(x, inplace=True)  # type: ignore[call-overload]
    fd.dropout(x, scaling="other")  # type: ignore[call-overload]
    fd.dropout(x, noise_shape=(None, 1), scaling="standard", out=x, part=fd.Part((2,), (0,), (2,)), rng=fd.Stream(1))

    assert_type(fd.dropout(x, store="seed")[1], fd.SeededMask | Any)
    assert_type(fd.alpha_dropout(x, store="seed")[1], fd.SeededMask | Any)
    assert_type(fd.drop_connect(x, rng=np.random.default_rng(0))[1], fd.PackedMask | Any)
    assert_type(fd.feature_dropout(x, 0.1, -1, scaling="standard")[1], fd.PackedMask | Any)
    assert_type(fd.feature_alpha_dropout(x, 0.1, -1)[0], Floats)
    assert_type(fd.variational_dropout(x, 0.1, 0, store="seed"), tuple[Floats, fd.SeededMask | Any])
    assert_type(fd.stochastic_depth(x, 0.1, "row"), tuple[Floats, fd.PackedMask | Any])
    fd.stochastic_depth(x, 0.1, "rows")  # type: ignore[call-overload]
    assert_type(fd.drop_block(x, 0.1, (3, 3)), tuple[Floats, fd.PackedMask | Any])
    assert_type(fd.gaussian_dropout(x, 0.1), tuple[Floats, fd.GaussianNoise | Any])

    out, saved = fd.bias_act_dropout(x, x, 0.1, "relu")
    print(out.shape, saved.nbytes, saved.backward(out).bias.sum())
    normed, total, kept = fd.dropout_add_layer_norm(x, None, p=0.1)
    assert_type(kept.backward(normed, dresidual=total).weight, NDArray[Any] | Any)


def on_a_gpu(x: Any) -> None:
    """Arrays of CuPy and Numba, which have no types."""
    y, mask = fd.dropout(x)
    print(y.get(), mask.kept)
    fd.dropout_add(x, x)


def tensors(x: torch.Tensor, mesh: DeviceMesh) -> None:
    assert_type(fdt.dropout(x, 0.5, seed=0, noise_shape=(None, 1)), torch.Tensor)
    assert_type(fdt.drop_block3d(x, 0.5, 3), torch.Tensor)
    assert_type(fdt.softmax_dropout(x, 0.5), torch.Tensor)
    assert_type(fdt.dropout_add_layer_norm(x, x), tuple[torch.Tensor, torch.Tensor])
    assert_type(fdt.lora_linear(x, x, None, x, x, 2.0, 0.1), torch.Tensor)
    assert_type(fdt.skip_residual(x, torch.relu, 0.5), torch.Tensor)
    assert_type(fdt.token_dropout(x, 0.5), torch.Tensor)
    assert_type(fdt.token_dropout(x, 0.5, return_index=True), tuple[torch.Tensor, torch.Tensor])
    assert_type(fdt.scaled_dot_product_attention(x, x, x, dropout_p=0.1), torch.Tensor)
    fdt.dropout(x, part=fd.Part((2,), (0,), (2,)))
    fdt.dropout_add(x, x, part=lambda shape: fd.Part(shape, (0,) * len(shape), shape))
    fdt.dropout(x, part=3)  # type: ignore[arg-type]
    fdt.Dropout(0.5, layout=(mesh, [Shard(0)]), seed=1)
    fdt.Dropout(0.5, sed=1)  # type: ignore[call-arg]
    fdt.no_such_name(x)  # type: ignore[attr-defined]
    fdt.dropout(x, inplce=True)  # type: ignore[call-arg]
    fdt.geglu_dropout(x)  # type: ignore[call-arg]


def models(model: torch.nn.Module, x: torch.Tensor) -> None:
    prediction = fdt.mc_predict(model, x, samples=8, task="classification")
    print(prediction.entropy.shape)
    for row in fdt.fuse(model).changed + fdt.convert(model).left:
        print(row.path)
    with fdt.enabled(), fdt.mc_dropout(model), fdt.same_masks(model, 0):
        model(x)
    scheduler = fdt.DropoutScheduler(model, fd.schedules.linear(0.5, 0.1, 10))
    assert_type(scheduler.step(), float)
    masks = fdt.name_masks(model, seed=0)
    with masks.at(3):
        model(x)
    assert_type(fdt.Dropout(0.5).p, float)
