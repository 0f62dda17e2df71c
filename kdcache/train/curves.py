"""TensorBoard: a curve of every metric, and the picture of each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdcache.drawing import U8


class Curves:
    """Events of a run, below its folder; a context manager.

    Epochs after `epochs_done`, written by a process that was stopped, are replaced.
    """

    def __init__(self, folder: Path, epochs_done: int) -> None:
        # here, because it takes a second and only the leading process of a training needs it
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def add(self, metrics: Mapping[str, Any], picture: U8) -> None:
        """The metrics of an epoch, by their names in metrics.jsonl, and its picture (H, W, 3)."""
        epoch = metrics["epoch"]
        for name, value in metrics.items():
            if name != "epoch" and value is not None:
                group = name.split("_")[0] if name.startswith(("train_", "val_")) else "pace"
                self._writer.add_scalar(f"{group}/{name}", value, epoch)
        self._writer.add_image("rows", picture, epoch, dataformats="HWC")
        self._writer.flush()
