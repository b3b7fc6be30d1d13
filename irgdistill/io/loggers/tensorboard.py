"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irgdistill.io.loggers.base import logger

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@logger("tensorboard", package="tensorboard", install="'irgdistill[tensorboard]'")
class TensorBoard:
    """Writes event files. Those of a resumed run replace what was logged after the update it resumes at."""

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        known = any(path.glob("events.out.tfevents.*"))
        self.since = step if known else 0
        """Records from this update on must be sent again: `purge_step` drops them."""
        self._writer = SummaryWriter(str(path), purge_step=step if known else None)
        self._writer.add_text("config", f"```yaml\n{text}```", step)

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(f"graphs/{name}", picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
