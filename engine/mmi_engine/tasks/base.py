"""What every generating command is made of: jobs, outputs, and the `Task` protocol between them.

Place in the flow:

    manifest Row ──Task.read──▶ Job(pieces) ──engine fills the pieces without a value──▶ Task.output ──▶ Output

Every task is an interleaved sequence of text and images in which some pieces have no value yet; the loop around it
(`run.py`), the output directory and the gallery are the same for all. A task holds no model and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mmi_engine.data.images import bytes_of
from mmi_engine.errors import GenerationError
from mmi_engine.pieces import Piece

if TYPE_CHECKING:
    from PIL import Image

    from mmi_engine.data.images import ImageLoader
    from mmi_engine.data.manifest import Row

MAX_PIECES = 4096  # far beyond any context; stops a hostile row before its images are loaded


@dataclass(frozen=True)
class Job:
    """An item ready for the engine.

    Attributes:
        row: the manifest row it comes from.
        pieces: the sequence; those with value None are generated, in order, each from all before it.
        free: after the last piece the model goes on by itself, deciding where text ends and an image begins,
            for at most this many more images; 0 for not at all.
        candidates: how many versions of the last piece (a picture) are made, all of them given back.
        rank: what scores the candidates: None, ``"self"``, or a CLIP model directory.
        note: what `Task.output` needs to remember of the row's pictures (their sizes).
        kept: originals that `Task.output` draws on.
        shown: the pictures that the gallery keeps small copies of; None for those among the pieces.
    """

    row: Row
    pieces: list[Piece]
    free: int = 0
    candidates: int = 1
    rank: str | None = None
    note: Any = None
    kept: tuple[Image.Image, ...] = ()
    shown: tuple[Image.Image, ...] | None = None

    @property
    def weight(self) -> int:
        """Bytes of the pictures it holds."""
        pictures = [piece.value for piece in self.pieces if piece.kind == "image" and piece.value is not None]
        return sum(map(bytes_of, (*pictures, *self.kept)))

    @property
    def to_generate(self) -> bool:
        """Whether there is anything for the model to do."""
        return self.free > 0 or any(piece.value is None for piece in self.pieces)


@dataclass(frozen=True)
class Output:
    """What an item leaves behind.

    Attributes:
        fields: the task's part of the result row, JSON values.
        media: path relative to the output directory (`/` between parts) → RGB picture.
    """

    fields: dict[str, Any]
    media: dict[str, Image.Image] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One box of the gallery: a picture with texts under it.

    Attributes:
        image: path relative to the output directory.
        image_generated: whether the model made it.
        texts: (text, whether the model made it).
        box: left, top, right, bottom in fractions of the picture, drawn over it.
        tag: replaces "given" or "made by the model".
    """

    image: str | None = None
    image_generated: bool = False
    texts: tuple[tuple[str, bool], ...] = ()
    box: tuple[float, float, float, float] | None = None
    tag: str | None = None


class Task(Protocol):
    """What `run.py` needs to know of a command.

    Attributes:
        name: of the command.
        makes_images: whether results include pictures.
        keeps_inputs: whether the gallery needs small copies of the pictures that rows give.
        column: the one field that a folder of images or a list of texts fills, None when neither makes sense.
        decoding: key of `prompts.DECODING`.
        settings: the task's own options that change an item's output.
    """

    name: str
    makes_images: bool
    keeps_inputs: bool
    column: str | None
    decoding: str
    settings: dict[str, Any]

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """The row as a job; raises ItemError (broken structure, unreadable image)."""
        ...

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """The result of a job: `filled` are its pieces with values, then further candidates or free pieces."""
        ...

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """A result row as gallery panels; `data` is its manifest row, `inputs` the small copies of its pictures."""
        ...


def check_filled(job: Job, filled: Sequence[Piece]) -> None:
    """Raises GenerationError unless every piece of the job came back with a value of its kind."""
    if len(filled) < len(job.pieces):
        raise GenerationError(f"the model returned {len(filled)} of {len(job.pieces)} pieces")
    for number, piece in enumerate(filled):
        expected = job.pieces[number].kind if number < len(job.pieces) else piece.kind
        good = isinstance(piece.value, str) if piece.kind == "text" else hasattr(piece.value, "convert")
        if piece.kind != expected or not good:
            raise GenerationError(f"piece {number} came back without its {expected}")


def last_text(job: Job, filled: Sequence[Piece]) -> str:
    """The text a text task asked for: the value of its last piece.

    Raises:
        GenerationError: it is missing.
    """
    check_filled(job, filled)
    return str(filled[len(job.pieces) - 1].value).strip()
