"""Words as labels: the loss that teaches features to say what a text says, without a text encoder.

Beside the losses of the model: a throw-away head reads features linearly and must tell which words belong to them,

    visual tokens and a feature map of a picture → words of its detailed caption   (task ``interleaved``)
    context tokens of a picture to be drawn      → words of the text before it     (task ``image_decoder``)

The released model starts from a visual tokenizer that was trained on captions (CLIP); the embedded one starts from
nothing, and next-token prediction alone teaches it slowly what a picture shows. Words as classes: Joulin et al. 2016
("Learning Visual Features from Large Weakly Supervised Data"), Huang et al. 2024 (SuperClass). Heads are not exported.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = 1024
"""Classes: words, neighbouring words and digits, hashed as in fastText (Bojanowski et al. 2017)."""
RARE = -5.0
"""Bias at the start: most classes are absent."""
QUERIES = 8
"""How many places of a map the head looks at."""


def classes(text: str) -> set[int]:
    """Classes of a text: its words, pairs of neighbours, and the digits of its numbers by their place.

    A number is more than the set of its digits, and each digit is seen far more often than each number.
    """
    words = re.findall(r"\w+", text.lower())
    found = words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
    for number in (word for word in words if word.isdigit()):
        found += [f"{digit}@{place}" for place, digit in enumerate(number)]
    return {zlib.crc32(name.encode()) % BUCKETS for name in found}


def labels(texts: Iterable[str]) -> Tensor:
    """bool ``[N, BUCKETS]``, one row per text; an empty text has no class."""
    rows = [classes(text) for text in texts]
    table = np.zeros((len(rows), BUCKETS), np.bool_)
    for row, found in enumerate(rows):
        table[row, sorted(found)] = True
    return torch.from_numpy(table)


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, γ = 2) per word that is there; logits and words ``[N, BUCKETS]``.

    What is told surely hardly counts, so that a number on a shirt, a few labels among a hundred, is not drowned by what
    was learnt long ago. Rows without a word do not count.
    """
    wanted = words.float()
    costs = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")
    unsure = -torch.expm1(-costs)  # 1 − the probability of the right answer
    return ((unsure.square() * costs).sum(1) * words.any(1)).sum() / wanted.sum().clamp(min=1)


def _classifier(width: int) -> nn.Linear:
    head = nn.Linear(width, BUCKETS)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, RARE)
    return head


class TokenWords(nn.Module):
    """Classes told from ``tokens`` tokens of width ``width``: a linear map of all of them."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.head = _classifier(tokens * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, K, d]`` → logits ``[N, BUCKETS]``."""
        logits: Tensor = self.head(F.layer_norm(tokens.float(), tokens.shape[-1:]).flatten(1))
        return logits


class MapWords(nn.Module):
    """Classes told from a feature map of ``width`` channels: a linear map of what some learnt queries attend to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES, width) * width**-0.5)
        self.head = _classifier(QUERIES * width)

    def forward(self, feature_map: Tensor) -> Tensor:
        """``[N, C, h, w]`` → logits ``[N, BUCKETS]``."""
        cells = F.layer_norm(feature_map.float().flatten(2).transpose(1, 2), feature_map.shape[1:2])  # (N, h·w, C)
        found = (self.queries @ cells.transpose(1, 2)).softmax(-1) @ cells  # (N, QUERIES, C)
        logits: Tensor = self.head(found.flatten(1))
        return logits
