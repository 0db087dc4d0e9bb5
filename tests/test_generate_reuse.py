"""What generation keeps changes nothing but the work: on equals off, each thing computed as often as it should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mmi_engine.data.images import prepare
from mmi_engine.generate import interleave
from mmi_engine.generate.interleave import Document, Maker
from mmi_engine.generate.reading import Read
from mmi_engine.generate.reuse import LITERAL, Encoded, PictureStore, Reuse
from mmi_engine.generate.settings import Settings
from mmi_engine.pieces import Piece


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def story() -> list[Piece]:
    return [
        Piece("text", "Pip is here."),
        Piece("image", picture(0)),
        Piece("text"),
        Piece("image"),
        Piece("text", "Boo waves."),
        Piece("image"),
    ]


@pytest.fixture
def count(model, monkeypatch):
    """How often pictures are encoded and values projected."""
    done = {"pictures": 0, "language": 0, "unet": 0}

    def counted(owner, name, key):
        original = getattr(owner, name)

        def call(*arguments):
            done[key] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    counted(model.visual_tokenizer, "forward", "pictures")
    for layer in model.language.mmfs_layers:
        counted(layer, "project_values", "language")
    for block in model.image_decoder.unet.mmfs_blocks:
        counted(block, "project_values", "unet")
    return done


def made(model, reuse: Reuse, settings: Settings) -> list[list[Piece]]:
    documents = [Document(story(), seed, 0) for seed in (1, 2)]
    maker = Maker(model, settings, 2, reuse=reuse)
    with torch.no_grad():
        while maker.round(documents):
            pass
    return [document.pieces for document in documents]


TEXTS = {
    "greedy": Settings(steps=3, guidance=2.0, max_new_tokens=5, min_new_tokens=5),
    "beams": Settings(steps=1, guidance=1.0, beams=3, max_new_tokens=4, min_new_tokens=2),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("reuse", [LITERAL, Reuse(pictures=False), Reuse(values=False), Reuse(prefix=False)], ids=str)
def test_the_same_tokens_and_pixels_with_and_without(model, kind, reuse):
    for kept, again in zip(made(model, Reuse(), TEXTS[kind]), made(model, reuse, TEXTS[kind]), strict=True):
        assert [piece.value for piece in kept if piece.kind == "text"] == [p.value for p in again if p.kind == "text"]
        for one, other in zip(kept, again, strict=True):
            if one.kind == "image":
                assert np.abs(np.asarray(one.value, int) - np.asarray(other.value, int)).max() <= 1


@pytest.fixture
def one_thread():
    """Rows of so small a model are split inside by two threads, which moves the last bit of a row's second copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_each_thing_is_computed_once(model, count):
    layers, blocks = len(model.language.mmfs_layers), len(model.image_decoder.unet.mmfs_blocks)
    made(model, Reuse(), TEXTS["greedy"])
    contents, pieces, drawn = 1 + 2, 3, 2  # one given picture for both stories, a drawn one each; one batch per piece
    assert count["pictures"] == 2 and contents == 3  # the given one alone, then the two drawn ones together
    assert count["language"] == layers * pieces
    assert count["unet"] == blocks * drawn  # not per denoising step, not per half of guidance


def test_the_literal_form_computes_again(model, count):
    layers, blocks, settings = (
        len(model.language.mmfs_layers),
        len(model.image_decoder.unet.mmfs_blocks),
        TEXTS["greedy"],
    )
    made(model, LITERAL, settings)
    assert count["pictures"] == 1 + 1 + 2  # batches of two: one picture before each of two pieces, two before the last
    assert count["language"] == layers * (3 + settings.max_new_tokens - 1)
    assert count["unet"] == blocks * 2 * (1 + settings.steps)  # `look` and every step


def test_a_picture_is_encoded_once_for_all_batches_and_its_bytes_do_not_depend_on_that(model, count, one_thread):
    question = [Piece("image", picture(0)), Piece("image", picture(1)), Piece("text")]
    store, settings = PictureStore(), Settings(max_new_tokens=3)
    for _ in range(3):
        interleave.fill(model, [question, question], [1, 2], settings, 2, pictures=store)
    assert count["pictures"] == 1 and len(store) == 2 and store.hits == 8
    alone = Document([Piece("image", picture(1)), Piece("text")], 0, 0)
    maker = Maker(model, settings, 2)
    with torch.no_grad():
        maker.encode([(alone, 1)])
    kept = store.get(PictureStore.key(prepare(picture(1), 32), maker.batch_size))
    assert kept is not None and torch.equal(kept.tokens, alone.encoded[0].tokens)
    assert all(torch.equal(a, b) for a, b in zip(kept.features, alone.encoded[0].features, strict=True))


