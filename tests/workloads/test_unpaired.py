"""unpaired: KTO on labelled completions, its point of reference, and rows that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco import RunConfig
from diloco.inner import AdamW
from diloco.messages import ShardId
from diloco.workloads.language import LanguageModel
from diloco.workloads.lora import LoRA
from diloco.workloads.unpaired import Unpaired
from tests.toy import launch, records
from tests.workloads.test_sft import data

EOS = 256


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i} is ", "completion": "a number." if i % 4 < 2 else "none??", "label": i % 4 < 2}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LanguageModel.named("micro", trust_remote_code=False).build(3).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def said(tokens: torch.Tensor) -> str:
    return bytes(token for token in tokens.tolist() if 0 < token < EOS).decode()


def test_each_completion_is_beside_its_neighbours(tmp_path: Path, model: str) -> None:
    workload = Unpaired(model=model)
    corpus = workload.corpus(data(tmp_path, rows()), seed=0, shards=1)
    batch = workload.batch(corpus, ShardId(0), 0)
    own = [said(text) for text in batch["tokens"][:, 0]]
    swapped = [said(text) for text in batch["tokens"][:, 1]]
    for place, text in enumerate(swapped):
        prompt, completion = own[place].partition(" is ")[0], own[(place + 1) % 4].partition(" is ")[2]
        assert text == f"{prompt} is {completion}"
    assert batch["desirable"].tolist() == ["number" in text for text in own]
    assert workload.tokens(batch) == sum(len(text.partition(" is ")[2]) + 1 for text in own)


def test_before_training_all_is_a_half(tmp_path: Path, model: str) -> None:
    """Sigmoid of 0, whatever the label."""
    workload = Unpaired(model=model, desirable_weight=1.0, undesirable_weight=1.0)
    corpus = workload.corpus(data(tmp_path, rows()), seed=0, shards=1)
    found = workload.evaluate(workload.build_model(0), corpus, "validation")
    assert found["loss"] == pytest.approx(0.5, abs=1e-5) and found["margin"] == pytest.approx(0.0, abs=1e-4)


def test_the_loss_by_hand(tmp_path: Path, model: str) -> None:
    """Text by text, with another policy than the reference."""
    workload = Unpaired(model=model, beta=0.3, desirable_weight=2.0)
    corpus = workload.corpus(data(tmp_path, rows()), seed=0, shards=1)
    batch = workload.batch(corpus, ShardId(0), 0)
    policy, start = (LanguageModel.named(name, trust_remote_code=False).build(9).eval() for name in ("micro", model))

    def ratio(place: int, side: int) -> float:
        ids, marks = batch["tokens"][place, side], batch["targets"][place, side]
        size = int(marks.nonzero().max()) + 1
        logps = []
        for one in (policy, start):
            with torch.no_grad():
                told: Any = torch.log_softmax(one(ids[None, : size - 1]).logits[0], dim=-1)
            each = told.gather(1, ids[1:size, None])[:, 0]
            logps.append(float(each[marks[1:size]].sum()))
        return logps[0] - logps[1]

    kl = max(0.0, sum(ratio(place, 1) for place in range(4)) / 4)
    losses = []
    for place, wanted in enumerate(batch["desirable"].tolist()):
        gain = 0.3 * (ratio(place, 0) - kl)
        losses.append(2.0 / (1 + math.exp(gain)) if wanted else 1 / (1 + math.exp(-gain)))
    with torch.no_grad():
        assert workload.loss(policy, batch)[0].item() == pytest.approx(sum(losses) / 4, rel=1e-4)


@pytest.mark.parametrize("lora", [LoRA(), LoRA(rank=2)], ids=["whole", "adapters"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_two_islands_learn_what_is_wanted(tmp_path: Path, model: str, lora: LoRA) -> None:
    run = launch(
        tmp_path / "run", workload=Unpaired(model=model, lora=lora), data=data(tmp_path, rows()), islands=2, rounds=2,
        inner_steps=5, inner=AdamW(lr=1e-2 if lora.rank else 2e-3),
    )  # fmt: skip
    last = records(run.directory, "evaluation")[-1]
    assert last["eval/margin"] > 0.1 and run.summary["val_loss"] < 0.5 and run.summary["perplexity"] is None


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"label": None}, "row 3 has no label"),
        ({"label": "yes"}, "row 3: label is 'yes', and must be true or false"),
        ({"completion": ""}, "row 3: completion is empty"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, model: str, changed: dict[str, Any], problem: str) -> None:
    bad = rows()[:3]
    bad[2] = {**bad[2], **changed}
    if changed.get("label") == "yes":
        bad = [{**row, "label": str(row["label"])} for row in bad[:2]] + [bad[2]]
        problem = "row 1: label is 'True', and must be true or false"
    with pytest.raises(ValueError, match=problem):
        Unpaired(model=model).corpus(data(tmp_path, bad), seed=0, shards=1)


def test_mistakes(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="workload.model=micro has new weights"):
        Unpaired(model="micro")
    with pytest.raises(ValueError, match="beta=0"):
        Unpaired(model=model, beta=0)
    with pytest.raises(ValueError, match="is measured against others of its batch"):
        Unpaired(model=model).corpus(data(tmp_path, rows(), batch=1), seed=0, shards=1)
    for given in ({"data": data(tmp_path, rows(), accumulation=2)}, {"workers": 2}):
        with pytest.raises(ValueError, match="against all others of its batch: use workers=1 and data.accumulation=1"):
            RunConfig(workload=Unpaired(model=model), **given)  # type: ignore[arg-type]
