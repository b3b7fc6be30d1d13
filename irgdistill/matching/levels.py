"""Finds the levels of a network: where its stages begin and end, from a dry run, without a table of names.

Level k holds the blocks whose map is 1/2^k of the network's input. The data flow defines a block: its output is a
*cut*, a tensor that every path from image to logits passes. Tensors on a residual branch, gates, inception branches
and dense layers are not cuts. Among the modules whose output is a cut, the module tree distinguishes blocks from lists
of blocks.

B batch, C channels, H W the map, L tokens.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from irgdistill.errors import UserError
from irgdistill.matching.trace import BATCH, Call, Geometries, Trace, dry_run, weight_rank

NOT_BLOCKS = ("stem", "down", "patch_embed", "neck")
"""Words in the names of modules that prepare a stage or follow the last one: they are not blocks."""


class LevelsError(UserError):
    """The network cannot be tapped. The message is one line."""


@dataclass(frozen=True)
class Tap:
    """One place in a network whose output is pooled to (B, C)."""

    module: str
    """Dotted path for `model.get_submodule`"""
    channels: int
    height: int
    width: int
    """Size of the map in the dry run; a tap works at any size"""
    layout: str
    """NCHW, NHWC, BLC (tokens), BTNC (tiles of tokens), BCPN (patches of pixels)"""
    prefix: int = 0
    """Number of leading tokens (class, registers) that do not belong to the map; BLC only"""
    index: int | None = None
    """Element of a returned tuple; None: the tensor itself, or all tensors of a tuple joined along C"""


@dataclass(frozen=True)
class Level:
    """All blocks of one resolution."""

    level: int
    """k of /2^k: floor(log2(sqrt(H_in/H * W_in/W)) + 0.5)"""
    entry: Tap | None
    """Output of the first block, as wide as the exit if possible; None if there is no other tensor"""
    exit: Tap
    """Output of the last block"""
    kind: str
    """How the entry was chosen.

    - block: the first block as wide as the exit.
    - block-inner: no other block is as wide as the exit; the first of the last blocks of equal shape, and the last of
      them is its partner.
    - stage-input: no two blocks have equal shapes; the first cut as wide as the exit, usually the input of the stage.
    - inner: no such cut; a tensor inside the last block.
    - unequal: the first block, or the first cut, of another width.
    - single: there is no other tensor.
    """
    blocks: tuple[Tap, ...]
    """All block outputs in order, the exit last; an isotropic network has one level with all its depth"""


def find_levels(model: nn.Module, input_size: tuple[int, int, int]) -> list[Level]:
    """The levels of `model` for images of `input_size` (C, H, W), finest first.

    The model may be on any device, meta included, and is not changed. Raises LevelsError if its forward does not run
    on the meta device, or if it has no block with a map.
    """
    what = f"{type(model).__name__} at input size {tuple(input_size)}"
    try:
        trace = dry_run(model, input_size)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LevelsError(f"{what} does not run on the meta device: {reason}") from error
    reader = _Reader(model, trace)
    by_level: dict[int, list[_Place]] = {}
    for place in _Tree(model, reader).blocks() or _plain_blocks(reader):
        by_level.setdefault(reader.level(place), []).append(place)
    if not by_level:
        raise LevelsError(f"{what} has no block with a map of more than one pixel")
    return [_describe(reader, level, places) for level, places in sorted(by_level.items())]


@dataclass(frozen=True, eq=False)
class _Place:
    """A tap and the call whose output it reads."""

    tap: Tap
    call: Call

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.tap.channels, self.tap.height, self.tap.width


class _Reader:
    """Reads maps, weights and levels from the calls of one run."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        times = Counter(call.name for call in trace.calls)
        self.calls = {call.name: call for call in trace.calls if times[call.name] == 1}
        """Name -> call, for modules that run exactly once: no other can be tapped"""
        prefix = getattr(model, "num_prefix_tokens", 0)
        self.geometries = Geometries(trace, (prefix if isinstance(prefix, int) else 0, 0, 1, 2))
        weights = [call for call in trace.calls if weight_rank(call.module) > 1 and _is_leaf(call.module)]
        self.weights = sorted(call.start for call in weights)
        self.convolutions = sorted(call.start for call in weights if weight_rank(call.module) == 4)
        self.map_weights = sorted(
            call.start for call in weights if any(self.geometries.read(value.shape) for value in call.outputs)
        )

    def level(self, place: _Place) -> int:
        height, width = self.trace.image.shape[2:]
        return math.floor(math.log2(math.sqrt(height / place.tap.height * width / place.tap.width)) + 0.5)

    def places(self, call: Call) -> list[_Place]:
        """The maps in the output of a call: one, or one for each element of a tuple; equal sizes are joined along C.

        Inputs that are returned unchanged do not count (the shortcut that SelecSLS passes from block to block). If
        C = H = W, a module with linear layers and no convolution is NHWC.
        """
        name = self._hookable_module(call)
        known, maps = {None, *(value.node for value in call.inputs)}, []
        for value in call.outputs:
            geometry = self.geometries.read(value.shape)
            if geometry and value.shape[0] == BATCH and value.node not in known:
                known.add(value.node)
                if geometry.layout == "NCHW" and len(set(value.shape[1:])) == 1 and self._is_linear(call):
                    geometry = geometry._replace(layout="NHWC")
                maps.append((value, geometry))
        if len(call.outputs) == len(maps) > 1 and len({geometry[1:] for _, geometry in maps}) == 1:
            channels = sum(geometry.channels for _, geometry in maps)
            return [_Place(Tap(name, channels, *maps[0][1][1:]), call)]
        return [_Place(Tap(name, *geometry, index=value.index), call) for value, geometry in maps]

    def _is_linear(self, call: Call) -> bool:
        convolutions = _between(self.convolutions, call.start, call.end)
        return convolutions == 0 and self.weights_between(call.start, call.end) > 0

    def _hookable_module(self, call: Call) -> str:
        """The module to hook: of a Sequential, the innermost one with the same output.

        timm's gradient checkpointing runs the children of a Sequential one by one, so its own hooks do not fire.
        """
        name, module = call.name, call.module
        while type(module).forward is nn.Sequential.forward and not _is_leaf(module):
            child, module = list(module.named_children())[-1]
            last = self.calls.get(f"{name}.{child}")
            if last is None or [v.node for v in last.outputs] != [v.node for v in call.outputs]:
                break
            name = last.name
        return name

    def weights_between(self, start: int, end: int) -> int:
        """Number of calls of modules with a weight between two moments of the run."""
        return _between(self.weights, start, end)

    def may_be_block(self, call: Call) -> bool:
        """Whether a module returns a map and has at least two weights that act on it (or on windows of it).

        If most weights act on the class token alone, it is class attention, which does not change the map.
        """
        places = self.places(call)
        on_map = _between(self.map_weights, call.start, call.end)
        if not places or on_map < 2:
            return False
        return places[-1].tap.prefix == 0 or 2 * on_map >= self.weights_between(call.start, call.end)

    def takes_image(self, call: Call) -> bool:
        return any(value.tensor is self.trace.image for value in call.inputs)


