"""What a codec promises, and the stored format it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from squat_fx.codecs.planes import PlaneLayout, plane_layout, uniform_widths

Role = Literal["key", "value"]
Layout = Literal["planes/channel", "dense"]


@dataclass(frozen=True)
class PerChannel:
    """A scale per channel, shared by ``group_size`` neighbouring tokens: ``[tokens / group_size,
    head_dim]`` scales.
    """

    group_size: int


@dataclass(frozen=True)
class PerToken:
    """A scale per token, shared by ``group_size`` neighbouring channels: ``[tokens, head_dim /
    group_size]`` scales.
    """

    group_size: int


@dataclass(frozen=True)
class Format:
    """How the keys, or the values, of one layer are stored.

    A row of the batch keeps its first ``sink_length`` valid tokens and its newest tokens exactly,
    in a dense buffer of ``sink_length + ring_length`` slots; what lies between is packed,
    ``token_group`` tokens at a time. Tokens leave the ring once ``residual_length + token_group``
    of them are there, so between ``residual_length`` and ``residual_length + token_group - 1``
    recent tokens are exact.
    """

    layout: Layout
    codec: str  # see codec_spec
    head_dim: int
    widths: tuple[int, ...]
    token_group: int
    channel_group: int
    residual_length: int
    sink_length: int

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
        packed = ("qdata",) if self.layout == "dense" else ("qdata", "scale", "zero_point")
        return (*packed, "dense", "start")

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The arenas that grow with the number of tokens."""
        return self.arena_names[:-2]

    def tokens_per_slot(self, name: str) -> int:
        """How many tokens one position of dim 2 of arena ``name`` stands for."""
        return 1 if name == "qdata" else self.token_group

    def last_dim(self, name: str) -> int:
        """Size of the last dim of the packed arena ``name``."""
        if name != "qdata":
            return self.channel_groups
        return self.head_dim if self.layout == "dense" else self.planes.row_bytes

    @property
    def planes(self) -> PlaneLayout:
        """Where the codes of one token lie."""
        return plane_layout(self.head_dim, self.widths)

    def packed_bits_per_element(self, dtype_bits: int = 16) -> float:
        """Bits per element of a packed token: codes, their padding, and scales and zero points in
        fp16.
        """
        if self.layout == "dense":
            return float(dtype_bits)
        scales = 32 * self.channel_groups / (self.head_dim * self.token_group)
        return self.planes.bits_per_element + scales

    def to_ints(self) -> list[int]:
        """The flat form in which ops take a format; the layout is the op's overload and the codec
        its own argument.
        """
        return [
            self.head_dim,
            self.token_group,
            self.channel_group,
            self.residual_length,
            self.sink_length,
            *self.widths,
        ]

    @classmethod
    def from_ints(cls, layout: Layout, codec: str, ints: list[int]) -> Format:
        """Undo :meth:`to_ints`."""
        head_dim, token_group, channel_group, residual_length, sink_length, *widths = ints
        return cls(
            layout,
            codec,
            head_dim,
            tuple(widths),
            token_group,
            channel_group,
            residual_length,
            sink_length,
        )


@runtime_checkable
class Codec(Protocol):
    """A quantization method: a frozen dataclass whose fields are its hyper-parameters.

    ``name`` is its row in the table, ``layout`` the stored format of its codes, ``summary`` and
    ``paper`` what lists say of it. It is torch only and knows neither graphs nor kernels.
    """

    name: ClassVar[str]
    layout: ClassVar[Layout]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Which numbers share a scale."""
        ...

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn groups of numbers into codes.

        Args:
            groups: fp32 ``[batch, heads, token groups, tokens, channel groups, channels]``; a group
                is dims 3 and 5.
            valid: bool, broadcastable to ``groups``; ``False`` marks padding, which must not touch
                a range.
            bits: width of a code.

        Returns:
            ``codes`` (uint8, the shape of ``groups``), ``scale`` and ``zero_point`` (fp16, dims 3
            and 5 of size 1), so that ``codes * scale + zero_point`` is the reconstruction.
        """
        ...


def make_format(
    codec: Codec,
    spec: str,
    role: Role,
    head_dim: int,
    bits: int,
    residual_length: int,
    sink_length: int,
) -> Format:
    """The stored format of one role under ``codec`` (``spec`` in ops), for heads of ``head_dim``
    channels.
    """
    granularity = codec.granularity(role)
    per_channel = isinstance(granularity, PerChannel)
    return Format(
        layout=codec.layout,
        codec=spec,
        head_dim=head_dim,
        widths=() if codec.layout == "dense" else uniform_widths(head_dim, bits),
        token_group=granularity.group_size if per_channel else 1,
        channel_group=1 if per_channel else min(granularity.group_size, head_dim),
        residual_length=residual_length,
        sink_length=sink_length,
    )
