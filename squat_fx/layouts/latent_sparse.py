"""``latent/rope`` with landmarks, by which a single query chooses the keys that it attends to.

Packed tokens are in chunks of ``CHUNK``. A chunk has a landmark, the mean of its keys as the model
cached them; the chunks of a prompt whose keys lie least along their landmark are outliers, whose
keys are kept exactly beside their codes. (ShadowKV, Sun et al., ICML 2025.) What is chosen and how
says :mod:`squat_fx.kernels.chosen`; read as a tensor, or by several queries at once, it is all
keys. ``Format.details`` go on with the budget, in tokens, and with the number of outliers.

| arena | besides those of ``latent/rope`` |
|---|---|
| ``landmark`` | fp16 ``[batch, heads, tokens / 8, head_dim]``; 2 bits a number |
| ``outlier`` | int32 ``[batch, heads, 1, outliers]``: the position of their first tokens, or -1 |
| ``outlier_key`` | ``[batch, heads, outliers * 8, head_dim]``, in the cache's dtype |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from squat_fx.layouts.base import Fixed
from squat_fx.layouts.latent_rope import LatentRope

if TYPE_CHECKING:
    from squat_fx.codecs.base import Codec
    from squat_fx.layouts.format import Format

CHUNK = 8
LARGEST_HALF = 65504.0


class LatentSparse(LatentRope):
    """See the module."""

    name: ClassVar[str] = "latent/sparse"
    packed: ClassVar[tuple[str, ...]] = ("qdata", "landmark")
    fixed: ClassVar[tuple[str, ...]] = (*LatentRope.fixed, "outlier", "outlier_key")
    chooses: ClassVar[bool] = True

    def last_dim(self, fmt: Format, name: str) -> int:
        """The bytes of a token, the numbers of a landmark."""
        return fmt.head_dim if name == "landmark" else super().last_dim(fmt, name)

    def dtype(self, fmt: Format, name: str, dtype: torch.dtype) -> torch.dtype:
        """Exact keys have the cache's."""
        others = {"landmark": torch.float16, "outlier": torch.int32, "outlier_key": dtype}
        return others.get(name) or super().dtype(fmt, name, dtype)

    def fixed_shape(self, fmt: Format, name: str, batch: int, heads: int) -> tuple[int, ...]:
        """See the module."""
        outliers = num_outliers(fmt)
        if name == "outlier":
            return batch, heads, 1, outliers
        if name == "outlier_key":
            return batch, heads, CHUNK * outliers, fmt.head_dim
        return super().fixed_shape(fmt, name, batch, heads)

    def empty_fixed(self, fmt: Format, name: str, like: Tensor) -> Tensor:
        """No outliers."""
        arena = super().empty_fixed(fmt, name, like)
        return arena.fill_(-1) if name == "outlier" else arena

    def describe(self, fmt: Format) -> str:
        """With how many keys are attended to."""
        return f"{super().describe(fmt)}, {budget(fmt)} tokens attended"

    def learned(self, x: Tensor, first: Tensor, packed: Tensor, fmt: Format) -> Fixed:
        """The outliers among the chunks that are packed, by position; as many as there are."""
        _, heads, tokens, head_dim = x.shape
        chunks, outliers = tokens // CHUNK, num_outliers(fmt)
        if not outliers:
            return {}
        slot = torch.arange(CHUNK * chunks, device=x.device)
        place = (first[:, None] + slot).clamp(max=max(tokens - 1, 0))  # [batch, tokens]
        place = place[:, None, :, None].expand(-1, heads, -1, head_dim)
        keys = x.gather(2, place).unflatten(2, (-1, CHUNK))
        landmark = landmarks(keys.flatten(2, 3)).float()[:, :, :, None]
        cosine = F.cosine_similarity(keys.float(), landmark, dim=-1).amin(-1).nan_to_num(1.0)
        there = slot[::CHUNK] < packed[:, None]  # [batch, chunks]
        cosine = F.pad(
            cosine.masked_fill(~there[:, None], torch.inf), (0, outliers), value=torch.inf
        )
        lowest, chunk = cosine.topk(outliers, -1, largest=False)  # [batch, heads, outliers]
        exists = lowest < torch.inf
        chunk = chunk.clamp(max=max(chunks - 1, 0))
        position = (first[:, None, None] + CHUNK * chunk).masked_fill(~exists, -1)
        taken = chunk[..., None, None].expand(-1, -1, -1, CHUNK, head_dim)
        kept = x.new_zeros(taken.shape) if not chunks else keys.gather(2, taken)
        kept = kept.masked_fill(~exists[..., None, None], 0.0)
        return {
            "outlier": position[:, :, None].to(torch.int32),
            "outlier_key": kept.flatten(2, 3),
        }

    def forget(self, fixed: Fixed, end: Tensor) -> None:
        """Outliers that do not end before ``end`` are none any more."""
        gone = fixed["outlier"] + CHUNK > end[:, None, None, None]
        fixed["outlier"].masked_fill_(gone, -1)

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
        """Codes and landmarks; padding among the tokens of a chunk counts as zeros."""
        place = first_slot, first_position
        codes = super().quantize(x, valid, fmt, codec, fixed, feedback, *place)
        if valid is not None:
            x = x.masked_fill(~valid[:, None, :, None], 0.0)
        return *codes, landmarks(x)

    def dequantize(
        self,
        packed: tuple[Tensor, ...],
        fmt: Format,
        fixed: Fixed,
        first_position: int | Tensor = 0,
    ) -> Tensor:
        """All keys, those of outliers exact."""
        numbers = super().dequantize(packed, fmt, fixed, first_position)
        tokens = numbers.shape[2]
        position = outlier_positions(fixed) - first_position  # [batch, heads, outliers * CHUNK]
        inside = (position >= 0) & (position < tokens) & (outlier_positions(fixed) >= 0)
        # One place more, for those that are elsewhere.
        place = torch.where(inside, position, tokens)[..., None].expand_as(fixed["outlier_key"])
        longer = F.pad(numbers, (0, 0, 0, 1))
        return longer.scatter_(2, place, fixed["outlier_key"].float())[:, :, :tokens]


def landmarks(x: Tensor) -> Tensor:
    """The mean of each chunk, fp16 ``[batch, heads, tokens / CHUNK, head_dim]``."""
    mean = x.float().unflatten(2, (-1, CHUNK)).mean(3)
    return mean.clamp(-LARGEST_HALF, LARGEST_HALF).half()


def outlier_positions(fixed: Fixed) -> Tensor:
    """Of each kept key, int64 ``[batch, heads, outliers * CHUNK]``; -1 where there is none."""
    first = fixed["outlier"][:, :, 0].long()[..., None]
    offset = torch.arange(CHUNK, device=first.device)
    return torch.where(first < 0, -1, first + offset).flatten(2)


def budget(fmt: Format) -> int:
    """How many packed tokens a query attends to, besides outliers."""
    return fmt.details[2]


def num_outliers(fmt: Format) -> int:
    """How many chunks of a prompt are kept exactly."""
    return fmt.details[3]
