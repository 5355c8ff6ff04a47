"""Routing within documents: tables by hand, windows, oracle, causality, and a token router on documents that switch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from diloco.tokens import TokenFolder
from dipaco import token_router
from dipaco.documents import Likelihoods, Pieces, score
from dipaco.evaluate import once, rerouted
from dipaco.token_router import Fitting, Scored, TokenRouter, best_paths

TOPIC = 8  # tokens 0 ... 7 are of topic 0, 8 ... 15 of topic 1
PREFIX, LENGTH, SWITCH, SIZE = 4, 16, 20, 44
FITTING = Fitting(look_ahead=8, steps=60, lr=3e-3)
OWN, OTHER = np.log(0.9 / TOPIC), np.log(0.1 / TOPIC)  # what a path gives to the tokens of either topic


class Unigram(nn.Module):
    """A path that expects its own topic, whatever came before."""

    def __init__(self, topic: int) -> None:
        super().__init__()
        logits = torch.full((2 * TOPIC,), float(OTHER))
        logits[topic * TOPIC : (topic + 1) * TOPIC] = float(OWN)
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def switching(count: int, seed: int) -> list[Any]:
    """Documents of one topic that go on with the other one."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        tokens = random.integers(0, TOPIC, SIZE)
        second = np.arange(SIZE) >= SWITCH
        found.append((tokens + TOPIC * (second if index % 2 else ~second)).astype(np.uint16))
    return found


def folder_of(documents: list[Any]) -> TokenFolder:
    offsets = np.cumsum([0, *(len(document) for document in documents)])
    nothing = np.zeros(len(documents), dtype=np.int64)
    return TokenFolder(
        folder=Path(), tokens=np.concatenate(documents), offsets=offsets, domains=nothing,
        held_out=nothing.astype(np.bool_), meta={},
    )  # fmt: skip


def pieces_of(documents: list[Any]) -> Pieces:
    return Pieces(folder_of(documents), np.arange(len(documents)), length=LENGTH, prefix=PREFIX)


def table_of(documents: list[Any]) -> Likelihoods:
    return score(pieces_of(documents), 2, Unigram)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=2 * TOPIC,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(base: Path) -> list[Scored]:
    documents = switching(40, seed=1)
    table = table_of(documents)
    return [
        Scored(tokens=document, likelihoods=table.values[:, table.document == index], first=PREFIX)
        for index, document in enumerate(documents)
    ]


@pytest.fixture(scope="module")
def router(base: Path, learned: list[Scored]) -> TokenRouter:
    return TokenRouter.fit(base, learned, FITTING)


# the table


