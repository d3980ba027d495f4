"""The small text encoder: what was saved reads the same words, padding is nothing, nothing is lost in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from medgen.networks.text_encoder import TextEncoder
from medgen.networks.vocabulary import PAD
from medgen.types import BadInputError

TEXTS = ["Chest X-ray, PA view.", "Chest", "normal chest PA view and no finding"]
WORDS = ["chest", "x", "ray", "pa", "view", "normal", "and", "no", "finding"]


@pytest.fixture
def small() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(WORDS, width=16, heads=2, length=8).eval()


@pytest.mark.parametrize("sizes", [{"width": 10, "heads": 4}, {"depth": 0}, {"length": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(BadInputError, match=r"text encoder: expected positive sizes .* got width"):
        TextEncoder(WORDS, **sizes)


def test_the_small_encoder_reloads_bit_for_bit_in_a_fresh_process(small: TextEncoder, tmp_path) -> None:
    small.save_pretrained(tmp_path / "encoder")
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    code = (
        "import sys, torch; from safetensors.torch import save_file\n"
        "from medgen.networks.text_encoder import TextEncoder\n"
        "encoder = TextEncoder.from_pretrained(sys.argv[1]).eval()\n"
        "save_file({'out': encoder.encode(sys.argv[3:]).detach()}, sys.argv[2])"
    )
    arguments = [str(tmp_path / "encoder"), str(tmp_path / "out.safetensors"), *TEXTS]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], small.encode(TEXTS).detach())


def test_the_small_encoder_is_the_transformer_of_torch(small: TextEncoder) -> None:
    """Without padding it is torch's own stack, whose weights it is given."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    stack = torch.nn.TransformerEncoder(layer, 2, small.norm, enable_nested_tensor=False).eval()
    for own, other in zip(small.layers, stack.layers, strict=True):
        other.load_state_dict(own.state_dict())
    ids = torch.randint(1, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(ids), stack(small.words.weight[ids] + small.positions))


@pytest.mark.parametrize("grad", [True, False])
def test_padding_and_the_other_texts_do_not_act(small: TextEncoder, grad: bool) -> None:
    ids = torch.stack([small.vocabulary.tokenize(text, 8).ids for text in [*TEXTS, ""]])
    with torch.set_grad_enabled(grad):
        together, before = small(ids), small.words.weight[PAD].clone()
        alone = torch.cat([small(row[None]) for row in ids])
        with torch.no_grad():
            small.words.weight[PAD] += torch.arange(16)  # a layer norm would take off a constant
        other = small(ids)
        with torch.no_grad():
            small.words.weight[PAD] = before
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, other, rtol=0, atol=1e-5)
    assert torch.equal(together.abs().sum(2) > 0, ids != PAD)
    assert torch.equal(together[3], torch.zeros(8, 16))


def test_no_row_is_masked_whole(small: TextEncoder) -> None:
    """The softmax over nothing is NaN on some devices, and its gradients reach the weights."""
    masks = []
    for layer in small.layers:
        layer.register_forward_pre_hook(
            lambda _, __, named: masks.append(named["src_key_padding_mask"]), with_kwargs=True
        )
    small(torch.tensor([8 * [PAD], [2, *7 * [PAD]]]))
    assert len(masks) == 2
    for mask in masks:
        assert mask.tolist() == [8 * [False], [False, *7 * [True]]]


def test_every_word_and_its_place_act(small: TextEncoder) -> None:
    texts = ["chest view", "view chest", "chest ray", "chest"]
    embedded = small.encode(texts)
    for other in embedded[1:]:
        assert (embedded[0, 0] - other[0]).abs().max() > 1e-2


def test_gradients_reach_every_weight_also_beside_a_text_without_words(small: TextEncoder) -> None:
    ids = torch.stack([small.vocabulary.tokenize(text, 8).ids for text in [*TEXTS, ""]])
    small.train()(ids).square().mul(torch.arange(16)).mean().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_ids_of_another_length_are_refused(small: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"expected ids of shape \(B, 8\), got \(1, 7\)"):
        small(torch.zeros(1, 7, dtype=torch.long))


def test_unknown_words_are_named_with_their_neighbors(small: TextEncoder) -> None:
    with pytest.warns(UserWarning, match=r"text encoder does not know: chset \(did you mean chest\?\), 77$"):
        embedded = small.encode(["chset view 77"])
    assert (embedded[0, :3].abs().sum(1) > 0).all()
    with pytest.raises(BadInputError, match=r"expected words that the text encoder knows, got none.* knows 9, such as"):
        small.encode(["chest", "Herz lateral"])


def test_only_words_that_are_much_alike_are_suggested() -> None:
    encoder = TextEncoder(["a", "ap", "involving", "effusion", "findings"], width=8, depth=1, heads=2, length=12)
    with pytest.warns(UserWarning) as caught:
        encoder.encode(["effusion pa aps finding resolving efusion"])
    (message,) = [str(warning.message) for warning in caught]
    assert message.endswith(
        "know: pa, aps, finding (did you mean findings?), resolving, efusion (did you mean effusion?)"
    )


def test_a_long_text_is_quoted_shortly(small: TextEncoder) -> None:
    with pytest.raises(BadInputError) as refused:
        small.encode([100 * "chest view "])
    assert len(str(refused.value)) < 260
    assert small.cut(100 * "chest view ") == " ".join(96 * ["chest", "view"])
    assert small.cut("chest view") == ""


def test_a_text_is_cut_with_a_warning_where_that_is_allowed(small: TextEncoder) -> None:
    text = "normal chest PA view and no finding PA"
    with pytest.warns(UserWarning, match=r"is too long .*: 'normal' is cut"):
        cut = small.encode([text + " normal"], truncate=True)
    assert torch.equal(cut, small.encode([text]))
