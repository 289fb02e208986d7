import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight.execution.tokens import gather_tokens, merge_samples, take_samples, write_back


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.data())
def test_gathering_and_writing_back_is_indexing_by_hand(
    batch: int, tokens: int, width: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, tokens))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator)
    before = x.clone()
    indices = torch.stack([torch.randperm(tokens, generator=generator)[:k] for _ in range(batch)])
    gathered = gather_tokens(x, indices)
    for sample in range(batch):
        assert torch.equal(gathered[sample], x[sample][indices[sample]])

    written = write_back(x, indices, -gathered)
    for sample in range(batch):
        for token in range(tokens):
            sign = -1 if token in indices[sample].tolist() else 1
            assert torch.equal(written[sample, token], sign * before[sample, token])
    assert torch.equal(x, before)


def test_gathering_follows_tokens_of_any_rank() -> None:
    indices = torch.tensor([[2, 0]])
    assert gather_tokens(torch.tensor([[5, 6, 7]]), indices).tolist() == [[7, 5]]
    rotary = torch.arange(24.0).reshape(1, 3, 4, 2)
    assert torch.equal(gather_tokens(rotary, indices), rotary[:, [2, 0]])


def test_written_tokens_take_the_dtype_of_the_stream() -> None:
    x = torch.zeros(1, 2, 1, dtype=torch.bfloat16)
    assert write_back(x, torch.tensor([[1]]), torch.ones(1, 1, 1)).dtype == torch.bfloat16


def test_rejected_tokens_pass_their_gradient_and_kept_ones_only_the_blocks() -> None:
    x = torch.ones(1, 3, 1, requires_grad=True)
    updated = torch.ones(1, 1, 1, requires_grad=True)
    write_back(x, torch.tensor([[1]]), updated).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 0, 1]
    assert updated.grad is not None and updated.grad.item() == 1


def test_samples_are_taken_from_containers_and_put_back_in_order() -> None:
    rows, other = torch.arange(8.0).reshape(4, 2), torch.arange(3.0)
    call = {"x": rows, "nested": {"y": [rows, None]}, "pair": (rows, 3), "other": other, "scalar": torch.tensor(1.0)}
    groups = [torch.tensor([3, 0]), torch.tensor([1, 2])]
    parts = [take_samples(call, group, 4) for group in groups]
    assert parts[0]["x"].tolist() == [[6, 7], [0, 1]] and parts[0]["pair"][1] == 3  # type: ignore[index]
    assert torch.equal(parts[1]["nested"]["y"][0], rows[1:3]) and parts[1]["nested"]["y"][1] is None  # type: ignore[index]
    assert isinstance(parts[0]["pair"], tuple)  # type: ignore[index]
    assert parts[0]["other"] is other and parts[0]["scalar"] is call["scalar"]  # type: ignore[index]
    assert torch.equal(merge_samples([part["x"] for part in parts], groups), rows)  # type: ignore[index]
    assert merge_samples([None, None], groups) is None
