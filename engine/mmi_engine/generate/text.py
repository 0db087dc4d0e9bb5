"""Text generation: a left-padded interleaved prompt → new token ids, by greedy, nucleus or beam search.

The prompt runs through the language model once; then one token a step with the KV cache and the projected image
features of the prompt. A new token sees the images that the prompt's last token saw. Output ids begin with ``<s>`` and
end at ``</s>`` or ``<BoI>``, as in the released implementation (transformers 4.31 ``generate`` on embeddings), whose
scores are reproduced: the opening ``<s>`` counts for beam length and repetition penalty. It does not count for our
minimum length, as it does for the released ``min_length``.
Source: docs/model.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmi_engine.generate.fixed import FixedStep, fixed_step
from mmi_engine.generate.reading import Prompt, Reading, read
from mmi_engine.generate.reuse import Anew, Reuse, language_anew
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.step import token_step
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.language import VisualContext

NOT_FINITE = "the logits are not finite"
ASK_EVERY = 8
"""Steps after which a device is asked whether all rows have ended: each time it must finish what it was given."""


@dataclass
class TextOutput:
    """Ids per returned row (``<s>`` first, stop id included when one was produced); raw logits ``[B, vocabulary]`` of
    every step, where they were asked for."""

    ids: list[list[int]]
    step_logits: list[Tensor]


class Decoder:
    """Prompt state of one batch: KV cache, projected images, mask and positions; rows may be reordered.

    Args:
        model, prompt: read here unless ``reading`` is given.
        copies: beams of every row.
        reuse: see `generate_text`.
        rows: with recorded steps, the rows of their buffers where these are more than the decoder's own.
    """

    def __init__(
        self,
        model: MMInterleaved,
        prompt: Prompt,
        copies: int = 1,
        reuse: Reuse | None = None,
        reading: Reading | None = None,
        rows: int = 0,
    ) -> None:
        reading = reading or read(model, prompt)
        self.model, self.mask = model, reading.mask
        self.cache, visual = reading.cache, reading.visual
        self.graphs = model.graphs if reuse is None or reuse.values else None
        self.fixed: FixedStep | None = None  # where the state is once a step has been made, with graphs
        self.rows = rows
        self.lean = token_step(model, self.cache) if self.graphs is None else None
        self._sound: Tensor | None = None
        self.logits = self._checked(model.text_head(reading.hidden[:, -1]).float())
        self.position = reading.positions[:, -1:]
        self.visual = None
        if visual is not None:
            if reuse is not None and not reuse.values and prompt.visual is not None:
                visual = language_anew(model, visual, prompt.visual.features, prompt.counts)
            self.visual = replace(visual, visible=visual.visible[:, -1:])
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
            self._select(torch.arange(len(prompt.ids), device=prompt.ids.device).repeat_interleave(copies))

    def _select(self, rows: Tensor) -> None:
        self.logits, self.mask, self.position = self.logits[rows], self.mask[rows], self.position[rows]
        if self.visual is not None:
            seen = self.visual.visible.shape[-1] > 0
            values = self.visual.values
            if isinstance(values, Anew):
                values = values.select(rows)
            elif seen:
                values = [v[rows] for v in values]
            self.visual = VisualContext(values, self.visual.shapes, self.visual.visible[rows])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if self.fixed is not None:
            self.fixed.keep(rows)
            self.fixed.show(self)
            self.logits = self.logits[rows]
            return
        self.cache.batch_select_indices(rows)
        self._select(rows)

    def reorder(self, rows: Tensor) -> None:
        """Continue with these rows; beams of one item share its images, so those stay where they are."""
        if self.fixed is not None:
            self.fixed.reorder(rows)
        else:
            self.cache.reorder_cache(rows)

    def settle(self, *, copy: bool = False) -> None:
        """Bring the state back into cache, mask, position, visual: views until the buffers serve again, or copies."""
        if self.fixed is not None:
            self.fixed.show(self, copy=copy)
            self.fixed = None

    def step(self, ids: Tensor) -> Tensor:
        """Append one token per row ``[B]``; returns the next logits ``[B, vocabulary]`` in float32."""
        if self.graphs is not None:
            if self.fixed is not None and self.fixed.full:
                self.settle()
            if self.fixed is None:
                self.fixed = fixed_step(self, self.graphs, self.rows)
            self.logits = self._checked(self.fixed(ids))
            return self.logits
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        self.position = self.position + 1
        if self.lean is not None:
            logits = self.lean(ids, self.mask, self.position, self.cache, self.visual)
        else:
            language = self.model.language
            hidden = language(
                language.embed(ids[:, None]), self.mask, self.visual, position_ids=self.position, cache=self.cache
            )
            logits = self.model.text_head(hidden[:, -1]).float()
        self.logits = self._checked(logits)
        return self.logits

    def _checked(self, logits: Tensor) -> Tensor:
        """The logits; on a CPU `check` is made at once, on a device noted for later, which waits for nothing."""
        if logits.device.type == "cpu":
            return _finite(logits)
        sound = torch.isfinite(logits).all()
        self._sound = sound if self._sound is None else self._sound & sound
        return logits

    def check(self) -> None:
        """Raises FloatingPointError where logits so far were NaN or infinite."""
        if self._sound is not None and not bool(self._sound):
            raise FloatingPointError(NOT_FINITE)


def _finite(logits: Tensor) -> Tensor:
    """The logits themselves.

    Raises:
        FloatingPointError: one of them is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError(NOT_FINITE)
    return logits


