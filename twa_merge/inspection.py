"""Are these checkpoints mergeable, and how do they differ?"""

from __future__ import annotations

from typing import Any

import torch

from twa_merge.checkpoints import Soup
from twa_merge.groups import group_parameters
from twa_merge.tensorfile import read_tensor


def inspect_soup(soup: Soup, granularity: str = "layer", *, distances: bool = False) -> dict[str, Any]:
    """Return what headers and configs tell, and with `distances` what the weights do.

    Distances are L2 norms: of each checkpoint from the average, and of the average itself.
    """
    floats = [tensor for tensor in soup.tensors if tensor.is_float]
    names = [(soup.parameters_of(tensor.name) or (tensor.name,))[0] for tensor in floats]
    about: dict[str, Any] = {
        "checkpoints": list(soup.labels),
        "tensors": len(soup.tensors),
        "parameters": sum(tensor.entries[0].numel for tensor in floats),
        "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for t in floats for entry in t.entries}),
        "bytes": sum(tensor.entries[0].nbytes for tensor in soup.tensors),
        "groups": {group: len(members) for group, members in group_parameters(names, granularity).items()},
        "differences": soup.notes,
    }
    if distances:
        about |= _distances(soup)
    return about


def _distances(soup: Soup) -> dict[str, Any]:
    squares = torch.zeros(len(soup), dtype=torch.float64)
    centre_square = 0.0
    for tensor in soup.tensors:
        if not tensor.is_float:
            continue
        centre = torch.zeros(tensor.entries[0].shape, dtype=torch.float64)
        for entry in tensor.entries:
            centre += read_tensor(entry).double() / len(soup)
        centre_square += float(centre.square().sum())
        for k, entry in enumerate(tensor.entries):
            squares[k] += (read_tensor(entry).double() - centre).square().sum()
    norms = squares.sqrt().tolist()
    return {"distance_from_average": dict(zip(soup.labels, norms, strict=True)), "norm_of_average": centre_square**0.5}


def inspection_text(about: dict[str, Any]) -> str:
    """Return the account as lines for a person."""
    count = len(about["checkpoints"])
    lines = [
        f"{count} checkpoint{'s' * (count != 1)} that fit together: {about['parameters']:,} parameters in "
        f"{about['tensors']} tensors, {', '.join(about['dtypes'])}, {about['bytes'] / 1e6:,.1f} MB each"
    ]
    lines += [f"  {label}" for label in about["checkpoints"]]
    lines.append(f"{len(about['groups'])} groups:")
    lines += [f"  {group} ({size} tensor{'s' * (size != 1)})" for group, size in about["groups"].items()]
    if about["differences"]:
        lines += ["harmless differences in configs:", *(f"  {line}" for line in about["differences"])]
    if "distance_from_average" in about:
        lines.append(f"distance from the average (whose norm is {about['norm_of_average']:.4g}):")
        lines += [f"  {label}: {value:.4g}" for label, value in about["distance_from_average"].items()]
    return "\n".join(lines)
