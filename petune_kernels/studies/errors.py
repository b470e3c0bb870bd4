"""What a study raises when the user can mend it; the command line prints these as one line."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, file or combination of options that cannot be used."""


class StudyError(RuntimeError):
    """A study could not be carried out: nothing to download from, a failed gate, a dead child process."""


def first_line(error: BaseException) -> str:
    """The first line of its message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
