"""CLIP's towers against timm's and open_clip's, zero-shot classification and retrieval against their definitions."""

from __future__ import annotations

import pytest
import timm
import torch
from parity import compare, count, double_reference, images, randomise, shapes
from torch import nn

import eva02
import eva02.clip
from eva02_kernels import clip_loss

open_clip = pytest.importorskip("open_clip")

# Parameters of the whole and of the vision tower (executed upstream code).
SIZES = {
    "EVA01-CLIP-B-16": (149_629_697, 86_201_600),
    "EVA01-CLIP-g-14": (1_136_435_841, 1_012_588_928),
    "EVA01-CLIP-g-14-plus": (1_366_621_569, 1_012_588_928),
    "EVA02-CLIP-B-16": (149_691_137, 86_263_040),
    "EVA02-CLIP-L-14": (427_755_457, 304_105_152),
    "EVA02-CLIP-L-14-336": (428_083_137, 304_432_832),
    "EVA02-CLIP-bigE-14": (4_704_589_569, 4_350_556_928),
    "EVA02-CLIP-bigE-14-plus": (5_044_889_089, 4_350_556_928),
}
MODELS = {
    "eva02_base_patch16_clip_224": 86_263_040,
    "eva02_large_patch14_clip_224": 304_105_152,
    "eva02_large_patch14_clip_336": 304_432_832,
    "eva02_enormous_patch14_clip_224": 4_350_556_928,
    "eva_giant_patch14_clip_224": 1_012_588_928,
    "eva_giant_patch14_224": 1_012_555_112,
    "eva_giant_patch14_336": 1_013_005_672,
    "eva_giant_patch14_560": 1_014_447_464,
}
PLAIN = {"eva_mae_base_patch16_224": "vit_base_patch16_224", "eva_large_patch14_196": "eva_large_patch14_196"}
# A model of the family that a test can afford; the hidden width 682 is no multiple of 8.
SMALL = {"depth": 2, "img_size": 64, "patch_size": 16, "embed_dim": 256, "num_heads": 4, "num_classes": 64}
SMALL_TEXT = {"width": 128, "depth": 2, "num_heads": 2, "context_length": 16}


def small_clip() -> eva02.clip.Clip:
    torch.manual_seed(0)
    return eva02.clip.create_model("EVA02-CLIP-B-16", text=SMALL_TEXT, **SMALL)


# ---- sizes, names ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_models(name):
    model = eva02.clip.create_model(name, device="meta")
    assert (count(model), count(model.visual)) == SIZES[name]
    assert eva02.clip.list_models() == list(SIZES)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_and_names_of_the_towers(name):
    assert count(eva02.create_model(name, device="meta")) == MODELS[name]
    with torch.device("meta"):
        assert shapes(eva02.create_model(name, depth=1)) == shapes(timm.create_model(name, depth=1))


def test_giant_without_a_classifier():
    assert count(eva02.create_model("eva_giant_patch14_224", device="meta", num_classes=0)) == 1_011_146_112


@pytest.mark.parametrize("name", PLAIN)
def test_plain_vision_transformers_have_timms_names(name):
    with torch.device("meta"):
        theirs = timm.create_model(PLAIN[name], global_pool="avg")
        assert shapes(eva02.create_model(name)) == shapes(theirs)


def test_wrong_names_and_options():
    with pytest.raises(ValueError, match="nearest: EVA02-CLIP-B-16"):
        eva02.clip.create_model("EVA02-CLIP-B16")
    with pytest.raises(TypeError, match="unknown option 'layers' of the text tower"):
        eva02.clip.create_model("EVA02-CLIP-B-16", text={"layers": 2})
    with pytest.raises(ValueError, match="embedding's width"):
        eva02.clip.create_model("EVA02-CLIP-B-16", num_classes=0)
    with pytest.raises(ValueError, match=r"tokens: expected \(B, S\) with S at most 16; got \(1, 77\)"):
        small_clip().encode_text(eva02.clip.tokenize("a text"))


# ---- outputs and gradients -------------------------------------------------------------------------------------------
TOWERS = {
    "base": ("eva02_base_patch16_clip_224", SMALL),
    "large": ("eva02_large_patch14_clip_224", {"depth": 1, "img_size": 56}),
    "giant": ("eva_giant_patch14_clip_224", {**SMALL, "embed_dim": 352}),
    "enormous": ("eva02_enormous_patch14_clip_224", {**SMALL, "embed_dim": 224, "num_heads": 2}),
    "giant classifier": ("eva_giant_patch14_224", {**SMALL, "embed_dim": 176, "num_heads": 2}),
}


@pytest.mark.parametrize("case", TOWERS)
def test_vision_towers_are_timms(case):
    name, options = TOWERS[case]
    theirs, ours = timm.create_model(name, **options), eva02.create_model(name, **options)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    batches = [images(2, *ours.img_size, seed=seed) for seed in range(3)]
    compare(theirs, ours, batches, lambda model: double_reference(model, ours.grid_size))


def test_a_plain_vision_transformer_is_timms():
    options = {"depth": 2, "img_size": 48, "embed_dim": 128, "num_heads": 2, "num_classes": 10}
    theirs = timm.create_model("vit_base_patch16_224", global_pool="avg", **options)
    ours = eva02.create_model("eva_mae_base_patch16_224", **options)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    compare(theirs, ours, [images(2, 48, 48, seed=seed) for seed in range(3)], nn.Module.double)


