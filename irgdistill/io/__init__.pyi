from .atomic import write_atomically, write_folder, write_text
from .console import Report, quiet_console, table
from .loggers.base import LOGGERS, Logger, Loggers, check_loggers, logger
from .metrics_file import records
from .run_folder import WEIGHTS, RunFolder, find_checkpoint
from .tensors import FORMAT, checksum, own_copies, read_metadata, read_tensors, save_tensors

__all__ = [
    "FORMAT",
    "LOGGERS",
    "WEIGHTS",
    "Logger",
    "Loggers",
    "Report",
    "RunFolder",
    "check_loggers",
    "checksum",
    "find_checkpoint",
    "logger",
    "own_copies",
    "quiet_console",
    "read_metadata",
    "read_tensors",
    "records",
    "save_tensors",
    "table",
    "write_atomically",
    "write_folder",
    "write_text",
]
