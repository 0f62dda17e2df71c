"""The `kdcache` command: its group, errors caught once, logging. The commands are in `commands/`."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import click

from kdcache import __version__
from kdcache.allocator import keep_freed_memory
from kdcache.commands import frozen, machine, students
from kdcache.errors import KdcacheError
from kdcache.options import EXIT_FAILED, example, leads
from kdcache.stop import interrupted_by_sigterm

# Commands that find on disk what they did before.
_GOING_ON = ("extract", "copy", "train", "sweep")
_SAME_COMMAND = (
    "; what is committed stays: the same command goes on (train: with --resume, if it had begun)"
)


class _Group(click.Group):
    """Catches every KdcacheError once: its message on stderr, exit status 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with interrupted_by_sigterm():
                return super().invoke(context)
        except (KdcacheError, OSError) as error:  # a full or read-only disk is no bug
            if isinstance(error, BrokenPipeError):
                raise
            if leads():
                click.echo(f"error: {error}", err=True)
            context.exit(EXIT_FAILED)
        except KeyboardInterrupt:
            if leads():
                goes_on = context.invoked_subcommand in _GOING_ON
                click.echo("stopped" + _SAME_COMMAND * goes_on, err=True)
            context.exit(EXIT_FAILED)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("kdcache demo"),
)
@click.version_option(__version__, "-V", "--version")
def main() -> None:
    """Distil once, train many times.

    `extract` runs the frozen networks over a dataset and stores what a student needs in a cache;
    `train` uses the cache alone.
    """
    _log_to_stderr()
    keep_freed_memory()
    # Pillow's remarks on odd files name no file; what matters of them is an error of ours
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _log_to_stderr() -> None:
    """The course of things: a few lines, as good in a batch job's log as on a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("kdcache")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if leads() else logging.ERROR)


for _command in (
    frozen.demo_command,
    frozen.plan,
    frozen.extract,
    frozen.info,
    frozen.verify,
    frozen.copy,
    students.train,
    students.sweep,
    students.evaluate,
    students.predict,
    students.export,
    students.bench,
    machine.doctor,
):
    main.add_command(_command)
