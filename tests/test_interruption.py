"""A full disk, Ctrl-C or a kill in any stage: nothing that looks finished, and a resumed run ends with the same files.

Each run is a process of its own, forked from one that has loaded torch; it is interrupted by a real signal, or by the
kernel refusing to write on.
"""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from tests import factory
from tests.test_cli import write_rows
from twa_merge.publish import publish

STAGES = {
    "header reading": ("twa_merge.tensorfile", "read_header", 2),
    "data": ("twa_merge.job_data", "open_split", 1),
    "basis": ("twa_merge.tensorfile", "read_range", 5),
    "baselines": ("twa_merge.league", "evaluate", 3),
    "first step": ("twa_merge.training", "_Run.step_on", 1),
    "learning": ("twa_merge.training", "_Run.step_on", 8),
    "second fold": ("twa_merge.training", "_Run.step_on", 15),
    "saving state": ("twa_merge.training", "_Run.save", 4),
    "scoring": ("twa_merge.league", "pool", 4),
    "test": ("twa_merge.job", "Job.score_test", 1),
    "writing": ("twa_merge.tensorfile", "TensorFileWriter.append", 10),
    "side files": ("twa_merge.writer", "copy_side_files", 1),
    "report": ("twa_merge.report", "write_report", 1),
    "publishing": ("twa_merge.publish", "check_output", 3),
}
"""Where a run is stopped: at the n-th call of a function."""


@pytest.fixture(scope="module")
def soup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruption")
    for member in factory.make_soup("bert", folder / "soup", scale=0.2):
        factory.make_tokenizer(member)
    write_rows(folder / "data/validation.csv", factory.text_rows(40))
    write_rows(folder / "data/test.csv", factory.text_rows(20, seed=1))
    command = ["train", *map(str, sorted((folder / "soup").iterdir())), "--data", str(folder / "data")]
    command += ["--split", "validation", "--test-split", "test", "--steps", "12", "--batch-size", "8"]
    command += ["--granularity", "layer", "--device", "cpu"]
    assert run([*command, "--output", str(folder / "whole")]) == 0
    return folder, command


def run(command, prepare=lambda: None, stderr=os.devnull):
    """Return the exit code of the command in a forked process; negative: the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(command, prepare, stderr))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _child(command, prepare, stderr):
    import torch

    from twa_merge.cli import main

    torch.set_num_threads(1)
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (lives as long as the process)
    prepare()
    code = main(command)
    sys.stderr.flush()
    os._exit(code)


def interrupt_at(stage, how):
    """Return what makes the process send itself a signal at that stage."""
    module, path, call = STAGES[stage]

    def prepare():
        import importlib

        signal.signal(signal.SIGINT, signal.default_int_handler)
        owner = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), how)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        for other in list(sys.modules.values()):  # where it was imported by name
            if getattr(other, "__name__", "").startswith("twa_merge") and getattr(other, name, None) is original:
                setattr(other, name, counted)

    return prepare


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_stopped_in_any_stage_resumes_to_the_same_files(soup, tmp_path, stage, how):
    folder, command = soup
    out = tmp_path / "out"
    code = run([*command, "--output", str(out)], interrupt_at(stage, how), tmp_path / "stderr")
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130), (tmp_path / "stderr").read_text()
    assert not out.exists()
    assert run([*command, "--output", str(out), "--resume"]) == 0
    for name in ("mixing_weights.safetensors", "model.safetensors"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()
    if how == signal.SIGINT:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "stderr"]


@pytest.mark.parametrize("limit", [0, 1_000, 20_000, 60_000])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing_finished(soup, tmp_path, limit):
    """RLIMIT_FSIZE makes the kernel refuse to write on at this size of a file: state, table, model, pictures."""
    _, command = soup

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
        read, write = os.pipe()  # stderr is a file too: let it pass through a pipe
        if os.fork():
            os.close(write)
            with open(tmp_path / "stderr", "wb") as file:
                while chunk := os.read(read, 4096):
                    file.write(chunk)
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        os.dup2(write, 2)
        os.close(write)
        os.close(read)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    assert run([*command, "--output", str(out)], prepare) == 1
    lines = (tmp_path / "stderr").read_text().strip().splitlines()
    assert len([line for line in lines if line.startswith("twa-merge: ")]) == 1, lines
    assert not out.exists()


def test_an_overwrite_that_is_interrupted_leaves_the_earlier_merge(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mixing_weights.json").write_text("earlier")
    rename = Path.rename

    def interrupted(self, target):
        if ".unfinished-" in self.name and not self.name.endswith(".replaced"):
            raise SystemExit(143)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit), publish(out, overwrite=True) as folder:
        (folder / "mixing_weights.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mixing_weights.json").read_text() == "earlier"
