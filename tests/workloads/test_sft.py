"""sft: which tokens count, packed and padded alike, adapters alone, and rows that cannot be used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from diloco.checkpoint import Checkpoint
from diloco.data import Data
from diloco.inner import AdamW, RateSchedule
from diloco.messages import ShardId
from diloco.outer import Sgd
from diloco.vocabulary import byte_tokenizer
from diloco.workloads.completions import bins, log_probabilities, packed, padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.language import LanguageModel
from diloco.workloads.lora import LoRA
from diloco.workloads.sft import SFT
from tests.toy import digests, launch

EOS = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}"
)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def some_rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} and {i} is ", "completion": f"{2 * i}, of course" + "!" * (i % 7)} for i in range(count)]


def data(folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Data:
    given: dict[str, Any] = {
        "files": write(folder, rows or some_rows()), "tokenizer": "bytes", "cache": str(folder / "cache"), "batch": 4,
        "sequence_length": 48, "validation_fraction": 0.2,
    }  # fmt: skip
    return Data(**{**given, **settings})


def corpus_of(
    folder: Path, rows: list[dict[str, Any]] | None = None, *, shards: int = 2, **settings: Any
) -> ExampleCorpus:
    workload = SFT(packing=settings.pop("packing", False))
    return workload.corpus(data(folder, rows, **settings), seed=0, shards=shards)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder whose tokenizer, of bytes, has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    LanguageModel.named("micro", trust_remote_code=False).build(0).save_pretrained(folder)  # type: ignore[operator]
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    wrapper = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(wrapper))
    return folder


def written(corpus: ExampleCorpus, row: int) -> tuple[str, str]:
    """All of a row's text, and what of it the model is to write."""
    tokens, targets = corpus.text(row)
    texts = (bytes(t for t in part if t < EOS).decode() for part in (tokens.tolist(), tokens[targets].tolist()))
    return next(texts), next(texts)


def test_completions_alone_are_targets_and_end(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path)
    for row, given in enumerate(some_rows()):
        assert written(corpus, row) == (given["prompt"] + given["completion"], given["completion"])
        tokens, targets = corpus.text(row)
        assert tokens[-1] == EOS and targets[-1]


def test_rows_of_a_prompt_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i // 3}?", "completion": f"{i}"} for i in range(60)]
    folder = corpus_of(tmp_path, rows).folder
    assert folder.held_out.reshape(20, 3).all(axis=1).tolist() == folder.held_out.reshape(20, 3).any(axis=1).tolist()
    assert 0 < folder.held_out.sum() < 30


