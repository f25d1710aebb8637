"""What a launcher must do, said once for the interpreter and for the GPU.

A law takes a :class:`Case` and a device. Cases are drawn from a seed, so that a failure names its
case; the storage is prepared by the reference on the CPU, and memory that is nobody's business
holds NaN or 255.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from squat_fx.codecs import Codec, Format, Kivi, Lossless, Role, codec_spec, make_format
from squat_fx.kernels import launch, reference
from squat_fx.kernels.reference import Arenas, Extent

NUM_KV_HEADS = 2

Side = tuple[Arenas, Extent, Format]


@dataclass(frozen=True)
class Case:
    """One call: ``pads`` leading tokens of the rows are padding, ``chunks`` made up the past."""

    seed: int
    codec: Codec
    key_dim: int
    value_dim: int
    bits: int
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

    def format(self, role: Role) -> Format:
        """How ``role`` is stored."""
        head_dim = self.key_dim if role == "key" else self.value_dim
        return make_format(
            self.codec,
            codec_spec(self.codec),
            role,
            head_dim,
            self.bits,
            self.residual_length,
            self.sink_length,
        )

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
    return Case(
        seed=seed,
        codec=pick.choice((Kivi(32), Kivi(32), Kivi(64), Kivi(128), Lossless(32))),
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
    )


# storage -----------------------------------------------------------------------------------------


def unwritten(case: Case, role: Role, capacity: int) -> Arenas:
    """Arenas for ``capacity`` tokens in which a wrong read or a missing write shows."""
    fmt = case.format(role)
    like = torch.zeros(len(case.pads), NUM_KV_HEADS, 1, fmt.head_dim, dtype=case.dtype)
    arenas = reference.empty_arenas(like, capacity // fmt.token_group * fmt.token_group, fmt)
    for tensor in (*arenas.packed, arenas.dense):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
    return arenas


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
    packed = tuple(t.to(device, copy=True) for t in arenas.packed)
    return Arenas(packed, arenas.dense.to(device, copy=True), arenas.start.to(device, copy=True))


def positions_of(*extents: Extent, device: str) -> Tensor:
    """A positions tensor whose row ``i + 1`` is the i-th extent."""
    rows = [(-7, -7), *((e.length, e.watermark) for e in extents)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def as_bytes(tensor: Tensor) -> Tensor:
    """For comparing bit for bit, NaN included."""
    return tensor.cpu().contiguous().view(torch.uint8)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal bit for bit."""
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(as_bytes(a), as_bytes(e))


def tensors_of(arenas: Arenas) -> tuple[Tensor, ...]:
    """Every tensor of ``arenas``."""
    return (*arenas.packed, arenas.dense, arenas.start)


# laws --------------------------------------------------------------------------------------------


def writing_is_bit_equal_to_the_reference(case: Case, role: Role, device: str) -> None:
    """Chunk by chunk, every arena holds what the reference wrote, and nothing else was touched."""
    fmt = case.format(role)
    past = sum(case.chunks)
    x = case.randn(len(case.pads), NUM_KV_HEADS, past, fmt.head_dim)
    expected = unwritten(case, role, past + 128)
    actual = to(expected, device)
    extent, at = Extent(0, 0), 0
    for chunk in case.chunks:
        # Strides of a model that keeps [batch, tokens, heads, channels].
        new = x[:, :, at : at + chunk].transpose(1, 2).contiguous().transpose(1, 2)
        valid = None if case.valid is None else case.valid[:, at : at + chunk]
        reference.write(expected, new, valid, extent, fmt)
        on_device = None if valid is None else valid.to(device)
        positions = positions_of(extent, device=device)
        launch.write(actual, new.to(device), on_device, (positions, 1), fmt)
        assert_same(tensors_of(actual), tensors_of(expected))
        extent, at = extent.after(chunk, fmt), at + chunk


def quantizing_is_bit_equal_to_the_reference(case: Case, role: Role, device: str) -> None:
    """Codes, scales and zero points of whole groups."""
    fmt = case.format(role)
    x = case.randn(len(case.pads), NUM_KV_HEADS, 2 * max(fmt.token_group, 20), fmt.head_dim)
    valid = (
        torch.rand(len(case.pads), x.shape[2], generator=torch.Generator().manual_seed(case.seed))
        < 0.5
    )
    valid[0, : fmt.token_group] = False
    for v in (None, valid):
        actual = launch.quantize(x.to(device), None if v is None else v.to(device), fmt)
        assert_same(actual, reference.quantize(x, v, fmt))


