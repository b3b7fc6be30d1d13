from .cache_manifest import CACHE_FORMAT, Manifest, manifest_path, read_manifest
from .cached_views import with_cached_orientation
from .checkpointing import Checkpointer
from .checks import check_classes, check_input_sizes, check_processes, difference
from .components import RunComponents, build_components
from .embeddings import embed
from .evaluation import Metrics, evaluate, metric_name, now, score
from .observer import Observer
from .precision import precision_of
from .probes import knn_top1, linear_top1
from .progress import Progress
from .resolving import on_backend, resolved
from .setup import Setup, SharedInputs, TeacherSetup, open_data, prepare
from .shared import SharedParts
from .similarity import agreement, each_pair, linear_cka, nearest_neighbours, pearson, spearman
from .state import SavedState, changes, open_state, position, seed_process
from .stored_logits import pack_logits
from .teacher_cache import (
    DTYPES,
    SHARD,
    TeacherCache,
    describe_data,
    describe_teacher,
    describe_views,
    shard_path,
)
from .teachers import CachedRows, LiveTeacher
from .together import Turns, fit_together
from .trainer import Trainer, build_trainer

__all__ = [
    "CACHE_FORMAT",
    "DTYPES",
    "SHARD",
    "CachedRows",
    "Checkpointer",
    "LiveTeacher",
    "Manifest",
    "Metrics",
    "Observer",
    "Progress",
    "RunComponents",
    "SavedState",
    "Setup",
    "SharedInputs",
    "SharedParts",
    "TeacherCache",
    "TeacherSetup",
    "Trainer",
    "Turns",
    "agreement",
    "build_components",
    "build_trainer",
    "changes",
    "check_classes",
    "check_input_sizes",
    "check_processes",
    "describe_data",
    "describe_teacher",
    "describe_views",
    "difference",
    "each_pair",
    "embed",
    "evaluate",
    "fit_together",
    "knn_top1",
    "linear_cka",
    "linear_top1",
    "manifest_path",
    "metric_name",
    "nearest_neighbours",
    "now",
    "on_backend",
    "open_data",
    "open_state",
    "pack_logits",
    "pearson",
    "position",
    "precision_of",
    "prepare",
    "read_manifest",
    "resolved",
    "score",
    "seed_process",
    "shard_path",
    "spearman",
    "with_cached_orientation",
]
