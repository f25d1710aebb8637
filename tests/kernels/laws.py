"""What a launcher must do, said once for the interpreter and for the GPU.

A law takes a :class:`Case` and a device. Cases are drawn from a seed, so that a failure names its
case; the storage is prepared by the reference on the CPU, and memory that is nobody's business
holds NaN or 255.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from squat_fx.codecs import (
    Codec,
    Format,
    Kivi,
    Lossless,
    Polar,
    PolarRope,
    Role,
    Squat,
    SquatPaper,
    TurboQuant,
    codec_from_spec,
    codec_spec,
    make_format,
)
from squat_fx.codecs.feedback import feedback_matrix, metric, query_gram
from squat_fx.codecs.smoothing import _floored
from squat_fx.codecs.squat import SMALLEST_PROMPT, second_moment
from squat_fx.kernels import fit as fitting
from squat_fx.kernels import launch, ops, reference
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.layouts import Fixed, polar_tree
from squat_fx.layouts.hadamard import rotation, rotation_pair
from squat_fx.layouts.latent_rope import largest_codes, latent_widths, num_latent, rotary_dim
from squat_fx.layouts.levels import level_of, level_table
from squat_fx.layouts.planes import LANES, num_planes, unpack
from squat_fx.layouts.rotary import Rotation
from squat_fx.layouts.signs_token import is_outlier, split_widths
from squat_fx.layouts.sketch import directions, signs_of
from squat_fx.layouts.symmetric import STEP, alternating_signs, least_scales, worths

NUM_KV_HEADS = 2
LATENT = ("latent/rope", "latent/sparse")
LIKE_PRODUCTS = ("planes/token", "levels/token", "signs/token", "polar/token", *LATENT)
"""Layouts that round after a sum of products, whose order is free."""

Side = tuple[Arenas, Extent, Format]


@dataclass(frozen=True)
class Case:
    """One call: ``pads`` leading tokens of the rows are padding, ``chunks`` made up the past."""

    seed: int
    codec: Codec
    key_dim: int
    value_dim: int
    bits: float
    residual_length: int
    sink_length: int
    dtype: torch.dtype
    pads: tuple[int, ...]
    chunks: tuple[int, ...]
    new_len: int
    q_len: int
    queries_per_kv: int
    mask: str  # none, bool, float, or padding: [batch, 1, 1, kv_len]
    causal: int
    softcap: float
    sinks: bool
    # Of the layout planes/token:
    widths: str = "uniform"  # spread: half a bit more or less than ``bits``, random: 0 to 8
    shifted: bool = False  # and scaled, values too
    calibrated: bool = False  # a basis per head instead of the fixed rotation
    hidden: float = 0.0  # the part of the past that has left the window, if there is one
    # Of the layout latent/rope:
    rotation: Rotation | None = None

    @property
    def per_token(self) -> bool:
        """Whether the layout is planes/token."""
        return self.codec.layout == "planes/token"

    @property
    def first_seen(self) -> int:
        """Where the window begins; 0 if there is none."""
        return int(self.hidden * sum(self.chunks))

    def format(self, role: Role) -> Format:
        """How ``role`` is stored."""
        head_dim = self.key_dim if role == "key" else self.value_dim
        fmt = make_format(
            self.codec,
            codec_spec(self.codec),
            role,
            head_dim,
            self._widths(head_dim) if self.per_token else self.bits,
            self.residual_length,
            self.sink_length,
            self.per_token and self.calibrated,
        )
        if self.rotation is not None and "rotary" in self.codec.taps(role):
            fmt = fmt.stored_layout.with_rotation(fmt, self.rotation)
        return replace(fmt, affine=fmt.affine or (self.per_token and self.shifted))

    def given(self, role: Role) -> Tensor | None:
        """What the layout is given: a basis, or frequencies from 1 down."""
        if self.format(role).layout not in LATENT:
            return self.basis(role)
        pairs = rotary_dim(self.format(role)) // 2
        return 1e-3 ** (torch.arange(pairs) / max(pairs, 1))

    def _widths(self, head_dim: int) -> float | tuple[int, ...]:
        planes = num_planes(head_dim)
        pick = random.Random(self.seed + head_dim)
        if self.widths == "random":
            return (*tuple(pick.randrange(9) for _ in range(planes - 1)), pick.randint(1, 8))
        if self.widths == "spread":
            return min(self.bits + pick.randrange(planes) / planes, 8)
        return self.bits

    def basis(self, role: Role) -> Tensor | None:
        """A well-conditioned matrix and its inverse per KV head, fp32."""
        if not (self.per_token and self.calibrated):
            return None
        head_dim = self.format(role).head_dim
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, NUM_KV_HEADS, head_dim, head_dim)
        left, right = torch.linalg.qr(torch.randn(shape, generator=generator).double()).Q
        sizes = 0.5 + 1.5 * torch.rand(NUM_KV_HEADS, 1, head_dim, generator=generator).double()
        return torch.stack([left * sizes @ right, right.mT / sizes @ left.mT]).float()

    def affine(self, role: Role) -> Tensor:
        """Offsets and factors, powers of two, fp16 ``[batch, heads, 2 or 0, head_dim]``."""
        fmt = self.format(role)
        shape = (len(self.pads), NUM_KV_HEADS, int(fmt.affine), fmt.head_dim)
        generator = torch.Generator().manual_seed(self.seed + 1)
        offset, exponent = torch.randn(2, *shape, generator=generator)
        return torch.cat([2 * offset, exponent.round().exp2()], 2).half()

    def channels(self, role: Role) -> Tensor:
        """Kept channels of each row and head, int16 ``[batch, heads, 1, kept]``, ascending."""
        fmt = self.format(role)
        shape = fmt.stored_layout.fixed_shape(fmt, "channels", len(self.pads), NUM_KV_HEADS)
        order = torch.rand(*shape[:3], fmt.head_dim, generator=torch.Generator().manual_seed(3))
        return order.argsort(-1)[..., : shape[3]].sort().values.to(torch.int16)

    def feedback(self, role: Role) -> Tensor | None:
        """What the codec makes of random queries; None if it feeds nothing back."""
        fmt = self.format(role)
        codec = self.codec if isinstance(self.codec, Squat | SquatPaper) else SquatPaper()
        x = self.randn(len(self.pads), NUM_KV_HEADS, 40, fmt.head_dim, seed=8)
        query = self.randn(len(self.pads), 2 * NUM_KV_HEADS, 40, fmt.head_dim, seed=9)
        keep = torch.ones(len(self.pads), 40, dtype=torch.bool)
        return codec.fit(role, x.float(), query.float(), keep).feedback

    def codebook(self, role: Role) -> Tensor:
        """Cosines and sines of a codebook for each head, of the layout polar/token."""
        widths, cpu = self.format(role).widths, torch.device("cpu")
        shape = (len(self.pads), NUM_KV_HEADS, polar_tree.entries(widths))
        generator = torch.Generator().manual_seed(self.seed + 2)
        moved = polar_tree.codebooks(widths, cpu) + 0.02 * torch.randn(shape, generator=generator)
        return polar_tree.cosines_and_sines(moved).half()

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """Random numbers with a few large channels, the same for the same shape and seed."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        x = torch.randn(shape, generator=generator)
        x[..., :: max(shape[-1] // 3, 1)] *= 4
        return x.to(self.dtype)

    @property
    def valid(self) -> Tensor | None:
        """Bool ``[batch, past]``; None without padding."""
        if not any(self.pads):
            return None
        return torch.arange(sum(self.chunks)) >= torch.tensor(self.pads)[:, None]


def random_case(
    seed: int, dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, ...], longest: int
) -> Case:
    """A case; past and queries up to about ``longest`` tokens."""
    pick = random.Random(seed)
    past = tuple(
        pick.choice((1, 2, 17, longest // 2, longest)) for _ in range(pick.choice((1, 2, 3)))
    )
    q_len = pick.choice((1, 1, 1, 2, 5, 16, longest // 3))
    pads = pick.choice(((0, 0), (0, 0), (3, 0, sum(past) // 2), (sum(past), 0)))
    # Every second case is of the layout planes/token.
    channel: tuple[Codec, ...] = (Kivi(32), Kivi(32), Kivi(64), Kivi(128), SquatPaper(32))
    token: tuple[Codec, ...] = (Squat(), Squat(strength=0.0, center=False, smooth=False))
    codec = pick.choice((token, (*channel, Lossless(32)))[seed % 2])
    return Case(
        seed=seed,
        codec=codec,
        key_dim=pick.choice(head_dims),
        value_dim=pick.choice(head_dims),
        bits=pick.choice((2, 2, 4, 1, 3, 5, 6, 7, 8)),
        residual_length=pick.choice((0, 5, 32, 40)),
        sink_length=pick.choice((0, 4)),
        dtype=pick.choice(dtypes),
        pads=pads,
        chunks=past,
        new_len=pick.choice((0, q_len)),
        q_len=q_len,
        queries_per_kv=pick.choice((1, 2, 3, 4, 7, 8, 16)),
        mask=pick.choice(("none", "bool", "float", "padding")),
        causal=pick.choice((0, 0, 1, 2)),
        softcap=pick.choice((0.0, 0.0, 7.0)),
        sinks=pick.random() < 0.3,
        widths=pick.choice(("uniform", "spread", "random")),
        shifted=pick.random() < 0.3,
        calibrated=pick.random() < 0.5,
        hidden=pick.choice((0.0, 0.0, 0.02, 0.5, 0.98)),
    )


def polar_case(case: Case) -> Case:
    """``case`` with one of the codecs that store radii and angles."""
    codecs = (Polar(), PolarRope(32), Polar("online"), PolarRope(64, radius_bits=2))
    codec = codecs[case.seed % 4]
    of_blocks, of_pairs = (3.375, 3.875, 4.25), (3, 4, 2, 5)
    choices = of_blocks if isinstance(codec, Polar) else of_pairs
    return replace(case, codec=codec, bits=choices[case.seed // 4 % len(choices)])


# storage -----------------------------------------------------------------------------------------


def unwritten(case: Case, role: Role, capacity: int) -> Arenas:
    """Arenas for ``capacity`` tokens in which a wrong read or a missing write shows."""
    fmt = case.format(role)
    like = torch.zeros(len(case.pads), NUM_KV_HEADS, 1, fmt.head_dim, dtype=case.dtype)
    slots = capacity // fmt.token_group * fmt.token_group
    arenas = reference.empty_arenas(like, slots, fmt, case.given(role))
    if fmt.layout in LATENT:
        x = case.randn(len(case.pads), NUM_KV_HEADS, sum(case.chunks), fmt.head_dim, seed=7)
        reference.learn(arenas, x, case.valid, None, fmt, role)
    for tensor in (*arenas.packed, arenas.dense):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
    if "channels" in arenas.fixed:
        return arenas.with_fixed(channels=case.channels(role))
    if "codebook" in arenas.fixed:
        return arenas.with_fixed(codebook=case.codebook(role))
    return arenas if arenas.affine is None else arenas.with_fixed(affine=case.affine(role))


def stored(case: Case, role: Role) -> tuple[Arenas, Extent]:
    """The past of ``case``, written by the reference."""
    fmt = case.format(role)
    past = sum(case.chunks)
    arenas = unwritten(case, role, past + 128)
    x = case.randn(len(case.pads), NUM_KV_HEADS, past, fmt.head_dim, seed=1 + (role == "value"))
    reference.write(arenas, x, case.valid, Extent(0, 0), fmt)
    return arenas, Extent(0, 0).after(past, fmt)


def to(arenas: Arenas, device: str) -> Arenas:
    """A copy on ``device``."""

    def there(t: Tensor) -> Tensor:
        return t.to(device, copy=True)

    packed = tuple(there(t) for t in arenas.packed)
    fixed = {name: there(t) for name, t in arenas.fixed.items()}
    return Arenas(packed, there(arenas.dense), there(arenas.start), fixed)


@dataclass(frozen=True)
class Recorded:
    """A kernel that says so when it is launched."""

    kernel: Any
    say: Callable[[Any], None]

    def __getitem__(self, grid: Any) -> Any:
        self.say(grid)
        return self.kernel[grid]


def positions_of(*extents: Extent, device: str) -> Tensor:
    """A positions tensor whose row ``i + 1`` is the i-th extent."""
    rows = [(-7, -7), *((e.length, e.watermark) for e in extents)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def as_bytes(tensor: Tensor) -> Tensor:
    """For comparing bit for bit, NaN included, of which there is one kind."""
    tensor = tensor.cpu().contiguous()
    if tensor.is_floating_point():
        tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
    return tensor.view(torch.uint8)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal bit for bit."""
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(as_bytes(a), as_bytes(e))


def tensors_of(arenas: Arenas) -> tuple[Tensor, ...]:
    """Every tensor of ``arenas``, in the order in which ops take them."""
    return (*arenas.packed, *arenas.fixed.values(), arenas.dense, arenas.start)


# laws --------------------------------------------------------------------------------------------


def writing_agrees_with_the_reference(
    case: Case, role: Role, device: str, with_feedback: bool = False
) -> None:
    """Chunk by chunk, every arena holds what the reference wrote, and nothing else was touched.

    Bit for bit, but for what is rounded after a sum of products, whose order is free: there every
    packed token is rounded rightly, as :func:`assert_rounded_rightly` says it.
    """
    fmt = case.format(role)
    past = sum(case.chunks)
    x = case.randn(len(case.pads), NUM_KV_HEADS, past, fmt.head_dim)
    feedback = case.feedback(role) if with_feedback else None
    expected = unwritten(case, role, past + 128)
    actual = to(expected, device)
    extent, at = Extent(0, 0), 0
    for chunk in case.chunks:
        # Strides of a model that keeps [batch, tokens, heads, channels].
        new = x[:, :, at : at + chunk].transpose(1, 2).contiguous().transpose(1, 2)
        valid = None if case.valid is None else case.valid[:, at : at + chunk]
        reference.write(expected, new, valid, extent, fmt, feedback)
        positions = positions_of(extent, device=device)
        valid, placed = (None if t is None else t.to(device) for t in (valid, feedback))
        launch.write(actual, new.to(device), valid, (positions, 1), fmt, placed)
        extent, at = extent.after(chunk, fmt), at + chunk
        assert_same_storage(actual, expected, x, extent, fmt, feedback)
        expected = to(actual, "cpu")  # the next chunk compares from here on


def writing_both_agrees_with_writing_each(case: Case, device: str) -> None:
    """Bit for bit, for single tokens and for several, in one launch or in many."""
    formats: dict[Role, Format] = {role: case.format(role) for role in ("key", "value")}
    sides = {role: stored(case, role) for role in formats}
    batch, extents = len(case.pads), {role: extent for role, (_, extent) in sides.items()}
    each = {role: to(arenas, device) for role, (arenas, _) in sides.items()}
    both = {role: to(arenas, device) for role, (arenas, _) in sides.items()}
    for step, tokens in enumerate((1, 1, 3, 1)):
        positions = positions_of(*extents.values(), device=device)
        rows = {role: (positions, row) for row, role in enumerate(formats, 1)}
        new = {
            role: case.randn(batch, NUM_KV_HEADS, tokens, fmt.head_dim, seed=step).to(device)
            for role, fmt in formats.items()
        }
        valid = None if step % 2 else torch.ones(batch, tokens, dtype=torch.bool, device=device)
        for role, fmt in formats.items():
            launch.write(each[role], new[role], valid, rows[role], fmt)
        launch.write_both(
            *((both[role], new[role], rows[role], fmt) for role, fmt in formats.items()), valid
        )
        for role, fmt in formats.items():
            assert_same(tensors_of(both[role]), tensors_of(each[role]))
            extents[role] = extents[role].after(tokens, fmt)
    assert any(
        not torch.equal(as_bytes(a), as_bytes(b))
        for role, (arenas, _) in sides.items()
        for a, b in zip(tensors_of(arenas), tensors_of(both[role]), strict=True)
    ), "nothing was written"


def assert_same_storage(
    actual: Arenas,
    expected: Arenas,
    x: Tensor,
    extent: Extent,
    fmt: Format,
    feedback: Tensor | None = None,
) -> None:
    """Both hold the tokens ``x`` ``[batch, heads, length, head_dim]``, and ``actual`` what
    ``expected`` holds, as :func:`writing_agrees_with_the_reference` says it.
    """
    if feedback is None and fmt.layout not in LIKE_PRODUCTS:
        assert_same(tensors_of(actual), tensors_of(expected))
        return
    actual, expected = to(actual, "cpu"), to(expected, "cpu")
    for row, start in enumerate(expected.start.tolist()):
        count, first = extent.packed(start, fmt), start + fmt.sink_length
        if not count:
            continue
        fixed = actual.fixed_of(slice(row, row + 1), fmt)
        row_feedback = None if feedback is None else feedback[row : row + 1]
        numbers = x[row : row + 1, :, first : first + count]
        for arenas in (actual, expected):
            packed = [
                arena[row : row + 1, :, : count // fmt.tokens_per_slot(name)]
                for name, arena in zip(fmt.packed_names, arenas.packed, strict=True)
            ]
            assert_rounded_rightly(packed, numbers, None, fmt, fixed, row_feedback, first)
            for part in packed:
                part.zero_()  # so that the rest is compared
    assert_same(tensors_of(actual), tensors_of(expected))


def quantizing_agrees_with_the_reference(
    case: Case, role: Role, device: str, with_feedback: bool = False
) -> None:
    """Codes and parameters of whole groups, with padding anywhere; equal as in writing."""
    fmt = case.format(role)
    tokens = 2 * fmt.token_group if fmt.token_group > 1 else 70
    x = case.randn(len(case.pads), NUM_KV_HEADS, tokens, fmt.head_dim)
    valid = (
        torch.rand(len(case.pads), x.shape[2], generator=torch.Generator().manual_seed(case.seed))
        < 0.5
    )
    valid[0, : fmt.token_group] = False
    fixed = unwritten(case, role, tokens).fixed
    feedback = case.feedback(role) if with_feedback else None
    placed = {name: t.to(device) for name, t in fixed.items()}
    placed_feedback = None if feedback is None else feedback.to(device)
    for v in (None, valid):
        on_device = None if v is None else v.to(device)
        actual = launch.quantize(x.to(device), on_device, fmt, placed, placed_feedback)
        expected = reference.quantize(x, v, fmt, fixed, feedback)
        if feedback is None and fmt.layout not in LIKE_PRODUCTS:
            assert_same(actual, expected)
            continue
        for packed in (actual, expected):
            assert_rounded_rightly([t.cpu() for t in packed], x, v, fmt, fixed, feedback)


def storing_agrees_with_the_reference(case: Case, role: Role, device: str) -> None:
    """The op ``store`` holds the prompt, rounded with what the codec learns from it."""
    fmt, given = case.format(role), case.given(role)
    batch, tokens = len(case.pads), sum(case.chunks)
    x = case.randn(batch, NUM_KV_HEADS, tokens, fmt.head_dim)
    query = case.randn(batch, NUM_KV_HEADS * case.queries_per_kv, tokens, fmt.head_dim, seed=9)
    query = query if case.codec.taps(role) else None
    valid = torch.ones(batch, tokens, dtype=torch.bool) if case.valid is None else case.valid
    placed = [None if t is None else t.to(device) for t in (x, valid, query, given)]
    found = ops.overload("store", fmt.layout)(*placed, role, fmt.codec, fmt.to_ints())
    capacity = -(-tokens // fmt.token_group) * fmt.token_group
    expected = reference.empty_arenas(x, capacity, fmt, given)
    named = dict(zip(fmt.stored_names, (t.cpu() for t in found), strict=True))
    for name in fmt.stored_layout.shared:
        named[name] = expected.fixed[name]
    actual = Arenas.of(fmt, [named[name] for name in fmt.arena_names])
    fit = reference.learn(expected, x, valid, query, fmt, role)
    if actual.affine is not None and expected.affine is not None:
        torch.testing.assert_close(actual.affine, expected.affine)
        expected = expected.with_fixed(affine=actual.affine)
    reference.write(expected, x, valid, Extent(0, 0), fmt, fit.feedback)
    extent = Extent(0, 0).after(tokens, fmt)
    assert_same_storage(actual, expected, x, extent, fmt, fit.feedback)


def learning_agrees_with_float64(case: Case, device: str, shift: float = 0.0) -> None:
    """Means to an fp16 ulp, factors the nearest powers of two, feedback to 1e-4 of its norm.

    ``shift`` is how far the keys of a head lie from zero; each row has its own padding, and one
    with too few tokens learns nothing.
    """
    fmt, codec, basis = case.format("key"), case.codec, case.basis("key")
    assert isinstance(codec, Squat | SquatPaper)
    batch, tokens = len(case.pads), sum(case.chunks)
    x = case.randn(batch, NUM_KV_HEADS, tokens, fmt.head_dim)
    x = (x + shift * case.randn(1, NUM_KV_HEADS, 1, fmt.head_dim, seed=3)).to(case.dtype)
    few = case.randn(batch, NUM_KV_HEADS * case.queries_per_kv, tokens, 6, seed=4).float()
    query = few @ case.randn(6, fmt.head_dim, seed=5).float()
    query = (query + case.randn(*query.shape, seed=6)).to(case.dtype)
    # Strides of a model that keeps [batch, tokens, heads, channels].
    x, query = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, query))
    first = torch.tensor(case.pads)[:, None] + fmt.sink_length
    keep = torch.arange(tokens) >= first
    if case.valid is not None:  # what is not kept is nobody's business
        dropped = ~case.valid[:, None, :, None]
        x, query = (t.masked_fill(dropped, float("nan")) for t in (x, query))
    arenas = to(reference.empty_arenas(x, 0, fmt, basis), device)
    placed = [None if t is None else t.to(device) for t in (x, case.valid, query)]
    found = fitting.learn(arenas, *placed, fmt, "key")
    if isinstance(codec, Squat):
        keep = keep & (keep.sum(1, keepdim=True) >= SMALLEST_PROMPT)

    factor = torch.ones(batch, NUM_KV_HEADS, 1, fmt.head_dim, dtype=torch.float64)
    gram = query_gram(query, keep, NUM_KV_HEADS)
    if isinstance(codec, Squat) and fmt.affine:
        assert arenas.affine is not None
        assert found.fixed["affine"] is arenas.affine
        mean, factor = arenas.affine.cpu().double().split(1, 2)
        kept = x.double().masked_fill(~keep[:, None, :, None], 0.0)
        true = kept.sum(2, keepdim=True) / keep.sum(1).clamp_min(1)[:, None, None, None]
        assert_nearest_halves(mean, true if codec.center else 0 * true, 1e-6 * kept.abs().amax())
        moment = second_moment(x.double(), mean, keep)
        of_queries = gram.diagonal(dim1=-2, dim2=-1)[:, :, None]
        ratio = (_floored(moment) / _floored(of_queries)).log2() / 4
        exponent = ratio - ratio.mean(-1, keepdim=True)
        exponent = exponent if codec.smooth and basis is None else 0 * exponent
        assert ((factor.log2() - exponent).abs() <= 0.5 + 1e-3).all()
        assert torch.equal(factor.log2(), factor.log2().round())
    if not codec.strength:
        assert found.feedback is None
        return
    assert found.feedback is not None
    latent = reference.basis_pair(basis, fmt.head_dim, x.device)[1].double() * factor
    if isinstance(codec, SquatPaper):
        latent = torch.eye(fmt.head_dim, dtype=torch.float64)
    h = metric(latent @ gram @ latent.mT, codec.strength, relative=True)
    expected, feedback = feedback_matrix(h, LANES), found.feedback.cpu()
    error = torch.linalg.matrix_norm(feedback - expected)
    assert (error <= 1e-4 * torch.linalg.matrix_norm(expected)).all()
    assert torch.equal(feedback == 0, expected == 0)
    again = fitting.learn(to(arenas, device), *placed, fmt, "key")
    assert_same((again.feedback,), (found.feedback,))


def assert_rounded_rightly(
    packed: list[Tensor], x: Tensor, valid: Tensor | None, fmt: Format, fixed: Fixed,
    feedback: Tensor | None, first_position: int = 0,
) -> None:  # fmt: skip
    """Every stored number is what float64 arithmetic would round, given those stored before it.

    A parameter is within one fp16 ulp; a code is the nearest level of the *stored* parameters (of
    the size of its token in ``planes/token``, whose scale comes after the codes), where the true
    number is not within a thousandth of a step of the middle between two. With
    feedback, the errors that reach a plane group are those of the stored codes before it, so that
    one code that fell to the other side of a middle is no excuse for the next.
    """
    if fmt.layout == "polar/token":
        assert_in_their_cells(packed, x, fmt, fixed)
        return
    if fmt.layout in LATENT:
        assert_at_nearest_latents(packed, x, valid, fmt, fixed, first_position)
        return
    if fmt.layout in OTHER_CHECKS:
        hidden = torch.tensor(False) if valid is None else ~valid[:, None, :, None]
        OTHER_CHECKS[fmt.layout](packed, x.double().masked_fill(hidden, 0.0), fmt)
        return
    head_dim, largest_number = fmt.head_dim, x.double().abs().amax(-1, keepdim=True)
    codes = unpack(packed[0], head_dim, fmt.widths).double()
    y, group = x.double(), 1
    if fmt.layout == "planes/token":
        affine = fixed["affine"]
        if affine.numel():
            y = (y - affine[:, :, :1].double()) / affine[:, :, 1:].double()
        y = y @ reference.basis_pair(fixed["basis"], head_dim, x.device)[0].double()
        least = torch.tensor(least_scales(fmt.widths), dtype=torch.float64)
        asked = y.abs() * least.repeat_interleave(LANES)[:head_dim]
        size = y.square().mean(-1).sqrt().maximum(asked.amax(-1)).clamp(2.0**-24, 65504.0)
        sign = alternating_signs(x.shape[2], 0, x.device).double()
        size = scale = size[..., None]
        bits = torch.tensor(fmt.widths).repeat_interleave(LANES)[:head_dim]
        levels = (codes - (2.0**bits - 1) / 2) * torch.tensor(STEP, dtype=torch.float64)[bits]
        worth = torch.tensor(worths(fmt.widths, fmt.latent), dtype=torch.float64)
        root = worth.repeat_interleave(LANES)[:head_dim].sqrt()
        levels, number = levels * sign * root, y * root
        length = number.norm(dim=-1, keepdim=True)
        scale = length / levels.norm(dim=-1, keepdim=True)
        if fmt.unbiased:
            scale = length**2 / (number * levels).sum(-1, keepdim=True).clamp_min(1e-30)
        size = size * sign
        scale = scale.clamp(2.0**-24, 65504.0)
        assert_nearest_halves(packed[1] * sign, scale, 1e-6 * largest_number)
    else:
        group = fmt.token_group
        assert fmt.channel_group == 1
    y = y.clone()
    for plane, bits in enumerate(fmt.widths):
        block = slice(plane * LANES, min((plane + 1) * LANES, head_dim))
        number, code, largest = y[..., block], codes[..., block], 2**bits - 1
        if fmt.layout == "planes/token":
            unit = size * STEP[bits]
            origin = -unit * largest / 2
        else:
            slack = 1e-6 * largest_number.amax()
            parts = number.unflatten(2, (-1, group))
            seen = torch.tensor(True) if valid is None else valid.unflatten(1, (-1, group))
            seen = seen if valid is None else seen[:, None, :, :, None]
            low = parts.masked_fill(~seen, torch.inf).amin(3)
            high = parts.masked_fill(~seen, -torch.inf).amax(3)
            low, high = (t.masked_fill(low > high, 0.0) for t in (low, high))
            scales, zero_points = (p[..., block] for p in packed[1:])
            assert_nearest_halves(scales, ((high - low) / largest).clamp(1e-6, 65504.0), slack)
            assert_nearest_halves(zero_points, low, slack)
            unit, origin = (p.double().repeat_interleave(group, 2) for p in (scales, zero_points))
        if bits:
            level = ((number - origin) / unit).clamp(0, largest)
            middle = 0.5 + 1e-3 + 1e-6 * largest_number / unit
            assert ((level - code).abs() <= middle).all(), (plane, (level - code).abs().max())
        else:
            assert not code.any()
        if feedback is not None:
            later = slice(block.stop, head_dim)
            error = code * unit + origin - number
            y[..., later] += error @ feedback[..., block, later].double()


def assert_in_their_cells(packed: list[Tensor], x: Tensor, fmt: Format, fixed: Fixed) -> None:
    """Every radius is the true one in fp16, and every angle in the cell of its code, where both are
    larger than what fp32 arithmetic has lost.
    """
    qdata, radius = packed
    y = x.double() @ reference.basis_pair(None, fmt.head_dim, x.device)[0].double()
    y = torch.nn.functional.pad(y, (0, -fmt.head_dim % polar_tree.BLOCK))
    lost = 1e-6 * x.double().abs().amax(-1, keepdim=True) * fmt.head_dim**0.5
    books = polar_tree.angles_of(*fixed["codebook"].float().unbind(2), fmt.widths)
    books = books.double().split([2**b for b in fmt.widths], -1)
    codes = polar_tree.unpack_codes(qdata, radius.shape[-1], fmt.widths)
    for level, (code, book) in enumerate(zip(codes, books, strict=True), 1):
        angle = torch.atan2(y[..., 1::2], y[..., 0::2])
        angle = angle.remainder(2 * torch.pi) if level == 1 else angle
        y = torch.hypot(y[..., 0::2], y[..., 1::2])
        edges = polar_tree.middles(book)
        edges = torch.nn.functional.pad(edges, (1, 0), value=0.0)
        edges = torch.nn.functional.pad(edges, (0, 1), value=2 * torch.pi)
        where = code.flatten(2).long()
        low, high = (edges[..., e].gather(-1, where).view(angle.shape) for e in (
            slice(None, -1), slice(1, None)))  # fmt: skip
        slack = 1e-6 + 2 * lost / y.clamp_min(1e-30)
        around = (angle - 2 * torch.pi).abs().minimum(angle) <= slack  # 0 is also a turn
        inside = (low - slack <= angle) & (angle <= high + slack)
        assert (inside | (around & (level == 1))).all(), level
    assert_nearest_halves(radius, y, lost)


def assert_at_nearest_levels(packed: list[Tensor], x: Tensor, fmt: Format) -> None:
    """:func:`assert_rounded_rightly` of the layout ``levels/token``: no level is nearer than the
    stored one by more than fp32 can tell, and the scale is that of the stored codes.
    """
    y = x @ rotation_pair(fmt.head_dim, x.device)[0].double()
    size = y.square().mean(-1, keepdim=True).sqrt()
    unit = y / size.clamp_min(1e-30)
    found = level_of(unpack(packed[0], fmt.head_dim, fmt.widths), fmt.widths).double()
    for plane, bits in enumerate(fmt.widths):
        block = slice(plane * LANES, (plane + 1) * LANES)
        distances = (level_table(bits, x.device)[0].double() - unit[..., block, None]).abs()
        own = (found[..., block] - unit[..., block]).abs()
        assert (own <= distances.amin(-1) + 1e-5).all()
    codec = codec_from_spec(fmt.codec)
    if isinstance(codec, TurboQuant) and codec.norm_correction:
        size = size / found.square().mean(-1, keepdim=True).sqrt()
    assert_nearest_halves(packed[1], size.clamp(max=65504.0), 1e-6 * size)


def assert_signs_of_projections(packed: list[Tensor], x: Tensor, fmt: Format) -> None:
    """:func:`assert_rounded_rightly` of the layout ``signs/token``: a sign is right where fp32 can
    tell it, and the outliers are channels of largest norm.
    """
    sketch_dim, outlier_dim, outliers = split_widths(fmt.widths)
    qdata, norm, channels = packed
    parts = [(x, sketch_dim, x)]
    if outliers:
        apart = is_outlier(channels, fmt.head_dim, fmt.token_group)
        squares = x.square().unflatten(2, (-1, fmt.token_group)).sum(3)
        chosen = squares.gather(3, channels.long()).amin(-1)
        assert (channels.int().diff() > 0).all()
        largest = squares.topk(outliers, -1).values.amin(-1)
        assert (chosen >= largest * (1 - 1e-6)).all()
        outside = x.masked_fill(~apart, 0.0)
        parts = [(x - outside, sketch_dim, x), (outside, outlier_dim, outside)]
    signs = signs_of(qdata).split([size for _, size, _ in parts], -1)
    for i, (sketched, size, measured) in enumerate(parts):
        products = sketched @ directions(fmt.head_dim, size, x.device).double().T
        slack = 1e-5 * sketched.norm(dim=-1, keepdim=True) * fmt.head_dim**0.5
        assert (products * signs[i] >= -slack).all()
        length = measured.norm(dim=-1, keepdim=True)
        assert_nearest_halves(norm[..., i : i + 1], length.clamp(max=65504.0), 1e-6 * length)


def assert_at_nearest_latents(
    packed: list[Tensor], x: Tensor, valid: Tensor | None, fmt: Format, fixed: Fixed,
    first_position: int,
) -> None:  # fmt: skip
    """Codes are the nearest levels of the latent channels of keys that are turned back; turns are
    what fp32 makes of them.
    """
    cached = x = x.double()
    largest_number = x.abs().amax(-1, keepdim=True)
    position = first_position + torch.arange(x.shape[2]).float()[:, None]
    turns = position * (fixed["frequency"] * (0.5 / math.pi))
    angle = turns.double() * (2 * math.pi)
    if turning := rotary_dim(fmt):
        pairing = "interleaved" if fmt.details[1] else "halves"
        x = Rotation(turning, pairing, -1).apply(x, angle.cos(), angle.sin())
    latent = (x - fixed["center"].double()) @ fixed["basis"].double().mT
    scale = fixed["scale"].double()
    level = (latent - fixed["zero_point"].double()) / scale
    level = level.clamp(min=0).minimum(largest_codes(fmt, x.device).double())
    for mean in packed[1:]:  # landmarks, of keys as they are cached
        shown = cached if valid is None else cached * valid[:, None, :, None]
        true = shown.unflatten(2, (-1, 8)).mean(3)
        assert_nearest_halves(mean, true, 1e-6 * largest_number.amax())
    codes = unpack(packed[0], num_latent(fmt), latent_widths(fmt)).double()
    middle = 0.5 + 1e-3 + 1e-5 * largest_number / scale
    assert ((level - codes).abs() <= middle).all(), (level - codes).abs().max()


OTHER_CHECKS = {
    "levels/token": assert_at_nearest_levels,
    "signs/token": assert_signs_of_projections,
}


def assert_nearest_halves(actual: Tensor, true: Tensor, slack: Tensor) -> None:
    """fp16 numbers within an ulp of ``true``, which fp32 arithmetic knows to ``slack``."""
    assert ((actual.double() - true).abs() <= true.abs() * 2.0**-10 + 2.0**-24 + slack).all()


def dequantizing_agrees_with_the_reference(case: Case, role: Role, device: str) -> None:
    """Numbers of packed tokens to rounding, exact ones bit for bit, zeros for padding."""
    fmt = case.format(role)
    arenas, extent = stored(case, role)
    actual = launch.dense_past(to(arenas, device), extent, fmt).cpu()
    later = launch.dense_past(to(arenas, device), extent, fmt, first=case.first_seen).cpu()
    step = torch.finfo(case.dtype).eps
    if fmt.layout in LATENT or through_dots(fmt):  # sums may depend on where in a tile a token is
        slack = 1e-5 * actual.abs().amax().item()
        seen = actual[:, :, case.first_seen :]
        torch.testing.assert_close(later, seen, rtol=2 * step, atol=slack)
    else:
        assert torch.equal(later, actual[:, :, case.first_seen :])
    expected = reference.dense_past(arenas, extent, fmt)
    assert actual.dtype == expected.dtype
    if not through_dots(fmt):
        rtol, atol = 2 * step, step
        if fmt.layout == "polar/pairs":  # cosines are not the same everywhere
            rtol, atol = 2 * step + 1e-6, step + 2e-6 * float(expected.abs().amax())
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
        return
    true = dense_past_in_float64(arenas, extent, fmt)
    # Tensor cores cut the sums of a product off where fp32 would round them.
    slack = step * true.abs() + 2e-5 * true.abs().amax(-1, keepdim=True) + step**2
    assert ((actual.double() - true).abs() <= slack).all()
    for row, start in enumerate(arenas.start.tolist()):
        first = start + fmt.sink_length
        for part in (slice(0, first), slice(first + extent.packed(start, fmt), None)):
            assert_same((actual[row, :, part],), (expected[row, :, part],))


def attending_agrees_with_float64(case: Case, device: str) -> None:
    """As close to float64 attention over the stored numbers as torch's own in the model's dtype."""
    key, value = ((*stored(case, role), case.format(role)) for role in ("key", "value"))
    batch, past = len(case.pads), sum(case.chunks)
    query = case.randn(batch, NUM_KV_HEADS * case.queries_per_kv, case.q_len, case.key_dim, seed=5)
    new_key, new_value = (
        case.randn(batch, NUM_KV_HEADS, case.new_len, head_dim, seed=6) if case.new_len else None
        for head_dim in (case.key_dim, case.value_dim)
    )
    options = {
        "mask": make_mask(case, past + case.new_len - case.first_seen),
        "sinks": case.randn(query.shape[1], seed=7).float() if case.sinks else None,
        "scale": 0.7 * case.key_dim**-0.5,
        "causal": case.causal,
        "softcap": case.softcap,
    }
    sides = (new_key, new_value, key, value, case.first_seen)
    expected = attention_in_float64(query, *sides, **options)
    rounded = attention_in_the_models_dtype(query, *sides, **options)

    on_device: dict[str, Any] = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()
    }
    positions = positions_of(key[1], value[1], Extent(case.first_seen, -7), device=device)
    placed_key, placed_value = (
        (to(arenas, device), (positions, 1 + row), fmt)
        for row, (arenas, _, fmt) in enumerate((key, value))
    )
    new_key, new_value = (None if x is None else x.to(device) for x in (new_key, new_value))
    actual = launch.attend(
        query.to(device), new_key, new_value, placed_key, placed_value,
        first=3 if case.first_seen else -1, **on_device,
    ).cpu()  # fmt: skip

    assert actual.dtype == case.dtype
    assert actual.isfinite().all()
    # Tensor cores cut off what fp32 would round, of sums that are several times their outcome.
    cut_off = through_dots(key[2]) and case.dtype == torch.float32 and device == "cuda"
    assert_as_close_as(actual, rounded, expected, slack=3e-4 if cut_off else 2e-6)


def attention_in_float64(
    query: Tensor, new_key: Tensor | None, new_value: Tensor | None, key: Side, value: Side,
    first: int, *, mask: Tensor | None, sinks: Tensor | None, scale: float, causal: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """The formula of ``reference.attention`` with nothing rounded since the numbers were stored."""
    full = []
    for (arenas, extent, fmt), new in ((key, new_key), (value, new_value)):
        past = dense_past_in_float64(arenas, extent, fmt)[:, :, first:]
        both = past if new is None else torch.cat([past, new.double()], 2)
        full.append(both.repeat_interleave(query.shape[1] // both.shape[1], 1))
    scores = scale * query.double() @ full[0].mT
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    q_len, kv_len = scores.shape[2:]
    seen = torch.arange(kv_len) >= key[0].start[:, None, None, None] - first
    if causal != reference.NO_CAUSALITY:
        offset = kv_len - q_len if causal == reference.BOTTOM_RIGHT else 0
        seen = seen & (torch.arange(kv_len) <= torch.arange(q_len)[:, None] + offset)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.double()
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return (weights / total).nan_to_num(0.0) @ full[1]


def attention_in_the_models_dtype(
    query: Tensor, new_key: Tensor | None, new_value: Tensor | None, key: Side, value: Side,
    first: int, *, mask: Tensor | None, **options,
) -> Tensor:  # fmt: skip
    """torch's attention over the stored numbers, rounded to the model's dtype."""
    full = []
    for side, new in ((key, new_key), (value, new_value)):
        past = reference.dense_past(*side)[:, :, first:]
        full.append(past if new is None else torch.cat([past, new], 2))
    seen = torch.arange(full[0].shape[2]) >= key[0].start[:, None, None, None] - first
    if mask is not None:
        seen = seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    return reference.attention(query, *full, mask=seen, **options)


def dense_past_in_float64(arenas: Arenas, extent: Extent, fmt: Format) -> Tensor:
    """``reference.dense_past`` with nothing rounded since the numbers were stored."""
    packed = tuple(t.double() for t in arenas.packed) if fmt.layout == "dense" else arenas.packed
    out = reference.dense_past(
        replace(arenas, packed=packed, dense=arenas.dense.double()), extent, fmt
    )
    if fmt.layout == "planes/dual":
        put_tiles_in_float64(out, arenas, extent, fmt)
    if fmt.layout != "planes/token":
        return out  # rounded to fp32 once
    widths = torch.tensor(fmt.widths).repeat_interleave(LANES)[: fmt.head_dim]
    step, zero = torch.tensor(STEP, dtype=torch.float64)[widths], (2.0**widths - 1) / 2
    inverse = reference.basis_pair(arenas.basis, fmt.head_dim, out.device)[1].double()
    for row, start in enumerate(arenas.start.tolist()):
        count, first = extent.packed(start, fmt), start + fmt.sink_length
        qdata, scale = (arena[row, :, :count] for arena in arenas.packed)
        codes = unpack(qdata, fmt.head_dim, fmt.widths).double()
        numbers = ((codes - zero) * step * scale.double()) @ inverse
        if fmt.affine and arenas.affine is not None:
            offset, factor = arenas.affine[row].double().split(1, 1)
            numbers = numbers * factor + offset
        out[row, :, first : first + count] = numbers
    return out


def put_tiles_in_float64(out: Tensor, arenas: Arenas, extent: Extent, fmt: Format) -> None:
    """The packed tokens of the layout ``planes/dual``."""
    back = rotation(fmt.head_dim).double().mT
    for row, start in enumerate(arenas.start.tolist()):
        count, first = extent.packed(start, fmt), start + fmt.sink_length
        qdata, *parameters = (
            arena[row, :, : count // fmt.tokens_per_slot(name)]
            for name, arena in zip(fmt.packed_names, arenas.packed, strict=True)
        )
        scale, zero_point, factor = (
            p.double().repeat_interleave(count // max(p.shape[1], 1), 1) for p in parameters
        )
        codes = unpack(qdata, fmt.head_dim, fmt.widths).double()
        numbers = ((codes * scale + zero_point) * factor) @ back
        out[row, :, first : first + count] = numbers


def through_dots(fmt: Format) -> bool:
    """Whether kernels take packed numbers through a dot, which rounds what goes in."""
    return fmt.layout not in ("planes/channel", "polar/pairs", "dense")


def assert_as_close_as(
    actual: Tensor, rounded: Tensor, expected: Tensor, slack: float = 2e-6
) -> None:
    """``actual`` is about as far from ``expected`` as ``rounded``, torch's in the same dtype.

    ``slack`` is at least what a GPU's exponential is good to.
    """
    ours, torchs = (distance(x, expected) for x in (actual, rounded))
    assert ours <= 2.5 * torchs + slack, (ours, torchs)


def distance(x: Tensor, expected: Tensor) -> float:
    """Relative error of the whole."""
    return ((x.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def make_mask(case: Case, kv_len: int) -> Tensor | None:
    """The kind of mask that ``case`` names; the first of several queries sees nothing."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, heads = len(case.pads), NUM_KV_HEADS * case.queries_per_kv
    if case.mask == "none":
        return None
    if case.mask == "padding":
        pads = torch.tensor(case.pads)[:, None] - case.first_seen
        return (torch.arange(kv_len) >= pads)[:, None, None]
    visible = torch.rand(batch, 1, case.q_len, kv_len, generator=generator) < 0.8
    if case.q_len > 1:
        visible[:, :, 0] = False
    if case.mask == "bool":
        return visible
    bias = torch.randn(1, heads, 1, kv_len, generator=generator)
    return bias.masked_fill(~visible, -torch.inf).to(case.dtype)


def learning_leaves_out(bad: float, case: Case, device: str) -> None:
    """A key that fp16 cannot hold counts as zeros, such a number of a query as zero: the kernels
    learn what the reference learns, and it is finite.
    """
    fmt = case.format("key")
    x = case.randn(2, NUM_KV_HEADS, 70, fmt.head_dim).to(device)
    query = case.randn(2, 2 * NUM_KV_HEADS, 70, fmt.head_dim, seed=2).to(device)
    x[0, 0, 50, 3], query[0, 0, 40, 5] = bad, bad
    arenas = [reference.empty_arenas(x, 0, fmt, None) for _ in range(2)]
    found = fitting.learn(arenas[0], x, None, query, fmt, "key")
    expected = reference.learn(arenas[1], x, None, query, fmt, "key")
    assert found.feedback is not None
    assert expected.feedback is not None
    assert bool(found.feedback.isfinite().all())
    torch.testing.assert_close(arenas[0].affine, arenas[1].affine, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.feedback, expected.feedback, rtol=1e-3, atol=1e-3)
