"""The command line: each command is a thin call of the library.

Exit codes: 0 done; 1 a method of `compare` failed; 2 bad input (one line on standard error, no traceback); 130 interrupted.
No model is downloaded: it is "tiny" (the bundled one), "tiny-planted" (the same function with outliers of the size that
large models have), a folder, or a repository that lies in the local Hugging Face cache.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd
    import torch

app = typer.Typer(
    help="Quantise, evaluate, compare, export and inspect language models with qoqlab.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_T = TypeVar("_T", bound=Callable[..., None])
_E = TypeVar("_E", bound=Enum)
_out, _err = Console(), Console(stderr=True)
#: What `compare` prints -> under which name; the file has every column.
_SHOWN = {
    "method": "method",
    "format": "format",
    "perplexity": "ppl",
    "gap": "gap",
    "runtime_perplexity": "runtime",
    "weight_bits": "W bits",
    "kv_bits": "KV bits",
}
#: What a command that was interrupted keeps of its work, if it writes somewhere.
_CONTINUES = {
    "quantize": "The same command continues after the last finished block.",
    "compare": "The same command continues after the last finished method.",
}
TINY, PLANTED = "tiny", "tiny-planted"
BUNDLED = (TINY, PLANTED)
#: Entries of a configuration by which the bundled model and its quantised or planted variants are recognised.
GEOMETRY = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
#: Tokens per window: of published perplexities, and quick on a laptop.
PAPER_LENGTH, TINY_LENGTH = 2048, 512


class Format(Enum):
    """Checkpoint formats of other engines."""

    QSERVE = "qserve"
    COMPRESSED_TENSORS = "compressed-tensors"
    DEEPCOMPRESSOR = "deepcompressor"


Model = Annotated[str, typer.Argument(help='"tiny", "tiny-planted", a folder, or a repository in the local cache.')]
Folder = Annotated[Path, typer.Argument(help="A folder that `qoqlab quantize` or qoqlab.save wrote.")]
Text = Annotated[str, typer.Option(help='"python-docs", "wikitext-2", or the path of a text file or folder.')]
TextPath = Annotated[Path | None, typer.Option(help='Where "wikitext-2" lies; without it the package datasets finds it.')]
Length = Annotated[
    int | None, typer.Option(help="Tokens per window; default: 2048, at most the model's context; the bundled model: 512.")
]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")]


def _plain_errors(command: _T) -> _T:
    """Bad input ends a command with one line and exit code 2, not with a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            _err.print(f"Error: {line}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            continues = _CONTINUES.get(command.__name__) if kwargs.get("out") is not None else None
            _err.print("Interrupted." if continues is None else f"Interrupted. {continues}")
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


# --- commands -------------------------------------------------------------------------------------------------------------


@app.command()
@_plain_errors
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the quantised checkpoint.")],
    recipe: Annotated[str, typer.Option(help="A preset; `qoqlab recipes` lists them.")] = "qoq-g128",
    text: Text = "python-docs",
    text_path: TextPath = None,
    length: Length = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows, from all over the text.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = None,
    report: Annotated[bool, typer.Option(help="Measure the error after every stage.")] = True,
) -> None:
    """Quantise MODEL block by block from disk. Started again after a kill, it continues after the last finished block."""
    from . import formats, offload, pipeline, recipes

    chosen = recipes.get(recipe)
    _require_writable(out)
    if model == PLANTED:  # planting takes the whole model
        network = _load(model, _dtype(dtype, model), _device(device))
    else:
        network = offload.open_model(_folder(model), _dtype(dtype, model), _device(device))
    tokenizer = _tokenizer(model)
    calibration = None
    if pipeline.needs_calibration(chosen) or report:
        calibration = _windows(tokenizer, network, text, "calibration", text_path, length, windows)
    run = out.absolute().with_name(f".{out.name}.run")
    finished = len(list(run.glob("block-*")))
    bar = _bar(chosen.name, f"Continuing after {finished} finished blocks." if finished else None)
    done = pipeline.quantize(network, chosen, calibration, inplace=True, progress=bar, report=report, resume=run)
    formats.save(done, out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(run)
    _out.print(f"{out}: {chosen.scheme}, {done.weight_bytes():,} bytes of weights", highlight=False, soft_wrap=True)


@app.command()
@_plain_errors
def evaluate(
    model: Model,
    text: Text = "python-docs",
    text_path: TextPath = None,
    length: Length = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Test windows, from all over the text; default: all.")] = None,
    mode: Annotated[str, typer.Option(help="simulated, or runtime: what the kernels compute.")] = "simulated",
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer lies, if not beside the model.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task of the lm-evaluation-harness, instead of perplexity.")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
) -> None:
    """Perplexity of MODEL, plain or quantised, or its scores in tasks."""
    from . import evaluate as evaluation
    from .attention import Mode
    from .pipeline import QuantizedModel

    chosen = _member("mode", mode, Mode)
    loaded = _load(model, _dtype(dtype, model), _device(device))
    words = _tokenizer(tokenizer or model)
    if task:
        _show(evaluation.lm_eval(loaded, task, words, tasks_folder, limit, mode=chosen))
        return
    network = loaded.model if isinstance(loaded, QuantizedModel) else loaded
    ids = _windows(words, network, text, "test", text_path, length, windows)
    value = evaluation.perplexity(loaded, ids, chosen)
    count, size = ids.shape
    _out.print(f"{model}: perplexity {value:.4f} ({mode}, {count} windows of {size} tokens of {text})", highlight=False)


@app.command()
@_plain_errors
def compare(
    model: Model = TINY,
    recipe: Annotated[list[str] | None, typer.Option(help="A preset; may be given several times.")] = None,
    preset: Annotated[str | None, typer.Option(help="paper, or ladder: its ablation study.")] = None,
    text: Text = "python-docs",
    calibration_text: Annotated[
        str, typer.Option(help="Text to calibrate on, named as --text is; the bundled one, whatever is tested.")
    ] = "python-docs",
    text_path: TextPath = None,
    length: Length = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    test_windows: Annotated[int | None, typer.Option(min=1, help="Test windows; default: all.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the table there, too (.csv); methods as they finish to the .jsonl of that name."),
    ] = None,
) -> None:
    """Quantise MODEL with several recipes and put their results side by side.

    Who calibrates on the kind of text that is tested wins, so methods are calibrated on Python's documentation unless you
    say otherwise. From a text that both options name, other parts are taken for either; a single file is taken as it is.

    With --out a killed comparison that is started again continues after the last finished method. Exit code 1 where a
    method failed: its row says why, and the others go on.
    """
    from . import recipes

    if bool(recipe) == bool(preset):
        raise ValueError("recipe: give --recipe, once or more, or --preset")
    if preset is not None and preset not in recipes.SUITES:
        raise ValueError(
            f"preset: expected {' or '.join(recipes.SUITES)}, got {preset!r}; single methods are named by --recipe, once or "
            "more, and `qoqlab recipes` lists them"
        )
    if out is not None and out.suffix != ".csv":
        raise ValueError(f"out: expected a name that ends in .csv, got {out.name!r}")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"out: {out.parent} is not a folder")
    from . import comparison

    network = _load(model, _dtype(dtype, model), _device(device))
    words = _tokenizer(model)
    names = (calibration_text, text)
    # the path is for the one that is wikitext-2; where neither is, load_text says so
    paths = [text_path if name == "wikitext-2" or "wikitext-2" not in names else None for name in names]
    calibration = _windows(words, network, calibration_text, "calibration", paths[0], length, windows)
    test = _windows(words, network, text, "test", paths[1], length, test_windows)
    _err.print(
        f"Calibrated on {len(calibration)} windows of {calibration_text}, tested on {len(test)} of {text}.",
        highlight=False,
        soft_wrap=True,
    )
    record = None if out is None else out.with_suffix(".jsonl")
    table = comparison.compare(recipe or str(preset), network, calibration, test, out=record)
    if out is not None:
        table.to_csv(out, index=False)
    # short names, so that nothing is cut off in a terminal of 80 columns
    _show(table[list(_SHOWN)].rename(columns=_SHOWN))
    failed = table[table[comparison.ERROR].notna()]
    for method, error in zip(failed["method"], failed[comparison.ERROR], strict=True):
        _err.print(f"Failed: {method}: {error}", markup=False, highlight=False, soft_wrap=True)
    if len(failed):
        raise typer.Exit(1)


