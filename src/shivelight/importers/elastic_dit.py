"""E-DiT's released Qwen-Image checkpoint as a diffusers transformer folder and an adapter (arXiv 2602.13993).

The authors' file holds a fine-tuned QwenImageTransformer2DModel under diffusers' own names, and beside it, for block i,

    gate_mlps.{i}.img_mod.1     modulation, T -> 3D, of SiLU(t)
    gate_mlps.{i}.out.0         trunk, D -> H
    gate_mlps.{i}.out.2         gate head, H -> 1
    gate_mlps.{i}.width_head    width head, H -> 4

Shapes: D width of the backbone, T of its timestep embedding, H of a router's hidden layer.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from shivelight.adapter import prepare
from shivelight.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_config
from shivelight.config import BlockRouting, Reuse, RoutingConfig
from shivelight.errors import AdapterError
from shivelight.execution.routed import Routed
from shivelight.importers.streaming import Checkpoint, Entry, ResumableFolder, write_tensors, write_text

KIND = "elastic-dit"
WIDTHS = (0.25, 0.5, 0.75, 1.0)
# Our name of a router's part, and the checkpoint's.
_PARTS = {"modulation": "img_mod.1", "trunk": "out.0", "gate_head": "out.2", "width_head": "width_head"}
_ROUTERS = "gates.router."
# A picture of 1328 x 1328 with guidance takes 5.1 GB in bf16; where less is allowed, blocks run instead of being reused.
_CACHE_MB = 8192.0


def routing_config(bottleneck: int = 128) -> RoutingConfig:
    """Block routing as released: tau 0.5, every guidance branch for itself, delta 0.015, K 10, reuse from half of the steps.

    Widths are prefixes of the channels in their own order. `set_budget(model, threshold=0.5)` puts the gates in force.
    """
    return RoutingConfig(
        tokens=None,
        blocks=BlockRouting(
            router="elastic-dit", bottleneck=bottleneck, widths=WIDTHS, threshold=0.5, cfg_gates="each", decide="block"
        ),
        reuse=Reuse(margin=0.015, max_reuses=10, blocks_after=0.5, warmup=0.0, max_cache_mb=_CACHE_MB, forecast=0.0),
        activation="quick-gelu",
    )


def backbone_config(entries: Mapping[str, Entry], path: Path) -> dict[str, Any]:
    """The config of the backbone, from the shapes of its tensors.

    The patch size is the family's 2. Rotary embeddings have no parameters: their three axes share a head as they do in
    Qwen-Image, 1/8 for the frame and the rest in halves.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = entries.get(name)
        if found is None or len(found.shape) != dimensions or 0 in found.shape:
            what = "has no" if found is None else f"has shape {found.shape} for"
            raise AdapterError(
                f"{path} {what} {name!r}: it is no E-DiT checkpoint for Qwen-Image. Give the authors' file "
                "(wjs0725/Elastic-DiT on the Hub)."
            )
        return found.shape

    width, channels = shape("img_in.weight", 2)
    text_width = shape("txt_in.weight", 2)[1]
    made = shape("proj_out.weight", 2)[0]
    (head,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if width % head or head % 32 or made % 4:
        raise AdapterError(
            f"The shapes in {path} fit no Qwen-Image transformer: width {width}, head {head}, output {made}; heads must "
            "divide the width and be multiples of 32, and the output a multiple of 2 x 2 pixels."
        )
    blocks = {match[1] for name in entries if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    return {
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": made // 4,
        "num_layers": len(blocks),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text_width,
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


class ElasticDiTImport:
    """The import of one checkpoint: everything is checked here, and nothing is written before `write`.

    Args:
        checkpoint: the authors' file.
        out: folder to write `transformer/`, `adapter/` and `import.json` to; an interrupted import there is gone on with.
        shard_bytes: largest size of a file of the transformer.

    Raises:
        AdapterError: tensors are missing, unknown, of another shape or of a type that weights do not have.
    """

    def __init__(self, checkpoint: Checkpoint, out: Path, shard_bytes: int = 5 * 10**9) -> None:
        self.checkpoint, self.out, self.shard_bytes = checkpoint, out, shard_bytes
        entries = checkpoint.entries
        if not any(name.startswith("gate_mlps.") for name in entries):
            raise AdapterError(
                f"{checkpoint.path} holds no routers (gate_mlps.*): it is no E-DiT checkpoint. Plain Qwen-Image weights "
                "need no import; load them with diffusers."
            )
        trunk = entries.get("gate_mlps.0.out.0.weight")
        bottleneck = trunk.shape[0] if trunk is not None and len(trunk.shape) == 2 and trunk.shape[0] else 128
        config = backbone_config(entries, checkpoint.path)
        # Weights on the meta device: names and shapes are all that is needed, and they are the library's own.
        with init_empty_weights():
            self.model = QwenImageTransformer2DModel(**config)
            self.routed: Routed = prepare(self.model, routing_config(bottleneck))
        self._adapter = self.routed.state_dict()
        self._origins = self._router_origins()
        self._check()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.files = {f"transformer/{name}": shard for name, shard in self._shards().items()}
        self.files[f"adapter/{WEIGHTS_NAME}"] = {
            name: entries[self._origins[name]] if name in self._origins else Entry.of(tensor)
            for name, tensor in self._adapter.items()
        }

    @property
    def tensors(self) -> int:
        """How many tensors there are to write."""
        return sum(len(entries) for entries in self.files.values())

    def write(self, progress: Callable[[], object] = lambda: None) -> ResumableFolder:
        """Write what is not there yet; `progress` is called once for each tensor.

        Returns:
            The folder; its `verify` compares the disk with what was meant to be written.

        Raises:
            AdapterError: the folder holds something else, there is no space, or a tensor is not finite.
        """
        about = {
            "import": KIND,
            "format": 1,
            "checkpoint_bytes": self.checkpoint.path.stat().st_size,
            "checkpoint_fingerprint": self.checkpoint.fingerprint(),
            "shard_bytes": self.shard_bytes,
        }
        folder = ResumableFolder(self.out, about)
        self._check_space(folder)
        for name, entries in self.files.items():
            if folder.stands(name):
                for _ in entries:
                    progress()
            else:
                folder.put(name, partial(write_tensors, entries=entries, read=partial(self._read, progress)))
        # The files that make a folder loadable come after what they promise.
        for name, text in self._texts(about).items():
            if not folder.stands(name):
                folder.put(name, partial(write_text, text=text))
        return folder

    def _router_origins(self) -> dict[str, str]:
        """Our name of every router parameter, and the checkpoint's."""
        assert self.routed.gates is not None
        origins = {}
        for name in self.routed.gates.router.state_dict():
            _, block, part, kind = name.split(".")
            origins[_ROUTERS + name] = f"gate_mlps.{block}.{_PARTS[part]}.{kind}"
        # The description leaves open whether the linears after the modulation have biases; where there are none, zeros are
        # the same.
        for part in ("trunk", "gate_head", "width_head"):
            biases = {ours for ours in origins if ours.endswith(f".{part}.bias")}
            if not any(origins[ours] in self.checkpoint.entries for ours in biases):
                for ours in biases:
                    del origins[ours]
        return origins

    def _check(self) -> None:
        path, found = self.checkpoint.path, self.checkpoint.entries
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        wanted |= {theirs: tuple(self._adapter[ours].shape) for ours, theirs in self._origins.items()}
        missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
        if missing or extra:
            what = f"lacks {missing[0]!r}" if missing else f"holds an unknown {extra[0]!r}"
            raise AdapterError(
                f"{path} {what} ({len(missing)} tensors missing, {len(extra)} unknown): it is not laid out as E-DiT's released "
                "Qwen-Image checkpoint, or not whole. Compare it with the authors' file, or update Shivelight."
            )
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise AdapterError(
                    f"{name!r} in {path} has shape {found[name].shape}, but the other tensors need {shape}: the file is damaged "
                    "or of another model. Download it again."
                )
            if not found[name].is_floating:
                raise AdapterError(
                    f"{name!r} in {path} is of type {found[name].dtype}; only F64, F32, F16 and BF16 are imported. Convert the "
                    "checkpoint first."
                )

    def _shards(self) -> dict[str, dict[str, Entry]]:
        """The backbone's tensors by the file that holds them, named and split as diffusers does."""
        entries = {n: e for n, e in self.checkpoint.entries.items() if not n.startswith("gate_mlps.")}
        sized = {n: torch.empty(e.bytes, dtype=torch.uint8, device="meta") for n, e in entries.items()}
        pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
        self._split = split_torch_state_dict_into_shards(
            sized, filename_pattern=pattern, max_shard_size=self.shard_bytes
        )
        return {file: {n: entries[n] for n in names} for file, names in self._split.filename_to_tensors.items()}

    def _read(self, progress: Callable[[], object], name: str) -> Tensor:
        """A tensor to be written, by its name in the file that is written."""
        progress()
        if name in self._adapter and name not in self._origins:  # channel orders, empty records, biases that are zero
            own = self._adapter[name]
            return torch.zeros(own.shape, dtype=own.dtype) if own.is_meta else own
        origin = self._origins.get(name, name)
        tensor = self.checkpoint.read(origin)
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{origin!r} in {self.checkpoint.path} holds NaN or infinite values: the file is damaged. Download it again."
            )
        return tensor

    def _texts(self, about: Mapping[str, Any]) -> dict[str, str]:
        """The small files."""
        texts = {}
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            texts[f"transformer/{SAFE_WEIGHTS_INDEX_NAME}"] = json.dumps(index, indent=2) + "\n"
        texts["transformer/config.json"] = self.model.to_json_string()
        origin = {
            "import": KIND,
            "checkpoint": self.checkpoint.path.name,
            "fingerprint": about["checkpoint_fingerprint"],
        }
        described = adapter_config(self.model, self.routed, {"imported": origin})
        texts[f"adapter/{CONFIG_NAME}"] = json.dumps(described, indent=2) + "\n"
        return texts

    def _check_space(self, folder: ResumableFolder) -> None:
        """Refuse at once what would end in a full disk hours later."""
        needed = sum(
            sum(entry.bytes for entry in entries.values())
            for name, entries in self.files.items()
            if not (name in folder.files and (self.out / name).is_file())
        )
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise AdapterError(
                f"{self.out} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free. Free some space, or give a folder on "
                "another disk; the same command goes on where it stopped."
            )
