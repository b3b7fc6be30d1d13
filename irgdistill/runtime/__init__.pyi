from .batch_norm import synchronised
from .device import autocast, choose_device, keep_memory, read_later
from .distributed import World, joined, statistics_of
from .environment import leave_word, ranks, restarts
from .signals import Signals, Stopped, leave_to_parent
from .workers import cores, run_workers

__all__ = [
    "Signals",
    "Stopped",
    "World",
    "autocast",
    "choose_device",
    "cores",
    "joined",
    "keep_memory",
    "leave_to_parent",
    "leave_word",
    "ranks",
    "read_later",
    "restarts",
    "run_workers",
    "statistics_of",
    "synchronised",
]
