from .api import Distiller, distill, match
from .config.loading import load_config, load_plugin
from .config.schema import Config
from .errors import UserError
from .losses.objective import DistillLoss
from .matching.plan import Plan

__all__ = ["Config", "DistillLoss", "Distiller", "Plan", "UserError", "distill", "load_config", "load_plugin", "match"]
__version__: str
