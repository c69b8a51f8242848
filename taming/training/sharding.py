"""Training a prior whose weights, gradients and moments are spread over the processes: FSDP2.

    python main.py --base configs/drin_transformer.yaml -t --gpus 8 --strategy fsdp2

Each block of the prior is gathered for its forward and backward pass and freed afterwards (Rajbhandari et
al. 2020, "ZeRO", stage 3; `torch.distributed.fsdp.fully_shard`), so that each of W processes keeps 16 / W
bytes of a weight: itself, its gradient and two moments. Checkpoints are the ordinary ones: whole tensors
under the usual names, written by the first process. Any number of processes resumes them, sharded or not. It
runs on CPUs as well, over gloo, where Lightning's FSDP does not.
"""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from taming.modules.distributed import sharded_like, whole

NAME = "fsdp2"


def resolve_strategy(strategy: Any, accelerator: str) -> Any:
    """Return the strategy for the Trainer: a `ShardedStrategy` for "fsdp2", any other as it is.

    Raises:
        ValueError: "fsdp" on a CPU, where Lightning does not run it.
    """
    if strategy == NAME:
        return ShardedStrategy()
    if isinstance(strategy, str) and strategy.startswith("fsdp") and accelerator == "cpu":
        raise ValueError(f"--strategy {strategy} needs GPUs (Lightning's FSDP): use --strategy {NAME} or ddp")
    return strategy


class ShardedStrategy(DDPStrategy):
    """Shards the prior of a `Net2NetTransformer` over all processes; its frozen stages are whole on each.

    Raises:
        ValueError: at the start of training, a model without a prior, or one that averages its weights.
    """

    strategy_name = NAME

    def setup(self, trainer: pl.Trainer) -> None:
        """Put the model on its device; shard it for training."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        assert self.accelerator is not None and self.model is not None  # as DDP, but for copying the weights
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Shard the model, where DDP would wrap it."""
        shard(self.lightning_module)

    # ---- checkpoints: whole tensors, which the first process has in the end

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the model with whole tensors; the others than the first process drop them."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer with whole tensors, in the order of its parameters as ever."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return self._gathered(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Shard the states of a checkpoint as their parameters are."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            of_number = dict(zip(numbers, parameters, strict=True))
            states = {
                number: {key: sharded_like(value, of_number[number]) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": states})

    def _gathered(self, nested: Any) -> Any:
        """Gather the tensors in nested dicts and lists, one after the other, on the first process's CPU."""
        if isinstance(nested, Mapping):
            return {key: self._gathered(value) for key, value in nested.items()}
        if isinstance(nested, list):
            return [self._gathered(value) for value in nested]
        if isinstance(nested, Tensor) and (gathered := whole(nested)) is not nested:
            return gathered.cpu() if self.is_global_zero else gathered.new_empty(0)
        return nested


def shard(model: Any) -> None:
    """Shard the prior of a model in place, block by block, over all processes."""
    prior = getattr(model, "transformer", None)
    if not isinstance(prior, nn.Module):
        raise ValueError(
            f"--strategy {NAME} shards the prior of stage 2, which {type(model).__name__} has not: use ddp"
        )
    if getattr(model, "averages", None) is not None:
        raise ValueError(f"--strategy {NAME} does not average weights: leave out model.ema_decay, or use ddp")
    for tensor in (*prior.parameters(), *prior.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # as ddp does: all begin with the weights of the first
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    inside = {id(module) for module in prior.modules()}
    for block in model.blocks().values():
        if id(block) in inside and block is not prior:
            fully_shard(block, mesh=mesh)
    fully_shard(prior, mesh=mesh)
