import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from tests.tiny_tasks import save_bert, save_gpt2, save_t5, save_tokenizer, save_vit, texts
from twa_merge.errors import UserError
from twa_merge.tasks import TASKS, build_task, custom_task, guess_task, load_module, module_task


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def from_dict(**columns):
    return datasets.Dataset.from_dict(columns)


def first_batch(task, data, size=4):
    features = task.prepare(data)
    return task.collate([features[i] for i in range(min(size, len(features)))])


def check_loss(task, module, batch):
    """The weighted mean of the sample losses is the model's own loss, and the weights are known beforehand."""
    with torch.no_grad():
        loss_B, weight_B = task.sample_losses(task.forward(module, batch), batch)
        own = module(**batch).loss
    assert loss_B.shape == weight_B.shape == (len(batch["labels"]),)
    assert loss_B.dtype == torch.float32 and weight_B.dtype == torch.float32
    torch.testing.assert_close((loss_B * weight_B).sum() / weight_B.sum(), own, rtol=1e-5, atol=1e-6)
    assert task.count(batch).dim() == 0 and task.count(batch) == weight_B.sum()
    assert loss_B.std() > 0
    return loss_B


# --- losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"num_labels": 3}, [0, 2, 1, 1, 0, 2]),
        ({"num_labels": 1}, [0.5, -1.0, 2.0, 0.0, 1.0, 3.0]),
        ({"num_labels": 2, "problem_type": "regression"}, [[0.5, 1.0], [0.0, 2.0]] * 3),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[0, 2], [], [1], [0, 1, 2], [2], [0]]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[1, 0, 1], [0, 0, 0]] * 3),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.5]] * 3),
    ],
)
def test_text_classification_has_the_loss_of_the_model(tmp_path, options, labels):
    save_bert(tmp_path, **options)
    task, module = build_task("text-classification", tmp_path), load_module("text-classification", tmp_path)
    batch = first_batch(task, from_dict(text=texts(6), label=labels))
    check_loss(task, module, batch)
    assert module.config.problem_type == options.get("problem_type") or "problem_type" not in options
    predictions, references = task.predictions(module(**batch), batch)
    assert len(predictions) == len(references) == 4
    assert np.asarray(predictions).shape == np.asarray(references).shape == tuple(batch["labels"].shape)
    assert [m.name for m in task.metrics] == [{1: "mse"}.get(options["num_labels"], {
        None: "accuracy", "regression": "mse", "multi_label_classification": "f1",
    }[options.get("problem_type")])]  # fmt: skip


def test_lists_of_label_numbers_become_flags(tmp_path):
    save_bert(tmp_path, num_labels=3, problem_type="multi_label_classification", id2label={0: "x", 1: "y", 2: "z"},
              label2id={"x": 0, "y": 1, "z": 2})  # fmt: skip
    task = build_task("text-classification", tmp_path)
    for labels in ([[0, 2], [1]], [["x", "z"], ["y"]], [[1, 0, 1], [0, 1, 0]]):
        batch = first_batch(task, from_dict(text=["a", "b"], label=labels))
        assert batch["labels"].tolist() == [[1, 0, 1], [0, 1, 0]]


def test_pairs_of_texts_and_padding(tmp_path):
    save_bert(tmp_path, num_labels=2)
    task, module = build_task("text-classification", tmp_path), load_module("text-classification", tmp_path)
    data = from_dict(premise=texts(4), hypothesis=texts(4, 1), label=[0, 1, 1, 0], idx=[0, 1, 2, 3])
    batch = first_batch(task, data)
    first = (batch["input_ids"][0] == 2).sum()
    assert first == 2  # both texts of a pair end
    loss_B = check_loss(task, module, batch)
    alone = first_batch(task, data.select([2]))
    torch.testing.assert_close(check_alone(task, module, alone), loss_B[2:3], rtol=1e-4, atol=1e-5)


def check_alone(task, module, batch):
    with torch.no_grad():
        return task.sample_losses(task.forward(module, batch), batch)[0]


def test_named_columns_win(tmp_path):
    save_bert(tmp_path, num_labels=2)
    columns = {"text": "meta.body", "label": "stars"}
    data = from_dict(text=["a"], meta=[{"body": "cat dog cat"}], label=[0], stars=[1])
    batch = first_batch(build_task("text-classification", tmp_path, columns=columns), data)
    assert batch["labels"].tolist() == [1] and batch["input_ids"].shape == (1, 4)
    batch = first_batch(build_task("text-classification", tmp_path, max_length=2), data)
    assert batch["labels"].tolist() == [0] and batch["input_ids"].shape == (1, 2)


