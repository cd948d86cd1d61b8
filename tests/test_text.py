"""Text of released models: the prompt's format, states of a frozen encoder, and states that are kept."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomised
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from sfv_world.released import load
from sfv_world.released import text as reading
from sfv_world.released.text import PromptCache, aspect_ratio, format_prompt, load_text_encoder

WORDS = (
    "<pad> </s> <unk> a cat dog runs : in Noise Level A video with fps aspect ratio . 500 300 16 8 10 1 2 3 9".split()
)
LENGTH = 24
"""As many tokens as a prompt of a video with a caption of five words."""


def save_encoder(folder, seed=0):
    """A random T5 encoder of width 16 and a tokenizer of the words of prompts, in the layout of `transformers`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    shape = T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = randomised(T5EncoderModel(shape), seed).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of an encoder; tests must not change it."""
    path = tmp_path_factory.mktemp("t5")
    save_encoder(path)
    return path


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_the_prompt_of_videos_and_images():
    expected = "Noise Level 500:\nA video with 16 fps:\na cat\n\n in a 16:9 aspect ratio.\n"
    assert format_prompt("a cat", 0.5, 480, 848, 16) == expected
    assert format_prompt("", 0.5, 480, 848, 16) == expected.replace("a cat", "")
    assert format_prompt("a cat", 0.3, 256, 256) == "Noise Level 300:\na cat\n\n in a 1:1 aspect ratio.\n"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 848), "16:9"), ((848, 480), "9:16"), ((300, 400), "4:3"), ((100, 100), "1:1"), ((10, 100), "21:9")],
)
def test_the_nearest_aspect_ratio(size, expected):
    assert aspect_ratio(*size) == expected


@torch.no_grad()
def test_states_are_the_encoders_and_zero_where_there_is_no_word(folder):
    encoder = load_text_encoder(folder, LENGTH)
    states = encoder(["a cat runs", "a", "a dog runs in a flat"])
    assert states.shape == (3, LENGTH, 16)
    model = T5EncoderModel.from_pretrained(folder)
    for row, ids in zip(states, ([3, 4, 6, 1], [3, 1], [3, 5, 6, 8, 3, 2, 1]), strict=True):
        close(row[: len(ids)], model(torch.tensor([ids])).last_hidden_state[0])
        assert not row[len(ids) :].any()
    close(encoder(["a"])[0], states[1])
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    half = load_text_encoder(folder, LENGTH, dtype=torch.bfloat16)(["a cat runs"])
    assert half.dtype == torch.float32
    close(half[0], states[0], atol=0.1)


@torch.no_grad()
def test_words_that_are_not_read_are_told(folder, recwarn):
    encoder = load_text_encoder(folder, 6)
    exact = encoder(["a dog runs in a"])
    assert not recwarn
    with pytest.warns(UserWarning, match="prompt: expected at most 6 tokens, got 8; the last 2 are not read.*shorter"):
        cut = encoder(["a dog runs in a cat runs", "a"])
    close(cut[:1], exact)


def test_the_tiny_encoder_sees_all_of_a_prompt(folder):
    """Tests of what reads prompts see another one by its states."""
    encoder = load_text_encoder(folder, LENGTH)
    prompt = format_prompt("a cat runs", 0.5, 32, 48, 16)
    ids = encoder.tokenizer([prompt]).input_ids[0]
    assert len(ids) < LENGTH and WORDS.index("<unk>") not in ids
    others = [
        format_prompt(*about)
        for about in (
            ("", 0.5, 32, 48, 16),
            ("ignored", 0.5, 32, 48, 16),
            ("a cat runs", 0.3, 32, 48, 16),
            ("a cat runs", 0.5, 48, 32, 16),
            ("a cat runs", 0.5, 32, 48, 8),
        )
    ]
    states = encoder([prompt, *others])
    assert ((states[1:] - states[0]).abs().amax((1, 2)) > 0.01).all()


@torch.no_grad()
def test_the_encoder_of_a_whole_t5_is_loaded_alone(tmp_path):
    shape = save_encoder(tmp_path).config
    whole = T5ForConditionalGeneration(T5Config(**{**shape.to_dict(), "is_encoder_decoder": True})).eval()
    whole.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path, LENGTH)
    assert sum(p.numel() for p in encoder.model.parameters()) == sum(p.numel() for p in whole.encoder.parameters())
    expected = whole.encoder(input_ids=torch.tensor([[3, 4, 6, 1]])).last_hidden_state
    close(encoder(["a cat runs"])[:, :4], expected)


def test_states_are_kept(folder, tmp_path, monkeypatch):
    cache = PromptCache(folder, tmp_path / "kept", LENGTH)
    expected = load_text_encoder(folder, LENGTH)(["a cat", ""])
    assert cache.missing(["a cat", "", "a cat"]) == ["a cat", ""]
    close(cache.states(["a cat", "", "a cat"]), expected[[0, 1, 0]])
    assert len(os.listdir(tmp_path / "kept")) == 2 and not cache.missing(["", "a cat"])

    def unneeded(*arguments):
        raise AssertionError("the encoder was loaded for prompts that are known")

    with monkeypatch.context() as patch:
        patch.setattr(reading, "load_text_encoder", unneeded)
        close(cache.states(["", "a cat"]), expected[[1, 0]])
        with pytest.raises(AssertionError):
            cache.states(["a dog"])
    assert replace(cache, length=23).missing([""]) == [""]


def test_states_of_another_encoder_are_others(tmp_path, monkeypatch):
    folder, states = tmp_path / "t5", []
    monkeypatch.setattr(load, "SMALL", 100)  # so that the tiny encoder has large tensors

    def kept():
        cache = PromptCache(folder, tmp_path / "kept", LENGTH)
        assert cache.missing(["a cat"]) == ["a cat"]
        states.append(cache.states(["a cat"]))

    save_encoder(folder)
    kept()
    config, tokenizer, tensors = folder / "config.json", folder / "tokenizer.json", folder / "model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "relative_attention_max_distance": 64}))
    kept()
    save_encoder(folder, seed=1)  # the same sizes, other weights
    kept()
    for name in ("encoder.final_layer_norm.weight", "encoder.block.1.layer.0.SelfAttention.o.weight"):
        values = load_file(tensors)
        save_file(values | {name: 2 * values[name]}, tensors, {"format": "pt"})
        kept()
    tokenizer.write_text(tokenizer.read_text().replace('"cat": 4', '"dog": 4').replace('"dog": 5', '"cat": 5'))
    kept()
    assert len({tuple(found.flatten().tolist()) for found in states[2:]}) == 4


def test_states_are_known_beside_a_copy_of_the_encoder(folder, tmp_path):
    PromptCache(folder, tmp_path / "kept", LENGTH).states(["a cat"])
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():  # at another time, and the tensors in two files
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    first = set(sorted(tensors)[:5])
    save_file({name: x for name, x in tensors.items() if name in first}, copy / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if name not in first}, copy / "other.safetensors")
    assert not PromptCache(copy, tmp_path / "kept", LENGTH).missing(["a cat"])


def test_states_of_another_dtype_are_others(folder, tmp_path):
    cache = PromptCache(folder, tmp_path, LENGTH)
    half = replace(cache, dtype=torch.bfloat16)
    rough = half.states(["a cat"])
    assert cache.missing(["a cat"]) == ["a cat"]
    exact = cache.states(["a cat"])
    close(exact, load_text_encoder(folder, LENGTH)(["a cat"]))
    assert torch.equal(half.states(["a cat"]), rough) and not torch.equal(rough, exact)


def test_folders_that_hold_no_encoder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected the folder of a T5EncoderModel"):
        load_text_encoder(tmp_path, LENGTH)
    model = save_encoder(tmp_path)
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a tokenizer \(tokenizer.json\)"):
        load_text_encoder(tmp_path, LENGTH)
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(ValueError, match=r"do not fit its config.json; \d+ missing .*encoder.block.2"):
        load_text_encoder(tmp_path, LENGTH)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Pickled weights are not read"):
        load_text_encoder(tmp_path, LENGTH)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: .*pip install -e \"\.\[released\]\""):
        load_text_encoder(tmp_path, LENGTH)
