"""build_engine: from a model and one EngineConfig to a running Engine. What cannot be built is refused by name here."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from codesign.engine.attention.paged import PagedAttention
from codesign.engine.attention.switched import AnyAttention, make_attention
from codesign.engine.block_allocator import UNPAGED, Allocator, BlockAllocator
from codesign.engine.block_pool import BlockPool
from codesign.engine.engine import Engine, EngineParts, Scheduler
from codesign.engine.graphs import CudaRecorder, Graphs
from codesign.engine.kernels.pieces import Pieces, choose
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.kv.tables import num_blocks_of
from codesign.engine.memory import return_freed_memory
from codesign.engine.models.assemble import PackClock
from codesign.engine.models.describe import describe
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.shape import ModelShape
from codesign.engine.parallel.assign import check_policy, part_of, policy_of, team_facts
from codesign.engine.parallel.failure import Disconnected
from codesign.engine.parallel.part import check_split
from codesign.engine.parallel.runner import RankRunner
from codesign.engine.parallel.stage import Stage
from codesign.engine.parallel.team import Team, follow, layout_of, lead
from codesign.engine.prefix_cache import PrefixCache
from codesign.engine.quantize.linear import Workspace
from codesign.engine.runner import SingleRunner
from codesign.engine.speculate.adaptive import Adaptive
from codesign.engine.speculate.calibrate import calibrate
from codesign.engine.speculate.proposer import Proposer, Speculator, Target
from codesign.engine.speculate.speculation import Speculation
from codesign.engine.step import BLOCK_TOKENS
from codesign.engine.weights import build_decoder
from codesign.errors import InputError, Unsupported
from codesign.registry import ATTENTION, KV_CODECS, KV_PLACES, KV_POLICIES, SCHEDULERS, SPECULATORS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.graph_rules import unrecorded
from codesign.spec.model import ModelSpec
from codesign.spec.rules import senseless, undrafted
from codesign.units import format_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    model: ModelSpec, config: EngineConfig, *, device: str = "cpu", num_threads: int | None = None
) -> Engine:
    """Builds what the configuration says, weights and cache included.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        num_threads: of this whole process, for operations on the CPU; None leaves them as they are.
    Raises:
        InputError: a file, key or value of the model or configuration is wrong.
        Unsupported: the model, machine or combination cannot be built; the text says what can.
    """
    config = config.resolve()
    place = _device(device)
    if config.parallel.num_ranks == 1:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        return _build(model, config, place, None)
    _check(model, describe(model)[0], config)  # what is wrong with them is said before any process is started
    team = lead(model, config, device=device, num_threads=num_threads, run=serve_rank)
    try:
        return _build(model, config, team.device, team)
    except BaseException as error:
        try:
            if isinstance(error, Disconnected):
                team.others.raise_failure()
            raise
        finally:
            team.close()


def serve_rank(job: Mapping[str, Any]) -> None:
    """What a rank other than 0 does: builds its part and runs the plans of rank 0, until that says that it is over."""
    team = follow(job)
    engine = _build(ModelSpec.from_dict(job["model"]), EngineConfig.from_dict(job["config"]), team.device, team)
    assert isinstance(engine.parts.runner, RankRunner)
    engine.parts.runner.serve(engine.own)


def _build(model: ModelSpec, config: EngineConfig, place: torch.device, team: Team | None) -> Engine:
    """The whole engine, or one rank's part of it."""
    dtype = DTYPES[config.dtype]
    shape, eos = describe(model)
    _check(model, shape, config)
    if (reason := unrecorded(config, place.type)) is not None:
        raise Unsupported(reason)

    workspace, clock = Workspace(), PackClock()
    started = time.perf_counter()
    build = functools.partial(
        build_decoder, model, shape, config, dtype=dtype, device=place, workspace=workspace, clock=clock
    )
    pieces = choose(config.kernels.fused, dtype=dtype, device=place)
    part = None if team is None else part_of(team, shape, config, build, pieces)
    decoder = build(part=part, links=None if team is None else team.links)
    decoder.use(pieces)
    speculator: Speculator = SPECULATORS.create(config.speculate.name, key="speculate", **config.speculate.knob_dict)
    proposer = speculator.start(
        Target(
            model=model,
            shape=shape,
            config=config,
            dtype=dtype,
            device=place,
            pieces=pieces,
            workspace=workspace,
            clock=clock,
        )
    )
    loaded = time.perf_counter()
    policy: KVPolicy = KV_POLICIES.create(config.kv.policy.name, key="kv.policy", **config.kv.policy.knob_dict)
    attention, num_slots = _allocate(
        policy if part is None else policy_of(policy, part),
        shape if part is None else part.shape,
        config,
        dtype,
        place,
        pieces,
        max_query_len=speculator.num_draft_tokens + 1,
        draft_bytes=0 if proposer is None else proposer.slot_bytes,
        total=int if team is None else team.links.total,
    )
    if proposer is not None:
        proposer.allocate(num_slots)
    return_freed_memory()
    allocated = time.perf_counter()

    member = SCHEDULERS.create(config.scheduler.name, key="scheduler", **config.scheduler.knob_dict)
    scheduler: Scheduler = member.start(
        num_slots=num_slots,
        max_step_tokens=config.max_step_tokens,
        allocator=_allocator(model, config, getattr(attention, "num_blocks", 0)),
    )
    blocks: dict[str, int] = {}
    if isinstance(attention, PagedAttention):
        block_bytes = attention.block_bytes if team is None else team.links.total(attention.block_bytes)
        blocks = {"num_blocks": attention.num_blocks, "block_bytes": block_bytes}
    kv: dict[str, Any] = {"kv_budget_tokens": list(attention.kv_budget_tokens), "kv_place": attention.kv_place}
    if part is None or team is None:
        graphs = Graphs(CudaRecorder(place), workspace) if config.kernels.graphs else None
        runner = SingleRunner(decoder, attention, place, graphs)
    else:
        assert isinstance(decoder, Stage), "a part of a model is a stage"
        runner = RankRunner(decoder, attention, team, num_micro_batches=config.parallel.num_micro_batches)
        kv = team_facts(team, part, kv)
    speculation = None
    if proposer is not None:
        adaptive = _adaptive(speculator, proposer, scheduler, runner, shape, config, num_slots)
        speculation = Speculation(
            proposer,
            KV_CODECS.create(config.kv.codec.name, key="kv.codec", **config.kv.codec.knob_dict),
            num_draft_tokens=speculator.num_draft_tokens,
            max_step_tokens=config.max_step_tokens,
            adaptive=adaptive,
        )
    calibrated = time.perf_counter()
    return Engine(
        EngineParts(
            config=config,
            model=decoder,
            attention=attention,
            scheduler=scheduler,
            runner=runner,
            workspace=workspace,
            device=place,
            num_slots=num_slots,
            eos_token_ids=eos,
            speculation=speculation,
            resolved={
                **kv,
                "num_slots": num_slots,
                **blocks,
                "dtype": config.dtype,
                "device": str(place),
                "num_threads": torch.get_num_threads(),
                "max_model_len": config.max_model_len,
                "max_step_tokens": config.max_step_tokens,
                "architecture": shape.architecture,
                "num_parameters": shape.num_parameters,
                "vocab_size": shape.vocab_size,
                "eos_token_ids": sorted(eos),
                "weight_cache": clock.cache,
                "weight_notes": clock.notes,
                **({} if speculation is None else {"speculation": speculation.stats()}),
            },
            phases={
                "load_s": loaded - started - clock.quantize_s,
                "quantize_s": clock.quantize_s,
                "allocate_s": allocated - loaded,
                **({} if speculation is None else {"calibrate_s": calibrated - allocated}),
            },
        )
    )


