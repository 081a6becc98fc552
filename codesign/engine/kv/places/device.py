"""device: rows in the memory of the device that computes. The neutral place."""

import dataclasses

from codesign.engine.kv.place import KVPlace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device(KVPlace):
    pass
