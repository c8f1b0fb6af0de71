import math

import numpy as np
import pytest

from twa_merge.errors import UserError
from twa_merge.metrics import DEFAULT_METRICS, OFFLINE, get_metric, standard_error


@pytest.mark.parametrize(("num_classes", "average"), [(2, "binary"), (3, "macro"), (5, "macro")])
def test_f1_is_that_of_scikit_learn(num_classes, average):
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(num_classes)
    predictions, references = rng.integers(num_classes, size=(2, 50)).tolist()
    expected = f1_score(references, predictions, average=average, zero_division=0)
    assert get_metric("f1", num_classes=num_classes).compute(predictions, references) == pytest.approx(expected)
    assert get_metric("f1").compute(predictions, references) == pytest.approx(expected)


def test_f1_of_three_classes_stays_the_mean_over_classes_where_only_two_occur():
    from sklearn.metrics import f1_score

    predictions, references = [0, 1, 1, 0], [0, 1, 0, 0]
    expected = f1_score(references, predictions, average="macro")
    assert get_metric("f1", num_classes=3).compute(predictions, references) == pytest.approx(expected)


def test_f1_of_several_labels_a_sample_is_micro():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    predictions, references = rng.integers(2, size=(2, 40, 4)).tolist()
    expected = f1_score(references, predictions, average="micro")
    assert get_metric("f1").compute(predictions, references) == pytest.approx(expected)
    assert get_metric("f1").compute([[0, 0]], [[0, 0]]) == 0.0


def test_simple_metrics():
    assert get_metric("accuracy").compute([1, 0, 2], [1, 0, 0]) == pytest.approx(2 / 3)
    assert get_metric("accuracy").compute([[1, 0], [0, 1]], [[1, 0], [1, 1]]) == 0.5
    assert get_metric("exact_match").compute(["a b", "c"], ["a b", "d"]) == 0.5
    assert get_metric("mse").compute([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 6.0]]) == 1.0
    assert get_metric("perplexity").compute([math.log(7.0)], []) == pytest.approx(7.0)
    assert get_metric("perplexity").compute([1e6], []) == math.inf
    assert math.isnan(get_metric("perplexity").compute([math.nan], []))


def test_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = ["the cat sat on the mat", "a dog ran"], ["the cat sat on a mat", "the dog ran fast"]
    metric = get_metric("bleu")
    assert metric.compute(predictions, references) == sacrebleu.corpus_bleu(predictions, [references]).score
    assert metric.needs_text
    assert metric.compute(references, references) == pytest.approx(100)


def test_directions_and_defaults():
    better = {name: get_metric(name).higher_is_better for name in OFFLINE}
    assert better == {
        "accuracy": True, "f1": True, "exact_match": True, "bleu": True, "mse": False, "perplexity": False,
    }  # fmt: skip
    assert get_metric("perplexity").from_loss
    assert all(name in OFFLINE for names in DEFAULT_METRICS.values() for name in names)


def test_standard_error_of_accuracy_is_binomial():
    assert standard_error(get_metric("accuracy"), [1] * 80 + [0] * 20, [1] * 100) == pytest.approx(0.04)
    assert math.isnan(standard_error(get_metric("accuracy"), [1], [1]))


def test_bootstrap_agrees_with_theory_and_repeats():
    rng = np.random.default_rng(0)
    errors = rng.normal(size=400)
    expected = (errors**2).std(ddof=1) / 20
    metric = get_metric("mse")
    found = standard_error(metric, errors.tolist(), [0.0] * 400, seed=1)
    assert found == pytest.approx(expected, rel=0.2)
    assert found == standard_error(metric, errors.tolist(), [0.0] * 400, seed=1)
    assert found != standard_error(metric, errors.tolist(), [0.0] * 400, seed=2)


def test_a_local_folder_is_never_run_in_place_of_a_metric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rouge").mkdir()
    (tmp_path / "rouge" / "rouge.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match=r"metric rouge: rouge in this folder.*\./rouge"):
        get_metric("rouge")
    (tmp_path / "meteor.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match=r"meteor\.py in this folder"):
        get_metric("meteor")


def test_unknown_metrics_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="someone/metric: code of other people's repositories is not run"):
        get_metric("someone/metric")
    with pytest.raises(UserError, match=r"\./nowhere\.py: no such script"):
        get_metric("./nowhere.py")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    with pytest.raises(UserError, match="did you mean accuracy") as caught:
        get_metric("acuracy")
    assert "\n" not in str(caught.value)


def test_a_script_is_run_when_named_as_a_path(tmp_path, monkeypatch):
    try:
        import evaluate  # noqa: F401
    except Exception as error:
        pytest.skip(f"evaluate cannot be imported here: {error}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halves.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Halves(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('int64'),"
        " 'references': datasets.Value('int64')})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'note': 'x', 'halves': sum(p == r for p, r in zip(predictions, references)) / 2}\n"
    )
    metric = get_metric("./halves.py")
    assert metric.compute([1, 2, 3], [1, 2, 0]) == 1.0
    assert metric.higher_is_better
    assert standard_error(metric, [1, 2, 3], [1, 2, 0]) > 0
