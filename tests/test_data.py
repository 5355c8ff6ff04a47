"""Documents, tokens on disk, shards and their order."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import diloco.data
from diloco.data import Data, TokenCorpus, prepared
from diloco.dealing import ShardSplit
from diloco.files import DocumentUnit
from diloco.sources import PythonDocs
from diloco.vocabulary import EOS, byte_tokenizer, train_bpe

WORDS = "ash birch cedar elm fir hazel larch maple oak pine rowan spruce willow yew".split()


def text_of(number: int, words: int = 40) -> str:
    """A document that names itself."""
    chosen = random.Random(number).choices(WORDS, k=words)
    return f"<{number:04d}> {' '.join(chosen)}"


def write_lines(path: Path, numbers: range, words: int = 40) -> Path:
    path.write_text("".join(text_of(number, words) + "\n" for number in numbers), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """60 documents of one line, tokenised as bytes, so that tokens can be read."""
    folder = tmp_path_factory.mktemp("lines")
    return data_of(write_lines(folder / "lines.txt", range(60)), folder, validation_fraction=0.1)


def data_of(files: Any, folder: Path, **settings: Any) -> Data:
    settings = {"document": DocumentUnit.line, "tokenizer": "bytes", "sequence_length": 16, **settings}
    files = [str(file) for file in files] if isinstance(files, list) else str(files)
    return Data(files=files, cache=str(folder / "cache"), **settings)


def open_corpus(data: Data, seed: int = 0, shards: int = 1) -> TokenCorpus:
    return TokenCorpus(data, seed=seed, shards=shards)


def as_text(tokens: Any) -> str:
    """Tokens of the bytes tokenizer; end-of-text becomes a bar."""
    return "".join("|" if token == 256 else chr(token) for token in np.asarray(tokens).ravel())


def documents_of(data: Data) -> list[str]:
    folder = prepared(data)
    texts = [as_text(folder.document(index)) for index in range(len(folder.held_out))]
    assert all(text.endswith("|") for text in texts)
    return [text[:-1] for text in texts]


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "data.batch=0: it must be at least 1"),
        ({"batch": 6, "accumulation": 4}, "data.accumulation=4 does not divide data.batch=6"),
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"eval_sequences": 0}, "data.eval_sequences=0"),
        ({"max_tokens": -1}, "data.max_tokens=-1"),
        ({"validation_fraction": 0.0}, "data.validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction=1.0"),
        ({"vocab_size": 100}, "data.vocab_size=100: a byte-level BPE has at least 257"),
        ({"corpus": "c4"}, "data.corpus=c4 is unknown: choose python_docs, botocore"),
        ({"files": 3}, "data.files=3"),
        ({"files": "a.txt", "hub": "b"}, "choose one"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**settings)


def test_data_is_a_structured_config(tmp_path: Path) -> None:
    overrides = OmegaConf.from_dotlist([f"files={tmp_path}/a.txt", "split=domain", "document=line", "batch=4"])
    data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), overrides))
    expected = Data(files=[f"{tmp_path}/a.txt"], split=ShardSplit.domain, document=DocumentUnit.line, batch=4)
    assert data == expected
    assert OmegaConf.to_object(OmegaConf.structured(expected)) == expected


def test_files_are_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Data(files="a.txt").files == [str(tmp_path / "a.txt")]


# documents


def test_units_of_plain_text(tmp_path: Path) -> None:
    paragraphs = [text_of(number, words=80) for number in range(12)]  # about 450 characters, so 4 in a passage
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n\n\n", encoding="utf-8")
    other = write_lines(tmp_path / "other.txt", range(50, 52))
    passages = documents_of(data_of(path, tmp_path, document=DocumentUnit.passage))
    assert len(passages) == 3 and all(len(passage) <= 2000 for passage in passages)
    assert "\n\n".join(passages) == "\n\n".join(paragraphs)
    assert documents_of(data_of(path, tmp_path)) == paragraphs
    files = data_of([path, other], tmp_path, document=DocumentUnit.file)
    assert documents_of(files) == [path.read_text(), other.read_text()]


def test_a_long_paragraph_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"short\n\n{'long ' * 1000}\n\nlast", encoding="utf-8")
    passages = documents_of(data_of(path, tmp_path, document=DocumentUnit.passage))
    assert [len(passage) for passage in passages] == [5, 4999, 4]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_of_tables(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": text_of(number) + "\nend", "kind": f"k{number % 3}"} for number in range(20)]
    path = tmp_path / f"rows [1]{suffix}"  # a name that would be a pattern
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    data = data_of(path, tmp_path, text_field="body", domain_field="kind", split=ShardSplit.domain)
    assert documents_of(data) == [row["body"] for row in rows]
    assert sorted(prepared(data).meta["domains"]) == ["k0", "k1", "k2"]
    assert len(open_corpus(data, shards=3).shard_examples()) == 3


def test_hub_datasets_are_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "set"  # `datasets` reads a local folder as it does a repository of the hub
    folder.mkdir()
    rows = [{"text": text_of(number), "site": "ab"[number % 2]} for number in range(30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = {"cache": str(tmp_path), "tokenizer": "bytes", "sequence_length": 16}
    assert documents_of(Data(hub=str(folder), **common)) == [row["text"] for row in rows]
    corpus = open_corpus(Data(hub=str(folder), domain_field="site", split=ShardSplit.domain, **common), shards=2)
    assert len(corpus.shard_examples()) == 2
    with pytest.raises(ValueError, match=f"data.hub={folder}.*no_such.*cannot be read"):
        prepared(Data(hub=str(folder), hub_split="no_such", **common))


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="data.hub=some/set.*check the three names and the network.*no route"):
        prepared(Data(hub="some/set", cache=str(tmp_path)))


def test_python_docs() -> None:
    documents = list(PythonDocs().documents())
    by_domain: dict[str, int] = {}
    for document in documents:
        by_domain[document.domain] = by_domain.get(document.domain, 0) + len(document.text)
    assert {"topics", "json", "dataclasses", "asyncio"} <= by_domain.keys()
    assert not {"test", "pydoc_data", "site-packages"} & by_domain.keys()
    assert 3_000_000 < sum(by_domain.values()) < 60_000_000
    assert [document.text for document in documents] == [document.text for document in PythonDocs().documents()]


def test_python_docs_up_to_a_limit(tmp_path: Path) -> None:
    data = Data(cache=str(tmp_path), max_tokens=30_000, vocab_size=512, sequence_length=32)
    corpus = open_corpus(data, shards=2)
    folder = corpus.folder
    assert folder.meta["train_tokens"] == 30_000
    eos = byte_tokens(folder.tokenizer)[EOS]
    assert all(folder.document(index)[-1] == eos for index in range(len(folder.held_out)))


def byte_tokens(folder: Path) -> dict[str, int]:
    """Token -> id of a tokenizer's folder, the special ones only."""
    found = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in found}


