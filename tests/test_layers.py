"""Layers: a module imports only from layers above its own, and importing the package stays cheap."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qoqlab"

#: Top to bottom. A module may import from every line above, and from names further left on its own line.
LAYERS = [
    ["grids", "checks", "tensorfile", "progress", "registration", "transfer"],
    ["affine", "packing"],
    ["progressive", "grouped", "kv", "hadamard", "transforms", "exact", "allocator"],
    ["reference", "paged", "arithmetic", "cached_attention"],
    ["schemes", "clipping", "gptq"],
    ["architecture", "online", "attention", "capture", "offload", "bundled"],
    ["sampling", "engine", "runtime", "parallel", "steps", "baselines", "outliers", "recipes", "resume"],
    ["pipeline"],
    ["rebuild", "engine_files", "qserve_format", "deepcompressor", "compressed_tensors"],
    ["formats", "hf", "hf_quantizer", "evaluate"],
    [
        "machines",
        "roofline",
        "prediction",
        "validation",
        "serve.requests",
        "serve.scheduler",
        "serve.server",
        "serve.planner",
        "serve.bench",
        "serve.surface",
        "serve.fleet",
        "sweeps",
        "comparison",
        "viz",
        "viz_serving",
        "viz_explorers",
        "viz_methods",
        "viz_kernels",
        "themes",
        "explorers",
    ],
    ["exercises_kernels", "exercises_methods", "exercises_serving", "exercises"],
    ["widgets"],
    ["tour", "cli", "classroom", "site"],
]
#: Modules that may import plotly.
FIGURES = {
    "viz",
    "viz_serving",
    "viz_explorers",
    "viz_methods",
    "viz_kernels",
    "themes",
    "explorers",
    "widgets",
    "tour",
    "site",
}
ORDER = [name for layer in LAYERS for name in layer]
#: By file below the package; ``serve/fleet.py`` is "serve.fleet".
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"
)


def imports(source, package="qoqlab"):
    """Everything that a module of ``package`` imports anywhere, inside functions too: ``{"qoqlab.kv", "torch.nn", ...}``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = package.split(".")
            above = ".".join(own[: len(own) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (above, node.module or "") if part)
            packages = {"qoqlab", "qoqlab.serve"}
            found |= {f"{base}.{alias.name}" for alias in node.names} if base in packages else {base}
    return found


def source(name):
    """A module's text."""
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")


@functools.cache
def own_imports(name):
    """Names of the package's modules that a module imports."""
    found = imports(source(name), ".".join(["qoqlab", *name.split(".")[:-1]]))
    own = [full.split(".")[1:] for full in found if full.startswith("qoqlab.")]
    return {".".join(parts[: 2 if parts[0] == "serve" else 1]) for parts in own}


@functools.cache
def roots(name):
    """Top-level names of all packages that a module imports."""
    return {full.split(".")[0] for full in imports(source(name))}


def test_the_reader_sees_every_form_of_import():
    text = """
from . import a, b
from .c import x
import qoqlab.d
from qoqlab import e
from qoqlab.f import y
def g():
    from .h import z
    import plotly.express as px
"""
    assert imports(text) == {"plotly.express", *(f"qoqlab.{name}" for name in "abcdefh")}
    deeper = "from .. import a\nfrom ..b import x\nfrom . import c\nfrom .d import y"
    assert imports(deeper, "qoqlab.serve") == {"qoqlab.a", "qoqlab.b", "qoqlab.serve.c", "qoqlab.serve.d"}


def test_every_module_has_a_layer():
    assert len(ORDER) == len(set(ORDER))
    assert set(MODULES) <= set(ORDER)
    assert {"grids", "reference", "pipeline"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_above(name):
    position = ORDER.index(name)
    assert own_imports(name) <= {*ORDER[:position], "__version__"}


def test_only_widgets_imports_ipywidgets():
    assert {name for name in MODULES if roots(name) & {"ipywidgets", "anywidget"}} <= {"widgets"}


def test_only_figures_import_plotly():
    assert {name for name in MODULES if "plotly" in roots(name)} <= FIGURES


def test_only_the_runtime_knows_the_kernels():
    assert {name for name in MODULES if "qoqlab_kernels" in roots(name)} <= {"runtime"}


@pytest.mark.parametrize("modules", ["qoqlab", "qoqlab.reference, qoqlab.gptq, qoqlab.clipping, qoqlab.transforms"])
def test_importing_loads_nothing_heavy(modules):
    heavy = ["plotly", "ipywidgets", "anywidget", "transformers", "numba", "pandas", "qoqlab_kernels"]
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (fresh.stdout.strip(), fresh.returncode) == ("[]", 0), fresh.stderr