@app.command()
@_plain_errors
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="Whose engines are to read it.")] = Format.QSERVE,
    engine: Annotated[
        str | None, typer.Option(help="With qserve: QServe or SGLang; what it cannot run is an error then, not a warning.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="With compressed-tensors: W8A8, W4A16 or W4A8; default: what the recipe suggests.")
    ] = None,
) -> None:
    """Write a quantised checkpoint in the format of another engine."""
    from . import formats

    if engine is not None and format is not Format.QSERVE:
        raise ValueError(f"engine: goes with format qserve, got {format.value}")
    if layout is not None and format is not Format.COMPRESSED_TENSORS:
        raise ValueError(f"layout: goes with format compressed-tensors, got {format.value}")
    target = None if engine is None else _member("engine", engine, formats.Engine)
    represented = None if layout is None else _member("layout", layout, formats.Layout)
    tokenizer = _tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None
    quantized = formats.load(folder)
    if format is Format.QSERVE:
        formats.export_qserve(quantized, out, tokenizer, target)
    elif format is Format.COMPRESSED_TENSORS:
        formats.export_compressed_tensors(quantized, out, represented, tokenizer)
    else:
        formats.export_deepcompressor(quantized, out, tokenizer)
    _out.print(f"{out}: {format.value}", highlight=False, soft_wrap=True)


