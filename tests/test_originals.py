"""Products straight from the files: both, in place, of a part of a tensor, in any dtype, while a soup learns."""

import os

import pytest
import torch
from safetensors.torch import save_file

import twa_merge as twa
from tests import factory
from tests.test_model import BATCHES
from twa_merge import mixing, originals
from twa_merge.kernels import PIECES, Kernels
from twa_merge.originals import MappedFiles, OriginalBlock, in_order
from twa_merge.tensorfile import Window, read_header

N = 4


def made(folder, shape, dtype=torch.float32, *, odd=False, window=None, count=1, n=N, compile=False):
    """Return blocks of tensors in N files, and (N, ...) their values."""
    files, stacks = [], []
    for k in range(n):
        generator = torch.Generator().manual_seed(k)
        tensors = {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i in range(count)}
        if odd:  # one byte first: nothing after it is aligned
            tensors["a"] = torch.zeros(1, dtype=torch.uint8)
        save_file(tensors, folder / f"{k}.safetensors")
        files.append(read_header(folder / f"{k}.safetensors"))
        stacks.append(tensors)
    maps = MappedFiles()
    blocks = [
        OriginalBlock(
            [f[f"t{i}"] for f in files], window or Window.whole(stacks[0]["t0"].numel()), maps, Kernels(compile=compile)
        )
        for i in range(count)
    ]
    in_order(blocks)
    return blocks, [torch.stack([s[f"t{i}"] for s in stacks]).double() for i in range(count)]


@pytest.mark.parametrize("tile", [1 << 18, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_both_products(tmp_path, monkeypatch, dtype, tile):
    monkeypatch.setattr(originals, "_TILE", tile)
    monkeypatch.setattr(originals, "_AHEAD", 3 * tile)
    (first, second), values = made(tmp_path, (5, 13), dtype, count=2)
    weights = torch.tensor([0.5, 0.0, 0.8, -0.3], dtype=torch.float64)
    grad = torch.randn(5, 13)
    for block, held in zip((first, second), values, strict=True):
        expected = torch.einsum("n,nij->ij", weights, held)
        for out_dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            out = torch.full((5, 13), torch.nan, dtype=out_dtype)
            block.combine(weights, out)
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        strided = torch.full((13, 5), torch.nan).t()
        block.combine(weights, strided)
        torch.testing.assert_close(strided.double(), expected, rtol=1e-6, atol=1e-6)
        deltas = held - held.mean(dim=0)
        products = torch.einsum("ij,nij->n", grad.double(), deltas)
        torch.testing.assert_close(block.project(grad).double(), products, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, PIECES, 2 * PIECES + 3])
def test_compiled_products(tmp_path, monkeypatch, n, dtype):
    monkeypatch.setattr(originals, "_TILE", 400)
    (block,), (held,) = made(tmp_path, (1000,), dtype, n=n, compile=True)
    weights, grad, out = torch.randn(n).double(), torch.randn(1000), torch.empty(1000)
    block.combine(weights, out)
    torch.testing.assert_close(out.double(), weights @ held, rtol=1e-5, atol=1e-5)
    products = (held - held.mean(dim=0)) @ grad.double()
    torch.testing.assert_close(block.project(grad).double(), products, rtol=1e-4, atol=1e-4)
    assert block.kernels.compiled


def test_a_tensor_that_is_not_aligned(tmp_path):
    (block,), (held,) = made(tmp_path, (40,), odd=True)
    out = torch.empty(40)
    block.combine(torch.full((N,), 0.25), out)
    torch.testing.assert_close(out.double(), held.mean(dim=0), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system cannot say what it holds in memory")
def test_only_what_is_not_in_memory_is_read_ahead(tmp_path, monkeypatch):
    blocks, _ = made(tmp_path, (3, 1000))
    entry, files = blocks[0].entries[0], blocks[0].files
    entry.file.read_bytes()
    file = files._map(entry.file)[0]
    assert originals._in_memory(file, entry.start)
    assert not originals._in_memory(file, 1 << 40)

    class Mapped:
        asked = 0

        def madvise(self, *arguments):
            self.asked += 1

    mapped = Mapped()
    files._maps[entry.file] = (file, mapped, files._maps[entry.file][2])
    files.read_ahead(entry, 0, 3000)
    assert mapped.asked == 0
    monkeypatch.setattr(originals, "_in_memory", lambda *_: False)
    files.read_ahead(entry, 0, 3000)
    assert mapped.asked == 1


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 1, 3), (1, 4, 6), (2, 0, 1), (1, 2, 0)])
def test_a_part_of_a_tensor(tmp_path, monkeypatch, dim, start, length):
    monkeypatch.setattr(originals, "_TILE", 5)
    monkeypatch.setattr(originals, "_AHEAD", 10)
    window = Window.slice((4, 10, 3), dim, start, length)
    (block,), (held,) = made(tmp_path, (4, 10, 3), window=window)
    part = held.narrow(dim + 1, start, length)
    assert window.numel == part[0].numel()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    out = torch.full(part.shape[1:], torch.nan)
    block.combine(weights, out)
    torch.testing.assert_close(out.double(), torch.einsum("n,nijk->ijk", weights, part), rtol=1e-6, atol=1e-6)
    grad = torch.randn(part.shape[1:])
    products = torch.einsum("ijk,nijk->n", grad.double(), part - part.mean(dim=0))
    torch.testing.assert_close(block.project(grad).double(), products, rtol=1e-4, atol=1e-5)


