"""The loop: independent of accumulation and processes, resumable, the same in Trainer; BatchNorm; kills."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import twa_merge as twa
from tests import factory
from tests.processes import ROOT, torchrun
from twa_merge import training as twa_training
from twa_merge.batches import batch_indices
from twa_merge.checkpoints import Soup
from twa_merge.errors import UserError
from twa_merge.learn_config import LearnConfig
from twa_merge.recipe import DataConfig, Recipe


@pytest.fixture(scope="module")
def soup_folder(tmp_path_factory):
    from tests.test_cli import write_rows

    folder = tmp_path_factory.mktemp("training")
    for member in factory.make_soup("bert", folder / "soup", scale=0.2):
        factory.make_tokenizer(member)
    write_rows(folder / "data/validation.csv", factory.text_rows(64))
    return folder


def members(folder):
    return [str(p) for p in sorted((folder / "soup").iterdir())]


def learned_table(folder, **options):
    options = {"steps": 6, "batch_size": 8, "granularity": "layer", "seed": 3} | options
    recipe = Recipe(data=DataConfig(select_fraction=0.25, min_select=1), device="cpu")
    result = twa.train(Soup(members(folder)), folder / "data/validation.csv", recipe=recipe, **options)
    return next(c for c in result.league if c.learned).weights.table, result


def test_a_granularity_given_as_a_tuple_resumes(soup_folder, tmp_path):
    state = tmp_path / "out"
    calls = []
    patterns = ("*layer*", "*")
    with pytest.MonkeyPatch.context() as patch:
        save = twa_training._Run.save
        patch.setattr(
            twa_training._Run, "save", lambda run, file: (save(run, file), calls.append(1), 1 / (len(calls) < 3))
        )
        with pytest.raises(ZeroDivisionError):
            learned_table(soup_folder, granularity=patterns, evaluations=6, output=state)
    whole, _ = learned_table(soup_folder, granularity=patterns, evaluations=6)
    resumed, _ = learned_table(soup_folder, granularity=patterns, evaluations=6, output=state, resume=True)
    torch.testing.assert_close(resumed, whole)


def test_steps_see_the_same_samples_however_divided():
    config = LearnConfig(batch_size=4, accumulation=1)
    whole = [set(b) for b in batch_indices(10, config, range(5))]
    parts = batch_indices(10, replace(config, batch_size=2, accumulation=2), range(5))
    assert [set(parts[2 * i]) | set(parts[2 * i + 1]) for i in range(5)] == whole
    ranks = [batch_indices(10, config, range(5), rank=r, world=2) for r in range(2)]
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == whole
    assert batch_indices(10, config, range(3, 5)) == batch_indices(10, config, range(5))[3:]
    assert sorted(i for b in batch_indices(10, config, range(5)) for i in b) == sorted([*range(10)] * 2)


def test_accumulation_changes_nothing(soup_folder):
    whole, _ = learned_table(soup_folder)
    parts, _ = learned_table(soup_folder, batch_size=2, accumulation=4)
    torch.testing.assert_close(whole, parts, rtol=0, atol=2e-5)


def test_learning_lowers_the_loss_it_trains_on(soup_folder):
    _, result = learned_table(soup_folder, steps=40, lr=0.05)
    uniform = next(c for c in result.league if c.name == "uniform")
    learned = next(c for c in result.league if c.learned)
    assert learned.fit.loss.value < uniform.fit.loss.value
    assert learned.select.loss.value <= uniform.select.loss.value  # step 0 is the uniform soup


@pytest.mark.parametrize("coordinates", ["relative", "normalized"])
def test_gradient_checkpointing_and_coordinates_run(soup_folder, coordinates):
    plain, _ = learned_table(soup_folder, coordinates=coordinates)
    checkpointed, _ = learned_table(soup_folder, coordinates=coordinates, gradient_checkpointing=True)
    torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-5)


def trained_by_trainer(folder, **arguments):
    from transformers import Trainer, TrainingArguments, default_data_collator

    from twa_merge.tasks import build_task

    soup = Soup(members(folder))
    model = twa.merged_model(soup, granularity="layer")
    task = build_task("text-classification", soup.folder)
    from twa_merge.data import open_split

    rows = list(task.prepare(open_split(folder / "data/validation.csv").dataset))
    settings = {
        "output_dir": str(folder / "trainer"), "max_steps": 5, "per_device_train_batch_size": 8, "use_cpu": True,
        "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [],
        "save_strategy": "no", "optim": "sgd", "remove_unused_columns": False,
    }  # fmt: skip
    trainer = Trainer(
        model=model, args=TrainingArguments(**{**settings, **arguments}), train_dataset=_InOrder(rows, task),
        data_collator=default_data_collator,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return model, rows, task


class _InOrder(torch.utils.data.Dataset):
    """Features padded to one length, so that any collator stacks them."""

    def __init__(self, rows, task):
        self.batch = task.collate(rows)

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def __getitem__(self, i):
        return {name: value[i] for name, value in self.batch.items()}


def test_an_unchanged_trainer_and_a_plain_accelerate_loop_agree(soup_folder):
    from accelerate import Accelerator

    model, rows, task = trained_by_trainer(soup_folder)
    accelerator = Accelerator(cpu=True)
    other = twa.merged_model(Soup(members(soup_folder)), granularity="layer")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.02)
    loader = torch.utils.data.DataLoader(_InOrder(rows, task), batch_size=8)
    wrapped, optimizer, loader = accelerator.prepare(other, optimizer, loader)
    wrapped.train()
    for _, batch in zip(range(5), loader, strict=False):
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert model.twa_coefficients.abs().max() > 1e-5
    torch.testing.assert_close(model.twa_coefficients.data, other.twa_coefficients.data, rtol=1e-5, atol=1e-8)


def test_trainer_resumes_and_saves_coefficients_alone(soup_folder, tmp_path):
    whole, _, _ = trained_by_trainer(
        soup_folder, output_dir=str(tmp_path / "a"), max_steps=6, optim="adamw_torch_fused"
    )
    trained_by_trainer(
        soup_folder, output_dir=str(tmp_path / "b"), save_strategy="steps", save_steps=3, max_steps=6,
        optim="adamw_torch_fused",
    )  # fmt: skip
    state = load_file(tmp_path / "b/checkpoint-3/model.safetensors")
    assert list(state) == ["twa_coefficients"]
    again = load_file(tmp_path / "b/checkpoint-6/model.safetensors")["twa_coefficients"]
    torch.testing.assert_close(again, whole.twa_coefficients.data, rtol=1e-5, atol=1e-7)


def test_two_processes_learn_the_same_table_as_one(soup_folder, tmp_path):
    one, two = (train_command(soup_folder, tmp_path / name, "--steps", "20") for name in ("one", "two"))
    alone = subprocess.run(one, capture_output=True, text=True, timeout=120)
    for done in (alone, torchrun(*two[1:])):
        assert done.returncode == 0, done.stderr[-3000:]
    a, b = (learned_of(tmp_path / name) for name in ("one", "two"))
    assert (a - 1 / 3).abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


TRAINER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.processes import leave
from tests.test_training import trained_by_trainer
folder, out = map(Path, sys.argv[1:])
model, _, _ = trained_by_trainer(folder, per_device_train_batch_size=4, output_dir=str(out.parent / "trainer"))
if torch.distributed.get_rank() == 0:
    save_file(model.state_dict(), out)
del model
leave()
"""


