"""The whole job for every kind of task: folders and data in, a merged folder out that transformers takes up again."""

import copy
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import twa_merge as twa
from tests import factory, tiny_tasks
from twa_merge.cli import main

LEARN = ["--steps", "4", "--batch-size", "8", "--granularity", "layer", "--device", "cpu"]


def soup_of(save, folder, n=3, **options):
    """Save a tiny checkpoint of `tiny_tasks` and its neighbours."""
    members = [folder / f"member-{k}" for k in range(n)]
    for k, member in enumerate(members):
        save(member, **options)
        state = load_file(member / "model.safetensors")
        generator = torch.Generator().manual_seed(k)
        state = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
        save_file(state, member / "model.safetensors", {"format": "pt"})
    return list(map(str, members))


def rows_of(task, count=30):
    texts = tiny_tasks.texts(count)
    if task == "causal-lm":
        return [{"text": text} for text in tiny_tasks.texts(4 * count)]
    if task == "seq2seq":
        return [{"source": a, "target": b} for a, b in zip(texts, tiny_tasks.texts(count, seed=1), strict=True)]
    if task == "regression":
        return [{"text": text, "label": len(text) / 10} for text in texts]
    if task == "multi-label":
        return [{"text": text, "labels": [float("cat" in text), float("dog" in text)]} for text in texts]
    return [{"text": text, "label": len(text) % 2} for text in texts]


TASKS = {
    "causal-lm": (tiny_tasks.save_gpt2, {}, "perplexity"),
    "seq2seq": (tiny_tasks.save_t5, {}, "perplexity"),
    "regression": (tiny_tasks.save_bert, {"num_labels": 1, "problem_type": "regression"}, "mse"),
    "multi-label": (tiny_tasks.save_bert, {"num_labels": 2, "problem_type": "multi_label_classification"}, "f1"),
}


@pytest.mark.parametrize("task", list(TASKS))
def test_a_task_from_folders_to_a_merged_folder(tmp_path, monkeypatch, capsys, task):
    import transformers

    monkeypatch.chdir(tmp_path)
    save, options, metric = TASKS[task]
    members = soup_of(save, Path("soup"), **options)
    for split in ("validation", "test"):
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    Path("data").mkdir()
    for split in ("validation", "test"):
        Path(f"{split}.jsonl").rename(f"data/{split}.jsonl")
    more = ["--max-length", "16"] if task == "causal-lm" else []
    command = ["train", *members, "--data", "data", "--split", "validation", "--test-split", "test", "--output", "out"]
    assert main([*command, *LEARN, *more]) == 0, capsys.readouterr().err
    assert metric in capsys.readouterr().out
    report = json.loads(Path("out/report.json").read_text())
    learned = next(c for c in report["league"] if c["learned"])
    uniform = next(c for c in report["league"] if c["name"] == "uniform")
    assert np.isfinite(learned["test"]["loss"]["value"])
    assert learned["fit"]["loss"]["value"] != uniform["fit"]["loss"]["value"]
    name = json.loads(Path("out/config.json").read_text())["architectures"][0]
    _, about = getattr(transformers, name).from_pretrained("out", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert main(["evaluate", "out", *members, "--data", "data", "--split", "test", *more]) == 0


def test_prefix_and_problem_type_reach_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = soup_of(tiny_tasks.save_t5, Path("t5"), n=2)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("seq2seq", 12)))

    def losses(*more):
        monkeypatch.setattr("sys.stdout", io.StringIO())
        assert main(["evaluate", *members, "--data", "rows.jsonl", "--json", *more]) == 0
        return [row["loss"] for row in json.loads(sys.stdout.getvalue()).values()]

    assert losses() != losses("--source-prefix", "the cat ")
    members = soup_of(tiny_tasks.save_bert, Path("bert"), n=2, num_labels=2)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("multi-label", 12)))
    assert all(np.isfinite(losses("--problem-type", "multi_label_classification")))


