"""The model and the text that come with the project: a real, small Llama and the interpreter's own documentation."""

from __future__ import annotations

import io
import os
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
#: Splits of published texts that serve as ours, best first.
SPLITS = {"calibration": ("train", "valid"), "test": ("test",)}


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
    with quiet():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' loading bar, which says nothing about 30 MB and litters notebooks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_text(name: str, split: str, path: str | os.PathLike[str] | None = None) -> str:
    """Text for calibration or test.

    ``name``:

    - "python-docs", the Python language reference that every interpreter carries (`pydoc_data.topics`), so its text, and
      every number computed from it, depends on the Python version; disjoint topics without shared paragraphs.
    - "wikitext-2", from ``path`` if given (a file, or a folder that holds ``train.txt``, ``valid.txt`` and ``test.txt``, or
      the archive's ``wiki.train.raw`` or ``wiki.train.tokens`` and so on), else through the package ``datasets`` (extra
      ``eval``), which takes it from its cache or downloads it. Lines are joined as published perplexities have them: two
      newlines between rows, a row being a line with its own newline and a blank line an empty row. Papers use the raw
      release; the word-level one has ``<unk>`` for rare words, and other perplexities.
    - the path of a UTF-8 text file, as it is, whatever the split; or of a folder with files named like those above.

    ``split``: "calibration" (files of the training split; where a folder lacks it, of validation) or "test".

    Raises ValueError for other names or splits and text that is not UTF-8, FileNotFoundError for a path or split that is
    not there, ImportError where ``datasets`` is needed and missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected 'calibration' or 'test', got {split!r}")
    if name == "wikitext-2":
        lines = _wikitext_rows(split) if path is None else list(io.StringIO(_read(Path(path), split)))
        return "\n\n".join(line if line.strip() else "" for line in lines)
    if path is not None:
        raise ValueError(f"path: goes with 'wikitext-2', got name {name!r}; to read another text, pass its path as the name")
    if name == "python-docs":
        return _python_docs(split)
    if not isinstance(name, str | os.PathLike) or not os.path.exists(name):
        raise ValueError(f"name: {name!r} is not a text; there is 'python-docs', 'wikitext-2', or the path of a file")
    return _read(Path(name), split)


def _python_docs(split: str) -> str:
    from pydoc_data.topics import topics

    chosen = [
        topics[key] for i, key in enumerate(sorted(topics)) if (i % CALIBRATION_EVERY == 0) == (split == "calibration")
    ]
    if split == "calibration":
        return "\n\n".join(chosen)
    seen = {p.strip() for p in _python_docs("calibration").split("\n\n")}
    kept = [p for text in chosen for p in text.split("\n\n") if len(p.strip()) <= QUOTE or p.strip() not in seen]
    return "\n\n".join(kept)


def _read(path: Path, split: str) -> str:
    """A file, or a split's file in a folder."""
    if path.is_dir():
        names = [name for s in SPLITS[split] for name in (f"{s}.txt", f"wiki.{s}.raw", f"wiki.{s}.tokens")]
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"path: {path} holds no {split} text; looked for {', '.join(names)}")
        path = found
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"path: there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _wikitext_rows(split: str) -> list[str]:
    """WikiText-2's raw release, a row per line."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            'name: "wikitext-2" without a path needs the package datasets; pip install "qoqlab[eval]", or pass path=...'
        ) from None
    return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=SPLITS[split][0])["text"])


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> torch.Tensor:
    """Non-overlapping windows of ``text``: int64 ``[n, length]``; a shorter rest is dropped.

    The text is tokenised as a whole, with the special tokens that the tokenizer puts at its very beginning and nothing at
    the start of later windows. With ``length=2048`` on the test split of WikiText-2 these are the windows of published
    perplexities (GPTQ, SmoothQuant, AWQ, QServe), which drop the rest too; `perplexity` then predicts 2047 tokens of each.

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


def spread(ids: torch.Tensor, windows: int) -> torch.Tensor:
    """At most ``windows`` rows from all over ``ids [n, length]``: neighbouring windows are about the same topic.

    >>> spread(torch.arange(10)[:, None], 3).flatten().tolist()
    [0, 3, 6]
    """
    return ids[:: max(1, len(ids) // windows)][:windows]
