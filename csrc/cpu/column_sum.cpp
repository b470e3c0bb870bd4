// column_sum on the CPU: each piece of rows adds eight rows pairwise, then to its sums, so that the rounding error
// grows with the number of eights; pieces are added in a fixed order. bytes: T * N * sizeof(X).
#define PETUNE_FILE "column_sum.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"

namespace petune::cpu::PETUNE_ISA {

template <class X>
void sum_rows(const ColumnSum& a, int64_t begin, int64_t end, float* sums) {
  const int64_t N = a.N;
  std::fill(sums, sums + N, 0.0f);
  const X* x = static_cast<const X*>(a.x);
  int64_t t = begin;
  for (; t + 8 <= end; t += 8) {
    const X* row = x + t * N;
    for_vectors(N, [&](int64_t i, auto n) {
      f32v v[8];
      for (int r = 0; r < 8; ++r) v[r] = load(row + r * N + i, n);
      for (int width = 4; width >= 1; width /= 2)
        for (int r = 0; r < width; ++r) v[r] += v[r + width];
      store(sums + i, load(sums + i, n) + v[0], n);
    });
  }
  for (; t < end; ++t)
    for_vectors(N, [&](int64_t i, auto n) { store(sums + i, load(sums + i, n) + load(x + t * N + i, n), n); });
}

inline void column_sum_all(const ColumnSum& a) {
  const RowChunks chunks(a.T, a.G);
  float* partial = static_cast<float*>(a.workspace);
  parallel(a.G * chunks.per_replica, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t replica = piece / chunks.per_replica, chunk = piece % chunks.per_replica;
      const int64_t begin = chunks.begin(replica, chunk), end = chunks.end(replica, chunk);
      a.dtype == DType::bf16 ? sum_rows<bf16>(a, begin, end, partial + piece * a.N)
                             : sum_rows<float>(a, begin, end, partial + piece * a.N);
    }
  });
  for (int64_t replica = 0; replica < a.G; ++replica)
    for_vectors(a.N, [&](int64_t i, auto n) {
      f32v total = {};
      for (int64_t chunk = 0; chunk < chunks.per_replica; ++chunk)
        total += load(partial + (replica * chunks.per_replica + chunk) * a.N + i, n);
      store(a.out + replica * a.N + i, total, n);
    });
}

}  // namespace petune::cpu::PETUNE_ISA

#else

namespace petune::cpu {

void column_sum(const ColumnSum& args, Stream) { PETUNE_DISPATCH(column_sum_all)(args); }

size_t column_sum_workspace(const ColumnSum& args) {
  return static_cast<size_t>(args.G * RowChunks(args.T, args.G).per_replica * args.N) * sizeof(float);
}

}  // namespace petune::cpu

#endif
