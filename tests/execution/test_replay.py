"""Passes recorded once and replayed: never a stale one, whatever changes in between, and no Python while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from families import FAMILIES, build
from matrix_help import decided, free, gated, kept
from taping import OperatorRecorder, taped
from torch import Tensor

import shivelight as sl
from shivelight.adapter import install, prepare, routed_of
from shivelight.demo import pipeline as embedded
from shivelight.errors import ShivelightError
from shivelight.execution.latency_table import LatencyTable, TimeCurve
from shivelight.execution.planning import Budget


def pictures(pipe: Any, *samples: int, steps: int = 4, **options: Any) -> Tensor:
    return FAMILIES["sd3"](pipe, *samples or (0,), steps=steps, **options)


def as_it_is(pipe: Any, *samples: int, **options: Any) -> Tensor:
    """As it would be drawn without a recording."""
    routed = routed_of(pipe)
    replays, routed.replays = routed.replays, None
    try:
        return pictures(pipe, *samples, **options)
    finally:
        routed.replays = replays


def right(pipe: Any, *samples: int, times: int = 3, **options: Any) -> None:
    """As without a recording, at the first run, the one that is recorded and one that is replayed."""
    for _ in range(times):
        assert torch.equal(pictures(pipe, *samples, **options), as_it_is(pipe, *samples, **options))


@pytest.fixture
def pipe() -> Any:
    return build("sd3")


def test_no_block_is_asked_while_a_generation_is_replayed(pipe: Any) -> None:
    free(pipe)
    routed = taped(pipe)
    asked = decided(routed)
    counts = []
    for sample in (0, 1, 2):
        pictures(pipe, sample)
        counts.append(len(asked))
    assert counts[0] and counts[1] == 2 * counts[0] == counts[2]
    assert routed.spending.ratio == pytest.approx(sl.planned_ratio(pipe, 4))
    assert "4 passes recorded, 1 kinds" in sl.summary(pipe)


CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "batch": lambda pipe: {"samples": (0, 1, 2)},
    "resolution": lambda pipe: {"height": 24},
    "steps": lambda pipe: {"steps": 6},
    "guidance": lambda pipe: {"guidance_scale": 1.0},
    "budget": lambda pipe: {} if sl.set_budget(pipe, compute=0.75) else {},
    "dense": lambda pipe: routed_of(pipe).enable(False) or {},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_between_generations_is_recorded_anew(pipe: Any, what: str) -> None:
    free(pipe)
    taped(pipe)
    right(pipe)
    options = CHANGES[what](pipe)
    samples = options.pop("samples", (0,))
    right(pipe, *samples, **options)


def test_weights_may_change_in_place_and_may_move(pipe: Any) -> None:
    free(pipe)
    taped(pipe)
    right(pipe)
    before = pictures(pipe)
    weight = pipe.transformer.transformer_blocks[0].attn.to_v.weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert not torch.allclose(pictures(pipe), before)
    right(pipe)
    weight.data = 2 * weight.data  # in other memory
    right(pipe)


def test_a_lora_and_its_scale_count(pipe: Any) -> None:
    from peft import LoraConfig

    free(pipe)
    taped(pipe)
    right(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "mine")
    right(pipe)
    pipe.transformer.set_adapters(["mine"], [0.2])
    right(pipe)
    pipe.transformer.disable_adapters()
    right(pipe)


def test_what_was_given_out_stays_as_it_is(pipe: Any) -> None:
    free(pipe)
    taped(pipe)
    right(pipe)
    given: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda module, args, output: given.append(output[0]))
    pictures(pipe, 0)
    before = [output.clone() for output in given]
    pictures(pipe, 1)
    assert all(map(torch.equal, before, given[: len(before)]))
    assert not any(map(torch.equal, before, given[len(before) :]))


def test_a_generation_that_was_stopped_is_recorded_again(pipe: Any) -> None:
    free(pipe)
    taped(pipe)
    expected = as_it_is(pipe)
    pictures(pipe)

    def stop(pipe: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return values

    pictures(pipe, callback_on_step_end=stop)
    for _ in range(3):
        assert torch.equal(pictures(pipe), expected)
    pictures(pipe, callback_on_step_end=stop)  # while it is replayed
    assert torch.equal(pictures(pipe), expected)


def test_a_pass_of_another_kind_in_the_middle_is_refused_and_recorded_anew(pipe: Any) -> None:
    free(pipe)
    taped(pipe)
    right(pipe)

    def unguide(pipe: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            values |= {name: value[1:] for name, value in values.items() if "embeds" in name}
        return values

    options = {
        "callback_on_step_end": unguide,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    expected = as_it_is(pipe, **options)
    with pytest.raises(ShivelightError, match="step 3 is not like that"):
        pictures(pipe, **options)
    for _ in range(3):
        assert torch.equal(pictures(pipe, **options), expected)


class Looking(JointAttnProcessor2_0):
    """An attention that looks at the data, as caches of others do."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden_states.sum().item() is not None
        return super().__call__(attn, hidden_states, *args, **kwargs)


