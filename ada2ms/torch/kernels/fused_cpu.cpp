// The rule on the CPU: one pass over the data of all tensors together, and one over the gradients before it.
//
// The formulas and their names are those of ada2ms/core/spec.py. Built on first use by fused_cpu.py, for the
// instructions that torch found on this machine; the loops are written such that a compiler makes them vectors.

#include <ATen/Parallel.h>
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kGrain = 1 << 15;  // entries for which another thread is worth its start
constexpr int64_t kBuffer = 512;     // entries of 16 bits that are widened at a time, in the nearest cache
constexpr int64_t kLanes = 32;       // sums side by side
#ifdef __AVX512F__
constexpr int64_t kBlock = 128;  // entries of an update that are worked on together: eight vectors of float32
#else
constexpr int64_t kBlock = 64;
#endif

template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
inline To bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// What v^(a/2) = u * u^(a-1), with u the square root of v, is computed with; the same for all tensors of a step.
struct Exponent {
  double half;  // a/2
  float coarse, fine;  // a-1 in units of 2^-23: a multiple of 2^-17 of it, and the rest
  float log2[8];  // (a-1) * log2(1 + t) / t, by the polynomial that is least off, 5e-8

  explicit Exponent(double adaptivity) : half(adaptivity / 2) {
    constexpr double kLog2[] = {1.44269477, -0.721357149, 0.480939445, -0.360087215,
                                0.286707448, -0.250069046, 0.23689044, -0.145744534};
    const double h = adaptivity - 1, rounded = std::round(h * 0x1p17) * 0x1p-17;
    coarse = static_cast<float>(rounded * 0x1p-23);
    fine = static_cast<float>((h - rounded) * 0x1p-23);
    for (int i = 0; i < 8; ++i) log2[i] = static_cast<float>(h * kLog2[i]);
  }
};

// u, the exponent e of u in units of 2^-23, and (a-1) * log2(u) less coarse * e.
template <typename Size>
inline void logarithms(Size n, const float* __restrict v, float* __restrict u, float* __restrict e,
                       float* __restrict log, const Exponent& a) {
  const float* c = a.log2;
  for (int64_t i = 0; i < n; ++i) {
    u[i] = std::sqrt(v[i]);  // 0 or normal, also where v is subnormal
    // u = 2^e * (1 + t), with 1 + t between the roots of 1/2 and 2; infinity and NaN are taken for 2^64
    const int32_t x = std::min(bits<int32_t>(u[i]), 0x5f800000);
    const int32_t whole = (x - 0x3f3504f3) & -0x800000;
    const float t = bits<float>(x - whole) - 1, t2 = t * t;
    e[i] = static_cast<float>(whole);
    const float q = (((c[6] + c[7] * t) * t2 + (c[4] + c[5] * t)) * t2 + (c[2] + c[3] * t)) * t2 + (c[0] + c[1] * t);
    log[i] = t * q + a.fine * e[i];
  }
}

// u <- u * 2^(coarse * e + log)
template <typename Size>
inline void powers(Size n, const float* __restrict e, const float* __restrict log, float* __restrict u,
                   const Exponent& a) {
  for (int64_t i = 0; i < n; ++i) {
    // coarse * e + log = n + r, with n whole: the sum has it in its lowest bits
    const float sum = (a.coarse * e[i] + log[i]) + 0x1.8p23f;
    const float r = (a.coarse * e[i] - (sum - 0x1.8p23f)) + log[i];  // coarse * e is exact, and so is that less n
    const float two_to_r =
        ((((0.00132647f * r + 0.00967151f) * r + 0.05550734f) * r + 0.24022242f) * r + 0.69314698f) * r + 1;
    u[i] *= bits<float>(bits<int32_t>(two_to_r) + (bits<int32_t>(sum) << 23));  // 0, infinity and NaN stay
  }
}

// How v^(a/2) is computed: by square roots where they say the same.
enum class PowerKind { kOne, kSqrt, kFourthRoot, kPower };

PowerKind power_kind(double adaptivity) {
  return adaptivity == 0 ? PowerKind::kOne
      : adaptivity == 1 ? PowerKind::kSqrt
      : adaptivity == 0.5 ? PowerKind::kFourthRoot
      : PowerKind::kPower;
}

template <typename W>
struct Scalars {
  W inv_scale, beta1, weight1, beta2, weight2, denom_scale, eps, decay_factor, step_size;

