import socket

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.tiny_tasks import save_bert, save_gpt2, save_t5, texts
from twa_merge.errors import UserError
from twa_merge.evaluation import Evaluation, bootstrap_paired, evaluate, paired_difference
from twa_merge.metrics import get_metric
from twa_merge.tasks import build_task, custom_task, load_module, module_task


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def plain(num_samples=23, seed=0):
    torch.manual_seed(seed)
    inputs, targets = torch.randn(num_samples, 4), torch.randint(3, (num_samples,))
    return nn.Linear(4, 3), list(zip(inputs, targets, strict=True)), inputs, targets


def made_up(losses, weights=None):
    losses = np.asarray(losses, dtype=np.float64)
    return Evaluation(losses, np.ones_like(losses) if weights is None else np.asarray(weights, float), [], [], ())


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (23, 0), (100, 0), (4, 1)])
def test_losses_and_predictions_in_the_order_of_the_dataset(batch_size, num_workers):
    module, data, inputs, targets = plain()
    found = evaluate(
        module, data, module_task(functional.cross_entropy), batch_size=batch_size, num_workers=num_workers
    )
    expected = functional.cross_entropy(module(inputs), targets, reduction="none").detach().double().numpy()
    np.testing.assert_allclose(found.losses_S, expected, rtol=1e-5)
    assert found.losses_S.dtype == np.float64
    assert found.references == targets.tolist() and found.predictions == module(inputs).argmax(1).tolist()
    share = np.mean([p == r for p, r in zip(found.predictions, found.references, strict=True)])
    assert found.metric("accuracy").value == share
    assert found.metric("accuracy").standard_error == pytest.approx(np.sqrt(share * (1 - share) / 23))
    assert found.loss.value == pytest.approx(expected.mean())
    assert found.loss.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(23))
    assert found.metric("loss") == found.loss


def test_modes_random_state_and_gradients_are_left_alone():
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    module.train()
    module[2].eval()
    _, data, _, _ = plain()
    before = torch.get_rng_state()
    task = module_task(functional.cross_entropy)
    first, second = (evaluate(module, data, task, batch_size=5) for _ in range(2))
    np.testing.assert_array_equal(first.losses_S, second.losses_S)  # no dropout
    assert [part.training for part in module] == [True, True, False, True] and module.training
    assert torch.equal(torch.get_rng_state(), before)
    assert module[2].num_batches_tracked == 0 and torch.is_grad_enabled()


def test_modes_are_restored_after_a_failure_too():
    module, data, _, _ = plain()
    task = module_task(lambda outputs, targets: outputs)
    with pytest.raises(UserError, match="expected one number a batch"):
        evaluate(module.train(), data, task, batch_size=5)
    assert module.training


def test_one_loss_a_batch_is_evaluated_sample_by_sample(tmp_path):
    module, _, inputs, _ = plain()
    targets = torch.randn(23, 3)
    found = evaluate(module, list(zip(inputs, targets, strict=True)), module_task(functional.mse_loss), batch_size=8)
    np.testing.assert_allclose(found.losses_S, (module(inputs) - targets).square().mean(1).detach(), rtol=1e-5)
    assert len(found.subset([3, 1]).losses_S) == 2
    bert = save_bert(tmp_path, num_labels=2)
    task = custom_task(lambda d, c: [{"input_ids": [3, 4], "labels": i % 2} for i in range(5)], tmp_path)
    assert len(evaluate(bert, task.prepare([]), task, batch_size=4).losses_S) == 5


