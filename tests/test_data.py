import json
import time

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from twa_merge import data
from twa_merge.errors import UserError
from twa_merge.splits import require_disjoint, same_split, split_indices


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def open_split(*args, **kwargs):
    return data.open_split(*args, **kwargs).dataset


def rows(count, offset=0):
    return {"text": [f"text {i + offset}" for i in range(count)], "label": [i % 2 for i in range(count)]}


def table(count, sep=",", offset=0):
    values = rows(count, offset)
    return "\n".join([f"text{sep}label", *(f"{t}{sep}{y}" for t, y in zip(*values.values(), strict=True))]) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Files named by split; the test file lacks the labels, as is common."""
    path = tmp_path / "named"
    path.mkdir()
    (path / "train.csv").write_text(table(10))
    (path / "dev.csv").write_text(table(4, offset=100))
    (path / "test.csv").write_text("text\na\nb\nc\n")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "csv.gz"])
def test_files(tmp_path, suffix):
    import gzip

    path = tmp_path / f"things.{suffix}"
    expected = datasets.Dataset.from_dict(rows(5))
    if suffix == "csv.gz":
        path.write_bytes(gzip.compress(table(5).encode()))
    elif suffix in ("csv", "tsv"):
        path.write_text(table(5, {"csv": ",", "tsv": "\t"}[suffix]))
    elif suffix == "json":
        path.write_text(json.dumps(expected.to_list()))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in expected.to_list()))
    elif suffix == "parquet":
        expected.to_parquet(path)
    else:
        expected.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    for source, split in ((path, None), (str(path), "train"), (str(path), "train[:3]")):
        found = open_split(source, split)
        assert found.to_dict() == (expected if split != "train[:3]" else expected.select(range(3))).to_dict()


def test_texts_that_look_like_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\nNone,1\nNA,0\nnull,1\n,0\n")
    assert open_split(tmp_path / "x.csv")["text"][:] == ["None", "NA", "null", None]


def test_text_file(tmp_path):
    (tmp_path / "corpus.txt").write_text("one line\nanother\n")
    assert open_split(tmp_path / "corpus.txt")["text"][:] == ["one line", "another"]


def test_a_file_is_the_split_it_is_named_after(folder):
    assert len(open_split(folder / "dev.csv", "validation")) == 4
    assert len(open_split(folder / "dev.csv", "dev")) == 4
    with pytest.raises(UserError, match=r"dev\.csv: no split 'test'; expected one of validation"):
        open_split(folder / "dev.csv", "test")


def test_a_rewritten_file_is_read_again(tmp_path):
    for word in ("aaaa", "bbbb"):
        (tmp_path / "same.csv").write_text(f"text,label\n{word},0\n")
        assert open_split(tmp_path / "same.csv")["text"][:] == [word]


def test_folder_of_files_named_by_split(folder):
    assert open_split(folder, "train").to_dict() == rows(10)
    assert open_split(str(folder), "validation").to_dict() == rows(4, 100)
    assert open_split(folder, "dev").to_dict() == rows(4, 100)
    assert open_split(folder, "test").column_names == ["text"]
    assert open_split(folder, "train[20%:50%]")["text"][:] == ["text 2", "text 3", "text 4"]
    assert open_split(folder, "train[-1:]+dev[:1]")["text"][:] == ["text 9", "text 100"]


def test_unknown_splits_list_those_there_are(folder):
    with pytest.raises(UserError, match=r"named: no split 'held'; expected one of train, validation, test"):
        open_split(folder, "held")
    assert open_split(folder)[:] == open_split(folder, "validation")[:]
    (folder / "dev.csv").unlink()
    with pytest.raises(UserError, match=r"has the splits train, test; name one"):
        open_split(folder)
    with pytest.raises(UserError, match=r"cannot read the split 'train\[x:\]'"):
        open_split(folder, "train[x:]")


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        ("train[:50%]", "train[50%:]", None),
        ("train[:6]", "train[-5:]", "rows 5 to 5 of 'train' are held-out and test data"),
        ("validation+train[:2]", "train[1:3]", "rows 1 to 1 of 'train'"),
        ("dev", "validation[:1]", "rows 0 to 0 of 'validation'"),
        ("train", "test", None),
    ],
)
def test_splits_that_share_rows_are_refused(folder, a, b, shared):
    rows = {"held-out": data.open_split(folder, a), "test": data.open_split(str(folder), b)}
    assert same_split(*rows.values()) == (shared is not None or "[" in a)
    if shared is None:
        require_disjoint(rows)
        return
    with pytest.raises(UserError, match=shared.replace("[", r"\[")):
        require_disjoint(rows)


def test_the_same_data_passed_twice_are_refused_and_equal_ones_are_not():
    one, other = (datasets.Dataset.from_dict(rows(5)) for _ in range(2))
    require_disjoint({"held-out": data.open_split(one), "test": data.open_split(other)})
    with pytest.raises(UserError, match="rows 0 to 4 of 'train' are held-out and test data"):
        require_disjoint({"held-out": data.open_split(one), "test": data.open_split(one)})


def test_saved_to_disk(tmp_path):
    one = datasets.Dataset.from_dict(rows(5))
    one.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": one, "validation": datasets.Dataset.from_dict(rows(3))})
    both.save_to_disk(tmp_path / "both")
    assert open_split(tmp_path / "one").to_dict() == rows(5)
    assert open_split(tmp_path / "one", "train[:2]").to_dict() == rows(2)
    assert open_split(tmp_path / "both", "validation").to_dict() == rows(3)
    assert open_split(both, "dev").to_dict() == rows(3)
    assert open_split(one).to_dict() == rows(5)
    with pytest.raises(UserError, match="DatasetDict: no split 'test'; expected one of train, validation"):
        open_split(both, "test")


@pytest.mark.parametrize("split", [None, "validation"])
def test_image_folder(tmp_path, split):
    for part in ["."] if split is None else ["train", "validation"]:
        # the validation part lacks a class: class numbers must not move
        for name, grey in (("bird", 0), ("cat", 90), ("dog", 200)):
            if part == "validation" and name == "bird":
                continue
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8, 3), grey + i, np.uint8)).save(
                    tmp_path / "images" / part / name / f"{i}.png"
                )
    found = open_split(tmp_path / "images", split)
    assert found.features["label"].names == ["bird", "cat", "dog"]
    assert found["label"][:] == ([0, 0] if split is None else []) + [1, 1, 2, 2]
    assert found[len(found) - 1]["image"].size == (8, 8)


def test_paths_that_are_not_there_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    started = time.monotonic()
    for source in ("./nothing", "/no/where", "~/nothing-here", "org/data.csv", "a/b/c", "imdb", "runs/a"):
        with pytest.raises(UserError, match=f"data {source}: no such file or folder"):
            open_split(source, "train")
    assert time.monotonic() - started < 2


def test_hub_failures_are_soon_and_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=r"data some-org/none: .* the Hub gave no such data set") as caught:
        open_split("some-org/none", "train")
    assert "\n" not in str(caught.value) and "no network" in str(caught.value)


def test_hub_data_are_asked_for_as_named(monkeypatch):
    import huggingface_hub

    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict({"validation": datasets.Dataset.from_dict(rows(5))})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_split("nyu-mll/glue", "validation[:3]", name="sst2", revision="abc")) == 3
    assert asked == [(("nyu-mll/glue", "sst2"), {"revision": "abc"})]


def test_broken_empty_and_unreadable(tmp_path):
    (tmp_path / "broken.json").write_text("{not json")
    with pytest.raises(UserError, match=r"broken\.json: not readable as json") as caught:
        open_split(tmp_path / "broken.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"empty\.csv: has no rows"):
        open_split(tmp_path / "empty.csv")
    (tmp_path / "zero.jsonl").write_text("")
    with pytest.raises(UserError, match=r"zero\.jsonl: the file is empty"):
        open_split(tmp_path / "zero.jsonl")
    with pytest.raises(UserError, match=r"split train.* is empty"):
        open_split(datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": []})}), "train")
    (tmp_path / "book.docx").write_text("x")
    with pytest.raises(UserError, match=r"book\.docx: cannot read \.docx; expected \.csv, \.tsv"):
        open_split(tmp_path / "book.docx")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match="hollow: no data found in this folder"):
        open_split(tmp_path / "hollow")
    with pytest.raises(UserError, match="got int"):
        open_split(3)


@settings(deadline=None, max_examples=60)
@given(st.integers(10, 3000), st.floats(0.05, 0.9), st.integers(1, 400), st.integers(2, 5), st.integers(0, 5))
def test_division_covers_and_separates(num_samples, fraction, min_select, folds, seed):
    pairs = split_indices(num_samples, select_fraction=fraction, min_select=min_select, folds=folds, seed=seed)
    for fit, select in pairs:
        assert fit == sorted(fit) and sorted(fit + select) == list(range(num_samples))
    if num_samples >= 3 * min_select:
        assert len(pairs) == 1 and len(pairs[0][1]) == max(round(fraction * num_samples), min_select)
    else:
        assert len(pairs) == folds
        assert sorted(i for _, select in pairs for i in select) == list(range(num_samples))
        sizes = [len(select) for _, select in pairs]
        assert max(sizes) - min(sizes) <= 1
    assert pairs == split_indices(num_samples, select_fraction=fraction, min_select=min_select, folds=folds, seed=seed)


def test_division_depends_on_the_seed_and_refuses_too_little():
    assert split_indices(600, seed=0) != split_indices(600, seed=1)
    assert [len(part) for part in split_indices(600)[0]] == [400, 200]
    assert [len(part) for part in split_indices(2000)[0]] == [1600, 400]
    assert len(split_indices(599)) == 5
    with pytest.raises(UserError, match=r"9 held-out samples are too few.*at least 10"):
        split_indices(9)
    with pytest.raises(UserError, match=r"select_fraction.*1.5"):
        split_indices(100, select_fraction=1.5)