def test_botocore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    info = tmp_path / "site" / "botocore-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: botocore\nVersion: 9.9\n")
    for service in ("s3", "ec2"):
        for version in ("2006-01-01", "2016-01-01"):
            shape = {"documentation": f"<p>{service} &amp; {version}  " + "words " * 200 + "</p>"}
            model = {"documentation": f"<b>About</b> {service}. {version}", "shapes": {"A": shape, "B": shape}}
            folder = tmp_path / "site" / "botocore" / "data" / service / version
            folder.mkdir(parents=True)
            (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))
    data = Data(corpus="botocore", cache=str(tmp_path), tokenizer="bytes", sequence_length=16)
    texts = documents_of(data)
    assert len(texts) == 2 and prepared(data).meta["domains"] == ["ec2", "s3"]
    assert texts[1].splitlines()[0] == "About s3. 2016-01-01"
    assert texts[1].splitlines()[1].startswith("s3 & 2016-01-01 words words")
    assert texts[1].count("s3 &") == 1


def test_botocore_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ValueError, match="pip install botocore"):
        prepared(Data(corpus="botocore", cache=str(tmp_path)))


# what cannot be used


def refused(data: Data, message: str, shards: int = 1) -> None:
    with pytest.raises(ValueError, match=message):
        open_corpus(data, shards=shards)
    corpora = Path(data.cache) / "corpora"
    assert not corpora.exists() or not [name for name in os.listdir(corpora) if name.startswith(".")]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.txt", range(20))
    empty, blank, binary, latin = (tmp_path / name for name in ("empty.txt", "blank.txt", "nul.bin", "latin.txt"))
    empty.touch()
    blank.write_text("\n \n\n")
    binary.write_bytes(b"some text\0and more\n" * 10)
    latin.write_bytes("déjà vu\n".encode("latin-1"))
    refused(data_of(tmp_path / "absent.txt", tmp_path), "there is no file .*absent.txt")
    refused(data_of(tmp_path / "*.none", tmp_path), r"there is no file .*\*\.none")
    refused(data_of(tmp_path, tmp_path), r"is a folder: name files in it, such as .*\*\.txt")
    refused(data_of([good, empty], tmp_path), "empty.txt is empty")
    refused(data_of([good, blank], tmp_path), "blank.txt holds no text")
    refused(data_of([good, binary], tmp_path), "nul.bin is not a UTF-8 text file.*NUL")
    refused(data_of([good, latin], tmp_path), "latin.txt is not a UTF-8 text file")


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "kind": "a"}\n{"body": "two"}\n{"text": "three"}\n')
    refused(data_of(path, tmp_path), r"rows.jsonl: row 2 has no text in the field 'text' \(its fields: body\)")
    path.write_text('{"text": "one", "kind": "a"}\n{"text": "two"}\n')
    refused(data_of(path, tmp_path, domain_field="kind"), "row 2 has no value in the field 'kind'")
    path.write_text('{"text": 1}\n{"text": 2}\n')
    refused(data_of(path, tmp_path), "row 1 has no text in the field 'text'")
    path.write_text("no json\n")
    refused(data_of(path, tmp_path), "rows.jsonl cannot be read as jsonl")
    (tmp_path / "x.parquet").write_bytes(b"\0\1\2 no parquet")
    refused(data_of(tmp_path / "x.parquet", tmp_path), "x.parquet cannot be read as parquet")


