import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from upcycle.errors import ResourceError, UpcycleError, UsageError
from upcycle.models.checkpoint_tensors import SafetensorsReader, read_tensors
from upcycle.targets.files import tensor_file
from upcycle.targets.files.output_file import BUFFER
from upcycle.targets.files.stored import Stored
from upcycle.targets.files.tensor_file import (
    DTYPE_NAMES,
    TensorEntry,
    check_disk,
    write_tensors,
)


def entry(name: str, tensor: torch.Tensor, stack: str | None = None) -> TensorEntry:
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor, stack)


def entries(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [entry(name, tensor) for name, tensor in tensors.items()]


def raw(directory: Path, place: Stored) -> torch.Tensor:
    """The tensor at `place`, read from the bytes of the file."""
    size = place.dtype.itemsize * torch.Size(place.shape).numel()
    data = (directory / place.file).read_bytes()[place.offset : place.offset + size]
    if not data:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(bytearray(data), dtype=place.dtype).reshape(place.shape)


def equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 5, generator=draw),
        "a": torch.randn(4, generator=draw).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "view": torch.randn(4, 6, generator=draw).t(),
        "strided": torch.randn(8, generator=draw)[::2],
    }


def test_safetensors_reads_the_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = write_tensors(tmp_path, entries(tensors))
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(equal(loaded[name], tensors[name]) for name in tensors)
    assert all(equal(raw(tmp_path, stored[name]), tensors[name]) for name in tensors)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    write_tensors(tmp_path, [entry("x", tensor)])
    assert load_file(tmp_path / "model.safetensors")["x"].dtype == dtype
    actual, expected = (t.view(torch.uint8) for t in (read_tensors(tmp_path)["x"], tensor))
    assert torch.equal(actual, expected)


def test_same_content_as_the_writer_of_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2, 2, 2)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path, entries(tensors), stem="ours")
    ours, theirs = (
        (tmp_path / name).read_bytes() for name in ("ours.safetensors", "theirs.safetensors")
    )
    headers = []
    for data in (ours, theirs):
        (length,) = struct.unpack("<Q", data[:8])
        headers.append((json.loads(data[8 : 8 + length]), data[8 + length :]))
    assert headers[0] == headers[1]


def test_header_is_aligned_and_data_follows_in_order_without_gaps(tmp_path: Path) -> None:
    tensors = {f"t{i}" * (i + 1): torch.full((2, i + 1), float(i)) for i in range(8)}
    stored = write_tensors(tmp_path, entries(tensors))
    data = (tmp_path / "model.safetensors").read_bytes()
    offset = 8 + struct.unpack("<Q", data[:8])[0]
    assert offset % 8 == 0
    for name, tensor in tensors.items():
        assert stored[name].offset == offset
        offset += tensor.nbytes
    assert offset == len(data)


def test_same_tensors_same_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, entries(tensors), max_shard_size=100)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_tensor_is_read_once_and_only_in_its_turn(tmp_path: Path) -> None:
    log: list[int] = []
    numbers = BUFFER // 4

    def reader(i: int) -> TensorEntry:
        def read() -> torch.Tensor:
            written = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
            assert written >= i * BUFFER
            log.append(i)
            return torch.full((numbers,), float(i))

        return TensorEntry(f"t{i}", (numbers,), torch.float32, read)

    write_tensors(tmp_path, (reader(i) for i in range(5)), max_shard_size=2 * BUFFER)
    assert log == [0, 1, 2, 3, 4]


def test_elements_start_at_multiples_of_their_size(tmp_path: Path) -> None:
    tensors = {"odd": torch.randn(3).bfloat16(), "four": torch.randn(2), "b": torch.ones(1).bool()}
    stored = write_tensors(tmp_path, entries(tensors))
    assert all(place.offset % place.dtype.itemsize == 0 for place in stored.values())
    assert all(equal(raw(tmp_path, stored[name]), tensors[name]) for name in tensors)


