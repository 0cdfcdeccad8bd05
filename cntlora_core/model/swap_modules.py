"""Other modules in the places of a network's own, for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def swapped_modules(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """`modules` in the places they name (`a.b.0`); the network's own are back when the block ends,
    however it ends."""
    own = {name: network.get_submodule(name) for name in modules}
    try:
        put_modules(network, modules)
        yield
    finally:
        put_modules(network, own)


def put_modules(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """`modules` in the places they name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
