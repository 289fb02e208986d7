"""Bad input, for every family: one clear error that names the thing, the value and the remedy; the model stays as it was."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import NAMES, TOKENS, free, gated, kept, of_samples, one_batch, run, widths_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from shivelight.backbones import find_spec


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """A family."""
    return request.param


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What happens inside leaves the model as it is: its modules, their attributes, hooks and weights."""

    def traces() -> dict[str, Any]:
        return {
            name: {
                key: list(value) if isinstance(value, dict | set) else id(value) for key, value in part.__dict__.items()
            }
            for name, part in model.named_modules()
        }

    before, state = traces(), {key: value.clone() for key, value in model.state_dict().items() if not value.is_meta}
    yield
    assert traces() == before
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def resized(model: Any, **changes: Any) -> Any:
    """Another model of the same class."""
    torch.manual_seed(0)
    return type(model).from_config(dict(model.config) | changes).requires_grad_(False).eval()


def cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


# precision and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_another_precision_takes_the_backbones(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    gated(model, reuse=False, widths=widths_of(name))
    expected = run(model, call)
    sl.save_adapter(model, tmp_path / "full")
    sl.detach(model)
    model.to(dtype)
    sl.set_budget(sl.load_adapter(model, tmp_path / "full"), threshold=0.5)
    routed = routed_of(model)
    assert {p.dtype for p in routed.parameters()} == {dtype}
    assert torch.isfinite(run(model, cast(call, dtype)).float()).all()
    sl.save_adapter(model, tmp_path / "half")
    sl.detach(model)
    whole = build(name).transformer
    sl.set_budget(sl.load_adapter(whole, tmp_path / "half"), threshold=0.5)
    assert {p.dtype for p in routed_of(whole).parameters()} == {torch.float32}
    assert torch.isfinite(run(whole, call)).all() and run(whole, call).shape == expected.shape


def test_routers_of_another_precision_than_the_backbone_run(name: str) -> None:
    pipe = build(name)
    call, model = cast(one_batch(pipe, name, 0, 1), torch.bfloat16), pipe.transformer.bfloat16()
    for attach in (gated, kept) if name in TOKENS else (gated,):
        routed = attach(model, **({"reuse": False, "widths": widths_of(name)} if attach is gated else {}))
        routed.float()  # what a user does who casts `pipe.transformer.shivelight` by hand
        out = run(model, call)
        assert out.dtype == torch.bfloat16 and torch.isfinite(out.float()).all()


def test_routers_on_another_device_are_refused(name: str) -> None:
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    dense = run(model, call)
    for attach in (gated, kept) if name in TOKENS else (gated,):
        routed = attach(model, **({"reuse": False, "widths": (1.0,)} if attach is gated else {}))
        (routed.gates if attach is gated else routed.router).to("meta")
        with pytest.raises(sl.ShivelightError, match="routers are offloaded"):
            run(model, call)
        sl.detach(model)
        assert torch.equal(run(model, call), dense)