@app.command()
@_plain_errors
def inspect(folder: Folder) -> None:
    """Say what a quantised checkpoint holds: recipe, formats, bytes, and the error of every layer."""
    import pandas as pd

    from . import formats

    loaded = formats.load(folder)
    rows = {
        "model": type(loaded.model).__name__,
        "recipe": loaded.recipe.name,
        "formats": str(loaded.recipe.scheme),
        "steps": ", ".join(step.name for step in loaded.recipe.steps) or "none",
        "source": loaded.recipe.source,
        "weight bytes": f"{loaded.weight_bytes():,}",
        "KV bytes per token": f"{loaded.kv_bytes_per_token():,.0f}",
    }
    _show(pd.DataFrame({"": list(rows), "value": list(rows.values())}))
    last = loaded.report.groupby("layer").tail(1)
    if len(last):
        _show(last[["layer", "stage", "weight_nmse", "output_sqnr_db"]])


@app.command("recipes")
@_plain_errors
def list_recipes() -> None:
    """List the presets."""
    import pandas as pd

    from . import recipes

    known = [recipes.get(name) for name in recipes.names()]
    _show(pd.DataFrame({"recipe": [r.name for r in known], "formats": [str(r.scheme) for r in known]}))


# --- parts ----------------------------------------------------------------------------------------------------------------


def _folder(model: str) -> Path:
    from . import bundled, offload

    return bundled.model_folder() if model in BUNDLED else offload.local_folder(model)


def _require_writable(out: Path) -> None:
    """``out`` is free, or holds a checkpoint of ours, which may be replaced. Raises ValueError otherwise."""
    from . import formats

    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists() or path.is_symlink())
    if not place.is_dir():
        raise ValueError(f"out: {place} is a file, expected a folder or a new name")
    if place != out.absolute() or (out / formats.MANIFEST).is_file():
        return
    # what a kill leaves behind may be replaced, too
    others = [p.name for p in out.iterdir() if p.suffix != ".partial" and not p.match("weights-*.safetensors")]
    if others:
        raise ValueError(f"out: {out} holds {min(others)} and no {formats.MANIFEST}; expected an empty folder or a new name")


def _member(option: str, name: str, kind: type[_E]) -> _E:
    """The member of an enum whose value is ``name``, in upper or lower case."""
    known = {member.value.lower(): member for member in kind}
    if name.lower() not in known:
        raise ValueError(f"{option}: expected {' or '.join(str(member.value) for member in kind)}, got {name!r}")
    return known[name.lower()]


def _device(name: str) -> str:
    """The name of a device that is there."""
    import torch

    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return name


def _dtype(name: str | None, model: str) -> torch.dtype | None:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return torch.float32 if model in BUNDLED else None  # as load_tiny has it
    if name not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def _load(model: str, dtype: torch.dtype | None, device: str) -> Any:
    """A plain model or a `QuantizedModel`, whatever the folder holds."""
    from transformers import AutoModelForCausalLM

    from . import bundled, formats, hf_quantizer, outliers
    from .pipeline import QuantizedModel

    if model not in BUNDLED and (Path(model) / formats.MANIFEST).is_file():
        native = formats.load(model)
        return QuantizedModel(native.model.to(device), native.recipe, native.report)
    folder = _folder(model)
    with bundled.quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    if model == PLANTED:
        from .tour import ACTIVATION_RATIO, KEY_RATIO

        loaded = outliers.plant(loaded, ACTIVATION_RATIO, KEY_RATIO)
    loaded = loaded.to(device)
    config = getattr(loaded.config, "quantization_config", None)
    return hf_quantizer.as_quantized(loaded) if isinstance(config, hf_quantizer.QoQConfig) else loaded


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(model) if model not in BUNDLED and Path(model).is_dir() else _folder(model)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: none found in {folder} ({str(error).splitlines()[0]})") from None


def _windows(
    tokenizer: Any, network: Any, text: str, split: str, path: Path | None, length: int | None, windows: int | None
) -> torch.Tensor:
    from . import bundled

    if length is None:
        known = json.loads((bundled.model_folder() / "config.json").read_text(encoding="utf-8"))
        ours = all(getattr(network.config, entry, None) == known[entry] for entry in GEOMETRY)
        length = TINY_LENGTH if ours else PAPER_LENGTH
        length = min(length, int(network.config.max_position_embeddings))
    ids = bundled.tokens(tokenizer, bundled.load_text(text, split, path), length)
    return ids if windows is None else bundled.spread(ids, windows)


def _bar(description: str, note: str | None) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A bar over blocks, below a note: when there are blocks, the folder of finished ones is known to be of this run."""

    def wrap(blocks: Iterable[Any]) -> Iterable[Any]:
        if note:
            _err.print(note, highlight=False)
        return track(list(blocks), description, console=_err)

    return wrap


def _show(table: pd.DataFrame) -> None:
    """A DataFrame as a table on standard output."""
    shown = Table()
    for name in table.columns:
        shown.add_column(str(name), overflow="fold")  # a narrow terminal breaks names, it does not cut them off
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row))
    _out.print(shown)


def main() -> None:
    """Entry point of the command ``qoqlab``."""
    app()
