import pytest
import torch

from upcycle.util.lazy_tensors import LazyTensors


def test_only_what_is_asked_for_is_read() -> None:
    read: list[str] = []

    def tensor(name: str) -> torch.Tensor:
        read.append(name)
        return torch.ones(len(name))

    tensors = LazyTensors(["b", "aa"], tensor)
    assert list(tensors) == ["b", "aa"]
    assert len(tensors) == 2
    assert "aa" in tensors
    assert "c" not in tensors
    assert not read
    assert tensors["aa"].shape == tensors["aa"].shape == (2,)
    assert read == ["aa", "aa"]


def test_another_name_is_not_read() -> None:
    tensors = LazyTensors(["a"], lambda name: torch.ones(1))
    with pytest.raises(KeyError, match="b"):
        tensors["b"]
    assert tensors.get("b") is None
