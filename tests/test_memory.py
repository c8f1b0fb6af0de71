"""Out of memory: the allocator really refuses, the run goes on with less, and ends with the same table."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset, default_collate

import twa_merge as twa
from twa_merge import blocks, job_model, memory
from twa_merge.evaluation import evaluate
from twa_merge.memory import OutOfMemory, is_out_of_memory, smaller_batch
from twa_merge.recipe import DataConfig, Recipe


class Hungry(nn.Module):
    """A classifier whose passes need more memory than any machine has for more than `most` samples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.most = {True: 1 << 20, False: 1 << 20}  # training or not
        self.refused = []

    def forward(self, x):
        if len(x) > self.most[self.training]:
            self.refused.append(len(x))
            torch.empty(1 << 60)
        return self.inner(x)


@pytest.fixture
def soup(tmp_path):
    torch.manual_seed(0)
    base = Hungry().state_dict()
    for k in range(3):
        (tmp_path / f"member-{k}").mkdir()
        member = {name: value + 0.3 * torch.randn(value.shape) for name, value in base.items()}
        save_file(member, tmp_path / f"member-{k}" / "model.safetensors")
    return twa.Soup(sorted(tmp_path.glob("member-*")))


DATA = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)


def learned(soup, module, output=None, **options):
    recipe = Recipe(data=DataConfig(select_fraction=0.25, min_select=1), device="cpu", eval_batch_size=16)
    options = {"steps": 6, "batch_size": 8, "storage": "float32"} | options
    result = twa.train(
        soup, DATA, module=module, loss=nn.functional.cross_entropy, recipe=recipe, output=output, **options
    )
    return next(c for c in result.league if c.learned).weights.table, result


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError()) and is_out_of_memory(OSError(12, "no"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(OSError(2, "no"))
    assert not is_out_of_memory(twa.UserError("out"))
    assert [smaller_batch(n) for n in (32, 12, 9, 7, 1)] == [16, 6, 3, 1, None]
    assert smaller_batch(8, least=4) == 4 and smaller_batch(8, least=5) is None


def test_learning_goes_on_in_smaller_passes(soup, capsys):
    expected, _ = learned(soup, Hungry())
    module = Hungry()
    module.most[True] = 3
    table, _ = learned(soup, module)
    torch.testing.assert_close(table, expected, rtol=0, atol=2e-5)
    assert module.refused == [8, 4]
    lines = capsys.readouterr().err.splitlines()
    assert "out of memory with 8 samples in a forward pass: going on with 4, 2 passes in a step" in lines
    assert "out of memory with 4 samples in a forward pass: going on with 2, 4 passes in a step" in lines


def test_scoring_goes_on_in_smaller_passes(soup, capsys):
    expected, whole = learned(soup, Hungry())
    module = Hungry()
    module.most[False] = 5
    table, parts = learned(soup, module)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)
    for a, b in zip(whole.league, parts.league, strict=True):
        assert a.select.loss.value == pytest.approx(b.select.loss.value, rel=1e-5)
        assert a.select.predictions == b.select.predictions
    assert "out of memory with 16 samples in a scoring pass: going on with 8" in capsys.readouterr().err


def test_batches_that_are_drawn_at_random_are_not_divided():
    """Their parts would hold other masks than the whole, with which other candidates were scored."""

    def noisy(samples):
        x, y = default_collate(samples)
        return x + torch.rand_like(x), y

    module = Hungry()
    module.most[False] = 5
    task = twa.module_task(nn.functional.cross_entropy, collate=noisy)
    with pytest.raises(OutOfMemory, match=r"16 sample.*drawn at random and cannot be divided: try a smaller"):
        evaluate(module, DATA, task, batch_size=16)

    class Crops(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.rand_like(x), y

    with pytest.raises(OutOfMemory, match="drawn at random"):
        evaluate(module, Crops(*DATA.tensors), twa.module_task(nn.functional.cross_entropy), batch_size=16)


def test_where_one_sample_is_too_much_the_basis_gets_smaller(soup, tmp_path, monkeypatch, capsys):
    module = Hungry()
    built, merged_model = [], job_model.merged_model

    def recorded(*args, **kwargs):
        built.append(kwargs["storage"])
        module.most[True] = 8 if kwargs["storage"] == "int8" else 0
        return merged_model(*args, **kwargs)

    monkeypatch.setattr(job_model, "merged_model", recorded)
    _, result = learned(soup, module, output=tmp_path / "out")
    assert built == ["float32", "bfloat16", "int8"] and result.storage == "int8"
    lines = capsys.readouterr().err
    assert "out of memory with storage float32: going on with bfloat16" in lines
    assert "out of memory with storage bfloat16: going on with int8" in lines
    about = json.loads((tmp_path / "out/report.json").read_text())["storage"]
    assert about["name"] == "int8"
    assert about["select_loss_exact"] == pytest.approx(about["select_loss_while_learning"], rel=1e-2)
    assert "Learned on deltas in int8: the select loss of TWA by tensor was" in (tmp_path / "out/report.md").read_text()


def test_the_users_module_works_as_before(soup):
    module = Hungry()
    module.inner.bias.requires_grad_(False)
    module.dropout = nn.Dropout(0.3)
    learned(soup, module)
    assert module.dropout.p == 0.3
    assert module.inner.weight.requires_grad and not module.inner.bias.requires_grad
    module(DATA.tensors[0]).sum().backward()
    assert module.inner.weight.grad is not None
    assert type(module.inner._parameters) is dict


def test_where_nothing_is_small_enough_one_line_says_so(soup):
    module = Hungry()
    module.most[True] = 0
    with pytest.raises(OutOfMemory, match=r"out of memory with 1 sample.*--gradient-checkpointing"):
        learned(soup, module)


def test_a_basis_that_does_not_fit_is_built_in_a_smaller_storage(soup, monkeypatch, capsys):
    large_empty = blocks.large_empty

    def scarce(shape, dtype):
        return large_empty(shape if dtype != torch.float32 or shape[0] != 3 else (1 << 60,), dtype)

    monkeypatch.setattr(blocks, "large_empty", scarce)  # rows in float32 do not fit, tiles do
    _, result = learned(soup, Hungry())
    assert result.storage == "bfloat16"
    assert "out of memory with storage float32: going on with bfloat16" in capsys.readouterr().err


def test_free_memory_is_what_the_system_has():
    free = memory.free_memory(torch.device("cpu"))
    assert 0 < free < 1 << 45
