"""Files of checkpoints, safetensors and JSON: written so that a kill leaves no half of one, read as if a stranger's.

Reading: plain files inside their folder only; lengths, names, shapes, dtypes and offsets are checked against the file's
size before anything is allocated; tensors are copied out of the file one at a time, so nothing refers to it afterwards.
Nothing is unpickled. Writing: one tensor at a time, into a temporary folder that is renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch

#: safetensors' names of the dtypes that a checkpoint may hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Largest safetensors header and JSON file that are read; a 70B checkpoint's are below 1 MiB.
MAX_TEXT = 64 * 2**20
_PARTIAL = ".partial"


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, damaged, or not of the expected format."""


# --- reading: plain files and JSON ----------------------------------------------------------------------------------------


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file that really lies in its folder, for reading.

    A symbolic link may point within the folder, or into the blob store of a Hugging Face cache that the folder belongs to
    (``.../snapshots/<revision>/file -> .../blobs/<hash>``). Raises CheckpointError for other links, for pipes and devices
    (which could block or never end), and for whatever the system refuses.
    """
    try:
        folder, target = path.parent.resolve(strict=True), path.resolve(strict=True)
        allowed = [folder]
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path}: is a link that leads out of its folder")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe must not block
        file = os.fdopen(os.open(target, flags), "rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: a NUL in the name
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not readable ({error})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a plain file")
    return file


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError; repeated keys, NaN and infinity are refused."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_TEXT:
            raise CheckpointError(f"{path}: has {size} bytes, a JSON file of a checkpoint at most {MAX_TEXT}")
        return parse_json(file.read(MAX_TEXT), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """`read_json` of bytes; ``where`` opens the messages."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys and its spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# --- reading: safetensors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file: ``entries`` by name and ``metadata``; `read` copies one tensor out.

    Stricter than the format asks: tensors must fill the file without gaps, and the file may not be longer than they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_plain(path)
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors read from it stay."""
        self._file.close()

    def _fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not readable as safetensors ({problem})")

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > self.bytes - 8 or length > MAX_TEXT:
            raise self._fail(f"{self.bytes} bytes, header of {length} bytes; truncated or not safetensors")
        header = parse_json(self._file.read(length), f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("__metadata__ is not a table of strings")
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self._fail(f"tensor {name} begins at byte {entry.start}, the one before it ends at {end}")
            end = entry.stop
        if end != self.bytes:
            raise self._fail(f"tensors end at byte {end}, the file has {self.bytes}; truncated or damaged")
        return entries, metadata

    def _entry(self, name: str, value: Any, base: int) -> Entry:
        """Check one tensor's description; integers only, so that nothing overflows or rounds."""
        try:
            dtype, shape, (start, stop) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
            numbers = [*shape, start, stop]
        except (KeyError, TypeError, ValueError) as error:
            raise self._fail(f"tensor {name}: {type(error).__name__}: {error}") from None
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise self._fail(f"tensor {name}: shape {shape} or offsets {[start, stop]} are no sizes")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise self._fail(f"tensor {name}: {stop - start} bytes for {value['dtype']} {shape}")
        return Entry(dtype, tuple(shape), base + start, base + stop)

    def read(self, name: str) -> torch.Tensor:
        """A copy of a tensor. Raises CheckpointError where the file ends early."""
        entry = self.entries[name]
        buffer = bytearray(entry.stop - entry.start)
        self._file.seek(entry.start)
        if self._file.readinto(buffer) != len(buffer):
            raise self._fail(f"tensor {name}: the file ends early")
        if not buffer:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