def test_other_contents_sizes_and_row_counts_are_other_pictures():
    first = picture(0)
    turned = Image.frombytes("RGB", (16, 64), first.tobytes())
    changed = first.copy()
    changed.putpixel((31, 31), (0, 0, 0))
    keys = {PictureStore.key(one, rows) for one in (first, turned, changed) for rows in (1, 2)}
    assert len(keys) == 6 and PictureStore.key(first.copy(), 1) in keys


def test_the_store_is_bounded_and_drops_what_was_not_used_longest():
    batch = torch.zeros(8, 25)
    store = PictureStore(limit=300)
    for name in (b"a", b"b", b"c"):
        kept = store.put(name, Encoded(batch[0], []))
        assert kept.tokens.untyped_storage().nbytes() == 100  # a copy: the batch is let go
    assert store.bytes == 300 and store.get(b"a") is not None
    store.put(b"d", Encoded(batch[1], []))
    assert store.bytes == 300 and store.get(b"b") is None and store.get(b"a") is not None
    store.put(b"large", Encoded(torch.zeros(100), []))
    assert store.bytes == 300 and store.get(b"large") is None and len(store) == 3


def long_story(seed: int) -> list[Piece]:
    text = "Pip runs to the lake near a red ball. " * (3 + seed)
    return [
        Piece("text", text),
        Piece("image", picture(seed)),
        Piece("image"),
        Piece("text", "Boo waves."),
        Piece("text"),
        Piece("image"),
        Piece("text"),
    ]


def told(model, reuse: Reuse, batch: int) -> tuple[list[list[Piece]], int]:
    """Two stories, and how many columns the language model read for prompts."""
    documents = [Document(long_story(seed), seed, 0) for seed in (1, 2)]
    maker = Maker(model, Settings(steps=2, max_new_tokens=3, min_new_tokens=3), batch, reuse=reuse)
    columns = 0

    def count(module, given, named) -> None:
        nonlocal columns
        width = named["inputs_embeds"].shape[1]
        columns += width if width > 1 else 0

    hook = model.language.body.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        while maker.round(documents):
            pass
    hook.remove()
    return [document.pieces for document in documents], columns


def test_what_was_read_is_not_read_again(model, one_thread):
    (once, few), (again, many) = told(model, Reuse(), 2), told(model, Reuse(prefix=False), 2)
    assert few < 0.7 * many
    for one, other in zip(sum(once, []), sum(again, []), strict=True):
        if one.kind == "text":
            assert one.value == other.value
        else:
            assert np.abs(np.asarray(one.value, int) - np.asarray(other.value, int)).max() <= 1
    alone = Document(long_story(1), 1, 0)  # its bytes are those it has beside the other story
    maker = Maker(model, Settings(steps=2, max_new_tokens=3, min_new_tokens=3), 2)
    with torch.no_grad():
        while maker.round([alone]):
            pass
    assert [p.value for p in alone.pieces] == [p.value for p in once[0]]


def test_what_is_read_on_from_fits_ids_and_pictures(model):
    tokens = model.config.tokens
    one, other = Encoded(torch.zeros(1), []), Encoded(torch.zeros(1), [])
    ids = [tokens.bos, *range(10, 50), tokens.boi, *[tokens.image] * 4, 60, 61]
    kept = Read(ids, [one], [], torch.zeros(0))
    assert kept.shared([*ids, 62], [one], tokens) == len(ids)
    assert kept.shared(ids, [one], tokens) == len(ids) - 1  # one token is left to be read
    assert kept.shared([*ids, 62], [other], tokens) == 0
    assert kept.shared([*ids[:-1], 5, 5], [one], tokens) == len(ids) - 1
    assert kept.shared(ids[:45], [one], tokens) == 41  # the picture's block stays whole
    assert kept.shared([*ids[:20], 5, *ids[21:]], [one], tokens) == 0  # too little to be worth it
    assert Read(ids[:42], [], [], torch.zeros(0)).shared(ids, [one], tokens) == 41
