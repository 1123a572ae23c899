"""Batched transforms: a sample's value does not depend on its company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.streams import Augment, BatchTransform, Chain, Flatten, Permute, Rotate, Scale, Tokens
from cmoe.streams.fingerprint import _Hash

G = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (700, 3, 8, 8), dtype=torch.uint8, generator=G)
TABLE = torch.stack([torch.randperm(192, generator=G) for _ in range(4)])

TRANSFORMS: dict[str, BatchTransform] = {
    "scale": Scale(),
    "normalise": Scale(255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    "flatten": Flatten(),
    "permute": Permute(TABLE),
    "rotate": Rotate([0.0, 30.0, 90.0, 123.4]),
    "augment off": Augment(),
    "tokens": Tokens(),
    "chain": Chain(Permute(TABLE), Scale(), Flatten()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [1, 5, 700])
def test_mixed_batches_equal_single_samples(name: str, size: int) -> None:
    transform, whose = TRANSFORMS[name], torch.arange(size) % 4
    mixed = transform(IMAGES[:size], whose, train=False)
    for i in range(0, size, 13):
        assert torch.equal(mixed[i], transform(IMAGES[i : i + 1], int(whose[i]), train=False)[0])
        assert torch.equal(mixed[i], transform(IMAGES[i : i + 1], whose[i : i + 1], train=False)[0])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_batch_is_not_changed(name: str) -> None:
    for source in (IMAGES[:9].clone(), IMAGES[:9].float()):
        before = source.clone()
        TRANSFORMS[name](source, 0, train=False)
        assert torch.equal(source, before)


def test_scale_is_torchvisions() -> None:
    from torchvision.transforms.v2.functional import normalize

    assert torch.equal(Scale()(IMAGES, 0, train=False), IMAGES.float() / 255)
    ours = Scale(255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(IMAGES, 0, train=False)
    torch.testing.assert_close(ours, normalize(IMAGES.float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))


def test_permutation_is_one() -> None:
    y = Permute(TABLE)(IMAGES, 2, train=False).flatten(1)
    assert torch.equal(y, IMAGES.flatten(1)[:, TABLE[2]])


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_rotation_is_counter_clockwise(angle: int) -> None:
    y = Rotate([float(angle)])(IMAGES, 0, train=False)
    torch.testing.assert_close(y, torch.rot90(IMAGES, angle // 90, (2, 3)).float() / 255, atol=1e-5, rtol=0)


def test_rotation_of_other_angles_is_torchvisions() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import rotate

    x = IMAGES.float() / 255
    theirs = rotate(x, 33.0, interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(Rotate([33.0])(IMAGES, 0, train=False), theirs, atol=1e-4, rtol=0)


def crops(x: Tensor, pad: int) -> list[Tensor]:
    padded = F.pad(x, (pad,) * 4)
    _, h, w = x.shape
    views = [padded[:, i : i + h, j : j + w] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    return views + [v.flip(2) for v in views]


def test_augmentation_is_a_crop_or_its_mirror_image() -> None:
    y = Augment(2)(IMAGES[:60], 0, train=True, generator=torch.Generator().manual_seed(1))
    found = [[torch.equal(y[i], c) for c in crops(IMAGES[i], 2)].index(True) for i in range(60)]
    assert len(set(found)) > 25
    assert {f < 25 for f in found} == {True, False}


def test_augmentation_is_the_generators() -> None:
    a, b, c = (
        Chain(Augment(), Scale())(IMAGES, 0, train=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(Augment()(IMAGES, 0, train=False), IMAGES)


def test_fingerprints_tell_transforms_apart() -> None:
    def digest(transform: BatchTransform) -> str:
        h = _Hash()
        h.add("transform", transform)
        return h.sha.hexdigest()

    assert len({digest(t) for t in TRANSFORMS.values()}) == len(TRANSFORMS)
    assert digest(Permute(TABLE)) == digest(Permute(TABLE.clone()))
    assert digest(Permute(TABLE)) != digest(Permute(TABLE.flip(0)))
    rotate = Rotate([10.0])
    before = digest(rotate)
    rotate(IMAGES[:1], 0, train=False)
    assert digest(rotate) == before
