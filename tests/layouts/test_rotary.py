"""Laws of rotary embeddings on plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squat_fx.layouts.rotary import Pairing, Rotation, rearranged
from tests.conftest import randn

PAIRINGS: tuple[Pairing, ...] = ("halves", "interleaved")
KEY = randn(2, 3, 5, 16, seed=1)
ANGLES = randn(2, 1, 5, 4, seed=2)


def turned(rotation: Rotation, angles: Tensor = ANGLES) -> Tensor:
    return rotation.apply(KEY, angles.cos(), angles.sin())


def test_halves_is_the_usual_spelling() -> None:
    angles = torch.cat([ANGLES, ANGLES], -1)
    turning, rest = KEY[..., :8], KEY[..., 8:]
    half = torch.cat([-turning[..., 4:], turning[..., :4]], -1)
    expected = torch.cat([turning * angles.cos() + half * angles.sin(), rest], -1)
    assert torch.equal(turned(Rotation(8, "halves"), angles), expected)
    assert torch.equal(turned(Rotation(8, "halves")), expected)


def test_interleaved_is_a_multiplication_of_complex_numbers() -> None:
    numbers = torch.view_as_complex(KEY[..., :8].unflatten(-1, (4, 2)))
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(ANGLES), ANGLES)).flatten(3)
    actual = turned(Rotation(8, "interleaved"))
    torch.testing.assert_close(actual[..., :8], expected)
    assert torch.equal(actual[..., 8:], KEY[..., 8:])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_sign_turns_the_other_way(pairing: Pairing) -> None:
    assert torch.equal(turned(Rotation(8, pairing, sign=-1)), turned(Rotation(8, pairing), -ANGLES))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("numbers", [4, 8])  # for each pair; for each channel, all of them unlike
def test_invert_undoes_apply_with_a_scaling_in_it(
    pairing: Pairing, sign: int, numbers: int
) -> None:
    rotation = Rotation(8, pairing, sign)
    angles = randn(2, 1, 5, numbers, seed=3) * 0.4
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    torch.testing.assert_close(rotation.invert(rotation.apply(KEY, cos, sin), cos, sin), KEY)


def test_the_result_has_the_keys_dtype_and_is_computed_in_the_rotations() -> None:
    key, cos, sin = (x.half() for x in (KEY, ANGLES.cos(), ANGLES.sin()))
    exact = Rotation(8, "halves").apply(key.float(), cos.float(), sin.float())
    actual = Rotation(8, "halves", dtype=torch.float32).apply(key, cos, sin)
    assert torch.equal(actual, exact.half())
    assert not torch.equal(Rotation(8, "halves").apply(key, cos, sin), actual)


def test_rearranged_moves_adds_and_drops_dims() -> None:
    x = randn(5, 1, 2, 4)
    assert torch.equal(rearranged(x, (2, None, 0, 3)), x[:, 0].transpose(0, 1)[:, None])
    assert rearranged(randn(4), (None, None, None, 0)).shape == (1, 1, 1, 4)
