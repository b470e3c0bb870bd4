// Loops over torch's own thread pool, without a torch header.
#pragma once
#include <cstdint>

#include "../common/ops.h"

namespace petune::cpu {

// body(begin, end) over [0, n) in pieces of at least `grain`; at most one piece per thread.
template <class Body>
void parallel(int64_t n, int64_t grain, Body&& body) {
  if (n <= 0) return;
  parallel_for(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// How a reduction over T rows is cut: the pieces depend on T and G alone, never on the number of threads, so that the
// order of every sum is fixed. Pieces never straddle a replica.
struct RowChunks {
  int64_t per_replica, rows, replica_rows;

  // At least that many rows a piece so that partial sums stay small, at most about 64 pieces a replica.
  RowChunks(int64_t T, int64_t G, int64_t at_least = 64) : replica_rows(T / G) {
    rows = replica_rows / 64 > at_least ? (replica_rows + 63) / 64 : at_least;
    per_replica = (replica_rows + rows - 1) / rows;
  }
  int64_t begin(int64_t replica, int64_t chunk) const { return replica * replica_rows + chunk * rows; }
  int64_t end(int64_t replica, int64_t chunk) const {
    const int64_t stop = (chunk + 1) * rows;
    return replica * replica_rows + (stop < replica_rows ? stop : replica_rows);
  }
};

}  // namespace petune::cpu
