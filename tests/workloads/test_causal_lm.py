"""Language models: built, trained on, evaluated, exported and sampled from."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diloco.data import Data, TokenCorpus
from diloco.files import DocumentUnit
from diloco.messages import ShardId
from diloco.vocabulary import EOS
from diloco.workloads import sampling
from diloco.workloads.causal_lm import CausalLM
from diloco.workloads.presets import PRESETS

WORDS = "ash birch cedar elm fir hazel larch maple oak pine rowan spruce willow yew".split()
SHARD = ShardId(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("text")
    choice = random.Random(0)
    text = "\n".join(" ".join(choice.choices(WORDS, k=30)) for _ in range(80))
    (folder / "text.txt").write_text(text)
    return Data(
        files=str(folder / "text.txt"), document=DocumentUnit.line, cache=str(folder / "cache"), vocab_size=300,
        batch=4, sequence_length=16, eval_sequences=20, validation_fraction=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(data: Data) -> TokenCorpus:
    return CausalLM().corpus(data, seed=0, shards=2)


@pytest.fixture
def model() -> nn.Module:
    return CausalLM().build_model(0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, corpus: TokenCorpus) -> Path:
    """A small model of another shape, saved in bfloat16, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=310,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus.tokenizer_folder).save_pretrained(folder)
    return folder


