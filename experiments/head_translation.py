"""Head of training, translation (paper, table 4): half of a run and a learned merge, or all of it.

    python experiments/head_translation.py --data DATA --output runs/head-translation

A small encoder-decoder Transformer (Marian's architecture) is trained from nothing on Multi30k, English to German, by
Adam with a learning rate that is divided by ten at half and at three quarters of the run. Snapshots of a first part of
the run, one an epoch, are merged, one row for the whole model, on the training data (TWA-t) or on the validation data
(TWA-v, where the scale of the logits is free; also of the later half of them), or by fixed weights. Learning starts
from their greedy soup, for the uniform one is far from all of them. BLEU is that of greedy decoding on the test set of
2016, scored at the end; it chooses nothing: settings were chosen on seed 100, which tests on a thousand other pairs of
the training file, as all seeds from there on do. Larger, for a GPU: `--pairs 28000 --width 256`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DEVELOPMENT, against, arguments, less, plot_differences, report
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import twa_merge as twa
from twa_merge.assembly import load_merge
from twa_merge.recipe import Recipe
from twa_merge.snapshot_stores import DiskStore

HEADS = {0.5: 0.1, 2 / 3: 0.03}
"""Shares of the run whose snapshots are merged (paper, tables 2 and 3), and epochs of learning as a share of those."""

Pairs = list[tuple[str, str]]


def read(data: Path, name: str) -> Pairs:
    """Return sentences and their translations."""
    sides = [(data / f"multi30k/{name}.{language}").read_text(encoding="utf-8") for language in ("en", "de")]
    return list(zip(*(side.split("\n")[:-1] for side in sides), strict=True))


def splits(data: Path, seed: int, count: int) -> dict[str, Pairs]:
    """Return `count` pairs to train on, held-out pairs and test pairs."""
    everything = read(data, "train")
    order = np.random.default_rng(seed).permutation(len(everything))
    others = [everything[i] for i in order[count : count + 1000]]
    return {
        "train": [everything[i] for i in order[:count]],
        "held out": read(data, "val"),
        "test": read(data, "test_2016_flickr") if seed < DEVELOPMENT else others,
    }


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-pair encoding of both languages that ends each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def features(pairs: Pairs, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Return token ids of the pairs."""
    sources, targets = (tokenizer(list(side), truncation=True)["input_ids"] for side in zip(*pairs, strict=True))
    return [
        {"input_ids": s, "attention_mask": [1] * len(s), "labels": t} for s, t in zip(sources, targets, strict=True)
    ]


def make_model(args: Any, tokenizer: PreTrainedTokenizerFast) -> MarianMTModel:
    """Return the Transformer with fresh weights."""
    size = args.width
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=size,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * size,
        decoder_ffn_dim=2 * size,
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=1,
        decoder_start_token_id=0,
        max_position_embeddings=128,
        scale_embedding=True,
        dropout=0.1,
    )
    return MarianMTModel(config)


