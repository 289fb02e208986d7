"""`shivelight bench`: what published shapes cost, dense and under a budget: counted without weights, or timed with random ones."""

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from shivelight.backbones import find_spec
from shivelight.backbones.presets import PRESETS, read_preset
from shivelight.cli import common
from shivelight.config import BlockRouting, Reuse, RoutingConfig, TokenRouting
from shivelight.cost import backbone_costs, planned_ratio, step_flops
from shivelight.evaluation.bare import BareLoop, bare_points, check_memory, timed_rows
from shivelight.evaluation.peers import PEERS, check_names, peer_points
from shivelight.evaluation.results import new_results, new_row
from shivelight.execution.routed import Routed
from shivelight.report.style import budget_label

SHAPE_HEADS = ("backbone", "method", "tokens + text", "M parameters", "T multiply-adds", "of dense", "published")


def bench(
    backbone: Annotated[
        list[str] | None, typer.Option(help=f"A published shape ({', '.join(PRESETS)}); repeat it. All by default.")
    ] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Token keep ratios; repeat it. 0.8 and 0.6 by default.")
    ] = None,
    compute: Annotated[
        list[float] | None,
        typer.Option(help="Shares of the dense FLOPs, for what needs no training; repeat it. Timed runs only."),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Other people's methods, set to shares of what they leave out ({', '.join(PEERS)}); repeat it. Timed runs only."
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build the backbones with random weights and time them.")
    ] = False,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps of a timed generation.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a pass.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds; every method runs once in each.")] = 7,
    blocks: Annotated[
        int | None, typer.Option(min=2, help="At most so many blocks of each kind, where not all of them fit.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=16, help="Image tokens; the shape's own by default.")] = None,
    dtype: common.PrecisionOption = "bfloat16",
    compile_blocks: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the blocks, dense and routed alike, and time torch.compile's own way too."
        ),
    ] = False,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs", help="With --compile: replay each step's pass as one CUDA graph, dense and routed alike."
        ),
    ] = False,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Parameters and multiply-adds of a pass of one sample, on the meta device: nothing is downloaded, held or run. With
    --random-weights, dense and routed generations of the bare backbone, timed in turns.

    Example: shivelight bench --backbone sd3-cpu --random-weights --keep 0.8 0.6 --compute 0.5
    """
    names = backbone or [name for name in PRESETS if not read_preset(name).missing]
    if not backbone and (left := [name for name in PRESETS if name not in names]):
        common.say("; ".join(f"{name} is left out: {read_preset(name).missing}" for name in left))
    check_names(peers or [])
    if cuda_graphs and not (compile_blocks and torch.device(device).type == "cuda"):
        raise typer.BadParameter("CUDA graphs are of compiled blocks on a CUDA device.", param_hint="--cuda-graphs")
    if not random_weights:
        if compute or peers:
            option = "--compute" if compute else "--peers"
            raise typer.BadParameter(
                f"Counting needs --keep alone; {option} is for --random-weights.", param_hint=option
            )
        common.save_json(json, count_shapes(names, keep or [0.8, 0.6], seed))
        return
    common.quiet_libraries()
    common.check_device(device)
    if torch.device(device).type == "cpu":
        common.keep_freed_memory()
    results = new_results(seed=seed, device=device, backbone={"class": "published shapes, random weights"})
    for name in names:
        preset, kind = read_preset(name), getattr(torch, dtype)
        parameters = sum(parameter.numel() for parameter in preset.build(blocks=blocks).parameters())
        check_memory(parameters, kind, device, preset.title)
        loop = BareLoop(
            preset.build(device, kind, blocks), batch, tokens or preset.image_tokens, preset.text_tokens, steps, seed
        )
        if compile_blocks:
            loop.compile(cuda_graphs=cuda_graphs)
        points, reasons = bare_points(loop, keep or ([] if compute else [0.8, 0.6]), compute or [])
        if peers:
            found, more = peer_points(loop, peers)
            points, reasons = points + found, reasons + more
        for reason in reasons:
            common.say(f"left out: {reason}")
        described = {
            "variant": name, "title": preset.title, "image_tokens": loop.shape[0], "text_tokens": loop.shape[1],
            "parameters": parameters,
        }  # fmt: skip
        if blocks is not None:
            described["blocks_of_a_kind"] = blocks
        with common.progress_bar(name, (rounds + 1 + cuda_graphs) * (1 + compile_blocks + len(points))) as advance:
            timed = timed_rows(loop, points, rounds, seed, advance, described)
        if loop.regions is not None:
            common.say(f"{preset.title}: {loop.regions}")
        results["rows"] += timed
        print_timed(preset.title, timed)
        del loop, points  # before the next one's weights are made
    common.save_json(json, results)


def count_shapes(names: list[str], keeps: list[float], seed: int) -> dict[str, Any]:
    """Print the table of published shapes; returns the results."""
    results = new_results(seed=seed, backbone={"class": "published shapes, on the meta device"})
    table = Table(*SHAPE_HEADS)
    for name in names:
        for row in shape_rows(name, keeps):
            results["rows"].append(row)
            table.add_row(*shape_cells(row))
    Console(width=max(common.console.width, 140)).print(table)
    return results


def print_timed(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows that were timed; where the interval of a speed-up holds 1, it is not called one."""
    table = Table("method", "planned", "ms a generation", "speed-up", "95%", "efficiency", "peak MB", title=title)
    for row in rows:
        low, high = row.get("ci95", {}).get("speedup", (1.0, 1.0))
        told = "speedup" in row and not low <= 1.0 <= high
        table.add_row(
            " ".join([row["method"], budget_label(row)]).strip(),
            f"{row['planned_ratio']:.3f}" if "planned_ratio" in row else "",
            f"{row['latency_ms']['median']:.1f} ({row['latency_ms']['p10']:.1f} to {row['latency_ms']['p90']:.1f})",
            f"{row['speedup']:.2f}x" if told else "" if "speedup" not in row else "within the spread",
            f"{low:.2f} to {high:.2f}" if "speedup" in row else "",
            f"{row['efficiency']:.2f}" if told and "efficiency" in row else "",
            f"{row['peak_memory_mb']:,.0f}" if "peak_memory_mb" in row else "",
        )
    Console(width=max(common.console.width, 120)).print(table)


