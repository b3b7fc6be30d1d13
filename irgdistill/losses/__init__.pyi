from .learner import Learner
from .logits import soft_targets
from .objective import DistillLoss, build_loss, gradient_shares
from .relations import LEAST_MOVEMENT
from .term import Batch

__all__ = ["LEAST_MOVEMENT", "Batch", "DistillLoss", "Learner", "build_loss", "gradient_shares", "soft_targets"]
