"""Docstrings on the site: their doctests become code blocks, which Markdown would read as quotations."""

import re

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class FenceDoctests(griffe.Extension):
    """Put a fence around each run of `>>>` lines and their output."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Change the docstring of an object that has been read.

        Args:
            obj: module, class, function or attribute.
            **kwargs: of other extensions.
        """
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
    """Return a docstring, without indentation, whose doctests are code blocks."""
    return _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
