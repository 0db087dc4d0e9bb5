"""The world's tokenizer: byte-level BPE, digits apart, special tokens in the released layout.

Place in the flow: trained once on the world's own texts and the task prompts (`build`), shipped as data/tokenizer.json,
loaded by `load_tokenizer`. With V entries in the ordinary vocabulary: `<unk>` 0, `<s>` 1, `</s>` 2, the 256 bytes,
merges, and pad = V - 1; `<|beginofimage|>` = V and `<|image|>` = V + 1 (the layout of the released checkpoints, where
V = 32000). Being byte-level it encodes any UTF-8 text without loss; every digit is a token of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmi_engine.toon import texts
from mmi_engine.toon.draw import semantic_map
from mmi_engine.toon.world import sample_scene, sample_story

VOCABULARY = 640  # V: ordinary entries, pad included
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
BOI, IMAGE = "<|beginofimage|>", "<|image|>"
PATH = Path(__file__).parent / "data" / "tokenizer.json"

PROMPTS = (
    "Provide a one-sentence caption for the provided image.",
    "Please describe the image in detail. The image depicts",
    "a photo of",
    "Based on the image, please answer the question. ",
    " Please provide an accurate answer within one word. The answer is: yes no",
    " The answer is: ",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    " caption: question: answer:",
    "Question: Provide the bounding box coordinate of the region this sentence describes: , Answer: (012,345)(678,999)",
    "Provide the bounding box coordinate of the region this sentence describes. <box>(012,345)(678,999)</box>",
)


def world_texts(scenes: int = 600, stories: int = 100) -> Iterator[str]:
    """Training texts, always the same: captions, questions with answers, expressions, stories, and the prompts."""
    for index in range(scenes):
        scene, rng = sample_scene(index, "train"), random.Random(index)
        labels = semantic_map(scene)
        short = texts.caption(scene, rng)
        yield short
        yield short.lower()
        yield texts.long_caption(scene, rng)
        for question, answer, _ in texts.questions(scene, rng, labels):
            yield f"{question} {answer}"
        for expression, box in texts.referring(scene, rng, labels):
            yield f"describes: {expression}, Answer: {texts.box_text(box)}"
        yield PROMPTS[index % len(PROMPTS)]
    for index in range(stories):
        yield from sample_story(index, "train").texts


def train_tokenizer(corpus: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train a tokenizer with `vocabulary` ordinary entries on the corpus and add the special tokens.

    Raises:
        ValueError: the corpus is too poor for so many entries (ids would leave the released layout).
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != vocabulary - 1:
        raise ValueError(f"corpus yields {tokenizer.get_vocab_size() + 1} entries, wanted {vocabulary}")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOI, IMAGE)])
    return tokenizer


def build(path: Path = PATH) -> Tokenizer:
    """Train the shipped tokenizer anew and write it to path; the same bytes every time."""
    tokenizer = train_tokenizer(world_texts())
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def load_tokenizer(path: Path = PATH) -> Tokenizer:
    """The shipped tokenizer; `get_vocab_size()` is V + 2 (V = VOCABULARY)."""
    return Tokenizer.from_file(str(path))
