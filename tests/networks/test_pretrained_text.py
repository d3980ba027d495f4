"""Text encoders of transformers read as there and are refused where something lacks, and what all encoders share."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from medgen.networks.pretrained_text import PretrainedTextEncoder
from medgen.networks.text_encoder import TextEncoder, encode_unique
from medgen.types import BadInputError

TEXTS = ["Chest X-ray, PA view.", "Chest", "normal chest PA view and no finding"]
WORDS = ["chest", "x", "ray", "pa", "view", "normal", "and", "no", "finding"]


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def write_tokenizer(folder, kind: str) -> None:
    """Vocabulary files as the makers of CLIP and BERT ship them."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "clip":
        tokens = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz-,." for end in ("", "</w>")]
        merges = ["p a</w>", "n o</w>"]
        tokens += ["pa</w>", "no</w>", "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        end = "<|endoftext|>"
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 40, **special}
    else:
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "-", ",", ".", "##s"]
        (folder / "vocab.txt").write_text("\n".join(tokens))
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(transformers, kind: str, positions: int = 40):
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=62, max_position_embeddings=positions, bos_token_id=60, eos_token_id=61, pad_token_id=61, **SIZES
        )
        return transformers.CLIPTextModel(config).eval()
    config = transformers.BertConfig(vocab_size=18, max_position_embeddings=positions, **SIZES)
    return transformers.BertModel(config).eval()


@pytest.fixture(params=["clip", "bert"])
def folder(request, transformers, tmp_path):
    path = tmp_path / request.param
    write_tokenizer(path, request.param)
    build(transformers, request.param).save_pretrained(path)
    return path


