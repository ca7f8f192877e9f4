"""How transformers learns of the quantisation method "qoq", whichever of the two packages is imported first.

transformers looks methods up in two tables of ``transformers.quantizers.auto``, knows no entry points, and makes random
weights for a folder whose method it does not find. Importing it here would make ``import qoqlab`` slow, so a finder waits
for that one module: it lets the others find it, fills the tables in as soon as it has run, and is gone. The standard
library has no such hook (PEP 369 was withdrawn). Entries are stand-ins until they are called: at that moment transformers
is half imported, and `hf_quantizer`, which needs all of it, puts the real ones in their place.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every `import qoqlab` pays for what is imported here
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

METHOD = "qoq"
TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Enter the method into transformers' tables: now where they are there, otherwise once they are imported."""
    module = sys.modules.get(TABLES)
    if module is not None and hasattr(module, "AUTO_QUANTIZER_MAPPING"):
        _fill(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """An entry of ``sys.meta_path`` that finds nothing itself; see the module."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that others find, with `_fill` after the module's own code."""
        if name != TABLES:
            return None
        from importlib.util import find_spec

        with contextlib.suppress(ValueError):  # two threads may come here
            sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_fill(module: ModuleType) -> None:
                run(module)
                _fill(module)

            with contextlib.suppress(AttributeError):  # an unusual loader; then `qoqlab.QoQConfig` must be named first
                spec.loader.exec_module = run_and_fill  # type: ignore[method-assign]
        return spec


def _fill(module: ModuleType) -> None:
    """Stand-ins, where nothing has the name yet; `hf_quantizer` complains of somebody else's."""
    module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    module.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)


class _Config:
    """Stands for `hf_quantizer.QoQConfig`."""

    @staticmethod
    def from_dict(entries: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What transformers asks a configuration class for."""
        return _real().QoQConfig.from_dict(entries, *args, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Stands for `hf_quantizer.QoQHfQuantizer`."""
    return _real().QoQHfQuantizer(*args, **kwargs)


def _real() -> ModuleType:
    return importlib.import_module(".hf_quantizer", __package__)
