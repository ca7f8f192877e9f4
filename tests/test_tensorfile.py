"""safetensors files and JSON: the same bytes as the reference implementation reads, and nothing that could harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qoqlab.tensorfile import (
    DTYPES,
    CheckpointError,
    LazyTensors,
    TensorFile,
    digest_of_tensor,
    open_plain,
    read_json,
    staged,
    write_file,
    write_tensors,
)


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    held = {n: torch.randint(0, 100, (3, 5), generator=g).to(dtype) for n, dtype in DTYPES.items()}
    held |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 4), "odd": torch.arange(3, dtype=torch.uint8)}
    return held | {"transposed": torch.arange(6.0).reshape(2, 3).T, 'näme "quoted"': torch.ones(1)}


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header whatever; ``length`` is the one it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_the_reference_implementation_reads_what_is_written(tmp_path: Path) -> None:
    held = tensors()
    table = write_tensors(tmp_path / "a.safetensors", held, {"format": "pt"})
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == held.keys() == table.keys()
    for name, tensor in held.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
        assert DTYPES[table[name]["dtype"]] == tensor.dtype and table[name]["shape"] == list(tensor.shape)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0  # so that data is aligned


def test_what_the_reference_implementation_writes_is_read(tmp_path: Path) -> None:
    held = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(held, tmp_path / "a.safetensors", {"key": "value"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"key": "value"}
        state = LazyTensors([file], {name: digest_of_tensor(tensor) for name, tensor in held.items()})
        assert len(state) == len(held) and set(state) == held.keys()
        for name, tensor in held.items():
            assert state.describe(name) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(state.pop(name), tensor) and name not in state
        with pytest.raises(TypeError):
            state["new"] = torch.ones(1)


def test_tensors_do_not_refer_to_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(1000.0)})
    with TensorFile(tmp_path / "a.safetensors") as file:
        x = file.read("x")
    with open(tmp_path / "a.safetensors", "r+b") as raw:
        raw.truncate(10)
    assert torch.equal(x, torch.arange(1000.0))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(1e5)})
    with TensorFile(tmp_path / "a.safetensors") as file:
        with open(tmp_path / "a.safetensors", "r+b") as raw:
            raw.truncate(200_000)
        with pytest.raises(CheckpointError, match="tensor x: the file ends early"):
            file.read("x")


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensor x: torch.complex64 cannot be stored; expected one of F64, F32"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], b"", "expected a JSON object, got a list"),
        (b"{", b"", "not readable as JSON"),
        (b"\xff\xff", b"", "not readable as JSON"),
        (b"[" * 5000, b"", "not readable as JSON"),
        ({"x": None}, b"", "tensor x: TypeError"),
        ({"x": {}}, b"", "tensor x: KeyError"),
        ({"x": ENTRY | {"dtype": "F8_E4M3"}}, b"1234", "tensor x: KeyError: 'F8_E4M3'"),
        ({"x": ENTRY | {"dtype": ["U8"]}}, b"1234", "tensor x: TypeError"),
        ({"x": ENTRY | {"shape": 4}}, b"1234", "tensor x: TypeError"),
        ({"x": ENTRY | {"shape": "4444"}}, b"1234", "are no sizes"),
        ({"x": ENTRY | {"shape": [4.0]}}, b"1234", "are no sizes"),
        ({"x": ENTRY | {"shape": [True, 4]}}, b"1234", "are no sizes"),
        ({"x": ENTRY | {"shape": [-4]}}, b"1234", "are no sizes"),
        ({"x": ENTRY | {"shape": [2**62, 4]}}, b"1234", "are no sizes"),
        ({"x": ENTRY | {"shape": [2**40, 2**40]}}, b"1234", "4 bytes for U8"),
        ({"x": ENTRY | {"shape": [5]}}, b"1234", "4 bytes for U8"),
        ({"x": ENTRY | {"data_offsets": [0, 4, 8]}}, b"1234", "tensor x: ValueError"),
        ({"x": ENTRY | {"data_offsets": [4, 0]}}, b"1234", "-4 bytes for U8"),
        ({"x": ENTRY | {"data_offsets": [1, 5]}}, b"12345", "begins at byte"),
        ({"x": ENTRY}, b"123", "tensors end at byte"),
        ({"x": ENTRY}, b"12345", "tensors end at byte"),
        ({"x": ENTRY, "y": ENTRY}, b"1234", "begins at byte"),
        ({"x": ENTRY, "y": ENTRY | {"data_offsets": [2, 6]}}, b"123456", "begins at byte"),
        (
            b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
            "twice",
        ),
        ({"__metadata__": 1}, b"", "__metadata__ is not a table of strings"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not a table of strings"),
    ],
)
def test_bad_headers(header: object, data: bytes, message: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message), TensorFile(path):
        pass


@pytest.mark.parametrize("length", [3, 2**20, 2**40, 2**64 - 1])
def test_headers_that_claim_more_than_there_is(length: int, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=rf"header of {length} bytes; truncated or not safetensors"):
        TensorFile(path)
    (tmp_path / "b.safetensors").write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="7 bytes"):
        TensorFile(tmp_path / "b.safetensors")


def test_json_files_of_any_size_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, a JSON file of a checkpoint at most"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_loops_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a: not readable"):
        open_plain(tmp_path / "a")
    with pytest.raises(CheckpointError, match="not readable"):
        open_plain(tmp_path / "nul\0")


def test_folders_and_devices_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not readable|is not a plain file"):
        open_plain(tmp_path)
    if Path("/dev/zero").exists():
        with pytest.raises(CheckpointError, match="/dev/zero: is not a plain file"):
            open_plain(Path("/dev/zero"))


def test_staged_files_replace_others_and_keep_the_rest(tmp_path: Path) -> None:
    for name in ("a", "b", "mine"):
        (tmp_path / name).write_text("old")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "old").write_text("old")
    order = []
    with staged(tmp_path, last="a") as temporary:
        for name in ("a", "b"):
            write_file(temporary / name, b"new")
        (temporary / "deep").mkdir()
        order = sorted(f.name for f in tmp_path.iterdir())
    assert len(order) == 5 and order[0].endswith(".partial")
    assert {f.name: f.read_text() for f in tmp_path.iterdir() if f.is_file()} == {"a": "new", "b": "new", "mine": "old"}
    assert not list((tmp_path / "deep").iterdir())


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyError), staged(folder, last="a") as temporary:
            write_file(temporary / "a", b"new")
            raise KeyError
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "old")]


def test_names_with_wildcards_leave_neighbours_alone(tmp_path: Path) -> None:
    neighbour = tmp_path / ".xy.0.partial"
    neighbour.mkdir()
    with staged(tmp_path / "[x]*", last="a") as temporary:
        write_file(temporary / "a", b"new")
    assert neighbour.is_dir() and (tmp_path / "[x]*" / "a").read_text() == "new"
