"""An imported checkpoint against E-DiT's description, block by block, in float64, on the checkpoint's own tensors.

The reference below is written from the method (router, gate, prefix widths, activation, cache), not from our code; only
what the method leaves as it is, the rest of a Qwen-Image block, is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.activations import ApproximateGELU
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from safetensors.torch import save_file
from torch import Tensor, nn

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.importers import Checkpoint, ElasticDiTImport

STEPS, TOKENS, TEXT = 24, 16, 5
SHARES = (0.25, 0.5, 0.75, 1.0)
Place = tuple[int, int, int]  # step, guidance branch, block


def open_pipe(transformer: QwenImageTransformer2DModel) -> QwenImagePipeline:
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: QwenImagePipeline, samples: slice = slice(None), steps: int = STEPS) -> Tensor:
    """Latents [B, N, C] at the end; guidance by two calls a step."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, TOKENS, 16, generator=generator)
    prompts = torch.randn(2, TEXT, 24, generator=generator)
    return pipe(
        prompt_embeds=prompts[samples], negative_prompt_embeds=torch.ones_like(prompts[samples]), true_cfg_scale=4.0,
        latents=latents[samples], num_inference_steps=steps, height=64, width=64, output_type="latent",
    ).images  # fmt: skip


class Watch:
    """Arguments and outputs of every block of a generation, and what was decided where something is attached."""

    def __init__(self, pipe: QwenImagePipeline) -> None:
        self.calls, self.seen, self.parts = -1, {}, {}
        self.handles = [pipe.transformer.register_forward_pre_hook(lambda *_: self._next())]
        for index, block in enumerate(pipe.transformer.transformer_blocks):
            note = partial(self._note, index)
            self.handles.append(block.register_forward_hook(note, with_kwargs=True))
        routed = routed_of(pipe, missing_ok=True)
        if routed is not None:
            decide = routed.decide

            def deciding(block: int, x: Tensor, text: Tensor | None, text_tokens: int) -> Any:
                parts = decide(block, x, text, text_tokens)
                self.parts[self._place(block)] = parts * (len(x) // len(parts))
                return parts

            routed.decide = deciding

    def _next(self) -> None:
        self.calls += 1

    def _place(self, block: int) -> Place:
        return self.calls // 2, self.calls % 2, block

    def _note(self, block: int, _: nn.Module, __: tuple, arguments: dict[str, Any], output: Any) -> None:
        self.seen[self._place(block)] = arguments, output

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class PrefixMlp(nn.Module):
    """The first k hidden channels, h * sigmoid(1.702 h), the whole output bias."""

    def __init__(self, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, k: int) -> None:
        super().__init__()
        self.parts = up[:k], up_bias[:k], down[:, :k], down_bias

    def forward(self, x: Tensor) -> Tensor:
        up, up_bias, down, down_bias = self.parts
        hidden = x @ up.T + up_bias
        return (hidden / (1.0 + torch.exp(-1.702 * hidden))) @ down.T + down_bias


@dataclass
class Kept:
    """A residual of both streams, and how often it was used since it was made."""

    text: Tensor
    image: Tensor
    used: int = 0


class Reference:
    """E-DiT for one sample, in float64."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.cache: dict[tuple[int, int], Kept] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def logits(self, block: int, call: dict[str, Any]) -> Tensor:
        """Gate logit, then four width logits."""
        router = f"gate_mlps.{block}."
        time = call["temb"][0]
        shift, scale, _ = self.linear(f"{router}img_mod.1", time / (1.0 + torch.exp(-time))).chunk(3)
        tokens = torch.cat([call["encoder_hidden_states"], call["hidden_states"]], dim=1)[0]
        centred = tokens - tokens.mean(-1, keepdim=True)
        normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        hidden = self.linear(f"{router}out.0", normed * (1.0 + scale) + shift).clamp(min=0.0)
        heads = [self.linear(f"{router}out.2", hidden), self.linear(f"{router}width_head", hidden)]
        return torch.cat(heads, dim=-1).mean(0)

    def step(self, place: Place, call: dict[str, Any], steps: int) -> tuple[str, float, Tensor, Tensor]:
        """(action, width, text, image) of a block."""
        step, branch, block = place
        says = self.logits(block, call)
        p, width = torch.sigmoid(says[0]).item(), SHARES[int(says[1:].argmax())]
        text, image = call["encoder_hidden_states"], call["hidden_states"]
        kept = self.cache.get((branch, block))
        if p < 0.5:
            return "skip", width, text, image
        if p <= 0.5 + 0.015 and step >= steps / 2 and kept is not None and kept.used < 10:
            kept.used += 1
            return "reuse", width, text + kept.text, image + kept.image
        after_text, after_image = self.run(block, width, call)
        self.cache[branch, block] = Kept(after_text - text, after_image - image)
        return "run", width, after_text, after_image

    def run(self, block: int, width: float, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        prefix = f"transformer_blocks.{block}."
        own = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        module = QwenImageTransformerBlock(64, num_attention_heads=2, attention_head_dim=32).double().eval()
        module.load_state_dict(own)
        mlp = [
            own[f"img_mlp.{name}"] for name in ("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias")
        ]
        module.img_mlp = PrefixMlp(*mlp, round(width * 256))
        return module(**call)


def of_sample(arguments: dict[str, Any], sample: int) -> dict[str, Any]:
    """A block's arguments for one sample, in float64; the rotary angles as they are."""
    batched = {
        name: arguments[name][sample : sample + 1].double() for name in ("hidden_states", "encoder_hidden_states")
    }
    angles = arguments["image_rotary_emb"]
    return batched | {
        "temb": arguments["temb"][sample : sample + 1].double(), "image_rotary_emb": angles, "encoder_hidden_states_mask": None,
    }  # fmt: skip


def calibrated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Routers moved so that they say something else of every sample and step: gates around the threshold and the margin
    above it, widths around each other; block 2 is always unsure."""
    model = QwenImageTransformer2DModel(
        num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24, in_channels=16, out_channels=4,
        axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("gate_mlps.")})
    pipe = open_pipe(model)
    watch, reference = Watch(pipe), Reference(tensors)
    generate(pipe)
    for block in range(3):
        calls = [of_sample(watch.seen[place][0], s) for place in watch.seen if place[2] == block for s in (0, 1)]
        said = torch.stack([reference.logits(block, call) for call in calls]).float()
        head, widths = f"gate_mlps.{block}.out.2", f"gate_mlps.{block}.width_head"
        scale = 0.0 if block == 2 else 0.08 / said[:, 0].std()
        tensors[f"{head}.weight"] *= scale
        tensors[f"{head}.bias"] = 0.03 - scale * (said[:, :1].median(0).values - tensors[f"{head}.bias"])
        tensors[f"{widths}.bias"] = tensors[f"{widths}.bias"] - said[:, 1:].mean(0)
    return tensors


@pytest.fixture(scope="module")
def tensors(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return calibrated(request.getfixturevalue("tiny"))


@pytest.fixture(scope="module")
def imported(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    save_file(tensors, folder / "released.safetensors")
    ElasticDiTImport(Checkpoint(folder / "released.safetensors"), folder / "out", 700_000).write().verify()
    return folder / "out"


@pytest.fixture
def pipe(imported: Path) -> QwenImagePipeline:
    """The imported transformer, without its adapter."""
    return open_pipe(QwenImageTransformer2DModel.from_pretrained(imported / "transformer"))


def test_every_block_does_what_the_description_says(
    pipe: QwenImagePipeline, imported: Path, tensors: dict[str, Tensor]
) -> None:
    sl.set_budget(sl.load_adapter(pipe, imported / "adapter"), threshold=0.5)
    watch = Watch(pipe)
    generate(pipe)
    references = [Reference(tensors), Reference(tensors)]
    done: list[tuple[str, float]] = []
    differing = 0
    assert len(watch.seen) == STEPS * 2 * 3
    for place, (arguments, (text, image)) in watch.seen.items():
        parts = watch.parts[place]
        differing += len(set(parts)) > 1
        for sample, reference in enumerate(references):
            call = of_sample(arguments, sample)
            action, width, wanted_text, wanted_image = reference.step(place, call, STEPS)
            logits = routed_of(pipe).gates.router(
                place[2], arguments["hidden_states"], arguments["temb"], None, arguments["encoder_hidden_states"]
            )
            ours = torch.cat([logits.gate[:, None], logits.width], dim=1)[sample]
            torch.testing.assert_close(ours.double(), reference.logits(place[2], call), atol=2e-5, rtol=1e-4)
            assert parts[sample].action == action, (place, sample)
            if action == "run":
                assert (parts[sample].tokens, parts[sample].width) == (TOKENS, width), (place, sample)
            torch.testing.assert_close(text[sample].double(), wanted_text[0], atol=5e-5, rtol=1e-5)
            torch.testing.assert_close(image[sample].double(), wanted_image[0], atol=5e-5, rtol=1e-5)
            done.append((action, width))
    # What was compared is worth comparing: everything happens, and often.
    assert all(sum(action == wanted for action, _ in done) > 20 for wanted in ("run", "reuse", "skip"))
    assert {width for action, width in done if action == "run"} == set(SHARES) and differing > 10


def test_an_unsure_block_reuses_ten_times_from_half_of_the_steps_in_each_branch(
    pipe: QwenImagePipeline, imported: Path
) -> None:
    sl.set_budget(sl.load_adapter(pipe, imported / "adapter"), threshold=0.5)
    watch = Watch(pipe)
    generate(pipe)
    for branch in (0, 1):
        actions = [watch.parts[step, branch, 2][0].action for step in range(STEPS)]
        assert actions == ["run"] * 12 + ["reuse"] * 10 + ["run", "reuse"]


def test_a_batch_of_two_is_two_batches_of_one(pipe: QwenImagePipeline, imported: Path) -> None:
    sl.set_budget(sl.load_adapter(pipe, imported / "adapter"), threshold=0.5)
    watch = Watch(pipe)
    together = generate(pipe)
    decided = dict(watch.parts)
    assert any(len(set(parts)) > 1 for parts in decided.values())
    for sample in (0, 1):
        watch.calls = -1
        watch.parts.clear()
        alone = generate(pipe, slice(sample, sample + 1))
        assert {place: parts[sample] for place, parts in decided.items()} == {
            place: parts[0] for place, parts in watch.parts.items()
        }
        torch.testing.assert_close(alone[0], together[sample], atol=1e-4, rtol=1e-3)


def test_the_activation_belongs_to_the_weights_and_goes_with_the_adapter(
    pipe: QwenImagePipeline, imported: Path
) -> None:
    plain = generate(pipe, steps=3)
    keys = pipe.transformer.state_dict().keys()
    tuned = open_pipe(QwenImageTransformer2DModel.from_pretrained(imported / "transformer"))
    for block in tuned.transformer.transformer_blocks:
        activated = ApproximateGELU(64, 256)
        activated.proj = block.img_mlp.net[0].proj
        block.img_mlp.net[0] = activated
    wanted = generate(tuned, steps=3)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    sl.load_adapter(pipe, imported / "adapter")
    assert torch.equal(generate(pipe, steps=3), wanted), "keep=1.0 runs everything"
    assert "quick-gelu" in sl.summary(pipe)
    sl.set_budget(pipe, threshold=0.5)
    assert not torch.allclose(generate(pipe, steps=3), wanted, atol=1e-3)
    with sl.dense(pipe):
        assert torch.equal(generate(pipe, steps=3), wanted)
    assert pipe.transformer.state_dict().keys() == keys
    sl.detach(pipe)
    for name, module in pipe.transformer.named_modules():
        assert "forward" not in module.__dict__ and "_diffusers_hook" not in module.__dict__, name
    assert torch.equal(generate(pipe, steps=3), plain)


def test_a_users_lora_counts_under_the_activation(pipe: QwenImagePipeline, imported: Path) -> None:
    """The projection is looked up at each call, so what peft puts around it computes, before or after loading."""
    from peft import LoraConfig

    sl.load_adapter(pipe, imported / "adapter")
    before = generate(pipe, steps=2)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["img_mlp.net.0.proj"], init_lora_weights=False))
    after = generate(pipe, steps=2)
    assert not torch.allclose(after, before, atol=1e-4)
    sl.detach(pipe)
    sl.load_adapter(pipe, imported / "adapter")
    assert torch.equal(generate(pipe, steps=2), after)


def test_an_activation_needs_a_module_that_has_one(pipe: QwenImagePipeline, imported: Path) -> None:
    pipe.transformer.transformer_blocks[1].img_mlp.net[0] = nn.Linear(64, 256)
    with pytest.raises(sl.UnsupportedBackboneError, match="'img_mlp.net.0' of block 1 is a Linear"):
        sl.load_adapter(pipe, imported / "adapter")
    assert routed_of(pipe, missing_ok=True) is None


def test_the_command_writes_verifies_and_goes_on(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = command(monkeypatch, capsys)
    path, out = tmp_path / "released.safetensors", tmp_path / "out"
    save_file(tensors, path)
    read = Checkpoint.read
    with monkeypatch.context() as patch:

        def stopping(self: Checkpoint, name: str) -> Tensor:
            if name == "proj_out.weight":
                raise KeyboardInterrupt
            return read(self, name)

        patch.setattr(Checkpoint, "read", stopping)
        code, _, error = run("import", "elastic-dit", path, "--out", out, "--shard-gb", 0.001)
    assert code == 1 and "nothing is left half-written" in error
    assert not list(out.rglob("*part*")) and not list(out.rglob("config.json"))
    for _ in range(2):
        code, said, error = run(
            "import", "elastic-dit", path, "--out", out, "--shard-gb", 0.001, "--json", tmp_path / "done.json"
        )
        assert code == 0 and "threshold=0.5" in said, error
    written = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} - {"import.json"}
    assert f'"{min(written)}"' in (tmp_path / "done.json").read_text()
    sl.load_adapter(QwenImageTransformer2DModel.from_pretrained(out / "transformer"), out / "adapter")

    path.write_bytes(path.read_bytes()[:-1])
    for arguments, said in [
        (("elastic-dit", path, "--out", out), "no whole safetensors file"),
        (("elastic-dit", tmp_path / "nowhere", "--out", out), "does not exist"),
    ]:
        code, _, error = run("import", *arguments)
        assert code == 1 and error.startswith("shivelight: ") and said in error
        assert len(error.strip().splitlines()) == 1
    for arguments in (("elastic-dit",), ("elastic-dit", path), ("other", path, "--out", out)):
        assert run("import", *arguments)[0] == 2


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""
    import sys

    from shivelight import cli

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shivelight", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return go
