"""What a router costs beside the block that it decides on, at published widths.

    python benchmarks/router_cost.py        # writes benchmarks/results/router-cost.json

One SD3 block with random weights, one picture under guidance, timed in turns with the token router (the conditional half is
scored for both) and with the block router, lean and as E-DiT's authors released it; `share` is of the dense block's time.
Wanted: below 1% at width 1024 and more. Routers read one sample, the conditional one; ranking, gather and the transfer of a
gate's decision are not in it (`block_scaling.py` has the former). `share_of_parameters` charges one block with all of a
router, also with what pairs of blocks or all of them share, so it is an upper bound.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock

from shivelight.cli import common
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.measurement.latency import interleave, synchronize
from shivelight.routing import BLOCK_ROUTERS, TokenRouter

TEXT = 333


@torch.no_grad()
def main() -> None:
    """Time blocks and routers at every shape, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "1536x4096"], help="width x image tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router-cost.json"))
    args = parser.parse_args()
    device, dtype = common.DEFAULT_DEVICE, getattr(torch, args.dtype)
    results = new_results(device=device, backbone={"class": "JointTransformerBlock"})
    for shape in args.shapes:
        width, tokens = map(int, shape.split("x"))
        torch.manual_seed(0)
        block = JointTransformerBlock(width, width // 64, 64, qk_norm="rms_norm").to(device, dtype)
        x, text = torch.randn(2, tokens, width), torch.randn(2, TEXT, width)
        x, text, time = (value.to(device, dtype) for value in (x, text, torch.randn(2, width)))
        routers = {
            "token-router": TokenRouter(width, width, width, [0]),
            "block-router": BLOCK_ROUTERS["lean"](width, width, width, [0]),
            "block-router, as released": BLOCK_ROUTERS["elastic-dit"](width, width, width, [0]),
        }
        ways: dict[str, Any] = {"dense block": partial(block, x, text, time)}
        for name, router in routers.items():
            extra = () if name == "token-router" else (text[1:],)
            ways[name] = partial(router.to(device, dtype), 0, x[1:], time[1:], time[1:], *extra)
        timings = interleave(ways, args.rounds, 2, synchronize(device))
        whole = timings.latency_ms("dense block")["median"]
        weights = sum(p.numel() for p in block.parameters())
        for name in ways:
            figures: dict[str, Any] = {}
            if name in routers:
                own = sum(p.numel() for p in routers[name].parameters())
                figures = {"share": timings.latency_ms(name)["median"] / whole, "share_of_parameters": own / weights}
            results["rows"].append(
                new_row(
                    name, variant=f"width {width}, {tokens} tokens", batch=1 if name in routers else 2, dtype=args.dtype,
                    latency_ms=timings.latency_ms(name), **figures,
                )
            )  # fmt: skip
            row = results["rows"][-1]
            said = "".join(f", {key} {value:.4f}" for key, value in figures.items())
            print(f"{row['variant']}, {name}: {row['latency_ms']['median']:.2f} ms{said}", flush=True)
    write_results(args.out, results)


if __name__ == "__main__":
    main()
