"""The chat template of a model directory, rendered in a process that is limited to a second and 256 MiB.

Templates come from the model directory and nowhere else: a template in a request was remote code execution in others
(CVE-2024-34359, CVE-2026-5760), its arguments a denial of service (CVE-2025-62426).
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codesign.engine.models.config_values import read_json
from codesign.errors import InputError
from codesign.serve import bounds, template_process

_GRACE_S = 0.4  # for the process to end itself before it is ended
_START_S = 10.0  # an interpreter on a busy machine
_ANSWER_BYTES = 8 * bounds.TEMPLATE_OUTPUT_BYTES  # JSON may need six bytes for one
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TemplateFailed(Exception):
    """These messages cannot be rendered; the text says why."""


def read_template(model: Path) -> tuple[str, dict[str, str]] | None:
    """(source, special tokens by name) of a model directory; None when it has no chat template.

    `chat_template.jinja` goes before `tokenizer_config.json`, whose list of named templates is asked for `default`.

    Raises:
        InputError: a file that cannot be read, or holds something else than a template.
    """
    config_file, own_file = model / "tokenizer_config.json", model / "chat_template.jinja"
    config = read_json(config_file) if config_file.is_file() else {}
    special = {name: text for name in _SPECIAL if (text := _token_text(config.get(name))) is not None}
    if own_file.is_file():
        try:
            with own_file.open("rb") as file:
                source: Any = file.read(bounds.TEMPLATE_BYTES + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", file=own_file) from error
        where: dict[str, Any] = {"file": own_file}
    else:
        source, where = config.get("chat_template"), {"file": config_file, "key": "chat_template"}
        if isinstance(source, list):
            source = next((item.get("template") for item in source if _is_default(item)), None)
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > bounds.TEMPLATE_BYTES:
        raise InputError(f"must be a template of at most {bounds.TEMPLATE_BYTES} characters", **where)
    return source, special


def _is_default(item: object) -> bool:
    return isinstance(item, Mapping) and item.get("name") == "default"


def _token_text(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


class ChatTemplate:
    """One process at a time, started when needed and again after it had to end. For one caller at a time.

    Args:
        source: the template.
        special: special tokens that it may name.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._source, self._special = source, dict(special)
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Raises TemplateFailed when the template cannot even be compiled."""
        self._started()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text, with what tells the model that it is its turn. Blocks for at most about a second.

        Raises:
            TemplateFailed: the template raised, or ran into a limit.
        """
        process = self._started()
        asked = {**self._special, "messages": list(messages), "add_generation_prompt": True}
        said = self._exchange(process, asked, bounds.TEMPLATE_S + _GRACE_S)
        if "error" in said:
            raise TemplateFailed(str(said["error"]))
        return str(said["text"])

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        limits = (bounds.TEMPLATE_S, bounds.TEMPLATE_MEMORY_BYTES, bounds.TEMPLATE_OUTPUT_BYTES)
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-P", template_process.__file__, *map(str, limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,  # a Ctrl-C is for the server
            bufsize=0,
        )
        said = self._exchange(self._process, {"template": self._source}, _START_S)
        if "error" in said:
            self.close()
            raise TemplateFailed(str(said["error"]))
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], asked: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One line there, one line back; the process is ended when none comes."""
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + timeout_s
        try:
            _write(process.stdin.fileno(), json.dumps(asked).encode() + b"\n", deadline)
            said = json.loads(_read_line(process.stdout.fileno(), deadline))
        except (OSError, ValueError, TimeoutError):
            self.close()
            limits = f"{bounds.TEMPLATE_S:g} s or {bounds.TEMPLATE_MEMORY_BYTES // 2**20} MiB"
            raise TemplateFailed(f"it needs more than {limits}") from None
        return said if isinstance(said, dict) else {"error": "no text came back"}


def _write(descriptor: int, data: bytes, deadline: float) -> None:
    """Raises TimeoutError when nobody reads it in time."""
    os.set_blocking(descriptor, False)
    left = memoryview(data)
    while left:
        _wait(descriptor, select.POLLOUT, deadline)
        left = left[os.write(descriptor, left) :]


def _read_line(descriptor: int, deadline: float) -> bytes:
    """Raises ValueError when the other side ends or writes too much, TimeoutError when it is late."""
    found = bytearray()
    while not found.endswith(b"\n"):
        _wait(descriptor, select.POLLIN, deadline)
        data = os.read(descriptor, 2**16)
        if not data or len(found) > _ANSWER_BYTES:
            raise ValueError("no line")
        found += data
    return bytes(found)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    ready = select.poll()  # select() has no room for descriptors of a busy server
    ready.register(descriptor, event)
    if not ready.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        raise TimeoutError
