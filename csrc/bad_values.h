// Kinds of bad values that kernels flag; each has the smallest index seen. The order is that of device_values.py.
#pragma once

namespace grpo {

enum BadValue { kBadId, kBadReward, kBadLiveRows, kBadLoss, kBadValueCount };

}  // namespace grpo
