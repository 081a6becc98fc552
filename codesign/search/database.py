"""The PostgreSQL database that several searches share: its address, its connections, and what happens in an outage.

Every step of a search is one transaction that may be run twice, so an answer that is lost on its way does no harm:
`run` simply runs the step again, for as long as a database takes to restart.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import TypeVar

import optuna
import sqlalchemy
from sqlalchemy import Connection

from codesign.errors import InputError, Unsupported, WorkError

T = TypeVar("T")

OUTAGE_S = 1800.0  # a database that is away for longer will not come back by itself
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_KEY = "--storage"
# A search that is stopped (SIGSTOP, a suspended laptop) in the middle of a transaction must not block the others.
_SETTINGS = {
    "statement_timeout": "60s",
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "30s",
    "synchronous_commit": "on",
}
_READ_ONLY = "25006"  # what a standby answers until it is promoted
_OPENING = 0x636F6465736967  # number of the advisory lock that one search holds while it creates what is missing


class Database:
    """Args:
    url: `postgresql://USER:PASSWORD@HOST/NAME`; PGPASSWORD and ~/.pgpass work too, and show in no process list.
    say: told when the database does not answer, and when it does again.
    is_interrupted: asked while waiting; a wait ends when it says so.

    Raises:
        InputError: not such a URL. No message holds a part of it that may be secret.
        Unsupported: the driver is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        say: Callable[[str], None] = lambda text: None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.url = _parsed(url)
        self._say = say
        self._is_interrupted = is_interrupted
        if importlib.util.find_spec("psycopg") is None:
            raise Unsupported("--storage needs the driver psycopg: pip install --editable '.[distributed]'")
        options = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
        self.engine = sqlalchemy.create_engine(
            self.url,
            hide_parameters=True,
            connect_args={
                "connect_timeout": 10,
                "application_name": "codesign",
                "options": options,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "tcp_user_timeout": 30_000,
            },
        )

    @property
    def address(self) -> str:
        """The URL without user and password."""
        return address_of(self.url)

    def check(self) -> None:
        """Raises WorkError when the database does not let us in now."""
        try:
            with self.engine.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT 1"))
        except sqlalchemy.exc.DBAPIError as error:
            raise WorkError(f"{self.address}: {self._text(error)}; nothing was measured") from None

    def alone(self, step: Callable[[], T]) -> T:
        """Runs a step while no other search opens a study in this database; waits and runs it again as `run` does."""

        def locked() -> T:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_OPENING})"))
                try:
                    return step()
                finally:
                    connection.invalidate()  # the lock ends with the connection

        return self._insist(locked)

    def run(self, step: Callable[[Connection], T], *, in_transaction: bool = True) -> T:
        """Runs a step in a transaction and returns what it returns; waits while the database does not answer.

        Args:
            step: may be run again although it was committed: the answer may have been lost.
            in_transaction: False where each statement stands alone, which saves two round trips.
        Raises:
            WorkError: it refuses the step, there was no answer for OUTAGE_S, or a signal came meanwhile.
        """

        def committed() -> T:
            if in_transaction:
                with self.engine.begin() as connection:
                    return step(connection)
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                return step(connection)

        return self._insist(committed)

    def _insist(self, action: Callable[[], T]) -> T:
        began_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
        is_said = False
        while True:
            try:
                found = action()
                if is_said:
                    self._say(f"{self.address} answers again after {time.monotonic() - began_s:.0f} s")
                return found
            except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                outage = _outage(error)
                if outage is None:
                    raise WorkError(f"{self.address}: {self._text(error)}") from error
                text = self._text(outage)
            away_s = time.monotonic() - began_s
            if self._is_interrupted() or away_s > OUTAGE_S:
                raise WorkError(
                    f"{self.address} has not answered for {away_s:.0f} s ({text}); every trial that it has taken in is "
                    "kept; start the same command again when it is back"
                )
            if not is_said and pause_s > 4 * _FIRST_PAUSE_S:
                self._say(f"{self.address} does not answer ({text}); trials that run go on, waiting for it")
                is_said = True
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def close(self) -> None:
        self.engine.dispose()

    def _text(self, error: Exception) -> str:
        cause: BaseException = getattr(error, "orig", None) or error
        text = " ".join(str(cause).split()) or type(cause).__name__
        return text.replace(str(self.url.password), "***") if self.url.password else text


def address_of(url: sqlalchemy.URL) -> str:
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{url.host or ''}{port}/{url.database}"


def redacted(arguments: list[str]) -> list[str]:
    """A command line without the passwords of the URLs in it."""
    found = []
    for argument in arguments:
        option, separator, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        found.append(f"{option}{separator}{_without_password(value)}" if "://" in argument else argument)
    return found


def _without_password(text: str) -> str:
    try:
        return sqlalchemy.make_url(text).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "***"


def _parsed(text: str) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InputError("must be postgresql://USER@HOST/DATABASE", key=_KEY) from None
    if url.drivername.startswith("sqlite"):
        raise InputError(
            "several searches cannot share an SQLite file; leave --storage out for a study of one machine, give "
            "postgresql://USER@HOST/DATABASE for one of several",
            key=_KEY,
        )
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise InputError("must be postgresql://USER@HOST/DATABASE; no other database is supported", key=_KEY)
    if not url.database:
        raise InputError("names no database: postgresql://USER@HOST/DATABASE", key=_KEY)
    if "password" in url.query:
        raise InputError("a password belongs before the @, in PGPASSWORD or in ~/.pgpass", key=_KEY)
    return url.set(drivername="postgresql+psycopg")


def _outage(error: BaseException) -> sqlalchemy.exc.SQLAlchemyError | None:
    """The error behind `error` that says that the database is away, restarting or busy; None when it is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, sqlalchemy.exc.DBAPIError) and (
            seen.connection_invalidated
            or isinstance(seen, sqlalchemy.exc.OperationalError)
            or getattr(seen.orig, "sqlstate", None) == _READ_ONLY
        ):
            return seen
        # What was begun on a connection that broke; the statement that broke it was Optuna's, which hid it.
        if isinstance(seen, sqlalchemy.exc.PendingRollbackError | sqlalchemy.exc.ResourceClosedError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
