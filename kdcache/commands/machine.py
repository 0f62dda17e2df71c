"""The command about this machine: doctor."""

from __future__ import annotations

import sys

import click

from kdcache.options import EXIT_FAILED, example, json_option, show


@click.command(
    epilog=example("kdcache doctor", "kdcache doctor /data/coco.zarr", "kdcache doctor --json")
)
@click.argument("place", metavar="[PATH]", default=".")
@json_option
def doctor(place: str, as_json: bool) -> None:
    """Tell what this machine has, what is broken, and what to type about it.

    PATH is a cache, or a folder in which one is or will be (default: here), or a URL of either.
    Python, torch and ONNX Runtime with what really starts, driver, memory, disk or store and its
    speed, hub; about ten seconds.
    Exit status 1 when there is a problem: something without which kdcache, or the GPU that is
    there, cannot be used. A note is what works with less.
    """
    from kdcache.doctor.checkup import checkup
    from kdcache.doctor.report import checkup_text

    report = checkup(place)
    if hasattr(sys.stdout, "reconfigure"):
        # an output that cannot show a letter is one of the findings
        sys.stdout.reconfigure(errors="replace")
    show(report, as_json, checkup_text)
    if not report.ok:
        sys.exit(EXIT_FAILED)
