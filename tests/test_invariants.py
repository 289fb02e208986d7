"""DESIGN.md's invariants 1 to 6, each by its own name, through diffusers' own pipelines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from tiny import rows, tiny_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.cost import step_flops
from shivelight.routing import count_unit

PROMPTS = ["a red apple", "blue bird", "an owl on stripes"]
TOKENS, TEXT_TOKENS = 64, 32
Sample = Callable[..., Tensor]


def shape_policy(model: Any, spread: float = 0.3) -> Any:
    """Make a fresh adapter's schedule uneven, as training does."""
    policy = getattr(model, "transformer", model).shivelight.policy
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (policy.time_out, policy.layer_out):
            part.copy_(spread * torch.randn(part.shape, generator=generator))
    return model


def route(model: Any, keep: float = 0.5, **options: Any) -> Any:
    torch.manual_seed(3)
    sl.attach(model, sl.RoutingConfig(tokens=sl.TokenRouting(**options)))
    return sl.set_budget(shape_policy(model), keep=keep)


def run(model: SD3Transformer2DModel, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def traces(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that an attach might leave on any submodule: instance attributes, hooks, keys."""
    found = {}
    for name, module in model.named_modules():
        found[name] = {
            key: list(value) if isinstance(value, dict | set) else value
            for key, value in module.__dict__.items()
            if key != "_backward_hooks"
        }
    return found


# 1. Keep 1.0, deltas off or fresh: bit-identical to the dense model; detach restores it exactly.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deltas", [None, sl.DeltaConfig()])
@pytest.mark.parametrize("bare", [False, True])
def test_1_a_fresh_adapter_is_bit_identical(
    pipe: StableDiffusion3Pipeline, sample: Sample, bare: bool, deltas: sl.DeltaConfig | None, dtype: torch.dtype
) -> None:
    pipe.transformer.to(dtype)
    pipe.text_encoder.to(torch.float32)
    call = {name: value.to(dtype) for name, value in tiny_inputs(2, [900.0, 30.0]).items()}
    expected, expected_bare = sample(pipe, PROMPTS[:2]) if dtype == torch.float32 else None, run(pipe.transformer, call)
    sl.attach(pipe.transformer if bare else pipe, sl.RoutingConfig(deltas=deltas))
    assert torch.equal(run(pipe.transformer, call), expected_bare)
    sl.set_budget(pipe, keep=1.0)
    assert torch.equal(run(pipe.transformer, call), expected_bare)
    sl.set_budget(pipe, compute=1.0)
    assert torch.equal(run(pipe.transformer, call), expected_bare)
    if expected is not None:
        assert torch.equal(sample(pipe, PROMPTS[:2]), expected)


@pytest.mark.parametrize("deltas", [None, sl.DeltaConfig()])
def test_1_detach_restores_everything(
    pipe: StableDiffusion3Pipeline, sample: Sample, deltas: sl.DeltaConfig | None
) -> None:
    model = pipe.transformer
    expected, before, state = sample(pipe, PROMPTS[:1]), traces(model), model.state_dict()
    sl.attach(pipe, sl.RoutingConfig(deltas=deltas))
    assert "shivelight" in dict(model.named_children()) and "_reset_stateful_cache" in model.__dict__
    sl.set_budget(shape_policy(pipe), keep=0.4)
    assert not torch.equal(sample(pipe, PROMPTS[:1]), expected)
    sl.detach(pipe)
    assert traces(model) == before
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(sample(pipe, PROMPTS[:1]), expected)


def test_1_dense_is_exact_inside_and_gone_after(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    expected = sample(pipe, PROMPTS)
    route(pipe)
    routed = sample(pipe, PROMPTS)
    with sl.dense(pipe):
        assert torch.equal(sample(pipe, PROMPTS), expected)
    with pytest.raises(KeyboardInterrupt), sl.dense(pipe):
        raise KeyboardInterrupt
    assert torch.equal(sample(pipe, PROMPTS), routed) and not torch.equal(routed, expected)


# 2. Train-mode selection with noise off equals inference selection, bit for bit.


@dataclass
class PlainSession:
    """Trains nothing: ranks the scores as they are, changes neither input nor output, notes what was kept."""

    counts: dict[int, tuple[int, ...]]
    kept: dict[int, Tensor]

    def decide(self, block: int, scores: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return scores, self.counts[block]

    def drift(self, block: int) -> None:
        return None

    def residuals(self, block: int, x: Tensor) -> None:
        return None

    def enter(self, block: int, x: Tensor, kept: Tensor) -> Tensor:
        self.kept[block] = kept
        return x

    def leave(self, block: int, x: Tensor, out: Tensor, kept: Tensor) -> Tensor:
        return out


@pytest.mark.parametrize("times", [[600.0] * 3, [980.0, 20.0, 500.0], [980.0, 20.0, 980.0]])
@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_2_train_mode_selects_what_inference_selects(
    pipe: StableDiffusion3Pipeline, keep: float, times: list[float]
) -> None:
    model = route(pipe.transformer, keep=keep)
    routed, call, chosen = model.shivelight, tiny_inputs(3, times), {}
    routed.observer = lambda block, x, out, kept, text: chosen.__setitem__(block, kept)
    expected = run(model, call)
    table = sl.current_schedule(model)
    counts = {
        block: tuple(table.row(round(time) - 1)[place] for time in times) for place, block in enumerate(routed.routed)
    }
    routed.session = session = PlainSession(counts, {})
    model.train()
    # With gradients on, as in training: nothing of the forward value may depend on that.
    trained = model(**call, return_dict=False)[0]
    assert torch.equal(trained.detach(), expected)
    for block in routed.routed:
        assert session.kept[block].sum(1).tolist() == list(counts[block])
        if len(set(times)) == 1 and chosen[block] is not None:
            mask = torch.zeros(3, TOKENS, dtype=torch.bool).scatter_(1, chosen[block], True)
            assert torch.equal(session.kept[block], mask)


def test_2_the_trainers_session_without_noise_selects_what_inference_selects(pipe: StableDiffusion3Pipeline) -> None:
    from shivelight.training.session import TeacherRecord, TokenSession

    model, call = route(pipe.transformer), tiny_inputs(2, [980.0, 20.0])
    routed = model.shivelight
    expected = run(model, call)
    table = sl.current_schedule(model)
    routed.observer = record = TeacherRecord(features_at=())
    with sl.dense(model):
        run(model, call)
    routed.observer = None
    for estimator in ("input", "residual"):
        ratios = torch.tensor([table.row(979), table.row(19)]) / TOKENS
        routed.session = TokenSession(routed.routed, ratios, record, estimator=estimator)
        assert torch.equal(model(**call, return_dict=False)[0].detach(), expected), estimator


# 3. B samples in one batch equal B batches of one; batched guidance equals split guidance.


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"cfg_scores": "max"}, {"scores": "norm"}, {"scores": "random"}, {"ratios": "policy", "share": 1}],
)
def test_3_a_batch_of_three_is_three_batches_of_one(
    pipe: StableDiffusion3Pipeline, sample: Sample, options: dict[str, Any], guidance: float
) -> None:
    route(pipe, **options)
    together = sample(pipe, PROMPTS, guidance_scale=guidance)
    for place, prompt in enumerate(PROMPTS):
        alone = sample(pipe, [prompt], first_seed=place, guidance_scale=guidance)
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_3_skip_layer_guidance_pairs_nothing_that_is_not_a_pair(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    route(pipe)
    options = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    routed, seen = pipe.transformer.shivelight, []

    def note(block: int, x: Tensor, out: Tensor, kept: Tensor, text: Any) -> None:
        seen.append((routed.context.step, routed.context.branch, block, kept.shape))

    routed.observer = note
    together = sample(pipe, PROMPTS, **options)
    rows_of = sl.current_schedule(pipe).keep
    expected = []
    for step in range(4):
        expected += [(step, "both", block, (6, rows_of[step][block - 1])) for block in (1, 2, 3)]
        if step in (1, 2, 3):
            expected += [(step, "single", block, (3, rows_of[step][block - 1])) for block in (1, 3)]
    assert seen == expected
    routed.observer = None
    for place, prompt in enumerate(PROMPTS):
        alone = sample(pipe, [prompt], first_seed=place, **options)
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, sample(pipe, PROMPTS), atol=1e-3)


@pytest.mark.parametrize("times", [[600.0] * 3, [980.0, 20.0, 500.0]])
def test_3_batched_guidance_is_split_guidance(pipe: StableDiffusion3Pipeline, times: list[float]) -> None:
    model, call = route(pipe.transformer), tiny_inputs(6, times * 2)
    with sl.branch(model, "both"):
        batched = run(model, call)
    with sl.branch(model, "cond"):
        cond = run(model, rows(call, 3, 4, 5))
    with sl.branch(model, "uncond"):
        uncond = run(model, rows(call, 0, 1, 2))
    torch.testing.assert_close(batched, torch.cat([uncond, cond]), rtol=1e-4, atol=1e-5)
    # The unconditional half would have chosen otherwise.
    assert not torch.allclose(run(model, rows(call, 0, 1, 2)), uncond, atol=1e-3)


def test_3_a_bare_batch_is_independent_samples_at_any_timesteps(pipe: StableDiffusion3Pipeline) -> None:
    model, call = route(pipe.transformer), tiny_inputs(4, [980.0, 20.0, 500.0, 20.0])
    together = run(model, call)
    for place in range(4):
        torch.testing.assert_close(together[[place]], run(model, rows(call, place)), rtol=1e-4, atol=1e-5)


# 4. Prompt 2 does not depend on prompt 1, nor on an interrupted generation before it. Same seed, same image.


class Interrupted(Exception):
    pass


def interrupt(pipe: StableDiffusion3Pipeline, step: int, time: Tensor, tensors: dict) -> dict:
    if step == 1:
        raise Interrupted
    return tensors


def stop_quietly(pipe: StableDiffusion3Pipeline, step: int, time: Tensor, tensors: dict) -> dict:
    pipe._interrupt = step >= 1
    return tensors


@pytest.mark.parametrize("options", [{}, {"scores": "random"}, {"cfg_scores": "max"}])
def test_4_a_generation_does_not_depend_on_what_ran_before(
    pipe: StableDiffusion3Pipeline, sample: Sample, options: dict[str, Any]
) -> None:
    route(pipe, **options)
    fresh = sample(pipe, ["owl"], steps=3, first_seed=7)
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)
    sample(pipe, PROMPTS, steps=5, guidance_scale=1.0)
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)
    sample(pipe, ["cat"], steps=3, height=16, width=24)
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)
    with pytest.raises(Interrupted):
        sample(pipe, ["cat"], steps=5, callback_on_step_end=interrupt)
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)
    sample(pipe, ["cat"], steps=5, callback_on_step_end=stop_quietly)
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)
    run(pipe.transformer, tiny_inputs(2, [10.0, 900.0]))
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)
    sl.detach(pipe)
    route(pipe, **options)
    assert torch.equal(sample(pipe, ["owl"], steps=3, first_seed=7), fresh)


def test_4_a_bare_call_after_a_generation_is_nobodys_step(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    route(pipe)
    call = tiny_inputs(3, [10.0, 900.0, 500.0])
    expected = run(pipe.transformer, call)
    sample(pipe, ["cat"])
    assert torch.equal(run(pipe.transformer, call), expected)
    sample(pipe, ["cat"], callback_on_step_end=stop_quietly)
    assert torch.equal(run(pipe.transformer, call), expected)


# 5. The schedule's cost never exceeds the budget and is at most one rounding unit below it; known before sampling.


def followed(pipe: Any, generate: Callable[[], object]) -> list[list[int]]:
    """What a generation really kept: one row for each call of the backbone."""
    routed, seen = pipe.transformer.shivelight, []

    def note(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
        if block == routed.routed[0]:
            seen.append([])
        seen[-1].append(x.shape[1] if kept is None else kept.shape[1])

    routed.observer = note
    generate()
    routed.observer = None
    return seen


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.613, 0.5, 0.1, 2 / 64])
def test_5_a_keep_budget_is_met_from_below_and_known_before(
    pipe: StableDiffusion3Pipeline, sample: Sample, keep: float
) -> None:
    route(pipe, keep=keep)
    for steps in (1, 3, 10):
        planned = sl.current_schedule(pipe, steps)
        entries = TOKENS * steps * 3
        unit = count_unit(TOKENS, 8)
        assert keep * entries - unit < planned.total <= keep * entries + 1e-6
        assert all(k % unit == 0 for row in planned.keep for k in row)
        assert followed(pipe, lambda steps=steps: sample(pipe, ["cat"], steps=steps)) == [
            list(row) for row in planned.keep
        ]
        assert sl.current_schedule(pipe) == planned


@pytest.mark.parametrize("compute", [1.0, 0.9, 0.613, 0.5])
def test_5_a_compute_budget_is_met_from_below_and_known_before(
    pipe: StableDiffusion3Pipeline, sample: Sample, compute: float
) -> None:
    route(pipe)
    sample(pipe, ["cat"], steps=1)  # from here on the length of the text is known
    sl.set_budget(pipe, compute=compute)
    costs = pipe.transformer.shivelight.planner.costs
    for steps in (1, 3, 10):
        planned, ratio = sl.current_schedule(pipe, steps), sl.planned_ratio(pipe, steps)
        dense = step_flops(costs, [TOKENS] * 4, TEXT_TOKENS) * steps
        unit = max(c.flops(TOKENS, TEXT_TOKENS) - c.flops(TOKENS - 1, TEXT_TOKENS) for c in costs)
        assert compute - unit / dense < ratio <= compute
        assert followed(pipe, lambda steps=steps: sample(pipe, ["cat"], steps=steps)) == [
            list(row) for row in planned.keep
        ]


@pytest.mark.parametrize("budget", [{"keep": 1.0}, {"keep": 0.6}, {"compute": 0.55}])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_5_the_flops_that_torch_counts_are_the_plan(
    pipe: StableDiffusion3Pipeline, sample: Sample, budget: dict[str, float], guidance: float
) -> None:
    route(pipe)
    sample(pipe, ["cat"], steps=1)
    sl.set_budget(pipe, **budget)
    costs, steps, passes = pipe.transformer.shivelight.planner.costs, 3, 2 if guidance > 1 else 1
    dense = step_flops(costs, [TOKENS] * 4, TEXT_TOKENS) * steps * passes * 2
    planned = round(sl.planned_ratio(pipe, steps) * dense)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # only the plain implementation's products are counted on a CPU
        sample(pipe, ["cat", "dog"], steps=steps, guidance_scale=guidance)
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    blocks = sum(counts[f"SD3Transformer2DModel.transformer_blocks.{i}"] for i in range(4))
    # The routers run inside the blocks' hooks; the plan leaves them out.
    parts = ("from_tokens", "from_time", "from_condition")
    routers = sum(n for name, n in counts.items() if name.endswith(parts))
    assert (routers > 0) == (budget != {"keep": 1.0})
    assert blocks - routers == planned


def test_5_heun_follows_one_schedule_over_all_its_calls(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    route(pipe)
    planned = sl.current_schedule(pipe, 3)
    assert planned.steps == 5 and len(set(planned.keep)) > 1
    assert followed(pipe, lambda: sample(pipe, ["cat"], steps=3)) == [list(row) for row in planned.keep]
    assert 0.5 * TOKENS * 15 - count_unit(TOKENS, 8) < planned.total <= 0.5 * TOKENS * 15


def test_5_image_to_image_starts_its_schedule_at_the_begin_index(pipe: StableDiffusion3Pipeline) -> None:
    edit = StableDiffusion3Img2ImgPipeline(**pipe.components)
    edit.set_progress_bar_config(disable=True)
    route(edit)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def generate() -> Tensor:
        return edit(
            "cat", image=picture, strength=0.6, num_inference_steps=5, max_sequence_length=16, output_type="latent",
            generator=torch.Generator().manual_seed(0), height=32, width=32,
        ).images  # fmt: skip

    rows_ = followed(edit, generate)
    planned = sl.current_schedule(edit)
    assert planned.steps == 3 and rows_ == [list(row) for row in planned.keep]
    assert 0.5 * TOKENS * 9 - 1 < sum(map(sum, rows_)) <= 0.5 * TOKENS * 9
    assert torch.equal(generate(), generate())


# 6. Attaching to something we do not know raises an error that names the class and says what to do.


def test_6_an_unknown_backbone_is_refused_by_name() -> None:
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4,), norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    before = traces(unet)
    for verb in (sl.attach, lambda model: sl.load_adapter(model, "/nowhere")):
        with pytest.raises(sl.ShivelightError) as caught:
            verb(unet)
        assert traces(unet) == before
    with pytest.raises(sl.UnsupportedBackboneError) as caught:
        sl.attach(unet)
    assert "UNet2DModel" in str(caught.value) and "register_backbone" in str(caught.value)


def test_6_nothing_ever_attaches_to_zero_blocks() -> None:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    with pytest.raises(sl.UnsupportedBackboneError, match="none to route"):
        sl.attach(model)