  template <typename To>
  Scalars<To> as() const {
    return {To(inv_scale), To(beta1), To(weight1), To(beta2), To(weight2),
            To(denom_scale), To(eps), To(decay_factor), To(step_size)};
  }
};

// v^(a/2), for all kinds but kOne.
template <PowerKind kind, typename W, typename Size>
inline void denom_powers(Size n, const W* __restrict v, W* __restrict result, const Exponent& exponent) {
  if constexpr (kind == PowerKind::kSqrt) {
    for (int64_t i = 0; i < n; ++i) result[i] = std::sqrt(v[i]);
  } else if constexpr (kind == PowerKind::kFourthRoot) {
    for (int64_t i = 0; i < n; ++i) result[i] = std::sqrt(std::sqrt(v[i]));
  } else if constexpr (std::is_same_v<W, float>) {
    float e[kBlock], log[kBlock];
    logarithms(n, v, result, e, log, exponent);
    powers(n, e, log, result, exponent);
  } else {
    for (int64_t i = 0; i < n; ++i) result[i] = std::pow(v[i], exponent.half);
  }
}

// The update of at most kBlock entries, in loops that are short enough for a processor to work on several at a time.
template <PowerKind kind, typename W, typename Size>
inline void update_block(Size n, W* __restrict p, const W* __restrict g, W* __restrict m, W* __restrict v,
                         const Scalars<W>& c, const Exponent& exponent) {
  for (int64_t i = 0; i < n; ++i) {
    const W x = g[i] * c.inv_scale;
    m[i] = c.beta1 * m[i] + c.weight1 * x;
    v[i] = c.beta2 * v[i] + c.weight2 * x * x;
  }
  if constexpr (kind == PowerKind::kOne) {  // the step size has been divided by d
    for (int64_t i = 0; i < n; ++i) p[i] = c.decay_factor * p[i] - c.step_size * m[i];
  } else {
    W power_of_v[kBlock];
    denom_powers<kind>(n, v, power_of_v, exponent);
    for (int64_t i = 0; i < n; ++i) {
      // d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
      const W d = c.denom_scale * power_of_v[i] + c.eps;
      const W quotient = m[i] / (d == 0 ? std::numeric_limits<W>::infinity() : d);  // 0 where nothing has moved yet
      p[i] = c.decay_factor * p[i] - c.step_size * quotient;
    }
  }
}

template <PowerKind kind, typename W>
void update(int64_t n, W* p, const W* g, W* m, W* v, const Scalars<W>& c, const Exponent& exponent) {
  constexpr std::integral_constant<int64_t, kBlock> block;  // known to the compiler
  int64_t i = 0;
  for (; i + block <= n; i += block) update_block<kind>(block, p + i, g + i, m + i, v + i, c, exponent);
  if (i < n) update_block<kind>(n - i, p + i, g + i, m + i, v + i, c, exponent);
}

// To and from 16 bits, to nearest even.
template <typename To, typename From>
inline void convert(int64_t n, const From* __restrict x, To* __restrict y) {
  int64_t i = 0;
#ifdef __F16C__  // compilers make no vectors of c10::Half's own conversion
  if constexpr (std::is_same_v<From, at::Half> && std::is_same_v<To, float>) {
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  } else if constexpr (std::is_same_v<From, float> && std::is_same_v<To, at::Half>) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) y[i] = static_cast<To>(x[i]);
}

// theta <- round(new),   compensation <- round(new - theta), 0 where theta is not finite
template <typename P, typename W>
void split(int64_t n, const W* __restrict given, P* __restrict p, P* __restrict compensation) {
  W rest[kBuffer];
  convert(n, given, p);
  convert(n, p, rest);
  for (int64_t i = 0; i < n; ++i) {
    const W lost = given[i] - rest[i];
    rest[i] = std::abs(lost) <= std::numeric_limits<W>::max() ? lost : W(0);
  }
  convert(n, rest, compensation);
}

// One tensor, as it lies in memory, and its numbers; `compensation` is null if it has none.
struct Work {
  void *p, *g, *m, *v, *compensation;
  Scalars<double> scalars;
  const Exponent* exponent;
  void (*run)(const Work&, int64_t begin, int64_t end);
};

