"""From a Trainer's run to its merge: the snapshots' combination is in the trainer's model, whatever the model is."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, BartForCausalLM, BertForMaskedLM, default_data_collator

import twa_merge as twa
from tests import factory
from tests.processes import torchrun
from tests.trainers import make_trainer, tokens
from twa_merge.learn_config import LearnConfig
from twa_merge.recipe import Recipe


def trained(folder, **settings):
    trainer = make_trainer(folder, callbacks=[twa.SnapshotCallback(3)], **settings)
    trainer.train()
    return trainer


def same_weights(module, folder):
    for name, value in factory.read_tensors(folder).items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn_on", ["validation", "train"])
def test_the_merge_is_in_the_trainers_model_and_on_disk(tmp_path, learn_on):
    trainer = trained(tmp_path)
    before = trainer.evaluate()["eval_loss"]
    result = twa.finish(
        trainer, learn_on=learn_on, steps=20, lr=0.1, recipe=Recipe(margin=-1e9), output=tmp_path / "merged"
    )
    same_weights(trainer.model, tmp_path / "merged")
    learned = next(c for c in result.league if c.learned)
    assert [c.name for c in result.league][-1] == learned.name and result.verdict.winner is learned
    assert "perplexity" in str(result) and learned.name in str(result)
    assert before != trainer.evaluate()["eval_loss"]
    if learn_on == "train":  # all of the evaluation data select
        with torch.no_grad():
            loss = trainer.model(**default_data_collator(tokens(16, seed=1))).loss
        assert float(loss) == pytest.approx(learned.select.loss.value, rel=1e-4)
    trainer.remove_callback(twa.SnapshotCallback)
    trainer.train()  # it is an ordinary model


class Net(nn.Module):
    """BatchNorm, and a loss that only the trainer knows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return {"logits": self.body(x)}


def rows(count, seed):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": (row[0] > 0).long()} for row in x]


def squares(outputs, labels, num_items_in_batch=None):
    return (outputs["logits"] - F.one_hot(labels, 2)).square().mean()


@pytest.mark.parametrize("task", [None, twa.module_task(F.cross_entropy)])
def test_any_module_and_loss(tmp_path, task):
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path,
        model=Net(),
        data=rows(24, 0),
        eval_dataset=rows(40, 1),
        callbacks=[twa.SnapshotCallback(3)],
        compute_loss_func=squares,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer.train()
    result = twa.finish(trainer, learn_on="train", task=task, steps=10, recipe=Recipe(margin=-1e9))
    assert "body.1.running_var" in result.weights.statistics
    torch.testing.assert_close(trainer.model.body[1].running_var, result.weights.statistics["body.1.running_var"])
    learned = next(c for c in result.league if c.learned)
    if task is None:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(learned.select.loss.value, rel=1e-3)
    else:
        logits = trainer.predict(rows(40, 1)).predictions
        loss = F.cross_entropy(torch.tensor(logits), torch.tensor([row["labels"] for row in rows(40, 1)]))
        assert float(loss) == pytest.approx(learned.select.loss.value, rel=1e-3)


def test_snapshots_in_memory_are_finished_too(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[twa.SnapshotCallback(3, storage="int8")])
    trainer.train()
    result = twa.finish(trainer, steps=5, output=tmp_path / "merged")
    assert result.weights.num_checkpoints == 4
    same_weights(trainer.model, tmp_path / "merged")


