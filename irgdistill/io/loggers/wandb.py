"""Weights & Biases: one W&B run for each run folder, whose id is in RUN/wandb.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from irgdistill.io.loggers.base import logger
from irgdistill.io.loggers.sent import Sent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@logger("wandb", package="wandb", install="'irgdistill[wandb]'")
class WeightsAndBiases:
    """Logs to W&B; a resumed run continues under the same id.

    W&B cannot take records back. RUN/wandb.json lists the last update of each kind sent; earlier ones are skipped.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], text: str) -> None:
        import wandb

        self.since = 0
        self._sent = Sent(folder / "wandb.json")
        self._sent.id = self._sent.id or uuid4().hex[:12]
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "irgdistill"),
            name=folder.name,
            dir=str(folder),
            id=self._sent.id,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off", quiet=True),
        )
        self._sent.save()

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self._send(kind, {f"{kind}/{name}": value for name, value in values.items()}, step)

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        self._send("graphs", {f"graphs/{name}": self._wandb.Image(array) for name, array in pictures.items()}, step)

    def close(self) -> None:
        self._run.finish()

    def _send(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        if self._sent.is_new(kind, step):
            self._run.log(dict(values), step=step)
            self._sent.save(kind, step)
