"""A router that reads a text token by token, and tells at each which path will do best on what comes next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diloco import pretrained
from diloco.workloads.language import evaluating, without_progress_bars
from diloco.workloads.sampling import limits, seeded
from dipaco.features import Document
from dipaco.saved import Floats, Integers

FOLDER = "token_router"  # in an export, beside the document router
HEAD = "head.safetensors"
FORMAT = 1  # of saved token routers
CONTEXT = 512  # tokens that it reads at most before a choice, and half of it at least where there are so many
BATCH = 8  # documents in a step
CLIP = 1.0  # of the gradient's norm
UNLABELLED = -100  # what cross_entropy ignores


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a token router is trained. The paper's: no warmup, about 2,000 steps, a look-ahead of 1,024 tokens.

    Too little of it, and short windows do worse than one path a document: on four kinds of text, 300 steps on 233
    documents cost .005 nats every 64 tokens, 900 steps on 1,200 bring .011.
    """

    look_ahead: int = 64  # tokens over which a path is to do best, counted from the one after the last that was read
    steps: int = 600  # of AdamW, on BATCH documents each
    documents: int = 1000  # held out of training for it, and training documents where they are fewer; 0 = the former
    lr: float = 1e-3  # at the first step; it falls to 0 in a half cosine
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("look_ahead", 1), ("steps", 1), ("documents", 0)):
            if vars(self)[name] < least:
                option = name.replace("_", "-")
                raise ValueError(
                    f"{name}={vars(self)[name]} of the token router (--{option}): it must be at least {least}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A document to learn from, and how well every path does on its tokens."""

    tokens: Document  # integers[tokens]
    likelihoods: Floats  # float32[paths, tokens - first], in nats, of the tokens from `first` on
    first: int  # at least 1: a choice needs a token to look at


def best_paths(likelihoods: Floats, look_ahead: int) -> Integers:
    """int64[tokens]: at each token j the path p with the greatest sum over j ... j + look_ahead - 1 of `likelihoods`.

    S_p of arXiv:2403.10616, section 2.4.3. `likelihoods`: float32[paths, tokens]; the sums end with the tokens, and of
    equal paths the lower one is taken.
    """
    paths, tokens = likelihoods.shape
    sums = np.concatenate([np.zeros((paths, 1)), likelihoods.cumsum(axis=1, dtype=np.float64)], axis=1)
    ends = np.minimum(np.arange(tokens) + look_ahead, tokens)
    return np.asarray((sums[:, ends] - sums[:, :tokens]).argmax(axis=0), dtype=np.int64)


@final
class TokenRouter:
    """A language model's body with a linear layer from its last hidden states to paths (section 2.4.3)."""

    def __init__(self, body: nn.Module, head: nn.Linear, fitting: Fitting) -> None:
        """`body`: tokens -> hidden states, as AutoModel loads; ValueError where `head` takes others."""
        config: Any = body.config
        if head.in_features != config.hidden_size:
            raise ValueError(
                f"the token router's head takes hidden states of width {head.in_features}, and its model has "
                f"{config.hidden_size}: fit it anew (diloco route RUN --refit)"
            )
        self.fitting = fitting
        self._body, self._head = body.eval(), head
        self._context = min(CONTEXT, limits(config)[1] or CONTEXT)

    @classmethod
    def fit(cls, base: str | Path, documents: Sequence[Scored], fitting: Fitting) -> TokenRouter:
        """Fine-tune the model in the folder `base` to predict the best paths.

        A function of its arguments. Raises ValueError where there are no documents to learn from, or no model.
        """
        if not documents:
            raise ValueError("there are no documents that a token router could learn from")
        paths = len(documents[0].likelihoods)
        with seeded(fitting.seed, torch.device("cpu")):
            body = _load_body(str(base))
            head = nn.Linear(body.config.hidden_size, paths)
            router = cls(body, head, fitting)
            router._train(documents)
        return router

    @property
    def paths(self) -> int:
        """How many it chooses among."""
        return self._head.out_features

    def choices(self, tokens: Document) -> Integers:
        """int64[tokens + 1]: at i the path for what comes after the first i `tokens`; -1 at 0, where nothing was read.

        A choice depends on no later token: it is made by up to CONTEXT tokens before it, and by at least half as many
        where the text has them.
        """
        found = np.full(len(tokens) + 1, -1, dtype=np.int64)
        half = self._context // 2
        for start in range(0, self._last_part(len(tokens)) + 1, half):
            chosen = self._chosen(tokens[start : start + self._context])
            known = half if start else 0  # by the part before, which has read more
            found[start + known + 1 : start + len(chosen) + 1] = chosen[known:]
        return found

    def choice(self, tokens: Document) -> int:
        """The last of `choices`: the path for what comes after `tokens`, at least one."""
        return int(self._chosen(tokens[self._last_part(len(tokens)) :])[-1])

    def save(self, folder: Path) -> None:
        """Write everything into `folder`, for `load`: safetensors and JSON."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        body: Any = self._body
        with without_progress_bars():
            body.save_pretrained(folder)
        save_file({"weight": self._head.weight.detach(), "bias": self._head.bias.detach()}, folder / HEAD)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone
            weights.chmod((folder / "config.json").stat().st_mode)
        meta = {"paths": self.paths, "fitting": asdict(self.fitting), "format": FORMAT}
        (folder / "token_router.json").write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, paths: int) -> TokenRouter:
        """What `save` wrote. Raises ValueError where it is not there, damaged, or not for so many paths."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        remedy = "fit it anew (diloco route RUN --refit)"
        try:
            meta = json.loads((folder / "token_router.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / HEAD)
            weight, bias = arrays["weight"], arrays["bias"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no token router that can be read ({error}): {remedy}") from error
        if meta.get("format") != FORMAT:
            raise ValueError(f"{folder}: its token router has format {meta.get('format')}, not {FORMAT}: {remedy}")
        if weight.shape[0] != paths or bias.shape != (paths,):
            raise ValueError(f"{folder}: its token router is for {weight.shape[0]} paths, not {paths}: {remedy}")
        head = nn.Linear(weight.shape[1], paths)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        return cls(_load_body(str(folder)), head, Fitting(**meta["fitting"]))

    def _last_part(self, tokens: int) -> int:
        """Where the last part of so many tokens begins, of those that it reads one by one: each a half further."""
        half = self._context // 2
        return max(0, (tokens - half - 1) // half * half)

    def _chosen(self, tokens: Document) -> Integers:
        """int64[tokens]: the path after each of them, by those before it in this part of a text."""
        with evaluating(self._body):
            scores = self._scores(torch.from_numpy(tokens.astype(np.int64))[None])[0]
        return scores.argmax(dim=1).numpy().astype(np.int64)

    def _scores(self, ids: Tensor) -> Tensor:
        """float32[texts, tokens, paths]. `ids`: int64[texts, tokens]; what pads them must be on the right."""
        scores: Tensor = self._head(self._body(input_ids=ids, use_cache=False).last_hidden_state)
        return scores

    def _train(self, documents: Sequence[Scored]) -> None:
        labels = [best_paths(document.likelihoods, self.fitting.look_ahead) for document in documents]
        weights = [*self._body.parameters(), *self._head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=self.fitting.lr, weight_decay=0.1)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.fitting.steps)
        random = np.random.default_rng(self.fitting.seed)
        order: list[int] = []
        self._body.train()
        for _ in range(self.fitting.steps):
            if len(order) < BATCH:
                order += random.permutation(len(documents)).tolist()
            chosen, order = order[:BATCH], order[BATCH:]
            parts = [self._cut(documents[index], labels[index], random) for index in chosen]
            ids = nn.utils.rnn.pad_sequence([part[0] for part in parts], batch_first=True)
            wanted = nn.utils.rnn.pad_sequence([part[1] for part in parts], batch_first=True, padding_value=UNLABELLED)
            loss = functional.cross_entropy(self._scores(ids).transpose(1, 2), wanted, ignore_index=UNLABELLED)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            falling.step()
        self._body.eval()

    def _cut(self, document: Scored, labels: Integers, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """int64[tokens], twice: a part of a document that it can read at once, and the path after each token."""
        after = np.full(len(document.tokens), UNLABELLED, dtype=np.int64)
        after[document.first - 1 : document.first - 1 + len(labels)] = labels
        start = int(random.integers(max(0, len(after) - self._context) + 1))
        part = slice(start, start + self._context)
        return torch.from_numpy(document.tokens[part].astype(np.int64)), torch.from_numpy(after[part])


def _load_body(folder: str) -> Any:
    """The model in `folder` without the layer that predicts tokens: float32, on the CPU."""
    from transformers import AutoModel

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder}: there is no model in this folder that a token router could read with")
    with without_progress_bars():
        return pretrained.load_model(AutoModel, folder, settings={"dtype": torch.float32})
