"""Which linear makes the values of attention and which reads their average, found by trying; no model is named here.

Attention averages values over tokens, head by head, so a rotation r of every value head comes out of it as the same rotation of
every head that enters the output linear. Nothing else in a block behaves so: turned queries or keys change the weights of the
average, and a turned half of an MLP meets a nonlinearity. So each reader of each block is turned in turn, on the stubs of
`roles`, and what enters the block's writers is compared in float64.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from voroq.pipeline.blocks import find_blocks
from voroq.pipeline.roles import Alteration, Roles, Trace, trace

_CLOSE = 1e-4


@dataclass(frozen=True)
class Heads:
    """The values of one block: `rows` (start, stop) of the linear `value`, in heads of `dim`; `output` reads their averages."""

    value: str
    rows: tuple[int, int]
    output: str
    dim: int


def find_heads(skeleton: nn.Module, roles: Roles) -> tuple[Heads, ...]:
    """The values of every block where they can be turned without a trace; blocks without attention, or with one that is not so
    simple (gated, or sharing its values with another block), have none."""
    dim, width = _head_sizes(skeleton)
    candidates = _candidates(skeleton, roles, dim, width)
    plain = trace(skeleton)
    found: dict[int, Heads] = {}
    for attempt in range(max(map(len, candidates.values()), default=0)):
        tried = {block: some[attempt] for block, some in candidates.items() if block not in found and attempt < len(some)}
        turned = trace(skeleton, _alterations(tried, dim))
        for block, (value, rows) in tried.items():
            for output in _writers(skeleton, roles, block):
                if _turned(plain, turned, output, _rotation(block, dim)):
                    found[block] = Heads(value, rows, output, dim)
    return tuple(found[block] for block in sorted(found)) if _harmless(skeleton, roles, plain, found, dim) else ()


def _head_sizes(skeleton: nn.Module) -> tuple[int, int]:
    """Dimension of a head, and of all value heads together, by the config; (1, 0) where it does not say. Trials decide, not it."""
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 1, 0
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return dim, (getattr(config, "num_key_value_heads", None) or heads) * dim


def _candidates(skeleton: nn.Module, roles: Roles, dim: int, width: int) -> dict[int, list[tuple[str, tuple[int, int]]]]:
    """(reader, rows) of every block that may be values: linears with `width` outputs, and the last `width` rows of larger ones."""
    found: dict[int, list[tuple[str, tuple[int, int]]]] = {}
    for block, name in _in_blocks(skeleton, roles.readers):
        outputs = skeleton.get_submodule(name).out_features
        if dim > 1 and outputs >= width > 0:
            found.setdefault(block, []).append((name, (outputs - width, outputs)))
    return found


def _in_blocks(skeleton: nn.Module, names: Mapping[str, str] | tuple[str, ...]) -> Iterator[tuple[int, str]]:
    prefix = f"{find_blocks(skeleton)}."
    for name in names:
        if name.startswith(prefix):
            yield int(name.removeprefix(prefix).partition(".")[0]), name


def _writers(skeleton: nn.Module, roles: Roles, block: int) -> list[str]:
    return [name for home, name in _in_blocks(skeleton, roles.writers) if home == block]


def _rotation(block: int, dim: int) -> Tensor:
    """A random rotation of its own for every block, so that values that reach another block are noticed."""
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(block), dtype=torch.float64)).Q


def _alterations(tried: Mapping[int, tuple[str, tuple[int, int]]], dim: int) -> dict[str, Alteration]:
    return {value: _turn(rows, _rotation(block, dim)) for block, (value, rows) in tried.items()}


def _turn(rows: tuple[int, int], rotation: Tensor) -> Alteration:
    start, stop = rows

    def turn(output: Tensor) -> Tensor:
        parts = output[..., :start], _by_head(output[..., start:stop], rotation), output[..., stop:]
        return torch.cat(parts, dim=-1)

    return turn


def _by_head(x: Tensor, rotation: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)


def _turned(plain: Trace, turned: Trace, output: str, rotation: Tensor) -> bool:
    """Whether what enters `output` was turned head by head, and nothing else."""
    before, after = plain.inputs[output], turned.inputs[output]
    if before.shape[-1] % len(rotation) or _same(before, after):
        return False
    return _same(_by_head(before, rotation), after)


def _harmless(skeleton: nn.Module, roles: Roles, plain: Trace, found: Mapping[int, Heads], dim: int) -> bool:
    """Whether turning all values at once turns what enters their outputs and leaves what enters every other writer."""
    together = trace(skeleton, _alterations({block: (heads.value, heads.rows) for block, heads in found.items()}, dim))
    expected = {heads.output: _rotation(block, dim) for block, heads in found.items()}
    return all(
        _turned(plain, together, name, expected[name]) if name in expected else _same(plain.inputs[name], together.inputs[name])
        for name in roles.writers
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _CLOSE * a.norm())