class LazyTensors(MutableMapping[str, torch.Tensor]):
    """The tensors of some open files, each read, and checked against its digest, when it is asked for.

    ``digests``: SHA-256 by name, of those tensors that have one. Deleting a name only forgets it.
    Raises CheckpointError for a name that two files hold.
    """

    def __init__(self, files: list[TensorFile], digests: Mapping[str, str] | None = None) -> None:
        self._files: dict[str, TensorFile] = {}
        self._digests = digests or {}
        self.size = sum(file.bytes for file in files)
        for file in files:
            for name in file.entries:
                if name in self._files:
                    raise CheckpointError(f"{file.path}: tensor {name} is in {self._files[name].path.name}, too")
                self._files[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._files[name].read(name)
        if name in self._digests and digest_of_tensor(tensor) != self._digests[name]:
            raise CheckpointError(f"{self._files[name].path}: tensor {name}: SHA-256 differs from the noted one; damaged")
        return tensor

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        raise TypeError("LazyTensors: tensors of a file cannot be replaced")

    def __delitem__(self, name: str) -> None:
        del self._files[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, without reading it."""
        entry = self._files[name].entries[name]
        return entry.dtype, entry.shape


def take(
    state: MutableMapping[str, torch.Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> torch.Tensor:
    """Remove and return a tensor, checking what it is before it is read; ``dtype=None`` takes any floating-point type.

    Raises KeyError where it is missing, ValueError where it is something else.
    """
    if name not in state:
        raise KeyError(f"tensor {name} is missing")
    if isinstance(state, LazyTensors):
        has_dtype, has_shape = state.describe(name)
    else:
        has_dtype, has_shape = state[name].dtype, tuple(state[name].shape)
    fits = has_dtype.is_floating_point if dtype is None else has_dtype == dtype
    if has_shape != shape or not fits:
        expected = "float" if dtype is None else dtype
        raise ValueError(f"tensor {name}: expected {expected} {list(shape)}, got {has_dtype} {list(has_shape)}")
    return state.pop(name)


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes, row by row."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


# --- writing --------------------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Write a new safetensors file, one tensor at a time, and flush it to disk.

    Tensors may lie on any device. Returns ``{name: {"dtype", "shape", "sha256"}}``. Raises TypeError for a dtype outside
    `DTYPES`.
    """
    # wide elements first keeps every tensor aligned to its element; names make the order, hence the bytes, reproducible
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    table: dict[str, dict[str, Any]] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise TypeError(f"tensor {name}: {tensor.dtype} cannot be stored; expected one of {', '.join(NAMES.values())}")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**table[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = _bytes(tensors[name].detach().cpu())
            table[name]["sha256"] = hashlib.sha256(data).hexdigest()
            file.write(data)
        _flush(file)
    return table


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it to disk."""
    with open(path, "xb") as file:
        file.write(content)
        _flush(file)


def write_json(path: Path, value: Any) -> None:
    """Write a new JSON file. Raises ValueError for NaN or infinity."""
    write_file(path, json.dumps(value, indent=1, allow_nan=False).encode())


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make a rename durable, where the system can flush folders."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # the rename itself has succeeded, and not every file system can do this
            os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder to write into; when the ``with`` block ends without an error its files become ``folder``'s.

    A folder that is not there yet appears complete or not at all. In one that is there, files of the same name are replaced
    one by one, ``last`` in the end, so a reader that begins with ``last`` never sees a mixture as long as other files do not
    change their content under one name. On an error nothing is changed and nothing left behind.

    Raises NotADirectoryError where ``folder`` is a file.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        there = folder.is_dir()
        if not there and (folder.exists() or folder.is_symlink()):
            raise FileExistsError
    except FileExistsError:
        raise NotADirectoryError(f"folder: {folder} is a file") from None
    if there:
        pattern, place = f".*{_PARTIAL}", folder
    else:
        pattern, place = f".{glob.escape(folder.name)}.*{_PARTIAL}", folder.parent
    for leftover in place.glob(pattern):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    temporary = place / f".{folder.name}.{secrets.token_hex(4)}{_PARTIAL}"
    temporary.mkdir()
    try:
        yield temporary
        _flush_folder(temporary)
        if there:
            for path in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
                _flush_folder(folder)
        else:
            os.rename(temporary, folder)
            _flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
