"""Mutation check of the CUDA kernels: break one line at a time; the contract suite on the simulator must notice.

python tests/cuda_mutants.py                     # everything: about half a minute a mutant
python tests/cuda_mutants.py --only 'swiglu_*' --json results.json

Each mutant is one replacement in a copy of csrc/. The operator's file is compiled from it for the simulator and linked
with the unmutated objects of build/cuda-simulator (`make cuda-simulator` makes those), and the operator's float32 and
bfloat16 samples run on that library until one fails: a wrong result, or a fault that the simulator finds. Mutants
marked equivalent change no result, for the reason given, and must survive.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda-simulator"
GPUSIM = ROOT / "eva02_kernels" / "testing" / "gpusim"


@dataclass(frozen=True)
class Mutant:
    """``old``, which ``file`` (below csrc/) holds once, replaced with ``new``; ``op`` must notice."""

    name: str
    file: str
    old: str
    new: str
    op: str
    source: str = ""  # the .cu that is compiled, where it is not ``file``
    equivalent: str = ""  # why no result changes
    test: str = ""  # of another file than the contract suite: what a rounding hides there


def row(name: str, op: str, old: str, new: str, equivalent: str = "", test: str = "") -> Mutant:
    return Mutant(name, f"{op}/{op}_cuda.cu", old, new, op, equivalent=equivalent, test=test)


def attention(name: str, file: str, old: str, new: str, source: str = "") -> Mutant:
    return Mutant(name, f"rope_attention/{file}", old, new, "rope_attention", f"rope_attention/{source or file}")


def shared(name: str, old: str, new: str, op: str, equivalent: str = "") -> Mutant:
    """Of what the row kernels share."""
    return Mutant(name, "common/rows.cuh", old, new, op, f"{op}/{op}_cuda.cu", equivalent)


def product(
    name: str, old: str, new: str, op: str = "linear", source: str = "gemm_cuda", equivalent: str = ""
) -> Mutant:
    """Of the tile loop of matrix products."""
    return Mutant(name, "gemm/product.cuh", old, new, op, f"gemm/{source}.cu", equivalent)


def epilogue(name: str, source: str, old: str, new: str, op: str, equivalent: str = "") -> Mutant:
    return Mutant(name, f"gemm/{source}.cu", old, new, op, equivalent=equivalent)


def in_mlp(name: str, old: str, new: str) -> Mutant:
    """Of subln_swiglu's backward kernel, as swiglu_mlp calls it."""
    return Mutant(name, "subln_swiglu/subln_swiglu_cuda.cu", old, new, "swiglu_mlp")