def test_two_ways_to_name_snapshots_and_mistakes(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(twa.UserError, match=r"add callbacks=\[twa.SnapshotCallback"):
        twa.finish(trainer)
    with pytest.raises(twa.UserError, match="learn_on: expected validation or train"):
        twa.finish(trainer, learn_on="test")
    trainer = trained(tmp_path, save_strategy="epoch")
    named = twa.finish(trainer, [str(tmp_path / "checkpoint-*")], steps=2)
    assert named.weights.num_checkpoints == 2
    assert twa.finish(trainer, str(tmp_path / "checkpoint-*"), steps=2).weights.num_checkpoints == 2
    with pytest.raises(twa.UserError, match=r"finish: unknown key learning_rate; known: .*lr"):
        twa.finish(trainer, learning_rate=0.1)
    with pytest.raises(twa.UserError, match="finish: lr: expected float, got 'x'"):
        twa.finish(trainer, lr="x")
    trainer.eval_dataset = [{"input_ids": row["input_ids"]} for row in tokens(8)]
    with pytest.raises(twa.UserError, match=r"expected 'labels' in the batches .* got input_ids"):
        twa.finish(trainer)
    trainer.eval_dataset = None
    with pytest.raises(twa.UserError, match="one eval_dataset, got none"):
        twa.finish(trainer)


def test_a_new_process_finds_the_snapshots_of_a_run(tmp_path, capsys):
    trained(tmp_path)
    later = make_trainer(tmp_path, callbacks=[twa.SnapshotCallback(3)])
    assert twa.finish(later, steps=2, output=tmp_path / "merged").weights.num_checkpoints == 4
    assert "push it with twa.push_to_hub" in capsys.readouterr().err
    twa.finish(later, steps=2, output=tmp_path / "_merged")
    assert "push it" not in capsys.readouterr().err


def test_without_held_out_data_training_data_decide_and_it_is_said(tmp_path, capsys):
    trainer = trained(tmp_path)
    trainer.eval_dataset = None
    result = twa.finish(trainer, learn_on="train", steps=2)
    assert len(result.folds[0][1]) == 2
    assert "2 training samples, which the snapshots have seen, decide" in capsys.readouterr().err


DRIVER = """
import sys
import torch
torch.set_num_threads(1)
import twa_merge as twa
from tests.processes import leave
from tests.trainers import make_trainer
trainer = make_trainer(sys.argv[1], callbacks=[twa.SnapshotCallback(3)], per_device_train_batch_size=2)
trainer.train()
# of one run, whose dropout was another
snapshots = [sys.argv[2] + "/_snapshots/snapshot-*"]
result = twa.finish(trainer, snapshots, steps=5, granularity="layer", output=sys.argv[1] + "/merged")
if trainer.is_world_process_zero():
    torch.save((result.league[-1].weights.table, trainer.model.state_dict()), sys.argv[1] + "/found.pt")
del trainer, result
leave()
"""


def test_two_processes_finish_as_one_does(tmp_path):
    alone = trained(tmp_path / "one")
    result = twa.finish(alone, steps=5, granularity="layer")
    (tmp_path / "driver.py").write_text(DRIVER)
    done = torchrun(tmp_path / "driver.py", tmp_path / "two", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "two/_snapshots").iterdir())) == 4  # one process has written
    table, state = torch.load(tmp_path / "two/found.pt")
    torch.testing.assert_close(table, result.league[-1].weights.table, rtol=1e-3, atol=1e-4)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-3)


SNAPSHOTS = """
import shutil, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import twa_merge as twa
from tests.processes import leave
from tests.trainers import make_trainer
from twa_merge.snapshot_stores import DiskStore
add = DiskStore.add
def slow(*arguments):
    time.sleep(1)
    add(*arguments)
DiskStore.add = slow
trainer = make_trainer(sys.argv[1], callbacks=[twa.SnapshotCallback(6)], per_device_train_batch_size=2)
trainer.train()
assert twa.finish(trainer, steps=2).weights.num_checkpoints == 2
rank = trainer.args.process_index
here = Path(sys.argv[1], f"rank-{rank}")
shutil.copytree(Path(sys.argv[1], "_snapshots/snapshot-6"), here / "a")
mine = here / "a"
said = []
for given in ([mine], [mine] if rank == 0 else ["nowhere"], ["nowhere"]):
    try:
        twa.finish(trainer, given, steps=2)
    except twa.UserError as error:
        said.append(str(error))

callback = twa.SnapshotCallback(3, storage="int8")
trainer = make_trainer(sys.argv[1], callbacks=[callback], per_device_train_batch_size=2)
trainer.train()
said.append(twa.finish(trainer, steps=2).league[-1].name)
Path(sys.argv[1], f"rank-{rank}.txt").write_text("\\n".join(said))  # lines of two processes may mix
del trainer, callback
leave()
"""


