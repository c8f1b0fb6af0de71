"""Train a small GPT-2 on WikiText-2 from scratch and keep ten snapshots of the one run.

python experiments/soups/gpt2_wikitext2.py --data DATA --output SOUPS/gpt2-1 --seed 1
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import arguments
from datasets import Dataset, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers import default_data_collator as collate

CONTEXT, VOCAB, STEPS = 128, 4096, 2000


def tokenizer_of(text: Path) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on one file."""
    trained = ByteLevelBPETokenizer()
    trained.train([str(text)], vocab_size=VOCAB, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )  # fmt: skip


def main() -> None:
    """Train and leave `checkpoint-*` folders."""
    args = arguments(__doc__, members=10)
    if (args.output / f"checkpoint-{STEPS}").exists():
        return
    tokenizer = tokenizer_of(args.data / "wikitext-2/train.txt")
    texts = load_dataset("text", data_files={"train": str(args.data / "wikitext-2/train.txt")})["train"]["text"]
    ids = [i for row in tokenizer(list(texts))["input_ids"] for i in (*row, tokenizer.eos_token_id)]
    blocks = [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT, CONTEXT)]
    rows = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    every = STEPS // 2 // args.members
    training = TrainingArguments(
        output_dir=str(args.output), max_steps=STEPS, per_device_train_batch_size=16, learning_rate=1e-3,
        weight_decay=0.01, warmup_steps=100, lr_scheduler_type="constant_with_warmup", save_steps=every,
        save_total_limit=args.members, save_only_model=True, seed=args.seed, report_to=[], use_cpu=True,
        logging_steps=100,
    )  # fmt: skip
    Trainer(
        model=GPT2LMHeadModel(config), args=training, train_dataset=rows, data_collator=collate,
        processing_class=tokenizer,
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
