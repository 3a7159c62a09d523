// N:M selection: in every group of `of` consecutive scores, keep the `keep` largest, ties to
// the lower index. One pass: scores are read once, one byte (0 or 1) is written per score, and
// NaN is noticed on the way. The definition is reference.py; the maths is in README.md.
//
// An entry's rank is the number of entries of its group that go before it: those at least as
// large to its left, those larger to its right. It stays when its rank is below `keep`.
//
// Plain C interface, no dependency. Instruction sets are chosen at run time.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define GOSSAMER_X86 1
#include <immintrin.h>
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define TARGET_AVX2 __attribute__((target("avx2")))
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Half formats are ranked by integers in the order of their values: no conversion needed.
// Flags come back in the width of a score, so that a loop over them fills whole vectors.
struct Float32 {
    using Stored = float;
    using Key = float;
    INLINE Key key(Stored x) { return x; }
    INLINE int32_t nan(Stored x) { return x != x; }
};
struct Float64 {
    using Stored = double;
    using Key = double;
    INLINE Key key(Stored x) { return x; }
    INLINE int32_t nan(Stored x) { return x != x; }
};
template <int kInfinity>
struct Half {
    using Stored = uint16_t;
    using Key = int32_t;
    INLINE Key key(Stored x) {
        const int32_t size = x & 0x7fff;
        return x & 0x8000 ? -size : size;  // -0 and +0 are equal
    }
    INLINE int32_t nan(Stored x) { return (x & 0x7fff) > kInfinity; }
};
using Float16 = Half<0x7c00>;
using BFloat16 = Half<0x7f80>;

// Sixteen groups at a time lie side by side, so that every comparison fills a vector.
constexpr int kLanes = 16;
constexpr int kWidest = 64;

template <class T>
INLINE int rank_lanes(const typename T::Stored* in, uint8_t* out, int of, int keep) {
    using Key = typename T::Key;
    typename T::Stored raw[kWidest][kLanes];
    Key key[kWidest][kLanes];
    int32_t bad = 0;
    // Laid side by side first, and only then computed with: the moves are the scalar part.
    for (int g = 0; g < kLanes; ++g)
        for (int j = 0; j < of; ++j) raw[j][g] = in[g * of + j];
    for (int j = 0; j < of; ++j)
        for (int g = 0; g < kLanes; ++g) {
            key[j][g] = T::key(raw[j][g]);
            bad |= T::nan(raw[j][g]);
        }
    for (int j = 0; j < of; ++j) {
        // Summed in the score's own width: mixing widths would break the vectors up.
        Key rank[kLanes] = {};
        for (int k = 0; k < j; ++k)
            for (int g = 0; g < kLanes; ++g) rank[g] += key[k][g] >= key[j][g] ? Key(1) : Key(0);
        for (int k = j + 1; k < of; ++k)
            for (int g = 0; g < kLanes; ++g) rank[g] += key[k][g] > key[j][g] ? Key(1) : Key(0);
        for (int g = 0; g < kLanes; ++g) out[g * of + j] = rank[g] < Key(keep);
    }
    return bad;
}

template <class T>
INLINE int rank_one(const typename T::Stored* in, uint8_t* out, int of, int keep) {
    int bad = 0;
    for (int j = 0; j < of; ++j) {
        const auto mine = T::key(in[j]);
        int rank = 0;
        bad |= T::nan(in[j]);
        for (int k = 0; k < j; ++k) rank += T::key(in[k]) >= mine;
        for (int k = j + 1; k < of; ++k) rank += T::key(in[k]) > mine;
        out[j] = rank < keep;
    }
    return bad;
}

template <class T>
INLINE int rank_any(const void* in_, uint8_t* out, int64_t groups, int of, int keep) {
    const auto* in = static_cast<const typename T::Stored*>(in_);
    int bad = 0;
    int64_t g = 0;
    if (of <= kWidest)
        for (; g + kLanes <= groups; g += kLanes)
            bad |= rank_lanes<T>(in + g * of, out + g * of, of, keep);
    for (; g < groups; ++g) bad |= rank_one<T>(in + g * of, out + g * of, of, keep);
    return bad;
}

