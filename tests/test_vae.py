"""Latent codecs: streams equal whole videos, latents are those of the library, and what does not fit is told."""

import copy
import json
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import normal, randomised

from sfv_world.codec.vae import ImageCodec, Memory, WanCodec, load_codec, to_frames, to_pixels

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]


def wan_vae(**options):
    shape = {
        "base_dim": 4, "decoder_base_dim": 6, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True], "latents_mean": MEAN, "latents_std": STD,
    }  # fmt: skip
    torch.manual_seed(0)
    return randomised(diffusers.AutoencoderKLWan(**shape | options), scale=0.1).eval()


# Wan 2.2's VAE has residual blocks and patches of 2 x 2 pixels as channels; 2.1's neither.
RESIDUAL = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}


@pytest.fixture(scope="module", params=[RESIDUAL, {}], ids=["wan2.2", "wan2.1"])
def codec(request):
    return WanCodec(wan_vae(**request.param))


@pytest.fixture(scope="module")
def video(codec):
    """Pixels of two videos of 13 frames."""
    return normal(2, 13, 2 * codec.space, codec.space, 3).tanh()


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@torch.no_grad()
def test_the_whole_video_is_that_of_the_library(codec, video):
    channels_first = video.permute(0, 4, 1, 2, 3)
    z = codec.vae.encode(channels_first).latent_dist.mode()
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (MEAN, STD))
    expected = (z - mean) / std
    expected[:, :, 1:] *= 0.6
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 4, 2, 1) and codec.time == 4 and codec.latent_frames(13) == 4
    close(latents, expected.transpose(1, 2))
    pixels = codec.vae.decode(z).sample.permute(0, 2, 3, 4, 1)
    assert pixels.std() > 0.01
    close(codec.decode(latents), pixels)


@pytest.mark.parametrize("pieces", [[1, 4, 4, 4], [5, 8], [9, 4]])
def test_a_stream_of_frames_equals_the_whole(codec, video, pieces):
    memory = Memory()
    streamed = [codec.encode(piece, memory) for piece in video.split(pieces, dim=1)]
    close(torch.cat(streamed, dim=1), codec.encode(video))
    assert memory.frames == 4
    # What is remembered matters: the same frames after another past are other latents.
    past = Memory()
    codec.encode(-video[:, : pieces[0]], past)
    assert (codec.encode(video[:, pieces[0] : sum(pieces[:2])], past) - streamed[1]).abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [2, 2], [3, 1]])
def test_a_stream_of_latents_equals_the_whole(codec, pieces):
    latents = normal(2, 4, 4, 2, 1)
    memory, whole = Memory(), codec.decode(latents)
    assert whole.shape == (2, 13, 2 * codec.space, codec.space, 3)
    streamed = [codec.decode(piece, memory) for piece in latents.split(pieces, dim=1)]
    assert [piece.shape[1] for piece in streamed] == [1 + 4 * (pieces[0] - 1), *(4 * n for n in pieces[1:])]
    close(torch.cat(streamed, dim=1), whole)


def test_a_copied_stream_goes_on_alone(codec):
    latents, memory = normal(1, 3, 4, 2, 2), Memory()
    codec.decode(latents[:, :1], memory)
    fork = copy.deepcopy(memory)
    codec.decode(-latents[:, 1:2], fork)
    codec.decode(latents[:, 1:2], memory)
    assert not torch.equal(codec.decode(latents[:, 2:], fork), codec.decode(latents[:, 2:], memory))
    assert fork.frames == memory.frames == 3
    close(codec.decode(latents[:, 2:], copy.deepcopy(memory)), codec.decode(latents[:, 2:], memory), atol=0)


def test_latents_carry_the_temporal_scale(codec, video):
    plain = WanCodec(codec.vae, temporal_scale=1.0)
    scaled, unscaled = codec.encode(video), plain.encode(video)
    close(scaled[:, :1], unscaled[:, :1], atol=0)
    close(scaled[:, 1:], 0.6 * unscaled[:, 1:])
    close(codec.decode(scaled), plain.decode(unscaled))


@pytest.mark.parametrize("frames", [0, 3, 6])
def test_numbers_of_frames_that_do_not_fit(codec, video, frames):
    with pytest.raises(ValueError, match=rf"expected 1 \+ a multiple of 4 frames, got {frames}"):
        codec.encode(video[:, :frames])
    with pytest.raises(ValueError, match=rf"expected a multiple of 4 frames, got {frames}"):
        codec.encode(video[:, :frames], Memory(frames=1))
    with pytest.raises(ValueError, match=rf"multiples of {codec.space}, got 7 x {codec.space}"):
        codec.encode(video[:, :1, :7])


