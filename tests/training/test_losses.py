from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from shivelight.errors import TrainingError
from shivelight.training.losses import (
    BudgetLoss,
    feature_distillation,
    noisy_latents,
    prediction_loss,
    shift_sigmas,
    stratified_ratios,
    stratified_uniform,
)


def test_budget_loss_is_the_papers_average() -> None:
    loss, means, target = BudgetLoss(beta=0.2), [0.9, 0.5, 0.7, 0.4], 0.6
    average = means[0]
    for step, value in enumerate(means):
        average = value if step == 0 else 0.2 * value + 0.8 * average
        mean_keep = torch.tensor(value, requires_grad=True)
        result = loss(mean_keep, target)
        result.backward()
        assert result.item() == pytest.approx(value * 2 * (average - target), abs=1e-6)
        assert mean_keep.grad is not None
        assert mean_keep.grad.item() == pytest.approx(2 * (average - target), abs=1e-6)


def test_budget_loss_with_sampled_targets_follows_the_deviation() -> None:
    # Always 0.1 above what was asked for: the pull is constant, however the targets jump.
    loss = BudgetLoss()
    for target in (0.3, 0.9, 0.5, 0.8):
        mean_keep = torch.tensor(target + 0.1, requires_grad=True)
        loss(mean_keep, torch.tensor(target)).backward()
        assert mean_keep.grad is not None and mean_keep.grad.item() == pytest.approx(0.2, abs=1e-6)


def test_budget_loss_drives_a_ratio_to_its_target() -> None:
    loss, logit = BudgetLoss(), torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss(torch.sigmoid(logit), 0.4).backward()
        optimizer.step()
    assert torch.sigmoid(logit).item() == pytest.approx(0.4, abs=0.005)


def test_budget_loss_resumes_from_its_state() -> None:
    first, second = BudgetLoss(), BudgetLoss()
    for value in (0.9, 0.7):
        first(torch.tensor(value), 0.6)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(torch.tensor(0.5), 0.6), second(torch.tensor(0.5), 0.6))


def test_budget_average_is_the_same_on_two_ranks() -> None:
    # Real gloo groups, one per thread: the trainer's own test starts two processes.
    store = dist.HashStore()
    batches = ((0.9, 0.5), (0.4, 0.7), (0.8, 0.8))

    def run(rank: int) -> tuple[float, float]:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))

        def reduce(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "mean"
            group.allreduce([tensor]).wait()
            return tensor / 2

        loss = BudgetLoss(reduce=reduce)
        for batch in batches:
            mean_keep = torch.tensor(batch[rank], requires_grad=True)
            loss(mean_keep, 0.6).backward()
        assert mean_keep.grad is not None
        return loss.deviation.item(), mean_keep.grad.item()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second
    average = 0.8 * (0.8 * 0.7 + 0.2 * 0.55) + 0.2 * 0.8
    assert first == pytest.approx((average - 0.6, 2 * (average - 0.6)), abs=1e-6)


def test_feature_distillation_is_a_mean_over_layers_of_normalised_features() -> None:
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    teacher = [torch.randn(2, 5, 8, generator=generator) for _ in range(3)]
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        normed = [
            (value - value.mean(-1, keepdim=True)) / (value.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            for value in (ours, theirs)
        ]
        expected += (normed[0] - normed[1]).square().mean().item() / 3
    assert feature_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_feature_distillation_ignores_scale_and_leaves_the_teacher_alone() -> None:
    features = [torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    assert feature_distillation([features[0] * 50 + 3], [features[0]]).item() < 1e-6
    student = (features[0] * 2 + torch.arange(16)).bfloat16()
    loss = feature_distillation([student], [features[1]])
    assert loss.dtype == torch.float32
    loss.backward()
    assert features[0].grad is not None and features[0].grad.abs().sum() > 0 and features[1].grad is None


def test_feature_distillation_refuses_what_does_not_match() -> None:
    with pytest.raises(TrainingError, match="0 student and 0 teacher"):
        feature_distillation([], [])
    with pytest.raises(TrainingError, match=r"Feature 0 has shape \(1, 2, 4\)"):
        feature_distillation([torch.zeros(1, 2, 4)], [torch.zeros(1, 3, 4)])


def test_path_and_velocity_are_the_samplers() -> None:
    # One Euler step of diffusers' own sampler along the true velocity walks exactly along our path.
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    here, there = scheduler.sigmas[1], scheduler.sigmas[2]
    scheduler.set_begin_index(1)
    start = noisy_latents(clean, noise, here.expand(2))
    stepped = scheduler.step(noise - clean, scheduler.timesteps[1], start).prev_sample
    torch.testing.assert_close(stepped, noisy_latents(clean, noise, there.expand(2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shift_sigmas(torch.arange(1, 1001) / 1000, 3.0).flip(0), _training_sigmas(3.0))


def _training_sigmas(shift: float) -> torch.Tensor:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).sigmas[:1000]


def test_noise_levels_are_per_sample_and_samples_count_alike() -> None:
    clean, noise = torch.zeros(2, 3), torch.ones(2, 3)
    assert noisy_latents(clean, noise, torch.tensor([0.25, 1.0])).tolist() == [[0.25] * 3, [1.0] * 3]
    wrong = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    assert prediction_loss(wrong, noise - clean).item() == 2.0
    assert prediction_loss(noise - clean, noise - clean).item() == 0.0
    assert prediction_loss(wrong.bfloat16(), noise).dtype == torch.float32


@given(st.integers(1, 64), st.integers(0, 2**31))
def test_stratified_draws_have_one_value_in_each_interval(count: int, seed: int) -> None:
    draws = stratified_uniform(count, torch.Generator().manual_seed(seed))
    assert bool((draws >= 0).all()) and bool((draws < 1).all())
    # In fp32 a draw may round up to the border of its interval, never past it.
    edges = torch.arange(count, dtype=torch.float64) / count
    ordered = draws.double().sort().values
    assert bool((ordered >= edges - 1e-6).all()) and bool((ordered <= edges + 1 / count + 1e-6).all())


def test_stratified_draws_are_shuffled_and_repeatable() -> None:
    first = stratified_uniform(32, torch.Generator().manual_seed(0))
    assert torch.equal(first, stratified_uniform(32, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, first.sort().values)
    ratios = stratified_ratios(4, 0.4, 0.8, torch.Generator().manual_seed(0)).sort().values
    assert [int((ratio.item() - 0.4) / 0.1) for ratio in ratios] == [0, 1, 2, 3]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(TrainingError, match="beta=0"):
        BudgetLoss(beta=0.0)
    with pytest.raises(TrainingError, match="0 stratified"):
        stratified_uniform(0)
    with pytest.raises(TrainingError, match=r"from 0\.9 to 0\.3"):
        stratified_ratios(2, 0.9, 0.3)
