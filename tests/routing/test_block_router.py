import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shivelight.errors import AdapterError
from shivelight.routing.block_router import (
    BLOCK_ROUTERS,
    BlockRouter,
    ElasticDiTRouter,
    GateLogits,
    gate_probability,
    width_choice,
)
from shivelight.routing.gate_records import Dial

WIDTH, TIME, CONDITION, TOKENS, TEXT = 24, 12, 10, 15, 6
Router = BlockRouter | ElasticDiTRouter
both = pytest.mark.parametrize("variant", ["lean", "elastic-dit"])


def make_router(
    variant: str = "lean", condition: int | None = CONDITION, trained: bool = True, **options: Any
) -> Router:
    """A small router; a trained one has no zeros left: every part matters to its logits."""
    torch.manual_seed(0)
    router = BLOCK_ROUTERS[variant](WIDTH, TIME, condition, [2, 0, 5], bottleneck=8, **options)
    for parameter in router.parameters() if trained else ():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def make_inputs(batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Image tokens, timestep embedding, condition and text tokens, as `forward` takes them."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, TOKENS, WIDTH), (batch, TIME), (batch, CONDITION), (batch, TEXT, WIDTH))
    x, time, condition, text = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, time, condition, text


def silu(z: torch.Tensor) -> torch.Tensor:
    return z / (1.0 + torch.exp(-z))


def by_definition(
    block: Any, tokens: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both heads of one sample, applied to every token and then averaged, in float64."""
    gates, widths = [], []
    for token in tokens.double():
        normed = (token - token.mean()) / torch.sqrt(token.var(unbiased=False) + 1e-6)
        modulated = (1.0 + scale) * normed + shift
        hidden = activation(block.trunk.weight.double() @ modulated + block.trunk.bias.double())
        gates.append(block.gate_head.weight.double() @ hidden + block.gate_head.bias.double())
        widths.append(block.width_head.weight.double() @ hidden + block.width_head.bias.double())
    return torch.stack(gates).mean(0)[0], torch.stack(widths).mean(0)


def reference(router: Any, place: int, x: torch.Tensor, time: torch.Tensor, condition: Any, text: Any) -> GateLogits:
    """The router's logits by the equations of methods/elastic-dit.md, sample by sample and token by token."""
    block, samples = router.routers[str(place)], []
    for sample in range(len(x)):
        t = time[sample].double()
        if isinstance(router, BlockRouter):
            context = router.from_time.weight.double() @ t
            if router.from_condition is not None:
                context = context + router.from_condition.weight.double() @ condition[sample].double()
            modulation = block.modulation.weight.double() @ silu(context)
            scale, shift = modulation[:WIDTH], modulation[WIDTH:]
            samples.append(by_definition(block, x[sample, :: router.token_stride], scale, shift, silu))
        else:
            modulation = block.modulation.weight.double() @ silu(t) + block.modulation.bias.double()
            shift, scale = modulation[:WIDTH], modulation[WIDTH : 2 * WIDTH]
            tokens = x[sample] if text is None else torch.cat([text[sample], x[sample]])
            samples.append(by_definition(block, tokens, scale, shift, torch.relu))
    return GateLogits(*(torch.stack(values) for values in zip(*samples, strict=True)))


@pytest.mark.parametrize("stride", [1, 4, 50])
@pytest.mark.parametrize("condition", [None, CONDITION])
def test_lean_logits_follow_the_equation(condition: int | None, stride: int) -> None:
    router = make_router(condition=condition, token_stride=stride).double()
    inputs = make_inputs(dtype=torch.float64)
    for block in router.blocks:
        torch.testing.assert_close(router(block, *inputs), reference(router, block, *inputs), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("with_text", [True, False])
def test_elastic_dit_logits_follow_the_released_layout(with_text: bool) -> None:
    router, (x, time, _, text) = make_router("elastic-dit").double(), make_inputs(dtype=torch.float64)
    inputs = (x, time, None, text if with_text else None)
    for block in router.blocks:
        torch.testing.assert_close(router(block, *inputs), reference(router, block, *inputs), atol=1e-12, rtol=1e-12)


def test_elastic_dit_parameters_have_the_released_shapes_and_an_unused_chunk() -> None:
    router, inputs = ElasticDiTRouter(WIDTH, TIME, None, [3]), make_inputs()
    shapes = {name: tuple(value.shape) for name, value in router.state_dict().items()}
    assert shapes == {
        "routers.3.modulation.weight": (3 * WIDTH, TIME),
        "routers.3.modulation.bias": (3 * WIDTH,),
        "routers.3.trunk.weight": (128, WIDTH),
        "routers.3.trunk.bias": (128,),
        "routers.3.gate_head.weight": (1, 128),
        "routers.3.gate_head.bias": (1,),
        "routers.3.width_head.weight": (4, 128),
        "routers.3.width_head.bias": (4,),
    }
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    before = router(3, *inputs)
    with torch.no_grad():
        router.get_parameter("routers.3.modulation.weight")[2 * WIDTH :] += 1.0
    assert all(map(torch.equal, before, router(3, *inputs)))


@both
def test_a_fresh_router_starts_at_full_capacity_for_every_input(variant: str) -> None:
    router, inputs = make_router(variant, trained=False), make_inputs()
    gate, width = router(2, *inputs)
    torch.testing.assert_close(torch.sigmoid(gate), torch.full((3,), 0.7))
    torch.testing.assert_close(width.softmax(-1), torch.tensor([[1 / 30, 1 / 30, 1 / 30, 0.9]] * 3))
    assert gate.unique().numel() == 1 and width.unique(dim=0).shape[0] == 1


@both
def test_a_fresh_router_is_unmodulated(variant: str) -> None:
    router, (x, time, condition, text) = make_router(variant, trained=False), make_inputs()
    for name, parameter in router.named_parameters():
        if "head" in name:
            torch.nn.init.normal_(parameter)
    gate = router(2, x, time, condition, text).gate
    assert gate.unique().numel() == 3  # what the tokens hold counts at once
    assert torch.equal(gate, router(2, x, time + 1.0, condition + 1.0, text).gate)


@both
def test_random_start_draws_every_head_and_bias_anew(variant: str) -> None:
    router, inputs = make_router(variant, trained=False, start="random"), make_inputs()
    for block in router.blocks:
        gate, width = router(block, *inputs)
        assert gate.unique().numel() == 3 and width.unique().numel() == 12
    many = BLOCK_ROUTERS[variant](WIDTH, TIME, None, range(500), start="random").state_dict()
    for head in ("gate_head", "width_head"):
        bias = torch.cat([value for name, value in many.items() if name.endswith(f"{head}.bias")])
        assert abs(bias.mean().item()) < 0.2 and bias.std().item() == pytest.approx(1.0, rel=0.15)
        weight = torch.cat([value for name, value in many.items() if name.endswith(f"{head}.weight")])
        assert weight.std().item() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.05)


def test_only_every_fourth_token_is_read_and_all_of_them_at_stride_one() -> None:
    x, *others = make_inputs()
    disturbed = x.clone()
    disturbed[:, torch.arange(TOKENS) % 4 != 0] += torch.randn(3, 11, WIDTH)
    sparse, full = make_router(), make_router(token_stride=1)
    assert torch.equal(sparse(0, x, *others).gate, sparse(0, disturbed, *others).gate)
    assert not torch.equal(full(0, x, *others).gate, full(0, disturbed, *others).gate)
    for token in range(0, TOKENS, 4):
        changed = x.clone()
        changed[:, token] += torch.randn(3, WIDTH)
        assert not torch.isclose(sparse(0, x, *others).gate, sparse(0, changed, *others).gate).any()


@both
def test_a_single_width_has_no_head_and_zero_logits(variant: str) -> None:
    router = make_router(variant, widths=(1.0,))
    gate, width = router(0, *make_inputs())
    assert gate.shape == (3,) and torch.equal(width, torch.zeros(3, 1))
    assert not [name for name in router.state_dict() if "width_head" in name]
    assert make_router(variant, widths=[0.5, 1]).widths == (0.5, 1.0)
    assert make_router(variant, widths=[0.5, 1])(0, *make_inputs()).width.shape == (3, 2)


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_fp32_and_not_rounded(variant: str, autocast: bool) -> None:
    router, inputs = make_router(variant), make_inputs(400)
    if not autocast:
        router.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gate, width = router(2, *inputs)
    assert gate.dtype == width.dtype == torch.float32
    # Of 400 and 1600 values in bf16, most would share theirs with others.
    assert gate.unique().numel() > 395 and width.unique().numel() > 1500
    expected = reference(router, 2, *(value[:30] for value in inputs))
    torch.testing.assert_close(gate[:30].double(), expected.gate, atol=0.1, rtol=0.02)
    torch.testing.assert_close(width[:30].double(), expected.width, atol=0.1, rtol=0.02)


@both
def test_statistics_of_bf16_tokens_are_fp32(variant: str) -> None:
    router, (x, *others) = make_router(variant).bfloat16(), make_inputs(dtype=torch.bfloat16)
    x = x * 0.5 + 40.0  # steps of 1/4: a mean or a square rounded to bf16 would lose what is left
    expected = reference(router, 2, x, *others)
    torch.testing.assert_close(router(2, x, *others).gate.double(), expected.gate, atol=0.03, rtol=0.01)
    # A bf16 router reads tokens in fp32 as they are, not rounded first.
    fine = x.float() + 1000.0 + torch.randn(x.shape) * 0.01
    expected = reference(router, 2, fine, *others)
    torch.testing.assert_close(router(2, fine, *others).gate.double(), expected.gate, atol=0.03, rtol=0.01)


@both
def test_a_sample_does_not_depend_on_the_others_of_its_batch(variant: str) -> None:
    router, inputs = make_router(variant), make_inputs()
    together = router(5, *inputs)
    for sample in range(3):
        alone = router(5, *(value[sample : sample + 1] for value in inputs))
        torch.testing.assert_close(alone.gate, together.gate[sample : sample + 1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(alone.width, together.width[sample : sample + 1], atol=1e-6, rtol=1e-6)
        others = torch.arange(3) != sample
        changed = router(5, *(torch.where(others.view(-1, *[1] * (v.dim() - 1)), v.flip(0) * 9, v) for v in inputs))
        assert torch.equal(changed.gate[sample], together.gate[sample])
        assert torch.equal(changed.width[sample], together.width[sample])


@both
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    router, inputs = make_router(variant), make_inputs()
    outputs = [router(block, *inputs) for block in router.blocks]
    sum((logits.gate.square().sum() + logits.width.square().sum() for logits in outputs), torch.zeros(())).backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_fresh_router_learns_from_its_first_steps() -> None:
    # Zero heads on a random trunk, and zero modulation on random projections: no pair of zeros blocks the way.
    router, inputs = make_router(trained=False), make_inputs()
    start = {name: value.clone() for name, value in router.state_dict().items()}
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        logits = router(2, *inputs)
        ((logits.gate - torch.tensor([1.0, -1.0, 0.0])).square().sum() + logits.width.square().sum()).backward()
        optimizer.step()
    moved = {name for name, value in router.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if not name.startswith("routers.") or name.startswith("routers.2.")}


@both
def test_each_block_has_its_own_router(variant: str) -> None:
    router, inputs = make_router(variant), make_inputs()
    assert router.blocks == (0, 2, 5)
    gates = torch.stack([router(block, *inputs).gate for block in router.blocks])
    assert gates.unique().numel() == 9


def test_condition_is_used_where_there_is_one_and_asked_for() -> None:
    router, (x, time, condition, _) = make_router(), make_inputs()
    assert not torch.equal(router(2, x, time, condition).gate, router(2, x, time, condition + 1.0).gate)
    assert not torch.equal(router(2, x, time, condition).gate, router(2, x, time + 1.0, condition).gate)
    with pytest.raises(AdapterError, match="condition"):
        router(2, x, time, None)
    assert make_router(condition=None)(2, x, time).gate.shape == (3,)


@pytest.mark.parametrize(
    ("width", "condition", "blocks", "backbone"),
    [
        pytest.param(1536, 1536, 24, 2.24e9, id="SD3.5-Medium"),
        pytest.param(1152, None, 28, 6.1e8, id="PixArt-Sigma"),
        pytest.param(3072, 3072, 57, 11.9e9, id="FLUX.1"),
        pytest.param(3072, None, 60, 20.4e9, id="Qwen-Image"),
        pytest.param(1152, None, 28, 6.75e8, id="DiT-XL/2"),
    ],
)
def test_routers_stay_below_half_a_percent_of_the_backbone(
    width: int, condition: int | None, blocks: int, backbone: float
) -> None:
    with torch.device("meta"):
        router = BlockRouter(width, width, condition, range(blocks))
    assert len(router.blocks) == blocks
    assert sum(parameter.numel() for parameter in router.parameters()) < 0.005 * backbone


def test_the_released_variant_has_the_released_size() -> None:
    with torch.device("meta"):
        router = ElasticDiTRouter(3072, 3072, None, range(60))
    parameters = sum(parameter.numel() for parameter in router.parameters())
    assert parameters / 60 == pytest.approx(28.7e6, rel=0.002)
    assert parameters / 20.4e9 == pytest.approx(0.084, abs=0.001)


@both
@pytest.mark.parametrize(
    "widths", [(), (0.5,), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0), (0.0, 1.0), (-0.5, 1.0), (0.5, 1.5), (math.nan, 1.0)]
)
def test_widths_that_are_no_ascending_shares_are_refused(variant: str, widths: tuple[float, ...]) -> None:
    with pytest.raises(AdapterError, match=r"The widths are .*ascending, the last 1\.0"):
        make_router(variant, widths=widths)


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"Block 1 has no router.*\[0, 2, 5\]"):
        make_router()(1, *make_inputs())
    for blocks in ([], [1, 1]):
        with pytest.raises(AdapterError, match="routed blocks"):
            BlockRouter(WIDTH, TIME, None, blocks=blocks)
    for name in ("bottleneck", "modulation_rank", "token_stride"):
        with pytest.raises(AdapterError, match=f"{name} is 0; it must be at least 1"):
            BlockRouter(WIDTH, TIME, None, [0], **{name: 0})
    with pytest.raises(AdapterError, match="start is 'half'; one of 'full', 'random'"):
        BlockRouter(WIDTH, TIME, None, [0], start="half")  # type: ignore[arg-type]


@both
def test_state_round_trips_and_the_router_traces_as_one_graph(variant: str) -> None:
    router, inputs = make_router(variant), make_inputs()
    again = make_router(variant, trained=False)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again(2, *inputs).width, router(2, *inputs).width)

    dial = Dial()

    def decide(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, width = router(2, *values)
        return dial.skips(gate), width_choice(width)

    compiled = torch.compile(decide, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*inputs), decide(*inputs)))


def test_gate_probability_is_a_sigmoid_in_fp32() -> None:
    logit = torch.linspace(0.5, 0.6, 8).bfloat16()
    p = gate_probability(logit)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, 1.0 / (1.0 + torch.exp(-logit.float())))
    assert gate_probability(logit.double()).dtype == torch.float64


def test_width_ties_and_nan_go_to_the_widest() -> None:
    nan = math.nan
    logits = [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [nan, nan, nan]]
    assert width_choice(torch.tensor(logits)).tolist() == [2, 1, 0, 2, 2]
    assert width_choice(torch.zeros(2, 1)).tolist() == [0, 0]