def test_text_classification(tmp_path):
    save_bert(tmp_path, num_labels=2)
    data = datasets.Dataset.from_dict({"text": texts(11), "label": [i % 2 for i in range(11)]})
    task = build_task("text-classification", tmp_path, metrics=["accuracy", "f1", "perplexity"])
    module, features = load_module("text-classification", tmp_path), task.prepare(data)
    found = evaluate(module, features, task, batch_size=4, progress=True)
    np.testing.assert_allclose(found.losses_S, evaluate(module, features, task, batch_size=1).losses_S, rtol=1e-4)
    loss = found.loss
    assert found.metric("perplexity").value == pytest.approx(np.exp(loss.value))
    assert found.metric("perplexity").standard_error == pytest.approx(
        np.exp(loss.value) * loss.standard_error, rel=0.05
    )
    assert 0 <= found.metric("f1").value <= 1 and found.metric("f1").standard_error > 0
    with pytest.raises(
        UserError, match="metric bleu: not computed here; expected one of loss, accuracy, f1, perplexity"
    ):
        found.metric("bleu")
    low = evaluate(module, features, task, batch_size=4, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert not np.array_equal(low.losses_S, found.losses_S)
    np.testing.assert_allclose(low.losses_S, found.losses_S, atol=0.1)


def test_language_models_weigh_by_tokens(tmp_path):
    save_gpt2(tmp_path / "gpt2")
    task, module = build_task("causal-lm", tmp_path / "gpt2", max_length=8), load_module("causal-lm", tmp_path / "gpt2")
    found = evaluate(module, task.prepare(datasets.Dataset.from_dict({"text": texts(20)})), task, batch_size=3)
    assert set(found.weights_S) == {7.0} and found.predictions == []
    assert found.metric("perplexity").value == pytest.approx(np.exp(found.loss.value))
    save_t5(tmp_path / "t5")
    data = datasets.Dataset.from_dict({"source": texts(7), "target": texts(7, 1)})
    task = build_task("seq2seq", tmp_path / "t5", metrics=["perplexity", "bleu"], max_length=16)
    module = load_module("seq2seq", tmp_path / "t5")
    features = task.prepare(data)
    found = evaluate(module, features, task, batch_size=3)
    assert found.weights_S.tolist() == [len(text.split()) + 1 for text in data["target"]]
    assert found.references == data["target"][:]
    whole = task.collate([features[i] for i in range(7)])
    assert found.loss.value == pytest.approx(module(**whole).loss.item(), rel=1e-5)
    assert 0 <= found.metric("bleu").value <= 100


class Pretend:
    """One of several processes, without the others."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes, self.is_main_process = process_index, num_processes, process_index == 0

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_any_number_of_processes_gives_the_same(monkeypatch, num_processes):
    from twa_merge import evaluation

    module, data, _, _ = plain()
    task = module_task(functional.cross_entropy)
    expected = evaluate(module, data, task, batch_size=5)
    calls, shares = [], []
    handle = module.register_forward_hook(lambda *a: calls.append(1))
    monkeypatch.setattr(evaluation, "_gather", lambda rows, accelerator: shares.append(rows) or rows)
    monkeypatch.setattr(evaluation, "_assemble", lambda rows, task, order: None)
    for index in range(num_processes):
        evaluate(module, data, task, batch_size=5, accelerator=Pretend(index, num_processes))
    handle.remove()
    assert len(calls) == num_processes * -(-5 // num_processes)  # equally often in each process
    monkeypatch.undo()
    found = evaluation._assemble([row for rows in shares for row in rows], task, list(range(len(data))))
    np.testing.assert_array_equal(found.losses_S, expected.losses_S)
    assert found.predictions == expected.predictions and found.references == expected.references


def test_sentences_of_any_length_keep_their_places(tmp_path):
    save_bert(tmp_path)
    task = build_task("text-classification", tmp_path)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts(23))]
    data = task.prepare(datasets.Dataset.from_list(rows))
    module = load_module("text-classification", tmp_path)
    together = evaluate(module, data, task, batch_size=4)
    alone = [evaluate(module, data.select([i]), task, batch_size=1) for i in range(len(data))]
    np.testing.assert_allclose(together.losses_S, [e.losses_S[0] for e in alone], rtol=1e-5)
    assert together.predictions == [e.predictions[0] for e in alone]
    assert together.references == [row["label"] for row in rows]
    shapes = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    evaluate(module, data, task, batch_size=4)
    handle.remove()
    assert shapes == sorted(shapes, reverse=True) and shapes[-1] < shapes[0]


def _in_each_process(rank, path):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "yes"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (path / "port").read_text(), "OMP_NUM_THREADS": "1"}
    from accelerate import Accelerator

    module, data, _, _ = plain()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = evaluate(module, data, module_task(functional.cross_entropy), batch_size=5, accelerator=accelerator)
    np.save(path / f"{rank}.npy", found.losses_S)
    accelerator.wait_for_everyone()  # gloo aborts a process whose peer goes away first
    accelerator.end_training()


def test_two_real_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    # spawned, not forked as by accelerate's debug_launcher: a fork after OpenMP has run can hang
    torch.multiprocessing.spawn(_in_each_process, args=(tmp_path,), nprocs=2)
    module, data, _, _ = plain()
    expected = evaluate(module, data, module_task(functional.cross_entropy), batch_size=5).losses_S
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, rtol=1e-6)


def test_subset():
    module, data, _, _ = plain()
    found = evaluate(module, data, module_task(functional.cross_entropy), batch_size=5)
    part = found.subset([4, 2, 9])
    assert part.losses_S.tolist() == [found.losses_S[i] for i in (4, 2, 9)]
    assert part.predictions == [found.predictions[i] for i in (4, 2, 9)]
    assert part.metric("accuracy").value == get_metric("accuracy").compute(part.predictions, part.references)


def test_weighted_loss_and_its_standard_error():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 30, size=(4000, 50)).astype(float)
    losses = rng.gamma(2.0, size=weights.shape) + weights / 30
    means = (losses * weights).sum(1) / weights.sum(1)
    claimed = np.mean([made_up(x, w).loss.standard_error for x, w in zip(losses[:500], weights, strict=False)])
    assert made_up(losses[0], weights[0]).loss.value == pytest.approx(means[0])
    assert claimed == pytest.approx(means.std(), rel=0.05)
    assert np.isnan(made_up([1.0]).loss.standard_error)
    assert np.isnan(made_up([1.0, np.nan]).loss.value)  # callers decide


def test_paired_difference_and_interval():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300) * 10
    worse, better = made_up(hard + rng.normal(size=300) + 0.5), made_up(hard)
    found = paired_difference(worse, better)
    assert found.value == pytest.approx(0.5, abs=0.2)
    assert found.standard_error == pytest.approx(1 / np.sqrt(300), rel=0.15)  # the samples' own difficulty cancels
    low, high = bootstrap_paired(worse, better, seed=3)
    assert low == pytest.approx(found.value - 1.96 * found.standard_error, abs=0.02)
    assert high == pytest.approx(found.value + 1.96 * found.standard_error, abs=0.02)
    assert (low, high) == bootstrap_paired(worse, better, seed=3) != bootstrap_paired(worse, better, seed=4)
    assert paired_difference(better, better).value == 0 == paired_difference(better, better).standard_error
    with pytest.raises(ValueError, match="not of the same samples"):
        paired_difference(worse, made_up(hard[:10]))


def test_bad_arguments():
    module, data, _, _ = plain()
    with pytest.raises(UserError, match="batch_size: expected at least 1, got 0"):
        evaluate(module, data, module_task(functional.cross_entropy), batch_size=0)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(module, [], module_task(functional.cross_entropy), batch_size=1)
