"""The two synthetic checks of the Shiva-DiT paper, for both estimators: writes benchmarks/results/synthetic.json.

    python benchmarks/synthetic.py                  # a minute or two on one core
    python benchmarks/synthetic.py --trials 100     # a quick look

**Check k: does the number of kept tokens find its place?** N = 100 tokens of width D = 16, 20 of them signal (mean 10,
variance 1), the others noise (mean 0), in new places at every step. A linear router scores them, one k starts at 50.
The block removes what a token holds, f(x) = -x; the loss is the mean square that is left plus 0.1 k. 100 steps of the
router alone (Adam, 0.1), then 700 of router and k (SGD, 2.0). The paper does not give its block and loss; with these
the equilibrium can be told beforehand: a rejected signal token weighs about 2 in dL/dpi, the slope of pi is at most
1 / (4 * 0.1 * 100), so that two rejected ones balance 0.1: k = 18, where the paper's settles too.

Other settings stand beside it. With f(x) = -x both estimators are the same; with a random block f(x) = W x the paper's
has no reason to find the right sign, as a rejected token's -<g, x> is about what a smaller x would do on the skip path,
not about what the block would do. Temperatures that harden (0.2 -> 0.02 and 0.1 -> 0.01) take k on to 20; hardened from
the first step, they freeze a router that has not turned yet in some seeds, so training hardens after the warm-up.

**Check cosine: how near is the estimate to the gradient it stands for?** The paper's "ideal" is not defined in full. We
read it as the exact gradient of the surrogate with both paths, <g_sel - g_rej, x>, against the estimate of the path
that was run: +<g_sel, x> where kept, -<g_rej, x> where rejected. With d the first and s = <g_sel + g_rej, x> the
estimate is (d + s) / 2 or (d - s) / 2: the cosine is 0.707 where the loss feels a token's scale as much as the choice
of its path, and higher only where it feels the choice more. On the plainest toy (N = 100, D = 16, k = 50, standard
normal tokens and targets, one residual MLP of unit gain without a norm, mean square error) it comes out at the
paper's own figure, 0.825 +- 0.043. Other keep ratios, and a norm before the MLP, as every DiT block has, are beside it.

**Check gain: and to what including the token truly changes?** The loss with token i in, minus the loss with it out, by
running both, on random pre-norm transformer blocks: one routed, one after it that runs in full. What follows a block
normalises too, so <g, x + r> is near 0 for a kept token and <g, x> near -<g, r>: the paper's estimate leans against the
gain, while the residual one is its first order. The second order, residual-2, has its one curvature fitted to the flips of
a quarter of the tokens, drawn anew in every trial; its cosine is over all of them, as the others' are.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.routing.select import token_mask, top_k_indices
from shivelight.training.estimators import (
    anneal,
    apply_input_estimator,
    apply_residual_estimator,
    curvature_moments,
    inclusion,
    second_order_term,
    soft_rank,
)

Estimator = Literal["input", "residual", "residual-2"]
ESTIMATORS: tuple[Estimator, ...] = ("input", "residual")
GAIN_ESTIMATORS: tuple[Estimator, ...] = (*ESTIMATORS, "residual-2")
Hardening = Literal["never", "after warm-up", "from the start"]
Tick = Callable[[], None]

TOKENS, WIDTH, SIGNALS, SIGNAL_MEAN = 100, 16, 20, 10.0
PENALTY, ROUTER_RATE, K_RATE, WARMUP = 0.1, 0.1, 2.0, 100
RANK_TEMPERATURE, SELECTION_TEMPERATURE = 0.2, 0.1
TRIALS_AT_ONCE = 50


def route(estimator: Estimator, block: Callable[[Tensor], Tensor], x: Tensor, pi: Tensor, kept: Tensor) -> Tensor:
    """Output of a tokenwise residual block on the kept tokens, with a gradient to `pi`: [B, N, D] -> [B, N, D]."""
    if estimator == "input":
        x = apply_input_estimator(x, pi, kept)
        return torch.where(kept[..., None], x + block(x), x)
    residual = block(x)
    return apply_residual_estimator(x, torch.where(kept[..., None], x + residual, x), pi, kept, residual.detach())


# --- k ---------------------------------------------------------------------------------------------------------------


def draw_tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] and which of them are signal [B, N]."""
    places = torch.rand(batch, TOKENS, generator=generator).argsort(1)[:, :SIGNALS]
    signal = token_mask(places, TOKENS)
    tokens = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    return tokens + SIGNAL_MEAN * signal[..., None], signal


