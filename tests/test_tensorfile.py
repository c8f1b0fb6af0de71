import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from twa_merge.errors import UserError
from twa_merge.tensorfile import DTYPES, TensorFileWriter, read_header, read_tensor


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    made = {str(dtype): (torch.randn(3, 5) * 10).to(dtype) for dtype in DTYPES.values()}
    return made | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def test_reads_what_the_library_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert header.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(read_tensor(header[name]), expected)


def test_the_library_reads_what_we_write(tmp_path, tensors):
    path = tmp_path / "y.safetensors"
    writer = TensorFileWriter(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    for tensor in tensors.values():
        flat = tensor.reshape(-1)
        writer.append(flat[:4])
        writer.append(flat[4:])
    writer.close()
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_named(tmp_path, tensors, keep):
    path = tmp_path / "cut.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.safetensors: (not a complete|truncated)"):
        read_header(path)


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1]},
        7,
    ],
)
def test_a_lying_header_is_refused(tmp_path, info):
    raw = json.dumps({"x": info}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 8)
    with pytest.raises(UserError, match=r"bad\.safetensors: (corrupt|truncated)"):
        read_header(path)
