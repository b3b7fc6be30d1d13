"""One call that turns a name (and perhaps a checkpoint) into a network with everything needed to feed it."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from irgdistill.errors import UserError, nearest
from irgdistill.levels import Level, LevelsError, Tap, find_levels
from irgdistill.taps import View

LOCAL = "local-dir:"
_SOURCES = ("hf-hub:", "hf_hub:", LOCAL)


@dataclass
class Network:
    """A timm model and how it wants its images."""

    name: str
    model: nn.Module
    args: dict[str, Any]
    """What `timm.create_model` needs beside the name and the number of classes."""
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    classes: list[str] | None = None
    """Class names in label order, where a checkpoint tells them."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> Network:
        """A timm model with its own way to see images, but for what is given."""
        data = {**resolve_model_data_config(model), **(preprocessing or {})}
        return cls(
            name=name or str(model.pretrained_cfg["architecture"]),  # type: ignore[index]
            model=model,
            args=dict(args or {}),
            size=tuple(size or data["input_size"][-2:]),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=str(data["interpolation"]),
            crop_pct=float(data["crop_pct"]),
        )

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def architecture(self) -> str:
        """The registered name, without a source or a weight tag."""
        return str(self.model.pretrained_cfg["architecture"])  # type: ignore[index]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes the network's input, in plain values."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
        }

    def describe(self) -> dict[str, Any]:
        """All but the weights, in plain values: what `rebuild_network` takes."""
        return {
            "architecture": self.architecture,
            "args": self.args,
            "num_classes": self.num_classes,
            "input_size": list(self.size),
            **self.preprocessing,
        }

    def view(self) -> View:
        return View(self.size, self.mean, self.std)

    def levels(self) -> list[Level]:
        """What can be tapped, found at the network's own default size, where no map has shrunk to a point.

        Raises UserError, one line, when nothing can."""
        own = tuple(self.model.pretrained_cfg["input_size"])  # type: ignore[index]
        size = own if not self._fixed else (own[0], *self.size)
        try:
            return find_levels(self.model, size)
        except LevelsError as error:
            raise UserError(f"{self.name} cannot be matched yet: {error}") from None

    def map_size(self, tap: Tap, size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of the map at `tap` for images of another size; None where the network does not run."""
        try:
            for level in find_levels(self.model, (len(self.mean), *size)):
                for other in level.blocks:
                    if other.module == tap.module:
                        return other.height, other.width
        except LevelsError:
            pass
        return None

    @property
    def _fixed(self) -> bool:
        return bool(self.model.pretrained_cfg.get("fixed_input_size"))  # type: ignore[union-attr,operator]


def known_models() -> list[str]:
    """Every name that timm can build here."""
    return list(timm.list_models())


def build_network(
    name: str,
    *,
    pretrained: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    args: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    origin: str = "",
    meta: bool = False,
) -> Network:
    """Build `name`, with pretrained weights, with `weights` (loaded strictly), or from random ones.

    `preprocessing` may hold mean, std, interpolation and crop_pct that override the network's own; `origin` names where
    the weights come from; `meta` builds shapes without weights, also of the largest networks.
    Raises UserError: unknown name (nearest ones), weights that do not fit or cannot be fetched.
    """
    _check_name(name)
    args = dict(args or {})
    if args.get("in_chans", 3) != 3:
        raise UserError(f"{name} with in_chans = {args['in_chans']}: images have 3 channels")
    if num_classes is None and weights is not None:
        num_classes = _classes_of(name, weights)
    if input_size is not None and _fixed_size(name, args):
        args["img_size"] = input_size
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
    try:
        device = {"device": "meta"} if meta else {}
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **args, **device)
    except (OSError, RuntimeError, FileNotFoundError) as error:
        if not pretrained:
            raise UserError(f"{name} cannot be built: {_one_line(error)}") from None
        raise UserError(
            f"no pretrained weights of {name} could be fetched ({_one_line(error)}); "
            "give them with --teacher-checkpoint or --student-checkpoint FILE (eval: --checkpoint)"
        ) from None
    except TypeError as error:
        wanted = {**args, **({} if num_classes is None else {"num_classes": num_classes})}
        raise UserError(f"{name} does not accept {wanted}: {_one_line(error)}") from None
    if weights is not None:
        load_weights(model, weights, name, origin)
    return Network.of(model, name, args, input_size, preprocessing)


def rebuild_network(about: Mapping[str, Any], *, input_size: tuple[int, int] | None = None, **how: Any) -> Network:
    """The network of `Network.describe`, at its own size or another; `how` as in `build_network`, which raises."""
    return build_network(
        about["architecture"],
        num_classes=about["num_classes"],
        input_size=input_size or tuple(about["input_size"]),
        args={key: value for key, value in about["args"].items() if key != "img_size"},
        preprocessing={key: about[key] for key in ("mean", "std", "interpolation", "crop_pct")},
        **how,
    )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Load strictly. Raises UserError that says what is missing, left over or of another shape."""
    own = model.state_dict()
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    missing, extra = [k for k in own if k not in weights], [k for k in weights if k not in own]
    for problem, names in (("lack", missing), ("have, beyond it,", extra), ("differ in shape at", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"the weights in {origin} do not fit {name}: they {problem} {', '.join(names[:3])}{more}")
    model.load_state_dict(dict(weights), strict=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a .safetensors or .pth file, never unpickling code. Raises UserError when it cannot be read."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is truncated or no checkpoint: {_one_line(error)}") from None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of weights")
    return dict(weights)


def parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(network: Network) -> int:
    """Multiply-adds of one image, counted on shapes alone."""
    tensors = {**dict(network.model.named_parameters()), **dict(network.model.named_buffers())}
    meta = {key: value.detach().to("meta") for key, value in tensors.items()}
    image = torch.empty(1, len(network.mean), *network.size, device="meta")
    training = network.model.training
    network.model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(network.model, meta, (image,))
    network.model.train(training)
    return int(counter.get_total_flops()) // 2


def _check_name(name: str) -> None:
    if name.startswith(_SOURCES):
        if name.startswith(LOCAL) and not (Path(name.removeprefix(LOCAL)) / "config.json").is_file():
            raise UserError(f"{name}: no config.json in that folder")
        return
    if not timm.is_model(name):
        elsewhere = ", and no folder or file here" if "/" in name or Path(name).suffix else ""
        known = [m.split(".")[0] for m in known_models()]
        raise UserError(f"unknown model {name!r}{elsewhere}{nearest(name, known)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise UserError(f"unknown weights {name!r}{nearest(name, tags)}") from None


def _fixed_size(name: str, args: Mapping[str, Any]) -> bool:
    if name.startswith(_SOURCES) or args.get("dynamic_img_size"):
        return False
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg is not None and cfg.fixed_input_size)


def _classes_of(name: str, weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes from the shape of the classifier in `weights`, None where it does not say."""
    cfg = None if name.startswith(_SOURCES) else timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg is not None else None
    for key in [head] if isinstance(head, str) else list(head or ()):
        for suffix in (".bias", ".weight"):
            if key + suffix in weights:
                return int(weights[key + suffix].shape[0])
    return None


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" …") or type(error).__name__
