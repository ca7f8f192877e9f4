"""Notebook hygiene: what nbval does not look at. (nbval itself runs the notebooks; see the Makefile.)"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST_BYTES = 1_000_000
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_notebooks():
    assert {
        "00_map",
        "01_outliers",
        "02_progressive_weights",
        "03_smooth_attention",
        "04_rotation_smoothing_reordering",
        "05_clipping_and_gptq",
        "06_whole_model",
        "07_whole_comparison",
        "08_why_w4a8kv4",
        "09_gemm_kernel",
        "10_kv4_kernel",
        "11_your_own_model",
        "12_serving",
    } <= {p.stem for p in NOTEBOOKS}


@each_notebook
def test_is_valid(path):
    nbformat.validate(read(path))


@each_notebook
def test_was_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run notebooks/refresh.py"


@each_notebook
def test_errors_only_in_exercises(path):
    for cell in code_cells(path):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in tags(cell)) == ("exercise" in tags(cell))


@each_notebook
def test_exercises_are_unsolved_stubs_with_a_check_and_a_hint(path):
    cells = read(path).cells
    exercises = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert exercises, "a lesson needs an exercise"
    for index in exercises:
        assert 'raise NotImplementedError("your turn")' in cells[index].source
        assert "exercises.check_" in cells[index].source
        assert "<details><summary>Hint</summary>" in cells[index - 1].source
        assert [o.ename for o in cells[index].outputs if o.output_type == "error"] == ["NotImplementedError"]


@each_notebook
def test_carries_no_widget_state(path):
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert "execution" not in cell.metadata
        assert not any(WIDGET_VIEW in output.get("data", {}) for output in cell.get("outputs", []))


@each_notebook
def test_is_small(path):
    assert path.stat().st_size < LARGEST_BYTES


@each_notebook
def test_few_outputs_are_exempt_from_comparison(path):
    cells = code_cells(path)
    exempt = [c for c in cells if "nbval-ignore-output" in tags(c) or "NBVAL_IGNORE_OUTPUT" in c.source]
    assert len(exempt) * 10 <= len(cells)


@each_notebook
def test_nothing_is_skipped_or_lax(path):
    for cell in code_cells(path):
        assert not re.search(r"NBVAL_SKIP|NBVAL_RAISES|NBVAL_CHECK", cell.source)
        assert not {"nbval-skip", "nbval-raises-exception"} & set(tags(cell))


@each_notebook
def test_needs_no_magic_network_or_interact(path):
    for cell in code_cells(path):
        assert not re.search(r"\binteract(ive)?(_output)?\b|^\s*[%!]|\bpip install\b|https?://", cell.source, re.MULTILINE)
        assert not re.search(r"os\.environ|IN_COLAB|IN_GITHUB", cell.source), "a notebook runs the same way everywhere"


@each_notebook
def test_outputs_name_no_machine(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            plain = [output.get("text", ""), *output.get("traceback", []), output.get("data", {}).get("text/plain", "")]
            assert not re.search(r"/(home|root|srv|mnt|tmp|work|Users)/|[A-Z]:\\|0x[0-9a-f]{8,}", "".join(plain))
            assert output.get("name") != "stderr", "warnings are fixed, not stored"
            assert not re.search(r"np\.(True_|False_|float|int)|tensor\(", "".join(plain)), "print plain numbers"


@each_notebook
def test_anatomy(path):
    cells = read(path).cells
    title = cells[0].source
    assert cells[0].cell_type == "markdown" and title.startswith("# ")
    for part in ("After this notebook you can", "**Paper:**", "**Time:**", "**Needs:**"):
        assert part in title
    assert "import qoqlab" in cells[1].source and "def " not in cells[1].source and "manual_seed(0)" in cells[1].source
    assert "## Recap" in cells[-1].source and cells[-1].cell_type == "markdown"
    assert any("assert " in c.source for c in cells if c.cell_type == "code")


@each_notebook
def test_one_live_figure_and_a_cell_that_moves_it(path):
    sources = [cell.source for cell in code_cells(path)]
    live = [i for i, source in enumerate(sources) if "widgets.explore(" in source]
    assert len(live) == 1, "each FigureWidget sends five megabytes to the browser; use viz.with_slider for more"
    assert "panel.children" in sources[live[0] + 1] and ".value" in sources[live[0] + 1]


@each_notebook
def test_stored_figures_have_titles_and_are_followed_by_words(path):
    cells = read(path).cells
    for index, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                layout = output["data"][PLOTLY]["layout"]
                assert layout["title"]["text"]
                later = cells[index + 1 : index + 3]
                assert any(c.cell_type == "markdown" for c in later), "say what to see"


@each_notebook
def test_relative_links_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", cell.source):
                assert (FOLDER / target).exists(), target
