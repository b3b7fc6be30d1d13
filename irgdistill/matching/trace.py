"""Traces a network on the meta device: which module returns which map, and which tensors every path passes.

The parameters are frozen meta tensors and the image is the only leaf that requires a gradient, so the autograd graph of
the output is exactly the data flow from image to logits. Nothing is computed or allocated.

B batch, C channels, H W the map, L tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call

BATCH = 3  # odd and small: an activation with another first axis is something else, such as windows


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor at the time of a hook: its graph node and version then, not at the end of the run."""

    tensor: Tensor
    node: Node | None
    version: int
    index: int | None = None
    """Element of a module's tuple output; None: the output itself"""

    @classmethod
    def of(cls, tensor: Tensor, index: int | None = None) -> Value:
        return cls(tensor, tensor.grad_fn, tensor._version, index)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def overwritten(self) -> bool:
        """Whether an in-place operation changed the tensor after the hook."""
        return self.tensor._version != self.version


@dataclass(eq=False)
class Call:
    """One call of one module. `start` and `end` count hook events, so calls nest like brackets."""

    name: str
    module: nn.Module
    start: int
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    end: int = -1


@dataclass(eq=False)
class Trace:
    """All calls of one forward, in the order they end, and the nodes that every path from image to output passes."""

    image: Tensor
    calls: list[Call]
    roots: list[Node]
    cuts: set[Node]

    def is_cut(self, values: Iterable[Value]) -> bool:
        """Whether every path from image to output passes at least one of the tensors."""
        nodes = {value.node for value in values if value.node is not None}
        if len(nodes) < 2:
            return bool(nodes & self.cuts)
        stack = [root for root in self.roots if root not in nodes]
        seen = nodes.union(stack)
        while stack:
            parents = _parents(stack.pop())
            if not parents:
                return False  # a path from the image avoids the tensors
            stack += [parent for parent in parents if parent not in seen]
            seen.update(parents)
        return True


def dry_run(model: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Run `model`, on any device, on a meta image (BATCH, *input_size) in eval mode, without changing it.

    Raises whatever the model's forward raises, and RuntimeError if the output does not depend on the image.
    """
    with torch.inference_mode(False), torch.enable_grad(), _eval_mode(model):
        state = {name: torch.empty_like(tensor, device="meta", requires_grad=False) for name, tensor in _slots(model)}
        dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
        image = torch.empty((BATCH, *input_size), dtype=dtype, device="meta", requires_grad=True)
        with _recorded(model) as calls:
            output = functional_call(model, state, (image,), tie_weights=False)
    roots = list({tensor.grad_fn: None for tensor in _tensors(output) if tensor.grad_fn is not None})
    if not roots:
        raise RuntimeError("the output does not depend on the image")
    return Trace(image, calls, roots, _cuts(roots))


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every attribute that holds a parameter or a buffer, under one name.

    An attribute with two names (its module is used in two others) comes once, because `functional_call` would leave the
    meta tensor in it. A parameter in two attributes comes twice.
    """
    for prefix, module in model.named_modules():
        yield from module.named_parameters(prefix, recurse=False, remove_duplicate=False)
        yield from module.named_buffers(prefix, recurse=False, remove_duplicate=False)


def _cuts(roots: list[Node]) -> set[Node]:
    """The nodes of an autograd graph that no edge jumps over.

    Walks from the outputs to the image in topological order and counts the open edges, those from a visited node to one
    not yet visited. If all open edges lead to one node, every path passes it.
    """
    uses = Counter(roots)
    stack = list(roots)
    while stack:
        for parent in _parents(stack.pop()):
            if parent not in uses:
                stack.append(parent)
            uses[parent] += 1
    cuts, waiting, open_edges = set(), uses.copy(), len(roots)
    ready: list[Node] = []
    reached = roots
    while ready or reached:
        for node in reached:
            waiting[node] -= 1
            if not waiting[node]:
                ready.append(node)
        node = ready.pop()
        open_edges -= uses[node]
        if open_edges == 0:
            cuts.add(node)
        reached = _parents(node)
        open_edges += len(reached)
    return cuts


def _parents(node: Node) -> list[Node]:
    return [parent for parent, _ in node.next_functions if parent is not None]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set the flags, do not call `.eval()`: a module's own `train` may do more, which could not be undone."""
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Call]]:
    """Record every module call inside the block, in the order the calls end."""
    done: list[Call] = []
    running: list[Call] = []
    clock = count()
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = [Value.of(tensor) for tensor in _tensors([*args, *kwargs.values()])]
        running.append(Call(names[module], module, next(clock), inputs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        if isinstance(output, Tensor):
            call.outputs = [Value.of(output)]
        elif isinstance(output, (tuple, list)):
            call.outputs = [Value.of(item, i) for i, item in enumerate(output) if isinstance(item, Tensor)]
        call.end = next(clock)
        done.append(call)

    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield done
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a module's arguments or output, however nested."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


class Geometry(NamedTuple):
    """Meaning of an activation's axes."""

    channels: int
    height: int
    width: int
    layout: str
    prefix: int


class Geometries:
    """Reads the geometry of an activation from its shape: the map must be a plausible reduction of the image."""

    def __init__(self, trace: Trace, prefixes: Iterable[int]) -> None:
        self.height, self.width = trace.image.shape[2:]
        self.prefixes = list(dict.fromkeys(prefixes))
        self.grids = {  # known maps: the outputs of convolutions and poolings are NCHW
            value.shape[2:]
            for call in trace.calls
            if isinstance(call.module, (nn.MaxPool2d, nn.AvgPool2d)) or weight_rank(call.module) == 4
            for value in call.outputs
            if len(value.shape) == 4 and value.shape[0] == BATCH and math.prod(value.shape[2:]) > 1
        }

    def read(self, shape: tuple[int, ...]) -> Geometry | None:
        """The geometry of an activation of this shape, or None if it is not a map."""
        if len(shape) == 3:
            for prefix in self.prefixes:
                if grid := self._tokens(shape[1] - prefix):
                    return Geometry(shape[2], *grid, "BLC", prefix)
        if len(shape) != 4:
            return None
        _, a, b, c = shape
        if self._is_map(b, c) and not ((a, b) in self.grids and (b, c) not in self.grids):
            return Geometry(a, b, c, "NCHW", 0)
        if self._is_map(a, b):
            return Geometry(c, a, b, "NHWC", 0)
        if b > 1 and (grid := self._tokens(a * b)):
            return Geometry(c, *grid, "BTNC", 0)
        if c > 1 and (grid := self._tokens(b * c)):
            return Geometry(a, *grid, "BCPN", 0)
        return None

    def _is_map(self, height: int, width: int) -> bool:
        """Whether a size has more than one pixel and the image's aspect ratio, up to rounding."""
        if (height, width) in self.grids:
            return True
        skew = abs(height * self.width - width * self.height)
        return 1 < height * width <= self.height * self.width and skew < max(self.height, self.width)

    def _tokens(self, number: int) -> tuple[int, int] | None:
        """Height and width of a map with this number of tokens, or None. Sizes of known maps come first."""
        for height, width in self.grids:
            if height * width == number:
                return height, width
        height = round(math.sqrt(max(number, 0) * self.height / self.width))
        if height and number % height == 0 and self._is_map(height, number // height):
            return height, number // height
        return None


def weight_rank(module: nn.Module) -> int:
    """Largest number of axes of the module's own parameters: 4 convolution, 2 linear, 1 norm, 0 none."""
    return max((parameter.dim() for parameter in module.parameters(recurse=False)), default=0)