def test_what_looks_at_the_data_cannot_be_recorded_and_says_so(pipe: Any) -> None:
    free(pipe)
    routed = taped(pipe)
    right(pipe)
    pipe.transformer.set_attn_processor(Looking())
    right(pipe, times=1)
    with pytest.raises(ShivelightError, match=r"Step 1 cannot be recorded.*cuda_graphs=False"):
        pictures(pipe)
    assert "0 passes" in str(routed.replays)
    right(pipe, times=1)


WAYS: dict[str, Callable[[Any], Any]] = {
    "gates": lambda pipe: gated(pipe, widths=(0.5, 1.0)),
    "random": lambda pipe: kept(pipe, scores="random"),
}


@pytest.mark.parametrize("way", WAYS)
def test_where_samples_or_chance_decide_passes_run_as_they_are(pipe: Any, way: str) -> None:
    WAYS[way](pipe)
    routed = taped(pipe)
    for _ in range(3):
        pictures(pipe)
    assert "0 passes" in str(routed.replays)


@pytest.mark.parametrize("budget", [{"compute": 0.7}, {"compute": 0.5}])
def test_static_gates_with_narrow_widths_are_replayed(pipe: Any, budget: dict[str, float]) -> None:
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting(widths=(0.5, 1.0), decide="static"), reuse=sl.Reuse()))
    routed = routed_of(pipe)
    logits = torch.randn(64, len(routed.routed), 3, generator=torch.Generator().manual_seed(4))
    routed.gates.records.add(1000 * torch.rand(64), logits[..., 0], logits[..., 1:])
    generator = torch.Generator().manual_seed(6)
    channels = pipe.transformer.transformer_blocks[0].ff.net[2].in_features
    routed.gates.set_orders(
        pipe.transformer, {block: torch.randperm(channels, generator=generator) for block in routed.routed}
    )
    sl.set_budget(pipe, **budget)
    taped(pipe)
    right(pipe)
    assert "4 passes" in str(routed.replays) and routed.spending.ratio < 0.9
    routed.gates.records.add(1000 * torch.rand(640), -logits.repeat(10, 1, 1)[..., 0], logits.repeat(10, 1, 1)[..., 1:])
    right(pipe)


def test_four_kinds_of_generations_are_kept(pipe: Any) -> None:
    free(pipe)
    routed = taped(pipe)
    for steps in (2, 3, 4, 5, 6):
        for _ in range(2):
            pictures(pipe, steps=steps)
    assert f"{3 + 4 + 5 + 6} passes recorded, 4 kinds" in str(routed.replays)


