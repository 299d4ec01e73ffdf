// What is kept of bad values that kernels met, in the order of device_values.py: the least index of each.
#pragma once

namespace grpo {

enum BadValue { kBadId, kBadReward, kBadLiveRows, kBadLoss, kBadValueCount };

}  // namespace grpo
