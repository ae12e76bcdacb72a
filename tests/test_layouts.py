"""Every layout out and in again: bit for bit, and as the upstreams' own modules hold their weights."""

from __future__ import annotations

import pytest
import timm
import torch
from parity import randomise
from test_checkpoint import to_asuka, to_mmpretrain
from torch import Tensor, nn

import eva02
import eva02.clip
from eva02.checkpoint import LAYOUTS
from eva02.cli import main

SIZE = {"depth": 2, "img_size": 56, "patch_size": 14, "embed_dim": 128, "num_heads": 2, "num_classes": 10}
TEXT = {"width": 64, "depth": 2, "num_heads": 2, "context_length": 8, "vocab_size": 100}
MODELS = {
    "packed": "eva02_tiny_patch14_224",
    "sub-LN": "eva02_base_patch14_224",
    "gelu": "eva_giant_patch14_224",
    "plain": "eva_mae_base_patch16_224",
}
CLIPS = {"sub-LN": "EVA02-CLIP-B-16", "gelu": "EVA01-CLIP-g-14", "post-norm": "EVA02-CLIP-bigE-14"}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = eva02.clip.create_model(name, text=TEXT, **SIZE) if "CLIP" in name else eva02.create_model(name, **SIZE)
    randomise(model)
    return model.to(dtype)


def saved(path, state: dict[str, Tensor]):
    torch.save(state, path)
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def converted(source, layout, tmp_path, suffix=".safetensors", **options):
    target = tmp_path / f"{layout}{suffix}"
    eva02.convert_checkpoint(source, target, layout=layout, **options)
    return target


def rope_tables() -> dict[str, Tensor]:
    """timm's, which are the official ones bit for bit."""
    rope = timm.create_model(MODELS["packed"], **SIZE).rope
    sin, cos = rope.get_embed().chunk(2, -1)
    return {"freqs_cos": cos.clone(), "freqs_sin": sin.clone()}


# ---- there and back --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_models_come_back_bit_for_bit(tmp_path, kind, layout):
    model = model_of(MODELS[kind], torch.bfloat16)
    source = saved(tmp_path / "source.pt", model.state_dict())
    there = converted(source, layout, tmp_path)
    back = converted(there, "timm", tmp_path / "..", suffix=f"-{kind}-{layout}.pt")
    assert_same(torch.load(back), model.state_dict())
    loaded = eva02.create_model(MODELS[kind], dtype=torch.bfloat16, **SIZE)
    report = eva02.load_checkpoint(loaded, there)
    assert_same(loaded.state_dict(), model.state_dict())
    gelu_official = layout == "asuka" and kind in ("gelu", "plain")  # the same names
    assert report.layout == ("timm" if gelu_official else layout)


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.clip is not None])
@pytest.mark.parametrize("kind", CLIPS)
def test_two_towers_come_back_bit_for_bit(tmp_path, kind, layout):
    model = model_of(CLIPS[kind])
    source = saved(tmp_path / "source.pt", model.state_dict())
    there = converted(source, layout, tmp_path)
    loaded = eva02.clip.create_model(CLIPS[kind], text=TEXT, device="meta", **SIZE)
    eva02.load_checkpoint(loaded, there)
    assert_same(loaded.state_dict(), model.state_dict())
    tower = eva02.Eva02(loaded.config.vision)
    report = eva02.load_checkpoint(tower, there)
    assert_same(tower.state_dict(), model.visual.state_dict())
    assert any("text" in key or "token_embedding" in key for key in report.dropped)


# ---- files made by others --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layout", "make"), [("asuka", to_asuka), ("mmpretrain", to_mmpretrain)])
@pytest.mark.parametrize("kind", ["packed", "sub-LN"])
def test_official_files_come_back_bit_for_bit(tmp_path, kind, layout, make):
    """Names, fused projections, zero key biases and RoPE tables too."""
    state = make(model_of(MODELS[kind]).state_dict(), rope_tables())
    ours = converted(saved(tmp_path / "source.pt", {"module": state}), "timm", tmp_path)
    assert_same(torch.load(converted(ours, layout, tmp_path, ".pt")), state)


def test_official_pre_training_files_come_back_bit_for_bit(tmp_path):
    model = eva02.create_model(MODELS["sub-LN"], head="mim", **SIZE)
    randomise(model)
    state = to_asuka(model.state_dict(), rope_tables())
    ours = converted(saved(tmp_path / "source.pt", state), "timm", tmp_path)
    assert_same(torch.load(converted(ours, "asuka", tmp_path, ".pt")), state)


