from .atomic import write_atomically, write_folder, write_text
from .console import Report, hushed, table
from .loggers import Loggers, check_loggers
from .metrics_file import records
from .run_folder import WEIGHTS, RunFolder, find_checkpoint
from .tensors import FORMAT, checksum, own_copies, read_metadata, read_tensors, save_tensors

__all__ = [
    "FORMAT",
    "WEIGHTS",
    "Loggers",
    "Report",
    "RunFolder",
    "check_loggers",
    "checksum",
    "find_checkpoint",
    "hushed",
    "own_copies",
    "read_metadata",
    "read_tensors",
    "records",
    "save_tensors",
    "table",
    "write_atomically",
    "write_folder",
    "write_text",
]
