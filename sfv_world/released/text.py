"""Text for released models: the prompt they were trained with, and the states of a frozen T5 encoder, kept on disk.

A model reads `txt_size` states; those of padding are zero. Guidance needs a prompt twice, with its caption and without.
"""

import hashlib
import json
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfv_world.checkpoint import load_tensors, save_tensors
from sfv_world.pretrained import import_extra, load_network, read_config
from sfv_world.released.load import checksum, open_network

RATIOS = ("1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")


def aspect_ratio(height: int, width: int) -> str:
    """The usual ratio of width to height that is nearest to this size, such as "16:9"."""

    def distance(ratio: str) -> float:
        across, down = map(int, ratio.split(":"))
        return abs(math.log(across / down * height / width))

    return min(RATIOS, key=distance)


def format_prompt(caption: str, noise: float, height: int, width: int, fps: int | None = None) -> str:
    """A caption with what the released models are told beside it; an empty caption gives the unconditional prompt.

    Args:
        caption: what is to be seen.
        noise: standard deviation of the noise on latents, as in training.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        fps: frames a second of a video; none for an image.
    """
    video = "" if fps is None else f"A video with {fps} fps:\n"
    return f"Noise Level {int(1000 * noise)}:\n{video}{caption}\n\n in a {aspect_ratio(height, width)} aspect ratio.\n"


class TextEncoder:
    """A T5 encoder and its tokenizer: prompts -> states, padded with zeros to `length` tokens.

    Args:
        model: a `T5EncoderModel`.
        tokenizer: its tokenizer.
        length: tokens a prompt; longer prompts are cut, with a warning.
    """

    def __init__(self, model: Any, tokenizer: Any, length: int):
        self.model, self.tokenizer, self.length = model, tokenizer, length

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "b k e"]:
        """States of prompts, in float32."""
        longest = max(map(len, self.tokenizer(list(prompts), verbose=False).input_ids))
        if longest > self.length:
            warnings.warn(
                f"prompt: expected at most {self.length} tokens, got {longest}; the last {longest - self.length} are not "
                "read, which name the aspect ratio. Give a shorter caption.",
                stacklevel=2,
            )
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state
        return states.float() * words.attention_mask[..., None]


def load_text_encoder(
    folder: str | Path, length: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The encoder of a T5 folder in the layout of `transformers`, tokenizer included.

    Raises:
        ImportError: if `transformers` is not installed.
        ValueError: if the folder holds no complete encoder or no tokenizer.
    """
    model = load_network("transformers", "T5EncoderModel", Path(folder), device, dtype)
    try:
        tokenizer = import_extra("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder}: expected a tokenizer (tokenizer.json), got none that can be read ({problem})."
        ) from error
    return TextEncoder(model, tokenizer, length)


@dataclass(frozen=True)
class PromptCache:
    """States of prompts on disk, so that the encoder, larger than a prompt by far, is loaded for new prompts alone.

    Files are named by prompt, length, what the encoder computes in and what its files hold, wherever they lie: another encoder in
    the same folder has other states, which a new cache sees.
    """

    encoder: Path
    """Folder of the T5 encoder."""
    folder: Path
    """Where states are kept; made when needed."""
    length: int
    """Tokens a prompt."""
    dtype: torch.dtype = torch.float32
    """What the encoder computes in."""

    def states(self, prompts: Sequence[str], device: str | torch.device = "cpu") -> Float[Tensor, "b k e"]:
        """States of prompts, on the CPU; the encoder is loaded, and let go of, if any of them is new.

        Args:
            prompts: what to read.
            device: where the encoder computes.

        Raises:
            ImportError: if it is needed and `transformers` is not installed.
            ValueError: if it is needed and cannot be read, or a file of states is damaged.
        """
        if new := self.missing(prompts):
            encoded = load_text_encoder(self.encoder, self.length, device, self.dtype)(new).cpu()
            for prompt, states in zip(new, encoded, strict=True):
                save_tensors(self.path(prompt), {"states": states}, {"prompt": prompt})
        return torch.stack([load_tensors(self.path(prompt))[0]["states"] for prompt in prompts])

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts whose states are not there, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).exists()]

    def path(self, prompt: str) -> Path:
        """The file of a prompt's states."""
        about = json.dumps([prompt, self.length, self.contents, str(self.dtype)])
        return self.folder / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"

    @cached_property
    def contents(self) -> dict[str, int]:
        """Checksums of the encoder's tensors, and of each file of its configuration and tokenizer.

        Raises:
            ValueError: if the folder holds no encoder, or tensors that cannot be read.
        """
        read_config(self.encoder, "a T5 encoder")
        files = [path for path in sorted(self.encoder.iterdir()) if path.suffix in (".json", ".model", ".txt")]
        return {"": checksum(open_network(self.encoder))} | {path.name: zlib.crc32(path.read_bytes()) for path in files}
