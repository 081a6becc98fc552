"""Guard: the outermost layer. Who may come in is decided before anything looks at the path or the body.

Host and Origin    a web page that has its own name point here (DNS rebinding) still sends that name
key                on every route but /health, compared in constant time
content type       only JSON: what a plain HTML form can send is no request of ours
body               bounded by what it says and by what comes

Plain ASGI, because Starlette's middleware classes hide from a handler that its client has left.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Callable, Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codesign.serve import bounds
from codesign.serve.refusal import Refusal

_DISCARD_S = 2.0
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]{1,253})(:[0-9]{1,5})?")


class Hosts:
    """Names by which this server may be called.

    Args:
        names: lower case, without port.
        any_address: also by any IP address: a page cannot make a browser send one that is not its own name.
    """

    def __init__(self, names: Collection[str], *, any_address: bool) -> None:
        self._names, self._any_address = frozenset(names), any_address

    def allows(self, host: str) -> bool:
        """Args:
        host: as in the header, with or without port.
        """
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1].strip("[]")
        return name in self._names or (self._any_address and _is_address(name))

    def allows_origin(self, origin: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and self.allows(parts.netloc)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """Args:
    api_key: what `Authorization: Bearer` must carry; None lets everybody in.
    record: told the path and status of every answer.
    """

    def __init__(self, app: ASGIApp, *, hosts: Hosts, api_key: str | None, record: Callable[[str, int], None]) -> None:
        self._app, self._hosts, self._record = app, hosts, record
        self._key_digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")

        async def recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._record(scope["path"], message["status"])
            await send(message)

        try:
            self._check(scope)
        except Refusal as refusal:
            await _discard_body(receive)
            await _answer(refusal, recorded)
        else:
            await self._app(scope, receive, recorded)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._hosts.allows(headers.get("host", "")):
            raise Refusal(403, "the Host header names another server than this one", code="foreign_host")
        if "origin" in headers and not self._hosts.allows_origin(headers["origin"]):
            raise Refusal(403, "requests from other web pages are refused", code="foreign_origin")
        if scope["path"] != "/health" and not self._has_key(headers.get("authorization", "")):
            raise Refusal(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            _check_body(headers)

    def _has_key(self, authorization: str) -> bool:
        if self._key_digest is None:
            return True
        scheme, _, key = authorization.partition(" ")
        # Digests have one length, so that not even the length of the key can be timed.
        is_equal = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key_digest)
        return is_equal and scheme.lower() == "bearer"


def _check_body(headers: Mapping[str, str]) -> None:
    kind, _, _ = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise Refusal(415, "Content-Type must be application/json", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "Content-Encoding: bodies must not be compressed", code="unsupported_media_type")
    length = headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > bounds.BODY_BYTES):
        raise too_large()


def too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {bounds.BODY_BYTES} bytes", code="body_too_large")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _discard_body(receive: Receive) -> None:
    """Reads what the client still sends, within bounds: a connection closed before that loses the answer."""
    left = bounds.DISCARDED_BYTES
    try:
        async with asyncio.timeout(_DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _answer(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.document).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    headers["connection"] = "close"  # there may be more of the body than was read
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
