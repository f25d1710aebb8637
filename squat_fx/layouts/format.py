"""The stored format of one role of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squat_fx.layouts.base import StoredLayout
from squat_fx.layouts.planes import PlaneLayout
from squat_fx.layouts.table import LAYOUTS


@dataclass(frozen=True)
class Format:
    """How the keys, or the values, of one layer are stored.

    A row of the batch keeps its first ``sink_length`` valid tokens and its newest tokens exactly,
    in a dense buffer of ``sink_length + ring_length`` slots; what lies between is packed,
    ``token_group`` tokens at a time. Tokens leave the ring once ``residual_length + token_group``
    of them are there, so between ``residual_length`` and ``residual_length + token_group - 1``
    recent tokens are exact.

    What ``widths`` are the layout says; in bit planes a width for each plane group of 16 channels.
    In the layout ``planes/token``, ``affine`` says that the channels of packed tokens are shifted
    and scaled, ``latent`` that packed tokens are in a basis of their head instead of the fixed
    rotation, and ``unbiased`` what their scales keep, see :mod:`squat_fx.layouts.symmetric`.
    ``details`` are numbers of which only the layout knows what they mean.
    """

    layout: str
    codec: str  # see codec_spec
    head_dim: int
    widths: tuple[int, ...]
    token_group: int
    channel_group: int
    residual_length: int
    sink_length: int
    affine: bool = False
    latent: bool = False
    unbiased: bool = False
    details: tuple[int, ...] = ()

    def __deepcopy__(self, memo: object) -> Format:
        # Nothing of it changes, and the same object is compared faster: Dynamo keeps a copy of it,
        # and looks at every handle's at every step.
        return self

    @property
    def stored_layout(self) -> StoredLayout:
        """What the layout's name stands for."""
        return LAYOUTS[self.layout]

    @property
    def ring_length(self) -> int:
        """Slots of the ring of recent tokens: one packed group more than the residual."""
        return self.residual_length + self.token_group

    @property
    def dense_length(self) -> int:
        """Slots of the dense buffer: sinks, then the ring."""
        return self.sink_length + self.ring_length

    @property
    def channel_groups(self) -> int:
        """Scales per token group."""
        return -(-self.head_dim // self.channel_group)

    @property
    def arena_names(self) -> tuple[str, ...]:
        """The tensors that hold a role, in the order in which ops take them."""
        return arena_names(self.layout)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """What the op ``store`` makes: all arenas but those that belong to the model."""
        return stored_names(self.layout)

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The arenas that grow with the number of tokens."""
        return self.stored_layout.packed

    def tokens_per_slot(self, name: str) -> int:
        """How many tokens one position of dim 2 of arena ``name`` stands for."""
        return self.stored_layout.tokens_per_slot(self, name)

    def last_dim(self, name: str) -> int:
        """Size of the last dim of the packed arena ``name``."""
        return self.stored_layout.last_dim(self, name)

    def constant_shapes(self, batch: int, heads: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the arenas that do not grow, by name."""
        layout = self.stored_layout
        dense, start = (batch, heads, self.dense_length, self.head_dim), (batch,)
        fixed = {name: layout.fixed_shape(self, name, batch, heads) for name in layout.fixed}
        return {"dense": dense, "start": start, **fixed}

    def arena_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of arena ``name`` for a cache of ``dtype``."""
        if name == "start":
            return torch.int32
        return dtype if name == "dense" else self.stored_layout.dtype(self, name, dtype)

    @property
    def planes(self) -> PlaneLayout | None:
        """Where the codes of one token lie, if they are in bit planes."""
        return self.stored_layout.planes(self)

    def packed_bits_per_element(self, dtype: torch.dtype = torch.float16) -> float:
        """Bits per element of a packed token: codes, their padding, and parameters in fp16."""
        return self.stored_layout.bits_per_element(self, dtype)

    @property
    def bits(self) -> float:
        """Bits of a code, averaged over the channels."""
        return self.stored_layout.bits(self)

    def to_ints(self) -> list[int]:
        """The flat form in which ops take a format; the layout is the op's overload and the codec
        its own argument. Where there are details, minus their number comes before them.
        """
        details = (-len(self.details), *self.details) if self.details else ()
        return [
            self.head_dim,
            self.token_group,
            self.channel_group,
            self.residual_length,
            self.sink_length,
            int(self.affine),
            int(self.latent),
            int(self.unbiased),
            *details,
            *self.widths,
        ]

    @classmethod
    def from_ints(cls, layout: str, codec: str, ints: list[int]) -> Format:
        """Undo :meth:`to_ints`."""
        head_dim, token_group, channel_group, residual_length, sink_length, *rest = ints
        affine, latent, unbiased, *widths = rest
        count = -widths[0] if widths and widths[0] < 0 else 0
        details, widths = widths[1 : 1 + count], widths[1 + count if count else 0 :]
        return cls(
            layout,
            codec,
            head_dim,
            tuple(widths),
            token_group,
            channel_group,
            residual_length,
            sink_length,
            bool(affine),
            bool(latent),
            bool(unbiased),
            tuple(details),
        )


def arena_names(layout: str) -> tuple[str, ...]:
    """The tensors that hold a role in a layout, in the order in which ops take them."""
    stored = LAYOUTS[layout]
    return (*stored.packed, *stored.fixed, "dense", "start")


def stored_names(layout: str) -> tuple[str, ...]:
    """Those that the op ``store`` makes."""
    return tuple(name for name in arena_names(layout) if name not in LAYOUTS[layout].shared)
