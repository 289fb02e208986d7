"""Where gates stand: the one rule of who runs, and the statistics that budgets are solved by."""

import math

import torch

from shivelight.routing import Dial, GateRecords


def test_the_threshold_itself_runs_and_so_does_nan() -> None:
    logits = torch.tensor([-9.0, -1e-7, 0.0, 9.0, math.nan])
    for dial, skipped in (
        (Dial(), [True, True, False, False, False]),
        (Dial(shift=1e-6), [True, False, False, False, False]),
        (Dial(shift=-1.0), [True, True, True, False, False]),
        (Dial(0.9), [True, True, True, False, False]),
    ):
        assert dial.skips(logits).tolist() == skipped == [dial.skips(value) for value in logits.tolist()]
    own = Dial(0.7).low  # a fresh router's logit lies on it, in fp32
    assert not Dial(0.7).skips(torch.tensor(own)) and Dial(0.7).skips(torch.tensor(own) - 1e-6)


def test_up_to_the_margin_a_gate_is_unsure() -> None:
    logits = torch.tensor([0.0, 0.4, 0.42, math.nan])  # logit(0.6) is 0.405
    assert Dial().unsure(logits, 0.1).tolist() == [True, True, False, False]
    assert Dial(shift=0.1).unsure(logits, 0.1).tolist() == [True, False, False, False]
    assert Dial(0.1).unsure(9.0, 0.9)  # threshold + margin is 1: any probability


def test_the_dial_moves_wider_widths_by_more() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0]])
    assert Dial(shift=-2.0).moved_widths(logits).tolist() == [[0.0, -1.0, -4.0]]
    assert Dial(shift=0.3).moved_widths(logits.double()).dtype == torch.float64


def test_a_share_of_the_recorded_gates_opens() -> None:
    records = GateRecords(2, 1, size=8)
    assert records.shift_to_run(0.5, 0.5) == 0.0
    gate = torch.tensor([[3.0, -1.0], [0.5, 2.0], [-4.0, 1.0], [0.0, -0.5]])
    records.add(torch.arange(4.0), gate, torch.zeros(4, 2, 1))
    for share, opened in ((0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)):
        for threshold in (0.3, 0.5):
            dial = Dial(threshold, records.shift_to_run(share, threshold))
            assert int((~dial.skips(gate)).sum()) == opened


def test_records_remember_when_and_at_which_dial() -> None:
    records = GateRecords(1, 1, size=8)
    times = torch.tensor([100.0, 200.0, 800.0, 900.0])
    records.add(times, times[:, None] / 100, torch.zeros(4, 1, 1), shift=-times / 1000)
    records.add(torch.tensor([500.0]), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    gate, width, shift = records.near([150.0, 900.0], share=0.4)  # two of five
    assert gate.shape == (2, 2, 1) and width.shape == (2, 2, 1, 1)
    assert sorted(gate[0, :, 0].tolist()) == [1.0, 2.0] and sorted(gate[1, :, 0].tolist()) == [8.0, 9.0]
    torch.testing.assert_close(shift, -gate[..., 0] / 10)
    assert records.shift[4] == 0.0
    records.clear()
    assert records.filled == 0
