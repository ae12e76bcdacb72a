"""Mutation check of the Triton kernels: break one line at a time; the contract suite must notice.

python tests/mutants.py                      # everything: some minutes on one core
python tests/mutants.py --only 'causal_*'    # some of them by name
python tests/mutants.py --ops linear --json results.json

Each mutant is one replacement in a copy of the package's operators. Every operator that the mutant names runs its
float32 samples, and its smoke samples in bfloat16, on that copy in Triton's interpreter, as ``test_is_accurate`` does,
until one fails: a wrong result, a load or store outside the kernel's tensors, an exception, a crash or the time limit.
Where every named operator noticed, the mutant is killed. Mutants marked equivalent change no result, for the reason
given, and must survive.

An operator has one process with the unmutated package, which computes the references once; each mutant is a fork of it
that imports its kernels from the copy.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "eva02_kernels"
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"  # the last complete run: what noticed then is run first
TIME_LIMIT = 120.0  # seconds for an operator, or three times what its samples take unmutated
# What a mutant's text may raise when it is no valid change: that would prove nothing.
BROKEN = ("NameError", "SyntaxError", "IndentationError", "ImportError", "AttributeError", "UnboundLocalError")


@dataclass(frozen=True)
class Mutant:
    """``old``, which function ``inside`` of ``file`` (below eva02_kernels/ops) holds once, replaced with ``new``."""

    name: str
    file: str
    inside: str
    old: str
    new: str
    ops: str  # operators, each of whose suites must notice, separated by spaces
    large: str = ""  # samples of tests/samples.py LARGE that are run too; others of them are skipped
    route: str = ""  # "mm": with products by torch.mm (_launch.force_fused)
    equivalent: str = ""  # why no result changes


M = Mutant
LIB, ROPE, GEMM, INDEX = "_triton_lib.py", "_triton_rope.py", "_triton_gemm.py", "_token_index.py"
SWIGLU, SUBLN, ADD, GATHER, GATHER_NORM, MASK, COSINE, CLIP, APPLY, QKV, ATTENTION, SWIGLU_MLP = (
    f"{op}/triton_kernels.py" for op in ("swiglu", "subln_swiglu", "add_layer_norm", "gather_tokens",
    "gather_layer_norm", "mask_tokens", "masked_cosine_loss", "clip_loss", "apply_rope", "qkv_rope", "rope_attention",
    "swiglu_mlp")
)  # fmt: skip
PRODUCT_STEPS, QKV_STEPS = "_products.py", "qkv_rope/gpu.py"
NORMS = "add_layer_norm gather_layer_norm subln_swiglu"
PRODUCTS = "linear swiglu_mlp gelu_mlp"
INDEXED = "gather_tokens scatter_tokens gather_layer_norm"
ATTENTIONS = "rope_attention rope_attention_packed"
ROTATED = "apply_rope rope_attention"
ROPES = "apply_rope qkv_rope rope_attention rope_attention_packed"
FWD, DQ, DKDV = (f"_rope_attention_{kernel}_kernel" for kernel in ("fwd", "bwd_dq", "bwd_dkdv"))

# fmt: off
MUTANTS = (
    # ---- what the kernels share --------------------------------------------------------------------------------------
    M("dot_forgets_the_sum_so_far", LIB, "dot", "tl.dot(a, b, acc,", "tl.dot(a, b, acc * 0.0,",
      "linear rope_attention"),
    M("sum_of_pieces_forgets_the_sum_so_far", LIB, "add_product", "1.0, acc)", "1.0, acc * 0.0)",
      "clip_loss rope_attention"),
    M("norm_variance_not_centred", LIB, "mean_and_rstd", "x - mean[:, None]", "x", NORMS),
    M("norm_mean_over_the_block", LIB, "mean_and_rstd", "mean = tl.sum(x, 1) * (1.0 / N)",
      "mean = tl.sum(x, 1) / x.shape[1]", NORMS),
    M("norm_variance_over_n_minus_1", LIB, "mean_and_rstd", "(centred * centred, 1) * (1.0 / N)",
      "(centred * centred, 1) / (N - 1)", NORMS),
    M("norm_eps_dropped", LIB, "mean_and_rstd", "variance + tl.cast(eps, tl.float32)", "variance", NORMS),
    M("norm_padding_in_the_variance", LIB, "mean_and_rstd", "tl.where(keep, x - mean[:, None], 0.0)",
      "x - mean[:, None]", NORMS),
    M("norm_rms_as_layer_norm", LIB, "mean_and_rstd", "if RMS:", "if RMS and N < 0:", "add_layer_norm"),
    M("norm_gradient_without_its_projection", LIB, "norm_input_gradient", "normed * along[:, None]", "normed * 0.0",
      NORMS),
    M("norm_gradient_without_its_mean", LIB, "norm_input_gradient", "(tl.sum(dnormed, 1) * (1.0 / N))[:, None]",
      "0.0", NORMS),
    M("norm_gradient_mean_over_the_block", LIB, "norm_input_gradient", "tl.sum(dnormed, 1) * (1.0 / N)",
      "tl.sum(dnormed, 1) / dnormed.shape[1]", NORMS),
    M("norm_gradient_without_rstd", LIB, "norm_input_gradient", "return d * rstd[:, None]", "return d", NORMS),
    M("norm_gradient_takes_padding", LIB, "norm_input_gradient", "dnormed = tl.where(keep, dnormed, 0.0)",
      "dnormed = dnormed * 1.0", NORMS, equivalent="every caller's gradient is zero beyond the last column already"),
    M("inverse_root_steps_too_far", LIB, "inverse_sqrt", "fused(r, step, r)", "fused(r, step, 1.001 * r)",
      "add_layer_norm masked_cosine_loss"),
    M("silu_precise_exponent_of_another_base", LIB, "silu_and_slope", "tl.exp2(p)", "tl.exp(p)", "swiglu"),
    M("silu_slope_without_its_second_term", LIB, "silu_and_slope", "sigmoid + silu * (1.0 - sigmoid)", "sigmoid",
      "swiglu subln_swiglu swiglu_mlp"),
    M("silu_is_sigmoid", LIB, "silu_and_slope", "gate * sigmoid", "sigmoid * 1.0", "swiglu subln_swiglu swiglu_mlp"),
    M("gelu_by_tanh", LIB, "gelu_and_slope", "0.5 * (1.0 + tl.erf(x * 0.7071067811865476))",
      "tl.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x))", "gelu_mlp"),
    M("gelu_slope_without_its_density", LIB, "gelu_and_slope", "cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))",
      "cdf", "gelu_mlp"),
    M("gather_takes_padding", LIB, "picked_tokens", "(token >= 0)", "(token >= -1)", "gather_tokens gather_layer_norm"),
    M("gather_off_by_one", LIB, "picked_tokens", "token.to(tl.int64) * stride_token",
      "(token + 1).to(tl.int64) * stride_token", "gather_tokens gather_layer_norm"),
    M("gather_from_another_sample", LIB, "picked_tokens", "sample = places // K", "sample = places // (K + 1)",
      "gather_tokens gather_layer_norm"),
    M("gather_flat_token_counts_over_samples", LIB, "picked_tokens", "token = token % S", "token = token % (2 * S)",
      "gather_tokens gather_layer_norm"),
    M("scatter_loses_duplicates", LIB, "sum_of_run", "tl.max(end - begin, 0)", "tl.minimum(tl.max(end - begin, 0), 1)",
      INDEXED),
    M("scatter_loses_the_last_of_a_run", LIB, "sum_of_run", "tl.max(end - begin, 0)", "tl.max(end - begin, 0) - 1",
      INDEXED),
    M("scatter_takes_one_of_the_next_run", LIB, "sum_of_run", "begin + k < end", "begin + k <= end",
      "gather_tokens scatter_tokens"),
    M("inverse_index_runs_begin_at_their_end", INDEX, "inverse_index", "out_int32=True)", "out_int32=True, right=True)",
      INDEXED),
    M("inverse_index_of_the_first_sample", INDEX, "inverse_token_index", "seq_len * torch", "0 * torch", INDEXED),
    M("inverse_index_takes_padding", INDEX, "inverse_token_index", "masked_fill(padding, -1)",
      "masked_fill(padding, 0)", INDEXED),
    M("partial_sums_without_the_last", LIB, "_column_sums_kernel", "(rows < P)", "(rows < P - 1)",
      "add_layer_norm subln_swiglu mask_tokens gather_layer_norm"),
    M("partial_sums_of_the_first_block", LIB, "_column_sums_kernel", "range(first, P, BLOCK_P)",
      "range(first, first + BLOCK_P, BLOCK_P)", "rope_attention"),
    M("partial_sums_column_mask_off_by_one", LIB, "_column_sums_kernel", "mask=cols < N", "mask=cols < N - 1",
      "add_layer_norm"),
    M("column_sums_of_the_last_rows", LIB, "_scale_and_sum_kernel", "part += x", "part = x", "linear"),
    M("column_sums_without_row_scale", LIB, "_scale_and_sum_kernel", "rows // rows_per_sample",
      "rows // rows_per_sample * 0", PRODUCTS),
    M("scaled_gradient_without_layer_scale", LIB, "_scale_and_sum_kernel", "x *= tl.load(layer_scale_ptr",
      "x += 0.0 * tl.load(layer_scale_ptr", PRODUCTS),
    M("column_sums_of_the_first_columns", LIB, "_scale_and_sum_kernel", "tl.program_id(1) * BLOCK_N", "0 * BLOCK_N",
      "linear"),
    # ---- rotation ----------------------------------------------------------------------------------------------------
    M("rope_sign_of_sin", ROPE, "rotate", "a * cos - b * sin", "a * cos + b * sin", ROPES),
    M("rope_rotates_instead_of_back", ROPE, "unrotate", "a * cos + b * sin, b * cos - a * sin",
      "a * cos - b * sin, b * cos + a * sin", ROPES),
    M("rope_rotates_the_prefix", ROPE, "load_cos_sin", "there & (token >= prefix)", "there", ROTATED),
    M("rope_leaves_the_first_patch", ROPE, "load_cos_sin", "token >= prefix", "token > prefix", ROTATED),
    M("rope_ignores_swap", ROPE, "load_cos_sin", "= column, row", "= row, column", ROTATED),
    M("rope_height_as_width", ROPE, "load_cos_sin", "columns = width", "columns = height", ROTATED),
    M("rope_columns_from_the_rows_table", ROPE, "load_cos_sin", "column = height + patch", "column = patch", ROTATED),
    M("rope_axis_boundary_off_by_one", ROPE, "load_cos_sin", "pair < quarter", "pair <= quarter", ROTATED),
    M("rope_grid_height_as_width", ROPE, "load_cos_sin", "2 * sequence + 1", "2 * sequence", ROTATED),
    M("rope_table_of_head_0", ROPE, "load_cos_sin", "tl.cast(head, tl.int64)", "tl.cast(0 * head, tl.int64)",
      "apply_rope rope_attention rope_attention_packed"),
    M("rope_table_of_sequence_0", ROPE, "load_cos_sin", "tl.cast(sequence, tl.int64)",
      "tl.cast(0 * sequence, tl.int64)", "apply_rope rope_attention rope_attention_packed"),
    M("rope_padding_pairs_turn", ROPE, "load_cos_sin", "(pair < HALF)", "(pair < HALF + 1)", ROTATED),
    M("rope_ignores_keep_idx", ROPE, "patch_of_token", "patch = tl.load(kept,", "_ = tl.load(kept,", ROPES),
    M("rope_keep_idx_of_sequence_0", ROPE, "patch_of_token", "tl.cast(sequence, tl.int64)",
      "tl.cast(0 * sequence, tl.int64)", "apply_rope qkv_rope rope_attention"),
    M("rope_keep_idx_counts_the_prefix", ROPE, "patch_of_token", "num_kept + patch", "num_kept + token",
      "apply_rope qkv_rope rope_attention"),
    M("rope_half_pairs_mask_off_by_one", ROPE, "load_pairs", "(pair < HALF)", "(pair <= HALF)", "rope_attention"),
    M("rope_half_second_channel_is_the_first", ROPE, "load_pairs", "offsets + HALF + pair", "offsets + pair", ROTATED),
    M("rope_half_stores_over_the_first", ROPE, "store_pairs", "offsets + HALF + pair", "offsets + pair", ROTATED),
    M("rope_interleaved_store_not_masked", ROPE, "store_pairs", "mask=there & (channel < 2 * HALF)[None, :]",
      "mask=there", ROTATED),
    M("rope_half_store_not_masked", ROPE, "store_pairs", "b, mask=keep", "b, mask=there", ROTATED),
    M("rope_second_tile_from_the_first_channels", ROPE, "load_pairs", "channel = 2 * FIRST +", "channel =", ROTATED),
    M("rope_tile_rotates_the_prefix", ROPE, "load_cos_sin_of_tile", "there & (token >= prefix)", "there", "qkv_rope"),
    M("rope_tile_ignores_swap", ROPE, "load_cos_sin_of_tile", "= column, row", "= row, column", "qkv_rope"),
    M("rope_tile_height_as_width", ROPE, "load_cos_sin_of_tile", "columns = width", "columns = height", "qkv_rope"),
    M("rope_tile_grid_height_as_width", ROPE, "load_cos_sin_of_tile", "2 * sequence + 1", "2 * sequence", "qkv_rope"),
    M("rope_tile_table_of_head_0", ROPE, "load_cos_sin_of_tile", "index + (head.to", "index + (0 * head.to",
      "qkv_rope"),
    M("rope_tile_table_of_sequence_0", ROPE, "load_cos_sin_of_tile", "index + (sequence.to", "index + (0 * sequence.to",
      "qkv_rope"),
    # ---- matrix products ---------------------------------------------------------------------------------------------
    M("product_skips_the_last_block", GEMM, "products", "range(0, K, BLOCK_K)",
      "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)", "linear swiglu_mlp gelu_mlp qkv_rope"),
    M("product_left_mask_off_by_one", GEMM, "products", "(k < K - start)", "(k <= K - start)", "linear"),
    M("product_right_mask_off_by_one", GEMM, "_load_b", "b = tl.load(ptrs, mask=(k < K - start)[:, None], other=0.0)",
      "b = tl.load(ptrs, mask=(k <= K - start)[:, None], other=0.0)", "linear"),
    M("product_rows_not_clamped", GEMM, "products", "tl.minimum(rows, M - 1)", "rows", "linear"),
    M("product_columns_not_clamped", GEMM, "products", "tl.minimum(cols, COLS - 1)", "cols", "linear"),
    M("product_up_takes_gate_weight", GEMM, "products", "_load_b(b2_ptr", "_load_b(b_ptr", "swiglu_mlp"),
    M("tiles_of_the_last_group_lost", GEMM, "tile_of_program", "tl.minimum(tiles_m - first, GROUP)", "GROUP", "linear"),
    M("tiles_of_the_first_group_only", GEMM, "tile_of_program", "first = program //", "first = 0 * program //",
      "linear"),
    M("epilogue_halves_swapped", GEMM, "column_halves",
      "tl.permute(tl.reshape(y, [y.shape[0], 2, y.shape[1] // 2]), (0, 2, 1))",
      "tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2])", "linear swiglu_mlp gelu_mlp qkv_rope"),
    M("bias_dropped", GEMM, "add_columns", "y += tl.load", "y += 0.0 * tl.load", "linear swiglu_mlp gelu_mlp qkv_rope"),
    M("layer_scale_dropped", GEMM, "_finish", "y *= tl.load(layer_scale_ptr", "y += 0.0 * tl.load(layer_scale_ptr",
      PRODUCTS),
    M("layer_scale_twice", GEMM, "_finish", "y *= tl.load(layer_scale_ptr",
      "y *= tl.load(layer_scale_ptr + cols, mask=cols < N)[None, :]\n        y *= tl.load(layer_scale_ptr", PRODUCTS),
    M("row_scale_dropped", GEMM, "_finish", "y *= tl.load(row_scale_ptr", "y += 0.0 * tl.load(row_scale_ptr", PRODUCTS),
    M("row_scale_of_sample_0", GEMM, "_finish", "rows // rows_per_sample", "rows // rows_per_sample * 0", PRODUCTS),
    M("residual_dropped", GEMM, "_finish", "y += tl.load(residual,", "y += 0.0 * tl.load(residual,", PRODUCTS),
    M("product_stored_without_mask", GEMM, "_finish", "y.to(out_ptr.dtype.element_ty), mask=keep)",
      "y.to(out_ptr.dtype.element_ty))", "linear"),
    M("hidden_padding_not_zero", GEMM, "_store_hidden", "tl.where((cols < N)[None, :], y, 0.0)", "(y + 0.0)",
      "swiglu_mlp gelu_mlp",
      equivalent="a second line of defence: products meet zero weights there, norms mask it, sums leave it out"),
    M("hidden_stored_without_mask", GEMM, "_store_hidden", "(rows < M)[:, None] & (cols < COLS)",
      "(rows < M)[:, None] & (cols < 2 * COLS)", "swiglu_mlp gelu_mlp"),
    M("gate_and_up_swapped", GEMM, "_activate_kernel", "gate, up = products(", "up, gate = products(", "swiglu_mlp"),
    M("hidden_without_up", GEMM, "_activate_kernel", "hidden = silu * up", "hidden = silu * 1.0", "swiglu_mlp"),
    M("up_bias_is_the_gates", GEMM, "_activate_kernel", "b_up_ptr, cols", "b_gate_ptr, cols", "swiglu_mlp"),
    M("parts_bias_of_v_for_q", GEMM, "_project_parts_kernel", "tl.where(part == 2, PART, 0)", "PART", "qkv_rope"),
    M("parts_weight_of_q_for_v", GEMM, "_project_parts_kernel", "b_ptr = b2_ptr", "b_ptr = b0_ptr", "qkv_rope"),
    M("hidden_without_the_norms_weight", GEMM, "_activate_kernel", "hidden *= tl.load(norm_weight_ptr",
      "hidden += 0.0 * tl.load(norm_weight_ptr", "swiglu_mlp"),
    M("piece_squares_of_padding", GEMM, "_store_piece", "tl.where(keep, hidden - mean[:, None], 0.0)",
      "hidden - mean[:, None]", "swiglu_mlp"),
    M("piece_squares_at_the_means", GEMM, "_store_piece", "at + tl.cast(COUNT, tl.int64) * M",
      "at + 0 * tl.cast(COUNT, tl.int64) * M", "swiglu_mlp"),
    M("norm_of_pieces_alone", GEMM, "_fold_norm_kernel", "squares += columns", "squares += 0.0 * columns",
      "swiglu_mlp"),
    M("folded_norm_without_bias", GEMM, "_fold_norm_kernel", "total = tl.sum(shift, 0)",
      "total = 0.0 * tl.sum(shift, 0)", "swiglu_mlp"),
    M("folded_norm_without_mean", GEMM, "_project_kernel", "y - mean[:, None] * weight_sum[None, :]",
      "y - 0.0 * mean[:, None] * weight_sum[None, :]", "swiglu_mlp"),
    M("dgate_without_slope", GEMM, "_activation_gradient", "dhidden * up * slope", "dhidden * up", "swiglu_mlp"),
    M("dup_takes_gate", GEMM, "_activation_gradient", "dhidden * silu", "dhidden * gate", "swiglu_mlp"),
    M("gelu_gradient_without_slope", GEMM, "_activation_gradient", "dhidden * slope", "dhidden * 1.0", "gelu_mlp"),
    M("recomputed_hidden_without_up", GEMM, "_activation_gradient", "hidden = silu * up", "hidden = silu * 1.0",
      "swiglu_mlp"),
    M("bias_sums_of_one_row_of_tiles", GEMM, "_hidden_gradient_kernel", "gate_sum_ptr + tile_m * N",
      "gate_sum_ptr + 0 * N", "swiglu_mlp gelu_mlp"),
    M("bias_sums_without_the_last_row_of_tiles", GEMM, "hidden_gradient",
      'partial[: triton.cdiv(rows, choice["BLOCK_M"])]', 'partial[: max(1, rows // choice["BLOCK_M"])]',
      "swiglu_mlp gelu_mlp"),
    M("up_bias_gradient_is_the_gates", GEMM, "_hidden_gradient_kernel", "tl.sum(dup, 0)", "tl.sum(dgate, 0)",
      "swiglu_mlp"),
    M("gelu_bias_not_in_what_is_kept", GEMM, "_activation_gradient", "add_columns(gate, bias_ptr, cols, N)", "gate",
      "gelu_mlp"),
    M("hidden_not_centred", GEMM, "_activation_gradient", "hidden -= tl.load", "hidden -= 0.0 * tl.load", "gelu_mlp"),
    M("weight_gradient_without_what_was_centred", GEMM, "_finish_gradients_kernel", "product += column_sum",
      "product += 0.0 * column_sum", "gelu_mlp"),
    M("layer_scale_gradient_of_the_last_block", GEMM, "_finish_gradients_kernel", "total += product",
      "total = product", "linear"),
    M("layer_scale_gradient_without_bias", GEMM, "_finish_gradients_kernel", "dscale += column_sum",
      "dscale += 0.0 * column_sum", PRODUCTS),
    M("weight_gradient_without_layer_scale", GEMM, "_finish_gradients_kernel", "(product * scale)", "product",
      PRODUCTS),
    M("bias_gradient_without_layer_scale", GEMM, "_finish_gradients_kernel", "(column_sum * scale)", "column_sum",
      PRODUCTS),
    M("input_gradient_without_residual", PRODUCT_STEPS, "hidden_input_gradient", "out, add)", "out, None)",
      "swiglu_mlp gelu_mlp"),
    M("mm_bias_dropped", GEMM, "_finish_kernel", "add_columns(y, bias_ptr, cols, N)", "y + 0.0", PRODUCTS, route="mm"),
    M("mm_gelu_without_bias", GEMM, "_activate_rows_kernel", "add_columns(gate, bias_ptr, cols, N)", "gate", "gelu_mlp",
      route="mm"),
    M("mm_hidden_without_up", GEMM, "_activate_rows_kernel", "silu * tl.load(up_ptr", "silu + 0.0 * tl.load(up_ptr",
      "swiglu_mlp", route="mm"),
    M("mm_hidden_gradient_without_the_last_column", GEMM, "_hidden_gradient_rows_kernel", "mask=there",
      "mask=there & (cols < N - 1)[None, :]", "swiglu_mlp gelu_mlp", route="mm"),
    # ---- swiglu ------------------------------------------------------------------------------------------------------
    M("swiglu_stores_without_mask", SWIGLU, "_swiglu_fwd_kernel", "out, mask=keep)", "out)", "swiglu"),
    M("swiglu_column_mask_off_by_one", SWIGLU, "_swiglu_fwd_kernel", "(cols < N)", "(cols < N - 1)", "swiglu"),
    M("swiglu_row_mask_off_by_one", SWIGLU, "_swiglu_fwd_kernel", "(rows < M)", "(rows <= M)", "swiglu"),
    M("swiglu_gradients_swapped", SWIGLU, "_swiglu_bwd_kernel", "dup = (dout * silu)", "dup = (dout * gate)", "swiglu"),
    M("swiglu_gradient_without_up", SWIGLU, "_swiglu_bwd_kernel", "dout * up * slope", "dout * slope", "swiglu"),
    M("swiglu_first_columns_only", SWIGLU, "_swiglu_bwd_kernel", "tl.program_id(1) * BLOCK_N", "0 * BLOCK_N", "swiglu",
      large="L"),
    # ---- subln_swiglu ------------------------------------------------------------------------------------------------
    M("subln_mean_not_subtracted", SUBLN, "_subln_swiglu_fwd_kernel", "hidden - mean[:, None]", "hidden",
      "subln_swiglu swiglu_mlp", route="mm"),
    M("subln_bias_before_the_weight", SUBLN, "_subln_swiglu_fwd_kernel", "* weight[None, :] + bias[None, :]",
      "* weight[None, :] + bias[None, :] * weight[None, :]", "subln_swiglu swiglu_mlp", route="mm"),
    M("subln_norm_of_silu_alone", SUBLN, "_subln_swiglu_fwd_kernel", "hidden = silu * up", "hidden = silu * 1.0",
      "subln_swiglu swiglu_mlp", route="mm"),
    M("subln_gradient_without_weight", SUBLN, "_subln_swiglu_bwd_kernel", "dout * weight[None, :]", "dout",
      "subln_swiglu swiglu_mlp"),
    M("subln_weight_gradient_of_the_last_rows", SUBLN, "_subln_swiglu_bwd_kernel", "dweight += ", "dweight = ",
      "subln_swiglu"),
    M("subln_rows_counted_twice", SUBLN, "_subln_swiglu_bwd_kernel", "tl.num_programs(0) * BLOCK_M", "BLOCK_M",
      "subln_swiglu"),
    M("subln_partials_in_one_place", SUBLN, "_subln_swiglu_bwd_kernel", "tl.program_id(0) * N + cols", "0 * N + cols",
      "subln_swiglu"),
    M("subln_dup_takes_gate", SUBLN, "_subln_swiglu_bwd_kernel", "dhidden * silu", "dhidden * gate",
      "subln_swiglu swiglu_mlp"),
    M("subln_output_again_without_bias", SUBLN, "_subln_swiglu_bwd_kernel", "normed * weight[None, :] + bias[None, :]",
      "normed * weight[None, :]", "swiglu_mlp"),
    M("subln_up_bias_gradient_is_the_gates", SUBLN, "_subln_swiglu_bwd_kernel", "up_sum += dup", "up_sum += dgate",
      "swiglu_mlp"),
    M("subln_gradient_not_centred", SUBLN, "_subln_swiglu_bwd_kernel", "silu * up - mean[:, None]", "silu * up",
      "subln_swiglu swiglu_mlp"),
    # ---- add_layer_norm ----------------------------------------------------------------------------------------------
    M("add_norm_residual_dropped", ADD, "_add_layer_norm_fwd_kernel", "x += tl.load(residual_ptr",
      "x += 0.0 * tl.load(residual_ptr", "add_layer_norm"),
    M("add_norm_row_scale_dropped", ADD, "_add_layer_norm_fwd_kernel", "x *= tl.load(row_scale_ptr",
      "x += 0.0 * tl.load(row_scale_ptr", "add_layer_norm"),
    M("add_norm_row_scale_of_the_row", ADD, "_add_layer_norm_fwd_kernel", "rows // rows_per_sample", "rows // 2",
      "add_layer_norm"),
    M("add_norm_layer_scale_twice", ADD, "_add_layer_norm_fwd_kernel", "x *= tl.load(layer_scale_ptr",
      "x *= tl.load(layer_scale_ptr + cols, mask=cols < N)[None, :]\n        x *= tl.load(layer_scale_ptr",
      "add_layer_norm"),
    M("add_norm_without_weight", ADD, "_add_layer_norm_fwd_kernel", "normed *= tl.load(weight_ptr",
      "normed += 0.0 * tl.load(weight_ptr", "add_layer_norm swiglu_mlp gelu_mlp qkv_rope"),
    M("add_norm_stores_without_mask", ADD, "_add_layer_norm_fwd_kernel", "normed, mask=keep)", "normed)",
      "add_layer_norm"),
    M("add_norm_gradient_of_the_sum_dropped", ADD, "_add_layer_norm_bwd_kernel", "d += tl.load(dsum_ptr",
      "d += 0.0 * tl.load(dsum_ptr", "add_layer_norm swiglu_mlp gelu_mlp"),
    M("add_norm_gradient_without_row_scale", ADD, "_add_layer_norm_bwd_kernel", "d *= tl.load(row_scale_ptr",
      "d += 0.0 * tl.load(row_scale_ptr", "add_layer_norm"),
    M("add_norm_gradient_without_layer_scale", ADD, "_add_layer_norm_bwd_kernel", "d *= tl.load(layer_scale_ptr",
      "d += 0.0 * tl.load(layer_scale_ptr", "add_layer_norm"),
    M("add_norm_gradient_without_weight", ADD, "_add_layer_norm_bwd_kernel", "d *= tl.load(weight_ptr",
      "d += 0.0 * tl.load(weight_ptr", "add_layer_norm swiglu_mlp gelu_mlp qkv_rope"),
    M("add_norm_weight_gradient_of_the_last_rows", ADD, "_add_layer_norm_bwd_kernel", "dweight += ", "dweight = ",
      "add_layer_norm", large="B"),
    M("add_norm_scale_gradient_of_the_last_rows", ADD, "_add_layer_norm_bwd_kernel", "dscale += ", "dscale = ",
      "add_layer_norm", large="B"),
    M("add_norm_bias_gradient_with_weight", ADD, "_add_layer_norm_bwd_kernel", "dbias += d", "dbias += d * normed",
      "add_layer_norm"),
    # ---- tokens ------------------------------------------------------------------------------------------------------
    M("gather_stores_without_mask", GATHER, "_gather_tokens_kernel",
      "out, mask=(rows < M)[:, None] & (cols < N)[None, :])", "out)", "gather_tokens"),
    M("gather_column_mask_off_by_one", GATHER, "_gather_tokens_kernel", "picked[:, None] & (cols < N)",
      "picked[:, None] & (cols < N - 1)", "gather_tokens scatter_tokens"),
    M("gather_first_columns_only", GATHER, "_gather_tokens_kernel", "tl.program_id(1) * BLOCK_N", "0 * BLOCK_N",
      "gather_tokens"),
    M("scatter_first_columns_only", GATHER, "_scatter_tokens_kernel", "tl.program_id(1) * BLOCK_N", "0 * BLOCK_N",
      "gather_tokens"),
    M("gather_norm_padding_gets_the_bias", GATHER_NORM, "_gather_layer_norm_fwd_kernel",
      "out = tl.where(picked[:, None], out, 0.0)", "out = tl.where(picked[:, None], out, out)", "gather_layer_norm"),
    M("gather_norm_without_bias", GATHER_NORM, "_gather_layer_norm_fwd_kernel", "+ bias[None, :]",
      "+ 0.0 * bias[None, :]", "gather_layer_norm"),
    M("gather_norm_rows_of_sample_0", GATHER_NORM, "_gather_layer_norm_bwd_kernel", "row_offsets(rows // S, stride_x)",
      "row_offsets(rows // S * 0, stride_x)", "gather_layer_norm"),
    M("gather_norm_leaves_out_unpicked_rows", GATHER_NORM, "_gather_layer_norm_bwd_kernel",
      "keep = (rows < M)[:, None]", "keep = picked[:, None]", "gather_layer_norm"),
    M("gather_norm_statistics_of_another_row", GATHER_NORM, "_gather_layer_norm_bwd_kernel", "tl.load(mean_ptr + place",
      "tl.load(mean_ptr + 0 * place", "gather_layer_norm"),
    M("gather_norm_bias_gradient_of_the_last_rows", GATHER_NORM, "_gather_layer_norm_bwd_kernel", "dbias += dout",
      "dbias = dout", "gather_layer_norm", large="S257"),
    M("mask_token_ignored", MASK, "_mask_tokens_fwd_kernel", "x = tl.where(masked[:, None], mask_token[None, :], x)",
      "x = tl.where(masked[:, None], x, x)", "mask_tokens"),
    M("mask_of_sample_0", MASK, "_mask_tokens_fwd_kernel", "sample.to(tl.int64) * P + patch",
      "0 * sample.to(tl.int64) + patch", "mask_tokens"),
    M("mask_cls_token_on_the_first_patch", MASK, "_mask_tokens_fwd_kernel", "(patch < 0)", "(patch <= 0)",
      "mask_tokens"),
    M("mask_pos_embed_dropped", MASK, "_mask_tokens_fwd_kernel", "x += tl.load(pos_embed_ptr",
      "x += 0.0 * tl.load(pos_embed_ptr", "mask_tokens"),
    M("mask_gradient_of_masked_patches", MASK, "_mask_tokens_bwd_kernel", "d = tl.where(masked[:, None], 0.0, d)",
      "d = tl.where(masked[:, None], d, d)", "mask_tokens"),
    M("mask_token_gradient_of_the_last_sample", MASK, "_mask_tokens_bwd_kernel", "total_masked += ", "total_masked = ",
      "mask_tokens"),
    M("mask_token_gradient_takes_every_patch", MASK, "_mask_tokens_bwd_kernel",
      "tl.where(masked[:, None], d.to(tl.float32), 0.0)", "d.to(tl.float32)", "mask_tokens"),
    M("mask_pos_gradient_of_the_last_sample", MASK, "_mask_tokens_bwd_kernel", "total += ", "total = ", "mask_tokens"),
    M("mask_partials_in_one_place", MASK, "_mask_tokens_bwd_kernel", "tl.cast(tl.program_id(0), tl.int64) * N",
      "tl.cast(part, tl.int64) * N", "mask_tokens"),
    M("mask_cls_gradient_of_patches", MASK, "_mask_tokens_bwd_kernel", "keep & (patch < 0)[:, None]", "keep",
      "mask_tokens"),
    # ---- masked_cosine_loss ------------------------------------------------------------------------------------------
    M("loss_not_negated", COSINE, "_mean_kernel", "-above / ", "above / ", "masked_cosine_loss"),
    M("loss_mean_over_every_row", COSINE, "_mean_kernel", "number += counts.to(tl.int32)",
      "number += (rows < M).to(tl.int32)", "masked_cosine_loss"),
    M("loss_ignores_the_index", COSINE, "_target_rows", "row = tl.load(idx_ptr + rows, mask=rows < M, other=-1)",
      "row = rows + 0 * tl.load(idx_ptr + rows, mask=rows < M, other=-1)", "masked_cosine_loss"),
    M("loss_takes_padding", COSINE, "_target_rows", "(row >= 0)", "(row >= -1)", "masked_cosine_loss"),
    M("loss_target_not_normalised", COSINE, "_cosine_kernel", "* p_inv * t_inv", "* p_inv", "masked_cosine_loss"),
    M("loss_norm_of_the_last_columns", COSINE, "_cosine_kernel", "pp += ", "pp = ", "masked_cosine_loss"),
    M("loss_zero_norm_not_clamped", COSINE, "_inverse", "tl.where(small, CLAMPED, inverse",
      "tl.where(small, 1.0, inverse", "masked_cosine_loss"),
    M("loss_gradient_of_a_clamped_norm", COSINE, "_coefficients", "p_inv < CLAMPED", "p_inv <= CLAMPED",
      "masked_cosine_loss"),
    M("loss_gradient_without_its_projection", COSINE, "_coefficients", "-along * p_inv * p_inv", "-along * 0.0",
      "masked_cosine_loss"),
    M("loss_target_gradient_without_its_projection", COSINE, "_coefficients", "-along * t_inv * t_inv", "-along * 0.0",
      "masked_cosine_loss"),
    M("loss_slope_forgotten", COSINE, "_coefficients", "return slope * p_inv", "return p_inv", "masked_cosine_loss"),
    M("loss_gradient_first_columns_only", COSINE, "_cosine_bwd_kernel", "tl.program_id(1) * BLOCK_N", "0 * BLOCK_N",
      "masked_cosine_loss"),
    M("loss_target_gradient_first_columns_only", COSINE, "_cosine_bwd_target_kernel", "tl.program_id(1) * BLOCK_N",
      "0 * BLOCK_N", "masked_cosine_loss"),
    M("loss_target_gradient_loses_duplicates", COSINE, "_cosine_bwd_target_kernel", "dtarget += other",
      "dtarget = other", "masked_cosine_loss"),
    M("loss_target_projection_loses_duplicates", COSINE, "_cosine_bwd_target_kernel", "along += ", "along = ",
      "masked_cosine_loss"),
    M("loss_padding_rows_not_zeroed", COSINE, "_cosine_bwd_kernel",
      "dpred = tl.where(keep, other[:, None] * t + of_pred[:, None] * p, 0.0)",
      "dpred = other[:, None] * t + of_pred[:, None] * p", "masked_cosine_loss",
      equivalent="what is loaded of a padding row, and its coefficients, are zeros already"),
    # ---- clip_loss ---------------------------------------------------------------------------------------------------
    M("clip_product_of_the_last_columns", CLIP, "_products", "acc = add_product(a, b, acc,",
      "acc = add_product(a, b, acc * 0.0,", "clip_loss"),
    M("clip_target_of_another_pair", CLIP, "_statistics_kernel", "own = (rows + first)[:, None] == cols[None, :]",
      "own = (rows + 1)[:, None] == cols[None, :]", "clip_loss"),
    M("clip_takes_columns_beyond_the_last", CLIP, "_statistics_kernel", "(cols < N)[None, :], logits",
      "(cols < 2 * N)[None, :], logits", "clip_loss"),
    M("clip_takes_rows_beyond_the_last", CLIP, "_statistics_kernel", "(rows < M)[:, None], logits",
      "(rows < 2 * M)[:, None], logits", "clip_loss"),
    M("clip_merge_without_fading", CLIP, "_merge_kernel", "total * _fade(largest - both)", "total", "clip_loss"),
    M("clip_merge_forgets_the_blocks_before", CLIP, "_merge_kernel", "if before_ptr is not None:",
      "if before_ptr is not None and P < 0:", "clip_loss"),
    M("clip_loss_without_its_target", CLIP, "_merge_kernel", "largest - target + ", "largest + ", "clip_loss"),
    M("clip_mean_over_one_side", CLIP, "_total_kernel", "* unit", "* (2.0 * unit)",
      "clip_loss"),
    M("clip_scale_gradient_of_logits", CLIP, "_total_kernel", "tl.load(dloss_ptr) / factor", "tl.load(dloss_ptr)",
      "clip_loss"),
    M("clip_gradient_of_rows_alone", CLIP, "_gradient_kernel", "g += tl.exp(", "g += 0.0 * tl.exp(", "clip_loss"),
    M("clip_gradient_with_the_rows_losses", CLIP, "_gradient_kernel", "key_target[None, :] - key_loss[None, :]",
      "key_target[None, :]", "clip_loss"),
    M("clip_gradient_of_pairs_as_of_others", CLIP, "_gradient_kernel", "tl.where(own, _exp",
      "tl.where(own & (N < 0), _exp", "clip_loss"),
    M("clip_gradient_of_pairs_of_one_side", CLIP, "_gradient_kernel", " + _exp_minus_1(-key_loss)[None, :]",
      " + 0.0 * key_loss[None, :]", "clip_loss"),
    M("clip_small_exponents_cut_short", CLIP, "_exp_minus_1", "tl.where(tl.abs(x) < 0.25, x * series,",
      "tl.where(tl.abs(x) < 0.25, x,", "clip_loss"),
    M("clip_logarithm_without_its_exponent", CLIP, "_log", "fused(exponent.to(tl.float32), 0.6931471805599453, ",
      "(", "clip_loss"),
    M("clip_logarithm_cut_short", CLIP, "_log", "2.0 * s + s * series", "2.0 * s", "clip_loss"),
    M("clip_features_of_the_last_block", CLIP, "_features_kernel", "if before_ptr is not None:",
      "if before_ptr is not None and K < 0:", "clip_loss"),
    M("clip_features_unscaled", CLIP, "_features_kernel", "tl.load(scale_ptr) * tl.load(dloss_ptr)",
      "tl.load(dloss_ptr)", "clip_loss"),
    M("clip_features_first_columns_only", CLIP, "_features_kernel", "tl.program_id(1) * BLOCK_N", "0 * BLOCK_N",
      "clip_loss"),
    # ---- apply_rope and the tables' gradients ------------------------------------------------------------------------
    M("apply_rope_backward_rotates_on", APPLY, "bwd", "inverse=True", "inverse=False", "apply_rope"),
    M("apply_rope_first_heads_only", APPLY, "_rotate_kernel", "tl.program_id(1) * BLOCK_H", "0 * BLOCK_H", "qkv_rope"),
    M("apply_rope_beyond_the_last_head", APPLY, "_rotate_kernel", "tl.minimum(first_head + BLOCK_H, H)",
      "first_head + BLOCK_H", "apply_rope"),
    M("apply_rope_without_its_second_tile", APPLY, "_rotate_kernel", "tl.static_range(2 if REST else 1)",
      "tl.static_range(1)", "apply_rope"),
    M("apply_rope_varlen_starts_ignored", APPLY, "_rotate_kernel", "first = tl.load(cu_seqlens_ptr + sequence)",
      "first = 0 * tl.load(cu_seqlens_ptr + sequence)", "rope_attention"),
    M("table_gradient_sign_of_dsin", APPLY, "_table_gradient_kernel", "xa * db - xb * da", "xb * da - xa * db", ROPES),
    M("table_gradient_term_of_dcos_dropped", APPLY, "_table_gradient_kernel", "xa * da + xb * db", "xa * da", ROPES),
    M("table_gradient_of_the_last_block", APPLY, "_table_gradient_kernel", "dcos += ", "dcos = ", ROTATED),
    M("table_gradient_second_tile_dropped", APPLY, "_table_gradient_kernel", "tl.static_range(2 if REST else 1)",
      "tl.static_range(1)", ROTATED),
    M("table_gradient_of_sequence_0", APPLY, "_table_gradient_kernel", "B * HEADS", "HEADS", ROTATED),
    M("table_gradient_of_head_0", APPLY, "_table_gradient_kernel", "first_head + rows % HEADS", "first_head + 0 * rows",
      ROTATED),
    M("table_gradient_counts_the_prefix", APPLY, "_table_gradient_kernel", "prefix + patch", "patch", ROTATED),
    M("table_gradient_keep_idx_loses_a_token", APPLY, "_table_gradient_kernel",
      "tl.load(starts_ptr + entry + 1) - start)", "tl.load(starts_ptr + entry + 1) - start - 1)", ROTATED),
    M("table_gradient_keep_idx_of_sequence_0", APPLY, "_table_gradient_kernel", "sequence = place // num_kept",
      "sequence = 0 * place", ROTATED),
    M("table_gradient_keep_idx_of_table_0", APPLY, "_table_gradient_kernel", "first_sequence * patches + patch",
      "patch", "apply_rope"),
    M("table_gradient_beyond_a_sequence", APPLY, "_table_gradient_kernel", "token < end - begin", "token <= end",
      "rope_attention"),
    M("table_gradient_of_q_alone", ATTENTION, "_gradients", "[a + b for a, b in", "[a for a, b in", ATTENTIONS),
    # ---- qkv_rope ----------------------------------------------------------------------------------------------------
    M("qkv_bias_dropped", QKV, "_qkv_rope_kernel", "y = add_columns(halves[half], bias_ptr, cols, N)",
      "y = halves[half]", "qkv_rope"),
    M("qkv_k_not_rotated", QKV, "_qkv_rope_kernel", "head < ROTATED", "head < H", "qkv_rope"),
    M("qkv_v_rotated", QKV, "_qkv_rope_kernel", "head < ROTATED", "head <= ROTATED", "qkv_rope"),
    M("qkv_pairs_of_the_first_half_tile", QKV, "_qkv_rope_kernel", "half * (BLOCK_N // 4)", "0 * (BLOCK_N // 4)",
      "qkv_rope"),
    M("qkv_tokens_count_over_samples", QKV, "_qkv_rope_kernel", "rows % S", "rows", "qkv_rope"),
    M("qkv_keys_beyond_a_head_table", QKV, "_qkv_rope_kernel", "tl.where(head < H, head, head - H)", "head",
      "qkv_rope"),
    M("qkv_stores_without_mask", QKV, "_qkv_rope_kernel", "y, mask=keep)", "y)", "qkv_rope"),
    M("qkv_backward_leaves_v", QKV_STEPS, "bwd", "d[:, :, heads + kv_heads :] = ", "_ = ", "qkv_rope"),
    M("qkv_table_gradient_of_rotated_q", QKV_STEPS, "bwd", "rotate(qkv[:, :, at], rope, inverse=True)",
      "rotate(qkv[:, :, at], rope, inverse=False)", "qkv_rope"),
    # ---- attention ---------------------------------------------------------------------------------------------------
    M("attention_scale_forgotten", ATTENTION, FWD, "tl.cast(scale, tl.float32) * LOG2_E",
      "tl.cast(1.0, tl.float32) * LOG2_E", ATTENTIONS),
    M("attention_lse_in_base_2", ATTENTION, FWD, "largest * LN_2", "largest", ATTENTIONS),
    M("attention_sum_does_not_fade", ATTENTION, FWD, "total * fade", "total", "rope_attention"),
    M("attention_first_tile_does_not_fade", ATTENTION, FWD, "acc0 * fade[:, None]", "acc0", "rope_attention"),
    M("attention_second_tile_does_not_fade", ATTENTION, FWD, "acc1 * fade[:, None]", "acc1", "rope_attention"),
    M("attention_skips_the_last_block", ATTENTION, FWD, "range(0, end, BLOCK_N)",
      "range(0, end // BLOCK_N * BLOCK_N, BLOCK_N)", ATTENTIONS),
    M("attention_second_tile_out_of_the_scores", ATTENTION, FWD, "scores = dot(q1, tl.trans(k1), scores, PRECISION)",
      "scores = scores * 1.0", ATTENTIONS),
    M("attention_key_of_another_head", ATTENTION, FWD, "k_head = _head_of(k_ptr, first, sample, head // group",
      "k_head = _head_of(k_ptr, first, sample, head % (heads // group)", ATTENTIONS),
    M("attention_value_of_another_head", ATTENTION, FWD, "v_head = _head_of(v_ptr, first, sample, head // group",
      "v_head = _head_of(v_ptr, first, sample, head % (heads // group)", ATTENTIONS),
    M("attention_query_without_keys_is_nan", ATTENTION, FWD, "share = (1.0 / tl.where(total == 0.0, 1.0, total))",
      "share = (1.0 / total)", ATTENTIONS),
    M("attention_shift_of_minus_infinity", ATTENTION, FWD, 'tl.where(now == float("-inf"), 0.0, now)', "now",
      "rope_attention"),
    M("attention_not_divided_by_the_sum", ATTENTION, FWD, "acc1 * share", "acc1", ATTENTIONS),
    M("causal_off_by_one", ATTENTION, "_allowed", "key <= query", "key < query", "rope_attention"),
    M("causal_upside_down", ATTENTION, "_allowed", "key <= query", "key >= query", "rope_attention"),
    M("causal_loop_one_block_short", ATTENTION, FWD, "(block + 1) * BLOCK_M", "block * BLOCK_M", "rope_attention"),
    M("causal_dq_one_block_short", ATTENTION, DQ, "tl.minimum(length, (block + 1) * BLOCK_M)",
      "tl.minimum(length, block * BLOCK_M)", "rope_attention"),
    M("causal_dkdv_begins_one_block_late", ATTENTION, DKDV, "// BLOCK_M * BLOCK_M", "// BLOCK_M * BLOCK_M + BLOCK_M",
      "rope_attention"),
    M("causal_dkdv_from_the_first_query", ATTENTION, DKDV, "begin = (block * BLOCK_N)", "begin = 0 * (block * BLOCK_N)",
      "rope_attention", equivalent="queries before the block's keys attend to none of them: slower, nothing else"),
    M("padding_mask_ignored", ATTENTION, "_allowed",
      "allowed & (tl.load(mask_ptr + at, mask=key < length, other=0) != 0)", "allowed", ATTENTIONS),
    M("padding_mask_of_sample_0", ATTENTION, "_allowed", "tl.cast(sample, tl.int64) * seq_len",
      "tl.cast(0 * sample, tl.int64) * seq_len", ATTENTIONS),
    M("attention_takes_a_key_beyond_the_last", ATTENTION, "_allowed", "allowed = key < length",
      "allowed = key <= length", ATTENTIONS),
    M("varlen_starts_ignored", ATTENTION, "_sequence_bounds", "return first,", "return 0 * first,", ATTENTIONS),
    M("varlen_lengths_count_from_0", ATTENTION, "_sequence_bounds", "sequence + 1) - first", "sequence + 1)",
      ATTENTIONS),
    M("attention_unit_of_strides_forgotten", ATTENTION, "_head_of", "stride_b * UNIT", "stride_b", ATTENTIONS),
    M("delta_dropped_in_dq", ATTENTION, DQ, "dp - delta[:, None]", "dp", ATTENTIONS),
    M("delta_dropped_in_dk", ATTENTION, DKDV, "dp - delta[None, :]", "dp", ATTENTIONS),
    M("delta_without_the_second_tile", ATTENTION, DQ, "delta += ", "delta += 0.0 * ", ATTENTIONS),
    M("dq_without_scale", ATTENTION, DQ, "dq0 * scale", "dq0", ATTENTIONS),
    M("dk_second_tile_without_scale", ATTENTION, DKDV, "dk1 * scale", "dk1", ATTENTIONS),
    M("dq_skips_the_last_block", ATTENTION, DQ, "range(0, end, BLOCK_N)", "range(0, end // BLOCK_N * BLOCK_N, BLOCK_N)",
      ATTENTIONS),
    M("dq_second_tile_dropped", ATTENTION, DQ, "dq1 = dot(ds, k1, dq1, PRECISION)", "dq1 = dq1 * 1.0", ATTENTIONS),
    M("dp_without_the_second_tile", ATTENTION, DKDV, "dp = dot(v1, tl.trans(g1), dp, PRECISION)", "dp = dp * 1.0",
      ATTENTIONS),
    M("dkdv_skips_the_last_block", ATTENTION, DKDV, "range(begin, length, BLOCK_M)",
      "range(begin, length // BLOCK_M * BLOCK_M, BLOCK_M)", ATTENTIONS),
    M("dkdv_of_the_first_head_of_a_group", ATTENTION, DKDV, "(kv_head + 1) * group)", "kv_head * group + 1)",
      ATTENTIONS),
    M("dq_of_a_query_without_keys_guarded_twice", ATTENTION, DQ,
      'tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E', "lse * LOG2_E", ATTENTIONS,
      equivalent="no key is allowed there, so that every p is zero already"),
    M("attention_rotates_with_the_first_tiles_angles", ATTENTION, "_load_prepared", "P0, P1, HALF, AXIS",
      "0, P1, HALF, AXIS", ATTENTIONS),
    M("attention_second_tile_from_the_first_channels", ATTENTION, "_load_prepared",
      "load_pairs(ptr, offsets, there, P0, P1", "load_pairs(ptr, offsets, there, 0, P1", ATTENTIONS),
    M("attention_chunk_boundary_off_by_one", ATTENTION, "_load_head", "there, 2 * P0, 2 * P1",
      "there, 2 * P0 - 1, 2 * P1", ATTENTIONS),
    M("attention_head_store_not_masked", ATTENTION, "_store_head", "x0.to(ptr.dtype.element_ty), mask=keep",
      "x0.to(ptr.dtype.element_ty), mask=there", ATTENTIONS),
    M("qk_norm_eps_dropped", ATTENTION, "_load_prepared", "+ tl.cast(norm_eps, tl.float32)",
      "+ 0.0 * tl.cast(norm_eps, tl.float32)", "rope_attention"),
    M("qk_norm_gradient_eps_dropped", ATTENTION, "_store_gradient", "+ tl.cast(norm_eps, tl.float32)",
      "+ 0.0 * tl.cast(norm_eps, tl.float32)", "rope_attention"),
    M("qk_norm_of_the_first_tile", ATTENTION, "_load_prepared", "squares += ", "squares += 0.0 * ", ATTENTIONS),
    M("qk_norm_weight_of_the_first_tile", ATTENTION, "_load_prepared", "_norm_weight(norm_ptr, P0, P1",
      "_norm_weight(norm_ptr, 0, P1", ATTENTIONS),
    M("qk_norm_gradient_without_its_projection", ATTENTION, "_store_gradient", "a0 - xa0 * along", "a0", ATTENTIONS),
    M("qk_norm_projection_of_the_first_tile", ATTENTION, "_store_gradient", "along += ", "along += 0.0 * ", ATTENTIONS),
    M("qk_norm_weight_gradient_of_a_channel", ATTENTION, "_store_gradient", "tl.sum(b1 * xb1, 0)",
      "tl.sum(a1 * xb1, 0)", ATTENTIONS),
    M("qk_norm_partials_not_zeroed", ATTENTION, "_partials", "partials.zero_()", "partials", "rope_attention"),
    M("attention_backward_rotates_on", ATTENTION, "_store_gradient", "a1, b1 = unrotate", "a1, b1 = rotate",
      ATTENTIONS),
)
# fmt: on


# ---- applying a mutant -----------------------------------------------------------------------------------------------
def mutated(mutant: Mutant, ops: Path = ROOT / PACKAGE / "ops") -> str:
    """Source of the mutant's file with its change; LookupError, with the mutant's name, where that cannot be made."""
    source = (ops / mutant.file).read_text()
    found = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == mutant.inside]
    if len(found) != 1:
        raise LookupError(f"mutant {mutant.name}: {mutant.file} has {len(found)} functions {mutant.inside}")
    lines = source.splitlines(keepends=True)
    first, last = found[0].lineno - 1, found[0].end_lineno
    body = "".join(lines[first:last])
    if body.count(mutant.old) != 1:
        raise LookupError(
            f"mutant {mutant.name}: expected {mutant.old!r} once in {mutant.inside} of {mutant.file}; "
            f"it is there {body.count(mutant.old)} times"
        )
    return "".join(lines[:first]) + body.replace(mutant.old, mutant.new) + "".join(lines[last:])


def copy_package(target: Path) -> None:
    """A copy of the package in ``target``, but for the compiled library, which is linked."""
    shutil.copytree(ROOT / PACKAGE, target / PACKAGE, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (target / PACKAGE / "lib").symlink_to(ROOT / PACKAGE / "lib")


def write_mutant(mutant: Mutant, original: Path, ops: Path) -> None:
    """``ops``: a copy of the original's operators, with the change."""
    shutil.copytree(original / PACKAGE / "ops", ops, ignore=shutil.ignore_patterns("__pycache__"))
    (ops / mutant.file).write_text(mutated(mutant, original / PACKAGE / "ops"))


