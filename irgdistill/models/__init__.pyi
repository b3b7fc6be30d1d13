from .build import build_network, known_models, multiply_adds, parameters, rebuild_network
from .checkpoint import CheckpointMetadata, PlanRecord, TeacherRecord, TermRecord, describe, restore, timm_config
from .class_names import class_names, put_in_order
from .fold import fold_batch_norm
from .network import Network, NetworkRecord, Preprocess
from .roles import build_booster, build_student, build_teacher, open_network, resolve_student
from .weights import LOCAL

__all__ = [
    "LOCAL",
    "CheckpointMetadata",
    "Network",
    "NetworkRecord",
    "PlanRecord",
    "Preprocess",
    "TeacherRecord",
    "TermRecord",
    "build_booster",
    "build_network",
    "build_student",
    "build_teacher",
    "class_names",
    "describe",
    "fold_batch_norm",
    "known_models",
    "multiply_adds",
    "open_network",
    "parameters",
    "put_in_order",
    "rebuild_network",
    "resolve_student",
    "restore",
    "timm_config",
]
