"""The training loss: exact negative log-likelihood of noised frames, plus the outcome heads.

STARFlow-V (arXiv 2511.20462): log p is maximised with every term, weighted towards what moves. Every few steps it is not
weighted; the gradient of such a loss with respect to its input is the flow's score, which the denoiser learns.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sfv_world.control.spaces import flatten_actions
from sfv_world.data.clips import Clips
from sfv_world.denoiser import video_score
from sfv_world.model import Reading, WorldModel
from sfv_world.released.adapted import AdaptedModel
from sfv_world.training.distributed import ALONE, Group


class Batch(NamedTuple):
    """Clips as tensors, everything aligned to the frame it leads to; where a step has several frames, to the step."""

    frames: UInt8[Tensor, "b n h w 3"]
    actions: Float[Tensor, "b t n"]
    known: Bool[Tensor, "b t"]
    rewards: Float[Tensor, "b t"]
    terminations: Bool[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    terminal: Bool[Tensor, "b t"]

    @classmethod
    def from_clips(cls, clips: Clips, model: WorldModel | AdaptedModel) -> "Batch":
        """Tensors on the model's device; the first frame of a clip has no known action.

        Of the frames of a step, actions are one after the other, rewards are added up, and one that terminates, or is no target
        for pixels, speaks for all.
        """
        device, b, n = model.codec.scale.device, *clips.valid.shape
        actions = flatten_actions(model.action_space, clips.actions, (b, n - 1))
        actions = np.concatenate([np.zeros_like(actions[:, :1]), actions], axis=1)
        arrays = (actions, clips.rewards, clips.terminations, clips.valid, clips.terminal | ~clips.valid)
        told, rewards, *marks = (model.codec.by_step(torch.from_numpy(array)) for array in arrays)
        terminations, valid, terminal = (mark.any(-1) for mark in marks)
        known = (torch.arange(valid.shape[1]) > 0).expand(b, -1)
        tensors = (told.flatten(2), known, rewards.sum(-1), terminations, valid, terminal & valid)
        return cls(*(tensor.to(device) for tensor in (torch.from_numpy(clips.frames), *tensors)))


LARGEST_ERROR = 6.0
"""Standard deviations of a token's channel."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the loss is made of."""

    action_dropout: float = 0.05
    """Part of the actions that training hides, so that p(frame | no action) is learned too."""
    errors: float = 0.0
    """Part of the clips whose past is told with errors, so that a world finds back from its own; see `with_errors`."""
    imagined: float = 0.0
    """Part of the steps in which everything is learned from a past that the model drew, too: a world reads its own, and what it
    draws too faintly would fade from frame to frame."""
    imagined_gap: float | None = None
    """Where a drawn past differs from the real one by more, root mean square of a token, the next frame is no target: it would
    teach that things come from nowhere; none: it is one everywhere. Two draws of nothing new are about 1.2 apart."""
    reward_weight: float = 0.02
    """Weight of the reward's cross-entropy (nats a frame) beside the flow's nats a dimension."""
    termination_weight: float = 0.1
    """Weight of the termination's cross-entropy."""
    motion_weight: float = 50.0
    """Weight of a patch in what moved just before, per mean square of a change 20 times the noise, which is 1 for pixels at
    noise 0.05; see `patch_weights`."""
    rare_weight: float = 0.0
    """Weight of a patch in what was out of the ordinary just before, per mean square of its channels above the 1 that they have
    in the mean; see `patch_weights`."""
    draft_weight: float = 0.02
    """Weight of the learned draft's error; it moves the draft network alone."""
    first_frame_weight: float = 1.0
    """Weight of the first frame of a clip, which nothing precedes."""
    score_every: int = 4
    """Of so many steps one moves the flow by the plain likelihood alone, from whose gradient the denoiser learns."""

    def __post_init__(self) -> None:
        for name in ("action_dropout", "errors", "imagined"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}.")
        for name in (field.name for field in fields(self) if field.name.endswith("_weight")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}.")
        if self.imagined_gap is not None and not self.imagined_gap > 0:
            raise ValueError(f"imagined_gap: expected none or a positive number, got {self.imagined_gap}.")
        if self.score_every < 1:
            raise ValueError(f"score_every: expected at least 1, got {self.score_every}.")


class Loss(NamedTuple):
    """The loss of a batch, and what the denoiser can learn from its gradient."""

    value: Tensor
    metrics: dict[str, Tensor]
    """Its parts, detached."""
    tokens: Float[Tensor, "b t l c"]
    """What the model read: a leaf, if the loss is the plain likelihood."""
    features: Float[Tensor, "b t l w"]
    """The deep flow's features of it, detached."""
    weights: Float[Tensor, "b t"]
    """Weight of each frame in the flow's part."""


