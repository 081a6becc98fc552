"""One trial: a short session that builds a configuration, warms it up, loads it, watches it and judges its quality.

    with TrialRunner(profile, baseline=space.default(...)) as runner:
        record = runner.measure(identity, config, on_phase=show)

Whatever the configuration does, the answer is a TrialRecord: a broken one is a result too. Quality is judged on the
very engine that was timed. It is compared with the unmodified configuration, whose log-probabilities are written once
per (model, suite, configuration) into a cache below `~/.cache/codesign`.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from codesign.bundled import calibration_texts
from codesign.engine.caches import cache_folder
from codesign.engine.models.tokenizer import Tokenizer
from codesign.errors import InputError, WorkError
from codesign.measure import suite as suites
from codesign.measure.capacity import Bounds, Capacity, find_capacity
from codesign.measure.child_session import ChildSession, Limits
from codesign.measure.client import client_facts
from codesign.measure.counters import memory_events, replayed_steps
from codesign.measure.kv_use import KVUse, kv_use
from codesign.measure.load import Load, LoadResult, drive
from codesign.measure.monitor import Monitor, make_probe
from codesign.measure.nursery import Nursery
from codesign.measure.nvml import MIN_ENERGY_WINDOW_S
from codesign.measure.phases import Phases
from codesign.measure.provenance import provenance
from codesign.measure.replay import Replay
from codesign.measure.requests import make_load
from codesign.measure.sanity import impossible
from codesign.measure.scores import checked_scores, vocab_size
from codesign.measure.session import BuildFacts, TrialFailed
from codesign.measure.summary import Readings, metrics, unsupported_objectives, violations
from codesign.measure.tier import RULES, TierRule
from codesign.measure.tokens import RandomTokens, TextTokens, TokenSource
from codesign.measure.turn import Turn
from codesign.results.measurement import percentile_supported
from codesign.results.record import MetricValue, Outcome, Tier, TrialIdentity, TrialRecord
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import METRICS
from codesign.spec.profile import Profile
from codesign.spec.rules import unjudged

OnPhase = Callable[[str, float | None], None]
FOREIGN_CPU_LIMIT = 0.10
CAPACITY_BLOCK = 100_000  # beyond the blocks of any window, so that no prompt comes twice
_SUITE_SEED = 20


class TrialRunner:
    """Measures configurations of one profile on this machine; holds the nursery.

    Args:
        baseline: the unmodified configuration, resolved; the reference of quality.
        cache_dir: where the reference's log-probabilities are kept.
        limits: clocks of one session.
        turn: which workers of this machine must not disturb each other.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        baseline: EngineConfig,
        cache_dir: Path | None = None,
        limits: Limits | None = None,
        turn: Turn | None = None,
    ) -> None:
        self.turn = turn or Turn()
        self._profile = profile
        self._baseline = baseline
        self._cache_dir = cache_dir or cache_folder()
        self._limits = limits or Limits()
        self._nursery = Nursery()
        self._provenance: Mapping[str, Any] = {}
        self._tokens: TokenSource | None = None
        self._tokenizer: Tokenizer | None = None
        self._replay: Replay | None = None

    def __enter__(self) -> Self:
        self._check_retrieval()
        model = self._profile.model_spec
        self._provenance = {
            **provenance(model, self._profile.device, self._profile.hardware.cores),
            "profile": {"name": self._profile.name, "digest": self._profile.digest},
            "seed": self._profile.workload.seed,
        }
        if self.turn.overlap is not None:
            self._provenance["placement"]["windows"] = dict(self.turn.overlap)
        if model.path is not None and (Path(model.path) / "tokenizer.json").exists():
            self._tokenizer = Tokenizer(Path(model.path))
        workload = self._profile.workload
        if workload.trace is not None:
            encode = None if self._tokenizer is None else self._tokenizer.encode
            self._replay = Replay(workload.trace, encode=encode, seed=workload.seed)
        return self

    def __exit__(self, *_: object) -> None:
        self._nursery.close()
        self.turn.close()

    def measure(
        self,
        identity: TrialIdentity,
        config: EngineConfig,
        *,
        tier: Tier = "screen",
        on_phase: OnPhase = lambda phase, share: None,
    ) -> TrialRecord:
        """Builds and measures one resolved configuration.

        Args:
            on_phase: called with the phase and the share of it that is done (None where that is not known).

        Raises:
            WorkError: the cache cannot be written, or other trouble that is not the configuration's.
        """
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        phases = Phases(on_phase)
        rule = RULES[tier]
        if identity.number == 0:  # every other trial is compared with this one, so its spread counts each time
            rule = dataclasses.replace(rule, min_s=2 * rule.min_s, min_blocks=2 * rule.min_blocks)
        trial = _Trial(self, config, rule, phases)
        outcome = Outcome(kind="ok")
        try:
            trial.run()
        except TrialFailed as failure:
            outcome = failure.outcome
        fields = trial.fields(outcome, careful=tier != "screen")
        return TrialRecord(
            **dataclasses.asdict(identity),
            config=config.to_dict(),
            config_digest=config.digest,
            tier=tier,
            phases=phases.seconds,
            started_at=started_at,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance=self._provenance,
            **fields,
        )

    def _check_retrieval(self) -> None:
        """Raises InputError when retrieval is asked for and the workload is too short to plant a fact in."""
        length, least = self._baseline.max_model_len, suites.LEAST_RETRIEVAL_TOKENS
        if "retrieval_accuracy" in self._profile.asked_metrics and length < least:
            raise InputError(
                f"retrieval needs at least {least} tokens of prompt and output, the workload has {length}",
                file=self._profile.path,
                key="workload",
            )

    # What trials of one profile share.

    @property
    def profile(self) -> Profile:
        return self._profile

    def open(self) -> ChildSession:
        return ChildSession(
            self._nursery,
            model=self._profile.model_spec,
            device=self._profile.device,
            num_threads=self._profile.hardware.cores or len(os.sched_getaffinity(0)),
            limits=self._limits,
        )

    def tokens(self, vocab_size: int) -> TokenSource:
        """Where prompts come from: calibration text, or random tokens where the model has no tokenizer."""
        if self._tokens is None:
            if self._tokenizer is None:
                self._tokens = RandomTokens(vocab_size)
            else:
                self._tokens = TextTokens([self._tokenizer.encode(text.text) for text in calibration_texts()])
        return self._tokens

    def load(
        self, vocab_size: int, *, block: int, lengths_of: int | None = None, num_requests: int | None = None
    ) -> Load:
        """The requests of one block (see `make_load`)."""
        return make_load(
            self._profile.workload,
            self.tokens(vocab_size),
            block=block,
            lengths_of=lengths_of,
            num_requests=num_requests,
            replay=self._replay,
        )

    @property
    def replay(self) -> Replay | None:
        return self._replay

    def suite(self, size: suites.SuiteSize, max_model_len: int, vocab_size: int) -> dict[str, Any] | None:
        """The quality suite, or None for random weights, whose output means nothing.

        Nothing in it is longer than `max_model_len`, nor than what the unmodified configuration can answer.
        """
        if not self._profile.model_spec.has_trained_weights:
            return None
        max_model_len = min(max_model_len, self._baseline.max_model_len)
        if self._tokenizer is None:
            return suites.random_suite(vocab_size, size, max_model_len=max_model_len, seed=_SUITE_SEED)
        return suites.make_suite(self._tokenizer.encode, size, max_model_len=max_model_len, seed=_SUITE_SEED)

    def reference(self, suite: dict[str, Any], on_phase: OnPhase) -> Path:
        """The file with the unmodified configuration's log-probabilities for this suite; made when it is not there.

        Raises:
            TrialFailed: the unmodified configuration itself cannot be judged.
        """
        model, versions = self._provenance["model"], self._provenance["versions"]
        named = [model["digest"], self._baseline.digest, suites.digest(suite), versions["torch"], versions["codesign"]]
        named.append(str(self._provenance["machine"]["cpu"]))
        path = self._cache_dir / "references" / f"{hashlib.sha256(repr(named).encode()).hexdigest()[:32]}.npy"
        if path.exists():
            return path
        on_phase("reference", None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkError(f"{path.parent}: cannot keep the quality reference there ({error})") from error
        with self.open() as session:
            session.build(self._baseline)
            session.score({**suite, "write_reference": str(path)})
        return path


class _Trial:
    """The state of one trial on its way, so that a failure keeps what was already known."""

    def __init__(self, runner: TrialRunner, config: EngineConfig, rule: TierRule, phases: Phases) -> None:
        self._runner, self._config, self._rule, self._phases = runner, config, rule, phases
        self._facts: BuildFacts | None = None
        self._readings: Readings | None = None
        self._trust: dict[str, Any] = {}
        self._warnings: list[str] = []

    def run(self) -> None:
        runner, phases = self._runner, self._phases
        refusal = unjudged(self._config, runner.profile.asked_metrics)
        if refusal is not None:
            raise TrialFailed(Outcome(kind="unsupported", detail=refusal))
        with runner.turn.busy(), phases("spawn"):
            session = runner.open()
        with session:
            with runner.turn.busy(), phases("build"):
                self._facts = session.build(self._config)
            phases.add(self._facts.phases)
            size = vocab_size(self._facts)
            capacity = None
            with runner.turn.alone(lambda: phases.say("wait", None)):
                with phases("warm_up"):
                    self._warm_up(session, size)
                with phases("measure"):
                    blocks, reading, counted = self._window(session, size)
                    memory = session.memory()
                if self._config.speculate.name != "none":
                    speculation = {"speculation": dict(session.speculation())}
                    self._facts = dataclasses.replace(self._facts, resolved={**self._facts.resolved, **speculation})
                if "capacity_requests_per_s" in runner.profile.asked_metrics:
                    with phases("capacity"):
                        capacity = self._capacity(session, size, blocks)
            with runner.turn.busy():
                quality = self._quality(session, size)
            sizes = {**self._facts.bytes, "peak": memory["peak_memory_bytes"], "host_peak": memory["host_peak_bytes"]}
            self._readings = Readings(
                blocks=blocks, bytes=sizes, quality=quality, monitor=reading, capacity=capacity, cache=counted
            )
            with phases("close"):
                session.close()

    def _quality(self, session: ChildSession, size: int) -> dict[str, Any] | None:
        """How well the very engine that was timed does its work; None where there is nothing to judge."""
        runner, phases = self._runner, self._phases
        suite = runner.suite(self._rule.suite, self._config.max_model_len, size)
        if suite is None:
            return None
        if suite["is_text"] and not suite["retrieval"]:
            least = suites.LEAST_RETRIEVAL_TOKENS
            self._warnings.append(f"retrieval was not judged: it needs a max_model_len of at least {least}")
        reference = runner.reference(suite, phases.say)
        with phases("quality"):
            scores = checked_scores(session.score({**suite, "reference": str(reference)}), suite)
        return {**scores, "is_text": suite["is_text"], "suite": suites.digest(suite)}

    def fields(self, outcome: Outcome, *, careful: bool) -> dict[str, Any]:
        """The record's fields, as far as the trial came."""
        facts, readings, profile = self._facts, self._readings, self._runner.profile
        found: dict[str, Any] = {"outcome": outcome, "trust": self._trust}
        if facts is not None:
            found |= {"resolved": facts.resolved, "kernels": facts.kernels, "bytes": facts.bytes}
        if readings is not None and facts is not None:
            values = metrics(readings, profile)
            why = impossible(readings, facts, profile.hardware, self._config)
            if why:
                found["outcome"] = Outcome(kind="harness", detail=f"physically impossible: {why}")
            self._say_limits()
            found |= {
                "bytes": readings.bytes,
                "metrics": values,
                "violations": violations(readings, values, profile.slo, careful=careful),
                "requests": readings.samples,
                "quality": readings.quality or {},
                "monitor": readings.monitor,
            }
            if self._config.is_emulated:
                found |= self._without_times(values)
        found["warnings"] = tuple(self._warnings)
        return found

    def _without_times(self, values: Mapping[str, MetricValue]) -> dict[str, Any]:
        """What takes the place of fields that hold times, or what goes with them: an emulation's say nothing."""
        kept = {name: value for name, value in values.items() if not METRICS[name].is_timed}
        dropped = ", ".join(name for name in values if name not in kept)
        self._warnings.append(f"emulated, so nothing that depends on speed is kept: {dropped}, requests, monitor")
        return {"metrics": kept, "requests": (), "monitor": {}}

    def _warm_up(self, session: ChildSession, vocab_size: int) -> None:
        """Loads of the same lengths until two in a row take the same time, within the tier's bounds."""
        workload, rule = self._runner.profile.workload, self._rule
        count = min(workload.num_requests, self._config.max_batch_size)
        walls: list[float] = []
        settled = False
        while not settled and (len(walls) < 2 or sum(walls) < rule.warm_up_s):
            load = self._runner.load(vocab_size, block=-1 - len(walls), lengths_of=-1, num_requests=count)
            walls.append(drive(session, load.at_once).wall_s)
            settled = len(walls) > 1 and abs(walls[-1] - walls[-2]) <= rule.settle * walls[-2]
        self._trust |= {"warmup_blocks": len(walls), "warmup_settled": settled}
        if not settled:
            self._warnings.append(
                f"warm-up did not settle within {rule.settle:.0%} in {len(walls)} blocks; the machine is unsteady"
            )

    def _window(
        self, session: ChildSession, vocab_size: int
    ) -> tuple[tuple[LoadResult, ...], dict[str, Any], dict[str, Any]]:
        """The measured blocks, what the monitor saw, and what became of the cache's memory; measured once more when
        others used the machine meanwhile."""
        attempts = []
        for _ in range(2):
            session.memory()  # the device's busy time counts from here
            before, _ = session.stats(), session.kv_use()  # the cache's readings count from here, too
            # Beside windows that were measured not to disturb, only work on this worker's cores is foreign.
            cores = os.sched_getaffinity(0) if self._runner.turn.may_overlap else None
            num_ranks, device = self._config.parallel.num_ranks, self._runner.profile.device
            with Monitor(make_probe(device, session.pid, num_ranks=num_ranks, cores=cores)) as monitor:
                blocks = self._blocks(session, vocab_size)
            wall_s = sum(block.wall_s for block in blocks)
            reading = {**monitor.reading, "wall_s": wall_s}
            busy_us = session.memory().get("device_busy_us")
            if busy_us is not None:
                reading["device_busy"] = busy_us / 1e6 / wall_s
            after, use = session.stats(), session.kv_use()
            counted = {**memory_events(before, after), **replayed_steps(before, after), **_spread(use)}
            attempts.append((blocks, reading, counted))
            if not _is_disturbed(monitor.reading):
                break
        blocks, reading, counted = min(attempts, key=lambda attempt: attempt[1].get("foreign_cpu", 0.0))
        self._trust |= {
            "num_blocks": len(blocks),
            "num_requests": sum(len(block.samples) for block in blocks),
            "num_processes": 1,
            "confidence": self._rule.confidence,
            "windows": len(attempts),
            "is_disturbed": _is_disturbed(reading),
            "ignore_eos": self._runner.profile.workload.ignore_eos,
            **counted,
        }
        facts, warnings = client_facts(blocks, self._runner.replay, confidence=self._rule.confidence)
        self._trust |= facts
        self._warnings += warnings
        supported = percentile_supported(self._trust["num_requests"], confidence=self._rule.confidence)
        self._trust["percentile_supported"] = supported
        if self._trust["is_disturbed"]:
            share = reading.get("foreign_cpu")
            what = (
                f"{share:.0%} of the processor" if share is not None else f"GPU shared with {reading['foreign_pids']}"
            )
            self._warnings.append(f"disturbed: other processes used {what} while this was measured, twice")
        return blocks, reading, counted

    def _blocks(self, session: ChildSession, vocab_size: int) -> tuple[LoadResult, ...]:
        rule, profile = self._rule, self._runner.profile
        min_s = max(rule.min_s, profile.workload.min_duration_s)
        if wants_energy(profile):
            min_s = max(min_s, MIN_ENERGY_WINDOW_S)
        blocks: list[LoadResult] = []
        while True:
            load = self._runner.load(vocab_size, block=len(blocks))
            blocks.append(drive(session, load, on_progress=lambda done, total: self._phases.say("measure", None)))
            elapsed_s = sum(block.wall_s for block in blocks)
            requests = sum(len(block.samples) for block in blocks)
            self._phases.say("measure", min(1.0, elapsed_s / min_s))
            if elapsed_s >= min_s and requests >= rule.min_requests and len(blocks) >= rule.min_blocks:
                return tuple(blocks)
            if elapsed_s >= max(rule.max_s, min_s):
                return tuple(blocks)

    def _capacity(self, session: ChildSession, vocab_size: int, blocks: tuple[LoadResult, ...]) -> Capacity | None:
        """The highest rate within the SLO, from the rate that was just served; what it rests on goes into `trust`."""

        def load(probe: int, num_requests: int) -> Load:
            return self._runner.load(vocab_size, block=CAPACITY_BLOCK + probe, num_requests=num_requests)

        found = find_capacity(
            session,
            load,
            self._runner.profile.slo.time_limits(),
            start_per_s=sum(len(block.samples) for block in blocks) / sum(block.wall_s for block in blocks),
            bounds=Bounds(max_s=self._rule.capacity_s, confidence=self._rule.confidence),
            on_probe=lambda probe: self._phases.say("capacity", None),
        )
        self._trust["capacity"] = found.to_dict()
        if found.stopped in ("probes", "seconds"):
            self._warnings.append(f"capacity: {found.verdict}")
        return found if found.probes else None

    def _say_limits(self) -> None:
        weak = unsupported_objectives(self._runner.profile.objectives, self._trust["percentile_supported"])
        if weak:
            count = self._trust["num_requests"]
            self._warnings.append(f"{count} requests do not support {', '.join(weak)}; it only steers the search")


def _is_disturbed(reading: Mapping[str, Any]) -> bool:
    return reading.get("foreign_cpu", 0.0) > FOREIGN_CPU_LIMIT or bool(reading.get("foreign_pids"))


def _spread(readings: Sequence[KVUse]) -> dict[str, Any]:
    found = kv_use(readings)
    return {"kv_use": found} if found else {}


def wants_energy(profile: Profile) -> bool:
    """Whether an objective or a limit needs the energy counter, which is too coarse for a short window."""
    return any(METRICS[name].needs == "energy" for name in profile.asked_metrics)