class _Tree:
    """Finds blocks and lists of blocks in the module tree."""

    def __init__(self, model: nn.Module, reader: _Reader) -> None:
        self.reader = reader
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.maps = {
            name: reader.places(call)
            for name, call in reader.calls.items()
            if not _is_leaf(call.module) and reader.may_be_block(call)
        }
        self.cuts = {name for name in self.maps if reader.trace.is_cut(reader.calls[name].outputs)}
        self.cuts.update([name for name in self.maps if any(self._alike(name, cut) for cut in self.cuts)])

    def blocks(self) -> list[_Place]:
        """All block outputs in the order of the run.

        A level has no cut if a second path runs beside its blocks through all of it (NASNet). Its blocks are then
        found without that test, outside the blocks already found.
        """
        found, _ = self._read("", self.cuts)
        levels = {self.reader.level(place) for place in found}
        for place in self._read("", set(self.maps))[0]:
            inside = any(block.call.start < place.call.start < block.call.end for block in found)
            if self.reader.level(place) not in levels and not inside:
                found.append(place)
        return sorted(found, key=lambda place: place.call.end)

    def _read(self, name: str, candidates: set[str]) -> tuple[list[_Place], bool]:
        """The blocks under a module, and whether it is a list of blocks.

        It is a list if it contains two numbered candidates in a row or another list, or if its output has another
        resolution than its last candidate. Weights after its last block count as one more block.
        """
        children = self._children(name)
        parts = [self._read(child, candidates) for child in children]
        found = [place for places, _ in parts for place in places]
        own = self.maps[name] if name in candidates else []
        inner = [child for child in children if child in candidates]
        is_list = any(child_is_list for _, child_is_list in parts) or any(
            _series(a) == _series(b) and (b in self.cuts or self._feeds(a, b)) for a, b in pairwise(inner)
        )
        level = self.reader.level
        if own and inner:
            is_list = is_list or level(self.maps[inner[-1]][-1]) != level(own[-1])
        if own and not is_list:
            return ([] if self.reader.takes_image(own[0].call) else own), False
        if found and len(own) == 1:
            last = max(found, key=lambda place: place.call.end)
            if level(last) == level(own[0]) and self.reader.weights_between(last.call.end, own[0].call.end):
                found += own
        return found, is_list

    def _children(self, name: str) -> list[str]:
        return [
            f"{name}.{child}" if name else child
            for child, module in self.modules[name].named_children()
            if not _is_leaf(module) and not any(word in child for word in NOT_BLOCKS)
        ]

    def _feeds(self, first: str, second: str) -> bool:
        given = {value.node for value in self.reader.calls[second].inputs}
        return any(value.node in given for value in self.reader.calls[first].outputs)

    def _alike(self, name: str, cut: str) -> bool:
        """Whether a module is a sibling of the block `cut`, of the same shape, in a list that is not called itself.

        It belongs to the same stage although another path runs beside it (the global query of GC-ViT).
        """
        parent = name.rpartition(".")[0]
        if parent != cut.rpartition(".")[0] or parent in self.maps or _series(name) != _series(cut):
            return False
        return [place.shape for place in self.maps[name]] == [place.shape for place in self.maps[cut]]


