"""Train peers that need it, DyDiT and DiffCR, on the embedded pipeline, for the front: as many steps, samples and pictures, the
same losses and the same rank of DoRA deltas as the shipped `tokens` adapter had; each is of one budget.

    python recipes/train_peers.py                                  # both at 0.7 and 0.5 into runs/peers; resumes by itself
    python benchmarks/front.py --use 25 --trained runs/peers/dydit-0.7 --trained ...

About an hour on 2 cores.
"""

import argparse
from pathlib import Path

import checkpoint
import torch
from train_adapters import encoded, finished, ship

from shivelight.cli import common
from shivelight.config import DeltaConfig
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.peers import TRAINED
from shivelight.evaluation.peers.trained import SETTINGS, WEIGHTS
from shivelight.evaluation.peers.training import PeerTrainer
from shivelight.files import replacing
from shivelight.training.stages import TrainingConfig


def main() -> None:
    """Train them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=sorted(TRAINED))
    parser.add_argument("--target", action="append", type=float, help="share of FLOPs (DyDiT) or of tokens (DiffCR)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--rank", type=int, default=6, help="of the DoRA deltas")
    parser.add_argument("--work", type=Path, default=Path("build/peers"))
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    args = parser.parse_args()
    common.quiet_libraries()
    checkpoint.use_plain_attention(torch.device(common.DEFAULT_DEVICE))
    config = TrainingConfig(
        router_steps=0,
        policy_steps=0,
        joint_steps=args.steps,
        groups=1,
        group_size=args.group_size,
        checkpoint_every=50,
    )
    deltas = DeltaConfig(args.rank, float(args.rank))
    for peer in args.peer or sorted(TRAINED):
        for target in args.target or (0.7, 0.5):
            pipe, cache, accelerator = encoded(embedded.PIPELINE, args.work, args.pictures)
            name = f"{peer}-{target:g}"
            trainer = PeerTrainer(pipe, TRAINED[peer], target, deltas, config, cache, args.work / name, accelerator)
            folder = finished(trainer)
            size = ship(folder, args.out / name)
            for file in (WEIGHTS, SETTINGS):
                with replacing(args.out / name / file) as unfinished:
                    unfinished.write_bytes((folder / file).read_bytes())
            print(f"{size / 1e6:.2f} MB of deltas in {args.out / name}")


if __name__ == "__main__":
    main()
