"""Many adapters on one base: the linear layers of a model with a stack of factors, and the slots that each row uses.

A layer computes `y = x W^T + (x A^T ⊙ m) B^T`. A stacks the factors of neighboring slots, so that the products of every row
with every adapter are one matrix product; `m` zeroes those with other rows' adapters, and multiplies by the weights of a blend.
So a batch in which rows use different adapters or none costs two thin matrix products more than the base, however many adapters
there are; blends of two cost four. The tokens of one prompt use one adapter: no `m`, and only its slot.

Where the processor multiplies 16-bit floats slowly, the stack and its products are in float32, rounded once they are added.

Layers with the same input (q, k, v; gate, up) share the first product. Ranks are padded with zeros to a multiple of 16, so that
a slot's numbers are added up in the same order wherever it is in the stack.

An adapter with magnitudes (DoRA) also has a gain for each output, `g = m / |W + sBA|`, which its B contains already. What is
left is to add `(g - 1) x W^T`, as peft does (`tuners/lora/dora.py`), to the rows that use it; no other row is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training.layers.lora import Frozen, replace_module
from adapterhub.training.layers.nf4_matrix import dense, dense_for_one_product
from adapterhub_converters.lazy_dataclass import dataclass

PADDING = 16
"""Ranks are padded to a multiple of this."""
MAX_WIDTH = 128
"""Slots are multiplied together up to this many numbers. Libraries split longer sums, and a sum that is split inside a slot is
rounded differently from that of the slot alone."""
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Use = tuple[tuple[int, float], ...]
"""Slots with their weights: `()` is the base."""
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By the path of a layer, A `(r, in)` and the transpose of `scaling * B`, `(r, out)`."""
Gains = Mapping[str, Tensor]
"""By the path of a layer, DoRA's gain of each output, float32 `(out,)`; empty for other adapters."""


