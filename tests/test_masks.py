"""Attention masks of ones are left out, others are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, PreTrainedModel

import squat_fx
from squat_fx.masks import may_be_left_out, without_idle_mask
from tests.models import build, prompt


def steps(model: PreTrainedModel, pads: int) -> Tensor:
    """Greedy tokens of a loop that hands over a growing mask, as older ``generate()`` does."""
    ids, cache, out = prompt(2, 40), DynamicCache(config=model.config), []
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    for _ in range(12):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones((2, 1))], 1)
        out.append(ids)
    return torch.cat(out, 1)


@pytest.mark.parametrize(("pads", "shapes"), [(0, "static"), (5, "dynamic")])
def test_a_decode_graph_is_static_if_the_mask_hides_nothing(pads: int, shapes: str) -> None:
    torch._dynamo.reset()
    model = squat_fx.compile(build("llama"), codec="none", inner="eager", residual_length=8)
    assert torch.equal(steps(model, pads), steps(build("llama"), pads))
    assert f"decode graph (eager, {shapes})" in str(squat_fx.report(model))


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0, 1, 1]]),
        torch.tensor([[2, 1, 1]]),
        torch.ones(1, 1, 3, 3),
        torch.zeros(1, 3, dtype=torch.bool),
        None,
        [[1, 1, 1]],
    ],
)
def test_a_mask_that_says_something_stays(mask: object) -> None:
    kwargs = {"attention_mask": mask, "use_cache": True}
    assert without_idle_mask(kwargs) is kwargs


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_a_mask_of_ones_goes(dtype: torch.dtype) -> None:
    kwargs = {"attention_mask": torch.ones(2, 3, dtype=dtype), "use_cache": True}
    assert without_idle_mask(kwargs) == {"attention_mask": None, "use_cache": True}
    assert kwargs["attention_mask"] is not None


def test_only_decoders_of_transformers_do_without() -> None:
    assert may_be_left_out(build("gpt2"))
    config = BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    assert not may_be_left_out(BartForConditionalGeneration(config))
    assert not may_be_left_out(nn.Linear(2, 2))
    assert not may_be_left_out(lambda x: x)
