from .adapters import Learner
from .base import Batch, Counterpart, Skip, Term, TermContext, TermSettings, method, term
from .objective import DistillLoss, StepLosses, build_loss, compared_maps, gradient_shares
from .several import mean_logits, with_mean_logits
from .terms.logits import soft_targets
from .terms.maps import attended
from .terms.positions import position_loss
from .terms.relations import LEAST_MOVEMENT

__all__ = [
    "LEAST_MOVEMENT",
    "Batch",
    "Counterpart",
    "DistillLoss",
    "Learner",
    "Skip",
    "StepLosses",
    "Term",
    "TermContext",
    "TermSettings",
    "attended",
    "build_loss",
    "compared_maps",
    "gradient_shares",
    "mean_logits",
    "method",
    "position_loss",
    "soft_targets",
    "term",
    "with_mean_logits",
]
