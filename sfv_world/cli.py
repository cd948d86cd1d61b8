"""The command line: `sfv-world collect | train-codec | train | blend | evaluate | demo`,
`counterfactual | horizon | calibrate`, `convert | info | generate`.

Options come from each command's config dataclass.
"""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

import sfv_world.envs  # noqa: F401  (registers the environment ids)
from sfv_world.blend import BlendConfig, blend
from sfv_world.calibrate import CalibrateConfig, calibrate
from sfv_world.counterfactual import CounterfactualConfig, counterfactual
from sfv_world.data.collect import CollectConfig, collect
from sfv_world.demo import DemoConfig, demo
from sfv_world.evaluation import EvaluateConfig, evaluate
from sfv_world.generate import GenerateConfig, generate
from sfv_world.given import check_folder
from sfv_world.horizon import HorizonConfig, horizon
from sfv_world.released.convert import ConvertConfig, convert
from sfv_world.released.plan import InfoConfig, info
from sfv_world.training.codec import TrainCodecConfig, train_codec
from sfv_world.training.config import TrainConfig
from sfv_world.training.trainer import train

COMMANDS: dict[type, Callable[[Any], Any]] = {
    CollectConfig: collect,
    TrainCodecConfig: train_codec,
    TrainConfig: train,
    BlendConfig: blend,
    EvaluateConfig: evaluate,
    CounterfactualConfig: counterfactual,
    HorizonConfig: horizon,
    DemoConfig: demo,
    CalibrateConfig: calibrate,
    ConvertConfig: convert,
    InfoConfig: info,
    GenerateConfig: generate,
}
Command = (
    Annotated[
        CollectConfig, tyro.conf.subcommand("collect", description="Record a real environment into a Minari dataset.")
    ]
    | Annotated[
        TrainCodecConfig,
        tyro.conf.subcommand("train-codec", description="Train an autoencoder, for worlds of its latents."),
    ]
    | Annotated[TrainConfig, tyro.conf.subcommand("train", description="Train a world on a recording.")]
    | Annotated[
        BlendConfig, tyro.conf.subcommand("blend", description="Mix the weights of a world and the one it began with.")
    ]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate", description="Measure a world on held-out episodes.")]
    | Annotated[
        CounterfactualConfig,
        tyro.conf.subcommand(
            "counterfactual", description="Show what another action would have made of a real episode."
        ),
    ]
    | Annotated[
        HorizonConfig,
        tyro.conf.subcommand("horizon", description="Measure how frames drift far beyond the training window."),
    ]
    | Annotated[DemoConfig, tyro.conf.subcommand("demo", description="Step a world beside the real game.")]
    | Annotated[
        CalibrateConfig,
        tyro.conf.subcommand("calibrate", description="Find the block size that decodes a world fastest here."),
    ]
    | Annotated[
        ConvertConfig,
        tyro.conf.subcommand("convert", description="Turn a checkpoint of the released layout into safetensors."),
    ]
    | Annotated[
        InfoConfig, tyro.conf.subcommand("info", description="Print what a released model takes, in memory and time.")
    ]
    | Annotated[
        GenerateConfig,
        tyro.conf.subcommand("generate", description="Make a film of a released-layout world: prompt, start image."),
    ]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a user's mistake is one line on standard error and exit status 2."""
    config: object = tyro.cli(Command, args=arguments, prog="sfv-world", description=__doc__)
    try:
        out = getattr(config, "out", None)
        if out is not None and not isinstance(config, GenerateConfig):  # which makes a file
            check_folder("out", out)
        COMMANDS[type(config)](config)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        print(f"sfv-world: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
