"""The callback in transformers' Trainer, on a tiny BERT and random tokens."""

from __future__ import annotations

import doctest
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import fastdrop.torch as fdt
from fastdrop import schedules
from fastdrop.torch.models.fuse.rules import Fused
from fastdrop.torch.runtime.context import is_enabled_everywhere

STEPS = 6


def bert():
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, num_labels=2)
    return transformers.BertForSequenceClassification(config)


def trainer_of(model, callback, folder, **options):
    import transformers

    samples = [{"input_ids": torch.randint(50, (8,)), "labels": torch.tensor(i % 2)} for i in range(4 * STEPS)]
    options = {"max_steps": STEPS, "logging_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4} | options
    arguments = transformers.TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, seed=0, **options
    )
    return transformers.Trainer(model, arguments, train_dataset=samples, callbacks=[callback])


@pytest.fixture
def watching():
    """A callback that notes what holds at each step, and raises at the step it is told to raise at."""
    import transformers

    class Watching(transformers.TrainerCallback):
        raises_at, seen = None, []

        def on_step_begin(self, args, state, control, model=None, **_):
            rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
            fused = sum(isinstance(module, Fused) for module in model.modules())
            self.seen.append((state.global_step, is_enabled_everywhere(), fused, *rates))
            if state.global_step == self.raises_at:
                raise KeyboardInterrupt

    Watching.seen = []
    return Watching()


def test_trainer(tmp_path, capsys, watching):
    """Saves, logs, raises, resumes in another Trainer, and leaves the model as it was."""
    from fastdrop.integrations import transformers as ours

    torch.manual_seed(0)
    schedule = schedules.linear(0.4, 0.1, STEPS)
    model, texts = bert(), []
    classes = [type(module) for module in model.modules()]
    ours.logger.info, log = texts.append, ours.logger.info
    try:
        watching.raises_at = 5
        callback = ours.FastDropout(fuse=True, schedule=schedule)
        trainer = trainer_of(model, callback, tmp_path)
        trainer.add_callback(watching)
        with pytest.raises(KeyboardInterrupt), callback:
            trainer.train()
    finally:
        ours.logger.info = log
    assert watching.seen == [(step, True, 4, schedule(step)) for step in range(STEPS)]
    assert not is_enabled_everywhere()
    assert [type(module) for module in model.modules()] == classes
    assert [text.partition(":")[0] for text in texts] == ["fastdrop, fuse", "fastdrop, schedule"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [(line["step"], line["dropout_p"]) for line in state["log_history"]] == [(2, schedule(2)), (4, schedule(4))]
    assert f"'dropout_p': {str(schedule(4))!r}" in capsys.readouterr().out.replace("'dropout_p': 0", "'dropout_p': '0")

    watching.raises_at, watching.seen[:] = None, []
    fresh = bert()
    trainer = trainer_of(fresh, ours.FastDropout(fuse=True, schedule=schedule), tmp_path)
    trainer.add_callback(watching)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert watching.seen == [(step, True, 4, schedule(step)) for step in (4, 5)]
    assert fresh.bert.embeddings.dropout.p == schedule(STEPS)
    assert [type(module) for module in fresh.modules()] == classes
    assert not is_enabled_everywhere()
    saved = type(fresh).from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_state_restored_by_transformers(tmp_path):
    """Its option to restore callbacks makes new ones of what JSON can hold. A schedule is not; the callback stays."""
    from fastdrop.integrations.transformers import FastDropout

    callback = FastDropout(schedule=schedules.constant(0.3))
    options = {"restore_callback_states_from_checkpoint": True}
    trainer_of(bert(), callback, tmp_path, max_steps=2, **options).train()
    trainer = trainer_of(bert(), callback, tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert callback in trainer.callback_handler.callbacks
    assert callback.scheduler.last_step == STEPS


def test_doctests():
    from fastdrop.integrations import transformers

    assert doctest.testmod(transformers).failed == 0
    fdt.disable()
