"""Models larger than a device: weights stay on disk, or where accelerate's ``device_map`` put them, until they are due.

`pipeline.quantize` asks for one block at a time: `fetch` makes it real on the device that works on it, `settle` puts the
quantised block, a quarter of the size, where it rests. Results are bit for bit those of a model in memory on that device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .architecture import SUPPORTED, Block, describe, replace_parameter
from .capture import Batch
from .checks import require_finite
from .tensorfile import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass
class Storage:
    """Where a model's tensors come from, are worked on, and rest; attribute ``qoq_storage`` of a model."""

    #: tensors by parameter name, read when asked for
    source: Mapping[str, torch.Tensor]
    #: where a block is worked on
    device: torch.device
    #: where quantised blocks rest
    home: torch.device


class MappedTensors(Mapping[str, torch.Tensor]):
    """The tensors of safetensors files, memory-mapped: nothing is read before it is asked for."""

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._file_of: dict[str, Any] = {}
        for path in files:
            file = _map(Path(path))
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, without reading it."""
        return self._file_of[name].get_slice(name).get_shape()

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, read off an empty slice of it."""
        part = self._file_of[name].get_slice(name)
        return (part[:0] if part.get_shape() else part[...]).dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _map(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"model: there is no {path.name} in {path.parent}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model: {path} is not readable as safetensors ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in one piece or several. Raises ValueError for a damaged index."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside the folder")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model: {index} is not an index of tensors ({error!r})") from None
    return [folder / name for name in names]


def local_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: ``model`` itself, or the local cache's copy of a Hugging Face repository.

    Never touches the network. Raises FileNotFoundError where there is neither.
    """
    path = Path(model)
    if (path / "config.json").is_file():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"model: {str(model)!r} is neither a folder with a config.json nor a repository in the local cache; "
            "nothing is downloaded here"
        ) from None


def open_model(
    model: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    home: torch.device | str | None = None,
) -> nn.Module:
    """A causal language model whose blocks stay on disk until ``quantize(..., inplace=True)`` fetches them, one at a time.

    ``model``: a folder of safetensors, or a repository in the local cache; ``dtype``: None takes the checkpoint's;
    ``device``: where blocks are worked on; ``home``: where embedding, head and quantised blocks rest (None: ``device``).
    Before quantisation the model cannot run.

    Raises FileNotFoundError for a model or file that is not there, TypeError for an unsupported architecture, ValueError for
    a checkpoint that is quantised already, or lacks tensors or has some of other shapes.
    """
    import transformers

    folder = local_folder(model)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {folder} has no usable config.json ({str(error).splitlines()[0]})") from None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: {folder} is quantised already")
    name = (config.architectures or ["?"])[0]
    if name not in SUPPORTED:
        raise TypeError(f"model: {name} is not a supported architecture; supported: {', '.join(SUPPORTED)}")
    config.dtype = dtype or config.dtype or torch.float32
    with torch.device("meta"):
        network = getattr(transformers, name)(config)
    for parameter in network.parameters():  # parameters alone: rotary frequencies stay fp32, as in from_pretrained
        parameter.data = parameter.data.to(config.dtype)
    rotary = network.get_submodule("model.rotary_emb")
    network.set_submodule("model.rotary_emb", type(rotary)(config=config).to(home or device))
    if (folder / "generation_config.json").is_file():
        network.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    network.config.name_or_path = str(model)
    source = MappedTensors(weight_files(folder))
    _require_same(network, source, folder)
    network.qoq_storage = Storage(source, torch.device(device), torch.device(home or device))
    return network.eval()


def _require_same(network: nn.Module, source: MappedTensors, folder: Path) -> None:
    """Every parameter is there in its shape, before any work starts."""
    for name, parameter in network.named_parameters():  # a tied head is listed once, as the embedding
        if name not in source:
            raise ValueError(f"model: {folder} lacks the tensor {name}")
        if source.shape(name) != list(parameter.shape):
            raise ValueError(f"model: {name} is {source.shape(name)} in {folder}, expected {list(parameter.shape)}")


def work_on(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Let `quantize` work on ``device``, a block at a time, while the model itself stays where it is. Returns ``model``."""
    home = next(model.parameters()).device
    model.qoq_storage = Storage({}, torch.device(device), home)  # type: ignore[assignment]
    return model


# --- what the pipeline calls ----------------------------------------------------------------------------------------------


@dataclass
class Residence:
    """How a model was spread over devices before `enter`, so that `leave` can spread the quantised one likewise."""

    storage: Storage | None
    device_map: dict[str, Any] = field(default_factory=dict)
    #: where blocks without a place of their own (offloaded ones) rest
    home: torch.device | None = None


