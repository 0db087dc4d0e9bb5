"""PSNR and SSIM of a made picture against the true one, pixel by pixel.

Place in the flow: pictures → a value per picture, mean per item. Both need pictures of equal size; another size makes
the item unusable instead of being resized in silence. PSNR is 10 log10(255² / MSE), 100 dB for equal pictures; SSIM is
torchmetrics' (Wang et al. 2004: Gaussian window of 11 px, σ 1.5), mean over colours and pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mmi_engine.errors import ImageError, ItemError, ManifestError, UsageError
from mmi_engine.metrics.base import Options, Scores, mean_measure
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.pictures import Source, made_pictures, true_pictures
from mmi_engine.versions import package_version

if TYPE_CHECKING:
    from PIL import Image

BEST_DB = 100.0


def psnr(made: Image.Image, true: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures of one size, dB."""
    error = np.asarray(made, np.float64) - np.asarray(true, np.float64)
    mse = float((error * error).mean())
    return BEST_DB if mse == 0 else min(BEST_DB, 10.0 * float(np.log10(255.0**2 / mse)))


def ssim(made: Image.Image, true: Image.Image) -> float:
    """Structural similarity of two RGB pictures of one size, at least 11 px each way; -1 to 1."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.from_numpy(np.array(x, np.float64)).permute(2, 0, 1)[None] / 255 for x in (made, true))
    return float(torch.as_tensor(structural_similarity_index_measure(a, b, data_range=1.0)))


class _Pixels:
    """A value per picture; subclasses say which. A missing picture scores 0."""

    differs = ""
    label = ""
    unit = ""
    implementation = "mmi"
    measure: Callable[[Image.Image, Image.Image], float]

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> list[Source]:
        """The true pictures."""
        return true_pictures(pair)

    def prediction(self, pair: Pair) -> list[Source]:
        """The made ones."""
        return made_pictures(pair)

    def score(self, references: list[list[Source]], predictions: list[list[Source] | None]) -> Scores:
        """See `Metric.score`."""
        parts, problems = np.zeros(len(references)), {}
        for k, (true, made) in enumerate(zip(references, predictions, strict=True)):
            if made is None:
                continue
            try:
                values = [self._one(a, b) for a, b in zip(made, true, strict=True)]
            except ItemError as error:
                problems[k] = str(error)
                continue
            parts[k] = float(np.mean(values))
            self.options.progress("pictures", k + 1, len(references))
        scores = Scores([mean_measure(self.label, parts, self.unit)], implementation=self.implementation)
        scores.references = float(np.mean([len(item) for item in references])) if references else 0.0
        scores.problems = problems
        return scores

    def _one(self, made: Source, true: Source) -> float:
        try:
            expected = true.load()
        except ImageError as error:
            raise ManifestError(f"{true.place}: {error}", remedy="a reference must load") from error
        picture = made.load()
        if picture.size != expected.size:
            raise ImageError(
                f"picture of {picture.width} × {picture.height} px, the true one has {expected.width} × "
                f"{expected.height}",
                remedy="bring both to one size first",
                code="wrong_size",
            )
        return type(self).measure(picture, expected)


class Psnr(_Pixels):
    """PSNR, dB."""

    label, unit = "PSNR", "dB"
    measure = staticmethod(psnr)


class Ssim(_Pixels):
    """SSIM."""

    label = "SSIM"
    measure = staticmethod(ssim)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        version = package_version("torchmetrics")
        if version is None:
            raise UsageError("--metric ssim needs torchmetrics", remedy='pip install "mmi[eval]"')
        self.implementation = f"torchmetrics {version}"
