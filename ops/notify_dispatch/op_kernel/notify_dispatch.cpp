// notify_dispatch: every rank tells all others how many rows it has for each expert. A launch that fails gives 0.
#include "counts.h"

namespace deep_ep {

class NotifyDispatch {
 public:
  __aicore__ NotifyDispatch() {}
  __aicore__ void init(GM_ADDR topk_idx, GM_ADDR windows, GM_ADDR num_rows, GM_ADDR workspace, const Tiling& tiling) {
    tiling_ = &tiling;
    num_rows_ = num_rows;
    exchange_.init(pipe_, tiling, windows, workspace, Op::notify_dispatch);
    counts_.init(pipe_, tiling, workspace, topk_idx);
    result_.init(pipe_, 1);
  }

  __aicore__ void process() {
    const int64_t rows = exchange_.has_failed_before() ? 0 : exchange();
    if (GetBlockIdx() != 0) return;
    result_.set(0, rows);
    order<HardEvent::S_MTE3>();
    store(num_rows_, result_.tensor(), 1);
  }

 private:
  __aicore__ int64_t exchange() {
    int64_t rows = 0;
    exchange_.begin();
    if (counts_.count(exchange_)) counts_.send(exchange_);
    exchange_.raise_all(0, counts_.numbers());
    if (exchange_.all_raised(0)) {
      const int64_t L = tiling_->work.experts / exchange_.ranks();
      counts_.receive(exchange_, exchange_.rank() * L, L);
      for (int64_t l = 0; l < L; ++l) rows += counts_.numbers().total().get(l);
    }
    exchange_.finish();
    return rows;
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR num_rows_ = nullptr;
  TPipe pipe_;
  Exchange exchange_;
  Counts counts_;
  Array<int64_t> result_;
};

}  // namespace deep_ep

extern "C" __global__ __aicore__ void deep_ep_notify_dispatch(GM_ADDR topk_idx, GM_ADDR windows, GM_ADDR num_rows,
                                                              GM_ADDR workspace, GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::NotifyDispatch op;
  op.init(topk_idx, windows, num_rows, workspace, tiling);
  op.process();
}
