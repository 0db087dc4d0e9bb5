"""Distances between sets of features: known answers, scipy, derivatives; the Inception network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmi_engine.errors import ModelError
from mmi_engine.metrics import frechet, inception, kid
from mmi_engine.metrics.base import Measure
from mmi_engine.metrics.bootstrap import add_intervals


def test_frechet_known_answers():
    eye = np.eye(4)
    assert frechet.frechet(np.zeros(4), eye, np.ones(4), eye) == pytest.approx(4.0, abs=1e-9)
    assert frechet.frechet(np.zeros(4), eye, np.zeros(4), 4 * eye) == pytest.approx(4.0, abs=1e-9)
    assert frechet.frechet(np.zeros(3), np.diag([1.0, 4, 9]), np.zeros(3), 16 * np.eye(3)) == pytest.approx(
        14.0, abs=1e-9
    )
    mean, cov = frechet.moments(np.array([[0.0], [0.5], [1.0]]))
    assert mean == [0.5] and cov == [[0.25]]


def test_frechet_of_the_width_of_inception():
    eye = np.eye(2048)
    assert frechet.frechet(np.zeros(2048), eye, np.ones(2048), eye) == pytest.approx(2048.0, abs=1e-6)


@pytest.mark.parametrize("rows", [40, 6])
def test_frechet_against_scipy(rows):
    from scipy.linalg import eigvals, sqrtm

    rng = np.random.default_rng(rows)
    x, y = rng.normal(size=(rows, 8)) @ rng.normal(size=(8, 8)), rng.normal(size=(rows, 8)) + 0.3
    (ma, ca), (mb, cb) = frechet.moments(x), frechet.moments(y)
    roots = sqrtm(ca @ cb).trace() if rows > 8 else np.sqrt(np.maximum(np.real(eigvals(ca @ cb)), 1e-14)).sum()
    theirs = ((ma - mb) ** 2).sum() + np.trace(ca + cb) - 2 * np.real(roots)
    close = 1e-6 if rows > 8 else 2e-6  # of a singular matrix the eigenvalues themselves are not known better
    assert frechet.frechet(ma, ca, mb, cb) == pytest.approx(theirs, abs=close)
    assert frechet.distance(x, y)[0] == pytest.approx(theirs, abs=close)


def test_both_ways_to_the_distance_agree_and_a_set_is_at_no_distance_from_itself():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(9, 8)) @ rng.normal(size=(8, 8)), rng.normal(size=(9, 8)) + 0.3
    centred = x - x.mean(0), y - y.mean(0)
    (a, (a_x, a_y)), (b, (b_x, b_y)) = frechet._by_rows(*centred), frechet._by_columns(*centred)
    assert a == pytest.approx(b) and np.allclose(a_x, b_x, rtol=1e-5) and np.allclose(a_y, b_y, rtol=1e-5)
    for z in (x, rng.normal(size=(5, 8))):
        value, parts = frechet.distance(z, z)
        assert value == pytest.approx(0.0, abs=1e-6) and np.allclose(parts, 0.0, atol=1e-5)


def test_influence_is_the_derivative_and_its_interval_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 3)) * [1, 2, 3], rng.normal(size=(300, 3)) + 0.5
    value, parts = frechet.distance(x, y)
    heavier = np.append(np.arange(300), [7] * 3)  # a little more weight on row 7
    moved = frechet.frechet(*frechet.moments(x[heavier]), *frechet.moments(y[heavier]))
    assert (moved - value) == pytest.approx(parts[7] * 3 / 303, rel=0.15)
    measure = Measure("fd", value, resample=lambda w: frechet.linear_resample(value, parts, np.ones(300), w))
    add_intervals([measure], 300, 400)
    drawn = [rng.integers(300, size=300) for _ in range(200)]
    real = [frechet.frechet(*frechet.moments(x[d]), *frechet.moments(y[d])) for d in drawn]
    assert (measure.high - measure.low) == pytest.approx(np.percentile(real, 97.5) - np.percentile(real, 2.5), rel=0.3)


def test_kernel_distance_against_the_plain_sum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 5)) + 0.4

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    same = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(9) for j in range(9) if i != j) / 72
    cross = sum(kernel(a, b) for a in x for b in y) / 81
    value, parts = kid.mmd(x, y)
    assert value == pytest.approx(same - 2 * cross) and parts.mean() == pytest.approx(0.0, abs=value)


def test_inception_has_the_published_weights_names_and_size():
    network = inception.Inception().eval()
    tensors = network.state_dict()
    assert (
        sum(t.numel() * t.element_size() for t in tensors.values()) == 95_542_320
    )  # the file: 95 628 359 with its index
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch5x5_2.bn.running_var": (64,),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3), "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }.items():  # fmt: skip
        assert tuple(tensors[name].shape) == shape
    with torch.no_grad():
        assert network(torch.rand(1, 3, 299, 299)).shape == (1, 2048)


def test_inception_weights_are_loaded_by_name_or_refused(tmp_path):
    torch.manual_seed(0)
    network = inception.Inception().eval()
    path = tmp_path / inception.FILE
    torch.save(network.state_dict(), path)
    extractor = inception.InceptionFeatures(tmp_path, 64)
    assert not extractor.official and len(extractor.fingerprint) == 64
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    prepared = extractor.prepare(image)
    assert prepared.shape == (3, 299, 299)
    with torch.no_grad():
        assert np.allclose(extractor.features([prepared])[0], network(prepared[None])[0], atol=1e-6)
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="tensors differ, first Conv2d_1a_3x3.conv.weight; download"):
        inception.load(path)
    path.write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be read"):
        inception.load(path)
    with pytest.raises(ModelError, match="not found"):
        inception.load(tmp_path / "gone.pth")
