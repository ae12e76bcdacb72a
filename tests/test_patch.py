"""What a patched model must survive, and what a fused module does at a call that it cannot fuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import patch_registry as registry
import pytest
import timm
import torch
from torch import Tensor, nn

import eva02_kernels
from eva02_kernels.patching import PatchReport, Rule, VerificationError, patch, unpatch
from eva02_kernels.patching import timm_eva as fused_eva
from eva02_kernels.patching import timm_vit as fused_vit
from eva02_kernels.testing import assert_accurate, measure_error

EVA = "eva02_base_patch16_clip_224"  # separate q, k, v, norm inside attention and MLP, rotary embedding
VIT = "vit_small_patch14_dinov2"  # layer scale


def eva(**kwargs: Any) -> nn.Module:
    return registry.build_timm(EVA, **kwargs)


def vit(**kwargs: Any) -> nn.Module:
    return registry.build_timm(VIT, **kwargs)


def both(build: Callable[..., nn.Module] = eva, **kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """(original, patched copy, images)."""
    original = build(**kwargs)
    patched = copy.deepcopy(original)
    patch(patched)
    return original, patched, registry.image(original)


@contextmanager
def calls() -> Iterator[Callable[[str], int]]:
    """Inside, the given function counts the forward calls of an operator."""
    before = eva02_kernels.stats()

    def count(op: str) -> int:
        now = eva02_kernels.stats()
        return sum(n - before.get(key, 0) for key, n in now.items() if key[0] == op and key[1] == "fwd")

    yield count


def close(out: Tensor, expected: Tensor) -> None:
    """Equal up to float32 rounding of a two-block model."""
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_replace_says_so() -> None:
    report = patch(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert not report
    assert "nothing was replaced" in str(report)
    assert "rules=" in str(report)


def test_report_tells_classes_operators_and_reasons() -> None:
    model = registry.build_timm("vit_base_patch16_clip_quickgelu_224")
    report = patch(model)
    text = str(report)
    assert "2 x Block -> FusedBlock: qkv_rope, rope_attention, linear" in text
    assert "act is QuickGELU, not exact GELU" in text
    assert "[blocks.0.mlp, blocks.1.mlp]" in text
    assert report.counts()["Block -> FusedBlock"] == 2
    working = {r.name for r in report.replaced if r.within is None}
    kept = {k.name for k in report.kept}
    assert "blocks.0.norm2" in kept, "the MLP half runs as written, so its norm does the work"
    assert "blocks.0.norm1" not in working | kept


def test_class_is_a_subclass_and_nothing_else_changes() -> None:
    original, patched, _ = both()
    assert type(patched.blocks[0]) is fused_eva.FusedEvaBlock
    assert isinstance(patched.blocks[0], timm.models.eva.EvaBlock)
    assert [n for n, _ in patched.named_modules()] == [n for n, _ in original.named_modules()]
    a, b = original.state_dict(), patched.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_patch_keeps_parameters_and_optimizer() -> None:
    model = eva()
    before = list(model.parameters())
    patch(model)
    assert all(p is q for p, q in zip(before, model.parameters(), strict=True))


def test_unpatch_restores_the_very_model() -> None:
    original, patched, x = both()
    assert unpatch(patched) > 0
    assert [type(m) for m in patched.modules()] == [type(m) for m in original.modules()]
    assert [sorted(vars(m)) for m in patched.modules()] == [sorted(vars(m)) for m in original.modules()]
    assert torch.equal(patched.eval()(x), original.eval()(x))
    assert unpatch(patched) == 0


def test_patching_twice_is_patching_once() -> None:
    _, patched, x = both()
    classes = [type(m) for m in patched.modules()]
    out = patched.eval()(x)
    report = patch(patched)
    assert [type(m) for m in patched.modules()] == classes
    assert report
    assert all(r.already for r in report.replaced)
    assert "already replaced" in str(report)
    assert torch.equal(patched(x), out)
    unpatch(patched)
    assert not any("Fused" in type(m).__name__ for m in patched.modules())


def test_deepcopy_and_pickle() -> None:
    _, patched, x = both()
    expected = patched.eval()(x)
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert [type(m) for m in other.modules()] == [type(m) for m in patched.modules()]
        assert torch.equal(other(x), expected)
        assert unpatch(other) > 0
    buffer = io.BytesIO()
    torch.save(patched, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_checkpoints_cross() -> None:
    original, patched, x = both()
    registry.randomize(original, seed=9)
    patched.load_state_dict(original.state_dict())
    close(patched.eval()(x), original.eval()(x))


def test_to_meta_and_back() -> None:
    original, patched, x = both(vit)
    state = original.state_dict()
    patched = patched.to("meta").to_empty(device="cpu")
    patched.load_state_dict(state)
    close(patched.eval()(x), original.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [eva, vit])
def test_low_precision(build: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    original, patched, x = both(build)
    original, patched, x = original.to(dtype).eval(), patched.to(dtype).eval(), x.to(dtype)
    exact = copy.deepcopy(original).double()(x.double())
    with torch.no_grad():
        out = patched(x)
        assert out.dtype == dtype
        assert_accurate(out, exact, [measure_error(original(x), exact)])
    patched(x).float().square().sum().backward()
    assert all(p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all()) for p in patched.parameters())


@pytest.mark.parametrize("build", [eva, vit])
def test_autocast_keeps_the_residual_stream(build: Callable[..., nn.Module]) -> None:
    original, patched, x = both(build)
    seen: dict[str, torch.dtype] = {}
    for name, model in (("original", original), ("patched", patched)):
        model.eval().blocks[1].register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out.dtype))
    exact = copy.deepcopy(original).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, plain = patched(x), original(x)
    assert seen["patched"] == seen["original"]
    assert out.dtype == plain.dtype
    assert_accurate(out, exact, [measure_error(plain, exact)], dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [EVA, VIT, "vit_small_patch16_rope_mixed_224", "transformers Dinov2Model"])
def test_compile_fullgraph(name: str) -> None:
    model, x = registry.build(name)
    patch(model)

    def loss(m: nn.Module) -> tuple[Tensor, list[Tensor]]:
        out = m(x)
        out = out if isinstance(out, Tensor) else out[0]
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
        return out, [g for g in grads if g is not None]

    torch._dynamo.reset()
    out, grads = loss(model.eval())
    compiled, compiled_grads = loss(torch.compile(model, fullgraph=True, backend="aot_eager"))
    close(compiled, out)
    for a, b in zip(compiled_grads, grads, strict=True):
        close(a, b)


def test_export() -> None:
    _, patched, x = both()
    program = torch.export.export(patched.eval(), (x,))
    close(program.module()(x), patched(x))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    _, patched, x = both(vit)
    alone = copy.deepcopy(patched)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(patched)
        parallel(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    alone(x).square().sum().backward()
    for p, q in zip(patched.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(("build", "reentrant"), [(eva, False), (vit, False), (vit, True)])
def test_gradient_checkpointing(build: Callable[..., nn.Module], reentrant: bool) -> None:
    original, patched, x = both(build)  # timm's Eva passes keyword arguments, which reentrant checkpointing refuses
    patched.set_grad_checkpointing()
    grads = []
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        for model in (original, patched):
            leaf = x.clone().requires_grad_()
            model(leaf).square().sum().backward()
            grads.append(leaf.grad)
    finally:
        timm.layers.set_reentrant_ckpt(False)
    close(grads[1], grads[0])


# ---- calls that need the original code ------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [eva, vit])
@pytest.mark.parametrize(
    ("dropout", "kept"),
    [("attn_drop_rate", "rope_attention"), ("proj_drop_rate", "linear"), ("proj_drop_rate", "mlp")],
)
def test_active_dropout_runs_the_original_code(build: Callable[..., nn.Module], dropout: str, kept: str) -> None:
    original, patched, x = both(build, **{dropout: 0.5})
    for model in (original, patched):
        model.train()
    torch.manual_seed(0)
    expected = original(x)
    torch.manual_seed(0)
    with calls() as count:
        out = patched(x)
    close(out, expected)
    ops = {"mlp": ("swiglu_mlp", "gelu_mlp"), "rope_attention": ("rope_attention", "rope_attention_packed")}
    assert sum(count(op) for op in ops.get(kept, (kept,))) == 0
    if dropout == "attn_drop_rate":
        assert count("swiglu_mlp") + count("gelu_mlp") == 2, "the MLP half is fused all the same"
    with calls() as count:
        close(patched.eval()(x), original.eval()(x))
    assert count("qkv_rope") == 2, "and in eval mode everything is"


@pytest.mark.parametrize("build", [eva, vit])
def test_drop_path_drops_the_same_samples(build: Callable[..., nn.Module]) -> None:
    original, patched, _ = both(build, drop_path_rate=0.5)
    x = registry.image(original, batch=8)
    results = []
    for model in (original, patched):
        model.train()
        torch.manual_seed(3)
        with calls() as count:
            results.append(model(x))
    assert count("qkv_rope") == 2
    close(results[1], results[0])
    eval_out = original.eval()(x)
    assert not torch.allclose(results[0], eval_out)


def test_hooks_on_skipped_children_fire() -> None:
    original, patched, x = both(vit)
    features: dict[str, Tensor] = {}
    for key, model in (("original", original), ("patched", patched)):
        model.eval()
        attn, fc1 = model.blocks[0].attn, model.blocks[1].mlp.fc1
        attn.register_forward_hook(lambda m, a, out, key=key: features.__setitem__(f"{key} attn", out))
        fc1.register_forward_hook(lambda m, a, out, key=key: features.__setitem__(f"{key} fc1", out))
        model(x)
    close(features["patched attn"], features["original attn"])
    close(features["patched fc1"], features["original fc1"])


def test_a_child_exchanged_later_is_run() -> None:
    class LowRank(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.delta = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.delta(x)

    original, patched, x = both(vit)
    adapter = LowRank(original.blocks[0].attn.qkv)
    for model in (original, patched):
        model.eval().blocks[0].attn.qkv = adapter
        model.blocks[1].mlp.act = nn.ReLU()
    close(patched(x), original(x))


def test_parametrized_weight_is_run() -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 0.5 * w

    original, patched, x = both(vit)
    for model in (original, patched):
        nn.utils.parametrize.register_parametrization(model.eval().blocks[0].mlp.fc1, "weight", Half())
    close(patched(x), original(x))


@pytest.mark.parametrize("build", [eva, vit])
def test_masks(build: Callable[..., nn.Module]) -> None:
    original, patched, x = both(build)
    tokens = original.eval().patch_embed.num_patches + original.num_prefix_tokens
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(2, 1, 1, tokens, generator=generator) > 0.3
    keys[..., 0] = True
    pairs = torch.rand(tokens, tokens, generator=generator) > 0.3
    pairs.fill_diagonal_(True)
    patched.eval()
    for mask, fused in ((keys, 2), (pairs, 0), (torch.randn(tokens, tokens, generator=generator), 0)):
        with calls() as count:
            out = patched(x, attn_mask=mask)
        close(out, original(x, attn_mask=mask))
        assert count("rope_attention_packed") == fused
    with calls() as count:
        close(patched(x, is_causal=True), original(x, is_causal=True))
    assert count("rope_attention_packed") == 2


@pytest.mark.parametrize("name", ["eva02_small_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_patch_dropout_with_rope(name: str) -> None:
    original, patched, x = both(lambda **kw: registry.build_timm(name, **kw), patch_drop_rate=0.4)
    grads = []
    for model in (original, patched):
        model.train()
        torch.manual_seed(0)
        with calls() as count:
            model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert count("qkv_rope") == 2
    assert grads[0].keys() == grads[1].keys()
    for key, g in grads[0].items():
        error = measure_error(grads[1][key], g.double())
        assert error.max < 1e-3, key


def test_table_cache_follows_the_table() -> None:
    original, patched, x = both()
    for model in (original, patched):
        model.eval()
    with torch.no_grad():
        close(patched(x), original(x))
        for model in (original, patched):
            model.rope.pos_embed.mul_(0.5)
        close(patched(x), original(x))
        for model in (original, patched):
            model.set_input_size((2 * 16, 5 * 16))
        x = registry.image((2 * 16, 5 * 16))
        close(patched(x), original(x))
    with torch.inference_mode():
        patched(x)
    patched(x).sum().backward()


def test_qk_norm_that_is_not_rms() -> None:
    original, patched, x = both(vit, qk_norm=True)
    assert isinstance(original.blocks[0].attn.q_norm, nn.LayerNorm)
    with calls() as count:
        close(patched.eval()(x), original.eval()(x))
    assert count("qkv_rope") == 2


def test_gated_attention() -> None:
    block = timm.models.eva.EvaBlock(64, 2, gated_attn=True, scale_attn_inner=True, qkv_fused=False)
    registry.randomize(block)
    x = torch.randn(2, 13, 64)
    expected = block(x)
    report = patch(nn.ModuleList([block]))
    assert report.counts() == {"EvaBlock -> FusedEvaBlock": 1}
    close(block(x), expected)


def test_transformers_recorded_outputs() -> None:
    model, x = registry.build("transformers DINOv3ViTModel")
    model.eval()
    model.set_attn_implementation("eager")
    expected = model(x, output_attentions=True, output_hidden_states=True)
    patch(model)
    found = model(x, output_attentions=True, output_hidden_states=True)
    for kind in ("attentions", "hidden_states"):
        assert len(found[kind]) == len(expected[kind]) > 0
        for a, b in zip(found[kind], expected[kind], strict=True):
            close(a, b)
    with calls() as count:
        close(model(x)[0], expected[0])
    assert count("qkv_rope") == 2, "the recording hooks stay on the modules, but nothing is recorded now"


def test_transformers_gradient_checkpointing() -> None:
    model, x = registry.build("transformers Dinov2Model")
    expected = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()), allow_unused=True)
    patch(model)
    model.gradient_checkpointing_enable()
    model.train()
    found = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            assert measure_error(a, b.double(), floor=1e-2).max < 1e-3


# ---- rules ----------------------------------------------------------------------------------------------------------
class GatedBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), timm.layers.SwiGLU(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class FusedGatedBlock(GatedBlock):
    def forward(self, x: Tensor) -> Tensor:
        m, n = self.mlp, self.norm
        if self.training and m.drop1.p > 0:
            return GatedBlock.forward(self, x)
        return eva02_kernels.swiglu_mlp(
            x,
            m.fc1_g.weight,
            m.fc1_g.bias,
            m.fc1_x.weight,
            m.fc1_x.bias,
            m.fc2.weight,
            m.fc2.bias,
            pre_norm=(n.weight, n.bias, n.eps),
            residual=x,
        )


class WrongGatedBlock(GatedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1.001 * self.mlp(self.norm(x))


def test_user_rule() -> None:
    model = registry.randomize(nn.Sequential(GatedBlock(32), GatedBlock(32)))
    x = torch.randn(2, 5, 32)
    expected = model(x)
    report = patch(model, rules=[Rule(GatedBlock, FusedGatedBlock, ops=("swiglu_mlp",))], verify=x)
    assert report.counts() == {"GatedBlock -> FusedGatedBlock": 2}
    assert "verified" in str(report)
    close(model(x), expected)
    assert pickle.loads(pickle.dumps(model))(x).shape == x.shape
    unpatch(model)
    assert type(model[0]) is GatedBlock
    assert type(model[0].mlp) is timm.layers.SwiGLU


def test_user_rule_wins_and_may_refuse() -> None:
    model = vit()
    rule = Rule(timm.models.vision_transformer.Block, fused_vit.FusedBlock, lambda m: ["not this one"])
    report = patch(model, rules=[rule])
    assert report.kept_counts()["Block: not this one"] == 2
    assert report.counts()["Attention -> FusedAttention"] == 2, "what is inside it is still replaced"


def test_verify_refuses_a_wrong_rule() -> None:
    model = registry.randomize(nn.Sequential(GatedBlock(32), GatedBlock(32)))
    x = torch.randn(2, 5, 32)
    expected = model(x)
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(VerificationError, match=r"output 0: error against float64 .*(.|\n)*WrongGatedBlock"):
        patch(model, rules=[Rule(GatedBlock, WrongGatedBlock)], verify=x)
    assert [type(m) for m in model] == [GatedBlock, GatedBlock]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model(x), expected)


def test_verify_restores_after_any_error() -> None:
    class Local(GatedBlock):
        pass

    with pytest.raises(TypeError, match="inside a function"):
        Rule(GatedBlock, Local)
    with pytest.raises(TypeError, match="must be a subclass"):
        Rule(GatedBlock, nn.Linear)
    model = vit()
    with pytest.raises(AssertionError, match="Input height"):  # timm refuses the batch
        patch(model, verify=torch.randn(2, 3, 7, 7))
    assert type(model.blocks[0]) is timm.models.vision_transformer.Block
    with pytest.raises(ValueError, match="give verify=batch"):
        patch(nn.Sequential(timm.layers.Mlp(8)), verify=True)


@pytest.mark.parametrize("name", [EVA, VIT, "transformers Dinov2Model", *list(registry.OTHERS)[-1:]])
def test_verify_finds_the_input(name: str) -> None:
    model, x = registry.build(name)
    report = patch(model, verify=True)
    assert report.verified is not None
    assert str(tuple(x.shape)) in report.verified


def test_open_clip_model_with_a_timm_trunk() -> None:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    model = CustomTextCLIP(
        16,
        CLIPVisionCfg(timm_model_name="eva02_tiny_patch14_224", timm_pool="token", timm_proj="linear", image_size=224),
        CLIPTextCfg(context_length=8, vocab_size=200, width=32, heads=2, layers=1),
    )
    model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    registry.randomize(model)
    report = patch(model, verify=True)
    assert report.counts()["EvaBlock -> FusedEvaBlock"] == 2
    assert "(2, 3, 224, 224) and texts (2, 8)" in str(report)


def test_another_version_of_a_class_is_refused() -> None:
    class Newer(timm.layers.Mlp):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(x)

    model = vit()
    model.blocks[0].mlp.__class__ = Newer
    report = patch(model)
    reasons = {k.name: k.reasons for k in report.kept}
    assert "subclass of Mlp" in reasons["blocks.0.mlp"][0]
    assert isinstance(report, PatchReport)
    assert "attention" in str(report)


def test_forward_exchanged_on_the_instance_is_refused() -> None:
    model = vit()
    model.blocks[0].forward = lambda x, **kwargs: x
    report = patch(model)
    assert "exchanged on this instance" in str(report)
    assert type(model.blocks[0]) is timm.models.vision_transformer.Block
