// y = W x for a W with few non-zeros, batch after batch of up to sixteen x, fp32 accumulation.
// The definition is reference.py; layouts, maths and bytes are in README.md.
//
// One x: the weights of a row meet x where it lies, by expanding (bitmask) or gathering (columns).
// Several x: they lie transposed, so that one weight meets all of them in one vector.
//
// Plain C interface, no dependency. Instruction sets are chosen at run time.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define GOSSAMER_X86 1
#include <immintrin.h>
#define TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,bmi,bmi2,popcnt")))
#define TARGET_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

enum Layout : int { kBitmask = 0, kColumns = 1 };
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Values and columns end with this many unused entries: whole vectors are read at the end.
constexpr int kPad = 16;
constexpr int kAhead = 4096;  // bytes that values are fetched ahead

template <int W> struct Vectors;
template <> struct Vectors<4> {
    typedef float F __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
};
template <> struct Vectors<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef uint32_t U __attribute__((vector_size(32)));
};
template <> struct Vectors<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef uint32_t U __attribute__((vector_size(64)));
};

struct Float32 {
    using Stored = float;
    INLINE float one(const Stored* p) { return *p; }
    template <int W> INLINE typename Vectors<W>::F everywhere(const Stored* p) {
        uint32_t bits;  // spread as an integer: adding 0.0 would be an addition
        std::memcpy(&bits, p, 4);
        return (typename Vectors<W>::F)(typename Vectors<W>::U{} + bits);
    }
};
struct BFloat16 {
    using Stored = uint16_t;
    INLINE float one(const Stored* p) {
        const uint32_t bits = static_cast<uint32_t>(*p) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    // Two neighbours are read and the second shifted out: one instruction less than widening.
    template <int W> INLINE typename Vectors<W>::F everywhere(const Stored* p) {
        uint32_t pair;
        std::memcpy(&pair, p, 4);
        const typename Vectors<W>::U bits = (typename Vectors<W>::U{} + pair) << 16;
        return (typename Vectors<W>::F)bits;
    }
};

struct Job {
    const void* values;
    const void* index;     // words of 64 columns, (rows, words); or the columns of every value
    const int64_t* start;  // where each row begins, rows + 1; null when all have `fan` values
    int64_t rows, columns, fan, words;
    const float* x;  // as laid out by prepare()
    float* y;        // (batch, rows)
    int64_t batch, stride;

    int64_t begin(int64_t row) const { return start ? start[row] : row * fan; }
};

// ---- in C++ for any machine; compiled again for every instruction set --------------------------

template <class T, class Index>
INLINE float dot_one(const typename T::Stored* v, const Index* at, int64_t n, const float* x) {
    float sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; ++k) sum[k] += T::one(v + i + k) * x[at[i + k]];
    for (; i < n; ++i) sum[i & 7] += T::one(v + i) * x[at[i]];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

template <class T, class Index, int W>
INLINE void dot_wide(const typename T::Stored* v, const Index* at, int64_t n, const float* x,
                     float* out) {
    using F = typename Vectors<W>::F;
    F sum[4] = {};
    const auto row = [x](Index column) {
        F f;
        std::memcpy(&f, __builtin_assume_aligned(x + int64_t(column) * W, 4 * W), sizeof f);
        return f;
    };
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; ++k) sum[k] += T::template everywhere<W>(v + i + k) * row(at[i + k]);
    for (; i < n; ++i) sum[0] += T::template everywhere<W>(v + i) * row(at[i]);
    const F total = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    std::memcpy(out, &total, sizeof total);
}

// Columns of the bits that are set, ascending; out has room for kPad more.
INLINE void decode_any(const uint64_t* words, int64_t count, uint32_t* out) {
    for (int64_t w = 0; w < count; ++w)
        for (uint64_t m = words[w]; m; m &= m - 1) *out++ = uint32_t(64 * w + __builtin_ctzll(m));
}

template <class T, class Index, int W>
INLINE void row_of(const Job& job, int64_t r, const Index* at) {
    const auto* v = static_cast<const typename T::Stored*>(job.values) + job.begin(r);
    const int64_t n = job.begin(r + 1) - job.begin(r);
    if constexpr (W == 1) {
        job.y[r] = dot_one<T>(v, at, n, job.x);
    } else {
        float out[W];
        dot_wide<T, Index, W>(v, at, n, job.x, out);
        for (int64_t b = 0; b < job.batch; ++b) job.y[b * job.rows + r] = out[b];
    }
}

template <class T, class Index, int W> struct Columns {
    INLINE void run(const Job& job, int64_t begin, int64_t end) {
        const auto* at = static_cast<const Index*>(job.index);
        for (int64_t r = begin; r < end; ++r) row_of<T, Index, W>(job, r, at + job.begin(r));
    }
};