@pytest.fixture(params=["small", "pretrained"])
def encoder(request, transformers, tmp_path):
    if request.param == "small":
        return TextEncoder(WORDS, width=16, heads=2, length=8).eval()
    write_tokenizer(tmp_path, "bert")
    build(transformers, "bert").save_pretrained(tmp_path)
    return PretrainedTextEncoder.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"texts: expected a list of at least one text, got \[\]"),
        ("chest", r"texts: expected a list of at least one text, got 'chest'\. Put a single one in a list"),
        (["chest", " "], r"got an empty text at position 1\. Leave the text out"),
        ([30 * "normal view "], r"expected at most the \d+ tokens .*view normal.* would be cut\. Shorten it, or allow"),
    ],
)
def test_texts_that_cannot_be_encoded_are_refused(encoder, texts: list[str], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        encoder.encode(texts)


def test_a_text_is_cut_with_a_warning_where_that_is_allowed(folder) -> None:
    encoder = PretrainedTextEncoder.from_folder(folder)
    whole = "pa " * (encoder.length - 2)
    with pytest.warns(UserWarning, match=r"'no no' is cut"):
        cut = encoder.encode([whole + "no no"], truncate=True)
    torch.testing.assert_close(cut, encoder.encode([whole]))


def test_pretrained_embeddings_are_those_of_transformers_without_padding(transformers, folder) -> None:
    encoder = PretrainedTextEncoder.from_folder(folder)
    assert (encoder.width, encoder.length) == (16, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded = encoder.encode(TEXTS)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert embedded.shape == (3, 40, 16) and not embedded.requires_grad
    for text, row in zip(TEXTS, embedded, strict=True):
        expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)
        assert torch.equal(row[len(expected) :], torch.zeros(40 - len(expected), 16))


def test_a_pretrained_encoder_saves_and_reloads_bit_for_bit(folder, tmp_path) -> None:
    encoder = PretrainedTextEncoder.from_folder(folder, length=30)
    with torch.no_grad():
        next(encoder.model.parameters()).mul_(1.5)  # as if it had been trained
    encoder.save_pretrained(tmp_path / "saved")
    assert not {path.suffix for path in (tmp_path / "saved").iterdir()} - {".json", ".safetensors", ".txt"}
    again = PretrainedTextEncoder.from_folder(tmp_path / "saved")
    assert again.length == 30
    assert torch.equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert not torch.equal(again.encode(TEXTS), PretrainedTextEncoder.from_folder(folder, length=30).encode(TEXTS))


def test_it_is_frozen_until_it_is_asked_to_train(folder) -> None:
    encoder = PretrainedTextEncoder.from_folder(folder)
    assert not encoder.train().training and not encoder.model.training
    assert encoder.requires_grad_().train().model.training
    encoder.encode(TEXTS).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_padding_as_stable_diffusion_reads_it(transformers, tmp_path, whole: bool) -> None:
    from diffusers import StableDiffusionPipeline

    write_tokenizer(tmp_path / "tokenizer", "clip")
    model = build(transformers, "clip")
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    pipeline = StableDiffusionPipeline(None, model, tokenizer, None, None, None, None, requires_safety_checker=False)
    prompts, nothing = pipeline.encode_prompt(TEXTS, "cpu", 1, do_classifier_free_guidance=True)
    encoder = PretrainedTextEncoder.from_folder(tmp_path, keep_padding=whole)
    embedded = encoder.encode(TEXTS)
    if whole:
        torch.testing.assert_close(embedded, prompts)
        torch.testing.assert_close(encoder.encode([""]), nothing[:1])
    else:
        kept = embedded.abs().sum(2) > 0
        torch.testing.assert_close(embedded[kept], prompts[kept])
        assert (prompts[~kept].abs().sum(1) > 0).all() and not kept.all()


def test_the_text_half_of_clip_and_the_encoder_half_of_t5_are_taken(transformers, tmp_path) -> None:
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    text = build(transformers, "clip").config.to_dict()
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Model(transformers.T5Config(vocab_size=18, **sizes)).eval()
    for name, model, kind in (("clip", clip, "clip"), ("t5", t5, "bert")):
        write_tokenizer(tmp_path / name, kind)
        model.save_pretrained(tmp_path / name)
        encoder = PretrainedTextEncoder.from_folder(tmp_path / name, length=40)
        ids = encoder.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        expected = (clip.text_model if name == "clip" else t5.encoder)(ids).last_hidden_state
        torch.testing.assert_close(encoder.encode(TEXTS)[:1, : ids.shape[1]], expected, rtol=0, atol=1e-5)
    with pytest.raises(BadInputError, match=r"expected a length, because neither .* has a limit"):
        PretrainedTextEncoder.from_folder(tmp_path / "t5")


@pytest.mark.parametrize(("kind", "most"), [("bert", 40), ("roberta", 37)])
def test_a_length_that_the_encoder_cannot_take_is_refused(transformers, tmp_path, kind: str, most: int) -> None:
    write_tokenizer(tmp_path, "bert")
    model = build(transformers, "bert")
    if kind == "roberta":
        config = transformers.RobertaConfig(vocab_size=18, max_position_embeddings=40, pad_token_id=2, **SIZES)
        model = transformers.RobertaModel(config)
    model.save_pretrained(tmp_path)
    encoder = PretrainedTextEncoder.from_folder(tmp_path)
    assert encoder.length == most
    assert encoder.encode(["pa " * (most - 2)]).abs().sum(2).gt(0).all()  # the last position has an embedding
    for length in (most + 1, 2):
        with pytest.raises(BadInputError, match=rf"length: expected 3 to {most} tokens, .* got {length}\."):
            PretrainedTextEncoder.from_folder(tmp_path, length=length)


def test_weights_of_half_precision_are_read_in_full(transformers, tmp_path) -> None:
    write_tokenizer(tmp_path, "bert")
    build(transformers, "bert").half().save_pretrained(tmp_path)
    assert PretrainedTextEncoder.from_folder(tmp_path).encode(TEXTS).dtype == torch.float32


def test_folders_that_lack_something_are_refused(transformers, folder, tmp_path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(BadInputError, match=message):
            PretrainedTextEncoder.from_folder(folder)

    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[2:]), folder / "model.safetensors", metadata={"format": "pt"})
    refused(r"expected weights of the whole text encoder, got none for \w+")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    refused(r"expected a text encoder and its tokenizer as transformers saves them, got an error: .* Save or download")
    (folder / "model.safetensors").unlink()
    refused(r"expected weights as \.safetensors, got none\. Copy")
    torch.save(weights, folder / "pytorch_model.bin")
    refused(r"got pytorch_model\.bin, a pickle, which can run code .* save it with save_pretrained")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    PretrainedTextEncoder.from_folder(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    refused(r"got an error: .*model\.safetensors.* Save or download")  # and not the pickle beside it
    (folder / "model.fp16.safetensors").rename(folder / "model.safetensors")
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "vocab.json").unlink(missing_ok=True)
    refused(r"expected a tokenizer \(tokenizer\.json, .*\), got none of these files\. Copy those of the encoder")
    (folder / "config.json").unlink()
    refused(r"config\.json: expected the text encoder's configuration beside its weights, got no such file")