def learn_k(
    estimator: Estimator, block_weight: Tensor, hardening: Hardening, seed: int, steps: int, tick: Tick
) -> dict[str, float]:
    """Train router and k on one block f(x) = x W; the k it settles at, and precision and recall on new tokens."""
    generator = torch.Generator().manual_seed(seed)
    router = torch.zeros(WIDTH, requires_grad=True)
    with torch.no_grad():
        router.uniform_(-1 / math.sqrt(WIDTH), 1 / math.sqrt(WIDTH), generator=generator)
    k = torch.tensor(TOKENS / 2, requires_grad=True)
    optimizers = [torch.optim.Adam([router], ROUTER_RATE), torch.optim.SGD([k], K_RATE)]
    path = []
    for step in range(steps):
        x, _ = draw_tokens(1, generator)
        scores = x @ router
        kept = token_mask(top_k_indices(scores, int(k)), TOKENS)
        first = {"never": steps, "after warm-up": WARMUP, "from the start": 0}[hardening]
        progress = max(0, step - first) / max(1, steps - first)
        ranks = soft_rank(scores, anneal(RANK_TEMPERATURE, 0.02, progress))
        pi = inclusion(ranks, k, anneal(SELECTION_TEMPERATURE, 0.01, progress), TOKENS)
        dense = x + x @ block_weight
        loss = F.mse_loss(route(estimator, lambda z: z @ block_weight, x, pi, kept), dense) + PENALTY * k
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers[: 1 if step < WARMUP else 2]:
            optimizer.step()
        with torch.no_grad():
            k.clamp_(1.0, TOKENS)
        path.append(k.item())
        tick()
    x, signal = draw_tokens(500, generator)
    kept = token_mask(top_k_indices(x @ router.detach(), int(k)), TOKENS)
    hits = (kept & signal).sum().item()
    settled = path[-max(1, steps // 8) :]
    return {
        "k": sum(settled) / len(settled),
        "k_kept": int(k),
        "precision": hits / kept.sum().item(),
        "recall": hits / signal.sum().item(),
    }


K_SETTINGS: tuple[tuple[str, Hardening, Estimator], ...] = (
    ("removing", "never", "input"),
    ("removing", "never", "residual"),
    ("removing", "after warm-up", "input"),
    ("removing", "from the start", "input"),
    ("random", "never", "input"),
    ("random", "never", "residual"),
)


def reached_k(run: dict[str, float]) -> bool:
    """What the project asks of this check."""
    recall_wanted = 0.95 * min(1.0, run["k_kept"] / SIGNALS)
    return abs(run["k"] - 18.0) <= 3.0 and run["precision"] >= 0.95 and run["recall"] >= recall_wanted


def check_k(seeds: int, steps: int, seed: int, tick: Tick) -> Iterator[dict[str, Any]]:
    """Rows of K_SETTINGS, each the mean over a few seeds."""
    for block, hardening, estimator in K_SETTINGS:
        runs = []
        for offset in range(seeds):
            weight = -torch.eye(WIDTH)
            if block == "random":
                generator = torch.Generator().manual_seed(1000 + seed + offset)
                weight = torch.randn(WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH)
            runs.append(learn_k(estimator, weight, hardening, seed + offset, steps, tick))
        means: dict[str, Any] = {name: sum(run[name] for run in runs) / seeds for name in ("k", "precision", "recall")}
        yield new_row(
            estimator, check="k", block=block, hardening=hardening, seeds=seeds, training_steps=steps, **means,
            k_per_seed=[run["k"] for run in runs], reached=all(map(reached_k, runs)),
        )  # fmt: skip


# --- cosine ----------------------------------------------------------------------------------------------------------


def surrogate_cosines(estimator: Estimator, keep: float, normed: bool, trials: int, seed: int, tick: Tick) -> Tensor:
    """Cosine, over a trial's tokens, of dL/dpi to the exact gradient of the two-path surrogate: [trials]."""
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator)
    cosines = []
    for start in range(0, trials, TRIALS_AT_ONCE):
        batch = min(TRIALS_AT_ONCE, trials - start)
        x, target = randn(batch, TOKENS, WIDTH), randn(batch, TOKENS, WIDTH)
        into = randn(batch, WIDTH, 4 * WIDTH) / math.sqrt(WIDTH)
        out_of = randn(batch, 4 * WIDTH, WIDTH) * math.sqrt(2.0 / (4 * WIDTH))
        kept = token_mask(top_k_indices(randn(batch, TOKENS), int(keep * TOKENS)), TOKENS)

        def block(z: Tensor, into: Tensor = into, out_of: Tensor = out_of) -> Tensor:
            z = F.layer_norm(z, (WIDTH,)) if normed else z
            return F.gelu(z @ into) @ out_of

        pi = torch.full((batch, TOKENS), 0.5, requires_grad=True)
        output = route(estimator, block, x, pi, kept)
        # Summed over trials: each trial's gradient is its own.
        loss = (output - target).square().mean((1, 2)).sum()
        estimate, at_output = torch.autograd.grad(loss, (pi, output))

        both = x.clone().requires_grad_()
        (at_block_input,) = torch.autograd.grad(both + block(both), both, at_output)
        exact = ((at_block_input - at_output) * x).sum(-1)
        cosines.append(F.cosine_similarity(estimate, exact, dim=-1))
        for _ in range(batch):
            tick()
    return torch.cat(cosines)


def check_cosine(trials: int, seed: int, tick: Tick) -> Iterator[dict[str, Any]]:
    """Rows for both estimators, with and without a norm, at three keep ratios; the paper's is `input`, 0.5, no norm."""
    for keep, normed in ((0.5, False), (0.2, False), (0.8, False), (0.5, True)):
        for estimator in ESTIMATORS:
            cosines = surrogate_cosines(estimator, keep, normed, trials, seed, tick)
            row = cosine_row(estimator, "cosine", keep, cosines) | {"reference": "surrogate", "normed": normed}
            if estimator == "input" and keep == 0.5 and not normed:
                row |= {"reached": row["cosine"] >= 0.8}
            yield row


def cosine_row(estimator: Estimator, check: str, keep: float, cosines: Tensor) -> dict[str, Any]:
    """Mean, spread over trials, and 95% interval of the mean."""
    mean, spread = cosines.mean().item(), cosines.std().item()
    error = 1.96 * spread / math.sqrt(len(cosines))
    return new_row(
        estimator, {"keep": keep}, check=check, samples=len(cosines), cosine=mean, cosine_std=spread,
        ci95={"cosine": [mean - error, mean + error]},
    )  # fmt: skip


# --- gain ------------------------------------------------------------------------------------------------------------

GAIN_TOKENS, GAIN_WIDTH, GAIN_HEADS = 32, 32, 4


def random_block(generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """A pre-norm transformer block with random weights of unit gain: (x [B, N, D], seen [B, N] bool) -> [B, N, D]."""

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)

    width = GAIN_WIDTH
    qkv, projection = weight(width, 3 * width), weight(width, width)
    into, out_of = weight(width, 4 * width), weight(4 * width, width)

    def block(x: Tensor, seen: Tensor) -> Tensor:
        heads = (F.layer_norm(x, (width,)) @ qkv).unflatten(-1, (3, GAIN_HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None, :])
        x = x + attended.transpose(1, 2).flatten(2) @ projection
        return x + F.gelu(F.layer_norm(x, (width,)) @ into) @ out_of

    return block


def gain_cosines(distilled: bool, keep: float, seed: int) -> dict[Estimator, Tensor]:
    """One trial: the cosine of each estimator's dL/dpi to the true gains of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    routed, following = random_block(generator), random_block(generator)
    x = torch.randn(1, GAIN_TOKENS, GAIN_WIDTH, generator=generator)
    target = torch.randn(1, GAIN_TOKENS, GAIN_WIDTH, generator=generator)
    scores = torch.randn(1, GAIN_TOKENS, generator=generator)
    kept = token_mask(top_k_indices(scores, int(keep * GAIN_TOKENS)), GAIN_TOKENS)
    everything = torch.ones_like(kept)

    def finish(tokens: Tensor) -> Tensor:
        return F.layer_norm(following(tokens, everything.expand(len(tokens), -1)), (GAIN_WIDTH,))

    dense = routed(x, everything)
    if distilled:
        target = finish(dense)

    def losses(masks: Tensor) -> Tensor:
        """[M, N] masks -> [M] losses of running exactly the tokens of each mask."""
        tokens = x.expand(len(masks), -1, -1)
        return (finish(torch.where(masks[..., None], routed(tokens, masks), tokens)) - target).square().mean((1, 2))

    flips = torch.eye(GAIN_TOKENS, dtype=torch.bool)
    with torch.no_grad():
        gains = losses(kept | flips) - losses(kept & ~flips)

    fitted = torch.randperm(GAIN_TOKENS, generator=generator)[: GAIN_TOKENS // 4]
    cosines: dict[Estimator, Tensor] = {}
    for estimator in GAIN_ESTIMATORS:
        pi = torch.full((1, GAIN_TOKENS), 0.5, requires_grad=True)
        entering = apply_input_estimator(x, pi, kept) if estimator == "input" else x
        output = torch.where(kept[..., None], routed(entering, kept), entering)
        residual = torch.where(kept[..., None], output - x, dense - x).detach()
        if estimator != "input":
            output = apply_residual_estimator(x, output, pi, kept, dense - x)
        loss = (finish(output) - target).square().mean()
        (estimate,) = torch.autograd.grad(loss, pi, retain_graph=True)
        if estimator == "residual-2":
            squares, signs = residual.square().sum(-1), torch.where(kept, -1.0, 1.0)[0, fitted]
            moments = curvature_moments(signs * gains[fitted], signs * estimate[0, fitted], squares[0, fitted])
            term = second_order_term(pi, kept, squares, moments[0] / moments[1])
            (estimate,) = torch.autograd.grad(loss + term, pi)
        cosines[estimator] = F.cosine_similarity(estimate[0], gains, dim=0)
    return cosines


def check_gain(trials: int, seed: int, tick: Tick) -> Iterator[dict[str, Any]]:
    """Rows for the estimators and the second order: the cosine to the true gain, under a random target and under distillation."""
    for distilled in (False, True):
        outcomes = []
        for trial in range(trials):
            outcomes.append(gain_cosines(distilled, 0.5, seed * trials + trial))
            tick()
        for estimator in GAIN_ESTIMATORS:
            row = cosine_row(estimator, "gain", 0.5, torch.stack([outcome[estimator] for outcome in outcomes]))
            yield row | {"reference": "true gain", "target": "dense output" if distilled else "random"}


# --- the command -----------------------------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="Where to write the JSON.")] = Path(__file__).parent
    / "results"
    / "synthetic.json",
    trials: Annotated[int, typer.Option(min=2, help="Random trials of each cosine.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each k.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run: 100 + 700 in the paper.")] = 800,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Run the synthetic checks, print a table, write the JSON."""
    torch.set_num_threads(1)  # the tensors are tiny: more threads only get in each other's way
    console = Console()
    results = new_results(" ".join(["benchmarks/synthetic.py", *sys.argv[1:]]), seed)
    checks: tuple[tuple[str, int, Callable[[Tick], Iterator[dict[str, Any]]]], ...] = (
        ("k", len(K_SETTINGS) * seeds * steps, partial(check_k, seeds, steps, seed)),
        ("cosine", 8 * trials, partial(check_cosine, trials, seed)),
        ("gain", 2 * trials, partial(check_gain, trials, seed)),
    )
    with Progress(console=console) as progress:
        for name, total, check in checks:
            task = progress.add_task(f"check {name}", total=total)
            for row in check(partial(progress.advance, task)):
                results["rows"].append(row)
                progress.console.print(describe(row), soft_wrap=True, highlight=False)
    write_results(out, results)
    console.print(f"Wrote {out}")


def describe(row: dict[str, Any]) -> str:
    """One row as a line for people."""
    if row["check"] == "k":
        setting = f"{row['block']} block, hardened {row['hardening']}"
        figures = f"k {row['k']:.2f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}"
    else:
        setting = f"to the {row['reference']}, keep {row['budget']['keep']}"
        setting += ", after a norm" if row.get("normed") else ""
        setting += f", {row['target']} target" if "target" in row else ""
        figures = f"cosine {row['cosine']:.3f} +- {row['cosine_std']:.3f}"
    verdict = {True: "  (reached)", False: "  (not reached)", None: ""}[row.get("reached")]
    return f"{row['check']:>6}  {row['method']:<8}  {setting}: {figures}{verdict}"


if __name__ == "__main__":
    typer.run(main)