def test_snapshots_reach_every_process(tmp_path):
    """Those on disk, though the last is still being written; those in memory; and others are not taken for them."""
    (tmp_path / "driver.py").write_text(SNAPSHOTS)
    done = torchrun(tmp_path / "driver.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        others, missing, none, learned = (tmp_path / f"run/rank-{rank}.txt").read_text().splitlines()
        assert "processes 0 and 1 see different snapshots" in others and "rank-0/a" in others and "rank-1/a" in others
        assert "processes 0 and 1 see different snapshots" in missing and "nowhere" in missing
        assert none.startswith("nowhere") and learned == "TWA by tensor"
    assert len(list((tmp_path / "run/_snapshots").iterdir())) == 2  # those of another run


@pytest.mark.parametrize("error", [{"lr": 1e30}, {"margin": None}])
def test_a_finish_that_fails_leaves_the_model_as_it_was(tmp_path, error, monkeypatch):
    trainer = trained(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if "margin" in error:

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("twa_merge.league.choose", interrupted)
        error = {}
    with pytest.raises((twa.UserError, KeyboardInterrupt)):
        twa.finish(trainer, steps=3, **error)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_loss_of_the_models_own_is_what_is_learned_and_scored(tmp_path):
    from transformers import BertForSequenceClassification

    class WeightedBertForSequenceClassification(BertForSequenceClassification):
        def forward(self, input_ids=None, labels=None):
            logits = super().forward(input_ids=input_ids).logits
            weighted = F.cross_entropy(logits, labels, reduction="none") * torch.tensor([5.0, 1.0])[labels]
            return {"loss": weighted.mean(), "logits": logits}

    def labelled(seed):
        return [row | {"labels": row["labels"][0] % 2} for row in tokens(24, seed=seed)]

    model = WeightedBertForSequenceClassification(factory.make_model("bert").config)
    given = {"model": model, "data": labelled(0), "eval_dataset": labelled(1), "per_device_eval_batch_size": 1}
    trainer = trained(tmp_path, **given)
    result = twa.finish(trainer, steps=4, learn_on="train")
    assert result.task == "trainer"
    assert result.verdict.winner.select.loss.value == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_random_masks_are_the_same_for_every_candidate(tmp_path):
    def masked(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        labels = ids.clone()
        chosen = torch.rand(ids.shape) < 0.3
        chosen[:, 0] = True
        labels[~chosen] = -100
        return {"input_ids": ids.masked_fill(chosen, 4), "labels": labels}

    trainer = trained(tmp_path, model=factory.make_model("bert_mlm"), data_collator=masked)
    result = twa.finish(trainer, steps=2, learn_on="train")
    uniform = next(c for c in result.league if c.name == "uniform")
    assert result.learned[0].curve[0]["select_loss"] == pytest.approx(uniform.select.loss.value, rel=1e-4)


def test_a_loss_of_whole_batches_is_warned_of_or_refused(tmp_path, capsys):
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 8)

        def forward(self, x):
            return {"logits": self.body(x)}

    def contrast(outputs, labels, num_items_in_batch=None):
        z = F.normalize(outputs["logits"], dim=-1)
        return F.cross_entropy(z @ (z + 0.1 * z.roll(1, -1)).T / 0.1, torch.arange(len(z)))

    def summed(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels, reduction="sum")

    given = {"model": Embedding(), "data": rows(24, 0), "eval_dataset": rows(40, 1), "compute_loss_func": summed}
    trainer = trained(tmp_path, **given, remove_unused_columns=False, label_names=["labels"])
    twa.finish(trainer, learn_on="train", steps=2)
    assert "is none of a mean of theirs" in capsys.readouterr().err
    trainer.compute_loss_func = contrast
    with pytest.raises(twa.UserError, match="of any one sample alone is 0, of 4 together"):
        twa.finish(trainer, steps=2)


def unshifted(seed):
    """Return rows for decoders that do not shift their labels: those are the next tokens already; none in the first."""
    found = [{"input_ids": row["input_ids"][:-1], "labels": row["input_ids"][1:]} for row in tokens(24, seed=seed)]
    return [row | {"labels": torch.full_like(row["labels"], -100)} for row in found[:3]] + found[3:]


def test_a_loss_that_is_not_that_of_its_kind_is_taken_as_it_is(tmp_path, capsys):
    config = BartConfig(**factory._MARIAN, is_decoder=True, add_cross_attention=False)
    torch.manual_seed(0)
    given = {"model": BartForCausalLM(config), "data": unshifted(0), "eval_dataset": unshifted(1)}
    trainer = trained(tmp_path, **given, per_device_eval_batch_size=24)
    result = twa.finish(trainer, learn_on="train", steps=2)
    assert result.task == "trainer" and "its loss here is not that of causal-lm" in capsys.readouterr().err
    assert result.verdict.winner.select.loss.value == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["some without a label", "several labels", "few bits, in a column"])
def test_labels_are_those_that_the_model_takes(tmp_path, kind):
    def classified(count, seed):
        rows = tokens(count, seed=seed)
        for i, row in enumerate(rows):
            label = torch.randint(3, (3,), generator=torch.Generator().manual_seed(i))
            if kind == "several labels":
                row["labels"] = (label > 0).float()
            elif kind == "some without a label":
                row["labels"] = label[0] if i % 4 else torch.tensor(-100)
            else:
                row["labels"] = label[:1]
        return rows

    def make():
        model = factory.make_model("bert", num_labels=3)
        model.config.problem_type = None
        model = model.bfloat16() if kind.startswith("few bits") else model
        given = {"model": model, "data": classified(24, 0), "eval_dataset": classified(16, 1)}
        return make_trainer(tmp_path, **given, callbacks=[twa.SnapshotCallback(3)], per_device_eval_batch_size=16)

    make().train()
    trainer = make()  # of a new process, whose model has not yet been told what kind of labels it has
    result = twa.finish(trainer, learn_on="train", steps=2)
    assert result.task == "text-classification"
    winner = result.verdict.winner.select
    assert winner.loss.value == pytest.approx(trainer.evaluate()["eval_loss"], rel=0.02 if "bits" in kind else 1e-4)
    if kind == "some without a label":
        assert winner.metric("accuracy").value * 12 == pytest.approx(round(winner.metric("accuracy").value * 12))


def test_passes_without_a_label_are_left_out(tmp_path):
    """Of a loss whose gradient is NaN there, too."""

    def masked(outputs, labels, num_items_in_batch=None):
        counted = (labels != -100).float()
        chosen = outputs.logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None])
        losses = -chosen.squeeze(2)
        return (losses * counted).sum() / counted.sum()

    held_out = tokens(16, seed=1)
    for row in held_out[::3]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = trained(tmp_path, compute_loss_func=masked, eval_dataset=held_out)
    tables = []
    for size, accumulation in ((1, 8), (8, 1)):
        result = twa.finish(trainer, steps=4, batch_size=size, accumulation=accumulation, granularity="layer")
        tables.append(result.learned[0].tables_EGN[-1])
    assert (tables[0] - 0.25).abs().max() > 1e-3
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-3, atol=1e-5)


