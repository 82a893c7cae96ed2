"""A transformers model as a row of blocks, of which one at a time is in memory.

The skeleton has every parameter on meta. A block is materialised from the shards, used, and dropped; the rest of the model (the
embedding) is materialised only while `capture` runs. All names here are names in the model with experts unstacked
(`model.layers.0.mlp.experts.3.down_proj`); `site_of` and `block_tensors` lead back to names on disk.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.experts import unstack_experts
from voroq.pipeline import blocks as structure
from voroq.pipeline.activations import Activations
from voroq.pipeline.blocks import Site
from voroq.pipeline.capture import Call, Recorder, Tail, first, stubs
from voroq.pipeline.compat import Group, build_skeleton
from voroq.pipeline.interleave import interleave
from voroq.pipeline.memory import give_back
from voroq.pipeline.outer import Outer
from voroq.pipeline.source import Source
from voroq.pipeline.weights import Weights, finite, put

_REAL = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def open_model(source: Source, *, device: torch.device | str, compute_dtype: torch.dtype | None = None) -> "OpenModel":
    """The model of `source`, with nothing but buffers in memory. Everything that can be checked from headers is checked here.

    `compute_dtype` is float32 unless given, or bfloat16 on an accelerator for a checkpoint mostly in bfloat16. Raises VoroqError
    for an unknown architecture and for weights that are missing, of another shape, or not real numbers.
    """
    device = torch.device(device)
    if compute_dtype is None:
        compute_dtype = torch.bfloat16 if device.type != "cpu" and _main_dtype(source) == torch.bfloat16 else torch.float32
    skeleton = build_skeleton(source.folder, dtype=compute_dtype, trust_remote_code=source.trust_remote_code)
    return OpenModel(source, skeleton, device)


def _main_dtype(source: Source) -> torch.dtype | None:
    """The dtype most bytes of the checkpoint have."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for entry in source.tensors.values():
        sizes[entry.dtype] += entry.size
    return max(sizes, key=sizes.__getitem__, default=None)