def test_a_class_folder_of_images(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    members = soup_of(tiny_tasks.save_vit, Path("soup"), id2label={0: "dark", 1: "light"})
    generator = np.random.default_rng(0)
    for split in ("validation", "test"):
        for label, low in (("dark", 0), ("light", 120)):
            folder = Path("data", split, label)
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = generator.integers(low, low + 130, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    command = ["train", *members, "--data", "data", "--split", "validation", "--test-split", "test", "--output", "out"]
    assert main([*command, *LEARN]) == 0
    assert Path("out/preprocessor_config.json").is_file()


HOOK = '''
import json
import torch

def features(rows, checkpoint):
    """Sentences of which the model is to find the words."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    def encode(row):
        encoded = tokenizer(row["text"], padding="max_length", truncation=True, max_length=16)
        pairs = zip(encoded["input_ids"], encoded["attention_mask"])
        return {**encoded, "labels": [token if seen else -100 for token, seen in pairs]}
    return rows.map(encode, remove_columns=rows.column_names)
'''


def test_the_preprocess_hook_of_a_recipe_brings_a_task_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for member in factory.make_soup("bert_mlm", Path("soup")):
        factory.make_tokenizer(member)
    Path("my_hooks.py").write_text(HOOK)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in factory.text_rows(40)))
    Path("recipe.yaml").write_text(
        "checkpoints: ['soup/member-*']\n"
        "data: {path: rows.jsonl, preprocess: 'my_hooks:features'}\n"
        "learn: {steps: 4, batch_size: 8, granularity: layer}\n"
        "output: {path: out}\ndevice: cpu\n"
    )
    assert main(["run", "recipe.yaml"]) == 0, capsys.readouterr().err
    report = json.loads(Path("out/report.json").read_text())
    assert {c["name"] for c in report["league"]} >= {"uniform", "TWA by layer"}
    assert main(["run", "recipe.yaml", "data.preprocess=my_hooks:nothing", "output.path=other"]) == 2
    assert "my_hooks:nothing' cannot be imported" in capsys.readouterr().err
    sys.modules.pop("my_hooks")