def is_spread(model: nn.Module) -> bool:
    """Whether weights are on disk, offloaded, or on several devices, so that a copy could not share them."""
    return any(p.is_meta for p in model.parameters()) or any(hasattr(m, "_hf_hook") for m in model.modules())


def enter(model: nn.Module) -> Residence:
    """Make everything outside the blocks real and free of accelerate's hooks; blocks wait for `fetch`."""
    storage = getattr(model, "qoq_storage", None)
    if storage is None and not is_spread(model):
        return Residence(None)
    residence = Residence(storage, dict(getattr(model, "hf_device_map", None) or {}))
    architecture = describe(model)
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    skipped = {id(module) for block in architecture.blocks for module in block.layer.modules()}
    for name, module in model.named_modules():
        if module is architecture.head and tied:  # comes last; its own tensor may be stored nowhere
            module.weight = architecture.embedding.weight
        if id(module) not in skipped:
            _materialise(module, name, storage.source if storage else {}, storage.home if storage else None)
    if tied:
        architecture.head.weight = architecture.embedding.weight
    return residence


def fetch(block: Block, residence: Residence) -> None:
    """Make a block real on the device that works on it, without accelerate's hooks."""
    storage = residence.storage
    prefix = f"model.layers.{block.index}"
    for name, module in block.layer.named_modules(prefix=prefix):
        if _offloaded(module):
            residence.home = torch.device("cpu")
        _materialise(module, name, storage.source if storage else {}, storage.device if storage else None)


def settle(block: Block, residence: Residence) -> None:
    """Put a block that is done where it rests."""
    home = residence.storage.home if residence.storage else residence.home
    if home is not None:
        block.layer.to(home)


@contextmanager
def ends_at_work(model: nn.Module, residence: Residence) -> Iterator[None]:
    """What surrounds the blocks on the device that works on them, for as long as it is run or a step changes it."""
    storage = residence.storage
    if storage is None or storage.device == storage.home:
        yield
        return
    architecture = describe(model)
    rotary = model.get_submodule("model.rotary_emb")
    ends = (architecture.embedding, architecture.final_norm, architecture.head, rotary)
    try:
        for module in ends:
            module.to(storage.device)
        yield
    finally:
        for module in ends:
            module.to(storage.home)
        if model.config.tie_word_embeddings:  # type: ignore[union-attr]
            architecture.head.weight = architecture.embedding.weight  # moving made two of one


def leave(model: nn.Module, residence: Residence) -> None:
    """Give a model that was spread over several devices its hooks back; one on a single device needs none."""
    if residence.storage is not None:
        del model.qoq_storage
    if not residence.device_map:
        return
    del model.hf_device_map
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) == 1:
        return
    from accelerate import dispatch_model

    places = {name: "cpu" if place == "disk" else place for name, place in residence.device_map.items()}
    dispatch_model(model, places, offload_buffers=True, skip_keys=model._skip_keys_device_placement)


def move(batch: Batch, block: Block) -> Batch:
    """A batch on the block's device; the same object where it is there already."""
    device = next(block.layer.parameters()).device
    if batch.hidden.device == device:
        return batch
    arguments = list(batch.arguments)
    arguments[block.index] = {name: _to(value, device) for name, value in batch.arguments[block.index].items()}
    return Batch(batch.hidden.to(device), tuple(arguments))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_to(v, device) for v in value) if isinstance(value, tuple) else value


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module, by what they can do (so that accelerate need not be installed)."""
    hook = getattr(module, "_hf_hook", None)
    listed = getattr(hook, "hooks", [hook])  # several in sequence, or one
    return [h for h in listed if hasattr(h, "execution_device")]


def _offloaded(module: nn.Module) -> bool:
    return any(hook.offload for hook in _hooks(module))


def _materialise(module: nn.Module, name: str, source: Mapping[str, torch.Tensor], device: torch.device | None) -> None:
    """Give ``module``'s own parameters their values, on ``device`` (None: where its hook computes, or where they are)."""
    values: dict[str, torch.Tensor] = {}
    for hook in _hooks(module):
        if device is None and hook.execution_device is not None:
            device = torch.device(hook.execution_device)
        if hook.offload:
            values |= {n: hook.weights_map[n] for n, _ in module.named_parameters(recurse=False)}
    if hasattr(module, "_hf_hook"):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
    for key, parameter in list(module.named_parameters(recurse=False)):
        value = values.get(key, parameter)
        if value.is_meta:
            value = source[f"{name}.{key}"].to(parameter.dtype, copy=True)  # the file may change once we are done
        if parameter.is_meta:
            require_finite(f"model weight {name}.{key}", value)
        if value is not parameter or (device is not None and parameter.device != device):
            replace_parameter(module, key, value.detach().to(device or value.device))
    if device is not None:
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = buffer.to(device)