def shape_rows(name: str, keeps: list[float]) -> list[dict[str, Any]]:
    """Rows of one preset: dense, its tokens at the same keep ratio in every routed block and step, and what routers add."""
    preset = read_preset(name)
    model = preset.build()
    spec = find_spec(model)
    costs = backbone_costs(model, spec)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, text_tokens = preset.image_tokens, preset.text_tokens
    dense = step_flops(costs, [tokens] * len(costs), text_tokens) / 2
    published = preset.published.get("multiply_adds")
    rows = [
        new_row(
            "dense", variant=name, title=preset.title, image_tokens=tokens, text_tokens=text_tokens, parameters=parameters,
            multiply_adds=dense, planned_ratio=1.0, source=preset.source,
            published_multiply_adds=published / preset.published["passes"] if published else None,
            published_of=preset.published.get("of"),
        )
    ]  # fmt: skip
    routed = range(spec.first_routed, len(costs))
    for keep in () if spec.no_tokens else keeps:
        ratio = planned_ratio(costs, [[int(keep * tokens)] * len(routed)], routed, tokens, text_tokens)
        rows.append(
            new_row(
                "tokens",
                {"keep": keep},
                variant=name,
                parameters=parameters,
                multiply_adds=ratio * dense,
                planned_ratio=ratio,
            )
        )
    configs = {"block routers": RoutingConfig(None, BlockRouting(widths=(1.0,)), reuse=Reuse())}
    if not spec.no_tokens:
        configs["token routers and policy"] = RoutingConfig(TokenRouting())
    for method, config in configs.items():
        with torch.device("meta"):
            own = sum(parameter.numel() for parameter in Routed(model, spec, config, None).parameters())
        rows.append(new_row(method, variant=name, parameters=own, share_of_parameters=own / parameters))
    return rows


def shape_cells(row: dict[str, Any]) -> list[str]:
    """A row as text, one cell for each of `SHAPE_HEADS`."""
    dense = row["method"] == "dense"
    return [
        row["title"] if dense else "",
        " ".join([row["method"], budget_label(row)]).strip(),
        f"{row['image_tokens']} + {row['text_tokens']}" if dense else "",
        f"{row['parameters'] / 1e6:,.1f}",
        f"{row['multiply_adds'] / 1e12:.3f}" if "multiply_adds" in row else "",
        f"{row['planned_ratio']:.3f}" if "planned_ratio" in row else f"{row['share_of_parameters']:.2%} of weights",
        f"{row['published_multiply_adds'] / 1e12:.3f}" if "published_multiply_adds" in row else "",
    ]