class OpenModel:
    """See the module. Made by `open_model`.

    config       the model's configuration (use_cache off)
    skeleton     the transformers model, parameters on meta
    blocks_name  dotted name of the list of blocks, e.g. "model.layers"
    n_blocks     how many there are
    device       where blocks are computed
    interleaved  by block, as loaded: the linears whose rows were reordered, together for every MLP
    """

    def __init__(self, source: Source, skeleton: nn.Module, device: torch.device) -> None:
        self.source = source
        self.skeleton = skeleton
        self.config = skeleton.config
        self.device = device
        self.blocks_name = structure.find_blocks(skeleton)
        self._blocks = list(skeleton.get_submodule(self.blocks_name))
        self.n_blocks = len(self._blocks)
        self._weights = Weights(source, skeleton, device)
        self._block_of = {name: self._index(target) for name, target in self._weights.unused.items()}
        self._site_of: dict[str, list[str]] = {}
        self._loaded: dict[int, nn.Module] = {}
        self._calls: dict[int, list[Call]] = {}
        self._recorder: Recorder | None = None
        self._height: Callable[[str], int | None] | None = None
        self.interleaved: dict[int, list[tuple[str, ...]]] = {}
        self._sites = lru_cache(maxsize=None)(self._find_sites)
        for group in self._weights.groups:
            self._place(group)
        self._check_complete()

    # ---- names ------------------------------------------------------------------------------------------------------

    def block_name(self, index: int) -> str:
        """Dotted name of block `index`."""
        return f"{self.blocks_name}.{index}"

    def sites(self, index: int) -> list[Site]:
        """The linears of block `index` that can be quantized, in module order, without loading it."""
        return list(self._sites(index))

    @property
    def linear_weights(self) -> int:
        """How many weights the linears of all blocks have that can be quantized."""
        return sum(math.prod(site.shape) for index in range(self.n_blocks) for site in self._sites(index))

    def unquantizable(self, index: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the other parameters of block `index` with two or more dimensions (routers, odd expert stacks)."""
        return structure.unquantizable(self._blocks[index], self.block_name(index))

    def block_tensors(self, index: int) -> list[str]:
        """Names on disk that belong to block `index`, in source order."""
        return [name for name in self.source.tensors if self._block_of[name] == index]

    def outer_tensors(self) -> list[str]:
        """Names on disk that belong to no block (embedding, final norm, head, and what the model does not use)."""
        return [name for name in self.source.tensors if self._block_of[name] is None]

    def site_of(self, name: str) -> list[str] | None:
        """The sites whose weights the tensor `name` on disk ends up in; None if it is no part of any site's weight."""
        return self._site_of.get(name)

    # ---- blocks -----------------------------------------------------------------------------------------------------

    def load_block(self, index: int) -> nn.Module:
        """Block `index` on the device, experts unstacked. It stays loaded until `drop_block`.

        Raises VoroqError naming the tensor if a weight is NaN or infinite.
        """
        block = copy.deepcopy(self._blocks[index])
        prefix = f"{self.block_name(index)}."
        wanted = [prefix + name for name in block.state_dict() if prefix + name in self._weights]
        for name, tensor in self._weights.read(wanted):
            put(block, name.removeprefix(prefix), tensor)
        block = unstack_experts(block.to(self.device))
        if self._height is not None:
            self.interleaved[index] = interleave(block, self.block_name(index), self._height)
        self._loaded[index] = block
        return block

    def interleave(self, height: Callable[[str], int | None]) -> None:
        """From now on blocks are loaded with the channels of an MLP interleaved, for tiles of these heights (`pipeline/interleave.py`)."""
        self._height = height

    def drop_block(self, index: int) -> None:
        """Free block `index`, whoever still holds it."""
        block = self._loaded.pop(index, None)
        if block is not None:
            block.to_empty(device="meta")
            give_back()

    def whole(self) -> nn.Module:
        """The whole model on the device, experts unstacked, every parameter in memory. Nothing requires a gradient.

        Raises VoroqError if a weight is missing, NaN or infinite.
        """
        model = copy.deepcopy(self.skeleton)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for name, tensor in self._weights.read(name for name in model.state_dict() if name in self._weights):
            put(model, name, tensor)
        for name in (name for name in names if name not in self._weights):
            source = self._weights.tied(name)
            if source is None:
                raise VoroqError(f"{self.source.name} has no tensor for {name}; the checkpoint is incomplete or of another architecture")
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = model.get_parameter(source)
        return unstack_experts(model.to(self.device))

    def plain_source(self, name: str) -> str | None:
        """The tensor on disk that is the model's parameter `name` and nothing else, if there is one."""
        return self._weights.plain_source(name)

    def linears(self, block: nn.Module, index: int) -> dict[str, nn.Linear]:
        """The modules behind `sites(index)` in the loaded block, by site name."""
        return structure.linears(block, self.block_name(index))

    def forward_block(self, block: nn.Module, index: int, hidden: Float[Tensor, "b ctx d"]) -> Float[Tensor, "b ctx d"]:
        """The block's output on `hidden`, called as the model calls it. Needs `capture`, for the same context and number of windows."""
        if hidden.shape[0] not in self._calls:
            raise ValueError(f"capture ran with batches of {sorted(self._calls)} windows, not {hidden.shape[0]}; use one of those")
        output = first(self._calls[hidden.shape[0]][index](block, hidden))
        if output.shape != hidden.shape:
            raise VoroqError(f"block {index} turned {tuple(hidden.shape)} into {tuple(output.shape)}; such models are not supported")
        return output

    # ---- what enters the blocks -------------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(
        self, tokens: Int[Tensor, "windows ctx"], batch: int, *, others: Collection[int] = (), limit: int, folder: Path
    ) -> Activations:
        """The hidden states that enter block 0, and (kept inside) how every block is called.

        Blocks can then be called with `batch` windows, with as many as are left over at the end, and with each number of `others`.
        `limit` and `folder` say when and where the states spill to disk. Raises VoroqError if the model's blocks are not called
        once each in order, or with arguments that depend on the tokens.
        """
        store: Activations | None = None
        self._calls = {}
        recorder = self._recorder = Recorder(self.n_blocks, self._form)
        blocks = self.skeleton.get_submodule(self.blocks_name)
        with stubs(blocks, recorder.visit), Outer(self.skeleton, self.blocks_name, self._weights, self.device) as outer:
            for start in range(0, len(tokens), batch):
                part = tokens[start : start + batch]
                outer.run(part, recorder)
                hidden = self._keep(recorder, part)
                if store is None:
                    store = Activations((len(tokens), *hidden.shape[1:]), hidden.dtype, limit=limit, folder=folder)
                store.write(start, hidden)
            for size in sorted(set(others) - set(self._calls)):
                outer.run(tokens[:size], recorder)
                self._keep(recorder, tokens[:size])
        return store

    @contextmanager
    def head(self) -> Iterator[Callable[[Int[Tensor, "b ctx"], Float[Tensor, "b ctx d"]], Float[Tensor, "b ctx v"]]]:
        """Inside, `logits(tokens, hidden)`: the model's logits where `hidden` leaves the last block. Needs `capture`."""
        tail = Tail(self._recorder)
        blocks = self.skeleton.get_submodule(self.blocks_name)
        with stubs(blocks, tail.visit), Outer(self.skeleton, self.blocks_name, self._weights, self.device) as outer:

            def logits(tokens: Int[Tensor, "b ctx"], hidden: Float[Tensor, "b ctx d"]) -> Float[Tensor, "b ctx v"]:
                tail.answer = hidden
                return outer.run(tokens, tail, whole=True).logits

            yield logits

    def _keep(self, recorder: Recorder, tokens: Int[Tensor, "b ctx"]) -> Float[Tensor, "b ctx d"]:
        """Check what was recorded on `tokens` and keep the calls; the hidden states that entered block 0."""
        kind, hidden = type(self.skeleton).__name__, recorder.hidden
        if not recorder.done:
            raise VoroqError(f"{kind} called {len(recorder.calls)} of its {self.n_blocks} blocks; such models are not supported")
        if hidden.device.type != self.device.type or hidden.shape[:2] != tokens.shape:
            where = f"{tuple(hidden.shape)} on {hidden.device}"
            raise VoroqError(f"{kind} turned tokens {tuple(tokens.shape)} into {where}; such models are not supported")
        if not finite(hidden):
            raise VoroqError(f"what enters {self.block_name(0)} holds NaN or infinity; the model is damaged")
        known = self._calls.setdefault(len(tokens), recorder.calls)
        compared: set[tuple[int, int]] = set()
        for index, (old, new) in enumerate(zip(known, recorder.calls, strict=True)):
            if not old.same(new, compared):
                raise VoroqError(f"block {index} takes arguments that depend on the tokens; such models are not supported")
        return hidden

    def _form(self, call: Call, hidden: Tensor) -> Any:
        block = self.load_block(0)
        try:
            return call(block, hidden)
        finally:
            self.drop_block(0)

    # ---- homes -----------------------------------------------------------------------------------------------------

    def _index(self, target: str) -> int | None:
        """The block that the model's tensor `target` belongs to, or None."""
        head, _, _ = target.removeprefix(f"{self.blocks_name}.").partition(".")
        inside = target.startswith(f"{self.blocks_name}.") and head.isdecimal() and int(head) < self.n_blocks
        return int(head) if inside else None

    def _find_sites(self, index: int) -> tuple[Site, ...]:
        return tuple(structure.block_sites(self._blocks[index], self.block_name(index)))

    def _place(self, group: Group) -> None:
        """Note which block and sites the sources of `group` belong to."""
        homes = {self._index(target) for target in group.shapes}
        if len(homes) > 1:
            raise VoroqError(f"tensor {group.sources[0][1]} holds weights of several blocks; such checkpoints are not supported")
        (home,) = homes
        ranks: dict[str, list[str]] = defaultdict(list)
        for pattern, name in group.sources:
            ranks[pattern].append(name)
        known = set() if home is None else {site.name for site in self._sites(home)}
        for pattern, name in group.sources:
            self._block_of[name] = home
            rank = (ranks[pattern].index(name), len(ranks[pattern]))
            found = [site for target in group.shapes for site in self._sites_behind(target, rank, known)]
            if found:
                self._site_of[name] = found
                dtype = self.source.tensors[name].dtype
                if dtype not in _REAL:
                    raise VoroqError(f"weight {name} is stored as {dtype}; give a model in float16, bfloat16 or float32")

    def _sites_behind(self, target: str, rank: tuple[int, int], known: set[str]) -> list[str]:
        """The sites, of those `known`, that a source of `target` feeds; `rank` is its place among the sources stacked with it.

        One source per expert feeds its own expert, anything else (a stack on disk) all of them.
        """
        module, _, leaf = target.rpartition(".")
        if leaf == "weight":
            return [module] if module in known else []
        if f"{module}.0.{leaf}" not in known:
            return []
        experts = self.skeleton.get_parameter(target).shape[0]
        place, of = rank
        return [f"{module}.{expert}.{leaf}" for expert in ([place] if of == experts else range(experts))]

    def _check_complete(self) -> None:
        """Every parameter of every block is in the checkpoint. (Others may be missing: a pooler that nobody calls.)"""
        for name, _ in self.skeleton.named_parameters(remove_duplicate=False):
            if self._index(name) is not None and name not in self._weights:
                raise VoroqError(f"{self.source.name} has no tensor for {name}; the checkpoint is incomplete or of another architecture")
