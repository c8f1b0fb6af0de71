"""Real runs of transformers' Trainer on tiny models."""

import torch
from transformers import Trainer, TrainingArguments

from tests import factory


def tokens(count=24, length=8, seed=0):
    """Return rows of random tokens that are their own labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, factory.VOCAB, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


_OF_TRAINER = ("data_collator", "compute_loss_func", "compute_metrics", "processing_class")


def make_trainer(folder, *, model=None, data=None, eval_dataset=None, callbacks=(), cls=Trainer, **settings):
    """Return a Trainer of a tiny GPT-2 that takes 12 steps in 2 epochs."""
    given = {name: settings.pop(name) for name in _OF_TRAINER if name in settings}
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "num_train_epochs": 2} | settings
    settings = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True} | settings
    args = TrainingArguments(str(folder), **settings)
    data = data if data is not None else tokens()
    model = model if model is not None else factory.make_model("gpt2")
    held_out = eval_dataset if eval_dataset is not None else tokens(16, seed=1)
    return cls(model=model, args=args, train_dataset=data, eval_dataset=held_out, callbacks=list(callbacks), **given)
