"""Write the model card and the loss curve from the records of a training run.

    python data/train/card.py --training data/model/training.json --report build/corpus/report.json \\
        --tokenizer build/tokenizer --out data/model

Writes ``README.md`` and ``loss.svg`` to the folder OUT.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 24, 48


def read(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON file.  Raises ``SystemExit`` naming the command that makes it, if it is missing."""
    if not path.is_file():
        raise SystemExit(f"no file at {path}; make it with: {made_by}")
    return json.loads(path.read_text())


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round tick values which cover ``low`` to ``high``."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= count:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def loss_svg(curve: list[list[float]], heldout: list[list[float]]) -> str:
    """Loss (nats a token) over millions of tokens as SVG text.  Rows of both curves: ``[step, tokens, loss]``."""
    if not curve:
        raise SystemExit("the training record holds no loss curve")
    xs = [row[1] / 1e6 for row in curve + heldout]
    x_high = max(xs)
    values = [row[2] for row in curve + heldout]
    low = math.floor(min(values) * 5) / 5
    high = min(max(values), low + 3.0)

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_high

    def py(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(y, high)) / (high - low or 1.0)

    def line(rows: list[list[float]], style: str) -> str:
        points = " ".join(f"{px(r[1] / 1e6):.1f},{py(r[2]):.1f}" for r in rows)
        return f'<polyline points="{points}" fill="none" {style}/>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        "<title>Training and held-out loss over the tokens seen</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for x in ticks(0, x_high):
        out.append(f'<path d="M{px(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dddddd"/>')
        out.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#333333">{x:g}</text>')
    for y in ticks(low, high):
        out.append(f'<path d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end" fill="#333333">{y:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out += [
        line(curve, 'stroke="#1f5fa8" stroke-width="1.5"'),
        line(heldout, 'stroke="#b3460f" stroke-width="2" stroke-dasharray="6 4"'),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle" fill="#333333">'
        "tokens seen (millions)</text>",
        f'<text x="16" y="{middle}" text-anchor="middle" fill="#333333" transform="rotate(-90 16 {middle})">'
        "loss (nats a token)</text>",
        f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 16}" text-anchor="end" fill="#1f5fa8">training (solid)</text>',
        f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 32}" text-anchor="end" fill="#b3460f">held-out (dashed)</text>',
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def quote(text: str) -> str:
    """A text as an indented literal block of Markdown."""
    lines = [piece for raw in text.split("\n") for piece in (textwrap.wrap(raw, 100) or [""])]
    return "\n".join(("    " + line).rstrip() for line in lines)


def inspect_model(window: int) -> dict[str, str]:
    """Facts that this machine measures on the finished model: perplexity on its own Python's text, and outliers."""
    import platform
    from pydoc_data.topics import topics

    import qoqlab

    model, tokenizer = qoqlab.load_tiny()
    ids = qoqlab.tokens(tokenizer, "\n\n".join(topics[key] for key in sorted(topics)), window)
    table = qoqlab.outliers.measure(model, ids[:2])
    ratios = table.pivot(index="layer", columns="site", values="ratio")
    sites = ["qkv", "o", "gate_up", "down", "keys", "values"]
    rows = [f"| {layer} | " + " | ".join(f"{ratios.loc[layer, s]:.1f}" for s in sites) + " |" for layer in ratios.index]
    return {
        "python": platform.python_version(),
        "tokens": str(ids.numel()),
        "perplexity": f"{qoqlab.perplexity(model, ids):.2f}",
        "outliers": "\n".join([f"| layer | {' | '.join(sites)} |", "| ---: |" + " ---: |" * len(sites), *rows]),
    }


