"""The command line as a user meets it: the main job, and one clear line for every mistake."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import factory
from twa_merge.cli import build_parser, main

LEARN = ["--steps", "4", "--batch-size", "8", "--granularity", "layer"]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A soup of BERT classifiers with tokenizers, and data, made once."""
    folder = tmp_path_factory.mktemp("origin")
    for member in factory.make_soup("bert", folder / "soup"):
        factory.make_tokenizer(member)
    write_rows(folder / "data/validation.csv", factory.text_rows(60))
    write_rows(folder / "data/test.csv", factory.text_rows(40, seed=1))
    return folder


@pytest.fixture
def work(origin, tmp_path, monkeypatch):
    """A copy of it to break, as working directory."""
    shutil.copytree(origin, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def members():
    return [f"soup/member-{k}" for k in range(3)]


def train_args(output="out"):
    return ["train", *members(), "--data", "data", "--split", "validation", "--output", output, *LEARN]


def test_train_leaves_a_model_a_report_and_a_recipe_that_runs_again(work, capsys):
    assert main([*train_args(), "--test-split", "test"]) == 0
    printed = capsys.readouterr().out
    for row in ("best single", "uniform", "greedy", "TWA by layer", "test accuracy"):
        assert row in printed
    left = {p.name for p in Path("out").iterdir()}
    assert left >= {
        "model.safetensors", "config.json", "tokenizer.json", "mixing_weights.safetensors", "mixing_weights.json",
        "recipe.yaml", "report.json", "report.md", "league.png", "mixing_weights.png", "curve.png", "README.md",
    }  # fmt: skip
    report = json.loads(Path("out/report.json").read_text())
    assert {c["name"] for c in report["league"]} >= {"best single", "uniform", "greedy", "TWA by layer"}
    stages = ["data", "basis", "baselines", "learning", "scoring", "test"]
    assert list(report["seconds"]) == list(report["peak_memory_mb"]) == stages
    assert all(value > 50 for value in report["peak_memory_mb"].values())
    assert not any(str(work) in (Path("out") / n).read_text() for n in ("README.md",))

    from transformers import pipeline

    assert pipeline("text-classification", "out")("good day")[0]["label"] in ("negative", "positive")
    assert main(["run", "out/recipe.yaml", "output.path=again"]) == 0
    for name in ("model.safetensors", "mixing_weights.safetensors"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    assert main(["apply", "out", *members(), "--output", "applied"]) == 0
    assert Path("applied/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


def test_learning_on_a_training_split_with_snapshots_in_order(work, capsys):
    write_rows(work / "data/train.csv", factory.text_rows(50, seed=2))
    assert main([*train_args(), "--train-split", "train", "--ordered", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"last-k (LAWA)", "EMA", "TWA by layer"} <= {c["name"] for c in report["league"]}
    assert report["samples"]["select"] == 60 and report["cross_fitting_folds"] is None


def test_a_part_of_the_training_split_selects_with_a_warning(work, capsys):
    splits = ["--split", "validation[:30]", "--train-split", "validation[30:]"]
    assert main([*train_args(), *splits]) == 0
    assert "held-out rows are a part of the training split" in capsys.readouterr().err
    assert "optimistic" in json.loads(Path("out/report.json").read_text())["warnings"][0]


def test_average_and_its_methods(work):
    states = [load_file(f"{m}/model.safetensors") for m in members()]
    assert main(["average", *members(), "--output", "uniform"]) == 0
    assert main(["average", *members(), "--weights", "2,1,1", "--output", "given"]) == 0
    assert main(["average", "soup/member-*", "--method", "last", "--last", "2", "--output", "last"]) == 0
    assert main(["average", *members(), "--method", "ema", "--decay", "0.5", "--output", "ema"]) == 0
    assert (
        main(["average", *members(), "--method", "greedy", "--data", "data/validation.csv", "--output", "greedy"]) == 0
    )
    assert main(["average", *members(), "--method", "best", "--data", "data/validation.csv", "--output", "best"]) == 0
    for name, weights in {
        "uniform": [1 / 3] * 3, "given": [0.5, 0.25, 0.25], "last": [0, 0.5, 0.5], "ema": [0.25, 0.25, 0.5]
    }.items():  # fmt: skip
        merged = load_file(f"{name}/model.safetensors")
        for key, value in merged.items():
            expected = sum(w * s[key].double() for w, s in zip(weights, states, strict=True)).float()
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    best = load_file("best/model.safetensors")
    assert any(all(torch.equal(best[k], s[k]) for k in best) for s in states)


def test_evaluate_and_inspect(work, capsys):
    assert main(["evaluate", *members(), "--data", "data/test.csv", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == members() and all(0 <= s["accuracy"] <= 1 for s in scores.values())
    assert main(["inspect", *members(), "--distances"]) == 0
    assert "3 checkpoints that fit together" in capsys.readouterr().out


def test_a_relative_folder_that_looks_like_a_hub_id_is_the_folder(work):
    assert main(["average", "soup/member-0", "soup/member-1", "--output", "out"]) == 0


def edit_config(member, **changes):
    path = Path(f"soup/member-{member}/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(member, change):
    path = Path(f"soup/member-{member}/model.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def corrupt(member):
    path = Path(f"soup/member-{member}/model.safetensors")
    path.write_bytes(b"\xff" * 200)


def truncate(member):
    path = Path(f"soup/member-{member}/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def lora(member):
    folder = Path(f"soup/member-{member}")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def outside(member):
    folder = Path(f"soup/member-{member}")
    (folder / "model.safetensors").rename(Path("soup/secret.safetensors"))
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NAME = "bert.encoder.layer.0.attention.self.query.weight"
BROKEN_SOUPS = {
    "missing folder": (lambda: shutil.rmtree("soup/member-1"), "soup/member-1: no such checkpoint"),
    "no config": (lambda: Path("soup/member-1/config.json").unlink(), "member-1: no config.json"),
    "corrupt": (lambda: corrupt(1), "member-1/model.safetensors: not a complete safetensors file"),
    "truncated": (lambda: truncate(1), "member-1/model.safetensors: truncated"),
    "missing tensor": (lambda: edit_state(1, lambda s: s.pop(NAME)), f"{NAME!r} is in soup/member-0 but missing"),
    "extra tensor": (
        lambda: edit_state(1, lambda s: s.update(extra=torch.zeros(2))), "'extra' is in soup/member-1 but missing"
    ),
    "shape": (
        lambda: edit_state(1, lambda s: s.update({NAME: torch.zeros(16, 8)})),
        f"{NAME!r} has shape [16, 16] in soup/member-0 but [16, 8] in soup/member-1",
    ),
    "architecture": (lambda: edit_config(1, model_type="gpt2", architectures=["GPT2LMHeadModel"]), "architecture"),
    "heads": (lambda: edit_config(1, num_attention_heads=4), "num_attention_heads"),
    "activation": (lambda: edit_config(1, hidden_act="relu"), "hidden_act"),
    "labels": (lambda: edit_config(1, id2label={"0": "positive", "1": "negative"}), "id2label"),
    "lora": (lambda: lora(1), "LoRA adapter"),
    "outside": (lambda: outside(1), "points outside its folder"),
    "nan": (
        lambda: edit_state(1, lambda s: s[NAME].view(-1)[3:4].fill_(float("nan"))),
        f"soup/member-1: tensor {NAME!r} holds NaN",
    ),
    "processor": (lambda: prepares(1, image_mean=[0.4] * 3), "image_mean is [0.4, 0.4, 0.4], expected [0.5, 0.5, 0.5]"),
    "lower case": (lambda: lower_case(1), 'normalizer is {"type": "Lowercase"}, expected null'),
    "both layouts": (
        lambda: Path("soup/member-1/model.safetensors.index.json").write_text("{}"), "holds both model.safetensors"
    ),
}  # fmt: skip


def prepares(member, **changes):
    for k in range(3):
        content = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "image_processor_type": "X"}
        if k == member:
            content |= changes
        Path(f"soup/member-{k}/preprocessor_config.json").write_text(json.dumps(content))


def lower_case(member):
    path = Path(f"soup/member-{member}/tokenizer.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    for other in {0, 1, 2} - {member}:
        path = Path(f"soup/member-{other}/tokenizer.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))


def assert_one_line_and_nothing_left(work, capsys, command, message, code=2):
    before = sorted(p.relative_to(work) for p in work.rglob("*"))
    assert main(command) == code
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if line.startswith("twa-merge: ")]
    assert len(lines) == 1 and message in lines[0], printed
    assert printed[-1] == lines[0]
    assert sorted(p.relative_to(work) for p in work.rglob("*")) == before


@pytest.mark.parametrize("command", ["average", "train"])
@pytest.mark.parametrize("how", list(BROKEN_SOUPS))
def test_a_broken_soup_is_one_line(work, capsys, how, command):
    damage, message = BROKEN_SOUPS[how]
    damage()
    arguments = train_args() if command == "train" else ["average", *members(), "--output", "out"]
    assert_one_line_and_nothing_left(work, capsys, arguments, message)


def relabel(row):
    return row | {"label": row["label"] + 5}


BROKEN_RUNS = {
    "one checkpoint": (["train", "soup/member-0", "--data", "data", "--output", "out"], "at least two checkpoints"),
    "one for average": (["average", "soup/member-0", "--output", "out"], "at least two checkpoints"),
    "column": ([*train_args(), "--column", "text=sentence"], "text, label"),
    "split": ([*train_args(), "--test-split", "tests"], "validation"),
    "rows that also test": ([*train_args(), "--test-split", "validation[50:]"], "rows 50 to 59 of 'validation' are"),
    "rows learned on that also select": ([*train_args(), "--train-split", "dev"], "held-out and train data"),
    "task": ([*train_args(), "--task", "text-clasification"], "text-classification"),
    "granularity": ([*train_args(), "--granularity", "block"], "model, layer, tensor"),
    "coordinates": ([*train_args(), "--coordinates", "polar"], "relative"),
    "start": ([*train_args(), "--start", "worst"], "uniform, greedy or best"),
    "dtype": ([*train_args(), "--dtype", "int3"], "float32, bfloat16, float16"),
    "metric": ([*train_args(), "--metric", "acuracy"], "acuracy"),
    "batch size": ([*train_args()[:-4], "--batch-size", "0"], "learn.batch_size: expected at least 1, got 0"),
    "epochs": ([*train_args(), "--epochs", "-1"], "learn.epochs: expected a number above 0, got -1"),
    "lr": ([*train_args(), "--lr", "nan"], "learn.lr: expected a number above 0, got nan"),
    "steps": ([*train_args(), "--steps", "0"], "learn.steps: expected at least 1, got 0"),
    "evaluation batch": ([*train_args(), "--eval-batch-size", "0"], "eval_batch_size: expected at least 1, got 0"),
    "unnamed split": (
        [*train_args()[:4], "--data", "unnamed", "--output", "out"],
        "has the splits train, test; name one",
    ),
    "last without its method": (["average", *members(), "--last", "2", "--output", "out"], "only with --method last"),
    "split without data": (["average", *members(), "--split", "dev", "--output", "out"], "--split: has a meaning only"),
    "metric without data": (
        ["average", *members(), "--metric", "f1", "--output", "out"],
        "--metric: has a meaning only",
    ),
    "seed": ([*train_args(), "--seed", "-1"], "learn.seed: expected a number from 0"),
    "large seed": ([*train_args(), "--seed", str(2**70)], "learn.seed: expected a number from 0"),
    "margin": ([*train_args(), "--margin", "nan"], "margin: expected a number of standard errors, got nan"),
    "length": ([*train_args(), "--max-length", "0"], "data.max_length: expected at least 1, got 0"),
    "prefix": ([*train_args(), "--source-prefix", "x: "], "source_prefix: has a meaning only for seq2seq"),
    "weights too large": (["average", *members(), "--weights", "1e308,1e308,1e308", "--output", "out"], "too large"),
    "below a file": ([*train_args("data/test.csv/out")], "is no folder that can be written to"),
    "data without its method": (["average", *members(), "--data", "data", "--output", "out"], "greedy or best"),
    "shard size of a fixed merge": (
        ["average", *members(), "--max-shard-gb", "0", "--output", "out"],
        "max_shard_gb: expected a number",
    ),
    "order of snapshots": (
        ["average", "soup/member-2", "soup/member-0", "soup/member-1", "--method", "last", "--output", "out"],
        "expected in the order of the run, got soup/member-2, soup/member-0",
    ),
    "ordered": (
        ["train", "soup/member-1", "soup/member-0", *train_args()[4:], "--ordered"],
        "expected in the order of the run",
    ),
    "fp16": ([*train_args(), "--mixed-precision", "fp16"], "learn.mixed_precision: expected no or bf16, got 'fp16'"),
    "shard size": ([*train_args(), "--max-shard-gb", "nan"], "max_shard_gb: expected a number above 0"),
    "pattern as YAML": (["run", "r.yaml", "learn.granularity=[*.attn.*]"], "quote names with a *"),
    "no data": ([*train_args()[:4], "--data", "nowhere.csv", "--output", "out"], "nowhere.csv"),
    "output is an input": (["average", *members(), "--output", "soup/member-0", "--overwrite"], "input"),
    "output holds the inputs": (["average", *members(), "--output", "soup", "--overwrite"], "input"),
    "output exists": (["average", *members(), "--output", "data"], "exists already"),
    "output is not ours": (["average", *members(), "--output", "data", "--overwrite"], "no earlier merge"),
    "weights sum to zero": (["average", *members(), "--weights=1,-1,0", "--output", "out"], "sum to zero"),
    "number of weights": (["average", *members(), "--weights", "1,1", "--output", "out"], "expected 3"),
    "greedy without data": (["average", *members(), "--method", "greedy", "--output", "out"], "--data"),
    "recipe key": (["run", "r.yaml", "learn.lrr=1", "output.path=out"], "did you mean learn.lr?"),
    "recipe value": (["run", "r.yaml", "learn.steps=many"], "learn.steps: expected int or null, got 'many'"),
    "no recipe": (["run", "none.yaml"], "none.yaml: no such recipe"),
    "no table": (["apply", "data", *members(), "--output", "out"], "no such mixing weights"),
    "empty data": ([*train_args()[:4], "--data", "empty.csv", "--output", "out"], "empty"),
    "labels": ([*train_args()[:4], "--data", "wrong.csv", "--output", "out"], "label"),
}


@pytest.mark.parametrize("how", list(BROKEN_RUNS))
def test_a_mistaken_run_is_one_line(work, capsys, how):
    (work / "r.yaml").write_text("checkpoints: [soup/member-0, soup/member-1]\ndata: {path: data}\n")
    (work / "empty.csv").write_text("text,label\n")
    for split in ("train", "test"):
        write_rows(work / f"unnamed/{split}.csv", factory.text_rows(20))
    write_rows(work / "wrong.csv", [relabel(row) for row in factory.text_rows(30)])
    arguments, message = BROKEN_RUNS[how]
    assert_one_line_and_nothing_left(work, capsys, arguments, message)


def test_a_nan_loss_names_step_lr_and_group(work, capsys):
    assert_one_line_and_nothing_left(work, capsys, [*train_args(), "--lr", "1e30"], "at step")


def test_overwrite_replaces_an_earlier_merge_only_when_complete(work):
    assert main(["average", *members(), "--output", "out"]) == 0
    first = Path("out/model.safetensors").read_bytes()
    truncate(2)
    assert main(["average", *members(), "--output", "out", "--overwrite"]) == 2
    assert Path("out/model.safetensors").read_bytes() == first
    assert main(["average", *members()[:2], "--output", "out", "--overwrite"]) == 0
    assert Path("out/model.safetensors").read_bytes() != first


def test_an_output_behind_a_symbolic_link_is_refused(work, capsys):
    assert main(["average", *members(), "--output", "old"]) == 0
    for target in ("old", "nowhere"):
        Path("link").symlink_to(target)
        for more in ([], ["--overwrite"]):
            assert main(["average", *members(), "--output", "link", *more]) == 2
            assert "link: is a symbolic link" in capsys.readouterr().err
        Path("link").unlink()
    assert not list(work.glob(".*"))


def test_folders_made_on_the_way_go_away_with_a_failed_run(work, capsys, monkeypatch):
    assert main([*train_args("q/w/out"), "--lr", "1e30"]) == 2
    assert main(["average", *members(), "--output", "q/w/out", "--weights", "1,1,1", "--dtype", "int3"]) == 2
    assert not Path("q").exists()
    monkeypatch.setenv("HOME", str(work))
    assert main([*train_args("~/home/out")]) == 0
    assert (work / "home/out/model.safetensors").is_file() and not Path("~").exists()


def test_overrides_may_follow_flags(work, capsys):
    assert main(train_args()) == 0
    assert main(["run", "out/recipe.yaml", "--json", "output.path=again"]) == 0
    assert Path("again/model.safetensors").is_file()
    with pytest.raises(SystemExit):
        main(["run", "out/recipe.yaml", "--jason", "output.path=more"])
    assert "unrecognized arguments: --jason" in capsys.readouterr().err


def test_the_config_names_the_dtype_that_is_written(work):
    state = load_file("soup/member-0/model.safetensors")
    save_file({k: v.bfloat16() for k, v in state.items()}, "soup/member-0/model.safetensors", {"format": "pt"})
    config = json.loads(Path("soup/member-0/config.json").read_text())
    Path("soup/member-0/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    for weights, dtype in (("0,1,1", "float32"), ("1,1,0", "bfloat16")):
        assert main(["average", *members(), "--weights", weights, "--output", dtype]) == 0
        assert json.loads(Path(dtype, "config.json").read_text())["dtype"] == dtype
        assert {str(v.dtype) for v in load_file(f"{dtype}/model.safetensors").values()} == {f"torch.{dtype}"}


def test_a_model_card_names_the_pipeline(work):
    assert main(train_args()) == 0
    assert "pipeline_tag: text-classification" in Path("out/README.md").read_text()


def test_help_loads_no_torch_and_is_quick():
    script = (
        "import sys, resource, twa_merge.cli as c\n"
        "try: c.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_options_of_the_command_line_are_frozen():
    """A change here is a change for users: it belongs in the changelog."""
    actions = build_parser()._subparsers._group_actions[0].choices
    options = {name: sorted(o for a in p._actions for o in a.option_strings) for name, p in actions.items()}
    frozen = json.loads(Path(__file__).with_name("cli_options.json").read_text())
    assert options == frozen


def test_the_help_of_train_states_the_defaults_that_hold():
    import dataclasses
    import re

    from twa_merge.recipe import Recipe

    actions = build_parser()._subparsers._group_actions[0].choices["train"]._actions
    stated = {a.dest: match[1] for a in actions if (match := re.search(r"\(default (\S+)\)", a.help or ""))}
    recipe = Recipe()
    held = {"margin": recipe.margin, **dataclasses.asdict(recipe.learn)}
    assert len(stated) >= 9
    assert stated == {name: str(held[name]) for name in stated}


def test_a_report_is_strict_json(work, capsys):
    assert main([*train_args(), "--json"]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    report = json.loads(Path("out/report.json").read_text(), parse_constant=refuse)
    assert printed["winner"] == report["winner"] and report["curves"][0][0]["fit_loss"] is None


def test_five_samples_are_enough_to_evaluate(work):
    write_rows(work / "five.csv", factory.text_rows(5))
    assert main(["evaluate", *members(), "--data", "five.csv"]) == 0
    assert main(["average", *members(), "--method", "best", "--data", "five.csv", "--output", "out"]) == 0


def test_single_files_of_any_name_train_like_their_folders(work):
    assert main(train_args("expected")) == 0
    folder = work / "files"
    shutil.copytree("soup/member-0", folder)
    (folder / "model.safetensors").unlink()
    for k, member in enumerate(members()):
        shutil.copy(f"{member}/model.safetensors", folder / f"run-{k}.safetensors")
    files = [str(folder / f"run-{k}.safetensors") for k in range(3)]
    assert main(["train", *files, *train_args()[4:]]) == 0
    expected, found = (Path(name, "model.safetensors").read_bytes() for name in ("expected", "out"))
    assert expected == found


def test_averaged_statistics_are_said_to_be(work, capsys):
    factory.make_soup("resnet", Path("resnets"))
    assert main(["average", "resnets/*", "--output", "out"]) == 0
    assert "running statistics are averaged like weights" in capsys.readouterr().err
    assert main(["average", *members(), "--output", "other"]) == 0
    assert "running statistics" not in capsys.readouterr().err