MUTANTS = (
    # ---- common/rows.cuh
    shared("packs_overlap", "* static_cast<int>(blockDim.x) + thread) * W",
           "* static_cast<int>(blockDim.x) + thread) * (W - (W > 1))", "swiglu"),
    shared("row_has_one_column_more", "return column_of<W>(i) < C;", "return column_of<W>(i) <= C;", "subln_swiglu"),
    # Rows that are wider than their columns are those of a hidden layer.
    Mutant("last_pack_reads_on", "common/rows.cuh", "if (c + W <= C) {\n      load_pack<W>(row + c, v + j * W);",
           "if (c < C) {\n      load_pack<W>(row + c, v + j * W);", "swiglu_mlp", "subln_swiglu/subln_swiglu_cuda.cu"),
    Mutant("last_pack_writes_on", "common/rows.cuh", "if (c + W <= C) {\n      store_pack<W>(row + c, v + j * W);",
           "if (c < C) {\n      store_pack<W>(row + c, v + j * W);", "swiglu_mlp", "subln_swiglu/subln_swiglu_cuda.cu",
           equivalent="what is behind a row's columns is padding, which is zeroed afterwards"),
    shared("sum_of_the_first_warp", "x[n] = warp_sum(lane < warps ? partial[n][lane] : 0.f);",
           "x[n] = warp_sum(lane < 1 ? partial[n][lane] : 0.f);", "add_layer_norm"),
    shared("sum_without_a_barrier", "partial[n][warp] = x[n];\n  }\n  __syncthreads();",
           "partial[n][warp] = x[n];\n  }", "add_layer_norm"),
    shared("sum_written_too_early", "  __syncthreads();  // the next sum may write again\n", "", "subln_swiglu"),
    shared("half_of_a_warp", "for (int lane = 16; lane > 0; lane /= 2)", "for (int lane = 8; lane > 0; lane /= 2)",
           "gather_layer_norm"),
    shared("variance_not_centred", "const float d = in_row<W>(i, C) ? v[i] - mean : 0.f;",
           "const float d = in_row<W>(i, C) ? v[i] : 0.f;", "add_layer_norm"),
    shared("variance_of_the_padding", "const float d = in_row<W>(i, C) ? v[i] - mean : 0.f;",
           "const float d = v[i] - mean;", "add_layer_norm"),
    shared("eps_outside_the_root", "sqrtf(block_sum(squares) / static_cast<float>(C) + eps)",
           "(sqrtf(block_sum(squares) / static_cast<float>(C)) + eps)", "subln_swiglu"),
    shared("gradient_without_the_mean", "mean = rms ? 0.f : sums[0]", "mean = rms ? 1.f : 0.f * sums[0]",
           "add_layer_norm"),
    shared("gradient_without_the_projection", "(d - mean - xhat * slope) * rstd", "(d - mean) * rstd",
           "gather_layer_norm"),
    shared("weight_gradient_without_xhat", "return dw + d[i] * xhat[i];", "return dw + d[i];", "subln_swiglu"),
    shared("bias_gradient_at_the_weights", "update_own(1, [&](int i, float db)", "update_own(0, [&](int i, float db)",
           "subln_swiglu"),
    shared("columns_kept_by_two_threads", "static_cast<int>(threadIdx.x)) * 4;",
           "static_cast<int>(threadIdx.x) / 2) * 4;", "gather_layer_norm"),
    shared("sums_start_from_anything", "[](int, float) { return 0.f; }", "[](int, float v) { return v; }",
           "subln_swiglu"),
    shared("one_kept_float_too_few", "const int bytes = own * threads", "const int bytes = (own - 1) * threads",
           "add_layer_norm"),
    shared("wide_rows_do_not_ask_for_memory", "if (bytes > kUnasked)", "if (bytes > kMost)", "subln_swiglu"),
    shared("run_without_its_last", "k < inverse.offsets[row + 1]; ++k)", "k < inverse.offsets[row + 1] - 1; ++k)",
           "gather_tokens"),
    shared("run_of_the_next_row", "for (int k = inverse.offsets[row];", "for (int k = inverse.offsets[row] + 1;",
           "gather_tokens"),
    shared("second_piece_forgotten", "first(static_cast<int>(blockIdx.y * blockDim.x) * kItems)",
           "first(static_cast<int>(0 * blockDim.x) * kItems)", "swiglu"),
    shared("rows_of_a_cta_in_one", "* blockDim.y + threadIdx.y)", "* blockDim.y)", "gather_tokens"),
    Mutant("column_sums_lose_a_warp", "common/rows.cu", "for (int w = 1; w < 8; ++w)", "for (int w = 2; w < 8; ++w)",
           "subln_swiglu", "common/rows.cu"),
    Mutant("column_sums_lose_the_last_part", "common/rows.cu", "end = min(parts, begin + per_warp)",
           "end = min(parts - 1, begin + per_warp)", "add_layer_norm", "common/rows.cu"),
    Mutant("column_sums_without_a_barrier", "common/rows.cu", "  __syncthreads();\n", "", "subln_swiglu",
           "common/rows.cu"),
    # ---- subln_swiglu, swiglu
    row("subln_without_bias", "subln_swiglu", "* s.rstd * w[i] + b[i]", "* s.rstd * w[i]"),
    row("subln_slope_forgotten", "subln_swiglu", "g[i] = dh * u[i] * a.slope;", "g[i] = dh * u[i] * a.value;"),
    row("subln_weight_kept_among_the_sums", "subln_swiglu", "keep_param<W>(sums, p.weight",
        "keep_param<W>(0, p.weight"),
    in_mlp("subln_bias_sums_at_the_weights", "partials + i * F", "partials + i / 2 * F"),
    in_mlp("subln_hidden_without_bias", "x[i] += b[i];", "x[i] += 0.f;"),
    in_mlp("subln_up_bias_sums_are_the_gates", "return sum + u[i];", "return sum + g[i];"),
    in_mlp("subln_padding_of_dgate_left", "* p.dgate_stride, cols, g);", "* p.dgate_stride, F, g);"),
    row("subln_statistics_by_all_threads_of_the_next_row", "subln_swiglu", "p.mean[row] = s.mean;",
        "p.mean[row ^ 1] = s.mean;"),
    Mutant("silu_slope_sign", "common/activations.cuh", "s + value * (1.f - s)", "s - value * (1.f - s)", "swiglu",
           "swiglu/swiglu_cuda.cu"),
    row("swiglu_gradients_swapped", "swiglu", "u[i] = d[i] * a.value;", "u[i] = d[i] * a.slope;"),
    # ---- add_layer_norm
    row("add_norm_without_row_scale", "add_layer_norm", "s[i] *= row_scale * scale[i];", "s[i] *= scale[i];"),
    row("add_norm_sum_not_rounded", "add_layer_norm", "s[i] = rounded<T>(s[i]);", "s[i] = s[i];",
        test="tests/test_cuda_host.py::test_the_sum_that_is_normalised_is_the_one_that_is_returned"),
    row("add_norm_row_scale_of_the_next_sample", "add_layer_norm",
        "p.row_scale[row / p.rows_per_sample];", "p.row_scale[0];"),
    row("add_norm_without_dsum", "add_layer_norm", "d[i] += x[i];", "d[i] += 0.f * x[i];"),
    row("add_norm_scale_gradient_unscaled", "add_layer_norm", "return sum + row_scale * d[i] * x[i];",
        "return sum + d[i] * x[i];"),
    # ---- indices
    row("gather_ignores_padding", "gather_tokens", "  if (row >= 0) {", "  {"),
    row("gather_from_the_wrong_sample", "gather_tokens", "row / p.seqlen * p.x_batch_stride", "0 * p.x_batch_stride"),
    row("gather_norm_padding_has_statistics", "gather_layer_norm", "Statistics stats{0.f, 0.f};",
        "Statistics stats{0.f, 1.f};", equivalent="backward reads no statistics of padding: nothing points to it"),
    row("gather_norm_statistics_of_the_row", "gather_layer_norm", "const float mean = p.mean[m], rstd = p.rstd[m];",
        "const float mean = p.mean[0], rstd = p.rstd[0];"),
    Mutant("index_of_the_first_sample", "common/token_index.h", "m / per_sequence * seqlen + entry", "entry",
           "gather_tokens", "gather_tokens/gather_tokens_cuda.cu"),
    # ---- mask_tokens, masked_cosine_loss
    row("mask_inverted", "mask_tokens", "else if (is_masked(p, b, patch))", "else if (!is_masked(p, b, patch))"),
    row("mask_gradient_passes", "mask_tokens", "        d[i] = 0.f;\n", ""),
    row("mask_position_of_the_patch", "mask_tokens", "part_of(p.pos_embed, n * p.C",
        "part_of(p.pos_embed, patch * p.C"),
    row("mask_token_sums_everything", "mask_tokens", "      if (masked) {", "      if (true) {"),
    row("cosine_mean_over_all_rows", "masked_cosine_loss", "count += index[m] >= 0;", "count += 1;"),
    row("cosine_tree_without_a_barrier", "masked_cosine_loss", "half > 0; half /= 2) {\n    __syncthreads();",
        "half > 0; half /= 2) {"),
    row("cosine_gradient_without_the_projection", "masked_cosine_loss", "? -scale * cosine * inv_self * inv_self : 0.f",
        "? 0.f : 0.f"),
    row("cosine_clamp_has_a_slope", "masked_cosine_loss", "inv_self < kClamped ? -scale", "true ? -scale"),
    # ---- apply_rope
    row("rope_sine_sign", "apply_rope", "first_member = a * cos[i] - c * s;", "first_member = a * cos[i] + c * s;"),
    row("rope_inverse_is_forward", "apply_rope", "s = p.inverse ? -sin[i] : sin[i];", "s = sin[i];"),
    row("rope_angles_of_the_first_run", "apply_rope", "runs[1][pair - quarter]", "runs[0][pair - quarter]"),
    row("rope_table_gradient_of_one_head", "apply_rope", "(per_head ? table + 1 : p.H); ++h)",
        "(per_head ? table + 1 : int64_t{1}); ++h)"),
    # ---- matrix products
    product("product_skips_the_last_step", "steps = ceil_div(K, A::kStep)", "steps = K / A::kStep"),
    product("product_without_a_barrier", "copy_async_wait<kStages - 2>();\n    __syncthreads();",
            "copy_async_wait<kStages - 2>();"),
    product("product_waits_too_little", "copy_async_wait<kStages - 2>();", "copy_async_wait<kStages - 1>();"),
    product("product_fills_the_stage_in_use", "load(step + kStages - 1);", "load(step + kStages);"),
    product("product_reads_k_beyond", "min(left, kElements)", "kElements"),
    product("product_reads_rows_beyond", "(count > 0 ? kPiece : 0)", "kPiece"),
    product("product_reads_k_rows_beyond", "bytes = j * kCopyRows < left ? bytes : 0;", "bytes = bytes;"),
    product("product_ignores_alignment", "stride % 16 == 0;", "true;"),
    product("product_swizzles_reads_alone", "to = offset(row, piece);", "to = row * kRowBytes + piece * kPiece;"),
    product("product_second_mma_step_is_the_first", "(fragment ^ step * 32)", "(fragment ^ 0 * 32)"),
    product("product_up_takes_gate_weight", "(kTwo && j % 2 ? other_bytes : 0)", "0", "swiglu_mlp", "activate"),
    product("product_exchanges_once", "bit <= 2; bit *= 2", "bit <= 1; bit *= 2"),
    Mutant("product_float32_in_two_parts", "common/mma.cuh", "  mma_tf32(d, a2, b0);\n", "", "linear",
           "gemm/gemm_cuda.cu", test="tests/test_cuda_products.py::test_no_bit_of_float32_operands_is_lost"),
    product("product_last_group_of_rows_too_high", "min(kGroupRows, tiles_m - group * kGroupRows)", "kGroupRows"),
    product("product_stores_beyond", "if (row >= rows || column >= N) continue;", "if (column >= N) continue;"),
    product("column_sums_of_four_lanes", "lanes < 32; lanes *= 2", "lanes < 16; lanes *= 2", "gelu_mlp",
            "hidden_gradient"),
    product("column_sums_of_one_warp", "Tile::kWarpsM + warp % Tile::kWarpsM) * 2 * N", "Tile::kWarpsM) * 2 * N",
            "swiglu_mlp", "hidden_gradient"),
    product("row_sums_of_half_the_rows", "row_sums[m][2 * half]", "row_sums[m][0]", "linear", "weight_gradient"),
    epilogue("weight_gradient_runs_into_the_next", "weight_gradient",
             "if (part.weight == nullptr || at < 0 || at >= part.rows) continue;",
             "if (part.weight == nullptr || at < 0) continue;", "qkv_rope"),
    epilogue("weight_gradient_bias_at_the_products_row", "weight_gradient", "store_param(part.bias, at, sum)",
             "store_param(part.bias, row, sum)", "qkv_rope"),
    epilogue("project_parts_k_over_q", "project_parts", "if (part > 0) first += p.widths[0];", "", "qkv_rope"),
    product("project_parts_tiles_run_on", "(within / height - part.first_tile) * kTileN", "within / height * kTileN",
            "qkv_rope", "project_parts"),
    epilogue("activate_without_the_norms_weight", "activate", "up[i] *= norm_weight[i];", "up[i] *= 1.f;",
             "swiglu_mlp"),
    epilogue("activate_squares_of_padding", "activate", "squares += i < n ?", "squares += i < kColumns ?",
             "swiglu_mlp"),
    epilogue("fold_norm_squares_of_pieces_alone", "fold_norm", "of.y + columns(i) * (of.x - mean) * (of.x - mean)",
             "of.y", "swiglu_mlp"),
    epilogue("fold_norm_every_piece_is_full", "fold_norm", "min(kNormPiece, F - i * kNormPiece)", "kNormPiece",
             "swiglu_mlp"),
    epilogue("fold_norm_without_the_norms_bias", "fold_norm", "shift += w[i] * norm_bias[i];", "", "swiglu_mlp"),
    epilogue("fold_norm_sums_meet", "fold_norm", "  __syncthreads();  // the next sum may write again\n", "",
             "swiglu_mlp"),
    epilogue("project_normed_without_the_mean", "gemm_cuda", "y[i] - mean * weight_sums[i]", "y[i]", "swiglu_mlp"),
    epilogue("project_without_bias", "gemm_cuda", "(y[i] + bias[i])", "y[i]", "linear"),
    epilogue("project_row_scale_of_sample_0", "gemm_cuda", "p.row_scale[row / p.rows_per_sample]", "p.row_scale[0]",
             "linear"),
    epilogue("project_without_residual", "gemm_cuda", "y[i] += residual[i];", "y[i] += 0.f;", "linear"),
    epilogue("activate_up_bias_is_the_gates", "activate", "up[i] += up_bias[i];", "up[i] += gate_bias[i];",
             "swiglu_mlp"),
    epilogue("activate_gate_without_silu", "activate", "silu<T>(gate[i]).value", "gate[i]", "swiglu_mlp"),
    epilogue("hidden_gradient_without_slope", "hidden_gradient", "y[i] *= up[i] * a.slope;", "y[i] *= up[i];",
             "swiglu_mlp"),
    epilogue("hidden_gradient_gelu_value", "hidden_gradient", "y[i] *= a.slope;\n        y2",
             "y[i] *= a.value;\n        y2", "gelu_mlp"),
    epilogue("hidden_gradient_gelu_without_bias", "hidden_gradient", "gelu(gate[i] + bias[i])", "gelu(gate[i])",
             "gelu_mlp"),
    epilogue("hidden_gradient_not_centred", "hidden_gradient", "a.value - centre[i]", "a.value", "gelu_mlp"),
    epilogue("weight_gradient_without_what_was_centred", "output_gradient", "g += sum * p.centre[k];", "", "gelu_mlp"),
    epilogue("project_rope_rotates_v", "project_rope", "c < p.rotated && ", "", "qkv_rope"),
    epilogue("project_rope_one_head_in_eight_columns", "project_rope", " || head_dim % kColumns != 0", "",
             "qkv_rope"),
    epilogue("project_rope_keys_beyond_a_head_table", "project_rope", "head < heads ? head : head - heads", "head",
             "qkv_rope"),
    epilogue("scaled_gradient_without_layer_scale", "output_gradient", "x[i] *= scale[i];", "x[i] *= 1.f;", "linear"),
    epilogue("bias_sums_of_the_last_row", "output_gradient", "sums[i] += x[i] *= row_scale;",
             "sums[i] = x[i] *= row_scale;", "linear"),
    epilogue("layer_scale_gradient_without_bias", "output_gradient", "dscale += sum * value(p.bias, 0.f);", "",
             "linear"),
    # ---- rope_attention
    attention("softmax_keeps_the_old_sum", "rope_attention_cuda.cu", "total[r] = fmaf(total[r], fade[r], sum);",
              "total[r] = total[r] + sum;"),
    attention("out_not_faded", "rope_attention_cuda.cu", "acc[n][r] *= fade[r / 2];", "acc[n][r] *= 1.f;"),
    attention("lse_without_the_scale", "rope_attention_cuda.cu", "softmax.largest[r] * p.scale + logf(safe)",
              "softmax.largest[r] + logf(safe)"),
    attention("largest_of_half_a_row", "rope_attention_cuda.cu",
              "      now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));\n", ""),
    attention("keys_of_the_wrong_head", "rope_attention_cuda.cu",
              "const int kv_head = place.head / static_cast<int>(p.H / p.Hkv);", "const int kv_head = 0;"),
    attention("unrotated_keys", "rope_attention_cuda.cu",
              "rotate_tile<T, kDim>(stages + stage * 2 * S::kTile, keys_of(i), k_lines[stage], k_rotation, D);", ""),
    attention("lines_of_the_same_tile", "rope_attention_cuda.cu", "k_lines[1 - stage], S::kKeys, (i + 1) * S::kKeys",
              "k_lines[1 - stage], S::kKeys, i * S::kKeys"),
    attention("rotation_sign", "rope_attention_tiles.cuh", "fmaf(a, c[i], bs) : fmaf(a, c[i], -bs)",
              "fmaf(a, c[i], bs) : fmaf(a, c[i], bs)", "rope_attention_cuda.cu"),
    attention("delta_of_half_a_row", "rope_attention_bwd.cu",
              "return sum + __shfl_xor_sync(0xffffffffu, sum, 16);", "return sum;"),
    attention("query_without_keys_has_gradients", "rope_attention_bwd.cu",
              "lse == -kInfinity ? kInfinity : lse * kLog2e", "lse * kLog2e"),
    attention("gradients_lack_the_scale", "rope_attention_bwd.cu", "acc[n][r] *= p.scale;", "acc[n][r] *= 1.f;"),
    attention("dq_without_delta", "rope_attention_bwd.cu", "* (dp[n][r] - delta[r / 2]);", "* dp[n][r];"),
)  # fmt: skip


