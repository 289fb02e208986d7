import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from torch import Tensor, nn

import shivelight as sl
from shivelight.execution.folding import Delta

Sample = Callable[..., Tensor]
PROMPTS = ["a red apple", "an owl"]
TUNED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.3.attn.add_k_proj")


def add_deltas(pipe: StableDiffusion3Pipeline) -> None:
    """DoRA deltas that are strong enough to see, in an attached adapter that has delta settings."""
    generator = torch.Generator().manual_seed(2)
    model = pipe.transformer
    deltas = {}
    for name in TUNED:
        linear = getattr(model.get_submodule(name), "base_layer", model.get_submodule(name))
        rows, columns = linear.weight.shape
        deltas[name] = Delta(
            torch.randn(8, columns, generator=generator),
            torch.randn(rows, 8, generator=generator),
            linear.weight.detach().norm(dim=1) * 1.5,
        )
    model.shivelight.set_deltas(model, deltas)


def tuned(pipe: StableDiffusion3Pipeline, keep: float = 0.5) -> StableDiffusion3Pipeline:
    """Attached with routers and deltas, under a budget."""
    torch.manual_seed(3)
    sl.attach(pipe, sl.RoutingConfig(deltas=sl.DeltaConfig()))
    add_deltas(pipe)
    return sl.set_budget(pipe, keep=keep)