def test_a_batch_is_a_function_of_shard_and_step_and_an_epoch_has_each_row_once(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path)
    sizes = corpus.shard_examples()
    for shard, size in enumerate(sizes):
        rows = [unit[0] for unit in corpus.units(shard, first=0, count=size)]
        assert sorted(rows) == sorted(corpus.assignment[shard].tolist())
        assert rows != [unit[0] for unit in corpus.units(shard, first=size, count=size)]
    workload = SFT()
    first, again = (workload.batch(corpus, ShardId(1), 3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_padded_packed_and_single_texts_have_the_same_log_probabilities(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, sequence_length=100)
    model = SFT().build_model(0).eval()
    texts = [corpus.text(row) for row in range(9)]
    with torch.no_grad():
        single = [float(log_probabilities(model, padded([text])).sum()) for text in texts]
        rows = log_probabilities(model, padded(texts)).sum(dim=1).tolist()
        batch = packed([texts[:4], texts[4:]])
        found = log_probabilities(model, batch)
        own = [
            float(found[i // 4 if i < 8 else 1][batch["texts"][min(i // 4, 1), 1:] == i - 4 * min(i // 4, 1)].sum())
            for i in range(9)
        ]
    assert rows == pytest.approx(single, rel=1e-5)
    assert own == pytest.approx(single, rel=1e-5)
    assert sum(single) == pytest.approx(float(found.sum()), rel=1e-5)


def test_packing_fills_sequences_and_keeps_the_loss(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, packing=True, shards=1, sequence_length=100)
    (units,) = corpus._units
    sizes = np.diff(corpus.folder.offsets)
    assert sorted(row for unit in units for row in unit) == sorted(corpus.assignment[0].tolist())
    assert all(sizes[unit].sum() <= 101 for unit in units) and len(units) < len(corpus.assignment[0]) / 2
    workload, model = SFT(packing=True), SFT().build_model(0)
    batch = workload.batch(corpus, ShardId(0), 0)
    rows = [row for unit in corpus.units(0, first=0, count=4) for row in unit]
    plain = padded([corpus.text(row) for row in rows])
    assert workload.tokens(batch) == SFT().tokens(plain)
    assert workload.loss(model, batch)[0].item() == pytest.approx(SFT().loss(model, plain)[0].item(), rel=1e-5)


def test_bins_by_hand() -> None:
    """6 and 3 fill a sequence of 9; 5 and 4 the next; 8 has one of its own."""
    assert bins(np.array([6, 5, 3, 8, 4]), room=9) == [[0, 2], [1, 4], [3]]


def test_of_a_chat_every_answer_is_a_target(tmp_path: Path, chatty: Path) -> None:
    talk = [
        {"role": "user", "content": "two and two?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    rows = [{"messages": talk}, {"prompt": talk[:1], "completion": talk[1:2]}, {"messages": talk[:2]}]
    workload = SFT(model=str(chatty))
    corpus = workload.corpus(data(tmp_path, rows * 2, tokenizer="", sequence_length=120), seed=0, shards=1)
    whole = "<|user|>two and two?\n<|assistant|>four\n<|user|>sure?\n<|assistant|>yes\n"
    assert written(corpus, 0) == (whole, "four\nyes\n")
    assert written(corpus, 1) == written(corpus, 2) == (whole[: whole.index("<|user|>sure")], "four\n")
    assert corpus.asked("three?") == "<|user|>three?\n<|assistant|>"


def test_a_chat_that_writes_the_name_of_a_special_token(tmp_path: Path) -> None:
    """In a plain text it is letters."""
    rows = [{"prompt": f"{i} <|endoftext|>", "completion": "x"} for i in range(4)]
    corpus = corpus_of(tmp_path, rows, shards=1)
    assert corpus.text(0)[0].tolist().count(EOS) == 1


def test_long_completions_are_cut_and_told_of(tmp_path: Path) -> None:
    rows = [*some_rows(), {"prompt": "p", "completion": "c" * 100}]
    corpus = corpus_of(tmp_path, rows)
    assert len(corpus.text(len(rows) - 1)[0]) == 49
    assert SFT().warnings(corpus) == ["1 completions were cut at data.sequence_length=48: raise it to train on all"]


SETTINGS: dict[str, Any] = {
    "inner": AdamW(lr=3e-3, rate=RateSchedule.constant, weight_decay=0.0),
    "outer": Sgd(lr=1.0),
    "inner_steps": 3,
    "rounds": 2,
    "checkpoint": Checkpoint(every=1),
}


def values_sha256(model: nn.Module, *, adapters: bool) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if ("lora_" in name) is adapters:
            digest.update(value.detach().numpy().tobytes())
    return digest.hexdigest()


def test_one_island_is_ordinary_fine_tuning(tmp_path: Path) -> None:
    given = data(tmp_path)
    workload = SFT()
    run = launch(tmp_path / "run", workload=workload, data=given, islands=1, **SETTINGS)
    corpus, model = workload.corpus(given, seed=0, shards=1), workload.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(6):
        loss, _ = workload.loss(model, workload.batch(corpus, ShardId(0), step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    exported = AutoModelForCausalLM.from_pretrained(run.directory / "export")
    for (name, value), found in zip(model.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6, msg=name)
    assert run.summary["val_loss"] == pytest.approx(workload.evaluate(model, corpus, "validation")["loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_only_adapters_travel_and_what_is_frozen_stays(tmp_path: Path) -> None:
    from peft import PeftModel

    workload = SFT(lora=LoRA(rank=2, targets=["q_proj", "v_proj"]), export_merged=True)
    run = launch(tmp_path / "run", workload=workload, data=data(tmp_path), islands=2, **SETTINGS)
    adapters = 3 * 2 * 2 * (64 + 64)  # layers, layers adapted in each, rank, both sides
    assert run.summary["trainable_parameters"] == adapters
    assert run.summary["parameters"] == 162_816 + adapters
    assert run.summary["bytes_up"] == pytest.approx(2 * 2 * 4 * adapters, rel=0.2)
    start = workload.build_model(0)
    plain = LanguageModel.named("micro", trust_remote_code=False).build(0)
    base: Any = plain
    found: Any = PeftModel.from_pretrained(base, str(run.directory / "export"))
    assert values_sha256(found, adapters=False) == values_sha256(start, adapters=False)
    assert values_sha256(found, adapters=True) != values_sha256(start, adapters=True)
    merged = AutoModelForCausalLM.from_pretrained(run.directory / "export" / "merged")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, found.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    AutoTokenizer.from_pretrained(run.directory / "export")


def test_resumed_is_never_stopped(tmp_path: Path) -> None:
    settings = {**SETTINGS, "workload": SFT(lora=LoRA(rank=2, dropout=0.1), packing=True), "data": data(tmp_path)}
    whole = launch(tmp_path / "whole", islands=2, **settings)
    half = launch(tmp_path / "half", islands=2, **{**settings, "rounds": 1, "inner": settings["inner"]})
    again = launch(tmp_path / "again", islands=2, **settings, resume=str(half.directory))
    assert digests(again) == digests(whole)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c"}], "row 2 has no completion (it has: prompt): rows need"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}], "row 2: completion is empty"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "c" * 60, "completion": "d"}], "row 2: its prompt has 60"),
        ([{"prompt": "a", "completion": "b"}] * 3, "all rows have the same prompt"),
        ([{"prompt": "a", "completion": "b"}], "the data has 1 row"),
        ([{"messages": [{"role": "assistant", "content": "y"}]}], "has no chat template"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        corpus_of(tmp_path, rows)
    assert told in str(error.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has documents, and this workload needs rows"):
        SFT().corpus(Data(tokenizer="bytes"), seed=0, shards=1)
    with pytest.raises(ValueError, match=r"data\.tokenizer=bpe is trained on documents"):
        SFT(model="tiny").corpus(data(tmp_path, tokenizer=""), seed=0, shards=1)
    with pytest.raises(ValueError, match="has no linear layer nothing, but q_proj"):
        SFT(lora=LoRA(rank=1, targets=["nothing"])).build_model(0)
    for settings in ({"rank": -1}, {"rank": 1, "dropout": 1.0}, {"rank": 1, "alpha": 0.0}):
        with pytest.raises(ValueError, match=rf"workload\.lora\.{list(settings)[-1]}="):
            LoRA(**settings)
