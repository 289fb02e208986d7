from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny import rows, tiny_inputs
from torch import Tensor

import shivelight as sl
from shivelight.backbones import flux2, qwen_image, sd3
from shivelight.execution.call import BlockCall

Seen = list[tuple[int, Tensor, Tensor, Tensor | None]]
TOKENS = 64


def routed_model(pipe: StableDiffusion3Pipeline, keep: float = 0.5, **options: object) -> SD3Transformer2DModel:
    """The bare transformer, with a policy that is not flat."""
    torch.manual_seed(1)
    model = sl.attach(pipe.transformer, sl.RoutingConfig(tokens=sl.TokenRouting(**options)))  # type: ignore[arg-type]
    policy = model.shivelight.policy
    if policy is not None:
        with torch.no_grad():
            policy.time_out.normal_(std=0.3)
            policy.layer_out.normal_(std=0.3)
    return sl.set_budget(model, keep=keep)


@contextmanager
def watched(model: SD3Transformer2DModel) -> Iterator[Seen]:
    seen: Seen = []
    model.shivelight.observer = lambda *what: seen.append(what[:4])
    with torch.no_grad():
        yield seen
    model.shivelight.observer = None


def run(model: SD3Transformer2DModel, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def test_a_block_call_is_read_by_name_however_it_is_passed() -> None:
    image, text, temb = torch.randn(1, 4, 2), torch.randn(1, 3, 2), torch.randn(1, 2)
    for call in (
        BlockCall(sd3.SPEC.blocks[0], (image, text, temb, None), {}),
        BlockCall(sd3.SPEC.blocks[0], (image,), {"temb": temb, "encoder_hidden_states": text}),
    ):
        assert call.image is image and call.text is text and call.arguments["temb"] is temb
        moved = call.on_tokens(image, torch.tensor([[3, 1]]))
        assert torch.equal(moved["hidden_states"], image[:, [3, 1]]) and moved["encoder_hidden_states"] is text
        assert call.image is image
    assert BlockCall(sd3.SPEC.blocks[0], (image,), {"encoder_hidden_states": None}).text is None
    assert call.split((None, image)) == (image, None) and call.join(image, None) == (None, image)
    assert call.split((text, image)) == (image, text) and call.join(image, text) == (text, image)


def test_a_joined_stream_is_taken_apart_and_put_together_without_needless_copies() -> None:
    kind, stream = flux2.SPEC.blocks[1], torch.randn(2, 7, 3)
    call = BlockCall(
        kind, (), {"hidden_states": stream, "encoder_hidden_states": None, "temb_mod": None}, text_tokens=3
    )
    assert torch.equal(call.text, stream[:, :3]) and torch.equal(call.image, stream[:, 3:]) and call.text_tokens == 3
    assert call.join(call.image, call.text) is stream and call.on_tokens(call.image, None)["hidden_states"] is stream
    indices = torch.tensor([[2, 0], [1, 3]])
    kept = call.on_tokens(call.image, indices)["hidden_states"]
    assert torch.equal(kept[1], stream[1, [0, 1, 2, 4, 6]])
    out = kept + 1
    image, text = call.split(out)
    assert torch.equal(image, out[:, 3:]) and torch.equal(text, out[:, :3]) and call.join(image, text) is out
    assert torch.equal(call.join(image * 2, text), torch.cat([out[:, :3], out[:, 3:] * 2], dim=1))
    other = call.of_samples(torch.tensor([1]), runs=False)
    assert torch.equal(other.image, stream[1:, 3:]) and torch.equal(other.text, stream[1:, :3])


def test_what_is_stacked_or_as_long_as_the_text_follows_samples_and_tokens() -> None:
    kind = qwen_image.SPEC.blocks[0]
    image, mask, temb = torch.randn(2, 6, 3), torch.tensor([[True, False], [True, True]]), torch.arange(8.0).view(4, 2)
    index = torch.arange(12).view(2, 6)
    call = BlockCall(kind, (image, torch.randn(2, 2, 3), mask, temb), {"modulate_index": index})
    kept = call.on_tokens(image, torch.tensor([[5, 0], [1, 2]]), attends_all=True)
    assert kept["modulate_index"].tolist() == [[5, 0], [7, 8]]
    assert kept["encoder_hidden_states_mask"].tolist() == [[True, False, *[True] * 4], [True] * 6]
    assert call.on_tokens(image, torch.tensor([[5], [1]]))["encoder_hidden_states_mask"] is mask
    second = call.of_samples(torch.tensor([1]), runs=True).arguments
    assert second["temb"].tolist() == [[2.0, 3.0], [6.0, 7.0]] and second["modulate_index"].tolist() == [
        list(range(6, 12))
    ]


def test_kept_tokens_run_through_the_blocks_own_forward_and_rejected_ones_pass(pipe: StableDiffusion3Pipeline) -> None:
    model = routed_model(pipe)
    with watched(model) as seen:
        run(model, tiny_inputs(2, 600.0))
    assert [block for block, *_ in seen] == [1, 2, 3]
    assert [kept.shape[1] for *_, kept in seen] == list(sl.current_schedule(model).row(599))
    for _, x, out, kept in seen:
        mask = torch.zeros(2, TOKENS, dtype=torch.bool).scatter_(1, kept, True)
        assert torch.equal(out[~mask], x[~mask]) and bool((out[mask] != x[mask]).any(-1).all())

    # The same by hand: every block's own forward on the tokens that were gathered.
    call = tiny_inputs(2, 600.0)
    temb = model.time_text_embed(call["timestep"], call["pooled_projections"])
    hidden, text = model.pos_embed(call["hidden_states"]), model.context_embedder(call["encoder_hidden_states"])
    with sl.dense(model), torch.no_grad():
        text, hidden = model.transformer_blocks[0](hidden, text, temb)
        for (_, x, out, kept), block in zip(seen, model.transformer_blocks[1:], strict=True):
            assert torch.equal(hidden, x)
            places = kept[..., None].expand(-1, -1, 32)
            text, updated = block(hidden.gather(1, places), text, temb)
            hidden = hidden.scatter(1, places, updated)
            assert torch.equal(hidden, out)
    assert text is None


def test_the_router_sees_the_blocks_input_the_time_and_the_condition(pipe: StableDiffusion3Pipeline) -> None:
    model, call = routed_model(pipe), tiny_inputs(2, 600.0)
    embedder = model.time_text_embed
    with watched(model) as seen:
        run(model, call)
        time = embedder.timestep_embedder(embedder.time_proj(call["timestep"]))
        condition = embedder.text_embedder(call["pooled_projections"])
    for block, x, _, kept in seen:
        scores = model.shivelight.router(block, x, time, condition)
        expected = scores.topk(kept.shape[1], dim=1).indices.sort(1).values
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("options", [{}, {"cfg_scores": "max"}, {"scores": "norm"}])
def test_samples_at_different_timesteps_each_keep_their_own_share(
    pipe: StableDiffusion3Pipeline, options: dict[str, object]
) -> None:
    model, call = routed_model(pipe, **options), tiny_inputs(4, [980.0, 20.0, 500.0, 20.0])
    table = sl.current_schedule(model)
    assert len({table.row(time - 1) for time in (980, 20, 500)}) == 3
    together = run(model, call)
    alone = torch.cat([run(model, rows(call, sample)) for sample in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_timesteps_off_the_grid_are_read_at_the_nearest_point(pipe: StableDiffusion3Pipeline) -> None:
    model = routed_model(pipe)
    for time, point in ((0.0, 1), (1000.0, 1000), (499.6, 500), (1e4, 1000)):
        with watched(model) as seen:
            run(model, tiny_inputs(1, time))
        assert [kept.shape[1] for *_, kept in seen] == list(sl.current_schedule(model).row(point - 1))


def test_norm_scores_keep_the_largest_tokens(pipe: StableDiffusion3Pipeline) -> None:
    model = routed_model(pipe, scores="norm")
    with watched(model) as seen:
        run(model, tiny_inputs(2, 600.0))
    for _, x, _, kept in seen:
        norms = x.norm(dim=-1)
        mask = torch.zeros(2, TOKENS, dtype=torch.bool).scatter_(1, kept, True)
        assert bool((norms.masked_fill(~mask, torch.inf).amin(1) >= norms.masked_fill(mask, -1).amax(1)).all())
    assert model.shivelight.router is None


def test_random_scores_depend_on_seed_block_and_step_alone(pipe: StableDiffusion3Pipeline, sample: Callable) -> None:
    def choices(seed: int, prompts: list[str]) -> dict[tuple[int, int], list[list[int]]]:
        sl.attach(pipe, sl.RoutingConfig(tokens=sl.TokenRouting(scores="random", ratios="fixed", seed=seed)))
        sl.set_budget(pipe, keep=0.5)
        routed, seen = pipe.transformer.shivelight, {}
        routed.observer = lambda block, x, out, kept, text: seen.__setitem__(
            (routed.context.step, block), kept.tolist()
        )
        sample(pipe, prompts, steps=2)
        return seen

    first = choices(0, ["cat", "dog"])
    assert all(len({tuple(kept) for kept in rows_}) == 1 for rows_ in first.values())
    assert len({tuple(kept[0]) for kept in first.values()}) == len(first) == 6
    assert {key: kept[0] for key, kept in choices(0, ["owl"]).items()} == {key: kept[0] for key, kept in first.items()}
    assert choices(1, ["cat", "dog"]) != first


def test_fixed_ratios_are_the_same_at_every_step_and_block(pipe: StableDiffusion3Pipeline) -> None:
    model = routed_model(pipe, ratios="fixed")
    assert model.shivelight.policy is None
    assert set(sum(sl.current_schedule(model).keep, ())) == {32}


def test_the_conditional_half_chooses_for_both(pipe: StableDiffusion3Pipeline) -> None:
    model, call = routed_model(pipe), tiny_inputs(4, 600.0)
    with watched(model) as guided, sl.branch(model, "both"):
        run(model, call)
    with watched(model) as alone:
        run(model, rows(call, 2, 3))
    for *_, both in guided:
        assert torch.equal(both[:2], both[2:])
    assert torch.equal(guided[0][3][2:], alone[0][3])


def test_max_scores_combine_both_halves(pipe: StableDiffusion3Pipeline) -> None:
    model, call = routed_model(pipe, cfg_scores="max"), tiny_inputs(2, 600.0)
    with watched(model) as guided, sl.branch(model, "both"):
        run(model, call)
        block, x, _, kept = guided[0]
        scores = model.shivelight.scores(block, x)
    assert torch.equal(kept[0], kept[1])
    expected = scores.amax(0).topk(kept.shape[1]).indices.sort().values
    assert torch.equal(kept[0], expected)
    assert not torch.equal(expected, scores[1].topk(kept.shape[1]).indices.sort().values)


def test_guided_batches_at_mixed_timesteps_are_split_ones(pipe: StableDiffusion3Pipeline) -> None:
    model, call = routed_model(pipe), tiny_inputs(4, [900.0, 30.0, 900.0, 30.0])
    with sl.branch(model, "both"):
        batched = run(model, call)
    with sl.branch(model, "cond"):
        cond = run(model, rows(call, 2, 3))
    with sl.branch(model, "uncond"):
        uncond = run(model, rows(call, 0, 1))
    torch.testing.assert_close(batched, torch.cat([uncond, cond]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(model, rows(call, 0, 1)), uncond, atol=1e-3)


def test_guidance_that_cannot_be_paired_is_refused(pipe: StableDiffusion3Pipeline) -> None:
    model = routed_model(pipe)
    with sl.branch(model, "uncond"), pytest.raises(sl.ShivelightError, match="Run it first.*'cond'"):
        run(model, tiny_inputs(2, 600.0))
    with sl.branch(model, "both"), pytest.raises(sl.ShivelightError, match="3 samples.*'single'"):
        run(model, tiny_inputs(3, 600.0))
    model = routed_model(pipe, cfg_scores="max")
    for name in ("cond", "uncond"):
        with sl.branch(model, name), pytest.raises(sl.ShivelightError, match="max.*separate calls.*'cond'"):
            run(model, tiny_inputs(2, 600.0))


def test_a_call_without_a_timestep_is_refused(pipe: StableDiffusion3Pipeline) -> None:
    model = routed_model(pipe)
    model.shivelight.begin(None)
    with pytest.raises(sl.BudgetError, match="without a timestep"):
        model.shivelight.kept_counts(1, 1, TOKENS, 7)


def test_observing_changes_nothing_dense_or_routed(pipe: StableDiffusion3Pipeline) -> None:
    model, call = routed_model(pipe), tiny_inputs(2, [900.0, 30.0])
    routed = run(model, call)
    with watched(model) as seen:
        assert torch.equal(run(model, call), routed)
        with sl.dense(model):
            dense = run(model, call)
    assert [kept is None for *_, kept in seen] == [True] * 6 and [block for block, *_ in seen] == [1, 2, 3] * 2
    sl.detach(model)
    assert torch.equal(run(model, call), dense) and not torch.equal(dense, routed)
