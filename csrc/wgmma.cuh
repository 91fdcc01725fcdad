// Products of a warp group on sm_90a: wgmma, with the first factor in shared memory or in registers. Part of
// tensor_cores.cuh.
#pragma once

namespace cisc {

// Operands of an instruction that has 32, 64 or 128 sums in a thread.
#define CISC_NAMES_32                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define CISC_NAMES_64                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define CISC_NAMES_128                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define CISC_SUMS_8(c, i)                                                                     \
  c(sums[i]), c(sums[i + 1]), c(sums[i + 2]), c(sums[i + 3]), c(sums[i + 4]), c(sums[i + 5]), \
      c(sums[i + 6]), c(sums[i + 7])
#define CISC_SUMS_32(c, i) \
  CISC_SUMS_8(c, i), CISC_SUMS_8(c, i + 8), CISC_SUMS_8(c, i + 16), CISC_SUMS_8(c, i + 24)
#define CISC_SUMS_64(c, i) CISC_SUMS_32(c, i), CISC_SUMS_32(c, i + 32)
#define CISC_SUMS_128(c, i) CISC_SUMS_64(c, i), CISC_SUMS_64(c, i + 64)

// types: of sums and factors; first, second, adds: operands by number; more: the instruction's immediate ones
#define CISC_PRODUCTS(columns, count, c, types, first, second, adds, more, ...)          \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds                            \
               ", 0;\n"                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #columns types " " CISC_NAMES_##count \
               ", " first ", " second ", adds" more ";\n}"                               \
               : CISC_SUMS_##count(c, 0)                                                 \
               : __VA_ARGS__)

