"""What the site adds to the Markdown of docs/: links to the sources, and notebooks that Colab opens.

The home of the project is known where GitHub builds the site (GITHUB_REPOSITORY, such as "owner/name"), or one says so;
elsewhere links to sources are plain text, and notebooks are for download alone.
"""

import os
import posixpath
import re
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]*)\)")
INSTALL = '%pip install --quiet "warp-phys[demos]'
COLAB = "https://colab.research.google.com"


def repository() -> str:
    """Where the sources are, as owner/name; empty if that is not known."""
    return os.environ.get("GITHUB_REPOSITORY", "")


def on_config(config: Any) -> Any:
    """Show where the sources are."""
    if repository():
        config.repo_url = f"https://github.com/{repository()}"
        config.repo_name = repository()
    return config


def on_files(files: Files, config: Any) -> Files:
    """Make a notebook of every page that says it is one."""
    for page in list(files.documentation_pages()):
        text = page.content_string
        if is_notebook(text):
            name = posixpath.join("notebooks", posixpath.splitext(page.src_uri)[0] + ".ipynb")
            files.append(File.generated(config, name, content=notebook(text)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to the sources; put a notebook's badge below its title."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def lead(match: re.Match[str]) -> str:
        label, (path, _, fragment) = match[1], match[2].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("docs/"):
            return match[0]
        if not repository():
            return label
        return f"[{label}](https://github.com/{repository()}/blob/main/{path}{'#' * bool(fragment)}{fragment})"

    markdown = LINK.sub(lead, markdown)
    if "jupyter" in page.meta:
        title, rest = markdown.split("\n", 1)
        markdown = f"{title}\n\n{badge(posixpath.splitext(page.file.src_uri)[0])}\n{rest}"
    return markdown


def is_notebook(text: str) -> bool:
    """Whether a page has jupytext's header."""
    return text.startswith("---\njupyter:")


def notebook(text: str) -> str:
    """A page as a notebook, which installs what it needs."""
    book = jupytext.reads(text, fmt="md")
    source = f" @ git+https://github.com/{repository()}" if repository() else ""
    install = jupytext.reads(f'```python\n{INSTALL}{source}"\n```\n', fmt="md").cells[0]
    for number, cell in enumerate([install, *book.cells]):
        cell["id"] = f"cell-{number}"  # the same page gives the same file
    book.cells = [book.cells[0], install, *book.cells[1:]]
    return jupytext.writes(book, fmt="ipynb")


def badge(name: str) -> str:
    """Links to a page's notebook."""
    download = f"[Notebook](notebooks/{name}.ipynb){{ .md-button download }}"
    if not repository():
        return download
    target = f"{COLAB}/github/{repository()}/blob/gh-pages/notebooks/{name}.ipynb"
    return f"[Open in Colab]({target}){{ .md-button .md-button--primary }} {download}"
