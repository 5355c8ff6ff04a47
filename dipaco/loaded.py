"""A routed model that was exported: a text goes through one path, or every so many tokens through another.

Only the weights of paths that a text goes through are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diloco import pretrained
from diloco.workloads.language import without_progress_bars
from diloco.workloads.sampling import continuation, seeded, text_after
from dipaco.routing import Routing
from dipaco.saved import Integers
from dipaco.token_router import FOLDER, TokenRouter

NEW_TOKENS = 80


def load(run: str | Path) -> Loaded:
    """The routed model that a run in this directory exported, or its folder `export`.

    Raises ValueError where there is no export with several paths and a router.
    """
    folder = Path(run)
    folder = folder / "export" if (folder / "export").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"{run} is not the directory of a run: there is no such folder")
    if not (folder / "paths.json").is_file():
        raise ValueError(f"{run} has no export of several paths: give a finished run with layout=paths")
    if not (folder / "router").is_dir():
        raise ValueError(f"{run}: its documents went to paths by workload.router=domains or iid, which no text has")
    paths = len(json.loads((folder / "paths.json").read_text())["paths"])
    return Loaded(folder, Routing.load(folder / "router"), paths=paths)


@final
class Loaded:
    """A router and the paths that it chooses from, read when they are first needed.

    With `every`, a path is chosen anew for every window of so many tokens, the first of which ends so many after the
    `prefix_tokens` that the router sees: its path is that of the whole text, and the token router that `diloco route`
    fitted chooses the others by what comes before them. A path reads the whole text so far.
    """

    def __init__(self, folder: Path, routing: Routing, *, paths: int) -> None:
        from transformers import AutoTokenizer

        self.paths = paths
        self._folder, self._routing = folder, routing
        self._tokenizer: Any = pretrained.load(AutoTokenizer, folder / "path0")
        self._models: dict[int, Any] = {}
        self._router: TokenRouter | None = None  # read when it is first needed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._folder)!r}, paths={self.paths})"

    def route(self, text: str) -> int:
        """The path that a text goes through, by its first tokens."""
        return self._first(self._ids(text))

    def generate(self, text: str, *, tokens: int = NEW_TOKENS, seed: int = 0, every: int | None = None) -> str:
        """`text` and up to so many tokens after it, sampled from the path that it goes through.

        `every`: from another path after so many tokens. Raises ValueError where that has no token router.
        """
        ids, end = self._ids(text), self._tokenizer.eos_token_id
        new: list[int] = []
        with seeded(seed, torch.device("cpu")):
            while len(new) < tokens:
                read = [*ids, *new]
                path, stop = (self._first(ids), tokens) if every is None else self._window(read, every)
                asked = min(tokens, stop if every is None else stop - len(ids)) - len(new)
                more = continuation(self._model(path), self._tokenizer, read, tokens=asked)
                new += more
                if len(more) < asked or more[-1] == end:
                    break
        return text + text_after(self._tokenizer, ids, new)

    def logprobs(self, text: str, *, every: int | None = None) -> Tensor:
        """float32[tokens - 1]: of each token of a text but the first, given those before, in nats.

        `every`: by another path after so many tokens. Raises ValueError where that has no token router, and for a text
        that is longer than the model.
        """
        ids = self._ids(text)
        most = self._model(self._first(ids)).config.max_position_embeddings
        if len(ids) > most:
            raise ValueError(f"the text has {len(ids)} tokens, and the model {most} positions: give a shorter one")
        path = self._by_token(ids, every)[1:]
        found = torch.empty(len(path))
        inputs = torch.tensor([ids])
        for index in np.unique(path).tolist():
            with torch.no_grad():
                logits = self._model(index)(inputs[:, :-1]).logits[0].float()
            own = torch.from_numpy(path == index)
            found[own] = functional.log_softmax(logits, dim=-1).gather(1, inputs[0, 1:, None])[own, 0]
        return found

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _first(self, ids: Sequence[int]) -> int:
        return int(self._routing.paths([np.asarray(ids, dtype=np.int64)])[0])

    def _window(self, ids: Sequence[int], every: int) -> tuple[int, int]:
        """The path that goes on after `ids`, and the position at which another one is chosen."""
        router, prefix = self._token_router(every), self._routing.prefix_tokens
        window = max(0, (len(ids) - prefix) // every)
        begin = prefix + window * every
        path = router.choice(np.array(ids[:begin], dtype=np.int64)) if window else self._first(ids)
        return path, begin + every

    def _by_token(self, ids: Sequence[int], every: int | None) -> Integers:
        """int64[tokens]: the path that predicts each."""
        path = np.full(len(ids), self._first(ids), dtype=np.int64)
        if every is not None:
            router, prefix = self._token_router(every), self._routing.prefix_tokens
            windows = (np.arange(len(ids)) - prefix) // every
            later = windows > 0
            path[later] = router.choices(np.array(ids, dtype=np.int64))[prefix + windows[later] * every]
        return path

    def _token_router(self, every: int) -> TokenRouter:
        if every < 1:
            raise ValueError(f"every={every}: a path is chosen for at least 1 token")
        if self._router is None:
            if not (self._folder / FOLDER).is_dir():
                raise ValueError(
                    f"{self._folder} has no token router to choose paths within a text: diloco route RUN fits one"
                )
            with torch.random.fork_rng(devices=[]):  # new layers draw numbers before they are filled
                self._router = TokenRouter.load(self._folder / FOLDER, paths=self.paths)
        return self._router

    def _model(self, path: int) -> Any:
        from transformers import AutoModelForCausalLM

        if path not in self._models:
            with without_progress_bars(), torch.random.fork_rng(devices=[]):
                model: Any = pretrained.load_model(AutoModelForCausalLM, self._folder / f"path{path}")
            self._models[path] = model.eval()
        return self._models[path]