def test_a_merged_folder_is_fine_tuned_further_and_merged_again(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    members = factory.make_soup("bert", tmp_path / "soup")
    for member in members:
        factory.make_tokenizer(member)
    assert main(["average", *map(str, members), "--output", str(tmp_path / "merged")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    encoded = [
        {**tokenizer(row["text"], padding="max_length", max_length=16), "labels": row["label"]}
        for row in factory.text_rows(32)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=4, save_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    Trainer(model=model, args=arguments, train_dataset=encoded, processing_class=tokenizer).train()
    again = [str(tmp_path / "merged"), str(tmp_path / "runs/checkpoint-*")]
    assert main(["average", *again, "--output", str(tmp_path / "again")]) == 0
    folders = [tmp_path / "merged", tmp_path / "runs/checkpoint-2", tmp_path / "runs/checkpoint-4"]
    states = [load_file(folder / "model.safetensors") for folder in folders]
    merged = load_file(tmp_path / "again/model.safetensors")
    assert any(not torch.equal(states[0][name], states[2][name]) for name in merged)
    for name, value in merged.items():
        reference = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(value, reference.float(), rtol=1e-6, atol=1e-7)


class Trap:
    """Unpickled without care, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def test_a_run_from_python_leaves_a_recipe_only_if_that_runs_it_again(tmp_path):
    members = factory.make_soup("bert", tmp_path / "soup")
    for member in members:
        factory.make_tokenizer(member)
    for name, seed in (("validation", 0), ("train", 1), ("test", 2)):
        rows = "\n".join(json.dumps(row) for row in factory.text_rows(40, seed=seed))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    held_out, soup = str(tmp_path / "validation.jsonl"), twa.Soup(members)
    settings = {"steps": 2, "granularity": "model"}
    twa.train(soup, held_out, output=tmp_path / "a", **settings)
    assert (tmp_path / "a/recipe.yaml").is_file()
    more = {"train_data": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    twa.train(soup, held_out, output=tmp_path / "b", **more, **settings)
    assert not (tmp_path / "b/recipe.yaml").exists()


def test_pickles_are_read_only_when_asked_for_and_never_run(tmp_path, capsys):
    members = factory.make_soup("bert", tmp_path / "soup")
    assert main(["average", *map(str, members), "--output", str(tmp_path / "expected")]) == 0
    for member in members:
        torch.save(load_file(member / "model.safetensors"), member / "pytorch_model.bin")
        (member / "model.safetensors").unlink()
    command = ["average", *map(str, members), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "if you trust them, add --allow-pickle" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) == 0
    expected, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert expected.keys() == merged.keys()
    assert all(torch.equal(expected[name], merged[name]) for name in expected)
    torch.save({"x": Trap(tmp_path / "executed")}, members[1] / "pytorch_model.bin")
    capsys.readouterr()
    assert main([*command[:-1], str(tmp_path / "other"), "--allow-pickle"]) == 2
    assert str(members[1]) in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "other").exists()


class Permuted(torch.nn.Module):
    """Buffers and parameters that are not averaged, and a tie whose first name is not the one on disk."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.randperm(16))
        self.flips = torch.nn.Parameter(torch.randint(0, 2, (16,)), requires_grad=False)
        self.tok = torch.nn.Linear(16, 16, bias=False)
        self.body = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 16, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.tok((x * (1 - 2 * self.flips))[:, self.order]))))


def test_what_is_scored_of_a_module_is_what_its_checkpoints_compute(tmp_path):
    from safetensors.torch import load_model, save_model

    torch.manual_seed(0)
    base = Permuted()
    for k in range(3):
        member = copy.deepcopy(base)
        with torch.no_grad():
            for p in (member.tok.weight, *member.body.parameters()):
                p += 0.1 * torch.randn_like(p)
        save_model(member, tmp_path / f"{k}.safetensors")
    x = torch.randn(300, 16)
    data = [(row, label) for row, label in zip(x, base(x).argmax(dim=1), strict=True)]
    soup = twa.Soup(sorted(tmp_path.glob("*.safetensors")))
    loss, output = torch.nn.functional.cross_entropy, tmp_path / "merged"
    result = twa.train(soup, data, module=Permuted(), loss=loss, test=data[:200], steps=10, output=output)
    single = next(c for c in result.league if c.name == "best single")
    member = Permuted()
    load_model(member, tmp_path / f"{single.weights.one_hot_column()}.safetensors")
    targets = torch.stack([label for _, label in data[:200]])
    assert single.test.loss.value == pytest.approx(loss(member(x[:200]), targets).item(), rel=1e-4)
    load_model(member, output / "model.safetensors")
    learned = result.verdict.winner
    assert learned.test.loss.value == pytest.approx(loss(member(x[:200]), targets).item(), rel=1e-4)


def test_one_checkpoint_far_off_does_not_spoil_the_scores_of_the_others(tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Linear(16, 2)
    for k in range(4):
        state = {name: value + 0.1 * torch.randn_like(value) for name, value in base.state_dict().items()}
        if k == 1:
            state["weight"] *= 1e8
        save_file(state, tmp_path / f"{k}.safetensors")
    x = torch.randn(300, 16)
    data = [(row, label) for row, label in zip(x, base(x).argmax(dim=1), strict=True)]
    soup = twa.Soup(sorted(tmp_path.glob("*.safetensors")))
    loss = torch.nn.functional.cross_entropy
    scores = {}
    for storage in ("float32", "disk"):
        result = twa.train(soup, data, module=torch.nn.Linear(16, 2), loss=loss, steps=3, storage=storage)
        scores[storage] = [c.select.loss.value for c in result.league if not c.learned]
    assert scores["float32"] == pytest.approx(scores["disk"], rel=1e-5)


def test_equal_checkpoints_leave_nothing_to_learn(tmp_path):
    for k in range(2):
        save_file(
            torch.nn.Linear(4, 2).state_dict() if k == 0 else load_file(tmp_path / "0.safetensors"),
            tmp_path / f"{k}.safetensors",
        )
    data = [(torch.randn(4), torch.tensor(k % 2)) for k in range(20)]
    soup = twa.Soup(sorted(tmp_path.glob("*.safetensors")))
    with pytest.raises(twa.UserError, match="the 2 checkpoints do not differ: there is nothing to learn"):
        twa.train(soup, data, module=torch.nn.Linear(4, 2), loss=torch.nn.functional.cross_entropy)


def test_samples_without_a_label_are_no_reason_to_stop(tmp_path):
    for k in range(2):
        torch.manual_seed(k)
        save_file(torch.nn.Linear(4, 2).state_dict(), tmp_path / f"{k}.safetensors")
    data = [(torch.randn(4), torch.tensor(k % 2 if k % 3 else -100)) for k in range(30)]
    soup = twa.Soup(sorted(tmp_path.glob("*.safetensors")))
    loss = torch.nn.functional.cross_entropy
    result = twa.train(soup, data, module=torch.nn.Linear(4, 2), loss=loss, batch_size=1, steps=40)
    assert all(row["fit_loss"] == row["fit_loss"] for row in result.learned[0].curve[1:])