def test_text_tower_is_open_clips():
    theirs = open_clip.transformer.TextTransformer(
        context_length=16, vocab_size=300, width=128, heads=2, layers=2, output_dim=64
    )
    ours = eva02.clip.TextTower(eva02.clip.TextConfig(**SMALL_TEXT, vocab_size=300), 64)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 299, (3, 16), generator=generator) for _ in range(3)]
    for tokens in texts:
        for row, end in enumerate((5, 15, 9)):
            tokens[row, end:] = 0
            tokens[row, end] = 299
    compare(theirs, ours, texts, nn.Module.double, lambda model, tokens: model(tokens.long()))


def test_the_model_and_its_loss_are_open_clips():
    """Both features, the loss, and every parameter's gradient of a training step, by names of open_clip."""
    ours = small_clip()
    theirs = open_clip.model.CustomTextCLIP(
        64,
        {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token", "timm_proj": None, "image_size": 224},
        {"context_length": 16, "width": 128, "heads": 2, "layers": 2},
    )  # fmt: skip
    theirs.visual.trunk = timm.create_model("eva02_base_patch16_clip_224", **SMALL)
    theirs.load_state_dict(
        {name.replace("visual.", "visual.trunk."): value for name, value in ours.state_dict().items()}
    )
    batch, tokens = images(4, 64, 64), eva02.clip.tokenize(["one", "two", "three 3", "four"], 16)
    loss = clip_loss(*ours(batch, tokens))
    expected = open_clip.loss.ClipLoss()(*theirs(batch, tokens)[:3])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = theirs_by_name[name.replace("visual.", "visual.trunk.")].grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


# ---- patch dropout ---------------------------------------------------------------------------------------------------
def test_patch_dropout_keeps_the_patches_places(monkeypatch):
    """Training on half of the patches is evaluating a model that attends to these alone, rotated by their places."""
    model = eva02.create_model("eva02_base_patch16_clip_224", **SMALL, patch_drop_rate=0.5)
    randomise(model)
    batch = images(2, 64, 64)
    keep = torch.tensor([[0, 3, 5, 6, 9, 10, 12, 15], [15, 1, 2, 4, 7, 8, 11, 13]])
    noise = torch.full((2, 16), -1.0).scatter(1, keep, torch.arange(8, 0, -1.0).expand(2, -1))
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: noise)
    found = model.train()(batch)

    x, rope = model.eval()._embed(batch)
    seen = torch.zeros(2, 17, dtype=torch.bool)
    seen[:, 0] = True
    seen.scatter_(1, keep + 1, True)
    for block in model.blocks:
        x = block(x, rope, key_padding_mask=seen)
    expected = model.head(model.norm(x)[:, 0])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(batch), model(batch))  # evaluation leaves nothing out


# ---- zero-shot classification, retrieval -----------------------------------------------------------------------------
def test_class_embeddings_are_open_clips():
    model = small_clip().eval()
    classes, templates = ["cat", "very small dog", "7"], ("a photo of a {}.", lambda name: f"the {name}", "{}")
    found = eva02.clip.class_embeddings(model, classes, templates, batch_size=2)
    by_function = [t if callable(t) else t.format for t in templates]
    expected = open_clip.build_zero_shot_classifier(
        model, lambda texts: eva02.clip.tokenize(texts, 16), classes, by_function
    )
    torch.testing.assert_close(found, expected.T)
    names, prompts = eva02.clip.imagenet_prompts()
    assert (len(names), len(prompts)) == (1000, 80)


def test_zero_shot_accuracy():
    model = small_clip().eval()
    batch = images(6, 64, 64)
    features = model.encode_image(batch, normalize=True).detach()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])  # the last image is its own class's, the sixth
    batches = [(batch[:4], labels[:4]), (batch[4:], labels[4:])]
    found = eva02.clip.zero_shot_accuracy(model, batches, features, topk=(1, 6, 7))
    assert found == {1: 5 / 6, 6: 1.0}


def test_retrieval_with_several_captions():
    """Against a count by hand: similarities are given by one-hot images and chosen texts."""
    image = torch.eye(3)
    text = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.9, 0.3], [0.1, 0.8, 0.7], [0.3, 0.4, 0.95], [0.99, 0.2, 0.5]])
    owner = torch.tensor([0, 0, 1, 2, 2])
    # image -> text: the nearest texts are 4 (of image 2), 1 (of 0), 3 (of 2): one right; the second are 0, 2, whatever.
    # text -> image: nearest images are 0, 1, 1, 2, 0: texts 0, 2, 3 right; second nearest 1, 2, 2, 1, 2: text 4 too.
    found = eva02.clip.retrieval_recall(image, text, owner, topk=(1, 2, 10), block=2)
    assert found == pytest.approx(
        {
            "image_to_text_R@1": 1 / 3,
            "image_to_text_R@2": 1.0,
            "image_to_text_R@10": 1.0,
            "text_to_image_R@1": 3 / 5,
            "text_to_image_R@2": 4 / 5,
            "text_to_image_R@10": 1.0,
        }
    )
    with pytest.raises(ValueError, match="each of the 3 images"):
        eva02.clip.retrieval_recall(image, text, torch.zeros(5, dtype=torch.long))
