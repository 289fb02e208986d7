import doctest
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight.errors import BudgetError, ShivelightError
from shivelight.routing import select
from shivelight.routing.select import check_scores, count_unit, keep_count, token_mask, top_k_indices


def top_k_by_sorting(row: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda index: (-row[index], index))[:k])


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"),
    [(0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57), (0.5, 7, 3), (1.0, 256, 256), (0.001, 100, 1), (0.0, 5, 1)],
)
def test_keep_count_examples(ratio: float, tokens: int, kept: int) -> None:
    assert keep_count(ratio, tokens) == kept


@given(st.integers(1, 1000), st.integers(1, 4096))
def test_keep_count_is_the_exact_floor_of_the_decimal(thousandths: int, tokens: int) -> None:
    exact = math.floor(Fraction(thousandths, 1000) * tokens)
    assert keep_count(thousandths / 1000, tokens) == max(exact, 1)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_count_unit_divides_and_leaves_32_steps(tokens: int, granularity: int) -> None:
    unit = count_unit(tokens, granularity)
    assert tokens % unit == 0 and granularity % unit == 0
    assert unit == 1 or tokens >= 32 * unit
    assert not any(
        tokens % part == 0 and granularity % part == 0 and tokens >= 32 * part
        for part in range(unit + 1, granularity + 1)
    )


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan])
def test_keep_count_refuses_what_is_no_ratio(ratio: float) -> None:
    with pytest.raises(BudgetError, match=str(ratio)):
        keep_count(ratio, 10)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_top_k_equals_sorting_with_ties_to_the_lower_index(data: st.DataObject) -> None:
    # Scores from a handful of values: most of them tie.
    row = data.draw(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0, math.inf]), min_size=1, max_size=40))
    k = data.draw(st.integers(1, len(row)))
    assert top_k_indices(torch.tensor([row]), k).tolist() == [top_k_by_sorting(row, k)]


def test_top_k_of_many_ties_in_a_batch_is_the_lowest_indices() -> None:
    scores = torch.zeros(3, 1000)
    scores[1, 700:] = 1.0
    expected = [list(range(400)), [*range(100), *range(700, 1000)], list(range(400))]
    assert top_k_indices(scores, 400).tolist() == expected


def test_top_k_ranks_bf16_scores_like_their_fp32_values() -> None:
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(top_k_indices(scores, 120), top_k_indices(scores.float(), 120))


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (9, 1), (9, 9)])
def test_top_k_edges(tokens: int, k: int) -> None:
    scores = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1))
    chosen = top_k_indices(scores, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [top_k_by_sorting(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("k", [0, 6, -1])
def test_top_k_refuses_an_impossible_k(k: int) -> None:
    with pytest.raises(BudgetError, match=f"k is {k} for 5 tokens"):
        top_k_indices(torch.zeros(1, 5), k)


def test_token_mask_is_true_exactly_where_kept() -> None:
    indices = torch.tensor([[0, 3], [1, 2]])
    assert token_mask(indices, 4).tolist() == [[True, False, False, True], [False, True, True, False]]


def test_check_scores_counts_what_is_not_finite() -> None:
    check_scores(torch.zeros(2, 3))
    with pytest.raises(ShivelightError, match="2 of 6 scores of block 3"):
        check_scores(torch.tensor([[0.0, math.nan, 1.0], [math.inf, 0.0, 0.0]]), "block 3")


def test_docstring_examples_run() -> None:
    assert doctest.testmod(select) == (0, 2)
