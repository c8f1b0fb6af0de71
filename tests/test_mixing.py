import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from twa_merge import mixing
from twa_merge.errors import UserError
from twa_merge.mixing import MixingWeights

NAMES = ("a", "b", "c", "d")


@given(st.integers(2, 30), st.data())
def test_rows_of_every_fixed_scheme_sum_to_one(n, data):
    names = tuple(map(str, range(n)))
    tables = [
        mixing.uniform(names),
        mixing.one_hot(data.draw(st.integers(0, n - 1)), names),
        mixing.last_k(data.draw(st.integers(1, n)), names),
        mixing.ema(data.draw(st.floats(0, 0.999)), names),
    ]
    for weights in tables:
        assert weights.table.shape == (1, n)
        assert abs(float(weights.table.sum()) - 1) < 1e-12


def test_ema_is_the_recursion_over_snapshots():
    values = torch.tensor([3.0, 1.0, 4.0, 1.5], dtype=torch.float64)
    average = values[0]
    for value in values[1:]:
        average = 0.7 * average + 0.3 * value
    assert float(mixing.ema(0.7, NAMES).table[0] @ values) == pytest.approx(float(average), abs=1e-15)


def test_last_k():
    assert mixing.last_k(2, NAMES).table.tolist() == [[0, 0, 0.5, 0.5]]
    with pytest.raises(UserError, match="k from 1 to 4"):
        mixing.last_k(5, NAMES)


def test_given_weights_are_scaled_and_checked():
    assert mixing.given([1, 1, 1, 1], NAMES).table.tolist() == [[0.25] * 4]
    with pytest.raises(UserError, match="sum to zero"):
        mixing.given([1, -1, 2, -2], NAMES)
    with pytest.raises(UserError, match="expected 4, one for each checkpoint, got 2"):
        mixing.given([1, 2], NAMES)
    with pytest.raises(UserError, match="finite"):
        mixing.given([1, float("nan"), 1, 1], NAMES)


@pytest.mark.parametrize("bad", [[0.5, 0.4], [float("nan"), 1.0]])
def test_rows_that_do_not_sum_to_one_are_refused(bad):
    with pytest.raises(UserError, match=r"group 'g'.*expected 1"):
        MixingWeights(torch.tensor([bad], dtype=torch.float64), {"g": ("x",)}, ("a", "b"))


def test_save_and_load_are_exact(tmp_path):
    table = torch.rand(3, 2, dtype=torch.float64)
    table[:, 1] = 1 - table[:, 0]
    weights = MixingWeights(
        table,
        {"g": ("x", "y"), "h": ("z",), "tied.weight": ("w",)},
        ("runs/a", "runs/b"),
        {"bn.running_mean": torch.randn(5)},
        ("f1", "f2"),
    )
    weights.save(tmp_path)
    again = MixingWeights.load(tmp_path)
    assert torch.equal(again.table, table)
    assert (again.groups, again.checkpoints, again.fingerprints) == (
        weights.groups,
        weights.checkpoints,
        weights.fingerprints,
    )
    assert torch.equal(again.statistics["bn.running_mean"], weights.statistics["bn.running_mean"])
    readable = json.loads((tmp_path / "mixing_weights.json").read_text())
    assert readable["mixing_weights"]["h"] == table[1].tolist()


def test_rows_by_parameter_name():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weights = MixingWeights(table, {"g": ("x", "y"), "h": ("z",)}, ("a", "b"))
    assert weights.row("y").tolist() == [1, 0]
    assert weights.row("z").tolist() == [0, 1]
    assert not weights.knows("q")
    assert mixing.uniform(NAMES).knows("anything")


def test_load_refuses_what_is_no_table(tmp_path):
    with pytest.raises(UserError, match="no such mixing weights"):
        MixingWeights.load(tmp_path)
    (tmp_path / "mixing_weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors"):
        MixingWeights.load(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "another"},
        {"groups": None},
        {"groups": {"model": [], "more": []}},
        {"groups": {}},
        {"groups": {"model": ["x"], "more": ["x"]}},
        {"checkpoints": 2},
        {"checkpoints": ["a"]},
        {"fingerprints": ["x"]},
    ],
)
def test_load_refuses_damaged_metadata_in_one_line(tmp_path, changed):
    about = {"format": mixing.FORMAT, "checkpoints": ["a", "b"], "fingerprints": [], "groups": {"model": []}}
    table = {"mixing_weights": torch.full((1, 2), 0.5, dtype=torch.float64)}
    file = tmp_path / "mixing_weights.safetensors"
    save_file(table, file, metadata={"twa_merge": json.dumps(about)})
    assert MixingWeights.load(tmp_path).checkpoints == ("a", "b")
    save_file(table, file, metadata={"twa_merge": json.dumps(about | changed)})
    with pytest.raises(UserError, match="holds no mixing weights") as caught:
        MixingWeights.load(tmp_path)
    assert "\n" not in str(caught.value)
    save_file(table, file, metadata={"twa_merge": "{"})
    with pytest.raises(UserError, match="holds no mixing weights"):
        MixingWeights.load(tmp_path)


def test_one_hot_column():
    assert mixing.one_hot(2, NAMES).one_hot_column() == 2
    assert mixing.uniform(NAMES).one_hot_column() is None