# ---- the process of one operator -------------------------------------------------------------------------------------
def work(op: str, route: str, jobs: list[dict[str, Any]]) -> None:
    """For each job, a folder of operators (None: as they are) and large samples, print the outcome as a line."""
    import torch
    from samples import LARGE

    import eva02_kernels
    from eva02_kernels import _launch
    from eva02_kernels._registry import get_spec
    from eva02_kernels.testing import contract, executing, nan_filled_memory

    original = Path(eva02_kernels.__file__).parent
    if original.parent != Path(os.environ["PYTHONPATH"]):
        raise RuntimeError(f"expected the package in {os.environ['PYTHONPATH']}; got {original}")
    torch.set_num_threads(1)
    _launch.force_fused = False if route == "mm" else None
    large = {name for job in jobs for name in job["large"].split()}
    with executing("interpreter"), nan_filled_memory():
        samples = [s for s in get_spec(op).samples() if not s.full and (s.id not in LARGE or s.id in large)]
        samples = [s for s in samples if not contract.refusal(op, s, torch.float32, "triton")]
        cases = [(s, torch.float32) for s in samples] + [(s, torch.bfloat16) for s in samples if s.smoke]
        for sample, dtype in cases:
            exact = contract.reference(op, sample.id, dtype)
            for kind in ("outputs", "grads"):
                for name in getattr(exact, kind):
                    contract.plain_errors(op, sample.id, dtype, name, kind)
        imported = [name for name in sys.modules if name.startswith("eva02_kernels.ops") and "triton_" in name]
        if imported:
            raise RuntimeError(f"kernels were imported before they could be changed: {imported}")

        def check(job: dict[str, Any]) -> dict[str, Any]:
            if job["ops"] is not None:
                for name, module in list(sys.modules.items()):
                    if f"{name}.".startswith("eva02_kernels.ops.") and hasattr(module, "__path__"):
                        module.__path__ = [str(Path(job["ops"], *name.split(".")[2:]))]
            passed = 0
            for sample, dtype in sorted(cases, key=lambda case: case[0].id != job["first"]):
                if sample.id in LARGE and sample.id not in job["large"].split():
                    continue
                try:
                    contract.check_accuracy(op, sample, dtype, "triton")
                except Exception as error:
                    text = " ".join(f"{type(error).__name__}: {error}".splitlines())
                    return {"sample": sample.id, "how": _kind(text), "message": text[:160]}
                passed += 1
            return {"sample": None, "passed": passed}

        limit = 900.0
        for job in jobs:
            outcome = in_fork(check, job, limit)
            print(json.dumps(outcome), flush=True)
            if job["ops"] is None:
                limit = max(TIME_LIMIT, 3 * outcome["seconds"])


