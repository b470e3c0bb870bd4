// bias_act on the CPU: one pass over u (and gate, dh). Backward sums d_bias in the pass that writes d_u; each piece of
// rows has its own fp32 sums, added in a fixed order. The derivation is in petune_kernels/ops/bias_act.py.
#define PETUNE_FILE "bias_act.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"
#include "vec_math.h"

namespace petune::cpu::PETUNE_ISA {

struct ValueAndSlope {
  f32v value, slope;
};

// act(v) and act'(v); the compiler drops the half that is not used.
template <Act act>
PETUNE_INLINE ValueAndSlope activate(f32v v) {
  if constexpr (act == Act::gelu) {
    const Normal n = normal(v);
    return {v * n.cdf, n.cdf + v * n.density};
  } else if constexpr (act == Act::gelu_tanh) {  // (1 + tanh w) / 2 = logistic(2w)
    const f32v k = splat(1.59576912f), square = v * v;
    const Logistic s = logistic(k * v * (1.0f + 0.044715f * square));
    return {v * s.value, s.value + v * s.value * s.complement * k * (1.0f + 0.134145f * square)};
  } else if constexpr (act == Act::relu) {
    const i32v off = v <= 0.0f;  // NaN passes
    return {select(off, f32v{}, v), select(off, f32v{}, splat(1.0f))};
  } else {
    const Logistic s = logistic(v);
    return {v * s.value, s.value + v * s.value * s.complement};
  }
}

// body(std::integral_constant<Act, ...>) for the activation asked for
template <class Body>
PETUNE_INLINE void with_act(Act act, Body&& body) {
  switch (act) {
    case Act::gelu:
      return body(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_tanh:
      return body(std::integral_constant<Act, Act::gelu_tanh>{});
    case Act::relu:
      return body(std::integral_constant<Act, Act::relu>{});
    case Act::silu:
      return body(std::integral_constant<Act, Act::silu>{});
  }
}

template <Act act, class X>
void bias_act_rows(const BiasAct& a, int64_t begin, int64_t end) {
  const int64_t N = a.N, replica_rows = a.T / a.G;
  const auto bias = scratch(1, N);
  int64_t replica = -1;
  for (int64_t t = begin; t < end; ++t) {
    if (t / replica_rows != replica) {
      replica = t / replica_rows;
      expand(a.bias, a.param_dtype, replica * N, N, 0.0f, bias.get());
    }
    const X* u = static_cast<const X*>(a.u) + t * N;
    const X* gate = a.gate ? static_cast<const X*>(a.gate) + t * N : nullptr;
    X* h = static_cast<X*>(a.h) + t * N;
    for_vectors(N, [&](int64_t i, auto n) {
      f32v v = load(u + i, n);
      if (a.bias) v += load(bias.get() + i);
      v = activate<act>(v).value;
      if (gate) v *= load(gate + i, n);
      store(h + i, v, n);
    });
  }
}

// Rows [begin, end) of one replica; the sums of d_bias go to partial [N] if it is wanted.
template <Act act, class X>
void bias_act_backward_rows(const BiasActBackward& a, int64_t replica, int64_t begin, int64_t end, float* partial) {
  const int64_t N = a.N;
  const auto rows = scratch(2, N);
  float *bias = rows.get(), *dbias = bias + padded(N);
  expand(a.bias, a.param_dtype, replica * N, N, 0.0f, bias);
  std::fill(dbias, dbias + padded(N), 0.0f);
  for (int64_t t = begin; t < end; ++t) {
    const X* dh = static_cast<const X*>(a.dh) + t * N;
    const X* u = static_cast<const X*>(a.u) + t * N;
    const X* gate = a.gate ? static_cast<const X*>(a.gate) + t * N : nullptr;
    for_vectors(N, [&](int64_t i, auto n) {
      f32v v = load(u + i, n);
      if (a.bias) v += load(bias + i);
      const ValueAndSlope f = activate<act>(v);
      const f32v d = load(dh + i, n);
      if (a.dgate) store(static_cast<X*>(a.dgate) + t * N + i, d * f.value, n);
      if (a.du || a.dbias) {
        const f32v du = (gate ? d * load(gate + i, n) : d) * f.slope;
        if (a.du) store(static_cast<X*>(a.du) + t * N + i, du, n);
        if (a.dbias) store(dbias + i, load(dbias + i) + du);
      }
    });
  }
  if (a.dbias) std::memcpy(partial, dbias, N * sizeof(float));
}

inline void bias_act_forward(const BiasAct& a) {
  with_act(a.act, [&](auto act) {
    parallel(a.T, 8, [&](int64_t begin, int64_t end) {
      a.dtype == DType::bf16 ? bias_act_rows<act.value, bf16>(a, begin, end)
                             : bias_act_rows<act.value, float>(a, begin, end);
    });
  });
}

inline void bias_act_backward(const BiasActBackward& a) {
  const RowChunks chunks(a.T, a.G);
  float* partial = static_cast<float*>(a.workspace);
  with_act(a.act, [&](auto act) {
    parallel(a.G * chunks.per_replica, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t replica = piece / chunks.per_replica, chunk = piece % chunks.per_replica;
        const int64_t begin = chunks.begin(replica, chunk), end = chunks.end(replica, chunk);
        float* sums = a.dbias ? partial + piece * a.N : nullptr;
        a.dtype == DType::bf16 ? bias_act_backward_rows<act.value, bf16>(a, replica, begin, end, sums)
                               : bias_act_backward_rows<act.value, float>(a, replica, begin, end, sums);
      }
    });
  });
  if (!a.dbias) return;
  const auto row = scratch(1, a.N);
  for (int64_t replica = 0; replica < a.G; ++replica) {
    for_vectors(a.N, [&](int64_t i, auto n) {
      f32v total = {};
      for (int64_t chunk = 0; chunk < chunks.per_replica; ++chunk)
        total += load(partial + (replica * chunks.per_replica + chunk) * a.N + i, n);
      store(row.get() + i, total);
    });
    write_small(a.dbias, a.param_dtype, replica * a.N, a.N, row.get());
  }
}

}  // namespace petune::cpu::PETUNE_ISA

#else

namespace petune::cpu {

void bias_act(const BiasAct& args, Stream) { PETUNE_DISPATCH(bias_act_forward)(args); }
void bias_act_backward(const BiasActBackward& args, Stream) { PETUNE_DISPATCH(bias_act_backward)(args); }

size_t bias_act_backward_workspace(const BiasActBackward& args) {
  if (!args.dbias) return 0;
  return static_cast<size_t>(args.G * RowChunks(args.T, args.G).per_replica * args.N) * sizeof(float);
}

}  // namespace petune::cpu

#endif
