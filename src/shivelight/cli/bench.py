"""`shivelight bench`: what published shapes cost, dense and under a budget, counted without weights."""

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
from shivelight.evaluation.results import new_results, new_row
from shivelight.execution.routed import Routed
from shivelight.report.style import budget_label

SHAPE_HEADS = ("backbone", "method", "tokens + text", "M parameters", "T multiply-adds", "of dense", "published")


def bench(
    backbone: Annotated[
        list[str] | None, typer.Option(help=f"A published shape ({', '.join(PRESETS)}); repeat it. All by default.")
    ] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Token keep ratios of every routed block; repeat it.")
    ] = None,
    json: common.JsonOption = None,
) -> None:
    """Parameters and multiply-adds of a pass of one sample, on the meta device: nothing is downloaded, held or run.

    Example: shivelight bench --backbone flux1-dev --backbone qwen-image
    """
    rows: list[dict[str, Any]] = []
    table = Table(*SHAPE_HEADS)
    for name in backbone or PRESETS:
        for row in shape_rows(name, keep or [0.8, 0.6]):
            rows.append(row)
            table.add_row(*shape_cells(row))
    Console(width=max(common.console.width, 140)).print(table)
    results = new_results(backbone={"class": "published shapes, on the meta device"})
    results["rows"] = rows
    common.save_json(json, results)


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
