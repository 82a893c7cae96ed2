"""What can be quantized in a model, found by structure: the repeated blocks and the linears (sites) in them.

No model is named here. Blocks are the outermost `nn.ModuleList` whose every element holds linears or stacked experts; of several
(a vision tower beside a language model) the one with the most parameters. Routers are never sites: their outputs choose experts,
and an error there is no longer a small error.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from voroq.errors import VoroqError
from voroq.experts import Experts, is_stacked, unstack_experts

_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
_ROUTER_OUTPUTS = 256
"""Linears with a router's name are routers up to this many outputs (the most experts of known models); wider ones are gates of MLPs."""


@dataclass(frozen=True)
class Site:
    """One linear to quantize: its full dotted name in the model (experts unstacked), (out, in), and whether it is an expert's."""

    name: str
    shape: tuple[int, int]
    expert: bool


def find_blocks(model: nn.Module) -> str:
    """The dotted name of the list of blocks. Raises VoroqError listing what was found if there is none."""
    candidates = dict(_block_lists(model, ""))
    if not candidates:
        found = [
            f"{name} ({len(module)} x {type(next(iter(module))).__name__})"
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        raise VoroqError(
            f"{type(model).__name__} has no list of repeated blocks that hold nn.Linear; module lists found: {', '.join(found) or 'none'}; "
            "only models built of such blocks can be quantized"
        )
    return max(candidates, key=lambda name: (sum(p.numel() for p in candidates[name].parameters()), len(candidates[name])))


def block_sites(block: nn.Module, prefix: str) -> list[Site]:
    """The sites of one block, in module order. `prefix` is the block's own dotted name."""
    return [
        Site(f"{prefix}.{name}", (linear.out_features, linear.in_features), expert) for name, linear, expert in _linears(_unstacked(block))
    ]


def unquantizable(block: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of two or more dimensions that is no site's weight: what the coverage report must own up to."""
    block = _unstacked(block)
    weights = {f"{name}.weight" for name, _, _ in _linears(block)}
    return {
        f"{prefix}.{name}": tuple(parameter.shape)
        for name, parameter in block.named_parameters()
        if parameter.dim() >= 2 and name not in weights
    }


def linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The modules behind `block_sites` of a block whose experts are unstacked, by site name."""
    return {f"{prefix}.{name}": linear for name, linear, _ in _linears(block)}


def _unstacked(block: nn.Module) -> nn.Module:
    return unstack_experts(copy.deepcopy(block))


def _block_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost lists of blocks under `module`."""
    if isinstance(module, nn.ModuleList) and len(module) and all(_holds_sites(child) for child in module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _block_lists(child, f"{name}.{child_name}" if name else child_name)


def _holds_sites(module: nn.Module) -> bool:
    return any(type(child) is nn.Linear or is_stacked(child) for child in module.modules() if child is not module)


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear, bool]]:
    """(name, linear, is an expert's). Subclasses of nn.Linear are left out: what they compute is not known to be x @ w.T."""
    modules = dict(block.named_modules())
    experts = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Experts))
    for name, module in modules.items():
        parent, _, tail = name.rpartition(".")
        if type(module) is nn.Linear and not _is_router(tail, module, modules[parent]):
            yield name, module, name.startswith(experts)


def _is_router(tail: str, linear: nn.Linear, parent: nn.Module) -> bool:
    if tail in _ROUTER_NAMES and linear.out_features <= _ROUTER_OUTPUTS:
        return True
    return any(_expert_count(child) == linear.out_features for child in parent.children())


def _expert_count(module: nn.Module) -> int | None:
    """How many experts `module` is, if it is a set of experts (ours, or a list of modules with linears as custom code has)."""
    if isinstance(module, Experts):
        return module.num_experts
    if isinstance(module, nn.ModuleList) and len(module) > 1 and all(_holds_sites(child) for child in module):
        return len(module)
    return None
