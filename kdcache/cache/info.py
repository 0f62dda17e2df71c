"""What a cache holds and what it costs, from its manifest and commit records alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from kdcache.cache.format import read_remarks
from kdcache.cache.layout import IMAGE, LOGITS, MASK
from kdcache.cache.mirrored import of_another_model
from kdcache.cache.reader import Cache


def describe(cache: Cache) -> dict[str, Any]:
    """Rows, samples, bytes on disk by part, and the ratio of each tap against float32."""
    stored: Counter[str] = Counter()
    for commit in cache.commits:
        for path, record in commit.objects.items():
            stored[path] += record.size_bytes
    features = {
        tap.name: sum(size for path, size in stored.items() if path.startswith(tap.folder + "/"))
        for tap in cache.manifest.taps
    }
    total, remarks = sum(stored.values()), read_remarks(cache.path)
    return {
        "path": str(cache.path),
        "rows": len(cache),
        "rows_by_split": dict(sorted(Counter(key.split for key in cache.keys).items())),
        "rows_by_view": dict(sorted(Counter(key.view for key in cache.keys).items())),
        "samples": len(cache.samples),
        "size_px": cache.manifest.size_px,
        "taps": {
            tap.name: {
                "shape": list(tap.shape),
                "precision": tap.precision,
                "stored_channels": {
                    factor: sum(stop - start for start, stop in channels)
                    for factor, channels in tap.groups
                },
            }
            for tap in cache.manifest.taps
        },
        "compression": cache.manifest.compression,
        "shards": len(cache.commits),
        "shard_files": sum(len(commit.objects) for commit in cache.commits),
        "bytes": {
            IMAGE: stored[IMAGE],
            MASK: stored[MASK],
            LOGITS: stored[cache.manifest.logits_path],
            "features": features,
            "total": total,
        },
        "bytes_per_row": total / len(cache) if len(cache) else None,
        "features_ratio_vs_float32": {
            tap.name: 4 * math.prod(tap.shape) * len(cache) / features[tap.name]
            for tap in cache.manifest.taps
            if features[tap.name]
        },
        **dataclasses.asdict(remarks.together),
        "in_train_and_val": remarks.in_train_and_val,
        "mirrored": {
            part: {
                **dataclasses.asdict(one),
                "of_another_model": of_another_model(cache.manifest, part, one),
            }
            for part, one in remarks.mirrored.items()
        },
        "fingerprint": dict(cache.manifest.fingerprint),
        "augmentation": cache.manifest.augmentation,
        "versions": dict(cache.manifest.versions),
    }
