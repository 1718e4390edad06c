// get_dispatch_layout: every block counts its share of the tokens, and adds its counts to the results. Ids that are not
// 0 to E-1 count as -1.
#include "kernel.h"

namespace deep_ep {

class GetDispatchLayout {
 public:
  __aicore__ GetDispatchLayout() {}
  __aicore__ void init(GM_ADDR topk_idx, GM_ADDR num_tokens_per_rank, GM_ADDR num_tokens_per_rdma_rank,
                       GM_ADDR num_tokens_per_expert, GM_ADDR is_token_in_rank, GM_ADDR workspace,
                       const Tiling& tiling) {
    tiling_ = &tiling;
    per_rank_ = num_tokens_per_rank;
    per_node_ = num_tokens_per_rdma_rank;
    per_expert_ = num_tokens_per_expert;
    in_rank_ = is_token_in_rank;
    ids_.init(pipe_, tiling, topk_idx);
    numbers_.init(pipe_, tiling, workspace);
    tokens_.init(pipe_, tiling.work.nodes);
    rows_.init(pipe_, tiling.chunk_tokens * tiling.work.ranks);
  }

  __aicore__ void process() {
    const Work& work = tiling_->work;
    clear(tokens_, work.nodes);
    if (GetBlockIdx() == 0) clear_results();

    for (Chunk chunk = own_tokens(*tiling_, 0, tiling_->tokens); chunk.any(); chunk.next()) count(chunk);

    all_blocks();  // the results are 0
    SetAtomicAdd<int32_t>();
    store(per_expert_, numbers_.next().tensor(), work.experts);
    store(per_rank_, numbers_.next().tensor()[static_cast<uint32_t>(tiling_->table_ranks)], work.ranks);
    store(per_node_, tokens_.tensor(), work.nodes);
    SetAtomicNone();
  }

 private:
  __aicore__ void clear_results() {
    clear(numbers_.total(), tiling_->table_words);
    order<HardEvent::V_MTE3>();
    store(per_expert_, numbers_.total().tensor(), tiling_->work.experts);
    store(per_rank_, numbers_.total().tensor(), tiling_->work.ranks);
    store(per_node_, numbers_.total().tensor(), tiling_->work.nodes);
  }

  __aicore__ void count(const Chunk& chunk) {
    const Work& work = tiling_->work;
    order<HardEvent::S_MTE2>();
    ids_.load(chunk);
    order<HardEvent::MTE2_S>();
    order<HardEvent::MTE3_V>();
    clear(rows_, chunk.count() * work.ranks);
    order<HardEvent::V_S>();
    const int32_t ranks_per_node = static_cast<int32_t>(work.ranks / work.nodes);
    for (int64_t i = 0; i < chunk.count(); ++i) {
      numbers_.next_token();
      for (int64_t k = 0; k < work.top_k; ++k) {
        const int64_t id = ids_.get(i, k);
        if (id < 0 || id >= work.experts) continue;
        const int32_t expert = static_cast<int32_t>(id), rank = numbers_.rank_of(expert);
        numbers_.of_expert(expert);
        if (!numbers_.is_new(rank)) continue;
        numbers_.of_rank(rank);
        rows_.set(i * work.ranks + rank, 1);
        const int32_t node = rank / ranks_per_node;
        if (numbers_.is_new(static_cast<int32_t>(work.ranks) + node)) tokens_.set(node, tokens_.get(node) + 1);
      }
    }
    order<HardEvent::S_MTE3>();
    store(in_rank_ + chunk.first * work.ranks * sizeof(int32_t), rows_.tensor(), chunk.count() * work.ranks);
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR per_rank_ = nullptr;
  GM_ADDR per_node_ = nullptr;
  GM_ADDR per_expert_ = nullptr;
  GM_ADDR in_rank_ = nullptr;
  TPipe pipe_;
  TokenValues<int64_t> ids_;
  Numbers numbers_;
  Table tokens_;  // by node
  Table rows_;    // whether a token goes to a rank, of a chunk
};

}  // namespace deep_ep

extern "C" __global__ __aicore__ void deep_ep_get_dispatch_layout(GM_ADDR topk_idx, GM_ADDR num_tokens_per_rank,
                                                                  GM_ADDR num_tokens_per_rdma_rank,
                                                                  GM_ADDR num_tokens_per_expert,
                                                                  GM_ADDR is_token_in_rank, GM_ADDR workspace,
                                                                  GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::GetDispatchLayout op;
  op.init(topk_idx, num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank, workspace,
          tiling);
  op.process();
}
