"""``make site``: the course as web pages that need neither a server nor a network.

Figures stay interactive: plotly.js lies beside the pages once and draws a figure when it comes into sight. Formulas become
MathML, which browsers read by themselves. Sliders that need Python say so; sliders inside figures work.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .themes import DARK, DARK_PAPER
from .viz import STEER

PLOTLY = "application/vnd.plotly.v1+json"
ROOT = Path(__file__).resolve().parents[1]
#: Fenced code, inline code, and the two kinds of formulas, in the order in which they win.
_PIECES = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|\$([^\s$](?:[^$\n]*?[^\s$])?)\$", re.DOTALL)
#: What Markdown would read inside a formula.
_MARKS = str.maketrans({"*": "&#42;", "_": "&#95;", "|": "&#124;", "`": "&#96;", "[": "&#91;", "]": "&#93;", "\n": " "})
_LIVE = re.compile(r"(explore|dashboard)\((\w+)")

_FIGURES_JS = (
    STEER
    + """const night = matchMedia('(prefers-color-scheme: dark)');
const colours = COLOURS;
const recolour = (value) => typeof value === 'string' ? colours[value] ?? value
  : Array.isArray(value) ? value.map(recolour)
  : value && typeof value === 'object' ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, recolour(v)])) : value;
const draw = (figure) => {
  const light = JSON.parse(figure.querySelector('script').textContent);
  const spec = night.matches ? recolour(light) : light;
  const place = figure.querySelector('div');
  Plotly.newPlot(place, spec.data, spec.layout, {responsive: true})
    .then(() => spec.frames && Plotly.addFrames(place, spec.frames)).then(() => steer(place));
};
const drawn = [];
const seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting)
  .forEach((e) => { seen.unobserve(e.target); draw(e.target); drawn.push(e.target); }), {rootMargin: '600px'});
