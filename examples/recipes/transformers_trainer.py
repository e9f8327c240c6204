"""Train a transformer with the Trainer of transformers: one callback makes it drop by fastdrop.

You want this if you fine-tune with `transformers.Trainer` on a CPU, where torch's dropout takes a good part of a step.
The callback enables fastdrop while the Trainer trains, fuses dropout with what stands around it, and lowers the rate
step by step. Afterwards the model is as it was. The model here is a tiny BERT with random weights and tokens.

    python examples/recipes/transformers_trainer.py --quick
"""

import argparse
import tempfile

import torch
import transformers
from torch.autograd.profiler import profile as profiler

from fastdrop import schedules
from fastdrop.integrations.transformers import FastDropout


def make_model():
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


def train(model, data, steps, callback):
    """Trains the model and returns the logs, and how often torch's own dropout drew a mask."""
    with tempfile.TemporaryDirectory() as folder, profiler(use_kineto=False) as profile:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train()
    drawn = sum(event.count for event in profile.key_averages() if event.key == "aten::bernoulli_")
    return trainer.state.log_history, drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps")
    steps = 4 if parser.parse_args().quick else 40

    data = [{"input_ids": torch.randint(100, (16,)), "labels": torch.tensor(i % 2)} for i in range(64)]
    _, before = train(make_model(), data, steps, transformers.TrainerCallback())

    model = make_model()
    falling = schedules.linear(0.1, 0.0, steps)
    callback = FastDropout(fuse=True, schedule=falling)
    logs, after = train(model, data, steps, callback)

    print(callback.reports["fuse"])
    print(f"masks drawn by torch's own dropout: {before} without the callback, {after} with it")
    assert before == steps * (2 * 3 + 2)  # per layer attention and two outputs; the embeddings and the pooled output
    assert after == 0
    rates = [line["dropout_p"] for line in logs]
    print("rate in the logs:", ", ".join(f"{rate:.3f}" for rate in rates))
    assert rates[:-1] == [falling(line["step"]) for line in logs[:-1]]
    assert not any(type(module).__name__.startswith("Fused") for module in model.modules())


if __name__ == "__main__":
    main()