def lora_weights(rank: int = 2) -> dict[str, Tensor]:
    """A LoRA as its author's file holds it, on layers with and without a delta of ours."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for block in (0, 1, 2):
        for layer in ("to_q", "to_v", "to_out.0"):
            for part, shape in (("lora_A", (rank, 32)), ("lora_B", (32, rank))):
                weights[f"transformer.transformer_blocks.{block}.attn.{layer}.{part}.weight"] = torch.randn(
                    shape, generator=generator
                )
    return weights


# attach, detach, dense


def test_attaching_returns_the_model_and_says_what_it_added(pipe: StableDiffusion3Pipeline) -> None:
    assert sl.attach(pipe) is pipe and sl.detach(pipe) is pipe
    assert sl.attach(pipe.transformer) is pipe.transformer
    routed = pipe.transformer.shivelight
    assert routed.routed == (1, 2, 3) and sorted(routed.router.pairs) == ["1_2", "3"]
    # No name that a LoRA's usual targets would match.
    assert not [
        n for n, _ in routed.named_modules() if n.endswith(("to_q", "to_k", "to_v", "proj", "net.2", "linear_1"))
    ]


def test_attaching_again_replaces_and_detaching_again_is_harmless(
    pipe: StableDiffusion3Pipeline, sample: Sample
) -> None:
    expected = sample(pipe, PROMPTS)
    sl.attach(pipe)
    first = pipe.transformer.shivelight
    sl.set_budget(pipe, keep=0.5)
    sl.attach(pipe, sl.RoutingConfig(tokens=sl.TokenRouting(scores="norm")))
    assert pipe.transformer.shivelight is not first and pipe.transformer.shivelight.budget.everything
    assert torch.equal(sample(pipe, PROMPTS), expected)
    assert len(pipe.transformer._diffusers_hook.hooks) == 1
    for _ in range(2):
        sl.detach(pipe)
        assert torch.equal(sample(pipe, PROMPTS), expected)


def test_attaching_over_folded_deltas_starts_from_the_backbones_own_weights(
    pipe: StableDiffusion3Pipeline, sample: Sample
) -> None:
    expected = sample(pipe, PROMPTS)
    tuned(pipe)
    sl.attach(pipe)
    assert torch.equal(sample(pipe, PROMPTS), expected)


def test_detaching_leaves_other_hooks_in_place(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
            Count.calls += 1
            return args, kwargs

    block = pipe.transformer.transformer_blocks[1]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Count(), "count")
    sl.attach(pipe)
    sl.detach(pipe)
    sample(pipe, PROMPTS, steps=2)
    assert Count.calls == 2 and list(block._diffusers_hook.hooks) == ["count"]


def test_a_compiled_wrapper_is_seen_through(pipe: StableDiffusion3Pipeline) -> None:
    model = pipe.transformer
    sl.attach(torch.compile(model))
    assert hasattr(model, "shivelight")
    pipe.transformer = torch.compile(model)
    assert "1 to 3" in sl.summary(pipe)
    sl.detach(pipe)
    assert not hasattr(model, "shivelight")


def test_deltas_are_off_in_dense_and_gone_after_detach(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    expected = sample(pipe, PROMPTS)
    tuned(pipe, keep=1.0)
    folded = sample(pipe, PROMPTS)
    assert not torch.allclose(folded, expected, atol=1e-2)
    with sl.dense(pipe):
        assert torch.equal(sample(pipe, PROMPTS), expected)
    assert torch.equal(sample(pipe, PROMPTS), folded)
    sl.detach(pipe)
    assert torch.equal(sample(pipe, PROMPTS), expected)


def test_deltas_alone_are_the_fine_tuned_baseline(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    sl.attach(pipe, sl.RoutingConfig(tokens=None, deltas=sl.DeltaConfig()))
    dense = sample(pipe, PROMPTS)
    add_deltas(pipe)
    assert not torch.allclose(sample(pipe, PROMPTS), dense, atol=1e-2)
    assert sl.planned_ratio(pipe) == 1.0 and "no routing" in sl.summary(pipe)
    sl.set_budget(pipe, keep=1.0)
    with pytest.raises(sl.BudgetError, match="always runs everything") as caught:
        sl.set_budget(pipe, keep=0.5)
    assert caught.value.nearest == 1.0
    with pytest.raises(sl.BudgetError, match="no schedule"):
        sl.current_schedule(pipe)


def test_a_routed_backbone_is_not_deep_copied(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    tuned(pipe)
    for thing in (pipe, pipe.transformer):
        with pytest.raises(sl.ShivelightError, match="cannot be deep-copied.*detach"):
            copy.deepcopy(thing)
    expected = sample(pipe, PROMPTS)
    with sl.dense(pipe):
        dense = sample(pipe, PROMPTS)
    sl.detach(pipe)
    twin = copy.deepcopy(pipe.transformer)
    tuned(pipe)
    assert torch.equal(sample(pipe, PROMPTS), expected)
    pipe.transformer = twin
    assert torch.equal(sample(pipe, PROMPTS), dense)


def test_a_deep_copy_of_someone_elses_hooked_model_is_refused(pipe: StableDiffusion3Pipeline) -> None:
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(ModelHook(), "theirs")
    twin = copy.deepcopy(pipe.transformer)
    sl.detach(sl.attach(pipe.transformer))  # the original is fine
    with pytest.raises(sl.UnsupportedBackboneError, match="deep copy of a hooked one"):
        sl.attach(twin)


@pytest.mark.parametrize(
    "verb",
    [
        lambda pipe: sl.set_budget(pipe, keep=0.5), sl.summary, sl.current_schedule, sl.planned_ratio,
        lambda pipe: sl.dense(pipe).__enter__(), lambda pipe: sl.branch(pipe, "both").__enter__(),
        lambda pipe: sl.save_adapter(pipe, "/nowhere"),
    ],
)  # fmt: skip
def test_verbs_on_a_bare_model_say_to_attach(pipe: StableDiffusion3Pipeline, verb: Callable) -> None:
    with pytest.raises(sl.AdapterError, match="Nothing is attached to this SD3Transformer2DModel.*attach"):
        verb(pipe)


# budgets, schedules, summaries


@pytest.mark.parametrize("kind", ["keep", "compute"])
@pytest.mark.parametrize("value", [0, 0.0, 1.1, -0.5, math.nan, math.inf, "0.5"])
def test_a_bad_budget_is_refused_and_the_old_one_stays(
    pipe: StableDiffusion3Pipeline, kind: str, value: object
) -> None:
    sl.set_budget(sl.attach(pipe), keep=0.5)
    with pytest.raises(sl.BudgetError, match=rf"{kind} is {value!r}.*\(0, 1\]"):
        sl.set_budget(pipe, **{kind: value})
    assert (pipe.transformer.shivelight.budget.kind, pipe.transformer.shivelight.budget.value) == ("keep", 0.5)


@pytest.mark.parametrize("both", [{}, {"keep": 0.5, "compute": 0.5}])
def test_exactly_one_budget_is_given(pipe: StableDiffusion3Pipeline, both: dict[str, float]) -> None:
    with pytest.raises(sl.BudgetError, match="exactly one"):
        sl.set_budget(sl.attach(pipe), **both)


@pytest.mark.parametrize("kind", ["keep", "compute"])
def test_an_unreachable_budget_says_the_nearest_which_then_works(
    pipe: StableDiffusion3Pipeline, sample: Sample, kind: str
) -> None:
    sl.attach(pipe)
    sample(pipe, PROMPTS, steps=1)
    with pytest.raises(sl.BudgetError, match="cannot be reached.*nearest") as caught:
        sl.set_budget(pipe, **{kind: 0.001})
    assert caught.value.nearest is not None and pipe.transformer.shivelight.budget.everything
    sl.set_budget(pipe, **{kind: caught.value.nearest})
    sample(pipe, PROMPTS, steps=2)
    assert (
        sl.planned_ratio(pipe) <= caught.value.nearest if kind == "compute" else sl.current_schedule(pipe).total == 12
    )
    assert set(sum(sl.current_schedule(pipe).keep, ())) <= {2, 4, 6}  # in units of 2 of 64 tokens


def test_a_budget_can_be_changed_at_any_time(pipe: StableDiffusion3Pipeline, sample: Sample) -> None:
    sl.attach(pipe)
    results = {keep: sample(pipe, PROMPTS) for keep in (1.0, 0.8, 0.5) if sl.set_budget(pipe, keep=keep)}
    for keep in (0.5, 1.0, 0.8):
        sl.set_budget(pipe, keep=keep)
        assert torch.equal(sample(pipe, PROMPTS), results[keep])
    assert not torch.equal(results[0.8], results[0.5])


def test_the_schedule_and_the_summary_of_a_pipeline_and_of_a_bare_transformer(pipe: StableDiffusion3Pipeline) -> None:
    sl.set_budget(sl.attach(pipe), keep=0.5)
    assert sl.current_schedule(pipe, 7).steps == 7 and sl.current_schedule(pipe).steps == 1000
    text = sl.summary(pipe)
    for part in ("SD3Transformer2DModel", "routed blocks: 1 to 3", "keep = 0.5", "mean keep 0.5000", "64 image"):
        assert part in text
    own = sum(p.numel() for p in pipe.transformer.shivelight.parameters())
    assert f"{own / 1e6:.3f} M parameters" in text
    sl.attach(pipe.transformer)
    with pytest.raises(sl.BudgetError, match="bare transformer has no sampling steps"):
        sl.current_schedule(pipe.transformer, 7)


def test_looking_at_a_schedule_does_not_move_the_pipelines_scheduler(pipe: StableDiffusion3Pipeline) -> None:
    sl.set_budget(sl.attach(pipe), keep=0.5)
    before = pipe.scheduler.timesteps
    sl.current_schedule(pipe, 7)
    assert pipe.scheduler.timesteps is before and not hasattr(pipe.scheduler, "num_inference_steps")


# other people's weights


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_works_whenever_it_is_loaded(pipe: StableDiffusion3Pipeline, sample: Sample, when: str) -> None:
    plain = sample(pipe, PROMPTS)
    tuned(pipe)
    ours = sample(pipe, PROMPTS)
    sl.detach(pipe)
    pipe.load_lora_weights(lora_weights(), adapter_name="style")
    theirs = sample(pipe, PROMPTS)
    assert not torch.allclose(theirs, plain, atol=1e-2)

    if when == "after":
        pipe.unload_lora_weights()
        tuned(pipe)
        pipe.load_lora_weights(lora_weights(), adapter_name="style")
    else:
        sl.attach(pipe)
        assert torch.equal(sample(pipe, PROMPTS), theirs)
        tuned(pipe)
    both = sample(pipe, PROMPTS)
    assert not torch.allclose(both, ours, atol=1e-2) and not torch.allclose(both, theirs, atol=1e-2)
    with sl.dense(pipe):
        assert torch.equal(sample(pipe, PROMPTS), theirs)
    # Whatever the order, the same result, and each can be taken off by itself.
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe, PROMPTS), ours)
    pipe.load_lora_weights(lora_weights(), adapter_name="style")
    assert torch.equal(sample(pipe, PROMPTS), both)
    sl.detach(pipe)
    assert torch.equal(sample(pipe, PROMPTS), theirs)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe, PROMPTS), plain)


def test_an_adapter_of_peft_added_by_hand_leaves_the_dense_model_exact(
    pipe: StableDiffusion3Pipeline, sample: Sample
) -> None:
    expected = sample(pipe, PROMPTS)
    tuned(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.0.proj"]))  # B starts at zero
    with sl.dense(pipe):
        torch.testing.assert_close(sample(pipe, PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_saving_the_pipeline_writes_the_backbones_own_weights(
    pipe: StableDiffusion3Pipeline, sample: Sample, tmp_path: Path
) -> None:
    expected, state = sample(pipe, PROMPTS), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    tuned(pipe)
    routed = sample(pipe, PROMPTS)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(sample(pipe, PROMPTS), routed)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    found = loaded.transformer.state_dict()
    assert set(found) == set(state) and all(torch.equal(found[key], state[key]) for key in state)
    assert torch.equal(sample(loaded, PROMPTS), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_dense_state_dict_loads_into_an_attached_model(
    pipe: StableDiffusion3Pipeline, sample: Sample, nested: bool
) -> None:
    other = {k: v + 0.05 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
             if v.is_floating_point() else v for k, v in pipe.transformer.state_dict().items()}  # fmt: skip
    twin = StableDiffusion3Pipeline(**(dict(pipe.components) | {"transformer": copy.deepcopy(pipe.transformer)}))
    twin.set_progress_bar_config(disable=True)
    twin.transformer.load_state_dict(other)
    expected = sample(twin, PROMPTS)

    tuned(pipe)
    if nested:  # as in a wrapper such as DistributedDataParallel
        nn.ModuleDict({"module": pipe.transformer}).load_state_dict({f"module.{k}": v for k, v in other.items()})
    else:
        pipe.transformer.load_state_dict(other)
    with sl.dense(pipe):
        assert torch.equal(sample(pipe, PROMPTS), expected)
    # The deltas are folded into the new weights.
    name = TUNED[0]
    delta = pipe.transformer.shivelight.deltas[name]
    assert torch.equal(pipe.transformer.get_submodule(name).weight, delta.fold(other[f"{name}.weight"], 1.0))
    sl.detach(pipe)
    assert torch.equal(sample(pipe, PROMPTS), expected)
    with pytest.raises(RuntimeError, match="pos_embed"):
        sl.attach(pipe).transformer.load_state_dict({k: v for k, v in other.items() if "pos_embed" not in k})


def test_a_models_own_state_dict_keeps_its_keys_and_weights(pipe: StableDiffusion3Pipeline) -> None:
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    tuned(pipe)
    for state in (pipe.transformer.state_dict(), nn.ModuleDict({"m": pipe.transformer}).state_dict(prefix="")):
        state = {key.removeprefix("m."): value for key, value in state.items()}
        assert list(state) == list(before) and all(torch.equal(state[key], before[key]) for key in before)


# dtypes and training mode


@pytest.mark.parametrize("order", ["cast first", "attach first"])
def test_a_pipeline_in_bf16_is_routed_in_bf16(
    pipe: StableDiffusion3Pipeline, sample: Sample, tmp_path: Path, order: str
) -> None:
    mine = StableDiffusion3Pipeline(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    mine.set_progress_bar_config(disable=True)
    if order == "cast first":
        mine.to(torch.bfloat16)
    tuned(mine)
    if order == "attach first":
        mine.to(torch.bfloat16)
    assert {p.dtype for p in mine.transformer.parameters()} == {torch.bfloat16}
    assert bool(sample(mine, PROMPTS).isfinite().all())
    mine.transformer.save_pretrained(tmp_path)
    assert {v.dtype for v in mine.transformer.state_dict().values()} == {torch.bfloat16}
    with sl.dense(mine):
        dense = sample(mine, PROMPTS)
    sl.detach(mine)
    assert torch.equal(sample(mine, PROMPTS), dense)


def test_gradient_checkpointing_changes_no_gradient(pipe: StableDiffusion3Pipeline) -> None:
    model = pipe.transformer
    sl.set_budget(sl.attach(model), keep=0.5)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 4, 16, 16, generator=generator)
    text, pooled = torch.randn(3, 7, 32, generator=generator), torch.randn(3, 32, generator=generator)
    model.train()
    blocks_run: list[int] = []
    for index, block in enumerate(model.transformer_blocks):
        block.norm1.register_forward_pre_hook(lambda *_, index=index: blocks_run.append(index))

    def gradients(times: list[float]) -> tuple[Tensor, Tensor]:
        start = image.clone().requires_grad_()
        out = model(start, text, pooled, torch.tensor(times), return_dict=False)[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), start)
        return out.detach(), gradient

    for times in ([500.0] * 3, [900.0, 40.0, 500.0]):
        blocks_run.clear()
        model.disable_gradient_checkpointing()
        expected = gradients(times)
        before = len(blocks_run)
        blocks_run.clear()
        model.enable_gradient_checkpointing()
        found = gradients(times)
        assert [*dict.fromkeys(blocks_run)] == [0, 1, 2, 3] and len(blocks_run) == 2 * before
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
