import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medgen.metrics.weights import load_strictly, read_weights
from medgen.provenance import sha256_file
from medgen.types import BadInputError


def test_reads_every_wrapping_of_a_state_dict(tmp_path: Path) -> None:
    plain = {"a.weight": torch.arange(6.0).view(2, 3)}
    torch.save(plain, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in plain.items()}}, tmp_path / "wrapped.pth")
    torch.save({"model": plain, "epoch": 3}, tmp_path / "model.pt")
    save_file(plain, tmp_path / "file.safetensors")
    for path in tmp_path.iterdir():
        weights, digest = read_weights(path)
        assert list(weights) == ["a.weight"]
        assert torch.equal(weights["a.weight"], plain["a.weight"])
        assert digest == sha256_file(path)


class _Code:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.witness,))


def test_never_runs_code_of_a_file_and_refuses_what_are_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    path.write_bytes(pickle.dumps({"a": _Code(tmp_path / "witness")}, protocol=2))
    with pytest.raises(BadInputError, match=r"code\.pth: expected a file of tensors.*Save the state dict alone"):
        read_weights(path)
    assert not (tmp_path / "witness").exists()
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(BadInputError, match="expected tensors by name"):
        read_weights(tmp_path / "mixed.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadInputError, match=r"bad\.safetensors: expected a file of tensors"):
        read_weights(tmp_path / "bad.safetensors")
    with pytest.raises(BadInputError, match=r"none\.pth: expected a weight file, got none there"):
        read_weights(tmp_path / "none.pth")


def test_loads_all_or_says_what_does_not_fit() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = network.state_dict()
    del weights["1.num_batches_tracked"]
    load_strictly(network, weights, "file")
    weights["0.weight"] = torch.zeros(3, 5)
    weights["2.weight"] = weights.pop("1.weight")
    with pytest.raises(
        BadInputError,
        match=r"file: expected all weights .*got 1 missing \(1\.weight\); 1 unknown \(2\.weight\); "
        r"1 of another shape \(0\.weight\)\. Use another file",
    ):
        load_strictly(network, weights, "file")
