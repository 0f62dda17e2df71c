"""Policies of views for tests."""

from __future__ import annotations

from kdcache.precompute.policy import Policy, read_policy

TRANSFORMS = list(Policy.model_fields)


def always(*names: str) -> Policy:
    """The heavy policy with these transforms, or all, in every view, and no others."""
    tables = read_policy("heavy").model_dump()
    return Policy.model_validate(
        {name: tables[name] | {"probability": 1.0} for name in names or TRANSFORMS}
    )
