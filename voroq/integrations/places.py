"""Where in a model the linears are that a quantization config names, whatever class the model was opened as."""

import torch
from torch import nn

from voroq.errors import FormatError
from voroq.experts import is_stacked, unstack_experts
from voroq.integrations.compat import names_in_model
from voroq.packed.base import Spec
from voroq.packed.checkpoint import SpecTable


def sites_in(model: nn.Module, table: SpecTable, stacks: dict[str, nn.Module]) -> dict[str, tuple[str, Spec]]:
    """The linears to replace, each with its name in the config and its spec.

    Stacked experts that `table` names are unstacked first, and kept in `stacks`. Raises FormatError for a name that the model does
    not have.
    """
    sites: dict[str, tuple[str, Spec]] = {}
    renamed = names_in_model(model, [f"{name}.weight" for name in table.names])
    for name in table.names:
        if "." not in name and not is_saved_class(model):
            continue  # a head that this class of model does without
        place = place_of(model, name, renamed[f"{name}.weight"].removesuffix(".weight"))
        module = linear_at(model, place, stacks)
        if not isinstance(module, nn.Linear):
            found = "has none" if module is None else f"has a {type(module).__name__}"
            raise FormatError(f"the quantization config names a linear {name}, where the model ({type(model).__name__}) {found}")
        sites[place] = name, table.lookup(name, tuple(module.weight.shape))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in sites and table.entry(name) is not None:
            sites[name] = name, table.lookup(name, tuple(module.weight.shape))
    return sites


def is_saved_class(model: nn.Module) -> bool:
    """Whether `model` is of the class that was saved, so that it should be complete."""
    names = model.config.architectures
    return isinstance(names, list) and type(model).__name__ in names


def place_of(model: nn.Module, name: str, renamed: str) -> str:
    """`name` in `model`, which may be the base model of the one that was saved, or the other way round; the loader calls it `renamed`."""
    prefix = f"{model.base_model_prefix}."
    places = [name, prefix + name, name.removeprefix(prefix)]
    exact = (place for place in [*places, renamed] if isinstance(_get(model, place), nn.Linear))
    return next(exact, next((place for place in places if _get(model, place.split(".", 1)[0]) is not None), name))


def linear_at(model: nn.Module, place: str, stacks: dict[str, nn.Module]) -> nn.Module | None:
    """The module at `place`, after unstacking the experts that it is one of."""
    parts = place.split(".")
    if _get(model, place) is None:
        above = next((".".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1) if _get(model, ".".join(parts[:cut]))), "")
        with torch.device("cpu"):  # loading happens under the meta device, telling a stack takes a small computation
            if above and is_stacked(model.get_submodule(above)):
                stacks[above] = model.get_submodule(above)
                model.set_submodule(above, unstack_experts(stacks[above]))
    return _get(model, place)


def _get(model: nn.Module, place: str) -> nn.Module | None:
    try:
        return model.get_submodule(place)
    except AttributeError:
        return None