def test_trainer_on_two_processes_learns_what_one_does(soup_folder, tmp_path):
    one, _, _ = trained_by_trainer(soup_folder)
    (tmp_path / "run.py").write_text(TRAINER)
    done = torchrun(tmp_path / "run.py", soup_folder, tmp_path / "two.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(tmp_path / "two.safetensors")["twa_coefficients"]
    torch.testing.assert_close(two, one.twa_coefficients.data, rtol=1e-4, atol=1e-7)


def learned_of(output):
    """The learned table of a run, whichever candidate shipped."""
    report = json.loads((output / "report.json").read_text())
    rows = next(c["mixing_weights"] for c in report["league"] if c["learned"])
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def resnet_soup(folder):
    folders = factory.make_soup("tiny_resnet", folder, scale=0.1)
    torch.manual_seed(0)
    x = torch.randn(80, 3, 16, 16)
    y = (x.mean(dim=(1, 2, 3)) > 0).long()
    return Soup(folders), TensorDataset(x, y)


def test_batchnorm_statistics_are_recomputed_and_travel_with_the_table(tmp_path):
    soup, data = resnet_soup(tmp_path / "soup")
    result = twa.train(
        soup, data, module=factory.TinyResNet(), loss=F.cross_entropy, output=tmp_path / "out", steps=5, batch_size=16,
        lr=0.05, recipe=Recipe(margin=-100.0, data=DataConfig(select_fraction=0.25, min_select=1), device="cpu"),
    )  # fmt: skip
    assert result.verdict.winner.learned
    merged = load_file(tmp_path / "out/model.safetensors")
    average = sum(factory.read_tensors(s.folder or s.files[0].parent)["norm.running_mean"] for s in soup.sources) / 3
    assert torch.equal(merged["norm.running_mean"], result.weights.statistics["norm.running_mean"])
    assert not torch.allclose(merged["norm.running_mean"], average)
    table = twa.MixingWeights.load(tmp_path / "out")
    twa.write(soup, table, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    module = factory.TinyResNet()
    module.load_state_dict(merged)
    module.eval()
    x, y = data.tensors
    with torch.no_grad():
        loss = float(F.cross_entropy(module(x), y))
    evaluation = pooled_loss(result, y)
    assert loss == pytest.approx(evaluation, rel=2e-3)


class Scaled(torch.nn.Module):
    """A classifier whose output depends on a floating point buffer."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_other_buffers_are_scored_as_they_are_written(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for k in range(3):
        module = Scaled()
        state = {**module.state_dict(), "scale": torch.tensor([1.0 + k, 2.0 - k])}
        (tmp_path / f"member-{k}").mkdir()
        save_file(state, tmp_path / f"member-{k}/model.safetensors")
    soup = Soup([tmp_path / f"member-{k}" for k in range(3)])
    x = torch.randn(60, 4)
    y = (x[:, 0] > 0).long()
    result = twa.train(
        soup, TensorDataset(x, y), module=Scaled(), loss=F.cross_entropy, steps=3, batch_size=8,
        recipe=Recipe(data=DataConfig(select_fraction=0.25, min_select=1), device="cpu"),
    )  # fmt: skip
    fit = torch.tensor(result.folds[0][0])
    for candidate in (c for c in result.league if not c.optimistic):  # whose fit part is everything
        twa.write(soup, candidate.weights, tmp_path / candidate.name)
        module = Scaled()
        module.load_state_dict(load_file(tmp_path / candidate.name / "model.safetensors"))
        loss = F.cross_entropy(module(x[fit]), y[fit]).item()
        assert candidate.fit.loss.value == pytest.approx(loss, rel=1e-5), candidate.name


def test_statistics_do_not_depend_on_the_order_of_the_rows(tmp_path):
    """Rows sorted by class would make batches of one class, whose variances leave out that between the classes."""
    soup, data = resnet_soup(tmp_path / "soup")
    x, y = data.tensors
    x = x + 3 * y.view(-1, 1, 1, 1)
    order = y.argsort()
    found = []
    for rows in (TensorDataset(x, y), TensorDataset(x[order], y[order])):
        result = twa.train(
            soup, rows, module=factory.TinyResNet(), loss=F.cross_entropy, steps=1, batch_size=16,
            recipe=Recipe(data=DataConfig(select_fraction=0.2, min_select=1), device="cpu"),
        )  # fmt: skip
        uniform = next(c for c in result.league if c.name == "uniform")
        scored = pooled_loss(replace(result, verdict=replace(result.verdict, winner=uniform)), y)
        found.append(scored)
    assert found[1] == pytest.approx(found[0], rel=0.02)


class Tied(torch.nn.Module):
    """A language model of one embedding, tied to its head; checkpoints hold both names."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(10, 4)
        self.mix = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.mix(self.emb(ids)))


def test_a_tied_weight_of_a_module_without_config_is_written_as_learned(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for k in range(3):
        (tmp_path / f"member-{k}").mkdir()
        state = {name: value.clone() for name, value in Tied().state_dict().items()}
        save_file(state, tmp_path / f"member-{k}/model.safetensors")
    soup = Soup([tmp_path / f"member-{k}" for k in range(3)])
    ids = torch.randint(10, (60,))
    result = twa.train(
        soup, TensorDataset(ids, (ids + 1) % 10), module=Tied(), loss=F.cross_entropy, steps=20, batch_size=16, lr=0.1,
        recipe=Recipe(margin=-1e9, data=DataConfig(select_fraction=0.25, min_select=1), device="cpu"),
        output=tmp_path / "out",
    )  # fmt: skip
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written["head.weight"], written["emb.weight"])
    assert not torch.equal(result.weights.row("emb.weight"), result.weights.table.mean(dim=0))
    state = load_file(tmp_path / "member-0/model.safetensors")
    for k in range(3):
        save_file({**state, "extra.weight": torch.ones(2)}, tmp_path / f"member-{k}/model.safetensors")
    with pytest.raises(UserError, match=r"holds 'extra.weight', which the module does not have"):
        twa.train(Soup(soup.labels), TensorDataset(ids, ids), module=Tied(), loss=F.cross_entropy)


def pooled_loss(result, y):
    """The winner's loss on all samples, from its fit and select parts."""
    winner = result.verdict.winner
    fit, select = (len(part) for part in result.folds[0])
    return (winner.fit.loss.value * fit + winner.select.loss.value * select) / (fit + select)


COMMAND = [sys.executable, "-m", "twa_merge.cli", "train"]


def train_command(folder, output, *more):
    learn = ["--steps", "60", "--batch-size", "8", "--granularity", "layer", "--device", "cpu"]
    data = ["--data", str(folder / "data"), "--output", str(output)]
    return [*COMMAND, *members(folder), *data, *learn, *more]


@contextlib.contextmanager
def interruption_after_a_save():
    original = twa_training._Run.save
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(self, file):
            original(self, file)
            if self.step == 3:
                raise KeyboardInterrupt

        patch.setattr(twa_training._Run, "save", interrupted)
        yield


def test_resume_refuses_the_state_of_another_run_and_keeps_it(soup_folder, tmp_path, capsys):
    from twa_merge.cli import main

    def run(checkpoints, *more):
        data = ["--data", str(soup_folder / "data"), "--output", str(tmp_path / "out"), "--device", "cpu"]
        learn = ["--steps", "10", "--batch-size", "8", "--granularity", "layer"]
        return main(["train", *checkpoints, *data, *learn, *more])

    state = tmp_path / ".out.twa-state"
    with interruption_after_a_save():
        assert run(members(soup_folder)) == 130
    before = {p.name: p.read_bytes() for p in state.iterdir()}
    first, second, third = members(soup_folder)
    changes = [
        ([second, first, third], []),
        ([first, second, third], ["--lr", "0.01"]),
        ([first, second, third], ["--max-length", "5"]),
    ]
    for checkpoints, more in changes:
        assert run(checkpoints, *more, "--resume") == 2
        assert "other settings, checkpoints or data" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in state.iterdir()} == before
    assert run(members(soup_folder), "--resume", "--metric", "f1") == 0  # does not change what is learned
    assert not state.exists()