def test_too_little_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", range(10))
    refused(data_of(path, tmp_path, document=DocumentUnit.file), r"has 1 distinct .*data.document=passage")
    refused(data_of(path, tmp_path), "9 training documents cannot fill 10 shards", shards=10)
    refused(data_of(path, tmp_path, split=ShardSplit.domain), "1 domains .*data.domain_field", shards=2)
    refused(data_of(path, tmp_path, domain_field="kind"), "data.domain_field=kind needs .jsonl")
    refused(data_of(path, tmp_path, sequence_length=100_000), "shard 0 of 1 holds .* tokens, fewer than one")
    refused(data_of(path, tmp_path, sequence_length=1000), "the validation documents hold .* tokens, fewer than")
    refused(data_of(path, tmp_path), "0 shards", shards=0)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", range(10))
    data = Data(files=str(path), cache=str(path))
    with pytest.raises(ValueError, match="data.cache=.* cannot be written"):
        prepared(data)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", range(10))
    refused(data_of(path, tmp_path, tokenizer=str(tmp_path)), "the tokenizer .* cannot be loaded")
    folder = tmp_path / "no_eos"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused(data_of(path, tmp_path, tokenizer=str(folder)), "has no end-of-sequence token")


# held-out documents, shards


def test_validation_documents_are_in_no_shard(lines: Data) -> None:
    folder = prepared(lines)
    held_out = {as_text(folder.document(index))[:6] for index in np.flatnonzero(folder.held_out)}
    assert 0 < len(held_out) < 20
    for shards in (1, 2, 7):
        corpus = open_corpus(lines, shards=shards)
        trained: list[str] = []
        for shard, count in enumerate(corpus.shard_examples()):
            text = as_text(corpus.sequences(shard, first=0, count=3 * count))
            assert not [name for name in held_out if name in text]
            trained += [as_text(folder.document(index))[:6] for index in corpus.assignment[shard]]
        assert sorted(trained) == sorted({f"<{number:04d}>" for number in range(60)} - held_out)
        validation = as_text(corpus.validation())
        assert not [name for name in trained if name in validation]


