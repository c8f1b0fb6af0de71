"""Small matrices in place of other bases: orthogonal, principal components, with the centre, random."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import twa_merge as twa
from tests import factory
from tests.test_model import BATCHES
from twa_merge.coordinates import orthonormal, principal

N, D = 6, 400


def snapshots(cosine=None, seed=0):
    """Return (N, D) float64 deltas; with a cosine, those of nearly collinear snapshots of one run."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, D, generator=generator, dtype=torch.float64)
    if cosine is not None:
        # steps along one line, and off it by as much as makes that the cosine of two of them
        line = torch.linspace(-1, 1, N, dtype=torch.float64)[:, None] * torch.randn(D, generator=generator).double()
        off = ((1 - cosine**2) ** 0.5) * line.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        noise = line + off * noise
    return noise - noise.mean(dim=0)


def serial_gram_schmidt(deltas):
    """Return float32 orthonormal rows as the paper's predecessors make them: one delta after another, over D."""
    rows = []
    for delta in deltas.float():
        for row in rows:
            delta = delta - (delta @ row) * row
        rows.append(delta / delta.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("cosine", [None, 0.99, 0.9999])
def test_orthonormal_rows_are_those_of_a_float64_reference(cosine):
    deltas = snapshots(cosine)
    rows = orthonormal(deltas @ deltas.T)
    assert (rows[-1] == 0).all()  # the deltas sum to zero: the last one is in the span of the others
    directions = rows[:-1] @ deltas
    q, r = torch.linalg.qr(deltas[:-1].T)
    reference = (q * r.diagonal().sign()).T
    torch.testing.assert_close(directions, reference, rtol=0, atol=1e-8)
    torch.testing.assert_close(directions @ directions.T, torch.eye(N - 1).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("cosine", [None, 0.99, 0.9999])
def test_principal_components_are_those_of_a_float64_svd(cosine):
    deltas = snapshots(cosine)
    found = principal(deltas @ deltas.T, 3) @ deltas
    _, _, reference = torch.linalg.svd(deltas, full_matrices=False)
    signs = (found * reference[:3]).sum(dim=1).sign()
    torch.testing.assert_close(found * signs[:, None], reference[:3], rtol=0, atol=1e-8)


def test_serial_gram_schmidt_in_float32_fails_where_they_do_not():
    """Its last direction is rounding noise, made a unit long; the one before is off."""
    deltas = snapshots(0.9999)
    serial = serial_gram_schmidt(deltas).double()
    inside = torch.linalg.lstsq(deltas[:-1].T, serial.T).solution
    outside = (serial - (inside.T @ deltas[:-1])).norm(dim=1)  # of the span of the snapshots
    rows = orthonormal(deltas @ deltas.T)
    gram = (rows @ deltas)[:-1] @ (rows @ deltas)[:-1].T
    worst = (gram - torch.eye(N - 1).double()).abs().max()
    assert outside[-1] > 0.1 and worst < 1e-8
    kept = serial[:-1]
    assert (kept @ kept.T - torch.eye(N - 1).double()).abs().max() > 100 * worst


def model_of(folder, kind="gpt2", **options):
    if not (folder / "member-0").is_dir():
        factory.make_soup(kind, folder, n=4)
    return twa.merged_model(twa.Soup(sorted(folder.iterdir())), granularity="layer", **options)


@pytest.mark.parametrize("coordinates", ["relative", "normalized"])
@pytest.mark.parametrize(
    "directions, components, linear",
    [("orthogonal", None, False), ("pca", 2, False), ("deltas", None, True), ("pca", 3, True)],
)
@pytest.mark.parametrize("storage", ["float32", "int8", "disk"])
def test_gradients_are_those_of_the_dense_graph(tmp_path, coordinates, directions, components, linear, storage):
    options = {"coordinates": coordinates, "directions": directions, "components": components, "linear": linear}
    model = model_of(tmp_path, storage=storage, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        size = 0.1 if coordinates == "relative" else 0.02
        model.twa_coefficients.copy_(size * torch.randn(model.twa_coefficients.shape))
    model(**BATCHES["gpt2"]).loss.backward()
    # the same by autograd through sum_k w_k theta_k
    states = [read(path) for path in sorted(tmp_path.iterdir())]
    coefficients = model.twa_coefficients.detach().double().requires_grad_()
    table = torch.full_like(model.basis.norms, 1 / 4).index_put(
        (model._active,), model.coordinates.weights(coefficients)
    )
    if linear:
        assert (table.sum(dim=1) - 1).abs().max() > 1e-3
    else:
        torch.testing.assert_close(table.sum(dim=1), torch.ones(len(table)).double())
    plain = twa.merged_model(model_soup(tmp_path)).unload()
    names = [name for name, _ in plain.named_parameters()]
    merged = {
        name: torch.tensordot(table[model.basis.row_of(name)], torch.stack([s[name].double() for s in states]), dims=1)
        for name in names
    }
    loss = torch.func.functional_call(plain.double(), merged, (), BATCHES["gpt2"], tie_weights=True).loss
    loss.backward()
    tolerance = 2e-2 if storage == "int8" else 1e-4
    scale = float(coefficients.grad.abs().max())
    torch.testing.assert_close(model.twa_coefficients.grad.double(), coefficients.grad, rtol=0, atol=tolerance * scale)


def model_soup(folder):
    return twa.Soup(sorted(folder.iterdir()))


def read(folder):
    import transformers

    return dict(transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("directions", ["deltas", "orthogonal", "pca"])
@pytest.mark.parametrize("coordinates", ["relative", "normalized"])
def test_weights_there_and_back(tmp_path, coordinates, directions, linear):
    model = model_of(tmp_path, coordinates=coordinates, directions=directions, linear=linear)
    weights = twa.ema(0.6, model.checkpoints)
    model.start_from(weights)
    torch.testing.assert_close(
        model.table_GN()[model._active], weights.table.expand(len(model._active), -1), rtol=1e-5, atol=1e-6
    )


def test_few_components_are_the_nearest_there_is(tmp_path):
    whole, few = (model_of(tmp_path, directions="pca", components=c) for c in (None, 1))
    weights = twa.one_hot(0, whole.checkpoints)
    for model in (whole, few):
        model.start_from(weights)
    torch.testing.assert_close(few.twa_coefficients[:, 0], whole.twa_coefficients[:, 0])
    assert not torch.allclose(few.table_GN(), whole.table_GN())


def test_a_merge_of_the_linear_span_is_written_and_read_again(tmp_path):
    folder = tmp_path / "soup"
    model = model_of(folder, linear=True)
    with torch.no_grad():
        model.twa_coefficients[:, -1] = 0.1
    weights = model.mixing_weights()
    twa.write(model_soup(folder), weights, tmp_path / "out")
    assert twa.MixingWeights.load(tmp_path / "out").linear
    module = model.merge_and_unload()
    for name, value in read(tmp_path / "out").items():
        torch.testing.assert_close(module.get_parameter(name), value, rtol=1e-5, atol=1e-6)
    with pytest.raises(twa.UserError, match="expected 1"):
        twa.MixingWeights(weights.table, weights.groups, weights.checkpoints)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"directions": "random"}, "directions: expected deltas, orthogonal or pca"),
        ({"components": 2}, "components: expected 1 to 3 for 4 checkpoints, with directions pca; got 2 with deltas"),
        ({"directions": "pca", "components": 4}, "components: expected 1 to 3"),
    ],
)
def test_nonsense_is_refused(tmp_path, options, message):
    with pytest.raises(twa.UserError, match=message):
        model_of(tmp_path, **options)


