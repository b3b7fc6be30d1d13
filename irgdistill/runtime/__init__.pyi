from .batch_norm import renew_statistics, sync_batch_norm
from .compiler import compiler_settings
from .device import choose_device, gpu_settings, keep_memory, read_later
from .distributed import World, process_group, running_statistics
from .environment import is_worker, report_failure, restart_count, world_size
from .loader_processes import loader_context, sharing_context, start_server
from .parent import end_with_parent, lifeline
from .precision import autocast, bf16_speed, instructions, may_have_bf16, resolve_precision, slow_precision
from .signals import Signals, Stopped, ignore_signals
from .workers import cores, run_workers

__all__ = [
    "Signals",
    "Stopped",
    "World",
    "autocast",
    "bf16_speed",
    "choose_device",
    "compiler_settings",
    "cores",
    "end_with_parent",
    "gpu_settings",
    "ignore_signals",
    "instructions",
    "is_worker",
    "keep_memory",
    "lifeline",
    "loader_context",
    "may_have_bf16",
    "process_group",
    "read_later",
    "renew_statistics",
    "report_failure",
    "resolve_precision",
    "restart_count",
    "run_workers",
    "running_statistics",
    "sharing_context",
    "slow_precision",
    "start_server",
    "sync_batch_norm",
    "world_size",
]
