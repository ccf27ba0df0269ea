"""A learner of a PyTorch module: AdamW, random numbers that the seed decides, and what a checkpoint keeps of both.

Parameters that require no gradient are frozen: they are neither trained nor saved. They come from elsewhere, such as
the weights of a language model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from l2d_ray.config import TrainConfig
from l2d_ray.errors import InputError
from l2d_ray.recommenders.trained import Trained
from l2d_ray.recommenders.training import Learner

BETAS = (0.9, 0.98)
"""Adam's decay rates in the code of SASRec's authors."""
OPTIMIZER = "optimizer"
"""First part of the names of the optimizer's tensors in a learner's state."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy, on the CPU, of a model's state without its frozen parameters."""
    frozen = _frozen(model)
    state = model.state_dict()
    return {name: weight.detach().cpu().clone() for name, weight in state.items() if name not in frozen}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Take over `trained_weights`. Raises RuntimeError if they are those of another model."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = {*unexpected, *(set(missing) - _frozen(model))}
    if wrong:
        raise RuntimeError(f"missing or unexpected weights: {', '.join(sorted(wrong))}")


def load_trained(model: nn.Module, trained: Trained) -> None:
    """Take over the result of a training. Raises InputError if it is that of another model."""
    try:
        load_weights(model, trained.weights)
    except RuntimeError:
        raise InputError(
            f"{trained.location}: holds other weights than training.json says; delete its folder and run jobs/train.py"
            f" recommender={trained.record.recommender} again"
        ) from None


def _frozen(model: nn.Module) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, weight in named if not weight.requires_grad}


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers that the seed and the epoch decide, and leave the process's own as they were."""
    (state,) = np.random.SeedSequence([seed, epoch]).generate_state(1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(state))
        yield


class GradientLearner(Learner, Generic[ModuleT]):
    """A module during its training by gradients."""

    def __init__(self, model: ModuleT, settings: TrainConfig, device: str) -> None:
        self._settings, self._device = settings, torch.device(device)
        self._model = model.to(self._device)
        self._optimizer = torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=settings.weight_decay,
        )

    def _step(self, loss: Tensor) -> None:
        """Run one optimizer step."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the model's state."""
        return trained_weights(self._model)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the states of the model and of the optimizer."""
        moments = {
            f"{OPTIMIZER}.{number}.{name}": value.detach().cpu().clone()
            for number, values in self._optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return self.weights() | moments

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the states of the model and of the optimizer."""
        moments: dict[int, dict[str, Tensor]] = {}
        for key in [key for key in state if key.startswith(f"{OPTIMIZER}.")]:
            _, number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = state[key]
        load_weights(self._model, {key: value for key, value in state.items() if key.partition(".")[0] != OPTIMIZER})
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
