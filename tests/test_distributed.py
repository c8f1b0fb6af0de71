"""Real processes over gloo: the coefficients of one process, whatever is shared, and what the processes exchange."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import twa_merge as twa
from benchmarks.traffic import Traffic
from tests import factory
from tests.test_model import BATCHES
from twa_merge import sharding
from twa_merge.evaluation import Evaluation
from twa_merge.learn_config import LearnConfig
from twa_merge.model import MergedModel
from twa_merge.storage import block_maker
from twa_merge.task_custom import module_task
from twa_merge.training import learn

KINDS = ("gpt2", "vit", "t5", "own")
STEPS = 20


class Experts(nn.Module):
    """Hard to spread: a scalar, fewer rows than processes, rows that no K divides, a tensor equal in all members."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.experts = nn.Parameter(torch.randn(2, 8, 12) / 3)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.odd = nn.Parameter(torch.randn(7, 12) / 3)
        self.frozen = nn.Parameter(torch.ones(12))

    def forward(self, x, labels):
        hidden = torch.einsum("bi,eoi->bo", x, self.experts)
        hidden = self.frozen * torch.cat([hidden, x[:, :4]], dim=1).tanh()
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return nn.functional.cross_entropy(self.scale * hidden @ self.odd.t(), labels)


def make_soups(folder):
    """Write a soup of each kind."""
    from safetensors.torch import save_file

    for kind in KINDS:
        (folder / kind).mkdir()
        if kind != "own":
            factory.make_soup(kind, folder / kind)
            continue
        torch.manual_seed(0)
        base = Experts().state_dict()
        for k in range(3):
            member = {n: v + 0.3 * torch.randn(v.shape) * (n != "frozen") for n, v in base.items()}
            (folder / kind / f"member-{k}").mkdir()
            save_file(member, folder / kind / f"member-{k}" / "model.safetensors")


def batch_of(kind, rank, world):
    """Return this process's rows of a batch of eight."""
    if kind == "own":
        generator = torch.Generator().manual_seed(0)
        whole = {"x": torch.randn(8, 12, generator=generator), "labels": torch.arange(8) % 7}
    else:
        whole = {name: torch.cat([v, v.flip(0), v])[:8] for name, v in BATCHES[kind].items()}
    return {name: v[rank::world].contiguous() for name, v in whole.items()}


def learned(folder, kind, shard, rank=0, world=1):
    """Return what twenty steps of SGD give, and what they cost."""
    soup = twa.Soup(sorted((folder / kind).glob("member-*")))
    torch.manual_seed(1)
    module = Experts() if kind == "own" else None
    model = twa.merged_model(soup, module, granularity="layer", storage="float32", shard=shard)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 and shard == "none" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        traffic = Traffic()
        with traffic:
            output = wrapped(**batch_of(kind, rank, world))
            (output if kind == "own" else output.loss).backward()
        if step == 0:
            first = model.twa_coefficients.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    with model.materialized() as whole, torch.no_grad():
        output = whole.eval()(**batch_of(kind, 0, 1))
        assert sharding.is_sharded(whole) == (world > 1 and shard != "none")  # also while weights are gathered
        score = float(output if kind == "own" else output.loss)
    sharding.free_gathered(model.module)  # scoring has left them, for the next batch
    held = [part for _, part in sharding.named_parts(model.module)]
    return {
        "coefficients": model.twa_coefficients.detach().double().tolist(),
        "gradient": first.double().tolist(),
        "score": score,
        "basis": sum(block.nbytes for block in model.basis.blocks.values()),
        "held": sum(p.numel() for p in held),
        "numel": sum(p.numel() for p in model.module.parameters()),
        "calls": dict(traffic.calls),
        "nbytes": dict(traffic.nbytes),
    }


def learned_by_the_loop(folder, shard):
    """Return the table that the built-in loop learns, and what its steps exchange."""
    from accelerate import Accelerator

    soup = twa.Soup(sorted((folder / "own").glob("member-*")))
    model = twa.merged_model(soup, Experts(), granularity="layer", storage="float32", shard=shard)
    whole = batch_of("own", 0, 1)
    data = [{name: value[i] for name, value in whole.items()} for i in range(8)]
    config = LearnConfig(steps=3, batch_size=8, evaluations=1, shard=shard)
    scored = Evaluation(np.ones(1), np.ones(1), [], [], ())
    with Traffic() as traffic:
        run = learn(model, data, module_task(), config, Accelerator(cpu=True), score=lambda: scored)
    return {
        "table": run.tables_EGN[-1].tolist(),
        "size": model.twa_coefficients.numel(),
        "calls": dict(traffic.calls),
        "nbytes": dict(traffic.nbytes),
    }


