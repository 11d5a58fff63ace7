"""Once-for-all training of one block: sort its channels by importance, train several widths at once, shrink it.

Run it with `python examples/elastic_block.py`; it takes seconds on a CPU. The block learns to do what a smaller block
with unknown weights does to random images. At the end half of the channels are cut off for good, and the result is
compared with the same number of channels taken without sorting.
"""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor, nn

from tfnas_ext.nn import MBInvRes

CHANNELS, MAX_WIDTH, TEACHER_WIDTH = 16, 96, 24
STEPS, BATCH = 60, 8


def importance(block: MBInvRes) -> Tensor:
    """How much each mid channel can put out: the L1 norm of its column of the projection, times its norm's scale."""
    assert block.bn2.weight is not None
    return block.conv_pwl.weight.abs().sum((0, 2, 3)) * block.bn2.weight.abs()


def loss_of(block: MBInvRes, teacher: MBInvRes, images: Tensor) -> Tensor:
    """Mean squared error against the teacher."""
    with torch.no_grad():
        wanted = teacher(images)
    return nn.functional.mse_loss(block(images), wanted)


def train(block: MBInvRes, teacher: MBInvRes) -> None:
    """Steps on the full width and one random width each; channels are sorted anew every 20 steps."""
    optimizer = torch.optim.Adam(block.parameters(), lr=3e-3)
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    for step in range(STEPS):
        if step % 20 == 0:
            block.set_importance(importance(block), optimizer)
        images = torch.randn(BATCH, CHANNELS, 10, 10, generator=generator)
        optimizer.zero_grad()
        for width in (MAX_WIDTH, rng.randrange(8, MAX_WIDTH)):
            block.set_width(width)
            loss_of(block, teacher, images).backward()
        optimizer.step()
    block.set_width(None)


def cut(block: MBInvRes, width: int) -> MBInvRes:
    """A block that has nothing but the first `width` channels."""
    small = MBInvRes(CHANNELS, width, CHANNELS, act=block.act)
    state = {
        name: value if value.shape == own.shape else value[tuple(slice(n) for n in own.shape)]
        for (name, value), own in zip(block.state_dict().items(), small.state_dict().values(), strict=True)
    }
    small.load_state_dict(state)
    return small


def main() -> None:
    torch.manual_seed(0)
    teacher = MBInvRes(CHANNELS, TEACHER_WIDTH, CHANNELS, act="swish")
    block = MBInvRes(CHANNELS, MAX_WIDTH, CHANNELS, act="swish")
    images = torch.randn(64, CHANNELS, 10, 10, generator=torch.Generator().manual_seed(2))
    print(f"before training: loss {loss_of(block, teacher, images).item():.4f}")
    train(block, teacher)
    block.set_importance(importance(block))
    for width in (MAX_WIDTH, MAX_WIDTH // 2, MAX_WIDTH // 4):
        block.set_width(width)
        print(f"width {width}: loss {loss_of(block, teacher, images).item():.4f}")

    half = MAX_WIDTH // 2
    small = cut(block, half)
    block.set_width(half)
    difference = (small(images) - block(images)).abs().max().item()
    print(f"cut to {half} channels: differs from the elastic block by {difference:.1e}")
    least = copy.deepcopy(block)
    least.set_mask(torch.arange(MAX_WIDTH) >= MAX_WIDTH - half)
    kept, dropped = (loss_of(b, teacher, images).item() for b in (block, least))
    print(f"the more important half: loss {kept:.4f}, the other half: {dropped:.4f}")


if __name__ == "__main__":
    main()
