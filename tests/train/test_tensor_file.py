"""Files written one tensor at a time are safetensors files like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fasttrain.train.tensor_file import Entry, TensorFile, TensorStream, write_tensors

TENSORS = {
    "matrix": torch.arange(15.0).view(3, 5).t(),  # not contiguous
    "scalar/step": torch.tensor(7.0),
    "half": torch.randn(5).bfloat16(),
    "bytes é": torch.arange(11, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "long": torch.tensor([2**40]),
}


def test_the_file_is_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    write_tensors(TensorStream.of(TENSORS), tmp_path / "x.safetensors")
    theirs = load_file(tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as ours:
        assert set(ours) == set(theirs) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(theirs[name], tensor) and torch.equal(ours[name], tensor)
            assert theirs[name].dtype == ours[name].dtype == tensor.dtype
        with pytest.raises(KeyError):
            ours["other"]


def test_a_value_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    for entry in (Entry("a", torch.float32, (3,)), Entry("a", torch.float64, (2,))):
        with pytest.raises(ValueError, match="a: wanted"):
            write_tensors(TensorStream([entry], iter([torch.zeros(2)])), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"shorter|longer"):
        write_tensors(TensorStream([Entry("a", torch.float32, (2,))], iter([])), tmp_path / "x.safetensors")


def test_a_cut_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(TensorStream.of(TENSORS), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        TensorFile(path)
