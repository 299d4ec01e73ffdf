// The row kernels of one instruction set. A row is read from memory once: the second read, for the gradient, hits the
// core's cache (151936 fp32 logits are 608 KB).
#include "row_kernels.h"

#include <algorithm>

#include "simd.h"

namespace grpo::GRPO_ISA {
namespace {

// Logits per block: the maximum is computed first, then the exponentials. A block stays in L1, and a lane sums at most
// 256 terms in fp32, because small terms lose precision beside the largest one, which is 1.
constexpr int64_t kBlock = std::min(2048, 256 * kLanes<float>);

// An exponent for which exp returns exactly 0.
template <class R>
constexpr R kNegligible = sizeof(R) == sizeof(double) ? -750 : -88;

// The transform in two steps, y = outer u(z). Differences are taken of u, before scaling. Then an offset that all
// logits share costs no precision, and no FMA contraction can round one occurrence of y differently from another.
template <class R, bool kSoftcap>
struct VectorTransform {
  R inner;  // scale / softcap
  R outer;  // softcap / temperature, or scale / temperature without a softcap
  R slope;  // scale / temperature

  explicit VectorTransform(const Transform& t)
      : inner(static_cast<R>(kSoftcap ? t.logit_scale / t.softcap : 1)),
        outer(static_cast<R>((kSoftcap ? t.softcap : t.logit_scale) / t.temperature)),
        slope(static_cast<R>(t.logit_scale / t.temperature)) {}

  Vector<R> operator()(Vector<R> z) const {  // u
    if constexpr (kSoftcap) return tanh(z * inner);
    return z;
  }

  Vector<R> derivative(Vector<R> u) const {  // f'(z)
    if constexpr (kSoftcap) return (R(1) - u * u) * slope;
    return splat<R>(slope);
  }
};

// A copy of the last, incomplete vector of a row.
template <class T>
struct Tail {
  T values[kLanes<Arithmetic<T>>] = {};
  Tail(const T* from, int64_t count) { std::copy(from, from + count, values); }
};

template <class R>
Vector<R> fill_lanes(int64_t count, Vector<R> v, R fill) {  // lanes from `count` on hold `fill`
  for (int i = 0; i < kLanes<R>; ++i) v[i] = i < count ? v[i] : fill;
  return v;
}

template <class R>
double horizontal_sum(Vector<R> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<R>; ++i) sum += v[i];
  return sum;
}

template <class R>
R horizontal_max(Vector<R> v) {
  R largest = v[0];
  for (int i = 1; i < kLanes<R>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// Calls body(u) for every vector of u(z); lanes past the end hold `fill`.
template <class T, class F, class Body>
inline void for_each_vector(const T* z, int64_t count, const F& transform, Arithmetic<T> fill, Body body) {
  using R = Arithmetic<T>;
  int64_t i = 0;
  for (; i + kLanes<R> <= count; i += kLanes<R>) body(transform(load(z + i)));
  if (i < count) body(fill_lanes<R>(count - i, transform(load(Tail<T>(z + i, count - i).values)), fill));
}

template <class T, bool kSoftcap, bool kExtras>
RowStatistics statistics_of(const T* z, int64_t vocab, int64_t id, const Transform& options) {
  using R = Arithmetic<T>;
  using V = Vector<R>;
  const VectorTransform<R, kSoftcap> transform(options);
  const R minus_infinity = static_cast<R>(-INFINITY);
  RowStatistics row;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, vocab - start);
    V largest = splat<R>(-INFINITY);
    const auto identity = [](V values) { return values; };
    for_each_vector(z + start, count, identity, minus_infinity, [&](V v) { largest = max(v, largest); });
    const R largest_z = horizontal_max<R>(largest);
    const R largest_u = transform(splat<R>(largest_z))[0];
    OnlineSoftmax<double> block;
    block.max = static_cast<double>(largest_u) * transform.outer;
    // a block of only -inf has no finite maximum; any other shift gives the exponentials 0
    const R shift = block.max == -INFINITY ? R(0) : largest_u;
    V sum{}, weighted{}, squares{};
    const T* next = z + start + kBlock;  // prefetched while this block is computed
    for_each_vector(z + start, count, transform, minus_infinity, [&](V u) {
      __builtin_prefetch(next);
      next += kLanes<R>;
      const V t = max(splat<R>(kNegligible<R>), (u - shift) * transform.outer);  // -inf * 0 is NaN
      const V e = exp(t);
      sum += e;
      weighted += t * e;
      if constexpr (kExtras) squares += e * e;
    });
    block.sum = horizontal_sum<R>(sum);
    block.weighted = horizontal_sum<R>(weighted);
    if constexpr (kExtras) {
      const double before = row.softmax.max;
      const double joint = std::max(before, block.max);
      row.sum_squares = (row.sum_squares == 0 ? 0 : row.sum_squares * std::exp(2 * (before - joint))) +
                        (block.max == -INFINITY ? 0 : horizontal_sum<R>(squares) * std::exp(2 * (block.max - joint)));
      V total{};
      for_each_vector(z + start, count, transform, R(0), [&](V u) { total += u; });
      row.sum_logits += horizontal_sum<R>(total) * transform.outer;
      if (block.max > before) {
        for (int64_t i = 0; i < count; i += kLanes<R>) {
          const int64_t n = std::min<int64_t>(kLanes<R>, count - i);
          const V values = load(Tail<T>(z + start + i, n).values);
          const V u = transform(values);
          int lane = 0;  // compares z too: the compiler may round u differently in the two places
          while (lane < n && u[lane] != largest_u && values[lane] != largest_z) ++lane;
          if (lane < n) {
            row.first_largest = start + i + lane;
            break;
          }
        }
      }
    }
    row.softmax.merge(block);
  }
  row.target = static_cast<double>(transform(load(Tail<T>(z + id, 1).values))[0]) * transform.outer;
  return row;
}

template <class T>
RowStatistics statistics(const void* z, int64_t vocab, int64_t id, const Transform& options, bool extras) {
  const T* row = static_cast<const T*>(z);
  if (options.softcap > 0) {
    return extras ? statistics_of<T, true, true>(row, vocab, id, options)
                  : statistics_of<T, true, false>(row, vocab, id, options);
  }
  return extras ? statistics_of<T, false, true>(row, vocab, id, options)
                : statistics_of<T, false, false>(row, vocab, id, options);
}

// log p = (u - u_lse) outer - rest. The log-sum-exp is split in two, so that a common offset costs no precision.
template <class R>
struct LogSoftmax {
  R outer, u_lse, rest;