@torch.no_grad()
def bleu(module: nn.Module, pairs: Pairs, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the BLEU of greedy decoding (sacrebleu's default tokens)."""
    import sacrebleu

    module.eval()
    sources, references = (list(side) for side in zip(*pairs, strict=True))
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found = [""] * len(sources)
    for start in range(0, len(order), 100):
        chosen = order[start : start + 100]
        batch = tokenizer([sources[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        inputs = {key: batch[key].to(module.device) for key in ("input_ids", "attention_mask")}
        ids = module.generate(**inputs, max_new_tokens=50, do_sample=False, num_beams=1)
        for i, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            found[i] = text.strip()
    return float(sacrebleu.corpus_bleu(found, [references]).score)


@torch.no_grad()
def loss_of(module: nn.Module, part: list[dict[str, Any]], collate: Any) -> float:
    """Return the mean cross-entropy of the labels."""
    module.eval()
    total = count = 0.0
    for start in range(0, len(part), 100):
        batch = {key: value.to(module.device) for key, value in collate(part[start : start + 100]).items()}
        labels = int((batch["labels"] != -100).sum())
        total += float(module(**batch).loss) * labels
        count += labels
    return total / count


def run(args: Any, seed: int) -> dict[str, Any]:
    """Train once; merge the snapshots of the first half, and of the first two thirds."""
    pairs = splits(args.data, seed, args.pairs)
    tokenizer = make_tokenizer([text for pair in pairs["train"] for text in pair], args.vocabulary)
    parts = {name: features(of, tokenizer) for name, of in pairs.items()}
    set_seed(seed)
    model = make_model(args, tokenizer)
    collate = DataCollatorForSeq2Seq(tokenizer, model)
    steps_of_epoch = -(-len(parts["train"]) // args.batch_size)
    steps = steps_of_epoch * args.epochs
    every = steps_of_epoch
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)

    def schedule(step: int) -> float:
        drop = 0.1 ** ((step >= steps // 2) + (step >= 3 * steps // 4))
        return drop * min(1.0, (step + 1) / 400)

    folder = args.output / f"translation-{seed}"
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=100,
        seed=seed,
        save_strategy="no",
        logging_steps=steps_of_epoch,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        train_sampling_strategy="group_by_length",
    )
    callback = twa.SnapshotCallback(every, folder=folder / "snapshots", overwrite=True)
    done = folder / "training.json"
    trainer = Trainer(
        model,
        settings,
        train_dataset=parts["train"],
        eval_dataset=parts["held out"],
        data_collator=collate,
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
        callbacks=[callback],
    )
    if not done.is_file():
        start = time.perf_counter()
        trainer.train()
        done.write_text(json.dumps({"training seconds": time.perf_counter() - start}))

    def scores() -> dict[str, float]:
        found = {
            "BLEU": bleu(model, pairs["test"], tokenizer),
            "loss": loss_of(model, parts["test"], collate),
        }
        return found | {"validation_loss": loss_of(model, parts["held out"], collate)}

    found: dict[str, Any] = json.loads(done.read_text())
    snapshots = list(DiskStore(callback.folder).paths.values())
    load_merge(model, twa.Soup(snapshots[-1:]), twa.one_hot(0, ["full"]))
    found["full"] = scores()
    common = {"recipe": Recipe(margin=-1e9, eval_batch_size=100), "batch_size": args.batch_size, "lr": args.twa_lr}
    # the scale of the logits is free, by the norm before them: held-out data ask for less confidence
    norm = f"model.decoder.layers.{model.config.decoder_layers - 1}.final_layer_norm.*"
    held_out: dict[str, Any] = {"learn_on": "validation", "granularity": [norm, "*"], "linear": True}
    rows: dict[str, dict[str, Any]] = {
        "TWA-t": {"learn_on": "train", "granularity": "model"},
        "TWA-v": held_out,
        "TWA-v of the later half": held_out,
    }
    for share, learning_share in HEADS.items():
        name, chosen = f"{share:.0%}", snapshots[: round(share * len(snapshots))]
        learning = {"steps": round(learning_share * share * steps), "evaluations": 8}
        for kind, options in rows.items():
            of = chosen[len(chosen) // 2 :] if kind.endswith("later half") else chosen
            start = time.perf_counter()
            twa.finish(trainer, of, start="greedy", **common, **learning, **options)
            found[f"{name}: {kind}"] = scores() | {"seconds": time.perf_counter() - start}
        soup = twa.Soup(chosen)
        fixed = {"last snapshot": twa.one_hot(len(soup) - 1, soup.labels), "SWA": twa.uniform(soup.labels)}
        fixed["SWA of the later half"] = twa.last_k(len(soup) // 2, soup.labels)
        for kind, weights in fixed.items():
            load_merge(model, soup, weights)
            found[f"{name}: {kind}"] = scores()
    return found


def main() -> None:
    """Run all seeds and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=30, help="of the full run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pairs", type=int, default=6_000, help="of the 29,000 that train")
    parser.add_argument("--twa-lr", type=float, default=0.03)
    args = parser.parse_args()
    table = against("full", BLEU="BLEU", loss="test loss", validation_loss="validation loss")
    found = report(args, "translation", lambda seed: run(args, seed), table)
    plot_differences(
        {"": less(found, "BLEU", "full")}, "BLEU less that of the full run", args.output / "translation.png"
    )


if __name__ == "__main__":
    main()
