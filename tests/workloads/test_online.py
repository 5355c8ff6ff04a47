"""online: what is sampled and when, averages that survive, plain training as a special case, judges that fail."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco import RunConfig
from diloco.checkpoint import Checkpoint
from diloco.codec import Float32
from diloco.data import Data
from diloco.inner import AdamW, RateSchedule
from diloco.island import Island
from diloco.layout import Whole
from diloco.merge import Slerp
from diloco.messages import IslandId, ShardId, SourceId, State, Task
from diloco.outer import Sgd
from diloco.replica import ReplicaKind, Single
from diloco.workloads.anchor import EmaAnchor
from diloco.workloads.judges import Answer, check, named, rewards
from diloco.workloads.language import LanguageModel
from diloco.workloads.lora import LoRA
from diloco.workloads.online import Anchor, Online, Update
from tests.toy import digests, launch, records
from tests.workloads.test_sft import TEMPLATE, data

LETTERS = frozenset(b"etaoinshrdlu")
answered: list[int] = []  # how many answers the judge below was given, call by call


def common_letters(answers: Sequence[Answer]) -> list[float]:
    """The share of the most frequent letters of English: a judge that a few steps can please."""
    answered.append(len(answers))
    return [sum(ord(c) in LETTERS for c in a.completion) / max(1, len(a.completion)) for a in answers]


def broken(answers: Sequence[Answer]) -> list[float]:
    """One reward too few where there are many answers; with more still, none at all."""
    found = common_letters(answers)
    if len(answers) > 16:
        raise OSError("no connection")
    return found if len(answers) < 16 else found[1:]


def half_nan(answers: Sequence[Answer]) -> list[float]:
    """No number for every other answer, but not while it is tried."""
    found = common_letters(answers)
    return found if len(answers) <= 2 else [math.nan if i % 2 else value for i, value in enumerate(found)]


def always_nan(answers: Sequence[Answer]) -> list[float]:
    """No number at all."""
    return [math.nan for _ in answers]


def refuses(answers: Sequence[Answer]) -> list[float]:
    """Has an error of its own."""
    raise ValueError("mine")


def fails(answers: Sequence[Answer]) -> list[float]:
    """Is written for something else."""
    return [answers["completion"] for _ in answers]  # type: ignore[call-overload]


HERE = __name__


@pytest.fixture(autouse=True)
def this_module() -> Any:
    """Importable by the name that a judge has in a configuration."""
    sys.modules[HERE] = sys.modules.get(HERE) or sys.modules[__name__]
    answered.clear()
    yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LanguageModel.named("micro", trust_remote_code=False).build(3).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def prompts(folder: Path, **settings: Any) -> Data:
    return data(folder, [{"prompt": f"{i} and {i} is ", "sum": 2 * i} for i in range(24)], **settings)


def online(model: str, /, **settings: Any) -> Online:
    return Online(**{"model": model, "judge": f"{HERE}:common_letters", "completion_tokens": 8, **settings})


def a_step(workload: Online, policy: Any, corpus: Any, step: int, rate: float = 0.0) -> dict[str, float]:
    """Of plain gradient descent."""
    workload.begin_step(policy, installed=False)
    loss, metrics = workload.loss(policy, workload.batch(corpus, ShardId(0), step))
    policy.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for value in policy.parameters():
            if value.grad is not None:
                value -= rate * value.grad
    return metrics


def test_before_training_nothing_has_moved(tmp_path: Path, model: str) -> None:
    workload = online(model)
    corpus = workload.corpus(prompts(tmp_path), seed=0, shards=1)
    found = workload.evaluate(workload.build_model(0), corpus, "validation")
    assert found["kl"] == 0 and found["loss"] == -found["reward"] and found["refused"] == 0
    assert 0 < found["length"] <= 8 and 0 < found["diversity"] <= 1
    assert not workload.has_perplexity()


@pytest.mark.parametrize(
    ("update", "anchor", "lora"),
    [
        pytest.param(update, anchor, LoRA(rank=4) if (i + j) % 2 else LoRA(), id=f"{update.value}-{anchor.value}")
        for i, update in enumerate(Update)
        for j, anchor in enumerate(Anchor)
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_update_earns_more(tmp_path: Path, model: str, update: Update, anchor: Anchor, lora: LoRA) -> None:
    workload = online(model, update=update, anchor=anchor, lora=lora, completion_tokens=12, beta=0.01, gamma=0.0)
    corpus = workload.corpus(prompts(tmp_path, batch=16), seed=0, shards=1)
    policy = workload.build_model(0)
    before = workload.evaluate(policy, corpus, "validation")
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=2e-2 if lora.rank else 3e-3)
    for step in range(12):
        workload.begin_step(policy, installed=step == 0)
        loss, metrics = workload.loss(policy, workload.batch(corpus, ShardId(0), step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = workload.evaluate(policy, corpus, "validation")
    assert after["reward"] > before["reward"] and after["kl"] > 0
    assert metrics["refused"] == 0 and set(metrics) == {"reward", "length", "anchor_kl", "ties", "refused"}


def test_what_is_sampled_depends_on_seed_prompt_and_step_alone(tmp_path: Path, model: str) -> None:
    """Not on how many islands share the prompts, nor on what is asked beside."""
    workload = online(model)
    policy = workload.build_model(0)
    found = []
    for shards in (1, 3):
        corpus = workload.corpus(prompts(tmp_path), seed=5, shards=shards)
        rows = workload.batch(corpus, ShardId(0), 2)["rows"].tolist()
        found.append([workload._written(policy, [row], [2], range(2)).completions[0] for row in (3, 11)])
        beside = workload._written(policy, [3, *rows, 11], [2] * (2 + len(rows)), range(2)).completions
        assert [beside[0], beside[-1]] == found[-1]
    assert found[0] == found[1]
    assert workload._written(policy, [3], [4], range(2)).completions[0] != found[0][0]
    other = workload.corpus(prompts(tmp_path), seed=6, shards=1)
    workload.batch(other, ShardId(0), 0)
    assert workload._written(policy, [3], [2], range(2)).completions[0] != found[0][0]


def test_a_step_by_hand(tmp_path: Path, model: str) -> None:
    """REINFORCE, text by text, without filling: the loss is -(r - other r) log pi(y) / 2, with beta = 0."""
    workload = online(model, update=Update.reinforce, beta=0.0)
    corpus = workload.corpus(prompts(tmp_path, batch=2), seed=0, shards=1)
    policy = workload.build_model(0)
    batch = workload.batch(corpus, ShardId(0), 0)
    loss, _ = workload.loss(policy, batch)
    rollouts = workload._written(policy, batch["rows"].tolist(), [0, 0], range(2))
    terms = []
    for prompt, texts, answers in zip(rollouts.prompts, rollouts.completions, rollouts.answers, strict=True):
        given = common_letters(answers)
        for own, other, text in ((0, 1, texts[0]), (1, 0, texts[1])):
            ids = torch.tensor([[*prompt, *text]])
            told = torch.log_softmax(policy(ids).logits[0, len(prompt) - 1 : -1], dim=-1)
            logp = told.gather(1, torch.tensor(text)[:, None]).sum()
            terms.append(-(given[own] - given[other]) * logp.item() / 2)
    assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-4)


# --- the average ---


def test_the_average_in_closed_form() -> None:
    """theta_t = t: a_t = t - (1 - mu)(1 - (1 - mu)^t) / mu."""
    policy, anchor = torch.nn.Linear(1, 1, bias=False), EmaAnchor(0.1)
    for step in range(21):
        with torch.no_grad():
            policy.weight.fill_(step)
        anchor.follow(policy, anew=False)
    expected = 20 - 0.9 * (1 - 0.9**20) / 0.1
    assert anchor.state()["weight"].item() == pytest.approx(expected, rel=1e-5)
    anchor.follow(policy, anew=True)
    assert anchor.state()["weight"].item() == 20


def island(workload: Online, corpus: Any) -> Island:
    made = Island(
        workload=workload, corpus=corpus, inner=AdamW(lr=3e-3, rate=RateSchedule.constant), codec=Float32(),
        codec_down=Float32(), replica=Single(workload.build_model(0)), accumulation=1, seed=5, total_steps=40,
    )  # fmt: skip
    made.setup(Whole().build(made.shapes(), 1))
    return made


def steps(made: Island, *, source: int, first: int, count: int) -> None:
    path = dict(Whole().build(made.shapes(), 1).paths[0])
    given: Any = {
        "source": SourceId(source), "island": IslandId(0), "round": 0, "segment": 0, "modules": path, "install": {},
        "keep": 0.0, "first_step": first, "steps": count, "shard": ShardId(0), "send": (), "last": False,
    }  # fmt: skip
    made.train(Task(**given), [])


def test_the_average_goes_with_a_source_to_another_island(tmp_path: Path, model: str) -> None:
    """One that has trained another source meanwhile; and a source that begins there anew has none."""
    workload = online(model, anchor=Anchor.ema, anchor_rate=0.3, update=Update.reinforce)
    corpus = workload.corpus(prompts(tmp_path), seed=0, shards=1)
    stays, other = island(copy.deepcopy(workload), corpus), island(copy.deepcopy(workload), corpus)
    steps(stays, source=0, first=0, count=3)
    moved = stays.export(SourceId(0))
    assert any(name.startswith("workload/") for name in moved.tensors)
    steps(other, source=1, first=0, count=2)
    other.load(SourceId(0), moved)
    for made in (stays, other):
        steps(made, source=0, first=3, count=3)
    mine, theirs = stays.export(SourceId(0)).tensors, other.export(SourceId(0)).tensors
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    local = {name.removeprefix("local/"): value for name, value in mine.items() if name.startswith("local/")}
    assert any(not torch.equal(value, mine[f"workload/{name}"]) for name, value in local.items())
    steps(other, source=2, first=0, count=1)
    fresh = other.export(SourceId(2)).tensors
    assert not any(torch.equal(value, mine[name]) for name, value in fresh.items() if name.startswith("workload/"))


@pytest.mark.parametrize("anchor", [Anchor.ema, Anchor.round_ema])
def test_resumed_is_as_never_stopped(tmp_path: Path, model: str, anchor: Anchor) -> None:
    given: dict[str, Any] = {
        "workload": online(model, anchor=anchor, anchor_rate=0.2, update=Update.reinforce), "islands": 2,
        "inner": AdamW(lr=3e-3, rate=RateSchedule.constant), "outer": Sgd(lr=0.7), "merge": Slerp(),
        "data": prompts(tmp_path), "inner_steps": 4,
    }  # fmt: skip
    whole = launch(tmp_path / "whole", **given, rounds=3)
    half = launch(tmp_path / "half", **given, rounds=1, checkpoint=Checkpoint(every=1))
    again = launch(tmp_path / "again", **given, rounds=3, resume=str(half.directory))
    assert digests(again) == digests(whole) and again.summary["status"] == "finished"
    assert again.summary["reward_before"] == whole.summary["reward_before"]
    assert again.summary["kl"] == whole.summary["kl"] > 0
    (sample,) = records(whole.directory, "sample")
    assert [set(row) for row in sample["table"]] == [{"prompt", "before", "after", "reward before", "reward after"}] * 3


def test_an_average_of_a_round_begins_anew_with_it(tmp_path: Path, model: str) -> None:
    """With rounds of one step it is the policy itself, which costs nothing: as beta = 0."""
    given: dict[str, Any] = {
        "inner": AdamW(lr=3e-3, rate=RateSchedule.constant), "outer": Sgd(lr=1.0), "data": prompts(tmp_path),
        "inner_steps": 1, "rounds": 4, "islands": 1,
    }  # fmt: skip
    held = launch(
        tmp_path / "held", workload=online(model, anchor=Anchor.round_ema, update=Update.reinforce, beta=5.0), **given
    )
    free = launch(tmp_path / "free", workload=online(model, update=Update.reinforce, beta=0.0), **given)
    kept = launch(
        tmp_path / "kept", workload=online(model, anchor=Anchor.ema, update=Update.reinforce, beta=5.0), **given
    )
    assert digests(held)[0] == digests(free)[0] != digests(kept)[0]


def test_warp_with_one_policy_and_eta_1_is_plain_training(tmp_path: Path, model: str) -> None:
    """Slerp of one, outer SGD at 1: torch's own loop on the same samples, to 1e-6."""
    workload = online(model, anchor=Anchor.round_ema, update=Update.reinforce)
    run = launch(
        tmp_path / "run", workload=workload, islands=1, inner_steps=3, rounds=2, merge=Slerp(), outer=Sgd(lr=1.0),
        inner=AdamW(lr=1e-3, rate=RateSchedule.constant, warmup_steps=0, weight_decay=0.0, clip=0.0),
        data=prompts(tmp_path),
    )  # fmt: skip
    own = copy.deepcopy(workload)
    corpus = own.corpus(prompts(tmp_path), seed=0, shards=1)
    policy = own.build_model(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(6):
        own.begin_step(policy, installed=step % 3 == 0)
        loss, _ = own.loss(policy, own.batch(corpus, ShardId(0), step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    exported = LanguageModel.named(str(run.directory / "export"), trust_remote_code=False).build(0)
    theirs = dict(exported.named_parameters())
    worst = max(float((value - theirs[name]).detach().abs().max()) for name, value in policy.named_parameters())
    assert worst < 1e-6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_alone_travel_and_are_averaged(tmp_path: Path, model: str) -> None:
    workload = online(model, lora=LoRA(rank=2), anchor=Anchor.ema, update=Update.j_bond)
    run = launch(tmp_path / "run", workload=workload, islands=2, inner_steps=2, rounds=2, data=prompts(tmp_path))
    trainable = run.summary["trainable_parameters"]
    assert 0 < trainable < run.summary["parameters"] / 4
    assert 1 < run.summary["bytes_up"] / (4 * trainable * 2 * 2) < 1.2  # many small tensors, each with a name


# --- judges ---


def test_a_judge_sees_the_prompt_the_text_and_the_row(tmp_path: Path, model: str) -> None:
    seen: list[Answer] = []
    workload = online(model)
    corpus = workload.corpus(prompts(tmp_path), seed=0, shards=1)
    workload.__dict__["_judged_by"] = lambda answers: seen.extend(answers) or [0.0] * len(answers)
    workload.loss(workload.build_model(0), workload.batch(corpus, ShardId(0), 0))
    assert len(seen) == 8
    for answer in seen:
        number = int(answer.prompt.split()[0])
        assert answer.prompt == f"{number} and {number} is " and answer.row["sum"] == 2 * number


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("nonsense", "workload.judge=nonsense is unknown: give sentiment, brevity"),
        ("no.such:judge", r"cannot be imported \(No module named 'no'\)"),
        ("math:pi", "math has no function pi"),
        ("math:nothere", "math has no function nothere"),
        ("", "workload.judge= is unknown"),
        ("/nowhere", "there is no such folder"),
        (f"{HERE}:refuses", r"fails \(ValueError: mine\)"),
        ("math:floor", r"fails \(TypeError.*it is called with a list of Answer"),
        (f"{HERE}:always_nan", "gives nan: rewards must be finite numbers"),
        (f"{HERE}:fails", r"fails \(TypeError"),
        ("builtins:list", r"fails \(TypeError"),
    ],
)
def test_a_judge_that_cannot_be_used_is_refused_before_training(
    tmp_path: Path, model: str, judge: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        launch(tmp_path / "run", workload=online(model, judge=judge), data=prompts(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_judge_with_another_count_is_refused() -> None:
    with pytest.raises(ValueError, match="gives 1 rewards for 2 answers: it must give one each"):
        check("mine", lambda answers: [1.0], [Answer(prompt="", completion="")] * 2)
    assert all(math.isnan(value) for value in rewards(lambda answers: [1.0], [Answer(prompt="", completion="")] * 2))


def test_in_the_middle_of_a_run_what_a_judge_spoils_is_counted(tmp_path: Path, model: str) -> None:
    """And nothing is learned from it, but from the rest."""
    given: dict[str, Any] = {"data": prompts(tmp_path), "islands": 1, "inner_steps": 2, "rounds": 1}
    told = {}
    for judge, completions in (("broken", 4), ("broken", 5), ("half_nan", 4)):
        workload = online(model, judge=f"{HERE}:{judge}", update=Update.reinforce, completions=completions)
        run = launch(tmp_path / f"{judge}{completions}", workload=workload, **given)
        told[judge, completions] = records(run.directory, "segment")[-1]
        assert run.summary["status"] == "finished" and run.summary["reward_after"] is not None
    for completions in (4, 5):
        assert told["broken", completions]["inner/refused"] == 1.0 and told["broken", completions]["inner/loss"] == 0
    assert told["half_nan", 4]["inner/refused"] == 0.5 and told["half_nan", 4]["inner/grad_norm"] > 0


def test_a_judge_of_which_nothing_can_be_learned_ends_the_run(tmp_path: Path, model: str) -> None:
    """It refuses all held-out answers: the run would go on for nothing."""
    workload = online(model)
    corpus = workload.corpus(prompts(tmp_path), seed=0, shards=1)
    workload.__dict__["_judged_by"] = always_nan
    with pytest.raises(ValueError, match="common_letters gives nan: rewards must be finite numbers"):
        workload.evaluate(workload.build_model(0), corpus, "validation")


def test_names_of_judges() -> None:
    answers = [Answer(prompt="", completion=text) for text in ("This is wonderful, thank you!", "It is awful.", "")]
    good, bad, nothing = named("sentiment")(answers)
    assert good > 0.5 > -0.3 > bad and nothing == 0  # vaderSentiment's own numbers: .8122, -.4588
    assert named("brevity")(answers) == pytest.approx([1 - 0.29, 1 - 0.12, 1.0])


def test_reasoning_gym_scores_by_the_generator_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which compiles C code where it is installed."""
    package = types.ModuleType("reasoning_gym")
    vars(package)["get_score_answer_fn"] = lambda name: lambda answer, entry: float(answer == entry["answer"] + name)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    entry = '{"answer": "6", "metadata": {"source_dataset": "!"}}'
    told = [Answer(prompt="3 + 3", completion=text, row={"entry": entry}) for text in (" 6!", "7")]
    assert named("reasoning_gym")(told) == [1.0, 0.0]
    with pytest.raises(ValueError, match="needs rows with prompt and entry"):
        named("reasoning_gym")([Answer(prompt="", completion="")])


def test_a_reward_model_with_another_chat_template_is_refused(tmp_path: Path) -> None:
    from diloco.vocabulary import byte_tokenizer
    from diloco.workloads.reward_model import RewardModel

    folders = []
    for number, template in enumerate((TEMPLATE, TEMPLATE.replace("<|", "["))):
        folder = tmp_path / str(number)
        RewardModel(model="micro").build_model(0).save_pretrained(folder)  # type: ignore[operator]
        if number == 0:
            LanguageModel.named("micro", trust_remote_code=False).build(0).save_pretrained(folder)  # type: ignore[operator]
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        wrapper = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**wrapper, "chat_template": template}))
        folders.append(str(folder))
    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(12)]
    workload = Online(model=folders[0], judge=folders[1], completion_tokens=4)
    with pytest.raises(ValueError, match="has another chat template than workload.model"):
        workload.corpus(data(tmp_path, rows, tokenizer=""), seed=0, shards=1)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model": "micro"}, "has new weights in each run"),
        ({"completions": 1}, "workload.completions=1: at least 2"),
        ({"completion_tokens": 0}, "workload.completion_tokens=0"),
        ({"anchor_rate": 1.5}, "workload.anchor_rate=1.5: it must be between 0 and 1"),
        ({"beta": -1.0}, "workload.beta=-1.0"),
        ({"temperature": 0.0}, "workload.temperature=0.0"),
        ({"objective": "ppo"}, "workload.objective=ppo is unknown"),
        ({"settings": {"tau": 1}}, "workload.settings has tau"),
    ],
)
def test_mistakes(model: str, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        online(model, **settings)


def test_a_model_that_is_spread_over_workers_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match="replica=fsdp2: workload=online samples from the model.*use ddp"):
        RunConfig(workload=online(model), replica=ReplicaKind.fsdp2, workers=2)


def test_objectives_on_whole_batches_are_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="looks at all pairs of a batch together, and ties are left out"):
        online(model, objective="aot").corpus(prompts(tmp_path), seed=0, shards=1)


def test_state_of_a_workload_without_an_average_is_empty(model: str) -> None:
    workload = online(model)
    assert workload.state() == State()
    workload.load_state(State())
