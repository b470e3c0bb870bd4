// dropout on the CPU: reads x, writes y; the mask comes from the seed. bytes: 2 * n * sizeof(X).
#define PETUNE_FILE "dropout.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"
#include "vec_math.h"

namespace petune::cpu::PETUNE_ISA {

constexpr int64_t kRun = 4096;  // elements at a time: their multipliers stay in the first-level cache

template <class X>
void dropout_runs(const Dropout& a, int64_t first_run, int64_t last_run) {
  const int64_t per_seed = a.n / a.seeds, runs = (per_seed + kRun - 1) / kRun;
  const auto buffer = scratch(1, kRun);
  const Dropper dropper(a.p);
  for (int64_t run = first_run; run < last_run; ++run) {
    const int64_t group = run / runs, first = run % runs * kRun, n = std::min(kRun, per_seed - first);
    const X* x = static_cast<const X*>(a.x) + group * per_seed + first;
    X* y = static_cast<X*>(a.y) + group * per_seed + first;
    const float* keep = dropper.multipliers(a.seed[group], first, n, buffer.get());
    for_vectors(n, [&](int64_t i, auto lanes) {
      const f32v multiplier = load(keep + i);  // a dropped inf or NaN is 0, not NaN
      store(y + i, select(multiplier > 0.0f, load(x + i, lanes) * multiplier, f32v{}), lanes);
    });
  }
}

inline void dropout_all(const Dropout& a) {
  if (a.n == 0) return;
  const int64_t runs = a.seeds * ((a.n / a.seeds + kRun - 1) / kRun);
  parallel(runs, 2, [&](int64_t begin, int64_t end) {
    a.dtype == DType::bf16 ? dropout_runs<bf16>(a, begin, end) : dropout_runs<float>(a, begin, end);
  });
}

}  // namespace petune::cpu::PETUNE_ISA

#else

namespace petune::cpu {

void dropout(const Dropout& args, Stream) { PETUNE_DISPATCH(dropout_all)(args); }

}  // namespace petune::cpu

#endif
