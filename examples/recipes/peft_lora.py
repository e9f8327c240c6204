"""LoRA with peft: dropout of adapters that keeps nothing for backward.

You want this if you train adapters with `lora_dropout` above 0. peft drops the input of each adapter by itself, so
query, key and value keep three dropped copies of the same input, and three masks. `fdt.fuse` makes each adapted layer
call `fdt.lora_linear`, which keeps the input itself, once for all three, and draws the masks again in backward. The
trainable parameters, the saved adapter and the way to use peft stay the same.

    python examples/recipes/peft_lora.py --quick
"""

import argparse

import peft
import torch
import transformers

import fastdrop.torch as fdt


def make_model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    adapters = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "key", "value"])
    return peft.get_peft_model(transformers.BertModel(config), adapters)


def bytes_kept(model, tokens):
    """Runs a step and returns the bytes of the tensors that autograd keeps for it, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens).last_hidden_state.square().mean()
    size = sum(kept.values())
    loss.backward()
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences")
    length = 32 if parser.parse_args().quick else 512

    tokens = torch.randint(100, (4, length))
    model = make_model().train()
    keys = list(peft.get_peft_model_state_dict(model))
    before = bytes_kept(model, tokens)
    report = fdt.fuse(model)
    after = bytes_kept(model, tokens)
    print("\n".join(line for line in str(report).splitlines() if "left" not in line))
    print(f"kept for backward: {before / 2**20:.2f} MiB with peft's dropout, {after / 2**20:.2f} MiB fused")
    layers = sum(row.path.endswith(("query", "key", "value")) for row in report.changed)
    assert layers == 6
    hidden = tokens.numel() * 64 * 4  # bytes of one hidden state
    assert before - after >= layers * hidden
    assert list(peft.get_peft_model_state_dict(model)) == keys
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
