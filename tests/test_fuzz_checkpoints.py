"""Damaged and hostile checkpoints: always a clean error or exactly the saved model, whatever is done to the files."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoModelForCausalLM

from qoqlab import formats, hf_quantizer, load, quantize, save
from qoqlab.architecture import defining
from qoqlab.formats import MANIFEST, CheckpointError
from qoqlab.pipeline import QuantizedModel

from .families import random_ids, wide

FUZZ = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
EXPORTS = {"qserve": (formats.export_qserve, formats.import_qserve)}
PRESET = "rtn-w4a8kv4-g128"


WRITERS = {
    "native": save,
    "qserve": formats.export_qserve,
    "deepcompressor": formats.export_deepcompressor,
    "transformers": hf_quantizer.save_pretrained,
}


@functools.cache
def model() -> QuantizedModel:
    return quantize(wide("qwen2"), PRESET, random_ids(2, 8), progress=False)


@functools.cache
def pristine(kind: str) -> Path:
    """A good checkpoint of each format, kept for the length of the test run."""
    folder = Path(tempfile.mkdtemp()) / kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WRITERS[kind](model(), folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    for kind in WRITERS:
        shutil.rmtree(pristine(kind).parent, ignore_errors=True)
    pristine.cache_clear()


@contextmanager
def damaged(kind: str) -> Iterator[Path]:
    """A copy to spoil."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(pristine(kind), Path(folder) / "copy"))


