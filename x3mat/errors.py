"""Typed errors: every failure that a user can repair names its source, cause and remedy."""

from __future__ import annotations


class X3MatError(Exception):
    """Base of the package's errors.

    ``source`` is what failed (a file name, a framework code, an argument), ``cause`` why it failed,
    ``remedy`` what the caller can do about it.

    >>> str(X3MatError("a.cif", "the file is empty", "give a complete file"))
    'a.cif: the file is empty. give a complete file'
    """

    def __init__(self, source: object, cause: str, remedy: str) -> None:
        self.source, self.cause, self.remedy = str(source), cause.rstrip("."), remedy
        super().__init__(self.source, self.cause, self.remedy)

    def __str__(self) -> str:
        return f"{self.source}: {self.cause}. {self.remedy}"


class CrystalError(X3MatError):
    """A crystal cannot be read, or is not a physically sensible ordered crystal."""


class ModelError(X3MatError):
    """A model or checkpoint cannot be built, loaded or applied."""


class DataError(X3MatError):
    """A data set, optional package or parameter that is needed is missing or unusable."""
