"""`TWATrainer`: what users of Trainer know works, and every trap of it, on real runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments, default_data_collator

import twa_merge as twa
from tests import factory
from tests.hub_server import hub
from tests.processes import ROOT, torchrun
from tests.trainers import tokens
from twa_merge.batches import batch_indices
from twa_merge.learn_config import LearnConfig
from twa_merge.task_base import require_rows
from twa_merge.task_classification import classification_task
from twa_merge.task_labels import LabelSpace


@pytest.fixture(scope="module")
def soup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    return twa.Soup(factory.make_soup("bert", folder, n=3, scale=0.2))


def rows(count=48, seed=0):
    return [row | {"labels": row["labels"][0] % 2} for row in tokens(count, seed=seed)]


def trained(soup, folder, *, train=True, resume=None, callbacks=(), data=None, **settings):
    settings = {"granularity": "layer", "max_steps": 12, "per_device_train_batch_size": 8} | settings
    settings = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True} | settings
    given = {name: settings.pop(name) for name in ("compute_metrics", "optimizers") if name in settings}
    trainer = twa.TWATrainer(
        soup,
        args=twa.TWAConfig(str(folder), **settings),
        train_dataset=data if data is not None else rows(),
        eval_dataset=rows(20, seed=1),
        callbacks=list(callbacks),
        **given,
    )
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def coefficients(trainer):
    return trainer.model.twa_coefficients.detach().clone()


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def test_it_learns_logs_evaluates_and_leaves_the_merged_model(soup, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4, "compute_metrics": accuracy}
    trainer = trained(soup, tmp_path, max_steps=24, learning_rate=0.1, **settings)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert all("eval_accuracy" in row for row in trainer.state.log_history if "eval_loss" in row)
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"model.safetensors", "config.json", "mixing_weights.json"} and not {
        n for n in names if "merge-" in n
    }
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = default_data_collator(rows(20, seed=1))
    with torch.no_grad():
        loss = merged(**batch).loss
        torch.testing.assert_close(loss, trainer.model.eval()(**batch).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    table = twa.MixingWeights.load(tmp_path)
    torch.testing.assert_close(table.table, trainer.model.table_GN())
    assert (table.table - 1 / 3).abs().max() > 0.01
    assert "use_cache" not in json.loads((soup.folder / "config.json").read_text()) or (
        json.loads((tmp_path / "config.json").read_text()) == json.loads((soup.folder / "config.json").read_text())
    )


def test_the_built_in_loop_gives_the_same_coefficients_from_the_same_order(soup, tmp_path):
    config = LearnConfig(granularity="layer", steps=20, batch_size=8, lr=0.03, seed=3, evaluations=1)
    data = rows()
    order = [i for batch in batch_indices(len(data), config, range(20)) for i in batch]
    in_order = [data[i] for i in order]
    trainer = trained(soup, tmp_path, train=False, data=in_order, max_steps=20)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(in_order)
    trainer.train()

    labels = LabelSpace.of(trainer.model.config)
    task = classification_task("same", labels, require_rows, default_data_collator, ())
    result = twa.train(soup, rows(20, seed=1), train_data=data, task=task, **vars(replace(config, storage="float32")))
    learned = result.learned[0].tables_EGN[-1]
    assert (learned - 1 / 3).abs().max() > 0.01
    torch.testing.assert_close(trainer.model.table_GN(), learned, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_a_resumed_run_ends_as_a_whole_one(soup, tmp_path, optim):
    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 6, "optim": optim}
    whole = trained(soup, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(soup, tmp_path / "cut", callbacks=[Cut()], **settings)
    resumed = trained(soup, tmp_path / "cut", resume=True, **settings)
    assert coefficients(whole).abs().max() > 1e-4
    torch.testing.assert_close(coefficients(resumed), coefficients(whole), rtol=0, atol=0)
    checkpoint = tmp_path / "cut/checkpoint-6"
    assert list(load_file(checkpoint / "model.safetensors")) == ["twa_coefficients"]
    assert (checkpoint / "mixing_weights.safetensors").is_file()
    with pytest.raises(twa.UserError, match="coefficients of a merge in training, not a model"):
        twa.Soup([checkpoint])


def test_the_best_is_loaded_and_read_at_once(soup, tmp_path):
    """Trainer writes parameters behind autograd's back; evaluation and the saved merge must be of the best."""
    settings = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = trained(
        soup, tmp_path, learning_rate=2.0, load_best_model_at_end=True, lr_scheduler_type="constant", **settings
    )
    curve = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(curve, key=curve.get)
    assert trainer.state.best_global_step == best and len(curve) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(curve[best], rel=1e-5)
    trainer.save_model(str(tmp_path / "final"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        assert merged(**default_data_collator(rows(20, seed=1))).loss.item() == pytest.approx(curve[best], rel=1e-5)


def test_accumulation_does_not_scale_gradients(soup, tmp_path):
    whole = trained(soup, tmp_path, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0)
    parts = trained(
        soup, tmp_path, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert coefficients(whole).abs().max() > 1e-3
    torch.testing.assert_close(coefficients(parts), coefficients(whole), rtol=1e-4, atol=1e-6)


def test_held_out_data_alone_are_divided(soup, tmp_path):
    trainer = twa.TWATrainer(soup, args=twa.TWAConfig(str(tmp_path), use_cpu=True), eval_dataset=rows(50))
    assert len(trainer.train_dataset) == 40 and len(trainer.eval_dataset) == 10
    texts = [
        {id(row) for row in map(part.__getitem__, range(len(part)))}
        for part in (trainer.train_dataset, trainer.eval_dataset)
    ]
    assert not texts[0] & texts[1]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_any_module_with_batchnorm(tmp_path):
    torch.manual_seed(0)
    base = Net()
    for k in range(3):
        state = {n: v + 0.2 * torch.randn_like(v) if v.is_floating_point() else v for n, v in base.state_dict().items()}
        state["body.1.running_var"] = torch.full((8,), 0.01)  # those of no merge
        save_file(state, tmp_path / f"{k}.safetensors")
    x = torch.randn(60, 6)
    data = [{"x": row, "labels": (row[0] > 0).long()} for row in x]
    args = twa.TWAConfig(
        str(tmp_path / "out"), use_cpu=True, max_steps=5, report_to="none", per_device_train_batch_size=30
    )
    trainer = twa.TWATrainer(
        sorted(tmp_path.glob("*.safetensors")), args, model=Net(), train_dataset=data, eval_dataset=data[:20]
    )
    trainer.train()
    trainer.save_model()
    found = Net()
    found.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    assert found.body[1].running_var.min() > 0.05
    with torch.no_grad():
        loss = found.eval()(**default_data_collator(data[:20]))["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


DRIVER = """
import sys
import torch
torch.set_num_threads(1)
from tests.processes import leave
from tests.test_trainer import coefficients, trained
import twa_merge as twa
from pathlib import Path
folder = Path(sys.argv[1])
trainer = trained(twa.Soup([folder / "soup" / f"member-{k}" for k in range(3)]), folder / "two",
                  per_device_train_batch_size=4, save_strategy="steps", save_steps=6)
trainer.save_model(str(folder / "two/final"))
if trainer.is_world_process_zero():
    torch.save(coefficients(trainer), folder / "two.pt")
del trainer
leave()
"""


def test_two_processes_give_what_one_gives(tmp_path):
    members = factory.make_soup("bert", tmp_path / "soup", n=3, scale=0.2)
    whole = trained(twa.Soup(members), tmp_path / "one")
    (tmp_path / "driver.py").write_text(DRIVER)
    done = torchrun(tmp_path / "driver.py", tmp_path)
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two.pt")
    assert coefficients(whole).abs().max() > 1e-3
    torch.testing.assert_close(two, coefficients(whole), rtol=1e-4, atol=1e-6)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "two/final").num_labels == 2


PUSH = """
import sys
from pathlib import Path
from tests.test_trainer import trained
import twa_merge as twa
folder = Path(sys.argv[1])
trainer = trained(twa.Soup([folder / "soup" / f"member-{k}" for k in range(3)]), folder / "out",
                  push_to_hub=True, hub_model_id="team/merged", save_strategy="steps", save_steps=6)
print(trainer.push_to_hub())
"""


def test_push_to_hub_pushes_the_merged_model(tmp_path):
    factory.make_soup("bert", tmp_path / "soup", n=3)
    (tmp_path / "driver.py").write_text(PUSH)
    with hub(tmp_path / "hub") as (address, requests):
        env = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
        env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_x"}
        done = subprocess.run(
            [sys.executable, str(tmp_path / "driver.py"), str(tmp_path)], env=env, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert len([r for r in requests if "/commit/" in r]) == 1  # not of every checkpoint
    pushed = tmp_path / "hub/models/team/merged"
    assert "training_args.bin" not in {path.name for path in pushed.iterdir()}
    assert len(load_file(pushed / "model.safetensors")) > 10
    assert "base_model" not in (pushed / "README.md").read_text()  # its parents are nowhere on the Hub
    assert str(tmp_path) not in "".join(p.read_text() for p in pushed.iterdir() if p.suffix in (".json", ".md"))


def test_mistakes(soup, tmp_path):
    with pytest.warns(UserWarning, match="5e-05 is Trainer's default for weights"):
        twa.TWATrainer(soup, TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=rows())
    with pytest.raises(twa.UserError, match="model_init has no meaning"):
        twa.TWATrainer(soup, twa.TWAConfig(str(tmp_path), use_cpu=True), train_dataset=rows(), model_init=Net)
    with pytest.raises(twa.UserError, match="expected one data set to learn on, got several"):
        twa.TWATrainer(soup, twa.TWAConfig(str(tmp_path), use_cpu=True), eval_dataset={"a": rows(), "b": rows()})
    (tmp_path / "checkpoint-3").mkdir()
    trainer = twa.TWATrainer(soup, twa.TWAConfig(str(tmp_path), use_cpu=True, max_steps=1), train_dataset=rows())
    with pytest.raises(twa.UserError, match="checkpoint-3: no checkpoint of a TWATrainer, or damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
