"""What a codec promises, and the stored format it asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from squat_fx.layouts import LAYOUTS, Format
from squat_fx.layouts.kept import PREFIX

Role = Literal["key", "value"]
Tap = Literal["query", "rotary", "scores"]


@dataclass(frozen=True)
class PerChannel:
    """A scale per channel, shared by ``group_size`` neighbouring tokens: ``[tokens / group_size,
    head_dim]`` scales.
    """

    group_size: int

    @property
    def token_group(self) -> int:
        """How many tokens are packed at a time."""
        return self.group_size


@dataclass(frozen=True)
class PerToken:
    """A scale per token, shared by ``group_size`` neighbouring channels: ``[tokens, head_dim /
    group_size]`` scales; ``token_group`` tokens are packed at a time.
    """

    group_size: int
    token_group: int = 1


@dataclass(frozen=True)
class Fit:
    """What a codec learned from a prompt, once, when it was stored.

    Attributes:
        fixed: the fixed arenas of the layout by name, for those that are not to stay as the layout
            makes them. In ``planes/token``: ``affine``, fp16 ``[batch, heads, 2, head_dim]``, an
            offset and a factor for each channel; ``(x - offset) / factor`` is what is packed.
        feedback: fp32 ``[batch, heads, head_dim, head_dim]``, strictly upper triangular in blocks
            of whole plane groups: the rounding error (rounded minus true) of channel ``i`` times
            row ``i`` is added to the later channels before they are rounded. Only the tokens of
            the prompt are rounded with it; it is not stored.
    """

    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    feedback: Tensor | None = None


class Codec:
    """A quantization method: a frozen dataclass whose fields are its hyper-parameters.

    ``name`` is its row in the table, ``layout`` the stored layout of its keys, ``summary`` and
    ``paper`` what lists say of it, ``remedy`` what helps where it loses too much. It is torch only
    and knows neither graphs nor kernels.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    remedy: ClassVar[str] = "more bits help"
    takes_calibration: ClassVar[bool] = False

    def layout_of(self, role: Role) -> str:
        """The stored layout; of values, the one that goes with that of the keys."""
        return self.layout if role == "key" else LAYOUTS[self.layout].values

    def check_bits(self, bits: float) -> None:
        """Refuse ``bits`` that no head could be stored with.

        Raises:
            ValueError: the message names the nearest that there are.
        """
        if LAYOUTS[self.layout].whole_bits and bits != int(bits):
            raise ValueError(
                f"codec {self.name!r} takes whole bits, got {bits}; "
                f"the nearest are {math.floor(bits)} and {math.ceil(bits)}"
            )

    def widths_of(self, role: Role, head_dim: int, bits: float) -> tuple[int, ...]:
        """``Format.widths`` for ``bits`` on average.

        Raises:
            ValueError: there are no such widths; the message names the nearest.
        """
        return LAYOUTS[self.layout_of(role)].widths(head_dim, bits)

    def granularity(self, role: Role) -> PerChannel | PerToken:
        """Which numbers share a scale; the layout ``planes/token`` has one scale per token."""
        raise NotImplementedError

    def taps(self, role: Role) -> frozenset[Tap]:
        """What the codec wants to see of the prompt besides the tensor that it stores: its queries,
        so that ``head_dim**-0.5`` scales their products with keys if these are to be scores, or the
        angles by which its keys were turned, without which a layer is left alone.
        """
        return frozenset()

    def details(self, role: Role) -> tuple[int, ...]:
        """``Format.details``: numbers of which only the layout knows what they mean."""
        return ()

    def affine(self, role: Role) -> bool:
        """Whether :meth:`fit` gives offsets and factors, for the layout ``planes/token``."""
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

    def fit_format(
        self,
        role: Role,
        fmt: Format,
        x: Tensor,
        query: Tensor | None,
        keep: Tensor,
        basis: Tensor | None = None,
    ) -> Fit:
        """:meth:`fit`, for a codec that learns something else for other stored formats."""
        return self.fit(role, x, query, keep, basis)

    def quantize(
        self, groups: Tensor, valid: Tensor | None, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn groups of numbers into codes; for layouts that leave the rounding to codecs.

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

    def balance(self, tiles: Tensor, keep: Tensor, of_tokens: bool) -> Tensor:
        """What to divide the tokens, or the channels, of each tile by before it is rounded; for the
        layout ``planes/dual``.

        Args:
            tiles: fp32 ``[batch, heads, tiles, tokens, channels]``, zero where not ``keep``.
            keep: bool ``[batch, 1, tiles, tokens, 1]``; False for padding, which may touch nothing.
            of_tokens: factors ``[..., tokens, 1]``; else of channels, ``[..., 1, channels]``.
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
    granularity, layout = codec.granularity(role), codec.layout_of(role)
    per_channel = isinstance(granularity, PerChannel)
    is_symmetric = layout.removeprefix(PREFIX) == "planes/token"
    return Format(
        layout=layout,
        codec=spec,
        head_dim=head_dim,
        widths=bits if isinstance(bits, tuple) else codec.widths_of(role, head_dim, bits),
        token_group=granularity.token_group,
        channel_group=1 if per_channel else min(granularity.group_size, head_dim),
        residual_length=residual_length,
        sink_length=sink_length,
        affine=is_symmetric and codec.affine(role),
        latent=latent,
        unbiased=is_symmetric and role == "value",
        details=codec.details(role),
    )
