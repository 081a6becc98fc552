"""Hardware: the machine a profile is about. Published figures, or what `codesign probe` measured."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from codesign.spec.section import Count, Name, NotNegative, Positive, Section

Device = Literal["cuda", "cpu"]


class Memory(Section):
    """One level of memory of one device, e.g. hbm or host."""

    name: Name
    gib: Positive
    gb_per_s: Positive | None = None


class Links(Section):
    """Bandwidths between devices, to the host, between nodes; GB/s of one direction."""

    device_gb_per_s: Positive | None = None
    host_gb_per_s: Positive | None = None
    node_gb_per_s: Positive | None = None


class PeakTflops(Section):
    """Dense peak per number format, in 10^12 operations per second (no sparsity)."""

    fp32: Positive | None = None
    tf32: Positive | None = None
    bf16: Positive | None = None
    fp16: Positive | None = None
    fp8: Positive | None = None
    int8: Positive | None = None
    int4: Positive | None = None


class Hardware(Section):
    """One machine: `count` equal devices. Only `name` and `device` are needed; the rest sharpens predictions.

    Attributes:
        name: as the device calls itself (a study refuses to run on another); for a CPU any name.
        compute_capability: of a CUDA device, e.g. "9.0".
        isa: of a CPU, e.g. [avx2] or [avx512, amx].
        cores: CPU cores to use; absent means all.
        price_per_hour: of the whole machine, in the currency of your choice.
    """

    name: Name
    device: Device
    count: Annotated[int, Field(ge=1, le=1024)] = 1
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")] | None = None
    isa: Annotated[tuple[Name, ...], Field(strict=False, max_length=64)] = ()
    cores: Count | None = None
    memory: Annotated[tuple[Memory, ...], Field(strict=False, max_length=16)] = ()
    links: Links = Links()
    peak_tflops: PeakTflops = PeakTflops()
    idle_power_w: NotNegative | None = None
    max_power_w: Positive | None = None
    price_per_hour: NotNegative | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.device == "cpu" and self.compute_capability is not None:
            raise ValueError("compute_capability belongs to device: cuda")
        if self.device == "cuda" and (self.isa or self.cores is not None):
            raise ValueError("isa and cores belong to device: cpu")
        names = [memory.name for memory in self.memory]
        if len(set(names)) != len(names):
            raise ValueError(f"memory names must differ, got {', '.join(names)}")
        if self.idle_power_w is not None and self.max_power_w is not None and self.idle_power_w > self.max_power_w:
            raise ValueError("idle_power_w is above max_power_w")
        return self
