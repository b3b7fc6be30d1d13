"""Weights under the names of torchvision, or of a network's authors, brought under timm's."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models as torchvision_models

from irgdistill.errors import UserError
from irgdistill.models.build import build_network
from irgdistill.models.foreign import Role, find_weights
from irgdistill.models.weights import Weights, classifier_keys, read_weights

TOLERANCE = 1e-4
"""Largest difference of logits that counts as equal, in standard deviations of the logits."""

State = Mapping[str, Tensor]


def find_in_file(path: Path, name: str, role: Role, args: Mapping[str, Any]) -> Weights:
    """The weights of timm's `name` with `args` in a file that another program wrote, under timm's names.

    Those of torchvision are accepted if both networks give the same logits with them; other layouts are those that timm
    itself converts. What is neither stays as it is, to be refused when it is loaded.
    Raises UserError: no weights, or torchvision's of another network.
    """
    dicts, own = read_weights(path), _with_classifier(name, args)
    tensors, note = find_weights(dicts, own.state_dict(), role)
    weights = Weights(tensors, str(path), note)
    if _fit(tensors, own):
        return weights
    for architecture in _similar(name):
        theirs = _torchvision(architecture).state_dict()
        tensors, note = find_weights(dicts, theirs, role)
        original = _filled(architecture, tensors, theirs)
        if original is not None:
            note = "; ".join(filter(None, (note, f"took the weights of torchvision's {architecture}")))
            renamed, more = _from_torchvision(original, architecture, name, args, path)
            return Weights(renamed, str(path), note, more)
    known = _by_timm(weights.tensors, own)
    if known is None or not _fit(known, own):
        return weights
    return weights._replace(tensors=known, note="; ".join(filter(None, (weights.note, "names converted by timm"))))


def _with_classifier(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network on the meta device; one that has no classes by default has one, so that its classifier is found."""
    network = build_network(name, args=args, meta=True)
    return (network if network.num_classes else build_network(name, num_classes=1, args=args, meta=True)).model


def _fit(tensors: State, model: nn.Module) -> bool:
    """Whether they have the names of the network's, but perhaps for its classifier."""
    own = model.state_dict()
    return tensors.keys() <= own.keys() and own.keys() - tensors.keys() <= set(classifier_keys(model))


def _by_timm(tensors: State, model: nn.Module) -> State | None:
    """Their names after the conversion of checkpoints that the model's file in timm holds, if it holds one."""
    module = sys.modules[type(model).__module__]
    convert: Callable[..., State] | None = getattr(module, "checkpoint_filter_fn", getattr(module, "_filter_fn", None))
    if convert is None:
        return None
    takes_model = len(inspect.signature(convert).parameters) > 1
    try:
        return convert(dict(tensors), model) if takes_model else convert(dict(tensors))
    except Exception:  # written for a few layouts; on others they fail in any way
        return None


# --- torchvision ------------------------------------------------------------------------------------------------------


class _Unallocated(TorchFunctionMode):
    """Parameters of new networks have shapes alone; torchvision's constructors compute with tensors, so not all do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _torchvision(architecture: str, **options: Any) -> nn.Module:
    """A network of torchvision without weights, in eval mode."""
    with _Unallocated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on initial weights, which are not used
        model: nn.Module = torchvision_models.get_model(architecture, weights=None, **options)
    return model.eval()


def _similar(name: str) -> list[str]:
    """Names of torchvision that begin like this one of timm, the most similar first."""
    start = name.removeprefix("tf_")[:3]
    known = [each for each in torchvision_models.list_models(torchvision_models) if each.startswith(start)]
    return sorted(known, key=lambda each: SequenceMatcher(None, name, each).ratio(), reverse=True)


def _filled(architecture: str, tensors: State, own: State) -> nn.Module | None:
    """The network of torchvision with these weights; None if they do not fit its state dict `own`. Any classes fit."""
    if own.keys() != tensors.keys() or any(own[key].shape[1:] != x.shape[1:] for key, x in tensors.items()):
        return None
    model = _torchvision(architecture, num_classes=len(tensors[list(own)[-1]]))
    state = model.state_dict()  # with the versions of its layers
    state.update({key: x.float() if x.is_floating_point() else x for key, x in tensors.items()})
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError:  # a first dimension differs
        return None
    return model


def _from_torchvision(
    original: nn.Module, architecture: str, name: str, args: Mapping[str, Any], path: Path
) -> tuple[State, dict[str, Any]]:
    """Its weights under timm's names, and the arguments of `timm.create_model` that the network needs.

    Raises UserError if the logits differ under every order that is tried.
    """
    given = original.state_dict()
    for more in _arguments(original):
        classes = len(given[list(given)[-1]])
        try:
            network = build_network(name, num_classes=classes, args={**args, **more})
        except UserError:  # it has no such argument
            continue
        model = network.model.eval()
        for tensors in (_by_timm(given, model), _in_order(given, model.state_dict())):
            if tensors is not None and _same_logits(original, model, tensors, network.input.shape):
                return tensors, more
    raise UserError(
        f"the weights in {path} are those of torchvision's {architecture}, and {name} of timm does not give the same "
        "logits with them: name timm's network of the same kind, or train with weights of timm"
    )


def _arguments(original: nn.Module) -> Iterator[dict[str, Any]]:
    """None, then the batch norm's epsilon, which torchvision and timm choose differently for some networks."""
    yield {}
    for eps in sorted({module.eps for module in original.modules() if isinstance(module, nn.BatchNorm2d)}):
        yield {"bn_eps": eps}


def _in_order(given: State, own: State) -> State | None:
    """The n-th tensor of a shape becomes the n-th of that shape in `own`; None if there are too few.

    Dimensions of length 1 do not count, nor how those after the first are grouped: a linear layer may be a convolution.
    """

    def kind(x: Tensor) -> tuple[int, int, bool]:
        return next((length for length in x.shape if length != 1), 1), x.numel(), x.is_floating_point()

    waiting: dict[tuple[int, int, bool], list[Tensor]] = {}
    for x in reversed(list(given.values())):
        waiting.setdefault(kind(x), []).append(x)
    try:
        return {key: waiting[kind(x)].pop().reshape(x.shape) for key, x in own.items()}
    except (KeyError, IndexError):
        return None


@torch.no_grad()
def _same_logits(original: nn.Module, model: nn.Module, tensors: State, shape: tuple[int, int, int]) -> bool:
    try:
        model.load_state_dict(dict(tensors))
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        wanted, found = original(image), model(image)
    except (RuntimeError, ValueError, AssertionError):  # names, shapes, or an input size that is not its own
        return False
    return wanted.shape == found.shape and bool((wanted - found).abs().max() <= TOLERANCE * wanted.std(correction=0))
