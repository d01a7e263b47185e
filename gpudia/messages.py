"""How messages are written: names of files and texts of headers are data, and may hold anything."""

from __future__ import annotations

import logging

__all__ = ["OneLine", "printable"]


def printable(text: object) -> str:
    r"""Return text with all that does not print as escapes (``\n``, ``\x1b``, ``\u202e``): names and headers are data.

    A line break in a file's name must not make two lines of a log, nor an escape sequence colour a terminal; a name
    that is not UTF-8 can be written to files.
    """
    plain = str(text)
    return plain if plain.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)


class OneLine(logging.Formatter):
    """A message is one line of characters that print, whatever the names of files in it are; a traceback follows."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record without its traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)
