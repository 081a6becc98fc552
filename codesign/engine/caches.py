"""Where what is expensive to make is kept between runs: $XDG_CACHE_HOME/codesign, by default ~/.cache/codesign."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder that may not exist yet. Raises RuntimeError when there is no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codesign" / name
