"""`mmi vqa`: pictures and a question → an answer; few-shot examples; dialogue with ranked options.

Place in the flow: a row becomes the prompt of `prompts.py` and one missing text. A row with ``history`` or ``caption``
is a dialogue (of the embedded model question after question, as it was trained); one with ``options`` does not write an
answer but ranks these by summed log-probability. ``shots`` are solved examples before the question. A row of
``messages`` is a chat, taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Row
from mmi_engine.errors import GenerationError
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import Job, Output, Panel, last_text
from mmi_engine.tasks.fields import (
    image_references,
    in_part,
    load_images,
    objects,
    optional_text,
    picture_panels,
    pictures_of,
    text_field,
    text_list,
)
from mmi_engine.tasks.prompts import (
    DIALOGUE_CAPTION,
    DIALOGUE_HEAD,
    DIALOGUE_ROUND,
    RELEASED,
    TOON,
    Template,
    vqa_prompt,
)
from mmi_engine.tasks.story import chat_pieces

FORMS = ("long", "short", "vizwiz")


class VqaTask:
    """See module.

    Args:
        form: prompt of a question outside a dialogue.
        template: one's own prompt with ``{image}`` and ``{question}``, also for dialogues.
        question: asked of rows that have none.
        family: of the model, see `prompts.py`.
    """

    name = "vqa"
    makes_images = False
    keeps_inputs = True
    decoding = "vqa"

    def __init__(
        self,
        form: str = "long",
        template: str | None = None,
        question: str | None = None,
        family: str = RELEASED,
    ) -> None:
        self.own, self.family = template is not None, family
        self.template = Template.parse(template or vqa_prompt(form, family), ("image", "question", "caption"))
        self.question = question
        self.column = "image" if question else None
        self.settings = {"template": self.template.text, "question": question}
        if family == TOON and not self.own:
            self.settings["dialogue"] = "turns"

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """See `Task.read`."""
        options = tuple(text_list(row.data, "options", "bad_options") or ())
        missing = Piece("text", options=options)
        history = _history(row.data)  # checked in every row, as the gallery shows it
        if row.data.get("messages") is not None:
            return Job(row, [*chat_pieces(row.data["messages"], loader), missing])
        references = image_references(row.data)
        texts = {"question": text_field(row.data, "question", default=self.question)}
        if caption := optional_text(row.data, "caption"):
            texts["caption"] = caption
        shots = [
            in_part(f"shot {number}", "bad_shots", lambda shot=shot: _solved(shot))
            for number, shot in enumerate(objects(row.data, "shots", "bad_shots"))
        ]
        dialogue = not self.own and ("history" in row.data or "caption" in texts)
        pieces: list[Piece] = []
        for images, question, answer in shots:
            values = {"image": load_images(images, loader), "question": question}
            pieces += [*self.template.build(values), Piece("text", answer)]
        examples = pictures_of(pieces)
        pictures = load_images(references, loader)
        if not dialogue:
            pieces += self.template.build({"image": pictures, **texts})
        elif self.family == TOON:
            pieces += self._in_turns(pictures, texts, history)
        else:
            pieces += _dialogue(pictures, texts, history)
        return Job(row, [*pieces, missing], shown=(*pictures_of(pictures), *examples))

    def _in_turns(self, pictures: list[Piece], texts: dict[str, str], rounds: list[tuple[str, str]]) -> list[Piece]:
        """As the embedded model was trained: question after question in the form, the pictures before the first.

        A caption, which it was not trained with, stands before the first question.
        """
        opening, _, turn = self.template.text.partition("{image}")
        following = Template.parse(turn, ("question",))
        caption = texts.get("caption", "").strip()
        known = f"{caption}{'' if caption[-1] in '.!?' else '.'} " if caption else ""
        pieces = [Piece("text", opening.strip()), *pictures]
        for number, (question, answer) in enumerate([*rounds, (texts["question"], "")]):
            pieces += following.build({"question": question if number else known + question})
            pieces += [Piece("text", answer)] if number < len(rounds) else []
        return pieces

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """See `Task.output`: the answer; with options also their log-probabilities and ranks (1 is the best)."""
        fields: dict[str, Any] = {"answer": last_text(job, filled)}
        options = job.pieces[-1].options
        if options:
            scores = filled[len(job.pieces) - 1].scores
            if len(scores) != len(options):
                raise GenerationError(f"the model scored {len(scores)} of {len(options)} options")
            order = sorted(range(len(options)), key=lambda index: -scores[index])
            ranks = [0] * len(options)
            for rank, index in enumerate(order, 1):
                ranks[index] = rank
            fields |= {"scores": [round(score, 4) for score in scores], "ranks": ranks}
        return Output(fields)

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """The pictures with what was asked and answered; options in the order of their ranks."""
        asked = data.get("question") or self.question
        texts = [(f"{entry['question']} {entry['answer']}", False) for entry in data.get("history") or ()]
        texts += [(str(asked), False)] if asked else []
        texts.append((result["answer"], True))
        if "ranks" in result and isinstance(data.get("options"), list):
            ranked = sorted(zip(result["ranks"], data["options"], result["scores"], strict=True))
            texts.append((" · ".join(f"{option} {score:.1f}" for _, option, score in ranked), False))
        return picture_panels(data, inputs, tuple(texts))


def _solved(shot: dict[str, Any]) -> tuple[list[Any], str, str]:
    """Pictures, question and answer of a solved example."""
    return image_references(shot), text_field(shot, "question"), text_field(shot, "answer")


def _history(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Earlier rounds of a dialogue: (question, answer)."""
    rounds = objects(data, "history", "bad_history")
    return [
        in_part(
            f"round {number} of the history",
            "bad_history",
            lambda entry=entry: (text_field(entry, "question"), text_field(entry, "answer")),
        )
        for number, entry in enumerate(rounds)
    ]


def _dialogue(pictures: list[Piece], texts: dict[str, str], rounds: list[tuple[str, str]]) -> list[Piece]:
    """``{image} caption: {caption} question: {q}? answer: {a}. … question: {q}? answer:``."""
    words = [DIALOGUE_CAPTION.format(caption=texts["caption"])] if "caption" in texts else []
    for question, answer in rounds:
        words.append(f"{DIALOGUE_ROUND.format(question=question.rstrip('?'))} {answer.rstrip('.')}.")
    words.append(DIALOGUE_ROUND.format(question=texts["question"].rstrip("?")))
    template = Template.parse(DIALOGUE_HEAD, ("image",))
    return [*template.build({"image": pictures}), Piece("text", " ".join(words))]
