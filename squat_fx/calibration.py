"""A calibrated latent basis for keys: what it is, which widths it gives, how it is kept.

For every KV head a basis in which the channels of keys differ in importance, so that bits can go
where they count (SVDq's latent channels, with the queries' metric of SQuat). With the second moment
``S`` of keys about the mean of their prompt and the Gram ``C`` of the queries that read them, both
averaged over texts,

    M = (1 - w) * I + w * C / mean eigenvalue of C           w = 1/4: a quarter query-weighted
    M = L @ L.T,   L.T @ S @ L = U @ diag(e) @ U.T           e from small to large
    basis = L @ U @ H / sd

so that rounding errors in the latent frame count alike. Channels are taken 16 at a time, the plane
groups of the stored format; ``H`` is a Hadamard rotation inside each, ``sd`` the root of the mean
of its eigenvalues. Bits go greedily to the group where they lower the error most. The weakest
groups come first: their errors are large, and what is fed back is taken up by those with more bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squat_fx.layouts.hadamard import rotation
from squat_fx.layouts.planes import LANES, spread_widths
from squat_fx.layouts.symmetric import DISTORTION

FORMAT, VERSION = "squat_fx calibration", 1
QUERY_WEIGHT = 0.25
RIDGE = 1e-2
SAMPLES = 16  # numbers per parameter in a fingerprint
SAMPLE_TOLERANCE = 0.02  # half precision, not another model


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """The keys of one layer.

    Attributes:
        matrices: fp32 ``[2, num_kv_heads, head_dim, head_dim]``: the basis that tokens are
            multiplied with, and its inverse.
        importance: fp32 ``[num_kv_heads, planes]``, what an error in each plane group costs.
    """

    matrices: Tensor
    importance: Tensor
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, second_moment: Tensor, gram: Tensor) -> LayerCalibration:
        """From ``S`` and ``C``, fp64 ``[num_kv_heads, head_dim, head_dim]`` each."""
        head_dim = second_moment.shape[-1]
        identity = torch.eye(head_dim, dtype=second_moment.dtype)
        mean = _mean_eigenvalue(second_moment).clamp_min(1e-6)  # keys that do not vary
        moment = second_moment + RIDGE * mean * identity
        relative = gram / _mean_eigenvalue(gram).clamp_min(1e-30)
        weighted = (1 - QUERY_WEIGHT + RIDGE) * identity + QUERY_WEIGHT * relative
        factor = torch.linalg.cholesky(weighted)
        values, vectors = torch.linalg.eigh(factor.mT @ moment @ factor)
        groups = values.split(LANES, -1)
        importance = torch.stack([group.mean(-1) for group in groups], -1)
        blocks = torch.block_diag(*[rotation(group.shape[-1]).to(values) for group in groups])
        deviation = importance.sqrt().repeat_interleave(LANES, -1)[..., :head_dim]
        basis = factor @ vectors @ blocks / deviation[..., None, :]
        matrices = torch.stack([basis, torch.linalg.inv(basis)])
        return cls(matrices.float(), importance.float())

    def widths(self, bits: float) -> tuple[int, ...]:
        """A width for each plane group, averaging ``bits``, the same for all heads.

        Raises:
            ValueError: the plane groups cannot average ``bits``.
        """
        total = sum(spread_widths(self.matrices.shape[-1], bits))
        share = self.importance / self.importance.sum(-1, keepdim=True)
        return allocate(share.log().mean(0).exp().tolist(), total)

    def misfit(self, heads: Any, head_dim: int) -> str | None:
        """Why keys of this shape cannot use it."""
        have = (self.matrices.shape[1], self.matrices.shape[3])
        if have == (heads, head_dim):
            return None
        return (
            f"the calibration is for {have[0]} heads of {have[1]} channels, "
            f"the keys have {heads} of {head_dim}; calibrate this model"
        )

    def basis(self, device: torch.device) -> Tensor:
        """``matrices`` on ``device``; one tensor per device."""
        if device not in self._on_device:
            with torch.inference_mode(False), torch.no_grad():
                self._on_device[device] = self.matrices.to(device)
        return self._on_device[device]


def _mean_eigenvalue(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def allocate(importance: list[float], total: int) -> tuple[int, ...]:
    """Widths from 0 to 8 that sum to ``total`` bits: a bit at a time to where it lowers the error
    most.
    """
    widths = [0] * len(importance)
    for _ in range(total):
        gains = [
            -1.0 if width == 8 else weight * (DISTORTION[width] - DISTORTION[width + 1])
            for weight, width in zip(importance, widths, strict=True)
        ]
        widths[gains.index(max(gains))] += 1
    return tuple(widths)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Which model it was: the names and shapes of its parameters, and a few numbers of each.

    Casting the model to another precision does not change it.
    """

    structure: str
    sample: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of ``model``."""
        names, samples = [], []
        for name, parameter in sorted(model.named_parameters()):
            names.append(f"{name} {tuple(parameter.shape)}")
            flat = parameter.detach().flatten()
            index = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
            samples.append(flat[index.to(flat.device)].float().cpu())
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        return cls(digest, torch.cat(samples) if samples else torch.zeros(0))

    def difference(self, other: Fingerprint) -> str | None:
        """How ``other`` differs, as a clause; None if it is the same model."""
        if self.structure != other.structure:
            return "its parameters have other names or shapes"
        scale = self.sample.abs().clamp_min(self.sample.abs().mean())
        if ((self.sample - other.sample).abs() > SAMPLE_TOLERANCE * scale).any():
            return "its weights are others"
        return None


@dataclass(frozen=True, eq=False)
class Calibration:
    """What :func:`squat_fx.calibrate` found; pass it to ``compile(..., calibration=...)``.

    Attributes:
        layers: by number of the attention layer.
        fingerprint: of the model it belongs to.
        tokens: how many tokens it was made from.
    """

    layers: Mapping[int, LayerCalibration]
    fingerprint: Fingerprint
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes that the bases take on the device."""
        return sum(layer.matrices.nbytes for layer in self.layers.values())

    def check(self, model: nn.Module) -> None:
        """Raise if this calibration belongs to another model.

        Raises:
            ValueError: it does; the message says how they differ.
        """
        if difference := self.fingerprint.difference(Fingerprint.of(model)):
            raise ValueError(
                f"this calibration belongs to another model than this {type(model).__name__}: "
                f"{difference}; run squat_fx.calibrate() on this one"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {"fingerprint": self.fingerprint.sample}
        for number, layer in self.layers.items():
            tensors[f"layers.{number}.matrices"] = layer.matrices.contiguous()
            tensors[f"layers.{number}.importance"] = layer.importance.contiguous()
        about = {"version": VERSION, "structure": self.fingerprint.structure, "tokens": self.tokens}
        save_file(tensors, str(path), metadata={"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no calibration, a damaged one, or one of another version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no calibration file {path}")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no calibration; squat_fx.calibrate(...).save() writes one")
        about = json.loads(metadata["about"])
        if about["version"] != VERSION:
            raise ValueError(
                f"{path} has version {about['version']}, this squat_fx reads version {VERSION}; "
                "calibrate again"
            )
        numbers = sorted(int(n.split(".")[1]) for n in tensors if n.endswith(".matrices"))
        layers = {
            number: LayerCalibration(
                tensors[f"layers.{number}.matrices"], tensors[f"layers.{number}.importance"]
            )
            for number in numbers
        }
        fingerprint = Fingerprint(about["structure"], tensors["fingerprint"])
        return cls(layers, fingerprint, about["tokens"])
