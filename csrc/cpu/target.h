// What a file of one instruction set says to the compiler.
#pragma once

// The sums of a tile stay in registers only if what fills and what folds them become one function.
#if defined(__GNUC__)
#define BAGFORMER_INLINE inline __attribute__((always_inline))
#else
#define BAGFORMER_INLINE inline
#endif

// What lies between these two lines is compiled for processors that have `features`, whatever the
// rest of the build is for. Headers of the standard library come before: nothing that other files
// share may be compiled here.
#define BAGFORMER_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define BAGFORMER_TARGET_BEGIN(features) \
    BAGFORMER_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BAGFORMER_TARGET_END BAGFORMER_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define BAGFORMER_TARGET_BEGIN(features) \
    BAGFORMER_PRAGMA(GCC push_options)   \
    BAGFORMER_PRAGMA(GCC target(features))
#define BAGFORMER_TARGET_END BAGFORMER_PRAGMA(GCC pop_options)
#else
#define BAGFORMER_TARGET_BEGIN(features)
#define BAGFORMER_TARGET_END
#endif
