from .checks import check_classes, check_input_sizes, check_processes
from .components import Parts
from .evaluation import Metrics, evaluate
from .setup import Setup, open_data, prepare, resolved
from .state import changes, metric, open_state, position, score
from .teacher_cache import (
    FORMAT,
    SHARD,
    TYPES,
    describe_data,
    describe_teacher,
    describe_views,
    mark_of,
    pack_logits,
    read_description,
    shard_path,
)
from .trainer import Trainer

__all__ = [
    "FORMAT",
    "SHARD",
    "TYPES",
    "Metrics",
    "Parts",
    "Setup",
    "Trainer",
    "changes",
    "check_classes",
    "check_input_sizes",
    "check_processes",
    "describe_data",
    "describe_teacher",
    "describe_views",
    "evaluate",
    "mark_of",
    "metric",
    "open_data",
    "open_state",
    "pack_logits",
    "position",
    "prepare",
    "read_description",
    "resolved",
    "score",
    "shard_path",
]
