"""The store of several searches on several machines: one table in PostgreSQL, Optuna's index beside it.

    codesign_ledger     one row per attempt at a trial, and one per study
      kind    running -> done       the lease's end, the record and its trial in Optuna's index: one transaction
              study                 the study's description; `place` counts what has been told
              late                  a record whose lease had been given up; kept, never told

A lease is a running row with a token and a deadline by the server's clock. Its search moves the deadline on; whoever
finds it passed, or on this machine finds the process gone, turns the row into a `harness` record, which is tried again.
Ending a lease compares the token, so a result that comes after that is late and changes nothing.

The folder is a mirror: records and leases are written there for people and for the report, and never read back; so it
is not fsynced, and what a power cut tears there is put aside and written again by the next search.
"""

import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy
from sqlalchemy import BigInteger, Column, Connection, DateTime, Index, Integer, Text, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import insert

from codesign.errors import WorkError
from codesign.results.ledger import read_records, write_record
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search import lease as leases
from codesign.search.advisor import frozen
from codesign.search.database import Database
from codesign.search.folder import StudyFolder
from codesign.search.lease import Lease
from codesign.search.lease_mirror import LeaseMirror
from codesign.search.ledger import load
from codesign.search.objective import Told, told
from codesign.search.pool import lost
from codesign.search.sql_index import SqlIndex
from codesign.search.store import Claim
from codesign.search.suggest import Point, Points
from codesign.search.trial_rows import UID
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective

LEASE_S = 60.0
_RENEW_SHARE = 0.25

