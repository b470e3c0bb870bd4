// C functions over the CUDA backend, for ctypes. Each takes an op's struct of ops.h and returns an error message, or
// null. A backward gets a workspace full of NaN and runs `runs` times on it.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../../csrc/common/ops.h"

namespace {

template <typename F>
const char* guarded(F&& f) {
  static std::string message;
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// Column sums become NaN again, so that a run which leaves them alone is seen.
void spoil(void* sum, int64_t n, petune::DType dtype) {
  if (sum != nullptr) std::memset(sum, 0xff, n * (dtype == petune::DType::f32 ? 4 : 2));
}
void spoil(const petune::ResidualNormBackward& op) {
  for (void* sum : {op.dgamma, op.dbeta, op.dbias}) spoil(sum, op.G * op.H, op.param_dtype);
}
void spoil(const petune::BiasActBackward& op) { spoil(op.dbias, op.G * op.N, op.param_dtype); }
void spoil(const petune::ColumnSum& op) { spoil(op.out, op.G * op.N, petune::DType::f32); }

template <typename Op>
void with_workspace(Op op, int runs, size_t (*size)(const Op&), void (*run)(const Op&, petune::Stream)) {
  const size_t bytes = size(op);
  void* memory = nullptr;
  // exactly as long as asked, so that AddressSanitizer sees its end
  if (bytes > 0 && posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  if (bytes > 0) std::memset(memory, 0xff, bytes);
  op.workspace = memory;
  for (int i = 0; i < runs; ++i) {
    spoil(op);
    run(op, nullptr);
  }
}

}  // namespace

using namespace petune;

extern "C" {

const char* petune_residual_norm(const ResidualNorm* op) {
  return guarded([&] { cuda::residual_norm(*op, nullptr); });
}
const char* petune_residual_norm_backward(const ResidualNormBackward* op, int runs) {
  return guarded(
      [&] { with_workspace(*op, runs, &cuda::residual_norm_backward_workspace, &cuda::residual_norm_backward); });
}
const char* petune_bias_act(const BiasAct* op) {
  return guarded([&] { cuda::bias_act(*op, nullptr); });
}
const char* petune_bias_act_backward(const BiasActBackward* op, int runs) {
  return guarded([&] { with_workspace(*op, runs, &cuda::bias_act_backward_workspace, &cuda::bias_act_backward); });
}
const char* petune_column_sum(const ColumnSum* op, int runs) {
  return guarded([&] { with_workspace(*op, runs, &cuda::column_sum_workspace, &cuda::column_sum); });
}
const char* petune_column_sum_without_workspace(const ColumnSum* op) {
  return guarded([&] { cuda::column_sum(*op, nullptr); });
}
const char* petune_dropout(const Dropout* op) {
  return guarded([&] { cuda::dropout(*op, nullptr); });
}

// The callers' ctypes structures must be these.
int petune_sizeof(const char* name) {
  const std::string op = name;
  return op == "ResidualNorm"           ? sizeof(ResidualNorm)
         : op == "ResidualNormBackward" ? sizeof(ResidualNormBackward)
         : op == "BiasAct"              ? sizeof(BiasAct)
         : op == "BiasActBackward"      ? sizeof(BiasActBackward)
         : op == "ColumnSum"            ? sizeof(ColumnSum)
         : op == "Dropout"              ? sizeof(Dropout)
                                        : -1;
}
}
