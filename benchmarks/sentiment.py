"""Judging embeddings by a task: a logistic regression on sentiment over mean-pooled embeddings of a real encoder."""

from __future__ import annotations

import torch

from effc.compiler.source import SourceModel


def embed(source: SourceModel, texts: list[str], length: int) -> torch.Tensor:
    """Mean-pooled, normalised embeddings ``[texts, hidden]`` of at most ``length`` tokens of each text."""
    pooled = []
    with torch.inference_mode():
        for start in range(0, len(texts), 8):
            some = texts[start : start + 8]
            batch = source.processor(some, truncation=True, max_length=length, padding=True, return_tensors="pt")
            hidden = source.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            pooled.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


def fit_head(embeddings: torch.Tensor, positive: torch.Tensor) -> torch.nn.Linear:
    """L2-regularised logistic regression; ``positive`` is bool, ``[texts]``."""
    torch.manual_seed(0)
    head = torch.nn.Linear(embeddings.shape[1], 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(head(embeddings)[:, 0], positive.float())
        value = value + 1e-4 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def predict(head: torch.nn.Linear, embeddings: torch.Tensor) -> torch.Tensor:
    """Whether each text is taken for a positive one, bool ``[texts]``."""
    return head(embeddings)[:, 0] > 0


def accuracy(head: torch.nn.Linear, embeddings: torch.Tensor, positive: torch.Tensor) -> float:
    """Share of texts that the head gets right."""
    return float((predict(head, embeddings) == positive).float().mean())
