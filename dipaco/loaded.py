"""A routed model that was exported: a text goes through one path, whose weights alone are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diloco.workloads.causal_lm import SAMPLE_TEMPERATURE, SAMPLE_TOP_K
from dipaco.routing import Routing

NEW_TOKENS = 80


def load(run: str | Path) -> Loaded:
    """The routed model that a run in this directory exported, or its folder `export`.

    Raises ValueError where there is no export with several paths and a router.
    """
    folder = Path(run)
    folder = folder / "export" if (folder / "export").is_dir() else folder
    if not (folder / "paths.json").is_file():
        raise ValueError(f"{run} has no export of several paths: give a finished run with layout=paths")
    if not (folder / "router").is_dir():
        raise ValueError(f"{run}: its documents went to paths by workload.router=domains or iid, which no text has")
    paths = len(json.loads((folder / "paths.json").read_text())["paths"])
    return Loaded(folder, Routing.load(folder / "router"), paths=paths)


@final
class Loaded:
    """A router and the paths that it chooses from, read when they are first needed."""

    def __init__(self, folder: Path, routing: Routing, *, paths: int) -> None:
        from transformers import AutoTokenizer

        self.paths = paths
        self._folder, self._routing = folder, routing
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder / "path0")
        self._models: dict[int, Any] = {}

    def route(self, text: str) -> int:
        """The path that a text goes through, by its first tokens."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(self._routing.paths([np.asarray(ids, dtype=np.int64)])[0])

    def generate(self, text: str, *, tokens: int = NEW_TOKENS, seed: int = 0) -> str:
        """`text` and up to so many tokens after it, sampled from the path that it goes through."""
        model = self._model(self.route(text))
        end = self._tokenizer.eos_token_id
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] or [end]
        ids = ids[-(model.config.max_position_embeddings - tokens) :]
        inputs = torch.tensor([ids])  # int64[1, prompt]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            outputs = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=SAMPLE_TEMPERATURE,
                top_k=SAMPLE_TOP_K,
                pad_token_id=end,
            )
        return text + str(self._tokenizer.decode(outputs[0, len(ids) :], skip_special_tokens=True))

    def logprobs(self, text: str) -> Tensor:
        """float32[tokens - 1]: of each token of a text but the first, given those before, in nats."""
        model = self._model(self.route(text))
        ids = torch.tensor([self._tokenizer(text, add_special_tokens=False)["input_ids"]])
        if ids.shape[1] > model.config.max_position_embeddings:
            most = model.config.max_position_embeddings
            raise ValueError(f"the text has {ids.shape[1]} tokens, and the model {most} positions: give a shorter one")
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0].float()
        return functional.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]

    def _model(self, path: int) -> Any:
        from transformers import AutoModelForCausalLM

        if path not in self._models:
            model: Any = AutoModelForCausalLM.from_pretrained(self._folder / f"path{path}")
            self._models[path] = model.eval()
        return self._models[path]
