"""Text that a language model writes: alike wherever it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

TEMPERATURE = 0.8
TOP_K = 50


def continuation(model: Any, tokenizer: Any, ids: Sequence[int], *, tokens: int) -> list[int]:
    """At most `tokens` token ids that `model` writes after `ids`, the last one end-of-text where it came to an end.

    It reads as many of the last `ids` as it has positions for, and never writes ids that stand for no text. Random
    numbers are torch's own: see `seeded`. The model should be in eval mode.
    """
    positions, end = limits(model.config)[1], tokenizer.eos_token_id
    if positions is not None:
        tokens = min(tokens, positions - 1)
        ids = ids[-(positions - tokens) :]
    inputs = torch.tensor([list(ids) or [end]], device=model.device)  # int64[1, context]
    with torch.no_grad():
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            eos_token_id=end,
            pad_token_id=end,
            suppress_tokens=without_text(model, tokenizer),
            use_cache=True,
        )
    return [int(token) for token in outputs[0, inputs.shape[1] :]]


def without_text(model: Any, tokenizer: Any) -> list[int] | None:
    """Token ids of `model` that stand for no text in `tokenizer`; None where there are none."""
    return list(range(max(tokenizer.get_vocab().values()) + 1, limits(model.config)[0])) or None


def text_after(tokenizer: Any, ids: Sequence[int], new: Sequence[int]) -> str:
    """What the token ids `new` say after `ids`: some tokenizers drop the space before a text's first word."""
    before, after = (str(tokenizer.decode(text, skip_special_tokens=True)) for text in (list(ids), [*ids, *new]))
    return after[len(before) :]


def limits(config: Any) -> tuple[int, int | None]:
    """Of a model with this configuration: the size of its vocabulary and its greatest length, where it has one."""
    text = config.get_text_config()
    try:
        return text.vocab_size, text.max_position_embeddings
    except AttributeError:  # state-space models, say, have no limit
        return text.vocab_size, None


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers on the CPU and `device` from `seed`, and the caller's state untouched afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices not restored
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
