// project_rope: A B + bias with the heads of q and k rotated by the angles of their token's patch
// Fused     bias, table look-up, rotation, concatenation with the prefix (eager: 13 passes over half-tensors)
// Bytes     as project: nothing is read or written for the rotation but its table
// Launch    product.cuh; an epilogue's 8 columns are 4 rotation pairs, of one head or two
// Numerics  float32 sums, bias and rotation, one rounding
// Limits    A (rows, K), B (N, K); interleaved pairs, a head dim in multiples of 4
// Source    original; Su et al., arXiv:2104.09864; EVA-02, arXiv:2303.11331
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

template <class T>
struct ProjectRope {
  using Params = ProjectRopeParams;
  static constexpr bool kDual = false, kSums = false, kRowSums = false, kWholeWarps = false;
  const Params& p;
  int column, n;
  float bias[kColumns];

  __device__ ProjectRope(const Params& p, int column, int n) : p(p), column(column), n(n) {
    load_columns(p.bias, column, n, 0.f, bias);
  }
  __device__ void operator()(int row, float (&y)[kColumns], float (&)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] += bias[i];
    const int head_dim = static_cast<int>(p.rope.head_dim), quarter = head_dim / 4;
    const auto tokens = static_cast<uint32_t>(p.seq_len), sample = static_cast<uint32_t>(row) / tokens;
    // A head ends at a multiple of 4 columns: two pairs are of one head, and all four where it is a multiple of 8.
    RopeAngles angles;
    bool rotated = false;
#pragma unroll
    for (int two = 0; two < kColumns; two += 4) {
      const int c = column + two;
      if (two == 0 || head_dim % kColumns != 0) {
        const int head = c / head_dim, heads = static_cast<int>(p.heads);
        rotated = c < p.rotated && two < n &&
                  rope_angles(p.rope, sample, row - sample * tokens, head < heads ? head : head - heads, angles);
      }
      if (!rotated) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pair = c % head_dim / 2 + i;
        const bool second = pair >= quarter;
        const int at = second ? pair - quarter : pair;
        const float cos = (second ? angles.cos[1] : angles.cos[0])[at];
        const float sin = (second ? angles.sin[1] : angles.sin[0])[at];
        const float a = y[two + 2 * i], b = y[two + 2 * i + 1];
        y[two + 2 * i] = a * cos - b * sin;
        y[two + 2 * i + 1] = b * cos + a * sin;
      }
    }
    store_columns(static_cast<T*>(p.out) + row * p.out_stride + column, n, y);
  }
};

}  // namespace

const char* run_project_rope(const ProjectRopeParams& p, const Device& device) {
  return by_dtype(p.product.dtype,
                  [&]<class T>() { return run_product<T, true, true, ProjectRope>(p, nullptr, device); });
}

}  // namespace eva02::cuda
