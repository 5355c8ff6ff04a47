"""Completions: drawn from the model's own probabilities, and the same beside whatever others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from diloco.vocabulary import byte_tokenizer
from diloco.workloads.generation import completions, key_of
from diloco.workloads.language import LanguageModel

EOS = 256
PROMPTS = [[72, 101], [72, 101, 108, 108, 111, 32], [65]]


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel.named("micro", trust_remote_code=False).build(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(file))
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_file=str(file), eos_token="<|endoftext|>")


def test_a_completion_depends_on_its_own_prompt_and_key_alone(model: Any, tokenizer: Any) -> None:
    keys = [key_of(0, row, 7) for row in range(3)]
    together = completions(model, tokenizer, PROMPTS, keys, tokens=12, temperature=1.0)
    backwards = completions(model, tokenizer, PROMPTS[::-1], keys[::-1], tokens=12, temperature=1.0)
    alone = [
        completions(model, tokenizer, [prompt], [key], tokens=12, temperature=1.0)[0]
        for prompt, key in zip(PROMPTS, keys, strict=True)
    ]
    assert together == backwards[::-1] == alone
    other = completions(model, tokenizer, PROMPTS, [key_of(0, row, 8) for row in range(3)], tokens=12, temperature=1.0)
    assert all(a != b for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_as_often_as_the_model_says(model: Any, tokenizer: Any, temperature: float) -> None:
    """Chi-square of 4,000 first tokens against softmax, rare ones taken together."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
        logits *= 8  # a new model says everything with the same probability
    model_ = _Sharper(model)
    count = 4_000
    keys = [key_of("draw", i) for i in range(count)]
    drawn = completions(model_, tokenizer, [PROMPTS[0]] * count, keys, tokens=1, temperature=temperature)
    expected = torch.softmax(logits / temperature, dim=0) * count
    found = torch.bincount(torch.tensor([text[0] for text in drawn]), minlength=len(expected)).double()
    rare = expected < 8
    observed = [*found[~rare].tolist(), found[rare].sum().item()]
    wanted = [*expected[~rare].tolist(), expected[rare].sum().item()]
    assert chisquare(observed, wanted).pvalue > 1e-3
    assert len(observed) > 20


class _Sharper(torch.nn.Module):
    """The model with eight times its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def generate(self, inputs: torch.Tensor, *, logits_processor: Any, **more: Any) -> Any:
        before = logits_processor[0]
        logits_processor[0] = lambda ids, scores: before(ids, scores * 8)
        return self.model.generate(inputs, logits_processor=logits_processor, **more)


def test_a_completion_ends_with_end_of_text(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        keys = [key_of("end", i) for i in range(64)]
        texts = completions(model, tokenizer, [PROMPTS[0]] * 64, keys, tokens=40, temperature=1.0)
    ended = [text for text in texts if EOS in text]
    assert ended and all(text.index(EOS) == len(text) - 1 for text in ended)
    assert all(len(text) == 40 for text in texts if EOS not in text)
    assert model.training  # as it was
