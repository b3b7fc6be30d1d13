from .augmentation import crop_of, padding_of
from .dataset import BadImages, Images
from .loader import Loader, as_it_is, eval_loader, train_images, train_loader
from .sampling import balanced_weights
from .sources.open import open_splits
from .sources.unlabelled import Unlabelled
from .splits import Source, Splits

__all__ = [
    "BadImages",
    "Images",
    "Loader",
    "Source",
    "Splits",
    "Unlabelled",
    "as_it_is",
    "balanced_weights",
    "crop_of",
    "eval_loader",
    "open_splits",
    "padding_of",
    "train_images",
    "train_loader",
]