INLINE int rank_dtype(int dtype, const void* in, uint8_t* out, int64_t groups, int of, int keep) {
    switch (dtype) {
        case kFloat32: return rank_any<Float32>(in, out, groups, of, keep);
        case kFloat64: return rank_any<Float64>(in, out, groups, of, keep);
        case kFloat16: return rank_any<Float16>(in, out, groups, of, keep);
        default: return rank_any<BFloat16>(in, out, groups, of, keep);
    }
}

int rank_portable(int dtype, const void* in, uint8_t* out, int64_t groups, int of, int keep) {
    return rank_dtype(dtype, in, out, groups, of, keep);
}

#ifdef GOSSAMER_X86

// Groups of four float32: a vector holds whole groups, and every lane meets its three
// neighbours by rotating inside 128 bits. Lane i meets lane (i + r) % 4, which lies to its left,
// and therefore wins a tie, where i + r wraps around.

TARGET_AVX512 int fours_avx512(const float* in, uint8_t* out, int64_t groups, int keep) {
    constexpr __mmask16 kLeft1 = 0x8888, kLeft2 = 0xcccc, kLeft3 = 0xeeee;
    const int64_t total = groups * 4;
    __mmask16 bad = 0;
    int64_t i = 0;
    for (; i + 64 <= total; i += 64) {
        uint64_t bits = 0;
        for (int part = 0; part < 4; ++part) {
            const __m512 x = _mm512_loadu_ps(in + i + 16 * part);
            bad |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
            const __m512 a = _mm512_permute_ps(x, 0x39);
            const __m512 b = _mm512_permute_ps(x, 0x4e);
            const __m512 c = _mm512_permute_ps(x, 0x93);
            const __mmask16 p = _mm512_cmp_ps_mask(a, x, _CMP_GT_OQ) |
                                _mm512_mask_cmp_ps_mask(kLeft1, a, x, _CMP_EQ_OQ);
            const __mmask16 q = _mm512_cmp_ps_mask(b, x, _CMP_GT_OQ) |
                                _mm512_mask_cmp_ps_mask(kLeft2, b, x, _CMP_EQ_OQ);
            const __mmask16 r = _mm512_cmp_ps_mask(c, x, _CMP_GT_OQ) |
                                _mm512_mask_cmp_ps_mask(kLeft3, c, x, _CMP_EQ_OQ);
            const unsigned lost = keep == 1   ? (p | q | r)
                                  : keep == 2 ? ((p & q) | (p & r) | (q & r))
                                              : (p & q & r);
            bits |= static_cast<uint64_t>(static_cast<uint16_t>(~lost)) << (16 * part);
        }
        _mm512_storeu_si512(out + i, _mm512_maskz_set1_epi8(bits, 1));
    }
    int rest = 0;
    for (; i < total; i += 4) rest |= rank_one<Float32>(in + i, out + i, 4, keep);
    return rest | (bad != 0);
}

