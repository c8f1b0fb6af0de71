"""Checkpoints and data from a Hub: a real HTTP server on loopback, and real processes that download from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import factory
from tests.hub_server import COMMIT, hub
from tests.test_cli import write_rows

ROOT = Path(__file__).resolve().parents[1]
IDS = ["org/model-0@v1", "org/model-1@main", "org/model-2"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for k, member in enumerate(factory.make_soup("bert", folder / "soup", sharded=True)):
        factory.make_tokenizer(member)
        (member / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
        (member / "onnx").mkdir()
        (member / "onnx/model.onnx").write_bytes(b"another format")
        (folder / "models/org").mkdir(parents=True, exist_ok=True)
        member.rename(folder / f"models/org/model-{k}")
    write_rows(folder / "datasets/org/reviews/validation.csv", factory.text_rows(40))
    write_rows(folder / "datasets/org/reviews/test.csv", factory.text_rows(30, seed=1))
    with hub(folder) as (address, requests):
        yield folder, address, requests


def twa_merge(address, home, *arguments):
    """Run the command in a process whose Hub and cache are these."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {key: value for key, value in os.environ.items() if key not in offline}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "twa_merge.cli", *arguments]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=120)


def test_members_of_pinned_revisions_are_downloaded_and_merged(served, tmp_path):
    folder, address, requests = served
    done = twa_merge(address, tmp_path, "average", *IDS, "--output", "out")
    assert done.returncode == 0, done.stderr
    locals_ = [str(folder / f"models/org/model-{k}") for k in range(3)]
    assert twa_merge(address, tmp_path, "average", *locals_, "--output", "local").returncode == 0
    merged = (tmp_path / "out/model.safetensors").read_bytes()
    assert merged == (tmp_path / "local/model.safetensors").read_bytes()
    assert not [r for r in requests if r.endswith((".bin", ".onnx"))]
    assert (tmp_path / "out/tokenizer.json").is_file()
    about = json.loads((tmp_path / "out/mixing_weights.json").read_text())
    assert about["checkpoints"] == IDS
    # the cache serves a second run without a Hub
    again = twa_merge("http://127.0.0.1:9", tmp_path, "average", *IDS, "--output", "again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == merged


def test_a_run_on_members_and_data_of_the_hub_records_their_commits(served, tmp_path):
    _, address, _ = served
    done = twa_merge(
        address, tmp_path, "train", *IDS, "--data", "org/reviews", "--split", "validation", "--test-split", "test",
        "--output", "out", "--steps", "2", "--batch-size", "8", "--granularity", "model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert COMMIT in json.dumps(report["checkpoints"])
    assert "org/model-0" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("checkpoint", "data", "message"),
    [
        ("org/none", "org/reviews", "org/none: no such folder here, and the Hub gave no such model"),
        ("org/model-1@v9", "org/reviews", "org/model-1@v9: no such folder here, and the Hub gave no such model"),
        ("org/model-1", "org/nothing", "data org/nothing: no such file or folder here, and the Hub gave no such data"),
    ],
)
def test_what_the_hub_has_not_is_one_line(served, tmp_path, checkpoint, data, message):
    _, address, _ = served
    done = twa_merge(address, tmp_path, "train", "org/model-0", checkpoint, "--data", data, "--output", "out")
    lines = [line for line in done.stderr.splitlines() if line.startswith("twa-merge: ")]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
    assert not (tmp_path / "out").exists()


def test_no_network_is_one_line_and_does_not_wait(tmp_path):
    done = twa_merge("http://127.0.0.1:9", tmp_path, "average", *IDS, "--output", "out")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "org/model-0@v1" in lines[0], done.stderr