def test_small_deltas_are_not_lost_in_rounding(tmp_path):
    files, held = [], []
    base = torch.randn(300_000)
    for k in range(N):
        held.append(base + 1e-5 * torch.randn(base.shape, generator=torch.Generator().manual_seed(k)))
        save_file({"t": held[-1]}, tmp_path / f"{k}.safetensors")
        files.append(read_header(tmp_path / f"{k}.safetensors")["t"])
    block = OriginalBlock(files, Window.whole(len(base)), MappedFiles(), Kernels(compile=False))
    values = torch.stack(held).double()
    grad = torch.randn(len(base))
    expected = (values - values.mean(dim=0)) @ grad.double()
    assert float((block.project(grad).double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("storage", ["float32", "int8", "disk"])
def test_autocast_leaves_the_merge_alone(tmp_path, storage):
    class Transposed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 4).t())

        def forward(self, x):
            return x @ self.weight

    for k in range(3):
        (tmp_path / str(k)).mkdir()
        save_file({"weight": torch.randn(4, 6)}, tmp_path / str(k) / "model.safetensors")
    found = []
    for enabled in (False, True):
        model = twa.merged_model(twa.Soup(sorted(tmp_path.iterdir())), Transposed(), storage=storage)
        with torch.no_grad():
            model.twa_coefficients += torch.tensor([0.5, 0.2, -0.7])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.refresh()
        weight = model.module.weight.detach().clone()
        products = model.basis.project("weight", torch.ones(4, 6).t().contiguous().t())
        found.append((weight, products))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_pickled_soup_lives_as_long_as_what_reads_it(tmp_path):
    import gc

    for k in range(2):
        (tmp_path / str(k)).mkdir()
        torch.save(
            {"weight": torch.full((2, 3), float(k)), "bias": torch.zeros(2)}, tmp_path / str(k) / "pytorch_model.bin"
        )
    soup = twa.Soup(sorted(tmp_path.iterdir()), allow_pickle=True)
    model = twa.merged_model(soup, torch.nn.Linear(3, 2), storage="int8")
    labels = soup.labels
    del soup
    gc.collect()
    with model.materialized(mixing.one_hot(1, labels)) as module:
        assert (module.weight == 1).all()


def test_a_greedy_soup_reads_only_what_it_adds_or_takes_away(tmp_path, monkeypatch):
    (block,), (held,) = made(tmp_path, (100,))
    read = []
    piece = OriginalBlock._piece
    monkeypatch.setattr(OriginalBlock, "_piece", lambda self, k, *rest: read.append(k) or piece(self, k, *rest))
    labels = tuple("abcd")
    steps = [([2], [2]), ([2, 0], [0]), ([2, 0, 1], [1]), ([2, 0, 3], [1, 3]), ([2, 0, 3], []), ([1], [1])]
    out, before = torch.empty(100), None
    for chosen, expected in steps:
        read.clear()
        row = mixing.subset(chosen, labels).row("any")
        block.combine(row, out) if before is None else block.update(before, row, out)
        assert sorted(read) == expected, chosen
        torch.testing.assert_close(out.double(), held[chosen].mean(dim=0), rtol=1e-6, atol=1e-6)
        before = row


