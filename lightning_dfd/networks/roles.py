"""Teacher, student, fake score and moving average: four roles, on one frozen network or on separate ones.

`LoraRoles` puts an adapter for each trained role on ONE frozen base, which without adapters is the teacher.
`FullRoles` holds separate networks. Both answer to `act_as(role)`, which yields the network to call.

Two traps of adapters on a shared base end in wrong gradients without any error, and are closed here:

* PEFT's `set_adapter` and `disable_adapters` flip `requires_grad`. Doing so between a forward and its backward
  drops the first role's gradient. `act_as` moves only the layers' two state attributes; `requires_grad` is set
  once.
* Gradient checkpointing recomputes the forward during backward, under whichever role is live by then. The
  checkpoints made here re-enter the role of their forward.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from lightning_dfd.distributed.sharding import fill, meta_copy, shard, shard_like
from lightning_dfd.networks.blocks import blocks_within, networks_within
from lightning_dfd.networks.offload import offload_blocks
from lightning_dfd.types import Role

TRAINED: tuple[Role, ...] = ("student", "fake")
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by peft
RECOMPILE_LIMIT = 64  # four roles, with and without gradient, two batch sizes, some room


class Roles(nn.Module, ABC):
    """What the training step needs to know of the roles."""

    held: tuple[Role, ...]  # the trained roles, and "ema" where there is one
    _averaged: tuple[list[Tensor], list[Tensor]] | None = None

    @abstractmethod
    def act_as(self, role: Role) -> AbstractContextManager[nn.Module]:
        """A context manager that yields the network which plays `role`; contexts may be nested."""

    @abstractmethod
    def names_of(self, role: Role) -> dict[str, str]:
        """The role's own parameters: from their names in this module to names that all roles share."""

    def _own(self, role: Role) -> dict[str, nn.Parameter]:
        parameters = dict(self.named_parameters())
        return {shared: parameters[name] for name, shared in self.names_of(role).items()}

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        return list(self._own(role).values())

    def weights_of(self, role: Role) -> dict[str, Tensor]:
        """A role's own weights: LoRA matrices, or a whole network. Load them with `load_weights`."""
        return {name: parameter.detach() for name, parameter in self._own(role).items()}

    @torch.no_grad()
    def load_weights(self, role: Role, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` into a role. Raises ValueError when names or shapes are not the role's."""
        own = self._own(role)
        wrong = sorted(set(own) ^ set(weights))
        wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
        if wrong:
            raise ValueError(
                f"weights for the {role} do not fit: {len(wrong)} of {len(own)} tensors differ, first {wrong[0]!r}. "
                "Was the checkpoint made with another teacher, student.mode, student.rank or student.targets?"
            )
        for name, parameter in own.items():
            parameter.copy_(shard_like(weights[name], parameter))

    def owned(self) -> set[str]:
        """The names, in this module, of what a checkpoint has to hold: all but the teacher."""
        return {name for role in self.held for name in self.names_of(role)}

    def load_owned(self, state: Mapping[str, Tensor]) -> None:
        """Load every held role from weights under the names of `owned`; other entries do not matter.

        An average that the weights lack begins at their student. Raises ValueError where they do not fit.
        """
        for role in self.held:
            given = {shared: state[name] for name, shared in self.names_of(role).items() if name in state}
            if role == "ema" and not given:
                given = self.weights_of("student")
            self.load_weights(role, given)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * student."""
        if self._averaged is None:  # looked up once, as that takes as long as the average
            self._averaged = [*self.parameters_of("ema")], [*self.parameters_of("student")]
        torch._foreach_lerp_(*self._averaged, 1.0 - decay)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile every block of the networks by itself: one piece of code for all blocks of a kind.

        It is compiled once for every role, with and without gradient, and for the teacher's double batch; torch's
        limit on such versions is raised to hold them. Shapes are fixed, so that a block's recomputation in the
        backward pass runs the very code of its forward.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        for block in self.blocks():
            block.compile(backend=backend, dynamic=False)

    def blocks(self) -> list[nn.Module]:
        """The blocks of every diffusers network here."""
        return blocks_within(self)

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread all weights over the processes of `mesh`, block by block (FSDP2)."""
        shard(networks_within(self), self.blocks(), mesh)

    def offload_teacher(self, device: torch.device) -> None:
        """Let the teacher wait on the CPU, where no trained role needs its weights."""

    def train(self, mode: bool = True) -> Roles:
        """Stays in evaluation mode: dropout would make teacher and student disagree by chance."""
        return super().train(False)

    def _check(self, role: Role) -> None:
        if role != "teacher" and role not in self.held:
            remedy = "; set model.student.ema_decay" if role == "ema" else ""
            raise ValueError(f"there is no role {role!r} here, only teacher, {', '.join(self.held)}{remedy}")


class LoraRoles(Roles):
    """One frozen base with a LoRA adapter for each role.

    Args:
        transformer: the teacher's network; frozen here, and changed in place.
        targets: names of the linear layers that get adapters, matched at the end of a module's path; see
            `check_targets`.
        rank, alpha: of the adapters; their output is scaled by alpha / rank (2106.09685).
        ema: whether to keep a moving average of the student as a third adapter.
        checkpointing: recompute activations block by block in the backward pass.
        seed: draws the adapters' first matrices (the second are zero: every role starts as the teacher).

    Raises:
        ValueError: one of `targets` names no layer, or one that takes no adapter.
    """

    def __init__(
        self,
        transformer: nn.Module,
        targets: Sequence[str],
        rank: int = 64,
        alpha: int = 64,
        ema: bool = False,
        checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.held = (*TRAINED, "ema") if ema else TRAINED
        transformer.requires_grad_(False)
        check_targets(transformer, targets)
        self.config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant here
            for role in self.held:
                # Adapters of student and average start alike. PEFT draws from the global generator.
                torch.manual_seed(seed + (role == "fake"))
                inject_adapter_in_model(copy.deepcopy(self.config), transformer, adapter_name=role)
        self.base = transformer
        self._layers = [layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
        for name, parameter in transformer.named_parameters():
            if _role_of(name) is not None:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(_role_of(name) in TRAINED)
        self._live: Role = "teacher"
        self._switch("teacher")
        if checkpointing:
            _checkpoint_blocks(transformer, lambda: self.act_as(self._live))
        self.eval()

    def _switch(self, role: Role) -> None:
        self._live = role
        for layer in self._layers:
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]

    def act_as(self, role: Role) -> AbstractContextManager[nn.Module]:
        self._check(role)
        return _LoraRole(self, role)

    def names_of(self, role: Role) -> dict[str, str]:
        self._check(role)
        names = (name for name, _ in self.named_parameters() if _role_of(name) == role)
        return {name: name.removeprefix("base.").replace(f".{role}.", ".") for name in names}


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Refuse what would train fewer adapters than it says: each target has to be the end of some layers' paths, and all
    of these have to take an adapter. `network` may be on the meta device.

    Raises:
        ValueError: names the target, and the nearest names of layers.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    layers = [name for name, module in modules.items() if isinstance(module, ADAPTABLE)]
    for target in targets:
        meant = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        wrong = next((module for module in meant.values() if not isinstance(module, ADAPTABLE)), None)
        if meant and wrong is None:
            continue
        said = "not a layer of the network" if wrong is None else f"a {type(wrong).__name__}, which takes no LoRA"
        near = difflib.get_close_matches(target, _ends(layers), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_shortest(layers))}"
        raise ValueError(f"model.student.targets: {target!r} is {said}; {hint}")


def _ends(paths: Sequence[str]) -> list[str]:
    """Every name by which layers can be meant: the ends of their paths that do not begin with a number."""
    parts = [path.split(".") for path in paths]
    ends = (part[start:] for part in parts for start in range(len(part)))
    return list(dict.fromkeys(".".join(end) for end in ends if not end[0].isdigit()))


def _shortest(paths: Sequence[str]) -> list[str]:
    """The shortest such name of each layer."""
    return list(dict.fromkeys(min(_ends([path]), key=len) for path in paths))


class FullRoles(Roles):
    """Separate networks: a frozen teacher, and student, fake score and average that start as its copies.

    Args:
        transformer: the teacher's network; frozen here. The copies are float32, whatever its precision.
        ema: whether to keep a moving average of the student.
        checkpointing: recompute activations block by block in the backward pass.
        meta: leave the copies on the meta device; `shard` then gives them values: no process has to hold whole copies.
    """

    def __init__(
        self, transformer: nn.Module, ema: bool = False, checkpointing: bool = False, meta: bool = False
    ) -> None:
        super().__init__()
        self.held = (*TRAINED, "ema") if ema else TRAINED
        self.networks = nn.ModuleDict({"teacher": transformer.requires_grad_(False)})
        for role in self.held:
            network = (meta_copy if meta else copy.deepcopy)(transformer).float().requires_grad_(role in TRAINED)
            if checkpointing and role in TRAINED:
                _checkpoint_blocks(network, nullcontext)
            self.networks[role] = network
        if checkpointing:  # for the GAN, whose gradient runs through the teacher; the copies come first
            _checkpoint_blocks(transformer, nullcontext)
        self.eval()

    def act_as(self, role: Role) -> AbstractContextManager[nn.Module]:
        self._check(role)
        return nullcontext(self.networks[role])

    def offload_teacher(self, device: torch.device) -> None:
        offload_blocks(self.networks["teacher"], device)

    @torch.no_grad()
    def shard(self, mesh: DeviceMesh) -> None:
        super().shard(mesh)
        given = dict(self.networks["teacher"].named_parameters())
        for role in self.held:
            fill(self.networks[role], given)

    def names_of(self, role: Role) -> dict[str, str]:
        self._check(role)
        if role == "teacher":
            return {}
        return {f"networks.{role}.{name}": name for name, _ in self.networks[role].named_parameters()}


def _role_of(parameter_name: str) -> str | None:
    """The adapter that a parameter belongs to, from PEFT's `....lora_A.<adapter>.weight`; None for the base."""
    parts = parameter_name.split(".")
    for kind in ("lora_A", "lora_B"):
        if kind in parts:
            return parts[parts.index(kind) + 1]
    return None


class _LoraRole:
    """The context of one role on a shared base. It can be entered again, as a second recomputation does."""

    def __init__(self, roles: LoraRoles, role: Role) -> None:
        self.roles, self.role = roles, role

    def __enter__(self) -> nn.Module:
        self.before = self.roles._live
        self.roles._switch(self.role)
        return self.roles.base

    def __exit__(self, *exception: object) -> None:
        self.roles._switch(self.before)


def _checkpoint_blocks(network: Any, reenter: Callable[[], AbstractContextManager[Any]]) -> None:
    """Turn on a diffusers network's block-wise checkpointing.

    `reenter()` is asked in the forward for the context in which its recomputation has to run.
    """

    def run(block: nn.Module, *args: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), reenter()))

    network.enable_gradient_checkpointing(run)
