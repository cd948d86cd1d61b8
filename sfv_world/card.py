"""The model card of a trained world: what `evaluation` measured, as Markdown."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sfv_world.codec.latent import LatentCodecConfig
from sfv_world.codec.pixels import PixelCodecConfig
from sfv_world.loading import SHIPPED
from sfv_world.released.adapted import AdaptedConfig
from sfv_world.training.config import TrainConfig
from sfv_world.world import World


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown; bits are per colour value of a world of pixels, per latent of a world of latents."""
    density, outcomes, rolled = results["density"], results["outcomes"], results["rollouts"]
    unit, shown = density["unit"], "noise included" if rolled["noised"] else "cleaned"
    horizons = list(rolled["psnr_of_one"]["decibels"])
    lines = [
        f"**Density**, {density['frames']} held-out {unit}s at noise {density['noise']}, bits per {density['dimension']} (lower is better; "
        f"{density['bits_per_frame']:,.0f} a {unit}):",
        "",
        "| this world | copy of the last frame, fitted Gaussian | entropy of the noise itself |",
        "| --- | --- | --- |",
        f"| {density['bits_per_dim']:.3f} ± {_error(density['bits_per_dim_error'], 3)} ({density['bits_per_dim_full_context']:.3f} after 8 {unit}s) "
        f"| {density['bits_per_dim_fitted_copy']:.3f} | {density['bits_per_dim_of_the_noise']:.3f} |",
        "",
        *_lossless(results.get("lossless")),
        f"**Rollouts** of {rolled['clips']} held-out clips under their real actions, PSNR in dB after so many steps (± here and above: "
        "standard errors, from resampled episodes):",
        "",
        "| | " + " | ".join(map(str, horizons)) + " |",
        "| --- |" + " --- |" * len(horizons),
    ]
    names = {
        "psnr_of_the_mean": f"mean of {rolled['rollouts']} imagined rollouts",
        "psnr_of_one": f"one imagined rollout, {shown}",
        "psnr_of_copying": "copy of the last observed frame",
        "psnr_of_the_codec": f"the real frame through the codec{', noise included' * rolled['noised']}",
        "gain_over_copying": "gain of the mean over the copy, of the same frames",
    }
    for key, name in names.items():
        found, error = rolled[key]["decibels"], rolled[key]["error"]
        lines.append(f"| {name} | " + " | ".join(f"{found[n]:.1f} ± {_error(error[n], 1)}" for n in horizons) + " |")
    lines += [
        "",
        f"Sweeps a {unit}: {rolled['deep_sweeps']:.1f} of the deep flow, {rolled['shallow_sweeps']:.1f} of shallow blocks; largest "
        f"certificate {rolled['largest_certificate']:.1e}.",
        "",
        f"**Termination** on {outcomes['frames']} held-out {unit}s, Brier score {outcomes['termination_brier']:.5f} "
        f"(base rate: {outcomes['termination_brier_of_the_base_rate']:.5f}), calibration error "
        f"{outcomes['termination_calibration_error']:.4f}:",
        "",
        "| predicted between | frames | mean prediction | observed |",
        "| --- | --- | --- | --- |",
    ]
    for row in outcomes["termination_reliability"]:
        lines.append(
            f"| {row['from']:.2f} and {row['to']:.2f} | {row['frames']} | {row['predicted']:.3f} | {row['observed']:.3f} |"
        )
    lines += [
        "",
        f"**Reward**, given whether the episode ended: mean absolute error {outcomes['reward_mean_absolute_error']:.4f} (of the median "
        f"reward in training, told the same: {outcomes['reward_mean_absolute_error_of_the_median']:.4f}), bias "
        f"{outcomes['reward_bias']:+.4f}.",
    ]
    if "denoising" in results:
        lines += [
            "",
            "**Denoising** of held-out frames (to the clean ones, half a clip before them and one frame after):",
            "",
        ]
        lines += ["| shown | PSNR, dB | flicker, levels |", "| --- | --- | --- |"]
        names = {
            "none": "the noised frame",
            "raw_score": "moved along the flow's own score, by autograd",
            "causal": '`denoise="causal"`',
            "lookahead": '`denoise="lookahead"`',
        }
        for key, name in names.items():
            lines.append(
                f"| {name} | {results['denoising'][key]['psnr']:.2f} | {results['denoising'][key]['flicker']:.2f} |"
            )
    return "\n".join(lines)


def _error(error: float | None, digits: int) -> str:
    """A standard error, or that there is none: of a single episode."""
    return "?" if error is None else f"{error:.{digits}f}"


