// bias_act on the CPU: one pass over u (and gate, dh). Backward sums d_bias in the pass that writes d_u; each piece of
// rows has its own fp32 sums, added in a fixed order. The derivation is in petune_kernels/ops/bias_act.py. `coded`: the
// forward also writes the 8-bit code of act', and the backward reads that instead of u.
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
template <Act act, class X>
PETUNE_INLINE ValueAndSlope activate(f32v v) {
  if constexpr (act == Act::gelu) {
    const Normal n = normal<X>(v);
    return {v * n.cdf, n.cdf + v * n.density};
  } else if constexpr (act == Act::gelu_tanh) {  // (1 + tanh w) / 2 = logistic(2w)
    const f32v k = splat(1.59576912f), square = v * v;
    const Logistic s = logistic<X>(k * v * (1.0f + 0.044715f * square));
    return {v * s.value, s.value + v * s.value * s.complement * k * (1.0f + 0.134145f * square)};
  } else if constexpr (act == Act::relu) {
    const i32v off = v <= 0.0f;  // NaN passes
    return {select(off, f32v{}, v), select(off, f32v{}, splat(1.0f))};
  } else {
    const Logistic s = logistic<X>(v);
    return {v * s.value, s.value + v * s.value * s.complement};
  }
}

// body(act, X{}, coded) for what the call asks for; act and coded are integral constants
template <class Op, class Body>
PETUNE_INLINE void with_kernel(const Op& a, Body&& body) {
  const auto with_act = [&](auto x, auto coded) {
    switch (a.act) {
      case Act::gelu:
        return body(std::integral_constant<Act, Act::gelu>{}, x, coded);
      case Act::gelu_tanh:
        return body(std::integral_constant<Act, Act::gelu_tanh>{}, x, coded);
      case Act::relu:
        return body(std::integral_constant<Act, Act::relu>{}, x, coded);
      case Act::silu:
        return body(std::integral_constant<Act, Act::silu>{}, x, coded);
    }
  };
  const auto with_coded = [&](auto x) { a.code ? with_act(x, std::true_type{}) : with_act(x, std::false_type{}); };
  a.dtype == DType::bf16 ? with_coded(bf16{}) : with_coded(float{});
}

template <Act act, class X, bool coded>
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
      const ValueAndSlope f = activate<act, X>(v);
      store(h + i, gate ? f.value * load(gate + i, n) : f.value, n);
      if constexpr (coded) {
        constexpr SlopeCode line = slope_code(act);
        constexpr float lo = line.lo, per_step = 1.0 / line.step;
        store(a.code + t * N + i, (f.slope - lo) * per_step, n);
      }
    });
  }
}

// Rows [begin, end) of one replica; the sums of d_bias go to partial [N] if it is wanted.
template <Act act, class X, bool coded>
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
      ValueAndSlope f;
      if constexpr (coded) {
        constexpr SlopeCode line = slope_code(act);
        constexpr float lo = line.lo, step = line.step;
        f = {f32v{}, load(a.code + t * N + i, n) * step + lo};
      } else {
        f32v v = load(u + i, n);
        if (a.bias) v += load(bias + i);
        f = activate<act, X>(v);
      }
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
  with_kernel(a, [&](auto act, auto x, auto coded) {
    parallel(a.T, 8,
             [&](int64_t begin, int64_t end) { bias_act_rows<act.value, decltype(x), coded.value>(a, begin, end); });
  });
}

inline void bias_act_backward(const BiasActBackward& a) {
  const RowChunks chunks(a.T, a.G);
  float* partial = static_cast<float*>(a.workspace);
  with_kernel(a, [&](auto act, auto x, auto coded) {
    parallel(a.G * chunks.per_replica, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t replica = piece / chunks.per_replica, chunk = piece % chunks.per_replica;
        const int64_t begin = chunks.begin(replica, chunk), end = chunks.end(replica, chunk);
        float* sums = a.dbias ? partial + piece * a.N : nullptr;
        bias_act_backward_rows<act.value, decltype(x), coded.value>(a, replica, begin, end, sums);
      }
    });
  });
  if (!a.dbias) return;
  const auto row = scratch(1, a.N);
  for (int64_t replica = 0; replica < a.G; ++replica) {
    add_pieces(partial + replica * chunks.per_replica * a.N, chunks.per_replica, a.N, a.N, row.get());
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