def test_resume_notices_other_labels_and_another_loss(tmp_path):
    """A data set and a loss of Python have no name to compare."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    for k in range(3):
        save_file(torch.nn.Linear(6, 3).state_dict(), tmp_path / f"{k}.safetensors")
    soup = twa.Soup([tmp_path / f"{k}.safetensors" for k in range(3)])

    def run(y, loss=F.cross_entropy, **more):
        settings = {"steps": 10, "batch_size": 8, "recipe": Recipe(device="cpu"), "output": tmp_path / "out"}
        return twa.train(soup, TensorDataset(x, y), module=torch.nn.Linear(6, 3), loss=loss, **settings, **more)

    whole = run(y)
    (tmp_path / "out").rename(tmp_path / "whole")
    with interruption_after_a_save(), pytest.raises(KeyboardInterrupt):
        run(y)
    state = next((tmp_path / ".out.twa-state").iterdir())
    before = state.read_bytes()
    flipped = y.clone()
    flipped[7] = (flipped[7] + 1) % 3
    with pytest.raises(UserError, match="other settings, checkpoints or data"):
        run(flipped, resume=True)
    with pytest.raises(UserError, match=r"had a select loss of .* other data or another loss"):
        run(y, loss=torch.nn.CrossEntropyLoss(label_smoothing=0.4), resume=True)
    state.write_bytes(before[:50])
    with pytest.raises(UserError, match=r"not a readable state.*start without --resume"):
        run(y, resume=True)
    state.write_bytes(before)
    assert torch.equal(run(y, resume=True).weights.table, whole.weights.table)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_nothing_that_looks_finished_and_resumes_to_the_same_table(soup_folder, tmp_path, how):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(train_command(soup_folder, whole), env=env, check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(
        train_command(soup_folder, cut),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # tests that a shell runs in the background inherit Ctrl-C as ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    state = tmp_path / ".cut.twa-state"
    deadline = time.time() + 120
    while not list(state.glob("fold-1*")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait() != 0
    assert not cut.exists() and state.exists()
    subprocess.run(train_command(soup_folder, cut, "--resume"), env=env, check=True, capture_output=True, timeout=300)
    for name in ("mixing_weights.safetensors", "model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert torch.equal(learned_of(cut), learned_of(whole))
    assert not state.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(soup_folder, tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse to write on, as a full disk does."""
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "twa_merge.cli",
        "average",
        *members(soup_folder),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_sgd_with_momentum_learns_and_resumes(soup_folder, tmp_path):
    options = {"optimizer": "sgd", "coordinates": "normalized", "lr": 1.0, "evaluations": 6}
    whole, _ = learned_table(soup_folder, **options)
    assert (whole - 1 / whole.shape[1]).abs().max() > 1e-3
    plain, _ = learned_table(soup_folder, **options, momentum=0.0)
    assert not torch.allclose(whole, plain)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        save = twa_training._Run.save
        patch.setattr(
            twa_training._Run, "save", lambda run, file: (save(run, file), calls.append(1), 1 / (len(calls) < 3))
        )
        with pytest.raises(ZeroDivisionError):
            learned_table(soup_folder, **options, output=tmp_path / "out")
    resumed, _ = learned_table(soup_folder, **options, output=tmp_path / "out", resume=True)
    torch.testing.assert_close(resumed, whole)
