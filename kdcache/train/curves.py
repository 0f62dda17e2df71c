"""TensorBoard: a curve of every metric, and the picture of each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.drawing import U8


class Curves:
    """Events of a run, below its folder; to be closed.

    Epochs after `epochs_done`, written by a process that was stopped, are replaced.
    """

    def __init__(self, folder: Path, epochs_done: int) -> None:
        # here, because it takes a second and only the leading process of a training needs it
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def add(self, metrics: Mapping[str, Any], picture: U8) -> None:
        """The metrics of an epoch, by their names in metrics.jsonl, and its picture (H, W, 3)."""
        epoch = metrics["epoch"]
        for name, value in metrics.items():
            if name != "epoch" and value is not None:
                group = name.split("_")[0] if name.startswith(("train_", "val_")) else "pace"
                self._writer.add_scalar(f"{group}/{name}", value, epoch)
        self._writer.add_image("rows", picture, epoch, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
