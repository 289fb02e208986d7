"""`shivelight import`: other people's weights as a diffusers folder and an adapter."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from shivelight.cli import common
from shivelight.evaluation.results import new_results
from shivelight.importers import Checkpoint, ElasticDiTImport


def import_(
    kind: Annotated[
        Literal["elastic-dit"], typer.Argument(help="Whose: elastic-dit is E-DiT's released Qwen-Image checkpoint.")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="The authors' safetensors file.")],
    out: Annotated[
        Path, typer.Option(help="Folder for transformer/ and adapter/; an interrupted import there is gone on with.")
    ],
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file of the transformer, in GB.")] = 5.0,
    json: common.JsonOption = None,
) -> None:
    """Turn released weights into a diffusers transformer folder and an adapter, tensor by tensor.

    Resumable: the same command goes on where it stopped, and run again it verifies what is there.

    Example: shivelight import elastic-dit qwen-image-elastic.safetensors --out elastic-qwen
    """
    common.quiet_libraries()
    plan = ElasticDiTImport(Checkpoint(checkpoint), out, round(shard_gb * 1e9))
    with common.progress_bar("importing", plan.tensors) as advance:
        folder = plan.write(advance)
    with common.progress_bar("verifying", len(folder.files)) as advance:
        folder.verify(advance)
    common.say(f"transformer: {out / 'transformer'} ({plan.parameters / 1e9:.2f} B parameters)")
    common.say(f"adapter: {out / 'adapter'}; load it with sl.load_adapter, then sl.set_budget(pipe, threshold=0.5)")
    if json is not None:
        backbone = {"class": type(plan.model).__name__, "parameters": plan.parameters}
        common.save_json(json, new_results(backbone=backbone, imported=kind, files=folder.files))
