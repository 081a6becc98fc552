"""The one thread that builds, steps and closes the engine; everybody else leaves commands in its queue.

commands   submit, abort, stop                      any thread -> engine
reports    list of StepOutput | Refused | Failed    engine -> the function given to `report_to`
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from codesign.engine.engine import Engine
from codesign.engine.sequence import StepOutput
from codesign.errors import InputError
from codesign.spec.request import Request

# A CUDA runner keeps two events per step until it is asked how long they took; nobody here wants to know.
_STEPS_PER_BUSY_READING = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What the engine said of itself once."""

    num_slots: int
    vocab_size: int
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Refused:
    """The engine would not take a request."""

    request_id: str
    message: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The engine is of no use any more; no report follows."""

    error: Exception


Report = list[StepOutput] | Refused | Failed


class EngineThread:
    """Args:
    build: makes the engine; called in the thread, so that whatever is bound to a thread is bound to the right one.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._report: Callable[[Report], None] = lambda report: None
        self._built: Future[Built] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Built:
        """Builds the engine and waits for it. Raises what the build raises."""
        self._thread.start()
        return self._built.result()

    def report_to(self, receive: Callable[[Report], None]) -> None:
        """`receive` is called in the engine's thread, from the next step on."""
        self._report = receive

    def submit(self, request: Request) -> None:
        def command(engine: Engine) -> None:
            try:
                engine.submit(request)
            except InputError as error:
                self._report(Refused(request.request_id, str(error)))

        self._commands.put(command)

    def abort(self, request_id: str) -> None:
        def command(engine: Engine) -> None:
            engine.abort(request_id)

        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the step that runs; whether it ended in time."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._build()
            built = Built(num_slots=engine.num_slots, vocab_size=engine.vocab_size, facts=engine.facts())
        except BaseException as error:
            self._built.set_exception(error)
            return
        self._built.set_result(built)
        try:
            self._serve(engine)
        except Exception as error:
            self._report(Failed(error))
        finally:
            engine.close()

    def _serve(self, engine: Engine) -> None:
        num_steps = 0
        while True:
            while not engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command(engine)
            outputs = engine.step()
            if outputs:
                self._report(outputs)
            num_steps += 1
            if num_steps % _STEPS_PER_BUSY_READING == 0:
                engine.device_busy_us()