def mutated(mutant: Mutant) -> str:
    """The file's text with its change; LookupError, with the mutant's name, where that cannot be made."""
    text = (ROOT / "csrc" / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise LookupError(f"mutant {mutant.name}: {mutant.file} has {mutant.old!r} {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


def build(mutant: Mutant, folder: Path) -> Path:
    """The simulator's library with the mutant in it."""
    sys.path.insert(0, str(ROOT))
    from eva02_kernels.testing.gpusim import nvcc

    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "csrc" / mutant.file).write_text(mutated(mutant))
    source = mutant.source or mutant.file
    changed = folder / "changed.o"
    command = ["nvcc", "-std=c++20", "-O3", "-DEVA02_CUDA", f"-I{folder / 'csrc'}", *nvcc.COMPILE, "-lineinfo",
               "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", folder / "csrc" / source, "-o", changed]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    objects = [p for p in (BUILD / "cuda").glob("*.o") if p.stem != Path(source).stem]
    objects += (BUILD / "CMakeFiles" / "eva02_kernels_cuda.dir" / "csrc").rglob("*.o")
    library = folder / "libeva02_kernels_cuda.so"
    command = ["g++", "-shared", "-o", library, changed, *objects, nvcc.SEAM, nvcc.STAND_IN, "-Wl,--exclude-libs,ALL",
               "-lpthread", *_torch_library()]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    return library


def _torch_library() -> list[str]:
    import torch

    return [str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")]


def run(mutant: Mutant) -> dict[str, Any]:
    """What noticed the mutant first, or None."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eva02_cuda_mutant_") as name:
        library = build(mutant, Path(name))
        environment = {**os.environ, "EVA02_CUDA_SIMULATED": str(library), "OMP_NUM_THREADS": "1"}
        selection = f"is_accurate and {mutant.op}- and (float32 or bfloat16)"
        tests = [mutant.test] if mutant.test else ["tests/test_contract.py", "-k", selection]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--backend", "cuda", "-m", "not full",
                   *tests]  # fmt: skip
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    noticed = re.search(r"^(?:FAILED|ERROR) \S+::(?:\S+\[)?([^\]\s]+)\]?(?: - (.*))?", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1) or (result.returncode == 1) != (noticed is not None):
        raise SystemExit(f"{mutant.name}: pytest did not run\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
    status = "SURVIVED" if noticed is None else "killed"
    if mutant.equivalent:
        status = "equivalent" if noticed is None else "KILLED, but said to be equivalent"
    how = "" if noticed is None else f"{noticed[1]}: {(noticed[2] or '').split(':')[0]}"
    return {"name": mutant.name, "file": mutant.file, "op": mutant.op, "status": status, "noticed": how,
            "seconds": round(time.monotonic() - begin, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutants and their changes, run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants of these names (* and ? stand for any text)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time (default: 1)")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.only or any(fnmatch.fnmatch(m.name, p) for p in args.only)]
    if not mutants:
        parser.error("no mutant has such a name; --list shows them")
    if args.list:
        for m in mutants:
            print(f"{m.name}: {m.file}\n  - {m.old!r}\n  + {m.new!r}\n  {m.equivalent or m.op}")
        return
    if not BUILD.exists():
        parser.error(f"there is no {BUILD.relative_to(ROOT)}: run `make cuda-simulator`")
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for last in pool.map(run, mutants):
            results.append(last)
            print(f"{last['name']:<50} {last['seconds']:6.1f} s  {last['status']}  {last['noticed']}", flush=True)
    counts = {s: sum(r["status"] == s for r in results) for s in ("killed", "equivalent")}
    print(f"{len(results)} mutants: {counts['killed']} killed, {counts['equivalent']} equivalent")
    if args.json:
        args.json.write_text(json.dumps({"schema": 1, "mutants": results}, indent=1) + "\n")
    raise SystemExit(any(r["status"] not in counts for r in results))


if __name__ == "__main__":
    main()
