"""What a snapshot every 100 steps adds to a run of Trainer.

    OMP_NUM_THREADS=1 python benchmarks/snapshots.py

Runs with and without `SnapshotCallback` in turns, of one snapshot each: wall time and processor time of all threads, as
ratios within a turn. The model is BERT-like (all-MiniLM-L6's size, 22.7 M parameters), with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import twa_merge as twa

BATCH, LENGTH = 8, 32


def seconds(folder: Path, steps: int, *, snapshots: bool) -> tuple[float, float, float]:
    """Return wall seconds, processor seconds, and those that training waited for the snapshot."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ids = torch.randint(0, config.vocab_size, (BATCH * steps, LENGTH))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    callbacks = [twa.SnapshotCallback(steps, overwrite=True)] if snapshots else []
    waited = 0.0
    if callbacks:
        take = callbacks[0].on_step_end

        def timed(*arguments: object, **options: object) -> None:
            nonlocal waited
            start = time.perf_counter()
            take(*arguments, **options)  # type: ignore[arg-type]
            waited += time.perf_counter() - start

        callbacks[0].on_step_end = timed  # type: ignore[method-assign,assignment]
    trainer = Trainer(BertForSequenceClassification(config), settings, train_dataset=data, callbacks=list(callbacks))
    wall, processor = time.perf_counter(), time.process_time()
    trainer.train()
    return time.perf_counter() - wall, time.process_time() - processor, waited


def main() -> None:
    """Print the ratios of all turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    walls, processors, waits = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        seconds(Path(folder), 5, snapshots=True)  # what is loaded at first
        for turn in range(args.turns):
            runs = {
                kept: seconds(Path(folder), args.steps, snapshots=kept) for kept in ((turn % 2 == 0), (turn % 2 == 1))
            }
            walls.append(runs[True][0] / runs[False][0])
            processors.append(runs[True][1] / runs[False][1])
            waits.append(runs[True][2] / runs[False][0])
            print(
                f"turn {turn}: {runs[False][0]:.1f} s without, {runs[True][0]:.1f} s with, training waited "
                f"{1000 * runs[True][2]:.0f} ms",
                flush=True,
            )
    for name, values in (("wall", walls), ("processor", processors)):
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        print(
            f"{name} time with one snapshot in {args.steps} steps: {statistics.median(values):.4f} of that without "
            f"(quartiles {low:.4f} to {high:.4f})"
        )
    print(f"training waits for {100 * statistics.median(waits):.2f} % of its time")


if __name__ == "__main__":
    main()