def _in_each_process(rank, world, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for kind in KINDS:
        for shard in ("none", "basis", "model"):
            found = learned(folder, kind, shard, rank, world)
            (folder / f"{kind}-{shard}-{world}-{rank}.json").write_text(json.dumps(found))
    for shard in ("none", "basis", "model"):
        found = learned_by_the_loop(folder, shard)
        (folder / f"loop-{shard}-{world}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_soups(folder)
    for world in (2, 4):
        torch.multiprocessing.spawn(_in_each_process, args=(world, folder), nprocs=world)
    return folder


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shard", ["none", "basis", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_learns_the_same(runs, kind, shard, world):
    alone = learned(runs, kind, "none")
    expected = torch.tensor(alone["coefficients"])
    assert expected.abs().max() > 1e-3
    scale = expected.norm()
    for rank in range(world):
        found = json.loads((runs / f"{kind}-{shard}-{world}-{rank}.json").read_text())
        assert (torch.tensor(found["coefficients"]) - expected).norm() < 1e-5 * scale
        assert found["score"] == pytest.approx(alone["score"], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_exchanges(runs, kind, world):
    """Replicated, the gradient of the coefficients; sharded, a gather of the weights and a scatter of the gradient."""
    coefficients = torch.tensor(json.loads((runs / f"{kind}-none-{world}-0.json").read_text())["coefficients"]).numel()
    replicated, basis, model = (
        json.loads((runs / f"{kind}-{shard}-{world}-0.json").read_text()) for shard in ("none", "basis", "model")
    )
    assert replicated["calls"] == {"allreduce": 1} and replicated["nbytes"] == {"allreduce": 4 * coefficients}
    weights = 4 * replicated["numel"]
    padded = 1.25 * weights + 4096  # rows that no K divides are padded, which tells in models as small as these
    for found in (basis, model):
        assert set(found["calls"]) == {"allgather_base", "reduce_scatter_base", "allreduce"}
        assert found["nbytes"]["allreduce"] == 4 * coefficients
        assert 0.9 * weights <= found["nbytes"]["reduce_scatter_base"] <= padded
    assert 0.9 * weights <= basis["nbytes"]["allgather_base"] <= padded
    assert 1.2 * weights <= model["nbytes"]["allgather_base"] <= 2 * padded


@pytest.mark.parametrize("world", [2, 4])
def test_what_a_step_of_the_loop_exchanges(runs, world):
    """A count of the samples first; then the gradient, the loss, and whether memory ran out."""
    alone = torch.tensor(learned_by_the_loop(runs, "none")["table"])
    for shard in ("none", "basis", "model"):
        found = json.loads((runs / f"loop-{shard}-{world}-0.json").read_text())
        torch.testing.assert_close(torch.tensor(found["table"]), alone, rtol=1e-3, atol=1e-4)
        calls = 2 if shard == "none" else 3
        assert found["calls"]["allreduce"] == 3 * calls
        if shard == "none":
            assert found["calls"].keys() == {"allreduce"}
            assert found["nbytes"]["allreduce"] == 3 * 4 * (1 + found["size"] + 2)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_process_holds(runs, kind, world):
    whole = learned(runs, kind, "none")
    for shard in ("basis", "model"):
        found = [json.loads((runs / f"{kind}-{shard}-{world}-{r}.json").read_text()) for r in range(world)]
        assert max(f["basis"] for f in found) <= 1.4 * whole["basis"] / world + 4096
        assert max(f["held"] for f in found) <= 1.4 * whole["numel"] / world + 100
        assert sum(f["held"] for f in found) >= whole["numel"]


def layer():
    return nn.Linear(2, 2)


def test_layers_are_found_in_any_nesting_and_those_that_share_weights_stay_together():
    class Whole(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    a, b, c, tied = layer(), layer(), layer(), layer()
    assert sharding.layers_of(Whole(stages=nn.ModuleList([nn.ModuleList([a, b]), nn.ModuleList([c])]))) == [a, b, c]
    assert sharding.layers_of(Whole(inner=Whole(blocks=nn.Sequential(a, nn.ReLU(), b)), head=c)) == [a, b]
    assert sharding.layers_of(Whole(first=nn.ModuleList([a, b]), again=nn.ModuleList([a]))) == [a, b]
    assert sharding.layers_of(Whole(blocks=nn.ModuleList([nn.ModuleList([nn.ModuleList([a])])]))) == [a]
    tied.weight = c.weight
    assert sharding.layers_of(Whole(blocks=nn.ModuleList([a, c, tied]))) == [a]
    assert sharding.layers_of(Whole(blocks=nn.ModuleList([a, c]), head=tied)) == [a]


def test_a_process_may_hold_nothing_of_a_tensor():
    for storage in ("float32", "bfloat16", "int8", "int4"):
        block = block_maker(storage, 3, 100)(0)
        block.combine(torch.ones(3) / 3, torch.empty(0, 5))
        assert torch.equal(block.project(torch.empty(0, 5)), torch.zeros(3))


def test_a_model_that_is_spread_says_how_to_save_it(tmp_path):
    from twa_merge.sharding import ShardedProjection

    soup = twa.Soup(factory.make_soup("gpt2", tmp_path))
    model = twa.merged_model(soup)
    assert isinstance(model, MergedModel) and not model.is_sharded
    object.__setattr__(model, "_projection", ShardedProjection(nn.Linear(1, 1), model.twa_coefficients, set(), print))
    with pytest.raises(twa.UserError, match="spread over processes; save it with"):
        model.save_pretrained(tmp_path / "out")
