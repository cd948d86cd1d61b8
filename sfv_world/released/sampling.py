"""Drawing from a released model: token by token through the deep block, then through the shallow ones of every frame.

Sequential decoding is the definition that faster decoding is held against. Samples are noised tokens; `ReleasedFlow.denoise` cleans
them. Guidance acts on the deep block only, and guided frames are not draws from the density that the model scores.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sfv_world.flow.affine import Fields
from sfv_world.released.model import FlowBlock, ReleasedFlow


def guide(conditional: Fields, unconditional: Fields, weight: float) -> Fields:
    """Fields moved away from the unconditional ones: the product p_c^(1+w) / p_u^w of two normals, kept proper.

    With s = min(sigma_c / sigma_u, 1)^2 and d = 1 + w - w s: sigma = sigma_c / sqrt(d), mu = ((1 + w) mu_c - w s mu_u) / d.
    """
    share = (conditional.sigma / unconditional.sigma).clamp(max=1).square()
    precision = 1 + weight - weight * share
    mu = ((1 + weight) * conditional.mu - weight * share * unconditional.mu) / precision
    return Fields(mu, conditional.sigma / precision.sqrt())


@torch.no_grad()
def invert(
    block: FlowBlock,
    noise: Float[Tensor, "n l c"],
    turn: Float[Tensor, "all_slots two p"],
    *,
    text: Float[Tensor, "m k e"] | None = None,
    known: Float[Tensor, "n j c"] | None = None,
    guidance: float = 0.0,
) -> Float[Tensor, "n l c"]:
    """Noise -> the tokens that follow the `known` ones, one by one.

    Text of twice as many rows as noise is the conditional and then the unconditional one, for guidance.
    """
    copies = 1 if text is None else len(text) // len(noise)
    start = block.sos_embed.expand(len(noise), -1, -1)
    slots = start if known is None else torch.cat([start, known], dim=1)
    cache, tokens = block.new_cache(copies * len(noise), len(turn)), []
    for i in range(noise.shape[1]):
        x = block.embed(slots.repeat(copies, 1, 1), text if i == 0 else None)
        at = slice(cache.length, cache.length + x.shape[1])
        fields = block.fields(block.features(x, turn[at], cache)[:, -1:])
        if copies == 2:
            (mu, mu_u), (sigma, sigma_u) = fields.mu.chunk(2), fields.sigma.chunk(2)
            fields = guide(Fields(mu, sigma), Fields(mu_u, sigma_u), guidance)
        slots = fields.denormalise(noise[:, i : i + 1])
        tokens.append(slots)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def sample(
    flow: ReleasedFlow,
    noise: Float[Tensor, "b t l c"],
    text: Float[Tensor, "b k e"],
    grid: tuple[int, int],
    *,
    unconditional: Float[Tensor, "b k e"] | None = None,
    guidance: float = 0.0,
    first: Float[Tensor, "b j l c"] | None = None,
) -> Float[Tensor, "b frames l c"]:
    """Videos of noised tokens from standard normal noise.

    Args:
        flow: the model.
        noise: of the frames to draw.
        text: states of the text encoder.
        grid: rows and columns of tokens in a frame.
        unconditional: states of the prompt without its caption; needed for guidance.
        guidance: its weight w; 0 is none.
        first: noised tokens of frames that come before and are continued; they begin the result.

    Raises:
        ValueError: if shapes do not fit, or guidance lacks the unconditional text.
    """
    flow.check(noise, text, grid)
    if guidance and unconditional is None:
        raise ValueError(f"guidance {guidance} needs the states of the unconditional text, got none")
    known = None
    if first is not None:
        if not flow.config.shallow_block_local:
            raise ValueError("first must be None, since this is a model of images; got frames to continue")
        known = flow(first, text, grid).latents
        known = rearrange(flow.orient(-1, known), "b j l c -> b (j l) c")
    if guidance and unconditional is not None:
        flow.check(noise, unconditional, grid)
        text = torch.cat([text, unconditional])
    frames = noise.shape[1]
    turn = flow.turn(frames + (0 if first is None else first.shape[1]), grid, True, noise.device)
    z = rearrange(flow.orient(-1, noise), "b t l c -> b (t l) c")
    u = invert(flow.block(-1), z, turn, text=text, known=known, guidance=guidance)
    u = flow.orient(-1, rearrange(u, "b (t l) c -> (b t) l c", t=frames))
    turn = flow.turn(1, grid, False, noise.device)
    for index in reversed(range(len(flow.blocks) - 1)):
        u = flow.orient(index, invert(flow.block(index), flow.orient(index, u), turn))
    new = rearrange(u, "(b t) l c -> b t l c", t=frames)
    return new if first is None else torch.cat([first, new], dim=1)
