// The sums of sketches on a CPU: every entry is read once. sketch.py says what they are; native.py builds and calls this.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

#if defined(__linux__) && !defined(ADA2MS_OWN_THREADS)
#define ADA2MS_OPENMP
// Of libgomp, if the process has it where all find it, as one has that has loaded torch. Its threads wait for work without
// sleeping for a while, in which others would have to share the processors with them.
// As many as torch is told to use: a process that was forked from one that had several has none of them, and may have one.
extern "C" void GOMP_parallel(void (*work)(void*), void* given, unsigned threads, unsigned flags) __attribute__((weak));
extern "C" int omp_get_max_threads() __attribute__((weak));
#endif

namespace {

constexpr int64_t kSums = 8;
constexpr int64_t kWidth = 1 + kSums;      // the sum of squares, then the signed sums
constexpr int64_t kVectorBytes = 32;       // also where a processor has wider vectors, of which it stores fewer at a time
constexpr int64_t kStripBytes = 1024;      // of a row, that are worked on together: 16 such rows are half a nearest cache
constexpr int64_t kChunkBytes = 1 << 17;   // of some rows, which are fetched ahead: a part of the second nearest cache
constexpr int64_t kChunkRows = 64;         // at most, of which squares are summed by themselves
constexpr int64_t kRows = 512;             // that are summed before their sums are widened
constexpr int64_t kPanel = 1024;           // columns, for which there are bags
constexpr int64_t kEntries = 1 << 15;      // of a vector, that are a task
constexpr int64_t kLineBytes = 64;

enum Type : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };  // in the order of native.py

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// What entries of a type are summed in, and unsigned integers of its size.
template <typename T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename W>
using bits_t = std::conditional_t<sizeof(W) == 8, uint64_t, uint32_t>;

template <typename W>
struct Vectors {
  static constexpr int64_t kLanes = kVectorBytes / sizeof(W), kStrip = kStripBytes / sizeof(W);
  typedef W Real __attribute__((vector_size(kVectorBytes), aligned(sizeof(W)), may_alias));
  typedef W Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef double Doubles __attribute__((vector_size(kLanes / 2 * sizeof(double))));
  typedef bits_t<W> Bits __attribute__((vector_size(kVectorBytes), aligned(sizeof(W)), may_alias));
};

// A matrix of entries, contiguous in memory, with the codes of its rows and columns.
struct Matrix {
  const void* entries;
  const uint8_t* row_codes;
  const uint8_t* column_codes;
  int64_t rows, columns, type;
};

template <typename W>
inline const typename Vectors<W>::Real& at(const W* x) {
  return *reinterpret_cast<const typename Vectors<W>::Real*>(x);
}

template <typename W>
inline typename Vectors<W>::Real& at(W* x) {
  return *reinterpret_cast<typename Vectors<W>::Real*>(x);
}

inline float widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline float widened(Float16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  if (bits >= 0x0f800000) bits |= 0x7f800000;  // infinity, NaN
  float y;
  std::memcpy(&y, &bits, sizeof y);
  y *= bits >= 0x0f800000 ? 1.0f : 0x1p112f;  // exponents of 16 bits begin 112 later
  return x.bits & 0x8000 ? -y : y;
}

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }

// n entries, and zeros up to whole vectors.
template <typename T>
inline void widen(int64_t n, int64_t padded, const T* __restrict x, wide_t<T>* __restrict y) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, Float16>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) y[i] = widened(x[i]);
  for (; i < padded; ++i) y[i] = 0;
}

