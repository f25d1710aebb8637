"""What a codec promises, and the stored format it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from squat_fx.codecs.planes import PlaneLayout, plane_layout, spread_widths

Role = Literal["key", "value"]
Layout = Literal["planes/token", "planes/channel", "dense"]
Tap = Literal["query"]

PACKED_ARENAS: dict[Layout, tuple[str, ...]] = {
    "planes/token": ("qdata", "scale"),
    "planes/channel": ("qdata", "scale", "zero_point"),
    "dense": ("qdata",),
}
"""The tensors of a layout that grow with the number of tokens."""

FIXED_ARENAS: dict[Layout, tuple[str, ...]] = {
    "planes/token": ("affine", "basis"),
    "planes/channel": (),
    "dense": (),
}
"""The tensors of a layout that are made once, at the store, and only read from then on."""


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

    ``widths`` has a width for each plane group of 16 channels. In the layout ``planes/token``,
    ``affine`` says that the channels of packed tokens are shifted and scaled, and ``latent`` that
    packed tokens are in a basis of their head instead of the fixed rotation.
    """

    layout: Layout
    codec: str  # see codec_spec
    head_dim: int
    widths: tuple[int, ...]
    token_group: int
    channel_group: int
    residual_length: int
    sink_length: int
    affine: bool = False
    latent: bool = False

    def __deepcopy__(self, memo: object) -> Format:
        # Nothing of it changes, and the same object is compared faster: Dynamo keeps a copy of it,
        # and looks at every handle's at every step.
        return self

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
        return (*self.packed_names, *FIXED_ARENAS[self.layout], "dense", "start")

    @property
    def stored_names(self) -> tuple[str, ...]:
        """What the op ``store`` makes: all arenas but the basis, which belongs to the model."""
        return tuple(name for name in self.arena_names if name != "basis")

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The arenas that grow with the number of tokens."""
        return PACKED_ARENAS[self.layout]

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
        """Bits per element of a packed token: codes, their padding, and parameters in fp16."""
        if self.layout == "dense":
            return float(dtype_bits)
        parameters = 16 * (len(self.packed_names) - 1) * self.channel_groups
        return self.planes.bits_per_element + parameters / (self.head_dim * self.token_group)

    @property
    def bits(self) -> float:
        """Bits of a code, averaged over the channels."""
        return sum(self.widths) / len(self.widths)

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
            int(self.affine),
            int(self.latent),
            *self.widths,
        ]

    @classmethod
    def from_ints(cls, layout: Layout, codec: str, ints: list[int]) -> Format:
        """Undo :meth:`to_ints`."""
        head_dim, token_group, channel_group, residual_length, sink_length, *rest = ints
        affine, latent, *widths = rest
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
        )


@dataclass(frozen=True)
class Fit:
    """What a codec learned from a prompt, once, when it was stored.

    Attributes:
        affine: fp16 ``[batch, heads, 2, head_dim]``, an offset and a factor for each channel:
            ``(x - offset) / factor`` is what is packed of every token. None: zeros and ones.
        feedback: fp32 ``[batch, heads, head_dim, head_dim]``, strictly upper triangular in blocks
            of whole plane groups: the rounding error (rounded minus true) of channel ``i`` times
            row ``i`` is added to the later channels before they are rounded. Only the tokens of
            the prompt are rounded with it; it is not stored.
    """

    affine: Tensor | None = None
    feedback: Tensor | None = None


class Codec:
    """A quantization method: a frozen dataclass whose fields are its hyper-parameters.

    ``name`` is its row in the table, ``layout`` the stored format of its codes, ``summary`` and
    ``paper`` what lists say of it. It is torch only and knows neither graphs nor kernels.
    """

    name: ClassVar[str]
    layout: ClassVar[Layout]
    summary: ClassVar[str]
    paper: ClassVar[str]
    takes_calibration: ClassVar[bool] = False

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Which numbers share a scale; the layout ``planes/token`` has one scale per token."""
        raise NotImplementedError

    def taps(self, role: Role) -> frozenset[Tap]:
        """What the codec wants to see of the prompt besides the tensor that it stores."""
        return frozenset()

    def affine(self, role: Role) -> bool:
        """Whether :meth:`fit` gives offsets and factors; for the layout ``planes/token``."""
        return False

    def fit(
        self,
        role: Role,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """Learn from a prompt.

        Args:
            role: what ``x`` is.
            x: ``[batch, heads, tokens, head_dim]``, any float dtype.
            query: ``[batch, num_heads, tokens, head_dim]`` if :meth:`taps` asks for it and the
                graph has it.
            keep: bool ``[batch, tokens]``; False for padding and for sinks, which must touch
                nothing that is learned.
            basis: fp32 ``[2, heads, head_dim, head_dim]``, a calibrated basis and its inverse if
                packed tokens are in one.
        """
        return Fit()

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn groups of numbers into codes; for the layout ``planes/channel``.

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
        raise NotImplementedError


def make_format(
    codec: Codec,
    spec: str,
    role: Role,
    head_dim: int,
    bits: float | tuple[int, ...],
    residual_length: int,
    sink_length: int,
    latent: bool = False,
) -> Format:
    """The stored format of one role under ``codec`` (``spec`` in ops), for heads of ``head_dim``
    channels.

    Args:
        codec, spec, role, head_dim: of what.
        bits: the average width of a code, or a width per plane group.
        residual_length, sink_length: see :class:`Format`.
        latent: whether packed tokens are in a calibrated basis.

    Raises:
        ValueError: the layout has no such widths; the message names the nearest that it has.
    """
    granularity = codec.granularity(role)
    per_channel = isinstance(granularity, PerChannel)
    widths: tuple[int, ...] = ()
    if codec.layout != "dense":
        widths = bits if isinstance(bits, tuple) else spread_widths(head_dim, bits)
    if codec.layout == "planes/channel" and len(set(widths)) > 1:
        raise ValueError(
            f"codec {codec.name!r} gives all channels the same width, got {bits} bits; "
            f"the nearest are {min(widths)} and {max(widths)}"
        )
    return Format(
        layout=codec.layout,
        codec=spec,
        head_dim=head_dim,
        widths=widths,
        token_group=granularity.group_size if per_channel else 1,
        channel_group=1 if per_channel else min(granularity.group_size, head_dim),
        residual_length=residual_length,
        sink_length=sink_length,
        affine=codec.layout == "planes/token" and codec.affine(role),
        latent=latent,
    )