  LogSoftmax(R outer, double lse)
      : outer(outer),
        u_lse(outer == 0 ? R(0) : static_cast<R>(lse / outer)),
        rest(static_cast<R>(lse - static_cast<double>(u_lse) * outer)) {}

  Vector<R> operator()(Vector<R> u) const { return (u - u_lse) * outer - rest; }
};

// The gradient by the sampled token's y. 1 - p is -expm1(logprob), which stays accurate when p is near 1.
inline double gradient_at_target(const RowGradient& g) {
  const double policy = -std::expm1(g.logprob) * g.c;
  if (g.c_h == 0) return policy;
  return policy - g.c_h * std::exp(g.logprob) * (std::max(g.logprob, -1e4) + g.entropy);  // -inf * 0 is NaN
}

template <class T, bool kSoftcap, bool kEntropy>
void gradient_of(const T* z, T* dz, int64_t vocab, const Transform& options, const RowGradient& g) {
  using R = Arithmetic<T>;
  using V = Vector<R>;
  const VectorTransform<R, kSoftcap> transform(options);
  const LogSoftmax<R> log_softmax(transform.outer, g.lse);
  const R entropy = static_cast<R>(g.entropy);
  const R c = static_cast<R>(g.c), c_h = static_cast<R>(g.c_h);
  // copies: for all the compiler knows, a write to dz changes what a reference reads
  const auto derivative = [=](V values) {
    const V u = transform(values);
    const V dy = transform.derivative(u);
    const V log_p = log_softmax(u);
    const V p = exp(log_p);
    if constexpr (kEntropy) {
      const V bounded = max(splat<R>(-88), log_p);  // -inf * 0 is NaN
      return -(p * (c + c_h * (bounded + entropy))) * dy;
    }
    return p * (-c * dy);
  };
  // read first: dz may be z
  const V slope = transform.derivative(transform(load(Tail<T>(z + g.id, 1).values)));
  int64_t i = 0;
  for (; i + kLanes<R> <= vocab; i += kLanes<R>) store(dz + i, derivative(load(z + i)));
  Tail<T> tail(z + i, vocab - i);
  store(tail.values, derivative(load(tail.values)));
  std::copy(tail.values, tail.values + (vocab - i), dz + i);
  const double at_target = gradient_at_target(g);
  Tail<T> patch(z, 0);
  store(patch.values, splat<R>(static_cast<R>(at_target * slope[0])));
  dz[g.id] = patch.values[0];
}

template <class T>
void gradient(const void* z, void* dz, int64_t vocab, const Transform& options, const RowGradient& g) {
  const T* from = static_cast<const T*>(z);
  T* to = static_cast<T*>(dz);
  if (options.softcap > 0) {
    return g.c_h != 0 ? gradient_of<T, true, true>(from, to, vocab, options, g)
                      : gradient_of<T, true, false>(from, to, vocab, options, g);
  }
  return g.c_h != 0 ? gradient_of<T, false, true>(from, to, vocab, options, g)
                    : gradient_of<T, false, false>(from, to, vocab, options, g);
}

// A transform selected at run time, with its log-softmax; for kernels over two rows.
template <class R>
struct AnySoftmax {
  VectorTransform<R, false> plain;
  VectorTransform<R, true> capped;
  bool is_capped;
  LogSoftmax<R> log_softmax;

