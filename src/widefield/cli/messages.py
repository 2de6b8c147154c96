"""Errors in words for whoever reads them on the command line: what happened, and what to do."""

import errno

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, or name another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or name another place"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be: remove it, or name another place"
    ),
    errno.ENOENT: "check how it is spelt, or name another place",
    errno.EISDIR: "it is a folder: name a file",
    errno.EMFILE: "close other programs, or raise the limit of open files (`ulimit -n`)",
}


def told(error: BaseException) -> str:
    """Return the message of an error; one of the operating system names no next step, which is added."""
    advice = _ADVICE.get(error.errno or 0) if isinstance(error, OSError) else None
    if advice is None or not isinstance(error, OSError):
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {advice}"