// sums[k] += the sum over columns of what `term` has for sum k and a column, with the column's sign.
template <typename W, typename Term>
inline void add_columns(int64_t padded, const bits_t<W>* codes, const Term& term, double* sums) {
  using V = Vectors<W>;
  constexpr int kHighest = 8 * sizeof(W) - 1;
  typename V::Real total[kSums] = {};
  for (int64_t j = 0; j < padded; j += V::kLanes) {
    const typename V::Bits code = *reinterpret_cast<const typename V::Bits*>(codes + j);
#pragma GCC unroll 8
    for (int64_t k = 0; k < kSums; ++k) {
      const typename V::Bits sign = (code << (kHighest - k)) & (bits_t<W>{1} << kHighest);
      total[k] += (typename V::Real)((typename V::Bits)term(k, j) ^ sign);
    }
  }
  for (int64_t k = 0; k < kSums; ++k)
    for (int64_t i = 0; i < V::kLanes; ++i) sums[k] += static_cast<double>(total[k][i]);
}

// Adds the squares of a row's entries to `sum`; and if there are bags, the row to both, with signs.
template <bool in_bags, typename W, typename Size>
inline void add_row(Size padded, const W* x, W* a, W* b, W sign_of_a, W sign_of_b, typename Vectors<W>::Doubles& sum) {
  using V = Vectors<W>;
  constexpr int64_t kTogether = 4;
  typename V::Real squares[kTogether] = {};
  const auto add = [&](int64_t j, typename V::Real& square) {
    const typename V::Real y = at(x + j);
    if constexpr (in_bags) {
      at(a + j) += sign_of_a * y;
      at(b + j) += sign_of_b * y;
    }
    square += y * y;
  };
  int64_t j = 0;
  for (; j + kTogether * V::kLanes <= padded; j += kTogether * V::kLanes)
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTogether; ++i) add(j + i * V::kLanes, squares[i]);
  for (; j < padded; j += V::kLanes) add(j, squares[0]);
  const typename V::Real all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  typename V::Half halves[2];
  std::memcpy(halves, &all, sizeof all);
  for (const auto& half : halves) sum += __builtin_convertvector(half, typename V::Doubles);
}

// Squares as they are in float64, of entries whose squares are too small or too large for float32.
template <typename T>
double wide_squares(int64_t rows, int64_t columns, int64_t stride, const T* x) {
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const double y = widened(x[i * stride + j]);
      sum += y * y;
    }
  return sum;
}

template <typename T>
double checked_squares(double sum, int64_t rows, int64_t columns, int64_t stride, const T* x) {
  const bool is_sure = std::is_same_v<T, double> || (sum > 1e-24 && sum < 1e38);
  return is_sure ? sum : wide_squares(rows, columns, stride, x);
}

// The signs of a row in the first four sums, and in the last four, make 16 patterns, of which 8 are the others negated. So
// each row is added to one of 8 bags, and to one of 8 others, and the signed sums are taken of bags: two additions for
// each entry in place of eight.
template <typename T>
class Panel {
 public:
  // Of a part of a matrix: at most kRows rows and kPanel columns.
  Panel(const Matrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns)
      : entries_(static_cast<const T*>(matrix.entries) + row * matrix.columns + column), stride_(matrix.columns),
        rows_(rows), columns_(columns), row_codes_(matrix.row_codes + row), column_codes_(matrix.column_codes + column) {}

