from .atomic import write_atomically, write_folder, write_text
from .console import Report, quiet_console, table
from .loggers.base import LOGGERS, Logger, Loggers, check_loggers, logger
from .metrics_file import records
from .record import SELECTING, Evaluation, Number, Record, Summary, read_json
from .run_folder import WEIGHTS, RunFolder, find_checkpoint
from .tensors import FORMAT, checksum, map_tensors, own_copies, read_metadata, read_tensors, save_tensors
from .text import code_span, markdown, markdown_table, visible, visible_values

__all__ = [
    "FORMAT",
    "LOGGERS",
    "SELECTING",
    "WEIGHTS",
    "Evaluation",
    "Logger",
    "Loggers",
    "Number",
    "Record",
    "Report",
    "RunFolder",
    "Summary",
    "check_loggers",
    "checksum",
    "code_span",
    "find_checkpoint",
    "logger",
    "map_tensors",
    "markdown",
    "markdown_table",
    "own_copies",
    "quiet_console",
    "read_json",
    "read_metadata",
    "read_tensors",
    "records",
    "save_tensors",
    "table",
    "visible",
    "visible_values",
    "write_atomically",
    "write_folder",
    "write_text",
]