document.querySelectorAll('figure.plotly').forEach((figure) => seen.observe(figure));
night.addEventListener('change', () => drawn.forEach(draw));
""".replace("COLOURS", json.dumps(DARK))
)
_STYLE = """body { max-width: 1180px; margin: 0 auto !important; padding: 0 16px 48px !important; }
nav.course { display: flex; gap: 1.5em; padding: 12px 4px; font: 15px system-ui, sans-serif; }
.jp-RenderedMarkdown pre { white-space: pre !important; overflow-x: auto; }
.jp-RenderedHTMLCommon thead th[colspan] { text-align: center; }
@media (max-width: 900px) {  /* a narrow page gives its width to what was printed: aligned columns would break */
  .jp-InputPrompt, .jp-OutputPrompt { display: none !important; }
  .jp-OutputArea-output pre { font-size: 11px !important; }
  .jp-InputArea-editor { max-width: 100%; overflow-x: auto !important; }
}
figure.plotly { margin: 0; min-width: 0; } .live { color: #52606d; font: italic 14px system-ui, sans-serif; margin: 4px 0; }
math { font-size: 1.05em; } math[display=block] { margin: 0.6em 0; overflow-x: auto; }
main.index { font: 16px/1.5 system-ui, sans-serif; max-width: 860px; margin: 0 auto; }
main.index li { margin: 0.7em 0; } main.index small { color: #52606d; display: block; }
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  html:root {
    --jp-layout-color0: PAPER; --jp-layout-color1: PAPER; --jp-layout-color2: #262b32;
    --jp-layout-color3: #3a414a; --jp-content-font-color0: #f2f4f7; --jp-content-font-color1: #e6eaef;
    --jp-content-font-color2: #c3cad2; --jp-content-font-color3: #8b96a3; --jp-ui-font-color0: #f2f4f7;
    --jp-ui-font-color1: #e6eaef; --jp-border-color0: #3a414a; --jp-border-color1: #3a414a;
    --jp-border-color2: #2f353d; --jp-border-color3: #2f353d; --jp-cell-editor-background: #21252b;
    --jp-cell-editor-border-color: #2f353d; --jp-rendermime-table-row-background: #21252b;
    --jp-rendermime-table-row-hover-background: #2f353d; --jp-rendermime-error-background: #402327;
    --jp-content-link-color: #6cb6ff; --jp-mirror-editor-keyword-color: #7ee787;
    --jp-mirror-editor-operator-color: #d2a8ff; --jp-mirror-editor-string-color: #ffa198;
    --jp-mirror-editor-number-color: #7ee787; --jp-mirror-editor-comment-color: #8fb3b3;
    --jp-mirror-editor-builtin-color: #7ee787; --jp-mirror-editor-def-color: #79c0ff;
    --jp-mirror-editor-variable-color: #e6eaef; --jp-mirror-editor-meta-color: #d2a8ff;
    --jp-mirror-editor-punctuation-color: #79c0ff; --jp-cell-prompt-not-active-font-color: #8b96a3;
    --jp-cell-inprompt-font-color: #8b96a3; --jp-cell-outprompt-font-color: #8b96a3;
  }
  body { background: PAPER; color: #e6eaef; } a { color: #6cb6ff; } .live, main.index small { color: #a3adb8; }
}
""".replace("PAPER", DARK_PAPER)


def formulas(markdown: str) -> str:
    """Markdown with ``$...$`` and ``$$...$$`` as MathML; code is left alone.

    >>> formulas("`$x$` and $x$")[:28]
    '`$x$` and <math xmlns="http:'
    """
    from latex2mathml.converter import convert

    def replace(found: re.Match[str]) -> str:
        code, block, inline = found.groups()
        if code:
            return code
        formula = convert(block.strip(), display="block") if block else convert(inline)
        # browsers stretch the bar that opens a norm and not the one that has the exponent
        formula = formula.replace("<mo>&#x02016;", '<mo fence="false" stretchy="false">&#x02016;').translate(_MARKS)
        return f"\n\n{formula}\n\n" if block else formula

    return _PIECES.sub(replace, markdown)


def figure(spec: dict[str, Any]) -> str:
    """A plotly figure as HTML that `figures.js` brings to life; its title is its name for screen readers."""
    spec = {name: value for name, value in spec.items() if name in ("data", "layout", "frames")}
    layout = spec.get("layout", {})
    name = html.escape(re.sub("<[^>]+>", " ", layout.get("title", {}).get("text", "figure")), quote=True)
    # "</" would end the script element
    text = json.dumps(spec, separators=(",", ":")).replace("</", "<\\/")
    height = int(layout.get("height") or 450)
    role = "group" if layout.get("sliders") else "img"  # what is in an image cannot be reached
    return (
        f'<figure class="plotly" role="{role}" aria-label="{name}"><div style="width:100%;height:{height}px"></div>'
        f'<script type="application/json">{text}</script></figure>'
    )


def prepare(notebook: Any) -> Any:
    """The notebook with figures, formulas and links made for a page; the argument is changed."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # files of the repository that are no notebooks are not part of the site: their names stay, as text
            text = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]+\.md\)", r"\1", formulas(cell.source))
            cell.source = re.sub(r"(\]\((?!https?:)[^)]+)\.ipynb", r"\1.html", text)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            live = _LIVE.match(data.get("text/plain", ""))
            if PLOTLY in data:
                output.data = {"text/html": figure(data[PLOTLY])}
            elif live:
                text = f"Here the notebook has live controls around <code>{live[2]}</code>: open it in JupyterLab."
                output.data = {"text/html": f'<p class="live">{text}</p>'}
    return notebook


def heading(notebook: Any) -> str:
    """The first line of a notebook, without its mark."""
    return str(notebook.cells[0].source.splitlines()[0].lstrip("# ").strip())


def _exporter() -> Callable[[Any], str]:
    from nbconvert import HTMLExporter

    # every address here would be a request to somebody else
    nowhere = {name: "" for name in ("require_js_url", "mathjax_url", "mermaid_js_url", "jquery_url")}
    exporter = HTMLExporter(template_name="lab", **nowhere)

    def render(notebook: Any) -> str:
        return str(exporter.from_notebook_node(notebook)[0])

    return render


