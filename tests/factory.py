"""The one place that makes small real checkpoints: N members around a shared base, as `save_pretrained` leaves them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

VOCAB = 64
"""Size of every text model's vocabulary; the tokenizer uses fewer."""
NUM_LABELS = 2

_GOOD = ("good", "great", "happy", "bright", "lovely", "warm")
_BAD = ("bad", "awful", "sad", "dark", "nasty", "cold")
_PLAIN = ("the", "a", "film", "day", "song", "was", "and", "very", "house", "with", "some", "time")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_TRUNK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VISION = {**_TRUNK, "image_size": 16, "patch_size": 8}
_BERT = {**_TRUNK, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}
_T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_MARIAN = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **{"eos_token_id": 3, "forced_eos_token_id": 3, "decoder_start_token_id": 0, "max_position_embeddings": 64},
}
_LLAMA = {**_TRUNK, "vocab_size": VOCAB, "num_key_value_heads": 1, "max_position_embeddings": 64, **_IDS}
_MOE = {**_LLAMA, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
_LABELS = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", **_LABELS}
_CLIP = {"vision_config": _VISION, "text_config": _BERT | {"bos_token_id": 2, "eos_token_id": 3}, "projection_dim": 16}

_TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCAB, **_IDS),
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_BERT, **_LABELS}),
    "bert_mlm": ("BertForMaskedLM", "BertConfig", _BERT),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_VISION, **_LABELS}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, "decoder_start_token_id": 0, "eos_token_id": 3}),
    "clip": ("CLIPModel", "CLIPConfig", _CLIP),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", _VISION),
    "clip_image": ("CLIPForImageClassification", "CLIPConfig", {**_CLIP, **_LABELS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 12, "shared_expert_intermediate_size": 8},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "num_experts": 3, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA, "num_local_experts": 3}),
    "marian": ("MarianMTModel", "MarianConfig", _MARIAN),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", _RESNET),
}

KINDS = (*_TINY, "tiny_resnet")
"""Every kind that `make_soup` can make."""
FUSED = ("qwen2_moe", "qwen3_moe", "mixtral")
"""Kinds whose experts are one tensor each on disk and fused on load."""


