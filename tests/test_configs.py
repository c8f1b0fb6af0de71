"""`configs`: what is refused, what is only listed, and whether the message helps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.factory import make_soup, make_tokenizer
from twa_merge.configs import compare_configs
from twa_merge.errors import UserError
from twa_merge.preparation import compare_processors, compare_tokenizers

BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "id2label": {"0": "negative", "1": "positive"},
    "label2id": {"negative": 0, "positive": 1},
}
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64}
DROP = object()


def folders(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> tuple[Path, Path]:
    for name, config in (("a", a), ("b", b)):
        (tmp_path / name).mkdir(exist_ok=True)
        kept = {key: value for key, value in config.items() if value is not DROP}
        (tmp_path / name / "config.json").write_text(json.dumps(kept))
    return tmp_path / "a", tmp_path / "b"


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_members_of_a_soup_differ_in_nothing(tmp_path: Path) -> None:
    a, b = make_soup("bert", tmp_path, 2)
    assert compare_configs(a, b) == []


def test_dtype_is_harmless(tmp_path: Path) -> None:
    (a,) = make_soup("gpt2", tmp_path / "a", 1)
    (b,) = make_soup("gpt2", tmp_path / "b", 1, dtype=torch.bfloat16)
    assert compare_configs(a, b) == ['dtype: "float32" / "bfloat16"']


@pytest.mark.parametrize(
    ("key", "x", "y", "line"),
    [
        ("hidden_dropout_prob", 0.1, 0.0, "hidden_dropout_prob: 0.1 / 0.0"),
        ("classifier_dropout", None, 0.2, "classifier_dropout: null / 0.2"),
        ("_name_or_path", "runs/a", DROP, '_name_or_path: "runs/a" / (missing)'),
        ("transformers_version", "4.40.0", "5.23.0", 'transformers_version: "4.40.0" / "5.23.0"'),
        ("torch_dtype", "float32", DROP, 'torch_dtype: "float32" / (missing)'),
        ("problem_type", "single_label_classification", None, 'problem_type: "single_label_classification" / null'),
        ("problem_type", "single_label_classification", DROP, None),
        ("use_cache", True, False, None),
        ("gradient_checkpointing", True, DROP, None),
        ("output_hidden_states", True, False, None),
        ("initializer_range", 0.02, 0.01, None),
        ("finetuning_task", "sst2", "mrpc", None),
        ("task_specific_params", {"x": {"y": 1}}, {"x": {"y": 2}}, None),
        ("router_aux_loss_coef", 0.1, 0.2, None),
        ("label_smoothing", 0.1, 0, None),
        ("mask_time_prob", 0.1, 0, None),
        ("num_beams", 1, 4, None),
        ("max_length", 20, DROP, None),
        ("layerdrop", 0.1, DROP, None),
        ("drop_path_rate", 0.1, 0.0, None),
    ],
)
def test_harmless_is_listed(key: str, x: Any, y: Any, line: str | None, tmp_path: Path) -> None:
    (found,) = compare_configs(*folders(tmp_path, {**BERT, key: x}, {**BERT, key: y}))
    assert found.startswith(key) and line in (None, found)


@pytest.mark.parametrize(
    ("key", "x", "y"),
    [
        ("num_attention_heads", 2, 4),
        ("hidden_act", "gelu", "relu"),
        ("layer_norm_eps", 1e-12, 1e-5),
        ("tie_word_embeddings", True, False),
        ("vocab_size", 64, 65),
        ("pad_token_id", 0, 1),
        ("eos_token_id", None, 3),
        ("position_embedding_type", "absolute", "relative_key"),
        ("problem_type", "regression", "single_label_classification"),
        ("token_dropout", True, False),
        ("output_stride", 8, 16),
        ("mask_feature_size", 8, 16),
        ("some_new_switch", 1, DROP),
    ],
)
def test_functional_is_refused_with_both_values(key: str, x: Any, y: Any, tmp_path: Path) -> None:
    a, b = folders(tmp_path, {**BERT, key: x}, {**BERT, key: y})
    message = refused(compare_configs, a, b)
    values = ["(missing)" if value is DROP else json.dumps(value) for value in (y, x)]
    assert f"{key} is {values[0]}, expected {values[1]}" in message
    assert message.startswith(f"{b}: ") and f"than {a}:" in message


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    swapped = {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    message = refused(compare_configs, *folders(tmp_path, BERT, {**BERT, **swapped}))
    assert 'id2label.0 is "positive", expected "negative"' in message and "also different: id2label.1" in message


def test_a_label_with_a_harmless_name_is_still_a_label(tmp_path: Path) -> None:
    a = {**BERT, "id2label": {"0": "x", "1": "dropout"}, "label2id": {"x": 0, "dropout": 1}}
    b = {**BERT, "id2label": {"0": "x", "1": "dropout"}, "label2id": {"x": 0, "dropout": 2}}
    assert "label2id.dropout is 2, expected 1" in refused(compare_configs, *folders(tmp_path, a, b))


def test_left_out_defaults_are_no_difference(tmp_path: Path) -> None:
    spelled = {**BERT, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "num_hidden_layers": 12}
    assert compare_configs(*folders(tmp_path, BERT, spelled)) == []
    other = refused(compare_configs, *folders(tmp_path, BERT, {**spelled, "num_hidden_layers": 6}))
    assert "num_hidden_layers is 6, expected 12" in other


def test_rope_in_old_and_new_spelling(tmp_path: Path) -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": None}
    new = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert compare_configs(*folders(tmp_path, old, new)) == []
    message = refused(compare_configs, *folders(tmp_path, {**old, "rope_theta": 1e4}, new))
    assert "rope_parameters.rope_theta is 500000.0, expected 10000.0" in message


def test_nested_configs(tmp_path: Path) -> None:
    clip = {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": {"patch_size": 8, "dropout": 0.1}}
    same = {**clip, "vision_config": {"patch_size": 8, "dropout": 0.0, "image_size": 224}}
    assert compare_configs(*folders(tmp_path, clip, same)) == ["vision_config.dropout: 0.1 / 0.0"]
    message = refused(compare_configs, *folders(tmp_path, clip, {**clip, "vision_config": {"patch_size": 16}}))
    assert "vision_config.patch_size is 16, expected 8" in message


def test_unknown_model_type_compares_what_is_there(tmp_path: Path) -> None:
    a = {"model_type": "fancy", "architectures": ["Fancy"], "width": 3}
    assert compare_configs(*folders(tmp_path, a, {**a, "dropout": 0.1})) == ["dropout: (missing) / 0.1"]
    message = refused(compare_configs, *folders(tmp_path, a, {**a, "depth": 2}))
    assert "depth is 2, expected (missing)" in message


@pytest.mark.parametrize(("key", "value"), [("architectures", ["BertForMaskedLM"]), ("model_type", "roberta")])
def test_another_architecture(key: str, value: Any, tmp_path: Path) -> None:
    a, b = folders(tmp_path, BERT, {**BERT, key: value})
    message = refused(compare_configs, a, b)
    assert "another architecture" in message and json.dumps(value) in message and str(b) in message


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    quantized = {**BERT, "quantization_config": {"quant_method": "fp8"}}
    assert "quantized" in refused(compare_configs, *folders(tmp_path, quantized, quantized))
    assert compare_configs(*folders(tmp_path, BERT, {**BERT, "quantization_config": None})) == []


@pytest.mark.parametrize(("text", "message"), [("{", "not readable"), ("[]", "JSON object"), (None, "not there")])
def test_broken_config(text: str | None, message: str, tmp_path: Path) -> None:
    a, b = folders(tmp_path, BERT, BERT)
    (b / "config.json").unlink()
    if text is not None:
        (b / "config.json").write_text(text)
    found = refused(compare_configs, a, b)
    assert message in found and str(b / "config.json") in found


def test_equal_configs_load_no_model_library(tmp_path: Path) -> None:
    a, b = folders(tmp_path, BERT, {**BERT, "hidden_dropout_prob": 0.3})
    code = (
        "import sys; from pathlib import Path; from twa_merge.configs import compare_configs; "
        f"compare_configs(Path({str(a)!r}), Path({str(b)!r})); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.fixture
def tokenizers(tmp_path: Path) -> tuple[Path, Path]:
    make_tokenizer(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def edit(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_equal_tokenizers(tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    assert compare_tokenizers(*tokenizers) == []
    edit(tokenizers[1], lambda data: None)  # other whitespace
    assert compare_tokenizers(*tokenizers) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    assert compare_tokenizers(tmp_path / "x", tmp_path / "y") == []


def test_truncation_and_padding_are_harmless(tokenizers: tuple[Path, Path]) -> None:
    edit(tokenizers[1], lambda data: data.update(truncation={"max_length": 8}, padding={"pad_id": 0}))
    assert compare_tokenizers(*tokenizers) == ["tokenizer.json: truncation, padding differs"]


def test_no_tokenizer_in_one_folder_is_listed(tokenizers: tuple[Path, Path]) -> None:
    (tokenizers[1] / "tokenizer.json").unlink()
    assert compare_tokenizers(*tokenizers) == ["tokenizer: tokenizer.json / none"]


def test_other_vocabulary_is_refused(tokenizers: tuple[Path, Path]) -> None:
    edit(tokenizers[1], lambda data: data["model"]["vocab"].update(good=6, great=5))
    message = refused(compare_tokenizers, *tokenizers)
    assert re.search(r"vocab differs \('good' is 6, expected 5\)", message)
    assert all(str(folder / "tokenizer.json") in message for folder in tokenizers)


def test_added_token_is_refused(tokenizers: tuple[Path, Path]) -> None:
    edit(tokenizers[1], lambda data: data["added_tokens"].append({"id": 40, "content": "<x>"}))
    message = refused(compare_tokenizers, *tokenizers)
    assert "added_tokens differs (6 entries, expected 5; '<x>' is 40, expected (missing))" in message


def test_merges_in_both_spellings(tmp_path: Path) -> None:
    for name, merges in (("a", ["a b", "b c"]), ("b", [["a", "b"], ["b", "c"]]), ("c", [["b", "c"], ["a", "b"]])):
        (tmp_path / name).mkdir()
        model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": merges}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    assert compare_tokenizers(tmp_path / "a", tmp_path / "b") == []
    assert "merges differs ('a b' is 1, expected 0)" in refused(compare_tokenizers, tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("vocab.txt", b"[PAD]\r\ngood\r\n", b"[PAD]\nbad\n"),
        ("merges.txt", b"#version: 0.2\n[PAD]\ngood\n", b"[PAD]\ngood\nx y\n"),
        ("spiece.model", b"[PAD]\ngood\n", b"x"),
        ("vocab.json", b'{ "good": 1}', b'{"good": 2}'),
    ],
)
def test_other_tokenizer_files(name: str, same: bytes, other: bytes, tmp_path: Path) -> None:
    first = {"merges.txt": b"#version: 0.1\n[PAD]\ngood\n", "vocab.json": b'{"good":1}'}.get(name, b"[PAD]\ngood\n")
    for folder, content in (("a", first), ("b", same), ("c", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    assert compare_tokenizers(tmp_path / "a", tmp_path / "b") == []
    message = refused(compare_tokenizers, tmp_path / "a", tmp_path / "c")
    assert str(tmp_path / "c" / name) in message


def test_tokenizers_of_different_kinds_are_listed(tokenizers: tuple[Path, Path]) -> None:
    (tokenizers[1] / "tokenizer.json").rename(tokenizers[1] / "spiece.model")
    assert compare_tokenizers(*tokenizers) == [
        "tokenizer: tokenizer.json / spiece.model (different files: not compared)"
    ]


def test_broken_tokenizer(tokenizers: tuple[Path, Path]) -> None:
    (tokenizers[1] / "tokenizer.json").write_text("{")
    assert "not readable" in refused(compare_tokenizers, *tokenizers)


def test_steps_of_a_tokenizer_in_a_list_are_compared_one_by_one(tokenizers: tuple[Path, Path]) -> None:
    def steps(**last: Any) -> Any:
        return {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", **last}]}

    edit(tokenizers[0], lambda data: data.update(pre_tokenizer=steps(prepend_scheme="always", add_prefix_space=True)))
    edit(tokenizers[1], lambda data: data.update(pre_tokenizer=steps(prepend_scheme="always", split=True)))
    assert compare_tokenizers(*tokenizers) == ["tokenizer.json: pre_tokenizer differs"]
    edit(tokenizers[1], lambda data: data.update(pre_tokenizer=steps(prepend_scheme="never")))
    assert 'prepend_scheme is "never", expected "always"' in refused(compare_tokenizers, *tokenizers)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_settings_of_a_tokenizer_decide_where_its_file_leaves_them_open(tmp_path: Path, file: str) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder, lower in zip(folders, (True, False), strict=True):
        folder.mkdir()
        (folder / file).write_text(json.dumps({"model": {"vocab": {"good": 0}}}) if file[0] == "t" else "good")
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower, "padding_side": "left"}))
    if file == "tokenizer.json":
        assert compare_tokenizers(*folders) == ["tokenizer_config.json: do_lower_case differs"]
    else:
        assert "do_lower_case is false, expected true" in refused(compare_tokenizers, *folders)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"image_processor_type": "ViTImageProcessorFast"}, {"image_processor_type": "ViTImageProcessor"}, None),
        ({"size": 16}, {"size": {"height": 16, "width": 16}}, None),
        ({"size": {"shortest_edge": 16}}, {"size": 16}, None),
        ({"size": {"shortest_edge": 16}}, {"size": {"height": 16, "width": 16}}, "size is"),
        ({"size": 16}, {"size": {"height": 16, "width": 18}}, "size is"),
        ({"image_processor": {"image_processor_type": "A", "do_resize": True}}, {"do_resize": True}, None),
        ({"image_processor": {"image_processor_type": "A", "do_resize": True}}, {"do_resize": False}, "do_resize is"),
        ({"image_mean": [0.5, 0.5, 0.5]}, {"image_mean": [0.5, 0.5, 0.4]}, "image_mean is [0.5, 0.5, 0.4], expected"),
        ({"resample": 2}, {"resample": 3}, "resample is 3, expected 2"),
    ],
)
def test_processors_that_see_other_inputs_are_refused(
    tmp_path: Path, a: dict[str, Any], b: dict[str, Any], message: str | None
) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder, content in zip(folders, (a, b), strict=True):
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    if message is None:
        assert all(line.startswith("preprocessor_config.json: ") for line in compare_processors(*folders))
    else:
        assert message in refused(compare_processors, *folders)
