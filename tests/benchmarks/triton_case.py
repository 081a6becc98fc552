"""What triton_compile.py compiles."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile.

    Attributes:
        name: what it is, config included.
        pointers: type of each argument that is no int, by name; pointers as "*bf16".
        constants: the constexpr arguments.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
