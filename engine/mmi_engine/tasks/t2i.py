"""`mmi t2i` and what `mmi seg2img` shares with it: one picture from what stands before it, perhaps the best of several.

Place in the flow: the row's prompt goes in as text, one picture is missing. With ``candidates`` the engine draws it
several times from different random numbers; without ``rerank`` all are written (``ID_0.png`` …), with it the one that
fits the prompt best is (``ID.png``), by a CLIP model or by the model's own likelihood of the prompt as a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Row
from mmi_engine.errors import GenerationError, UsageError
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import Job, Output, Panel, check_filled
from mmi_engine.tasks.fields import text_field
from mmi_engine.tasks.prompts import T2I_PROMPT, Template

if TYPE_CHECKING:
    from PIL import Image

MAX_CANDIDATES = 1000


class Candidates:
    """How many pictures are drawn for a row, what ranks them, and which are written.

    Args:
        count: at least 1.
        rerank: None, ``self``, or a CLIP model directory.
        keep_all: with `rerank`, write all of them (``ID_0.png`` …), not the best alone.

    Raises:
        UsageError: a rerank of a single picture, or a directory without a model.
    """

    def __init__(self, count: int = 1, rerank: str | None = None, keep_all: bool = False) -> None:
        if rerank is not None and count < 2:
            raise UsageError("--rerank needs more than one candidate", remedy="add --candidates 8")
        if keep_all and rerank is None:
            raise UsageError("--keep-all belongs to --rerank", remedy="without --rerank all candidates are kept anyway")
        if rerank not in (None, "self") and not (Path(str(rerank)) / "config.json").is_file():
            raise UsageError(
                f'--rerank "{rerank}" is no model directory', remedy="name a CLIP model directory, or self"
            )
        self.count, self.rerank, self.keep_all = count, rerank, keep_all

    @property
    def settings(self) -> dict[str, Any]:
        """What of it changes an item's output; a model by its files, not its path."""
        ranked_by = self.rerank
        if self.rerank not in (None, "self"):
            from mmi_engine.model_info import fingerprint

            ranked_by = fingerprint(Path(str(self.rerank)))
        return {"candidates": self.count, "rerank": ranked_by, "keep_all": self.keep_all}

    def output(self, pictures: Sequence[Piece], stem: str) -> Output:
        """The result row's fields and files of all candidates of one item."""
        if len(pictures) != self.count:
            raise GenerationError(f"the model returned {len(pictures)} of {self.count} candidates")
        if self.count == 1:
            return Output({"image": f"{stem}.png"}, {f"{stem}.png": _rgb(pictures[0])})
        names = [f"{stem}_{number}.png" for number in range(self.count)]
        if self.rerank is None:
            listed = [{"image": name} for name in names]
            return Output({"images": listed}, {name: _rgb(made) for name, made in zip(names, pictures, strict=True)})
        scores = [made.scores[0] for made in pictures]
        best = max(range(self.count), key=lambda index: scores[index])
        fields: dict[str, Any] = {"candidate": best, "scores": [round(score, 4) for score in scores]}
        if self.keep_all:
            media = {name: _rgb(made) for name, made in zip(names, pictures, strict=True)}
            return Output({"image": names[best], **fields, "images": [{"image": name} for name in names]}, media)
        return Output({"image": f"{stem}.png", **fields}, {f"{stem}.png": _rgb(pictures[best])})

    def panels(self, result: dict[str, Any], prompt: str) -> list[Panel]:
        """The best (or only) picture with the prompt, then the others."""
        texts = ((prompt, False),) if prompt else ()
        listed = [entry["image"] for entry in result.get("images", [])]
        if "image" not in result:
            first, others = listed[0], listed[1:]
            return [Panel(first, True, texts), *(Panel(name, True) for name in others)]
        scores = result.get("scores")
        best = f"best of {len(scores)}" if scores else None
        others = [(number, name) for number, name in enumerate(listed) if name != result["image"]]
        tags = [f"candidate {number}, score {scores[number]:g}" for number, _ in others]
        return [
            Panel(result["image"], True, texts, tag=best),
            *(Panel(name, True, tag=tag) for (_, name), tag in zip(others, tags, strict=True)),
        ]


def _rgb(piece: Piece) -> Image.Image:
    picture: Image.Image = piece.value
    return picture.convert("RGB")


class T2iTask:
    """See module.

    Args:
        candidates: see `Candidates`.
        template: one's own wording around ``{prompt}``.
    """

    name = "t2i"
    makes_images = True
    keeps_inputs = False
    column: str | None = "prompt"
    decoding = "t2i"

    def __init__(self, candidates: Candidates | None = None, template: str | None = None) -> None:
        self.candidates = candidates or Candidates()
        self.template = Template.parse(template or T2I_PROMPT, ("prompt",))
        self.settings = {"template": self.template.text, **self.candidates.settings}

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """See `Task.read`."""
        prompt = text_field(row.data, "prompt")
        pieces = [*self.template.build({"prompt": prompt}), Piece("image")]
        return Job(row, pieces, candidates=self.candidates.count, rank=self.candidates.rerank, note=prompt)

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """See `Task.output`."""
        check_filled(job, filled)
        return self.candidates.output(filled[len(job.pieces) - 1 :], stem)

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """See `Candidates.panels`."""
        return self.candidates.panels(result, str(data.get("prompt", "")))
