"""`describe`: the numbers that `kdcache info` shows."""

from __future__ import annotations

from kdcache.cache.info import describe


def test_bytes_are_those_of_the_files(cache):
    info = describe(cache)
    (tap,) = cache.manifest.taps

    def on_disk(folder: str) -> int:
        return sum(file.stat().st_size for file in (cache.path / folder).rglob("c.*"))

    for part in ("image", "mask", "teacher_logits"):
        assert info["bytes"][part] == on_disk(part)
    assert info["bytes"]["features"] == {tap.name: on_disk(tap.folder)}
    assert info["rows"] == sum(info["rows_by_split"].values()) == 10
    ratio = 10 * 4 * 16 * 8 * 8 / on_disk(tap.folder)
    assert info["features_ratio_vs_float32"] == {tap.name: ratio}
    assert info["taps"][tap.name]["stored_channels"] == {2: 8, 1: 8}
    assert info["shard_files"] == len(list(cache.path.rglob("c.*")))
