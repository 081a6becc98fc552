"""Names by which a server may be called."""

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from codesign.serve.command import hosts_of  # once it is known to be importable
from codesign.serve.guard import Hosts

LOOPBACK = hosts_of("127.0.0.1", (), is_loopback=True)
OPEN = hosts_of("0.0.0.0", ("models.example",), is_loopback=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:8000"])
def test_loopback_is_called_by_its_own_names(host: str) -> None:
    assert LOOPBACK.allows(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "localhost@evil.example",
        "evil.example#localhost",
        "127.0.0.1.evil.example",
        "192.168.0.7:8000",
        "[::2]",
        "localhost:",
        "localhost:80:80",
        "localhost/",
        " localhost",
        "local\u0131host",
    ],
)
def test_other_names_are_foreign_on_loopback(host: str) -> None:
    assert not LOOPBACK.allows(host)


@pytest.mark.parametrize(
    "host", ["192.168.0.7:8000", "[fe80::1]:80", "models.example", "Models.Example:443", "localhost"]
)
def test_an_open_server_is_called_by_any_address_and_the_names_it_was_given(host: str) -> None:
    assert OPEN.allows(host)


def test_an_open_server_is_not_called_by_other_names() -> None:
    assert not OPEN.allows("evil.example")
    assert not OPEN.allows("x.models.example")


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("null", False),
        ("http://evil.example", False),
        ("file://", False),
        ("chrome-extension://abc", False),
        ("http://[::1", False),
        ("http://localhost@evil.example", False),
    ],
)
def test_origins(origin: str, is_allowed: bool) -> None:
    assert Hosts({"localhost", "127.0.0.1"}, any_address=False).allows_origin(origin) is is_allowed
