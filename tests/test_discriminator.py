"""The discriminator: what its hooks see, what its heads learn, where its gradients go."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dfd.backbones import Backbone
from lightning_dfd.networks.blocks import blocks_of, feature_shape, tapped
from lightning_dfd.objectives import discriminator_loss
from lightning_dfd.objectives.terms import Discriminator
from lightning_dfd.types import VideoSize
from tests.conftest import random_conditioning

SIZE = VideoSize(9, 32, 32)


def discriminator(network: nn.Module, blocks: list[int] | None = None, seed: int = 0) -> Discriminator:
    shape = feature_shape(network)
    return Discriminator(shape.blocks, shape.width, blocks, seed)


class Net(nn.Module):
    """A network of `count` blocks that add 1, on tokens of 8 features."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    def __init__(self, count: int) -> None:
        super().__init__()
        self.config: Any = {"num_attention_heads": 2, "attention_head_dim": 4}
        self.few = nn.ModuleList([nn.Identity()])
        self.blocks = nn.ModuleList([self.Block() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("count", "blocks"), [(30, [15, 22, 29]), (42, [21, 31, 41]), (2, [1]), (1, [0])])
def test_default_blocks_are_those_of_fastgens_recipes(count: int, blocks: list[int]) -> None:
    assert discriminator(Net(count)).blocks == blocks


def test_taps_see_what_the_blocks_return(backbone: Backbone) -> None:
    transformer = backbone.load_transformer()
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, *backbone.latent_shape(SIZE), generator=generator)
    cond = random_conditioning(backbone, 3, generator)
    timestep = backbone.schedule.timestep(torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64))
    blocks = blocks_of(transformer)
    expected: dict[nn.Module, list[Any]] = {block: [] for block in blocks}
    handles = [block.register_forward_hook(lambda m, i, o: expected[m].append(o)) for block in blocks]
    backbone.call(transformer, x_t, timestep, cond)
    for handle in handles:
        handle.remove()
    with tapped(transformer, [0, 1], 3) as features:
        backbone.call(transformer, x_t, timestep, cond)
    first = [torch.cat([o if isinstance(o, Tensor) else o[0] for o in outputs]) for outputs in expected.values()]
    assert all(torch.equal(a, b) for a, b in zip(features, first, strict=True))
    assert features[0].shape[::2] == (3, 32)
    backbone.call(transformer, x_t, timestep, cond)
    assert len(features) == 2  # the hooks are gone
    assert discriminator(transformer, [0, 1])(features).shape == (3, 2)


def test_a_batch_that_is_called_in_parts_comes_back_whole() -> None:
    network = Net(2)
    x = torch.arange(3 * 5 * 8).float().view(3, 5, 8)
    with tapped(network, [0, 1], 3) as features:
        network(x[:1])
        network(x[1:])
    assert torch.equal(features[0], x + 1)
    assert torch.equal(features[1], x + 2)


def test_frames_seen_as_a_batch_come_back_to_their_clips() -> None:
    network = Net(2)
    x = torch.arange(2 * 3 * 5 * 8).float().view(2 * 3, 5, 8)  # 2 clips of 3 frames
    with tapped(network, [0], 2) as features:
        network(x)
    assert torch.equal(features[0], (x + 1).view(2, 15, 8))


def test_hooks_go_even_when_the_call_fails() -> None:
    network = Net(2)
    with pytest.raises(TypeError), tapped(network, [1], 1):
        network("nonsense")
    output = weakref.ref(network(torch.zeros(1, 5, 8)))
    assert output() is None  # a hook that stayed would keep it


def test_a_network_that_goes_round_twice_is_refused() -> None:
    network = Net(1)
    network.blocks.append(network.blocks[0])
    with pytest.raises(RuntimeError, match="1 blocks are tapped, but one call gave 2"), tapped(network, [0], 1):
        network(torch.zeros(1, 2, 8))


def test_judging_trains_the_features_and_not_the_heads() -> None:
    judge = discriminator(Net(4))
    features = [torch.randn(2, 5, 8, requires_grad=True) for _ in judge.blocks]
    judged = judge.judge(features)
    assert torch.equal(judged, judge(features))
    judged.sum().backward()
    assert all(parameter.grad is None for parameter in judge.parameters())
    gradients = [one.grad for one in features]
    expected = torch.autograd.grad(judge(features).sum(), features)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(gradients, expected, strict=True))  # type: ignore[arg-type,union-attr]


def test_loss_falls_where_features_can_be_told_apart() -> None:
    """Tokens that differ in one feature's spread, not in their mean."""
    judge = discriminator(Net(4), seed=1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        real, made = (
            [torch.randn(8, 20, 8, generator=generator) * torch.tensor([width, *[1.0] * 7]) for _ in judge.blocks]
            for width in (3.0, 0.3)
        )
        loss = discriminator_loss(judge(real), judge(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert losses[-1] < 0.2


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = discriminator(Net(4), seed=3), discriminator(Net(4), seed=3), discriminator(Net(4), seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_what_cannot_be_tapped_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.gan\.blocks is \[0, 4\]; the teacher's blocks are 0 to 3"):
        discriminator(Net(4), [0, 4])
    with pytest.raises(ValueError, match=r"model\.gan\.blocks is \[\]"):
        discriminator(Net(4), [])
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        blocks_of(nn.Linear(2, 2))
    bare = Net(4)
    bare.config = {"num_attention_heads": 2}
    with pytest.raises(ValueError, match="no 'attention_head_dim'"):
        discriminator(bare)
