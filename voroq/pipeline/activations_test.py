"""A store gives back what was written, wherever it keeps it."""

import os

import pytest
import torch

from voroq.errors import VoroqError
from voroq.pipeline.activations import Activations


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_are_what_was_written(limit, dtype, tmp_path):
    states = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Activations((7, 3, 5), dtype, limit=limit, folder=tmp_path) as store:
        assert store.spilled == (limit == 0)
        for start in (5, 0, 2):
            store.write(start, states[start : start + 3])
        assert torch.equal(store.read(0, 7), states)
        store.read(0, 7).zero_()
        parts = dict(store.batches(3))
        assert list(parts) == [0, 3, 6]
        assert torch.equal(torch.cat(list(parts.values())), states)


def test_batches_may_be_overwritten_while_they_are_read(tmp_path):
    with Activations((5, 2, 3), torch.float32, limit=0, folder=tmp_path) as store:
        store.write(0, torch.ones(5, 2, 3))
        for start, part in store.batches(2):
            store.write(start, part + start)
        assert store.read(0, 5)[:, 0, 0].tolist() == [1, 1, 3, 3, 5]


def test_a_spilled_store_leaves_nothing_behind(tmp_path):
    with Activations((5, 2, 3), torch.float32, limit=0, folder=tmp_path / "new"):
        assert os.listdir(tmp_path / "new") == []
    assert os.listdir(tmp_path / "new") == []


def test_too_little_disk_is_said_at_once(tmp_path):
    with pytest.raises(VoroqError, match="free some space"):
        Activations((1 << 30, 1 << 20, 1 << 20), torch.float32, limit=0, folder=tmp_path)


def test_states_of_another_shape_are_refused(tmp_path):
    store = Activations((5, 2, 3), torch.float32, limit=1 << 20, folder=tmp_path)
    for start, part in ((0, torch.ones(1, 2, 4)), (5, torch.ones(1, 2, 3)), (0, torch.ones(1, 2, 3, dtype=torch.float64))):
        with pytest.raises(ValueError, match="cannot hold"):
            store.write(start, part)