TARGET_AVX2 int fours_avx2(const float* in, uint8_t* out, int64_t groups, int keep) {
    const __m256 left1 = _mm256_castsi256_ps(_mm256_set_epi32(-1, 0, 0, 0, -1, 0, 0, 0));
    const __m256 left2 = _mm256_castsi256_ps(_mm256_set_epi32(-1, -1, 0, 0, -1, -1, 0, 0));
    const __m256 left3 = _mm256_castsi256_ps(_mm256_set_epi32(-1, -1, -1, 0, -1, -1, -1, 0));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const int64_t total = groups * 4;
    __m256 bad = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= total; i += 32) {
        __m256i kept[4];
        for (int part = 0; part < 4; ++part) {
            const __m256 x = _mm256_loadu_ps(in + i + 8 * part);
            bad = _mm256_or_ps(bad, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
            const __m256 a = _mm256_permute_ps(x, 0x39);
            const __m256 b = _mm256_permute_ps(x, 0x4e);
            const __m256 c = _mm256_permute_ps(x, 0x93);
            const __m256 p = _mm256_or_ps(_mm256_cmp_ps(a, x, _CMP_GT_OQ),
                                          _mm256_and_ps(left1, _mm256_cmp_ps(a, x, _CMP_EQ_OQ)));
            const __m256 q = _mm256_or_ps(_mm256_cmp_ps(b, x, _CMP_GT_OQ),
                                          _mm256_and_ps(left2, _mm256_cmp_ps(b, x, _CMP_EQ_OQ)));
            const __m256 r = _mm256_or_ps(_mm256_cmp_ps(c, x, _CMP_GT_OQ),
                                          _mm256_and_ps(left3, _mm256_cmp_ps(c, x, _CMP_EQ_OQ)));
            const __m256 any = _mm256_or_ps(p, _mm256_or_ps(q, r));
            const __m256 two = _mm256_or_ps(_mm256_and_ps(p, q), _mm256_and_ps(r, _mm256_or_ps(p, q)));
            const __m256 all = _mm256_and_ps(p, _mm256_and_ps(q, r));
            const __m256 lost = keep == 1 ? any : keep == 2 ? two : all;
            kept[part] = _mm256_andnot_si256(_mm256_castps_si256(lost), _mm256_set1_epi32(1));
        }
        // Packing works inside 128 bits; the permutation puts the pieces back in order.
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(kept[0], kept[1]),
                                                 _mm256_packs_epi32(kept[2], kept[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm256_permutevar8x32_epi32(bytes, order));
    }
    int rest = 0;
    for (; i < total; i += 4) rest |= rank_one<Float32>(in + i, out + i, 4, keep);
    return rest | (_mm256_movemask_ps(bad) != 0);
}

TARGET_AVX512 int rank_avx512(int dtype, const void* in, uint8_t* out, int64_t groups, int of,
                              int keep) {
    return rank_dtype(dtype, in, out, groups, of, keep);
}

TARGET_AVX2 int rank_avx2(int dtype, const void* in, uint8_t* out, int64_t groups, int of,
                          int keep) {
    return rank_dtype(dtype, in, out, groups, of, keep);
}

#endif

int best_level() {
#ifdef GOSSAMER_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
    return kPortable;
}

int rank(int level, int dtype, const void* in, uint8_t* out, int64_t groups, int of, int keep) {
#ifdef GOSSAMER_X86
    const bool fours = dtype == kFloat32 && of == 4;
    const auto* floats = static_cast<const float*>(in);
    if (level == kAvx512)
        return fours ? fours_avx512(floats, out, groups, keep)
                     : rank_avx512(dtype, in, out, groups, of, keep);
    if (level == kAvx2)
        return fours ? fours_avx2(floats, out, groups, keep)
                     : rank_avx2(dtype, in, out, groups, of, keep);
#endif
    (void)level;
    return rank_portable(dtype, in, out, groups, of, keep);
}

}  // namespace

extern "C" {

// The instruction set this machine offers: 2 AVX-512, 1 AVX2, 0 portable.
int gossamer_nm_level() { return best_level(); }

// Fill out[groups * of] with 1 where the score stays and 0 elsewhere. Returns 1 if a score is
// NaN (out is then meaningless), else 0. Needs 0 < keep < of and level <= gossamer_nm_level().
int gossamer_nm_mask(const void* in, uint8_t* out, int64_t groups, int of, int keep, int dtype,
                     int threads, int level) {
    const int64_t width = dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : 2;
    const auto* bytes = static_cast<const char*>(in);
    // A share is worth more than starting a thread, some ten microseconds. Threads take shares
    // until none is left, so that one held up by another program holds up little.
    const int64_t share = std::max<int64_t>(1, (1 << 18) / of);
    const int64_t shares = (groups + share - 1) / share;
    std::atomic<int64_t> next{0};
    std::atomic<int> bad{0};
    auto work = [&] {
        for (int64_t s = next++; s < shares; s = next++) {
            const int64_t begin = s * share, size = std::min(share, groups - begin);
            if (rank(level, dtype, bytes + begin * of * width, out + begin * of, size, of, keep))
                bad = 1;
        }
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min<int64_t>(threads, shares); ++t) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    return bad;
}
}
