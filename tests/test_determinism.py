"""A second run is the first, bit by bit, and nothing of a criterion is lost on the way to disk."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from cases import CPU, NAMES, Case, assert_same, case

over_criteria = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """An operation without a deterministic algorithm raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@over_criteria
@pytest.mark.usefixtures("deterministic")
def test_two_runs_are_bitwise_equal(name: str, backend: str, device: torch.device) -> None:
    (losses, gradients), (again, gradients_again) = (case(name).on(device).step() for _ in range(2))
    assert_same(again, losses, 0)
    assert_same(gradients_again, gradients, 0)


def through_pickle(criterion: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(criterion))


def through_a_file(criterion: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@over_criteria
@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_a_file])
def test_a_copy_gives_the_same_losses(name: str, through: object) -> None:
    batch = case(name)
    losses, gradients = batch.step()  # before: a criterion that has run is copied too
    ours, our_gradients = Case(through(batch.criterion), batch.inputs).step()
    assert_same(ours, losses, 0)
    assert_same(our_gradients, gradients, 0)


@over_criteria
def test_the_state_dict_is_empty(name: str) -> None:
    """As OTX's: a checkpoint of a detector loads whichever of the two trained it."""
    batch = case(name)
    batch.step()
    assert not batch.criterion.state_dict()
    assert not list(batch.criterion.parameters())
    batch.criterion.load_state_dict({})


@over_criteria
def test_moves(name: str, device: torch.device) -> None:
    batch = case(name)
    assert batch.criterion.to(device).to(CPU) is batch.criterion
    losses, _ = batch.step()
    ours, _ = batch.on(device).step()
    assert_same({path: loss.cpu() for path, loss in ours.items()}, losses, 1e-5)


@pytest.mark.parametrize("name", ["atss", "rtmdet", "yolox"])
def test_modules_of_the_user_keep_their_state(name: str) -> None:
    """What a user's own module holds is in the state dict, under the slot's name."""
    criterion = case(name).criterion
    criterion.loss_bbox = torch.nn.BatchNorm1d(3)
    assert "loss_bbox.running_mean" in criterion.state_dict()