def _device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise InputError(f"unknown device {name!r}", key="device", got=name, known=["cpu", "cuda"])
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unsupported("device cuda: this machine has no usable CUDA device; use device cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise Unsupported(f"device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if kind == "cuda":  # cuDNN plans attention for each shape anew, and at each step a sequence has one row more
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def _check(model: ModelSpec, shape: ModelShape, config: EngineConfig) -> None:
    """Combinations that would compute something else than the model."""
    length = config.max_model_len
    if length > shape.max_positions:
        raise Unsupported(
            f"max_model_len {length} is longer than the {shape.max_positions} positions of the model; "
            f"use at most {shape.max_positions}, or a rope scaling in its config.json"
        )
    if shape.sliding_window is not None and length > shape.sliding_window:
        raise Unsupported(
            f"max_model_len {length} is longer than the model's sliding window of {shape.sliding_window} tokens, which "
            f"this engine does not mask; use at most {shape.sliding_window}"
        )
    reason = senseless(config) or undrafted(config, model)
    if reason is not None:
        raise Unsupported(reason)
    layout = layout_of(config)
    check_split(shape, layout)
    policy = KV_POLICIES.create(config.kv.policy.name, key="kv.policy", **config.kv.policy.knob_dict)
    check_policy(policy, shape, layout, config.max_batch_size)
    if config.max_step_tokens < config.max_batch_size:
        raise Unsupported(
            f"max_step_tokens {config.max_step_tokens} cannot hold one token of each of max_batch_size "
            f"{config.max_batch_size} sequences; use at least {config.max_batch_size}"
        )


def _adaptive(
    speculator: Speculator,
    proposer: Proposer,
    scheduler: Scheduler,
    runner: SingleRunner,
    shape: ModelShape,
    config: EngineConfig,
    num_slots: int,
) -> Adaptive | None:
    """What chooses how many tokens are drafted, from costs measured now; None where that is fixed."""
    if not speculator.adaptive:
        return None
    costs = calibrate(
        scheduler,
        runner,
        proposer,
        num_slots=num_slots,
        num_draft_tokens=speculator.num_draft_tokens,
        max_step_tokens=config.max_step_tokens,
        max_model_len=config.max_model_len,
        vocab_size=shape.vocab_size,
    )
    return Adaptive(costs, speculator.num_draft_tokens) if costs.target else None  # no room for a single draft


def _allocate(
    policy: KVPolicy,
    shape: ModelShape,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    pieces: Pieces,
    *,
    max_query_len: int,
    draft_bytes: int,
    total: Callable[[int], int],
) -> tuple[AnyAttention, int]:
    """The cache with as many slots as batch size and `kv_memory_bytes` allow, and their number.

    Args:
        draft_bytes: that a slot costs beside this cache, within the same bound.
        total: bytes of this process -> of all ranks, which hold parts of one cache.
    """

    def attention(policy: KVPolicy, num_slots: int, num_blocks: int | None = None) -> AnyAttention:
        return make_attention(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            rope=rope_of(shape.rope, shape.head_dim),
            policy=policy,
            codec=KV_CODECS.create(config.kv.codec.name, key="kv.codec", **config.kv.codec.knob_dict),
            place=KV_PLACES.create(config.kv.place.name, key="kv.place", **config.kv.place.knob_dict),
            backend=ATTENTION.create(config.attention.name, key="attention", **config.attention.knob_dict),
            num_slots=num_slots,
            num_blocks=num_blocks,
            max_model_len=config.max_model_len,
            max_query_len=max_query_len,
            dtype=dtype,
            device=device,
            pieces=pieces,
        )

    if config.kv.layout.name == "paged":
        return _allocate_blocks(config, functools.partial(attention, policy), draft_bytes=draft_bytes, total=total)

    @functools.cache
    def slot_bytes(policy: KVPolicy) -> int:
        return attention(policy, 1).kv_bytes  # asked of a real one: only it knows what policy and codec add up to

    def num_bytes(num_slots: int) -> int:
        own_bytes = total(sum(count * slot_bytes(own) for count, own in policy.slot_policies(num_slots)))
        return own_bytes + num_slots * draft_bytes

    try:
        num_slots, limit = config.max_batch_size, config.kv_memory_bytes
        if limit is not None:
            while num_slots and num_bytes(num_slots) > limit:
                num_slots -= 1
            if not num_slots:
                least = num_bytes(1)
                raise Unsupported(
                    f"kv_memory_bytes {limit} ({format_bytes(limit)}): one sequence of max_model_len "
                    f"{config.max_model_len} needs {least} ({format_bytes(least)})"
                )
        return attention(policy, num_slots), num_slots
    except ValueError as error:
        raise Unsupported(f"kv.policy {config.kv.policy.name!r}: {error}") from error


def _allocate_blocks(
    config: EngineConfig,
    attention: Callable[[int, int], AnyAttention],
    *,
    draft_bytes: int,
    total: Callable[[int], int],
) -> tuple[AnyAttention, int]:
    """The cache in blocks: as many as the batch can fill, or `kv_memory_bytes` has room for.

    Sequences share them, so that more can run than would fit at full length: what is then too much is preempted and
    computed anew. Rows that a codec rounds come out of that different, since a prompt attends to native ones; so with
    such a codec there are only as many sequences as always fit. A prefix cache keeps what is left of the memory filled.
    """
    num_slots, limit = config.max_batch_size, config.kv_memory_bytes
    each = num_blocks_of(config.max_model_len)
    num_blocks = num_slots * each
    if limit is not None:
        probe = attention(num_slots, 1)  # asked of a real one: only it knows what codec and table add up to
        assert isinstance(probe, PagedAttention)
        block_bytes = total(probe.block_bytes)
        fixed = total(probe.kv_bytes) - block_bytes + num_slots * draft_bytes
        room = (limit - fixed) // block_bytes
        if room < each:
            least = fixed + each * block_bytes
            raise Unsupported(
                f"kv_memory_bytes {limit} ({format_bytes(limit)}): one sequence of max_model_len "
                f"{config.max_model_len} needs {least} ({format_bytes(least)}), {each} blocks of {BLOCK_TOKENS} tokens"
            )
        num_blocks = room if config.prefix_cache else min(num_blocks, room)
    if config.kv.codec.name != "native":
        num_slots = min(num_slots, num_blocks // each)
    return attention(num_slots, num_blocks), num_slots


def _allocator(model: ModelSpec, config: EngineConfig, num_blocks: int) -> Allocator:
    """Who has which block of a paged cache; `num_blocks` is 0 where the cache is not paged.

    The keys of the prefix cache are seeded with model and configuration: what is computed from equal tokens depends on
    both. An engine's weights never change, so they need not be read for it.
    """
    if not num_blocks:
        return UNPAGED
    pool = BlockPool(num_blocks)
    if not config.prefix_cache:
        return BlockAllocator(pool)
    seed = json.dumps({"model": dataclasses.asdict(model), "config": config.to_dict()}, sort_keys=True)
    return BlockAllocator(pool, PrefixCache(pool, seed=seed.encode()))
