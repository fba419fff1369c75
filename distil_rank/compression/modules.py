"""Put modules into the places of others, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as it was outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def installed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """With these modules in place of those of the same names."""
    before = {name: model.get_submodule(name) for name in modules}
    install(model, modules)
    try:
        yield
    finally:
        install(model, before)


def install(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules in a model by their names."""
    for name, module in modules.items():
        model.set_submodule(name, module)
