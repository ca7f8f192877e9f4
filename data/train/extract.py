"""Turn documentation files (HTML, DocBook, Mallard, man, Info, POD, RST, Markdown, text) into clean English text.

Every reader returns *blocks*: pairs ``(kind, text)`` with the kinds ``"h"`` (heading), ``"p"`` (paragraph), ``"l"``
(list item), ``"s"`` (signature or term) and ``"c"`` (code, lines kept).  :func:`clean` filters the blocks of one
file and lays them out as plain text; it returns ``None`` for files which are not English prose documentation.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import subprocess
import textwrap
import unicodedata
import zlib
from typing import NamedTuple

from lxml import etree

Block = tuple[str, str]


def words(text: str) -> frozenset[str]:
    """The set of the words of a text."""
    return frozenset(text.split())


MAX_RAW = 6_000_000  # bytes: larger files are dumps, not documentation
STOP = words(
    "the a an of to in is are be was were and or not that this it its for on with as by from at if can will which "
    "you your when has have may must should use used one only any all other than then these there each but do does "
    "also into so such no more"
)

SKIP_TAGS = words(
    "script style nav footer header form svg math noscript button select option iframe object head audio video aside "
    "indexterm remark toc index info bookinfo articleinfo chapterinfo refentryinfo revhistory legalnotice "
    "annotation-xml title_abbrev anchor"
)
PRE_TAGS = words("pre programlisting screen literallayout code-block synopsis cmdsynopsis funcsynopsis")
HEAD_TAGS = words("h1 h2 h3 h4 h5 h6 title bridgehead")
ITEM_TAGS = words("li listitem")
TERM_TAGS = words("dt term")
BLOCK_TAGS = (
    words(
        "p para simpara div section article main dd tr table ul ol dl blockquote center body td th entry row note tip "
        "warning caution important page item steps step procedure variablelist itemizedlist orderedlist figure "
        "caption chapter sect1 sect2 sect3 sect4 refsection refsect1 refsect2 formalpara example book hr"
    )
    | HEAD_TAGS
    | ITEM_TAGS
    | TERM_TAGS
)
BAD_CLASSES = words(
    "nav navbar navheader navfooter navigation navpanel sphinxsidebar sphinxsidebarwrapper sidebar related footer "
    "headerlink toc toctree-wrapper breadcrumb breadcrumbs wy-breadcrumbs search searchbox searchform linenos lineno "
    "genindextable indextable index-entry printindex copyright permalink mw-editsection editsection nav-sub rst-nav "
    "bottomnav topnav subnav directory memproto memitem memberdecls summary-table head foot manual-text-head "
    "table-of-contents contents-list short-contents shortcontents shorttoc sectiontoc local_toc contents revision-info "
    "prevnext skip-link nav-wide-wrapper sidebar-scrollbox menubar ltoc nodetoc"
)

BAD_NAME = re.compile(
    r"(copyright|licen[sc]e|copying|/gpl|lgpl|gfdl|/fdl|changelog|/changes|whatsnew|what_s_new|release[-_]?notes|"
    r"relnotes|/news|/authors|/thanks|/todo|contributors|credits|acknowledg|genindex|modindex|searchindex|/search\.|"
    r"annotated|hierarchy|functions_|globals_|-members\.|_8h|_8c|_8dox|_source\.|/dir_|inherit|namespacemembers|"
    r"allclasses|package-tree|package-frame|package-use|class-use|/index-\d|index-all|overview-tree|"
    r"constant-values|serialized-form|deprecated-list|/classes\.html|bibliography|glossary_index|sitemap|"
    r"/locale/|/icons/|/themes/|robots|requirements\.txt|/_sources/|/tests?/|locallang|keysym|unicode[-_]?data|"
    r"wordlist|dictionary\.txt|/README\.Debian|NEWS\.Debian|upstream/metadata)",
    re.I,
)
LANGS = sorted(
    words(
        "ar bg bn bs ca cs da de el eo es et eu fa fi fr ga gl he hi hr hu ia id is it ja kk km ko lt lv mk mr nb nds nl "
        "nn pa pl pt pt_br pt-br ro ru se sk sl sr sv ta te tg th tr ug uk uz vi wa xh zh zh_cn zh_tw zh-cn zh-tw de_ch "
        "ca@valencia sr@latin sr@ijekavian en_gb en-gb oc ml af be ast gu kn or si mai az sq hy ka lo my ne ku as fy"
    )
)
FOREIGN = re.compile(r"(/(" + "|".join(LANGS) + r")(_[a-z]{2})?/|\.(" + "|".join(LANGS) + r")(\.[a-z0-9]+)*$)", re.I)
SKIP_SECTIONS = re.compile(
    r"^[\d.\s]*(see also|authors?|copyright.*|licen[sc]e.*|reporting bugs|colophon|bug reports?|availability|history|"
    r"index|references?|external links|table of contents|contents|bibliography|acknowledge?ments?|credits|"
    r"inheritance diagram.*|further reading|change ?log|maintainers?|translations?|resources)[\s:.]*$",
    re.I,
)
LEGAL = re.compile(
    r"(permission is (hereby )?granted|without (any )?warrant|copyright (©|\(c\)|19|20)|©|all rights reserved|"
    r"gnu (general|free|lesser|library)|creative commons|merchantability|redistribution and use|free software "
    r"foundation|apache license|bsd licen[sc]e|mit licen[sc]e|licen[sc]ed under|public licen[sc]e|trademark)",
    re.I,
)
NAVIGATION = re.compile(
    r"^[\[(]?(next|prev|previous|up|home|contents|index|top|back|edit|view source|source code|more\.\.\.|skip to|"
    r"last (updated|modified)|generated (by|on)|table of contents|return to|go to|created using|built with|"
    r"show source|powered by|referenced by|references |definition at line|inherits|inherited by|implements )\b.{0,90}$",
    re.I,
)
SPACES = re.compile(r"\s+")
WORD = re.compile(r"[A-Za-z][a-z'’]*")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufffd]")
ENTITY = re.compile(r"&(?!(?:amp|lt|gt|quot|apos);)([A-Za-z][\w.-]*);")


class Document(NamedTuple):
    """One cleaned file: its name, its text and a quality score between 0 and 1."""

    name: str
    text: str
    score: float


def wanted(path: str) -> bool:
    """Tell whether a package member of that path may hold English prose documentation."""
    low = path.lower()
    if not low.startswith(("./usr/share/", "./usr/lib/")) or BAD_NAME.search(low) or FOREIGN.search(low):
        return False
    stem = re.sub(r"\.(gz|xz|bz2)$", "", low)
    if low.startswith("./usr/share/man/"):
        return low.startswith("./usr/share/man/man") and "3x11" not in low
    if low.startswith("./usr/share/info/"):
        return ".info" in low
    if stem.endswith((".html", ".htm", ".xhtml", ".html.en", ".docbook", ".page", ".pod")):
        return True
    if "/doc/" not in low and "/help/" not in low:
        return False
    return stem.endswith((".txt", ".rst", ".md", ".adoc", ".asciidoc", "/readme", "faq", "howto"))


def decompress(path: str, raw: bytes) -> bytes:
    """Undo gzip, xz or bzip2 by file ending.  Returns at most ``MAX_RAW`` bytes' worth of document, else nothing."""
    try:
        if path.endswith(".gz"):
            raw = gzip.decompress(raw)
        elif path.endswith(".xz"):
            raw = lzma.decompress(raw)
        elif path.endswith(".bz2"):
            raw = bz2.decompress(raw)
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return b""
    return raw if len(raw) <= MAX_RAW else b""


