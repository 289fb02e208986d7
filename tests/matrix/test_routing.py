"""DESIGN.md's invariants for every family, through its own pipeline: blocks without training, learned gates and widths, tokens
where they can be routed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from families import FAMILIES, build
from matrix_help import MLPS, NAMES, TOKENS, close, decided, free, gated, widths_of
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec


def test_everything_on_is_the_dense_model_and_detach_leaves_no_trace(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    dense, before = call(pipe, 0, 1), set(pipe.transformer.state_dict())
    free(pipe)
    assert not torch.equal(call(pipe, 0, 1), dense)
    with sl.dense(pipe):
        assert torch.equal(call(pipe, 0, 1), dense)
    sl.set_budget(pipe, compute=1.0)
    assert torch.equal(call(pipe, 0, 1), dense)
    sl.detach(pipe)
    assert torch.equal(call(pipe, 0, 1), dense)
    assert set(pipe.transformer.state_dict()) == before
    assert not [part for part in pipe.transformer.modules() if "forward" in part.__dict__]


@pytest.mark.parametrize("name", MLPS)
def test_open_gates_at_full_width_are_the_dense_model(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    dense = call(pipe, 0, 1)
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))  # a fresh router opens every gate, at full width
    sl.set_budget(pipe, threshold=0.5)
    assert torch.equal(call(pipe, 0, 1), dense)
    assert routed_of(pipe).spending.ratio == 1.0


def test_the_plan_counts_what_torch_counts(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    places = [
        f"{type(pipe.transformer).__name__}.{kind.path}.{index}"
        for kind in find_spec(pipe.transformer).blocks
        for index in range(len(kind.list_in(pipe.transformer, name)))
    ]
    assert len(places) == 4

    def counted() -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(pipe, 0, **call.unguided)
        found = counter.get_flop_counts()
        return sum(sum(found[place].values()) for place in places)

    dense = counted()
    costs = free(pipe).planner
    expected = 6 * costs.dense_flops(call.tokens, call.text_tokens)[0]
    assert dense == pytest.approx(expected, rel=1e-9)
    assert counted() == pytest.approx(0.5 * dense, rel=1e-9)
    assert routed_of(pipe).spending.ratio == pytest.approx(0.5)
    assert routed_of(pipe).shape == (call.tokens, call.text_tokens)


def test_a_batch_is_its_samples(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    free(pipe, 0.6)
    together = call(pipe, 0, 1, 2)
    for sample in range(3):
        close(call(pipe, sample), together[sample : sample + 1])


@pytest.mark.parametrize("cfg_gates", ["cond", "each"])
def test_a_batch_of_samples_that_disagree_is_its_samples(name: str, cfg_gates: Any) -> None:
    pipe, call = build(name), FAMILIES[name]
    routed = gated(pipe, cfg_gates=cfg_gates, widths=widths_of(name))
    seen = decided(routed)
    together = call(pipe, 0, 1, 2)
    actions = {parts.action for _, _, samples in seen for parts in samples}
    assert len(actions) > 1 and any(len(set(samples)) > 1 for _, _, samples in seen)
    for sample in range(3):
        close(call(pipe, sample), together[sample : sample + 1])


def test_a_prompt_does_not_depend_on_the_one_before(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    free(pipe, 0.6)
    alone = call(pipe, 0)
    call(pipe, 1, 2, steps=4)
    assert torch.equal(call(pipe, 0), alone)


def test_an_adapter_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    pipe, call = build(name), FAMILIES[name]
    gated(pipe, widths=widths_of(name))
    routed = call(pipe, 0, 1)
    sl.save_adapter(pipe, tmp_path / "adapter")
    sl.detach(pipe)
    dense = call(pipe, 0, 1)
    pipe.transformer.save_pretrained(tmp_path / "backbone")
    pipe.register_modules(transformer=type(pipe.transformer).from_pretrained(tmp_path / "backbone"))
    assert torch.equal(call(pipe, 0, 1), dense) and not torch.equal(dense, routed)
    sl.load_adapter(pipe, tmp_path / "adapter")
    sl.set_budget(pipe, threshold=0.5)
    assert torch.equal(call(pipe, 0, 1), routed)
    other = build("sana" if name != "sana" else "dit")
    with pytest.raises(sl.AdapterError, match=f"{find_spec(pipe.transformer).name!r} backbone"):
        sl.load_adapter(other, tmp_path / "adapter")


def test_resolutions_and_step_counts_are_free(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    free(pipe, 0.6)
    for steps in (3, 5, 12):
        call(pipe, 0, steps=steps)
        assert 0.3 < routed_of(pipe).spending.ratio <= 0.6
    if "height" in call.shared:
        before = routed_of(pipe).shape
        call(pipe, 0, height=64, width=64)
        assert routed_of(pipe).shape[0] > before[0] and routed_of(pipe).spending.ratio <= 0.6


def test_bf16_runs(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    pipe.to(dtype=torch.bfloat16)
    free(pipe, 0.6)
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in call.arguments.items()}
    low = type(call)(call.build, inputs, call.shared, call.tokens, call.text_tokens)
    assert torch.isfinite(low(pipe, 0, 1).float()).all() and routed_of(pipe).spending.ratio <= 0.6


def test_a_lora_counts_whether_it_comes_before_or_after(name: str) -> None:
    call, pictures = FAMILIES[name], []
    for first in ("lora", "routing"):
        pipe = build(name)
        if not isinstance(pipe.transformer, PeftAdapterMixin):
            pytest.skip(f"diffusers' {type(pipe.transformer).__name__} takes no LoRA")
        if first == "routing":
            free(pipe)
        plain = call(pipe, 0)
        torch.manual_seed(5)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
        if first == "lora":
            free(pipe)
        pictures.append(call(pipe, 0))
        assert not torch.allclose(pictures[-1], plain)
        pipe.transformer.disable_adapters()
        pipe.transformer.enable_adapters()
    assert torch.equal(*pictures)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_kept_as_planned(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    dense = call(pipe, 0, 1)
    torch.manual_seed(3)
    sl.attach(pipe, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    assert torch.equal(call(pipe, 0, 1), dense)
    sl.set_budget(pipe, keep=0.5)
    kept: dict[tuple[int, int], int] = {}
    routed = routed_of(pipe)
    routed.observer = lambda block, x, out, indices, text: kept.update(
        {(routed.context.step, block): x.shape[1] if indices is None else indices.shape[1]}
    )
    together = call(pipe, 0, 1, 2)
    schedule = sl.current_schedule(pipe, 6)
    assert 0 < schedule.mean_keep <= 0.5
    assert all(kept[step, block] == schedule.keep[step][block - 1] for step, block in kept if block)
    for sample in range(3):
        close(call(pipe, sample), together[sample : sample + 1])
    # Without training, with residuals and the keys and values of those that are left out.
    sl.attach(pipe, sl.RoutingConfig.training_free(0.5))
    assert not torch.equal(call(pipe, 0, 1), dense) and sl.current_schedule(pipe, 6).mean_keep <= 0.5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOKENS])
def test_tokens_that_cannot_be_routed_are_refused_with_the_reason(name: str) -> None:
    pipe = build(name)
    reason = find_spec(pipe.transformer).no_tokens
    with pytest.raises(sl.UnsupportedBackboneError, match="tokens of a .* cannot be routed") as caught:
        sl.attach(pipe, sl.RoutingConfig(sl.TokenRouting()))
    assert reason in str(caught.value) and not hasattr(pipe.transformer, "shivelight")


def test_widths_where_there_is_no_mlp_to_narrow_are_refused() -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match="names no MLP that can be narrowed"):
        sl.attach(build("sana"), sl.RoutingConfig(None, sl.BlockRouting()))


def test_each_of_two_transformers_keeps_its_own_residuals_and_the_steps_of_both() -> None:
    pipe, call = build("wan"), FAMILIES["wan"]
    torch.manual_seed(7)
    second = type(pipe.transformer).from_config(pipe.transformer.config).requires_grad_(False).eval()
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.9)
    dense = call(pipe, 0, 1)
    config = sl.RoutingConfig.training_free(compute=0.5, axis="blocks", growth=3.0)
    with pytest.raises(sl.UnsupportedBackboneError, match="two transformers.*pipeline=pipe"):
        sl.attach(pipe, config)
    seen = []
    for part in (pipe.transformer, pipe.transformer_2):
        sl.attach(part, config, pipeline=pipe)
        seen.append(decided(routed_of(part)))
    routed = call(pipe, 0, 1)
    assert not torch.equal(routed, dense)
    steps = [sorted({step for step, _, _ in part}) for part in seen]
    assert steps[0] + steps[1] == list(range(6)) and steps[0] and steps[1]
    ran = [{step for step, _, samples in part if samples[0].action == "run"} for part in seen]
    # One transformer would run at 0, 1 and 3; the second one's first step, 2, runs in any case, and 3 pays for it.
    assert steps[1][0] == 2 and ran == [{0, 1}, {2}]
    assert torch.equal(call(pipe, 0, 1), routed)
    for part in (pipe.transformer, pipe.transformer_2):
        sl.detach(part)
    assert torch.equal(call(pipe, 0, 1), dense)
