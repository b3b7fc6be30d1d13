from .batch_norm import sync_batch_norm
from .compiler import compiler_settings
from .device import autocast, choose_device, keep_memory, read_later
from .distributed import World, process_group, running_statistics
from .environment import is_worker, report_failure, restart_count, world_size
from .signals import Signals, Stopped, ignore_signals
from .workers import cores, run_workers

__all__ = [
    "Signals",
    "Stopped",
    "World",
    "autocast",
    "choose_device",
    "compiler_settings",
    "cores",
    "ignore_signals",
    "is_worker",
    "keep_memory",
    "process_group",
    "read_later",
    "report_failure",
    "restart_count",
    "run_workers",
    "running_statistics",
    "sync_batch_norm",
    "world_size",
]