using Decode = void (*)(const uint64_t*, int64_t, uint32_t*);

template <class T, int W> struct Bits {
    INLINE void run(const Job& job, int64_t begin, int64_t end, Decode decode = nullptr) {
        static thread_local std::vector<uint32_t> at;
        at.resize(job.words * 64 + kPad);
        const auto* words = static_cast<const uint64_t*>(job.index);
        for (int64_t r = begin; r < end; ++r) {
            if (decode) decode(words + r * job.words, job.words, at.data());
            else decode_any(words + r * job.words, job.words, at.data());
            row_of<T, uint32_t, W>(job, r, at.data());
        }
    }
};

using Rows = void (*)(const Job&, int64_t, int64_t);

template <class K> void portable(const Job& job, int64_t begin, int64_t end) {
    K::run(job, begin, end);
}

#ifdef GOSSAMER_X86

template <class K> TARGET_AVX2 void avx2(const Job& job, int64_t begin, int64_t end) {
    K::run(job, begin, end);
}

template <class K> TARGET_AVX512 void avx512(const Job& job, int64_t begin, int64_t end) {
    K::run(job, begin, end);
}

// vexpand and vcompress wait for the last write to the register they fill (AMD, Zen 5), though they
// overwrite it: six cycles instead of one. Fresh zeros in the register break the chain; the empty
// assembly keeps compilers from seeing that they are not needed.
TARGET_AVX512 inline __m512i fresh() {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

TARGET_AVX512 void decode_avx512(const uint64_t* words, int64_t count, uint32_t* out) {
    const __m512i step = _mm512_set1_epi32(16);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t w = 0; w < count; ++w)
        for (uint64_t m = words[w], part = 0; part < 4; ++part, m >>= 16) {
            const __mmask16 k = static_cast<__mmask16>(m);
            _mm512_storeu_si512(out, _mm512_mask_compress_epi32(fresh(), k, at));
            out += __builtin_popcountll(m & 0xffff);
            at = _mm512_add_epi32(at, step);
        }
}

template <class T, int W>
TARGET_AVX512 void bits_avx512(const Job& job, int64_t begin, int64_t end) {
    Bits<T, W>::run(job, begin, end, decode_avx512);
}

TARGET_AVX512 inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
TARGET_AVX512 inline __m512 load16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
TARGET_AVX512 inline __m512i columns16(const uint32_t* p) { return _mm512_loadu_si512(p); }
TARGET_AVX512 inline __m512i columns16(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// One x, columns: sixteen at a time are gathered from x, which lies in the first cache.
template <class T, class Index>
TARGET_AVX512 void gather_avx512(const Job& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const auto* v = static_cast<const typename T::Stored*>(job.values) + job.begin(r);
        const auto* at = static_cast<const Index*>(job.index) + job.begin(r);
        const int64_t n = job.begin(r + 1) - job.begin(r);
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        int64_t i = 0;
        for (; i + 32 <= n; i += 32)
            for (int k = 0; k < 2; ++k) {
                const __m512 x = _mm512_i32gather_ps(columns16(at + i + 16 * k), job.x, 4);
                sum[k] = _mm512_fmadd_ps(load16(v + i + 16 * k), x, sum[k]);
            }
        for (; i < n; i += 16) {
            const __mmask16 k = static_cast<__mmask16>((1u << std::min<int64_t>(16, n - i)) - 1);
            const __m512 x =
                _mm512_mask_i32gather_ps(_mm512_setzero_ps(), k, columns16(at + i), job.x, 4);
            sum[0] = _mm512_mask3_fmadd_ps(load16(v + i), x, sum[0], k);
        }
        job.y[r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
    }
}

// A few x, bitmask: the values of sixteen columns are spread to their places and meet x there.
// Lanes without a weight are left out of the sum, so that what x holds there has no say.
template <class T, int B>
TARGET_AVX512 void expand_avx512(const Job& job, int64_t begin, int64_t end) {
    constexpr int kSums = B == 1 ? 4 : 2;
    for (int64_t r = begin; r < end; ++r) {
        const auto* v = static_cast<const typename T::Stored*>(job.values) + job.begin(r);
        const uint64_t* words = static_cast<const uint64_t*>(job.index) + r * job.words;
        __m512 sum[B][kSums];
        for (auto& of_x : sum)
            for (auto& part : of_x) part = _mm512_setzero_ps();
        const float* x = job.x;
        for (int64_t w = 0; w < job.words; ++w, x += 64) {
            const uint64_t m = words[w];
            // Values are read in uneven steps, which the processor does not foresee by itself.
            const char* ahead = reinterpret_cast<const char*>(v) + kAhead;
            _mm_prefetch(ahead, _MM_HINT_T0);
            if constexpr (sizeof(*v) == 4) _mm_prefetch(ahead + 64, _MM_HINT_T0);
            for (int q = 0; q < 4; ++q) {
                __mmask16 k = static_cast<__mmask16>(m >> (16 * q));
                __asm__("" : "+k"(k));  // moved to a mask register once
                // Counted from the start of the word: the four do not wait for one another.
                const int before = __builtin_popcountll(m & ((uint64_t(1) << (16 * q)) - 1));
                const __m512 e =
                    _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh()), k, load16(v + before));
                for (int b = 0; b < B; ++b) {
                    __m512& part = sum[b][q % kSums];
                    part = _mm512_mask3_fmadd_ps(e, _mm512_load_ps(x + b * job.stride + 16 * q),
                                                 part, k);
                }
            }
            v += __builtin_popcountll(m);
        }
        for (int b = 0; b < B; ++b) {
            __m512 total = _mm512_add_ps(sum[b][0], sum[b][1]);
            if constexpr (kSums == 4)
                total = _mm512_add_ps(total, _mm512_add_ps(sum[b][2], sum[b][3]));
            job.y[b * job.rows + r] = _mm512_reduce_add_ps(total);
        }
    }
}