  AnySoftmax(const Transform& t, double lse)
      : plain(t),
        capped(t.softcap > 0 ? t : Transform{t.temperature, 1, t.logit_scale}),
        is_capped(t.softcap > 0),
        log_softmax(is_capped ? capped.outer : plain.outer, lse) {}

  Vector<R> operator()(Vector<R> z) const { return is_capped ? capped(z) : z; }
  Vector<R> derivative(Vector<R> u) const { return is_capped ? capped.derivative(u) : plain.derivative(u); }
};

// The terms of a divergence, and its gradient p (g - centre), at a vector of columns.
template <class R>
struct Divergence {
  using V = Vector<R>;
  R mixture;
  bool is_forward, is_reverse;  // from the fp64 value: R may round another one to 0 or 1

  explicit Divergence(double m) : mixture(static_cast<R>(m)), is_forward(m == 0), is_reverse(m == 1) {}

  // probability * log_ratio; 0 where the probability is 0, even if the logarithm is infinite.
  static V product_or_zero(V probability, V log_ratio) { return probability > R(0) ? probability * log_ratio : V{}; }

  // m / max(p, q) for d = log p - log q. Cannot overflow, and is 1 at d = 0.
  V mixture_over_larger(V d) const {
    const V w = exp(max(splat<R>(-87), d > R(0) ? -d : d));
    const V p_weight = splat<R>(R(1) - mixture), q_weight = splat<R>(mixture);
    return d > R(0) ? p_weight + q_weight * w : q_weight + p_weight * w;
  }

  // Each p log term is paired with a difference of probabilities, which sums to 0 over the vocabulary. It cancels the
  // first-order effect of the rounding of the logarithm and of both log-sum-exps.
  void add(V log_p, V log_q, V& value, V& centre) const {
    const V p = exp(log_p), q = exp(log_q), d = log_p - log_q;
    if (is_forward) {
      value += product_or_zero(q, -d) + (p - q);
    } else if (is_reverse) {
      value += product_or_zero(p, d) + (q - p);
    } else {
      const R p_weight = R(1) - mixture;
      const V ratio = mixture_over_larger(d), log_inverse = -log(ratio);
      const V p_term = product_or_zero(p, d > R(0) ? log_inverse : log_inverse + d);
      const V q_term = product_or_zero(q, d > R(0) ? log_inverse - d : log_inverse);
      const V m = product_or_zero(d > R(0) ? p : q, ratio);
      centre += p_term;
      value += p_weight * p_term + mixture * q_term + (m - (p_weight * p + mixture * q));
    }
  }

