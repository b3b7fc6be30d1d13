from .levels import Level, LevelsError, Tap, find_levels
from .plan import Ends, Plan, ends, match
from .pooling import MAP_LAYOUTS
from .table import print_plan
from .taps import Output, Tapped, first_output, has_unused_parameters, tap_name

__all__ = [
    "MAP_LAYOUTS",
    "Ends",
    "Level",
    "LevelsError",
    "Output",
    "Plan",
    "Tap",
    "Tapped",
    "ends",
    "find_levels",
    "first_output",
    "has_unused_parameters",
    "match",
    "print_plan",
    "tap_name",
]