def _lossless(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    return [
        f"**Without loss**, a held-out uint8 frame takes {found['bits_per_colour_value']:.3f} bits per colour value by bits-back coding "
        f"({found['of_the_residual']:.3f} of them for what the frame is beside the one shown): comparable between worlds of pixels and of latents.",
        "",
    ]


def model_card(world: World, results: dict[str, Any]) -> str:
    """The model card of a trained world, Markdown."""
    run, data = world.about["training"], world.about["data"]
    name = _name(world)
    recipe, config = data.get("recipe", {}), world.model.config
    frames = run["batch"] * run["clip"] * world.about["steps"]
    before = world.about.get("before")
    start = f" Started from a world of {before['steps']} steps, {before['minutes']:.0f} minutes." if before else ""
    blended = world.about.get("blended")
    if blended:
        start += (
            f" Then {blended['share']:.0%} of the weights of `{blended['other']}` was mixed in (`sfv-world blend`)."
        )
    processes = world.about.get("processes", 1)
    command = "sfv-world" if processes == 1 else f"torchrun --nproc-per-node {processes} -m sfv_world"
    codec, signal, density, clean = "pixels", "pixels in [-1, 1]", "frames", "dequantised frame"
    past = "frames before it, actions"
    if not isinstance(config.codec, PixelCodecConfig):
        codec, signal = "latents of {} x {} x {} a frame".format(*config.codec.signal), "latents"
        density, clean = "latents, not frames", "latents of the frame"
    if isinstance(config.codec, LatentCodecConfig):
        signal += " of variance 1"
    if isinstance(config, AdaptedConfig):
        codec += f", a video's first and every {world.time} after it" * (world.time > 1)
        past += f", the prompt `{config.prompt}`"
    return f"""# {world.name}

A learned world: a causal normalizing flow over video, with exact likelihoods. `gym.make("sfv_world/World-v0", world="{name}")`.

![Imagined above, real continuation below](rollouts.png)

- **Data**: `{data.get("dataset_id", run["data"])}`, recorded with `{json.dumps(recipe)}`; {run["held_out"]:.0%} of the episodes held out.
- **Model**: {_model(world)}
- **Codec**: {codec}.
- **Training**: {world.about["steps"]} steps of {run["batch"]} clips of {run["clip"]} frames ({frames:,} frames seen), {world.about["minutes"]:.0f} \
minutes on `{run["device"]}` by {processes} process(es) of {run["threads"] or "all"} thread(s). Noise {config.noise} on {signal}.{start}
- **Command**: `{command} train {train_options(run)}`
- **The density** is over noised {density}: log p({clean} + {config.noise} x normal noise | {past}).

## Results

Measured by `sfv-world evaluate --world {shlex.quote(name)} {" ".join(_options(results["measured"], {}))}` ({results["machine"]}).

{tables(results)}
"""


def _name(world: World) -> str:
    """What a world is called: a shipped one by its name, others by their folders, from here if they are below."""
    if world.folder is None or world.folder.parent.samefile(SHIPPED):
        return world.name
    here = Path.cwd()
    return str(world.folder.relative_to(here) if world.folder.is_relative_to(here) else world.folder)


def _model(world: World) -> str:
    """What a world's weights are."""
    config, size = world.model.config, sum(parameter.numel() for parameter in world.model.parameters()) / 1e6
    if isinstance(config, AdaptedConfig):
        tokens, channels = math.prod(config.codec.grid), config.codec.channels
        return (
            f"{size:.1f} M parameters, a control adapter on the released model in `{config.backbone}`, which stays as it is; "
            f"{tokens} tokens of {channels} channels a latent frame, chunks of {config.chunk} of them."
        )
    flow = config.flow
    coarsest = [f"the first in {flow.groups} groups"] * (flow.groups > 1)
    coarsest += [f"the first {len(flow.bins)} with curves of {flow.bins[0]} bins"] if flow.bins else []
    grouped = f" ({', '.join(coarsest)})" if coarsest else ""
    shallow = (
        f"{len(flow.bands)} bands, coarse to fine{grouped}," if flow.bands else f"{flow.shallow_blocks} raster blocks"
    )
    return (
        f"{size:.1f} M parameters, {flow.kind}; deep flow {flow.deep.depth} x {flow.deep.width} over {flow.deep.window} frames, "
        f"shallow flow of {shallow} of {flow.shallow.depth} x {flow.shallow.width}; {flow.tokens} tokens of {flow.channels} "
        "channels a frame."
    )


def train_options(run: dict[str, Any]) -> str:
    """The options of `sfv-world train` that make a run of such a configuration (JSON), wherever it is computed."""
    usual = TypeAdapter(TrainConfig).dump_python(TrainConfig(Path(run["data"]), Path(run["out"]), steps=1), mode="json")
    return " ".join(_options(run, {**usual, "data": None, "out": None, "steps": None, "device": run["device"]}))


def _options(run: dict[str, Any], usual: dict[str, Any], lead: str = "--") -> list[str]:
    """The options of a command that are not the usual ones."""
    found = []
    for name, value in run.items():
        if isinstance(value, dict):
            found += _options(value, usual.get(name, {}), f"{lead}{name}.")
        elif value not in (None, usual.get(name)) and name != "resume":
            option = name.replace("_", "-")
            found.append(
                f"{lead}{'' if value else 'no-'}{option}"
                if isinstance(value, bool)
                else f"{lead}{option} {shlex.quote(str(value))}"
            )
    return found
