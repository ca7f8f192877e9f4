"""qoqlab makes the QServe paper (arXiv 2405.04532) executable: QoQ quantisation of language models, stage by stage.

The short way: ``model, tokenizer = load_tiny()``, then ``quantize(model, "qoq-g128", calibration=ids)`` and ``perplexity``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import registration as _registration

if TYPE_CHECKING:  # static readers see plain imports, Python loads lazily
    from .attention import Mode as Mode
    from .bundled import load_text as load_text
    from .bundled import load_tiny as load_tiny
    from .bundled import tokens as tokens
    from .comparison import compare as compare
    from .evaluate import generate as generate
    from .evaluate import perplexity as perplexity
    from .formats import load as load
    from .formats import save as save
    from .hf_quantizer import QoQConfig as QoQConfig
    from .pipeline import QuantizedModel as QuantizedModel
    from .pipeline import quantize as quantize
    from .recipes import Recipe as Recipe
    from .sweeps import sweep as sweep

__version__ = "0.1.0"

#: Public name -> module that defines it; loaded on first use, so that ``import qoqlab`` costs nothing beyond this file.
_EXPORTS = {
    "Mode": "attention",
    "QoQConfig": "hf_quantizer",
    "QuantizedModel": "pipeline",
    "Recipe": "recipes",
    "compare": "comparison",
    "generate": "evaluate",
    "load": "formats",
    "load_text": "bundled",
    "load_tiny": "bundled",
    "perplexity": "evaluate",
    "quantize": "pipeline",
    "save": "formats",
    "sweep": "sweeps",
    "tokens": "bundled",
}
_MODULES = [
    "affine",
    "architecture",
    "arithmetic",
    "attention",
    "baselines",
    "bundled",
    "cached_attention",
    "capture",
    "clipping",
    "comparison",
    "compressed_tensors",
    "deepcompressor",
    "engine",
    "engine_files",
    "evaluate",
    "exact",
    "exercises",
    "formats",
    "gptq",
    "grids",
    "grouped",
    "hadamard",
    "hf",
    "hf_quantizer",
    "kv",
    "offload",
    "online",
    "outliers",
    "packing",
    "paged",
    "parallel",
    "pipeline",
    "progressive",
    "qserve_format",
    "rebuild",
    "recipes",
    "reference",
    "runtime",
    "schemes",
    "steps",
    "sweeps",
    "tensorfile",
    "transforms",
    "viz",
    "widgets",
]

__all__ = [*_EXPORTS, *_MODULES]


_registration.register()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
