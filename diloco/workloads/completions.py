"""What a causal language model makes of texts with targets: batches of them, and log-probabilities token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diloco.tokens import Array

Marked: TypeAlias = "tuple[Array, Array]"  # integers[tokens], and bool[tokens] of those that the model is to write


def padded(texts: Sequence[Marked]) -> dict[str, Tensor]:
    """{"tokens": int64[texts, longest], "targets": bool[texts, longest]}, filled up on the right with 0 and false.

    What comes after a token changes nothing for it, so that these tensors need no mask of their own.
    """
    longest = max(len(tokens) for tokens, _ in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    targets = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, (tokens, marks) in enumerate(texts):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        targets[row, : len(marks)] = torch.from_numpy(np.array(marks))
    return {"tokens": ids, "targets": targets}


def packed(sequences: Sequence[Sequence[Marked]]) -> dict[str, Tensor]:
    """Several texts one after the other in each sequence: `padded`, and "texts": int64[sequences, longest].

    That tells to which text of its sequence a token belongs; a text's first token is never a target.
    """
    joined = []
    numbers = []
    for texts in sequences:
        marks = [np.concatenate([[False], own[1:]]) for _, own in texts]
        joined.append((np.concatenate([tokens for tokens, _ in texts]), np.concatenate(marks).astype(np.bool_)))
        numbers.append(np.repeat(np.arange(len(texts)), [len(tokens) for tokens, _ in texts]))
    batch = padded(joined)
    own = torch.full_like(batch["tokens"], -1)
    for row, number in enumerate(numbers):
        own[row, : len(number)] = torch.from_numpy(number)
    return {**batch, "texts": own}


def bins(sizes: Array, *, room: int) -> list[list[int]]:
    """Which texts share a sequence of `room` tokens: each goes to the first that it fits in, in the order given."""
    filled: list[int] = []
    found: list[list[int]] = []
    for index, size in enumerate(sizes.tolist()):
        place = next((i for i, used in enumerate(filled) if used + size <= room), None)
        if place is None:
            filled.append(size)
            found.append([index])
        else:
            filled[place] += size
            found[place].append(index)
    return found


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """float32[texts, longest - 1]: of each token but the first given those before it in its text; 0 for no target."""
    device = next(model.parameters()).device
    tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
    logits = model(input_ids=tokens[:, :-1], **_apart(batch, device)).logits
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return torch.where(targets[:, 1:], -losses.view(tokens.shape[0], -1), 0.0)


def _apart(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Positions and a mask by which texts that share a sequence do not see each other."""
    if "texts" not in batch:
        return {}
    texts = batch["texts"][:, :-1].to(device)
    length = texts.shape[1]
    places = torch.arange(length, device=device)
    first = torch.cat([texts.new_full((len(texts), 1), True, dtype=torch.bool), texts[:, 1:] != texts[:, :-1]], dim=1)
    starts = torch.where(first, places, 0).cummax(dim=1).values
    visible = (texts[:, :, None] == texts[:, None, :]) & (places[:, None] >= places)
    return {"position_ids": places - starts, "attention_mask": visible[:, None]}
