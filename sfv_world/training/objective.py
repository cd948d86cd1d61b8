"""The training loss: exact negative log-likelihood of noised frames, plus the outcome heads.

STARFlow-V (arXiv 2511.20462) without its denoiser: log p is maximised with every term, weighted towards what moves.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from sfv_world.control.spaces import flatten_actions
from sfv_world.data.clips import Clips
from sfv_world.model import WorldModel


class Batch(NamedTuple):
    """Clips as tensors, everything aligned to the frame it leads to."""

    frames: UInt8[Tensor, "b t h w 3"]
    actions: Float[Tensor, "b t n"]
    known: Bool[Tensor, "b t"]
    rewards: Float[Tensor, "b t"]
    terminations: Bool[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    terminal: Bool[Tensor, "b t"]

    @classmethod
    def from_clips(cls, clips: Clips, model: WorldModel) -> "Batch":
        """Tensors on the model's device; the first frame of a clip has no known action."""
        device = model.codec.scale.device
        b, t = clips.valid.shape
        actions = flatten_actions(model.action_space, clips.actions, (b, t - 1))
        actions = np.concatenate([np.zeros_like(actions[:, :1]), actions], axis=1)
        known = np.broadcast_to(np.arange(t) > 0, (b, t)).copy()
        arrays = (clips.frames, actions, known, clips.rewards, clips.terminations, clips.valid, clips.terminal)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the loss is made of."""

    action_dropout: float = 0.05
    """Part of the actions that training hides, so that p(frame | no action) is learned too."""
    reward_weight: float = 0.02
    """Weight of the reward's cross-entropy (nats a frame) beside the flow's nats a dimension."""
    termination_weight: float = 0.1
    """Weight of the termination's cross-entropy."""
    motion_weight: float = 50.0
    """Weight of a patch in what moved just before, per mean square of a change 20 times the noise, which is 1 for pixels at
    noise 0.05; see `motion_weights`."""
    draft_weight: float = 0.02
    """Weight of the learned draft's error; it moves the draft network alone."""
    first_frame_weight: float = 1.0
    """Weight of the first frame of a clip, which nothing precedes."""


def world_loss(
    model: WorldModel, batch: Batch, config: ObjectiveConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its detached parts.

    The flow's part is the mean negative log-likelihood in nats a dimension (a colour value or a latent), weighted by
    `motion_weights`. Padded frames count nowhere; an ended game's repeated screen is no target for the flow, and the first
    frame none for the heads.
    """
    shape, device = batch.frames.shape, batch.frames.device
    uniform = torch.rand(shape, generator=generator, device=device)
    normal = torch.randn((*shape[:2], *model.config.codec.signal), generator=generator, device=device)
    kept = torch.rand(batch.known.shape, generator=generator, device=device) >= config.action_dropout
    tokens = model.noised_tokens(batch.frames, uniform, normal)
    reading = model(tokens, batch.actions, batch.known & kept)
    nats = -reading.log_likelihood / model.config.dimensions
    share = motion_weights(tokens, model, config.motion_weight)
    weighted = -((reading.encoding.log_prob * share).sum(-1) + model.codec.log_det) / model.config.dimensions

    later = torch.arange(shape[1], device=device) > 0
    weights = (batch.valid & ~batch.terminal) * torch.where(later, 1.0, config.first_frame_weight)
    reward, termination = model.heads.loss(reading.outcome, batch.rewards, batch.terminations)
    reward, termination = (_mean(part, (batch.valid & later).float()) for part in (reward, termination))
    flow = _mean(weighted, weights)
    loss = flow + config.reward_weight * reward + config.termination_weight * termination
    drafts = {}
    if reading.draft_error is not None:  # moves the draft network alone
        drafts["draft_error"] = _mean(reading.draft_error.mean(-1), weights[:, 1:])
        loss = loss + config.draft_weight * drafts["draft_error"]
    metrics = {
        "flow_loss": flow,
        "nats_per_dim": _mean(nats, weights),
        "next_frame_bits_per_dim": _mean(nats, weights * later) / math.log(2),
        "reward_loss": reward,
        "termination_loss": termination,
        **drafts,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def motion_weights(tokens: Float[Tensor, "b t l c"], model: WorldModel, weight: float) -> Float[Tensor, "b t l"]:
    """Weights, of mean 1, that turn the loss to where something moved: up to ten times that of a still patch.

    What acts in a world (a missile, a monster) fills a few patches of a frame and weighs little in its likelihood. A patch
    weighs by how much it or a neighbour changed from frame n-2 to n-1. That is known before frame n, so the weighted loss
    is lowest at the same densities as the unweighted one; where capacity is short, it says where to spend it.
    """
    b, t, l, _ = tokens.shape
    if t < 3:
        return tokens.new_ones(b, t, l)
    rows, columns = model.config.codec.grid
    with torch.no_grad():
        change = ((tokens[:, 1:-1] - tokens[:, :-2]) * model.codec.scale).square().mean(-1) - 2 * model.config.noise**2
        near = F.max_pool2d(change.reshape(-1, 1, rows, columns), 3, stride=1, padding=1)
        raw = (1 + weight / (20 * model.config.noise) ** 2 * near).clamp(1, 10).reshape(b, t - 2, l)
        raw = torch.cat([raw.new_ones(b, 2, l), raw], dim=1)
        return raw / raw.mean()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-9)
