"""Recording how a parent calls its blocks, on toy parents that do what real ones do in odd corners."""

import pytest
import torch
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.pipeline.capture import Recorder, first, stubs


class Block(nn.Module):
    kind = "full"

    def forward(self, hidden_states: Tensor, scale: Tensor, *, shift: float = 0.0) -> Tensor:
        return hidden_states * scale + shift


class TupleBlock(Block):
    def forward(self, hidden_states, scale, *, shift=0.0):
        return super().forward(hidden_states, scale, shift=shift), None


class InPlaceBlock(Block):
    def forward(self, hidden_states, scale, *, shift=0.0):
        return hidden_states.mul_(scale).add_(shift)


def record(blocks: nn.ModuleList, parent) -> Recorder:
    recorder = Recorder(len(blocks), lambda call, hidden: call(blocks_before[0], hidden))
    blocks_before = list(blocks)
    with stubs(blocks, recorder.visit):
        parent(blocks)
    assert list(blocks) == blocks_before
    return recorder


HIDDEN = torch.ones(2, 3, 4)
SCALES = [torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)]


def positional(blocks):
    hidden = HIDDEN.clone()
    for index, block in enumerate(blocks):
        hidden = first(block(hidden, SCALES[index], shift=float(index)))


def by_name(blocks):
    hidden = HIDDEN.clone()
    for index, block in enumerate(blocks[:3]):
        hidden = first(block(hidden_states=hidden, scale=SCALES[index], shift=float(index)))


@pytest.mark.parametrize("parent", [positional, by_name])
@pytest.mark.parametrize("kind", [Block, TupleBlock, InPlaceBlock])
def test_replayed_calls_are_the_parents(parent, kind):
    blocks = nn.ModuleList(kind() for _ in range(3))
    recorder = record(blocks, parent)
    assert recorder.done
    hidden = recorder.hidden
    assert torch.equal(hidden, HIDDEN)
    for block, call in zip(blocks, recorder.calls, strict=True):
        hidden = first(call(block, hidden))
    assert torch.equal(hidden, torch.full_like(HIDDEN, ((1 * 2 + 0) * 3 + 1) * 5 + 2))


def test_stubs_have_the_attributes_of_their_blocks():
    blocks = nn.ModuleList(Block() for _ in range(2))
    blocks[1].kind = "sliding"
    seen: list[str] = []
    recorder = record(blocks, lambda stubbed: seen.extend(block.kind for block in stubbed))
    assert seen == ["full", "sliding"]
    assert not recorder.done


def test_blocks_out_of_order_are_refused():
    with pytest.raises(VoroqError, match="block 2 was called after 0 blocks"):
        record(nn.ModuleList(Block() for _ in range(3)), lambda blocks: positional(reversed(blocks)))


def test_repeated_blocks_are_refused():
    with pytest.raises(VoroqError, match="block 0 was called after 1 blocks"):
        record(nn.ModuleList(Block() for _ in range(3)), lambda blocks: positional([blocks[0], blocks[0]]))


@pytest.mark.parametrize("arguments", [(), (torch.ones(3, 4), SCALES[0]), (None, SCALES[0])])
def test_blocks_without_one_hidden_state_are_refused(arguments):
    with pytest.raises(VoroqError, match="one hidden state"):
        record(nn.ModuleList([Block()]), lambda blocks: blocks[0](*arguments))


def test_blocks_that_change_the_shape_are_refused():
    with pytest.raises(VoroqError, match="not the shape of its input"):
        record(nn.ModuleList([Block()]), lambda blocks: blocks[0](HIDDEN, torch.ones(7, 1, 1, 1)))