@torch.no_grad()
def generate_text(
    model: MMInterleaved,
    prompt: Prompt,
    settings: Settings,
    *,
    generators: list[torch.Generator] | None = None,
    returned: int = 1,
    record_logits: bool = False,
    reuse: Reuse | None = None,
    reading: Reading | None = None,
) -> TextOutput:
    """Continue every prompt.

    Args:
        model: the model.
        prompt: left-padded rows.
        settings: text part of the run's settings.
        generators: one per row, for sampling (``temperature`` > 0).
        returned: beam hypotheses per row.
        record_logits: keep the raw logits of every step (greedy and sampling).
        reuse: what is computed once, everything by default.
        reading: what `read` made of the prompt, where that has been done.
    """
    if settings.beams > 1:
        return TextOutput(_beam_search(model, prompt, settings, returned, reuse, reading), [])
    tokens, batch = model.config.tokens, len(prompt.ids)
    decoder = Decoder(model, prompt, reuse=reuse, reading=reading)
    output = torch.full((batch, 1), tokens.bos, dtype=torch.long, device=prompt.ids.device)
    done = torch.zeros(batch, dtype=torch.bool, device=prompt.ids.device)
    recorded, logits = [], decoder.logits
    every = 1 if output.device.type == "cpu" or record_logits else ASK_EVERY
    for index in range(settings.max_new_tokens):
        if record_logits:
            recorded.append(logits)
        if settings.temperature > 0:
            decoder.check()
        scores = process(logits, output, settings, (tokens.eos, tokens.boi))
        chosen = sample(scores, settings, generators) if settings.temperature > 0 else scores.argmax(-1)
        chosen = chosen.masked_fill(done, tokens.pad)
        output = torch.cat([output, chosen[:, None]], dim=1)
        done |= (chosen == tokens.eos) | (chosen == tokens.boi)
        if index == settings.max_new_tokens - 1 or ((index + 1) % every == 0 and bool(done.all())):
            break
        logits = decoder.step(chosen)
    decoder.check()
    return TextOutput([cut(row, (tokens.eos, tokens.boi)) for row in output.tolist()], recorded)


def cut(row: list[int], stops: tuple[int, ...]) -> list[int]:
    """The row up to and including its first stop id."""
    for index, token in enumerate(row):
        if index and token in stops:
            return row[: index + 1]
    return row


def process(scores: Tensor, ids: Tensor, settings: Settings, stops: tuple[int, ...]) -> Tensor:
    """Repetition penalty on generated ids, then the minimum length; ``ids`` ``[B, n]`` with the opening ``<s>``."""
    if settings.repetition_penalty != 1.0:
        seen = scores.gather(1, ids)
        seen = torch.where(seen < 0, seen * settings.repetition_penalty, seen / settings.repetition_penalty)
        scores = scores.scatter(1, ids, seen)
    if ids.shape[1] - 1 < settings.min_new_tokens:
        scores = scores.clone()
        scores[:, list(stops)] = -torch.inf
    return scores


def sample(scores: Tensor, settings: Settings, generators: list[torch.Generator] | None) -> Tensor:
    """Nucleus sampling; each row draws from its own generator, so neighbours do not matter."""
    probabilities = torch.softmax(scores / settings.temperature, dim=-1)
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= settings.top_p, 0.0)  # the most likely token always stays
    drawn = [
        torch.multinomial(row.cpu(), 1, generator=generators[i] if generators else None)
        for i, row in enumerate(ordered)
    ]
    return index.gather(1, torch.stack(drawn).to(index.device)).squeeze(1)


