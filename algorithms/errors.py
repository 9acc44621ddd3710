"""The exceptions whose text a user reads: one sentence that says where, what, and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TermwiseError(Exception):
    """Something was computed and is wrong, or could not be finished. Exit status 1."""

    exit_status = 1


class InputError(TermwiseError):
    """Bad input: a file, key, tensor or value that cannot be accepted. Nothing was written. Exit status 2."""

    exit_status = 2


class MissingToolError(TermwiseError):
    """A tool or package is missing or too old; the message says how to install it. Exit status 3."""

    exit_status = 3


SHOWN_NAMES = 24
"""Accepted names that an error tells; of more, the first."""


def unknown_name(what: str, name: object, accepted: Iterable[str]) -> InputError:
    """The error for a name that is not in a closed list, with the nearest accepted name and the first of the list.

    >>> print(unknown_name("accelerator", "oliv", ["fp16", "ant", "olive"]))
    unknown accelerator 'oliv': did you mean 'olive'? Accepted: fp16, ant, olive
    """
    names = list(accepted)
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    return InputError(f"unknown {what} {name!r}: {hint}Accepted: {shown}")
