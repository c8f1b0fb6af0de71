"""Large models on many processes, simulated: what a process holds and what a step exchanges, counted by torch itself.

    python benchmarks/world.py --processes 64 1024 --models llama-8b llama-70b moe-1t

torch's fake process group and fake tensors run the real `fully_shard`, forward and backward pass of process 0 of the
world; nothing is computed, every collective is counted. Ten checkpoints, weights in bfloat16, gradients summed in
float32. Beside each figure the formula in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from traffic import Traffic

from twa_merge import sharding
from twa_merge.groups import group_parameters
from twa_merge.storage import bytes_of

NUM_CHECKPOINTS = 10


def build(name: str) -> torch.nn.Module:
    """Return a model of random, fake weights."""
    import transformers as t

    if name == "moe-1t":
        config: Any = t.DeepseekV3Config(
            hidden_size=7168, num_hidden_layers=61, n_routed_experts=384, num_experts_per_tok=8, n_group=1,
            topk_group=1, moe_intermediate_size=2048, intermediate_size=18432, first_k_dense_replace=1,
            num_attention_heads=64, num_key_value_heads=64, vocab_size=163840,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"  # its shapes do not depend on what is routed where
        return t.DeepseekV3ForCausalLM(config)
    sizes = {
        "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    }[name]
    heads = sizes["hidden_size"] // 128
    config = t.LlamaConfig(num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256, **sizes)
    return t.LlamaForCausalLM(config)


def measure(name: str, world: int, *, layers: bool) -> dict[str, Any]:
    """Simulate a step of process 0."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = init_device_mesh("cpu", (world,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        module = build(name)
        torch.set_default_dtype(torch.float32)
        numel = sum(p.numel() for p in module.parameters())
        units = [sum(p.numel() for p in layer.parameters()) for layer in sharding.layers_of(module)]
        shapes = [tuple(p.shape) for p in module.parameters()]
        sharding.shard(module, mesh, layers=layers)
        dims = [p.placements[0].dim for p in module.parameters()]
        held = sum(part.numel() for _, part in sharding.named_parts(module))
        traffic = Traffic()
        tokens = torch.zeros(1, 16, dtype=torch.long)
        with traffic:
            module(input_ids=tokens, labels=tokens).loss.backward()
    # process 0 holds the largest part of every tensor; the last one, the smallest
    least = 0
    for shape, dim in zip(shapes, dims, strict=True):
        chunk = -(-shape[dim] // world)
        rows = max(0, min(chunk, shape[dim] - chunk * (world - 1)))
        least += torch.Size(shape).numel() // shape[dim] * rows
    names = [n for n, _ in module.named_parameters()]
    return {
        "numel": numel,
        "held": held,
        "least": least,
        "unit": max([*units, numel - sum(units)]),
        "groups": len(group_parameters(names, "tensor")),
        "nbytes": dict(traffic.nbytes),
        "calls": dict(traffic.calls),
    }


def main() -> None:
    """Print a row for each model and world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--models", nargs="+", default=["llama-8b", "llama-70b", "moe-1t"])
    parser.add_argument("--shard", choices=["basis", "model"], default="model")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0], args.processes[0], layers=args.shard == "model")))
        return
    print("| model | K | D | part of D held, most (least) | basis int4, GB | largest unit gathered, GB | "
          "gathered, bytes | scattered, bytes |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in args.models:
        for world in args.processes:
            command = [sys.executable, __file__, "--one", "--models", name, "--processes", str(world)]
            done = subprocess.run([*command, "--shard", args.shard], check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            numel, nbytes = found["numel"], found["nbytes"]
            print(
                f"| {name} | {world} | {numel / 1e9:.2f} G | {found['held'] * world / numel:.4f} "
                f"({found['least'] * world / numel:.4f}) D / K "
                f"| {bytes_of('int4', NUM_CHECKPOINTS, found['held']) / 1e9:.2f} "
                f"| {2 * found['unit'] / 1e9:.2f} | {nbytes['allgather_base'] / numel:.3f} D "
                f"| {nbytes['reduce_scatter_base'] / numel:.3f} D |",
                flush=True,
            )


if __name__ == "__main__":
    main()
