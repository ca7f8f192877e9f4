"""Checkpoints: bit-exact, crash-safe to write, and safe to read whatever is in the folder."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialize

from qoqlab import formats, load, perplexity, quantize, recipes, save, steps
from qoqlab.architecture import describe
from qoqlab.attention import Mode
from qoqlab.formats import MANIFEST, CheckpointError, recipe_from_json, recipe_to_json
from qoqlab.grids import INT4, INT8, UINT8, Zero
from qoqlab.pipeline import QuantizedModel
from qoqlab.rebuild import ROTARY
from qoqlab.recipes import Recipe, Step
from qoqlab.schemes import Scheme, WeightFormat, WeightKind

from .families import FAMILIES, LLAMA3_ROPE, build, cast_parameters, logits, random_ids, relative_error, wide

IDS = random_ids(3, 12)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that takes part in computing (``original_inv_freq`` is a spare copy that transformers keeps)."""
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in everything.items() if not name.endswith("original_inv_freq")}


def assert_same(loaded: QuantizedModel, saved: QuantizedModel) -> None:
    """Every tensor bit for bit, and what is computed from them."""
    a, b = tensors(loaded.model), tensors(saved.model)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert type(loaded.model) is type(saved.model) and not loaded.model.training
    assert loaded.recipe == saved.recipe
    assert torch.equal(logits(loaded.model, IDS), logits(saved.model, IDS))


# --- round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", recipes.names())
def test_round_trip(preset: str, family: str, quantized, tmp_path: Path) -> None:
    saved = quantized(family, preset)
    save(saved, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert_same(loaded, saved)
    assert list(loaded.report.columns) == list(saved.report.columns) and len(loaded.report) == len(saved.report)
    if len(saved.report):
        pd.testing.assert_frame_equal(loaded.report, saved.report, check_dtype=False, rtol=1e-6)
    if saved.recipe.scheme.weights is not None:
        assert perplexity(loaded, IDS, Mode.RUNTIME) == perplexity(saved, IDS, Mode.RUNTIME)


@pytest.mark.parametrize("preset", recipes.names())
def test_round_trip_of_a_16_bit_model(preset: str, tmp_path: Path) -> None:
    """Parameters in bf16, rotary frequencies in fp32, as ``from_pretrained`` makes them; families take turns."""
    family = list(FAMILIES)[recipes.names().index(preset) % len(FAMILIES)]
    model = cast_parameters(wide(family, tied=family == "qwen2"), torch.bfloat16)
    saved = quantize(model, preset, IDS, progress=False)
    save(saved, tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, saved)
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert loaded.model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_of_a_model_cast_before_quantisation(dtype: torch.dtype, tmp_path: Path) -> None:
    """``model.to(dtype)`` casts the rotary frequencies as well; they come back as they were."""
    saved = quantize(wide("llama").to(dtype), "qoq-g128", IDS, progress=False)
    save(saved, tmp_path)
    assert_same(load(tmp_path), saved)


def test_round_trip_of_a_model_cast_after_quantisation(tmp_path: Path) -> None:
    saved = quantize(wide("llama"), "qoq-g128", IDS, progress=False)
    saved.model.to(torch.bfloat16)
    save(saved, tmp_path)
    assert_same(load(tmp_path), saved)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", ["fp16", "rtn-w4a8kv4", "qoq-g128"])
def test_ties_come_back(preset: str, tied: bool, tmp_path: Path) -> None:
    saved = quantize(wide("llama", tied=tied), preset, IDS, progress=False)
    save(saved, tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, saved)
    expected = tied and preset != "qoq-g128"  # rotation has to untie
    assert describe(loaded.model).tied == describe(saved.model).tied == expected
    assert loaded.model.config.tie_word_embeddings is expected


def test_rope_scaling_comes_back(tmp_path: Path) -> None:
    saved = quantize(wide("llama", rope_parameters=LLAMA3_ROPE), "qoq-g128", IDS, progress=False)
    save(saved, tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, saved)
    assert loaded.model.config.rope_parameters == saved.model.config.rope_parameters
    assert loaded.model.config.rope_parameters["rope_type"] == "llama3"
    long = random_ids(1, 64)
    assert torch.equal(logits(loaded.model, long), logits(saved.model, long))
    plain = quantize(wide("llama"), "fp16")
    assert not torch.equal(loaded.model.model.rotary_emb.inv_freq, plain.model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4, 32, Zero.SCALED), INT4, UINT8),
        Scheme(WeightFormat(WeightKind.PROGRESSIVE_U4, 64), None, None),
        Scheme(WeightFormat(WeightKind.CHANNEL_U4, zero=Zero.SCALED), INT8, None),
        Scheme(WeightFormat(WeightKind.CHANNEL_S8)),
        Scheme(kv=UINT8),
    ],
)
def test_round_trip_of_other_formats(scheme: Scheme, tmp_path: Path) -> None:
    recipe = Recipe("mine", scheme, (Step(steps.rotate, {"values": True}), Step(steps.smooth_output, {"alpha": None})))
    saved = quantize(wide("qwen2"), recipe, IDS, progress=False)
    save(saved, tmp_path)
    assert_same(load(tmp_path), saved)


