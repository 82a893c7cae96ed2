"""The weights of a skeleton, read from the shards when asked for, under the names they have in the model."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.pipeline.compat import Group, plan_groups, tied_names
from voroq.pipeline.source import Source


class Weights:
    """`groups` are the tensors on disk that together make tensors of the model, `unused` the others by the name they would have."""

    def __init__(self, source: Source, skeleton: nn.Module, device: torch.device) -> None:
        self.source = source
        self.device = device
        self._skeleton = skeleton
        self._dtypes = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
        headers = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in source.tensors.items()}
        self.groups, self.unused = plan_groups(skeleton, headers)
        self._group_of: dict[str, Group] = {target: group for group in self.groups for target in group.shapes}
        self._check_shapes()

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has the model's tensor `name`."""
        return name in self._group_of

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of each of `names`, on the device in the skeleton's dtype, group by group so that little is held at a time.

        Raises VoroqError naming the tensor on disk if it holds NaN or infinity.
        """
        names = set(names)
        for group in dict.fromkeys(self._group_of[name] for name in sorted(names)):
            for name, tensor in group.convert(self._skeleton, self._finite).items():
                if name in names:
                    yield name, tensor.to(device=self.device, dtype=self._dtypes[name])

    def plain_source(self, name: str) -> str | None:
        """The tensor on disk that becomes `name` as it is, if there is one."""
        group = self._group_of.get(name)
        return group.sources[0][1] if group is not None and group.converter is None else None

    def tied(self, name: str) -> str | None:
        """`name` if the checkpoint has it, else a tensor tied to it that the checkpoint has."""
        ties = tied_names(self._skeleton)
        root = ties.get(name, name)
        family = [name, root, *(other for other, source in ties.items() if source == root)]
        return next((other for other in family if other in self), None)

    def _finite(self, name: str) -> Tensor:
        tensor = self.source.tensor(name)
        if tensor.is_floating_point() and not finite(tensor):
            file = self.source.folder / self.source.tensors[name].file
            raise VoroqError(f"tensor {name} in {file} holds NaN or infinity; the checkpoint is damaged, get it again")
        return tensor

    def _check_shapes(self) -> None:
        for name, parameter in self._skeleton.named_parameters(remove_duplicate=False):
            group = self._group_of.get(name)
            if group is not None and group.shapes[name] != tuple(parameter.shape):
                stored, made = group.sources[0][1], group.shapes[name]
                raise VoroqError(
                    f"{name} must be {tuple(parameter.shape)} by config.json, but {stored} in the checkpoint makes it {made}; "
                    "config and weights do not belong together"
                )


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite; one pass, since NaN survives both minimum and maximum."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set parameter or buffer `name` of `module`, whatever device it was on."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
