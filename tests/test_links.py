"""Links of notebooks and pages: files in the repository exist, headings that are pointed to exist, the rest is https."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
#: ``[text](target)`` and ``![text](target)``, without titles; an image inside a link is found as well.
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)")


def documents() -> list[Path]:
    """Markdown files and notebooks, as far as git knows or would know them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.ipynb"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        return sorted(
            path for kind in ("*.md", "*.ipynb") for path in (*ROOT.glob(kind), *ROOT.glob(f"notebooks/**/{kind}"))
        )
    return sorted(path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file())


def text_of(path: Path) -> str:
    """A document's Markdown without blocks of code."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def links(path: Path) -> list[str]:
    """Targets of all links, those in inline code left out."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", text_of(path)))


def anchors(path: Path) -> set[str]:
    """Headings of a document as GitHub makes them into marks; JupyterLab keeps the words and puts hyphens."""
    marks = set()
    for words in re.findall(r"^#+\s+(.*?)\s*$", text_of(path), re.MULTILINE):
        marks |= {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"), words.replace(" ", "-")}
    return marks


DOCUMENTS = documents()


def test_there_are_documents():
    names = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "notebooks/00_map.ipynb", "notebooks/explorers/recipe_lab.ipynb"} <= names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in links(path):
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/\S*)?", target), f"{target}: not a plain https address"
            continue
        name, _, mark = target.partition("#")
        place = path if not name else path.parent / name
        assert place.exists(), f"{target} leads nowhere"
        assert not mark or mark in anchors(place), f"{target}: no such heading"


def test_the_checker_finds_what_is_broken(tmp_path):
    page = tmp_path / "page.md"
    for text in ("[a](missing.md)", "[a](#nothing)", "[a](http://example.org)", "![a](none.png)"):
        page.write_text(f"# Title\n\n{text}\n")
        with pytest.raises(AssertionError):
            test_links_lead_somewhere(page)
    page.write_text(
        "# Title, with `code`\n\n[a](#title-with-code) `[b](none)` [c](https://arxiv.org/abs/2405.04532) [d](page.md)\n"
    )
    test_links_lead_somewhere(page)
