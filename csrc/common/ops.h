// The interface between bindings.cpp and the kernels: one struct of plain pointers per op, the same for the CPU and
// CUDA. No torch header here or in any kernel file, so kernels compile in seconds and run in tests without torch.
//
// Shapes as in petune_kernels/schema.py. All tensors are contiguous (attention: strides given). A null output pointer
// means "not wanted": the kernel computes nothing for it. A null input pointer means "not there".
#pragma once
#include <cstddef>
#include <cstdint>

namespace petune {

enum class DType : int { f32, bf16, f16 };
enum class Act : int { gelu, gelu_tanh, relu, silu };
enum Shared : int { kSharedBias = 1, kSharedGamma = 2, kSharedBeta = 4 };

// The 8-bit code of act': code c stands for act' = lo + step * c. Derived in petune_kernels/reference.py.
struct SlopeCode {
  double lo, step;
};
constexpr SlopeCode slope_code(Act act) {
  if (act == Act::relu) return {0.0, 1.0};  // act' is 0 or 1, its own code
  const double lo = act == Act::gelu        ? -0.12890414518515479
                    : act == Act::gelu_tanh ? -0.12899306865877177
                                            : -0.09983932012886692;
  return {lo, (1.0 - 2.0 * lo) / 255.0};
}

struct ResidualNorm {
  int64_t T, H, G;           // rows, width, replicas of the small parameters
  int64_t seeds;             // elements of seed: 1 or G
  DType dtype, param_dtype;  // of x, residual, y, z, xhat; of bias, gamma, beta
  const void *x, *bias, *residual, *gamma, *beta;
  const int64_t* seed;  // null: no dropout
  double p, eps;
  bool rms;
  void *y, *z, *xhat;  // z, xhat may be null
  float* rstd;         // [T]
  int shared;          // bits of Shared: parameters that are [H] though G > 1, one for all replicas
};

struct ResidualNormBackward {
  int64_t T, H, G, seeds;
  DType dtype, param_dtype;
  const void *dy, *dz, *row;  // dz may be null
  const float* rstd;
  const void* gamma;  // may be null
  const int64_t* seed;
  double p;
  bool rms, row_is_z;            // row holds z, or xhat
  void *dresidual, *dx;          // [T, H]: gradient of z, and of x behind the dropout; either may be null
  void *dbias, *dgamma, *dbeta;  // [G, H] in param_dtype; each may be null
  void* workspace;               // residual_norm_backward_workspace bytes, of any contents
  int shared;                    // as above; such a parameter has no gradient here
};

struct BiasAct {
  int64_t T, N, G;
  DType dtype, param_dtype;
  const void *u, *bias, *gate;  // bias, gate may be null
  Act act;
  void* h;
  uint8_t* code;  // [T, N]: the code of act' (bias_act_coded, which has no gate); null: not wanted
};

struct BiasActBackward {
  int64_t T, N, G;
  DType dtype, param_dtype;
  const void *dh, *u, *bias, *gate;
  const uint8_t* code;  // bias_act_coded_backward: there instead of u, bias and gate, and without d_gate; else null
  Act act;
  void *du, *dbias, *dgate;  // each may be null
  void* workspace;
};

struct ColumnSum {
  int64_t T, N, G;
  DType dtype;
  const void* x;
  float* out;  // [G, N]
  void* workspace;
};

struct Dropout {
  int64_t n, seeds;  // elements in all, elements of seed; n % seeds == 0
  DType dtype;
  const void* x;
  const int64_t* seed;
  double p;
  void* y;
};

// q, do, o, dq [B, h, S, D]; k, v, dk, dv [B, h, K, D]; strides in elements of batch, head, row; the last is 1.
struct Strides {
  int64_t b, h, s;
};

struct Attention {
  int64_t B, h, S, K, D;
  DType dtype;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides, o_strides;
  const void* mask;  // additive, in dtype, broadcast by zero strides; null: none
  int64_t mask_strides[4];
  const int64_t* seed;  // element index ((b * h + head) * S + row) * K + column, b counted within the batch of its seed
  int64_t seeds;        // elements of seed: 1 or G, which divides B
  double p, scale;
  bool causal;  // row i sees columns up to i + K - S
  void* o;      // 0 in a row that sees nothing; unused in backward
};

struct AttentionBackward {
  Attention forward;
  const void* d_o;
  Strides do_strides, dq_strides, dk_strides, dv_strides;
  void *dq, *dk, *dv;
};

struct LoraAdapter {
  int64_t T, K, N, r, G, seeds;
  DType dtype, param_dtype;        // of x, y; of a, b, bias_b
  const void *x, *a, *b, *bias_b;  // [T, K], [G, r, K], [G, N, r], [G, N]; bias_b may be null
  const int64_t* seed;             // null: no dropout
  double p, scale;
  void* y;  // [T, N], added to
};

struct LoraAdapterBackward {
  int64_t T, K, N, r, G, seeds;
  DType dtype, param_dtype;
  const void *dy, *x, *a, *b;  // x may be null where neither da nor db is wanted
  const int64_t* seed;
  double p, scale;
  void *dx, *da, *db;  // dx [T, K] is added to; each may be null
  void* workspace;     // lora_adapter_backward_workspace bytes
};

using Stream = void*;  // cudaStream_t; unused on the CPU

#define PETUNE_DECLARE_OPS                                              \
  void residual_norm(const ResidualNorm&, Stream);                      \
  void residual_norm_backward(const ResidualNormBackward&, Stream);     \
  size_t residual_norm_backward_workspace(const ResidualNormBackward&); \
  void bias_act(const BiasAct&, Stream);                                \
  void bias_act_backward(const BiasActBackward&, Stream);               \
  size_t bias_act_backward_workspace(const BiasActBackward&);           \
  void column_sum(const ColumnSum&, Stream);                            \
  size_t column_sum_workspace(const ColumnSum&);                        \
  void dropout(const Dropout&, Stream);

namespace cpu {
PETUNE_DECLARE_OPS
void attention(const Attention&);
void attention_backward(const AttentionBackward&);
void lora_adapter(const LoraAdapter&);
void lora_adapter_backward(const LoraAdapterBackward&);
size_t lora_adapter_backward_workspace(const LoraAdapterBackward&);

// Runs body(context, begin, end) over [0, n) on torch's own thread pool; defined in bindings.cpp.
void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
int max_threads();
}  // namespace cpu

namespace cuda {
PETUNE_DECLARE_OPS
}  // namespace cuda

}  // namespace petune