def card(training: dict[str, Any], report: dict[str, Any], tokenizer: dict[str, Any], local: dict[str, str]) -> str:
    """The model card as Markdown; ``local`` as `inspect_model` returns it."""
    recipe, overlap = training["recipe"], report["overlap"]
    train, heldout = report["train"], report["heldout"]
    perplexity = training["perplexity"]
    text_python = perplexity.get("pydoc_topics", {}).get("text_python", "?")
    names = {"heldout": "held-out documentation", "pydoc_topics": f"Python {text_python}'s language reference"}
    held_rows = training["heldout_curve"]
    losses = {row[0]: row[2] for row in training["loss_curve"]}
    table = []
    for step, tokens, value in held_rows[:: max(1, len(held_rows) // 10)] + held_rows[-1:]:
        nearest = min(losses, key=lambda s: abs(s - step))
        row = f"| {step} | {tokens / 1e6:.1f} | {losses[nearest]:.3f} | {value:.3f} |"
        if row not in table:
            table.append(row)
    packages = report["packages"]
    largest = sorted(packages, key=lambda name: -packages[name]["characters"])
    versions = ", ".join(f"{name} {packages[name]['version']}" for name in sorted(packages))
    entries = len(tokenizer["model"]["vocab"])
    scores = "\n".join(
        f"| {names.get(key, key)} | {value['tokens']} | {value['perplexity']:.2f} | {value['unigram_perplexity']:.1f} |"
        for key, value in perplexity.items()
    )
    examples = "\n\n".join(
        f"Prompt: “{s['prompt']}”\n\nGreedy:\n\n{quote(s['greedy'])}\n\nTemperature 0.7:\n\n{quote(s['temperature_0.7'])}"
        for s in training["samples"]
    )
    dedup = report["deduplication"]
    table_text = "\n".join(table)
    largest_text = ", ".join(f"{n} ({packages[n]['characters'] / 1e6:.1f} M)" for n in largest[:20])
    return f"""# A small Llama trained on technical documentation

A decoder-only language model of {training["parameters"] / 1e6:.1f} million parameters, trained from scratch on English
technical documentation, so that quantisation can be studied on real, trained weights on any laptop. The weights are
stored in bfloat16 as sharded safetensors and load with `transformers`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("data/model")
tokenizer = AutoTokenizer.from_pretrained("data/model")
```

| | |
| --- | --- |
| layers | {recipe["layers"]} of the Llama kind, width {recipe["hidden_size"]}, feed-forward {recipe["intermediate_size"]} |
| attention | {recipe["heads"]} query heads, {recipe["kv_heads"]} key-value heads, head size {recipe["head_dim"]} |
| positions | up to {recipe["positions"]}, rotary base {recipe["rope_theta"]:g}; trained on windows of {recipe["window"]} |
| vocabulary | {entries} entries, byte-level BPE, digits one by one, `<\\|endoftext\\|>` = 0 |
| embeddings | input and output not tied |

## Perplexity

| text | tokens | perplexity | unigram model's perplexity |
| --- | ---: | ---: | ---: |
{scores}
| Python {local["python"]}'s language reference | {local["tokens"]} | {local["perplexity"]} | |

The language reference is the text of `pydoc_data.topics`, which differs from one Python version to the next. Windows of
{recipe["window"]} tokens, weights in bfloat16. The unigram model is fitted on the training tokens with add-one smoothing.
Perplexities are per token of this vocabulary and compare only with others of the same vocabulary.

## Outliers

How many times the median channel the largest one is, by largest magnitude over two windows of the language reference: at
the inputs of the linear layers, and in keys (after RoPE) and values, for the head that has most.

{local["outliers"]}

Large models have ratios of 10 to 100 at their norms' outputs and about 10 in fixed key channels. This one has some of both:
a fixed channel at the input of most attention layers, a very large number in front of one `down_proj`, and RoPE pairs of
keys that stand out in all layers but the first. Values are even. `qoqlab.outliers.plant` enlarges what is there to a chosen
size without changing what the model computes.

## Licence

The weights and the tokenizer are part of this project and under its licence, Apache-2.0. They were trained on documentation
under many free licences, among them the GPL and the GFDL; none of that text is included. Whether a model is a derived work
of its training text is not settled; this one is meant for teaching and research, and can be trained again from other text.

## Data

Documentation in {len(packages)} Debian packages: {train["documents"]} documents, {train["characters"] / 1e6:.1f} million
characters, {training["training_tokens"] / 1e6:.1f} million tokens; {heldout["documents"]} further documents
({heldout["characters"] / 1e6:.2f} million characters) are held out. None of the text is part of this repository;
`data/train/collect.py` fetches and cleans it anew. The packages are free software under many licences.

Mark-up, navigation, indexes, change logs, licence texts, tables of numbers, long listings and text in other languages
are removed; documents are ranked by the share of function words and of prose. Of {dedup["paragraphs"]} paragraphs
{dedup["repeated_paragraphs"]} repeated ones were dropped, as were {dedup["repeated_documents"]} documents that mostly
repeated others.

The Python language reference is the evaluation text and was not collected. Every paragraph sharing 13 words in a row
with it was removed as well ({overlap["paragraphs_dropped"]} paragraphs, {overlap["documents_dropped"]} whole documents;
reference of Python {overlap["evaluation_python"]}):

| share of the evaluation's n-grams found in the training text | before | after |
| --- | ---: | ---: |
| 8 words | {overlap["share_8grams_before"]:.4%} | {overlap["final_training_text"]["share_8grams"]:.4%} |
| 13 words | {overlap["share_13grams_before"]:.4%} | {overlap["final_training_text"]["share_13grams"]:.4%} |

The largest sources, in characters: {largest_text}.

<details><summary>All packages with their versions</summary>

{versions}

</details>

SHA-256 of the training text: `{train["sha256"]}`.

## Training

AdamW (β {recipe["betas"][0]}, {recipe["betas"][1]}, weight decay {recipe["weight_decay"]} on matrices), gradient
clipping at {recipe["clip"]}, {recipe["batch"]} windows of {recipe["window"]} tokens a step, learning rate
{recipe["peak_lr"]:g} after {recipe["warmup"]} steps of linear warm-up, held, and brought linearly to zero over the last
{recipe["decay"]:.0%}. Seed {recipe["seed"]}, {training["steps"]} steps, {training["tokens_seen"] / 1e6:.0f} million tokens
({training["epochs"]:.1f} passes over the data), {training["seconds"]:.0f} s on one {training["device"]}
({training["tokens_per_second"] / 1e6:.2f} million tokens a second), torch {training["versions"]["torch"]}.

![Training and held-out loss](loss.svg)

| step | million tokens | training loss | held-out loss |
| ---: | ---: | ---: | ---: |
{table_text}

To train it again (the number of steps is recorded in `training.json`):

```sh
python data/train/collect.py --out build/corpus
python data/train/make_tokenizer.py --corpus build/corpus --out build/tokenizer
python data/train/train.py --corpus build/corpus --tokenizer build/tokenizer --out build/model \\
  --batch {recipe["batch"]} --steps {training["steps"]}
```

## Samples

{examples}

## Use and limits

Meant for teaching and for experiments with quantisation. The model imitates the style of manuals and knows little: its
statements are often wrong and must not be relied upon, and commands that it writes must not be run. It has seen only
English documentation, has not been tuned to follow instructions, and repeats itself when decoded greedily. At this size,
effects of quantisation differ in degree from those in models of billions of parameters.
"""


def main() -> None:
    """Read the records and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, required=True, help="training.json of the run")
    parser.add_argument("--report", type=Path, required=True, help="report.json of the corpus")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for README.md and loss.svg")
    args = parser.parse_args()
    training = read(args.training, "python data/train/train.py (see data/train/README.md)")
    report = read(args.report, "python data/train/collect.py --out build/corpus")
    tokenizer = read(args.tokenizer / "tokenizer.json", "python data/train/make_tokenizer.py (see data/train/README.md)")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "README.md").write_text(card(training, report, tokenizer, inspect_model(training["recipe"]["window"])))
    (args.out / "loss.svg").write_text(loss_svg(training["loss_curve"], training["heldout_curve"]))
    print(f"wrote {args.out / 'README.md'} and {args.out / 'loss.svg'}")


if __name__ == "__main__":
    main()