def _kind(text: str) -> str:
    if text.startswith("AssertionError"):
        return "wrong result"
    if re.search(r"(load|store) outside the kernel", text):
        return "out of bounds"
    kind = next((k for k in re.findall(r"\w+(?:Error|Exception)\b", text) if k != "InterpreterError"), text)
    return f"invalid: {kind}" if kind in BROKEN else f"exception: {kind}"


def in_fork(function: Callable[[Any], dict[str, Any]], argument: Any, limit: float) -> dict[str, Any]:
    """Result of ``function`` in a fork of this process, or how that ended instead, and its seconds."""
    begin = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(function(argument)).encode())  # less than a pipe holds
        finally:
            os._exit(1)
    os.close(write)
    ready, _, _ = select.select([read], [], [], limit)
    if not ready:
        os.kill(child, signal.SIGKILL)
    text = os.read(read, 65536) if ready else b""
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if text:
        outcome = json.loads(text)
    elif not ready:
        outcome = {"sample": "?", "how": "timeout", "message": f"after {limit:.0f} s"}
    elif os.WIFSIGNALED(status):
        outcome = {"sample": "?", "how": f"crash: {signal.Signals(os.WTERMSIG(status)).name}", "message": ""}
    else:
        outcome = {"sample": "?", "how": "invalid: the process failed", "message": ""}
    return {**outcome, "seconds": round(time.monotonic() - begin, 1)}