def test_decoders_classify_in_batches_though_the_config_names_no_padding(tmp_path):
    save_gpt2(tmp_path, head="GPT2ForSequenceClassification", num_labels=2)
    task, module = build_task("text-classification", tmp_path), load_module("text-classification", tmp_path)
    check_loss(task, module, first_batch(task, from_dict(text=texts(4), label=[0, 1, 1, 0])))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_classification_has_the_loss_of_the_model(tmp_path, channels):
    save_vit(tmp_path, num_labels=3, num_channels=channels)
    task, module = build_task("image-classification", tmp_path), load_module("image-classification", tmp_path)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(256, size=(20, 24), dtype=np.uint8)) for _ in range(5)]
    data = datasets.Dataset.from_dict({"img": images, "label": [0, 1, 2, 1, 0]}).cast_column("img", datasets.Image())
    batch = first_batch(task, data)
    assert batch["pixel_values"].shape == (4, channels, 16, 16)
    check_loss(task, module, batch)
    features = task.prepare(data)
    assert features[1]["pixel_values"] is features[1]["pixel_values"]  # kept, as every candidate reads all images
    features._cache.clear()
    features._free = 0
    assert features[1]["pixel_values"] is not features[1]["pixel_values"]
    torch.testing.assert_close(features[1]["pixel_values"], batch["pixel_values"][1])


def test_images_as_paths_bytes_and_pixels(tmp_path):
    save_vit(tmp_path, num_labels=3)
    task = build_task("image-classification", tmp_path)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "red.png")
    content = (tmp_path / "red.png").read_bytes()
    by_path = first_batch(task, from_dict(image=[str(tmp_path / "red.png")], label=[1]))
    by_bytes = first_batch(task, from_dict(image=[{"bytes": content, "path": None}], label=[1]))
    ready = first_batch(task, from_dict(pixel_values=by_path["pixel_values"].tolist(), label=[1]))
    for batch in (by_bytes, ready):
        torch.testing.assert_close(batch["pixel_values"], by_path["pixel_values"])
    with pytest.raises(UserError, match=r"column 'image' holds .*int64.*expected images.*columns image, label"):
        task.prepare(from_dict(image=[3], label=[1]))
    with pytest.raises(UserError, match="image of row 0 in column 'image'"):
        _ = task.prepare(from_dict(image=[str(tmp_path / "gone.png")], label=[1]))[0]


def test_causal_lm_has_the_loss_of_the_model(tmp_path):
    save_gpt2(tmp_path)
    task = build_task("causal-lm", tmp_path, max_length=8)
    module = load_module("causal-lm", tmp_path)
    batch = first_batch(task, from_dict(text=texts(20)))
    assert batch["input_ids"].shape == (4, 8)
    check_loss(task, module, batch)
    assert task.count(batch) == 4 * 7
    batch["labels"][1, 3:] = -100  # as a collator of one's own might
    check_loss(task, module, batch)
    assert [m.name for m in task.metrics] == ["perplexity"]


def test_causal_lm_joins_texts_with_the_end_token_and_drops_the_rest(tmp_path):
    save_gpt2(tmp_path)
    task = build_task("causal-lm", tmp_path, max_length=4)
    features = task.prepare(from_dict(text=["the a", "", "cat dog sat", "ran"]))
    # the a </s> cat | dog sat </s> ran
    assert [features[i]["input_ids"].tolist() for i in range(len(features))] == [[3, 4, 2, 5], [6, 7, 2, 8]]
    features = task.prepare(from_dict(text=["the a", "cat dog"]))
    assert [features[i]["input_ids"].tolist() for i in range(len(features))] == [[3, 4, 2, 5]]
    assert len(build_task("causal-lm", tmp_path).prepare(from_dict(text=["the a cat"]))[0]["input_ids"]) == 3
    with pytest.raises(UserError, match="causal-lm: column 'text' gives 1 tokens"):
        task.prepare(from_dict(text=["cat"]))
    save_tokenizer(tmp_path, eos=False)
    features = build_task("causal-lm", tmp_path, max_length=4).prepare(from_dict(text=["the a", "cat dog"]))
    assert features[0]["input_ids"].tolist() == [3, 4, 5, 6]


def test_seq2seq_has_the_loss_of_the_model(tmp_path):
    save_t5(tmp_path)
    task, module = build_task("seq2seq", tmp_path), load_module("seq2seq", tmp_path)
    data = from_dict(document=texts(6), summary=texts(6, 1, longest=5))
    batch = first_batch(task, data)
    assert (batch["labels"] == -100).any()
    check_loss(task, module, batch)
    assert task.count(batch) == (batch["labels"] != -100).sum()