def test_held_out_documents_depend_on_their_text_only(lines: Data, tmp_path: Path) -> None:
    shuffled = [text_of(number) for number in random.Random(1).sample(range(60), 60)]
    path = tmp_path / "shuffled.txt"
    path.write_text("\n".join(shuffled))

    def held_out(data: Data) -> set[str]:
        folder = prepared(data)
        return {as_text(folder.document(index)) for index in np.flatnonzero(folder.held_out)}

    assert held_out(data_of(path, tmp_path, validation_fraction=0.1)) == held_out(lines)


def test_duplicates_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(text_of(number % 10) for number in range(40)))
    assert documents_of(data_of(path, tmp_path)) == [text_of(number) for number in range(10)]


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_something_is_held_out_and_something_trained_on(tmp_path: Path, fraction: float) -> None:
    path = write_lines(tmp_path / "lines.txt", range(2))
    folder = prepared(data_of(path, tmp_path, validation_fraction=fraction))
    assert folder.held_out.sum() == 1 and len(folder.held_out) == 2


def test_iid_shards_are_balanced_and_seeded(lines: Data) -> None:
    one, again, other = (open_corpus(lines, seed=seed, shards=4) for seed in (0, 0, 1))
    sizes = one.shard_examples()
    assert max(sizes) - min(sizes) <= 300 // lines.sequence_length  # a document has less than 300 bytes
    assert [list(shard) for shard in one.assignment] == [list(shard) for shard in again.assignment]
    assert [list(shard) for shard in one.assignment] != [list(shard) for shard in other.assignment]


def test_domain_shards_hold_whole_domains(tmp_path: Path) -> None:
    for index, size in enumerate((30, 12, 11, 9)):
        write_lines(tmp_path / f"{index}.txt", range(100 * index, 100 * index + size))
    data = data_of(tmp_path / "*.txt", tmp_path, split=ShardSplit.domain)
    corpus = open_corpus(data, shards=2)
    folder = corpus.folder
    domains = [{folder.meta["domains"][folder.domains[i]] for i in shard} for shard in corpus.assignment]
    names = [{Path(domain).stem for domain in shard} for shard in domains]
    assert names == [{"0"}, {"1", "2", "3"}]
    assert sum(map(len, corpus.assignment)) == (~folder.held_out).sum()


# order


def windows_by_hand(corpus: TokenCorpus, shard: int) -> list[tuple[int, ...]]:
    stream = [int(token) for index in corpus.assignment[shard] for token in corpus.folder.document(index)]
    length = corpus.data.sequence_length
    return [tuple(stream[i : i + length + 1]) for i in range(0, len(stream) - length, length)]


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 300), shards=st.integers(1, 5), seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
def test_an_epoch_has_each_sequence_once(lines: Data, length: int, shards: int, seed: int, epoch: int) -> None:
    data = Data(**{**vars(lines), "sequence_length": length})
    corpus = open_corpus(data, seed=seed, shards=shards)
    for shard, count in enumerate(corpus.shard_examples()):
        rows = corpus.sequences(shard, first=epoch * count, count=count)
        assert rows.shape == (count, length + 1) and rows.dtype == torch.int64
        assert sorted(map(tuple, rows.tolist())) == sorted(windows_by_hand(corpus, shard))


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 5000), count=st.integers(1, 700))
def test_sequences_are_a_pure_function(lines: Data, first: int, count: int) -> None:
    corpus = open_corpus(lines, shards=2)
    together = corpus.sequences(1, first=first, count=count)
    corpus.sequences(0, first=3, count=2)
    singly = [corpus.sequences(1, first=first + i, count=1) for i in reversed(range(0, count, 97))]
    assert torch.equal(together[0:count:97], torch.cat(singly[::-1]))
    assert torch.equal(together, open_corpus(lines, shards=2).sequences(1, first=first, count=count))


