"""What all tests share: shape checks while testing, one thread, and small worlds with random weights."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from jaxtyping import install_import_hook

install_import_hook("sfv_world", "beartype.beartype")

from recorded import record, trained  # noqa: E402
from tiny import KINDS, Kind, of_kind, randomised  # noqa: E402

from sfv_world.checkpoint import STARTS, save_model, save_tensors  # noqa: E402
from sfv_world.codec.pixels import PixelCodecConfig  # noqa: E402
from sfv_world.control.spaces import action_size  # noqa: E402
from sfv_world.flow.model import FlowConfig  # noqa: E402
from sfv_world.flow.transformer import TransformerConfig  # noqa: E402
from sfv_world.loading import load_world  # noqa: E402
from sfv_world.model import ModelConfig, WorldModel  # noqa: E402
from sfv_world.world import World  # noqa: E402

torch.set_num_threads(1)

DISCRETE = spaces.Discrete(3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever draws from torch's own generator draws the same in every test, whichever went before."""
    torch.manual_seed(0)


def tiny_model(kind: Kind, action_space: spaces.Space, seed: int) -> WorldModel:
    """A model of 16 x 24 frames in 2 x 3 tokens, window 3, in which every weight matters."""
    codec = PixelCodecConfig(16, 24, patch=8)
    deep, shallow = TransformerConfig(32, 2, head_dim=16, window=3), TransformerConfig(32, 1, head_dim=16)
    flow = of_kind(FlowConfig(codec.channels, codec.grid, deep, shallow, control_width=8), kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ModelConfig(codec, flow, control_tokens=2, denoiser=shallow)
        model = randomised(WorldModel(config, action_space), seed, scale=0.04)
        randomised(model.denoiser, seed, scale=0.3)
        model.codec.scale.uniform_(0.5, 1.5)
    # Rewards of a few units, and about one frame in twenty ends an episode.
    with torch.no_grad():
        bias = model.heads.mlp[-1].bias
        bias[0] -= 3
        bias[1:] -= model.heads.bins.abs().log1p().repeat(2) * 3
    return model


@pytest.fixture(scope="session")
def build_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny world with three start sequences of four frames, and gives its folder."""

    def build(kind: Kind = "frame-parallel", action_space: spaces.Space = DISCRETE, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        save_model(folder, tiny_model(kind, action_space, seed), {"data": {"fps": 8.75}})
        generator = torch.Generator().manual_seed(seed)
        frames = torch.randint(256, (3, 4, 16, 24, 3), generator=generator).byte()
        actions = torch.rand(3, 4, action_size(action_space), generator=generator)
        save_tensors(folder / STARTS, {"frames": frames, "actions": actions})
        return folder

    return build


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Presses Ctrl-C, as if at a terminal: tests may run where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every attention that is computed: whether cuDNN, which plans it, might have been asked to."""
    planned, attend = [], F.scaled_dot_product_attention

    def told(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        planned.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", told)
    return planned


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """Windows that are open, and all that was shown in them."""
    shown: dict[str, list[np.ndarray]] = {}
    monkeypatch.setattr(cv2, "imshow", lambda name, image: shown.setdefault(name, []).append(image.copy()))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda name, flag: float(name in shown) or -1.0)
    monkeypatch.setattr(cv2, "destroyWindow", shown.pop)
    monkeypatch.setenv("DISPLAY", ":0")
    return shown


@pytest.fixture(scope="session", params=KINDS)
def tiny_folder(request: pytest.FixtureRequest, build_world: Callable[..., Path]) -> Path:
    """Folder of a tiny world, of each kind of flow; tests must not change it."""
    return build_world(request.param)


@pytest.fixture(scope="session")
def tiny_world(tiny_folder: Path) -> World:
    """A tiny world, of each kind of flow; tests must not change it."""
    return load_world(tiny_folder)


@pytest.fixture(scope="module")
def home(build_world: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recording, `data`, and a tiny world that says it was trained on it, `world`."""
    home = tmp_path_factory.mktemp("home")
    record(home / "data", DISCRETE)
    trained(build_world(), home / "world")
    return home