# ---- the whole list --------------------------------------------------------------------------------------------------
def run_operator(op: str, route: str, mutants: list[Mutant], folder: Path) -> list[dict[str, Any]]:
    """Outcomes of an operator unmutated and on each mutant, in a process of its own."""
    last = {m["name"]: m["runs"] for m in json.loads(RESULTS.read_text())["mutants"]} if RESULTS.exists() else {}
    noticed = {(name, r["op"]): r["sample"] for name, runs in last.items() for r in runs}
    jobs = [{"ops": None, "large": " ".join(m.large for m in mutants), "first": None}]
    jobs += [{"ops": str(folder / m.name), "large": m.large, "first": noticed.get((m.name, op))} for m in mutants]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", __file__, "--work", op, route]
    outcomes: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(jobs))
        process.stdin.close()
        for line, name in zip(process.stdout, ("unmutated", *(m.name for m in mutants)), strict=False):
            outcome = {"op": op, "route": route or "fused", **json.loads(line)}
            outcomes.append(outcome)
            how = f"{op}-{outcome['sample']}, {outcome['how']}" if outcome["sample"] is not None else f"{op} passes"
            print(f"{name:<50} {outcome['seconds']:6.1f} s  {how}", flush=True)
            if name == "unmutated" and (outcome["sample"] is not None or not outcome["passed"]):
                process.kill()
                raise SystemExit(f"{op} does not pass as it is, so nothing can be said of mutants: {outcome}")
    if len(outcomes) != len(jobs):
        raise SystemExit(f"{op}: the process ended after {len(outcomes)} of {len(jobs)} runs")
    return outcomes


