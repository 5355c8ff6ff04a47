"""preference: the reference alike from wherever it comes, pairs told apart, and rows that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diloco import RunConfig
from diloco.data import Data
from diloco.inner import AdamW
from diloco.messages import ShardId
from diloco.outer import Sgd
from diloco.workload import cut
from diloco.workloads.language import LanguageModel
from diloco.workloads.lora import LoRA
from diloco.workloads.objectives import DPO, OBJECTIVES, PairLogps
from diloco.workloads.preference import Preference, Reference
from tests.toy import digests, launch, records
from tests.workloads.test_sft import data, write


def some_pairs(count: int = 24) -> list[dict[str, Any]]:
    """What ends with a stop is better."""
    return [
        {"prompt": f"{i} is ", "chosen": "a number.", "rejected": f"no number{'?' * (i % 4)}"} for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model in a folder."""
    folder = tmp_path_factory.mktemp("model")
    LanguageModel.named("micro", trust_remote_code=False).build(3).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def pairs(folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Data:
    return data(folder, rows or some_pairs(), **settings)


def test_before_training_the_policy_is_the_reference(tmp_path: Path, model: str) -> None:
    """Then every difference is 0, and DPO's loss log 2."""
    workload = Preference(model=model)
    corpus = workload.corpus(pairs(tmp_path), seed=0, shards=1)
    found = workload.evaluate(workload.build_model(0), corpus, "validation")
    assert found["loss"] == pytest.approx(0.693147, abs=1e-5) and found["margin"] == pytest.approx(0, abs=1e-4)
    batch = workload.batch(corpus, ShardId(0), 0)
    assert batch["tokens"].shape[:2] == batch["reference"].shape == (4, 2)
    assert batch["targets"][0].sum(dim=1).tolist() == [len("a number.") + 1, len("no number") + 1 + _marks(batch)]
    assert workload.weight(batch) == 4 and workload.tokens(batch) == int(batch["targets"].sum())


def _marks(batch: dict[str, torch.Tensor]) -> int:
    return bytes(batch["tokens"][0, 1][batch["targets"][0, 1]].tolist()[:-1]).decode().count("?")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_reference_is_the_same_from_everywhere(tmp_path: Path, model: str) -> None:
    losses = []
    for kind in Reference:
        workload = Preference(model=model, lora=LoRA(rank=2, dropout=0.5), reference=kind)
        corpus = workload.corpus(pairs(tmp_path), seed=0, shards=1)
        adapted = workload.build_model(0).eval()
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.fill_(0.05)
        losses.append(workload.loss(adapted, workload.batch(corpus, ShardId(0), 0))[0].item())
        assert not adapted.training
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert abs(losses[0] - 0.693147) > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_what_is_better(tmp_path: Path, model: str, name: str) -> None:
    """Some steps of plain AdamW; the ones that hardly move at this rate still must not go the wrong way."""
    workload = Preference(model=model, objective=name)
    corpus = workload.corpus(pairs(tmp_path, batch=8), seed=0, shards=1)
    policy = workload.build_model(0)
    before = workload.evaluate(policy, corpus, "validation")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for step in range(8):
        loss, _ = workload.loss(policy, workload.batch(corpus, ShardId(0), step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = workload.evaluate(policy, corpus, "validation")
    assert after["loss"] < before["loss"]
    assert after["margin"] > before["margin"] or name == "discopop"  # whose loss falls both ways near 0


def test_parts_of_a_batch_are_joined_by_pairs(tmp_path: Path, model: str) -> None:
    """As an island does it: losses of parts weighed by their pairs are that of the whole, however long they are."""
    workload = Preference(model=model)
    corpus = workload.corpus(pairs(tmp_path), seed=0, shards=1)
    other, batch = LanguageModel.named("micro", trust_remote_code=False).build(7), workload.batch(corpus, ShardId(0), 1)
    whole = workload.loss(other, batch)[0].item()
    shares = [workload.loss(other, part)[0].item() * workload.weight(part) / 4 for part in cut(batch, 2)]
    assert sum(shares) == pytest.approx(whole, rel=1e-5)


def test_a_run_is_the_same_from_a_resume_and_in_parts(tmp_path: Path, model: str) -> None:
    given: dict[str, Any] = {
        "workload": Preference(model=model, lora=LoRA(rank=2)), "islands": 2, "inner_steps": 2, "rounds": 2,
        "inner": AdamW(lr=3e-3), "outer": Sgd(lr=1.0), "data": pairs(tmp_path),
    }  # fmt: skip
    whole = launch(tmp_path / "whole", **given)
    again = launch(
        tmp_path / "again", **given, resume=str(launch(tmp_path / "half", **{**given, "rounds": 1}).directory)
    )
    assert whole.summary["status"] == again.summary["status"] == "finished"
    told = records(whole.directory, "evaluation")[-1]
    assert 0 <= told["eval/accuracy"] <= 1 and "eval/margin" in told
    parts = launch(tmp_path / "parts", **{**given, "data": pairs(tmp_path, accumulation=2)})
    assert parts.summary["val_loss"] == pytest.approx(whole.summary["val_loss"], rel=1e-4)
    assert len(set(map(str, digests(whole)))) >= 1


def test_the_loss_by_hand(tmp_path: Path, model: str) -> None:
    """With sums over the completions of each text alone."""
    workload = Preference(model=model, settings={"beta": 0.5})
    corpus = workload.corpus(pairs(tmp_path), seed=0, shards=1)
    policy, start = (LanguageModel.named(name, trust_remote_code=False).build(5).eval() for name in ("micro", model))
    batch = workload.batch(corpus, ShardId(0), 0)

    def summed(model: Any, pair: int, side: int) -> torch.Tensor:
        ids, marks = batch["tokens"][pair, side], batch["targets"][pair, side]
        length = int(marks.nonzero().max()) + 1
        logps = model(input_ids=ids[None, :length]).logits[0].log_softmax(dim=-1)
        return torch.stack([logps[at - 1, ids[at]] for at in range(length) if marks[at]]).sum()

    with torch.no_grad():
        sums = {
            (name, side): torch.stack([summed(m, pair, index) for pair in range(4)])
            for name, m in (("policy", policy), ("reference", start))
            for index, side in enumerate(("chosen", "rejected"))
        }
        counted = torch.ones(4)
        expected = DPO(beta=0.5)(
            PairLogps(
                **{f"{name}_{side}": value for (name, side), value in sums.items()},
                chosen_tokens=counted,
                rejected_tokens=counted,
            )
        )
        assert workload.loss(policy, batch)[0].item() == pytest.approx(expected.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 2 has no rejected (it has: prompt, chosen): rows need chosen, rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 2: chosen and rejected are equal"),
        ({"chosen": "b", "rejected": "c"}, "row 2 has no prompt: give one"),
        ({"prompt": "a" * 90, "chosen": "b", "rejected": "c"}, "row 2: its prompt has 90 tokens"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "c"}, "must both be texts"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    if isinstance(row.get("chosen"), list):  # a column has one type: two files
        files = [write(tmp_path, some_pairs(1), "first.jsonl"), write(tmp_path, [row], "second.jsonl")]
        given = pairs(tmp_path, files=files)
        told = told.replace("row 2", "row 1")
    else:
        given = pairs(tmp_path, [some_pairs(1)[0], row])
    with pytest.raises(ValueError, match=r".") as error:
        Preference().corpus(given, seed=0, shards=1)
    assert told in str(error.value)


def test_other_mistakes(tmp_path: Path) -> None:
    for settings, told in (
        ({"objective": "dop"}, r"workload\.objective=dop is unknown: choose dpo, ipo"),
        ({"settings": {"bata": 1.0}}, r"has bata, which workload\.objective=dpo has not: it has beta"),
        ({"settings": {"beta": -1.0}}, r"beta=-1\.0 must be a positive number"),
        ({"reference": Reference.adapter_off}, "needs adapters"),
        ({"reference": Reference.kept}, "whose weights are new in each run"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            Preference(**settings)
    for given in ({"data": pairs(tmp_path, accumulation=2)}, {"workers": 2}):
        with pytest.raises(ValueError, match=r"all pairs of a batch together: use workers=1 and data\.accumulation=1"):
            RunConfig(workload=Preference(objective="aot"), **given)  # type: ignore[arg-type]
