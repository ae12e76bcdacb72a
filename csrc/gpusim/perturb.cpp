// numerics="perturb": what a GPU may do otherwise than PTX's text says, or may round otherwise: approximate functions
// move within PTX's stated error, and unrounded products are fused with the sums that take them (ptxas does).
// Source of the errors: PTX ISA 8.8, section 9.7.3, the tables of each approximate function.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

// Largest error of the float32 functions against the exact value: relative, absolute, in units of the last place.
struct Error {
  double relative, absolute, ulps;
};

const Error* error_of(const Instruction& in) {
  static const std::map<std::string, Error> errors = {
      {"ex2", {0x1p-22, 0, 0}},  {"rcp", {0x1p-23, 0, 0}},  {"rsqrt", {0x1.12p-23, 0, 0}},  // 2^-22.9
      {"sqrt", {0x1p-23, 0, 0}}, {"lg2", {0, 0x1p-22, 0}},  {"sin", {0, 0x1p-21, 0}},
      {"cos", {0, 0x1p-21, 0}},  {"tanh", {0x1p-11, 0, 0}}, {"div", {0, 0, 2}}};
  const bool approximate = in.has("approx") || (in.opcode == "div" && in.has("full"));
  const auto it = errors.find(in.opcode);
  return approximate && in.last() == "f32" && it != errors.end() ? &it->second : nullptr;
}

u64 mix(u64 x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

// Moved by a part of the error that follows from the seed, the place and the value: the same call gives the same again.
void approximate(Warp& w, const Op& op, u32 mask) {
  op.unperturbed(w, op, mask);
  const Program& p = w.cta->program;
  const Error error = *error_of(*p.instruction(op.index));
  float* d = w.reg<float>(op, 0);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1) || !std::isfinite(d[l]) || d[l] == 0) continue;
    const u64 dice = mix(p.perturbation ^ static_cast<u64>(op.index) << 32 ^ bits_as<u32>(d[l]));
    const double part = static_cast<double>(static_cast<i64>(dice)) * 0x1p-63;  // in [-1, 1)
    const double ulp = std::ldexp(1.0, std::ilogb(d[l]) - 23);
    const double most = error.relative * std::fabs(d[l]) + error.absolute + error.ulps * ulp;
    // Half a unit is spent by the rounding of what is moved here, which is the exact value's nearest.
    const float moved = static_cast<float>(d[l] + part * std::max(most - ulp / 2, 0.0));
    if (std::isfinite(moved) && (moved < 0) == (d[l] < 0)) d[l] = moved;
  }
}

}  // namespace

void perturb(Op& op, const Instruction& in) {
  if (op.exec == nullptr || error_of(in) == nullptr) return;
  op.unperturbed = op.exec;
  op.exec = &approximate;
}

std::vector<Instruction> fuse_products(const Function& function) {
  const std::vector<Instruction>& body = function.body;
  std::vector<Instruction> out = body;
  std::set<size_t> labels;
  for (const auto& [name, at] : function.labels) labels.insert(static_cast<size_t>(at));
  const auto plain = [](const Instruction& in, const char* opcode) {
    return in.opcode == opcode && in.guard.empty() && in.modifiers == std::vector<std::string>{"f32"} &&
           in.operands.size() == (in.opcode == "mul" || in.opcode == "add" || in.opcode == "sub" ? 3u : 0u);
  };
  std::map<std::string, size_t> products;  // register -> the product that it holds
  for (size_t i = 0; i < body.size(); ++i) {
    const Instruction& in = body[i];
    if (labels.count(i)) products.clear();
    const bool leaves = in.opcode == "bra" || in.opcode == "ret" || in.opcode == "exit" || in.opcode == "call";
    for (int side = 0; plain(in, "add") && side < 2; ++side) {
      const auto product = products.find(in.operands[static_cast<size_t>(1 + side)].name);
      if (in.operands[static_cast<size_t>(1 + side)].kind != Operand::kName || product == products.end()) continue;
      Instruction& fused = out[i];
      fused.opcode = "fma";
      fused.modifiers = {"rn", "f32"};
      const Operand other = in.operands[static_cast<size_t>(2 - side)];
      fused.operands = {in.operands[0], body[product->second].operands[1], body[product->second].operands[2], other};
      break;
    }
    // What is overwritten holds no product any more, nor do products of it have their factors.
    const auto forget = [&](const std::string& name) {
      std::erase_if(products, [&](const auto& item) {
        const auto& factors = body[item.second].operands;
        return item.first == name || factors[1].name == name || factors[2].name == name;
      });
    };
    for (const Operand& o : in.operands.empty() ? std::vector<Operand>{} : std::vector<Operand>{in.operands[0]}) {
      forget(o.name);
      for (const Operand& e : o.list) forget(e.name);
    }
    if (plain(in, "mul") && in.operands[0].name != in.operands[1].name && in.operands[0].name != in.operands[2].name)
      products[in.operands[0].name] = i;
    if (leaves) products.clear();
  }
  return out;
}

}  // namespace gpusim