def world_loss(
    model: WorldModel | AdaptedModel,
    batch: Batch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    plain: bool = False,
    group: Group = ALONE,
    replica: nn.Module | None = None,
) -> Loss:
    """The loss of a batch.

    The flow's part is the mean negative log-likelihood in nats a dimension (a colour value or a latent), weighted by
    `patch_weights`. Padded frames count nowhere; an ended game's repeated screen is no target for the flow, and the first
    frame none for the heads. A `plain` loss moves the flow by its own part alone, without any weights: see `score_loss`.

    Where `batch` is one process's rows, so is the result one process's part: the mean over the processes of `group` is the loss of
    all rows. `replica` is called in the model's place (see `Group.replica`).
    """
    (b, t), device = batch.valid.shape, batch.frames.device
    rows = group.size * b  # the noise of all rows, whatever share of them is here
    uniform = group.own(torch.rand((rows, *batch.frames.shape[1:]), generator=generator, device=device))
    signal = model.config.codec.signal
    normal = group.own(torch.randn((rows, t, *signal), generator=generator, device=device))
    kept = group.own(torch.rand((rows, t), generator=generator, device=device)) >= config.action_dropout
    tokens = model.noised_tokens(batch.frames, uniform, normal).requires_grad_(plain)
    known = batch.known & kept
    motion, rare = (0.0, 0.0) if plain else (config.motion_weight, config.rare_weight)
    share = patch_weights(tokens, model, motion, rare, group)

    def read(past: Tensor) -> tuple[Reading, Tensor]:
        """What the model says when it is told such a past, and the weighted loss of each frame."""
        told = {}
        if config.errors and not plain:
            told["told"] = with_errors(past, model.config.codec.grid, config.errors, generator, group)
        elif past is not tokens:
            told["told"] = past
        reading = (replica or model)(tokens, batch.actions, known, heads_apart=plain, **told)
        wanted = share
        if past is not tokens and config.imagined_gap is not None:
            wanted = share * agreement(past, tokens, model.config.codec.grid, config.imagined_gap)
        log_prob = (reading.encoding.log_prob * wanted).sum(-1) + model.codec.log_det
        return reading, -log_prob / model.config.dimensions

    readings = [read(tokens)]
    reading = readings[0][0]
    if config.imagined and not plain and torch.rand((), generator=generator, device=device) < config.imagined:
        assert isinstance(model, WorldModel), "TrainConfig has seen to it"
        noise = group.own(torch.randn((rows, *tokens.shape[1:]), generator=generator, device=device))
        readings.append(read(model.flow.redraw(reading.encoding, noise)))
    nats = -reading.log_likelihood / model.config.dimensions
    weighted = torch.stack([loss for _, loss in readings]).mean(0)

    later = torch.arange(t, device=device) > 0
    weights = (batch.valid & ~batch.terminal) * torch.where(later | plain, 1.0, config.first_frame_weight)
    found = [model.heads.loss(one.outcome, batch.rewards, batch.terminations) for one, _ in readings]
    reward, termination = (
        group.mean(torch.stack(parts).mean(0), (batch.valid & later).float()) for parts in zip(*found, strict=True)
    )
    flow = group.mean(weighted, weights)
    loss = flow + config.reward_weight * reward + config.termination_weight * termination
    drafts = {}
    if reading.draft_error is not None:  # moves the draft network alone
        drafts["draft_error"] = group.mean(reading.draft_error.mean(-1), weights[:, 1:])
        loss = loss + config.draft_weight * drafts["draft_error"]
    metrics = {
        "flow_loss": flow,
        "nats_per_dim": group.mean(nats, weights),
        "next_frame_bits_per_dim": group.mean(nats, weights * later) / math.log(2),
        "reward_loss": reward,
        "termination_loss": termination,
        **drafts,
    }
    metrics = {name: value.detach() for name, value in metrics.items()}
    return Loss(loss, metrics, tokens, reading.encoding.features.detach(), weights)


def agreement(
    past: Float[Tensor, "b t l c"], tokens: Float[Tensor, "b t l c"], grid: tuple[int, int], gap: float
) -> Float[Tensor, "b t l"]:
    """1 where the frame before is told as it was, around a token; 0 where more than `gap` lies between; 1 in the first frame."""
    apart = (past - tokens).detach().square().mean(-1).sqrt()
    around = F.max_pool2d(apart.unflatten(-1, grid), 3, stride=1, padding=1).flatten(-2)
    return (F.pad(around[:, :-1], (0, 0, 1, 0)) <= gap).to(tokens.dtype)


