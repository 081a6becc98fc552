"""`codesign serve CONFIG`: what is asked on the command line, checked, built and served."""

import dataclasses
import errno
import ipaddress
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from codesign.engine.build import build_engine
from codesign.engine.models.tokenizer import Tokenizer
from codesign.errors import CodesignError, InputError, Unsupported, WorkError
from codesign.serve import bounds
from codesign.serve.app import Service, make_app
from codesign.serve.chat_template import ChatTemplate, TemplateFailed, read_template
from codesign.serve.dispatcher import Dispatcher
from codesign.serve.engine_thread import EngineThread
from codesign.serve.guard import Guard, Hosts
from codesign.serve.metrics import Metrics
from codesign.serve.prompts import Prompts
from codesign.serve.server import Server
from codesign.spec.engine_config import EngineConfig, load_config
from codesign.spec.model import ModelSpec
from codesign.spec.model_source import model_from_text
from codesign.spec.profile import load_profile
from codesign.units import format_bytes

KEY_VARIABLE = "CODESIGN_API_KEY"
_STOP_S = 30.0  # for the step that runs when the server ends
_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """The command line.

    Args:
        profile: names model and hardware; by default `profile.yaml` beside the configuration.
        model: instead of the profile's: `bundled` or a directory.
        port: 0 for any that is free.
        allow_host: further names by which clients call this server.
    """

    config: Path
    profile: Path | None = None
    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_host: Sequence[str] = ()


def serve(asked: ServeRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Builds and serves until a signal; returns what was done, as plain data.

    Raises:
        InputError, Unsupported: it cannot be started as asked.
        WorkError: the engine failed, or the address cannot be had.
    """
    config = load_config(asked.config)
    api_key = read_api_key(asked.api_key_file)
    is_loopback = _is_loopback(asked.host)
    if not is_loopback and api_key is None:
        raise InputError(
            f"{asked.host} can be reached from other machines, so an API key is needed: set {KEY_VARIABLE} or give "
            "--api-key-file FILE; or serve on 127.0.0.1",
            key="--host",
        )
    model, device, num_threads = _model_and_device(asked, say)
    if model.path is None:
        raise Unsupported(
            "random weights have no tokenizer, so no text can be served; --model takes a model directory or bundled"
        )
    tokenizer = Tokenizer(Path(model.path))
    listener = _listen(asked.host, asked.port)
    template: ChatTemplate | str | None = None
    prompts = None
    try:
        template = _template(Path(model.path), say)
        say(f"building {model.name} on {device}")
        engine = EngineThread(lambda: build_engine(model, config, device=device, num_threads=num_threads))
        built = engine.start()
        metrics = Metrics()
        dispatcher = Dispatcher(engine, metrics, num_slots=built.num_slots, max_waiting=bounds.WAITING)
        prompts = Prompts(tokenizer, template, max_model_len=config.max_model_len, vocab_size=built.vocab_size)
        service = Service(
            model=model.name,
            fingerprint=f"codesign-{config.digest}",
            max_model_len=config.max_model_len,
            kv_bytes=built.facts["bytes"]["kv"],
            tokenizer=tokenizer,
            prompts=prompts,
            dispatcher=dispatcher,
            metrics=metrics,
        )
        guard = Guard(
            make_app(service),
            hosts=hosts_of(asked.host, asked.allow_host, is_loopback=is_loopback),
            api_key=api_key,
            record=lambda path, status: _count(metrics, path, status),
        )
        url = _url(listener)
        ready = _ready(model, config, built.num_slots, service.kv_bytes, url, has_key=api_key is not None)
        ended_by = _run(
            Server(app=guard, dispatcher=dispatcher, engine=engine, listener=listener, ready=ready, say=say), say
        )
        if not engine.stop(_STOP_S):
            say(f"the engine's last step takes longer than {_STOP_S:g} s; leaving without it")
        return {
            "url": url,
            "ended_by": ended_by,
            "sequences": metrics.num_sequences,
            "output_tokens": metrics.output_tokens,
            "aborted": metrics.aborted,
        }
    finally:
        listener.close()
        if prompts is not None:
            prompts.close()
        elif isinstance(template, ChatTemplate):
            template.close()


def read_api_key(file: Path | None) -> str | None:
    """The key from the environment or a file, None when neither is given. It leaves this process's environment, so
    that no child inherits it.

    Raises:
        InputError: both are given, or what is given is no key.
    """
    given = os.environ.pop(KEY_VARIABLE, None)
    if given is not None and file is not None:
        raise InputError(f"{KEY_VARIABLE} and --api-key-file are both given; use one", key="--api-key-file")
    where: dict[str, Any] = {"key": KEY_VARIABLE}
    if file is not None:
        where = {"file": file, "key": "--api-key-file"}
        try:
            with file.open("rb") as opened:
                given = opened.read(bounds.KEY_BYTES + 1).decode("latin-1")
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", **where) from error
    if given is None:
        return None
    key = given.strip()
    if not key or len(key) > bounds.KEY_BYTES or not key.isascii() or not key.isprintable():
        raise InputError(f"must hold one line of 1 to {bounds.KEY_BYTES} printable ASCII characters", **where)
    return key


def hosts_of(host: str, further: Sequence[str], *, is_loopback: bool) -> Hosts:
    """By which names clients may call: on loopback its own alone, elsewhere any address and this machine's name too."""
    names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in further)}
    if not is_loopback:
        names |= {socket.gethostname().lower()}
    return Hosts(names, any_address=not is_loopback)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _model_and_device(asked: ServeRequest, say: Callable[[str], None]) -> tuple[ModelSpec, str, int | None]:
    """(model, device, threads on the CPU): of the profile where there is one, else of the command line and machine."""
    beside = asked.config.parent / "profile.yaml"
    profile_path = asked.profile or (beside if beside.is_file() else None)
    if profile_path is not None:
        profile = load_profile(profile_path, model_override=asked.model)
        return profile.model_spec, profile.device, profile.hardware.cores
    if asked.model is None:
        raise InputError(
            f"which model? There is no profile.yaml beside {asked.config}; give --profile PROFILE, or --model DIR "
            "(or --model bundled)",
            key="--model",
        )
    try:
        model = model_from_text(asked.model, folder=Path.cwd())
    except InputError as error:
        raise InputError(error.message, key="--model") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"device {device} (no profile; {'a CUDA device is' if device == 'cuda' else 'no CUDA device is'} here)")
    return model, device, None