def test_order_differs_between_epochs_shards_and_seeds(lines: Data) -> None:
    corpus = open_corpus(lines)
    count = corpus.shard_examples()[0]
    first, second = (corpus.sequences(0, first=epoch * count, count=count) for epoch in (0, 1))
    other = open_corpus(lines, seed=1).sequences(0, first=0, count=count)
    assert not torch.equal(first, second) and not torch.equal(first, other)
    windows = torch.tensor(windows_by_hand(corpus, 0))
    assert (first == windows).all(dim=1).float().mean() < 0.1


def test_validation_is_spread_evenly(lines: Data) -> None:
    few = open_corpus(Data(**{**vars(lines), "eval_sequences": 4})).validation()
    everything = open_corpus(Data(**{**vars(lines), "eval_sequences": 10_000})).validation()
    places = [next(i for i, row in enumerate(everything) if torch.equal(row, window)) for window in few]
    assert few.shape == (4, 17) and places == [len(everything) * i // 4 for i in range(4)]


def test_global_random_state_is_left_alone(lines: Data) -> None:
    python, torchs, numpys = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    open_corpus(lines, shards=2).sequences(0, first=0, count=10)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torchs) and (np.random.get_state()[1] == numpys).all()


# tokens


def test_max_tokens_is_met_exactly(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", range(60))
    folder = prepared(data_of(path, tmp_path, max_tokens=1000))
    assert folder.meta["train_tokens"] == 1000
    texts = [as_text(folder.document(index)) for index in range(len(folder.held_out))]
    whole = {text_of(number) + "|" for number in range(60)}
    assert all(text.endswith("|") for text in texts)
    assert len([text for text in texts if text not in whole]) <= 1
    everything = prepared(data_of(path, tmp_path, max_tokens=10**9)).meta
    assert everything["train_tokens"] == prepared(data_of(path, tmp_path)).meta["train_tokens"]


def test_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(300))) + " naïve 🌳"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.token_to_id(EOS) == 256 and tokenizer.get_vocab_size() == 257


def test_bpe_is_deterministic_and_lossless() -> None:
    texts = [text_of(number) for number in range(50)]
    one, two = train_bpe(texts, 300), train_bpe(texts, 300)
    assert one.to_str() == two.to_str() and one.get_vocab_size() == 300
    text = "A  new\tword,\r\n naïve 🌳 . "
    assert one.decode(one.encode(text).ids) == text
    assert len(one.encode("birch").ids) < 5


def test_bpe_is_trained_on_training_documents_only(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", range(30))
    data = data_of(path, tmp_path, tokenizer="bpe", vocab_size=400)
    folder = prepared(data)
    plain = prepared(data_of(path, tmp_path))
    training = [as_text(plain.document(index))[:-1] for index in np.flatnonzero(~plain.held_out)]
    trained = json.loads((folder.tokenizer / "tokenizer.json").read_text())
    assert trained["model"]["merges"] == json.loads(train_bpe(training, 400).to_str())["model"]["merges"]


def test_end_of_text_written_in_a_document_does_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"{text_of(number)} {EOS} more" for number in range(5)))
    for tokenizer in ("bytes", "bpe"):
        folder = prepared(data_of(path, tmp_path, tokenizer=tokenizer, vocab_size=300))
        eos = byte_tokens(folder.tokenizer)[EOS]
        assert (folder.tokens == eos).sum() == 5


def test_description_is_json(lines: Data) -> None:
    corpus = open_corpus(lines, shards=3)
    described = json.loads(json.dumps(corpus.describe()))
    assert described["documents"] == 60 and described["split"] == "iid" and described["dtype"] == "uint16"
    assert described["characters"] == sum(len(text_of(number)) for number in range(60))
    assert described["train_tokens"] + described["validation_tokens"] == described["characters"] + 60
    assert sum(described["shard_tokens"]) == described["train_tokens"]
    assert len(corpus.sha256) == 64 and corpus.sha256 == open_corpus(lines, seed=5).sha256
    assert corpus.prompt().startswith("<")


