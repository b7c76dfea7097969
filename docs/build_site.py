"""Build the documents and the API's pages as a site: python docs/build_site.py build/site"""

from __future__ import annotations

import html
import os
import shutil
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import pages  # noqa: E402
import pdoc  # noqa: E402
from markdown_it.token import Token  # noqa: E402
from pygments import highlight  # noqa: E402
from pygments.formatters import HtmlFormatter  # noqa: E402
from pygments.lexers import get_lexer_by_name  # noqa: E402

PACKAGES = ("agents", "envs")
FORMATTER = HtmlFormatter(nowrap=True)
STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; display: flex; }
nav { flex: 0 0 13rem; padding: 1.5rem 1rem 2rem 1.5rem; border-right: 1px solid var(--line); min-height: 100vh; }
nav a { display: block; padding: .12rem 0; text-decoration: none; }
nav b { display: block; margin-top: 1rem; }
nav .here { font-weight: 600; }
main { flex: 1 1 auto; max-width: 62rem; min-width: 0; padding: 1rem 2.5rem 4rem; }
a[href] { color: #2a6fb8; }
img { max-width: 100%; background: #fff; }
pre { padding: .8rem 1rem; overflow-x: auto; background: var(--faint); border: 1px solid var(--line); }
code { font: .88em/1.45 ui-monospace, monospace; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
@media (max-width: 60rem) { body { display: block; } nav { min-height: 0; } main { padding: 0 1.5rem 3rem; } }
"""


def place(page: Path) -> Path:
    """Return where a page stands in the site."""
    path = page.relative_to(pages.ROOT)
    return path.with_name("index.html") if path.name == "README.md" else path.with_suffix(".html")


def target(link: str, page: Path, site: Path) -> str | None:
    """Return where a page's link leads in the site, relative to the page; None if nothing there stands for it.

    Pages lead to pages, modules to the API's pages; other files are copied along.
    """
    path, sign, anchor = link.partition("#")
    if not path or link.startswith(("http://", "https://")):
        return link
    file = (page.parent / path).resolve()
    place_of = file.relative_to(pages.ROOT)
    if file in pages.PAGES:
        place_of = place(file)
    elif place_of.parts[0] in PACKAGES:
        module = place_of.with_suffix("") if place_of.name != "__init__.py" else place_of.parent
        place_of = Path("api") / module.with_suffix(".html")
    elif file.is_file():
        copy = site / place_of
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    else:
        return None
    return os.path.relpath(place_of, place(page).parent) + sign + anchor


def rendered(page: Path, site: Path) -> str:
    """Return a page's text as HTML, with anchors at its headings and links into the site."""
    tokens = pages.MARKDOWN.parse(page.read_text(encoding="utf-8"))
    anchors = iter(pages.headings(page))
    for token in tokens:
        if token.type == "heading_open":
            token.attrSet("id", next(anchors)[1])
        _lead(token.children or [], page, site)
    return str(pages.MARKDOWN.renderer.render(tokens, pages.MARKDOWN.options, {}))


def _lead(tokens: list[Token], page: Path, site: Path) -> None:
    for token in tokens:
        name = {"link_open": "href", "image": "src"}.get(token.type)
        if name is not None:
            found = target(str(token.attrGet(name)), page, site)
            if found is None:
                del token.attrs[name]
            else:
                token.attrSet(name, found)


def coloured(code: str, language: str, _: str) -> str:
    """Return a fenced block's code as HTML."""
    return highlight(code, get_lexer_by_name(language), FORMATTER) if language else html.escape(code)


def navigation(page: Path) -> str:
    """Return the list of pages, as it stands beside one."""
    here = place(page).parent
    lines = []
    groups = {
        "": [pages.ROOT / "README.md"],
        "Guides": [p for p in pages.PAGES if p.parent == pages.ROOT / "docs"],
        "Results": [p for p in pages.PAGES if p.parent.name == "results"],
        "More": [pages.ROOT / "CHANGELOG.md"],
    }
    for group, members in groups.items():
        lines += [f"<b>{group}</b>"] if group else []
        for member in members:
            mark = ' class="here"' if member == page else ""
            title = pages.title_of(member).removeprefix("Results: ")
            title = html.escape(title[0].upper() + title[1:]) if group else html.escape(title)
            lines.append(f'<a{mark} href="{os.path.relpath(place(member), here)}">{title}</a>')
    lines += [f'<a href="{os.path.relpath(f"api/{name}.html", here)}">API: {name}</a>' for name in PACKAGES]
    return "\n".join(lines)


def whole(page: Path, site: Path) -> str:
    """Return a page of the site."""
    title = html.escape(pages.title_of(page))
    colours = FORMATTER.get_style_defs("pre")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}{colours}</style>\n'
        f"<nav>\n{navigation(page)}\n</nav>\n<main>\n{rendered(page, site)}</main></html>\n"
    )


def build(site: Path) -> None:
    """Write the whole site anew."""
    shutil.rmtree(site, ignore_errors=True)
    pages.MARKDOWN.options["highlight"] = coloured
    for page in pages.PAGES:
        file = site / place(page)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(whole(page, site), encoding="utf-8")
    for name in every_module():
        resolve_annotations(import_module(name))
    agents = import_module("agents")  # whose public names come when they are first used: pdoc reads what is there
    vars(agents).update({name: getattr(agents, name) for name in agents.__all__})
    pdoc.render.configure(docformat="google", show_source=True, search=True)
    pdoc.pdoc(*named_modules(), output_directory=site / "api")


def every_module() -> list[str]:
    """Name the modules of the packages."""
    files = [file for name in PACKAGES for file in sorted((pages.ROOT / name).rglob("*.py"))]
    paths = (file.relative_to(pages.ROOT).with_suffix("") for file in files)
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def named_modules() -> list[str]:
    """Name the modules that pdoc is to be told of: it finds others by itself, but for those of a package whose __all__
    does not list them."""
    parents = {name: name.rpartition(".")[0] for name in every_module()}
    return [name for name, parent in parents.items() if not parent or hasattr(import_module(parent), "__all__")]


def resolve_annotations(module: ModuleType) -> None:
    """Put types in place of the annotations of a module's dataclasses and named tuples, which pdoc would look up in the
    wrong module where fields are inherited."""
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            made: Any = kind.__init__ if is_dataclass(kind) else kind.__new__
            if is_dataclass(kind) or hasattr(kind, "_fields"):
                types = get_type_hints(kind)  # ranges left out: docs/options.md has them
                kind.__annotations__ = {name: types[name] for name in kind.__annotations__}
                made.__annotations__ = {name: types.get(name, None) for name in made.__annotations__}


if __name__ == "__main__":
    build(Path(sys.argv[1]))