def load_with_transformers(folder: Path) -> QuantizedModel:
    """Damage that transformers meets before it asks us gets its own error, or leaves a model that is none of ours."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:
        if any(Path(frame.filename).parent.name == "qoqlab" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise CheckpointError("transformers") from error
    try:
        return hf_quantizer.as_quantized(loaded)
    except TypeError as error:
        raise CheckpointError("not ours") from error


READERS = {
    "native": load,
    "qserve": formats.import_qserve,
    "deepcompressor": formats.import_deepcompressor,
    "transformers": load_with_transformers,
}


def contents(q: QuantizedModel) -> dict[str, torch.Tensor]:
    return {**dict(q.model.named_parameters()), **dict(q.model.named_buffers())}


def definition(q: QuantizedModel) -> dict[str, Any]:
    return defining(q.model.config.to_dict()) | {"recipe": formats.recipe_to_json(q.recipe)}


@functools.cache
def expected(kind: str) -> dict[str, torch.Tensor]:
    return contents(READERS[kind](pristine(kind)))


def assert_error_or_same(kind: str, folder: Path, same: bool = True) -> None:
    """The one property: CheckpointError (a ValueError) or, where ``same``, exactly the model that was saved."""
    try:
        loaded = READERS[kind](folder)
    except CheckpointError:
        return
    if same:
        held = contents(loaded)
        assert held.keys() == expected(kind).keys()
        for name, tensor in expected(kind).items():
            assert held[name].dtype == tensor.dtype and torch.equal(held[name], tensor), name
        assert definition(loaded) == definition(READERS[kind](pristine(kind)))


def flip(path: Path, bits: list[float]) -> None:
    raw = bytearray(path.read_bytes())
    for position in bits:
        bit = int(position * 8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def files(kind: str) -> list[str]:
    return sorted(f.name for f in pristine(kind).iterdir())


#: Positions as fractions of a file. Headers are small and at the beginning, so half of the positions lie there.
POSITIONS = st.floats(0, 1, exclude_max=True) | st.floats(0, 0.02)


# --- random damage --------------------------------------------------------------------------------------------------------


@FUZZ
@given(st.data())
def test_flipped_bits_of_native_checkpoints(data: st.DataObject) -> None:
    """Every bit of weights, header and manifest is under a digest, so the loaded model is the saved one or none."""
    with damaged("native") as folder:
        name = data.draw(st.sampled_from(files("native")))
        flip(folder / name, data.draw(st.lists(POSITIONS, min_size=1, max_size=3)))
        assert_error_or_same("native", folder)


@pytest.mark.parametrize("kind", ["qserve", "transformers"])
@FUZZ
@given(st.data())
def test_flipped_bits_of_exports(kind: str, data: st.DataObject) -> None:
    """QServe exports carry digests of their tensors and what their configuration says of the model; transformers folders
    of every tensor, the recipe and what defines the model: the saved model, an error, or none of ours."""
    with damaged(kind) as folder:
        name = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
        flip(folder / name, data.draw(st.lists(POSITIONS, min_size=1, max_size=3)))
        assert_error_or_same(kind, folder)


@settings(FUZZ, max_examples=100)
@given(st.data())
def test_hostile_configurations_of_transformers_folders(data: st.DataObject) -> None:
    """The same for whole entries that are replaced or gone."""
    with damaged("transformers") as folder:
        config = json.loads((folder / "config.json").read_text())
        places = [p for p in paths(config) if "digests" not in p]
        places += [p for p in paths(config) if "digests" in p][:5]
        mutate(config, data.draw(st.sampled_from(places)), data.draw(HOSTILE), data.draw(st.booleans()))
        (folder / "config.json").write_text(json.dumps(config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_error_or_same("transformers", folder)


@FUZZ
@given(kind=st.sampled_from(["qserve", "deepcompressor"]), data=st.data())
def test_flipped_bits_of_foreign_files_raise_nothing_else(kind: str, data: st.DataObject) -> None:
    """Configurations have no digest, so another model may come out, but never another exception."""
    with damaged(kind) as folder:
        flip(folder / data.draw(st.sampled_from(files(kind))), data.draw(st.lists(POSITIONS, min_size=1, max_size=3)))
        assert_error_or_same(kind, folder, same=False)


@FUZZ
@given(kind=st.sampled_from(sorted(READERS)), where=POSITIONS, tail=st.binary(max_size=20), data=st.data())
def test_truncated_and_extended_files(kind: str, where: float, tail: bytes, data: st.DataObject) -> None:
    with damaged(kind) as folder:
        path = folder / data.draw(st.sampled_from(files(kind)))
        raw = path.read_bytes()
        path.write_bytes(raw[: int(where * len(raw))] + tail if data.draw(st.booleans()) else raw + tail)
        assert_error_or_same(kind, folder)


@FUZZ
@given(kind=st.sampled_from(sorted(READERS)), content=st.binary(max_size=200), data=st.data())
def test_files_of_random_bytes(kind: str, content: bytes, data: st.DataObject) -> None:
    with damaged(kind) as folder:
        name = data.draw(st.sampled_from([n for n in files(kind) if n != "generation_config.json"]))
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            READERS[kind](folder)


@pytest.mark.parametrize("kind", READERS)
def test_missing_files(kind: str) -> None:
    for name in files(kind):
        with damaged(kind) as folder:
            (folder / name).unlink()
            if name == "generation_config.json":
                assert_error_or_same(kind, folder)
                continue
            with pytest.raises(CheckpointError):
                READERS[kind](folder)


# --- hostile files: everything under digests that fit ---------------------------------------------------------------------

HOSTILE = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            3,
            16,
            2**31,
            2**63,
            -(2**63),
            2**64,
            10**12,
            10**30,
            0.5,
            -1.5,
            1e300,
            "",
            "x",
            "1",
        ),
        *(
            "../../etc/passwd",
            "/dev/zero",
            "\0",
            "a" * 1000,
            [],
            [1],
            [[]],
            {},
            {"a": 1},
            "float16",
            "torch.float16",
            "os.system",
        ),
        *("kernels-community/flash-attn3", "auto", "mps", [10**12] * 3, {"rope_type": "yarn"}, "LlamaForCausalLM", "UINT4"),
    ]
)


def paths(value: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Where every value of a JSON structure is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


def mutate(value: Any, path: tuple, new: Any, delete: bool) -> None:
    for key in path[:-1]:
        value = value[key]
    if delete:
        del value[path[-1]]
    else:
        value[path[-1]] = copy.deepcopy(new)  # drawn values are shared between examples


def sign(manifest: dict[str, Any]) -> dict[str, Any]:
    entries = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return {**entries, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@functools.cache
def manifest() -> tuple[dict[str, Any], list[tuple]]:
    """The manifest, and where its values are: of tensors' entries and report rows only the first few of each kind."""
    value = json.loads((pristine("native") / MANIFEST).read_text())
    places = [p for p in paths(value) if p[:2] != ("weights", "tensors") and p[0] != "report"]
    some = list(paths(value["weights"]["tensors"], ("weights", "tensors")))[:30]
    return value, [*places, *some, *list(paths(value["report"], ("report",)))[:7]]


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_hostile_manifests(data: st.DataObject) -> None:
    """Any value anywhere: a clean error or a model, and neither memory nor time for what the files do not hold."""
    original, places = manifest()
    changed = copy.deepcopy(original)
    for path in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=2, unique=True)):
        try:
            mutate(changed, path, data.draw(HOSTILE), data.draw(st.booleans()))
        except (KeyError, IndexError, TypeError):  # the first change removed the second one's place
            continue
    with damaged("native") as folder:
        (folder / MANIFEST).write_text(json.dumps(sign(changed)))
        assert_error_or_same("native", folder, same=False)