def test_seq2seq_generates_text_for_metrics(tmp_path):
    save_t5(tmp_path)
    columns = {"source": "translation.en", "target": "translation.de"}
    task = build_task("seq2seq", tmp_path, columns=columns, metrics=["bleu"], source_prefix="the ", max_length=12)
    batch = first_batch(task, from_dict(translation=[{"en": "cat sat", "de": "dog ran on"}, {"en": "a", "de": "mat"}]))
    assert batch["input_ids"].tolist() == [[3, 5, 7, 2], [3, 4, 2, 0]]
    generated, references = task.generate(load_module("seq2seq", tmp_path), batch)
    assert references == ["dog ran on", "mat"]
    assert len(generated) == 2 and all(isinstance(text, str) and "[PAD]" not in text for text in generated)
    assert task.metrics[0].compute(generated, references) >= 0


# --- what is wrong with the data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"body": ["a"], "label": [0]}, "no column found for text; .*columns body, label.*`columns.text`"),
        ({"text": ["a"], "stars": [0]}, "no column found for label; .*columns text, stars"),
        ({"text": [1], "label": [0]}, "column 'text' holds int64, expected text"),
        ({"text": ["a", None], "label": [0, 1]}, "row 1 has no text in column 'text'"),
        ({"text": ["a", ""], "label": [0, 1]}, "row 1 has no text in column 'text'"),
        ({"text": ["a", "b"], "label": [0, 3]}, r"column 'label', row 1: label 3 is out of range; .* 3 labels, 0 to 2"),
        ({"text": ["a"], "label": [-1]}, "label -1 is out of range.*split without labels"),
        ({"text": ["a"], "label": [None]}, "column 'label', row 0: no label"),
        ({"text": ["a"], "label": ["fine"]}, r"no label 'fine'; it has \[bad, so, good\]"),
        ({"text": ["a"], "label": [0.5]}, "expected a class number, got 0.5.*regression"),
        ({"text": ["a"], "label": [[0, 1]]}, "expected one label, got a list.*multi_label_classification"),
    ],
)
def test_data_that_do_not_fit(tmp_path, data, message):
    save_bert(tmp_path, id2label={0: "bad", 1: "so", 2: "good"}, label2id={"bad": 0, "so": 1, "good": 2})
    with pytest.raises(UserError, match=message) as caught:
        build_task("text-classification", tmp_path).prepare(from_dict(**data))
    assert "\n" not in str(caught.value)


def test_empty_data_and_missing_named_columns(tmp_path):
    save_bert(tmp_path, num_labels=2)
    with pytest.raises(UserError, match="the dataset is empty"):
        build_task("text-classification", tmp_path).prepare(from_dict(text=[], label=[]))
    with pytest.raises(UserError, match=r"expected a datasets.Dataset, got list"):
        build_task("text-classification", tmp_path).prepare([{"text": "a"}])
    task = build_task("text-classification", tmp_path, columns={"text": "body"})
    with pytest.raises(UserError, match="no column 'body' for text; the data have the columns text, label"):
        task.prepare(from_dict(text=["a"], label=[0]))
    with pytest.raises(UserError, match="unknown column role 'texts'; expected one of text, text_pair, label"):
        build_task("text-classification", tmp_path, columns={"texts": "body"})
    save_t5(tmp_path / "t5")
    task = build_task("seq2seq", tmp_path / "t5", columns={"source": "en"})
    with pytest.raises(UserError, match="no column named for target"):
        task.prepare(from_dict(en=["a"], fr=["b"]))
    with pytest.raises(UserError, match=r"name them as `columns.source`, `columns.target`"):
        build_task("seq2seq", tmp_path / "t5").prepare(from_dict(translation=[{"en": "a", "de": "b"}]))


