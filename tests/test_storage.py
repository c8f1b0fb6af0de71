"""Deltas in few bits: how far off, both products those of the rounded deltas, and what `auto` takes."""

import pytest
import torch

import twa_merge as twa
from tests import factory
from tests.test_model import BATCHES
from twa_merge import kernels
from twa_merge.blocks import TILE, FloatBlock, TiledBlock
from twa_merge.errors import UserError
from twa_merge.kernels import Kernels
from twa_merge.quantize import BLOCK, dequantize, quantize
from twa_merge.storage import BITS, STORAGES, bytes_of, choose_storage


def deltas(n, numel, seed=0):
    """Heavy-tailed, as real ones are, and each checkpoint on a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, numel, generator=generator)
    tails = torch.rand(n, numel, generator=generator).clamp_min(1e-3) ** -0.25
    values = normal * tails * torch.logspace(-5, -2, n).unsqueeze(1)
    return values - values.mean(dim=0)


def filled(storage, n=5, numel=3 * TILE + 70, compile=False):
    block = TiledBlock(n, numel, BITS[storage], Kernels(compile=compile))
    values, centre = deltas(n, numel), torch.randn(numel, generator=torch.Generator().manual_seed(1))
    for first in range(0, numel, 2 * TILE):
        block.put(first, values[:, first : first + 2 * TILE], centre[first : first + 2 * TILE])
    return block, values, centre


def rounded(block, storage):
    """Return the (N, D) deltas that a block really holds."""
    values = dequantize(block.codes, block.scales, BITS[storage])
    return values.transpose(0, 1).reshape(values.shape[1], -1)[:, : block.numel].double()


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.001, 0.01), (4, 0.05, 0.14)])
def test_error_of_each_checkpoint_whatever_its_scale(bits, least, most):
    values = deltas(5, 64 * TILE).view(5, 64, TILE).transpose(0, 1).contiguous()
    codes, scales = quantize(values, bits)
    assert codes.nbytes == values.numel() * bits // 8 and scales.shape == (64, 5, TILE // BLOCK)
    error = (dequantize(codes, scales, bits) - values).double().square().sum(dim=(0, 2)).sqrt()
    relative = error / values.double().square().sum(dim=(0, 2)).sqrt()
    assert (relative > least).all() and (relative < most).all(), relative


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_costs_its_own_block_alone(bits):
    values = deltas(2, TILE).view(1, 2, TILE)
    before = dequantize(*quantize(values, bits), bits)
    values = values.clone()
    values[0, 0, 5] = 1e4
    after = dequantize(*quantize(values, bits), bits)
    assert torch.equal(before[0, 1], after[0, 1]) and torch.equal(before[0, 0, BLOCK:], after[0, 0, BLOCK:])
    assert after[0, 0, 5] == 1e4


@pytest.mark.parametrize("bits", [8, 4])
def test_extremes_and_zeros_are_kept(bits):
    values = torch.zeros(1, 3, 2 * BLOCK)
    values[0, 1, 3], values[0, 2, 100] = -2.5, 7.0
    assert torch.equal(dequantize(*quantize(values, bits), bits), values)


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("storage", list(BITS))
def test_both_products_are_those_of_the_rounded_deltas(storage, compile):
    block, _, centre = filled(storage, compile=compile)
    held = rounded(block, storage)
    weights = torch.tensor([0.7, -0.2, 0.1, 0.3, 0.1])
    grad = torch.randn(block.numel, generator=torch.Generator().manual_seed(2))
    expected = centre.double() + (weights.double() - 0.2) @ held
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        out = torch.empty(block.numel, dtype=dtype)
        block.combine(weights.double(), out)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    products = held @ grad.double()
    torch.testing.assert_close(block.project(grad).double(), products - products.mean(), rtol=1e-4, atol=1e-6)
    assert block.kernels.compiled == compile
    strided = torch.empty(2, block.numel).t()[:, 0]
    block.combine(weights, strided)
    torch.testing.assert_close(strided.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", list(BITS))
def test_equal_weights_are_the_centre_itself(storage):
    block, _, centre = filled(storage)
    out = torch.empty(block.numel)
    block.combine(torch.full((5,), 0.2), out)
    assert torch.equal(out, centre)


def test_without_a_compiler_plain_kernels_take_over(monkeypatch):
    block, _, _ = filled("int4", compile=True)
    plain, _, _ = filled("int4")

    def fail(*args):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setitem(block.kernels._compiled, kernels._project, fail)
    grad = torch.randn(block.numel)
    with pytest.warns(UserWarning, match=r"slower plain kernels are used \(no compiler\)"):
        found = block.project(grad)
    torch.testing.assert_close(found, plain.project(grad))
    assert not block.kernels.compiled


@pytest.mark.parametrize("kind", ["gpt2", "vit", "t5"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_model_learns_with_its_exact_gradient_on_rounded_deltas(tmp_path, kind, storage):
    """The gradient of the coefficients is that of the loss at the weights that the block hands out."""
    soup = twa.Soup(factory.make_soup(kind, tmp_path))
    model = twa.merged_model(soup, granularity="layer", storage=storage)
    batch = BATCHES[kind]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.twa_coefficients.copy_(0.3 * torch.randn(model.twa_coefficients.shape, generator=generator))

    def loss():
        return model(**batch).loss

    loss().backward()
    gradient = model.twa_coefficients.grad.clone()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    ends = []
    start = model.twa_coefficients.detach().clone()
    for sign in (-1, 1):
        with torch.no_grad():
            model.twa_coefficients.copy_(start + sign * 2e-3 * direction)
            ends.append(float(loss()))
    slope = (ends[1] - ends[0]) / 4e-3
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=3e-2, abs=1e-4)
    assert sum(block.nbytes for block in model.basis.blocks.values()) == model.basis.nbytes


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("n", [3, 37])
def test_float_rows(n, compile):
    torch.manual_seed(0)
    numel = 300_001
    block = FloatBlock(n, numel, Kernels(compile=compile))
    values, centre = torch.randn(n, numel), torch.randn(numel)
    values -= values.mean(dim=0)
    block.put(0, values, centre)
    weights, grad = torch.randn(n), torch.randn(numel)
    expected = (centre.double() + weights.double() @ values.double()).view(numel, 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        out = torch.full((numel, 1), torch.nan, dtype=dtype)
        block.combine(weights.double(), out)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    products = values.double() @ grad.double()
    assert (block.project(grad).double() - products).norm() < 3e-5 * products.norm()
    assert block.kernels.compiled == compile


def test_auto_takes_the_most_exact_that_fits():
    numel = 100_000_000
    sizes = [bytes_of(storage, 10, numel) for storage in STORAGES]
    assert sizes == [4_000_000_000, 2_400_000_000, 1_462_500_000, 962_500_000, 0]
    for storage, size in zip(STORAGES, sizes, strict=True):
        assert choose_storage(10, numel, 2 * size)[0] == storage
    chosen, line = choose_storage(10, numel, 3_000_000_000)
    assert chosen == "int8"
    assert line == "storage: int8, 1.46 GB of 3.0 GB free (bfloat16 would take 2.40 GB, more than half)"
    assert choose_storage(10, numel, -1)[0] == "disk"


def test_unknown_storage_is_refused(tmp_path):
    soup = twa.Soup(factory.make_soup("bert", tmp_path))
    with pytest.raises(
        UserError, match="storage: expected auto or one of float32, bfloat16, int8, int4, disk, got 'int2'"
    ):
        twa.merged_model(soup, storage="int2")
