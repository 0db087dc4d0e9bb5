"""Text generation against slower, independent forms: no cache, no padding, and exhaustive search for beams."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import Prompt, generate_text
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.sequence import image_block, pad_rows
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    return tiny_model(seed=2)


def prompt_of(model: MMInterleaved, rows: list[list[int]], images: list[int]) -> Prompt:
    """Rows of ids, each opened by ``<s>`` and as many images as ``images`` says."""
    tokens = model.config.tokens
    full = [
        [tokens.bos, *image_block(tokens, model.config.tokens_per_image) * n, *row]
        for row, n in zip(rows, images, strict=True)
    ]
    ids, mask = pad_rows(full, tokens.pad, left=True)
    pixels = torch.rand(sum(images), 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        visual = model.visual_tokenizer(pixels) if sum(images) else None
    return Prompt(ids, mask, visual, torch.tensor(images))


@torch.no_grad()
def next_logits(model: MMInterleaved, prompt: Prompt, generated: list[int]) -> torch.Tensor:
    """Logits after one unpadded prompt and some generated ids, everything computed anew."""
    ids = torch.cat([prompt.ids, torch.tensor([generated], dtype=torch.long)], dim=1)
    features = prompt.visual.features if prompt.visual is not None else ()
    tokens = prompt.visual.tokens if prompt.visual is not None else torch.zeros(0, 1, 1)
    context = model.visual_context(ids, features, prompt.counts)
    hidden = model.language(model.embed(ids, tokens), torch.ones_like(ids), context)
    return model.text_head(hidden[0, -1]).float()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_greedy_equals_recomputing_everything(model: MMInterleaved, images: int) -> None:
    prompt = prompt_of(model, [[7, 8, 9]], [images])
    made = generate_text(model, prompt, Settings(max_new_tokens=6)).ids[0]
    expected: list[int] = []
    for _ in range(6):
        expected.append(int(next_logits(model, prompt, expected).argmax()))
        if expected[-1] in (model.config.tokens.eos, model.config.tokens.boi):
            break
    assert made[1:] == expected


def test_padding_does_not_matter(model: MMInterleaved) -> None:
    together = prompt_of(model, [[7, 8, 9, 10, 11, 12], [5]], [1, 1])
    both = generate_text(model, together, Settings(max_new_tokens=5), record_logits=True)
    short = prompt_of(model, [[5]], [1])
    assert together.visual is not None and short.visual is not None
    short.visual.tokens[:] = together.visual.tokens[1:]
    for own, shared in zip(short.visual.features, together.visual.features, strict=True):
        own[:] = shared[1:]
    alone = generate_text(model, short, Settings(max_new_tokens=5), record_logits=True)
    assert alone.ids[0] == both.ids[1]
    torch.testing.assert_close(alone.step_logits[0][0], both.step_logits[0][1], rtol=1e-4, atol=1e-5)


def test_beams_that_cannot_prune_find_the_best_sequence(model: MMInterleaved) -> None:
    """With one step less than exhaustive width nothing may be lost: two tokens, all first tokens kept."""
    prompt = prompt_of(model, [[7, 8]], [1])
    first = torch.log_softmax(next_logits(model, prompt, []), -1)
    keep = first.topk(40).indices.tolist()
    stops = (model.config.tokens.eos, model.config.tokens.boi)
    scored: list[tuple[float, list[int]]] = []
    for token in keep:
        if token in stops:
            scored.append((float(first[token]) / 1, [token]))
            continue
        second = torch.log_softmax(next_logits(model, prompt, [token]), -1)
        best = second.topk(2)
        for value, following in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            length = 2 if following in stops else 3  # the opening <s> counts, the stop does not
            scored.append(((float(first[token]) + value) / length, [token, following]))
    expected = max(scored)[1]
    settings = Settings(beams=40, max_new_tokens=2)
    assert generate_text(model, prompt, settings).ids[0][1:] == expected


def test_minimum_length_and_repetition_penalty(model: MMInterleaved) -> None:
    prompt = prompt_of(model, [[7, 8, 9]], [1])
    stops = {model.config.tokens.eos, model.config.tokens.boi}
    made = generate_text(model, prompt, Settings(max_new_tokens=8, min_new_tokens=8)).ids[0]
    assert len(made) == 9 and not stops & set(made[1:])
    free = generate_text(model, prompt, Settings(max_new_tokens=12)).ids[0][1:]
    punished = generate_text(model, prompt, Settings(max_new_tokens=12, repetition_penalty=1e6)).ids[0][1:]
    assert len(set(punished)) == len(punished)
    assert free[0] == punished[0]


def test_sampling_depends_on_its_own_generator_only(model: MMInterleaved) -> None:
    settings = Settings(temperature=1.0, top_p=0.9, max_new_tokens=6)
    pair = prompt_of(model, [[7, 8], [7, 8]], [0, 0])

    def sample(seeds: tuple[int, int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate_text(model, pair, settings, generators=generators).ids

    first, second = sample((1, 2)), sample((2, 1))
    assert first[0] == second[1] and first[1] == second[0]
    assert len({tuple(row) for seeds in itertools.pairwise(range(6)) for row in sample(seeds)}) > 1


def test_beams_without_any_image(model: MMInterleaved) -> None:
    prompt = prompt_of(model, [[7, 8]], [0])
    one = generate_text(model, prompt, Settings(beams=3, max_new_tokens=1)).ids[0]
    assert one[1] == int(next_logits(model, prompt, []).argmax())


def test_small_nucleus_is_greedy(model: MMInterleaved) -> None:
    prompt = prompt_of(model, [[7, 8]], [0])
    sampled = generate_text(
        model,
        prompt,
        Settings(temperature=1.0, top_p=1e-6, max_new_tokens=5),
        generators=[torch.Generator().manual_seed(0)],
    )
    assert sampled.ids == generate_text(model, prompt, Settings(max_new_tokens=5)).ids