template <PowerKind kind, typename P, typename G, typename W>
void run(const Work& work, int64_t begin, int64_t end) {
  P* p = static_cast<P*>(work.p);
  const G* g = static_cast<const G*>(work.g);
  W *m = static_cast<W*>(work.m), *v = static_cast<W*>(work.v);
  const auto c = work.scalars.template as<W>();
  if constexpr (std::is_same_v<P, W>) {
    update<kind, W>(end - begin, p + begin, g + begin, m + begin, v + begin, c, *work.exponent);
  } else {
    P* compensation = static_cast<P*>(work.compensation);
    W wide_p[kBuffer], wide_g[kBuffer];
    for (; begin < end; begin += kBuffer) {
      const int64_t n = std::min(kBuffer, end - begin);
      convert(n, p + begin, wide_p);
      if (compensation) {
        convert(n, compensation + begin, wide_g);
        for (int64_t i = 0; i < n; ++i) wide_p[i] += wide_g[i];
      }
      convert(n, g + begin, wide_g);
      update<kind, W>(n, wide_p, wide_g, m + begin, v + begin, c, *work.exponent);
      if (compensation) split(n, wide_p, p + begin, compensation + begin);
      else convert(n, wide_p, p + begin);
    }
  }
}

template <PowerKind kind>
auto run_for(at::ScalarType p, at::ScalarType g) -> decltype(Work::run) {
  if (p == at::kDouble) return run<kind, double, double, double>;
  if (p == at::kHalf) return g == p ? run<kind, at::Half, at::Half, float> : run<kind, at::Half, float, float>;
  if (p == at::kBFloat16)
    return g == p ? run<kind, at::BFloat16, at::BFloat16, float> : run<kind, at::BFloat16, float, float>;
  TORCH_CHECK_NOT_IMPLEMENTED(p == at::kFloat, "fused Ada2MS has no kernel for parameters of dtype ", p);
  return run<kind, float, float, float>;
}

decltype(Work::run) run_for(PowerKind kind, at::ScalarType p, at::ScalarType g) {
  switch (kind) {
    case PowerKind::kOne: return run_for<PowerKind::kOne>(p, g);
    case PowerKind::kSqrt: return run_for<PowerKind::kSqrt>(p, g);
    case PowerKind::kFourthRoot: return run_for<PowerKind::kFourthRoot>(p, g);
    default: return run_for<PowerKind::kPower>(p, g);
  }
}

// `run(i, begin, end)` for every part of the numbers 0..sizes[i] of each i, by all threads, with as many numbers each.
template <typename Run>
void for_parts(const std::vector<int64_t>& sizes, const Run& run) {
  std::vector<int64_t> ends(sizes.size());
  int64_t total = 0;
  for (size_t i = 0; i < sizes.size(); ++i) ends[i] = total += sizes[i];
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; begin = ends[i++]) {
      const int64_t start = ends[i] - sizes[i];
      run(i, begin - start, std::min(end, ends[i]) - start);
    }
  });
}

// `x` itself, or a copy of it that has another's strides, and this dtype.
Tensor laid_out_as(const Tensor& x, const Tensor& like, at::ScalarType dtype) {
  const bool same = (x.is_contiguous() && like.is_contiguous()) || x.strides() == like.strides();
  if (same && x.scalar_type() == dtype) return x;
  return at::empty_strided(like.sizes(), like.strides(), x.options().dtype(dtype)).copy_(x);
}

// The values of counts, which are 0-d tensors.
std::vector<double> counts(TensorList tensors) {
  std::vector<double> values;
  values.reserve(tensors.size());
  for (const Tensor& x : tensors)
    values.push_back(x.scalar_type() == at::kFloat ? *x.const_data_ptr<float>() : x.item().toDouble());
  return values;
}