def decode(raw: bytes) -> str:
    """Decode UTF-8, else Latin-1."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


# ---------------------------------------------------------------- readers


def code_text(text: str) -> str:
    """Dedent a code block, drop its blank borders and trailing blanks."""
    lines = [line.rstrip() for line in text.expandtabs(4).replace("\r", "").split("\n")]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) > 2 and not any(lines[1::2]):  # some formatters put a blank line after every line
        lines = lines[::2]
    return textwrap.dedent("\n".join(lines))


class _Walker:
    """Collects blocks from an element tree."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.buffer: list[str] = []

    def flush(self, kind: str) -> None:
        if self.buffer:
            text = SPACES.sub(" ", "".join(self.buffer)).strip()
            self.buffer.clear()
            if text:
                self.blocks.append((kind, text))

    def walk(self, el: etree._Element, kind: str) -> None:
        tag = el.tag
        if not isinstance(tag, str):
            return
        if tag.startswith("{"):
            tag = tag.rsplit("}", 1)[1]
        if tag in SKIP_TAGS or el.get("role") in ("navigation", "search", "contentinfo", "banner"):
            return
        names = f"{el.get('class') or ''} {el.get('id') or ''}"
        if names != " " and not BAD_CLASSES.isdisjoint(names.lower().split()):
            return
        if tag in PRE_TAGS or (tag == "code" and el.get("mime")):
            self.flush(kind)
            code = code_text("".join(el.itertext()))
            if code:
                self.blocks.append(("c", code))
            return
        block = tag in BLOCK_TAGS
        if block:
            self.flush(kind)
            if tag in HEAD_TAGS:
                kind = "h"
            elif tag in ITEM_TAGS:
                kind = "l"
            elif tag in TERM_TAGS:
                kind = "s"
            elif tag in ("dd", "td", "entry", "blockquote"):
                kind = "p"
        elif tag in ("br", "cell", "guimenu", "guisubmenu", "guimenuitem", "keycap"):
            self.buffer.append(" ")
        if el.text:
            self.buffer.append(el.text)
        first = True
        for child in el:
            self.walk(child, kind if kind != "l" or first else "p")
            if block and kind == "l" and self.blocks and not self.buffer:
                first = False
            if child.tail:
                self.buffer.append(child.tail)
        if block:
            self.flush(kind if kind != "l" or first else "p")


