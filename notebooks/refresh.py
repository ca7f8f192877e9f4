"""Run notebooks from top to bottom and store their outputs: ``python notebooks/refresh.py [NAME ...]``.

Running it twice gives byte-identical files: no widget state, timings, counters of the machine or folder names are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMEOUT_S = 600
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def refresh(path: Path) -> None:
    """Execute one notebook in its own folder and write it back."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=TIMEOUT_S, record_timing=False, store_widget_state=False, resources=resources)
    client.widget_registry = {}  # nbclient can wait forever for messages of Output widgets; it needs to track none
    client.execute()
    tidy(notebook)
    nbformat.write(notebook, path)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs between runs or machines."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            output.get("metadata", {}).pop(WIDGET_VIEW, None)
            if output.output_type == "error":
                # the last line says it all; the frames above it name folders
                output.traceback = [f"{output.ename}: {output.evalue}"]


def merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Neighbouring pieces of one stream as one output; where a kernel cuts them is a matter of timing."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> None:
    """Refresh the named notebooks (``solutions/NAME`` for one of a folder), or all of them."""
    for path in (*sorted(HERE.glob("*.ipynb")), *sorted(HERE.glob("*/[!.]*.ipynb"))):
        own = path.relative_to(HERE).with_suffix("").as_posix()
        if not names or own in [name.removesuffix(".ipynb") for name in names]:
            refresh(path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