// For AVX2, which cannot expand: where each of eight lanes finds its value, for every mask.
constexpr std::array<std::array<uint8_t, 8>, 256> places() {
    std::array<std::array<uint8_t, 8>, 256> table{};
    for (int m = 0; m < 256; ++m)
        for (int lane = 0, next = 0; lane < 8; ++lane)
            table[m][lane] = static_cast<uint8_t>((m >> lane & 1) ? next++ : 0x80);
    return table;
}
constexpr auto kPlaces = places();

TARGET_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
TARGET_AVX2 inline __m256 load8(const uint16_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

template <class T> TARGET_AVX2 void expand_avx2(const Job& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const auto* v = static_cast<const typename T::Stored*>(job.values) + job.begin(r);
        const uint64_t* words = static_cast<const uint64_t*>(job.index) + r * job.words;
        __m256 sum[4];
        for (auto& s : sum) s = _mm256_setzero_ps();
        const float* x = job.x;
        for (int64_t w = 0; w < job.words; ++w, x += 64) {
            uint64_t m = words[w];
            for (int q = 0; q < 8; ++q, m >>= 8) {
                const __m128i place =
                    _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces[m & 0xff].data()));
                // The sign of a lane says that it has no value.
                const __m256i lane = _mm256_cvtepi8_epi32(place);
                const __m256 e = _mm256_permutevar8x32_ps(load8(v), lane);
                const __m256 more = _mm256_fmadd_ps(e, _mm256_load_ps(x + 8 * q), sum[q & 3]);
                sum[q & 3] = _mm256_blendv_ps(more, sum[q & 3], _mm256_castsi256_ps(lane));
                v += __builtin_popcountll(m & 0xff);
            }
        }
        const __m256 all = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        job.y[r] = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
}

#endif

// ---- choosing and sharing ----------------------------------------------------------------------

int best_level() {
#ifdef GOSSAMER_X86
    __builtin_cpu_init();
    const bool old = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                     __builtin_cpu_supports("popcnt");
    if (old && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kAvx512;
    if (old) return kAvx2;
#endif
    return kPortable;
}

template <class K> Rows compiled_for(int level) {
#ifdef GOSSAMER_X86
    if (level == kAvx512) return avx512<K>;
    if (level == kAvx2) return avx2<K>;
#endif
    (void)level;
    return portable<K>;
}

template <class T, class Index> Rows columns_rows(int level, int lanes) {
#ifdef GOSSAMER_X86
    if (level == kAvx512 && lanes == 1) return gather_avx512<T, Index>;
#endif
    switch (lanes) {
        case 1: return compiled_for<Columns<T, Index, 1>>(level);
        case 4: return compiled_for<Columns<T, Index, 4>>(level);
        case 8: return compiled_for<Columns<T, Index, 8>>(level);
        default: return compiled_for<Columns<T, Index, 16>>(level);
    }
}

template <class T> Rows bits_rows(int level, int lanes, int64_t batch) {
#ifdef GOSSAMER_X86
    if (level == kAvx512 && lanes == 1) {
        switch (batch) {
            case 1: return expand_avx512<T, 1>;
            case 2: return expand_avx512<T, 2>;
            case 3: return expand_avx512<T, 3>;
            default: return expand_avx512<T, 4>;
        }
    }
    if (level == kAvx512) {
        if (lanes == 4) return bits_avx512<T, 4>;
        return lanes == 8 ? bits_avx512<T, 8> : bits_avx512<T, 16>;
    }
    if (level == kAvx2 && lanes == 1) return expand_avx2<T>;
#endif
    (void)batch;
    switch (lanes) {
        case 1: return compiled_for<Bits<T, 1>>(level);
        case 4: return compiled_for<Bits<T, 4>>(level);
        case 8: return compiled_for<Bits<T, 8>>(level);
        default: return compiled_for<Bits<T, 16>>(level);
    }
}

template <class T> Rows rows_for(int layout, int wide, int level, int lanes, int64_t batch) {
    if (layout == kBitmask) return bits_rows<T>(level, lanes, batch);
    return wide ? columns_rows<T, uint32_t>(level, lanes) : columns_rows<T, uint16_t>(level, lanes);
}

// Memory for x that stays: fresh pages cost more than filling them.
float* scratch(int64_t count) {
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < count + 16) kept.resize(count + 16);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t(63));
}