def test_updates_in_place_do_not_drift(tmp_path):
    (block,), (held,) = made(tmp_path, (100,))
    rows = [mixing.subset(chosen, tuple("abcd")).row("any") for chosen in ([0, 1], [0, 1, 2], [0, 1, 3])]
    out = torch.empty(100)
    block.combine(rows[0], out)
    for turn in range(300):
        block.update(rows[turn % 3], rows[(turn + 1) % 3], out)
    torch.testing.assert_close(out.double(), held[:2].mean(dim=0), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("n", [10, 40])
def test_updates_do_not_multiply_what_was_rounded(tmp_path, n):
    (block,), (held,) = made(tmp_path, (100,), n=n)
    labels = tuple(str(k) for k in range(n))
    little = torch.full((n,), (1 - 1e-6) / (n - 1), dtype=torch.float64)
    little[0] = 1e-6
    tables = [mixing.ema(decay, labels) for decay in (0.5, 0.7, 0.8, 0.9)]
    tables += [mixing.one_row(little, labels), mixing.ema(0.6, labels)]
    out, before = torch.empty(100), tables[0].row("any")
    block.combine(before, out)
    for table in tables[1:]:
        row = table.row("any")
        block.update(before, row, out)
        torch.testing.assert_close(out.double(), row @ held, rtol=1e-6, atol=1e-6)
        before = row


@pytest.mark.parametrize("storage", ["int4", "disk"])
@pytest.mark.parametrize("kind", ["gpt2", "vit", "t5"])
def test_tables_are_put_in_place_exactly(tmp_path, kind, storage):
    """Whatever the storage that learns: a table's weights are those that are written."""
    soup = twa.Soup(factory.make_soup(kind, tmp_path))
    model = twa.merged_model(soup, storage=storage)
    reference = twa.merged_model(soup, storage="float32")
    labels = soup.labels
    tables = [
        mixing.one_hot(0, labels),
        mixing.subset([0, 1], labels),
        mixing.uniform(labels),
        mixing.one_hot(1, labels),
    ]
    for table in tables:
        with model.materialized(table) as module, reference.materialized(table) as expected:
            for (name, found), wanted in zip(module.named_parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad(), model.materialized() as module:  # back to what learns
        at_start = module(**BATCHES[kind]).loss
    torch.testing.assert_close(model(**BATCHES[kind]).loss, at_start)


def test_what_is_unloaded_or_saved_is_exact(tmp_path):
    import transformers

    soup = twa.Soup(factory.make_soup("gpt2", tmp_path / "soup"))
    found = {}
    for storage in ("float32", "int4"):
        model = twa.merged_model(soup, storage=storage)
        with torch.no_grad():
            model.twa_coefficients[:, 0] += 0.7
        model.save_pretrained(tmp_path / storage)
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / storage)
        found[storage] = dict(model.merge_and_unload().named_parameters())
        for name, parameter in saved.named_parameters():
            assert torch.equal(parameter, found[storage][name])
    for name, parameter in found["int4"].items():
        torch.testing.assert_close(parameter, found["float32"][name], rtol=1e-5, atol=1e-6)


def test_disk_learns_as_memory_does(tmp_path):
    soup = twa.Soup(factory.make_soup("gpt2", tmp_path))
    found = {}
    for storage in ("float32", "disk"):
        model = twa.merged_model(soup, granularity="layer", storage=storage)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            model(**BATCHES["gpt2"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[storage] = model.twa_coefficients.detach().clone()
        assert storage != "disk" or model.basis.nbytes == 0
    assert found["disk"].abs().max() > 1e-4
    torch.testing.assert_close(found["disk"], found["float32"], rtol=1e-3, atol=1e-6)
