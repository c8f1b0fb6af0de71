"""The experiments: each starts, and what they measure with code of their own is right."""

import os
import subprocess
import sys

import pytest
import torch

from tests.processes import ROOT

SCRIPTS = sorted(
    path for path in (ROOT / "experiments").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_starts(script):
    """Its imports are there, and no module of the folder hides another."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script), "--help"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script.name}"), done.stderr


@pytest.fixture
def detection(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    pytest.importorskip("matplotlib")
    import detection

    yield detection
    for name in ("detection", "common"):
        sys.modules.pop(name, None)


def test_average_precision_of_known_detections(detection):
    """Area under the precision envelope, by hand: hits at ranks 1 and 3 of 4 detections, 3 objects."""
    found = [(0.9, True), (0.8, False), (0.7, True), (0.6, False)]
    assert detection.average_precision(found, 3) == pytest.approx((1 + 2 / 3) / 3)
    assert detection.average_precision(found[::-1], 3) == detection.average_precision(found, 3)
    assert detection.average_precision([], 3) == 0
    assert detection.average_precision([(0.5, True)] * 2, 2) == 1


def test_overlap_of_known_boxes(detection):
    boxes = detection.corners(torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.75, 0.5, 0.5, 1.0], [2.0, 2.0, 1.0, 1.0]]))
    assert boxes[0].tolist() == [0, 0, 1, 1]
    assert detection.overlap(boxes[0], boxes).tolist() == pytest.approx([1, 0.5, 0])