def digest(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = digest(one), digest(two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# models


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("deep", 0.4, 0.02),
        ("tiny", 1.3, 0.02),
        ("10m", 10.5, 0.02),
        ("60m", 60, 0.03),
        ("150m", 150, 0.01),
        ("400m", 400, 0.03),
        ("1.3b", 1300, 0.03),
    ],
)
def test_presets_have_the_size_of_their_name(name: str, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        model = CausalLM(model=name).build_model(0)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    assert parameters == pytest.approx(millions * 1e6, rel=tolerance)
    weight = model.get_parameter("model.layers.0.self_attn.k_proj.weight")
    assert weight.shape == (PRESETS[name].heads * PRESETS[name].head_size, PRESETS[name].width)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_new_model_is_a_function_of_the_seed(model: nn.Module) -> None:
    state = torch.get_rng_state()
    assert same(model, CausalLM().build_model(0)) and not same(model, CausalLM().build_model(1))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa" and model.config.use_cache is False
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pretrained_model_brings_weights_and_tokenizer(pretrained: Path, data: Data, corpus: TokenCorpus) -> None:
    workload = CausalLM(model=str(pretrained))
    model = workload.build_model(0)
    assert same(model, workload.build_model(1)) and model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    own = workload.corpus(data, seed=0, shards=2)
    assert own.data.tokenizer == str(pretrained) and own.sha256 == corpus.sha256


def test_models_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, message in (
        (str(tmp_path), f"workload.model={tmp_path}: the folder has no config.json: give a preset"),
        (str(tmp_path / "absent"), "there is no such folder"),
        ("nobody/nothing", "workload.model=nobody/nothing cannot be loaded .*check the name and, for a hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            CausalLM(model=name).build_model(0)
        with pytest.raises(ValueError, match=message):
            CausalLM(model=name).corpus(Data(cache=str(tmp_path)), seed=0, shards=1)
    with pytest.raises(ValueError, match="workload.model is empty: choose micro, deep, tiny, 10m, 60m"):
        CausalLM(model="")


def test_a_folder_is_named_absolutely(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pretrained.parent)
    assert CausalLM(model=pretrained.name) == CausalLM(model=str(pretrained))


# corpus


def changed(data: Data, **settings: Any) -> Data:
    return Data(**{**vars(data), **settings})


def test_the_tokenizer_is_derived_from_the_model(data: Data) -> None:
    derived = CausalLM().corpus(changed(data, vocab_size=0), seed=0, shards=1)
    assert (derived.data.tokenizer, derived.data.vocab_size) == ("bpe", PRESETS["tiny"].vocab_size)
    given = CausalLM().corpus(changed(data, tokenizer="bytes"), seed=0, shards=1)
    assert given.vocab_size == 257


def test_a_tokenizer_that_does_not_fit_the_model(pretrained: Path, data: Data) -> None:
    with pytest.raises(ValueError, match="data.tokenizer=bpe has 5000 tokens and workload.model=tiny room for 4096"):
        CausalLM().corpus(changed(data, vocab_size=5000), seed=0, shards=1)
    large = CausalLM().corpus(changed(data, vocab_size=400), seed=0, shards=1)
    assert large.vocab_size > 310
    with pytest.raises(
        ValueError, match=rf"has {large.vocab_size} tokens and workload.model={pretrained} room for 310"
    ):
        folder = str(large.tokenizer_folder)
        CausalLM(model=str(pretrained)).corpus(changed(data, tokenizer=folder), seed=0, shards=1)


def test_a_sequence_longer_than_the_model(pretrained: Path, data: Data) -> None:
    with pytest.raises(ValueError, match="data.sequence_length=33 is more than the 32 positions"):
        CausalLM(model=str(pretrained)).corpus(changed(data, sequence_length=33), seed=0, shards=1)


# training and evaluation


def test_batches_are_the_next_sequences(corpus: TokenCorpus) -> None:
    workload = CausalLM()
    batches = [workload.batch(corpus, SHARD, step)["tokens"] for step in (5, 6)]
    assert batches[0].shape == (4, 17) and batches[0].dtype == torch.int64
    assert torch.equal(torch.cat(batches), corpus.sequences(0, first=20, count=8))
    assert torch.equal(workload.batch(corpus, SHARD, 5)["tokens"], batches[0])
    assert workload.tokens({"tokens": batches[0]}) == 4 * 16


def test_loss_is_the_mean_cross_entropy(model: nn.Module, corpus: TokenCorpus) -> None:
    workload = CausalLM()
    batch = workload.batch(corpus, SHARD, 0)
    loss, metrics = workload.loss(model, batch)
    assert metrics == {} and loss.shape == () and loss.requires_grad
    expected = model(input_ids=batch["tokens"], labels=batch["tokens"]).loss  # transformers shifts by itself
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(math.log(4096), rel=0.05)


def test_training_lowers_the_loss(model: nn.Module, corpus: TokenCorpus) -> None:
    workload = CausalLM()
    before = workload.evaluate(model, corpus, "validation")["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(15):
        loss, _ = workload.loss(model, workload.batch(corpus, SHARD, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert workload.evaluate(model, corpus, "validation")["loss"] < before - 2


def test_evaluation_is_the_mean_over_all_validation_tokens(model: nn.Module, corpus: TokenCorpus) -> None:
    workload = CausalLM()
    found = workload.evaluate(model, corpus, "validation")
    assert model.training and workload.evaluate(model.eval(), corpus, "validation") == found and not model.training
    windows = corpus.validation()
    assert windows.shape == (20, 17)  # two whole chunks and a part
    with torch.no_grad():
        log_probabilities = model(input_ids=windows[:, :-1]).logits.double().log_softmax(dim=-1)
    expected = -log_probabilities.gather(2, windows[:, 1:, None]).mean().item()
    assert found == {"loss": pytest.approx(expected, rel=1e-5)}
    with pytest.raises(ValueError, match="split='test' is unknown"):
        workload.evaluate(model, corpus, "test")


# export and samples


def tokens_of(corpus: TokenCorpus) -> Tensor:
    return corpus.sequences(0, first=0, count=2)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_an_export_loads_elsewhere(model: nn.Module, data: Data, tmp_path: Path, tokenizer: str) -> None:
    workload = CausalLM()
    corpus = workload.corpus(changed(data, tokenizer=tokenizer), seed=0, shards=1)
    workload.export(model, corpus, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = tokens_of(corpus)
    assert torch.equal(loaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    encoder = AutoTokenizer.from_pretrained(tmp_path)
    text = "birch  and\nelm . naïve"
    assert encoder.decode(encoder(text)["input_ids"]) == text
    eos = encoder.convert_tokens_to_ids(EOS)
    assert eos == (256 if tokenizer == "bytes" else 0) == encoder.eos_token_id
    settings, generation = (json.loads((tmp_path / f"{kind}config.json").read_text()) for kind in ("", "generation_"))
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["use_cache"]) == (eos, eos, True)
    assert [generation[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [eos] * 3
    generated = loaded.generate(**encoder("oak", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= len(encoder("oak")["input_ids"]) + 3


def test_an_export_can_be_trained_on(model: nn.Module, corpus: TokenCorpus, data: Data, tmp_path: Path) -> None:
    workload = CausalLM()
    workload.export(model, corpus, tmp_path)
    again = CausalLM(model=str(tmp_path))
    reloaded = again.build_model(1)
    assert same(reloaded, model)
    batch = {"tokens": torch.zeros(1, 9, dtype=torch.int64)}  # all end-of-text
    gradients = []
    for each in (model, reloaded):
        workload.loss(each, batch)[0].backward()
        gradients.append(each.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients)
    own = again.corpus(data, seed=0, shards=1)
    (tmp_path / "second").mkdir()
    again.export(reloaded, own, tmp_path / "second")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "second").train(), model)
    names = ("config.json", "generation_config.json", "tokenizer.json")
    assert all((tmp_path / name).read_text() == (tmp_path / "second" / name).read_text() for name in names)


def test_tokens_without_text_are_never_written(model: Any, corpus: TokenCorpus) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    assert corpus.vocab_size == 300 and model.config.vocab_size == 4096  # most tokens of the model stand for nothing
    with sampling.seeded(0, torch.device("cpu")):
        written = sampling.continuation(model.eval(), tokenizer, [5, 6], tokens=50)
    assert max(written) < 300 and (len(written) == 50 or written[-1] == tokenizer.eos_token_id)


def test_samples_are_seeded(model: nn.Module, corpus: TokenCorpus) -> None:
    workload = CausalLM()
    state = torch.get_rng_state()
    one, again, other = (workload.sample(model, corpus, "oak pine", tokens=12, seed=seed) for seed in (1, 1, 2))
    assert one == again != other and one.startswith("oak pine") and len(one) > len("oak pine")
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert workload.sample(model, corpus, "", tokens=5, seed=0)


def test_a_prompt_longer_than_the_model(pretrained: Path, data: Data) -> None:
    workload = CausalLM(model=str(pretrained))
    corpus = workload.corpus(data, seed=0, shards=1)
    prompt = "oak pine elm " * 20
    for tokens in (8, 100):
        sample = workload.sample(workload.build_model(0), corpus, prompt, tokens=tokens, seed=0)
        assert sample.startswith(prompt) and len(sample) > len(prompt)
