"""Train the byte-level BPE tokenizer (4096 entries) of the bundled model.

    python data/train/make_tokenizer.py --corpus build/corpus --out build/tokenizer

Reads a deterministic sample of ``CORPUS/train.txt.xz`` and writes ``tokenizer.json`` and ``tokenizer_config.json``.
The only special token is ``<|endoftext|>`` (id 0): beginning, end and padding at once.  Digits are split one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import lzma
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
ROUND_TRIP = [
    "plain words, and  two  spaces\n\n\tindented\r\nCR LF",
    " leading and trailing ",
    "naïve café – “quotes” … ½ ﬁ İstanbul ß",
    "汉字 かな 한국어 العربية עברית हिन्दी",
    "🙂👩‍👩‍👧‍👦 \u200b\u0000\u0007 \U0010ffff e\u0301",
    "x = 12345.678e-9  # 0xFF",
    "",
]


def sample(texts: list[str], characters: int) -> list[str]:
    """The documents of lowest hash, up to that many characters: the same sample on every run."""
    ranked = sorted(texts, key=lambda t: hashlib.blake2b(t[:2000].encode(), digest_size=8).digest())
    out: list[str] = []
    for text in ranked:
        out.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return out


def train_tokenizer(texts: list[str], entries: int = 4096) -> Tokenizer:
    """Train a byte-level BPE on ``texts``.  Raises ``ValueError`` if it does not reach ``entries`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != entries:
        raise ValueError(f"{tokenizer.get_vocab_size()} entries instead of {entries}: give more text")
    return tokenizer


def check_round_trip(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Raise ``ValueError`` if decoding the encoded text does not give back every text exactly."""
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text, verbose=False))
        if back != text:
            at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
            raise ValueError(f"no exact round trip at character {at}: {text[at : at + 40]!r} became {back[at : at + 40]!r}")


def main() -> None:
    """Train, check and save the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer's files")
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--sample-mb", type=float, default=40.0, help="training sample in millions of characters")
    args = parser.parse_args()
    source = args.corpus / "train.txt.xz"
    if not source.is_file():
        raise SystemExit(f"no corpus at {source}; make it with: python data/train/collect.py --out {args.corpus}")
    if args.entries < 257:
        raise SystemExit("--entries must be at least 257 (256 bytes and one special token)")
    start = time.time()
    texts = lzma.decompress(source.read_bytes()).decode("utf-8").split("\x00")
    chosen = sample(texts, int(args.sample_mb * 1e6))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(chosen, args.entries),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    evaluation = [topics[key] for key in sorted(topics)]
    check_round_trip(tokenizer, ROUND_TRIP + evaluation + texts[:20])
    assert tokenizer.convert_tokens_to_ids(END) == 0 and tokenizer.encode("a")[0] != 0, "special tokens are off"
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    check_round_trip(PreTrainedTokenizerFast.from_pretrained(args.out), ROUND_TRIP)
    held = lzma.decompress((args.corpus / "heldout.txt.xz").read_bytes()).decode("utf-8")
    held_bytes, held_tokens = len(held.encode()), len(tokenizer.encode(held.replace("\x00", "\n"), verbose=False))
    joined = "\n\n".join(evaluation)
    report = {
        "entries": len(tokenizer),
        "sample_characters": sum(map(len, chosen)),
        "heldout_bytes_per_token": round(held_bytes / held_tokens, 4),
        "evaluation_bytes_per_token": round(len(joined.encode()) / len(tokenizer.encode(joined, verbose=False)), 4),
        "seconds": round(time.time() - start, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