def _template(model: Path, say: Callable[[str], None]) -> ChatTemplate | str:
    """The model's chat template, or why there is none; said aloud, since chat requests will be refused."""
    try:
        found = read_template(model)
        if found is None:
            reason = "it has no chat template"
        else:
            template = ChatTemplate(*found)
            template.check()
            return template
    except (InputError, TemplateFailed) as error:
        reason = f"its chat template cannot be used: {error}"
    say(f"chat requests will be refused: {reason}")
    return reason


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio switches Nagle's algorithm off only on such sockets, and with it whatever is written in two
    # parts, as head and body are, waits 40 ms for a client that delays its acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise WorkError(f"port {port} of {host} is in use; --port 0 picks a free one") from error
        raise InputError(f"cannot listen on {host!r:.80}: {error}", key="--host") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _ready(model: ModelSpec, config: EngineConfig, num_slots: int, kv_bytes: int, url: str, *, has_key: bool) -> str:
    return (
        f"serving {model.name}: {config.dtype}, weights {config.weights.name}, {num_slots} sequences of "
        f"{config.max_model_len} tokens at once, {format_bytes(kv_bytes)} of KV cache\n"
        f"ready: {url}/v1 ({'API key needed' if has_key else 'no API key; this machine only'})"
    )


def _run(server: Server, say: Callable[[str], None]) -> str:
    try:
        return server.run()
    except CodesignError as error:
        raise WorkError(f"the engine failed: {error}") from error
    except Exception as error:
        say("".join(traceback.format_exception(error)))
        raise WorkError(f"the engine failed: {type(error).__name__}: {error}") from error


def _count(metrics: Metrics, path: str, status: int) -> None:
    metrics.http[path if path in _ROUTES else "other", status] += 1
