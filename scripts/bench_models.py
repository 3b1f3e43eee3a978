"""For `bench.py --models`: language models of transformers with random weights, rewritten whole, beside the package's own
attention: eager, sdpa and flex_attention.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from bench_zoo import DTYPES, Row, peak_mib, timed
from torch import Tensor, nn

from rewriter import rewrite
from rewriter.check.numerics import relative_error

LENGTH = 4096
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2 * LENGTH,
}
DRY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 1024}),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 128},
    ),
    "diffllama": ("DiffLlamaConfig", {}),
}
PEERS = ("sdpa", "flex_attention")


class Task(NamedTuple):
    """One row of the table."""

    name: str
    dtype: str
    seconds: float
    dry: bool


class Case:
    """A model by its configuration, and the tokens it reads. A batch of one: prefill."""

    def __init__(self, task: Task):
        import transformers

        kind, own = MODELS[task.name]
        sizes = SIZES | own | ({**DRY, "vocab_size": 128} if task.dry else {})
        self.config = getattr(transformers, kind)(**sizes)
        self.device, self.dtype = "cpu" if task.dry else "cuda", DTYPES[task.dtype]
        torch.manual_seed(0)
        self.tokens = torch.randint(0, self.config.vocab_size, (1, 64 if task.dry else LENGTH), device=self.device)
        self.eager = self.model("eager")

    def model(self, attention: str, dtype: torch.dtype | None = None) -> nn.Module:
        """The same weights whatever the attention."""
        import transformers

        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(self.config, attn_implementation=attention)
        model = model.to(self.dtype).to(dtype or self.dtype)  # the exact one has the rounded weights, too
        return model.eval().requires_grad_(False).to(self.device)

    def logits(self, model: nn.Module) -> Tensor:
        return model(self.tokens, use_cache=False).logits

    def measured(self, name: str, model: nn.Module, exact: Tensor) -> dict[str, Any]:
        out = {f"{name}_error": relative_error(self.logits(model), exact)}
        out[f"{name}_mib"] = peak_mib(lambda: self.logits(model), self.device)
        return out | {f"{name}_ms": timed(lambda: self.logits(model), self.device)}


def measured(task: Task) -> Row:
    """Everything about one row. Never raises."""
    row = Row()
    with torch.no_grad(), row.step("model"):
        case = Case(task)
        exact = case.logits(case.model("eager", torch.float32))
        row |= case.measured("eager", case.eager, exact)
        with row.step("rewritten"):
            start = time.perf_counter()
            result = rewrite(case.eager, (case.tokens,), {"use_cache": False})
            row["seconds"] = time.perf_counter() - start
            chains = result.report["chains"]
            row["hosts"] = " ".join(sorted({c["host"] for c in chains}))
            row["kernels"] = len({k for c in chains for k in c["kernels"]})
            row |= case.measured("rewritten", result.module, exact)
            row["ok"] = row["rewritten_error"] <= 2 * row["eager_error"]
        for peer in () if task.dry else PEERS:
            with row.step(peer):
                row |= case.measured(peer.partition("_")[0], case.model(peer), exact)
    return row


def shown(row: dict) -> str:
    parts = [
        f"{row['model']:10} {row.get('hosts', '-')} kernels {row.get('kernels', '-')} {row.get('seconds', 0):.0f} s"
    ]
    for name in ("rewritten", "eager", "sdpa", "flex"):
        if f"{name}_ms" in row:
            mib = row[f"{name}_mib"]
            memory = "" if mib is None else f" {mib:.0f} MiB"
            parts.append(f"{name} {row[f'{name}_ms']:.2f} ms{memory} error {row[f'{name}_error']:.1e}")
    return "; ".join((*parts, row.get("note", "")))