// The update of lists of tensors, in place; step sizes, the scales of d and eps are one for all, or one for each.
// Compensations are those of all 16-bit parameters, in their order, or there are none.
void step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList compensations,
          at::ArrayRef<double> step_sizes, at::ArrayRef<double> denom_scales, at::ArrayRef<double> eps, double beta1,
          double beta2, double decay_factor, double adaptivity, double inv_scale) {
  std::vector<Work> works;
  std::vector<int64_t> sizes;
  std::vector<Tensor> copies, originals;  // of what lies in memory otherwise than its parameter, or with gaps
  auto as = [&](const Tensor& x, const Tensor& like, at::ScalarType dtype, bool written) {
    Tensor y = laid_out_as(x, like, dtype);
    if (!y.is_same(x)) {
      copies.push_back(y);
      originals.push_back(written ? x : Tensor());
    }
    return y.data_ptr();
  };
  const Exponent exponent(adaptivity);
  Scalars<double> scalars{inv_scale, beta1, 1 - beta1, beta2, 1 - beta2, 1, 0, decay_factor, 0};
  const PowerKind kind = power_kind(adaptivity);
  const auto of = [](at::ArrayRef<double> numbers, size_t i) { return numbers[numbers.size() == 1 ? 0 : i]; };
  size_t compensated = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor &p = params[i], &g = grads[i];
    scalars.step_size = of(step_sizes, i);
    scalars.denom_scale = of(denom_scales, i);
    scalars.eps = of(eps, i);
    const auto narrow = p.scalar_type(), wide = narrow == at::kDouble ? at::kDouble : at::kFloat;
    const auto of_g = g.scalar_type() == narrow ? narrow : wide;
    const Tensor like = p.is_non_overlapping_and_dense() ? p : p.contiguous();
    void* compensation = nullptr;
    if (narrow != wide && !compensations.empty())
      compensation = as(compensations.at(compensated++), like, narrow, true);
    works.push_back({as(p, like, narrow, true), as(g, like, of_g, false), as(exp_avgs[i], like, wide, true),
                     as(exp_avg_sqs[i], like, wide, true), compensation, scalars, &exponent,
                     run_for(kind, narrow, of_g)});
    sizes.push_back(p.numel());
  }
  for_parts(sizes, [&](size_t i, int64_t begin, int64_t end) { works[i].run(works[i], begin, end); });
  for (size_t i = 0; i < copies.size(); ++i)
    if (originals[i].defined()) originals[i].copy_(copies[i]);
  for (TensorList written : {params, exp_avgs, exp_avg_sqs, compensations})  // so that autograd knows
    for (const Tensor& x : written) x.unsafeGetTensorImpl()->bump_version();
}

template <typename T>
double square(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  double sums[kLanes] = {};
  const int64_t end = n / kLanes * kLanes;
  for (int64_t i = 0; i < end; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const double y = static_cast<wide_t<T>>(x[i + j]);
      sums[j] += y * y;
    }
  for (int64_t i = end; i < n; ++i) sums[i - end] += std::pow(static_cast<double>(x[i]), 2);
  return std::accumulate(sums, sums + kLanes, 0.0);
}

double square(const Tensor& x, int64_t begin, int64_t n) {
  const char* data = static_cast<const char*>(x.const_data_ptr()) + begin * x.element_size();
  switch (x.scalar_type()) {
    case at::kDouble: return square<double>(data, n);
    case at::kHalf: return square<at::Half>(data, n);
    case at::kBFloat16: return square<at::BFloat16>(data, n);
    default: return square<float>(data, n);
  }
}

// sum(x*x) of each, in float64, and the same whatever the number of threads: by blocks that depend on the size alone.
Tensor squares(TensorList tensors) {
  std::vector<Tensor> dense;
  std::vector<int64_t> sizes, first;  // first: the number of blocks before each tensor
  int64_t blocks = 0;
  for (const Tensor& given : tensors) {
    Tensor x = given.is_non_overlapping_and_dense() ? given : given.contiguous();
    dense.push_back(at::isFloatingType(x.scalar_type()) ? x : x.to(at::kDouble));
    sizes.push_back(x.numel());
    first.push_back(blocks);
    blocks += (x.numel() + kGrain - 1) / kGrain;
  }
  std::vector<double> sums(blocks);
  for_parts(sizes, [&](size_t i, int64_t begin, int64_t end) {  // the blocks that begin in this part
    for (int64_t k = (begin + kGrain - 1) / kGrain; k * kGrain < end; ++k)
      sums[first[i] + k] = square(dense[i], k * kGrain, std::min(kGrain, sizes[i] - k * kGrain));
  });
  Tensor result = at::zeros({static_cast<int64_t>(tensors.size())}, at::kDouble);
  double* total = result.data_ptr<double>();
  for (size_t i = 0; i < dense.size(); ++i)
    for (int64_t k = first[i]; k < (i + 1 < first.size() ? first[i + 1] : blocks); ++k) total[i] += sums[k];
  return result;
}

}  // namespace

TORCH_LIBRARY(ada2ms, library) {
  library.def(
      "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] compensations, float[] step_sizes, float[] denom_scales, float[] eps, float beta1, float beta2, "
      "float decay_factor, float adaptivity, float inv_scale) -> ()");
  library.def("squares(Tensor[] tensors) -> Tensor");
  library.def("counts(Tensor[] tensors) -> float[]");
}

TORCH_LIBRARY_IMPL(ada2ms, CPU, library) {
  library.impl("step", &step);
  library.impl("squares", &squares);
  library.impl("counts", &counts);
}