def test_mmpretrains_giant(tmp_path):
    """Of EVA-01, whose blocks mmpretrain names otherwise."""
    model = model_of(MODELS["gelu"])
    names = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        key = (
            key.replace("blocks.", "layers.")
            .replace("fc_norm", "ln2")
            .replace("patch_embed.proj", "patch_embed.projection")
        )
        state["head.fc." + key[5:] if key.startswith("head.") else "backbone." + key] = value
    for i in range(2):
        attn = f"backbone.layers.{i}.attn."
        q_bias, v_bias = state.pop(attn + "q_bias"), state.pop(attn + "v_bias")
        state[attn + "qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    ours = converted(saved(tmp_path / "source.pt", {"state_dict": state}), "timm", tmp_path)
    assert_same(torch.load(converted(ours, "mmpretrain", tmp_path, ".pt")), state)
    loaded = eva02.create_model(MODELS["gelu"], **SIZE)
    eva02.load_checkpoint(loaded, ours)
    assert_same(loaded.state_dict(), model.state_dict())


def test_open_clip_loads_what_is_written_for_it(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    ours = model_of(CLIPS["sub-LN"])
    theirs = open_clip.model.CustomTextCLIP(
        10,
        {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token", "timm_proj": None, "image_size": 224},
        {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
    )
    theirs.visual.trunk = timm.create_model("eva02_base_patch16_clip_224", **SIZE)
    source = saved(tmp_path / "source.pt", ours.state_dict())
    file = converted(source, "open_clip", tmp_path, ".pt")
    theirs.load_state_dict(torch.load(file))
    # open_clip -> EVA-CLIP's own names -> open_clip
    assert_same(
        torch.load(converted(converted(file, "asuka", tmp_path), "open_clip", tmp_path, ".pt")), theirs.state_dict()
    )


def test_eva_clips_first_text_names(tmp_path):
    model = model_of(CLIPS["gelu"])
    old = {key.removeprefix("text."): value for key, value in model.state_dict().items()}
    loaded = eva02.clip.create_model(CLIPS["gelu"], text=TEXT, **SIZE)
    eva02.load_checkpoint(loaded, saved(tmp_path / "old.pt", {"state_dict": old}))
    assert_same(loaded.state_dict(), model.state_dict())


def test_transformers_loads_what_is_written_for_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = model_of(MODELS["sub-LN"])
    file = converted(saved(tmp_path / "source.pt", model.state_dict()), "transformers", tmp_path, ".pt")
    options = {name: value for name, value in SIZE.items() if name != "num_classes"}
    config = transformers.TimmWrapperConfig(architecture=MODELS["sub-LN"], model_args=options, num_labels=10)
    theirs = transformers.TimmWrapperForImageClassification(config).eval()
    theirs.load_state_dict(torch.load(file))
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(images).logits, model.eval()(images), rtol=1e-4, atol=1e-4)

    model = model_of(CLIPS["sub-LN"])
    file = converted(saved(tmp_path / "source.pt", model.state_dict()), "transformers", tmp_path, ".pt")
    config = transformers.CLIPTextConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=100,
        max_position_embeddings=8, projection_dim=10, hidden_act="gelu", eos_token_id=99,
    )  # fmt: skip
    text = transformers.CLIPTextModelWithProjection(config).eval()
    state = torch.load(file)
    text.load_state_dict({key: value for key, value in state.items() if key.startswith("text_")})
    tokens = torch.tensor([[98, 3, 4, 99, 0, 0, 0, 0], [98, 5, 6, 7, 8, 9, 10, 99]])
    torch.testing.assert_close(text(tokens).text_embeds, model.text(tokens), rtol=1e-4, atol=1e-4)


# ---- errors, command -------------------------------------------------------------------------------------------------
def test_clip_towers_begin_from_pre_training(tmp_path):
    """Its norms inside attention are new; position embedding and patches are resized."""
    source = eva02.create_model(MODELS["sub-LN"], head="mim", **SIZE)
    path = saved(tmp_path / "mim.pt", to_asuka(source.state_dict()))
    model = eva02.clip.create_model(CLIPS["sub-LN"], text=TEXT, **{**SIZE, "patch_size": 16, "img_size": 80})
    report = eva02.load_checkpoint(model.visual, path)
    inner_norms = {f"blocks.{i}.attn.norm.{p}" for i in range(2) for p in ("weight", "bias")}
    assert set(report.fresh) == {"head.weight", "head.bias"} | inner_norms
    assert len(report.resized) == 2
    assert torch.equal(model.visual.norm.weight, source.norm.weight)


def test_layouts_that_cannot_hold_a_model(tmp_path):
    two = saved(tmp_path / "two.pt", model_of(CLIPS["gelu"]).state_dict())
    with pytest.raises(ValueError, match="'mmpretrain' has no files of two towers"):
        converted(two, "mmpretrain", tmp_path)
    with pytest.raises(ValueError, match="layout is one of timm, asuka"):
        converted(two, "timm1", tmp_path)
    model = eva02.create_model(MODELS["packed"], **{**SIZE, "img_size": (56, 84)})
    oblong = saved(tmp_path / "oblong.pt", model.state_dict())
    with pytest.raises(ValueError, match="RoPE tables of square grids"):
        converted(oblong, "asuka", tmp_path)
    assert not (tmp_path / "asuka.safetensors").exists()


def test_convert_command(tmp_path, capsys):
    state = model_of(CLIPS["sub-LN"]).state_dict()
    source = saved(tmp_path / "in.pt", state)
    assert main(["convert", str(source), str(tmp_path / "out.pt"), "--to", "open_clip"]) == 0
    assert "visual.trunk.head.weight" in torch.load(tmp_path / "out.pt")
    assert main(["convert", str(source), str(tmp_path / "x.pt"), "--to", "asuka", "--model", "EVA02-CLIP-B-16"]) == 1
    assert "wrong shape" in capsys.readouterr().err
