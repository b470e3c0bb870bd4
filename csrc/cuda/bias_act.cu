// bias_act: h = act(u + b), gated: gate * act(u + b), and its backward.
//
//   backward   v = u + b,  d_u = dh * gate * act'(v),  d_b = sum over rows d_u,  d_gate = dh * act(v)
//              One pass over dh, u (and gate); v and the activation are computed again, nothing else is saved.
//   coded      forward also writes the 8-bit code of act', backward reads it instead of u: act' = lo + step * code.
//
// act: gelu v * cdf(v), cdf(v) = (1 + erf(v / sqrt 2)) / 2, gelu' = cdf(v) + v * pdf(v); gelu_tanh with tanh(sqrt(2/pi)
// (v + 0.044715 v^3)) for the erf; relu (derivative 0 at 0); silu v * sigmoid(v). The activation is chosen per chunk by
// a branch that the whole grid takes alike; only the column sum and the code are compile-time switches, for their
// registers.
#include "columns.cuh"

namespace petune::cuda {
namespace {

// Rows in flight per thread, as many as spill no register: a code costs the forward some, and saves the backward the
// activation; byte by byte it costs more.
template <bool kVector, bool kCoded>
constexpr int kForwardRows = !kCoded   ? 4
                             : kVector ? 3
                                       : 2;
template <bool kVector, bool kCoded>
constexpr int kBackwardRows = kVector && kCoded ? 4 : 2;

struct Activated {
  float value, slope;
};

// For 16-bit rows (kFast) the hardware's exp2 and reciprocal, some 2^-22 off, are far below the rounding of the result.
// __expf and __fdividef scale their arguments around these instructions, for numbers below 2^-126: here those become 0.
__device__ __forceinline__ float fast_exp2(float v) {
#ifdef PETUNE_EMULATOR
  return std::exp2(v);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#endif
}
__device__ __forceinline__ float fast_inverse(float v) {
#ifdef PETUNE_EMULATOR
  return 1.0f / v;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#endif
}

// e^(factor * v); factor is a constant, to which log2(e) is multiplied as it compiles.
template <bool kFast>
__device__ __forceinline__ float exponential(float factor, float v) {
  return kFast ? fast_exp2(factor * 1.4426950408889634f * v) : expf(factor * v);
}
template <bool kFast>
__device__ __forceinline__ float inverse(float v) {
  return kFast ? fast_inverse(v) : 1.0f / v;
}

// What is not used of these results is not computed: everything here is inlined.
template <bool kFast>
__device__ __forceinline__ Activated gelu(float v) {
  const float e = exponential<kFast>(-0.5f, v * v);
  float cdf;
  if constexpr (kFast) {
    // erfc(x) = e^(-x^2) * polynomial in 1 / (1 + 0.3275911 x) to 1.5e-7 (Abramowitz and Stegun 7.1.26): with x =
    // |v| / sqrt 2 the exponential is the one that the slope needs, and erff would cost more than the memory traffic
    const float t = inverse<true>(1.0f + 0.23164189f * fabsf(v));
    const float poly =
        t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576014f + t * 0.530702715f))));
    const float tail = poly * e;
    cdf = v < 0.0f ? tail : 1.0f - tail;
  } else {
    cdf = 0.5f * (1.0f + erff(v * 0.70710678118654752f));
  }
  return {v * cdf, cdf + v * 0.39894228040143268f * e};
}
template <bool kFast>
__device__ __forceinline__ Activated gelu_tanh(float v) {
  // (1 + tanh y) / 2 = sigmoid(2 y)
  constexpr float k = 2.0f * 0.79788456080286536f, c = 0.044715f;
  const float s = inverse<kFast>(1.0f + exponential<kFast>(-k, v + c * v * v * v));
  return {v * s, s + v * s * (1.0f - s) * k * (1.0f + 3.0f * c * v * v)};
}
__device__ __forceinline__ Activated relu(float v) {
  // not max(v, 0): a NaN stays one, as in PyTorch
  return {v < 0.0f ? 0.0f : v, v > 0.0f ? 1.0f : 0.0f};
}
template <bool kFast>
__device__ __forceinline__ Activated silu(float v) {
  const float s = inverse<kFast>(1.0f + exponential<kFast>(-1.0f, v));
  return {v * s, s * (1.0f + v * (1.0f - s))};
}

template <typename T, typename F>
__device__ __forceinline__ void with_activation(Act act, F&& f) {
  constexpr bool kFast = sizeof(T) < 4;
  switch (act) {
    case Act::gelu:
      return f([](float v) { return gelu<kFast>(v); });
    case Act::gelu_tanh:
      return f([](float v) { return gelu_tanh<kFast>(v); });
    case Act::relu:
      return f([](float v) { return relu(v); });
    case Act::silu:
      return f([](float v) { return silu<kFast>(v); });
  }
}

// How a code and the slope it stands for follow from each other: offset and factor of whichever is wanted.
struct SlopeLine {
  float lo, scale;
};