_metadata = sqlalchemy.MetaData()
LEDGER = sqlalchemy.Table(
    "codesign_ledger",
    _metadata,
    Column("uid", Text, primary_key=True),
    Column("study", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("json", Text),
    Column("number", Integer),
    Column("attempt", Integer),
    Column("token", Text),
    Column("worker", Text),
    Column("lease", Text),
    Column("deadline", DateTime(timezone=True)),
    Column("place", BigInteger),
    UniqueConstraint("study", "number", "attempt"),
    Index("codesign_ledger_order", "study", "kind", "place"),
)
_c = LEDGER.c


@dataclasses.dataclass(frozen=True)
class SharedStudies:
    """The studies in a database, as `open_study` asks for them."""

    database: Database

    @property
    def address(self) -> str:
        return self.database.address

    def agree(self, name: str, description: str) -> str:
        row = {"uid": f"study/{name}", "study": f"study/{name}", "kind": "study", "json": description, "place": 0}
        self.database.alone(lambda: _metadata.create_all(self.database.engine))

        def step(connection: Connection) -> str:
            connection.execute(insert(LEDGER).values(row).on_conflict_do_nothing())
            return str(connection.execute(sqlalchemy.select(_c.json).where(_c.uid == row["uid"])).scalar_one())

        return self.database.run(step)


class SqlStore:
    """Opens the study of a folder in its database.

    Args:
        lease_s: how long a search may be silent before its trials are given to others.
    """

    def __init__(
        self,
        database: Database,
        folder: StudyFolder,
        *,
        points: Points,
        objectives: Sequence[Objective],
        say: Callable[[str], None],
        lease_s: float = LEASE_S,
    ) -> None:
        self._database = database
        self._folder = folder
        self._points = points
        self._objectives = tuple(objectives)
        self._lease_s = lease_s
        self._deadline = func.now() + _seconds(lease_s)
        self._me = leases.new()
        self._mirror = LeaseMirror(folder.leases)
        self._ahead: set[str] = set()  # records of ours beyond `_last_place`, which need not be read again
        self._last_place = 0
        self._renewed_s = -math.inf
        load(folder.trials, say)  # puts damaged files aside; what is missing is written again
        self._index = SqlIndex(database, folder.name, points, objectives, self._all_done)
        database.alone(self._index.open)
        self._send_unsent(say)

    # Reading.

    @property
    def running(self) -> Sequence[Lease]:
        return tuple(self._mirror.running.values())

    def refresh(self) -> Sequence[TrialRecord]:
        began_s = time.monotonic()
        is_due = began_s - self._renewed_s > _RENEW_SHARE * self._lease_s
        if is_due:
            self._renew()
        fresh, running, dead = self._look()
        if dead:
            for row, lease in dead:
                self._bury(row, lease)
            fresh, running, _ = self._look()
        records = []
        for row in fresh:
            self._last_place = row.place
            if row.json is None:
                self._ahead.discard(row.uid)
            else:
                records.append(TrialRecord.from_json(row.json))
                write_record(self._folder.trials, records[-1], is_durable=False)
        self._mirror.show({lease.uid: lease for lease in running})
        if is_due:
            self._renewed_s = began_s
            self._mirror.tidy()
        return records

    def _renew(self) -> None:
        mine = (_c.worker == self._me.worker) & (_c.kind == "running")
        update = sqlalchemy.update(LEDGER).where(mine).values(deadline=self._deadline)
        self._database.run(lambda connection: connection.execute(update), in_transaction=False)

    def _look(self) -> tuple[list[Any], list[Lease], list[tuple[Any, Lease]]]:
        """(new records, without their text where they are ours; living leases; dead leases and their rows)."""
        # While the database was away nobody could renew, so after its start everybody has as long as a lease lasts.
        has_passed = (_c.deadline < func.now()) & (
            func.pg_postmaster_start_time() < func.now() - _seconds(self._lease_s)
        )
        text = sqlalchemy.case((_c.uid.in_(self._ahead), None), else_=_c.json)
        query = sqlalchemy.select(
            *(_c.uid, _c.kind, _c.place, _c.token, _c.lease, _c.deadline),
            has_passed.label("has_passed"),
            text.label("json"),
        )
        is_new = (_c.kind == "running") | ((_c.kind == "done") & (_c.place > self._last_place))
        query = query.where(_c.study == self._folder.uid, is_new).order_by(_c.place)
        rows = self._database.run(lambda connection: connection.execute(query).all(), in_transaction=False)
        running, dead = [], []
        for row in rows:
            if row.kind == "running":
                lease = Lease.from_json(row.lease)
                is_ours = lease.worker.startswith(f"{self._me.worker}-")  # and we live, however long we were suspended
                if is_ours or (not row.has_passed and lease.is_alive):
                    running.append(lease)
                else:
                    dead.append((row, lease))
        return [row for row in rows if row.kind == "done"], running, dead

    def _bury(self, row: Any, lease: Lease) -> None:
        """Turns a dead lease into a record that says so, unless it was renewed or ended meanwhile."""
        why = "has not been heard of" if row.has_passed else "is gone"
        identity = TrialIdentity(study=self._folder.name, number=lease.number, uid=lease.uid, attempt=lease.attempt)
        config = EngineConfig.from_dict(lease.config)
        record = lost(identity, config, f"its search (process {lease.pid} on {lease.host}) {why}", lease.since)
        point, is_same = self._points.located(config), _c.deadline == row.deadline
        self._database.run(lambda connection: self._end(connection, record, point, None, row.token, is_same))

    # A trial's way.

    def claim(self, point: Point, number: int, attempt: int, place: str) -> Claim | None:
        identity = self._folder.identity(number, attempt, point.config.digest)
        token = uuid.uuid4().hex
        lease = dataclasses.replace(
            self._me,
            worker=f"{self._me.worker}-{number}-{attempt}",
            uid=identity.uid,
            number=number,
            attempt=attempt,
            config=point.config.to_dict(),
            place=place,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        row = {
            "uid": identity.uid,
            "study": self._folder.uid,
            "kind": "running",
            "number": number,
            "attempt": attempt,
            "token": token,
            "worker": self._me.worker,
            "lease": lease.to_json(),
            "deadline": self._deadline,
        }

        def step(connection: Connection) -> bool:
            new = insert(LEDGER).values(row).on_conflict_do_nothing().returning(_c.token)
            if connection.execute(new).scalar() is not None:
                return True
            held = sqlalchemy.select(_c.token).where(_c.uid == identity.uid, _c.kind == "running")
            return connection.execute(held).scalar() == token  # ours already, when the answer was lost

        if not self._database.run(step, in_transaction=False):
            return None
        self._mirror.begin(lease)
        return Claim(identity=identity, point=point, lease=lease, token=token)

    def moved(self, claim: Claim, place: str) -> Claim:
        lease = dataclasses.replace(claim.lease, place=place)
        update = sqlalchemy.update(LEDGER).where(*_held(claim)).values(lease=lease.to_json())
        self._database.run(lambda connection: connection.execute(update), in_transaction=False)
        self._mirror.begin(lease)
        return dataclasses.replace(claim, lease=lease)

    def finish(self, claim: Claim, record: TrialRecord, told: Told | None) -> bool:
        try:
            was_in_time = self._finish(record, claim.point, told, claim.token)
        except WorkError:  # the database is away for good, or a signal came while it was
            write_record(self._folder.trials / "unsent", _with_token(record, claim.token))
            raise
        if was_in_time:
            self._ahead.add(record.uid)
        self._mirror.end(record.uid)
        return was_in_time

    def _finish(self, record: TrialRecord, point: Point, told: Told | None, token: str) -> bool:
        def step(connection: Connection) -> bool:
            if self._end(connection, record, point, told, token):
                return True
            row = connection.execute(sqlalchemy.select(_c.kind, _c.token, _c.json).where(_c.uid == record.uid)).first()
            if row is not None and (row.kind, row.token, row.json) == ("done", token, record.to_json()):
                return True  # it was committed, and the answer was lost
            late = {"uid": f"{record.uid}/{token}", "study": self._folder.uid, "kind": "late", "json": record.to_json()}
            connection.execute(insert(LEDGER).values(late).on_conflict_do_nothing())
            return False

        was_in_time = self._database.run(step)
        if was_in_time:
            write_record(self._folder.trials, record, is_durable=False)
        else:
            write_record(self._folder.trials / "late", _with_token(record, token))
        return was_in_time

    def _send_unsent(self, say: Callable[[str], None]) -> None:
        """Hands in what an earlier search measured and could not hand in; in time, unless the trial was given up."""
        records, _ = read_records(self._folder.trials / "unsent")
        for kept in records:
            uid, _, token = kept.uid.rpartition("-")
            record = dataclasses.replace(kept, uid=uid)
            point = self._points.located(EngineConfig.from_dict(record.config))
            was_in_time = self._finish(record, point, told(record, self._objectives, ()), token)
            became = "handed in" if was_in_time else "late"
            say(f"trial {record.number}, measured before the database went away, is {became}")
            (self._folder.trials / "unsent" / f"{kept.uid}.json").unlink()

    def abandon(self, claim: Claim) -> None:
        delete = sqlalchemy.delete(LEDGER).where(*_held(claim))
        self._database.run(lambda connection: connection.execute(delete), in_transaction=False)
        self._mirror.end(claim.identity.uid)

    def close(self) -> None:
        self._mirror.show({})
        self._database.close()

    def _end(
        self,
        connection: Connection,
        record: TrialRecord,
        point: Point,
        told: Told | None,
        token: str,
        *conditions: sqlalchemy.ColumnElement[bool],
    ) -> bool:
        """Ends the lease with this token, keeps the record and tells the index; False when the lease was not there."""
        # The study's row is locked until the commit, so that places are told in the order of the commits.
        study = sqlalchemy.update(LEDGER).where(_c.uid == f"study/{self._folder.name}").returning(_c.place)
        place: int = connection.execute(study.values(place=_c.place + 1)).scalar_one()
        end = sqlalchemy.update(LEDGER).where(
            _c.uid == record.uid, _c.kind == "running", _c.token == token, *conditions
        )
        ended = connection.execute(end.values(kind="done", json=record.to_json(), deadline=None, place=place))
        if ended.rowcount != 1:
            connection.execute(study.values(place=_c.place - 1))  # nothing was told: the places have no gaps
            return False
        self._index.add(connection, place - 1, frozen(point, told, **{UID: record.uid}))
        return True

    # Small parts.

    def _all_done(self, connection: Connection) -> list[TrialRecord]:
        """Every record in the order in which it was told; none is told before the transaction ends."""
        study = sqlalchemy.select(_c.place).where(_c.uid == f"study/{self._folder.name}").with_for_update()
        connection.execute(study)
        done = (_c.study == self._folder.uid) & (_c.kind == "done")
        rows = connection.execute(sqlalchemy.select(_c.json).where(done).order_by(_c.place))
        return [TrialRecord.from_json(row.json) for row in rows]


def _with_token(record: TrialRecord, token: str) -> TrialRecord:
    """The record under a uid that says which lease it came from."""
    return dataclasses.replace(record, uid=f"{record.uid}-{token}")


def _held(claim: Claim) -> tuple[sqlalchemy.ColumnElement[bool], ...]:
    return _c.uid == claim.identity.uid, _c.kind == "running", _c.token == claim.token


def _seconds(seconds: float) -> sqlalchemy.ColumnElement[Any]:
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)
