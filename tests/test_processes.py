"""The command under torchrun: one result for any number of processes, the end of one is the end of all, and resume."""

import time

import pytest
import torch

from tests import factory, processes
from tests.test_cli import write_rows
from twa_merge.cli import main
from twa_merge.mixing import MixingWeights

DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tests.test_processes import ship_what_is_learned
from twa_merge import training
ship_what_is_learned()
step_on = training._Run.step_on
def dying(self, *arguments):
    if os.environ["RANK"] == "1" and self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step_on(self, *arguments)
if "DIE" in os.environ:
    training._Run.step_on = dying
if "SCARCE" in os.environ:
    from twa_merge import batch_scorer, folds, job_model
    learn, score, smaller = folds.learn, batch_scorer._score, job_model.ModelBuilder.smaller_storage
    scarce = [False]
    def learning(*arguments, **options):
        scarce[0] = None if scarce[0] is None else True
        return learn(*arguments, **options)
    def scoring(*arguments):
        if os.environ["RANK"] == "1" and scarce[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return score(*arguments)
    def moving(*arguments):
        scarce[0] = None
        return smaller(*arguments)
    folds.learn, batch_scorer._score, job_model.ModelBuilder.smaller_storage = learning, scoring, moving
from tests.processes import check_left
from twa_merge.cli import main
code = main(sys.argv[1:])
if not {"basis", "model"} & set(sys.argv):  # there, caches of DTensor's hold the process group
    check_left()
sys.exit(code)
"""


def ship_what_is_learned(patch=setattr):
    """Make the last table that was learned the one that is written, however it scores: all others are fixed."""
    from twa_merge import folds, league

    patch(folds, "best_evaluation", lambda runs, samples: min(len(run.curve) for run in runs) - 1)
    patch(league, "choose", lambda found, margin: league.Verdict(next(c for c in found if c.learned), "learned"))


@pytest.fixture(scope="module", autouse=True)
def learned_ships():
    with pytest.MonkeyPatch.context() as patch:
        ship_what_is_learned(patch.setattr)
        yield


def torchrun(folder, arguments, **options):
    """Run the command in several processes."""
    (folder / "driver.py").write_text(DRIVER)
    return processes.torchrun(folder / "driver.py", *arguments, **options)


def table(folder):
    """Return a table that has moved away from the fixed ones."""
    found = MixingWeights.load(folder).table
    assert len(found) > 1 and (found - 1 / found.shape[1]).abs().max() > 0.01
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for member in factory.make_soup("bert", folder / "soup", scale=0.2):
        factory.make_tokenizer(member)
    write_rows(folder / "data/validation.csv", factory.text_rows(40))
    command = ["train", *map(str, sorted((folder / "soup").iterdir())), "--data", str(folder / "data")]
    command += ["--steps", "12", "--batch-size", "8", "--granularity", "layer"]
    assert main([*command, "--output", str(folder / "alone")]) == 0
    return folder, command


@pytest.mark.parametrize("shard", ["none", "basis", "model"])
def test_two_processes_give_what_one_gives(text, tmp_path, shard):
    folder, command = text
    out = tmp_path / "out"
    done = torchrun(tmp_path, [*command, "--shard", shard, "--output", str(out)])
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(table(out), table(folder / "alone"), rtol=1e-3, atol=1e-4)
    assert done.stdout.count("| greedy ") == 1  # one process tells


def test_the_end_of_one_process_is_the_end_of_all_and_one_goes_on(text, tmp_path):
    folder, command = text
    out = tmp_path / "out"
    start = time.monotonic()
    done = torchrun(tmp_path, [*command, "--output", str(out)], DIE="1")
    assert done.returncode != 0 and time.monotonic() - start < 120
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert not out.exists() and (tmp_path / ".out.twa-state").is_dir()
    assert main([*command, "--output", str(out), "--resume"]) == 0
    torch.testing.assert_close(table(out), table(folder / "alone"), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shard, expected", [("none", 0), ("model", 2)])
def test_where_one_process_cannot_score_all_go_on_or_end(text, tmp_path, shard, expected):
    _, command = text
    done = torchrun(tmp_path, [*command, "--shard", shard, "--output", str(tmp_path / "out")], SCARCE="1")
    if expected == 0:
        assert done.returncode == 0, done.stderr
        assert "out of memory with storage float32: going on with bfloat16" in done.stderr
    else:  # the others wait inside the model: there is no going on
        assert done.returncode != 0 and "out of memory with" in done.stderr and not (tmp_path / "out").exists()


def test_one_process_prints_and_writes_what_all_have_scored(text, tmp_path):
    folder, command = text
    members, data = [*map(str, sorted((folder / "soup").iterdir()))], str(folder / "data")
    done = torchrun(tmp_path, ["evaluate", *members, "--data", data])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" accuracy |") == 1
    for method in ("greedy", "uniform"):
        out = tmp_path / method
        command = ["average", *members, "--method", method, "--output", str(out)]
        done = torchrun(tmp_path, [*command, *(["--data", data] if method == "greedy" else [])])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("merged ") == 1 and (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_texts_are_generated_by_a_model_that_is_spread(tmp_path):
    for member in factory.make_soup("t5", tmp_path / "soup"):
        factory.make_tokenizer(member)
    rows = [{"source": f"{row['text']}", "target": row["text"]} for row in factory.text_rows(13)]
    write_rows(tmp_path / "data.csv", rows)
    command = ["train", *map(str, sorted((tmp_path / "soup").iterdir())), "--data", str(tmp_path / "data.csv")]
    command += ["--task", "seq2seq", "--metric", "exact_match", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    command += ["--max-length", "12", "--granularity", "layer"]
    assert main([*command, "--output", str(tmp_path / "alone")]) == 0
    done = torchrun(tmp_path, [*command, "--shard", "model", "--output", str(tmp_path / "spread")])
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(table(tmp_path / "spread"), table(tmp_path / "alone"), rtol=1e-3, atol=1e-4)
