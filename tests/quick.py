"""A quick recipe for tests of what surrounds the pipeline: QoQ without its search of clipping ranges."""

from __future__ import annotations

from qoqlab import recipes
from qoqlab.recipes import Recipe


def without_clipping(preset: str = "qoq-g128") -> Recipe:
    """A preset of QoQ without its step ``clip``."""
    full = recipes.get(preset)
    return Recipe(f"{preset} without clipping", full.scheme, tuple(s for s in full.steps if s.name != "clip"), "test")


QUICK = without_clipping()