def with_errors(
    tokens: Float[Tensor, "b t l c"],
    grid: tuple[int, int],
    share: float,
    generator: torch.Generator,
    group: Group = ALONE,
) -> Float[Tensor, "b t l c"]:
    """Tokens of which a rectangle, through some frames of a `share` of the clips, is drowned in noise.

    A world that reads its own frames meets what it was never taught: a mistake makes the next one likelier. Whoever learns to
    predict real frames from a past with mistakes in it finds back (noise augmentation: GameNGen, arXiv 2408.14837).
    """
    b, t, l, _ = tokens.shape
    clips = group.size * b
    noise = group.own(torch.randn(clips, *tokens.shape[1:], generator=generator, device=tokens.device))
    chance, strength, *places = group.own(torch.rand(clips, 8, generator=generator, device=tokens.device)).unbind(1)

    def span(size: int, start: Tensor, length: Tensor) -> Bool[Tensor, "b size"]:
        """From one to all of so many places, anywhere among them."""
        length = 1 + (length * size).long()
        first = (start * (size + 1 - length)).long()
        at = torch.arange(size, device=tokens.device)
        return (at >= first[:, None]) & (at < (first + length)[:, None])

    frames, rows, columns = (span(n, *places[2 * i : 2 * i + 2]) for i, n in enumerate((t, *grid)))
    where = frames[:, :, None, None] & rows[:, None, :, None] & columns[:, None, None, :]
    hit = where.reshape(b, t, l) & (chance < share)[:, None, None]
    return tokens + torch.where(hit[..., None], LARGEST_ERROR * strength[:, None, None, None] * noise, 0.0)


def score_loss(
    model: WorldModel,
    loss: Loss,
    generator: torch.Generator,
    group: Group = ALONE,
    replica: nn.Module | None = None,
) -> Tensor:
    """How far the denoiser is from sigma times the score: the mean square, after the backward pass of a `plain` loss.

    The score is that of whole clips; of half of the frames, by chance, the denoiser does not see the next one, so that it
    learns to do without. `replica` is called in the denoiser's place.
    """
    assert model.denoiser is not None and loss.tokens.grad is not None, "the trainer asks where there are both"
    dimensions = model.config.dimensions * group.average(loss.weights.sum())
    target = -dimensions * model.token_noise * loss.tokens.grad
    b, t = loss.weights.shape
    shown = group.own(torch.rand(group.size * b, t, generator=generator, device=target.device)) < 0.5
    score = video_score(replica or model.denoiser, loss.tokens.detach(), loss.features, shown)
    return group.mean((score - target).square().mean((-1, -2)), loss.weights)


def noise_left(model: WorldModel, batch: Batch, loss: Loss) -> Tensor:
    """Mean square of what the denoiser leaves of the noise when it sees nothing ahead; 1 if it does nothing."""
    assert model.denoiser is not None, "the trainer asks where there is one"
    clean = model.codec.encode(model.codec.signal(batch.frames))
    shown = torch.zeros_like(loss.weights, dtype=torch.bool)
    score = video_score(model.denoiser, loss.tokens, loss.features, shown)
    error = (loss.tokens - clean) / model.token_noise + score
    return ALONE.mean(error.square().mean((-1, -2)), loss.weights)


def patch_weights(
    tokens: Float[Tensor, "b t l c"],
    model: WorldModel | AdaptedModel,
    motion: float,
    rare: float = 0.0,
    group: Group = ALONE,
) -> Float[Tensor, "b t l"]:
    """Weights, of mean 1 over all rows of `group`, that turn the loss to what acts: up to ten times those of other patches.

    What acts in a world (a missile, a monster) fills a few patches of a frame and weighs little in its likelihood. A patch
    weighs by how much it or a neighbour changed from frame n-2 to n-1 (`motion`), or, where everything moves, by how far from
    the ordinary they were in frame n-1 (`rare`). Both are known before frame n, so the weighted loss is lowest at the same
    densities as the unweighted one; where capacity is short, it says where to spend it.
    """
    b, t, l, _ = tokens.shape
    if t < 3:
        return tokens.new_ones(b, t, l)
    rows, columns = model.config.codec.grid
    with torch.no_grad():
        change = ((tokens[:, 1:-1] - tokens[:, :-2]) * model.codec.scale).square().mean(-1) - 2 * model.config.noise**2
        unusual = (tokens[:, 1:-1].square().mean(-1) - 1).clamp(min=0)
        moved, out = (F.max_pool2d(x.reshape(-1, 1, rows, columns), 3, stride=1, padding=1) for x in (change, unusual))
        raw = (1 + motion / (20 * model.config.noise) ** 2 * moved + rare * out).clamp(1, 10).reshape(b, t - 2, l)
        raw = torch.cat([raw.new_ones(b, 2, l), raw], dim=1)
        return raw / group.average(raw.mean())