def padded_rank(rank: int) -> int:
    """Return the rank with its padding."""
    return -(rank // -PADDING) * PADDING


@dataclass
class _SlotPart:
    """Neighboring slots that a pass uses.

    Attributes:
        slots: The first of them, and the one after the last.
        hidden: bool `(rows, slots * rank)`, True where a row does not use a slot; None if all rows use all of them.
        weights: `(rows or 1, slots * rank)` in the dtype of the stack; None if all are 1.
    """

    slots: tuple[int, int]
    hidden: Tensor | None = None
    weights: Tensor | None = None

    def mask(self, products: Tensor) -> Tensor:
        """Apply both to `(layers, rows, slots * rank)`, in place."""
        # Not by a factor of zero, because the product of a row with another row's adapter may be infinite.
        if self.hidden is not None:
            products.masked_fill_(self.hidden, 0)
        return products if self.weights is None else products.mul_(self.weights)


class Slots:
    """The stack of active adapters of a model, whose linear layers it replaces; nothing is allocated before the first adapter.

    Args:
        linears: The layers by their path, frozen.
        count: The number of slots.
        dtype: That of the model.
        stack_dtype: That of the stack; None for the model's.

    Attributes:
        shapes: `(out_features, in_features)` of every layer by its path.
        rank: The rank of all slots, with padding; 0 before the first adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, Frozen],
        count: int,
        dtype: torch.dtype,
        stack_dtype: torch.dtype | None = None,
    ) -> None:
        self.count, self.rank, self.dtype, self.stack_dtype = count, 0, dtype, stack_dtype or dtype
        self.parts: list[_SlotPart] = []
        self.scaled_rows: list[tuple[int, Tensor | None]] = []  # slots with gains, and the rows of each; None for all
        self._with_gains: set[int] = set()
        self._layers: dict[str, _SlotLinear] = {}
        self._inputs: dict[str, _Input] = {}
        for path, layer in linears.items():
            parent, _, name = path.rpartition(".")
            sharing = next(("|".join(names) for names in _SHARING if name in names), name)
            shared = self._inputs.setdefault(f"{parent}.{sharing}", _Input(self))
            self._layers[path] = _SlotLinear(layer, shared)
            replace_module(model, path, self._layers[path])
        self.shapes = {path: layer.shape for path, layer in self._layers.items()}

    def weight(self, path: str) -> Tensor:
        """Return the matrix of a layer, float32 `(out, in)`."""
        return dense(self._layers[path].base, torch.float32)

    def fill(self, slot: int, factors: Factors, gains: Gains | None = None) -> None:
        """Put an adapter into a slot, replacing its content; gains are those of B too."""
        rank = max(padded_rank(max(len(A) for A, _ in factors.values())), self.rank)
        for path in factors:
            self._layers[path].join()
        # All slots get the same rank, because the stack is one tensor.
        if rank > self.rank:
            self.rank = rank
            for shared in self._inputs.values():
                shared.allocate()
        for path, layer in self._layers.items():
            if path in factors:
                layer.fill(slot, *factors[path])
            else:
                layer.clear(slot)
        self._fill_gains(slot, gains or {})

    def _fill_gains(self, slot: int, gains: Gains) -> None:
        """Replace the gains of a slot."""
        for path, layer in self._layers.items():
            layer.gains.pop(slot, None)
            if path in gains:
                layer.gains[slot] = gains[path].to(layer.device)
        self._with_gains.discard(slot)
        if gains:
            self._with_gains.add(slot)

    def clear(self) -> None:
        """Free the stack."""
        self.rank, self._with_gains = 0, set()
        for shared in self._inputs.values():
            shared.free()

    @contextmanager
    def using(self, uses: Sequence[Use], tokens: int) -> Iterator[None]:
        """Let the layers use these slots within the block.

        Args:
            uses: The slots of each token; or of all tokens, if there is only one.
            tokens: The tokens of the pass; those after the last of several `uses` use nothing.
        """
        self.parts = self._parts_for_all(uses[0]) if len(set(uses)) == 1 else self._parts_by_row(uses, tokens)
        self.scaled_rows = self._rows_with_gains(uses)
        try:
            yield
        finally:
            self.parts, self.scaled_rows = [], []
            for shared in self._inputs.values():
                shared.forget()

    def _rows_with_gains(self, uses: Sequence[Use]) -> list[tuple[int, Tensor | None]]:
        """Return the slots in use that have gains, each with its rows."""
        if not self._with_gains:
            return []
        slots = sorted(self._with_gains & {slot for use in set(uses) for slot, _ in use})
        if len(set(uses)) == 1:
            return [(slot, None) for slot in slots]
        rows = {slot: [row for row, use in enumerate(uses) if slot in dict(use)] for slot in slots}
        return [(slot, torch.tensor(rows[slot], device=self._device)) for slot in slots]

    def _parts_for_all(self, use: Use) -> list[_SlotPart]:
        """Return the parts for a pass whose tokens all use the same slots."""
        return [
            _SlotPart((slot, slot + 1), weights=None if weight == 1.0 else self._on_device(torch.full((1, 1), weight)))
            for slot, weight in use
        ]

    def _parts_by_row(self, uses: Sequence[Use], tokens: int) -> list[_SlotPart]:
        # The slots of a blend one after another, as for a row alone: a sum in another order is rounded differently.
        """Return the parts for a pass whose tokens use different slots."""
        turns = range(max(len(use) for use in uses))
        return [part for turn in turns for part in self._parts_of_turn([use[turn : turn + 1] for use in uses], tokens)]

    def _parts_of_turn(self, uses: Sequence[Use], tokens: int) -> Iterator[_SlotPart]:
        """Yield the parts in which each token uses one slot, or none."""
        together = max(1, MAX_WIDTH // self.rank)
        used = sorted({slot for use in uses for slot, _ in use})
        for _, group in groupby(used, lambda slot: slot // together):
            slots = [*group]
            weights = torch.zeros(tokens, slots[-1] - slots[0] + 1)
            for row, use in enumerate(uses):
                for slot, weight in use:
                    if slot in slots:
                        weights[row, slot - slots[0]] = weight
            plain = bool(((weights == 0) | (weights == 1)).all())
            wide = self._on_device(weights.repeat_interleave(self.rank, dim=1))
            yield _SlotPart((slots[0], slots[-1] + 1), wide == 0, None if plain else wide)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self.stack_dtype)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._layers.values())).device


class _Input:
    """The A factors of layers that get the same input, and their products with it, computed once in a pass.

    Attributes:
        members: The layers that some adapter has targeted.
        lora_A: `(slots, members, rank, in)`, so that those of neighboring slots form one matrix.
    """

    def __init__(self, stack: Slots) -> None:
        self.stack = stack
        self.members: list[_SlotLinear] = []
        self.lora_A: Tensor | None = None
        self._views: dict[tuple[int, int], Tensor] = {}  # of lora_A, cached because a pass has thousands of small steps
        self._x: Tensor | None = None
        self._products: list[Sequence[Tensor]] = []

    def products(self, x: Tensor) -> list[Sequence[Tensor]]:
        """Return, for an input `(…, in)`, the products `(tokens, slots * rank)` for each part of the pass and each member."""
        # By identity: the layers of one input get the same tensor object.
        if x is not self._x:
            rows = x.reshape(-1, x.shape[-1]).to(self.stack.stack_dtype)
            self._products = [part.mask(self._product(rows, part.slots)).unbind() for part in self.stack.parts]
            self._x = x
        return self._products

    def _product(self, rows: Tensor, slots: tuple[int, int]) -> Tensor:
        """Return, for rows `(tokens, in)`, the products `(members, tokens, slots * rank)`."""
        A = self._views.get(slots)
        if A is None:
            A = self._views[slots] = self.lora_A[slice(*slots)].flatten(0, 2)  # type: ignore[index]
        product, count, members = nn.functional.linear(rows, A), slots[1] - slots[0], len(self.members)
        if count == 1 or members == 1:
            return product.view(len(rows), members, -1).transpose(0, 1)
        return product.view(len(rows), count, members, -1).permute(2, 0, 1, 3).reshape(members, len(rows), -1)

    def forget(self) -> None:
        """Free the products of the pass."""
        self._x, self._products = None, []

    def join(self, layer: _SlotLinear) -> int:
        """Make room for one more layer, and return its place."""
        self.members.append(layer)
        if self.stack.rank:
            self.allocate()
        return len(self.members) - 1

    def allocate(self) -> None:
        """Give all members room for the stack's rank, keeping their content."""
        if not self.members:
            return
        first, count, rank = self.members[0], self.stack.count, self.stack.rank
        options = {"dtype": self.stack.stack_dtype, "device": first.device}
        before, self.lora_A = self.lora_A, torch.zeros(count, len(self.members), rank, first.shape[1], **options)
        if before is not None:
            self.lora_A[:, : before.shape[1], : before.shape[2]] = before
        self._views = {}
        for layer in self.members:
            layer.allocate(count, rank, options)

    def free(self) -> None:
        """Remove all members."""
        for layer in self.members:
            layer.free()
        self.members, self.lora_A, self._views = [], None, {}


class _SlotLinear(Frozen):
    """A frozen linear layer, and its part of the stack.

    Attributes:
        lora_B: `(slots, rank, out)`, scaled; None while no adapter targets the layer.
        gains: DoRA's, by slot.
        place: Its index among the members of its input.
    """

    def __init__(self, layer: Frozen, shared: _Input) -> None:
        super().__init__(layer.base, layer.bias)
        self.transposed, self._shared = layer.transposed, shared
        self.lora_B: Any = None
        self.gains: dict[int, Tensor] = {}
        self.place: int | None = None
        self._views: dict[tuple[int, int], Tensor] = {}  # of lora_B

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.base.shape[0], self.base.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of its matrix."""
        return self.base.device

    def join(self) -> None:
        """Become a member of its input, unless it is one."""
        if self.place is None:
            self.place = self._shared.join(self)

    def allocate(self, count: int, rank: int, options: Mapping[str, Any]) -> None:
        """Make room for the rank in all slots, keeping their content."""
        old, self.lora_B = self.lora_B, torch.zeros(count, rank, self.shape[0], **options)
        if old is not None:
            self.lora_B[:, : old.shape[1]] = old
        self._views = {}

    def free(self) -> None:
        """Leave the stack."""
        self.lora_B, self.place, self._views, self.gains = None, None, {}, {}

    def fill(self, slot: int, A: Tensor, B: Tensor) -> None:
        """Replace the content of a slot by factors `(r, in)` and `(r, out)`."""
        self.clear(slot, len(A))
        self._shared.lora_A[slot, self.place, : len(A)] = A  # type: ignore[index]
        self.lora_B[slot, : len(B)] = B

    def clear(self, slot: int, start: int = 0) -> None:
        """Clear the ranks of a slot from `start` on. Zeros in A suffice, because what is left in B is finite."""
        if self.place is not None:
            self._shared.lora_A[slot, self.place, start:] = 0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Return `(…, out)` for an input `(…, in)`."""
        y = nn.functional.linear(x, dense_for_one_product(self.base, x.dtype), self.bias)
        if self.place is not None and self._shared.stack.parts:
            flat = y.view(-1, y.shape[-1])
            self._scale(flat)
            for part, products in zip(self._shared.stack.parts, self._shared.products(x), strict=True):
                B = self._views.get(part.slots)
                if B is None:
                    B = self._views[part.slots] = self.lora_B[slice(*part.slots)].flatten(0, 1)
                if B.dtype == flat.dtype:
                    flat.addmm_(products[self.place], B)
                else:
                    flat.add_(products[self.place] @ B)
        return y

    def _scale(self, flat: Tensor) -> None:
        """Multiply the base's products of the rows that use gains, in place; the bias has none."""
        for slot, rows in self._shared.stack.scaled_rows:
            gain = self.gains.get(slot)
            if gain is None:
                continue
            result = (flat if rows is None else flat[rows]).float()
            product = result if self.bias is None else result - self.bias.float()
            # Each operation by itself: a fused one rounds otherwise, and only in some of a row's numbers.
            scaled = (result + (gain - 1) * product).to(flat.dtype)
            flat[slice(None) if rows is None else rows] = scaled