@pytest.mark.parametrize("adapter", ["blocks-part-tuned", "blocks-tuned"])
def test_maps_parts_and_deltas_of_single_plans_are_replayed(adapter: str) -> None:
    pipe = embedded.load_few_step("cpu")
    sl.load_adapter(pipe, embedded.FEW_STEP / "adapters" / adapter)

    def draw(seed: int) -> Tensor:
        return pipe(
            "red apple", num_inference_steps=4, guidance_scale=1.0, max_sequence_length=embedded.TEXT_TOKENS,
            generator=torch.Generator().manual_seed(seed), output_type="latent",
        ).images  # fmt: skip

    expected = {}
    for compute in (0.608, 0.808):
        sl.set_budget(pipe, compute=compute)
        expected[compute] = [draw(seed) for seed in (0, 1)]
    routed = taped(pipe)
    for _ in range(3):
        for compute, wanted in expected.items():
            sl.set_budget(pipe, compute=compute)
            for seed in (0, 1):
                assert torch.equal(draw(seed), wanted[seed])
    assert "8 passes recorded, 2 kinds" in str(routed.replays)


def test_off_cuda_it_runs_as_it_is_and_ends_with_what_it_was_made_for(pipe: Any) -> None:
    free(pipe)
    expected = pictures(pipe)
    sl.compile(pipe, backend="eager", cuda_graphs=True)
    routed = routed_of(pipe)
    for _ in range(3):
        torch.testing.assert_close(pictures(pipe), expected)
    assert "CUDA graphs: 0 passes" in sl.summary(pipe)
    sl.compile(pipe, backend="eager")
    assert routed.replays is None


def test_what_is_recorded_outlives_a_detour_through_another_adapter(pipe: Any) -> None:
    routed = free(pipe)
    taped(pipe)
    right(pipe)
    sl.detach(pipe)
    install(pipe, prepare(pipe, sl.RoutingConfig.training_free(compute=0.75, axis="blocks")), {})
    pictures(pipe)
    sl.detach(pipe)
    install(pipe, routed, {})
    routed.enable(True)
    asked = decided(routed)
    right(pipe, times=1)
    assert len(asked) == 4 * len(routed.routed)  # of the one without a recording


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["tokens", "blocks", "dense"])
def test_cuda_graphs_draw_the_same_pictures(pipe: Any, way: str) -> None:
    (kept if way == "tokens" else free)(pipe)
    routed_of(pipe).enable(way != "dense")
    pipe.to("cuda")
    sl.compile(pipe, cuda_graphs=True)
    expected = as_it_is(pipe, 1)
    for _ in range(3):
        torch.testing.assert_close(pictures(pipe, 1), expected, rtol=1e-3, atol=1e-4)
    assert "4 passes" in str(routed_of(pipe).replays)


def test_the_recorder_of_these_tests_computes_nothing_and_refuses_to_wait() -> None:
    x, state = torch.ones(3), torch.zeros(3)

    def add() -> Tensor:
        state.add_(x)
        return state * 2

    output, replay = OperatorRecorder()(add)
    assert torch.equal(state, torch.zeros(3)) and output.isnan().all()
    x.fill_(2.0)
    replay()
    assert torch.equal(state, torch.full((3,), 2.0)) and torch.equal(output, torch.full((3,), 4.0))
    with pytest.raises(RuntimeError):
        OperatorRecorder()(lambda: x.sum().item())


def test_a_budget_of_time_is_settled_before_it_is_replayed(pipe: Any) -> None:
    routed = free(pipe)
    curve = TimeCurve((8, 56), (4.0, 28.0), 40.0, {}, 32)
    slow, fast = (
        LatencyTable(64, 40.0 + never, never, 0.0, 0.0, {"all": curve}, (("all", 0.25),) * 4, 0.01)
        for never in (20.0, 2.0)
    )
    tables = [fast]
    routed.settling.stopwatch = lambda load, measure: tables[-1]
    routed.budget = Budget("speedup", 1.25)
    taped(pipe)
    right(pipe)
    before = routed.spending.ratio
    assert before == 0.75 and "4 passes" in str(routed.replays)
    tables.append(slow)  # calibrated anew: what it comes to has changed
    right(pipe)
    assert routed.spending.ratio == 0.5
