"""What people do with ``generate()`` and with the cache that it returns, as functions of a model.

Each returns whatever must be the same with another cache: token ids, or numbers made of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.generation import BaseStreamer

from tests.models import (
    VOCABULARY,
    beam,
    build,
    chat,
    greedy,
    left_padded_batch,
    prompt,
    prompt_lookup,
)

Use = Callable[[PreTrainedModel], Tensor]
Mode = Callable[[], AbstractContextManager[Any]]


def tiny() -> PreTrainedModel:
    """A Llama of one layer."""
    model = build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


def generate(model: PreTrainedModel, ids: Tensor, tokens: int = 16, **options: Any) -> Any:
    """Greedy unless ``do_sample`` is given, from a fixed seed."""
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=tokens, **({"do_sample": False} | options))


def prefilled(model: PreTrainedModel, ids: Tensor, mode: Mode = torch.no_grad) -> DynamicCache:
    """A cache that holds ``ids``."""
    cache = DynamicCache(config=model.config)
    with mode():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def steps(
    model: PreTrainedModel, cache: Any, batch: int, tokens: int = 12, mode: Mode = torch.no_grad
) -> Tensor:
    """Greedy single steps from a fixed token on."""
    token, out = prompt(batch, 1, seed=4), []
    for _ in range(tokens):
        with mode():
            logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1).detach()
        out.append(token)
    return torch.cat(out, 1)


# ways to generate ---------------------------------------------------------------------------------


def sampling(model: PreTrainedModel) -> Tensor:
    """Two rows, from a fixed seed."""
    return generate(model, prompt(2, 20), 24, do_sample=True, temperature=0.8, top_k=20)


def several_samples(model: PreTrainedModel) -> Tensor:
    """Three continuations of each row."""
    return generate(model, prompt(2, 20), do_sample=True, num_return_sequences=3)


def beam_sampling(model: PreTrainedModel) -> Tensor:
    """Beams that are sampled."""
    return generate(model, prompt(2, 20), do_sample=True, num_beams=3, num_return_sequences=2)


class Collected(BaseStreamer):
    """Keeps what it is given, and that it ended."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """The prompt, then token by token."""
        self.tokens.append(value.flatten().clone())

    def end(self) -> None:
        """No more come."""
        self.tokens.append(torch.tensor([-1]))


def streaming(model: PreTrainedModel) -> Tensor:
    """Tokens as they come."""
    streamer = Collected()
    generate(model, prompt(1, 20), streamer=streamer)
    return torch.cat(streamer.tokens)


def returned_dict(model: PreTrainedModel) -> Tensor:
    """Logits and hidden states beside the tokens."""
    out = generate(
        model, prompt(2, 20), 8, return_dict_in_generate=True, output_logits=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert len(out.hidden_states) == 8
    numbers = torch.stack(out.logits).flatten(), out.hidden_states[-1][-1].flatten()
    return torch.cat([out.sequences.flatten(), *(x.mul(1e3).round().long() for x in numbers)])


def chunked_prefill(model: PreTrainedModel) -> Tensor:
    """The last chunk is a single token."""
    return generate(model, prompt(2, 65), prefill_chunk_size=32)


def chunked_prefill_with_padding(model: PreTrainedModel) -> Tensor:
    """A row is nothing but padding in the first chunk."""
    ids, mask = prompt(3, 70), torch.ones(3, 70, dtype=torch.long)
    for row, pads in enumerate((0, 7, 40)):
        mask[row, :pads] = 0
    return generate(model, ids * mask, attention_mask=mask, prefill_chunk_size=32)


def embeddings(model: PreTrainedModel) -> Tensor:
    """A prompt that never was tokens."""
    embedded = model.get_input_embeddings()(prompt(2, 30)).detach()
    return model.generate(inputs_embeds=embedded, max_new_tokens=12, do_sample=False)


def guidance(model: PreTrainedModel) -> Tensor:
    """Two caches, with and without the prompt."""
    return generate(model, prompt(1, 20), 12, guidance_scale=1.5)


def no_cache(model: PreTrainedModel) -> Tensor:
    """The whole text again for every token."""
    return generate(model, prompt(1, 20), 4, use_cache=False)


def attention_weights(model: PreTrainedModel) -> Tensor:
    """They are returned, so that the attention must run as it was."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = generate(
            model, prompt(1, 20), 4, return_dict_in_generate=True, output_attentions=True
        )
    finally:
        model.set_attn_implementation(before)
    assert out.attentions[-1][0].shape[-1] == 23
    return out.sequences


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each token id."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left"
    )


def text_pipeline(model: PreTrainedModel) -> Tensor:
    """Texts of different lengths, together."""
    words = tokenizer()
    generator = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    texts = ["w5 w6 w7 w8 w10 w11 w12 w13", "w9 w20"]
    found = generator(texts, max_new_tokens=12, do_sample=False, batch_size=2)
    return words([x[0]["generated_text"] for x in found], padding=True, return_tensors="pt")[
        "input_ids"
    ]