def test_missing_values_are_equal_to_themselves(tmp_path):
    class Filled(Net):
        def forward(self, x):
            return super().forward(x.nan_to_num())

    def holes(seed):
        found = rows(24, seed)
        for row in found[::2]:
            row["x"] = row["x"].clone()
            row["x"][0] = math.nan
        return found

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels)

    given = {"model": Filled(), "data": holes(0), "eval_dataset": holes(1), "compute_loss_func": loss}
    trainer = trained(tmp_path, **given, remove_unused_columns=False, label_names=["labels"])
    assert math.isfinite(twa.finish(trainer, steps=2).verdict.winner.select.loss.value)


def test_options_may_be_tuples_and_sharding_is_refused(tmp_path):
    trainer = trained(tmp_path)
    names = ("*.mlp.*", "*")
    given = twa.finish(trainer, steps=2, granularity=names)
    of_recipe = twa.finish(trainer, steps=2, recipe=Recipe(learn=LearnConfig(granularity=names)))
    assert len(given.weights.groups) == len(of_recipe.weights.groups)
    for options in ({"shard": "model"}, {"recipe": Recipe(learn=LearnConfig(shard="basis"))}):
        with pytest.raises(twa.UserError, match="whole in every process"):
            twa.finish(trainer, **options)


class Masking:
    """Masks a few tokens of each row, none of some; of a generator of its own if seeded."""

    def __init__(self, seed=None):
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        masked = torch.rand(ids.shape, generator=self.generator) < 0.15
        return {"input_ids": ids.masked_fill(masked, 1), "labels": ids.masked_fill(~masked, -100)}


