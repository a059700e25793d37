// The sums of sketches as XLA calls them. sketches_cpu.py builds this and has it called.

#define ADA2MS_OWN_THREADS  // XLA calls from several threads, for each of which OpenMP would keep as many of its own
#include "sketch.cpp"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Codes = ffi::BufferR1<ffi::U8>;
using Sums = ffi::BufferR3<ffi::U32>;

// sums <- float64, as pairs of 32 bits, of each array (its squares, its signed sums).
// places: of each array the first of its rows' codes and of its columns', how many there are of both, and its type.
ffi::Error sum(Codes codes, ffi::RemainingArgs arrays, ffi::Span<const int64_t> places, int64_t threads,
               ffi::Result<Sums> sums) {
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const int64_t* place = places.begin() + 5 * i;
    const auto array = arrays.get<ffi::AnyBuffer>(i);
    if (array.has_error()) return array.error();
    const uint8_t* first = codes.typed_data();
    matrices.push_back({array->untyped_data(), first + place[0], first + place[1], place[2], place[3], place[4]});
  }
  double* results = reinterpret_cast<double*>(sums->untyped_data());
  if (ada2ms_sums(matrices.size(), matrices.data(), threads, results))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "No memory for the sums of sketches");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ada2ms_sketch_sums, sum,
                              ffi::Ffi::Bind()
                                  .Arg<Codes>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const int64_t>>("places")
                                  .Attr<int64_t>("threads")
                                  .Ret<Sums>());
