"""Classification and regression of texts and of images, with transformers' Auto classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twa_merge.errors import UserError
from twa_merge.metrics import Metric
from twa_merge.task_base import (
    Batch,
    Task,
    check_text,
    check_tokens,
    column_values,
    find_columns,
    plain_rows,
    without_labels,
)
from twa_merge.task_labels import LabelSpace

TEXT_ROLES = ("text", "text_pair", "label")
IMAGE_ROLES = ("image", "label")
_TEXTS = (
    {"text": "sentence1", "text_pair": "sentence2"},
    {"text": "premise", "text_pair": "hypothesis"},
    {"text": "question", "text_pair": "sentence"},
    {"text": "question1", "text_pair": "question2"},
    {"text": "text"},
    {"text": "sentence"},
    {"text": "content"},
    {"text": "review"},
)
_IMAGES = ({"image": "image"}, {"image": "img"}, {"image": "pixel_values"})
_LABELS = ({"label": "label"}, {"label": "labels"})
_CACHE_BYTES = 1 << 30


def text_classification(
    tokenizer: Any,
    labels: LabelSpace,
    *,
    max_length: int | None,
    columns: Mapping[str, str],
    metrics: tuple[Metric, ...],
) -> Task:
    """Return the task of classifying texts, or pairs of texts, cut to `max_length` tokens."""
    what = "text-classification"

    def prepare(dataset: Any) -> Any:
        dataset = plain_rows(dataset, columns)
        texts = find_columns(dataset, _TEXTS, columns, what=what)
        label = find_columns(dataset, _LABELS, columns, what=what)["label"]
        for column in texts.values():
            check_text(dataset, column, what=what)
        values = labels.read(dataset, label)
        read = [texts[role] for role in ("text", "text_pair") if role in texts]
        return _tokenize(dataset, tokenizer, read, max_length, what).add_column("labels", values)

    def collate(samples: list[Any]) -> Batch:
        inputs = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples]
        return {**pad(tokenizer, inputs), "labels": labels.tensor([sample["labels"] for sample in samples])}

    return classification_task(what, labels, prepare, collate, metrics)


def image_classification(
    processor: Any, labels: LabelSpace, *, mode: str, columns: Mapping[str, str], metrics: tuple[Metric, ...]
) -> Task:
    """Return the task of classifying images, given to the processor in PIL's `mode` (RGB, or L for grey)."""
    what = "image-classification"

    def prepare(dataset: Any) -> Any:
        dataset = plain_rows(dataset, columns)
        image = find_columns(dataset, _IMAGES, columns, what=what)["image"]
        label = find_columns(dataset, _LABELS, columns, what=what)["label"]
        values = labels.read(dataset, label)
        return ImageFeatures(_as_images(dataset, image, what), image, values, processor, mode)

    def collate(samples: list[Any]) -> Batch:
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": labels.tensor([sample["labels"] for sample in samples]),
        }

    return classification_task(what, labels, prepare, collate, metrics)


class ImageFeatures:
    """Images processed when they are read; as many as fit in `cache_bytes` are kept, as every candidate reads them all.

    A sample is `pixel_values` (channels, height, width) and `labels`.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        labels: Sequence[Any],
        processor: Any,
        mode: str,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self.dataset, self.column, self.labels, self.processor, self.mode = dataset, column, labels, processor, mode
        self._free = cache_bytes
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = self._process(index)
            self._free -= pixels.nbytes
            if self._free >= 0:
                self._cache[index] = pixels
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def _process(self, index: int) -> Tensor:
        try:
            value = self.dataset[index][self.column]
            if not hasattr(value, "convert"):  # rows of pixel values, as from an Array3D column
                return torch.as_tensor(value, dtype=torch.float32)
            pixels: Tensor = self.processor(images=value.convert(self.mode), return_tensors="pt")["pixel_values"][0]
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"image-classification: image of row {index} in column {self.column!r}: {reason}"
            ) from error
        return pixels


def pad(tokenizer: Any, samples: list[dict[str, Any]]) -> Batch:
    """Return samples padded to the longest, as tensors (B, T)."""
    from transformers import DataCollatorWithPadding

    return dict(DataCollatorWithPadding(tokenizer)(samples))


def classification_task(what: str, labels: LabelSpace, prepare: Any, collate: Any, metrics: tuple[Metric, ...]) -> Task:
    """Return the task of a model whose logits and `labels` are of this space."""
    return Task(
        name=what,
        prepare=prepare,
        collate=collate,
        count=labels.count,
        sample_losses=labels.sample_losses,
        predictions=labels.predictions,
        metrics=metrics,
        forward=without_labels,
    )


def _tokenize(dataset: Any, tokenizer: Any, columns: Sequence[str], max_length: int | None, what: str) -> Any:
    def encode(rows: dict[str, list[str]], indices: list[int]) -> dict[str, Any]:
        for column in columns:
            check_tokens(rows[column], indices, column=column, what=what)
        encoded = tokenizer(
            *(rows[column] for column in columns), truncation=max_length is not None, max_length=max_length
        )
        check_tokens(encoded["input_ids"], indices, column=columns[0], what=what)
        return dict(encoded)

    rows = dataset.select_columns(list(columns))
    return rows.map(encode, batched=True, with_indices=True, remove_columns=list(columns), desc="tokenizing")


def _as_images(dataset: Any, column: str, what: str) -> Any:
    """Return the dataset with a column of paths or encoded bytes decoded on reading."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset
    encoded = isinstance(feature, dict) and "bytes" in feature
    if encoded or getattr(feature, "dtype", None) in ("string", "binary"):
        return dataset.cast_column(column, datasets.Image())
    shape = torch.as_tensor(column_values(dataset.select([0]), column)[0]).shape if _is_nested(feature) else ()
    if len(shape) != 3:
        raise UserError(
            f"{what}: column {column!r} holds {feature}, expected images (paths, bytes or pixel values of shape "
            f"(channels, height, width)); the data have the columns {', '.join(dataset.column_names)}"
        )
    return dataset


def _is_nested(feature: Any) -> bool:
    return isinstance(feature, list) or hasattr(feature, "feature") or hasattr(feature, "shape")
