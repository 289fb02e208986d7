"""Memory of the tensors that live at once, in closed form."""

import torch

from shivelight.measurement.memory import working_memory_mb

MILLION = 250_000  # numbers of fp32


def test_what_lives_at_once_counts_and_what_is_gone_does_not():
    def run():
        first = torch.ones(MILLION)
        second = first + 1
        del first
        third = second * 2
        del second, third
        return torch.ones(MILLION)

    assert working_memory_mb(run, "cpu") == 2


def test_views_and_what_was_there_before_take_nothing():
    given = torch.ones(MILLION)

    def run():
        given.add_(1)
        given.view(2, -1)[0].mul_(2)
        return given[1:].reshape(-1)

    assert working_memory_mb(run, "cpu") == 0


def test_what_a_backward_pass_needs_is_kept():
    weight = torch.ones(MILLION, requires_grad=True)

    def forward():
        return (weight * 2).sin().cos()

    with torch.no_grad():
        assert working_memory_mb(forward, "cpu") == 2
    assert working_memory_mb(forward, "cpu") == 3  # what sine and cosine read, and what comes out


def test_runs_do_not_add_up():
    kept = []
    assert [working_memory_mb(lambda: kept.append(torch.ones(MILLION)), "cpu") for _ in range(3)] == [1, 1, 1]
