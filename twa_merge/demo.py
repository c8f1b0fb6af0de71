"""The demo's soup: a small ViT on scikit-learn's handwritten digits, fine-tuned in ways a sweep would try.

Everything after the checkpoints is the code path of `twa-merge train`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from twa_merge.errors import UserError
from twa_merge.learn_config import LearnConfig
from twa_merge.publish import publish
from twa_merge.recipe import DataConfig, OutputConfig, Recipe
from twa_merge.runner import run_recipe

if TYPE_CHECKING:
    from twa_merge.job import Result

NUM_MEMBERS = 8
SPLITS = {"train": 797, "validation": 400, "test": 600}
_MARK = "soup.json"


def run_demo(folder: Path, seed: int) -> Result:
    """Make the soup in `folder` unless it is there, and run the main job on it.

    Leaves `data/`, `pretrained/`, `members/member-*` and `merged/`.

    Raises:
        UserError: `folder` holds something else, or the demo of another seed.
    """
    _check(folder, seed)
    if not (folder / _MARK).exists():
        if folder.exists():
            folder.rmdir()
        with publish(folder) as unfinished:
            make_soup(unfinished, seed)
    # `merged` is the demo's own: running it again makes it anew
    shutil.rmtree(folder / "merged", ignore_errors=True)
    return run_recipe(demo_recipe(folder, seed))


def demo_recipe(folder: Path, seed: int) -> Recipe:
    """Return the main job on the demo's folders, with no setting but the defaults."""
    return Recipe(
        checkpoints=[str(folder / "members" / f"member-{k}") for k in range(NUM_MEMBERS)],
        task="image-classification",
        data=DataConfig(path=str(folder / "data"), split="validation", test_split="test"),
        learn=LearnConfig(seed=seed),
        output=OutputConfig(path=str(folder / "merged")),
    )


def _check(folder: Path, seed: int) -> None:
    mark = folder / _MARK
    if mark.is_file():
        made = json.loads(mark.read_text(encoding="utf-8"))["seed"]
        if made != seed:
            raise UserError(f"{folder}: holds the demo of seed {made}, not {seed}; choose another folder with --keep")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no demo; choose another folder with --keep")


def make_soup(folder: Path, seed: int, members: int = NUM_MEMBERS) -> None:
    """Pretrain one small ViT and fine-tune it `members` times, with transformers' `Trainer`."""
    from tqdm import tqdm
    from transformers import ViTImageProcessorPil

    splits = _digits(seed)
    splits.save_to_disk(str(folder / "data"))
    processor = ViTImageProcessorPil(
        do_resize=False, do_rescale=True, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    train = _features(splits["train"], processor)
    generator = torch.Generator().manual_seed(seed)
    choices = [_hyper_parameters(generator) for _ in range(members)]
    with tqdm(total=members + 1, desc="making checkpoints", disable=None) as bar:
        torch.manual_seed(seed)
        model = _new_vit()
        _train(model, train, folder / "trainer", seed, {"learning_rate": 2e-3, "epochs": 40, "weight_decay": 0.05})
        _save(model, processor, folder / "pretrained")
        bar.update()
        for k, choice in enumerate(choices):
            member = type(model).from_pretrained(folder / "pretrained")
            _train(member, train, folder / "trainer", seed * 1000 + k + 1, choice)
            _save(member, processor, folder / "members" / f"member-{k}")
            bar.update()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    about = {"seed": seed, "members": choices}
    (folder / _MARK).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _digits(seed: int) -> Any:
    """Return the 1,797 digits (8 x 8 pixels, UCI, shipped with scikit-learn) in three splits."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as Pictures

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('the demo needs scikit-learn: pip install "twa-merge[demo]"') from error
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype("uint8")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed)).tolist()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    splits, first = DatasetDict(), 0
    for name, size in SPLITS.items():
        part = order[first : first + size]
        pictures = [Pictures.fromarray(pixels[i]).convert("RGB") for i in part]
        labels = [int(digits.target[i]) for i in part]
        splits[name] = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        first += size
    return splits


def _features(split: Any, processor: Any) -> list[dict[str, Any]]:
    pixels = processor([row["image"] for row in split], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, split["label"], strict=True)]


def _new_vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    names = {d: str(d) for d in range(10)}
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        id2label=names, label2id={name: d for d, name in names.items()},
    )  # fmt: skip
    return ViTForImageClassification(config)


def _hyper_parameters(generator: torch.Generator) -> dict[str, Any]:
    """Draw what a sweep would try; some of it is bad."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    return {
        "learning_rate": 10 ** uniform(-4.0, -2.5),
        "epochs": round(uniform(4, 12)),
        "weight_decay": 10 ** uniform(-3, -0.7),
        "label_smoothing": uniform(0, 0.1),
        "share": uniform(0.5, 1.0),
        "shift": bool(torch.rand((), generator=generator) < 0.5),
    }


def _train(model: Any, train: list[dict[str, Any]], scratch: Path, seed: int, choice: dict[str, Any]) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(train), generator=generator)[: round(choice.get("share", 1.0) * len(train))]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        if choice.get("shift"):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            batch["pixel_values"] = torch.roll(batch["pixel_values"], (down, right), dims=(2, 3))
        return batch

    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=32,
        num_train_epochs=choice["epochs"],
        learning_rate=choice["learning_rate"],
        weight_decay=choice["weight_decay"],
        label_smoothing_factor=choice.get("label_smoothing", 0.0),
        warmup_steps=20,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
    )
    subset = torch.utils.data.Subset(train, kept.tolist())  # type: ignore[arg-type, var-annotated]
    trainer = Trainer(model=model, args=arguments, train_dataset=subset, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _save(model: Any, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