  void add_to(double* result) {
    for (int64_t j = 0; j < columns_; j += kStrip)
      for (auto& bag : bags_[j / kStrip]) std::fill(bag, bag + padded(in_strip(j)), W(0));
    const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (columns_ * sizeof(T)), 1, kChunkRows);
    for (int64_t i = 0; i < rows_; i += chunk) {  // what the second nearest cache holds, while the next is fetched
      const int64_t end = std::min(i + chunk, rows_);
      next_ = entries_ + (i + chunk) * stride_;
      next_column_ = 0;
      for (int64_t j = 0; j < columns_; j += kStrip) {
        if (in_strip(j) == kStrip) add_rows(std::integral_constant<int64_t, kStrip>(), i, end, j);
        else add_rows(in_strip(j), i, end, j);
      }
    }
    double squares = 0;
    for (int64_t i = 0; i < kLanes / 2; ++i) squares += squares_[i];
    result[0] += checked_squares(squares, rows_, columns_, stride_, entries_);
    for (int64_t j = 0; j < columns_; j += kStrip) add_sums(j, result + 1);
  }

 private:
  using W = wide_t<T>;
  static constexpr int64_t kLanes = Vectors<W>::kLanes, kStrip = Vectors<W>::kStrip;

  static int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }
  int64_t in_strip(int64_t column) const { return std::min(kStrip, columns_ - column); }

  // Adds rows in a strip of n columns to their bags.
  template <typename Size>
  void add_rows(Size n, int64_t begin, int64_t end, int64_t column) {
    W(*const bags)[kStrip] = bags_[column / kStrip];
    typename Vectors<W>::Doubles squares = {};
    for (int64_t i = begin; i < end; ++i) {
      fetch(n);
      const T* given = entries_ + i * stride_ + column;
      alignas(kLineBytes) W buffer[kStrip];
      const W* x = buffer;
      if constexpr (std::is_same_v<T, W>)
        if (n % kLanes == 0) x = given;
      if (x == buffer) widen(n, padded(n), given, buffer);
      const int code = row_codes_[i], low = code & 15, high = code >> 4;
      const bool is_low_negated = low & 8, is_high_negated = high & 8;
      W *a = bags[is_low_negated ? low ^ 15 : low], *b = bags[8 + (is_high_negated ? high ^ 15 : high)];
      const W sign_of_a = is_low_negated ? -1 : 1, sign_of_b = is_high_negated ? -1 : 1;
      if constexpr (std::is_same_v<Size, int64_t>) add_row<true>(padded(n), x, a, b, sign_of_a, sign_of_b, squares);
      else add_row<true>(n, x, a, b, sign_of_a, sign_of_b, squares);
    }
    squares_ += squares;
  }

  // Fetches the next n entries of the next chunk, in the order in which they lie in memory.
  template <typename Size>
  void fetch(Size n) {
    for (int64_t j = 0; j < n; j += kLineBytes / sizeof(T)) __builtin_prefetch(next_ + next_column_ + j, 0, 2);
    next_column_ += n;
    if (next_column_ >= columns_) {
      next_column_ -= columns_;
      next_ += stride_;
    }
  }

  void add_sums(int64_t column, double* sums) const {
    const int64_t n = in_strip(column);
    const W(*bags)[kStrip] = bags_[column / kStrip];
    bits_t<W> codes[kStrip] = {};
    std::copy_n(column_codes_ + column, n, codes);
    const auto term = [&](int64_t k, int64_t j) __attribute__((always_inline)) {
      const W(*half)[kStrip] = bags + k / 4 * 8;
      typename Vectors<W>::Real sum = at(half[0] + j);
#pragma GCC unroll 8
      for (int64_t i = 1; i < 8; ++i) sum = i >> k % 4 & 1 ? sum - at(half[i] + j) : sum + at(half[i] + j);
      return sum;
    };
    add_columns<W>(padded(n), codes, term, sums);
  }

  const T* entries_;
  int64_t stride_, rows_, columns_;
  const uint8_t *row_codes_, *column_codes_;
  const T* next_ = nullptr;
  int64_t next_column_ = 0;
  typename Vectors<W>::Doubles squares_ = {};
  alignas(kLineBytes) W bags_[kPanel / kStrip][16][kStrip];
};

