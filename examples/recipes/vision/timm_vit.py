"""A vision transformer of timm: `convert` for its modules, `enable` for its attention, `fuse` for its drop path.

You want this if you train timm's models on a CPU. Three kinds of dropout are in a ViT. Its Dropout and DropPath modules
are changed by `fdt.convert`. Attention drops inside of `F.scaled_dot_product_attention`, which only `fdt.enable`
reaches. And with `fdt.fuse` the blocks skip what drop path drops: a sample that loses its branch is not computed.

    python examples/recipes/vision/timm_vit.py --quick
"""

import argparse

import timm
import torch
from torch.autograd.profiler import profile

import fastdrop.torch as fdt


def make_model():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.4}
    return timm.models.VisionTransformer(**sizes, **rates).train()


def masks_drawn_in_a_step(model, images):
    """Runs a step and counts the masks that torch's dropout draws, all by one operator."""
    with profile(use_kineto=False) as profiled:
        model(images).square().mean().backward()
    return sum(event.count for event in profiled.key_averages() if event.key == "aten::bernoulli_")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small batch")
    images = torch.randn(8 if parser.parse_args().quick else 256, 3, 32, 32)

    model = make_model()
    plain = masks_drawn_in_a_step(model, images)
    report = fdt.convert(model)
    print(report)
    converted = masks_drawn_in_a_step(model, images)
    with fdt.enabled():
        both = masks_drawn_in_a_step(model, images)
    print(f"masks drawn by torch: {plain} as it was, {converted} converted, {both} converted and enabled")
    assert plain == 4 * (1 + 3) + 3 * 2  # in each block attention and three others; drop path, but for the first block
    assert (converted, both) == (4, 0)

    # Drop path with nothing else: fused blocks compute fewer samples, with the same masks and results.
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
    model = timm.models.VisionTransformer(**sizes, drop_path_rate=0.4).train()
    fdt.convert(model)
    torch.manual_seed(1)
    expected = model(images)
    samples = []
    hook = model.blocks[3].mlp.register_forward_hook(lambda module, given, result: samples.append(len(result)))
    fdt.fuse(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), expected)
    hook.remove()
    print(f"the last block computed {samples[0]} of {len(images)} samples")
    assert samples[0] < len(images)


if __name__ == "__main__":
    main()