@pytest.mark.parametrize("own_loss", [False, True])
def test_rows_without_a_masked_token_count_nothing(tmp_path, own_loss):
    def squares(outputs, labels, num_items_in_batch=None):
        counted = labels != -100
        return F.cross_entropy(outputs.logits[counted], labels[counted])

    torch.manual_seed(0)
    model = BertForMaskedLM(factory.make_model("bert").config)
    options = {"compute_loss_func": squares} if own_loss else {}
    trainer = make_trainer(
        tmp_path, model=model, callbacks=[twa.SnapshotCallback(3)], data_collator=Masking(), **options
    )
    trainer.train()
    result = twa.finish(trainer, steps=2, learn_on="train")
    assert result.task == ("trainer" if own_loss else "masked-lm")
    assert all(math.isfinite(c.select.loss.value) for c in result.league)
    trainer.data_collator = Masking(seed=1)
    with pytest.raises(twa.UserError, match="differ from one time to the next"):
        twa.finish(trainer, steps=2)


def test_nothing_ships_where_no_loss_is_finite(tmp_path):
    trainer = trained(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.eval_dataset = [row | {"labels": torch.full_like(row["labels"], -100)} for row in tokens(8)]
    with pytest.raises(twa.UserError, match="no candidate has a finite loss"):
        twa.finish(trainer, steps=2, learn_on="train")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_twa_trainer_has_learned_already(tmp_path):
    members = factory.make_soup("gpt2", tmp_path, n=2)
    trainer = twa.TWATrainer(members, twa.TWAConfig(str(tmp_path / "out"), use_cpu=True, report_to="none"))
    with pytest.raises(twa.UserError, match="save_model"):
        twa.finish(trainer)


def test_a_model_with_adapters_becomes_a_full_one(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], r=2, fan_in_fan_out=True)
    adapted = peft.get_peft_model(factory.make_model("gpt2"), config)
    trainer = trained(tmp_path, model=adapted)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    result = twa.finish(trainer, steps=20, lr=0.1, recipe=Recipe(margin=-1e9), output=tmp_path / "merged")
    assert type(trainer.model) is type(factory.make_model("gpt2"))
    same_weights(trainer.model, tmp_path / "merged")
    learned = result.league[-1]
    assert learned.learned and learned.select.loss.value < max(c.select.loss.value for c in result.league)
    for name, value in adapted.state_dict().items():  # the caller's own stays as it was
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    trainer.save_model(tmp_path / "saved")
    same_weights(trainer.model, tmp_path / "saved")
    trainer.remove_callback(twa.SnapshotCallback)
    trainer.train()


def test_whole_numbers_that_differ_are_refused_before_anything_is_learned(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(factory.VOCAB, 8), nn.Linear(8, factory.VOCAB)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, input_ids, labels=None):
            self.seen += 1
            logits = self.head(self.embed(input_ids))
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    trainer = trained(tmp_path, model=Counting())
    with pytest.raises(twa.UserError, match="'seen' differs"):
        twa.finish(trainer, steps=10**9, output=tmp_path / "out")
    twa.finish(trainer, steps=2)


def test_statistics_are_those_of_training_data(tmp_path):
    shifted = [row | {"x": row["x"] + 3} for row in rows(24, 0)]
    given = {"model": Net(), "data": shifted, "eval_dataset": rows(40, 1), "compute_loss_func": squares}
    trainer = trained(tmp_path, **given, remove_unused_columns=False, label_names=["labels"])
    twa.finish(trainer, steps=2, recipe=Recipe(margin=-1e9))
    body = trainer.model.body
    with torch.no_grad():
        expected = body[0](torch.stack([row["x"] for row in shifted])).mean(dim=0)
    torch.testing.assert_close(body[1].running_mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given, expected", [({}, (4, 8)), ({"batch_size": 16}, (16, 1)), ({"accumulation": 2}, (4, 2))]
)
def test_passes_are_no_larger_than_the_trainers(tmp_path, given, expected, monkeypatch):
    found = []

    def note(self):
        found.append((self.recipe.learn.batch_size, self.recipe.learn.accumulation))
        raise KeyboardInterrupt

    monkeypatch.setattr("twa_merge.job.Job.run", note)
    with pytest.raises(KeyboardInterrupt):
        twa.finish(trained(tmp_path), **given)
    assert found == [expected]
