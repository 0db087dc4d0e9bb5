"""How likely a given continuation is: summed log-probabilities of token rows behind a prompt.

Place in the flow: `interleave.py` ranks the options of a question with `option_scores`, `rank.py` the candidates of a
picture with `row_scores`. The prompt runs once; all continuations of a chunk follow in one step over its KV cache.
A continuation counts its own tokens alone, not the end mark behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmi_engine.generate.text import Decoder, Prompt, _finite
from mmi_engine.model.interleaved import MMInterleaved


@torch.no_grad()
def option_scores(model: MMInterleaved, prompt: Prompt, options: Sequence[Sequence[int]]) -> list[float]:
    """Σ log p of each option behind one prompt.

    Args:
        model: the model.
        prompt: left-padded, every row the same item; its row count is the size of a chunk of options.
        options: token ids, none empty.

    Returns:
        one number per option, ≤ 0.
    """
    decoder = Decoder(model, prompt)
    first = torch.log_softmax(decoder.logits, dim=-1)
    rows, length = len(prompt.ids), max(map(len, options))
    scores: list[float] = []
    for start in range(0, len(options), rows):
        chunk = list(options[start : start + rows])
        count = len(chunk)
        chunk += [options[0]] * (rows - count)
        scores += _score(decoder, first, chunk, length)[:count]
    return scores


@torch.no_grad()
def row_scores(model: MMInterleaved, prompt: Prompt, continuations: Sequence[Sequence[int]]) -> list[float]:
    """Σ log p of a continuation per row of the prompt."""
    decoder = Decoder(model, prompt)
    first = torch.log_softmax(decoder.logits, dim=-1)
    return _score(decoder, first, continuations, max(map(len, continuations)))


def _score(decoder: Decoder, first: Tensor, rows: Sequence[Sequence[int]], length: int) -> list[float]:
    """Scores of one continuation per row; the cache is left as it was."""
    decoder.check()
    device = first.device
    ids = torch.zeros(len(rows), length, dtype=torch.long, device=device)
    counted = torch.zeros(len(rows), length, device=device)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(list(tokens), device=device)
        counted[row, : len(tokens)] = 1.0
    logs = first[:, None]
    if length > 1:
        logs = torch.cat([logs, torch.log_softmax(_extend(decoder, ids[:, :-1]), dim=-1)], dim=1)
    chosen = logs.gather(2, ids[..., None]).squeeze(2) * counted
    return [float(value) for value in chosen.sum(1)]


def _extend(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits ``[B, T, vocabulary]`` behind each of the ids ``[B, T]``; the cache is cut back afterwards."""
    steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)[None]
    mask = torch.cat([decoder.mask, decoder.mask.new_ones(ids.shape)], dim=1)
    language = decoder.model.language
    positions = decoder.position + steps
    hidden = language(language.embed(ids), mask, decoder.visual, position_ids=positions, cache=decoder.cache)
    decoder.cache.crop(-ids.shape[1])
    return _finite(decoder.model.text_head(hidden).float())
