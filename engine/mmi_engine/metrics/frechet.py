"""Fréchet distance between two sets of pictures: FID with Inception features, a distance of its own name with others.

Place in the flow: pictures → `features.py` → mean and covariance → distance. Source: Dowson and Landau (1982); Heusel
et al., *GANs trained by a two time-scale update rule* (2017). The released script makes its pictures 64 px first
(bicubic, centre crop): that is ``fid64``, the variant behind the paper's figures; ``fid`` takes them as they are to 299
px.

The interval resamples the distance's first-order expansion (its influence function), which costs one matrix product and
has none of the upward bias that drawing items twice would add. Shapes: X, Y ``[n, d]``.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mmi_engine.errors import ManifestError
from mmi_engine.metrics.base import Measure, Options, Scores
from mmi_engine.metrics.features import Extractor, blame, extract, spread
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.pictures import Source, made_pictures, true_pictures


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[d]`` and covariance ``[d, d]`` (over n - 1) of features ``[n, d]``."""
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / max(1, len(x) - 1)


def _eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and vectors of a symmetric matrix; torch's are several times faster than numpy's at 2048."""
    import torch

    values, vectors = torch.linalg.eigh(torch.from_numpy(np.ascontiguousarray(matrix)))
    return values.numpy(), vectors.numpy()


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    import torch

    return np.asarray(torch.linalg.eigvalsh(torch.from_numpy(np.ascontiguousarray(matrix))).numpy())


def _roots(values: np.ndarray) -> np.ndarray:
    """Square roots of the eigenvalues of a matrix without negative ones; what rounding left of zeros is zero."""
    noise = len(values) * np.finfo(np.float64).eps * max(float(values.max(initial=0.0)), 0.0)
    return np.asarray(np.sqrt(np.where(values > noise, values, 0.0)))


def _factor(cov: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = cov: Cholesky's, or the symmetric root where the matrix is singular."""
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        values, vectors = _eigen(cov)
        return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½). With Σb = L Lᵀ the last trace is the sum of the roots of Lᵀ Σa L."""
    half = _factor(cov_b)
    roots = _roots(_eigenvalues(half.T @ cov_a @ half))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * roots.sum())


def distance(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Fréchet distance of two sets of n rows, and how much more weight on row i of both moves it, ``[n]``.

    The derivative of 2 tr (Σx Σy)^½ by Σx is the optimal transport map T = L (Lᵀ Σx L)^-½ Lᵀ, the one by Σy its
    inverse; so a row's influence needs zᵀ T z of the centred rows z. With no more rows than columns Σ is singular, and
    the same numbers come from the n × n matrix K = A Bᵀ of the scaled rows: zᵀ T z = (n - 1) [(K Kᵀ)^½]_ii.
    """
    n, width = x.shape
    centred = [z - z.mean(0) for z in (x, y)]
    offset = x.mean(0) - y.mean(0)
    traces = [float((z * z).sum()) / (n - 1) for z in centred]
    if n <= width:
        cross, bends = _by_rows(*centred)
    else:
        cross, bends = _by_columns(*centred)
    parts = np.zeros(n)
    for z, bend, trace, sign in zip(centred, bends, traces, (1.0, -1.0), strict=True):
        parts += 2.0 * sign * (z @ offset) + (z * z).sum(1) - bend - (trace - cross)
    return float((offset**2).sum() + sum(traces) - 2.0 * cross), parts