def test_a_damaged_tokenizer_is_refused(transformers, tmp_path) -> None:
    write_tokenizer(tmp_path, "clip")
    build(transformers, "clip").save_pretrained(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(BadInputError, match=r"expected a text encoder and its tokenizer .* got an error"):
        PretrainedTextEncoder.from_folder(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(transformers, tmp_path) -> None:
    write_tokenizer(tmp_path, "clip")
    build(transformers, "bert").save_pretrained(tmp_path)
    with pytest.raises(
        BadInputError, match=r"tokenizer: expected ids below 18, .* got 61\. Take tokenizer and weights"
    ):
        PretrainedTextEncoder.from_folder(tmp_path)
    tokenizer = transformers.BertTokenizer(vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, pad_token=None)
    with pytest.raises(BadInputError, match=r"expected one with a padding token, got none"):
        PretrainedTextEncoder(build(transformers, "bert"), tokenizer)


def test_models_that_do_not_read_text_are_refused(transformers, tmp_path) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=16, **SIZES)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartModel(transformers.BartConfig(vocab_size=18, **sizes, **heads))
    both = transformers.SiglipConfig(
        text_config={"vocab_size": 18, **SIZES}, vision_config={"image_size": 32, "patch_size": 16, **SIZES}
    )
    models = {"vit": transformers.ViTModel(config), "bart": bart, "siglip": transformers.SiglipModel(both)}
    for name, model in models.items():
        write_tokenizer(tmp_path / name, "bert")
        model.save_pretrained(tmp_path / name)
        with pytest.raises(BadInputError, match=rf"expected a text encoder .* got a model of type {name}\. Name"):
            PretrainedTextEncoder.from_folder(tmp_path / name)


def test_names_without_a_model_are_refused(tmp_path, monkeypatch, transformers) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, got in (("file", "a file"), ("nowhere", "nothing of that name here"), ("./a", "nothing of that name")):
        with pytest.raises(BadInputError, match=rf"expected the folder of a text encoder or a Hub id .* got {got}"):
            PretrainedTextEncoder.from_folder(name)
    with pytest.raises(BadInputError, match=r"owner/name: .* got neither: .* the Hub answers LocalEntryNotFoundError"):
        PretrainedTextEncoder.from_folder("owner/name")


def test_a_hub_id_is_downloaded_without_pickles_and_other_networks(transformers, folder, monkeypatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **settings: asked.update(settings) or folder)
    assert PretrainedTextEncoder.from_folder("owner/name").width == 16
    wanted = ["config.json", "model.safetensors", "vocab.txt", "text_encoder/model.safetensors", "tokenizer/merges.txt"]
    others = ["pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors", "v1-5.safetensors", "a.ckpt"]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=asked["allow_patterns"])) == wanted


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInputError, match=r"expected the package transformers .* pip install 'medgen\[text\]'"):
        PretrainedTextEncoder.from_folder(tmp_path)


def test_each_different_text_is_encoded_once(encoder) -> None:
    seen, plain = [], encoder.encode
    encoder.encode = lambda texts, **settings: seen.append(texts) or plain(texts, **settings)
    found = encode_unique(encoder, [*TEXTS, *TEXTS], batch_size=2)
    assert seen == [TEXTS[:2], TEXTS[2:]] and list(found) == TEXTS
    torch.testing.assert_close(torch.stack(list(found.values())), plain(TEXTS).detach(), rtol=0, atol=1e-5)
    assert not any(row.requires_grad for row in found.values())
