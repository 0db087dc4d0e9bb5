"""Sentences, questions, boxes and the tokenizer of the embedded world."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from mmi_engine.tasks.ground import parse_box
from mmi_engine.toon import texts, tokenizer
from mmi_engine.toon.draw import semantic_map
from mmi_engine.toon.palette import ID
from mmi_engine.toon.score import truth
from mmi_engine.toon.world import sample_scene, sample_story


def test_short_texts_name_the_stated_facts_and_nothing_else() -> None:
    for i in range(150):
        scene, rng = sample_scene(i, "train"), random.Random(i)
        text = texts.caption(scene, rng)
        said, true = texts.parse_text(text), truth(scene)
        assert said == {name: true[name] for name in ("character", "place", "action", "props")}
        assert texts.parse_text(text.lower()) == said


def test_long_captions_state_everything() -> None:
    for i in range(150):
        scene = sample_scene(i, "val")
        assert texts.parse_text(texts.long_caption(scene, random.Random(i))) == truth(scene)


def test_story_texts_are_short_and_silent_about_what_only_images_tell() -> None:
    for i in range(60):
        story = sample_story(i, "train")
        for scene, text in zip(story.scenes, story.texts, strict=True):
            assert len(text.split()) <= 14
            assert not re.search(r"shirt|hat|cap|number|sun|moon|\d", text)
            assert scene.character in text


def test_a_contradiction_is_ambiguous() -> None:
    said = texts.parse_text("Pip is running on the beach. Momo is running.")
    assert said["character"] == "ambiguous"
    assert said["action"] == "running"
    assert texts.parse_text("nothing here") == {"props": ()}


def test_questions_cover_all_kinds_and_their_answers_hold() -> None:
    seen: dict[str, set[str]] = {}
    for i in range(200):
        scene = sample_scene(i, "train")
        for question, answer, kind in texts.questions(scene, random.Random(i)):
            seen.setdefault(kind, set()).add(answer)
            assert question.endswith("?")
            assert " " not in answer
            if question == "Which number does " + scene.character + " wear?":
                assert answer == str(scene.number)
            if question.startswith("How many things"):
                assert answer == str(len(scene.props))
            bound = re.fullmatch(r"Is the number on the shirt larger than (\d+)\?", question)
            if bound:
                assert answer == ("yes" if scene.number > int(bound[1]) else "no")
    assert set(seen) == set(texts.KINDS)
    assert seen["yesno"] == {"yes", "no"}


def test_boxes_lie_inside_the_picture_and_enclose_the_named_class() -> None:
    for i in range(60):
        scene = sample_scene(i, "test")
        labels = semantic_map(scene)
        for expression, (x1, y1, x2, y2) in texts.referring(scene, random.Random(i), labels):
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
            for prop in scene.props:
                if expression in (f"the {prop.kind}", f"the {prop.color} {prop.kind}"):
                    mask = labels == ID[prop.kind]
                    assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
                    inner = mask[y1:y2, x1:x2]
                    assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()


def test_box_text_and_back() -> None:
    assert texts.box_text((0, 0, 128, 128)) == "(000,000)(999,999)"
    assert texts.box_text((64, 32, 96, 127)) == "(500,250)(750,992)"
    rng = np.random.default_rng(0)
    for _ in range(50):
        box = tuple(float(v) for v in rng.uniform(0, 127.8, 4))
        ordered = (*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:]))
        back = parse_box("Answer: " + texts.box_text(ordered) + "</box>")
        assert back is not None
        assert np.abs(np.multiply(back, 128 / 1000) - ordered).max() <= 0.5 * 128 / 1000 + 1e-9
    assert parse_box("no box (12,3)") is None


def test_the_tokenizer_has_the_released_layout() -> None:
    tok = tokenizer.load_tokenizer()
    size = tokenizer.VOCABULARY
    assert tok.get_vocab_size() == size + 2
    names = ("<unk>", "<s>", "</s>", "<pad>", "<|beginofimage|>", "<|image|>")
    assert [tok.token_to_id(name) for name in names] == [0, 1, 2, size - 1, size, size + 1]
    assert tok.encode("a<|beginofimage|><|image|>b").ids[1:3] == [size, size + 1]


def test_the_tokenizer_loses_nothing_and_keeps_digits_apart() -> None:
    tok = tokenizer.load_tokenizer()
    for text in [*tokenizer.world_texts(40, 10), *tokenizer.PROMPTS, "Zoë 漢字 🙂\n\tab  c", "(012,345)(678,999)"]:
        ids = tok.encode(text).ids
        assert tok.decode(ids, skip_special_tokens=False) == text
        assert tok.token_to_id("<unk>") not in ids
    digits = [t for t in tok.encode("the number 4207, (123,456)").tokens if re.search(r"\d", t)]
    assert digits == list("4207123456")


def test_most_words_of_the_world_are_one_token() -> None:
    tok = tokenizer.load_tokenizer()
    words = re.findall(r" [a-z]+", " ".join(" " + text for text in tokenizer.world_texts(80, 20)))
    single = sum(len(tok.encode(word).ids) == 1 for word in words)
    assert single / len(words) > 0.98


def test_the_shipped_tokenizer_can_be_made_again(tmp_path: Path) -> None:
    tokenizer.build(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.PATH.read_bytes()


def test_a_corpus_too_poor_is_refused() -> None:
    with pytest.raises(ValueError, match="corpus"):
        tokenizer.train_tokenizer(["ab ab"], 640)
