"""Doctests in docstrings as code: Markdown would take `>>>` for quotations."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> (?:.+\n)*.+$", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts fences around the doctests of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
