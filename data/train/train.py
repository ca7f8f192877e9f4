"""Train the bundled 15-million-parameter Llama on the collected documentation.

    python data/train/train.py --corpus build/corpus --tokenizer build/tokenizer --out OUT --minutes 8.5
    python data/train/train.py --corpus build/corpus --tokenizer build/tokenizer --out OUT --steps N

``--minutes`` bounds the wall clock of the whole run: the time of a step is measured after a warm-up and fixes the
number of steps, which is printed and recorded; ``--steps`` with that number repeats the run.  Meant for one NVIDIA
GPU; needs torch, transformers, tokenizers, safetensors and numpy, and no network.  ``--smoke`` runs a tiny model on
the CPU through every stage, resuming included, in about a minute.

Writes to OUT (flat): the weights in bfloat16 (safetensors, shards under 15 MB), ``config.json`` and
``training.json`` (recipe, loss curve, evaluations, samples).
"""

from __future__ import annotations

import argparse
import importlib
import json
import lzma
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPTS = (
    "The configuration file is read when the daemon starts. Each line",
    "To install the package, first make sure that",
    "A hash table is a data structure which",
)
SHARD_BYTES = 15_000_000


@dataclass
class Recipe:
    """Hyperparameters.  Sizes in tokens, rates a step; ``warmup`` in steps, ``decay`` as a share of all steps."""

    seed: int = 20240507
    window: int = 1024
    batch: int = 64
    peak_lr: float = 3e-3
    warmup: int = 200
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    vocab_size: int = 4096
    hidden_size: int = 512
    intermediate_size: int = 896
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    rope_theta: float = 10000.0
    positions: int = 2048

    def rate(self, step: int, total: int | None) -> float:
        """Learning rate of a step (from 0): linear warm-up, constant, linear decay to zero (``total`` may be open)."""
        rate = min(1.0, (step + 1) / max(self.warmup, 1))
        if total is not None:
            tail = max(1.0, self.decay * total)
            rate = min(rate, max(0.0, (total - step) / tail))
        return self.peak_lr * rate


@dataclass
class Log:
    """What a run records: ``[step, tokens, loss]``, ``[step, tokens, held-out loss]`` and ``[step, rate]``."""

    loss: list[list[float]] = field(default_factory=list)
    heldout: list[list[float]] = field(default_factory=list)
    rate: list[list[float]] = field(default_factory=list)