// One instruction for each type, of sums [64,columns].
#define CISC_SHARED_PRODUCTS_64(c, types, more, ...)                         \
  CISC_PRODUCTS(64, 32, c, types, "%32", "%33", "%34", more, "l"(a), "l"(b), \
                "r"(static_cast<int>(adds)), ##__VA_ARGS__)
#define CISC_REGISTER_PRODUCTS_64(c, types, more, ...)                                              \
  CISC_PRODUCTS(64, 32, c, types, "{%32, %33, %34, %35}", "%36", "%37", more, "r"(a[0]), "r"(a[1]), \
                "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), ##__VA_ARGS__)
#define CISC_SHARED_PRODUCTS_128(c, types, more, ...)                         \
  CISC_PRODUCTS(128, 64, c, types, "%64", "%65", "%66", more, "l"(a), "l"(b), \
                "r"(static_cast<int>(adds)), ##__VA_ARGS__)
#define CISC_REGISTER_PRODUCTS_128(c, types, more, ...)                                              \
  CISC_PRODUCTS(128, 64, c, types, "{%64, %65, %66, %67}", "%68", "%69", more, "r"(a[0]), "r"(a[1]), \
                "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), ##__VA_ARGS__)
#define CISC_SHARED_PRODUCTS_256(c, types, more, ...)                             \
  CISC_PRODUCTS(256, 128, c, types, "%128", "%129", "%130", more, "l"(a), "l"(b), \
                "r"(static_cast<int>(adds)), ##__VA_ARGS__)
#define CISC_REGISTER_PRODUCTS_256(c, types, more, ...)                                                     \
  CISC_PRODUCTS(256, 128, c, types, "{%128, %129, %130, %131}", "%132", "%133", more, "r"(a[0]), "r"(a[1]), \
                "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), ##__VA_ARGS__)

// sums [64,n] = a [64,16] times b [16,n], added to what is there if `adds`; 32 terms of s8. On their way
// until products_wait. a, b: descriptors; transposed: of b the columns lie together.
template <Matrix type, bool transposed, int half>
__device__ __forceinline__ void multiply_64(float (&sums)[half], uint64_t a, uint64_t b, bool adds) {
  static_assert(type != Matrix::s8 && (half == 32 || half == 64 || half == 128), "what the instruction has");
  if constexpr (half == 32 && type == Matrix::f16 && !transposed) {
    CISC_SHARED_PRODUCTS_64("+f", "k16.f32.f16.f16", ", 1, 1, 0, 0");
  }
  if constexpr (half == 32 && type == Matrix::f16 && transposed) {
    CISC_SHARED_PRODUCTS_64("+f", "k16.f32.f16.f16", ", 1, 1, 0, 1");
  }
  if constexpr (half == 32 && type == Matrix::bf16 && !transposed) {
    CISC_SHARED_PRODUCTS_64("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0");
  }
  if constexpr (half == 32 && type == Matrix::bf16 && transposed) {
    CISC_SHARED_PRODUCTS_64("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 1");
  }
  if constexpr (half == 64 && type == Matrix::f16 && !transposed) {
    CISC_SHARED_PRODUCTS_128("+f", "k16.f32.f16.f16", ", 1, 1, 0, 0");
  }
  if constexpr (half == 64 && type == Matrix::f16 && transposed) {
    CISC_SHARED_PRODUCTS_128("+f", "k16.f32.f16.f16", ", 1, 1, 0, 1");
  }
  if constexpr (half == 64 && type == Matrix::bf16 && !transposed) {
    CISC_SHARED_PRODUCTS_128("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0");
  }
  if constexpr (half == 64 && type == Matrix::bf16 && transposed) {
    CISC_SHARED_PRODUCTS_128("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 1");
  }
  if constexpr (half == 128 && type == Matrix::f16 && !transposed) {
    CISC_SHARED_PRODUCTS_256("+f", "k16.f32.f16.f16", ", 1, 1, 0, 0");
  }
  if constexpr (half == 128 && type == Matrix::f16 && transposed) {
    CISC_SHARED_PRODUCTS_256("+f", "k16.f32.f16.f16", ", 1, 1, 0, 1");
  }
  if constexpr (half == 128 && type == Matrix::bf16 && !transposed) {
    CISC_SHARED_PRODUCTS_256("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0");
  }
  if constexpr (half == 128 && type == Matrix::bf16 && transposed) {
    CISC_SHARED_PRODUCTS_256("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 1");
  }
}

template <int half>
__device__ __forceinline__ void multiply_64(int32_t (&sums)[half], uint64_t a, uint64_t b, bool adds) {
  static_assert(half == 32 || half == 64 || half == 128, "what the instruction has");
  if constexpr (half == 32) CISC_SHARED_PRODUCTS_64("+r", "k32.s32.s8.s8", "");
  if constexpr (half == 64) CISC_SHARED_PRODUCTS_128("+r", "k32.s32.s8.s8", "");
  if constexpr (half == 128) CISC_SHARED_PRODUCTS_256("+r", "k32.s32.s8.s8", "");
}

template <Matrix type, bool transposed, int half>
__device__ __forceinline__ void multiply_64(float (&sums)[half], const uint32_t (&a)[4], uint64_t b,
                                            bool adds) {
  static_assert(type != Matrix::s8 && (half == 32 || half == 64 || half == 128), "what the instruction has");
  if constexpr (half == 32 && type == Matrix::f16 && !transposed) {
    CISC_REGISTER_PRODUCTS_64("+f", "k16.f32.f16.f16", ", 1, 1, 0");
  }
  if constexpr (half == 32 && type == Matrix::f16 && transposed) {
    CISC_REGISTER_PRODUCTS_64("+f", "k16.f32.f16.f16", ", 1, 1, 1");
  }
  if constexpr (half == 32 && type == Matrix::bf16 && !transposed) {
    CISC_REGISTER_PRODUCTS_64("+f", "k16.f32.bf16.bf16", ", 1, 1, 0");
  }
  if constexpr (half == 32 && type == Matrix::bf16 && transposed) {
    CISC_REGISTER_PRODUCTS_64("+f", "k16.f32.bf16.bf16", ", 1, 1, 1");
  }
  if constexpr (half == 64 && type == Matrix::f16 && !transposed) {
    CISC_REGISTER_PRODUCTS_128("+f", "k16.f32.f16.f16", ", 1, 1, 0");
  }
  if constexpr (half == 64 && type == Matrix::f16 && transposed) {
    CISC_REGISTER_PRODUCTS_128("+f", "k16.f32.f16.f16", ", 1, 1, 1");
  }
  if constexpr (half == 64 && type == Matrix::bf16 && !transposed) {
    CISC_REGISTER_PRODUCTS_128("+f", "k16.f32.bf16.bf16", ", 1, 1, 0");
  }
  if constexpr (half == 64 && type == Matrix::bf16 && transposed) {
    CISC_REGISTER_PRODUCTS_128("+f", "k16.f32.bf16.bf16", ", 1, 1, 1");
  }
  if constexpr (half == 128 && type == Matrix::f16 && !transposed) {
    CISC_REGISTER_PRODUCTS_256("+f", "k16.f32.f16.f16", ", 1, 1, 0");
  }
  if constexpr (half == 128 && type == Matrix::f16 && transposed) {
    CISC_REGISTER_PRODUCTS_256("+f", "k16.f32.f16.f16", ", 1, 1, 1");
  }
  if constexpr (half == 128 && type == Matrix::bf16 && !transposed) {
    CISC_REGISTER_PRODUCTS_256("+f", "k16.f32.bf16.bf16", ", 1, 1, 0");
  }
  if constexpr (half == 128 && type == Matrix::bf16 && transposed) {
    CISC_REGISTER_PRODUCTS_256("+f", "k16.f32.bf16.bf16", ", 1, 1, 1");
  }
}

#undef CISC_PRODUCTS
#undef CISC_SUMS_8
#undef CISC_SUMS_32
#undef CISC_SUMS_64
#undef CISC_SUMS_128
#undef CISC_NAMES_32
#undef CISC_NAMES_64
#undef CISC_NAMES_128
#undef CISC_SHARED_PRODUCTS_64
#undef CISC_REGISTER_PRODUCTS_64
#undef CISC_SHARED_PRODUCTS_128
#undef CISC_REGISTER_PRODUCTS_128
#undef CISC_SHARED_PRODUCTS_256
#undef CISC_REGISTER_PRODUCTS_256

}  // namespace cisc
