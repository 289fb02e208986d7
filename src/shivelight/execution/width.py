"""MLPs narrowed for real: the first s * H hidden channels in order of importance, through the block's own forward.

    y = down[:, order[:k]] act(up[order[:k]] x + b[order[:k]]) + b_down        (E-DiT, inference; the down bias stays)

Shapes: H hidden channels, k = floor(s * H) of them, D token width. The backbone's own parameters are never permuted or
changed: slices are gathered from them into copies, which `torch.func.functional_call` lends to the block for one call.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shivelight.backbones.spec import Mlp
from shivelight.cost import kept_channels
from shivelight.errors import AdapterError, ShivelightError
from shivelight.execution.tokens import queued
from shivelight.routing import DEFAULT_WIDTHS


@dataclass(frozen=True)
class _Source:
    """What a copy was gathered from: enough to notice that the parameter holds something else now."""

    # The object, not its address: a freed block of memory is soon given to another weight.
    storage: "weakref.ref[torch.UntypedStorage]"
    pointer: int
    version: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Source":
        return cls(weakref.ref(tensor.untyped_storage()), tensor.data_ptr(), tensor._version, tensor.dtype)

    def is_still(self, tensor: Tensor) -> bool:
        return self.storage() is tensor.untyped_storage() and (self.pointer, self.version, self.dtype) == (
            tensor.data_ptr(),
            tensor._version,
            tensor.dtype,
        )


@dataclass
class _Held:
    """One block's copies: the widest narrow share in sorted order, and the slice of each width made so far."""

    sources: dict[str, _Source]
    whole: dict[str, Tensor]
    slices: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def fits(self, sources: dict[str, Tensor]) -> bool:
        """Whether these parameters are still what the copies were gathered from."""
        return self.sources.keys() == sources.keys() and all(
            self.sources[name].is_still(source) for name, source in sources.items()
        )