def test_a_backbone_without_weights_takes_an_adapter_before_them(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    gated(pipe.transformer, reuse=False, widths=(1.0,))
    sl.save_adapter(pipe.transformer, tmp_path)
    with torch.device("meta"):
        empty = resized(pipe.transformer)
    sl.load_adapter(empty, tmp_path)
    assert {p.is_meta for p in routed_of(empty).parameters()} == {False}


# adapters that do not belong here


def test_an_adapter_of_another_family_is_refused_and_the_one_that_is_attached_stays(name: str, tmp_path: Path) -> None:
    other = "pixart" if name != "pixart" else "sd3"
    theirs = build(other)
    gated(theirs, widths=(1.0,))
    sl.save_adapter(theirs, tmp_path)
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    with untouched(model), pytest.raises(sl.AdapterError, match=f"is for a '{other}' backbone, this one is '{name}'"):
        sl.load_adapter(pipe, tmp_path)
    gated(model, reuse=False, widths=widths_of(name))
    mine = run(model, call)
    with untouched(model), pytest.raises(sl.AdapterError, match=f"is for a '{other}' backbone"):
        sl.load_adapter(model, tmp_path)
    assert torch.equal(run(model, call), mine)
    # Another adapter takes its place, which attach says.
    gated(model, reuse=False, widths=(1.0,), seed=7)
    assert len([part for part in model.modules() if part is routed_of(model)]) == 1
    sl.detach(model)
    assert routed_of(model, missing_ok=True) is None


def test_an_adapter_of_another_size_is_refused(name: str, tmp_path: Path) -> None:
    model = build(name).transformer
    gated(model, reuse=False, widths=(1.0,))
    sl.save_adapter(model, tmp_path)
    layers = {"num_layers": model.config.num_layers + 1}
    deeper = [layers, {"num_single_layers": 3}] if "num_single_layers" in model.config else [layers]
    for changes in deeper:
        other, (field, value) = resized(model, **changes), next(iter(changes.items()))
        with (
            untouched(other),
            pytest.raises(sl.AdapterError, match=rf"another .*{field} {model.config[field]} \(here {value}\)"),
        ):
            sl.load_adapter(other, tmp_path)


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(data[: len(data) // 2])


def no_json(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("{")


def of_the_future(folder: Path) -> None:
    stored = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(stored | {"format_version": 99}))


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = math.nan
    save_file(tensors, folder / WEIGHTS_NAME)


def incomplete(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS_NAME)


def missing(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


DAMAGE: dict[Callable[[Path], None], str] = {
    truncated: "not a readable safetensors file.*Copy the adapter again",
    no_json: "cannot be read as JSON.*Copy the adapter again",
    of_the_future: "format version 99.*update the package",
    with_nan: "NaN or infinite.*train it anew",
    incomplete: "lacks .*1 missing",
    missing: f"has no {WEIGHTS_NAME}.*save_adapter",
}


def test_a_broken_adapter_is_refused(name: str, tmp_path: Path) -> None:
    model = build(name).transformer
    gated(model, reuse=False, widths=(1.0,))
    for damage in DAMAGE:
        damage(sl.save_adapter(model, tmp_path / damage.__name__))
    sl.detach(model)
    for damage, message in DAMAGE.items():
        with untouched(model), pytest.raises(sl.AdapterError, match=f"(?s){damage.__name__}.*{message}"):
            sl.load_adapter(model, tmp_path / damage.__name__)


# backbones that cannot be routed as they are


def test_a_backbone_without_blocks_is_refused(name: str) -> None:
    model = build(name).transformer
    few = find_spec(model).first_routed
    changes = {"num_layers": few} | ({"num_single_layers": 0} if "num_single_layers" in model.config else {})
    empty = resized(model, **changes)
    with untouched(empty), pytest.raises(sl.UnsupportedBackboneError, match=f"has {few} blocks in .*none to route"):
        sl.attach(empty, sl.RoutingConfig(None, sl.BlockRouting(widths=(1.0,))))


def test_context_parallelism_is_refused_before_and_after(name: str) -> None:
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    gated(model, reuse=False, widths=(1.0,))
    model._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.raises(sl.UnsupportedBackboneError, match="Context parallelism.*Disable it"):
        run(model, call)
    sl.detach(model)
    with untouched(model), pytest.raises(sl.UnsupportedBackboneError, match="Context parallelism.*Disable it"):
        free(pipe)


def test_a_compiled_backbone_is_routed_as_what_it_wraps(name: str) -> None:
    pipe = build(name)
    model = pipe.transformer
    compiled = torch.compile(model, backend="eager")
    with untouched(model):
        pipe.transformer = compiled
        free(pipe)
        assert routed_of(model) is routed_of(compiled) is routed_of(pipe)
        assert sl.attach(compiled, sl.RoutingConfig(None, sl.BlockRouting(widths=(1.0,)))) is compiled
        sl.detach(pipe)
        pipe.transformer = model


# passes and budgets


def test_batches_that_cannot_be_are_refused(name: str) -> None:
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    for attach in (gated, kept) if name in TOKENS else (gated,):
        attach(model, **({"reuse": False, "widths": widths_of(name)} if attach is gated else {}))
        expected = run(model, call)
        with (
            sl.branch(model, "both"),
            pytest.raises(sl.ShivelightError, match="conditional half.* has 1 samples.*branch"),
        ):
            run(model, of_samples(call, 2, 0))
        with pytest.raises(sl.ShivelightError, match="no samples"):
            run(model, of_samples(call, 2))
        with pytest.raises(sl.ShivelightError, match="branch is 'twice'; one of"), sl.branch(model, "twice"):
            pass
        assert torch.equal(run(model, call), expected)


def test_budgets_out_of_range_are_refused_and_the_old_one_stays(name: str) -> None:
    pipe = build(name)
    ways = [free, lambda pipe: gated(pipe, widths=(1.0,))] + ([kept] if name in TOKENS else [])
    for attach in ways:
        routed = attach(pipe)
        before = routed.budget
        for kind in ("compute", "keep"):
            for value in (0, -0.5, 1.01, math.nan, math.inf, "half", None):
                with pytest.raises(sl.BudgetError, match=r"(keep|compute)"):
                    sl.set_budget(pipe, **{kind: value})
        for value in (0.0, 1.0, -1, math.nan, "half"):
            with pytest.raises(sl.BudgetError, match="threshold"):
                sl.set_budget(pipe, threshold=value)
        for options in ({}, {"keep": 0.5, "compute": 0.5}, {"compute": 0.5, "threshold": 0.5}, {"cap": True}):
            with pytest.raises(sl.BudgetError, match="keep|compute"):
                sl.set_budget(pipe, **options)
        with pytest.raises(sl.BudgetError, match="cannot be reached.*nearest|have no statistics.*threshold") as caught:
            sl.set_budget(pipe, compute=1e-9)
        assert (caught.value.nearest is None) == (routed.gates is not None)
        assert routed.budget == before


def test_latents_that_are_nan_stay_with_their_generation(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    ways = [free, lambda pipe: gated(pipe, widths=widths_of(name))] + ([kept] if name in TOKENS else [])
    for attach in ways:
        attach(pipe)
        expected = call(pipe, 0, steps=3)
        spoilt = []

        def spoil(module: nn.Module, args: tuple, kwargs: dict[str, Any], spoilt: list = spoilt) -> tuple:
            key = "hidden_states"
            first = args[0] if args else kwargs[key]
            spoilt.append(first.shape)
            nan = torch.full_like(first, math.nan)
            return ((nan, *args[1:]), kwargs) if args else ((), kwargs | {key: nan})

        handle = pipe.transformer.register_forward_pre_hook(spoil, with_kwargs=True)
        out = call(pipe, 1, steps=3)
        handle.remove()
        assert spoilt and out.isnan().any()  # what the dense model says, too
        assert torch.equal(call(pipe, 0, steps=3), expected)
