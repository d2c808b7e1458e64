"""A discriminator on what the frozen teacher makes of a clip: hooks on its blocks, and a small head on each.

Axis legend: B batch, S tokens of a clip (frames and places), D features of a token, N tapped blocks.
DMD2 (2405.14867) reads the fake score's features; like FastGen's video recipes this reads the teacher's, which do not
change while the head learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

HIDDEN = 256


class Discriminator(nn.Module):
    """Real or made: N logits for each clip from the features that N blocks of the teacher give of it.

    Each block has a head of its own: every token is normalised and goes through one hidden layer, the mean over the
    tokens gives the logit. So it fits any number of frames and any size.

    Args:
        transformer: the teacher's network; only looked at.
        blocks: numbers of its blocks, from 0; None for one half way, one at three quarters, and the last.
        seed: draws the weights.

    Attributes:
        blocks: the numbers, rising.

    Raises:
        ValueError: the network has no such block, or no list of blocks.
    """

    def __init__(self, transformer: nn.Module, blocks: Sequence[int] | None = None, seed: int = 0) -> None:
        super().__init__()
        count, features = len(blocks_of(transformer)), _token_features(transformer)
        self.blocks = sorted({count // 2, 3 * count // 4, count - 1} if blocks is None else set(blocks))
        if not self.blocks or self.blocks[0] < 0 or self.blocks[-1] >= count:
            raise ValueError(
                f"model.gan.blocks is {list(blocks or [])}; the teacher's blocks are 0 to {count - 1}, name some of "
                "them, or null for the middle and later ones"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(_Head(features) for _ in self.blocks)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, N], float32, of features N x [B, S, D] from `tapped`."""
        logits = [head(tokens) for head, tokens in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)

    def judge(self, features: Sequence[Tensor]) -> Tensor:
        """As `forward`, with gradient to the features but none to the weights: for the student's loss, which must
        leave nothing in the gradients of the next update of the head."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        logits: Tensor = functional_call(self, weights, (features,))
        return logits

    def take_over(self, weights: Mapping[str, Tensor]) -> bool:
        """Load another discriminator's weights, if they are of the same shapes; says whether they are."""
        shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        fits = shapes == {name: tensor.shape for name, tensor in weights.items()}
        if fits:
            self.load_state_dict(dict(weights))
        return fits


class _Head(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, elementwise_affine=False)
        self.hidden = nn.Linear(features, HIDDEN)
        self.logit = nn.Linear(HIDDEN, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.hidden(self.norm(tokens.float())))
        logit: Tensor = self.logit(hidden.mean(1)).float()
        return logit


@contextmanager
def tapped(transformer: nn.Module, blocks: Sequence[int], batch_size: int) -> Iterator[list[Tensor]]:
    """Fills the yielded list, at its end, with what the blocks return while `transformer` is called: [B, S, D] each.

    Of a block that returns several tensors (CogVideoX: video and text tokens) the first counts. Frames that a block
    sees as a batch are put back into their clips, and the calls of a batch that was called in parts into one.

    Raises:
        RuntimeError: a call did not go through every tapped block once.
    """
    features: list[Tensor] = []
    calls: list[list[Tensor]] = []  # what the blocks gave in each call of the network

    def begin(network: nn.Module, arguments: object) -> None:
        calls.append([])

    def keep(block: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        calls[-1].append(output if isinstance(output, Tensor) else output[0])

    layers = blocks_of(transformer)
    handles = [layers[number].register_forward_hook(keep) for number in blocks]
    handles.append(transformer.register_forward_pre_hook(begin))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
    for given in calls or [[]]:
        if len(given) != len(blocks):
            raise RuntimeError(f"{len(blocks)} blocks are tapped, but one call gave {len(given)} features")
    for parts in zip(*calls, strict=True):
        features.append(torch.cat(parts).reshape(batch_size, -1, parts[0].shape[-1]))


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """The network's blocks: the longest list of modules right below it."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks to tap; set model.gan.weight: 0")
    return max(lists, key=len)


def _token_features(transformer: nn.Module) -> int:
    """D, as diffusers' video transformers state it."""
    config: dict[str, int] = dict(transformer.config)  # type: ignore[arg-type]
    if "model_dim" in config:  # Kandinsky's name for it
        return config["model_dim"]
    try:
        return config["num_attention_heads"] * config["attention_head_dim"]
    except KeyError as error:
        raise ValueError(
            f"the config of {type(transformer).__name__} has no {error}, from which the size of its features follows; "
            "set model.gan.weight: 0"
        ) from error