@pytest.mark.parametrize(
    "options", [{"directions": "orthogonal"}, {"directions": "pca", "components": 2}, {"linear": True}]
)
def test_a_whole_run(tmp_path, options):
    torch.manual_seed(0)
    base = nn.Linear(16, 2)
    for k in range(4):
        state = {name: value + 0.3 * torch.randn_like(value) for name, value in base.state_dict().items()}
        save_file(state, tmp_path / f"{k}.safetensors")
    x = torch.randn(300, 16)
    data = [(row, label) for row, label in zip(x, base(x).argmax(dim=1), strict=True)]
    soup = twa.Soup(sorted(tmp_path.glob("*.safetensors")))
    result = twa.train(soup, data, module=nn.Linear(16, 2), loss=F.cross_entropy, steps=60, **options)
    learned = next(c for c in result.league if c.learned)
    assert learned.select.loss.value < next(c for c in result.league if c.name == "uniform").select.loss.value
    assert learned.weights.linear == options.get("linear", False)


def test_random_directions_of_one_element_are_as_long_as_the_deltas_on_average(tmp_path):
    module = nn.Linear(1, 1, bias=False)
    for value in (-1.0, 1.0):
        save_file({"weight": torch.full((1, 1), value)}, tmp_path / f"{value}.safetensors")
    soup = twa.Soup(sorted(tmp_path.glob("*.safetensors")))
    bases = [twa.random_basis(soup, module, {"all": ("weight",)}, dimensions=1, seed=seed) for seed in range(300)]
    assert float(torch.stack([basis.norms.square().mean() for basis in bases]).mean()) == pytest.approx(1, abs=0.25)


def test_random_directions_are_made_anew_and_learn(tmp_path):
    from twa_merge.basis import mergeable_parameters
    from twa_merge.groups import group_parameters

    factory.make_soup("gpt2", tmp_path, n=4)
    soup = model_soup(tmp_path)
    module = twa.merged_model(soup).unload()
    groups = group_parameters(list(mergeable_parameters(soup, module)), "model")
    basis = twa.random_basis(soup, module, groups, dimensions=5, seed=1)
    assert basis.norms.shape == (1, 6)
    checkpoints = twa.merged_model(soup, module, granularity="model")
    length = checkpoints.basis.norms.square().mean().sqrt()
    checkpoints.unload()
    torch.testing.assert_close(basis.norms, length.expand(1, 6), rtol=0.05, atol=0)
    model = twa.MergedModel(module, basis, tuple(f"random-{k}" for k in range(6)))
    uniform = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(**BATCHES["gpt2"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        model.twa_coefficients.zero_()
    with model.materialized() as merged:
        for name, p in merged.named_parameters():
            torch.testing.assert_close(p, uniform[name])
    # both products are those of the same directions
    name, block = next(iter(basis.blocks.items()))
    size = block.centre().numel()
    rows = torch.stack([out_of(block, k, size) for k in range(6)])
    grad = torch.randn(size)
    torch.testing.assert_close(block.project(grad), rows @ grad, rtol=1e-4, atol=1e-4)


def out_of(block, k, size):
    weights, out = torch.zeros(6, dtype=torch.float64), torch.empty(size)
    weights[k] = 1
    block.combine(weights, out)
    return out - block.centre()
