from .build import build_network, known_models, multiply_adds, parameters, rebuild_network
from .checkpoint import describe, described, restore, timm_config
from .fold import fold_batch_norm
from .network import Network, View
from .roles import build_booster, build_student, build_teacher, open_network, resolve_student
from .weights import LOCAL

__all__ = [
    "LOCAL",
    "Network",
    "View",
    "build_booster",
    "build_network",
    "build_student",
    "build_teacher",
    "describe",
    "described",
    "fold_batch_norm",
    "known_models",
    "multiply_adds",
    "open_network",
    "parameters",
    "rebuild_network",
    "resolve_student",
    "restore",
    "timm_config",
]
