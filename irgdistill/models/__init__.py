"""Teacher and student through timm. Importing this package registers the CIFAR networks."""

from irgdistill.models import cifar
from irgdistill.models.build import (
    LOCAL,
    Network,
    build_network,
    known_models,
    multiply_adds,
    parameters,
    rebuild_network,
)
from irgdistill.models.fold import fold_batch_norm

__all__ = [
    "LOCAL",
    "Network",
    "build_network",
    "cifar",
    "fold_batch_norm",
    "known_models",
    "multiply_adds",
    "parameters",
    "rebuild_network",
]