# what is done with a cache ------------------------------------------------------------------------


def prefix_reuse(model: PreTrainedModel) -> Tensor:
    """Several questions to copies of one prompt's cache."""
    prefix = prompt(1, 50)
    cache, out = prefilled(model, prefix), []
    for seed in range(3):
        ids = torch.cat([prefix, prompt(1, 7, seed=10 + seed)], 1)
        out.append(generate(model, ids, past_key_values=copy.deepcopy(cache)))
    assert cache.get_seq_length() == 50
    return torch.cat(out, 1)


def crop(model: PreTrainedModel) -> Tensor:
    """Back to the prompt, and on with another question."""
    cache, ids = DynamicCache(config=model.config), prompt(1, 50)
    first = generate(model, ids, 20, past_key_values=cache)
    cache.crop(50 - cache.get_seq_length())
    assert cache.get_seq_length() == 50
    other = torch.cat([ids, prompt(1, 5, seed=3)], 1)
    return torch.cat([first, generate(model, other, 20, past_key_values=cache)], 1)


def reorder(model: PreTrainedModel) -> Tensor:
    """Rows exchanged, doubled and dropped."""
    cache = prefilled(model, prompt(3, 50))
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    return steps(model, cache, 3)


def repeat_rows(model: PreTrainedModel) -> Tensor:
    """``batch_repeat_interleave``."""
    cache = prefilled(model, prompt(2, 50))
    cache.batch_repeat_interleave(2)
    return steps(model, cache, 4)


def select_rows(model: PreTrainedModel) -> Tensor:
    """``batch_select_indices``."""
    cache = prefilled(model, prompt(4, 50))
    cache.batch_select_indices(torch.tensor([3, 1]))
    return steps(model, cache, 2)


def reset(model: PreTrainedModel) -> Tensor:
    """The cache object is used for another prompt."""
    cache = prefilled(model, prompt(2, 50))
    first = steps(model, cache, 2)
    cache.reset()
    with torch.no_grad():
        model(prompt(2, 30, seed=8), past_key_values=cache, use_cache=True)
    return torch.cat([first, steps(model, cache, 2)], 1)


def offload_between_steps(model: PreTrainedModel) -> Tensor:
    """What an offloaded cache does to its layers."""
    cache, out = prefilled(model, prompt(2, 50)), []
    for _ in range(4):
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        out.append(steps(model, cache, 2, tokens=2))
    return torch.cat(out, 1)


# modes --------------------------------------------------------------------------------------------


def autocast() -> AbstractContextManager[Any]:
    """bf16 where autocast says so; the cache of an fp32 model is bf16 then."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def inference_mode_and_no_grad_in_turn(model: PreTrainedModel) -> Tensor:
    """Tensors of inference mode cannot be written outside of it; ours can."""
    modes = torch.inference_mode, torch.no_grad, torch.inference_mode
    cache = prefilled(model, prompt(1, 40), torch.inference_mode)
    return torch.cat([steps(model, cache, 1, 6, mode) for mode in modes], 1)


def gradients_after_a_prompt(model: PreTrainedModel) -> Tensor:
    """Steps with gradients enabled on a cache that was made without, and back."""
    cache = prefilled(model, prompt(1, 40))
    modes = torch.no_grad, nullcontext, torch.no_grad
    return torch.cat([steps(model, cache, 1, 3, mode) for mode in modes], 1)


def generation_under_autocast(model: PreTrainedModel) -> Tensor:
    """A whole generation."""
    with autocast():
        return generate(model, prompt(2, 40))


def autocast_for_a_while(model: PreTrainedModel) -> Tensor:
    """New tokens of another dtype than the cache."""
    cache = prefilled(model, prompt(2, 40))
    modes = torch.no_grad, autocast, torch.no_grad
    with torch.no_grad():
        return torch.cat([steps(model, cache, 2, 4, mode) for mode in modes], 1)


USES: dict[str, Use] = {
    f.__name__: f
    for f in (
        greedy, sampling, several_samples, beam, beam_sampling, prompt_lookup, streaming,
        left_padded_batch, chat, returned_dict, chunked_prefill, chunked_prefill_with_padding,
        embeddings, guidance, no_cache, attention_weights, text_pipeline, prefix_reuse, crop,
        reorder, repeat_rows, select_rows, reset, offload_between_steps,
        inference_mode_and_no_grad_in_turn, gradients_after_a_prompt, generation_under_autocast,
        autocast_for_a_while,
    )
}  # fmt: skip
LEFT_DENSE = {"no_cache", "attention_weights", "gradients_after_a_prompt"}
"""Uses in which a cache is dense for a while, or there is none."""
