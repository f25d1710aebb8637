"""The table of tiles: every shape has a row, and yours come first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squat_fx.kernels import tuning
from squat_fx.kernels.tuning import ANY, BLOCKS, TABLE, Choice, choice

OWN = Choice("planes/token", 64, 128, block_n=32, stages=5, tiles=2, programs=4, measured="mine")
layouts = st.sampled_from(["planes/token", "planes/channel"])


@pytest.fixture(autouse=True)
def nothing_preferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.prefer()
    yield
    tuning.prefer()


@given(layout=layouts, row_bytes=st.integers(1, 2048), head_dim=st.integers(1, 2048))
def test_every_shape_has_a_row(layout: str, row_bytes: int, head_dim: int) -> None:
    found = choice(layout, row_bytes, head_dim)
    assert found.serves(layout, row_bytes, head_dim)
    assert found in TABLE
    assert found.measured


def test_preferred_rows_serve_their_class_before_the_table() -> None:
    tuning.prefer(OWN)
    assert choice("planes/token", 64, 128) == OWN
    assert choice("planes/token", 65, 128) in TABLE
    assert choice("planes/token", 64, 129) in TABLE
    assert choice("planes/channel", 64, 128) in TABLE
    newer = Choice("planes/token", ANY, ANY, block_n=16, stages=2)
    tuning.prefer(newer)
    assert choice("planes/token", 64, 128) == newer
    tuning.prefer()
    assert choice("planes/token", 64, 128) in TABLE


def test_a_file_serves_through_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "tuning.json"
    tuning.write(path, [OWN])
    assert tuning.read(path) == (OWN,)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert choice("planes/token", 64, 128) == OWN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ('[{"layout": "planes/token", "block": 32}]', "block"),
        ("[3]", "mapping"),
        (None, "No such file"),
    ],
)
def test_files_that_hold_no_rows_are_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        tuning.read(path)
    assert "must hold a JSON list" in str(refused.value)
    assert "block_n" in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"block_n": 48}, "one of"), ({"stages": 1}, "2 stages"), ({"tiles": 0}, "0 tiles")],
)
def test_rows_that_could_not_run_are_refused(wrong: dict[str, int], words: str) -> None:
    numbers = {"row_bytes": 64, "head_dim": 128, "block_n": 64, "stages": 2} | wrong
    with pytest.raises(ValueError, match=words):
        Choice("planes/token", **numbers)


@pytest.mark.parametrize("group", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("block_n", BLOCKS)
def test_tiles_lie_in_groups_and_as_much_is_copied_ahead(group: int, block_n: int) -> None:
    found = Choice("planes/channel", 32, 128, block_n=block_n, stages=2).for_group(group)
    assert group % found.block_n == 0
    assert found.block_n << (found.stages - 2) == block_n