def test_shards_are_named_and_listed_as_hugging_face_does(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    stored = write_tensors(tmp_path, entries(tensors), max_shard_size=800)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"] == {name: place.file for name, place in stored.items()}
    assert [stored[f"t{i}"].file for i in range(5)] == [names[i // 2] for i in range(5)]


@pytest.mark.parametrize("size", [500, 1000, 10**9], ids=["larger-than-a-shard", "next", "all"])
def test_a_stack_is_one_span_of_one_file(size: int, tmp_path: Path) -> None:
    experts = torch.randn(4, 5, 10)
    plan = [entry("before", torch.randn(100))]
    plan += [entry(f"experts.{i}.w", experts[i], "experts.w") for i in range(4)]
    plan += [entry("after", torch.randn(100))]
    stored = write_tensors(tmp_path, plan, max_shard_size=size)
    assert stored["experts.w"].shape == (4, 5, 10)
    assert equal(raw(tmp_path, stored["experts.w"]), experts)
    assert len({stored[f"experts.{i}.w"].file for i in range(4)}) == 1
    loaded = read_tensors(tmp_path)
    assert len(loaded) == 6
    assert all(equal(loaded[e.name], e.read()) for e in plan)


def test_a_large_tensor_gets_its_own_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "big": torch.ones(1000), "c": torch.zeros(10)}
    stored = write_tensors(tmp_path, entries(tensors), max_shard_size=100)
    assert len({place.file for place in stored.values()}) == 3


def test_programming_errors_are_caught(tmp_path: Path) -> None:
    one = entry("x", torch.zeros(2))
    with pytest.raises(ValueError, match="two tensors or stacks"):
        write_tensors(tmp_path, [one, one])
    with pytest.raises(ValueError, match="two tensors or stacks"):
        write_tensors(
            tmp_path,
            [entry("x", torch.zeros(2), "s"), entry("y", torch.zeros(1)), entry("s", one.read())],
        )
    with pytest.raises(ValueError, match="differ in shape"):
        write_tensors(tmp_path, [entry("x", torch.zeros(2), "s"), entry("y", torch.zeros(3), "s")])
    wrong = TensorEntry("x", (3,), torch.float32, lambda: torch.zeros(2))
    with pytest.raises(ValueError, match="declared"):
        write_tensors(tmp_path, [wrong])
    with pytest.raises(UpcycleError, match="cannot hold"):
        write_tensors(tmp_path, [entry("x", torch.zeros(2, dtype=torch.complex128))])


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    too_much = TensorEntry("x", (2**50,), torch.float32, lambda: torch.zeros(1))
    with pytest.raises(ResourceError, match="GB are free"):
        write_tensors(tmp_path, [too_much])
    assert list(tmp_path.iterdir()) == []
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(ResourceError):
        check_disk(tmp_path / "not" / "there", 2**60)


def test_reading_is_lazy(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_tensors(tmp_path, entries(tensors), max_shard_size=60)
    loaded = read_tensors(tmp_path)
    assert set(loaded) == set(tensors)
    assert all(equal(loaded[name], tensors[name]) for name in tensors)
    assert "nothing" not in loaded
    with pytest.raises(KeyError):
        loaded["nothing"]


def two_shards(directory: Path) -> list[Path]:
    write_tensors(
        directory, entries({"a": torch.ones(50), "b": torch.zeros(50)}), max_shard_size=200
    )
    return sorted(directory.glob("*.safetensors"))


def test_another_thread_may_read_another_file_meanwhile(tmp_path: Path) -> None:
    a, b = two_shards(tmp_path)
    meanwhile: list[str] = []

    class Watched(type(a)):  # type: ignore[misc]
        """Something else happens while it is compared."""

        def __ne__(self, other: object) -> bool:
            while meanwhile:
                assert read(meanwhile.pop()).sum() == 0
            return bool(self.as_posix() != str(other))

    read = SafetensorsReader({"a": Watched(a), "b": b})
    assert read("a").sum() == 50
    meanwhile.append("b")
    assert read("a").sum() == 50
    assert not meanwhile


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, entries({"a": torch.ones(50)}))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 5, 30, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UsageError, match=r"model\.safetensors: not a whole safetensors file"):
            read_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = two_shards(tmp_path)
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"{shards[1].name}: the index names this file"):
        read_tensors(tmp_path)


def test_a_wrong_index_is_reported(tmp_path: Path) -> None:
    shards = two_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = shards[1].name
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="says that a is in"):
        read_tensors(tmp_path)
    content["weight_map"]["a"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        UsageError, match=r"names '../model.safetensors', which is not in its directory"
    ):
        read_tensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(UsageError, match="not a JSON object"):
        read_tensors(tmp_path)


def test_pickles_need_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, path)
    for source in (tmp_path, path):
        with pytest.raises(UsageError, match="`allow_pickle=True`"):
            read_tensors(source)
        assert torch.equal(read_tensors(source, allow_pickle=True)["a"], torch.ones(3))


def test_pickles_with_code_are_refused_even_with_the_flag(tmp_path: Path) -> None:
    torch.save({"a": shutil.rmtree}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match="plain tensors"):
        read_tensors(tmp_path, allow_pickle=True)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is it a checkpoint"):
        read_tensors(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        read_tensors(tmp_path / "nothing")


def test_a_large_checkpoint_is_written_past_the_cache_with_the_same_bytes(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, large in (("one", tensor_file.LARGE), ("two", 1)):
        monkeypatch.setattr(tensor_file, "LARGE", large)
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, entries(tensors))
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
