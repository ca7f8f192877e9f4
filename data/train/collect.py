"""Collect English technical documentation from Debian packages as training text.

    python data/train/collect.py --out build/corpus

The packages named in ``packages.txt`` are fetched with ``apt-get download`` into ``OUT/debs`` (what is there is not
fetched again), read straight from the archives without installing anything, cleaned by ``extract.py`` (one cached
file a package in ``OUT/clean``), deduplicated, freed of every 13-gram shared with the evaluation text (the Python
language reference, ``pydoc_data.topics``), and written to ``OUT/train.txt.xz``, ``OUT/heldout.txt.xz`` (documents
parted by one NUL character, in an order fixed by a hash) and ``OUT/report.json``.

Needs a Debian or Ubuntu system with ``apt-get``, ``dpkg-deb``, ``mandoc`` and ``xz``, and the Python packages lxml
and numpy.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from extract import Document, clean, read_blocks, wanted

HERE = Path(__file__).resolve().parent
DEFAULT_CAP = 8.0  # MB of clean text a package
MIN_PARAGRAPH = 80  # characters: shorter paragraphs may repeat
MAX_DOCUMENT = 2_000_000  # characters
SEED = "qoqlab-corpus-1"
FOLD = re.compile(r"[^a-z0-9]+")
TOKEN = re.compile(r"[a-z0-9_']+")


def package_list(path: Path) -> dict[str, float]:
    """Read ``packages.txt``: a mapping of package name to cap in MB of clean text.

    Raises ``SystemExit`` with the line's number for a cap that is no number.
    """
    caps: dict[str, float] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        try:
            caps[fields[0]] = float(fields[1]) if len(fields) > 1 else DEFAULT_CAP
        except ValueError:
            raise SystemExit(f"{path}, line {number}: the cap {fields[1]!r} is not a number of MB") from None
    return caps


def download(names: list[str], folder: Path) -> dict[str, Path]:
    """Fetch the packages that are not in ``folder`` yet.  Returns a mapping of package name to archive."""
    folder.mkdir(parents=True, exist_ok=True)

    def present() -> dict[str, Path]:
        return {deb.name.split("_")[0]: deb for deb in sorted(folder.glob("*.deb"))}

    missing = [name for name in names if name not in present()]
    if missing:
        known = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=True).stdout.split()
        absent = sorted(set(missing) - set(known))
        if absent:
            print("not in this release, skipped:", ", ".join(absent))
        missing = [name for name in missing if name not in absent]
        groups = [missing[i : i + 40] for i in range(0, len(missing), 40)]
        for group in groups:
            subprocess.run(["apt-get", "download", "-q", *group], cwd=folder, check=False, stdout=subprocess.DEVNULL)
    have = present()
    return {name: have[name] for name in names if name in have}


def members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each file of a package that may hold documentation, in the archive's order."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as pipe:
        assert pipe.stdout is not None
        with tarfile.open(fileobj=pipe.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and 200 < member.size < 20_000_000 and wanted(member.name):
                    handle = archive.extractfile(member)
                    if handle is not None:
                        yield member.name, handle.read()
        pipe.kill()


def read_package(name: str, deb: Path, cap: float, cache: Path) -> str:
    """Clean one package into ``cache`` (JSON lines of name, text, score).  ``cap``: MB of text.  Returns a summary."""
    target = cache / f"{deb.stem}.jsonl"
    if target.exists():
        return f"{name}: cached"
    documents: list[Document] = []
    failed = size = 0
    seen: set[bytes] = set()
    for path, raw in members(deb):
        digest = hashlib.blake2b(raw, digest_size=12).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            document = clean(f"{name}{path[1:]}", read_blocks(path, raw))
        except Exception as error:  # one odd file must not end the run
            failed += 1
            if failed == 1:
                print(f"{name}{path[1:]}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if document is None or len(document.text) > MAX_DOCUMENT:
            continue
        documents.append(document)
        size += len(document.text)
        if size > 2.0e6 * cap:
            break
    documents.sort(key=lambda d: (-d.score, d.name))
    part = target.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        size = 0
        for document in documents:
            size += len(document.text)
            if size > cap * 1e6:
                break
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    part.rename(target)
    return f"{name}: {len(documents)} documents, {min(size, cap * 1e6) / 1e6:.2f} MB, {failed} unreadable"


def order(name: str) -> bytes:
    """Sorting key of a document: a seeded hash of its name."""
    return hashlib.blake2b(f"{SEED}:{name}".encode(), digest_size=8).digest()


def deduplicate(documents: list[Document]) -> tuple[list[Document], dict[str, int]]:
    """Drop repeated paragraphs (compared by letters and digits) and documents that mostly repeat others."""
    seen: set[bytes] = set()
    kept: list[Document] = []
    counts = {"paragraphs": 0, "repeated_paragraphs": 0, "repeated_documents": 0}
    for document in documents:
        parts: list[str] = []
        long = repeated = 0
        fresh: list[bytes] = []
        for paragraph in document.text.split("\n\n"):
            counts["paragraphs"] += 1
            if len(paragraph) > MIN_PARAGRAPH:
                long += 1
                key = hashlib.blake2b(FOLD.sub("", paragraph.lower()).encode(), digest_size=8).digest()
                if key in seen:
                    repeated += 1
                    continue
                seen.add(key)
                fresh.append(key)
            parts.append(paragraph)
        counts["repeated_paragraphs"] += repeated
        if repeated > 0.6 * long or sum(map(len, parts)) < 300:
            counts["repeated_documents"] += 1
            continue
        kept.append(document if not repeated else document._replace(text="\n\n".join(parts)))
    return kept, counts


class Overlap:
    """Looks for the word n-grams of an evaluation text in other texts (words: lower-case letters, digits, _ and ')."""

    def __init__(self, evaluation: str, sizes: tuple[int, ...] = (8, 13)) -> None:
        words = TOKEN.findall(evaluation.lower())
        self.ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
        rng = np.random.default_rng(13)
        self.keys = rng.integers(1, 2**63, size=(max(sizes), len(self.ids)), dtype=np.uint64)
        self.sizes = sizes
        stream = self._stream(evaluation)
        self.grams = {n: np.unique(self._hashes(stream, n)[0]) for n in sizes}
        self.counts = {n: np.zeros(len(self.grams[n]), dtype=bool) for n in sizes}

    def _stream(self, text: str) -> np.ndarray:
        get = self.ids.get
        return np.fromiter((get(word, -1) for word in TOKEN.findall(text.lower())), dtype=np.int64)

    def _hashes(self, stream: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the n-grams made of known words alone, and their positions."""
        count = len(stream) - n + 1
        if count <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        unknown = np.concatenate(([0], np.cumsum(stream < 0)))
        at = np.flatnonzero(unknown[n:] == unknown[:-n])
        total = np.zeros(len(at), dtype=np.uint64)
        for k in range(n):
            total += self.keys[k][stream[at + k]]
        return total, at

    def find(self, text: str) -> dict[int, np.ndarray]:
        """For each n, the sorted indices of the evaluation n-grams which occur in ``text``."""
        stream = self._stream(text)
        found = {}
        for n in self.sizes:
            hashes, _ = self._hashes(stream, n)
            grams = self.grams[n]
            index = np.searchsorted(grams, hashes)
            index[index == len(grams)] = 0
            found[n] = np.unique(index[grams[index] == hashes])
        return found


def decontaminate(
    documents: list[Document], evaluation: str, n: int = 13
) -> tuple[list[Document], dict[str, object], np.ndarray]:
    """Remove what shares a word n-gram with the evaluation text: first the paragraphs, then whole documents.

    Returns the remaining documents, a report with the share of the evaluation's distinct 8-grams and 13-grams found
    in the documents before and after, and the boolean mask over distinct 8-grams found after.
    """
    search = Overlap(evaluation)
    before = {k: np.zeros(len(g), dtype=bool) for k, g in search.grams.items()}
    after = {k: np.zeros(len(g), dtype=bool) for k, g in search.grams.items()}
    kept: list[Document] = []
    paragraphs = dropped = touched = 0
    for document in documents:
        found = search.find(document.text)
        for k, index in found.items():
            before[k][index] = True
        if len(found[n]):
            touched += 1
            parts = document.text.split("\n\n")
            clear = [p for p in parts if not len(search.find(p)[n])]
            paragraphs += len(parts) - len(clear)
            document = document._replace(text="\n\n".join(clear))
            found = search.find(document.text)
            if len(found[n]) or len(clear) < 0.5 * len(parts) or len(document.text) < 300:
                dropped += 1
                continue
        for k, index in found.items():
            after[k][index] = True
        kept.append(document)
    report: dict[str, object] = {
        "evaluation_text": "pydoc_data.topics (all topics, sorted by name, joined by blank lines)",
        "evaluation_python": sys.version.split()[0],
        "evaluation_characters": len(evaluation),
        "documents_touched": touched,
        "documents_dropped": dropped,
        "paragraphs_dropped": paragraphs,
    }
    for k in search.sizes:
        report[f"distinct_{k}grams"] = len(search.grams[k])
        report[f"share_{k}grams_before"] = round(float(before[k].mean()), 6)
        report[f"share_{k}grams_after"] = round(float(after[k].mean()), 6)
    return kept, report, after[8]


def evaluation_text() -> str:
    """The evaluation text: all of ``pydoc_data.topics``, sorted by name and joined by blank lines."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[key] for key in sorted(topics))


def write_xz(path: Path, texts: list[str]) -> dict[str, object]:
    """Write NUL-separated texts as xz (two blocks, so two threads can work).  Returns sizes and SHA-256 sums."""
    data = "\x00".join(texts).encode("utf-8")
    plain = path.with_suffix("")
    plain.write_bytes(data)
    block = max(len(data) // 2 + 1, 1 << 20)
    options = ["--format=xz", "--lzma2=preset=9,dict=128MiB", f"--block-size={block}", "-T2", "-M", "20GiB"]
    with path.with_suffix(".part").open("wb") as out:
        subprocess.run(["xz", "-z", "-c", *options, str(plain)], stdout=out, check=True)
    path.with_suffix(".part").rename(path)
    plain.unlink()
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "bytes": len(data),
        "bytes_xz": path.stat().st_size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "sha256_xz": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Run the whole collection; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus and the caches")
    parser.add_argument("--packages", type=Path, default=HERE / "packages.txt", help="list of packages and caps")
    parser.add_argument("--max-mb", type=float, default=200.0, help="keep the best documents up to this many MB")
    parser.add_argument("--max-xz-mb", type=float, default=50.0, help="fail if the compressed training text is larger")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "mandoc", "xz"):
        if shutil.which(tool) is None:
            raise SystemExit(f"the program {tool!r} is missing; on Debian: apt-get install apt dpkg mandoc xz-utils")
    if not args.packages.is_file():
        raise SystemExit(f"no package list at {args.packages}")
    if args.max_mb <= 0 or args.workers < 1:
        raise SystemExit("--max-mb must be positive and --workers at least 1")
    start = time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - start:6.1f} s] {text}", flush=True)

    caps = package_list(args.packages)
    debs = download(list(caps), args.out / "debs")
    say(f"{len(debs)} of {len(caps)} packages at hand")
    cache = args.out / "clean"
    cache.mkdir(parents=True, exist_ok=True)
    jobs = sorted((name for name in debs if caps[name] > 0), key=lambda name: -debs[name].stat().st_size)
    with ProcessPoolExecutor(args.workers) as pool:
        futures = [pool.submit(read_package, name, debs[name], caps[name], cache) for name in jobs]
        for done, future in enumerate(futures, 1):
            line = future.result()
            if done % 25 == 0 or done == len(futures):
                say(f"{done}/{len(futures)} packages, last {line}")

    documents: list[Document] = []
    for name in jobs:
        with (cache / f"{debs[name].stem}.jsonl").open(encoding="utf-8") as lines:
            documents += [Document(*json.loads(line)) for line in lines]
    collected = sum(len(d.text) for d in documents)
    say(f"{len(documents)} documents, {collected / 1e6:.1f} M characters before deduplication")
    documents.sort(key=lambda d: (-d.score, order(d.name)))  # of two copies the better document keeps a paragraph
    documents, counts = deduplicate(documents)
    say(f"{len(documents)} documents, {sum(len(d.text) for d in documents) / 1e6:.1f} M characters after it")
    documents, overlap, _ = decontaminate(documents, evaluation_text())
    say(f"overlap with the evaluation text: {json.dumps(overlap)}")

    candidates = sum(len(d.text) for d in documents)
    size, cut = 0, len(documents)
    for i, document in enumerate(documents):
        size += len(document.text.encode("utf-8")) + 1
        if size > args.max_mb * 1e6:
            cut = i
            break
    lowest = documents[cut - 1].score if documents else 0.0
    documents = sorted(documents[:cut], key=lambda d: order(d.name))
    heldout: list[Document] = []
    train: list[Document] = []
    heldout_size = 0
    for document in documents:
        pick = int.from_bytes(hashlib.blake2b(f"{SEED}:heldout:{document.name}".encode(), digest_size=4).digest(), "big")
        small = len(document.text) < 100_000 and heldout_size < 1_500_000
        if pick % 200 == 0 and small:
            heldout.append(document)
            heldout_size += len(document.text)
        else:
            train.append(document)
    say(f"training: {len(train)} documents, {sum(len(d.text) for d in train) / 1e6:.1f} M characters; compressing")
    packages = {}
    for document in documents:
        name = document.name.split("/", 1)[0]
        entry = packages.setdefault(name, {"version": "", "documents": 0, "characters": 0})
        entry["documents"] += 1
        entry["characters"] += len(document.text)
    for name, entry in packages.items():
        entry["version"] = unquote(debs[name].name.split("_")[1])
    final = Overlap(evaluation_text())
    hits = {n: np.zeros(len(final.grams[n]), dtype=bool) for n in final.sizes}
    for document in train:
        for n, index in final.find(document.text).items():
            hits[n][index] = True
    overlap["final_training_text"] = {f"share_{n}grams": round(float(hits[n].mean()), 6) for n in final.sizes}
    if hits[13].any():
        raise SystemExit("the training text still shares 13-grams with the evaluation text")
    report = {
        "seed": SEED,
        "collected_characters": collected,
        "deduplication": {**counts, "characters_after": candidates},
        "quality_score_lowest": round(lowest, 4),
        "overlap": overlap,
        "train": write_xz(args.out / "train.txt.xz", [d.text for d in train]),
        "heldout": write_xz(args.out / "heldout.txt.xz", [d.text for d in heldout]),
        "packages": dict(sorted(packages.items())),
        "seconds": round(time.time() - start, 1),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    say(json.dumps({k: report[k] for k in ("train", "heldout", "deduplication")}))
    if report["train"]["bytes_xz"] > args.max_xz_mb * 1e6:  # type: ignore[index]
        raise SystemExit(f"train.txt.xz is over {args.max_xz_mb} MB: run again with a smaller --max-mb")


if __name__ == "__main__":
    main()
