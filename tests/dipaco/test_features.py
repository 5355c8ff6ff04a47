"""Features: what they are, that they tell domains apart, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import AutoModel, AutoTokenizer

from diloco.data import TokenCorpus
from diloco.workloads.causal_lm import CausalLM
from dipaco import features as kinds
from dipaco.features import Document, Features, HiddenFeatures, TextFeatures
from dipaco.router import KMeansRouter
from dipaco.routing import texts
from dipaco.shards import purity
from tests.dipaco import planted


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    folder = tmp_path_factory.mktemp("planted")
    planted.write(folder)
    return CausalLM(model="micro").corpus(planted.data(folder), seed=0, shards=1)


@pytest.fixture(scope="module")
def documents(corpus: TokenCorpus) -> list[Document]:
    return texts(corpus.folder, np.arange(len(corpus.folder.domains)))


@pytest.fixture(scope="module")
def base(corpus: TokenCorpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A new model of the corpus's tokenizer, exported."""
    folder = tmp_path_factory.mktemp("base")
    workload = CausalLM(model="micro")
    workload.export(workload.build_model(0), corpus, folder)
    return str(folder)


@pytest.fixture(params=["text", "hidden"])
def fitted(request: pytest.FixtureRequest, documents: list[Document], base: str) -> Features:
    if request.param == "hidden":
        return HiddenFeatures.fit(documents, tokens=64, base=base)
    return TextFeatures.fit(documents, tokens=64, vocabulary=257, seed=0)


def test_what_both_kinds_keep(fitted: Features, documents: list[Document], tmp_path: Path) -> None:
    found = fitted.vectors(documents, tokens=32)
    assert found.shape == (len(documents), fitted.width) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(fitted.vectors(documents[5:9], tokens=32), found[5:9], atol=1e-4)  # whoever else is asked about
    cut = [document[:32] for document in documents]
    assert np.allclose(fitted.vectors(cut, tokens=1000), found, atol=1e-4)  # the rest is not seen
    assert np.isfinite(fitted.vectors([documents[0][:0], documents[0][:1]], tokens=32)).all()
    fitted.save(tmp_path)
    loaded = kinds.load(tmp_path)
    assert type(loaded) is type(fitted) and np.array_equal(loaded.vectors(documents, tokens=32), found)


def test_tf_idf_is_scikit_learns(documents: list[Document]) -> None:
    """With an SVD that keeps everything, angles between documents are those of scikit-learn's tf-idf."""
    few = [document[:40] for document in documents[:20]]
    lengths = kinds.run_lengths(257)
    grams = [Counter(d[i : i + n].tobytes() for n in lengths for i in range(len(d) - n + 1)) for d in few]
    known = {gram: column for column, gram in enumerate(dict.fromkeys(gram for row in grams for gram in row))}
    counts = np.array([[row[gram] for gram in known] for row in grams])
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(sparse.csr_matrix(counts)).toarray()
    found = TextFeatures.fit(few, tokens=40, vocabulary=257, seed=0).vectors(few, tokens=40)
    assert np.allclose(found @ found.T, weighted @ weighted.T, atol=0.02)  # some terms share a bucket


def test_hidden_states_are_means_of_the_models(documents: list[Document], base: str) -> None:
    model = AutoModel.from_pretrained(base).eval()
    with torch.no_grad():
        states = [model(torch.tensor([d[:10].tolist()])).last_hidden_state.mean(dim=1)[0] for d in documents[:50]]
    matrix = torch.stack(states).double().numpy()
    found = kinds._hidden_states(model, documents[:50], 10)
    assert np.allclose(found, matrix, atol=1e-5)


def test_words_tell_domains_apart(corpus: TokenCorpus, documents: list[Document]) -> None:
    features = TextFeatures.fit(documents, tokens=1000, vocabulary=257, seed=0).vectors(documents, tokens=1000)
    found = KMeansRouter.fit(features, paths=4, seed=0).assign(features)[:, 0]
    assert purity(found, corpus.folder.domains) > 0.95


def test_both_halves_have_strong_components(documents: list[Document]) -> None:
    features = TextFeatures.fit(documents, tokens=1000, vocabulary=257, seed=0).vectors(documents, tokens=1000)
    first, second = (np.square(half).sum() for half in np.split(features, 2, axis=1))
    assert first / second == pytest.approx(1, abs=0.8)


def test_bases_that_do_not_fit(base: str, corpus: TokenCorpus, tmp_path: Path, documents: list[Document]) -> None:
    kinds.check_base(base, corpus.tokenizer_folder)
    with pytest.raises(
        ValueError, match=f"workload.base={tmp_path}: there is no model in this folder: give RUN/export"
    ):
        HiddenFeatures.fit(documents, tokens=8, base=str(tmp_path))
    other = CausalLM(model="tiny").corpus(
        planted.data(Path(corpus.data.files[0]).parent, tokenizer="bpe", vocab_size=300), seed=0, shards=1
    )
    with pytest.raises(ValueError, match="has another tokenizer than the corpus: set data.tokenizer="):
        kinds.check_base(base, other.tokenizer_folder)
    HiddenFeatures.fit(documents, tokens=8, base=base).save(tmp_path / "saved")
    CausalLM(model="tiny").build_model(0).save_pretrained(tmp_path / "wide")  # width 128, not 64
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "wide")
    meta = tmp_path / "saved" / "features.json"
    meta.write_text(meta.read_text().replace(base, str(tmp_path / "wide")))
    with pytest.raises(ValueError, match="hidden states of width 128, and these features were fitted on 64"):
        kinds.load(tmp_path / "saved")
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(ValueError, match="its features have format 0, not 1: fit them anew"):
        kinds.load(tmp_path / "saved")