def _plain_blocks(reader: _Reader) -> list[_Place]:
    """Blocks of a network without block modules (VGG): the map between a convolution and the next or a pooling."""
    starts = reader.map_weights
    found: dict[int, _Place] = {}
    for call in reader.calls.values():
        unit = bisect_right(starts, call.start)
        places = reader.places(call) if unit and _is_leaf(call.module) else []
        if len(places) == 1 and reader.trace.is_cut(call.outputs):
            first = call.start == starts[unit - 1]
            if first or (unit in found and found[unit].shape == places[0].shape):
                found[unit] = places[0]
    return list(found.values())


def _describe(reader: _Reader, level: int, places: list[_Place]) -> Level:
    entry, kind = _entry(reader, level, places)
    return Level(level, entry, places[-1].tap, kind, tuple(place.tap for place in places))


def _entry(reader: _Reader, level: int, places: list[_Place]) -> tuple[Tap | None, str]:
    """The entry of the level and its kind (see `Level.kind`)."""
    last = places[-1]
    for place in reversed(places):
        same = [other for other in places if other.shape == place.shape]
        if len(same) > 1:
            return same[0].tap, "block" if place.shape == last.shape else "block-inner"
    before = [
        place
        for call in reader.calls.values()
        if reader.weights_between(call.end, last.call.end)
        for place in reader.places(call)
        if len(call.outputs) == 1 and not call.outputs[0].overwritten and reader.level(place) == level
    ]
    cuts = [place for place in before if reader.trace.is_cut(place.call.outputs)]
    inner = [place for place in before if place.call.start > last.call.start]
    for kind, options in (("stage-input", cuts), ("inner", inner)):
        for place in options:
            if place.shape == last.shape:
                return place.tap, kind
    others = [*places[:-1], *cuts]
    return (others[0].tap, "unequal") if others else (None, "single")


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _series(name: str) -> str:
    """The name without its number: `stage.block` of `stage.block12`."""
    parent, _, child = name.rpartition(".")
    return f"{parent}.{re.split('[0-9]', child)[0]}"


def _between(moments: list[int], start: int, end: int) -> int:
    """Number of the sorted moments between two; 0 if `end` comes first."""
    return max(0, bisect_left(moments, end) - bisect_right(moments, start))
