"""`codesign serve` as tests run it: any outbound connection ends the process with status 77.

    python runner.py [--fail-after STEPS] serve CONFIG ...

`--fail-after` has the engine fail at that step, as it does when it computes NaN.
"""

import os
import sys
from typing import Any

from codesign.cli import main
from codesign.engine.engine import Engine
from codesign.errors import NumericalError


def refuse_connections(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        print(f"outbound connection to {arguments[1]}", file=sys.stderr, flush=True)
        os._exit(77)


def fail_after(num_steps: int) -> None:
    step, left = Engine.step, [num_steps]

    def failing(engine: Engine) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise NumericalError("the logits are NaN or infinite")
        return step(engine)

    Engine.step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.addaudithook(refuse_connections)
    given = sys.argv[1:]
    if given[0] == "--fail-after":
        fail_after(int(given[1]))
        del given[:2]
    sys.exit(main(given))