def dequantizing_agrees_with_the_reference(case: Case, role: Role, device: str) -> None:
    """Numbers of packed tokens to rounding, exact ones bit for bit, zeros for padding."""
    fmt = case.format(role)
    arenas, extent = stored(case, role)
    actual = launch.dense_past(to(arenas, device), extent, fmt).cpu()
    expected = reference.dense_past(arenas, extent, fmt)
    assert actual.dtype == expected.dtype
    step = torch.finfo(case.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=2 * step, atol=step)


def attending_agrees_with_float64(case: Case, device: str) -> None:
    """As close to float64 attention over the stored numbers as torch's own in the model's dtype."""
    sides = {role: (*stored(case, role), case.format(role)) for role in ("key", "value")}
    batch, past = len(case.pads), sum(case.chunks)
    query = case.randn(batch, NUM_KV_HEADS * case.queries_per_kv, case.q_len, case.key_dim, seed=5)
    new = [
        case.randn(batch, NUM_KV_HEADS, case.new_len, fmt.head_dim, seed=6)
        if case.new_len
        else None
        for _, _, fmt in sides.values()
    ]
    options = {
        "mask": make_mask(case, past + case.new_len),
        "sinks": case.randn(query.shape[1], seed=7).float() if case.sinks else None,
        "scale": 0.7 * case.key_dim**-0.5,
        "causal": case.causal,
        "softcap": case.softcap,
    }
    expected = attention_in_float64(query, *new, *sides.values(), **options)
    rounded = reference.attend(query, *new, *sides.values(), **options)

    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    positions = positions_of(*(extent for _, extent, _ in sides.values()), device=device)
    placed = [
        (to(arenas, device), (positions, 1 + row), fmt)
        for row, (arenas, _, fmt) in enumerate(sides.values())
    ]
    new = [None if x is None else x.to(device) for x in new]
    actual = launch.attend(query.to(device), *new, *placed, **on_device).cpu()

    assert actual.dtype == case.dtype
    assert actual.isfinite().all()
    assert_as_close_as(actual, rounded, expected)


def attention_in_float64(
    query: Tensor, new_key: Tensor | None, new_value: Tensor | None, key: Side, value: Side, *,
    mask: Tensor | None, sinks: Tensor | None, scale: float, causal: int, softcap: float,
) -> Tensor:  # fmt: skip
    """The formula of ``reference.attention`` with nothing rounded since the numbers were stored."""
    full = []
    for (arenas, extent, fmt), new in ((key, new_key), (value, new_value)):
        past = reference.dense_past(in_float64(arenas, fmt), extent, fmt)
        both = past if new is None else torch.cat([past, new.double()], 2)
        full.append(both.repeat_interleave(query.shape[1] // both.shape[1], 1))
    scores = scale * query.double() @ full[0].mT
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    q_len, kv_len = scores.shape[2:]
    seen = torch.arange(kv_len) >= key[0].start[:, None, None, None]
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


def in_float64(arenas: Arenas, fmt: Format) -> Arenas:
    """The same storage, whose numbers come out in float64."""
    packed = tuple(t.double() for t in arenas.packed) if fmt.layout == "dense" else arenas.packed
    return Arenas(packed, arenas.dense.double(), arenas.start)


def assert_as_close_as(actual: Tensor, rounded: Tensor, expected: Tensor) -> None:
    """``actual`` is about as far from ``expected`` as ``rounded``, torch's in the same dtype."""
    ours, torchs = (distance(x, expected) for x in (actual, rounded))
    # A GPU's exponential is good to some 2e-6.
    assert ours <= 2.5 * torchs + 2e-6, (ours, torchs)


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
        return (torch.arange(kv_len) >= torch.tensor(case.pads)[:, None])[:, None, None]
    visible = torch.rand(batch, 1, case.q_len, kv_len, generator=generator) < 0.8
    if case.q_len > 1:
        visible[:, :, 0] = False
    if case.mask == "bool":
        return visible
    bias = torch.randn(1, heads, 1, kv_len, generator=generator)
    return bias.masked_fill(~visible, -torch.inf).to(case.dtype)
