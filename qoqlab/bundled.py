"""The model and the text that come with the project: a real, small Llama and the interpreter's own documentation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

#: Every third topic of the documentation is calibration text, the others are test text.
CALIBRATION_EVERY = 3
#: Topics quote each other; paragraphs longer than this that calibration text holds are left out of test text.
QUOTE = 80


def model_folder() -> Path:
    """Folder of the bundled checkpoint, in a checkout (``data/model``) or inside an installed wheel.

    Raises FileNotFoundError if neither is there.
    """
    package = Path(str(resources.files("qoqlab")))
    for folder in (package.parent / "data" / "model", package / "_bundled" / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"the bundled model is in neither {package.parent / 'data' / 'model'} nor {package / '_bundled'}"
    )


def load_tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The bundled model and its tokenizer: offline, on the CPU, in fp32 (a laptop's fastest type), in evaluation mode.

    See ``data/model/README.md`` for what it was trained on and what it can and cannot do.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = model_folder()
    with _quiet():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bar, which says nothing about 30 MB and litters notebooks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_text(name: str, split: str) -> str:
    """Text for calibration or test.

    ``name``: "python-docs", the Python language reference that every interpreter carries (`pydoc_data.topics`), so its
    text, and every number computed from it, depends on the Python version. ``split``: "calibration" or "test", disjoint
    topics without shared paragraphs.

    Raises ValueError for other names or splits.
    """
    if name != "python-docs":
        raise ValueError(f"name: {name!r} is not a bundled text; there is 'python-docs'")
    if split not in ("calibration", "test"):
        raise ValueError(f"split: expected 'calibration' or 'test', got {split!r}")
    from pydoc_data.topics import topics

    chosen = [
        topics[key] for i, key in enumerate(sorted(topics)) if (i % CALIBRATION_EVERY == 0) == (split == "calibration")
    ]
    if split == "calibration":
        return "\n\n".join(chosen)
    seen = {p.strip() for p in load_text(name, "calibration").split("\n\n")}
    kept = [p for text in chosen for p in text.split("\n\n") if len(p.strip()) <= QUOTE or p.strip() not in seen]
    return "\n\n".join(kept)


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> torch.Tensor:
    """Non-overlapping windows of ``text``: int64 ``[n, length]``; a shorter rest is dropped.

    Raises ValueError for a length below 2 (perplexity predicts within a window) or a text shorter than one window.
    """
    if not callable(tokenizer) and tokenizer is not None:
        raise TypeError(f"tokenizer: expected a Hugging Face tokenizer, got {type(tokenizer).__name__}")
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    if not isinstance(length, int) or length < 2:
        raise ValueError(f"length: expected an integer of at least 2, got {length!r}")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < length:
        raise ValueError(f"text: has {len(ids)} tokens, fewer than one window of {length}")
    return ids[: len(ids) // length * length].view(-1, length)