// v = u + bias, where there is one.
template <typename T>
__device__ __forceinline__ void make_v(uint4 raw, const float (&bias)[kChunk<T>], float (&v)[kChunk<T>]) {
  unpack<T>(raw, v);
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) v[j] += bias[j];
}

template <typename T, bool kVector>
__device__ __forceinline__ void load_bias(const void* param, const Columns& columns, const ColumnPlace& at,
                                          float (&bias)[kChunk<T>]) {
  if (param != nullptr) {
    load_param<kVector, T>(param, columns.param_f32, at.g * columns.N + at.column, at.valid, bias);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) bias[j] = 0.0f;
  }
}

// scale: codes per unit of slope
template <typename T, bool kVector, bool kCoded>
__global__ void __launch_bounds__(kColumnBlock, 2) bias_act_kernel(BiasAct op, SlopeLine line, Columns columns) {
  constexpr int V = kChunk<T>, kRows = kForwardRows<kVector, kCoded>;
  const ColumnPlace at(columns, V);
  const int64_t step = static_cast<int64_t>(columns.blocks) * at.rows;
  const bool has_gate = !kCoded && op.gate != nullptr;
  float bias[V];
  load_bias<T, kVector>(op.bias, columns, at, bias);
  for (int64_t i0 = static_cast<int64_t>(at.block) * at.rows + at.row; i0 < columns.per_replica; i0 += step * kRows) {
    uint4 u[kRows], gate[kRows] = {};
    const auto offset = [&](int r) { return (at.first_row + i0 + r * step) * columns.N + at.column; };
    const auto valid = [&](int r) { return i0 + r * step < columns.per_replica ? at.valid : 0; };
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      u[r] = load<kVector>(static_cast<const T*>(op.u) + offset(r), valid(r));
      if (has_gate) gate[r] = load<kVector>(static_cast<const T*>(op.gate) + offset(r), valid(r));
    }
    with_activation<T>(op.act, [&](auto activate) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float h[V], code[V];
        make_v<T>(u[r], bias, h);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Activated f = activate(h[j]);
          h[j] = f.value;
          code[j] = (f.slope - line.lo) * line.scale;
        }
        if constexpr (kCoded) store_bytes<kVector>(op.code + offset(r), valid(r), code);
        if (has_gate) {
          float wide_gate[V];
          unpack<T>(gate[r], wide_gate);
#pragma unroll
          for (int j = 0; j < V; ++j) h[j] *= wide_gate[j];
        }
        store<kVector>(static_cast<T*>(op.h) + offset(r), valid(r), h);
      }
    });
  }
}

// scale: slope per code
template <typename T, bool kVector, bool kBias, bool kCoded>
__global__ void __launch_bounds__(kColumnBlock, 2)
    bias_act_backward_kernel(BiasActBackward op, SlopeLine line, Columns columns, ColumnSums sums) {
  constexpr int V = kChunk<T>, kRows = kBackwardRows<kVector, kCoded>;
  const ColumnPlace at(columns, V);
  const int64_t step = static_cast<int64_t>(columns.blocks) * at.rows;
  const bool want_slope = kBias || op.du != nullptr;
  const bool want_gate = !kCoded && want_slope && op.gate != nullptr;  // d_gate alone does not read the gate
  float bias[V], sum[V] = {};
  load_bias<T, kVector>(kCoded ? nullptr : op.bias, columns, at, bias);
  for (int64_t i0 = static_cast<int64_t>(at.block) * at.rows + at.row; i0 < columns.per_replica; i0 += step * kRows) {
    uint4 dh[kRows], u[kRows], gate[kRows] = {};
    uint2 code[kRows];
    const auto offset = [&](int r) { return (at.first_row + i0 + r * step) * columns.N + at.column; };
    const auto valid = [&](int r) { return i0 + r * step < columns.per_replica ? at.valid : 0; };
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      dh[r] = load<kVector>(static_cast<const T*>(op.dh) + offset(r), valid(r));
      if constexpr (kCoded)
        code[r] = load_bytes<kVector, V>(op.code + offset(r), valid(r));
      else
        u[r] = load<kVector>(static_cast<const T*>(op.u) + offset(r), valid(r));
      if (want_gate) gate[r] = load<kVector>(static_cast<const T*>(op.gate) + offset(r), valid(r));
    }
    // activate(v), of v = u + bias or of the code
    const auto finish_rows = [&](auto activate) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[V], wide_dh[V];
        if constexpr (kCoded)
          unpack_bytes(code[r], v);
        else
          make_v<T>(u[r], bias, v);
        unpack<T>(dh[r], wide_dh);
        if (!kCoded && op.dgate != nullptr) {
          float d[V];
#pragma unroll
          for (int j = 0; j < V; ++j) d[j] = wide_dh[j] * activate(v[j]).value;
          store<kVector>(static_cast<T*>(op.dgate) + offset(r), valid(r), d);
        }
        if (!want_slope) continue;
        if (want_gate) {
          float wide_gate[V];
          unpack<T>(gate[r], wide_gate);
#pragma unroll
          for (int j = 0; j < V; ++j) wide_dh[j] *= wide_gate[j];
        }
        // rows past the end have dh = 0 and a finite slope: they add 0
#pragma unroll
        for (int j = 0; j < V; ++j) wide_dh[j] *= activate(v[j]).slope;
        if (op.du != nullptr) store<kVector>(static_cast<T*>(op.du) + offset(r), valid(r), wide_dh);
        if constexpr (kBias) {
#pragma unroll
          for (int j = 0; j < V; ++j) sum[j] += wide_dh[j];
        }
      }
    };
    if constexpr (kCoded)
      finish_rows([&](float code) { return Activated{0.0f, line.lo + line.scale * code}; });
    else
      with_activation<T>(op.act, finish_rows);
  }
  if constexpr (kBias) finish_slab<T>(sums, 0, columns, at, sum);
}