@settings(FUZZ, max_examples=100)
@given(kind=st.sampled_from(["qserve", "deepcompressor"]), data=st.data())
def test_hostile_configurations(kind: str, data: st.DataObject) -> None:
    with damaged(kind) as folder:
        name = data.draw(st.sampled_from(["config.json", "config.json", "generation_config.json"]))
        config = json.loads((folder / name).read_text())
        path = data.draw(st.sampled_from(list(paths(config))))
        mutate(config, path, data.draw(HOSTILE), data.draw(st.booleans()))
        (folder / name).write_text(json.dumps(config))
        assert_error_or_same(kind, folder, same=False)


@settings(FUZZ, max_examples=150)
@given(kind=st.sampled_from(["native", "qserve"]), data=st.data())
def test_hostile_headers(kind: str, data: st.DataObject) -> None:
    """Wrong shapes, dtypes, offsets, names and lengths; for our own checkpoints beside a manifest that agrees."""
    with damaged(kind) as folder:
        path = next(folder.glob("*.safetensors"))
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        names = sorted(header)
        name = data.draw(st.sampled_from(names))
        action = data.draw(st.sampled_from(["value", "value", "delete", "rename", "duplicate", "swap", "length"]))
        if action == "value":
            place = data.draw(st.sampled_from(list(paths(header[name]))))
            mutate(header[name], place, data.draw(HOSTILE | st.sampled_from(["F32", "I8", "U8", "F64", "BOOL"])), False)
        elif action == "delete":
            del header[name]
        elif action == "rename":
            header[data.draw(st.text(max_size=30))] = header.pop(name)
        elif action == "swap":
            other = data.draw(st.sampled_from(names))
            header[name], header[other] = header[other], header[name]
        text = json.dumps(header)
        if action == "duplicate":
            text = text[:-1] + f', "{name}": {json.dumps(header[name])}}}'
        prefix = data.draw(st.integers(0, 2**64 - 1)) if action == "length" else len(text.encode())
        path.write_bytes(prefix.to_bytes(8, "little") + text.encode() + raw[8 + length :])
        if kind == "native":
            value = json.loads((folder / MANIFEST).read_text())
            value["weights"]["bytes"] = path.stat().st_size
            listed = value["weights"]["tensors"]
            for key in list(listed):
                entry = header.get(key)
                if not isinstance(entry, dict):
                    del listed[key]
                else:
                    listed[key].update({k: v for k, v in entry.items() if k in ("dtype", "shape")})
            (folder / MANIFEST).write_text(json.dumps(sign(value)))
        assert_error_or_same(kind, folder, same=kind == "native")


@pytest.mark.parametrize("kind", ["qserve", "deepcompressor"])
def test_pickles_that_run_code_do_not(kind: str, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    with damaged(kind) as folder:
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.pt").write_bytes(pickle.dumps({"x": Evil()}))
        with pytest.raises(CheckpointError, match=r"model.pt: not readable as tensors"):
            READERS[kind](folder)
        torch.save({"x": Evil()}, folder / "model.pt")
        with pytest.raises(CheckpointError, match=r"model.pt: not readable as tensors"):
            READERS[kind](folder)
    assert not (tmp_path / "ran").exists()


def deflated(path: Path) -> None:
    """The same archive, compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def overlapping(path: Path) -> None:
    """A central directory in which every entry of the archive stands a hundred times."""
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        for index in range(100):
            again = copy.copy(largest)
            again.filename = again.orig_filename = f"{largest.filename}{index}"
            archive.filelist.append(again)
        archive.writestr("last", b"")  # so that the directory is written again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deflated, "has compressed entries, which torch does not write"),
        (overlapping, r"claims [\d,]+ bytes in a file of [\d,]+"),
        (
            lambda path: torch.save(torch.load(path), path, _use_new_zipfile_serialization=False),
            "expected the zip format that torch writes since version 1.6",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["qserve", "deepcompressor"])
def test_files_of_torch_that_could_grow_are_refused_before_they_are_read(
    kind: str, change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with damaged(kind) as folder:
        (folder / "model.safetensors").unlink(missing_ok=True)
        path = folder / "model.pt"
        torch.save({"x": torch.zeros(1 << 20)}, path)
        change(path)
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was read"))
        with pytest.raises(CheckpointError, match=rf"model\.pt: not readable as tensors \(ValueError: {message}"):
            READERS[kind](folder)
