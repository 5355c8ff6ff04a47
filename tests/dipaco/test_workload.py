"""routed_lm: shards by router, evaluation by path, and what is refused."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diloco.config import RunConfig, load, to_yaml
from diloco.messages import ShardId
from diloco.workload import Workload
from diloco.workloads.causal_lm import CausalLM
from dipaco import dealing, routing
from dipaco.corpus import RoutedCorpus
from dipaco.routing import RouterKind
from dipaco.workload import RoutedLM
from experiments.composition import Request, single
from experiments.mistakes import Mistake
from tests.dipaco import planted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    planted.write(folder)
    return folder


def lm(**settings: Any) -> RoutedLM:
    return RoutedLM(**{"model": "micro", "paths": 4, "prefix_tokens": 24, "router_fraction": 0.1, **settings})


def corpus_of(folder: Path, workload: RoutedLM, *, seed: int = 0, shards: int = 4, **data: Any) -> RoutedCorpus:
    return workload.corpus(planted.data(folder, **data), seed=seed, shards=shards)


@pytest.fixture(scope="module")
def corpus(folder: Path) -> RoutedCorpus:
    return corpus_of(folder, lm())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lm().build_model(0)


# shards


def test_documents_of_a_domain_come_to_a_path(corpus: RoutedCorpus) -> None:
    found: Any = corpus.describe()["routing"]
    assert found["training"]["purity"] > 0.9 and found["validation"]["purity"] > 0.75
    assert found["training"]["concentration"] > 0.9
    assert sum(found["validation"]["documents"]) == corpus.tokens.folder.meta["validation_documents"]
    assert sum(found["training"]["load"]) == pytest.approx(1, abs=1e-3)
    assert found["warnings"] == corpus.warnings and "overfit" in corpus.warnings[0]  # 30 kB for 160 k parameters


@pytest.mark.parametrize("kind", ["domains", "iid", "product"])
def test_other_ways_to_come_to_a_path(folder: Path, kind: str) -> None:
    corpus = corpus_of(folder, lm(router=RouterKind(kind), balance=1.5 if kind == "product" else 0.0))
    found: Any = corpus.describe()["routing"]
    least, most = {"domains": (1, 1), "iid": (0.25, 0.5), "product": (0.4, 1)}[kind]
    for part in ("training", "validation"):
        assert least <= found[part]["purity"] <= most
    if kind != "product":
        assert max(found["training"]["load"]) < 0.3


@pytest.mark.parametrize("overlap", [1, 2, 4])
@pytest.mark.parametrize("balance", [0.0, 1.1])
def test_training_documents_are_in_n_shards_and_others_in_none(folder: Path, overlap: int, balance: float) -> None:
    corpus = corpus_of(folder, lm(overlap=overlap, balance=balance))
    times = np.bincount(np.concatenate(corpus.tokens.assignment), minlength=len(corpus.tokens.folder.held_out))
    held_out = corpus.tokens.folder.held_out.copy()
    held_out[corpus.router_documents] = True
    assert set(times[~held_out]) == {overlap} and not times[held_out].any()
    assert all(len(set(own.tolist())) == len(own) for own in corpus.tokens.assignment)
    assert len(corpus.router_documents) == round(0.1 * (~corpus.tokens.folder.held_out).sum())


def test_sources_share_their_paths_documents(folder: Path, corpus: RoutedCorpus) -> None:
    eight = corpus_of(folder, lm(), shards=8)
    for path in range(4):
        parts = [eight.tokens.assignment[source].tolist() for source in (path, path + 4)]
        assert sorted(parts[0] + parts[1]) == corpus.tokens.assignment[path].tolist()
        sizes = np.diff(corpus.tokens.folder.offsets)
        assert abs(sizes[parts[0]].sum() - sizes[parts[1]].sum()) < 500
    assert len(eight.shard_examples()) == 8 and eight.sha256 == corpus.sha256


def test_one_path_reads_what_causal_lm_reads(folder: Path) -> None:
    data = planted.data(folder)
    ours, theirs = lm(paths=1), CausalLM(model="micro")
    one, plain = ours.corpus(data, seed=5, shards=2), theirs.corpus(data, seed=5, shards=2)
    assert one.sha256 == plain.sha256 and one.shard_examples() == plain.shard_examples()
    for shard in (ShardId(0), ShardId(1)):
        mine, other = ours.batch(one, shard, 7), theirs.batch(plain, shard, 7)
        assert torch.equal(mine["tokens"], other["tokens"]) and ours.tokens(mine) == theirs.tokens(other)
    assert one.describe() == plain.describe() and len(one.router_documents) == 0


def test_a_routing_is_a_function_of_settings_and_seed(
    folder: Path, corpus: RoutedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert corpus_of(folder, lm(), seed=1).sha256 != corpus.sha256
    elsewhere = corpus_of(folder, lm(), cache=str(tmp_path / "cache"))  # fitted again
    assert elsewhere.sha256 == corpus.sha256 and (tmp_path / "cache" / "routings").is_dir()

    def never(*_: object) -> None:
        raise AssertionError("it was made before")

    monkeypatch.setattr(dealing, "_make", never)
    again = corpus_of(folder, lm())
    assert again.sha256 == corpus.sha256 and again.describe() == corpus.describe()
    for settings in ({"prefix_tokens": 25}, {"document_tokens": 99}, {"overlap": 3}, {"balance": 2.5}):
        with pytest.raises(AssertionError, match="made before"):
            corpus_of(folder, lm(**settings))


def test_several_may_ask_at_once(folder: Path, corpus: RoutedCorpus, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: corpus_of(folder, lm(), cache=str(tmp_path)).sha256, range(3)))
    assert found == [corpus.sha256] * 3
    assert len(list((tmp_path / "routings").iterdir())) == 1  # and nothing half made


# evaluation


def test_a_document_is_scored_whole_but_for_its_prefix(corpus: RoutedCorpus, model: nn.Module) -> None:
    documents = [3, 50]
    expected = []
    for document in documents:
        tokens = torch.from_numpy(corpus.tokens.folder.document(document).astype(np.int64))
        total = 0.0
        for start in range(0, len(tokens) - 1, 32):  # pieces of 32 inputs
            piece = tokens[start : start + 33]
            with torch.no_grad():
                nats = model(input_ids=piece[None, :-1]).logits[0].double().log_softmax(dim=1)
            for place in range(1, len(piece)):
                if start + place >= 24:  # the first 24 are the prefix
                    total += nats[place - 1, piece[place]].item()
        expected.append(total / (len(tokens) - 24))
    found = corpus.pieces(np.array([50, 3])).document_scores(model)  # in order of document
    assert found.dtype == np.float64 and found == pytest.approx(expected, rel=1e-5)
    assert model.training  # as before


def test_every_token_after_the_prefix_counts_once(corpus: RoutedCorpus) -> None:
    documents = np.arange(40)
    sizes = np.diff(corpus.tokens.folder.offsets)[:40]
    for prefix in (1, 24, 32, 33, 100):
        corpus_settings = lm(prefix_tokens=prefix)
        pieces = routing_pieces(corpus, documents, corpus_settings.prefix_tokens)
        assert np.array_equal(np.bincount(pieces.documents, pieces.tokens, minlength=40), np.maximum(0, sizes - prefix))
        assert pieces.tokens.min() > 0 and pieces.tokens.max() <= 32


def routing_pieces(corpus: RoutedCorpus, documents: Any, prefix: int) -> Any:
    from dipaco.documents import Pieces

    return Pieces(corpus.tokens.folder, documents, length=32, prefix=prefix)


def test_evaluation_never_overlaps(folder: Path, model: nn.Module) -> None:
    workload = lm(overlap=2)
    corpus = corpus_of(folder, workload)
    assert workload.splits() == [f"validation/{path}" for path in range(4)]
    parts = [workload.evaluate(model, corpus, split) for split in workload.splits()]
    whole = workload.evaluate(model, corpus, "validation")
    assert sum(part["tokens"] for part in parts) == whole["tokens"] == corpus.validation.tokens.sum()
    mean = sum(part["loss"] * part["tokens"] for part in parts) / whole["tokens"]
    assert mean == pytest.approx(whole["loss"], rel=1e-5)
    assert len(corpus.validation) == 24  # data.eval_sequences
    router = [workload.evaluate(model, corpus, f"router/{path}")["tokens"] for path in range(4)]
    assert sum(router) == workload.evaluate(model, corpus, "router")["tokens"] > 0


def test_the_same_documents_for_every_number_of_paths(folder: Path, model: nn.Module) -> None:
    found = []
    for paths in (1, 2, 4):
        workload = lm(paths=paths)
        corpus = corpus_of(folder, workload, shards=4)
        found.append((corpus.validation.documents.tolist(), workload.evaluate(model, corpus, "validation")))
    assert found[0] == found[1] == found[2]
    assert lm(paths=1).splits() == ["validation"] == CausalLM().splits()


def test_a_path_without_documents(folder: Path, model: nn.Module) -> None:
    workload = lm()
    corpus = corpus_of(folder, workload, eval_sequences=1)
    found = [workload.evaluate(model, corpus, split) for split in workload.splits()]
    assert [part["tokens"] > 0 for part in found].count(True) == 1
    assert all(part == {"loss": 0.0, "tokens": 0.0} for part in found if not part["tokens"])
    for split in ("test", "validation/4", "validation/", "validation/-1", "router/x"):
        with pytest.raises(ValueError, match="is unknown: routed_lm has validation, router, and each with a path"):
            workload.evaluate(model, corpus, split)


def test_the_rest_is_causal_lms(corpus: RoutedCorpus, model: nn.Module, tmp_path: Path) -> None:
    ours, theirs = lm(), CausalLM(model="micro")
    batch = ours.batch(corpus, ShardId(2), 3)
    assert torch.equal(ours.loss(model, batch)[0], theirs.loss(model, batch)[0])
    assert ours.num_parameters() == theirs.num_parameters()
    ours.export(model, corpus, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    text = ours.sample(model, corpus, "the oak", tokens=4, seed=0)
    assert text == theirs.sample(model, corpus.tokens, "the oak", tokens=4, seed=0)
    assert corpus.vocab_size == 257 and corpus.tokenizer_folder.is_dir() and corpus.prompt()
    assert isinstance(ours, Workload) and ours.state().tensors == {}


# saved routers, a base model


def test_a_base_models_features(folder: Path, corpus: RoutedCorpus, model: nn.Module, tmp_path: Path) -> None:
    lm().export(model, corpus, tmp_path)
    based = corpus_of(folder, lm(base=str(tmp_path)))
    assert based.sha256 != corpus.sha256 and len(based.shard_examples()) == 4


def test_saved_routers_that_do_not_fit(folder: Path, corpus: RoutedCorpus, tmp_path: Path) -> None:
    assert corpus.table is not None and corpus.table.routing is not None
    corpus.table.routing.save(tmp_path)

    def file(**settings: Any) -> RoutedLM:
        return lm(router=RouterKind.file, router_file=str(tmp_path), **settings)

    assert corpus_of(folder, file()).describe()["shard_tokens"] == corpus.describe()["shard_tokens"]
    with pytest.raises(ValueError, match="was fitted with paths=4, and workload.paths=2: set workload.paths=4"):
        corpus_of(folder, file(paths=2))
    with pytest.raises(ValueError, match="was fitted with prefix_tokens=24, and workload.prefix_tokens=32"):
        corpus_of(folder, file(prefix_tokens=32))
    routing.KMeansRouter(np.zeros((4, 5), np.float32)).save(tmp_path)
    with pytest.raises(ValueError, match="fitted on features of width 5, and was given 64: use the base model"):
        corpus_of(folder, file())
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="holds no routing that can be read .*: give a folder"):
        corpus_of(folder, file())


# bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": -1}, "workload.paths=-1: it must be at least 0"),
        ({"prefix_tokens": 0}, "workload.prefix_tokens=0: it must be at least 1"),
        ({"document_tokens": -1}, "workload.document_tokens=-1: it must be at least 0"),
        ({"paths": 4, "overlap": 5}, "workload.overlap=5 with 4 paths: use at most 4"),
        ({"balance": 0.5}, "workload.balance=0.5: a shard needs its fair share"),
        ({"router_fraction": 1.0}, "workload.router_fraction=1.0: it must be at least 0 and below 1"),
        (
            {"router": RouterKind.product, "paths": 5},
            "needs a square number of paths, not 5: use 4 paths",
        ),
        ({"router": RouterKind.file}, "workload.router=file with workload.router_file=''"),
        ({"router_file": "x"}, "workload.router=kmeans with workload.router_file="),
        ({"router": RouterKind.discriminative}, "workload.router=discriminative with workload.scorer=''"),
        ({"scorer": "x"}, "workload.router=kmeans with workload.scorer="),
        ({"router": RouterKind.iid, "overlap": 2}, "workload.router=iid has no scores for workload.overlap=2"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedLM(**settings)


def test_corpora_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workload.paths=4 do not divide 6 sources: use a multiple of 4 islands"):
        corpus_of(folder, lm(), shards=6)
    with pytest.raises(ValueError, match="4 domains in the training documents cannot fill 5 paths"):
        corpus_of(folder, lm(paths=5, router=RouterKind.domains), shards=5)
    with pytest.raises(ValueError, match="there is no model in this folder: give RUN/export"):
        corpus_of(folder, lm(base=str(tmp_path)))
    with pytest.raises(ValueError, match=r"documents cannot fill 250 paths: use fewer paths"):
        corpus_of(folder, lm(paths=250), shards=250)
    with pytest.raises(ValueError, match="shard of path .* fewer than one sequence needs .*: workload.balance=1.5"):
        corpus_of(folder, lm(paths=40), shards=40, sequence_length=900)
    with pytest.raises(ValueError, match="no validation document has more than workload.prefix_tokens=1000 tokens"):
        corpus_of(folder, lm(prefix_tokens=1000))


def test_a_single_path_is_told_of(folder: Path) -> None:
    (told,) = lm(paths=1).warnings(corpus_of(folder, lm(paths=1)))
    assert "workload=causal_lm" in told and "layout=paths" in told and "workload.paths=4" in told


# configuration


def test_the_command_line_and_config_yaml_know_it(tmp_path: Path) -> None:
    config = single(Request(overrides=("workload=routed_lm", "workload.router=iid", "workload.paths=2"))).config
    assert config.workload == RoutedLM(router=RouterKind.iid, paths=2)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(RunConfig(workload=lm(overlap=2))))
    assert load(path).workload == lm(overlap=2)
    with pytest.raises(Mistake, match=r"workload\.overlap=9"):
        single(Request(overrides=("workload=routed_lm", "workload.paths=4", "workload.overlap=9")))
