"""Pages that need no network: tables, pictures and text as one HTML file; the same tables as Markdown and for a terminal."""

from __future__ import annotations

import base64
import html
import io
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--text:#222;--quiet:#555;--back:#fff;--card:#f4f4f4;--line:#ddd;--strong:#888;
--up:#17692b;--down:#a5202f;--warn:#fff3cd}
@media (prefers-color-scheme:dark){:root{--text:#e4e6e9;--quiet:#a9b0b8;--back:#16181b;--card:#22262b;--line:#3a4047;
--strong:#7a828b;--up:#6fcf8a;--down:#ff8f8f;--warn:#4a3d10}}
body{font:1rem/1.45 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:var(--text);background:var(--back)}
h1,td.word,td,.label{overflow-wrap:anywhere}
table{border-collapse:collapse;margin:1rem 0;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .55rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th{border-bottom:2px solid var(--strong);font-weight:600;white-space:normal;overflow-wrap:anywhere;min-width:5.5rem}
th.word,td.word{text-align:left}
td.word{white-space:normal;min-width:9rem}
.scroll{overflow-x:auto}
img{max-width:100%}
figure{margin:0}
figure img{background:#fff;border-radius:6px}
figcaption{color:var(--quiet);font-size:.85rem;padding:0 .6rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,28rem),1fr));gap:1.2rem}
pre{background:var(--card);padding:1rem;overflow-x:auto;font-size:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
.warning{background:var(--warn);padding:.6rem 1rem;border-left:4px solid #e0a800}
.note{color:var(--quiet);font-size:.9rem;max-width:60rem}
.up{color:var(--up)} .down{color:var(--down)} .none{color:var(--quiet)}
.pair{border:1px solid var(--line);border-radius:6px;padding:1rem;margin:1rem 0;display:flex;flex-wrap:wrap;gap:1.2rem;
align-items:flex-start}
.pair>div:last-child{flex:1;min-width:min(100%,18rem)}
.pair img{width:100%;min-width:8rem;max-width:16rem;max-height:16rem;object-fit:contain;border:1px solid var(--line)}
.lead{font-weight:600;margin-bottom:.5rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;margin:.2rem 0 .8rem}
.chosen{border-left:4px solid #009e73;padding-left:.7rem}
.rejected{border-left:4px solid #d55e00;padding-left:.7rem}
.label{color:var(--quiet);font-size:.85rem}
summary{cursor:pointer;margin:.5rem 0}
@media (max-width:40rem){td.word{min-width:6rem}}
@media print{body{max-width:none;margin:0}.scroll{overflow:visible}table{font-size:.7rem}th,td{white-space:normal;padding:.2rem .3rem}
th,td.word{min-width:3.8rem}figure,img,tr{break-inside:avoid}}
"""
# Nothing is fetched and nothing runs, whatever text the page shows.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Table:
    """head and rows of text; the first `words` columns are words, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    note: str = ""


def page(title: str, parts: list[str]) -> str:
    """The whole page; `title` is text, `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def folded(title: str, inside: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def picture(content: bytes, alt: str, kind: str = "image/png") -> str:
    source = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{source}">'


def plot_png(figure: Any, dpi: int) -> bytes:
    """A matplotlib figure as PNG; letters of a name that its font lacks are boxes, told in no warning: tables have the name."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def figure(content: bytes, title: str, caption: str = "") -> str:
    """A plot with a sentence below it; `title` is what a reader who sees no pictures is told."""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture(content, title)}{below}</figure>"


def table_html(table: Table) -> str:
    def cells(row: tuple[str, ...], tag: str) -> str:
        kinds = [' class="word"' if index < table.words else "" for index in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in table.rows)
    return (
        (heading(table.title) if table.title else "")
        + '<div class="scroll"><table>\n'
        + f"<thead><tr>{cells(table.head, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        + (paragraph(table.note, "note") if table.note else "")
    )


def table_markdown(table: Table) -> str:
    ruler = ["---" if index < table.words else "---:" for index in range(len(table.head))]
    lines = [table.head, *table.rows]
    texts = ["| " + " | ".join(map(inert, line)) + " |" for line in lines]
    texts.insert(1, "| " + " | ".join(ruler) + " |")
    parts = [f"## {inert(table.title)}", "", *texts]
    return "\n".join([*parts, "", table.note] if table.note else parts)


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None of a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(table: Table, width: int | None = None) -> Iterator[str]:
    """The table as text: aligned columns, heads wrapped to the width of what stands below them.

    A table wider than `width` goes on below itself, its columns of words repeated.
    """
    widths = [
        max(len(cell) for cell in (*head.split(), *cells))
        for head, *cells in zip(table.head, *table.rows, strict=True)
    ]
    wrapped = [
        textwrap.wrap(head, width, break_on_hyphens=False)
        for head, width in zip(table.head, widths, strict=True)
    ]
    deepest = max(map(len, wrapped))
    heads = zip(*([""] * (deepest - len(lines)) + lines for lines in wrapped), strict=True)
    rows = [*heads, ["-" * width for width in widths], *table.rows]
    for number, columns in enumerate(_parts(widths, table.words, width)):
        if number:
            yield ""
        for row in rows:
            aligned = (
                row[i].ljust(widths[i]) if i < table.words else row[i].rjust(widths[i]) for i in columns
            )
            yield "  ".join(aligned).rstrip()


def _parts(widths: list[int], words: int, width: int | None) -> list[list[int]]:
    """Columns of each part of a table that is at most `width` wide, or has one column of numbers."""
    parts = [list(range(words))]
    for column in range(words, len(widths)):
        wider = [*parts[-1], column]
        full = width is not None and sum(widths[i] + 2 for i in wider) - 2 > width
        if full and len(parts[-1]) > words:
            wider = [*range(words), column]
            parts.append(wider)
        parts[-1] = wider
    return parts


def inert(text: str) -> str:
    """Text for Markdown: a model's name must not break a table or become markup."""
    flat = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        flat = flat.replace(mark, "\\" + mark)
    return flat
