"""The text of a result as a notebook shows it: with its columns, in a fixed width."""

from __future__ import annotations

__all__ = ["TextInNotebooks"]


class TextInNotebooks:
    """Give a result with a short `repr` its whole `str` in notebooks.

    >>> class Found(TextInNotebooks):
    ...     def __str__(self):
    ...         return "a < b"
    >>> Found()._repr_html_()
    '<pre>a &lt; b</pre>'
    """

    __slots__ = ()

    def _repr_html_(self) -> str:
        import html  # only notebooks need it

        return f"<pre>{html.escape(str(self))}</pre>"