// A part of a matrix of fewer columns than a vector has, whose every entry has a sign of its own.
template <typename T>
void add_entries(const Matrix& matrix, int64_t begin, int64_t end, double* result) {
  using W = wide_t<T>;
  constexpr int64_t kLanes = Vectors<W>::kLanes, kStrip = Vectors<W>::kStrip;
  const T* x = static_cast<const T*>(matrix.entries);
  alignas(kLineBytes) W buffer[kStrip];
  bits_t<W> codes[kStrip] = {};
  int64_t row = begin / matrix.columns, column = begin % matrix.columns;
  for (int64_t i = begin; i < end; i += kStrip) {
    const int64_t n = std::min(kStrip, end - i), padded = (n + kLanes - 1) / kLanes * kLanes;
    widen(n, padded, x + i, buffer);
    if (matrix.columns == 1) {
      for (int64_t j = 0; j < n; ++j) codes[j] = matrix.row_codes[i + j] ^ matrix.column_codes[0];
    } else {
      for (int64_t j = 0; j < n; ++j) {
        codes[j] = matrix.row_codes[row] ^ matrix.column_codes[column];
        if (++column == matrix.columns) column = 0, ++row;
      }
    }
    typename Vectors<W>::Doubles squares = {};
    add_row<false, W>(padded, buffer, nullptr, nullptr, 0, 0, squares);
    double sum = 0;
    for (int64_t j = 0; j < kLanes / 2; ++j) sum += squares[j];
    result[0] += checked_squares(sum, 1, n, n, x + i);
    add_columns<W>(padded, codes, [&](int64_t, int64_t j) { return at(buffer + j); }, result + 1);
  }
}

// A part of a matrix that one thread works on.
struct Task {
  const Matrix* matrix;
  int64_t begin, end, column, columns;  // rows and columns; or entries, if there are no columns
};

template <typename T>
void add_tasks(const Matrix& matrix, std::vector<Task>& tasks) {
  if (matrix.columns < Vectors<wide_t<T>>::kLanes) {
    const int64_t size = matrix.rows * matrix.columns;
    for (int64_t i = 0; i < size; i += kEntries) tasks.push_back({&matrix, i, std::min(i + kEntries, size), 0, 0});
  } else {
    for (int64_t i = 0; i < matrix.rows; i += kRows)
      for (int64_t j = 0; j < matrix.columns; j += kPanel)
        tasks.push_back({&matrix, i, std::min(i + kRows, matrix.rows), j, std::min(kPanel, matrix.columns - j)});
  }
}

template <typename T>
void run(const Task& task, double* result) {
  if (task.columns)
    Panel<T>(*task.matrix, task.begin, task.end - task.begin, task.column, task.columns).add_to(result);
  else
    add_entries<T>(*task.matrix, task.begin, task.end, result);
}

// Calls `call` with an entry of the type.
template <typename Call>
void with_type(int64_t type, const Call& call) {
  switch (type) {
    case kFloat64: return call(double());
    case kBFloat16: return call(BFloat16());
    case kFloat16: return call(Float16());
    default: return call(float());
  }
}

// work() by so many threads, or by as many as the system gives.
template <typename Work>
void in_threads(int64_t count, const Work& work) {
#ifdef ADA2MS_OPENMP
  if (GOMP_parallel != nullptr && omp_get_max_threads != nullptr) {
    const unsigned most = std::clamp<int64_t>(count, 1, omp_get_max_threads());
    GOMP_parallel([](void* given) { (*static_cast<const Work*>(given))(); }, const_cast<Work*>(&work), most, 0);
    return;
  }
#endif
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 1; i < count; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  work();
  for (auto& thread : threads) thread.join();
}

}  // namespace

// results[i] <- the sum of squares and the signed sums of each matrix; the same whatever the number of threads. Not 0 if
// there is no memory left.
extern "C" int ada2ms_sums(int64_t count, const Matrix* matrices, int64_t threads, double* results) noexcept try {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i)
    with_type(matrices[i].type, [&](auto entry) { add_tasks<decltype(entry)>(matrices[i], tasks); });
  const int64_t size = tasks.size();
  std::vector<double> partial(size * kWidth);
  std::atomic<int64_t> next{0};
  in_threads(std::min(threads, size), [&] {
    for (int64_t i; (i = next++) < size;)
      with_type(tasks[i].matrix->type, [&](auto entry) { run<decltype(entry)>(tasks[i], &partial[i * kWidth]); });
  });
  std::fill(results, results + count * kWidth, 0.0);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t k = 0; k < kWidth; ++k) results[(tasks[i].matrix - matrices) * kWidth + k] += partial[i * kWidth + k];
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
