"""A ConvNeXt of torchvision: stochastic depth that skips what it drops.

You want this if you train torchvision's models with StochasticDepth (ConvNeXt, Swin, EfficientNet). torchvision
computes each branch for all samples and then multiplies some of them by 0. `fdt.convert` makes that one pass of one-bit
masks, and `fdt.fuse` computes the branch for the kept samples only. The rates rise from block to block.
`fdt.DropoutScheduler` drives them by one number and keeps their proportions.

    python examples/recipes/vision/torchvision_convnext.py --quick
"""

import argparse

import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import fastdrop.torch as fdt
from fastdrop import schedules


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small batch")
    images = torch.randn(8 if parser.parse_args().quick else 128, 3, 32, 32)

    torch.manual_seed(0)
    stages = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 3)]
    model = ConvNeXt(stages, stochastic_depth_prob=0.5, layer_scale=1.0, num_classes=10).train()
    print(fdt.convert(model))
    torch.manual_seed(1)
    expected = model(images)

    report = fdt.fuse(model)
    print(report)
    assert len(report.changed) == 5
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), expected)

    computed = []
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda module, given, result: computed.append(len(result)))
    model(images).square().mean().backward()
    print(f"samples computed in each block: {computed} of {len(images)}")
    assert sum(computed) < len(computed) * len(images)

    scheduler = fdt.DropoutScheduler(model, schedules.linear(0.5, 0.1, 10))
    rates = [module.p for module in model.modules() if isinstance(module, fdt.StochasticDepth)]
    scheduler.step(10)
    later = [module.p for module in model.modules() if isinstance(module, fdt.StochasticDepth)]
    print("rates:", ", ".join(f"{p:.3f}" for p in rates), "and after ten steps:", ", ".join(f"{p:.3f}" for p in later))
    torch.testing.assert_close(torch.tensor(later) * 5, torch.tensor(rates))


if __name__ == "__main__":
    main()
