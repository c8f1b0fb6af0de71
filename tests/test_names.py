"""`names`: the map says what `from_pretrained` does, for every family and spelling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.factory import FUSED, KINDS, RESPELLED, TinyResNet, make_model, make_soup, read_tensors
from twa_merge.errors import UserError
from twa_merge.names import NameMap, map_names, meta_model, meta_module

FAMILIES = tuple(kind for kind in KINDS if kind != "tiny_resnet")
# Marian computes positions itself: tests/test_model.py
SPELLINGS = [(kind, "new") for kind in FAMILIES if kind != "marian"] + [(kind, "old") for kind in RESPELLED]


def load(cls: Any, config: Any, state: dict[str, torch.Tensor]) -> nn.Module:
    return cls.from_pretrained(None, config=config, state_dict=state)  # type: ignore[no-any-return]


def saved(kind: str, folder: Path, spelling: str = "new", **options: Any) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """One checkpoint: its tensors on disk, and the meta module of its config."""
    (path,) = make_soup(kind, folder, 1, spelling=spelling, **options)
    return read_tensors(path), meta_module(path)


def check_by_number(names: NameMap, state: Mapping[str, torch.Tensor], meta: Any) -> None:
    """Oracle: fill each tensor on disk with its own number and look where transformers puts it."""
    # equal numbers for the spellings of one storage: transformers unties what differs
    key = {name: names.mapped[name].parameters[0] if plain(names, name) else name for name in state}
    number = {text: i + 1 for i, text in enumerate(dict.fromkeys(key.values()))}
    numbered = {name: torch.full_like(t, number[key[name]]) for name, t in state.items()}
    module = load(type(meta), meta.config, numbered)
    landed = {name: set(t.flatten().tolist()) for name, t in module.state_dict().items()}
    for name in state:
        targets = names.mapped[name].parameters if name in names.mapped else ()
        found = {names.ties.get(p, p) for p, values in landed.items() if number[key[name]] in values}
        assert found == set(targets), name


def plain(names: NameMap, name: str) -> bool:
    return name in names.mapped and names.mapped[name].part is None


@pytest.mark.parametrize(("kind", "spelling"), SPELLINGS)
def test_every_tensor_goes_where_from_pretrained_puts_it(kind: str, spelling: str, tmp_path: Path) -> None:
    state, meta = saved(kind, tmp_path, spelling)
    names = map_names(meta, state)
    check_by_number(names, {name: t for name, t in state.items() if t.is_floating_point()}, meta)

    loaded = type(meta).from_pretrained(tmp_path / "member-0").state_dict()  # type: ignore[attr-defined]
    for name, tensor in state.items():
        if plain(names, name):
            assert torch.equal(loaded[names.mapped[name].parameters[0]], tensor), name


@pytest.mark.parametrize(("kind", "spelling"), SPELLINGS)
def test_map_is_complete(kind: str, spelling: str, tmp_path: Path) -> None:
    state, meta = saved(kind, tmp_path, spelling)
    names = map_names(meta, state)
    real = make_model(kind)
    covered = {parameter for mapped in names.mapped.values() for parameter in mapped.parameters}
    assert list(names.mapped) == list(state) and names.unused == ()
    assert covered == {*names.parameters, *names.buffers}
    assert len(names.parameters) == len(list(real.parameters()))
    assert {*names.parameters, *names.buffers, *names.ties} == set(real.state_dict())
    assert not set(names.ties) & covered


@pytest.mark.parametrize("kind", RESPELLED)
def test_spellings_agree(kind: str, tmp_path: Path) -> None:
    new, meta = saved(kind, tmp_path / "new")
    old, _ = saved(kind, tmp_path / "old", "old")
    assert set(new) != set(old)
    keyed = [{(m.parameters, m.part) for m in map_names(meta, state).mapped.values()} for state in (new, old)]
    assert keyed[0] == keyed[1]


def test_ties_are_named_by_their_source(tmp_path: Path) -> None:
    def ties(kind: str) -> dict[str, str]:
        state, meta = saved(kind, tmp_path / kind)
        return dict(map_names(meta, state).ties)

    assert ties("gpt2") == {"lm_head.weight": "transformer.wte.weight"}
    assert ties("llama") == {}
    assert ties("llama_tied") == {"lm_head.weight": "model.embed_tokens.weight"}
    assert ties("bert_mlm") == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert ties("t5") == dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
    )


def test_alias_alone_on_disk_is_the_source(tmp_path: Path) -> None:
    state, meta = saved("llama_tied", tmp_path)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    names = map_names(meta, state)
    assert names.mapped["lm_head.weight"].parameters == ("model.embed_tokens.weight",)
    check_by_number(names, state, meta)


@pytest.mark.parametrize("kind", FUSED)
def test_parts_of_fused_experts(kind: str, tmp_path: Path) -> None:
    state, meta = saved(kind, tmp_path)
    names = map_names(meta, state)
    parts = {name: mapped for name, mapped in names.mapped.items() if mapped.part is not None}
    assert parts and all(".experts." in name for name in parts)
    assert len({(m.parameters, m.part) for m in parts.values()}) == len(parts)
    # the same parts, whatever the order of the file and with or without the base model's prefix
    stripped = {name: name.removeprefix("model.") for name in reversed(state)}
    again = map_names(meta, stripped.values()).mapped
    assert {name: again[short] for name, short in stripped.items()} == names.mapped


def test_expert_ten_is_not_expert_two(tmp_path: Path) -> None:
    state, meta = saved("qwen2_moe", tmp_path)
    names = map_names(meta, state)
    name = "model.layers.1.mlp.experts.10.up_proj.weight"
    assert names.mapped[name].parameters == ("model.layers.1.mlp.experts.gate_up_proj",)
    assert names.mapped[name].part == "mlp.experts.*.up_proj.weight[10]"
    fused = type(meta).from_pretrained(tmp_path / "member-0").state_dict()  # type: ignore[attr-defined]
    assert torch.equal(fused[names.mapped[name].parameters[0]][10, 8:], state[name])


def test_fused_experts_on_disk_are_parameters(tmp_path: Path) -> None:
    state, meta = saved("qwen3_moe", tmp_path)
    names = map_names(meta, meta.state_dict())
    assert all(mapped.part is None for mapped in names.mapped.values()) and not names.unused
    with pytest.raises(UserError, match=r"experts.down_proj' is on disk twice, whole and in parts"):
        map_names(meta, [*state, "model.layers.0.mlp.experts.down_proj"])


def test_vision_tower_of_a_clip_folder(tmp_path: Path) -> None:
    state, _ = saved("clip", tmp_path)
    config = transformers.CLIPVisionConfig.from_pretrained(tmp_path / "member-0")
    meta = meta_model(transformers.CLIPVisionModel, config)
    names = map_names(meta, state)
    assert set(names.mapped) == {name for name in state if name.startswith("vision_model.")}
    assert "text_model.embeddings.token_embedding.weight" in names.unused and "logit_scale" in names.unused
    assert names.mapped["vision_model.post_layernorm.bias"].parameters == ("post_layernorm.bias",)
    check_by_number(names, state, meta)


def test_unknown_names_are_unused_and_second_spellings_too(tmp_path: Path) -> None:
    state, meta = saved("gpt2", tmp_path)
    names = map_names(meta, [*state, "transformer.h.0.attn.masked_bias", "value_head.weight", "wte.weight"])
    assert names.unused == ("transformer.h.0.attn.masked_bias", "value_head.weight", "wte.weight")
    state["wte.weight"] = state["transformer.wte.weight"] + 1
    loaded = load(type(meta), meta.config, state).state_dict()  # type: ignore[attr-defined]
    assert torch.equal(loaded["transformer.wte.weight"], state["transformer.wte.weight"])


def test_split_qkv_maps_to_several_parameters() -> None:
    meta = meta_model(transformers.Sapiens2Model, transformers.Sapiens2Config(num_hidden_layers=1))
    mapped = map_names(meta, ["blocks.0.ffn.w12.weight"]).mapped["blocks.0.ffn.w12.weight"]
    assert [p.rsplit(".", 2)[1] for p in mapped.parameters] == ["gate_proj", "up_proj"] and mapped.part is not None


def test_batchnorm_buffers(tmp_path: Path) -> None:
    state, meta = saved("resnet", tmp_path)
    names = map_names(meta, state)
    assert {name.rsplit(".", 1)[1] for name in names.buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    assert set(names.parameters) | set(names.buffers) == set(state)


def test_plain_torch_module_keeps_its_names() -> None:
    module = TinyResNet()
    module.extra = module.head
    names = map_names(module, [*TinyResNet().state_dict(), "other"])
    assert names.unused == ("other",) and names.mapped["head.bias"].parameters == ("head.bias",)
    assert names.ties == {"extra.weight": "head.weight", "extra.bias": "head.bias"}


def test_meta_module_needs_no_memory(tmp_path: Path) -> None:
    _, meta = saved("vit", tmp_path)
    assert isinstance(meta, transformers.ViTForImageClassification)
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"architectures": ["FancyRemoteModel"]}', "'FancyRemoteModel', which transformers .* does not have"),
        ('{"architectures": ["logging"]}', "'logging', which transformers"),
        ('{"model_type": "bert"}', "config.json: has no `architectures`"),
        ("{", "config.json: not a readable config"),
        ("[]", "config.json: not a readable config"),
        ('{"architectures": ["GPT2LMHeadModel"], "n_embd": 15}', "cannot build GPT2LMHeadModel from config.json"),
        (None, "config.json: not a readable config"),
    ],
)
def test_errors_name_the_config(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        meta_module(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_sharded_folders_hold_the_same_tensors(tmp_path: Path) -> None:
    whole, _ = saved("gpt2", tmp_path / "a", spelling="old")
    parts, _ = saved("gpt2", tmp_path / "b", spelling="old", sharded=True)
    index = json.loads((tmp_path / "b" / "member-0" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3 and set(index["weight_map"]) == set(whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_frozen_tensors_are_equal_and_the_others_are_not(tmp_path: Path) -> None:
    folders = make_soup("bert", tmp_path, 2, frozen=["bert.embeddings.*"], dtype=torch.bfloat16)
    a, b = (read_tensors(folder) for folder in folders)
    assert {t.dtype for t in a.values()} == {torch.bfloat16}
    assert {name for name in a if torch.equal(a[name], b[name])} == {n for n in a if n.startswith("bert.embeddings.")}
