"""Server-side paths: only files that really lie below an allowed folder, whatever links and dots say."""

import os
from collections.abc import Sequence


class PathError(ValueError):
    """A path that is not served. The message is the same whether or not there is a file."""


class AllowedRoots:
    """Folders whose files may be asked for.

    Links are resolved before anything is opened, and what is opened later is the resolved path. Whoever can exchange
    folders below a root for links between the two steps is trusted: point roots at folders of your own.
    """

    def __init__(self, roots: Sequence[str | os.PathLike]) -> None:
        missing = [os.fspath(root) for root in roots if not os.path.isdir(root)]
        if missing:
            raise ValueError(f"--roots: no such folder: {', '.join(missing)}")
        self.roots = tuple(os.path.realpath(root, strict=True) for root in roots)

    def __bool__(self) -> bool:
        return bool(self.roots)

    def resolve(self, path: str) -> str:
        """The real path of a regular file below a root; relative paths are looked for below each. Raises PathError."""
        for root in self.roots:
            try:
                # strict: otherwise a loop of links ends the resolution early, and links behind it stay in the result
                real = os.path.realpath(os.path.join(root, path), strict=True)
            except (OSError, ValueError):  # missing, a loop, not allowed, too long; a NUL byte, a lone surrogate
                continue
            is_below = any(os.path.commonpath([real, allowed]) == allowed for allowed in self.roots)
            if is_below and os.path.isfile(real):
                return real
        raise PathError(f"no file below the server's --roots: {path}")