# the cache


def test_a_second_opening_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "lines.txt", range(20))
    first = open_corpus(data_of(path, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(diloco.data, "prepare", None)
        again = open_corpus(data_of(path, tmp_path, batch=2, sequence_length=8, eval_sequences=3), shards=2)
        assert again.sha256 == first.sha256
    write_lines(path, range(21))
    changed = open_corpus(data_of(path, tmp_path))
    assert changed.sha256 != first.sha256 and changed.folder.folder != first.folder.folder
    fraction = open_corpus(data_of(path, tmp_path, validation_fraction=0.5))
    assert fraction.sha256 != changed.sha256
    assert len(os.listdir(tmp_path / "cache" / "corpora")) == 3


def test_threads_prepare_at_once(tmp_path: Path) -> None:
    data = data_of(write_lines(tmp_path / "lines.txt", range(200)), tmp_path, tokenizer="bpe", vocab_size=400)
    start = threading.Barrier(4)
    digests: list[str] = []

    def work() -> None:
        start.wait()
        digests.append(open_corpus(data).sha256)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4 and len(set(digests)) == 1
    assert len(os.listdir(tmp_path / "cache" / "corpora")) == 1


def test_processes_prepare_at_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.txt", range(2000))
    program = f"""
import sys
from diloco.data import Data, TokenCorpus
from diloco.files import DocumentUnit
print("ready", flush=True)
sys.stdin.readline()
data = Data(files={str(path)!r}, cache={str(tmp_path)!r}, document=DocumentUnit.line)
print(TokenCorpus(data, seed=0, shards=2).sha256)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    digests = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(digests) == 1
    assert len(os.listdir(tmp_path / "corpora")) == 1


# --- rows of documents ---


def test_paragraphs_of_prose_become_prompts_and_completions(tmp_path: Path) -> None:
    from diloco.prompts import rows_of
    from diloco.sources import Document

    text = (
        "A first paragraph goes\n  on over lines. It ends here.\n\ndef code(x):\n    return {x: 1}\n\n"
        "Too short to be used.\n\nThis one has no stop at the end of it\n\nAnother one ends with a question, does it?"
    )
    found = list(rows_of([Document(text, "kind")], 4))
    assert [row.values for row in found] == [
        {"prompt": "A first paragraph goes", "completion": " on over lines. It ends here."},
        {"prompt": "Another one ends with", "completion": " a question, does it?"},
    ]
    assert [row.place for row in found] == ["kind: row 1", "kind: row 2"] and all(row.made for row in found)


def test_rows_of_documents_whose_prompt_is_too_long_are_left_out(tmp_path: Path) -> None:
    """They could not be mended; rows of the user's own are told."""
    from diloco.workloads.sft import SFT

    texts = [f"Number {i} is {'large' * (9 if i == 3 else 1)} enough to be a text of its own here." for i in range(12)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    given: dict[str, Any] = {"tokenizer": "bytes", "sequence_length": 40, "cache": str(tmp_path / "cache")}
    made = Data(files=str(tmp_path / "texts.txt"), document=DocumentUnit.line, prompt_words=4, **given)
    corpus = SFT().corpus(made, seed=0, shards=1)
    assert corpus.folder.meta["rows"] == 11
    own = [{"prompt": "long " * 20, "completion": "short"}, {"prompt": "a", "completion": "b"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, own)))
    with pytest.raises(ValueError, match="row 1: its prompt has 100 tokens"):
        SFT().corpus(Data(files=str(tmp_path / "own.jsonl"), **given), seed=0, shards=1)
    with pytest.raises(ValueError, match="data.prompt_words=8 cuts prompts and completions from documents"):
        SFT().corpus(Data(cache=given["cache"], tokenizer="bytes"), seed=0, shards=1)
    with pytest.raises(ValueError, match="data.prompt_words=-1"):
        Data(prompt_words=-1)
