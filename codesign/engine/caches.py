"""Where what is expensive to make is kept between runs: $XDG_CACHE_HOME/codesign, by default ~/.cache/codesign."""

import os
from pathlib import Path


def cache_folder(name: str = "") -> Path:
    """The folder of this name, or the one that holds them all; it may not exist yet.

    Raises:
        RuntimeError: there is no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codesign" / name
