"""The Inception-v3 that FID is defined by: pool3 features of the weights of 2015-12-05.

Place in the flow: the extractor of `fid`, `fid64` and `kid`. The weights come from the user: the file
``pt_inception-2015-12-05-6726825d.pth`` of the pytorch-fid project (docs/eval.md says where it is published; 95 628 359
bytes, sha256 below), a TensorFlow network of that day brought to PyTorch. Its layers carry torchvision's names; they
differ from torchvision's network in three pools (averages that do not count the padding, a maximum in the last block)
and in having 1008 classes. Source: Szegedy et al., *Rethinking the Inception Architecture* (2015), figures 5, 6, 7;
Heusel et al. (2017) for the distance.

Shapes: pictures ``[B, 3, h, w]`` in [0, 1] → bilinear to 299 × 299 → ``[B, 2048]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.errors import ModelError
from mmi_engine.metrics.features import file_fingerprint

if TYPE_CHECKING:
    from PIL import Image

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
WIDTH = 2048
REMEDY = f"download {FILE} of the pytorch-fid project's release fid_weights (see docs/eval.md)"

# A branch is a list of convolutions (name, out channels, kernel, stride, padding); a list in it splits the path in two.
_Conv = tuple[str, int, tuple[int, int], int, tuple[int, int]]


def _conv(name: str, out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True) -> _Conv:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    return name, out, size, stride, (size[0] // 2, size[1] // 2) if pad else (0, 0)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (ε 0.001), ReLU."""

    def __init__(
        self, cin: int, out: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(cin, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` → ``[B, out, h', w']``."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Parallel branches, joined by channel.

    Args:
        cin: channels that come in.
        branches: lists of convolutions; a nested list at a branch's end runs its convolutions side by side.
        pool: ``avg`` or ``max`` before ``branch_pool``, ``stride`` for a maximum with stride 2 and no convolution.
        pooled: channels of ``branch_pool``.
    """

    def __init__(self, cin: int, branches: list[list[Any]], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.paths: list[list[Any]] = []
        for branch in branches:
            channels, path = cin, []
            for entry in branch:
                split = entry if isinstance(entry, list) else [entry]
                for name, out, kernel, stride, padding in split:
                    setattr(self, name, ConvNorm(channels, out, kernel, stride, padding))
                path.append([name for name, *_ in split])
                channels = split[0][1]
            self.paths.append(path)
        if pooled:
            self.branch_pool = ConvNorm(cin, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` → ``[B, C', h', w']``."""
        outputs = []
        for path in self.paths:
            y = x
            for names in path:
                y = torch.cat([getattr(self, name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "stride":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def _block_a(cin: int, pooled: int) -> Block:
    branches = [
        [_conv("branch1x1", 64, 1)],
        [_conv("branch5x5_1", 48, 1), _conv("branch5x5_2", 64, 5)],
        [_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)],
    ]
    return Block(cin, branches, "avg", pooled)


def _block_b(cin: int) -> Block:
    double = [_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, 2, False)]
    return Block(cin, [[_conv("branch3x3", 384, 3, 2, False)], double], "stride")


def _block_c(c: int) -> Block:
    double = [_conv("branch7x7dbl_1", c, 1)]
    double += [_conv(f"branch7x7dbl_{k}", c, (7, 1) if k % 2 == 0 else (1, 7)) for k in (2, 3, 4)]
    double += [_conv("branch7x7dbl_5", 192, (1, 7))]
    single = [_conv("branch7x7_1", c, 1), _conv("branch7x7_2", c, (1, 7)), _conv("branch7x7_3", 192, (7, 1))]
    return Block(768, [[_conv("branch1x1", 192, 1)], single, double], "avg", 192)


def _block_d(cin: int) -> Block:
    long = [_conv("branch7x7x3_1", 192, 1), _conv("branch7x7x3_2", 192, (1, 7)), _conv("branch7x7x3_3", 192, (7, 1))]
    long += [_conv("branch7x7x3_4", 192, 3, 2, False)]
    return Block(cin, [[_conv("branch3x3_1", 192, 1), _conv("branch3x3_2", 320, 3, 2, False)], long], "stride")


def _block_e(cin: int, pool: str) -> Block:
    def split(stem: str) -> list[_Conv]:
        return [_conv(f"{stem}a", 384, (1, 3)), _conv(f"{stem}b", 384, (3, 1))]

    branches: list[list[Any]] = [
        [_conv("branch1x1", 320, 1)],
        [_conv("branch3x3_1", 384, 1), split("branch3x3_2")],
        [_conv("branch3x3dbl_1", 448, 1), _conv("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")],
    ]
    return Block(cin, branches, pool, 192)


class Inception(nn.Module):
    """The network up to pool3; ``fc`` is there for the weights' sake."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(128), _block_c(160)
        self.Mixed_6d, self.Mixed_6e = _block_c(160), _block_c(192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "avg"), _block_e(2048, "max")
        self.fc = nn.Linear(WIDTH, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``[B, 3, 299, 299]`` in [0, 1] → pool3 features ``[B, 2048]``."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))


def load(path: Path) -> tuple[Inception, str, bool]:
    """The network with the weights of a file (``.pth`` read with weights only, or safetensors).

    Args:
        path: the file, or a folder that holds it under its usual name (or one ``.safetensors``).

    Returns:
        the network in eval mode, sha256 of the file, and whether these are FID's own weights.

    Raises:
        ModelError: no such file, no weights, or those of another network.
    """
    file = _file(path)
    digest = file_fingerprint(file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file shows itself in a dozen ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f'Inception weights "{file}" cannot be read: {reason}', remedy=REMEDY) from error
    with torch.device("meta"):
        network = Inception()
    expected = {name: t.shape for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t.float() for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    wrong = [name for name in expected if name not in given or given[name].shape != expected[name]]
    wrong += [name for name in given if name not in expected and not name.startswith("AuxLogits")]
    if wrong:
        raise ModelError(
            f'"{file}" holds no FID Inception: {len(wrong)} tensors differ, first {wrong[0]}', remedy=REMEDY
        )  # fmt: skip
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: given[name] for name in expected}, strict=False)
    return network.eval().requires_grad_(False), digest, digest == SHA256


def _file(path: Path) -> Path:
    if path.is_dir():
        named = [path / FILE, *sorted(path.glob("*.safetensors")), *sorted(path.glob("*inception*.pth"))]
        path = next((file for file in named if file.is_file()), path / FILE)
    if not path.is_file():
        raise ModelError(f'Inception weights "{path}" not found', remedy=REMEDY)
    return path


class InceptionFeatures:
    """Extractor of pool3 features.

    Args:
        path: see `load`.
        side: 0 for pictures as they are, else their short side is brought to this many pixels (bicubic) and the centre
            cut out first.
        device: where to compute.
    """

    width = WIDTH

    def __init__(self, path: Path, side: int = 0, device: str = "cpu") -> None:
        self.network, digest, self.official = load(path)
        self.network.to(device)
        self.side, self.device = side, device
        self.name = f"inception{side or SIDE}"
        self.fingerprint = digest

    def prepare(self, image: Image.Image) -> Tensor:
        """``[3, 299, 299]`` in [0, 1]."""
        if self.side:
            image = _square(image, self.side)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None].float() / 255
        return F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]

    @torch.inference_mode()
    def features(self, prepared: list[Tensor]) -> np.ndarray:
        """``[b, 2048]``."""
        return np.asarray(self.network(torch.stack(prepared).to(self.device)).cpu().numpy())


def _square(image: Image.Image, side: int) -> Image.Image:
    """Short side to ``side`` px (bicubic), centre cut out."""
    from PIL import Image

    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
