import pytest
import torch

from shivelight.errors import AdapterError
from shivelight.routing.select import top_k_indices
from shivelight.routing.token_router import TokenRouter

WIDTH, TIME, CONDITION, TOKENS = 24, 12, 10, 15


def make_router(condition: int | None = CONDITION, share: int = 2) -> TokenRouter:
    torch.manual_seed(0)
    return TokenRouter(WIDTH, TIME, condition, blocks=range(1, 6), bottleneck=8, share=share)


def make_inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, TOKENS, WIDTH), (batch, TIME), (batch, CONDITION))
    x, time, condition = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, time, condition


def test_scores_follow_the_papers_equation() -> None:
    router, (x, time, condition) = make_router(), make_inputs()
    pair = router.pairs["3_4"]
    for member, block in enumerate((3, 4)):
        scores = router(block, x, time, condition)
        context = pair.from_time.weight @ time[1] + pair.from_condition.weight @ condition[1] + pair.layer[member]
        for token in range(TOKENS):
            hidden = pair.from_tokens.weight @ x[1, token] + pair.from_tokens.bias + context
            hidden = hidden * torch.sigmoid(hidden)
            normed = (hidden - hidden.mean()) / torch.sqrt(hidden.var(unbiased=False) + 1e-5)
            torch.testing.assert_close(scores[1, token], normed @ pair.score, atol=1e-5, rtol=1e-5)


def test_adjacent_blocks_share_all_but_the_layer_embedding() -> None:
    router, inputs = make_router(), make_inputs()
    assert list(router.pairs) == ["1_2", "3_4", "5"]
    assert router.blocks == (1, 2, 3, 4, 5)
    assert not torch.equal(router(1, *inputs), router(2, *inputs))
    with torch.no_grad():
        router.pairs["1_2"].layer[1] = router.pairs["1_2"].layer[0]
    assert torch.equal(router(1, *inputs), router(2, *inputs))
    assert not torch.equal(router(2, *inputs), router(3, *inputs))


def test_pairs_are_counted_from_block_one_whatever_is_routed() -> None:
    assert list(TokenRouter(WIDTH, TIME, None, blocks=[6, 2, 3, 5]).pairs) == ["2", "3", "5_6"]
    assert list(make_router(share=1).pairs) == ["1", "2", "3", "4", "5"]


def test_twenty_four_blocks_have_twelve_routers_within_half_a_percent() -> None:
    with torch.device("meta"):
        router = TokenRouter(1536, 1536, 1536, blocks=range(1, 24))
    assert len(router.pairs) == 12
    parameters = sum(parameter.numel() for parameter in router.parameters())
    assert parameters < 0.005 * 2_243_171_520  # SD3.5-Medium's transformer


def test_every_parameter_gets_a_gradient() -> None:
    router, inputs = make_router(), make_inputs()
    sum(router(block, *inputs).square().sum() for block in router.blocks).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in router.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_fp32_and_free_of_bf16_ties(autocast: bool) -> None:
    router, (x, time, condition) = make_router(), make_inputs(1)
    x = x.repeat(1, 40, 1) + 0.3 * torch.randn(1, 40 * TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    if not autocast:
        router.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = router(2, x, time, condition)
    assert scores.dtype == torch.float32
    # 600 scores of about unit size would share some 300 values in bf16.
    assert scores.unique().numel() > 590


def test_a_sample_is_scored_alike_alone_and_in_a_batch() -> None:
    router, inputs = make_router(), make_inputs()
    together = router(4, *inputs)
    for sample in range(3):
        alone = router(4, *(value[sample : sample + 1] for value in inputs))
        torch.testing.assert_close(alone, together[sample : sample + 1], atol=1e-6, rtol=1e-5)


def test_condition_is_used_where_there_is_one_and_asked_for() -> None:
    router, (x, time, condition) = make_router(), make_inputs()
    assert not torch.equal(router(1, x, time, condition), router(1, x, time, condition + 1.0))
    with pytest.raises(AdapterError, match="condition"):
        router(1, x, time, None)
    unconditional = make_router(condition=None)
    assert unconditional(1, x, time, None).shape == (3, TOKENS)


def test_unknown_blocks_and_empty_routers_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"Block 0 has no router.*\[1, 2, 3, 4, 5\]"):
        make_router()(0, *make_inputs())
    for blocks in ([], [1, 1]):
        with pytest.raises(AdapterError, match="routed blocks"):
            TokenRouter(WIDTH, TIME, None, blocks=blocks)


def test_router_and_top_k_trace_as_one_graph() -> None:
    router, inputs = make_router(), make_inputs()

    def choose(x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return top_k_indices(router(3, x, time, condition), 7)

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), choose(*inputs))
