"""`TWATrainer` beside what a user has on disk, and with the options of Trainer that depend on the wrapped model."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_pt_utils import LabelSmoother

import twa_merge as twa
from tests import factory
from tests.test_trainer import Net
from tests.trainers import tokens

SETTINGS = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": 3}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return factory.make_soup("gpt2", tmp_path_factory.mktemp("gpt2"), n=3, scale=0.2)


def make(checkpoints, folder, **settings):
    given = {name: settings.pop(name) for name in ("model", "compute_metrics") if name in settings}
    data = settings.pop("data", None) or tokens()
    held_out = settings.pop("eval_dataset", None) or tokens(16, seed=1)
    args = twa.TWAConfig(str(folder), **(SETTINGS | settings))
    return twa.TWATrainer(checkpoints, args, train_dataset=data, eval_dataset=held_out, **given)


def test_inputs_in_the_output_folder_are_refused(tmp_path):
    members = factory.make_soup("gpt2", tmp_path, n=2)
    inside = [path.rename(tmp_path / f"checkpoint-{k}") for k, path in enumerate(members)]
    with pytest.raises(twa.UserError, match=r"output_dir .* holds the input"):
        make(inside, tmp_path)
    with pytest.raises(twa.UserError, match=r"output_dir .* holds the input"):
        make(inside, inside[0])
    trainer = make(inside, tmp_path / "out")
    before = factory.read_tensors(inside[1])
    with pytest.raises(twa.UserError, match=r"save_model .* holds the input"):
        trainer.save_model(str(inside[1]))
    assert factory.read_tensors(inside[1]).keys() == before.keys()


def test_a_save_that_fails_keeps_the_earlier_one(members, tmp_path, monkeypatch):
    trainer = make(members, tmp_path)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("twa_merge.trainer.write", full)
        with pytest.raises(OSError, match="No space"):
            trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_replaces_every_shard_of_an_earlier_one(members, tmp_path):
    factory.write_tensors(factory.read_tensors(members[0]), tmp_path, sharded=True)
    (tmp_path / "model_of_mine.safetensors").write_bytes(b"kept")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    trainer = make(members, tmp_path)
    trainer.save_model()
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors", "model_of_mine.safetensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_named_like_a_checkpoint_gets_a_model_when_the_user_asks(members, tmp_path):
    trainer = make(members, tmp_path / "out", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "checkpoint-5"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert len(factory.read_tensors(tmp_path / "out/checkpoint-3")) == 1


def shifted_cross_entropy(reduction):
    def loss(outputs, labels, num_items_in_batch=None):
        found = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
        return found / num_items_in_batch if reduction == "sum" else found

    return loss


@pytest.mark.parametrize("loss", ["model", "sum", "mean"])
@pytest.mark.parametrize("regularization", [0.0, 0.5])
def test_accumulation_weighs_tokens_not_passes(members, tmp_path, regularization, loss):
    """Whether the losses of passes are shares of the step's, by the model or by Trainer's convention, or means."""
    data = tokens(48, length=16)
    for row in data[1::2] if loss != "mean" else ():
        row["labels"] = row["labels"].clone()
        row["labels"][2:] = -100

    def coefficients(batch, accumulation):
        settings = {"optim": "sgd", "learning_rate": 1.0, "granularity": "layer", "regularization": regularization}
        trainer = make(
            members,
            tmp_path,
            data=data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        if loss != "model":
            trainer.compute_loss_func = shifted_cross_entropy(loss)
            trainer.model_accepts_loss_kwargs = False
        if loss == "mean":
            trainer.loss_is_scaled_for_ga = False
        trainer.train()
        return trainer.model.twa_coefficients.detach().clone()

    at_once, in_parts = coefficients(8, 1), coefficients(1, 8)
    assert at_once.abs().max() > 1e-3
    torch.testing.assert_close(in_parts, at_once, rtol=1e-3, atol=1e-5)


def test_label_smoothing_shifts_labels_where_the_model_does(members, tmp_path):
    trainer = make(members, tmp_path, label_smoothing_factor=0.1)
    batch = default_data_collator(tokens(16, seed=1))
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        outputs = trainer.model(input_ids=batch["input_ids"])
    expected = LabelSmoother(0.1)(outputs, batch["labels"], shift_labels=True)
    torch.testing.assert_close(found, expected)


def test_question_answering_evaluates(tmp_path):
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**factory._BERT))
    for k in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"member-{k}")
    rows = [
        {"input_ids": row["input_ids"], "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
        for row in tokens(16)
    ]

    def count(found):
        return {"count": len(found.predictions[0])}

    given = {"model": model, "data": rows, "eval_dataset": rows, "compute_metrics": count}
    trainer = make([tmp_path / "member-*"], tmp_path / "out", **given)
    found = trainer.evaluate()
    plain = Trainer(trainer.model.unload(), TrainingArguments(str(tmp_path / "plain"), **SETTINGS), eval_dataset=rows)
    assert found["eval_count"] == 16
    assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


def pictures(count, seed):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": (row[0] > 0).long()} for row in x]


@pytest.fixture
def nets(tmp_path):
    torch.manual_seed(0)
    base = Net().state_dict()
    for k in range(3):
        state = {n: v + 0.2 * torch.randn_like(v) if v.is_floating_point() else v for n, v in base.items()}
        save_file(state, tmp_path / f"{k}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


def test_persistent_workers_evaluate_on_the_evaluation_data(nets, tmp_path):
    def loss(**workers):
        settings = {"model": Net(), "data": pictures(60, 0), "eval_dataset": pictures(20, 1)}
        trainer = make(nets, tmp_path / "out", per_device_train_batch_size=30, **settings, **workers)
        trainer.train()
        trainer.mixing_weights()
        return trainer.evaluate()["eval_loss"]

    kept = loss(dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert kept == pytest.approx(loss(), rel=1e-6)


def test_coefficients_of_another_soup_are_not_resumed(members, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make(members, tmp_path, **settings).train()
    other = [{"coordinates": "normalized"}, {"granularity": "layer"}, {"directions": "pca", "components": 1}]
    for checkpoints, options in [(members[::-1], {}), *((members, options) for options in other)]:
        with pytest.raises(twa.UserError, match="of other checkpoints, of another order"):
            make(checkpoints, tmp_path, **settings, **options).train(resume_from_checkpoint=True)
    make(members, tmp_path, **settings).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())["global_step"] == 3


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(pictures(20, 0))


def test_mistakes_take_one_line(members, nets, tmp_path):
    with pytest.raises(twa.UserError, match="expected checkpoints first, got a module"):
        twa.TWATrainer(Net(), twa.TWAConfig(str(tmp_path / "out"), **SETTINGS))
    with pytest.raises(twa.UserError, match="eval_dataset: expected one with a length"):
        twa.TWATrainer(nets, twa.TWAConfig(str(tmp_path / "out"), **SETTINGS), model=Net(), eval_dataset=Stream())
    given = {"model": Net(), "eval_dataset": pictures(20, 1)}
    for data in (Stream(), None):
        trainer = make(nets, tmp_path / "out", data=data, **given)
        trainer.train_dataset = data
        with pytest.raises(twa.UserError, match="expected a train_dataset with a length"):
            trainer.evaluate()
