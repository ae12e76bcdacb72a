"""Checkpoints: every upstream's layout and container in, resizing by either rule, one clear error for a bad file."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from parity import images, randomise, rope_cat
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor

import eva02
from eva02 import CheckpointError
from eva02.cli import main

TINY, BASE = "eva02_tiny_patch14_224", "eva02_base_patch14_224"
SMALL_ARGS = {"depth": 2, "img_size": 56, "embed_dim": 128, "num_heads": 2}


def model_of(name=TINY, seed=0, **kwargs):
    model = eva02.create_model(name, **{**SMALL_ARGS, **kwargs})
    randomise(model, seed)
    return model


def rope_tables(grid=4, head_dim=64):
    sin, cos = rope_cat((grid, grid), head_dim).float().chunk(2, dim=-1)
    return {"freqs_cos": cos.clone(), "freqs_sin": sin.clone()}


def to_asuka(state: dict[str, Tensor], rope: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Names the official repository uses for a state dict of ours."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"mlp\.fc1_g\b", "mlp.w1", key)
        key = re.sub(r"mlp\.fc1_x\b", "mlp.w2", key)
        key = re.sub(r"mlp\.fc1\b", "mlp.w12", key)
        key = re.sub(r"mlp\.fc2\b", "mlp.w3", key)
        key = key.replace("mlp.norm", "mlp.ffn_ln").replace("attn.norm", "attn.inner_attn_ln")
        key = key.replace("attn.q_proj.bias", "attn.q_bias").replace("attn.v_proj.bias", "attn.v_bias")
        out[key] = value
    for name, table in (rope or rope_tables()).items():
        out[f"rope.{name}"] = table
        for i in range(2):
            out[f"blocks.{i}.attn.rope.{name}"] = table
    return out


def to_mmpretrain(state: dict[str, Tensor], rope: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What mmpretrain's converter makes of the official names: all fused, a zero key bias, tables kept."""
    asuka, out = to_asuka(state, rope), {}
    for key, value in asuka.items():
        if key.startswith("head."):
            out[key.replace("head.", "head.fc.")] = value
            continue
        key = key.replace("blocks.", "layers.").replace("fc_norm", "ln2").replace("mlp.ffn_ln", "mlp.norm")
        out["backbone." + key.replace("patch_embed.proj", "patch_embed.projection")] = value
    for i in range(2):
        attn, mlp = f"backbone.layers.{i}.attn.", f"backbone.layers.{i}.mlp."
        if attn + "q_proj.weight" in out:
            out[attn + "qkv.weight"] = torch.cat([out.pop(f"{attn}{n}_proj.weight") for n in "qkv"])
        q_bias, v_bias = out.pop(attn + "q_bias"), out.pop(attn + "v_bias")
        out[attn + "qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        if mlp + "w1.weight" in out:
            for kind in ("weight", "bias"):
                out[mlp + "w12." + kind] = torch.cat([out.pop(mlp + "w1." + kind), out.pop(mlp + "w2." + kind)])
    return out


def assert_same(model, expected: dict[str, Tensor], skip=()):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert key in skip or torch.equal(state[key], value), key


# ---- layouts -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("layout", ["asuka", "mmpretrain", "timm"])
@pytest.mark.parametrize("name", [TINY, BASE])
def test_fine_tuned_layouts(tmp_path, name, layout, suffix):
    source = model_of(name, num_classes=10)
    state = {"asuka": to_asuka, "mmpretrain": to_mmpretrain, "timm": dict}[layout](source.state_dict())
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    target = model_of(name, seed=1, num_classes=10)
    report = eva02.load_checkpoint(target, path)
    assert_same(target, source.state_dict())
    assert report.layout == layout
    assert not report.fresh
    assert len(report.loaded) == len(source.state_dict())
    assert all("rope" in key for key in report.dropped)
    assert bool(report.dropped) == (layout != "timm")
    assert layout in str(report)
    if layout == "mmpretrain":
        assert any("norm_eps=1e-5" in note for note in report.notes)


@pytest.mark.parametrize("name", [TINY, BASE])
def test_official_mim_file(tmp_path, name):
    source = model_of(name, head="mim")
    state = to_asuka(source.state_dict(), {k: v.half().reshape(4, 4, 64) for k, v in rope_tables().items()})
    path = tmp_path / "mim.pt"
    torch.save({"module": state}, path)
    target = model_of(name, seed=1, head="mim")
    eva02.load_checkpoint(target, path)
    assert_same(target, source.state_dict())

    expected = checkpoint_filter_fn(dict(state), timm.create_model(name, num_classes=0, **SMALL_ARGS))
    features = model_of(name, seed=1)
    report = eva02.load_checkpoint(features, path)
    assert_same(features, expected)
    assert report.renamed["norm.weight"] == "fc_norm.weight"
    assert "mask_token" in report.dropped

    classifier = model_of(name, seed=1, num_classes=10)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    report = eva02.load_checkpoint(classifier, path, mim_norm="fresh")
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    for key in report.fresh:
        assert torch.equal(classifier.state_dict()[key], before[key])

    pooled = model_of(name, seed=1, global_pool="token")
    eva02.load_checkpoint(pooled, path)
    assert torch.equal(pooled.norm.weight, source.norm.weight)


@pytest.mark.parametrize("name", [TINY, BASE])
def test_same_weights_as_timm_loads(tmp_path, name):
    """The whole chain: official names into timm through its own filter, and into ours through the file."""
    state = to_asuka(model_of(name, num_classes=10).state_dict())
    path = tmp_path / "official.pt"
    torch.save({"model": state}, path)
    theirs = timm.create_model(name, num_classes=10, **SMALL_ARGS)
    theirs.load_state_dict(checkpoint_filter_fn({"model": state}, theirs))
    ours = model_of(name, seed=1, num_classes=10)
    eva02.load_checkpoint(ours, path)
    x = images(2, 56, 56)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_fused_and_split_are_interchangeable(tmp_path):
    source = model_of(BASE)
    path = tmp_path / "split.safetensors"
    eva02.save_checkpoint(source, path)
    fused = model_of(BASE, seed=1, qkv_fused=True)
    report = eva02.load_checkpoint(fused, path)
    assert report.converted == [f"blocks.{i}.attn.qkv.weight" for i in range(2)]
    x = images(1, 56, 56)
    torch.testing.assert_close(fused(x), source(x), rtol=1e-5, atol=1e-5)
    eva02.save_checkpoint(fused, path)
    again = model_of(BASE, seed=2)
    eva02.load_checkpoint(again, path)
    assert_same(again, source.state_dict())


def test_headless_mmpretrain_backbone(tmp_path):
    state = {k: v for k, v in to_mmpretrain(model_of(BASE).state_dict()).items() if "ln2" not in k}
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    target = model_of(BASE, seed=1, num_classes=10)
    report = eva02.load_checkpoint(target, tmp_path / "backbone.pth")
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("prefix", ["visual.", "visual.trunk."])
def test_vision_tower_of_a_clip_file(tmp_path, prefix):
    args = {"global_pool": "token", "num_classes": 16, "scale_attn_inner": True}
    source = model_of(BASE, **args)
    state = source.state_dict() if "trunk" in prefix else to_asuka(source.state_dict())
    stored = {prefix + key: value for key, value in state.items()}
    stored |= {"text.positional_embedding": torch.zeros(77, 8), "logit_scale": torch.zeros(())}
    torch.save(stored, tmp_path / "clip.pt")
    target = model_of(BASE, seed=1, **args)
    report = eva02.load_checkpoint(target, tmp_path / "clip.pt")
    assert_same(target, source.state_dict())
    assert {"text.positional_embedding", "logit_scale"} <= set(report.dropped)


# ---- containers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("container", ["model_ema", "model", "module", "state_dict", "state_dict_ema", None])
def test_containers_and_prefixes(tmp_path, container):
    source = model_of()
    state = {"module." + key: value for key, value in source.state_dict().items()}
    stored = state if container is None else {container: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(stored, tmp_path / "file.pt")
    target = model_of(seed=1)
    report = eva02.load_checkpoint(target, tmp_path / "file.pt")
    assert_same(target, source.state_dict())
    assert report.container == (container or "root")


def test_averaged_weights_are_preferred_unless_refused(tmp_path):
    raw, averaged = model_of(seed=1), model_of(seed=2)
    torch.save({"model_ema": averaged.state_dict(), "module": raw.state_dict()}, tmp_path / "file.pt")
    target = model_of()
    assert eva02.load_checkpoint(target, tmp_path / "file.pt").container == "model_ema"
    assert_same(target, averaged.state_dict())
    assert eva02.load_checkpoint(target, tmp_path / "file.pt", ema=False).container == "module"
    assert_same(target, raw.state_dict())


def test_nested_and_compiled(tmp_path):
    source = model_of()
    state = {"_orig_mod.module." + key: value.half() for key, value in source.state_dict().items()}
    torch.save({"model": {"module": state}}, tmp_path / "file.pt")
    target = model_of(seed=1)
    assert eva02.load_checkpoint(target, tmp_path / "file.pt").container == "model.module"
    assert_same(target, {key: value.half().float() for key, value in source.state_dict().items()})


def test_into_a_model_on_meta(tmp_path):
    source = model_of(num_classes=10)
    eva02.save_checkpoint(source, tmp_path / "file.safetensors")
    target = eva02.create_model(TINY, num_classes=10, device="meta", dtype=torch.bfloat16, **SMALL_ARGS)
    eva02.load_checkpoint(target, tmp_path / "file.safetensors")
    assert_same(target, {key: value.bfloat16() for key, value in source.state_dict().items()})
    assert all(parameter.requires_grad for parameter in target.parameters())
    target.float()(images(1, 56, 56))


# ---- resizing ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("new", [(16, 16), (3, 5), (4, 4), (14, 14)])
def test_position_embedding_rules(new):
    pos = torch.randn(1, 1 + 16, 32)
    ours = eva02.resize_pos_embed(pos, new, (4, 4), 1, "timm")
    theirs = resample_abs_pos_embed(pos, list(new), [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    official = eva02.resize_pos_embed(pos, new, (4, 4), 1, "official")
    assert torch.equal(official[:, :1], pos[:, :1])
    if new != (4, 4):
        image = pos[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
        torch.testing.assert_close(official[:, 1:], image.permute(0, 2, 3, 1).reshape(1, -1, 32))
        assert not torch.allclose(official, ours, atol=1e-2)
    assert eva02.resize_pos_embed(pos.half(), new, (4, 4)).dtype == torch.float16


@pytest.mark.parametrize("new", [(16, 16), (8, 8), (14, 16), (14, 14)])
def test_patch_kernel_rules(new):
    kernel = torch.randn(8, 3, 14, 14)
    ours, theirs = eva02.resize_patch_kernel(kernel, new, "timm"), resample_patch_embed(kernel, list(new))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    official = eva02.resize_patch_kernel(kernel, new, "official")
    if new == (14, 14):
        assert official is kernel
        assert ours is kernel
    else:
        torch.testing.assert_close(official, F.interpolate(kernel, size=new, mode="bicubic", align_corners=False))


def test_pseudo_inverse_rule_keeps_the_product():
    """A kernel and an image resized up together meet in the same number as before."""
    kernel, image = torch.randn(4, 3, 14, 14), torch.randn(1, 3, 14, 14)
    resized = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    before = F.conv2d(image, kernel)
    torch.testing.assert_close(
        F.conv2d(resized, eva02.resize_patch_kernel(kernel, (16, 16))), before, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("rule", ["timm", "official"])
def test_loading_resizes(tmp_path, rule):
    source = model_of(img_size=56)
    torch.save(to_asuka(source.state_dict()), tmp_path / "file.pt")
    target = model_of(seed=1, img_size=(96, 64), patch_size=16)
    report = eva02.load_checkpoint(target, tmp_path / "file.pt", resize=rule)
    state = source.state_dict()
    expected_pos = eva02.resize_pos_embed(state["pos_embed"], (6, 4), (4, 4), 1, rule)
    expected_kernel = eva02.resize_patch_kernel(state["patch_embed.proj.weight"], (16, 16), rule)
    assert torch.equal(target.pos_embed, expected_pos)
    assert torch.equal(target.patch_embed.proj.weight, expected_kernel)
    assert report.resized == [
        f"patch_embed.proj.weight 14x14 -> 16x16 ({rule})",
        f"pos_embed 4x4 -> 6x4 ({rule})",
    ]
    if rule == "timm":
        theirs = timm.create_model(TINY, **{**SMALL_ARGS, "img_size": (96, 64), "patch_size": 16})
        expected = checkpoint_filter_fn(to_asuka(state), theirs)
        torch.testing.assert_close(target.pos_embed.detach(), expected["pos_embed"], rtol=1e-6, atol=1e-6)
    assert target(images(1, 96, 64)).isfinite().all()


def test_non_square_source_grid(tmp_path):
    source = model_of(img_size=(28, 112))  # 2 x 8 = 16 patches, as many as 4 x 4
    target = model_of(seed=1, img_size=(56, 56))
    eva02.save_checkpoint(source, tmp_path / "file.safetensors")
    assert eva02.load_checkpoint(target, tmp_path / "file.safetensors").resized == ["pos_embed 2x8 -> 4x4 (timm)"]
    eva02.save_checkpoint(source, tmp_path / "file.pt")
    assert not eva02.load_checkpoint(target, tmp_path / "file.pt").resized
    report = eva02.load_checkpoint(target, tmp_path / "file.pt", pos_grid=(2, 8))
    assert report.resized == ["pos_embed 2x8 -> 4x4 (timm)"]
    with pytest.raises(CheckpointError, match="16 patch rows, not the 3x5 of pos_grid"):
        eva02.load_checkpoint(target, tmp_path / "file.pt", pos_grid=(3, 5))
    eva02.save_checkpoint(model_of(img_size=(42, 56)), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"12 patch rows, no square grid; pass pos_grid"):
        eva02.load_checkpoint(target, tmp_path / "file.pt")


# ---- mmpretrain's own traps ---------------------------------------------------------------------------------------
def test_mmpretrain_key_bias_is_refused(tmp_path):
    state = to_mmpretrain(model_of().state_dict())
    state["backbone.layers.1.attn.qkv.bias"][200] = 0.5
    torch.save(state, tmp_path / "file.pth")
    for strict_rope in (True, False):
        with pytest.raises(CheckpointError, match=r"backbone\.layers\.1\.attn\.qkv\.bias: the key bias is not zero"):
            eva02.load_checkpoint(model_of(), tmp_path / "file.pth", strict_rope=strict_rope)


def test_mmpretrain_rope_tables_are_checked(tmp_path):
    source, path = model_of(), tmp_path / "file.pth"
    tables = {key: value.half() for key, value in rope_tables().items()}
    torch.save(to_mmpretrain(source.state_dict(), tables), path)
    eva02.load_checkpoint(model_of(seed=1), path)  # half precision is within the allowance

    # mmpretrain's own formula: coordinates stretched to 32, frequencies tiled instead of repeated.
    omega = 10000.0 ** (-torch.arange(16) / 16)
    angles = torch.outer(torch.arange(4) / 4 * 32, omega).repeat(1, 2)
    grid = torch.cat([angles[:, None].expand(4, 4, -1), angles[None].expand(4, 4, -1)], -1).reshape(16, 64)
    torch.save(to_mmpretrain(source.state_dict(), {"freqs_cos": grid.cos(), "freqs_sin": grid.sin()}), path)
    target = model_of(seed=1)
    with pytest.raises(CheckpointError) as error:
        eva02.load_checkpoint(target, path)
    text = str(error.value)
    for name in ("backbone.rope.freqs_cos", "backbone.layers.[0-1].attn.rope.freqs_sin"):
        assert f"{name}: the stored RoPE table differs" in text
    report = eva02.load_checkpoint(target, path, strict_rope=False)
    assert_same(target, source.state_dict())
    assert any("RoPE" in note for note in report.notes)

    tables = rope_tables()
    tables["freqs_sin"] = tables["freqs_sin"] + 2e-3
    torch.save(to_mmpretrain(source.state_dict(), tables), path)
    with pytest.raises(CheckpointError, match=r"freqs_sin: the stored RoPE table differs.*0\.002"):
        eva02.load_checkpoint(target, path)


def test_k_bias_of_other_layouts(tmp_path):
    state = dict(model_of().state_dict())
    state["blocks.0.attn.k_bias"] = torch.zeros(128)
    torch.save(state, tmp_path / "file.pt")
    assert eva02.load_checkpoint(model_of(), tmp_path / "file.pt").dropped == ["blocks.0.attn.k_bias"]
    state["blocks.0.attn.k_bias"] = torch.ones(128)
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="k_bias: the key bias is not zero"):
        eva02.load_checkpoint(model_of(), tmp_path / "file.pt")


# ---- wrong files -------------------------------------------------------------------------------------------------
class Payload:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def refuse(path, *expected, model=None, **kwargs):
    """One CheckpointError naming everything in `expected`, and a model as it was."""
    model = model or model_of(num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        eva02.load_checkpoint(model, path, **kwargs)
    assert isinstance(error.value, ValueError)
    text = str(error.value)
    assert str(path) in text
    assert error.value.problems
    for part in expected:
        assert part in text, text
    assert_same(model, before)
    return text


def test_everything_wrong_is_listed_at_once(tmp_path):
    state = to_asuka(model_of(num_classes=10).state_dict())
    del state["cls_token"], state["blocks.0.norm1.weight"], state["blocks.1.norm1.weight"]
    state["surprise.weight"] = torch.zeros(3)
    state["blocks.1.mlp.w3.bias"] = torch.zeros(7)
    state["fc_norm.bias"] = torch.zeros(128, dtype=torch.int64)
    path = tmp_path / "file.pt"
    torch.save(state, path)
    refuse(
        path,
        "missing (3): ",
        "cls_token",
        "blocks.[0-1].norm1.weight",
        "unexpected (1): surprise.weight",
        "wrong shape, (7,) stored and (128,) expected: blocks.1.mlp.fc2.bias",
        "fc_norm.bias is torch.int64",
    )


def test_other_size_depth_and_classes(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(model_of(num_classes=10, embed_dim=256, num_heads=4).state_dict(), path)
    refuse(path, "wrong shape, (256,) stored and (128,) expected", "cls_token")
    torch.save(model_of(num_classes=10, depth=4).state_dict(), path)
    refuse(path, "unexpected (", "blocks.[2-3].attn.qkv.weight")
    torch.save(model_of(BASE, num_classes=10).state_dict(), path)
    refuse(path, "unexpected (4): blocks.[0-1].mlp.norm.weight, blocks.[0-1].mlp.norm.bias")
    torch.save(model_of(num_classes=7).state_dict(), path)
    refuse(path, "wrong shape, (7, 128) stored and (10, 128) expected: head.weight; head='fresh'")
    target = model_of(num_classes=10, seed=1)
    report = eva02.load_checkpoint(target, path, head="fresh")
    assert report.fresh == ["head.weight", "head.bias"]
    assert report.dropped == ["head.weight", "head.bias"]
    features = model_of()
    assert eva02.load_checkpoint(features, path).dropped == ["head.weight", "head.bias"]
    mim = model_of(head="mim")
    refuse(path, "missing", "mask_token", "lm_head.weight", "norm.weight", "unexpected", "fc_norm.weight", model=mim)
    report = eva02.load_checkpoint(mim, path, head="fresh")
    assert {"mask_token", "lm_head.weight", "norm.weight"} <= set(report.fresh)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    eva02.save_checkpoint(model_of(), path)
    data = path.read_bytes()
    for length in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refuse(path, "empty (0 bytes)" if length == 0 else f"({length} bytes): truncated or not a checkpoint")


def test_legacy_format(tmp_path):
    source, path = model_of(), tmp_path / "legacy.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    target = model_of(seed=1)
    eva02.load_checkpoint(target, path)
    assert_same(target, source.state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    refuse(path, "truncated or not a checkpoint")


@pytest.mark.parametrize(
    "stored",
    [
        [1, 2, 3],
        "weights",
        torch.zeros(3),
        {},
        {"a": 1, "b": "two"},
        {"model": {"epoch": 3}},
        {1: torch.zeros(2)},
        collections.OrderedDict(lr=0.1),
    ],
    ids=repr,
)
def test_no_state_dict(tmp_path, stored):
    torch.save(stored, tmp_path / "file.pt")
    refuse(tmp_path / "file.pt", "not a state dict" if not (isinstance(stored, dict) and 1 in stored) else "no string")


def test_state_dict_with_something_else_inside(tmp_path):
    torch.save({**model_of().state_dict(), "epoch": 3}, tmp_path / "file.pt")
    refuse(tmp_path / "file.pt", "entry 'epoch': int, expected a tensor")


def test_no_eva_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "file.pt")
    refuse(tmp_path / "file.pt", "is no EVA checkpoint", "weight, bias")


@pytest.mark.parametrize("how", ["torch", "pickle", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    stored = {"model": model_of().state_dict(), "optimizer": Payload()}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"payload": Payload()}))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=how == "torch")
    text = refuse(path)
    assert not (tmp_path / "unpickled").exists()
    if how != "pickle":
        assert "mkdir" in text
        assert "weights_only" in text


def test_whole_module_and_numpy_are_refused(tmp_path):
    torch.save(model_of(), tmp_path / "module.pt")
    refuse(tmp_path / "module.pt", "holds a eva02.model.Eva02 object")
    torch.save({"model": np.zeros(3)}, tmp_path / "numpy.pt")
    refuse(tmp_path / "numpy.pt")


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        eva02.load_checkpoint(model_of(), tmp_path / "absent.pt")
    refuse(tmp_path, "is a directory")


def test_odd_shapes_do_not_crash(tmp_path):
    state = to_mmpretrain(model_of(BASE).state_dict())
    state["backbone.layers.0.attn.qkv.weight"] = torch.zeros(())
    state["backbone.layers.0.attn.qkv.bias"] = torch.zeros(5)
    state["backbone.layers.1.mlp.w12.weight"] = torch.zeros(3)
    state["backbone.pos_embed"] = torch.zeros(2)
    state["backbone.patch_embed.projection.weight"] = torch.zeros(3, 4)
    torch.save(state, tmp_path / "file.pt")
    refuse(tmp_path / "file.pt", "qkv.weight", "qkv.bias", "pos_embed", "patch_embed", model=model_of(BASE))


def test_wrong_arguments(tmp_path):
    for kwargs in ({"resize": "bicubic"}, {"head": "new"}, {"mim_norm": "keep"}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            eva02.load_checkpoint(model_of(), tmp_path / "file.pt", **kwargs)


# ---- writing -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_is_atomic(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"file{suffix}"
    eva02.save_checkpoint(model_of(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        eva02.save_checkpoint(model_of(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses_other_names(tmp_path):
    with pytest.raises(ValueError, match="safetensors"):
        eva02.save_checkpoint(model_of(), tmp_path / "file.bin")


def test_saved_file_loads_in_timm(tmp_path):
    source = model_of(BASE, num_classes=10)
    eva02.save_checkpoint(source, tmp_path / "file.safetensors")
    theirs = timm.create_model(BASE, num_classes=10, checkpoint_path=str(tmp_path / "file.safetensors"), **SMALL_ARGS)
    x = images(1, 56, 56)
    torch.testing.assert_close(theirs(x), source(x), rtol=1e-5, atol=1e-5)


# ---- command -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [to_asuka, to_mmpretrain])
@pytest.mark.parametrize("name", [TINY, BASE])
def test_convert_command(tmp_path, capsys, name, make):
    source = model_of(name, num_classes=10)
    torch.save({"module": make(source.state_dict())}, tmp_path / "in.pt")
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 0
    converted = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert converted.keys() == source.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in source.state_dict().items())
    assert "layout" in capsys.readouterr().out


def test_convert_command_with_a_model_resizes(tmp_path, capsys):
    source = eva02.create_model(TINY, img_size=56, num_classes=10)
    randomise(source)
    torch.save(to_asuka(source.state_dict()), tmp_path / "in.pt")
    arguments = ["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), "--model", TINY]
    options = ["--img-size", "70x98", "--patch-size", "14", "--num-classes", "10", "--resize", "official"]
    assert main(arguments + options) == 0
    assert "pos_embed 4x4 -> 5x7 (official)" in capsys.readouterr().out
    assert safetensors.torch.load_file(tmp_path / "out.safetensors")["pos_embed"].shape == (1, 36, 192)
    assert main([*arguments, "--num-classes", "11"]) == 1
    assert "wrong shape" in capsys.readouterr().err
    assert main(arguments[:3] + options[:2]) == 1
    assert "need --model" in capsys.readouterr().err


def test_features_command(tmp_path, capsys):
    from PIL import Image

    source = eva02.create_model(TINY, img_size=28)
    eva02.save_checkpoint(source, tmp_path / "model.safetensors")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for name, shape in (("b.png", (40, 60, 3)), ("a.png", (28, 28, 3)), ("c.png", (90, 30, 3))):
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "images" / name)
    arguments = ["features", str(tmp_path / "images"), "--model", TINY, "--img-size", "28", "--batch-size", "2"]
    arguments += ["--checkpoint", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out.npz")]
    assert main(arguments) == 0
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["features"].shape == (3, 192)
        assert [os.path.basename(path) for path in stored["paths"]] == ["a.png", "b.png", "c.png"]
        from eva02.images import load_image

        expected = source.eval()(load_image(tmp_path / "images" / "a.png", (28, 28))[None]).detach().numpy()
        np.testing.assert_allclose(stored["features"][:1], expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "empty").mkdir()
    assert main(["features", str(tmp_path / "empty"), *arguments[2:]]) == 1
    assert "no image" in capsys.readouterr().err


def test_info_command(capsys):
    assert main(["info", "eva02_*_patch14_224"]) == 0
    out = capsys.readouterr().out
    for count in ("5,502,144", "21,621,120", "85,758,720", "303,268,800"):
        assert count in out
    assert main(["info", "eva02_tiny_patch14_224", "--mim", "--json"]) == 0
    assert '"params": 5699968' in capsys.readouterr().out
    assert main(["info", "EVA02-CLIP-L*"]) == 0
    assert "427,755,457" in capsys.readouterr().out
    assert main(["info", "resnet50"]) == 1
    assert "no model matches" in capsys.readouterr().err
