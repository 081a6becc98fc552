"""Renders a model's chat template, in a process of its own that can do nothing else. Run by chat_template.py, by path:

    in    {"template": ...}, then one {"messages": ..., ...} per line
    out   {} once the template is compiled, then {"text": ...} or {"error": ...} per line

The template is the model repository's, which may be hostile: a sandbox keeps it from Python, and this process ends by
itself (SIGALRM, address space) when the sandbox was not enough.
Imports nothing of the package: it is run by path, apart from it.
"""

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main(limit_s: float, memory_bytes: int, output_bytes: int) -> int:
    _load_everything()
    _confine(memory_bytes)
    template: jinja2.Template | None = None
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # nobody handles SIGALRM: it ends the process, whatever it does
        try:
            if template is None:
                template = environment().from_string(asked["template"])
                said = {}
            else:
                said = {"text": _rendered(template, asked, output_bytes)}
        except MemoryError:
            os._exit(1)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"[:500]}
        answer = json.dumps(said).encode() + b"\n"
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()
        if template is None:
            return 1
    return 0


class _Generation(Extension):
    """`{% generation %}` marks what the model itself said, for training; here it is what is inside."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, which is what templates are written for."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = _strftime_now
    return found


def _rendered(template: jinja2.Template, values: dict[str, Any], output_bytes: int) -> str:
    """Raises ValueError as soon as the text is too long."""
    pieces, left = [], output_bytes
    for piece in template.generate(**values):
        left -= len(piece.encode("utf-8", "surrogatepass"))
        if left < 0:
            raise ValueError(f"the text is longer than {output_bytes} bytes")
        pieces.append(piece)
    return "".join(pieces)


def _load_everything() -> None:
    """Jinja imports a few modules where it first needs them; once confined, no file can be opened any more."""
    try:
        environment().from_string("{{ 'a\\n' | trim }}{{ {} | tojson }}{{ raise_exception('') }}").render()
    except jinja2.TemplateError:
        _strftime_now("%d %b %Y")


def _confine(memory_bytes: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    os.nice(5)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the parent had
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
