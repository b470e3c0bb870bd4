// column_sum on the CPU: each piece of rows adds eight rows pairwise, then to its sums, so that the rounding error
// grows with the number of eights; pieces are added in a fixed order. bytes: T * N * sizeof(X).
#define PETUNE_FILE "column_sum.cpp"
#include "foreach_isa.h"

#ifdef PETUNE_ISA
#include "vec.h"

namespace petune::cpu::PETUNE_ISA {

template <class X>
PETUNE_INLINE void add_row(const X* x, int64_t N, float* sums) {
  for_vectors(N, [&](int64_t i, auto n) { store(sums + i, load(sums + i, n) + load(x + i, n), n); });
}

template <class X>
void sum_rows(const X* x, int64_t rows, int64_t N, float* sums) {
  std::fill(sums, sums + N, 0.0f);
  int64_t t = 0;
  for (; t + 8 <= rows; t += 8) {
    const X* row = x + t * N;
    for_vectors(N, [&](int64_t i, auto n) {
      f32v v[8];
      for (int r = 0; r < 8; ++r) v[r] = load(row + r * N + i, n);
      for (int width = 4; width >= 1; width /= 2)
        for (int r = 0; r < width; ++r) v[r] += v[r + width];
      store(sums + i, load(sums + i, n) + v[0], n);
    });
  }
  for (; t < rows; ++t) add_row(x + t * N, N, sums);
}

// Rows narrower than kNarrow, 16 in a line so that vectors are full whatever N is: lines first, then their 16 rows.
constexpr int64_t kLine = 16, kNarrow = 64;

template <class X>
void sum_narrow_rows(const X* x, int64_t rows, int64_t N, float* sums) {
  float line[kLine * kNarrow];
  const int64_t lines = rows / kLine;
  sum_rows(x, lines, kLine * N, line);
  for (int64_t width = kLine / 2; width >= 1; width /= 2)
    for (int64_t i = 0; i < width * N; ++i) line[i] += line[width * N + i];
  std::copy(line, line + N, sums);
  for (int64_t t = lines * kLine; t < rows; ++t) add_row(x + t * N, N, sums);
}

inline void column_sum_all(const ColumnSum& a) {
  const RowChunks chunks(a.T, a.G);
  float* partial = static_cast<float*>(a.workspace);
  parallel(a.G * chunks.per_replica, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t replica = piece / chunks.per_replica, chunk = piece % chunks.per_replica;
      const int64_t begin = chunks.begin(replica, chunk), end = chunks.end(replica, chunk);
      const auto sum = [&](auto* x) {
        x += begin * a.N;
        a.N < kNarrow ? sum_narrow_rows(x, end - begin, a.N, partial + piece * a.N)
                      : sum_rows(x, end - begin, a.N, partial + piece * a.N);
      };
      a.dtype == DType::bf16 ? sum(static_cast<const bf16*>(a.x)) : sum(static_cast<const float*>(a.x));
    }
  });
  for (int64_t replica = 0; replica < a.G; ++replica)
    add_pieces(partial + replica * chunks.per_replica * a.N, chunks.per_replica, a.N, a.N, a.out + replica * a.N);
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
