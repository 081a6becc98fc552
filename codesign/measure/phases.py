"""Phases of a trial: how long each took, and word of the current one for whoever shows progress."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Phases:
    """`with phases("build"): ...` adds to `seconds["build_s"]`, also when it fails."""

    def __init__(self, say: Callable[[str, float | None], None]) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(name, None)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"{name}_s"] = self.seconds.get(f"{name}_s", 0.0) + time.perf_counter() - start_s

    def add(self, parts: Mapping[str, float]) -> None:
        """Seconds that the child reports of a phase's parts, e.g. load_s and quantize_s of the build."""
        self.seconds |= {f"build.{name}": seconds for name, seconds in parts.items()}