def _page(body: str, title: str, up: str, neighbours: str) -> str:
    """A rendered notebook with our style, our scripts and links to its neighbours; ``up`` leads to the site's root."""
    head = f'<title>{html.escape(title)} · qoqlab</title><link rel="stylesheet" href="{up}assets/site.css">'
    scripts = f'<script src="{up}assets/plotly.min.js"></script><script src="{up}assets/figures.js"></script>'
    # scripts of the template load libraries from elsewhere; nothing on these pages needs them
    body = re.sub(r"<script\b(?![^>]*application/json)[^>]*>.*?</script>", "", body, flags=re.DOTALL)
    body = re.sub(r"<title>.*?</title>", lambda _: head, body, count=1, flags=re.DOTALL)
    body = re.sub(r"<body[^>]*>", lambda found: f"{found[0]}<nav class='course'>{neighbours}</nav>", body, count=1)
    return body.replace("</body>", f"{scripts}</body>")


def lessons(folder: Path) -> list[Path]:
    """Notebooks of the course in order, then the explorers."""
    return [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob("explorers/*.ipynb"))]


def build(out: Path, folder: Path | None = None) -> list[Path]:
    """Render all notebooks of ``folder`` (default: the course) to ``out``; returns the pages, the index first.

    Raises FileNotFoundError where there are none, as in an installation without the checkout.
    """
    import nbformat
    from plotly.offline import get_plotlyjs

    folder = folder or ROOT / "notebooks"
    found = lessons(folder)
    if not found:
        raise FileNotFoundError(f"no notebooks in {folder}; the site is made in a checkout of the project")
    (out / "assets").mkdir(parents=True, exist_ok=True)
    for name, text in (("plotly.min.js", get_plotlyjs()), ("figures.js", _FIGURES_JS), ("site.css", _STYLE)):
        (out / "assets" / name).write_text(text, encoding="utf-8")
    notebooks = {path.relative_to(folder).with_suffix(".html"): nbformat.read(path, as_version=4) for path in found}
    titles = {page: heading(notebook) for page, notebook in notebooks.items()}
    render, order, pages = _exporter(), list(notebooks), [out / "index.html"]
    for index, (page, notebook) in enumerate(notebooks.items()):
        up = "../" * (len(page.parts) - 1)
        links = [f'<a href="{up}index.html">the course</a>']
        for arrow, other in (("&larr;", index - 1), ("&rarr;", index + 1)):
            if 0 <= other < len(order):
                links.append(f'<a href="{up}{order[other].as_posix()}">{arrow} {html.escape(titles[order[other]])}</a>')
        target = out / page
        target.parent.mkdir(exist_ok=True)
        target.write_text(_page(render(prepare(notebook)), titles[page], up, " ".join(links)), encoding="utf-8")
        pages.append(target)
    pages[0].write_text(_index({page.as_posix(): title for page, title in titles.items()}), encoding="utf-8")
    return pages


def _index(titles: dict[str, str]) -> str:
    def entries(explorers: bool) -> str:
        chosen = {p: t for p, t in titles.items() if p.startswith("explorers/") == explorers}
        return "".join(f'<li><a href="{page}">{html.escape(title)}</a></li>' for page, title in chosen.items())

    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qoqlab: the course</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="assets/site.css"></head>
<body><main class="index"><h1>qoqlab: W4A8KV4 from the roofline to the bits</h1>
<p>The QServe paper, executable. These pages are the notebooks as they were last run: figures turn, zoom and have sliders,
which the arrow keys move as well once Tab has reached the figure.
To change the code, do the exercises and move the controls, open them in JupyterLab with <code>make lab</code>.</p>
<h2>Lessons</h2><ol style="list-style:none;padding:0">{entries(False)}</ol>
<h2>Explorers</h2><p>They compute while you move their controls, so they need Python: <code>make app</code>.</p>
<ol style="list-style:none;padding:0">{entries(True)}</ol></main></body></html>
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line of ``make site``."""
    parser = argparse.ArgumentParser(description="Render the course to web pages that work offline.")
    parser.add_argument("--out", type=Path, default=Path("build/site"), help="folder to write (default: build/site)")
    pages = build(parser.parse_args(arguments).out)
    print(f"{len(pages)} pages; open {pages[0]}")


if __name__ == "__main__":
    main()
