"""The zigzag deal against dealing by hand."""

import pytest
import torch

from duquant.errors import ShapeError
from duquant.transforms.permutation import zigzag

CASES = [(16, 1), (16, 2), (16, 3), (7, 5), (6, 96), (128, 12), (96, 6), (1, 8), (5, 3)]


def deal_by_hand(magnitude: torch.Tensor, block_size: int) -> list[int]:
    blocks = len(magnitude) // block_size
    hands: list[list[int]] = [[] for _ in range(blocks)]
    order = sorted(range(len(magnitude)), key=lambda channel: (-float(magnitude[channel]), channel))
    for position, channel in enumerate(order):
        turn, seat = divmod(position, blocks)
        hands[seat if turn % 2 == 0 else blocks - 1 - seat].append(channel)
    return [channel for hand in hands for channel in hand]


@pytest.mark.parametrize(("block_size", "blocks"), CASES)
def test_zigzag_equals_dealing_by_hand(block_size: int, blocks: int) -> None:
    magnitude = torch.rand(block_size * blocks, generator=torch.Generator().manual_seed(blocks))
    assert zigzag(magnitude, block_size).tolist() == deal_by_hand(magnitude, block_size)


def test_ties_keep_the_channel_order() -> None:
    magnitude = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 0.0, 1.0, 2.0, 2.0])
    assert zigzag(magnitude, 3).tolist() == deal_by_hand(magnitude, 3)


@pytest.mark.parametrize(("block_size", "blocks"), CASES)
def test_zigzag_is_a_permutation(block_size: int, blocks: int) -> None:
    perm = zigzag(torch.rand(block_size * blocks, generator=torch.Generator().manual_seed(1)), block_size)
    assert sorted(perm.tolist()) == list(range(block_size * blocks))
    inverse = torch.argsort(perm)
    assert torch.equal(perm[inverse], torch.arange(block_size * blocks))


def test_zigzag_spreads_largest_channels_across_blocks() -> None:
    magnitude = torch.ones(96)
    outliers = torch.tensor([3, 4, 5, 6, 40, 90])
    magnitude[outliers] = 100.0
    blocks = zigzag(magnitude, 16).view(6, 16)
    assert all(len(set(block.tolist()) & set(outliers.tolist())) == 1 for block in blocks)


@pytest.mark.parametrize(("block_size", "blocks"), [(16, 4), (16, 5), (7, 3), (2, 9)])
def test_block_sums_differ_by_at_most_the_largest_magnitude(block_size: int, blocks: int) -> None:
    # Two rounds there and back leave any two blocks apart by no more than the spread of those rounds; the spreads of
    # successive rounds telescope to max - min.
    magnitude = torch.rand(block_size * blocks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = magnitude[zigzag(magnitude, block_size)].view(blocks, block_size).sum(1)
    assert float(sums.max() - sums.min()) <= float(magnitude.max() - magnitude.min())


def test_block_size_that_does_not_divide_the_channels_is_an_error() -> None:
    with pytest.raises(ShapeError, match="block size 16 does not divide 40"):
        zigzag(torch.ones(40), 16)