  V gradient(V log_p, V p, V log_q, R centre) const {
    if (is_forward) return p - exp(log_q);
    const V d = log_p - log_q;
    if (is_reverse) return product_or_zero(p, d - centre);
    const V log_inverse = -log(mixture_over_larger(d));
    return (R(1) - mixture) * product_or_zero(p, (d > R(0) ? log_inverse : log_inverse + d) - centre);
  }
};

template <class T>
RowDivergence divergence(const ComparedRow& p, const ComparedRow& q, int64_t vocab, double mixture) {
  using R = Arithmetic<T>;
  using V = Vector<R>;
  const T *z = static_cast<const T*>(p.z), *zq = static_cast<const T*>(q.z);
  const AnySoftmax<R> softmax_p(p.transform, p.lse), softmax_q(q.transform, q.lse);
  const Divergence<R> divergence(mixture);
  RowDivergence result{0, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t end = std::min(start + kBlock, vocab);
    V value{}, centre{};
    const auto add = [&](const T* from_p, const T* from_q) {
      const V log_p = softmax_p.log_softmax(softmax_p(load(from_p)));
      const V log_q = softmax_q.log_softmax(softmax_q(load(from_q)));
      divergence.add(log_p, log_q, value, centre);
    };
    int64_t i = start;
    for (; i + kLanes<R> <= end; i += kLanes<R>) add(z + i, zq + i);
    if (i < end) {
      const V value_before = value, centre_before = centre;
      add(Tail<T>(z + i, end - i).values, Tail<T>(zq + i, end - i).values);
      for (int lane = static_cast<int>(end - i); lane < kLanes<R>; ++lane) {
        value[lane] = value_before[lane];
        centre[lane] = centre_before[lane];
      }
    }
    result.value += horizontal_sum<R>(value);
    result.centre += horizontal_sum<R>(centre);
  }
  if (mixture == 1) result.centre = result.value;
  return result;
}

template <class T>
void divergence_gradient(const ComparedRow& p_row, const ComparedRow& q_row, void* drow, int64_t vocab,
                         const Transform& options, const RowGradient& g, double mixture,
                         const RowDivergence& row_divergence, double c_d) {
  using R = Arithmetic<T>;
  using V = Vector<R>;
  const T *z = static_cast<const T*>(p_row.z), *zq = static_cast<const T*>(q_row.z);
  T* dz = static_cast<T*>(drow);
  const AnySoftmax<R> policy(options, g.lse);
  const AnySoftmax<R> softmax_p(p_row.transform, p_row.lse), softmax_q(q_row.transform, q_row.lse);
  const bool same_temperature = options.temperature == p_row.transform.temperature;
  const Divergence<R> divergence(mixture);
  const R entropy = static_cast<R>(g.entropy), centre = static_cast<R>(row_divergence.centre);
  const R c = static_cast<R>(g.c), c_h = static_cast<R>(g.c_h);
  const R cd = static_cast<R>(c_d * options.temperature / p_row.transform.temperature);
  const auto derivative = [=](V logits, V reference) {
    const V u = policy(logits);
    const V log_policy = policy.log_softmax(u);
    const V policy_p = exp(log_policy);
    V dy = -(policy_p * (c + c_h * (max(splat<R>(-88), log_policy) + entropy)));  // -inf * 0 is NaN
    if (cd != 0) {
      const V log_p = same_temperature ? log_policy : softmax_p.log_softmax(u);
      const V p = same_temperature ? policy_p : exp(log_p);
      dy += cd * divergence.gradient(log_p, p, softmax_q.log_softmax(softmax_q(reference)), centre);
    }
    return dy * policy.derivative(u);
  };
  // read first: dz may be z
  const V slope = policy.derivative(policy(load(Tail<T>(z + g.id, 1).values)));
  int64_t i = 0;
  for (; i + kLanes<R> <= vocab; i += kLanes<R>) store(dz + i, derivative(load(z + i), load(zq + i)));
  Tail<T> tail(z + i, vocab - i);
  store(tail.values, derivative(load(tail.values), load(Tail<T>(zq + i, vocab - i).values)));
  std::copy(tail.values, tail.values + (vocab - i), dz + i);
  double at_target = gradient_at_target(g);
  if (cd != 0) {
    const V log_p = splat<R>(static_cast<R>(p_row.logprob)), log_q = splat<R>(static_cast<R>(q_row.logprob));
    at_target += cd * divergence.gradient(log_p, exp(log_p), log_q, centre)[0];
  }
  Tail<T> patch(z, 0);
  store(patch.values, splat<R>(static_cast<R>(at_target * slope[0])));
  dz[g.id] = patch.values[0];
}

template <class T>
void scale(void* values, int64_t count, double factor) {
  using R = Arithmetic<T>;
  T* v = static_cast<T*>(values);
  const R f = static_cast<R>(factor);
  int64_t i = 0;
  for (; i + kLanes<R> <= count; i += kLanes<R>) store(v + i, load(v + i) * f);
  Tail<T> tail(v + i, count - i);
  store(tail.values, load(tail.values) * f);
  std::copy(tail.values, tail.values + (count - i), v + i);
}

template <class T>
constexpr RowKernels kernels_for() {
  return {statistics<T>, gradient<T>, divergence<T>, divergence_gradient<T>, scale<T>};
}

}  // namespace

// Indexed by Dtype.
extern const RowKernels kRowKernels[kDtypeCount];
const RowKernels kRowKernels[kDtypeCount] = {kernels_for<float>(), kernels_for<BFloat16>(), kernels_for<Half>(),
                                             kernels_for<double>()};

}  // namespace grpo::GRPO_ISA
