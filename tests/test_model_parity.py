"""The model against timm 1.0.31: names, sizes, outputs and the gradient of every parameter."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from parity import compare, count, double_reference, images, randomise, run, shapes
from torch import nn

import eva02
from benchmarks.pretrain import TimmMim

TIMM_NAMES = [
    "eva02_tiny_patch14_224",
    "eva02_tiny_patch14_336",
    "eva02_small_patch14_224",
    "eva02_small_patch14_336",
    "eva02_base_patch14_224",
    "eva02_base_patch14_448",
    "eva02_large_patch14_224",
    "eva02_large_patch14_448",
]
TINY, SMALL, BASE, LARGE = (f"eva02_{size}_patch14_224" for size in ("tiny", "small", "base", "large"))


def timm_model(name: str, **kwargs) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    randomise(model)
    return model


# ---- names, sizes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("eva02_tiny_patch14_224", {}, 5_502_144),
        ("eva02_tiny_patch14_336", {}, 5_756_584),
        ("eva02_small_patch14_224", {}, 21_621_120),
        ("eva02_small_patch14_336", {}, 22_129_000),
        ("eva02_base_patch14_224", {}, 85_758_720),
        ("eva02_base_patch14_224", {"patch_size": 16}, 85_850_880),
        ("eva02_base_patch16_224", {}, 85_850_880),
        ("eva02_base_patch14_448", {}, 87_117_544),
        ("eva02_base_patch14_448", {"num_classes": 21841}, 103_144_273),
        ("eva02_large_patch14_224", {}, 303_268_800),
        ("eva02_large_patch14_224", {"patch_size": 16}, 303_391_680),
        ("eva02_large_patch16_224", {}, 303_391_680),
        ("eva02_large_patch14_448", {}, 305_080_232),
        ("eva02_large_patch14_448", {"num_classes": 21841}, 326_442_257),
        ("eva02_tiny_patch14_224", {"head": "mim"}, 5_699_968),
        ("eva02_small_patch14_224", {"head": "mim"}, 22_015_744),
        ("eva02_base_patch14_224", {"head": "mim"}, 86_546_944),
        ("eva02_large_patch14_224", {"head": "mim"}, 304_319_424),
    ],
)
def test_parameter_count(name, overrides, expected):
    assert count(eva02.create_model(name, device="meta", **overrides)) == expected


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_names_and_shapes_are_timms(name):
    assert name in eva02.list_models()
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), eva02.create_model(name)
    assert shapes(ours) == shapes(theirs)
    assert ours.config.num_classes == theirs.num_classes
    assert ours.num_features == theirs.num_features


def test_list_models():
    assert set(TIMM_NAMES) <= set(eva02.list_models())
    assert set(eva02.list_models("eva02_tiny_patch16*")) == {f"eva02_tiny_patch16_{n}" for n in (224, 336, 448)}


def test_wrong_names_and_options():
    with pytest.raises(ValueError, match=r"nearest: .*eva02_tiny_patch14_224"):
        eva02.create_model("eva02_tiny_patch14_225")
    with pytest.raises(TypeError, match="did you mean 'img_size'"):
        eva02.create_model(TINY, image_size=98)
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        eva02.create_model(TINY, num_heads=5)
    model = eva02.create_model(TINY, depth=1)
    with pytest.raises(ValueError, match=r"images are 98x98, the model was built for 224x224.*dynamic_img_size"):
        model(images(1, 98, 98))
    with pytest.raises(ValueError, match="not whole patches"):
        eva02.create_model(TINY, depth=1, dynamic_img_size=True)(images(1, 100, 98))


# ---- outputs and gradients ---------------------------------------------------------------------------------------
# Hidden width 682: like Large's 2730 no multiple of 8.
NARROW = {"num_classes": 10, "depth": 2, "img_size": 98, "embed_dim": 256, "num_heads": 4}
CASES = {
    "tiny": (TINY, 2, {"num_classes": 1000}),
    "small": (SMALL, 1, {"num_classes": 1000}),
    "base": (BASE, 1, {"num_classes": 1000, "depth": 4}),
    "large": (LARGE, 1, {"num_classes": 1000, "depth": 2}),
    "tiny-p16": (TINY, 2, {"num_classes": 10, "depth": 3, "patch_size": 16}),
    "base-p16": (BASE, 1, {"num_classes": 10, "depth": 2, "patch_size": 16}),
    "large-p16-small-image": (LARGE, 1, {"num_classes": 10, "depth": 2, "patch_size": 16, "img_size": 96}),
    "tiny-98": (TINY, 3, {"num_classes": 10, "depth": 3, "img_size": 98}),
    "tiny-336": (TINY, 1, {"num_classes": 10, "depth": 2, "img_size": 336}),
    "tiny-448": (TINY, 1, {"num_classes": 10, "depth": 2, "img_size": 448}),
    "small-196x280": (SMALL, 1, {"num_classes": 10, "depth": 2, "img_size": (196, 280)}),
    "base-280x70": (BASE, 2, {"num_classes": 10, "depth": 2, "img_size": (280, 70)}),
    "large-70x98": (LARGE, 1, {"num_classes": 10, "depth": 2, "img_size": (70, 98)}),
    "tiny-100-cut": (TINY, 2, {"num_classes": 10, "depth": 2, "img_size": 100}),
    "features": (TINY, 2, {"num_classes": 0, "depth": 2, "img_size": 98}),
    "tokens": (TINY, 2, {"num_classes": 0, "depth": 2, "img_size": 98, "global_pool": ""}),
    "class-token": (BASE, 2, {**NARROW, "global_pool": "token"}),
    "layer-scale": (TINY, 2, {"num_classes": 10, "depth": 3, "img_size": 98, "init_values": 0.1}),
    "layer-scale-subln": (BASE, 2, {**NARROW, "init_values": 0.1}),
    "tiny-split": (TINY, 2, {"num_classes": 10, "depth": 2, "img_size": 98, "qkv_fused": False}),
    "base-fused": (BASE, 1, {**NARROW, "qkv_fused": True}),
    "no-qkv-bias": (BASE, 1, {**NARROW, "qkv_bias": False}),
    "inner-norm": (BASE, 1, {**NARROW, "scale_attn_inner": True}),
    "no-rope": (TINY, 2, {"num_classes": 10, "depth": 2, "img_size": 98, "use_rot_pos_emb": False}),
    "no-abs-pos": (TINY, 2, {"num_classes": 10, "depth": 2, "img_size": 98, "use_abs_pos_emb": False}),
    "post-norm-gelu": (
        TINY,
        2,
        {"num_classes": 10, "depth": 2, "img_size": 98, "use_post_norm": True, "swiglu_mlp": False, "mlp_ratio": 4.0},
    ),
}


def compare_models(theirs, ours, batch, size, inputs):
    ours.load_state_dict(theirs.state_dict())
    ph, pw = ours.config.patch_hw
    grid = size[0] // ph, size[1] // pw
    batches = [images(batch, *size, seed=seed) for seed in range(inputs)]
    compare(theirs, ours, batches, lambda model: double_reference(model, grid))


@pytest.mark.parametrize("case", CASES)
def test_same_outputs_and_gradients(case):
    name, batch, kwargs = CASES[case]
    theirs, ours = timm_model(name, **kwargs), eva02.create_model(name, **kwargs)
    # One tensor of few elements alone needs several yardsticks; full-size models pool theirs over depth.
    compare_models(theirs, ours, batch, ours.img_size, inputs=2 if kwargs["num_classes"] == 1000 else 3)


@pytest.mark.parametrize("size", [(98, 182), (224, 224), (280, 196)])
def test_dynamic_image_size(size):
    kwargs = {"num_classes": 10, "depth": 2, "dynamic_img_size": True}
    compare_models(timm_model(TINY, **kwargs), eva02.create_model(TINY, **kwargs), 2, size, inputs=3)


@torch.no_grad()
def test_forward_features_and_pre_logits():
    kwargs = {"num_classes": 10, "depth": 2, "img_size": 98}
    theirs, ours = timm_model(BASE, **kwargs), eva02.create_model(BASE, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    x = images(1, 98, 98)
    tokens = ours.forward_features(x)
    torch.testing.assert_close(tokens, theirs.forward_features(x), rtol=1e-5, atol=1e-5)
    expected = theirs.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(ours.forward_head(tokens, pre_logits=True), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(tokens), ours(x), rtol=0, atol=0)


# ---- MIM ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [TINY, BASE])
def test_mim_outputs_and_gradients(name):
    kwargs = {"depth": 2, "img_size": (70, 98), "embed_dim": 256, "num_heads": 4}
    encoder = timm.create_model(name, num_classes=0, use_fc_norm=False, use_post_transformer_norm=True, **kwargs)
    theirs = TimmMim(encoder, 24)
    randomise(theirs)
    ours = eva02.create_model(name, head="mim", mim_dim=24, **kwargs)
    ours.load_state_dict({key.removeprefix("encoder."): value for key, value in theirs.state_dict().items()})
    mask = torch.rand(3, 35, generator=torch.Generator().manual_seed(3)) < 0.4
    compare(
        theirs,
        ours,
        [images(3, 70, 98, seed=seed) for seed in range(3)],
        lambda model: double_reference(model, (5, 7)),
        lambda model, x: model(x, mask),
        lambda key: key.replace("encoder.", ""),
    )


def test_mim_index_selects_and_pads():
    model = eva02.create_model(TINY, head="mim", mim_dim=8, depth=1, img_size=56)
    randomise(model)
    x = images(2, 56, 56)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3] = mask[0, 15] = mask[1, 0] = True
    expected = model(x, mask)
    assert expected.shape == (3, 8)
    for dtype in (torch.int32, torch.int64):
        padded = model(x, mask, torch.tensor([3, 15, 16, -1], dtype=dtype))
        torch.testing.assert_close(padded[:3], expected, rtol=0, atol=0)
        torch.testing.assert_close(padded[3], model.lm_head.bias)
    assert model(x, torch.zeros_like(mask)).shape == (0, 8)
    everything = model(x)
    assert everything.shape == (2, 16, 8)
    torch.testing.assert_close(model(x, None, torch.arange(32)), everything.flatten(0, 1))
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), everything)


# ---- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [TINY, BASE])
@pytest.mark.parametrize("how", ["set_grad_checkpointing", "set_recompute"])
def test_saving_memory_changes_nothing(name, how):
    model = eva02.create_model(name, depth=3, img_size=98, num_classes=10, drop_path_rate=0.5)
    randomise(model)
    x = images(4, 98, 98)
    torch.manual_seed(5)
    expected = run(model, x)
    getattr(model, how)()
    torch.manual_seed(5)
    actual = run(model, x)
    for key, value in expected.items():
        if how == "set_grad_checkpointing":
            assert torch.equal(actual[key], value), key
        else:
            torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-5 * value.abs().max().item())
    getattr(model, how)(False)


def test_recompute_saves_less():
    def saved(model):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            out = model(x)
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        del out
        return sum(kept.values())

    x = images(2, 98, 98)
    model = eva02.create_model(BASE, depth=2, img_size=98, num_classes=10)
    plain = saved(model)
    model.set_recompute()
    tokens = 2 * 50 * 2 * 4  # batch, tokens, blocks, bytes
    # Gate and value of both blocks are gone: 2G, with the statistics of the rows.
    assert plain - saved(model) >= 2 * 2048 * tokens


def test_patch_gradient_scale():
    model = eva02.create_model(TINY, depth=1, img_size=56, num_classes=10)
    randomise(model)
    x = images(2, 56, 56)
    full = run(model, x)
    model.config = model.config.replace(patch_grad_scale=0.1)
    scaled = run(model, x)
    assert torch.equal(scaled["output"], full["output"])
    for key in full:
        factor = 0.1 if "patch_embed" in key else 1.0
        torch.testing.assert_close(scaled[key], full[key] * factor, rtol=1e-5, atol=1e-6)
    model.config = model.config.replace(patch_grad_scale=0.0)
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()
    assert not model.patch_embed.proj.weight.grad.count_nonzero()


def test_no_weight_decay_and_groups():
    model = eva02.create_model(TINY, depth=2, device="meta", num_classes=10)
    theirs = timm.create_model(TINY, depth=2, num_classes=10)
    assert model.no_weight_decay() == theirs.no_weight_decay() - {"reg_token"}
    from timm.optim._param_groups import param_groups_layer_decay

    def scales(m):
        return sorted((g["lr_scale"], len(g["params"])) for g in param_groups_layer_decay(m, layer_decay=0.8))

    assert scales(model) == scales(theirs)


def test_reset_classifier():
    model = eva02.create_model(TINY, depth=1, img_size=56, num_classes=10)
    assert model.get_classifier().out_features == 10
    model.reset_classifier(5)
    assert model(images(1, 56, 56)).shape == (1, 5)
    model.reset_classifier(0, "token")
    out = model(images(1, 56, 56))
    assert out.shape == (1, 192)
    torch.testing.assert_close(out, model.forward_head(model.forward_features(images(1, 56, 56))))
    assert count(eva02.Eva02(model.config)) == count(model)


# ---- initialisation ----------------------------------------------------------------------------------------------
def test_beit_initialisation():
    torch.manual_seed(0)
    model = eva02.create_model(BASE, depth=3, num_classes=100)
    for i, block in enumerate(model.blocks):
        assert block.attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * (i + 1)), rel=0.02)
        assert not block.attn.q_proj.bias.count_nonzero()
        assert torch.equal(block.norm1.weight, torch.ones(768))
        assert not block.norm1.bias.count_nonzero()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.count_nonzero()


@pytest.mark.parametrize("name", [TINY, BASE])
def test_xavier_initialisation(name):
    torch.manual_seed(0)
    model = eva02.create_model(name, head="mim", depth=12 if name == TINY else 2)
    dim, hidden, subln = model.embed_dim, model.config.hidden_features, model.config.scale_mlp
    gain = math.sqrt(math.log(2 * len(model.blocks))) if subln else 1.0

    def xavier(inputs, outputs):
        return math.sqrt(2 / (inputs + outputs))

    for block in model.blocks:
        stds = {block.attn.proj.weight: gain * xavier(dim, dim), block.mlp.fc2.weight: gain * xavier(dim, hidden)}
        if subln:
            stds |= {
                block.attn.q_proj.weight: xavier(dim, dim),
                block.attn.k_proj.weight: xavier(dim, dim),
                block.attn.v_proj.weight: gain * xavier(dim, dim),
                block.mlp.fc1_g.weight: gain * xavier(dim, hidden),
                block.mlp.fc1_x.weight: gain * xavier(dim, hidden),
            }
        else:
            stds |= {block.attn.qkv.weight: xavier(dim, 3 * dim), block.mlp.fc1.weight: xavier(dim, 2 * hidden)}
        for weight, std in stds.items():
            assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert not block.mlp.fc2.bias.count_nonzero()
    assert model.lm_head.weight.std().item() == pytest.approx(xavier(dim, 1024), rel=0.03)
    for token in (model.cls_token, model.pos_embed, model.mask_token):
        assert token.abs().max().item() <= 0.02
    assert model.pos_embed.std().item() == pytest.approx(0.0108, rel=0.02)
    kernel = model.patch_embed.proj.weight
    assert kernel.abs().max().item() <= math.sqrt(6 / (dim + 3 * 14 * 14))
    assert model.patch_embed.proj.bias.count_nonzero()


def test_meta_to_empty_init_is_complete():
    model = eva02.create_model(BASE, depth=2, img_size=56, num_classes=10, device="meta", init_values=0.1)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(images(1, 56, 56)).isfinite().all()


# ---- composition -------------------------------------------------------------------------------------------------
def test_compiles_to_one_graph():
    model = eva02.create_model(BASE, depth=2, img_size=56, num_classes=10)
    randomise(model)
    x = images(2, 56, 56)
    expected = run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    model.zero_grad(set_to_none=True)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7)))
    torch.testing.assert_close(out.double(), expected["output"], rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected["grad " + name], rtol=1e-4, atol=1e-4)


def test_copies_agree():
    model = eva02.create_model(TINY, depth=1, img_size=56, num_classes=10)
    x = images(1, 56, 56)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_low_precision_and_autocast():
    model = eva02.create_model(BASE, depth=2, img_size=56, num_classes=10)
    x = images(2, 56, 56)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    assert model.blocks[0].attn.q_proj.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
