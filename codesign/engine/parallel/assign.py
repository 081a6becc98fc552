"""Who takes what: the part of the model and the share of the cache of each rank."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from codesign.engine.kernels.pieces import Pieces
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.models.assemble import PackClock
from codesign.engine.models.decoder import Decoder
from codesign.engine.models.shape import ModelShape
from codesign.engine.parallel.balance import split_layers, stage_costs
from codesign.engine.parallel.part import Layout, Part
from codesign.engine.parallel.stage import Stage
from codesign.engine.parallel.stage_policy import of_layers
from codesign.engine.parallel.team import Team
from codesign.engine.quantize.cpu import capability
from codesign.errors import Unsupported
from codesign.spec.engine_config import EngineConfig


class BuildPart(Protocol):
    def __call__(self, *, part: Part, clock: PackClock) -> Decoder: ...


def part_of(team: Team, shape: ModelShape, config: EngineConfig, build: BuildPart, pieces: Pieces) -> Part:
    """This rank's part. Where there are stages, rank 0 finds out what a layer and the head cost and tells the others.

    Args:
        build: a part that stands alone, to be timed.
    """
    layout, links = team.links.layout, team.links
    stages: tuple[range, ...] = (range(shape.num_layers),)
    if layout.num_stages > 1:
        found = [] if links.rank else [*_costs(team, shape, config, build, pieces)]
        layer_ns, head_ns = links.share(found)
        stages = split_layers(shape.num_layers, layout.num_stages, layer_cost=layer_ns, head_cost=head_ns)
    return Part(whole=shape, tensor_rank=links.tensor_rank, tensor_size=layout.tensor_size, layers=stages[links.stage])


def _costs(team: Team, shape: ModelShape, config: EngineConfig, build: BuildPart, pieces: Pieces) -> tuple[int, int]:
    """Nanoseconds of (a layer, the head) in a decoding step of the whole batch."""
    tensor_size = team.links.layout.tensor_size
    facts = {
        "shape": dataclasses.asdict(shape),
        "weights": config.weights.to_dict(),
        "dtype": config.dtype,
        "pieces": pieces.kernel,
        "tensor_size": tensor_size,
        "num_rows": config.max_batch_size,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(team.device) if team.device.type == "cuda" else capability(),
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    layers = range(shape.num_layers - 1, shape.num_layers)  # the last one, which has the head beside it
    part = Part(whole=shape, tensor_rank=0, tensor_size=tensor_size, layers=layers)

    def built() -> Stage:
        stage = build(part=part, clock=PackClock())
        assert isinstance(stage, Stage)
        stage.use(pieces)
        return stage

    return stage_costs(key, built, num_rows=config.max_batch_size)


def policy_of(policy: KVPolicy, part: Part) -> KVPolicy:
    """The KV policy as a rank's own cache needs it."""
    return of_layers(policy, part.layers, num_layers=part.whole.num_layers)


def check_policy(policy: KVPolicy, shape: ModelShape, layout: Layout, num_slots: int) -> None:
    """Raises Unsupported for a policy that would decide otherwise on a part of the heads."""
    if shape.num_kv_heads % layout.tensor_size == 0:
        return
    for _, own in policy.slot_policies(num_slots):
        if own.evidence != "none":
            name = type(own).__module__.rpartition(".")[2]
            raise Unsupported(
                f"kv.policy {name!r} with parallel.tensor_parallel_size {layout.tensor_size} on {shape.num_kv_heads} "
                "KV heads: copies of a KV head would each see a part of its queries, and keep other rows; use a degree "
                "that divides the KV heads, or kv.policy full or streaming_llm"
            )


def team_facts(team: Team, part: Part, kv: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the whole, from what each rank says of its own; on other ranks than 0 their own."""
    own = {
        **kv,
        "stage": team.links.stage,
        "tensor_rank": team.links.tensor_rank,
        "layers": [part.layers.start, part.layers.stop],
        "heads": [part.heads.start, part.heads.stop],
        "kv_heads": list(part.kv_heads),
        "device": str(team.device),
    }
    found = team.links.collect(own)
    if not found:
        return dict(kv)
    stages = sorted((rank for rank in found if rank["tensor_rank"] == 0), key=lambda rank: rank["stage"])
    places: dict[str, int] = {}
    for rank in found:
        for memory, num_bytes in rank["kv_place"].items():
            places[memory] = places.get(memory, 0) + num_bytes
    return {
        "kv_budget_tokens": [budget for stage in stages for budget in stage["kv_budget_tokens"]],
        "kv_place": places,
        "ranks": [{name: value for name, value in rank.items() if name not in kv} for rank in found],
    }