def test_class_names(tmp_path):
    save_bert(tmp_path, id2label={0: "bad", 1: "so", 2: "good"}, label2id={"bad": 0, "so": 1, "good": 2})
    task = build_task("text-classification", tmp_path)

    def data(names):
        return from_dict(text=["a", "b"], label=[2, 0]).cast_column("label", datasets.ClassLabel(names=names))

    assert first_batch(task, data(["Bad", "So", "Good"]))["labels"].tolist() == [2, 0]
    assert first_batch(task, from_dict(text=["a", "b"], label=["good", "bad"]))["labels"].tolist() == [2, 0]
    with pytest.raises(UserError, match=r"another order.*data \[good, so, bad\], checkpoint \[bad, so, good\]"):
        task.prepare(data(["good", "so", "bad"]))
    with pytest.warns(UserWarning, match=r"matched by number.*\[neg, neutral, pos\]"):
        assert first_batch(task, data(["neg", "neutral", "pos"]))["labels"].tolist() == [2, 0]
    save_bert(tmp_path / "plain", num_labels=3)  # LABEL_0, ...: any names will do
    task = build_task("text-classification", tmp_path / "plain")
    assert first_batch(task, data(["good", "so", "bad"]))["labels"].tolist() == [2, 0]
    assert first_batch(task, from_dict(text=["a"], label=["1"]))["labels"].tolist() == [1]


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_guess_task():
    known = {
        "BertForSequenceClassification": "text-classification",
        "ViTForImageClassification": "image-classification",
        "CLIPForImageClassification": "image-classification",
        "GPT2LMHeadModel": "causal-lm",
        "LlamaForCausalLM": "causal-lm",
        "T5ForConditionalGeneration": "seq2seq",
        "MarianMTModel": "seq2seq",
    }
    assert {name: guess_task([name]) for name in known} == known
    with pytest.raises(UserError, match="BertForMaskedLM; name it, one of text-classification, image-classification"):
        guess_task(["BertForMaskedLM"])
    with pytest.raises(UserError, match=r"none in config.json"):
        guess_task([])


def test_wrong_names_and_folders(tmp_path):
    with pytest.raises(UserError, match="got 'seq2sec'; did you mean seq2seq"):
        build_task("seq2sec", tmp_path)
    with pytest.raises(UserError, match=f"expected one of {', '.join(TASKS)}, got 'nli'"):
        load_module("nli", tmp_path)
    with pytest.raises(UserError, match=r"no config\.json"):
        build_task("causal-lm", tmp_path)
    save_gpt2(tmp_path / "gpt2")
    with pytest.raises(UserError, match="expected an encoder-decoder, got gpt2"):
        build_task("seq2seq", tmp_path / "gpt2")
    save_bert(tmp_path, num_labels=2)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer files|tokenizer cannot be loaded"):
        build_task("text-classification", tmp_path)
    with pytest.raises(UserError, match="image processor cannot be loaded"):
        build_task("image-classification", tmp_path)
    with pytest.raises(UserError, match="dtype: expected float32, bfloat16 or float16, got 'int8'"):
        load_module("text-classification", tmp_path, dtype="int8")
    assert next(load_module("text-classification", tmp_path, dtype="bfloat16").parameters()).dtype == torch.bfloat16


def test_weights_that_would_be_made_up_are_refused(tmp_path):
    save_gpt2(tmp_path)
    with pytest.raises(UserError, match=r"GPT2ForSequenceClassification needs score\.weight, not in the checkpoint"):
        load_module("text-classification", tmp_path)
    with pytest.raises(UserError, match="not a model for image-classification"):
        load_module("image-classification", tmp_path)


def test_options_that_do_not_fit(tmp_path):
    save_bert(tmp_path / "bert", num_labels=2)
    save_gpt2(tmp_path / "gpt2")
    for name, folder, options, message in (
        ("text-classification", "bert", {"metrics": ["mse"]}, "metric mse: not for single_label_classification"),
        ("text-classification", "bert", {"problem_type": "ranking"}, "problem_type: .* got 'ranking'"),
        ("text-classification", "bert", {"max_length": 65}, "max_length: expected 2 to 64 tokens.*got 65"),
        ("causal-lm", "gpt2", {"metrics": ["accuracy"]}, "metric accuracy: not for causal-lm"),
        ("causal-lm", "gpt2", {"max_length": 1}, "max_length: expected 2 to 32"),
    ):
        with pytest.raises(UserError, match=message):
            build_task(name, tmp_path / folder, **options)
    assert build_task("text-classification", tmp_path / "bert", metrics=()).metrics == ()


# --- tasks of the user's own ---------------------------------------------------------------------------------------


