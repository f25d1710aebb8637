"""The codec ``squat`` with everything that it decides turned into an option, to vary one at a time.

``Variant()`` rounds as :class:`squat_fx.codecs.Squat` does (a test holds it); each other value of a
field is something that was tried. Numbers are rounded and not packed, so that what has no stored
layout can be judged before it gets one; what an option would cost to store is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from simulation import Rounding, Site
from torch import Tensor

from squat_fx.calibrate import FIRST
from squat_fx.calibration import QUERY_WEIGHT, RIDGE, LayerCalibration
from squat_fx.codecs.feedback import feedback_matrix, leading_subspace, query_gram
from squat_fx.codecs.smoothing import FLOOR, LARGEST_EXPONENT
from squat_fx.codecs.squat import SMALLEST_PROMPT, second_moment, token_mean
from squat_fx.layouts.hadamard import rotation
from squat_fx.layouts.levels import level_table
from squat_fx.layouts.planes import LANES, spread_widths
from squat_fx.layouts.symmetric import DISTORTION, LARGEST_HALF, SMALLEST_SCALE, STEP


@dataclass(frozen=True)
class Variant(Rounding):
    """How keys and values are rounded.

    Attributes:
        key_bits, value_bits: on average.
        by_half: pairs of widths for the first and for the second half of the layers.
        exact_layers: layers whose cache is exact; negative numbers count from the last.
        strength: ``lambda'`` of the feedback.
        block: channels rounded together before their error is fed back.
        rank: leading dimensions of the query subspace that count; None: all.
        appended: whether tokens after the prompt are rounded with feedback too; a matrix a head
            would have to be stored.
        newest: queries of the prompt that count; None: all.
        shrink: tokens at which what is learned from a prompt is trusted by half; 0: always.
        center: whether the mean of the keys is taken out, or how much of it.
        center_sinks: whether the first tokens count in it.
        center_values: the same of values.
        smooth: exponent of the factors: 1/4 is least squares.
        power_of_two: whether factors are.
        smooth_values: whether channels of values get factors from the output projection.
        rotate: channels that a rotation mixes; 0: all, 1: none.
        reach: how far levels reach at 2 bits, at 3 and more; in largest numbers of a token. None:
            (0, 1), at 3 bits (0, 0), and (0.75, 1) where plane groups have different widths.
        stretch: what the scale that codes are found with is multiplied by.
        uniform: evenly spaced levels; False: Lloyd-Max levels, a table in the kernels.
        norm: how a token's scale is mended after rounding: "" (not), "norm" (keeps the norm),
            "fit" (least squares), "unbiased" (keeps the product with the token itself, beside which
            "norm" is half-way to "fit"), "search" (the best of nine scales, then least squares).
        value_norm: the same of values.
        mend_mixed: of what numbers scales keep the length where plane groups have different widths:
            "" (scales stay as they are), "all", "stored" (of the groups that have bits), "weighed"
            (by one over the error that a width leaves, which is what a group is worth). None:
            "weighed" in a latent basis, "stored" elsewhere.
        mixed_size: of what numbers a token's size is taken there, likewise.
        gain: whether the levels of each width are stretched by what it takes off a Gaussian.
        balanced: whether latent channels of equal width are scaled so that what they are worth is
            shared between their size and the weight of their errors, and then rotated.
        falling: whether the strongest of the latent channels come first.
        seek: whether the scale of mixed widths is the one of five that leaves the least error,
            weighed as in ``mend_mixed``.
        even: whether latent channels all have the same width.
        least_width: bits that every plane group of latent channels has.
        plain_metric: whether the feedback's identity is that of the keys, not of the latent frame.
        weighted_search: whether the search weighs errors with the queries' metric.
        value_strength: ``lambda'`` of feedback in the metric of the output projection, all tokens.
        calibration: latent bases of keys by layer, in place of the rotation.
        smooth_latent: whether keys get factors before the latent basis.
        usual: by layer, the logarithms of what keys' squares are to queries' in the texts that were
            calibrated on: factors are then for how far a prompt is from that.
        residual, sinks: tokens kept exact.
    """

    key_bits: float = 2
    value_bits: float = 2
    by_half: tuple[tuple[float, float], tuple[float, float]] | None = None
    exact_layers: tuple[int, ...] = ()
    strength: float = 1.0
    block: int = LANES
    rank: int | None = None
    appended: bool = False
    newest: int | None = None
    shrink: float = 0.0
    center: float = 1.0
    center_sinks: bool = False
    center_values: bool = False
    smooth: float = 0.25
    power_of_two: bool = True
    smooth_values: bool = False
    rotate: int = 0
    reach: tuple[float, float] | None = None
    stretch: float = 1.0
    uniform: bool = True
    norm: str = "norm"
    value_norm: str = "unbiased"
    mend_mixed: str | None = None
    mixed_size: str = "all"
    gain: bool = False
    balanced: bool = False
    falling: bool = False
    seek: bool = False
    even: bool = False
    least_width: int = 0
    plain_metric: bool = False
    weighted_search: bool = False
    value_strength: float = 0.0
    calibration: Mapping[int, LayerCalibration] | None = None
    smooth_latent: bool = False
    usual: Mapping[int, Tensor] | None = None
    residual: int = 32
    sinks: int = 4

    def groups(self, site: Site, key: Tensor) -> tuple[int, int]:
        """Tokens are packed one by one."""
        return 1, 1

    def __call__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`simulation.Rounding`."""
        layers = site.module.config.num_hidden_layers
        if site.layer in self.exact_layers or site.layer - layers in self.exact_layers:
            return key, value
        bits = self.key_bits, self.value_bits
        if self.by_half is not None:
            bits = self.by_half[2 * site.layer >= layers]
        return (
            self._round_keys(site, query, key.float(), bits[0]),
            self._round_values(site, value.float(), bits[1]),
        )

    # keys -----------------------------------------------------------------------------------------

    def _round_keys(self, site: Site, query: Tensor, key: Tensor, bits: float) -> Tensor:
        batch, heads, _, head_dim = key.shape
        prompt = key[:, :, : site.prompt]
        first = 0 if self.center_sinks else site.sinks
        token = torch.arange(site.prompt, device=key.device)[None].expand(batch, -1)
        keep = (token >= site.sinks) & (site.prompt - site.sinks >= SMALLEST_PROMPT)
        trust = site.prompt / (site.prompt + self.shrink)
        mean = token_mean(prompt, keep & (token >= first) | (token >= first) & self.center_sinks)
        mean = mean.float() * trust * self.center
        gram = query_gram(
            query[:, :, : site.prompt],
            keep & (token >= site.prompt - (self.newest or site.prompt)),
            heads,
        )
        layer = self.calibration.get(site.layer) if self.calibration else None
        factor = torch.ones_like(mean)
        if self.smooth and (layer is None or self.smooth_latent or self.usual):
            moment = second_moment(prompt, mean.half(), keep)
            of_queries = gram.diagonal(dim1=-2, dim2=-1)[:, :, None]
            usual = self.usual[site.layer].to(key.device) if self.usual else None
            factor = self._factors(moment, of_queries, trust, usual)
        pair = self._pair(layer, head_dim, key.device)
        widths = spread_widths(head_dim, bits)
        if layer and not self.even:
            widths = self._allocated(layer, sum(widths))
        if layer and self.balanced:
            pair = _balanced(pair, layer.importance.to(key.device), widths)
        if layer and self.falling:
            order = torch.arange(head_dim, device=key.device).flip(0)
            pair, widths = (pair[0][..., order], pair[1][..., order, :]), widths[::-1]
        matrix, h = None, None
        if self.strength:
            if self.rank is not None:
                gram = leading_subspace(gram, self.rank)
            back = pair[1].double() * factor.double()
            if self.plain_metric:
                h = back @ _metric(gram, self.strength * trust) @ back.mT
            else:
                h = _metric(back @ gram @ back.mT, self.strength * trust)
            matrix = feedback_matrix(h, self.block)
        y = ((key - mean) / factor) @ pair[0]
        end = site.prompt if not self.appended else key.shape[2]
        end = site.sinks + site.packed(end, 1)
        weights = None if h is None or not self.weighted_search else h.float()
        rounded = torch.cat(
            [
                self._round(y[:, :, :end], widths, self.norm, matrix, weights, layer is not None),
                self._round(y[:, :, end:], widths, self.norm, None, weights, layer is not None),
            ],
            2,
        )
        return (rounded @ pair[1]) * factor + mean

    def _allocated(self, layer: LayerCalibration, total: int) -> tuple[int, ...]:
        share = layer.importance / layer.importance.sum(-1, keepdim=True)
        worth = share.log().mean(0).exp().tolist()
        widths = [self.least_width] * len(worth)
        for _ in range(total - sum(widths)):
            gains = [w * (DISTORTION[b] - DISTORTION[b + 1]) if b < 8 else -1.0
                     for w, b in zip(worth, widths, strict=True)]  # fmt: skip
            widths[gains.index(max(gains))] += 1
        return tuple(widths)

    def _factors(
        self, of_keys: Tensor, of_queries: Tensor, trust: float, usual: Tensor | None = None
    ) -> Tensor:
        """As :func:`squat_fx.codecs.smoothing.smoothing_factors`, for any exponent."""
        floored = [x.double() + FLOOR * x.double().mean(-1, keepdim=True) + 1e-300
                   for x in (of_keys, of_queries)]  # fmt: skip
        ratio = (floored[0] / floored[1]).log2()
        if usual is not None:
            ratio = ratio - usual
        ratio = ratio * self.smooth * trust
        exponent = (ratio - ratio.mean(-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
        exponent = exponent.round() if self.power_of_two else exponent
        return torch.exp2(exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)).float()

    def _pair(
        self, layer: LayerCalibration | None, head_dim: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The matrix into the frame of rounding, and its inverse."""
        if layer is not None:
            matrices = layer.basis(device)
            return matrices[0], matrices[1]
        if self.rotate == 1:
            matrix = torch.eye(head_dim, device=device)
        elif self.rotate:
            blocks = [rotation(self.rotate)] * (head_dim // self.rotate)
            matrix = torch.block_diag(*blocks).to(device, torch.float32)
        else:
            matrix = rotation(head_dim).to(device, torch.float32)
        return matrix, matrix.mT.contiguous()

    # values ---------------------------------------------------------------------------------------

    def _round_values(self, site: Site, value: Tensor, bits: float) -> Tensor:
        heads, head_dim = value.shape[1], value.shape[-1]
        pair = self._pair(None, head_dim, value.device)
        mean = torch.zeros_like(value[:, :, :1])
        if self.center_values:
            mean = value[:, :, site.sinks : site.prompt].mean(2, keepdim=True)
        factor, matrix = torch.ones_like(mean), None
        if self.smooth_values or self.value_strength:
            # What reaches the residual stream: the output projection's columns of each query head.
            weight = site.module.o_proj.weight.double()
            of_heads = weight.unflatten(1, (heads, -1, head_dim))  # [hidden, kv heads, n, d]
            gram = torch.einsum("mhnd,mhne->hde", of_heads, of_heads)[None]
            if self.smooth_values:
                moment = value[:, :, site.sinks : site.prompt].square().mean(2, keepdim=True)
                of_weight = gram.diagonal(dim1=-2, dim2=-1)[:, :, None]
                factor = self._factors(moment, of_weight, 1.0)
            if self.value_strength:
                back = pair[1].double() * factor.double()
                h = _metric(back @ gram @ back.mT, self.value_strength)
                matrix = feedback_matrix(h, self.block)
        y = ((value - mean) / factor) @ pair[0]
        widths = spread_widths(head_dim, bits)
        rounded = self._round(y, widths, self.value_norm, matrix, None)
        return (rounded @ pair[1]) * factor + mean

    # levels ---------------------------------------------------------------------------------------

    def _round(
        self,
        y: Tensor,
        widths: tuple[int, ...],
        norm: str,
        matrix: Tensor | None,
        weights: Tensor | None,
        is_latent: bool = False,
    ) -> Tensor:
        """``y`` on the levels of each plane group, with error feedback if there is a matrix."""
        mend = (
            ("weighed" if is_latent else "stored") if self.mend_mixed is None else self.mend_mixed
        )
        is_mixed = len(set(widths)) > 1
        low, high = self.reach or ((0.75, 1.0) if is_mixed else (0.0, float(max(widths) > 3)))
        weights_of = _weights_of(widths, y)
        size = y.square()
        if is_mixed:
            size = size * weights_of[self.mixed_size] / weights_of[self.mixed_size].mean()
        size = size.mean(-1, keepdim=True).sqrt()
        reach = [low if w == 2 else high if w > 2 else 0.0 for w in widths]
        scale = size
        if self.uniform:
            least = [r / (STEP[w] * (2**w - 1) / 2) if w else 0.0
                     for w, r in zip(widths, reach, strict=True)]  # fmt: skip
            least = torch.tensor(least, device=y.device).repeat_interleave(LANES)[: y.shape[-1]]
            scale = torch.maximum(size, (y.abs() * least).amax(-1, keepdim=True))
        scale = (scale * self.stretch).clamp(SMALLEST_SCALE, LARGEST_HALF)
        if is_mixed and not mend:
            scale, norm = scale.half().float(), ""
        if is_mixed and self.seek:
            scale = self._sought(y, scale, widths, weights_of["weighed"])
        if norm != "search":
            weigh = weights_of[mend or "all"].sqrt() if is_mixed else 1.0
            rounded = self._with_scale(y, scale, widths, matrix)
            if self.gain:
                kept = 1 - torch.tensor(DISTORTION, device=y.device)[_bits(widths, y)]
                rounded = rounded / (kept if norm == "unbiased" else kept.sqrt()).clamp_min(1e-9)
            return _mended(y, rounded, norm, scale, weigh)
        best, least_error = None, None
        for step in range(-4, 5):
            other = scale * 2 ** (step / 8)
            tried = self._with_scale(y, other, widths, matrix)
            tried = _mended(y, tried, "fit", other) if matrix is None else tried
            error = tried - y
            weighed = error if weights is None else error @ weights
            cost = (weighed * error).sum(-1, keepdim=True)
            if best is None:
                best, least_error = tried, cost
            else:
                best = torch.where(cost < least_error, tried, best)
                least_error = torch.minimum(cost, least_error)
        assert best is not None
        return best

    def _sought(self, y: Tensor, scale: Tensor, widths: tuple[int, ...], weights: Tensor) -> Tensor:
        tried = torch.stack([scale * 2 ** (step / 4) for step in range(-3, 2)])
        errors = torch.stack([
            ((self._with_scale(y, one, widths, None) - y).square() * weights).sum(-1, keepdim=True)
            for one in tried
        ])  # fmt: skip
        return tried.gather(0, errors.argmin(0, keepdim=True))[0]

    def _with_scale(
        self, y: Tensor, scale: Tensor, widths: tuple[int, ...], matrix: Tensor | None
    ) -> Tensor:
        bits = _bits(widths, y)
        step = torch.tensor(STEP, device=y.device)[bits]
        zero = (2.0**bits - 1) / 2
        if matrix is None:
            return self._levels(y, scale, step, zero, widths)
        y, out = y.clone(), torch.empty_like(y)
        for first in range(0, y.shape[-1], self.block):
            block = slice(first, first + self.block)
            later = slice(first + self.block, y.shape[-1])
            part = widths[first // LANES : -(-(first + self.block) // LANES)]
            out[..., block] = self._levels(y[..., block], scale, step[block], zero[block], part)
            y[..., later] += (out[..., block] - y[..., block]) @ matrix[..., block, later]
        return out

    def _levels(
        self, y: Tensor, scale: Tensor, step: Tensor, zero: Tensor, widths: tuple[int, ...]
    ) -> Tensor:
        if self.uniform:
            unit = scale * step
            codes = (y / unit + zero).round().clamp_(min=0.0).minimum(2 * zero)
            return (codes - zero) * unit
        (width,) = set(widths)
        table, thresholds = level_table(width, y.device)
        return table[torch.bucketize(y / scale, thresholds)] * scale


def _metric(gram: Tensor, strength: float) -> Tensor:
    """As :func:`squat_fx.codecs.feedback.metric`, relative."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-300)
    return identity + strength * gram / mean


def _bits(widths: tuple[int, ...], y: Tensor) -> Tensor:
    """The width of each channel of ``y``."""
    return torch.tensor(widths, device=y.device).repeat_interleave(LANES)[: y.shape[-1]]


def _weights_of(widths: tuple[int, ...], y: Tensor) -> dict[str, Tensor]:
    """See :class:`Variant`."""
    bits = _bits(widths, y)
    worth = 1 / torch.tensor(DISTORTION, device=y.device)[bits]
    stored = (bits > 0).float()
    return {"all": torch.ones_like(worth), "stored": stored, "weighed": worth * stored}


def _balanced(
    pair: tuple[Tensor, Tensor], importance: Tensor, widths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """See :class:`Variant`."""
    head_dim = pair[0].shape[-1]
    logs = importance.double().log().repeat_interleave(LANES, -1)[:, :head_dim]
    bits = torch.tensor(widths, device=importance.device).repeat_interleave(LANES)[:head_dim]
    turned = [x.clone() for x in pair]
    for width in set(widths):
        same = (bits == width).nonzero()[:, 0]
        mean = logs[:, same].mean(-1, keepdim=True)
        size = (logs[:, same] - mean) / 4
        size = size.exp()
        size = size / size.square().mean(-1, keepdim=True).sqrt()  # unit variance once rotated
        mixing = _orthogonal(len(same)).to(importance.device)
        turned[0][..., same] = (pair[0][..., same] * size.float()[:, None, :]) @ mixing
        turned[1][:, same] = mixing.T @ (pair[1][:, same] / size.float()[:, :, None])
    return turned[0], turned[1]


def _orthogonal(order: int) -> Tensor:
    """A rotation that mixes ``order`` channels."""
    if order & (order - 1) == 0:
        return rotation(order).float()
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(order, order, generator=generator)).Q


def _mended(
    y: Tensor, rounded: Tensor, norm: str, scale: Tensor, weigh: Tensor | float = 1.0
) -> Tensor:
    """``rounded``, multiples of ``scale``, with other scales in fp16; see :class:`Variant`."""
    y, weighed = y * weigh, rounded * weigh
    inner = (y * weighed).sum(-1, keepdim=True)
    ours, theirs = (x.square().sum(-1, keepdim=True).clamp_min(1e-30) for x in (weighed, y))
    ratios = {
        "": torch.ones_like(scale),
        "fit": inner / ours,
        "unbiased": theirs / inner.clamp_min(1e-30),
        "norm": (theirs / ours).sqrt(),
    }
    mended = (scale * ratios[norm]).clamp(SMALLEST_SCALE, LARGEST_HALF).half().float()
    return rounded / scale * mended


SKIPPED = (0, FIRST)


class Statistics(Rounding):
    """Sums of keys and queries by layer, as a rounding that changes nothing; for calibrations."""

    residual = sinks = 0

    def __init__(self) -> None:
        self._moment: dict[tuple[int, int], Tensor] = {}
        self._gram: dict[int, Tensor] = {}

    def groups(self, site: Site, key: Tensor) -> tuple[int, int]:
        """See :class:`simulation.Rounding`."""
        return 1, 1

    def __call__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds the windows up."""
        keep = key.new_ones(key.shape[::2], dtype=torch.bool)
        for first in SKIPPED:
            part = key[:, :, first:]
            centered = (part - part.mean(2, keepdim=True)).double()
            moment = (centered.mT @ centered).sum(0) / part.shape[2]
            place = site.layer, first
            self._moment[place] = self._moment.get(place, 0) + moment
        gram = query_gram(query, keep, key.shape[1]).sum(0)
        self._gram[site.layer] = self._gram.get(site.layer, 0) + gram
        return key, value

    def usual(self, first: int = FIRST) -> dict[int, Tensor]:
        """See ``Variant.usual``."""
        found = {}
        for layer, gram in self._gram.items():
            sums = self._moment[layer, first], gram
            diagonals = [x.diagonal(dim1=-2, dim2=-1) for x in sums]
            floored = [x + FLOOR * x.mean(-1, keepdim=True) + 1e-300 for x in diagonals]
            found[layer] = (floored[0] / floored[1]).log2()[None, :, None]
        return found

    def calibration(
        self,
        query_weight: float = QUERY_WEIGHT,
        joint: bool = False,
        inner: bool = True,
        first: int = FIRST,
    ) -> dict[int, LayerCalibration]:
        """Bases by layer.

        Args:
            query_weight: ``w`` of :mod:`squat_fx.calibration`.
            joint: one basis for all heads of a layer.
            inner: whether a Hadamard rotation mixes each plane group.
            first: tokens of a window, of ``SKIPPED``, whose keys are left out.
        """
        found = {}
        for layer, gram in self._gram.items():
            moment = self._moment[layer, first]
            if joint:
                moment, gram = (x.mean(0, keepdim=True).expand_as(x) for x in (moment, gram))
            found[layer] = _basis(moment.cpu(), gram.cpu(), query_weight, inner)
        return found


def _basis(moment: Tensor, gram: Tensor, weight: float, inner: bool) -> LayerCalibration:
    """As :meth:`LayerCalibration.of`, for any weight."""
    head_dim = moment.shape[-1]
    identity = torch.eye(head_dim, dtype=moment.dtype)
    mean = [x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] for x in (moment, gram)]
    moment = moment + RIDGE * mean[0] * identity
    weighted = (1 - weight + RIDGE) * identity + weight * gram / mean[1]
    factor = torch.linalg.cholesky(weighted)
    values, vectors = torch.linalg.eigh(factor.mT @ moment @ factor)
    groups = values.split(LANES, -1)
    importance = torch.stack([group.mean(-1) for group in groups], -1)
    order = [group.shape[-1] if inner else 1 for group in groups]
    blocks = torch.block_diag(
        *[
            rotation(group.shape[-1]).double() if n > 1 else torch.eye(group.shape[-1]).double()
            for group, n in zip(groups, order, strict=True)
        ]
    )
    deviation = importance.sqrt().repeat_interleave(LANES, -1)[..., :head_dim]
    basis = factor @ vectors @ blocks / deviation[..., None, :]
    matrices = torch.stack([basis, torch.linalg.inv(basis)])
    return LayerCalibration(matrices.float(), importance.float())
