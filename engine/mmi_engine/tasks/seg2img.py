"""`mmi seg2img`: a semantic map and a caption → a picture.

Place in the flow: the map becomes a picture in the colours of a palette (`data/maps.py`), then
``{segmentation}{prompt}`` and a missing picture, as `t2i.py` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Row
from mmi_engine.data.maps import Palette, load_map
from mmi_engine.errors import RowError
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import Job, Output, Panel, check_filled
from mmi_engine.tasks.fields import text_field
from mmi_engine.tasks.prompts import SEG2IMG_PROMPT, Template
from mmi_engine.tasks.t2i import Candidates


class Seg2ImgTask:
    """See module.

    Args:
        palette: colours of the classes.
        candidates: see `t2i.Candidates`.
        template: one's own prompt with ``{segmentation}`` and ``{prompt}``.
    """

    name = "seg2img"
    makes_images = True
    keeps_inputs = True
    column: str | None = None
    decoding = "seg2img"

    def __init__(self, palette: Palette, candidates: Candidates | None = None, template: str | None = None) -> None:
        self.palette = palette
        self.candidates = candidates or Candidates()
        self.template = Template.parse(template or SEG2IMG_PROMPT, ("segmentation", "prompt"))
        if "segmentation" not in self.template.fields:
            self.template = Template.parse("{segmentation}" + self.template.text, ("segmentation", "prompt"))
        colours = palette.fingerprint()
        self.settings = {"template": self.template.text, "palette": colours, **self.candidates.settings}

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """See `Task.read`."""
        prompt = text_field(row.data, "prompt")
        reference = row.data.get("segmentation")
        if reference is None:
            remedy = 'add "segmentation": "map.png"'
            raise RowError('the row has no "segmentation"', remedy=remedy, code="no_segmentation")
        shown = Piece("image", load_map(loader, reference, self.palette))
        pieces = [*self.template.build({"segmentation": [shown], "prompt": prompt}), Piece("image")]
        return Job(row, pieces, candidates=self.candidates.count, rank=self.candidates.rerank, note=prompt)

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """See `Task.output`."""
        check_filled(job, filled)
        return self.candidates.output(filled[len(job.pieces) - 1 :], stem)

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """The map, then what was drawn."""
        return [
            *(Panel(name, tag="map") for name in inputs),
            *self.candidates.panels(result, str(data.get("prompt", ""))),
        ]