def _older_t5(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shared = state["shared.weight"]
    return {**state, "encoder.embed_tokens.weight": shared.clone(), "decoder.embed_tokens.weight": shared.clone()}


def _renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def rename(name: str) -> str:
        for new, old in pairs:
            name = name.replace(new, old)
        return name

    return lambda state: {rename(name): tensor for name, tensor in state.items()}


_OLD: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "gpt2": _renamed(("transformer.", "")),
    "bert": _renamed(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    "bert_mlm": _renamed(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    "clip_vision": lambda state: {f"vision_model.{name}": tensor for name, tensor in state.items()},
    "t5": _older_t5,
}
"""How to respell what `save_pretrained` wrote; ViT's old names are written by transformers itself."""

RESPELLED = (*_OLD, "vit")
"""Kinds whose `spelling="old"` differs from `"new"`."""


class TinyResNet(nn.Module):
    """A plain torch classifier with BatchNorm: pixels `[B, 3, H, W]` -> logits `[B, 2]`."""

    def __init__(self, width: int = 8, num_labels: int = NUM_LABELS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, num_labels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.stem(pixel_values)).relu()
        return self.head((hidden + self.block(hidden)).mean((2, 3)))  # type: ignore[no-any-return]


def make_model(kind: str, seed: int = 0, **config: Any) -> nn.Module:
    """Make the tiny model of `kind` with every tensor random: no bias is 0, no LayerNorm weight is 1.

    Args:
        kind: one of `KINDS`.
        seed: of the weights.
        config: overrides of the kind's config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "tiny_resnet":
            model: Any = TinyResNet(**config)
        else:
            import transformers

            class_name, config_name, settings = _TINY[kind]
            model = getattr(transformers, class_name)(getattr(transformers, config_name)(**{**settings, **config}))
        _jitter(model, 0.1)
    return model.eval()  # type: ignore[no-any-return]


def make_members(
    kind: str, n: int = 3, *, seed: int = 0, scale: float = 0.05, frozen: Sequence[str] = (), **config: Any
) -> list[nn.Module]:
    """Make `n` models: a shared base, plus `scale` times a standard normal in every tensor not matched by `frozen`."""
    base = make_model(kind, seed, **config)
    members = [copy.deepcopy(base) for _ in range(n)]
    for k, member in enumerate(members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * (seed + 1) + k)
            _jitter(member, scale, frozen)
        for name, buffer in member.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(10 * (k + 1))
    return members


def make_soup(
    kind: str,
    folder: Path,
    n: int = 3,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    spelling: str = "new",
    scale: float = 0.05,
    frozen: Sequence[str] = (),
    **config: Any,
) -> list[Path]:
    """Save `n` members as `folder/member-0` and so on, and return these folders.

    Args:
        kind: one of `KINDS`; `tiny_resnet` is saved without a config.
        folder: made if missing.
        n: how many members.
        seed: of base and members.
        dtype: of the weights on disk.
        sharded: several files and an index instead of one file.
        spelling: names on disk, "new" as in the module, "old" as in older checkpoints (see `RESPELLED`), "mixed"
            alternates between members, new first. Experts are one tensor each in every spelling.
        scale: how far members lie from the base; 0 for equal members.
        frozen: patterns (`fnmatch`) of names in the module whose tensors are equal in all members.
        config: overrides of the kind's config.
    """
    if spelling not in ("new", "old", "mixed"):
        raise ValueError(f"spelling: expected new, old or mixed, got {spelling!r}")
    folders = []
    for k, member in enumerate(make_members(kind, n, seed=seed, scale=scale, frozen=frozen, **config)):
        old = spelling == "old" or (spelling == "mixed" and k % 2 == 1)
        folders.append(save_member(member.to(dtype), Path(folder) / f"member-{k}", kind, old=old, sharded=sharded))
    return folders


def save_member(model: nn.Module, folder: Path, kind: str, *, old: bool = False, sharded: bool = False) -> Path:
    """Save one model of `kind` in the wanted spelling and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "tiny_resnet":
        write_tensors(model.state_dict(), folder, sharded=sharded)
        return folder
    writer: Any = model
    writer.save_pretrained(
        folder,
        save_original_format=kind in FUSED or (kind == "vit" and old),
        max_shard_size=_shard_bytes(model) if sharded else "50GB",
    )
    if old and kind in _OLD:
        write_tensors(_OLD[kind](read_tensors(folder)), folder, sharded=sharded)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the safetensors files in `folder`, by its name on disk."""
    state = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            state.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return state


def write_tensors(state: dict[str, torch.Tensor], folder: Path, *, sharded: bool = False) -> None:
    """Replace the safetensors files in `folder` by one, or by three and an index."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if not sharded:
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return
    names, weight_map = list(state), {}
    for i in range(3):
        file_name = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: state[name].contiguous() for name in names[i::3]}, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(names[i::3], file_name))
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_tokenizer(folder: Path) -> None:
    """Save a small word tokenizer that knows the words of `text_rows`, in `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = (*_SPECIAL, *_GOOD, *_BAD, *_PLAIN)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, _SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
    Path(folder).mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)


def text_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `n` rows `{"text", "label"}`, half of each label; the words give the label away."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        telling = rng.choices((_BAD, _GOOD)[i % 2], k=rng.randint(1, 3))
        words = [*telling, *rng.choices(_PLAIN, k=rng.randint(2, 5))]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": i % 2})
    rng.shuffle(rows)
    return rows


@torch.no_grad()
def _jitter(model: nn.Module, scale: float, frozen: Sequence[str] = ()) -> None:
    """Add noise to every float tensor that is saved; variances stay positive, ties stay ties."""
    persistent = model.state_dict(keep_vars=True)
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(persistent.items())}
    for name, tensor in reversed(tensors.values()):
        if not tensor.is_floating_point() or any(fnmatch(name, pattern) for pattern in frozen):
            continue
        noise = scale * torch.randn(tensor.shape, dtype=tensor.dtype)
        tensor.add_(noise.abs() if name.endswith("running_var") else noise)


def _shard_bytes(model: nn.Module) -> int:
    return max(sum(p.nbytes for p in model.parameters()) // 3, 1)
