"""Tokenizers: trained on the corpus, bytes, or pretrained; each kept as a folder for transformers to load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from diloco import pretrained

EOS = "<|endoftext|>"
FORMAT = 1  # of prepared folders; a higher number makes all cached corpora be prepared again
MIN_BPE_VOCABULARY = 257  # 256 bytes and EOS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How text becomes tokens: all that a prepared folder depends on besides the source."""

    tokenizer: str  # "bpe", "bytes", a folder or a hub id
    vocab_size: int  # of "bpe"
    max_tokens: int  # of training documents; 0 = no limit
    validation_fraction: float
    trust_remote_code: bool = False

    def fingerprint(self) -> dict[str, object]:
        """JSON values that change when the tokens would."""
        folder = Path(self.tokenizer)
        patterns = ("*token*", "vocab*", "merges*")
        files = sorted(file for pattern in patterns for file in folder.glob(pattern)) if folder.is_dir() else []
        return {
            "format": FORMAT,
            "tokenizers": metadata.version("tokenizers"),
            "tokenizer": self.tokenizer,
            "tokenizer_files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "vocab_size": self.vocab_size,
            "max_tokens": self.max_tokens,
            "validation_fraction": self.validation_fraction,
        }


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer at work."""

    encode: Callable[[list[str]], list[list[int]]]  # without special tokens
    eos: int
    vocabulary: int  # all ids are below


def make_encoder(recipe: Recipe, texts: Iterable[str], folder: Path) -> Encoder:
    """Train on `texts`, or load, the tokenizer; write it to the new `folder`, as AutoTokenizer loads it."""
    if recipe.tokenizer not in ("bpe", "bytes"):
        return _pretrained(recipe, folder)
    if recipe.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_bpe(texts, recipe.vocab_size)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    wrapper = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(wrapper), encoding="utf-8")
    return Encoder(
        encode=_batch_encode(tokenizer), eos=tokenizer.get_vocab()[EOS], vocabulary=tokenizer.get_vocab_size()
    )


def _batch_encode(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    tokenizer.encode_special_tokens = True  # a document that writes "<|endoftext|>" does not end there

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _pretrained(recipe: Recipe, folder: Path) -> Encoder:
    from transformers import (
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )  # heavy, and needed for pretrained ones only

    name = recipe.tokenizer
    try:
        tokenizer = pretrained.load(AutoTokenizer, name, trust_remote_code=recipe.trust_remote_code)
    except pretrained.NeedsCode as error:
        raise ValueError(f"data.tokenizer={error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer {name!r} cannot be loaded: give data.tokenizer=bpe, bytes, a folder with "
            f"tokenizer.json, or the id on a hub that can be reached ({str(error).splitlines()[0]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {name!r} has no end-of-sequence token: set its eos_token, or use data.tokenizer=bpe"
        )
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encode = _batch_encode(backend)
    else:

        def encode(texts: list[str]) -> list[list[int]]:
            return cast("list[list[int]]", tokenizer(texts, add_special_tokens=False)["input_ids"])

    return Encoder(encode=encode, eos=tokenizer.eos_token_id, vocabulary=max(tokenizer.get_vocab().values()) + 1)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, EOS being token 0; a function of its arguments."""
    tokenizer = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i, and token 256 is EOS."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]  # GPT-2 shows these as characters from 256 on
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = _byte_level({shown[byte]: byte for byte in range(256)}, [])
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """All cores while preparing, and one after: a process that forks with the pool open may hang."""
    name = "TOKENIZERS_PARALLELISM"  # the library's only switch
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = "false"