def test_the_table_has_every_counted_token_once() -> None:
    documents = [*switching(3, seed=0), np.arange(5, dtype=np.uint16), np.arange(4, dtype=np.uint16)]
    table = table_of(documents)
    places = [(index, position) for index, document in enumerate(documents) for position in range(4, len(document))]
    assert list(zip(table.document.tolist(), table.position.tolist(), strict=True)) == places
    topics = np.array([documents[index][position] // TOPIC for index, position in places])
    expected = np.stack([np.where(topics == path, OWN, OTHER) for path in range(2)])
    assert table.values.dtype == np.float32 and np.allclose(table.values, expected, atol=1e-6)


def test_its_sums_are_those_of_the_pieces(base: Path) -> None:
    """With a model that looks at what came before, and pieces left out."""
    model = LlamaForCausalLM.from_pretrained(base)
    pieces = pieces_of(switching(6, seed=0))
    pieces.thin(9)
    values, (document, _) = pieces.token_log_likelihoods(model), pieces.places()
    sums = np.add.reduceat(values.astype(np.float64), np.cumsum([0, *pieces.tokens[:-1]]))
    assert sums == pytest.approx(pieces.log_likelihoods(model, np.arange(9)), rel=1e-6)
    assert len(values) == len(document) == pieces.tokens.sum()


def test_best_paths_look_ahead() -> None:
    values = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    for ahead in (1, 4, 20, 99):
        expected = [values[:, start : start + ahead].sum(axis=1).argmax() for start in range(20)]
        assert best_paths(values, ahead).tolist() == expected


# losses by hand


def test_losses_loads_and_oracle_by_hand() -> None:
    random = np.random.default_rng(0)
    lengths, prefix = (13, 6, 30), 3
    document = np.repeat([7, 2, 4], lengths)
    position = np.concatenate([prefix + np.arange(length) for length in lengths])
    keep = np.flatnonzero(random.random(len(document)) < 0.8)  # where pieces were left out
    values = random.normal(-4, 1, (3, len(document))).astype(np.float32)
    table = Likelihoods(values=values[:, keep], document=document[keep], position=position[keep])
    paths = np.array([0, 0, 2, 0, 1, 0, 0, 0])
    choices = {index: random.integers(0, 3, 40) for index in (2, 4, 7)}
    for every in (1, 5, 8):
        total, best, counts = 0.0, 0.0, [0, 0, 0]
        windows: dict[tuple[int, int], Any] = {}
        for column in keep.tolist():
            own, place = int(document[column]), int(position[column])
            window = (place - prefix) // every
            path = int(choices[own][prefix + window * every]) if window else int(paths[own])
            total += float(values[path, column])
            counts[path] += 1
            windows[own, window] = windows.get((own, window), 0) + values[:, column].astype(np.float64)
        best = sum(float(sums.max()) for sums in windows.values())
        found = rerouted(table, paths, choices, every=every, prefix=prefix)
        assert found.loss == pytest.approx(-total / len(keep)) and found.oracle == pytest.approx(-best / len(keep))
        assert found.loads == pytest.approx([count / len(keep) for count in counts])
        assert found.perplexity == pytest.approx(np.exp(found.loss))
    whole = once(table, paths)
    assert whole.loss == pytest.approx(-values[paths[document[keep]], keep].mean(), rel=1e-6)
    assert rerouted(table, paths, choices, every=30, prefix=prefix) == whole  # a window is the longest document


def test_the_first_window_ends_so_many_tokens_after_the_prefix() -> None:
    table = table_of(switching(2, seed=0))
    never = {index: np.full(SIZE + 1, 1) for index in range(2)}
    every = SWITCH - PREFIX  # so that the second window is all of the second topic
    found = rerouted(table, np.array([1, 0]), {**never, 1: np.full(SIZE + 1, 1)}, every=every, prefix=PREFIX)
    # Document 0 begins with topic 1 and document 1 with topic 0; the later windows of both are sent to path 1.
    share = (SIZE - PREFIX + every) / (2 * (SIZE - PREFIX))  # what goes to its own topic's path
    assert found.loss == pytest.approx(-(share * OWN + (1 - share) * OTHER), rel=1e-6)
    assert found.oracle == pytest.approx(-OWN, rel=1e-6)


# the token router


def test_frequent_routing_beats_once_where_documents_switch(router: TokenRouter) -> None:
    documents = switching(20, seed=2)
    table = table_of(documents)
    paths = np.array([int(document[0]) // TOPIC for document in documents])  # a perfect document router
    choices = {index: router.choices(document) for index, document in enumerate(documents)}
    whole = once(table, paths)
    found = {every: rerouted(table, paths, choices, every=every, prefix=PREFIX) for every in (8, 4, 2)}
    assert found[2].loss < found[4].loss < whole.loss - 0.5 and found[8].loss < whole.loss - 0.3
    assert found[2].oracle == pytest.approx(-OWN, rel=1e-6)
    assert found[2].loss < found[2].oracle + 0.25  # the first window after the switch cannot know of it
    assert all(np.abs(np.array(figures.loads) - 0.5).max() < 0.1 for figures in found.values())


def test_no_choice_depends_on_later_tokens(router: TokenRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a text of many parts, and as `choice` has it, which reads the last part alone."""
    monkeypatch.setattr(router, "_context", 12)
    text = np.concatenate(switching(3, seed=3))
    choices = router.choices(text)
    assert choices[0] == -1 and set(choices[1:].tolist()) == {0, 1}
    for seen in (1, 2, 11, 12, 13, 18, 19, 50, 131):
        other = np.concatenate([text[:seen], (text[seen:] + TOPIC) % (2 * TOPIC)])
        assert router.choices(other)[: seen + 1].tolist() == choices[: seen + 1].tolist()
        assert router.choice(text[:seen]) == choices[seen]
    assert (router.choices((text + TOPIC) % (2 * TOPIC))[1:] != choices[1:]).mean() > 0.7  # it does look at them


def test_saved_and_loaded_it_chooses_alike(
    router: TokenRouter, base: Path, learned: list[Scored], tmp_path: Path
) -> None:
    router.save(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("*.bin"))
    again = TokenRouter.load(tmp_path / "saved", paths=2)
    fitted = TokenRouter.fit(base, learned, FITTING)
    other = TokenRouter.fit(base, learned, replace(FITTING, seed=1))
    text = np.concatenate(switching(4, seed=4))
    scores = [one._scores(torch.from_numpy(text[None].astype(np.int64))) for one in (router, again, fitted, other)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[3])
    assert again.choices(text).tolist() == router.choices(text).tolist()
    assert (again.paths, again.fitting) == (2, FITTING)


def test_documents_longer_than_it_reads_at_once(
    base: Path, learned: list[Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_router, "CONTEXT", 12)
    router = TokenRouter.fit(base, learned, FITTING)
    (text,) = switching(1, seed=5)
    choices = router.choices(text)
    assert choices[PREFIX:SWITCH].tolist() == [1] * (SWITCH - PREFIX)
    assert choices[SWITCH + 6 :].tolist() == [0] * (SIZE + 1 - SWITCH - 6)


def test_token_routers_that_cannot_be(router: TokenRouter, learned: list[Scored], base: Path, tmp_path: Path) -> None:
    for wrong in ({"look_ahead": 0}, {"steps": 0}, {"documents": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value} of the token router .*it must be at least"):
            Fitting(**wrong)
    with pytest.raises(ValueError, match="no documents that a token router could learn from"):
        TokenRouter.fit(base, [], FITTING)
    with pytest.raises(ValueError, match="there is no model in this folder"):
        TokenRouter.fit(tmp_path, learned, FITTING)
    with pytest.raises(ValueError, match="holds no token router that can be read"):
        TokenRouter.load(tmp_path, paths=2)
    router.save(tmp_path)
    with pytest.raises(ValueError, match="its token router is for 2 paths, not 4: fit it anew"):
        TokenRouter.load(tmp_path, paths=4)
    narrow = nn.Linear(16, 2)
    with pytest.raises(ValueError, match="takes hidden states of width 16, and its model has 32"):
        TokenRouter(LlamaForCausalLM.from_pretrained(base).model, narrow, FITTING)
    meta = json.loads((tmp_path / "token_router.json").read_text())
    (tmp_path / "token_router.json").write_text(json.dumps({**meta, "format": 0}))
    with pytest.raises(ValueError, match="format 0, not 1"):
        TokenRouter.load(tmp_path, paths=2)
    (tmp_path / "token_router.json").write_text(json.dumps(meta))
    (tmp_path / token_router.HEAD).write_bytes(b"broken")
    with pytest.raises(ValueError, match="holds no token router that can be read"):
        TokenRouter.load(tmp_path, paths=2)