def test_custom_task(tmp_path):
    module = save_bert(tmp_path, num_labels=2)

    def preprocess(dataset, checkpoint):
        assert checkpoint == tmp_path
        return [{"input_ids": [3, 4, 5], "labels": row["y"]} for row in dataset]

    task = custom_task(preprocess, tmp_path)
    features = task.prepare([{"y": 0}, {"y": 1}, {"y": 1}])
    batch = task.collate(features)
    loss, weight = task.sample_losses(task.forward(module, batch), batch)
    assert loss.shape == weight.shape == (1,) and weight == 3 == task.count(batch)
    assert loss[0] == module(**batch).loss and not task.per_sample
    tuple_loss, _ = task.sample_losses(module(**batch, return_dict=False), batch)
    assert tuple_loss[0] == loss[0]
    with pytest.raises(UserError, match=r"expected a dataset of features .*got NoneType"):
        custom_task(lambda dataset, checkpoint: None, tmp_path).prepare([])
    with pytest.raises(UserError, match=r"expected one number a batch.*`labels`"):
        task.sample_losses(module(input_ids=batch["input_ids"]), batch)


def test_custom_task_uses_the_collator_of_the_features(tmp_path):
    class Features(list):
        def collate(self, samples):
            return {"x": torch.tensor(samples)}

    task = custom_task(lambda dataset, checkpoint: Features(dataset), tmp_path)
    assert task.collate(task.prepare([1, 2]))["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "loss",
    [
        functional.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1, ignore_index=1),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_module_task_with_a_cross_entropy(loss, dense):
    torch.manual_seed(0)
    module = nn.Conv1d(2, 3, 1) if dense else nn.Linear(2, 3)
    inputs = torch.randn(6, 2, 4) if dense else torch.randn(6, 2)
    targets = torch.randint(3, (6, 4) if dense else (6,))
    task = module_task(loss)
    batch = task.collate(list(zip(inputs, targets, strict=True)))
    outputs = task.forward(module, batch)
    loss_B, weight_B = task.sample_losses(outputs, batch)
    assert loss_B.shape == (6,)
    torch.testing.assert_close((loss_B * weight_B).sum() / weight_B.sum(), loss(module(inputs), targets))
    torch.testing.assert_close(task.count(batch), weight_B.sum())
    assert task.metrics[0].name == "accuracy" and task.per_sample
    if dense:
        with pytest.raises(UserError, match=r"expected one class a sample, got targets of shape \(6, 4\)"):
            task.predictions(outputs, batch)
    else:
        assert task.predictions(outputs, batch) == (outputs.argmax(1).tolist(), targets.tolist())


def test_module_task_with_other_losses():
    module = nn.Linear(2, 1)
    inputs, targets = torch.randn(5, 2), torch.randn(5, 1)
    task = module_task(functional.mse_loss)
    batch = task.collate(list(zip(inputs, targets, strict=True)))
    loss, weight = task.sample_losses(task.forward(module, batch), batch)
    assert loss.shape == (1,) and weight == 5 and loss[0] == functional.mse_loss(module(inputs), targets)
    assert task.predictions is None and task.metrics == () and not task.per_sample

    class OwnLoss(nn.Module):
        def forward(self, x, y):
            return {"loss": (x - y).square().mean()}

    task = module_task()
    batch = task.collate([{"x": x, "y": x + 2} for x in inputs])
    loss, weight = task.sample_losses(task.forward(OwnLoss(), batch), batch)
    assert loss.tolist() == pytest.approx([4.0]) and weight == 5
    batch = task.collate([(x, x + 2) for x in inputs])
    assert task.sample_losses(task.forward(OwnLoss(), batch), batch)[0].tolist() == pytest.approx([4.0])

    class Named(nn.Module):
        def forward(self, x):
            return {"logits": x}

    task = module_task(functional.cross_entropy)
    batch = task.collate([{"x": x, "labels": 1} for x in inputs])
    loss_B, weight_B = task.sample_losses(task.forward(Named(), batch), batch)
    torch.testing.assert_close((loss_B * weight_B).mean(), functional.cross_entropy(inputs, torch.ones(5).long()))
    with pytest.raises(UserError, match="metrics accuracy: need a cross-entropy"):
        module_task(functional.mse_loss, metrics=["accuracy"])
    with pytest.raises(UserError, match="reduction 'mean', got 'sum'"):
        module_task(nn.CrossEntropyLoss(reduction="sum"))


def test_gradients_of_the_sample_losses_are_those_of_the_model(tmp_path):
    save_gpt2(tmp_path)
    task, module = build_task("causal-lm", tmp_path, max_length=8), load_module("causal-lm", tmp_path)
    batch = first_batch(task, from_dict(text=texts(20)))
    loss_B, weight_B = task.sample_losses(task.forward(module, batch), batch)
    ours = torch.autograd.grad((loss_B * weight_B).sum() / task.count(batch), module.transformer.wte.weight)[0]
    own = torch.autograd.grad(module(**batch).loss, module.transformer.wte.weight)[0]
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)
