"""Models and tokenizers from outside: their code is not run, their weights are safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diloco import RunConfig, pretrained, train
from diloco.data import Data
from diloco.runtime.local import Local
from diloco.workloads.causal_lm import CausalLM
from diloco.workloads.judges import RewardModelJudge
from experiments.cli import main

TINY = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
SIZES = {"intermediate_size": 8, "vocab_size": 300, "max_position_embeddings": 32}
CODE = "from pathlib import Path\nPath(r'{ran}').touch()\nfrom transformers import {base}\nclass Mine({base}): {body}\n"


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that the foreign code would make."""
    return tmp_path / "ran"


@pytest.fixture
def foreign(tmp_path: Path, ran: Path) -> Path:
    """A model that works with code of its own only."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps({**TINY, **SIZES, "model_type": "mine", "auto_map": auto_map}))
    (folder / "mine.py").write_text(CODE.format(ran=ran, base="LlamaConfig", body="model_type = 'mine'"))
    return folder


def test_foreign_code_is_not_run(foreign: Path, ran: Path, capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    with pytest.raises(pretrained.NeedsCode, match=r"which is not run: give a model that transformers has"):
        pretrained.load(AutoConfig, foreign)
    config = RunConfig(runtime=Local(), workload=CausalLM(model=str(foreign)), data=Data(tokenizer="bytes"))
    with pytest.raises(ValueError, match=r"workload\.model=.*unless you read it and set workload\.trust_remote"):
        train(config, runs / "1_run")
    assert main(["train", "runtime=local", f"workload.model={foreign}", "data.tokenizer=bytes"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: workload.model={foreign} comes with Python code") and "[y/N]" not in error
    assert not ran.exists() and not list(runs.iterdir())


def test_foreign_code_is_run_where_it_is_trusted(foreign: Path, ran: Path) -> None:
    assert pretrained.load(AutoConfig, foreign, trust_remote_code=True).model_type == "mine"
    assert ran.exists()


def test_a_foreign_tokenizer_is_not_run(tmp_path: Path, ran: Path, runs: Path) -> None:
    auto_map = {"AutoTokenizer": ["mine.Mine", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": auto_map}))
    (tmp_path / "mine.py").write_text(CODE.format(ran=ran, base="PreTrainedTokenizer", body="pass"))
    (tmp_path / "text.txt").write_text("\n\n".join(f"{number} words and more" * 90 for number in range(9)))
    data = Data(tokenizer=str(tmp_path), files=[str(tmp_path / "text.txt")], cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*trust_remote_code=true"):
        train(RunConfig(runtime=Local(), data=data), runs / "1_run")
    assert not ran.exists()


def test_a_model_that_transformers_has_needs_no_code(tmp_path: Path, ran: Path) -> None:
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **SIZES, "auto_map": auto_map}))
    (tmp_path / "mine.py").write_text(CODE.format(ran=ran, base="LlamaConfig", body="pass"))
    assert pretrained.load(AutoConfig, tmp_path).model_type == "llama"
    assert not ran.exists()


def test_pickled_weights_are_refused(tmp_path: Path, runs: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **SIZES}))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    workload, data = CausalLM(model=str(tmp_path)), Data(tokenizer="bytes", sequence_length=16)
    with pytest.raises(ValueError, match=r"workload\.model=.*no file named model\.safetensors"):
        workload.build_model(0)
    with pytest.raises(OSError, match="no file named"):
        RewardModelJudge(_reward_model(tmp_path))
    assert data.tokenizer == "bytes"


def _reward_model(folder: Path) -> Path:
    """The same as a reward model, with a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    from diloco.vocabulary import EOS, byte_tokenizer

    config = {**TINY, **SIZES, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=EOS).save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)
    return folder
