// The exchange over MPI_Alltoallv: one call from Python for any number of operations in a row.
#include <mpi.h>

#include <utility>
#include <vector>

#include "exchange.h"

namespace {

// Sends rows of `bytes` as the counts of the exchange say; back: the other way.
void all_to_all(const Exchange& e, const void* send, void* recv, int64_t bytes, bool back) {
  std::vector<int> numbers(4 * e.ranks);
  int *send_n = numbers.data(), *send_at = send_n + e.ranks, *recv_n = send_at + e.ranks, *recv_at = recv_n + e.ranks;
  for (int64_t r = 0, sent = 0, received = 0; r < e.ranks; ++r) {
    send_at[r] = static_cast<int>(sent);
    recv_at[r] = static_cast<int>(received);
    sent += send_n[r] = static_cast<int>(e.send_count(r)[0]);
    received += recv_n[r] = static_cast<int>(e.recv_count(r)[0]);
  }
  if (back) {
    std::swap(send_n, recv_n);
    std::swap(send_at, recv_at);
  }
  MPI_Datatype row;
  MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &row);
  MPI_Type_commit(&row);
  MPI_Alltoallv(send, send_n, send_at, row, recv, recv_n, recv_at, row, MPI_COMM_WORLD);
  MPI_Type_free(&row);
}

int64_t dispatch(const Exchange& e, const void* x, const int64_t* ids, const float* weights) {
  exchange_pack(&e, x, ids, weights);
  const int counts = static_cast<int>(1 + e.local_experts());
  MPI_Alltoall(e.send_counts, counts, MPI_INT64_T, e.recv_counts, counts, MPI_INT64_T, MPI_COMM_WORLD);
  if (e.merge) all_to_all(e, e.send_meta, e.recv_meta, e.meta_bytes(), false);
  all_to_all(e, e.send_rows, e.recv_rows, e.row_bytes(), false);
  return exchange_unpack(&e);
}

void combine(const Exchange& e, const void* y, void* out) {
  if (e.expand) exchange_pack_back(&e, y);
  all_to_all(e, e.expand ? e.recv_rows : y, e.send_rows, e.row_bytes(), true);
  exchange_unpack_back(&e, out);
}

}  // namespace

extern "C" {

void mpi_start() { MPI_Init(nullptr, nullptr); }

void mpi_stop() { MPI_Finalize(); }

// `times` times exchange_pack, the all-to-all, exchange_unpack; returns N.
int64_t mpi_dispatch(const Exchange* exchange, const void* x, const int64_t* ids, const float* weights, int64_t times) {
  int64_t N = 0;
  for (int64_t i = 0; i < times; ++i) N = dispatch(*exchange, x, ids, weights);
  return N;
}

// `times` times the way back for y [N, H], into out [T, H].
void mpi_combine(const Exchange* exchange, const void* y, void* out, int64_t times) {
  for (int64_t i = 0; i < times; ++i) combine(*exchange, y, out);
}
}