def html_blocks(raw: bytes) -> list[Block]:
    """Blocks of an HTML page (tags of navigation, menus and scripts left out)."""
    text = decode(raw)
    root = etree.fromstring(text.encode("utf-8"), etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True))
    if root is None:
        return []
    roles = root.xpath("//*[@role='main']") or root.xpath("//main") or root.xpath("//div[@class='body']")
    main = roles[0] if roles else next(iter(root.xpath("//body")), root)
    walker = _Walker()
    walker.walk(main, "p")
    walker.flush("p")
    return walker.blocks


def xml_blocks(raw: bytes) -> list[Block]:
    """Blocks of a DocBook or Mallard file; entities such as ``&kate;`` become words."""
    text = ENTITY.sub(lambda m: m[1][0].upper() + m[1][1:].replace("-", " "), decode(raw))
    text = re.sub(r"<!DOCTYPE.*?(\]\s*>|>)", "", text, count=1, flags=re.S)
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    root = etree.fromstring(
        text.encode("utf-8"),
        etree.XMLParser(recover=True, remove_comments=True, remove_pis=True, resolve_entities=False),
    )
    if root is None:
        return []
    walker = _Walker()
    walker.walk(root, "p")
    walker.flush("p")
    return walker.blocks


def man_blocks(raw: bytes) -> list[Block]:
    """Blocks of a manual page, formatted by the program ``mandoc`` (which must be installed)."""
    if raw.lstrip()[:4] == b".so ":
        return []
    out = subprocess.run(["mandoc", "-K", "utf-8", "-T", "html"], input=raw, capture_output=True, timeout=20, check=False)
    return html_blocks(out.stdout) if out.stdout else []


def english(text: str) -> float:
    """Share of English function words among the words of a text."""
    found = WORD.findall(text)
    return sum(w.lower() in STOP for w in found) / len(found) if found else 0.0


UNDERLINE = re.compile(r"^([=\-~^\"'*+#.])\1{2,}$")
BULLET = re.compile(r"^\s*([-*•+o]|\d{1,2}[.)])\s+")


def text_blocks(text: str) -> list[Block]:
    """Blocks of plain text: paragraphs at blank lines, deeper indented non-prose as code, underlined headings."""
    blocks: list[Block] = []
    for chunk in re.split(r"\n[ \t]*\n", text.expandtabs(8).replace("\r", "")):
        lines = [line.rstrip() for line in chunk.split("\n") if line.strip()]
        while lines and UNDERLINE.match(lines[0].strip()):
            lines.pop(0)
        if not lines:
            continue
        if len(lines) >= 2 and UNDERLINE.match(lines[1].strip()):
            blocks.append(("h", lines[0].strip()))
            lines = lines[2:]
            if not lines:
                continue
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        joined = " ".join(line.strip() for line in lines)
        if BULLET.match(lines[0]):
            item: list[str] = []
            for line in lines:
                if BULLET.match(line) and item:
                    blocks.append(("l", " ".join(item)))
                    item = []
                item.append(BULLET.sub("", line).strip() if not item else line.strip())
            blocks.append(("l", " ".join(item)))
        elif indent >= 2 and english(joined) < 0.22:
            code = code_text("\n".join(lines))
            if blocks and blocks[-1][0] == "c":
                blocks[-1] = ("c", blocks[-1][1] + "\n\n" + code)
            else:
                blocks.append(("c", code))
        else:
            blocks.append(("p", SPACES.sub(" ", joined)))
    return blocks