def verdict(mutant: Mutant, runs: list[dict[str, Any]]) -> dict[str, Any]:
    survived = [r["op"] for r in runs if r["sample"] is None]
    invalid = [r for r in runs if r.get("how", "").startswith("invalid")]
    if invalid:
        status = f"NO VALID CHANGE: {invalid[0]['message']}"
    elif mutant.equivalent:
        status = "equivalent" if len(survived) == len(runs) else "KILLED, but said to be equivalent"
    else:
        status = f"SURVIVED in {', '.join(survived)}" if survived else "killed"
    return {"name": mutant.name, "file": mutant.file, "function": mutant.inside, "status": status,
            **({"reason": mutant.equivalent} if mutant.equivalent else {}), "runs": runs}  # fmt: skip


def chosen(only: list[str] | None, ops: list[str] | None) -> list[Mutant]:
    found = [m for m in MUTANTS if not only or any(fnmatch.fnmatch(m.name, pattern) for pattern in only)]
    found = [m for m in found if not ops or set(ops) & set(m.ops.split())]
    if not found:
        raise SystemExit("no mutant has such a name and operator; --list shows them")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutants and their changes, run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants of these names (* and ? stand for any text)")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="run these operators only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="operators at a time (default: 1)")
    parser.add_argument("--work", nargs=2, metavar=("OP", "ROUTE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work, json.load(sys.stdin))
        return
    mutants = chosen(args.only, args.ops)
    if args.list:
        for m in mutants:
            print(f"{m.name}: {m.inside} of {m.file}\n  - {m.old!r}\n  + {m.new!r}\n  {m.equivalent or m.ops}")
        return
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for m in mutants:
        for op in m.ops.split():
            if not args.ops or op in args.ops:
                groups.setdefault((op, m.route), []).append(m)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eva02_mutants_") as name, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        copy_package(folder)
        for m in mutants:
            write_mutant(m, folder, folder / m.name)
        found = list(pool.map(lambda group: run_operator(*group[0], group[1], folder), groups.items()))
    runs: dict[str, list[dict[str, Any]]] = {m.name: [] for m in mutants}
    for group, (_, *outcomes) in zip(groups.values(), found, strict=True):
        for m, outcome in zip(group, outcomes, strict=True):
            runs[m.name].append(outcome)
    results = [verdict(m, runs[m.name]) for m in mutants]
    minutes = round((time.monotonic() - begin) / 60, 1)
    counts = {s: sum(r["status"] == s for r in results) for s in ("killed", "equivalent")}
    print(f"{len(results)} mutants in {minutes} minutes: {counts['killed']} killed, {counts['equivalent']} equivalent")
    bad = [r for r in results if r["status"] not in counts]
    for r in bad:
        print(f"  {r['name']}: {r['status']}")
    if args.json:
        write_json(args.json, minutes, [outcomes[0] for outcomes in found], results)
    raise SystemExit(1 if bad else 0)


def write_json(path: Path, minutes: float, unmutated: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    versions = {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "triton", "numpy")}}
    document = {"schema": 1, "versions": versions, "minutes": minutes, "unmutated": unmutated, "mutants": results}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
