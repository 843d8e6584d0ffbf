"""Which tensor of a checkpoint is which parameter of a model: one table of rules, run in both directions.

A rule names tensors and parameters by templates, in which `{i}` stands for one part of a dotted name:

    Rule("backbone.layers.{i}.mixer.out_proj.weight", "layers.{i}.mixer.out.kernel", transposed)

Its layout is a function that *views* the array of a parameter in the tensor's layout. Saving reads that
view, loading writes into it, so a rule needs no inverse that could disagree with it. A rule with several
parameters is a fused tensor: their views, in that order, are its blocks of rows, or take turns along another axis
(`axis`, `turns`). A tensor's template with a part that its parameter lacks (`experts.{e}.w.weight` for `moe.w`) stands
for several tensors, stacked along the parameter's first axis.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

Layout = Callable[[np.ndarray], np.ndarray]


def same(array: np.ndarray) -> np.ndarray:
    """The tensor is the parameter."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """[..., in, out], as Flax keeps the kernel of a linear layer; the tensor is torch's [..., out, in]."""
    return array.swapaxes(-1, -2)


def depthwise(array: np.ndarray) -> np.ndarray:
    """[k, c], taps of a depthwise convolution; the tensor is torch's [c, 1, k]."""
    return array.T[:, None, :]


def conv2d(array: np.ndarray) -> np.ndarray:
    """[height, width, in, out], as Flax keeps the kernel of a convolution; the tensor is torch's [out, in, h, w]."""
    return array.transpose(3, 2, 0, 1)


def row(array: np.ndarray) -> np.ndarray:
    """[d], one row of the tensor."""
    return array[None]


def flat(array: np.ndarray) -> np.ndarray:
    """Any shape; the tensor has one axis."""
    return array.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight map.

    Attributes:
      tensor: template of the tensor's name, as it is written.
      params: template of the parameter's path, or several for a fused tensor.
      layout: views a parameter as its tensor; it must not copy.
      also: templates of other names under which the tensor is read.
      axis: of the tensor, along which several parameters lie.
      turns: entries that each parameter has in its turn, again and again: (1, 1) interleaves two. None: one turn.
    """

    tensor: str
    params: str | tuple[str, ...]
    layout: Layout = same
    also: tuple[str, ...] = ()
    axis: int = 0
    turns: tuple[int, ...] | None = None


class Block(NamedTuple):
    """Where in a tensor the parameter at `path` lies, or its slice `index` along the first axis.

    Entry i along the tensor's `axis` belongs to it where start <= i % period < stop.
    """

    path: str
    index: int | None
    axis: int
    period: int
    start: int
    stop: int

    def places(self, length: int) -> np.ndarray:
        """Returns the entries that belong to it, of `length` along the axis."""
        places = np.arange(length)
        return places[(places % self.period >= self.start) & (places % self.period < self.stop)]


class Tensor(NamedTuple):
    """A tensor that a checkpoint must have: its name, other names, and the parameters it holds."""

    name: str
    also: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout
    blocks: tuple[Block, ...]

    def view(self, array: np.ndarray, block: Block) -> np.ndarray:
        """Returns the view of a parameter's array that is `block` of this tensor, with at least one axis."""
        return np.atleast_1d(self.layout(array if block.index is None else array[block.index]))


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """The rules of one model and one format.

    Attributes:
      rules: every parameter must be covered by exactly one.
      repeats: tensors that a file may hold as copies of another, by name: a tied head, say.
      prefix: start of the tensors' names that files of a model without its head leave out.
      ignored: pattern of the names of tensors that files may hold and the model has no use for.
    """

    rules: tuple[Rule, ...]
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    ignored: str | None = None

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
        """Lists the tensors of a checkpoint of a model.

        Args:
          shapes: of the model's parameters, by dotted path.

        Raises:
          ValueError: the rules leave out a parameter; a mistake in the weight map, not in a file.
        """
        found = [tensor for rule in self.rules for tensor in self._apply(rule, shapes)]
        covered = {block.path for tensor in found for block in tensor.blocks}
        if left := shapes.keys() - covered:
            raise ValueError(f"weight map: no rule covers {', '.join(sorted(left))}; add one for each.")
        return found

    def _apply(self, rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        paths = (rule.params,) if isinstance(rule.params, str) else rule.params
        pattern = _pattern(paths[0])
        for match in filter(None, map(pattern.fullmatch, shapes)):
            parts = match.groupdict()
            stacked = [part for part in _parts(rule.tensor) if part not in parts]
            named = [path.format(**parts) for path in paths]
            for index in range(shapes[named[0]][0]) if stacked else (None,):
                found = [_tensor_shape(rule.layout, shapes[p] if index is None else shapes[p][1:]) for p in named]
                lengths = [shape[rule.axis] if shape else 1 for shape in found]
                ends = list(itertools.accumulate(rule.turns or lengths))
                starts = [0, *ends[:-1]]
                full = parts | {part: str(index) for part in stacked}
                shape = list(found[0])
                shape[rule.axis : rule.axis + 1] = [sum(lengths)] if shape else []
                yield Tensor(
                    name=rule.tensor.format(**full),
                    also=tuple(self._spellings(rule, full)),
                    shape=tuple(shape),
                    layout=rule.layout,
                    blocks=tuple(
                        Block(path, index, rule.axis, ends[-1], *span)
                        for path, *span in zip(named, starts, ends, strict=True)
                    ),
                )

    def _spellings(self, rule: Rule, parts: Mapping[str, str]) -> Iterator[str]:
        names = [template.format(**parts) for template in (rule.tensor, *rule.also)]
        yield from names[1:]
        for name in names:
            if self.prefix and name.startswith(self.prefix):
                yield name.removeprefix(self.prefix)


def _parts(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(template)))


def _tensor_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    return layout(np.broadcast_to(np.empty((), np.int8), shape)).shape