def test_a_loaded_model_can_be_saved_again(quantized, tmp_path: Path) -> None:
    save(quantized("qwen3", "qoq-g128"), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    assert_same(load(tmp_path / "b"), quantized("qwen3", "qoq-g128"))
    weights = [next((tmp_path / name).glob("weights-*")).read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_loaded_model_generates(quantized, tmp_path: Path) -> None:
    saved = quantized("llama", "qoq-g128")
    save(saved, tmp_path)
    prompt = IDS[:1, :4]
    expected = saved.model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(load(tmp_path).model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_generation_settings_come_back(tmp_path: Path) -> None:
    """A token that ends the text ends it after loading, too."""
    saved = quantize(wide("llama"), "rtn-w4a8kv4", progress=False)
    prompt = IDS[:1, :4]
    free = saved.model.generate(prompt, max_new_tokens=5, do_sample=False)
    saved.model.generation_config.eos_token_id = saved.model.generation_config.pad_token_id = int(free[0, 5])
    expected = saved.model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert expected.shape[1] < free.shape[1]
    save(saved, tmp_path)
    assert torch.equal(load(tmp_path).model.generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_report_numbers_come_back_exactly(tmp_path: Path) -> None:
    """Small errors and infinite ratios (no error at all) included."""
    saved = quantize(wide("llama"), "rtn-w4a8kv4", IDS, progress=False)
    saved.report.loc[0, "weight_mse"] = 1.2345678901234567e-17
    saved.report.loc[0, "output_sqnr_db"] = float("inf")
    saved.report.loc[1, "output_sqnr_db"] = float("nan")
    save(saved, tmp_path)
    pd.testing.assert_frame_equal(load(tmp_path).report, saved.report, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("recipe", [*map(recipes.get, recipes.names()), *recipes.ladder()], ids=lambda r: r.name)
def test_recipes_survive_json(recipe: Recipe) -> None:
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


def test_a_checkpoint_is_small(quantized, tmp_path: Path) -> None:
    save(quantized("llama", "qoq-g128"), tmp_path / "w4")
    save(quantized("llama", "fp16"), tmp_path / "fp")
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in ("w4", "fp")]
    assert sizes[0] < 0.5 * sizes[1]  # fp32 embeddings included


# --- overwriting and interruption -----------------------------------------------------------------------------------------


def test_overwriting_leaves_one_checkpoint(quantized, tmp_path: Path) -> None:
    for preset in ("rtn-w4a8kv4", "qoq-g128", "qoq-g128"):
        save(quantized("llama", preset), tmp_path)
        assert_same(load(tmp_path), quantized("llama", preset))
        assert len(list(tmp_path.iterdir())) == 2


def test_overwriting_leaves_other_files_alone(quantized, tmp_path: Path) -> None:
    strangers = ["notes.txt", "weights-mine.safetensors", "model.safetensors", "weights-0123456789abcdeg.safetensors"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    save(quantized("llama", "rtn-w4a8kv4"), tmp_path)
    save(quantized("llama", "qoq-g128"), tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in strangers)


def test_saving_over_the_folder_a_model_was_loaded_from(quantized, tmp_path: Path) -> None:
    save(quantized("llama", "qoq-g128"), tmp_path)
    loaded = load(tmp_path)
    save(loaded, tmp_path)
    assert_same(load(tmp_path), quantized("llama", "qoq-g128"))


#: Saves a new checkpoint over an old one again and again; each time a child is killed one file operation later. Operations
#: are seen through Python's audit hooks (before they happen) and through fsync (before and after).
KILLED = """
import os, shutil, signal, sys
import torch
from pathlib import Path
from qoqlab import formats
from tests.families import random_ids, wide
from qoqlab import quantize

base = Path(sys.argv[1])
old = quantize(wide("llama", seed=0), "rtn-w4a8kv4", progress=False)
new = quantize(wide("llama", seed=1), "rtn-w4a8kv4-g128", progress=False)
formats.save(old, base / "old")
formats.save(new, base / "new")

def child(folder, stop):
    seen = 0
    def operation(what):
        nonlocal seen
        seen += 1
        if seen > stop:
            (base / (folder.name + ".log")).write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)
    busy = False
    def audit(event, args):
        nonlocal busy
        if busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            return
        if not str(args[0]).startswith(str(folder)):
            return
        busy = True
        operation(event + " " + str(args[0]))
        busy = False
    sync = os.fsync
    def fsync(descriptor):
        operation("before fsync")
        sync(descriptor)
        operation("after fsync")
    os.fsync = fsync
    sys.addaudithook(audit)
    formats.save(new, folder)
    operation("end")
    os._exit(0)

for stop in range(100):
    folder = base / f"run{stop}"
    shutil.copytree(base / "old", folder)
    pid = os.fork()
    if pid == 0:
        child(folder, stop)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    print(stop, (base / f"run{stop}.log").read_text(), flush=True)
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    base = tmp_path_factory.mktemp("interrupted")
    root = Path(formats.__file__).parent.parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(base)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
    )
    assert run.returncode == 0, run.stderr
    return base, run.stdout.splitlines()


def content(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    loaded = load(folder)
    return loaded.recipe.name, tensors(loaded.model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a saving process cheaply")
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(interrupted) -> None:
    base, operations = interrupted
    assert len(operations) >= 8, operations  # two files opened, flushed before and after, renamed, one removed
    contents = {content(base / name)[0]: content(base / name)[1] for name in ("old", "new")}
    found = []
    for stop, operation in enumerate(operations):
        name, held = content(base / f"run{stop}")
        assert held.keys() == contents[name].keys(), operation
        assert all(torch.equal(held[key], contents[name][key]) for key in held), operation
        found.append(name)
    # the old one up to one moment, the new one from then on; that moment is the manifest's rename
    switch = found.index("rtn-w4a8kv4-g128")
    assert found == ["rtn-w4a8kv4"] * switch + ["rtn-w4a8kv4-g128"] * (len(found) - switch)
    renames = [i for i, operation in enumerate(operations) if "os.rename" in operation]
    assert len(renames) == 3 and switch == renames[2] + 1  # weights get their name, then both files their place


def test_a_new_folder_appears_complete_or_not_at_all(quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "new"
    with monkeypatch.context() as patch:
        patch.setattr(formats, "write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            save(quantized("llama", "qoq-g128"), target)
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "deep" / ".new.0123abcd.partial").mkdir()  # of a process that was killed
    save(quantized("llama", "qoq-g128"), target)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["new"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill a saving process cheaply")
def test_a_save_after_a_killed_one_succeeds(interrupted, quantized) -> None:
    base, operations = interrupted
    for stop in range(len(operations)):
        save(quantized("llama", "qoq-g128"), base / f"run{stop}")
        assert_same(load(base / f"run{stop}"), quantized("llama", "qoq-g128"))


@pytest.mark.parametrize("failing", range(1, 5))
@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_an_error_while_saving_leaves_the_old_checkpoint_and_no_litter(
    operation: str, failing: int, quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for example."""
    save(quantized("llama", "rtn-w4a8kv4"), tmp_path)
    calls, original = 0, getattr(os, operation)

    def broken(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, operation, broken)
    # two renames; flushes of two files, then of folders, which not every file system can do
    if failing > 2:
        save(quantized("llama", "qoq-g128"), tmp_path)
        assert_same(load(tmp_path), quantized("llama", "qoq-g128"))
        return
    with pytest.raises(OSError, match="No space left"):
        save(quantized("llama", "qoq-g128"), tmp_path)
    assert_same(load(tmp_path), quantized("llama", "rtn-w4a8kv4"))
    assert len(list(tmp_path.iterdir())) <= 3  # at most a weight file that nothing refers to
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


# --- damaged and hostile folders ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(quantized, tmp_path: Path) -> Path:
    save(quantized("qwen2", "qoq-g128"), tmp_path)
    return tmp_path


def weight_file(folder: Path) -> Path:
    return next(folder.glob("weights-*.safetensors"))


def signed(manifest: dict) -> dict:
    """With the digest that its other entries have."""
    entries = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return {**entries, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(signed(manifest)))


def replace_weights(folder: Path, change) -> None:
    """Other tensors under a valid name, size and digests."""
    path = weight_file(folder)
    state = parse(path.read_bytes())
    change(state)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    path.write_bytes(serialize(state))
    kinds = {torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}
    table = {
        name: {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        }
        for name, tensor in state.items()
    }
    edit_manifest(folder, lambda m: m["weights"].update(bytes=path.stat().st_size, tensors=table))


def test_the_manifest_says_what_the_file_holds(folder: Path) -> None:
    """Digests of single tensors, by other code than ours."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["schema"] == 2 and manifest == signed(manifest)
    held = parse(weight_file(folder).read_bytes())
    assert manifest["weights"]["tensors"].keys() == held.keys()
    for name, entry in manifest["weights"]["tensors"].items():
        assert entry["sha256"] == hashlib.sha256(held[name].numpy().tobytes()).hexdigest()
        assert entry["shape"] == list(held[name].shape)


def test_digests_are_stable(quantized, tmp_path: Path) -> None:
    """The same model gives the same files, so a checkpoint can be compared by its manifest."""
    for name in "ab":
        save(quantized("llama", "qoq-g128"), tmp_path / name)
    files = [sorted((f.name, f.read_bytes()) for f in (tmp_path / name).iterdir()) for name in "ab"]
    assert files[0] == files[1]


def test_checkpoints_of_schema_1_are_read(quantized, tmp_path: Path) -> None:
    """They had one digest for all weights, and none for the manifest."""
    save(quantized("llama", "qoq-g128"), tmp_path)
    payload = weight_file(tmp_path).read_bytes()
    digest = hashlib.sha256(payload).hexdigest()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["weights"] = {"file": weight_file(tmp_path).name, "bytes": len(payload), "sha256": digest}
    del manifest["sha256"], manifest["recipe"]["scheme"]["weights"]["outliers"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"schema": 1}))
    assert_same(load(tmp_path), quantized("llama", "qoq-g128"))
    weight_file(tmp_path).write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load(tmp_path)


def test_truncated_weights(folder: Path) -> None:
    path = weight_file(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{path.name}: has \d+ bytes, the manifest says \d+; truncated or damaged"):
        load(folder)


@pytest.mark.parametrize("where", [0.5, 0.9, 0.999])
def test_a_flipped_bit(where: float, folder: Path) -> None:
    path = weight_file(folder)
    payload = bytearray(path.read_bytes())
    payload[int(where * len(payload))] ^= 1
    path.write_bytes(payload)
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor .*: SHA-256 differs from the noted one; damaged"):
        load(folder)


def test_an_edited_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert '"rms_norm_eps": 1e-06' in text
    (folder / MANIFEST).write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-04'))
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: SHA-256 of its entries differs"):
        load(folder)


@pytest.mark.parametrize("missing", ["manifest", "tensor", "all"])
def test_missing_digests(missing: str, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    if missing == "tensor":
        del manifest["weights"]["tensors"]["model.norm.weight"]["sha256"]
    if missing == "all":
        del manifest["weights"]["tensors"]
    manifest = signed(manifest)
    if missing == "manifest":
        del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"SHA-256 of its entries differs|differ from the manifest's"):
        load(folder)


def test_missing_weights(folder: Path) -> None:
    path = weight_file(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ('{"format": "qoqlab", ', "not readable as JSON"),
        ("[]", "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got a NoneType"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"format": "qoqlab", "schema": 1, "schema": 2}', "not readable as JSON .'schema' occurs twice"),
        ('{"format": "qoqlab", "schema": NaN}', "not readable as JSON .NaN is not a JSON number"),
        ("{}", "not a qoqlab checkpoint"),
        ('{"format": "other", "schema": 1}', "not a qoqlab checkpoint"),
        ('{"format": "qoqlab"}', "schema None, this version reads 1 to 2"),
        ('{"format": "qoqlab", "schema": 3}', "schema 3, this version reads 1 to 2"),
        ('{"format": "qoqlab", "schema": true}', "schema True, this version reads 1 to 2"),
        ('{"format": "qoqlab", "schema": 1}', "entry 'architecture' is missing or not a str"),
        (b"\xff\xfe{".decode("latin-1"), "not readable as JSON"),
    ],
)
def test_broken_manifests(text: str, message: str, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: {message}"):
        load(folder)


@pytest.mark.parametrize("key", ["architecture", "config", "recipe", "report", "weights"])
def test_missing_entries_are_named(key: str, folder: Path) -> None:
    edit_manifest(folder, lambda m: m.pop(key))
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: entry '{key}' is missing or not a"):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
@pytest.mark.parametrize("which", ["weights", "manifest"])
def test_links_out_of_the_folder_are_refused(which: str, folder: Path) -> None:
    path = weight_file(folder) if which == "weights" else folder / MANIFEST
    outside = folder.parent / f"{folder.name}-outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{path.name}: is a link that leads out of its folder"):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_links_inside_a_folder_and_into_a_hub_cache_are_followed(quantized, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    save(quantized("llama", "qoq-g128"), snapshot)
    blobs.mkdir()
    for i, path in enumerate(list(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    assert_same(load(snapshot), quantized("llama", "qoq-g128"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("which", ["weights", "manifest"])
def test_pipes_are_refused_and_do_not_block(which: str, folder: Path) -> None:
    path = weight_file(folder) if which == "weights" else folder / MANIFEST
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{path.name}: is not a plain file"):
        load(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: no such file; is this a folder that qoqlab.save wrote"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=f"absent.*{MANIFEST}: no such file"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"file.*{MANIFEST}"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "../weights-0123456789abcdef.safetensors",
        "/etc/passwd",
        "weights-0123456789abcdef.safetensors\n",
        "weights-0123456789abcdef.safetensors/../../x",
        "sub/weights-0123456789abcdef.safetensors",
        "model.pt",
        "",
        None,
        7,
    ],
)
def test_file_names_cannot_leave_the_folder(name: object, folder: Path) -> None:
    payload = weight_file(folder).read_bytes()
    for place in ("x.safetensors", "weights-0123456789abcdef.safetensors"):
        (folder.parent / place).write_bytes(payload)
    edit_manifest(folder, lambda m: m["weights"].update(file=name))
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: .* is not a weight file's name"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(architecture="GPT2LMHeadModel"), "architecture: 'GPT2LMHeadModel' is not supported"),
        (lambda m: m.update(architecture="os.system"), "architecture: 'os.system' is not supported"),
        (lambda m: m["recipe"].pop("scheme"), "KeyError: 'scheme'"),
        (lambda m: m["recipe"]["scheme"].update(kv="UINT3"), "KeyError: 'UINT3'"),
        (lambda m: m["recipe"]["scheme"]["weights"].update(kind="u2"), "'u2' is not a valid WeightKind"),
        (lambda m: m["recipe"]["scheme"]["weights"].update(group_size=0), "group_size"),
        (lambda m: m["recipe"]["scheme"]["weights"].update(group_size=-128), "group"),
        (lambda m: m["recipe"]["scheme"]["weights"].update(group_size=64), "group_scales: expected"),
        (lambda m: m["recipe"]["scheme"]["weights"].update(group_size="many"), "ValueError"),
        (lambda m: m["recipe"]["steps"].append({"name": "Context", "parameters": {}}), "'Context' is not a step"),
        (lambda m: m["recipe"]["steps"].append({"name": "__builtins__", "parameters": {}}), "is not a step"),
        (lambda m: m["recipe"]["steps"].append({"name": "rotate", "parameters": {"angle": 1}}), "step rotate"),
        (lambda m: m["recipe"]["steps"].append(3), "TypeError"),
        (lambda m: m["config"].update(num_hidden_layers="two"), "num_hidden_layers"),
        (lambda m: m["config"].update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda m: m["config"].update(num_hidden_layers=-1), "num_hidden_layers"),
        (lambda m: m["config"].update(vocab_size=10**15), ""),
        (lambda m: m["config"].update(intermediate_size=10**12), "config: describes"),
        (lambda m: m["config"].update(head_dim=10**12), "config: describes"),
        (lambda m: m["config"].update(hidden_size=10**30), ""),
        (lambda m: m["config"].update(rope_parameters={"rope_type": "nonsense"}), ""),
        (lambda m: m["config"].update(dtype="int8"), "dtype"),
        (lambda m: m["config"].update(dtype="nn"), ""),
        (lambda m: m["config"].update(hidden_size=64), "128x64 is not divisible into groups of 128"),
        (lambda m: m["config"].update(hidden_size=256), "config: describes"),
        (
            lambda m: m["config"].update(hidden_size=2**31),
            r"config: describes \d+ parameters, the tensors there are hold at most",
        ),
        (lambda m: m["config"].update(num_hidden_layers=1), "num_hidden_layers"),
        (lambda m: m["config"].update(num_hidden_layers=1, layer_types=["full_attention"]), "tensors of 2 layers"),
        (lambda m: m["config"].update(num_hidden_layers=3, layer_types=["full_attention"] * 3), "tensors of 2 layers"),
    ],
)
def test_nonsense_in_the_manifest_is_refused(change, message: str, folder: Path) -> None:
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=rf"(?s)({MANIFEST}|{weight_file(folder).name}): .*{message}"):
        load(folder)


Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.1.self_attn.o_proj"  # noqa: E741


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s.update({f"{Q}.codes": s[f"{Q}.codes"][:-1]}), rf"{Q}.*codes: expected", id="codes-rows"),
        pytest.param(lambda s: s.update({f"{Q}.codes": s[f"{Q}.codes"].T}), rf"{Q}.*codes: expected", id="codes-transposed"),
        pytest.param(
            lambda s: s.update({f"{Q}.codes": s[f"{Q}.codes"].view(torch.int8)}), rf"{Q}.*codes: expected", id="int8"
        ),
        pytest.param(
            lambda s: s.update({f"{O}.channel_scales": s[f"{O}.channel_scales"].float()}),
            rf"{O}.*channel_scales: expected torch.float16 \[128\], got torch.float32",
            id="scales-dtype",
        ),
        pytest.param(
            lambda s: s.update({f"{O}.group_scales": s[f"{O}.group_scales"][:, :0]}),
            rf"{O}.*group_scales: expected torch.int8 \[128, 1\], got torch.int8 \[128, 0\]",
            id="group-scales-shape",
        ),
        pytest.param(lambda s: s.pop(f"{O}.group_zeros"), rf"{O}.*group_zeros is missing", id="zeros-missing"),
        pytest.param(lambda s: s.pop("model.norm.weight"), "missing tensors .*model.norm.weight", id="norm-missing"),
        pytest.param(lambda s: s.pop("lm_head.weight"), "missing tensors .*lm_head.weight", id="head-missing"),
        pytest.param(lambda s: s.pop(ROTARY), "tensor .*inv_freq is missing", id="rotary-missing"),
        pytest.param(lambda s: s.update(extra=torch.zeros(1)), "unexpected tensors .*extra", id="extra"),
        pytest.param(
            lambda s: s.update({"model.norm.weight": torch.zeros(64)}),
            r"model.norm.weight: expected float \[128\], got torch.float32 \[64\]",
            id="norm-shape",
        ),
        pytest.param(
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"].to(torch.int32)}),
            r"lm_head.weight: expected float \[128, 128\], got torch.int32",
            id="head-integer",
        ),
        pytest.param(lambda s: s.pop(f"{Q}.bias"), rf"{Q}.*bias", id="bias-missing"),
        pytest.param(lambda s: s.update({f"{Q}.bias": torch.zeros(7)}), rf"{Q}.*bias", id="bias-shape"),
        pytest.param(lambda s: s.update({f"{Q}.bias": torch.zeros(128).int()}), rf"{Q}.*bias", id="bias-integer"),
        pytest.param(lambda s: s.update({f"{O}.bias": torch.zeros(128)}), rf"{O}.*bias", id="bias-unexpected"),
    ],
)
def test_wrong_tensors_under_a_valid_digest(change, message: str, folder: Path) -> None:
    replace_weights(folder, change)
    with pytest.raises(CheckpointError, match=rf"(?s){weight_file(folder).name}: .*{message}"):
        load(folder)


def test_weights_that_are_not_safetensors(folder: Path) -> None:
    payload = b"PK\x03\x04 a pickle in disguise"
    path = weight_file(folder)
    path.write_bytes(payload)
    edit_manifest(folder, lambda m: m["weights"].update(bytes=len(payload)))
    with pytest.raises(CheckpointError, match=rf"{path.name}: not readable as safetensors"):
        load(folder)


def test_a_checkpoint_error_is_a_value_error() -> None:
    assert issubclass(CheckpointError, ValueError)


def test_code_named_in_a_configuration_is_not_run(folder: Path) -> None:
    """Neither classes nor attention kernels, which transformers would fetch from a hub."""
    evil = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "attn_implementation": "evil/kernel"}
    edit_manifest(folder, lambda m: m["config"].update(evil, _attn_implementation="evil/kernel"))
    assert relative_error(logits(load(folder).model, IDS), logits(load(folder).model, IDS)) == 0


# --- folders that cannot be written ---------------------------------------------------------------------------------------


def test_a_folder_that_is_a_file(quantized, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"folder: .*file is a file"):
        save(quantized("llama", "qoq-g128"), tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        save(quantized("llama", "qoq-g128"), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs Linux's /proc, which nobody can write to")
def test_a_folder_that_cannot_be_written(quantized) -> None:
    for path in ("/proc/qoqlab", "/proc"):
        with pytest.raises(OSError, match="proc"):
            save(quantized("llama", "qoq-g128"), path)


def test_only_quantised_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="quantized: expected a QuantizedModel, got LlamaForCausalLM"):
        save(build("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_does_not_change_the_model(quantized, tmp_path: Path) -> None:
    saved = quantized("llama", "qoq-g128")
    before = copy.deepcopy(tensors(saved.model))
    save(saved, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(saved.model).items())


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_files_are_readable_as_the_umask_says(quantized, tmp_path: Path) -> None:
    """A checkpoint on a shared disk is for others to read; temporary files are private, finished ones need not be."""
    before = os.umask(0o022)
    try:
        save(quantized("llama", "qoq-g128"), tmp_path)
    finally:
        os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in tmp_path.iterdir()} == {"0o644"}
