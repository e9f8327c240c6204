"""The networks whose training step is timed. A function builds each for a dropout rate, with a batch of random data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0
BATCH, LENGTH, WIDTH, VOCABULARY = 8, 128, 256, 1000
Loss = Callable[[nn.Module], Tensor]
Network = tuple[nn.Module, Loss]


def encoder(p: float) -> Network:
    """nn.TransformerEncoder: 4 layers, 256 wide, 4 heads, 1,024 hidden; 8 x 128 tokens."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=p, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), lambda model: model(x).square().mean()


def mlp(p: float) -> Network:
    """784-2048-2048-10, batches of 128."""
    model = nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Dropout(p),
        nn.Linear(2048, 2048), nn.ReLU(), nn.Dropout(p),
        nn.Linear(2048, 10),
    )  # fmt: skip
    x, labels = torch.randn(128, 784), torch.randint(10, (128,))
    return model, lambda model: nn.functional.cross_entropy(model(x), labels)


def bert(p: float) -> Network:
    """transformers' BERT for masked tokens: 4 layers, 256 wide, 8 x 128 tokens, random weights."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=4 * WIDTH, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), _language_model_loss()


def gpt2(p: float) -> Network:
    """transformers' GPT-2: 4 layers, 256 wide, 8 x 128 tokens, random weights."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=LENGTH,
        resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), _language_model_loss()


def _language_model_loss() -> Loss:
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    return lambda model: model(input_ids=tokens, labels=tokens).loss


def long_encoder(p: float, causal: bool = False) -> Network:
    """nn.TransformerEncoder: 2 layers, 256 wide, 4 heads, 1,024 hidden; 1 x 2,048 tokens."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=p, batch_first=True)
    x = torch.randn(1, 2048, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(2048) if causal else None
    return (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        lambda model: model(x, mask=mask, is_causal=causal).square().mean(),
    )


def characters(p: float) -> Network:
    """What examples/transformer.py trains: 4 causal layers, 128 wide, 4 heads, 512 hidden; 8 x 128 tokens."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=p, batch_first=True)
    x, mask = torch.randn(BATCH, LENGTH, 128), nn.Transformer.generate_square_subsequent_mask(LENGTH)
    model = nn.Sequential(nn.Dropout(p), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
    return model, lambda model: model[1](model[0](x), mask=mask, is_causal=True).square().mean()


# Name, and the rate of dropout that such networks train with.
MODELS: dict[str, tuple[Any, float]] = {
    "TransformerEncoder": (encoder, 0.1),
    "MLP": (mlp, 0.5),
    "BERT": (bert, 0.1),
    "GPT-2": (gpt2, 0.1),
}

# Networks in which attention takes much of the time, and what makes its dropout ours.
ATTENTIVE: dict[str, tuple[Any, str]] = {
    "TransformerEncoder, 2,048 tokens": (long_encoder, "fuse"),
    "TransformerEncoder, 2,048 tokens, causal": (functools.partial(long_encoder, causal=True), "fuse"),
    "TransformerEncoder, 8 x 128 tokens": (encoder, "fuse"),
    "causal characters, 128 wide": (characters, "enable"),
}


def training_step(name: str, p: float, change: Callable[[nn.Module], object] | None = None) -> Callable[[], object]:
    """One step of a network of its own, changed or not. The same weights and data always."""
    return step(*_network(name, p, change))


def step(model: nn.Module, loss: Loss) -> Callable[[], object]:
    """Forward, backward, update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # the cheapest there is: nothing to hide dropout behind

    def run() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return run


def bytes_kept(name: str, p: float, change: Callable[[nn.Module], object] | None = None) -> int:
    return bytes_kept_by(*_network(name, p, change))


def bytes_kept_by(model: nn.Module, loss: Loss) -> int:
    """Bytes of activations that a network's forward pass keeps for backward: parameters and shared memory once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss(model)
    return sum(kept.values())


def _network(name: str, p: float, change: Callable[[nn.Module], object] | None) -> Network:
    torch.manual_seed(SEED)
    model, loss = (MODELS | ATTENTIVE)[name][0](p)
    model.train()
    if change is not None:
        change(model)
    return model, loss