@dataclass
class _Hypotheses:
    """Finished beams of one row, best ``size`` kept: (normalised score, ids with their stop id)."""

    size: int
    length_penalty: float
    items: list[tuple[float, list[int]]]
    done: bool = False

    def add(self, ids: list[int], score: float, stop: int | None = None) -> None:
        """Offer a hypothesis with summed log-probability ``score``; its stop id does not count as length."""
        ended = ids if stop is None else [*ids, stop]
        self.items.append((score / len(ids) ** self.length_penalty, ended))
        self.items.sort(key=lambda item: item[0], reverse=True)
        del self.items[self.size :]

    def finished(self, best: float, length: int) -> bool:
        """Whether no running beam (summed score ``best``) can still enter, were it to end at ``length``."""
        return len(self.items) == self.size and self.items[-1][0] >= best / length**self.length_penalty


def _beam_search(
    model: MMInterleaved,
    prompt: Prompt,
    settings: Settings,
    returned: int,
    reuse: Reuse | None,
    reading: Reading | None,
) -> list[list[int]]:
    """Beam search with two stop ids: 3 × beams candidates a step, score = Σ log-probability / length^penalty."""
    tokens, beams, batch = model.config.tokens, settings.beams, len(prompt.ids)
    stops = (tokens.eos, tokens.boi)
    device = prompt.ids.device
    decoder = Decoder(model, prompt, copies=beams, reuse=reuse, reading=reading)
    output = torch.full((batch * beams, 1), tokens.bos, dtype=torch.long, device=device)
    running = torch.full((batch, beams), -1e9, device=device)
    running[:, 0] = 0.0  # all beams start alike: only the first may branch
    kept = [_Hypotheses(beams, settings.length_penalty, []) for _ in range(batch)]
    logits = decoder.logits
    for index in range(settings.max_new_tokens):
        decoder.check()
        scores = process(torch.log_softmax(logits, dim=-1), output, settings, stops)
        vocabulary = scores.shape[1]
        totals = (scores + running.flatten()[:, None]).view(batch, beams * vocabulary)
        best, flat = totals.topk(beams * (1 + len(stops)), dim=1)
        parents, chosen = flat // vocabulary, flat % vocabulary
        rows, next_ids, running = _advance(kept, output, best, parents, chosen, stops, tokens.pad)
        output = torch.cat([output[rows], next_ids[:, None]], dim=1)
        if all(row.done for row in kept) or index == settings.max_new_tokens - 1:
            break
        decoder.reorder(rows)
        logits = decoder.step(next_ids)
    for row, hypotheses in enumerate(kept):
        if not hypotheses.done:
            for beam in range(beams):
                hypotheses.add(output[row * beams + beam].tolist(), float(running[row, beam]))
    return [ids for row in kept for _, ids in row.items[:returned]]


def _advance(
    kept: list[_Hypotheses],
    output: Tensor,
    best: Tensor,
    parents: Tensor,
    chosen: Tensor,
    stops: tuple[int, ...],
    pad: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the bookkeeping: ended candidates become hypotheses, the best others go on.

    Returns:
        parent rows ``[B·beams]``, next ids ``[B·beams]``, running scores ``[B, beams]``.
    """
    beams = kept[0].size
    rows, ids, scores = [], [], []
    for row, hypotheses in enumerate(kept):
        going: list[tuple[int, int, float]] = []
        if hypotheses.done:
            going = [(row * beams, pad, 0.0)] * beams
        else:
            for rank, (score, parent, token) in enumerate(
                zip(best[row].tolist(), parents[row].tolist(), chosen[row].tolist(), strict=True)
            ):
                source = row * beams + parent
                if token in stops:
                    if rank < beams:  # a worse ending than the beams themselves is not kept
                        hypotheses.add(output[source].tolist(), score, token)
                elif len(going) < beams:
                    going.append((source, token, score))
            length = output.shape[1] + 1
            hypotheses.done = hypotheses.finished(max(best[row].tolist()), length)
        for source, token, score in going:
            rows.append(source)
            ids.append(token)
            scores.append(score)
    device = output.device
    return (
        torch.tensor(rows, device=device),
        torch.tensor(ids, device=device),
        torch.tensor(scores, device=device).view(len(kept), beams),
    )
