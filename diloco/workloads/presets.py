"""Sizes of new models: the decoders of the DiLoCo and DiPaCo papers in Llama's form, and small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A decoder with SwiGLU, rotary positions and tied embeddings."""

    layers: int
    width: int
    heads: int
    head_size: int  # of keys and values
    vocab_size: int = 32_000
    max_positions: int = 4096  # rotary positions cost no memory

    def num_parameters(self) -> int:
        """How many, the embedding once."""
        attention, feed_forward = 4 * self.heads * self.head_size, 3 * self._feed_forward()
        return self.width * (self.vocab_size + self.layers * (attention + feed_forward + 2) + 1)

    def _feed_forward(self) -> int:
        return round(self.width / 3) * 8  # 8/3 of the width, in multiples of 8

    def llama_settings(self) -> dict[str, Any]:
        """Keyword arguments of transformers.LlamaConfig."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self._feed_forward(),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
            "use_cache": False,
            # The tokenizer's own, not Llama's, are set on export.
            "bos_token_id": None,
            "eos_token_id": None,
        }


# Widths, depths and heads: arXiv:2311.08105, Table 1 (60m to 400m) and arXiv:2403.10616 (1.3b).
PRESETS = {
    "micro": Preset(layers=3, width=64, heads=4, head_size=16, vocab_size=257),  # 0.16 M: bytes and end-of-text
    "deep": Preset(layers=8, width=64, heads=4, head_size=16, vocab_size=257),  # 0.4 M, to be cut into levels
    "tiny": Preset(layers=4, width=128, heads=4, head_size=32, vocab_size=4096),  # 1.3 M
    "10m": Preset(layers=12, width=256, heads=8, head_size=32, vocab_size=4096),  # 10.5 M
    "60m": Preset(layers=3, width=896, heads=16, head_size=64),
    "150m": Preset(layers=12, width=896, heads=16, head_size=64),
    "400m": Preset(layers=12, width=1536, heads=12, head_size=128),
    "1.3b": Preset(layers=24, width=2048, heads=16, head_size=128),
}