def rst_blocks(text: str) -> list[Block]:
    """Blocks of reStructuredText or Markdown after light removal of its mark-up."""
    text = re.sub(r"(?m)^\s*\.\. (_[^:\n]*:.*|\w[\w-]*::.*|\|.*|\[.*)$", "", text)
    text = re.sub(r"(?m)^\s*:[\w -]+:\s.*$", "", text)
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)(\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<\n]+?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"!?\[([^\]\n]+)\]\([^)\n]*\)", r"\1", text)
    text = re.sub(r"<!--.*?-->|</?[a-z][^>\n]*>", "", text, flags=re.S)
    text = re.sub(r"(?m)^#{1,6}\s+(.*)$", r"\n\1\n=====\n", text)
    text = re.sub(r"``?|\*\*", "", text).replace("::\n", ":\n")
    return text_blocks(text)


def info_blocks(text: str) -> list[Block]:
    """Blocks of a GNU Info file, menus and node headers removed."""
    blocks: list[Block] = []
    for node in text.split("\x1f")[1:]:
        body = node.lstrip("\n").split("\n", 1)
        if len(body) < 2 or not body[0].startswith("File:") or re.search(r"Node: .*\bIndex\b", body[0]):
            continue
        body_text = re.sub(r"(?ms)^\* Menu:.*?(?=\n\n(?!\*)|\Z)", "", body[1])
        body_text = re.sub(r"(?m)^\* [^\n]*::?.*$", "", body_text)
        body_text = re.sub(r"\*[Nn]ote ([^:]*)::", r"\1", body_text)
        body_text = re.sub(r"\*[Nn]ote ([^:]*):\s*[^.,]*", r"\1", body_text)
        blocks += text_blocks(body_text)
    return blocks


POD_CODE = re.compile(r"([A-Z])<(?:<+ ([^<>]*?) >+|([^<>]*))>")


def pod_blocks(text: str) -> list[Block]:
    """Blocks of Perl POD."""
    blocks: list[Block] = []
    active = skipping = False

    def plain(s: str) -> str:
        for _ in range(4):
            s = POD_CODE.sub(_pod_inline, s)
        return SPACES.sub(" ", s).strip().replace("‹", "<").replace("›", ">")

    for chunk in re.split(r"\n[ \t]*\n", text.replace("\r", "")):
        chunk = chunk.strip("\n")
        command = re.match(r"=(\w+)\s*(.*)", chunk, re.S)
        if command:
            name, rest = command.groups()
            active = name != "cut"
            if name == "begin":
                skipping = True
            elif name == "end":
                skipping = False
            elif name.startswith("head"):
                blocks.append(("h", plain(rest)))
            elif name == "item" and not re.fullmatch(r"[*\d.\s]*", rest):
                blocks.append(("s", plain(rest)))
        elif active and not skipping and chunk.strip():
            if chunk[0] in " \t":
                code = code_text(chunk)
                if blocks and blocks[-1][0] == "c":
                    blocks[-1] = ("c", blocks[-1][1] + "\n\n" + code)
                else:
                    blocks.append(("c", code))
            else:
                blocks.append(("p", plain(chunk)))
    return blocks


def _pod_inline(match: re.Match[str]) -> str:
    body = match[2] if match[2] is not None else match[3]
    if match[1] in "XZ":
        return ""
    if match[1] == "E":
        return {"lt": "‹", "gt": "›", "verbar": "|", "sol": "/"}.get(body, "")
    return body.split("|")[0] if match[1] == "L" else body


def read_blocks(path: str, raw: bytes) -> list[Block]:
    """Blocks of one package member, by the reader which its path calls for."""
    low = re.sub(r"\.(gz|xz|bz2)$", "", path.lower())
    raw = decompress(path.lower(), raw)
    if not raw:
        return []
    if "/man/man" in low:
        return man_blocks(raw)
    if low.startswith("./usr/share/info/"):
        return info_blocks(decode(raw))
    if low.endswith((".docbook", ".page")):
        return xml_blocks(raw)
    if low.endswith(".pod"):
        return pod_blocks(decode(raw))
    if low.endswith((".rst", ".md", ".adoc", ".asciidoc")):
        return rst_blocks(decode(raw))
    if low.endswith((".html", ".htm", ".xhtml", ".html.en")):
        return html_blocks(raw)
    return text_blocks(decode(raw))


# ---------------------------------------------------------------- cleaning


def tidy(text: str, code: bool = False) -> str:
    """Unicode NFC, no control or zero-width characters; outside code no link marks either."""
    text = unicodedata.normalize("NFC", text).replace("\u00a0", " ").replace("‐", "-").replace("‑", "-")
    if not code:
        text = text.replace("¶", "").replace("[source]", "").replace("[edit]", "").rstrip()
    return CONTROL.sub("", text)


