"""Pages that need no network: tables, pictures and text as one HTML file; the same tables as Markdown."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass

_STYLE = """
body{font-family:system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{border-bottom:2px solid #888;font-weight:600}
th.word,td.word{text-align:left}
.scroll{overflow-x:auto}
img{max-width:100%}
pre{background:#f4f4f4;padding:1rem;overflow-x:auto}
.warning{background:#fff3cd;padding:.6rem 1rem;border-left:4px solid #e0a800}
.note{color:#555;font-size:.9rem;max-width:60rem}
.pair{border:1px solid #ddd;border-radius:6px;padding:1rem;margin:1rem 0;display:flex;gap:1.2rem;align-items:flex-start}
.pair img{max-width:260px;max-height:260px;border:1px solid #eee}
.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 .8rem}
.chosen{border-left:4px solid #009e73;padding-left:.7rem}
.rejected{border-left:4px solid #d55e00;padding-left:.7rem}
.label{color:#555;font-size:.85rem}
"""


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


def inert(text: str) -> str:
    """Text for Markdown: a model's name must not break a table or become markup."""
    flat = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        flat = flat.replace(mark, "\\" + mark)
    return flat