def build(recipe: Recipe) -> LlamaForCausalLM:
    """A freshly initialised model in float32 (normal, 0.02; output projections scaled by depth)."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.02,
        use_cache=True,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(recipe.seed)
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * recipe.layers)
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x`` (batch, heads, time, head_dim), halves layout as in Llama."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def logits_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, time, vocab) of token ids (batch, time).

    The forward pass of the Llama modules written out, without masks and caches, so that it compiles to one graph;
    :func:`check_forward` compares it with the library's own.
    """
    cfg = model.config
    heads, kv, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    batch, time_ = ids.shape
    theta = cfg.rope_parameters["rope_theta"]
    inverse = theta ** (-torch.arange(0, dim, 2, device=ids.device, dtype=torch.float32) / dim)
    angle = torch.arange(time_, device=ids.device, dtype=torch.float32)[:, None] * inverse
    angle = torch.cat((angle, angle), dim=-1)
    x = model.model.embed_tokens(ids)
    mixed = torch.is_autocast_enabled(ids.device.type)
    dtype = torch.get_autocast_dtype(ids.device.type) if mixed else x.dtype
    x = x.to(dtype)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def norm(module: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        wide = y.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + cfg.rms_norm_eps)
        return module.weight.to(dtype) * wide.to(dtype)

    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        h = norm(layer.input_layernorm, x)
        q = attn.q_proj(h).view(batch, time_, heads, dim).transpose(1, 2)
        k = attn.k_proj(h).view(batch, time_, kv, dim).transpose(1, 2)
        v = attn.v_proj(h).view(batch, time_, kv, dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(heads // kv, dim=1), v.repeat_interleave(heads // kv, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.o_proj(out.transpose(1, 2).reshape(batch, time_, heads * dim))
        h = norm(layer.post_attention_layernorm, x)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return model.lm_head(norm(model.model.norm, x))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting ``ids[:, 1:]`` from ``ids[:, :-1]``."""
    logits = logits_of(model, ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def check_forward(model: LlamaForCausalLM) -> float:
    """Largest difference between :func:`logits_of` and the library's forward pass in float32; raises if over 2e-3."""
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    worst = (logits_of(model, ids) - model(ids).logits).abs().max().item()
    if worst > 2e-3:
        raise RuntimeError(f"the written-out forward pass is off by {worst:.2e}")
    return worst


# ---------------------------------------------------------------- data


def read_corpus(path: Path, corpus: Path) -> list[str]:
    """Documents of an xz file of NUL-separated texts.  Raises ``SystemExit`` with the making command if missing."""
    if not path.is_file():
        raise SystemExit(f"no corpus at {path}; make it with: python data/train/collect.py --out {corpus}")
    return lzma.decompress(path.read_bytes()).decode("utf-8").split("\x00")


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Token ids (uint16) of all documents, each preceded by the end-of-text token (id 0), and one at the end."""
    parts: list[np.ndarray] = []
    backend = tokenizer.backend_tokenizer
    end = np.zeros(1, dtype=np.uint16)
    for i in range(0, len(texts), 4000):
        for encoding in backend.encode_batch_fast(texts[i : i + 4000], add_special_tokens=False):
            parts += [end, np.array(encoding.ids, dtype=np.uint16)]
    return np.concatenate([*parts, end])


def load_tokens(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the training and held-out texts; the training tokens are cached in the scratch folder."""
    cache = args.checkpoint / "train-tokens.npy"
    heldout = read_corpus(args.corpus / "heldout.txt.xz", args.corpus)
    if cache.is_file() and args.resume:
        return np.load(cache), encode(heldout, tokenizer)
    texts = read_corpus(args.corpus / "train.txt.xz", args.corpus)
    for more in sorted(args.corpus.glob("train-*.txt.xz")):
        texts += read_corpus(more, args.corpus)
    if args.smoke:
        texts, heldout = texts[:150], heldout[:4]
    train = encode(texts, tokenizer)
    part = cache.with_suffix(".part.npy")
    np.save(part, train)
    part.replace(cache)
    return train, encode(heldout, tokenizer)


class Windows:
    """Random contiguous windows without replacement: every epoch shifts the grid and shuffles its windows anew."""

    def __init__(self, tokens: np.ndarray, recipe: Recipe, device: torch.device) -> None:
        self.size, self.seed, self.device = recipe.window, recipe.seed, device
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # ids are below 2**15
        self.count = (len(tokens) - 1) // self.size - 1
        if self.count < 1:
            raise SystemExit(f"the corpus holds {len(tokens)} tokens, too few for windows of {self.size}")
        self.span = torch.arange(self.size + 1, device=device)
        self.cache: dict[int, torch.Tensor] = {}

    def starts(self, epoch: int) -> torch.Tensor:
        """Start positions of an epoch's windows in their shuffled order."""
        if epoch not in self.cache:
            generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            offset = int(torch.randint(self.size, (1,), generator=generator))
            order = torch.randperm(self.count, generator=generator) * self.size + offset
            self.cache = {k: v for k, v in self.cache.items() if k >= epoch - 1}
            self.cache[epoch] = order.to(self.device)
        return self.cache[epoch]

    def batch(self, step: int, batch: int) -> torch.Tensor:
        """Token ids (batch, window + 1) of a step: a function of the step alone."""
        parts = []
        position, left = step * batch, batch
        while left:
            epoch, at = divmod(position, self.count)
            piece = self.starts(epoch)[at : at + left]
            parts.append(piece)
            position, left = position + len(piece), left - len(piece)
        start = torch.cat(parts)
        return self.tokens[start[:, None] + self.span].long()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: np.ndarray, window: int, device: torch.device) -> float:
    """Mean loss in nats a token over consecutive windows (the tokens after the last full window count as well)."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    full = (len(ids) - 1) // window
    pieces = [ids[i * window : i * window + window + 1] for i in range(full)]
    groups = [torch.stack(pieces[i : i + 32]) for i in range(0, full, 32)]
    if full * window < len(ids) - 1:
        groups.append(ids[full * window :][None])
    total = torch.zeros((), device=device, dtype=torch.float64)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for group in groups:
            total += loss_of(model, group).double() * (group.numel() - len(group))
    return total.item() / (len(ids) - 1)


def unigram_loss(train: np.ndarray, tokens: np.ndarray, vocabulary: int) -> float:
    """Mean loss in nats a token of the unigram distribution of ``train`` with add-one smoothing."""
    counts = np.bincount(train, minlength=vocabulary).astype(np.float64) + 1.0
    return float(-np.log(counts / counts.sum())[tokens[1:]].mean())


# ---------------------------------------------------------------- training


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write weights, optimizer state, step and log to a temporary file, then rename it."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **state}, part)
    part.replace(path)


def train(
    args: argparse.Namespace,
    recipe: Recipe,
    windows: Windows,
    heldout: np.ndarray,
    device: torch.device,
    deadline: float | None,
) -> tuple[LlamaForCausalLM, Log, dict[str, Any]]:
    """Run the optimisation.

    ``deadline`` is a value of ``time.time()`` by which training must stop (used when ``args.steps`` is not given).
    Returns the model, the log and facts on speed.  Raises ``SystemExit`` if ``--resume`` finds no checkpoint, and
    ``FloatingPointError`` if the loss is no longer finite.
    """
    model = build(recipe)
    difference = check_forward(model)  # on the CPU, in full float32
    model = model.to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.peak_lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,
    )
    path = args.checkpoint / "checkpoint.pt"
    total: int | None = args.steps
    step, log, before = 0, Log(), 0.0
    if args.resume:
        if not path.is_file():
            raise SystemExit(f"--resume: no checkpoint at {path}; run without --resume first")
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
        total = total if total is not None else state["total"]
        log = Log(**state["log"])
        print(f"resumed at step {step}", flush=True)
    function = torch.compile(loss_of, dynamic=False) if device.type == "cuda" and not args.no_compile else loss_of

    begin = last_print = last_save = time.time()
    running = torch.zeros((), device=device)
    pending = 0
    warm, probe = 15, 60
    mark = 0.0
    first = step
    per_step = recipe.batch * recipe.window
    stopped_early = False
    while total is None or step < total:
        rate = recipe.rate(step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = windows.batch(step, recipe.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = function(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        pending += 1
        step += 1
        if total is None and step - first in (warm, warm + probe):
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step - first == warm:
                mark = time.time()
            else:
                step_s = (time.time() - mark) / probe
                assert deadline is not None
                total = step + max(1, int((deadline - time.time()) * 0.97 / step_s))
                print(f"{step_s * 1e3:.2f} ms a step: {total} steps in all (repeat with --steps {total})", flush=True)
        every = max(1, (total or 20000) // 200)
        if step % every == 0 or step == total:
            value = running.item() / pending
            running.zero_()
            pending = 0
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}; lower --lr")
            log.loss.append([step, step * per_step, round(value, 5)])
            log.rate.append([step, rate])
            now = time.time()
            if now - last_print >= 5 or step == total:
                speed = (step - first) * per_step / (now - begin)
                print(f"step {step}/{total} loss {value:.4f} lr {rate:.2e} {speed / 1e6:.3f} M tokens/s", flush=True)
                last_print = now
        if total is not None and (step % max(1, total // 20) == 0 or step == total):
            log.heldout.append([step, step * per_step, round(evaluate(model, heldout, recipe.window, device), 5)])
            print(f"step {step} held-out loss {log.heldout[-1][2]:.4f}", flush=True)
        now = time.time()
        due = step == args.save_step if args.save_step else now - last_save > 60 * args.checkpoint_minutes
        if due and total is not None:
            running_state = {"step": step, "total": total, "log": asdict(log), "seconds": before + now - begin}
            save_checkpoint(path, model, optimizer, running_state)
            last_save = now
        if deadline is not None and now > deadline:
            if total is None:
                raise SystemExit(f"--minutes is too short: only {step} steps were done before the end; give --steps")
            stopped_early = step < total
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.time() - begin
    facts = {
        "steps": step,
        "planned_steps": total,
        "stopped_early": stopped_early,
        "tokens_seen": step * per_step,
        "epochs": round(step * recipe.batch / windows.count, 3),
        "seconds": round(before + seconds, 1),
        "tokens_per_second": round((step - first) * per_step / seconds),
        "forward_check_max_difference": difference,
    }
    return model, log, facts


@torch.no_grad()
def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, str]]:
    """Greedy and sampled (temperature 0.7, top 50) continuations of :data:`PROMPTS`, ``length`` tokens each."""
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        mask = torch.ones_like(ids)
        shared = {"attention_mask": mask, "max_new_tokens": length, "pad_token_id": 0}
        greedy = model.generate(ids, do_sample=False, **shared)
        torch.manual_seed(7)
        drawn = model.generate(ids, do_sample=True, temperature=0.7, top_k=50, **shared)
        cut = ids.shape[1]
        texts = [tokenizer.decode(t[0, cut:], skip_special_tokens=True) for t in (greedy, drawn)]
        out.append({"prompt": prompt, "greedy": texts[0], "temperature_0.7": texts[1]})
    return out


def evaluation_topics() -> list[str]:
    """The topics of the interpreter's language reference, sorted by name; empty if it was built without them."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [topics[key] for key in sorted(topics)]


def finish(
    args: argparse.Namespace,
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_tokens: np.ndarray,
    heldout: np.ndarray,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate the model as saved (bfloat16 weights), write its files and ``training.json``, return the latter."""
    device = model.device
    model = model.to(torch.bfloat16).eval()
    if device.type == "cpu":
        model = model.float()  # the rounded weights, computed in float32
    texts = {"heldout": heldout}
    topics = evaluation_topics()
    if topics:
        texts["pydoc_topics"] = encode(topics, tokenizer)
    results: dict[str, Any] = {}
    for name, tokens in texts.items():
        loss = evaluate(model, tokens, recipe.window, device)
        base = unigram_loss(train_tokens, tokens, recipe.vocab_size)
        results[name] = {
            "tokens": len(tokens) - 1,
            "loss": round(loss, 5),
            "perplexity": round(math.exp(loss), 4),
            "unigram_perplexity": round(math.exp(base), 3),
        }
        if name == "pydoc_topics":
            count = len("".join(topics).encode())
            results[name]["bits_per_byte"] = round(loss * (len(tokens) - 1) / math.log(2) / count, 4)
            results[name]["text_python"] = sys.version.split()[0]
    record["perplexity"] = results
    print(json.dumps(results), flush=True)
    try:
        record["samples"] = samples(model, tokenizer, 16 if args.smoke else 120)
    except Exception as error:  # samples are an illustration; the weights matter more
        record["samples"] = []
        print(f"no samples: {type(error).__name__}: {error}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size="12MB")
    (args.out / "generation_config.json").unlink(missing_ok=True)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for file in sorted(args.out.iterdir()):
        print(f"{file.name} {file.stat().st_size}", flush=True)
        if file.stat().st_size > SHARD_BYTES:
            raise RuntimeError(f"{file} is over {SHARD_BYTES} bytes")
    return record


def parse() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by collect.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder made by make_tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, help="wall clock of the whole run in minutes")
    parser.add_argument("--steps", type=int, help="exact number of optimiser steps")
    parser.add_argument("--reserve", type=float, default=25.0, help="seconds kept for evaluation and saving")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="windows a step")
    parser.add_argument("--lr", type=float, default=Recipe.peak_lr, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--checkpoint", type=Path, help="scratch folder for checkpoint and token cache")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny model and text on the CPU, all stages")
    args = parser.parse_args()
    args.save_step = None
    if args.smoke:
        args.steps, args.minutes = args.steps or 20, None
    if (args.minutes is None) == (args.steps is None):
        parser.error("give either --minutes or --steps")
    if args.minutes is not None and args.minutes * 60 <= args.reserve + 30:
        parser.error(f"--minutes must leave more than 30 s besides the reserve of {args.reserve:.0f} s")
    if (args.steps is not None and args.steps < 1) or args.batch < 1 or args.lr <= 0:
        parser.error("--steps, --batch and --lr must be positive")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    if not (args.tokenizer / "tokenizer.json").is_file():
        command = f"python data/train/make_tokenizer.py --corpus {args.corpus} --out {args.tokenizer}"
        raise SystemExit(f"no tokenizer at {args.tokenizer}; make it with: {command}")
    return args


def main() -> None:
    """Load, train, evaluate and save; see the module's description."""
    start = time.time()
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.smoke else "cpu")
    if device.type == "cpu" and not args.smoke:
        raise SystemExit("no CUDA device found; --smoke runs a tiny version on the CPU")
    recipe = Recipe(seed=args.seed, batch=args.batch, peak_lr=args.lr, weight_decay=args.weight_decay)
    if args.smoke:
        recipe = Recipe(
            seed=args.seed, batch=4, window=128, warmup=5, hidden_size=64, intermediate_size=112, layers=2, head_dim=16
        )
    torch.set_float32_matmul_precision("high")
    scratch = None
    if args.checkpoint is None:
        scratch = tempfile.TemporaryDirectory(prefix="training-")
        args.checkpoint = Path(scratch.name)
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    if len(tokenizer) != recipe.vocab_size:
        raise SystemExit(f"the tokenizer has {len(tokenizer)} entries, the model {recipe.vocab_size}")
    tokens, heldout = load_tokens(args, tokenizer)
    print(f"{len(tokens)} training and {len(heldout)} held-out tokens after {time.time() - start:.1f} s", flush=True)
    windows = Windows(tokens, recipe, device)
    deadline = start + args.minutes * 60 - args.reserve if args.minutes is not None else None
    if args.smoke:
        args.save_step = max(1, args.steps // 2)
    model, log, facts = train(args, recipe, windows, heldout, device, deadline)
    if args.smoke:
        args.resume, args.save_step = True, None
        again, log2, _ = train(args, recipe, windows, heldout, device, None)
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        if not same or log.loss != log2.loss:
            raise RuntimeError("the resumed run differs from the uninterrupted one")
        print("resumed run equals the uninterrupted one", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "schedule": "linear warm-up, constant, linear decay to zero",
        "optimizer": "AdamW (fused), weight decay on matrices only, bfloat16 autocast with float32 weights",
        "parameters": parameters,
        "training_tokens": len(tokens),
        **facts,
        "loss_curve": log.loss,
        "heldout_curve": log.heldout,
        "rate_curve": log.rate,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
        },
    }
    finish(args, recipe, model, tokenizer, tokens, heldout, record)
    print(f"done after {time.time() - start:.1f} s", flush=True)
    if scratch is not None:
        scratch.cleanup()


if __name__ == "__main__":
    main()
