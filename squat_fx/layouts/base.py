"""What a stored layout says: which tensors hold packed tokens, and how numbers get there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from squat_fx.layouts.planes import PlaneLayout, spread_widths

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format
    from squat_fx.layouts.rotary import Rotation

Fixed = Mapping[str, Tensor]


def positions_from(first: int | Tensor, tokens: int, device: torch.device) -> Tensor:
    """The positions of ``tokens`` neighbours: int64 ``[tokens]``, or ``[batch, 1, tokens]`` where
    rows begin at different ones, ``[batch, 1]``.
    """
    if isinstance(first, Tensor):
        first = first[:, None]
    return first + torch.arange(tokens, device=device)


class StoredLayout:
    """How packed tokens of one role lie in memory; one instance of each class is in ``LAYOUTS``.

    Arenas are contiguous. Kernels know layouts, not codecs: all that a decoder needs is in the
    :class:`Format` and the arenas.

    Attributes:
        name: as ``Format.layout`` has it.
        packed: the arenas that grow with the number of tokens, ``[batch, heads, slots, n]``, first
            ``qdata``.
        fixed: the arenas that are made once, at the store, and only read from then on,
            ``[batch, heads, ...]``.
        given: the one among ``fixed`` that the store is given, if there is one.
        shared: ``(given,)`` where all sequences share it; else the store copies it to each.
        values: the layout of values beside keys of this one; its own name or another's.
        whole_bits: whether all channels have the same width.
        chooses: whether a single query attends to packed keys that :mod:`squat_fx.kernels.chosen`
            chooses, and not to all.
        positional: whether a token is rounded by its position.
        keeps_part: whether tokens of a prompt may be lost, see :mod:`squat_fx.layouts.kept`.
    """

    name: ClassVar[str]
    packed: ClassVar[tuple[str, ...]]
    fixed: ClassVar[tuple[str, ...]] = ()
    given: ClassVar[str | None] = None
    shared: ClassVar[tuple[str, ...]] = ()
    values: ClassVar[str]
    whole_bits: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    positional: ClassVar[bool] = False
    keeps_part: ClassVar[bool] = False

    def widths(self, head_dim: int, bits: float) -> tuple[int, ...]:
        """``Format.widths`` for ``bits`` on average; here the width of each plane group.

        Raises:
            ValueError: there are no such widths; the message names the nearest.
        """
        return spread_widths(head_dim, bits)

    def planes(self, fmt: Format) -> PlaneLayout | None:
        """Where the codes of a token lie in ``qdata``, if that is bit planes."""
        return None

    def last_dim(self, fmt: Format, name: str) -> int:
        """Size of the last dim of the packed arena ``name``."""
        raise NotImplementedError

    def tokens_per_slot(self, fmt: Format, name: str) -> int:
        """How many tokens one position of dim 2 of the packed arena ``name`` stands for."""
        return 1 if name == "qdata" else fmt.token_group

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the arena ``name`` for a cache of ``dtype``."""
        return torch.uint8 if name == "qdata" else torch.float16

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """Shape of the fixed arena ``name``."""
        raise NotImplementedError

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """The fixed arena ``name`` before anything is learned, for tensors like ``like`` ``[batch,
        heads, ...]``.
        """
        shape = self.fixed_shape(fmt, name, *like.shape[:2])
        return like.new_zeros(shape, dtype=self.dtype(fmt, name, like.dtype))

    def place_given(self, fmt: Format, given: Tensor, like: Tensor) -> Tensor:
        """The fixed arena that is made of what the store is given, for tensors like ``like``."""
        return given

    def with_rotation(self, fmt: Format, rotation: Rotation) -> Format:
        """``fmt`` for keys that went through a rotary embedding; layouts that do not turn them back
        have no other.
        """
        return fmt

    def to_frame(self, x: Tensor, fmt: Format, fixed: Fixed) -> Tensor:
        """A prompt ``[batch, heads, tokens, head_dim]`` as codecs learn from it."""
        return x

    def learned(self, x: Tensor, first: Tensor, packed: Tensor, fmt: Format) -> Fixed:
        """What the layout itself keeps of a prompt ``[batch, heads, tokens, head_dim]``: fixed
        arenas by name. Of each row the tokens from ``first`` on are packed, ``packed`` of them,
        int64 ``[batch]``.
        """
        return {}

    def forget(self, fixed: Fixed, end: Tensor) -> None:
        """Drop what :meth:`learned` kept of positions from ``end`` ``[batch]`` on, in place: other
        tokens come there.
        """

    def constant(
        self, head_dim: int, widths: tuple[int, ...], device: torch.device
    ) -> Tensor | None:
        """A matrix that decoders read besides the arenas, the same for every cache; contiguous, and
        at one place as long as the process lives.
        """
        return None

    def bits(self, fmt: Format) -> float:
        """Bits of a code, averaged over the channels."""
        return sum(fmt.widths) / len(fmt.widths)

    def bits_per_element(self, fmt: Format, dtype: torch.dtype = torch.float16) -> float:
        """Bits per element of a packed token: codes, their padding, and parameters."""
        bits = 0.0
        for name in self.packed:
            itemsize = self.dtype(fmt, name, dtype).itemsize
            bits += 8 * itemsize * self.last_dim(fmt, name) / self.tokens_per_slot(fmt, name)
        return bits / fmt.head_dim

    def describe(self, fmt: Format) -> str:
        """Which numbers share a scale, for reports."""
        return "token"

    def quantize(
        self,
        x: Tensor,
        valid: Tensor | None,
        fmt: Format,
        codec: Codec,
        fixed: Fixed,
        feedback: Tensor | None = None,
        first_slot: int = 0,
        first_position: int | Tensor = 0,
    ) -> tuple[Tensor, ...]:
        """The packed arenas of ``x``, for the slots from ``first_slot`` on.

        On a GPU this may run inside a CUDA graph: nothing may depend on what numbers are.

        Args:
            x: ``[batch, heads, tokens, head_dim]``, any float dtype, whole token groups.
            valid: bool ``[batch, tokens]``; False for padding, which may touch nothing.
            fmt: the stored format.
            codec: whose format it is, for layouts that leave the rounding to codecs.
            fixed: the fixed arenas.
            feedback: see :class:`squat_fx.codecs.Fit`.
            first_slot: where the first token is stored.
            first_position: the position of the first token, as :mod:`squat_fx.kernels.reference`
                counts them; int64 ``[batch, 1]`` where rows differ. It stays when slots move.
        """
        raise NotImplementedError

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """Undo :meth:`quantize`: fp32 ``[batch, heads, tokens, head_dim]``."""
        raise NotImplementedError

    def dequantize_into(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        out: Tensor,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """The same into ``out``, of any float dtype."""
        return out.copy_(self.dequantize(packed, fmt, fixed, first_position))
