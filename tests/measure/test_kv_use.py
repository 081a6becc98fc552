from codesign.measure.kv_use import KVUse, kv_use


def test_median_and_most_are_of_the_readings_in_which_blocks_were_held() -> None:
    readings = [KVUse(0, 0, 0, 0), KVUse(1, 32, 32, 0), KVUse(2, 64, 48, 128), KVUse(2, 64, 16, 64)]

    assert kv_use(readings) == {
        "num_samples": 3,
        "fragmentation": {"p50": 0.25, "max": 0.75},
        "shared_bytes": {"p50": 64, "max": 128},
        "blocks_used": {"p50": 2, "max": 2},
    }


def test_a_cache_that_was_never_used_has_no_figures() -> None:
    assert kv_use([]) == kv_use([KVUse(0, 0, 0, 0)]) == {}
