"""The one exception that is the user's to mend, and the failures that are not."""

from __future__ import annotations

import errno

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class UserError(ValueError):
    """A mistake the user can mend; the command line prints it as one line and exits with code 2.

    The message says what is wrong, where, what was expected, what was found, and what to do.
    """


def first_line(error: BaseException) -> str:
    """Return an error as one line; of "error while generating", the cause."""
    while error.__cause__ is not None and "generating the dataset" in str(error):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def raise_disk_failure(error: BaseException) -> None:
    """Raise the full or broken disk behind an error that a library has wrapped, if there is one.

    Readers of data sets write a cache: that it cannot be written says nothing about the data.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK:
            raise seen
        seen = seen.__cause__ or seen.__context__