// lanes 1: every x padded to whole words of columns. Else transposed, (columns, lanes).
void prepare(Job& job, const float* x, int lanes) {
    job.stride = job.words * 64;
    float* to = scratch(lanes == 1 ? job.batch * job.stride : job.columns * lanes);
    job.x = to;
    if (lanes == 1) {
        for (int64_t b = 0; b < job.batch; ++b) {
            std::memcpy(to + b * job.stride, x + b * job.columns, job.columns * sizeof(float));
            std::fill(to + b * job.stride + job.columns, to + (b + 1) * job.stride, 0.0f);
        }
        return;
    }
    for (int64_t c = 0; c < job.columns; ++c)
        for (int b = 0; b < lanes; ++b)
            to[c * lanes + b] = b < job.batch ? x[b * job.columns + c] : 0.0f;
}

// The first row of share s of n: shares hold equally many values and row ends.
int64_t share(const Job& job, int64_t s, int64_t n) {
    if (s >= n) return job.rows;
    const int64_t weight = 16, total = job.begin(job.rows) + weight * job.rows;
    const int64_t wanted = total / n * s;
    int64_t low = 0, high = job.rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (job.begin(middle) + weight * middle < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

// void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags)
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

void spread(const Job& job, Rows rows, int threads, Parallel parallel) {
    if (threads <= 1) return rows(job, 0, job.rows);
    // More shares than threads: one held up by another program holds up little.
    struct Work {
        const Job& job;
        Rows rows;
        int64_t shares;
        std::atomic<int64_t> next{0};
        static void run(void* self) {
            auto& w = *static_cast<Work*>(self);
            for (int64_t s = w.next++; s < w.shares; s = w.next++)
                w.rows(w.job, share(w.job, s, w.shares), share(w.job, s + 1, w.shares));
        }
    } work{job, rows, int64_t(threads) * 8};
    if (parallel) return parallel(Work::run, &work, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(Work::run, &work);
    Work::run(&work);
    for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

// The instruction set this machine offers: 2 AVX-512, 1 AVX2, 0 portable.
int gossamer_sparse_level() { return best_level(); }

// y (batch, rows) = x (batch, columns) times the transposed matrix. layout: 0 bitmask, 1 columns
// (start null: every row has `fan` values); wide: columns of 32 bits instead of 16. parallel: the
// address of GOMP_parallel in the caller's thread pool, or null for threads of our own.
void gossamer_sparse_linear(const void* values, const void* index, const int64_t* start,
                            int64_t rows, int64_t columns, int64_t fan, const float* x, float* y,
                            int64_t batch, int layout, int dtype, int wide, int threads, int level,
                            Parallel parallel) {
    const int64_t few = layout == kBitmask && level == kAvx512 ? 4 : 1;
    for (int64_t done = 0; done < batch;) {
        const int64_t size = std::min<int64_t>(16, batch - done);
        const int lanes = size <= few ? 1 : size <= 4 ? 4 : size <= 8 ? 8 : 16;
        Job job{values, index, start, rows, columns, fan, (columns + 63) / 64, nullptr,
                y + done * rows, size, 0};
        prepare(job, x + done * columns, lanes);
        const Rows run = dtype == kFloat32 ? rows_for<Float32>(layout, wide, level, lanes, size)
                                           : rows_for<BFloat16>(layout, wide, level, lanes, size);
        // Below some tens of microseconds of work, waking threads costs more than they save.
        const int64_t work = start ? start[rows] : rows * fan;
        spread(job, run, work < (1 << 15) ? 1 : threads, parallel);
        done += size;
    }
}
}