def _by_rows(x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """tr (Σx Σy)^½ and zᵀ T z of both sets, from the rows' inner products."""
    n = len(x)
    inner = x @ y.T / (n - 1)
    values, vectors = _eigen(inner @ inner.T)
    roots = _roots(values)
    other = (inner.T @ vectors) ** 2 @ _inverse(roots)
    return float(roots.sum()), [(n - 1) * (vectors**2 @ roots), (n - 1) * other]


def _by_columns(x: np.ndarray, y: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The same from the covariances."""
    n = len(x)
    cov_x, cov_y = x.T @ x / (n - 1), y.T @ y / (n - 1)
    tiny = 1e-10 * max(float(np.trace(cov_y)) / len(cov_y), 1e-30)
    half = np.linalg.cholesky(cov_y + tiny * np.eye(len(cov_y)))
    values, vectors = _eigen(half.T @ cov_x @ half)
    roots = _roots(values)
    forth = (x @ (half @ vectors)) ** 2 @ _inverse(roots)
    back = (y @ np.linalg.solve(half.T, vectors)) ** 2 @ roots
    return float(roots.sum()), [forth, back]


def _inverse(roots: np.ndarray) -> np.ndarray:
    limit = 1e-8 * max(float(roots.max(initial=0.0)), 1e-300)
    return np.where(roots > limit, 1.0 / np.maximum(roots, limit), 0.0)


def linear_resample(value: float, parts: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """value + the weighted mean of influences; parts and counts are sums over an item's pictures, ``[n]``."""
    return np.asarray(value + (weights @ parts) / np.maximum(weights @ counts, 1.0))


def _not_below_zero(value: float, parts: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.maximum(linear_resample(value, parts, counts, weights), 0.0)


class SetDistance:
    """Two sets of features and their Fréchet distance; subclasses choose network and distance."""

    differs = ""
    label = ""
    biased = True  # upwards, by few pictures

    def __init__(self, options: Options) -> None:
        self.options = options
        self.extractor = self.network(options)

    @classmethod
    def network(cls, options: Options) -> Extractor:
        """The extractor; here the model's own encoder."""
        from mmi_engine.metrics.encoder import EncoderFeatures

        return EncoderFeatures(options.model, options.device)

    def reference(self, pair: Pair) -> list[Source]:
        """See `pictures.true_pictures`."""
        return true_pictures(pair)

    def prediction(self, pair: Pair) -> list[Source]:
        """See `pictures.made_pictures`."""
        return made_pictures(pair)

    def implementation(self) -> str:
        """Network and weights."""
        return f"{self.extractor.name}, weights {self.extractor.fingerprint[:12]}"

    def score(self, references: list[list[Source]], predictions: list[list[Source] | None]) -> Scores:
        """See `Metric.score`. A missing picture counts as a grey one."""
        counts = [len(item) for item in references]
        true, broken = extract(self.extractor, spread(counts, references), self.options, "true pictures")
        if broken:
            index, why = next(iter(broken.items()))
            source = spread(counts, references)[index]
            raise ManifestError(f"{source.place if source else ''}: {why}", remedy="a reference must load")
        made, problems = extract(
            self.extractor, spread(counts, [p or [] for p in predictions]), self.options, "pictures"
        )
        scores = Scores([self._measure(made, true, counts)], implementation=self.implementation())
        scores.references = float(np.mean(counts)) if counts else 0.0
        scores.problems = blame(problems, counts)
        if self.biased and len(true) <= self.extractor.width:
            scores.notes.append(
                f"{len(true)} pictures for {self.extractor.width} features: the distance is biased upwards; compare "
                "only with runs of as many pictures"
            )
        return scores

    def _measure(self, made: np.ndarray, true: np.ndarray, counts: list[int]) -> Measure:
        if len(true) < 2:
            return Measure(self.label, float("nan"), higher=False)
        value, influences = distance(made, true)
        owner = np.repeat(np.arange(len(counts)), counts)
        parts = np.bincount(owner, influences, minlength=len(counts))
        resample = partial(_not_below_zero, value, parts, np.array(counts, float))
        return Measure(self.label, value, higher=False, resample=resample)


class InceptionDistance(SetDistance):
    """A distance of Inception's pool3 features."""

    side = 0  # px that pictures are brought to before the network's own resize to 299; 0 for none

    @classmethod
    def network(cls, options: Options) -> Extractor:
        """Inception."""
        from mmi_engine.metrics.inception import InceptionFeatures

        assert options.inception is not None
        return InceptionFeatures(options.inception, cls.pixels(options), options.device)

    @classmethod
    def pixels(cls, options: Options) -> int:
        """`side`, for the variant asked for."""
        return cls.side

    def score(self, references: list[list[Source]], predictions: list[list[Source] | None]) -> Scores:
        """See `Metric.score`; other weights than FID's own are said so."""
        scores = super().score(references, predictions)
        if not getattr(self.extractor, "official", True):
            scores.notes.append(
                "the Inception weights are not those of 2015-12-05 (checksum in docs/eval.md): not comparable with "
                "published figures"
            )
        return scores


class Fid(InceptionDistance):
    """FID: pictures brought to 299 px by the network's own bilinear resize; the released variant is `Fid64`."""

    label = "FID"
    differs = "pictures are brought to 64 px first: the same as fid64"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.released:
            self.label = Fid64.label

    @classmethod
    def pixels(cls, options: Options) -> int:
        """64 in the released variant."""
        return Fid64.side if options.released else cls.side


class Fid64(InceptionDistance):
    """FID of pictures at 64 px."""

    label = "FID at 64 px"
    differs = ""
    side = 64


class EncoderFd(SetDistance):
    """Fréchet distance of the features of the model's own encoder."""

    label = "FD (own encoder)"
