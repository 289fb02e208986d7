"""Rebuild every embedded file from nothing, in order; each step goes on where it stopped.

make recipes                       # hours on a CPU
python recipes/build.py --full     # where there is a GPU: every emoji, 1,024 tokens, tens of thousands of steps
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from shivelight.demo.pipeline import FEW_STEP, PIPELINE

HERE = Path(__file__).parent


def run(script: str, *arguments: str) -> None:
    """One recipe as a process of its own."""
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def main() -> None:
    """Data, autoencoder, teacher, adapters; the teacher distilled to a few steps, adapters for that; the scorer of captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full set and 1,024 tokens")
    parser.add_argument("--work", type=Path, default=Path("build"))
    args = parser.parse_args()
    teacher = ["--subset", "full", "--tokens", "1024", "--steps", "60000", "--batch", "256"] if args.full else []
    run("build_data.py")
    run("train_autoencoder.py", "--work", str(args.work / "autoencoder"))
    run("train_teacher.py", "--vae", str(args.work / "autoencoder/vae"), "--work", str(args.work / "teacher"), *teacher)
    shutil.copytree(args.work / "teacher/pipeline", PIPELINE, dirs_exist_ok=True)
    run("train_adapters.py", "--work", str(args.work / "adapters"))
    run("distil_few_steps.py", "--work", str(args.work / "few-step"))
    few = ["--pipeline", str(args.work / "few-step/pipeline"), "--out", str(FEW_STEP / "adapters")]
    run("train_adapters.py", *few, "--only", "tokens", "--only", "blocks", "--only", "blocks-refresh")
    for part in ("transformer", "scheduler"):
        shutil.copytree(args.work / "few-step/pipeline" / part, FEW_STEP / part, dirs_exist_ok=True)
    run("train_scorer.py", "--work", str(args.work / "scorer"))


if __name__ == "__main__":
    main()
