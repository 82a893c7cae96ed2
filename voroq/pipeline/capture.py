"""How a model calls its blocks, recorded from the model itself.

Parents pass their blocks masks, rotary angles and flags that differ from model to model and from block to block (sliding and
full attention alternate). Instead of knowing models, we put a `Stub` in every block's place, run the parent once and keep what
each stub was called with. The hidden state is passed through unchanged, so the first stub sees what enters the blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from voroq.errors import VoroqError

_HIDDEN = "hidden_states"


class Captured(Exception):
    """Raised when everything is recorded: the rest of the model (norm, head) need not run."""


@dataclass(frozen=True)
class Call:
    """A block's call without its hidden state, which comes first or, if `keyword`, by name."""

    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    keyword: bool

    def __call__(self, block: nn.Module, hidden: Float[Tensor, "b ctx d"]) -> Any:
        """What the block returns."""
        if self.keyword:
            return block(*self.args, **{_HIDDEN: hidden}, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def same(self, other: "Call", compared: set[tuple[int, int]]) -> bool:
        """Whether all tensors are equal. `compared` holds the pairs already found equal: blocks share masks and angles."""
        mine, theirs = (tree_leaves((call.args, call.kwargs)) for call in (self, other))
        if len(mine) != len(theirs):
            return False
        for a, b in zip(mine, theirs, strict=True):
            if not isinstance(a, Tensor) or (id(a), id(b)) in compared:
                continue
            if not isinstance(b, Tensor) or a.shape != b.shape or not torch.equal(a, b):
                return False
            compared.add((id(a), id(b)))
        return True


def first(output: Any) -> Tensor:
    """The hidden state of a block's output: the output, or its first element."""
    return output[0] if isinstance(output, (tuple, list)) else output


class Stub(nn.Module):
    """Stands for block `index`; every attribute a parent may ask for comes from the block itself."""

    def __init__(self, block: nn.Module, index: int, visit: Callable[[int, tuple, dict], Any]) -> None:
        super().__init__()
        self.original = (block,)  # in a tuple, so that it is not a child: the stub has no weights
        self.index = index
        self.visit = visit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.visit(self.index, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"][0], name)


@contextmanager
def stubs(blocks: nn.ModuleList, visit: Callable[[int, tuple, dict], Any]) -> Iterator[None]:
    """Inside, every block of the list is a stub that calls `visit`."""
    originals = list(blocks)
    for index, block in enumerate(originals):
        blocks[index] = Stub(block, index, visit)
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


class Recorder:
    """Runs of the parent over `blocks` stubs. `form(call, hidden)` is what block 0 really returns: a tensor or a tuple."""

    def __init__(self, blocks: int, form: Callable[[Call, Tensor], Any]) -> None:
        self.blocks = blocks
        self.form = form
        self._rest: tuple | None = None  # what blocks return after the hidden state; None if they return it bare
        self._learned = False
        self.start()

    def start(self) -> None:
        """Forget the calls of the last run."""
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None
        self._seen: tuple | None = None

    @property
    def done(self) -> bool:
        """Whether every block was called."""
        return len(self.calls) == self.blocks

    def visit(self, index: int, args: tuple, kwargs: dict) -> Any:
        """What stub `index` does when called."""
        if index != len(self.calls):
            raise VoroqError(f"block {index} was called after {len(self.calls)} blocks; repeated or reordered blocks are not supported")
        call, hidden = _split(args, kwargs)
        seen = (hidden.data_ptr(), hidden.shape, hidden.stride(), hidden._version)
        if index == 0:
            self.hidden, self._seen = hidden, seen
        if seen != self._seen:
            raise VoroqError(f"the model changes hidden states between blocks {index - 1} and {index}; such models are not supported")
        made = {id(leaf) for leaf in tree_leaves(self._rest) if isinstance(leaf, Tensor)}
        if any(id(leaf) in made for leaf in tree_leaves((call.args, call.kwargs))):
            raise VoroqError(f"block {index} takes a tensor that block 0 made besides its hidden state; such models are not supported")
        self.calls.append(call)
        if not self._learned:
            self._learn(call, hidden)
        return hidden if self._rest is None else (hidden, *self._rest)

    def _learn(self, call: Call, hidden: Tensor) -> None:
        """Run block 0 once to see in what form blocks return their hidden state."""
        output = self.form(call, hidden.clone())
        if not isinstance(first(output), Tensor) or first(output).shape != hidden.shape:
            raise VoroqError("a block's output has not the shape of its input; such models are not supported")
        self._rest = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
        self._learned = True


class Tail(Recorder):
    """Runs of the parent in which the last block answers with `hidden` [b ctx d], in the form that `known` blocks answer in."""

    def __init__(self, known: Recorder) -> None:
        super().__init__(known.blocks, known.form)
        self._rest, self._learned = known._rest, True
        self.answer: Tensor | None = None

    def visit(self, index: int, args: tuple, kwargs: dict) -> Any:
        output = super().visit(index, args, kwargs)
        if not self.done:
            return output
        return self.answer if self._rest is None else (self.answer, *self._rest)


def _split(args: tuple, kwargs: dict) -> tuple[Call, Tensor]:
    """The call without its hidden state, and the hidden state [b ctx d]."""
    if args:
        hidden, call = args[0], Call(tuple(args[1:]), dict(kwargs), keyword=False)
    else:
        hidden, call = kwargs.get(_HIDDEN), Call((), {name: value for name, value in kwargs.items() if name != _HIDDEN}, keyword=True)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise VoroqError("blocks are not called with one hidden state of shape [batch, tokens, width]; such models are not supported")
    return call, hidden
