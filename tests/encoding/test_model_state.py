"""What a forward changes of a model is seen and put back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bertstream.encoding.model_state import ModelState, unchanged


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(sparse=True)
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.kind = "sparse"
        self.table = nn.Buffer(torch.arange(3.0))


def add_buffer(model: Model) -> None:
    model.register_buffer("more", torch.ones(1))


CHANGES: list[Callable[[Model], object]] = [
    lambda model: setattr(model, "kind", "full"),
    lambda model: setattr(model, "cached", torch.ones(2)),
    lambda model: setattr(model.inner, "width", 3),
    lambda model: setattr(model.config, "sparse", False),
    lambda model: setattr(model.config, "more", 1),
    lambda model: setattr(model, "inner", nn.Identity()),
    lambda model: model.inner.append(nn.ReLU()),
    lambda model: setattr(model, "table", torch.zeros(3)),
    lambda model: model.table.add_(1),
    add_buffer,
    lambda model: model.train(not model.training),
]


def described(model: Model) -> object:
    plain = {name: value for name, value in model.__dict__.items() if not name.startswith("_")}
    return (
        repr(model),
        plain | {"config": dict(model.config.__dict__)},
        {n: b.tolist() for n, b in model.named_buffers()},
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_put_back(change: Callable[[Model], object]) -> None:
    model = Model()
    weight, before, state = model.inner[0].weight, described(model), ModelState(model)
    assert not state.differs()
    change(model)
    assert state.differs()
    state.put_back()
    assert not state.differs() and described(model) == before and model.inner[0].weight is weight
    with unchanged(model):
        change(model)
    assert described(model) == before


def test_weights_are_no_part_of_the_state() -> None:
    model = Model()
    state = ModelState(model)
    with torch.no_grad():
        model.inner[0].weight.add_(1)
    assert not state.differs()


def test_a_warning_that_would_come_with_every_forward_is_not_given(caplog: pytest.LogCaptureFixture) -> None:
    with unchanged(Model()):
        logging.getLogger(__name__).warning("changes")
    assert not caplog.records
    logging.getLogger(__name__).warning("later")
    assert caplog.messages == ["later"]
