"""Language models: of running text (causal-lm), and from a source text to a target text (seq2seq).

Legend: B samples in a batch, T tokens, V vocabulary, M blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from twa_merge.errors import UserError
from twa_merge.metrics import Metric
from twa_merge.task_base import IGNORED, Batch, Task, check_text, check_tokens, find_columns, logits_of, plain_rows

CAUSAL_ROLES = ("text",)
SEQ2SEQ_ROLES = ("source", "target")
_TEXTS = ({"text": "text"}, {"text": "content"}, {"text": "sentence"}, {"text": "review"})
_PAIRS = (
    {"source": "source", "target": "target"},
    {"source": "document", "target": "summary"},
    {"source": "article", "target": "highlights"},
    {"source": "en", "target": "de"},
)
_READ_AT_ONCE = 1000
_DEFAULT_GENERATED = 128


def causal_lm(tokenizer: Any, *, block_size: int, columns: Mapping[str, str], metrics: tuple[Metric, ...]) -> Task:
    """Return the task of predicting each next token of blocks of `block_size` tokens; a sample is a block."""
    what = "causal-lm"

    def prepare(dataset: Any) -> Any:
        dataset = plain_rows(dataset, columns)
        column = find_columns(dataset, _TEXTS, columns, what=what)["text"]
        check_text(dataset, column, what=what)
        tokens = _running_tokens(dataset, column, tokenizer)
        if len(tokens) < 2:
            raise UserError(
                f"{what}: column {column!r} gives {len(tokens)} tokens in all, expected at least 2; is it empty?"
            )
        size = min(block_size, len(tokens))
        return TokenBlocks(torch.from_numpy(tokens[: len(tokens) // size * size].reshape(-1, size)))

    def collate(samples: list[Any]) -> Batch:
        ids_BT = torch.stack([sample["input_ids"] for sample in samples])
        return {"input_ids": ids_BT, "labels": ids_BT.clone()}

    return Task(
        name=what,
        prepare=prepare,
        collate=collate,
        count=lambda batch: (batch["labels"][:, 1:] != IGNORED).sum().float(),
        sample_losses=lambda outputs, batch: token_losses(logits_of_tokens(outputs)[:, :-1], batch["labels"][:, 1:]),
        predictions=None,
        metrics=metrics,
        forward=lambda module, batch: module(input_ids=batch["input_ids"], use_cache=False),
    )


def seq2seq(
    tokenizer: Any, *, max_length: int, columns: Mapping[str, str], metrics: tuple[Metric, ...], source_prefix: str = ""
) -> Task:
    """Return the task of turning a source text into a target text; both are cut to `max_length` tokens."""
    what = "seq2seq"

    def encode(rows: dict[str, list[str]], indices: list[int], source: str, target: str) -> dict[str, Any]:
        for column in (source, target):
            check_tokens(rows[column], indices, column=column, what=what)
        inputs = tokenizer([source_prefix + text for text in rows[source]], truncation=True, max_length=max_length)
        labels = tokenizer(text_target=rows[target], truncation=True, max_length=max_length)["input_ids"]
        check_tokens(inputs["input_ids"], indices, column=source, what=what)
        check_tokens(labels, indices, column=target, what=what)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}

    def prepare(dataset: Any) -> Any:
        dataset = plain_rows(dataset, columns)
        pair = find_columns(dataset, _PAIRS, columns, what=what)
        for column in pair.values():
            check_text(dataset, column, what=what)
        rows = dataset.select_columns(list(pair.values()))
        options = {"remove_columns": rows.column_names, "fn_kwargs": pair, "desc": "tokenizing"}
        return rows.map(encode, batched=True, with_indices=True, **options)

    def collate(samples: list[Any]) -> Batch:
        from transformers import DataCollatorForSeq2Seq

        return dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(samples))

    return Task(
        name=what,
        prepare=prepare,
        collate=collate,
        count=lambda batch: (batch["labels"] != IGNORED).sum().float(),
        sample_losses=lambda outputs, batch: token_losses(logits_of_tokens(outputs), batch["labels"]),
        predictions=None,
        generate=lambda module, batch: _generate(module, batch, tokenizer, max_length),
        metrics=metrics,
    )


class TokenBlocks:
    """M blocks of T tokens; a sample is its `input_ids`."""

    def __init__(self, tokens_MT: Tensor) -> None:
        self.tokens_MT = tokens_MT

    def __len__(self) -> int:
        return len(self.tokens_MT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens_MT[index].long()}


def logits_of_tokens(outputs: Any) -> Tensor:
    """Return logits (B, T, V) in their own dtype: a batch of them in float32 can be the largest tensor of a run."""
    if isinstance(outputs, Mapping):
        logits: Tensor = outputs["logits"]
        return logits
    return logits_of(outputs)


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cross-entropy (B,) over its labels that are not -100, and how many those are (B,)."""
    weight_B = (labels_BT != IGNORED).sum(dim=1).float()
    # sample by sample, so that only one sample's logits are held in float32 where no graph keeps them
    sums = [
        functional.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="sum")
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.stack(sums) / weight_B.clamp_min(1), weight_B


def _running_tokens(dataset: Any, column: str, tokenizer: Any) -> np.ndarray:
    """Return all texts as one row of int32 tokens, with the end-of-text token between them if there is one."""
    end = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    for start in range(0, len(dataset), _READ_AT_ONCE):
        texts = [text for text in dataset[start : start + _READ_AT_ONCE][column] if text]
        if not texts:
            continue
        rows = tokenizer(texts, verbose=False)["input_ids"]
        # one that the tokenizer itself puts at the end is not doubled
        joined = ([*row, end] if end is not None and row and row[-1] != end else row for row in rows)
        parts.append(np.fromiter(chain.from_iterable(joined), dtype=np.int32))
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return tokens[:-1] if end is not None and len(tokens) and tokens[-1] == end else tokens


@torch.no_grad()
def _generate(module: nn.Module, batch: Batch, tokenizer: Any, max_length: int) -> tuple[list[Any], list[Any]]:
    inner: Any = module if hasattr(module, "generate") else getattr(module, "module", module)
    own = getattr(inner, "generation_config", None)
    limit = getattr(own, "max_new_tokens", None) or getattr(own, "max_length", None) or 20
    if limit <= 20:  # transformers' default, which no one chose
        limit = min(max_length, _DEFAULT_GENERATED)
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    ids = inner.generate(**inputs, max_new_tokens=limit, do_sample=False)
    labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, tokenizer.pad_token_id)
    decoded = [tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True) for rows in (ids, labels)]
    return [text.strip() for text in decoded[0]], [text.strip() for text in decoded[1]]