def test_channels_and_statistics_must_agree():
    with pytest.raises(ValueError, match="latents_mean: expected 4 numbers, one a channel, got 3"):
        WanCodec(wan_vae(latents_mean=MEAN[:3]))


def image_vae():
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=2, latent_channels=4, scaling_factor=0.2,
        ), scale=0.1,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_the_image_codec_is_the_library_on_every_frame():
    codec, frames = ImageCodec(image_vae()), normal(2, 3, 8, 6, 3).tanh()
    latents = codec.encode(frames)
    assert latents.shape == (2, 3, 4, 4, 3) and (codec.space, codec.time, codec.latent_frames(3)) == (2, 1, 3)
    z = codec.vae.encode(frames[1, 2].permute(2, 0, 1)[None]).latent_dist.mode()
    close(latents[1, 2], 0.2 * z[0])
    close(codec.decode(latents)[1, 2], codec.vae.decode(z).sample[0].permute(1, 2, 0).clamp(-1, 1))
    close(codec.decode(latents), torch.stack([codec.decode(latents[:, n : n + 1])[:, 0] for n in range(3)], dim=1))
    with pytest.raises(ValueError, match="multiples of 2, got 7 x 6"):
        codec.encode(frames[:, :, :7])


def test_frames_and_pixels_are_inverse():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, -1, 1).expand(1, 1, -1, 3)
    assert torch.equal(to_frames(to_pixels(frames)), frames)
    assert to_pixels(frames).min() == -1 and to_pixels(frames).max() == 1


@pytest.mark.parametrize("make", [wan_vae, image_vae])
def test_codecs_are_loaded_from_a_folder(make, tmp_path):
    vae = make()
    vae.save_pretrained(tmp_path)
    codec, pixels = load_codec(tmp_path), normal(1, 1, 8, 8, 3)
    close(codec.encode(pixels), type(codec)(vae).encode(pixels), atol=1e-6)
    assert not any(p.requires_grad for p in codec.parameters()) and not codec.vae.training
    half = load_codec(tmp_path, dtype=torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16 and half.encode(pixels).dtype == torch.float32
    assert half.decode(codec.encode(pixels)).isfinite().all()


def test_attention_by_its_older_names_is_loaded(tmp_path):
    vae, path = image_vae(), tmp_path / "diffusion_pytorch_model.safetensors"
    vae.save_pretrained(tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, old in older.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): x for name, x in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, path, {"format": "pt"})
    pixels = normal(1, 1, 8, 8, 3)
    close(load_codec(tmp_path).encode(pixels), ImageCodec(vae).encode(pixels), atol=1e-6)


def test_the_full_size_of_wan_2_2():
    statistics = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan(base_dim=160, decoder_base_dim=256, z_dim=48, **RESIDUAL, **statistics)
    codec = WanCodec(vae)
    assert (codec.channels, codec.space, codec.time, codec.latent_frames(81)) == (48, 16, 4, 21)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 704_688_668


def test_folders_that_hold_no_codec(tmp_path, monkeypatch):
    vae = image_vae()
    with pytest.raises(ValueError, match=r"expected the folder of a VAE, .*found none"):
        load_codec(tmp_path)
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for values, expected in (
        ([], "expected a JSON object, got list"),
        ({**config, "_class_name": "Other"}, "expected a VAE of AutoencoderKLWan or AutoencoderKL, got 'Other'"),
        ({**config, "layers_per_block": 2}, r"do not fit its config.json; \d+ missing or of another shape"),
        ({**config, "latent_channels": 3}, r"expected a complete AutoencoderKL|do not fit its config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=expected):
            load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="expected a complete AutoencoderKL, got files that cannot be read"):
        load_codec(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="Pickled weights are not read"):
        load_codec(tmp_path)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    image_vae().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"diffusers: expected it installed.*pip install -e \"\.\[released\]\""):
        load_codec(tmp_path)


def test_a_vae_may_leave_time_as_it_is():
    codec = WanCodec(wan_vae(temperal_downsample=[False, False, False]))
    pixels = normal(1, 3, 8, 8, 3).tanh()
    memory = Memory()
    latents = codec.encode(pixels)
    assert codec.time == 1 and latents.shape == (1, 3, 4, 1, 1)
    close(torch.cat([codec.encode(frame, memory) for frame in pixels.split(1, dim=1)], dim=1), latents)
    assert codec.decode(latents).shape == pixels.shape
