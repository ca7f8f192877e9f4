"""A quantisation run that was killed continues after the last finished block, to the very same result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qoqlab import quantize
from qoqlab.grids import INT8
from qoqlab.pipeline import QuantizedModel
from qoqlab.recipes import PROGRESSIVE, Recipe, Step
from qoqlab.schemes import Scheme
from qoqlab.steps import rotate
from qoqlab.tensorfile import CheckpointError

from .families import FAMILIES, cast_parameters, random_ids, wide
from .quick import QUICK

IDS = random_ids(4, 24)
FILES = ["block-00000.safetensors", "block-00001.safetensors", "block-00002.safetensors", "run.json"]


class Killed(Exception):
    pass


def killed_after(finished: int):
    """A progress function that ends the run when ``finished`` blocks are done."""

    def progress(blocks):
        for block in blocks:
            if block.index == finished:
                raise Killed
            yield block

    return progress


def recipe_that_counts(calls: list[int]) -> Recipe:
    """A recipe of one step that notes the blocks on which it runs."""

    def note(context) -> None:
        calls.append(context.block.index)

    note.__name__ = "note"
    return Recipe("counting", Scheme(PROGRESSIVE, INT8), (Step(rotate), Step(note)))


def require_same(result: QuantizedModel, expected: QuantizedModel) -> None:
    ours, theirs = result.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])] == []
    columns = ["stage", "layer", "weight_mse", "weight_nmse", "output_sqnr_db"]
    assert result.report[columns].equals(expected.report[columns])
    with torch.no_grad():
        assert torch.equal(result.model(IDS).logits, expected.model(IDS).logits)


@pytest.mark.parametrize(
    ("family", "preset"),
    [*((family, QUICK) for family in FAMILIES), ("qwen2", "qoq-per-channel"), ("llama", "rtn-w8a8")],
)
def test_a_killed_run_continues_to_the_same_result(family: str, preset: str | Recipe, tmp_path: Path) -> None:
    model = cast_parameters(wide(family, num_hidden_layers=3), torch.bfloat16)
    with pytest.raises(Killed):
        quantize(model, preset, IDS, progress=killed_after(2), resume=tmp_path)
    assert sorted(os.listdir(tmp_path)) == [FILES[0], FILES[1], FILES[3]]
    result = quantize(model, preset, IDS, progress=False, resume=tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    require_same(result, quantize(model, preset, IDS, progress=False))
    require_same(quantize(model, preset, IDS, progress=False, resume=tmp_path), result)  # all blocks from the folder


def test_finished_blocks_are_not_quantised_again(tmp_path: Path) -> None:
    model, calls = wide("llama", num_hidden_layers=3), []
    recipe = recipe_that_counts(calls)
    with pytest.raises(Killed):
        quantize(model, recipe, IDS, progress=killed_after(1), resume=tmp_path)
    assert calls == [0]
    quantize(model, recipe, IDS, progress=False, resume=tmp_path)
    assert calls == [0, 1, 2]


def test_without_calibration(tmp_path: Path) -> None:
    model = wide("llama", num_hidden_layers=3)
    recipe = Recipe("data-free", Scheme(PROGRESSIVE, INT8), (Step(rotate),))
    with pytest.raises(Killed):
        quantize(model, recipe, progress=killed_after(2), resume=tmp_path)
    require_same(quantize(model, recipe, progress=False, resume=tmp_path), quantize(model, recipe, progress=False))


def test_a_step_that_looks_at_data_needs_calibration() -> None:
    with pytest.raises(ValueError, match=r"calibration: recipe 'qoq-g128' needs tokens \[n, length\], got None"):
        quantize(wide("llama"), "qoq-g128", progress=False)


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    quantize(wide("llama"), QUICK, IDS, progress=False, resume=tmp_path)
    other = wide("llama", seed=1)
    with pytest.warns(UserWarning, match=r"block-0000\d\.safetensors: belongs to other weights"):
        result = quantize(other, QUICK, IDS, progress=False, resume=tmp_path)
    require_same(result, quantize(other, QUICK, IDS, progress=False))


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({"model": wide("llama", num_hidden_layers=1)}, "model"),
        ({"recipe": "qoq-per-channel"}, "recipe"),
        ({"calibration": random_ids(4, 24, seed=9)}, "calibration"),
        ({"report": False}, "report"),
    ],
)
def test_a_folder_of_another_run_is_refused(change: dict, entry: str, tmp_path: Path) -> None:
    call = {"model": wide("llama"), "recipe": "rtn-w8a8", "calibration": IDS, "progress": False, "resume": tmp_path}
    quantize(**call)
    with pytest.raises(ValueError, match=rf"resume: .* holds another run \(its {entry} differs\)"):
        quantize(**(call | change))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"resume: .* holds files, and no run\.json of a run"):
        quantize(wide("llama"), "rtn-w8a8", progress=False, resume=tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    quantize(wide("llama"), "rtn-w8a8", IDS, progress=False, resume=tmp_path)
    path = tmp_path / FILES[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors.*delete it to quantise the block again"):
        quantize(wide("llama"), "rtn-w8a8", IDS, progress=False, resume=tmp_path)
    path.unlink()
    quantize(wide("llama"), "rtn-w8a8", IDS, progress=False, resume=tmp_path)


def test_leftovers_of_a_kill_in_mid_write_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".block-00000.safetensors.1234abcd.partial"
    leftover.write_bytes(b"half")
    quantize(wide("llama"), "rtn-w8a8", progress=False, resume=tmp_path)
    assert not leftover.exists()