template <typename T, bool kCoded>
auto backward_kernel(bool vector, bool dbias) {
  if (dbias)
    return vector ? bias_act_backward_kernel<T, true, true, kCoded> : bias_act_backward_kernel<T, false, true, kCoded>;
  return vector ? bias_act_backward_kernel<T, true, false, kCoded> : bias_act_backward_kernel<T, false, false, kCoded>;
}

struct Plan {
  Columns columns;
  ColumnSums sums;
  size_t workspace;
};

Plan plan_backward(const BiasActBackward& op) {
  Plan plan{};
  const int N = checked_width(op.N, "bias_act_backward");
  if (op.T == 0 || N == 0) return plan;
  const int chunk = static_cast<int>(16 / dtype_size(op.dtype)), per_sm = op.dbias != nullptr ? 4 : 16;
  const int rows = op.code != nullptr ? kBackwardRows<true, true> : kBackwardRows<true, false>;
  plan.columns = make_columns(op.T, op.G, N, chunk, rows, multiprocessors() * int64_t{per_sm}, op.param_dtype);
  void* const out[kMaxSums] = {op.dbias, nullptr, nullptr};
  if (op.dbias != nullptr)
    plan.workspace = ColumnSums::plan(plan.sums, op.workspace, op.G, op.G * plan.columns.slabs, plan.columns.blocks, N,
                                      out, plan.columns.param_f32);
  return plan;
}

}  // namespace

void bias_act(const BiasAct& op, Stream stream_handle) {
  const int N = checked_width(op.N, "bias_act");
  if (op.T == 0 || N == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_dtype(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vector = N % kChunk<T> == 0 && aligned16(op.u, op.bias, op.gate, op.h, op.code);
    const int rows = op.code != nullptr ? kForwardRows<true, true> : kForwardRows<true, false>;
    const Columns columns =
        make_columns(op.T, op.G, N, kChunk<T>, rows, multiprocessors() * int64_t{16}, op.param_dtype);
    const auto kernel = op.code != nullptr
                            ? (vector ? bias_act_kernel<T, true, true> : bias_act_kernel<T, false, true>)
                            : (vector ? bias_act_kernel<T, true, false> : bias_act_kernel<T, false, false>);
    const SlopeCode code = slope_code(op.act);
    const SlopeLine line{static_cast<float>(code.lo), static_cast<float>(1.0 / code.step)};
    PETUNE_LAUNCH(kernel, grid_of(columns, op.G, "bias_act"), kColumnBlock, 0, stream, op, line, columns);
  });
  check_launch("bias_act");
}

size_t bias_act_backward_workspace(const BiasActBackward& op) {
  BiasActBackward counted = op;
  counted.workspace = nullptr;
  return plan_backward(counted).workspace;
}

void bias_act_backward(const BiasActBackward& op, Stream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (op.T == 0 || op.N == 0) {
    if (op.dbias != nullptr && op.G * op.N > 0)
      check(cudaMemsetAsync(op.dbias, 0, op.G * op.N * dtype_size(op.param_dtype), stream), "cudaMemsetAsync");
    return;
  }
  if (op.du == nullptr && op.dbias == nullptr && op.dgate == nullptr) return;
  const Plan plan = plan_backward(op);
  plan.sums.start("bias_act_backward", stream);
  with_dtype(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vector = op.N % kChunk<T> == 0 && aligned16(op.dh, op.u, op.bias, op.gate, op.code, op.du, op.dgate);
    const auto kernel = op.code != nullptr ? backward_kernel<T, true>(vector, op.dbias != nullptr)
                                           : backward_kernel<T, false>(vector, op.dbias != nullptr);
    const SlopeCode code = slope_code(op.act);
    const SlopeLine line{static_cast<float>(code.lo), static_cast<float>(code.step)};
    PETUNE_LAUNCH(kernel, grid_of(plan.columns, op.G, "bias_act_backward"), kColumnBlock, 0, stream, op, line,
                  plan.columns, plan.sums);
  });
  check_launch("bias_act_backward");
}

}  // namespace petune::cuda
