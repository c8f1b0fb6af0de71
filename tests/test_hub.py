"""Checkpoints and data from a Hub: a real HTTP server on loopback, and real processes that download from it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import twa_merge as twa
from tests import factory
from tests.hub_server import COMMIT, hub
from tests.test_cli import write_rows
from twa_merge.hub import make_public

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


@pytest.fixture(scope="module")
def finished(served, tmp_path_factory):
    """A learned merge of two checkpoints of the Hub and a local one, on local data."""
    folder, address, _ = served
    home = tmp_path_factory.mktemp("finished")
    write_rows(home / "secret-data.csv", factory.text_rows(40))
    local = home / "secret-runs/secret-member"
    shutil.copytree(folder / "models/org/model-2", local, ignore=shutil.ignore_patterns("onnx", "*.bin"))
    config = json.loads((local / "config.json").read_text()) | {"_name_or_path": "/home/someone/secret-base"}
    (local / "config.json").write_text(json.dumps(config))
    command = ["train", "org/model-0@v1", str(local), "secret-runs/secret-member", "org/model-1"]
    command += ["--data", "secret-data.csv", "--output", "out", "--steps", "2", "--granularity", "layer"]
    done = twa_merge(address, home, *command)
    assert done.returncode == 0, done.stderr
    return home


def test_a_merge_is_pushed_without_what_is_private(served, finished):
    folder, address, requests = served
    done = twa_merge(address, finished, "push", "out", "team/merged", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/team/merged") and "private=True" in requests
    pushed = folder / "models/team/merged"
    for path in pushed.iterdir():
        content = path.read_bytes()
        for word in (b"secret", str(finished).encode(), str(Path.home()).encode()):
            assert word not in content, path.name
    assert {p.name for p in pushed.iterdir()} == {p.name for p in (finished / "out").iterdir()}
    card = (pushed / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["org/model-0", "org/model-1"] and front["base_model_relation"] == "merge"
    assert "| best single" in card and "twa-merge apply mixing_weights.safetensors" in card and "steps: 2" in card
    assert f"org/model-0@{COMMIT}" in card and "checkpoint-2" in card
    about = json.loads((pushed / "mixing_weights.json").read_text())
    assert about["checkpoints"] == [f"org/model-0@{COMMIT}", "checkpoint-2", "checkpoint-3", f"org/model-1@{COMMIT}"]
    assert yaml.safe_load((pushed / "recipe.yaml").read_text())["data"]["path"] == "local-data"
    # what stays at home is as it was
    assert "secret-member" in (finished / "out/mixing_weights.json").read_text()


def test_a_push_to_a_branch(served, finished):
    folder, address, _ = served
    done = twa_merge(address, finished, "push", "out", "team/other", "--revision", "trial")
    assert done.returncode == 0, done.stderr
    assert (folder / "branches/trial/team/other/model.safetensors").is_file()
    assert not list((folder / "models/team/other").iterdir())


@pytest.mark.parametrize(
    ("target", "endpoint", "message"),
    [
        ("closed/merged", None, "the Hub did not take it"),
        ("team/merged", "http://127.0.0.1:9", "the Hub did not take it"),
        ("not a name", None, "the Hub did not take it (HFValidationError"),
    ],
)
def test_a_push_that_is_refused_is_one_line_and_keeps_the_folder(served, finished, target, endpoint, message):
    _, address, _ = served
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (finished / "out").iterdir())
    done = twa_merge(endpoint or address, finished, "push", "out", target)
    assert done.returncode == 2
    assert done.stderr.startswith(f"twa-merge: push to {target}: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and "out is kept" in done.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (finished / "out").iterdir()) == before


def test_a_push_of_anything_else_is_refused(served, finished):
    _, address, _ = served
    done = twa_merge(address, finished, "push", "secret-runs/secret-member", "team/merged")
    assert done.returncode == 2 and "not a folder that twa-merge has written" in done.stderr


def test_a_recipe_pushes_what_it_has_written(served, finished, tmp_path):
    folder, address, _ = served
    recipe = yaml.safe_load((finished / "out/recipe.yaml").read_text())
    recipe["output"] |= {"path": str(tmp_path / "again"), "push_to_hub": "team/by-recipe"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = twa_merge(address, finished, "run", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    pushed = folder / "models/team/by-recipe"
    assert (pushed / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["gpt2", "vit", "t5"])
def test_what_is_pulled_back_computes_what_was_pushed(served, tmp_path, kind):
    _, address, _ = served
    members = [str(member) for member in factory.make_soup(kind, tmp_path / "soup", scale=0.2)]
    done = twa_merge(address, tmp_path, "average", *members, "--weights", "0.2,0.5,0.3", "--output", "out")
    assert done.returncode == 0, done.stderr
    done = twa_merge(address, tmp_path, "push", "out", f"team/{kind}")
    assert done.returncode == 0, done.stderr
    script = (
        "import sys, torch, transformers\n"
        "from tests.test_model import BATCHES\n"
        f"cls = getattr(transformers, {factory._TINY[kind][0]!r})\n"
        f"a, b = (cls.from_pretrained(name).eval() for name in ('out', 'team/{kind}'))\n"
        f"with torch.no_grad(): x, y = (m(**BATCHES[{kind!r}]).logits for m in (a, b))\n"
        "assert torch.equal(x, y)\n"
    )
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    env = {key: value for key, value in env.items() if not key.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_model_and_its_reports_are_public(tmp_path):
    members = factory.make_soup("bert", tmp_path / "members", n=2)
    soup = twa.Soup(members)
    folder, public = tmp_path / "merged", tmp_path / "public"
    twa.write(soup, twa.uniform(soup.labels), folder)
    expected = {path.name for path in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    inner = {"_name_or_path": "/data/someone/base", "files": [{"vocab_file": "/data/someone/v.txt"}], "size": 3}
    inner |= {"datasets": ["/data/someone/x.csv", "imdb"], "cache": "~/cache", "drive": r"C:\\runs"}
    # what begins like a path and is the model's own
    words = {"id2label": {"0": "/Sports", "1": "/m/09x0r", "2": "~unknown"}, "extra_special_tokens": {"t": "/think"}}
    words |= {"label2id": {"/m/09x0r": 1}, "eos_token": "/s", "act": "/relu"}
    private = {"encoder": inner, "_name_or_path": "runs/secret"}
    (folder / "config.json").write_text(json.dumps(config | private | words))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"/root": 1, str(Path.home()): 2}}}))
    for name in ("train.log", "customers.csv", "notes.txt", "rng_state.pth", "training_args.bin", "mine.json"):
        (folder / name).write_text("secret")
    public.mkdir()
    make_public(folder, public)
    assert {path.name for path in public.iterdir()} == expected | {"tokenizer.json"}
    found = json.loads((public / "config.json").read_text())
    assert found == config | {"encoder": {"files": [{}], "size": 3, "datasets": ["imdb"]}} | words


def test_local_data_stay_private_wherever_the_push_is_made_from(finished, tmp_path, monkeypatch):
    recipe = yaml.safe_load((finished / "out/recipe.yaml").read_text())
    folder, public = tmp_path / "merged", tmp_path / "public"
    shutil.copytree(finished / "out", folder)
    recipe["data"]["path"] = "secret-patients/visits"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    public.mkdir()
    make_public(folder, public)
    assert yaml.safe_load((public / "recipe.yaml").read_text())["data"]["path"] == "local-data"
