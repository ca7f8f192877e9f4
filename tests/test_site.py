"""The course as web pages: nothing is fetched from elsewhere, every link leads somewhere, figures and formulas are there."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("latex2mathml", reason="latex2mathml, of the extra lab, makes the formulas")

from qoqlab import site

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    return {page.relative_to(out).as_posix(): page for page in site.build(out)}


class Reader(HTMLParser):
    """Collects what a page fetches, where its links lead, and how often each element occurs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        values = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif "src" in values:
            self.fetched.append(values["src"])
        elif tag == "link":
            self.fetched.append(values.get("href", ""))


def test_every_notebook_has_a_page(pages):
    wanted = {path.relative_to(FOLDER).with_suffix(".html").as_posix() for path in site.lessons(FOLDER)}
    assert set(pages) == wanted | {"index.html"}


def test_nothing_is_fetched_from_elsewhere(pages):
    for name, page in pages.items():
        text = page.read_text(encoding="utf-8")
        for address in Reader(text).fetched:
            assert address.startswith("data:") or (page.parent / address).is_file(), f"{name}: {address[:80]}"
        assert not re.search(r"url\(['\"]?https?:|@import", text), name


def test_every_link_leads_somewhere(pages):
    for name, page in pages.items():
        for link in Reader(page.read_text(encoding="utf-8")).links:
            path, _, mark = link.partition("#")
            if not link.startswith("https://") and path:
                target = page.parent / path
                assert target.is_file() and not path.endswith(".ipynb"), f"{name}: {link}"
            assert not (mark and not path) or f'id="{mark}"' in page.read_text(encoding="utf-8"), f"{name}: {link}"


def test_figures_are_there_once_each_and_plotly_once_for_all(pages):
    for path in site.lessons(FOLDER):
        page = pages[path.relative_to(FOLDER).with_suffix(".html").as_posix()]
        outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
        wanted = sum(site.PLOTLY in output.get("data", {}) for output in outputs)
        text = page.read_text(encoding="utf-8")
        assert Reader(text).count.get("figure", 0) == wanted, path.stem
        specs = re.findall(r'<script type="application/json">(.*?)</script></figure>', text, re.DOTALL)
        assert len(specs) == wanted and all(json.loads(spec)["data"] for spec in specs)
        assert page.stat().st_size < 1_500_000, "plotly.js lies beside the pages, not in them"


def test_formulas_are_mathml_and_none_is_left(pages):
    for path in site.lessons(FOLDER):
        cells = nbformat.read(path, as_version=4).cells
        text = pages[path.relative_to(FOLDER).with_suffix(".html").as_posix()].read_text(encoding="utf-8")
        for cell in cells:
            if cell.cell_type == "markdown":
                made = site.formulas(cell.source)
                assert "merror" not in made and not re.search(r"<m[a-z]+>\\[a-zA-Z]", made), "a command it does not know"
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert "$$" not in prose and not re.search(
            r"\\(frac|text|sum|operatorname)", re.sub(r"<annotation.*?</annotation>", "", prose)
        )


@pytest.mark.parametrize(
    ("markdown", "wanted"),
    [
        ("`$x$`", "`$x$`"),
        ("```\n$x$ and $y$\n```", "```\n$x$ and $y$\n```"),
        ("it costs 5$ or 6 $ today", "it costs 5$ or 6 $ today"),
    ],
)
def test_what_is_no_formula_stays(markdown, wanted):
    assert site.formulas(markdown) == wanted


def test_markdown_finds_nothing_to_read_in_a_formula():
    made = site.formulas("$M^* \\le |x_i|$ and $N^*$")
    assert made.count("<math") == 2 and not set("*_|") & set(re.sub(r"<[^>]*>", "", made))


def test_the_bars_of_a_norm_are_alike():
    text = site.formulas(r"$\lVert y\rVert^2$ and $$\lVert y\rVert$$")
    bars = re.findall(r"<mo[^>]*>&#x02016;", text)
    assert len(bars) == 4 and all('stretchy="false"' in bar for bar in bars)


def test_a_title_cannot_break_out_of_a_page():
    made = site.figure({"data": [], "layout": {"title": {"text": 'a "b" </script><i>c</i>'}}})
    assert made.count("</script>") == 1 and 'aria-label="a &quot;b&quot;' in made


def test_live_controls_say_where_they_live(pages):
    text = pages["explorers/recipe_lab.html"].read_text(encoding="utf-8")
    assert "open it in JupyterLab" in text


def test_no_notebooks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebooks in"):
        site.build(tmp_path / "out", tmp_path)
