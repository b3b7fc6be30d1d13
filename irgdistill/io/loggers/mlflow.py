"""MLflow: one MLflow run for each run folder, whose id is in RUN/mlflow.json."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irgdistill.io.loggers.base import logger
from irgdistill.io.loggers.sent import Sent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


PARAMETERS, LENGTH = 100, 500
"""Parameters of one request, and characters of one value, that every MLflow server takes."""


@logger("mlflow", package="mlflow", install="'irgdistill[mlflow]'")
class MLflow:
    """Logs to MLflow, at the place and in the experiment that MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say.

    A resumed run continues under the same id. MLflow takes no records back: those sent already are skipped.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any], text: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.since = 0
        self._client, self._metric = MlflowClient(), Metric
        self._sent = Sent(folder / "mlflow.json")
        if self._sent.id is not None:
            self._client.update_run(self._sent.id, status="RUNNING")
            return
        self._sent.id = self._client.create_run(_experiment(self._client), run_name=folder.name).info.run_id
        self._sent.save()
        values = [Param(key, str(value)[:LENGTH]) for key, value in _flat(config).items()]
        for first in range(0, len(values), PARAMETERS):
            self._client.log_batch(self._sent.id, params=values[first : first + PARAMETERS])
        self._client.log_text(self._sent.id, text, "config.yaml")

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        if self._sent.is_new(kind, step):
            now = int(1000 * time.time())
            metrics = [self._metric(f"{kind}/{name}", value, now, step) for name, value in values.items()]
            self._client.log_batch(self._sent.id, metrics=metrics)
            self._sent.save(kind, step)

    def images(self, pictures: Mapping[str, NDArray[np.uint8]], step: int) -> None:
        if self._sent.is_new("graphs", step):
            for name, picture in pictures.items():
                self._client.log_image(self._sent.id, picture, key=f"graphs/{name}", step=step)
            self._sent.save("graphs", step)

    def close(self) -> None:
        self._client.set_terminated(self._sent.id)


def _experiment(client: Any) -> str:
    """Id of the experiment, which is made if it does not exist."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "irgdistill")
    if (found := client.get_experiment_by_name(name)) is None:
        with suppress(Exception):  # another process may have made it in between
            return str(client.create_experiment(name))
        found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