def wrap(text: str, width: int, first: str = "", rest: str = "") -> str:
    """Fill a paragraph to ``width`` columns (no wrapping for width 0), with the given line prefixes."""
    if not width:
        return first + text
    lines: list[str] = []
    line = first
    empty = True
    for word in text.split(" "):
        if not empty and len(line) + 1 + len(word) > width:
            lines.append(line)
            line, empty = rest, True
        line += word if empty else " " + word
        empty = False
    lines.append(line)
    return "\n".join(lines)


def keep_code(text: str) -> bool:
    """Tell whether a code block is short and readable enough to keep."""
    lines = text.split("\n")
    if len(lines) > 50 or max(map(len, lines)) > 120:
        return False
    letters = sum(c.isalpha() or c.isspace() for c in text)
    digits = sum(c.isdigit() for c in text)
    return letters > 0.5 * len(text) and digits < 0.2 * len(text)


def clean(name: str, blocks: list[Block]) -> Document | None:
    """Filter and lay out the blocks of one file.

    Parameters: ``name`` (package and path, fixes the line width of the layout by its hash) and the ``blocks``.
    Returns the document, or ``None`` if less than 60 words of English prose remain.
    """
    kept: list[Block] = []
    legal = skip = 0
    for kind, text in blocks:
        text = tidy(text, kind == "c")
        if kind == "h":
            skip = bool(SKIP_SECTIONS.match(text)) and len(text) < 60
            if not skip and len(text) < 120 and re.search("[A-Za-z]{2}", text) and not NAVIGATION.match(text):
                kept.append((kind, text))
            continue
        if skip or not text.strip():
            continue
        if kind == "c":
            if keep_code(text):
                kept.append((kind, text))
            continue
        if LEGAL.search(text):
            legal += 1
            continue
        if len(text) < 100 and NAVIGATION.match(text):
            continue
        letters = sum(map(str.isalpha, text))
        if letters < 0.6 * len(text) or text.count("|") > 3:
            continue
        found = WORD.findall(text)
        longest = max(map(len, text.split()))
        if len(found) < 2 or longest > 90:
            continue
        if kind == "s":
            if len(text) < 160:
                kept.append((kind, text))
            continue
        if len(found) >= 8:
            if sum(w.lower() in STOP for w in found) < 0.16 * len(found):
                continue
            if not text.isascii() and sum(map(str.isascii, text)) < 0.95 * len(text):
                continue
            kept.append((kind, text))
        elif len(text) < 90:
            kept.append(("x" if kind == "p" else "y", text))  # a short piece: needs prose beside it
    if legal > 3 and legal * 3 > len(kept):
        return None
    # runs of more than five short pieces are menus and tables; a heading needs something beneath it
    out: list[Block] = []
    run: list[Block] = []
    for block in [*kept, ("end", "")]:
        if block[0] in "xys":
            run.append(block)
            continue
        if len(run) <= 5:
            out += run
        run = []
        if block[0] != "end":
            if block[0] == "h" and out and out[-1][0] == "h" and len(out) > 1 and out[-2][0] == "h":
                out.pop()
            out.append(block)
    while out and out[-1][0] in "hxys":
        out.pop()
    prose = [text for kind, text in out if kind in "pl"]
    prose_words = WORD.findall(" ".join(prose))
    if len(prose_words) < 60:
        return None
    stop = sum(w.lower() in STOP for w in prose_words) / len(prose_words)
    prose_chars = sum(map(len, prose))
    code_chars = sum(len(text) for kind, text in out if kind == "c")
    if code_chars > 1.2 * prose_chars:
        budget = 0.6 * prose_chars
        trimmed: list[Block] = []
        for kind, text in out:
            if kind == "c":
                budget -= len(text)
                if budget < 0:
                    continue
            trimmed.append((kind, text))
        out = trimmed
    total = sum(len(text) for _, text in out)
    score = 0.4 * min(stop / 0.4, 1.0) + 0.35 * prose_chars / total + 0.25 * min(len(prose_words) / len(prose) / 40.0, 1.0)
    if stop < 0.27 or prose_chars < 0.4 * total:
        return None
    pick = hashlib.blake2b(name.encode(), digest_size=2).digest()
    width = (0, 0, 72, 72, 78)[pick[0] % 5]
    bullet = ("* ", "- ")[pick[1] % 2]
    parts: list[str] = []
    for kind, text in out:
        text = text.strip() if kind != "c" else text
        if kind == "c":
            parts.append(textwrap.indent(text, "    "))
        elif kind in "ly":
            parts.append(wrap(text, width, bullet, "  "))
        else:
            parts.append(wrap(text, width))
    return Document(name, "\n\n".join(parts), score)
