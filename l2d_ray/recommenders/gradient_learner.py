"""The part that learners with a PyTorch model share: the steps of an epoch, and the state of model and optimizer.

Parameters that require no gradient are frozen: they are neither trained nor saved, because they come from elsewhere,
such as the weights of a language model.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l2d_ray.config import TrainConfig
from l2d_ray.recommenders.training import Learner, TrainingData

OPTIMIZER = "optimizer"
"""First part of the names of the optimizer's tensors in a learner's state."""


class GradientLearner(Learner):
    """A learner with a PyTorch model and an optimizer. A subclass makes both."""

    _model: nn.Module
    _optimizer: Optimizer

    def __init__(self, settings: TrainConfig, data: TrainingData, device: str) -> None:
        self._settings, self._data, self._device = settings, data, torch.device(device)

    @abstractmethod
    def _losses(self, epoch: int) -> Iterator[Tensor]:
        """Yield the losses [N] of the samples of one batch after the other, in an order that the epoch decides."""

    def run_epoch(self, epoch: int) -> float:
        """Run one optimizer step for each batch, in a new order."""
        self._model.train()
        total, samples = 0.0, 0
        with self._seeded(epoch):
            for losses_N in self._losses(epoch):
                loss = losses_N.mean()
                self._optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                self._optimizer.step()
                total, samples = total + loss.item() * len(losses_N), samples + len(losses_N)
                if not np.isfinite(total):
                    break
        return total / samples

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the model's state without frozen parameters."""
        return on_cpu(trained_state(self._model))

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the states of the model and of the optimizer."""
        moments = {
            f"{OPTIMIZER}.{number}.{name}": value
            for number, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return on_cpu(trained_state(self._model) | moments)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the states of the model and of the optimizer."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key in [key for key in state if key.startswith(f"{OPTIMIZER}.")]:
            _, number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = state[key]
        load_state(self._model, {key: value for key, value in state.items() if key.partition(".")[0] != OPTIMIZER})
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    @contextmanager
    def _seeded(self, epoch: int) -> Iterator[None]:
        """Draw random numbers that the seed and the epoch decide, and leave the process's own as they were."""
        (seed,) = np.random.SeedSequence([self._settings.seed, epoch]).generate_state(1)
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(int(seed))
            yield


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state without frozen parameters."""
    frozen = _frozen(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over a state without frozen parameters. Raises RuntimeError if it is that of another model."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = {*unexpected, *missing} - _frozen(model)
    if wrong:
        raise RuntimeError(f"missing or unexpected: {', '.join(sorted(wrong))}")


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
