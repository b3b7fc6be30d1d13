from .augmentation import crop_of, padding_of
from .dataset import Images, UnreadableImages
from .loader import Loader, eval_loader, no_collate, train_images, train_loader
from .sampling import balanced_weights
from .sources.open import open_splits
from .sources.unlabelled import Unlabelled
from .splits import Source, Splits

__all__ = [
    "Images",
    "Loader",
    "Source",
    "Splits",
    "Unlabelled",
    "UnreadableImages",
    "balanced_weights",
    "crop_of",
    "eval_loader",
    "no_collate",
    "open_splits",
    "padding_of",
    "train_images",
    "train_loader",
]