class NarrowMlps:
    """Weights of narrower MLPs, gathered once from the backbone's own and gathered again when those change.

    Each block holds one sorted copy of its widest share below 1; narrower ones are views of its beginning. Where an
    up-projection stacks two halves (GEGLU, SwiGLU), the beginnings of both are no view, so there each width has a copy
    of the up-projection. A block without an order (identity) and without halves needs no copy at all.

    Swapped weights (DoRA folded or not), `model.to(...)`, `load_state_dict` and optimizer steps are noticed at the next
    call. Writing in place through `weight.data` is not (PyTorch does not count it; peft's `fuse_lora` does it while its
    layers are in the way): call `forget()` after that, or simply when a generation begins, which also lets go of memory
    on a device that the model has left.

    Args:
        blocks: the routed blocks by index.
        mlps: what to narrow in each of them.
        orders: for each block a LongTensor [H], order[j] = the channel of rank j; a block that is missing keeps the order
            of its weights.
        widths: the shares s that may be asked for.
    """

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        mlps: Mapping[int, Mlp],
        orders: Mapping[int, Tensor] | None = None,
        widths: Sequence[float] = DEFAULT_WIDTHS,
    ) -> None:
        self.widths = tuple(widths)
        self._blocks = dict(blocks)
        self._mlps = {index: mlps[index] for index in self._blocks}
        self._channels = {index: self._mlps[index].channels(block) for index, block in self._blocks.items()}
        self._offsets = {index: self._mlps[index].offset(block) for index, block in self._blocks.items()}
        self._before = {index: self._mlps[index].rows_before(block) for index, block in self._blocks.items()}
        self._orders = {index: order.detach().cpu() for index, order in (orders or {}).items()}
        self._orders_on: dict[tuple[int, torch.device], Tensor] = {}
        self._held: dict[int, _Held] = {}
        for index, order in self._orders.items():
            _check_order(index, order, self._channels)

    def count(self, block: int, share: float) -> int:
        """Hidden channels that a block runs at this share."""
        return kept_channels(share, self._channels[block])

    def can_narrow(self, block: int) -> str | None:
        """Why this block must run at full width now, or None where it can be narrowed.

        Slicing reads the linear layers' weights and leaves out what is wrapped around them, so a LoRA of the user's,
        quantised weights and hooks on the layers themselves (layer-wise offload or casting) all keep the full width.
        """
        return self._obstacle(block, self._layers(block)) or self._absent(block)

    @torch.compiler.disable(reason="looks at memory, not at values")
    def replacements(self, block: int, share: float) -> dict[str, Tensor]:
        """Parameters, by name relative to the block, that make its MLP run the first `share` of its channels.

        Empty (run the block as it is) at full width and where `can_narrow` has a reason. While autograd records and
        the weights themselves are being trained, the slices are gathered anew, so that gradients reach the weights.
        """
        if share not in self.widths:
            raise ShivelightError(f"The MLP width {share} is none of the widths {self.widths} that were prepared.")
        if share == 1.0:
            return {}
        layers = self._layers(block)
        if (self._obstacle(block, layers) or self._absent(block)) is not None:
            self.forget(block)
            return {}
        count = self.count(block, share)
        sources = self._sources(block, layers)
        trained = torch.is_grad_enabled() and any(source.requires_grad for source in sources.values())
        if trained or (block not in self._orders and self._mlps[block].halves == 1):
            return self._gather(block, count, sources)
        held = self._held.get(block)
        if held is None or not held.fits(sources):
            self.forget(block)  # first, so that old and new copies never lie in memory together
            held = self._held[block] = self._hold(block, sources)
        if count not in held.slices:
            held.slices[count] = self._slice(block, count, sources, held.whole)
        return dict(held.slices[count])

    def sizes(self, block: int, share: float) -> dict[str, int]:
        """Attributes, by name relative to the block, that say so while it runs with the `replacements` of this share."""
        name = self._mlps[block].size
        return {} if name is None else {name: self.count(block, share)}

    def forget(self, block: int | None = None) -> None:
        """Drop the copies of one block, or of all; they are gathered again when they are asked for."""
        if block is None:
            self._held.clear()
        else:
            self._held.pop(block, None)

    def memory(self) -> int:
        """Bytes that the copies hold."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for held in self._held.values()
            for tensors in (held.whole, *held.slices.values())
            for tensor in tensors.values()
        }
        return sum(storages.values())

    def _layers(self, block: int) -> dict[str, Any]:
        # Looked up at each call: peft and quantisation put other layers in their places.
        return {
            name: self._blocks[block].get_submodule(name) for name in (*self._mlps[block].up, self._mlps[block].down)
        }

    @staticmethod
    def _obstacle(block: int, layers: dict[str, Any]) -> str | None:
        for name, layer in layers.items():
            if type(layer) is not nn.Linear:
                if hasattr(layer, "base_layer"):
                    return f"{name!r} of block {block} carries a LoRA; unload it, or fuse and unload it."
                return f"{name!r} of block {block} is a {type(layer).__name__}, not a plain nn.Linear."
            if "forward" in layer.__dict__:
                return f"{name!r} of block {block} has a hook of its own (offloading or casting layer by layer)."
            weight = layer.weight
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                return f"The weight of {name!r} of block {block} is quantised or not a plain parameter."
            if weight.is_meta:
                return f"The weight of {name!r} of block {block} is offloaded (on the meta device)."
            if weight.is_inference():
                return f"The weight of {name!r} of block {block} was made in inference mode, where no change shows."
        return None

    def _absent(self, block: int) -> str | None:
        registry = getattr(self._blocks[block], "_diffusers_hook", None)
        order = [] if registry is None else registry._hook_order
        if order[:1] == ["group_offloading"]:
            return f"Block {block} is brought to its device after its slices would be read; attach before offloading groups."
        return None

    def _is_down(self, block: int, name: str) -> bool:
        return name == f"{self._mlps[block].down}.weight"

    def _sources(self, block: int, layers: dict[str, Any]) -> dict[str, Tensor]:
        """The parameters that narrowing slices, by name."""
        sources = {}
        for name, layer in layers.items():
            sources[f"{name}.weight"] = layer.weight
            if name != self._mlps[block].down and layer.bias is not None:
                sources[f"{name}.bias"] = layer.bias
        return sources

    def _gather(self, block: int, count: int, sources: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first `count` channels of every source: views where the channels keep their order and have no halves."""
        if not sources:
            return {}
        device = next(iter(sources.values())).device
        order, offset = self._order_on(block, device), self._offsets[block]
        before, halves = self._before[block], self._mlps[block].halves
        return {
            name: _columns(source, order, count, offset)
            if self._is_down(block, name)
            else _rows(source, order, count, halves, before)
            for name, source in sources.items()
        }

    def _order_on(self, block: int, device: torch.device) -> Tensor | None:
        """The order of a block's channels on a device, moved there once and without waiting for it."""
        order = self._orders.get(block)
        if order is None:
            return None
        if (block, device) not in self._orders_on:
            self._orders_on[block, device] = queued(order, device)
        return self._orders_on[block, device]

    def _hold(self, block: int, sources: dict[str, Tensor]) -> _Held:
        seen = {name: _Source.of(source) for name, source in sources.items()}
        widest = self.count(block, max(width for width in self.widths if width < 1.0))
        if self._mlps[block].halves > 1:
            # No width's rows are a beginning of another's; only the columns are shared.
            sources = {name: source for name, source in sources.items() if self._is_down(block, name)}
        # A copy made in inference mode could not be used where autograd records.
        with torch.inference_mode(False), torch.no_grad():
            whole = {name: part.contiguous() for name, part in self._gather(block, widest, sources).items()}
        return _Held(seen, whole)

    def _slice(self, block: int, count: int, sources: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
        columns, rows = self._offsets[block] + count, self._before[block] + count
        with torch.inference_mode(False), torch.no_grad():
            sliced = {
                name: part[:, :columns] if self._is_down(block, name) else part[:rows] for name, part in whole.items()
            }
            return sliced | self._gather(block, count, {name: s for name, s in sources.items() if name not in whole})


class OwnForward(nn.Module):
    """Lets `functional_call` swap a block's parameters around a given callable, instead of around the block's call.

    Args:
        block: whose parameters they are.
        forward: the block's original forward as a hook knows it (`fn_ref.original_forward`): a call of the block itself would
            go through its __call__ and so enter that hook, and every one around it, a second time.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.original = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the block."""
        return self.original(*args, **kwargs)


def call_narrow(own: OwnForward, replacements: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The block's forward of these arguments, with some of its parameters replaced for the time of the call."""
    named = {f"block.{name}": tensor for name, tensor in replacements.items()}
    # Nothing is tied inside an MLP, and looking for ties would walk all parameters at each call.
    return functional_call(own, named, args, kwargs, tie_weights=False)


@contextmanager
def resized(block: nn.Module, sizes: Mapping[str, int]) -> Iterator[None]:
    """Other values of a block's attributes (`NarrowMlps.sizes`) for a while."""
    places = [(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in sizes]
    previous = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), size in zip(places, sizes.values(), strict=True):
            setattr(owner, name, size)
        yield
    finally:
        for (owner, name), size in zip(places, previous, strict=True):
            setattr(owner, name, size)


@contextmanager
def masked_channels(block: nn.Module, mlp: Mlp, mask: Tensor) -> Iterator[None]:
    """While the block runs, its MLP's hidden channels are multiplied by `mask` [B, H]: how widths are trained.

    The mask reaches the down-projection's last H inputs; what a fused block puts before them stays.
    """
    offset = mlp.offset(block)

    def narrow(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        factors = mask.to(hidden.dtype)[:, None]
        if offset:
            factors = torch.cat([factors.new_ones(len(mask), 1, offset), factors], dim=-1)
        return (hidden * factors, *args[1:])

    handle = block.get_submodule(mlp.down).register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def _rows(tensor: Tensor, order: Tensor | None, count: int, halves: int, before: int) -> Tensor:
    """[before + halves * H, ...] -> [before + halves * count, ...], each half narrowed alike."""
    if order is None and halves == 1:
        return tensor[: before + count]
    stacked = tensor[before:].unflatten(0, (halves, -1))
    kept = stacked[:, :count] if order is None else stacked.index_select(1, order[:count])
    return torch.cat([tensor[:before], kept.flatten(0, 1)]) if before else kept.flatten(0, 1)


def _columns(weight: Tensor, order: Tensor | None, count: int, offset: int) -> Tensor:
    """[D, offset + H] -> [D, offset + count]: what comes before the hidden channels stays whole."""
    if order is None:
        return weight[:, : offset + count]
    index = torch.cat([torch.arange(offset, device=order.device), offset + order[:count]])
    return weight.index_select(1, index)


def _check_order(block: int, order: Tensor, channels: Mapping[int, int]) -> None:
    if block not in channels:
        raise AdapterError(f"There is a channel order for block {block}, but only {sorted(channels)} are routed.")
    hidden = channels[block]
    if (
        order.dtype != torch.int64
        or order.shape != (hidden,)
        or not torch.equal(order.sort().values, torch.arange(hidden))
    ):
        raise AdapterError(
            f"The channel order of block {block} ({order.dtype}, shape {tuple(order.shape)}) is no permutation of its "
            f"{hidden} hidden channels: the adapter belongs to another backbone. Rank the channels again."
        )
