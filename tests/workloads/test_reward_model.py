"""reward_model: its scores are those of transformers' own class, it tells pairs apart, and it judges by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from diloco.inner import AdamW
from diloco.messages import ShardId
from diloco.workloads.judges import Answer, RewardModelJudge
from diloco.workloads.language import LanguageModel
from diloco.workloads.lora import LoRA
from diloco.workloads.reward_model import RewardModel
from tests.toy import launch, records
from tests.workloads.test_preference import pairs, some_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LanguageModel.named("micro", trust_remote_code=False).build(3).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def trained(folder: Path, model: str, **settings: Any) -> tuple[RewardModel, Any, Any]:
    workload = RewardModel(model=model, **settings)
    corpus = workload.corpus(pairs(folder, batch=8), seed=0, shards=1)
    policy = workload.build_model(0)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    for step in range(12):
        loss, _ = workload.loss(policy, workload.batch(corpus, ShardId(0), step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return workload, policy, corpus


def test_it_starts_from_nothing_whatever_the_seed(tmp_path: Path, model: str) -> None:
    workload = RewardModel(model=model)
    corpus = workload.corpus(pairs(tmp_path), seed=0, shards=1)
    found = workload.evaluate(workload.build_model(0), corpus, "validation")
    assert found["loss"] == pytest.approx(math.log(2)) and found["margin"] == 0 == found["accuracy"]
    same = (dict(workload.build_model(seed).named_parameters()) for seed in (0, 7))
    first, second = same
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not workload.has_perplexity()


def test_it_learns_and_transformers_reads_the_same_scores(tmp_path: Path, model: str) -> None:
    """From the export, each text alone, without any filling; the loss is that of its margins by hand."""
    workload, policy, corpus = trained(tmp_path, model)
    after = workload.evaluate(policy, corpus, "validation")
    assert after["accuracy"] == 1.0 and after["loss"] < 0.5
    (tmp_path / "export").mkdir()
    workload.export(policy, corpus, tmp_path / "export")
    oracle: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    margins = []
    with torch.no_grad():
        for row in corpus.validation_rows:
            ids = [torch.from_numpy(corpus.text(int(row), side)[0].astype("int64"))[None] for side in range(2)]
            margins.append(float(oracle(input_ids=ids[0]).logits - oracle(input_ids=ids[1]).logits))
    assert after["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    by_hand = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert after["loss"] == pytest.approx(by_hand, rel=1e-4)


def test_its_export_is_a_judge(tmp_path: Path, model: str) -> None:
    workload, policy, corpus = trained(tmp_path, model, lora=LoRA(rank=2), export_merged=True)
    (tmp_path / "export").mkdir()
    workload.export(policy, corpus, tmp_path / "export")
    with pytest.raises(ValueError, match=r"adapter alone: train with workload.export_merged=true.*merged"):
        RewardModelJudge(tmp_path / "export")
    judge = RewardModelJudge(tmp_path / "export" / "merged")
    scores = judge([Answer(prompt="3 is ", completion=text) for text in ("a number.", "no number??")])
    assert scores[0] > scores[1]
    batch = workload.batch(corpus, ShardId(0), 0)
    tokenizer: Any = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    prompts, texts = [], []
    for pair in range(2):
        whole = bytes(token for token in batch["tokens"][pair, 0][: batch["lengths"][pair, 0]].tolist() if token < 256)
        prompts.append(whole.decode().removesuffix("a number."))
        texts.append("a number.")
    assert tokenizer.eos_token_id == 256
    policy.eval()
    with torch.no_grad():
        from diloco.workloads.reward_model import _scores

        direct = _scores(policy, batch["tokens"][:2, 0], batch["lengths"][:2, 0])
    answers = [Answer(prompt=p, completion=t) for p, t in zip(prompts, texts, strict=True)]
    assert judge(answers) == pytest.approx(direct.tolist(), rel=1e-4)


def test_two_islands_train_it(tmp_path: Path, model: str) -> None:
    result = launch(
        tmp_path / "run", workload=RewardModel(model=model, dropout=0.1), data=pairs(tmp_path), islands=2, rounds=2,
        inner_steps=4, inner=AdamW(lr=3e-3),
    )  # fmt: skip
    assert result.summary["perplexity"] is None and result.summary["val_loss"] < math.log(2)
    assert records(result.directory, "evaluation")[-1]["eval/accuracy"] > 0.5
    assert not records(result.directory, "sample")


def test_dropout_is_that_of_attention(model: str) -> None:
    built: Any = RewardModel(model=model, dropout=0.5).build_model(0)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        built.score.weight.fill_(1.0)
        assert not torch.equal(built.train()(input_ids=ids).logits, built(input_ids=ids).logits)
        assert torch.equal(built.eval()(input_ids=ids).logits, built(input_ids=ids).logits)


def test_mistakes(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match=r"workload.dropout=1: it must be at least 0 and below 1"):
        RewardModel(model=model, dropout=1)
    with pytest.raises(ValueError, match=r"is no reward model: train one with workload=reward_model"):
        RewardModelJudge(Path(model))
    rows = some_pairs()
    rows[2]["rejected"] = rows[2]["chosen"]
    with pytest.raises(ValueError, match=r"row 3: chosen and rejected are equal"):
        RewardModel(model=model).corpus(pairs(tmp_path, rows), seed=0, shards=1)
