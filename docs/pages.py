"""What the documents hold: their links, anchors, snippets and the names in their text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
MARKDOWN = MarkdownIt("commonmark").enable(["table"])


def title_of(page: Path) -> str:
    """Return the page's first heading."""
    return next(text for text, _ in headings(page))


def headings(page: Path) -> Iterator[tuple[str, str]]:
    """Give each heading of a page, as text and as the anchor that links name."""
    seen: dict[str, int] = {}
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            yield text, anchor(text, seen)


def anchor(heading: str, seen: dict[str, int]) -> str:
    """Return the anchor that GitHub gives a heading; seen counts those of the page so far."""
    name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    count = seen[name] = seen.get(name, -1) + 1
    return f"{name}-{count}" if count else name


def links(page: Path) -> Iterator[str]:
    """Give the targets of a page's links and pictures, as they are written."""
    for token in _walk(MARKDOWN.parse(page.read_text(encoding="utf-8"))):
        target = token.attrGet("href") if token.type == "link_open" else token.attrGet("src")
        if target and token.type in ("link_open", "image"):
            yield str(target)


def named(page: Path) -> Iterator[str]:
    """Give what a page's text sets as code: names, paths and commands."""
    for token in _walk(MARKDOWN.parse(page.read_text(encoding="utf-8"))):
        if token.type == "code_inline":
            yield token.content


def snippets(page: Path, language: str) -> list[str]:
    """Return a page's fenced blocks of a language."""
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def commands(page: Path) -> Iterator[str]:
    """Give the commands of a page's sh blocks, without their comments."""
    for block in snippets(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("  #")[0].strip()
            if command:
                yield command


def _walk(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _walk(token.children or [])
