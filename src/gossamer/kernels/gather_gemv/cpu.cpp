// Products of one to four x with the rows of a matrix that matter, fp32 accumulation.
// The definitions are in reference.py, the bytes that must move in README.md.
//
// axpy: W lies channel-major, one row for every input channel; the rows of active channels, eight
// at a time, are added to a tile of the result that stays in the first cache.
// dot: W lies output-major; four rows at a time meet x, which stays in the first cache.
// Both fetch the rows of the next pass while they compute this one: rows lie anywhere, which the
// hardware cannot foresee. A whole MLP and a whole decode step are built of these.
//
// Plain C interface, no dependency. Instruction sets are chosen at run time.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define GOSSAMER_X86 1
#include <immintrin.h>
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
enum Act : int64_t { kSilu = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kRelu2 = 4, kNone = 5 };

constexpr int64_t kPad = 16;    // whole vectors are written at the end of lists
// Outputs that are summed together, for so many x: whole rows of 16 KB where they are long.
constexpr int64_t tile(int batch) { return batch == 1 ? 4096 : batch == 2 ? 2048 : 1024; }
constexpr int kMost = 4;        // x at once
constexpr int64_t kHead = 256;  // bytes of a row that are fetched a pass ahead

}  // namespace

extern "C" {

// One matrix. All fields have eight bytes; op.py mirrors them.
struct GossamerLinear {
    const void* weight;  // (in, out) if channel-major, else (out, in)
    const float* scale;  // (out) for int8, or null
    const float* bias;   // (out), or null
    const float* cut;    // channel j is active iff not |x_j| <= cut_j; null: all are
    int64_t in, out, cuts, dtype, channel_major;
    int64_t* seen;       // [channels read, channels] are added up here; or null
};

struct GossamerMlp {
    GossamerLinear gate, up, down;  // gate.weight null: act(up) goes down
    const float* mid;               // active iff not |act(gate)| <= mid; null: none
    int64_t mids, act;
    int64_t* seen;
};

struct GossamerBlock {
    GossamerLinear q, k, v, o;
    GossamerMlp mlp;
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;  // the last two may be null
};

struct GossamerModel {
    int64_t blocks, hidden, heads, kv_heads, head_dim, rotary, cache_dtype;
    const GossamerBlock* block;
    const float* final_norm;
    double epsilon, scaling;
};

// Keys and values of one block, (batch, kv_heads, room, head_dim) with rows side by side.
struct GossamerCache {
    void *keys, *values;
    int64_t batch_stride, head_stride;
};

// void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags)
typedef void (*GossamerParallel)(void (*)(void*), void*, unsigned, unsigned);
}

namespace {

using Linear = GossamerLinear;
using Mlp = GossamerMlp;

// ---- vectors -----------------------------------------------------------------------------------

template <int W> struct Vectors {
    typedef float F __attribute__((vector_size(4 * W)));
    typedef int32_t I __attribute__((vector_size(4 * W)));
    typedef uint32_t U __attribute__((vector_size(4 * W)));
};

template <class V, class P> INLINE V read(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// How weights become floats. A group is kGroup vectors from W words of memory: vector g holds the
// elements g, g + kGroup, ... of the group, which takes shifts only; `place` is where an element of
// the group then lies. Widening neighbours instead costs a shuffle for every vector.
struct Float32 {
    using Stored = float;
    static constexpr int kGroup = 1;
    INLINE float one(const Stored* p) { return *p; }
    template <int W> INLINE void group(const Stored* p, typename Vectors<W>::F* to) {
        to[0] = read<typename Vectors<W>::F>(p);
    }
};
struct BFloat16 {
    using Stored = uint16_t;
    static constexpr int kGroup = 2;
    INLINE float one(const Stored* p) {
        const uint32_t bits = static_cast<uint32_t>(*p) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    template <int W> INLINE void group(const Stored* p, typename Vectors<W>::F* to) {
        using F = typename Vectors<W>::F;
        const auto words = read<typename Vectors<W>::U>(p);
        to[0] = (F)(words << 16);
        to[1] = (F)(words & 0xffff0000u);
    }
};
struct Int8 {
    using Stored = int8_t;
    static constexpr int kGroup = 4;
    INLINE float one(const Stored* p) { return *p; }
    template <int W> INLINE void group(const Stored* p, typename Vectors<W>::F* to) {
        using F = typename Vectors<W>::F;
        using I = typename Vectors<W>::I;
        const I words = read<I>(p);
        to[0] = __builtin_convertvector((words << 24) >> 24, F);
        to[1] = __builtin_convertvector((words << 16) >> 24, F);
        to[2] = __builtin_convertvector((words << 8) >> 24, F);
        to[3] = __builtin_convertvector(words >> 24, F);
    }
};

// Of element i of a list of n, in groups of W * G; the rest behind whole groups stays in order.
template <int W, int G> INLINE int64_t place(int64_t i, int64_t n) {
    constexpr int64_t size = W * G;
    if (G == 1 || i >= n / size * size) return i;
    return i / size * size + i % G * W + i % size / G;
}

template <int W> INLINE float total(typename Vectors<W>::F v) {
    float lane[W];
    std::memcpy(lane, &v, sizeof v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

// e to the x, relative error below 3e-7 where the result is normal; NaN stays NaN.
template <int W> INLINE typename Vectors<W>::F exponential(typename Vectors<W>::F x) {
    using F = typename Vectors<W>::F;
    using I = typename Vectors<W>::I;
    const F low = F{} - 87.3f, high = F{} + 88.3f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const F n = (x * 1.44269504089f + magic) - magic;
    F r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F p = F{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const F known = x == x ? n : F{};
    const I power = (__builtin_convertvector(known, I) + 127) << 23;
    return p * (F)power;
}

// ---- axpy: rows of active channels are added up ------------------------------------------------

struct Product {
    const void* weight;
    const int32_t* index;  // rows to visit; null: 0, 1, 2 ...
    int64_t count;         // of them
    const float* x;        // axpy: (batch, stride) at the index; dot: (batch, in)
    int64_t stride;
    float* y;              // (batch, y_stride)
    int64_t y_stride;
    const float *scale, *bias;
    int64_t in, out, batch;
};

template <class T, int W, int B, int R, int U>
INLINE void axpy_pass(const typename T::Stored* const* row, const typename T::Stored* const* next,
                      const float (*x)[B], float (*y)[tile(B)], int64_t size) {
    using F = typename Vectors<W>::F;
    constexpr int G = T::kGroup;
    constexpr int64_t kStep = W * G;
    F factor[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) factor[r][b] = F{} + x[r][b];
    // The start of the rows to come; the hardware follows from there. Of narrow weights, whose rows
    // are short in bytes, everything is fetched ahead below.
    for (int r = 0; r < R; ++r)
        for (int64_t byte = 0; byte < std::min<int64_t>(kHead, size * 4 / G); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(next[r]) + byte, 0, 3);
    // U groups at once while they last, then one at a time.
    const auto some = [&](int64_t o, auto units) __attribute__((always_inline)) {
        constexpr int N = decltype(units)::value;
        F sum[B][N * G];
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < N * G; ++v) sum[b][v] = read<F>(y[b] + o + v * W);
        for (int r = 0; r < R; ++r) {
            if (G > 1) {
                const char* ahead = reinterpret_cast<const char*>(next[r] + o);
                for (int byte = 0; byte < N * W * 4; byte += 64)
                    __builtin_prefetch(ahead + byte, 0, 3);
            }
            for (int u = 0; u < N; ++u) {
                F w[G];
                T::template group<W>(row[r] + o + u * kStep, w);
                for (int g = 0; g < G; ++g)
                    for (int b = 0; b < B; ++b) sum[b][u * G + g] += factor[r][b] * w[g];
            }
        }
        for (int b = 0; b < B; ++b)
            for (int v = 0; v < N * G; ++v) std::memcpy(y[b] + o + v * W, &sum[b][v], sizeof(F));
    };
    int64_t o = 0;
    for (; o + U * kStep <= size; o += U * kStep) some(o, std::integral_constant<int, U>{});
    for (; o + kStep <= size; o += kStep) some(o, std::integral_constant<int, 1>{});
    for (; o < size; ++o)
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r) y[b][o] += x[r][b] * T::one(row[r] + o);
}

template <class T, int W, int B> struct Axpy {
    using S = typename T::Stored;
    static constexpr int G = T::kGroup;
    template <int R>
    INLINE void visit(const Product& j, int64_t k, int64_t begin, int64_t size, float (*y)[tile(B)]) {
        constexpr int U = B == 1 ? (G == 4 ? 1 : 4 / G) : (G == 1 ? 2 : 1);
        const S* w = static_cast<const S*>(j.weight) + begin;
        const S *row[R], *next[R];
        float x[R][B];
        for (int r = 0; r < R; ++r) {
            const int64_t here = k + r, then = std::min(k + R + r, j.count - 1);
            row[r] = w + (j.index ? j.index[here] : here) * j.out;
            next[r] = w + (j.index ? j.index[then] : then) * j.out;
            for (int b = 0; b < B; ++b) x[r][b] = j.x[b * j.stride + here];
        }
        axpy_pass<T, W, B, R, U>(row, next, x, y, size);
    }
    INLINE void run(const Product& j, int64_t first, int64_t last) {
        constexpr int R = B <= 2 ? 8 : B == 4 && G == 4 ? 2 : 4;
        alignas(64) float y[B][tile(B)];  // in the order of the groups
        for (int64_t begin = first; begin < last; begin += tile(B)) {
            const int64_t size = std::min(begin + tile(B), last) - begin;
            std::memset(y, 0, sizeof y);
            int64_t k = 0;
            for (; k + R <= j.count; k += R) visit<R>(j, k, begin, size, y);
            for (; k < j.count; ++k) visit<1>(j, k, begin, size, y);
            for (int b = 0; b < B; ++b)
                for (int64_t o = 0; o < size; ++o) {
                    float value = y[b][place<W, G>(o, size)];
                    if (j.scale) value *= j.scale[begin + o];
                    if (j.bias) value += j.bias[begin + o];
                    j.y[b * j.y_stride + begin + o] = value;
                }
        }
    }
};

// ---- dot: chosen outputs ------------------------------------------------------------------------

template <class T, int W, int B> struct Dot {
    using S = typename T::Stored;
    using F = typename Vectors<W>::F;
    static constexpr int G = T::kGroup;
    // x in the order of the groups.
    template <int R>
    INLINE void visit(const Product& j, int64_t k, const float* ordered, int64_t stride) {
        constexpr int U = B == 1 && G == 1 ? 2 : 1;
        constexpr int V = U * G < 2 ? 1 : 2;  // sums of a row, so that they do not wait
        constexpr int64_t kStep = W * G;
        const S* w = static_cast<const S*>(j.weight);
        const S *row[R], *next[R];
        for (int r = 0; r < R; ++r) {
            const int64_t then = std::min(k + R + r, j.count - 1);
            row[r] = w + (j.index ? j.index[k + r] : k + r) * j.in;
            next[r] = w + (j.index ? j.index[then] : then) * j.in;
        }
        for (int r = 0; r < R; ++r)
            for (int64_t byte = 0; byte < std::min<int64_t>(kHead, j.in * 4 / G); byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(next[r]) + byte, 0, 3);
        F sum[R][B][V] = {};
        int64_t c = 0;
        for (; c + U * kStep <= j.in; c += U * kStep) {
            F x[B][U * G];
            for (int b = 0; b < B; ++b)
                for (int v = 0; v < U * G; ++v) x[b][v] = read<F>(ordered + b * stride + c + v * W);
            for (int r = 0; r < R; ++r) {
                if (G > 1) {
                    const char* ahead = reinterpret_cast<const char*>(next[r] + c);
                    for (int byte = 0; byte < U * W * 4; byte += 64)
                        __builtin_prefetch(ahead + byte, 0, 3);
                }
                for (int u = 0; u < U; ++u) {
                    F v[G];
                    T::template group<W>(row[r] + c + u * kStep, v);
                    for (int g = 0; g < G; ++g)
                        for (int b = 0; b < B; ++b)
                            sum[r][b][(u * G + g) % V] += x[b][u * G + g] * v[g];
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            const int64_t o = j.index ? j.index[k + r] : k + r;
            for (int b = 0; b < B; ++b) {
                F all = sum[r][b][0];
                if constexpr (V == 2) all += sum[r][b][V - 1];
                float value = total<W>(all);
                for (int64_t t = c; t < j.in; ++t) value += j.x[b * j.stride + t] * T::one(row[r] + t);
                if (j.scale) value *= j.scale[o];
                if (j.bias) value += j.bias[o];
                j.y[b * j.y_stride + k + r] = value;
            }
        }
    }
    INLINE void run(const Product& j, int64_t begin, int64_t end) {
        const float* ordered = j.x;
        int64_t stride = j.stride;
        if (G > 1) {
            static thread_local std::vector<float> kept;
            stride = j.in;
            kept.resize(size_t(B * stride));
            for (int b = 0; b < B; ++b)
                for (int64_t i = 0; i < j.in; ++i)
                    kept[size_t(b * stride + place<W, G>(i, j.in))] = j.x[b * j.stride + i];
            ordered = kept.data();
        }
        constexpr int R = B >= 3 && G == 4 ? 2 : 4;
        int64_t k = begin;
        for (; k + R <= end; k += R) visit<R>(j, k, ordered, stride);
        for (; k < end; ++k) visit<1>(j, k, ordered, stride);
    }
};

// ---- one query per sequence ---------------------------------------------------------------------

struct Attention {
    const float* q;      // (batch, heads, dim)
    GossamerCache cache;
    const uint8_t* mask; // (batch, length), 0: not seen; or null
    float *scores, *y;   // (batch, heads, length), (batch, heads, dim)
    int64_t batch, heads, kv_heads, dim, length;
    float scaling;
};

template <class T, int W> struct Attend {
    using S = typename T::Stored;
    using F = typename Vectors<W>::F;
    static constexpr int G = T::kGroup;
    static constexpr int64_t kStep = W * G;
    INLINE void run(const Attention& a, int64_t begin, int64_t end) {
        static thread_local std::vector<float> kept;
        kept.resize(size_t(2 * a.dim));
        float *q = kept.data(), *y = q + a.dim;  // both in the order of the groups
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t b = unit / a.heads, h = unit % a.heads, kv = h / (a.heads / a.kv_heads);
            const int64_t offset = b * a.cache.batch_stride + kv * a.cache.head_stride;
            const S* keys = static_cast<const S*>(a.cache.keys) + offset;
            const S* values = static_cast<const S*>(a.cache.values) + offset;
            float* score = a.scores + unit * a.length;
            for (int64_t d = 0; d < a.dim; ++d) q[place<W, G>(d, a.dim)] = a.q[unit * a.dim + d];
            float most = -INFINITY, sum = 0;
            for (int64_t t = 0; t < a.length; ++t) {
                const S* key = keys + t * a.dim;
                F part = {}, w[G];
                int64_t d = 0;
                for (; d + kStep <= a.dim; d += kStep) {
                    T::template group<W>(key + d, w);
                    for (int g = 0; g < G; ++g) part += read<F>(q + d + g * W) * w[g];
                }
                float s = total<W>(part);
                for (; d < a.dim; ++d) s += q[d] * T::one(key + d);
                s *= a.scaling;
                if (a.mask && !a.mask[b * a.length + t]) s = -INFINITY;
                score[t] = s;
                most = s > most || s != s ? s : most;
            }
            for (int64_t t = 0; t < a.length; ++t) sum += score[t] = std::exp(score[t] - most);
            std::fill(y, y + a.dim, 0.0f);
            for (int64_t t = 0; t < a.length; ++t) {
                const S* value = values + t * a.dim;
                const float weight = score[t] / sum;
                F w[G];
                int64_t d = 0;
                for (; d + kStep <= a.dim; d += kStep) {
                    T::template group<W>(value + d, w);
                    for (int g = 0; g < G; ++g) {
                        const F more = read<F>(y + d + g * W) + weight * w[g];
                        std::memcpy(y + d + g * W, &more, sizeof more);
                    }
                }
                for (; d < a.dim; ++d) y[d] += weight * T::one(value + d);
            }
            for (int64_t d = 0; d < a.dim; ++d) a.y[unit * a.dim + d] = y[place<W, G>(d, a.dim)];
        }
    }
};

// ---- elementwise --------------------------------------------------------------------------------

struct Elements {
    float* gate;      // act(gate) or act(gate) * up is left here
    const float* up;  // or null
    int64_t act;
};

INLINE float act_one(float x, int64_t act) {
    switch (act) {
        case kSilu: return x / (1.0f + std::exp(-x));
        case kRelu: return x < 0 ? 0.0f : x;
        case kRelu2: return x < 0 ? 0.0f : x * x;
        case kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
        case kGeluTanh:
            return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        default: return x;
    }
}

template <int W> struct Activate {
    using F = typename Vectors<W>::F;
    INLINE void run(const Elements& e, int64_t begin, int64_t end) {
        int64_t i = begin;
        if (e.act == kSilu)
            for (; i + W <= end; i += W) {
                const F x = read<F>(e.gate + i);
                F value = x / (1.0f + exponential<W>(-x));
                if (e.up) value *= read<F>(e.up + i);
                std::memcpy(e.gate + i, &value, sizeof value);
            }
        for (; i < end; ++i) {
            const float value = act_one(e.gate[i], e.act);
            e.gate[i] = e.up ? value * e.up[i] : value;
        }
    }
};

struct Norm {
    const float *x, *weight;
    float* y;
    int64_t size;
    float epsilon;
};

template <int W> struct Normalise {
    using F = typename Vectors<W>::F;
    INLINE void run(const Norm& n, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const float* x = n.x + row * n.size;
            float* y = n.y + row * n.size;
            F sum[2] = {};
            int64_t i = 0;
            for (; i + 2 * W <= n.size; i += 2 * W)
                for (int k = 0; k < 2; ++k) {
                    const F v = read<F>(x + i + k * W);
                    sum[k] += v * v;
                }
            float square = total<W>(sum[0] + sum[1]);
            for (; i < n.size; ++i) square += x[i] * x[i];
            const float factor = 1.0f / std::sqrt(square / float(n.size) + n.epsilon);
            for (i = 0; i < n.size; ++i) y[i] = n.weight[i] * (x[i] * factor);
        }
    }
};

// ---- which channels are active ------------------------------------------------------------------

struct Channels {
    const float* x;       // (batch, size)
    const float* cut;
    const uint8_t* dense; // (batch): this x keeps every channel; or null
    int64_t size, cuts, batch;
    int32_t* index;       // room for size + kPad
    float* packed;        // (batch, size + kPad): x at the index, 0 where that x drops the channel
    int64_t count;
};

INLINE void compact_from(Channels& c, int64_t i, int64_t n) {
    const int64_t room = c.size + kPad;
    for (; i < c.size; ++i) {
        const float cut = c.cut[c.cuts == 1 ? 0 : i];
        bool any = false;
        c.index[n] = static_cast<int32_t>(i);
        for (int64_t b = 0; b < c.batch; ++b) {
            const float x = c.x[b * c.size + i];
            const bool active = !(std::fabs(x) <= cut) || (c.dense && c.dense[b]);
            c.packed[b * room + n] = active ? x : 0.0f;
            any |= active;
        }
        n += any;
    }
    c.count = n;
}

void compact_any(Channels& c) { compact_from(c, 0, 0); }

// ---- compiled for every instruction set ---------------------------------------------------------

template <class J> using Run = void (*)(const J&, int64_t, int64_t);

template <class K, class J> void portable(const J& job, int64_t begin, int64_t end) {
    K::run(job, begin, end);
}

#ifdef GOSSAMER_X86

template <class K, class J> TARGET_AVX2 void avx2(const J& job, int64_t begin, int64_t end) {
    K::run(job, begin, end);
}

template <class K, class J> TARGET_AVX512 void avx512(const J& job, int64_t begin, int64_t end) {
    K::run(job, begin, end);
}

// vcompress waits for the last write to the register it fills (Zen 5); fresh zeros break the chain.
TARGET_AVX512 inline __m512i fresh() {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

TARGET_AVX512 void compact_avx512(Channels& c) {
    if (c.batch != 1 || c.dense) return compact_any(c);
    const __m512i step = _mm512_set1_epi32(16);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 same = _mm512_set1_ps(c.cut[0]);
    int64_t i = 0, n = 0;
    for (; i + 16 <= c.size; i += 16) {
        const __m512 x = _mm512_loadu_ps(c.x + i);
        const __m512 cut = c.cuts == 1 ? same : _mm512_loadu_ps(c.cut + i);
        const __mmask16 k = _mm512_cmp_ps_mask(_mm512_abs_ps(x), cut, _CMP_NLE_UQ);
        _mm512_storeu_si512(c.index + n, _mm512_mask_compress_epi32(fresh(), k, at));
        _mm512_storeu_ps(c.packed + n,
                         _mm512_mask_compress_ps(_mm512_castsi512_ps(fresh()), k, x));
        n += __builtin_popcount(k);
        at = _mm512_add_epi32(at, step);
    }
    compact_from(c, i, n);
}

#endif

template <class J, template <int> class K> Run<J> for_level(int level) {
#ifdef GOSSAMER_X86
    if (level == kAvx512) return avx512<K<16>, J>;
    if (level == kAvx2) return avx2<K<8>, J>;
#endif
    (void)level;
    return portable<K<4>, J>;
}

template <template <class, int, int> class K, class T, int B> struct Bound {
    template <int W> using At = K<T, W, B>;
};

template <template <class, int, int> class K, class T> Run<Product> for_batch(int level, int64_t b) {
    switch (b) {
        case 1: return for_level<Product, Bound<K, T, 1>::template At>(level);
        case 2: return for_level<Product, Bound<K, T, 2>::template At>(level);
        case 3: return for_level<Product, Bound<K, T, 3>::template At>(level);
        default: return for_level<Product, Bound<K, T, 4>::template At>(level);
    }
}

template <template <class, int, int> class K>
Run<Product> product_for(int level, int64_t dtype, int64_t batch) {
    if (dtype == kFloat32) return for_batch<K, Float32>(level, batch);
    if (dtype == kBFloat16) return for_batch<K, BFloat16>(level, batch);
    return for_batch<K, Int8>(level, batch);
}

template <class T> struct AttendIn {
    template <int W> using At = Attend<T, W>;
};

int best_level() {
#ifdef GOSSAMER_X86
    __builtin_cpu_init();
    const bool old = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (old && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kAvx512;
    if (old) return kAvx2;
#endif
    return kPortable;
}

// ---- sharing among threads ----------------------------------------------------------------------

// Memory for what lies between stages: kept from call to call, because fresh pages cost more than
// filling them. Pieces stay where they are until the next reset.
class Arena {
    std::vector<std::pair<std::unique_ptr<char[]>, size_t>> pieces;
    size_t piece = 0, used = 0;

  public:
    void reset() { piece = used = 0; }
    template <class T> T* take(int64_t count) {
        const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
        for (; piece < pieces.size(); ++piece, used = 0)
            if (used + bytes <= pieces[piece].second) break;
        if (piece == pieces.size()) {
            const size_t size = std::max<size_t>(bytes + 64, size_t(1) << 20);
            pieces.emplace_back(std::unique_ptr<char[]>(new char[size]), size);
            used = 0;
        }
        const auto start = reinterpret_cast<uintptr_t>(pieces[piece].first.get());
        const size_t shift = (64 - start % 64) % 64;
        if (used < shift) used = shift;
        char* found = pieces[piece].first.get() + used;
        used += bytes;
        return reinterpret_cast<T*>(found);
    }
};

struct Machine {
    int threads, level;
    GossamerParallel parallel;
    Arena& arena;
};

Arena& arena() {
    static thread_local Arena kept;
    return kept;
}

constexpr int64_t kSmall = 1 << 15;  // products below which waking threads costs more than it saves

// Up to three jobs side by side; every thread takes the same share of each.
template <class J> struct Stage {
    J job[3];
    Run<J> run[3];
    int64_t units[3], grain[3];
    int count = 0;
    int64_t work = 0;  // products
    int64_t shares = 1;
    std::atomic<int64_t> next{0};

    void add(const J& one, Run<J> how, int64_t size, int64_t unit, int64_t cost) {
        job[count] = one;
        run[count] = how;
        units[count] = size;
        grain[count++] = unit;
        work += cost;
    }
    void share(int64_t s) {
        for (int i = 0; i < count; ++i) {
            const int64_t grains = (units[i] + grain[i] - 1) / grain[i];
            const int64_t begin = grains * s / shares * grain[i];
            const int64_t end = std::min(grains * (s + 1) / shares * grain[i], units[i]);
            if (begin < end) run[i](job[i], begin, end);
        }
    }
    static void enter(void* self) {
        auto& stage = *static_cast<Stage*>(self);
        for (int64_t s = stage.next++; s < stage.shares; s = stage.next++) stage.share(s);
    }
    void go(const Machine& m) {
        if (m.threads <= 1 || work < kSmall) return share(0);
        shares = m.threads;
        if (m.parallel) return m.parallel(enter, this, unsigned(m.threads), 0);
        std::vector<std::thread> others;
        for (int t = 1; t < m.threads; ++t) others.emplace_back(enter, this);
        enter(this);
        for (auto& other : others) other.join();
    }
};

// ---- linear layers, the MLP, the step -----------------------------------------------------------

void compact(const Machine& m, Channels& c) {
    c.index = m.arena.take<int32_t>(c.size + kPad);
    c.packed = m.arena.take<float>(c.batch * (c.size + kPad));
#ifdef GOSSAMER_X86
    if (m.level == kAvx512) return compact_avx512(c);
#endif
    compact_any(c);
}

void count(int64_t* seen, int64_t read, int64_t all) {
    if (seen) {
        seen[0] += read;
        seen[1] += all;
    }
}

bool all_dense(const uint8_t* dense, int64_t batch) {
    return dense && std::all_of(dense, dense + batch, [](uint8_t d) { return d != 0; });
}

// One linear layer into a stage; y (batch, out). Lists made here live until the arena is reset.
void linear(const Machine& m, Stage<Product>& stage, const Linear& l, const float* x,
            const uint8_t* dense, int64_t batch, float* y) {
    Product p{l.weight, nullptr, l.in, x, l.in, y, l.out, l.scale, l.bias, l.in, l.out, batch};
    if (l.cut && !all_dense(dense, batch)) {
        Channels c{x, l.cut, dense, l.in, l.cuts, batch, nullptr, nullptr, 0};
        compact(m, c);
        p.count = c.count;
        p.index = c.index;
        p.x = c.packed;
        p.stride = l.in + kPad;
    }
    count(l.seen, p.count, l.in);
    if (l.channel_major) {
        stage.add(p, product_for<Axpy>(m.level, l.dtype, batch), l.out, 64,
                  p.count * l.out * batch);
        return;
    }
    if (p.index) {  // output-major: the dropped channels are zeros, every weight is read
        float* zeroed = m.arena.take<float>(batch * l.in);
        std::memset(zeroed, 0, batch * l.in * sizeof(float));
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t k = 0; k < p.count; ++k)
                zeroed[b * l.in + p.index[k]] = p.x[b * p.stride + k];
        p.x = zeroed;
        p.stride = l.in;
        p.index = nullptr;
    }
    p.count = l.out;
    stage.add(p, product_for<Dot>(m.level, l.dtype, batch), l.out, 4, l.in * l.out * batch);
}

void one_linear(const Machine& m, const Linear& l, const float* x, const uint8_t* dense,
                int64_t batch, float* y) {
    Stage<Product> stage;
    linear(m, stage, l, x, dense, batch, y);
    stage.go(m);
}

void activate(const Machine& m, float* gate, const float* up, int64_t size, int64_t act) {
    Stage<Elements> stage;
    const int64_t cost = size * (act == kSilu ? 4 : 16);
    stage.add({gate, up, act}, for_level<Elements, Activate>(m.level), size, 64, cost);
    stage.go(m);
}

// The neurons that act(gate) leaves active: the rest of `up` and `down` is not read.
void mlp_chosen(const Machine& m, const Mlp& p, const float* x, const uint8_t* dense,
                int64_t batch, float* y) {
    const int64_t inner = p.gate.out, room = inner + kPad;
    float* gate = m.arena.take<float>(batch * inner);
    one_linear(m, p.gate, x, dense, batch, gate);
    activate(m, gate, nullptr, batch * inner, p.act);
    Channels c{gate, p.mid, dense, inner, p.mids, batch, nullptr, nullptr, 0};
    compact(m, c);
    count(p.seen, c.count, inner);
    float* up = m.arena.take<float>(batch * room);
    Stage<Product> rows;
    rows.add({p.up.weight, c.index, c.count, x, p.up.in, up, room, p.up.scale, p.up.bias, p.up.in,
              p.up.out, batch},
             product_for<Dot>(m.level, p.up.dtype, batch), c.count, 4, c.count * p.up.in * batch);
    rows.go(m);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = 0; k < c.count; ++k) up[b * room + k] *= c.packed[b * room + k];
    Stage<Product> down;
    const Linear& d = p.down;
    if (d.cut) {  // a second threshold, on what enters `down`
        int64_t kept = 0;
        for (int64_t k = 0; k < c.count; ++k) {
            const int32_t j = c.index[k];
            bool any = false;
            for (int64_t b = 0; b < batch; ++b) {
                const float a = up[b * room + k];
                const bool active =
                    !(std::fabs(a) <= d.cut[d.cuts == 1 ? 0 : j]) || (dense && dense[b]);
                up[b * room + kept] = active ? a : 0.0f;
                any |= active;
            }
            c.index[kept] = j;
            kept += any;
        }
        c.count = kept;
    }
    count(d.seen, c.count, inner);
    down.add({d.weight, c.index, c.count, up, room, y, d.out, d.scale, d.bias, d.in, d.out, batch},
             product_for<Axpy>(m.level, d.dtype, batch), d.out, 64, c.count * d.out * batch);
    down.go(m);
}

void mlp(const Machine& m, const Mlp& p, const float* x, const uint8_t* dense, int64_t batch,
         float* y) {
    if (p.mid && !all_dense(dense, batch)) return mlp_chosen(m, p, x, dense, batch, y);
    const int64_t inner = p.up.out;
    float* up = m.arena.take<float>(batch * inner);
    float* gate = p.gate.weight ? m.arena.take<float>(batch * inner) : nullptr;
    Stage<Product> both;
    if (gate) linear(m, both, p.gate, x, dense, batch, gate);
    linear(m, both, p.up, x, dense, batch, up);
    both.go(m);
    activate(m, gate ? gate : up, gate ? up : nullptr, batch * inner, p.act);
    one_linear(m, p.down, gate ? gate : up, dense, batch, y);
}

void normalise(const Machine& m, const float* x, const float* weight, float* y, int64_t rows,
               int64_t size, double epsilon) {
    for_level<Norm, Normalise>(m.level)({x, weight, y, size, float(epsilon)}, 0, rows);
}

// Halves of a head turn against each other: (a, b) -> (a cos - b sin, b cos + a sin).
void rotate(float* x, const float* cos, const float* sin, int64_t heads, int64_t dim,
            int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t h = 0; h < heads; ++h, x += dim)
        for (int64_t d = 0; d < half; ++d) {
            const float a = x[d], b = x[d + half];
            x[d] = a * cos[d] - b * sin[d];
            x[d + half] = b * cos[d + half] + a * sin[d + half];
        }
}

void append(void* cache, int64_t dtype, int64_t offset, const float* x, int64_t dim) {
    if (dtype == kFloat32) {
        std::memcpy(static_cast<float*>(cache) + offset, x, dim * sizeof(float));
        return;
    }
    auto* to = static_cast<uint16_t*>(cache) + offset;
    for (int64_t d = 0; d < dim; ++d) {
        uint32_t bits;
        std::memcpy(&bits, x + d, 4);
        const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
        to[d] = uint16_t(x[d] != x[d] ? 0x7fc0 : rounded >> 16);
    }
}

void step(const Machine& m, const GossamerModel& g, float* hidden, const float* cos,
          const float* sin, const GossamerCache* caches, int64_t past, const uint8_t* mask,
          const uint8_t* dense, int64_t batch, float* out) {
    const int64_t wide = g.heads * g.head_dim, narrow = g.kv_heads * g.head_dim;
    const int64_t length = past + 1;
    for (int64_t i = 0; i < g.blocks; ++i) {
        m.arena.reset();
        const GossamerBlock& block = g.block[i];
        float* x = m.arena.take<float>(batch * g.hidden);
        float *q = m.arena.take<float>(batch * wide), *k = m.arena.take<float>(batch * narrow);
        float *v = m.arena.take<float>(batch * narrow), *mixed = m.arena.take<float>(batch * wide);
        float* y = m.arena.take<float>(batch * g.hidden);
        normalise(m, hidden, block.attention_norm, x, batch, g.hidden, g.epsilon);
        Stage<Product> read;
        linear(m, read, block.q, x, dense, batch, q);
        linear(m, read, block.k, x, dense, batch, k);
        linear(m, read, block.v, x, dense, batch, v);
        read.go(m);
        if (block.q_norm) normalise(m, q, block.q_norm, q, batch * g.heads, g.head_dim, g.epsilon);
        if (block.k_norm)
            normalise(m, k, block.k_norm, k, batch * g.kv_heads, g.head_dim, g.epsilon);
        const GossamerCache& cache = caches[i];
        for (int64_t b = 0; b < batch; ++b) {
            rotate(q + b * wide, cos + b * g.rotary, sin + b * g.rotary, g.heads, g.head_dim,
                   g.rotary);
            rotate(k + b * narrow, cos + b * g.rotary, sin + b * g.rotary, g.kv_heads, g.head_dim,
                   g.rotary);
            for (int64_t h = 0; h < g.kv_heads; ++h) {
                const int64_t offset = b * cache.batch_stride + h * cache.head_stride +
                                       past * g.head_dim;
                const int64_t from = b * narrow + h * g.head_dim;
                append(cache.keys, g.cache_dtype, offset, k + from, g.head_dim);
                append(cache.values, g.cache_dtype, offset, v + from, g.head_dim);
            }
        }
        Attention a{q, cache, mask, m.arena.take<float>(batch * g.heads * length), mixed, batch,
                    g.heads, g.kv_heads, g.head_dim, length, float(g.scaling)};
        Stage<Attention> attend;
        attend.add(a,
                   g.cache_dtype == kFloat32
                       ? for_level<Attention, AttendIn<Float32>::At>(m.level)
                       : for_level<Attention, AttendIn<BFloat16>::At>(m.level),
                   batch * g.heads, 1, batch * g.heads * length * g.head_dim);
        attend.go(m);
        one_linear(m, block.o, mixed, dense, batch, y);
        for (int64_t j = 0; j < batch * g.hidden; ++j) hidden[j] += y[j];
        normalise(m, hidden, block.mlp_norm, x, batch, g.hidden, g.epsilon);
        mlp(m, block.mlp, x, dense, batch, y);
        for (int64_t j = 0; j < batch * g.hidden; ++j) hidden[j] += y[j];
    }
    normalise(m, hidden, g.final_norm, out, batch, g.hidden, g.epsilon);
}

Machine machine(int threads, int level, GossamerParallel parallel) {
    Arena& kept = arena();
    kept.reset();
    return {threads, level, parallel, kept};
}

}  // namespace

extern "C" {

// The instruction set this machine offers: 2 AVX-512, 1 AVX2, 0 portable.
int gossamer_gather_level() { return best_level(); }

// The most x that one call takes.
int gossamer_gather_most() { return kMost; }

// y (batch, out) = the linear layer at x (batch, in), by its thresholds.
void gossamer_gather_linear(const GossamerLinear* l, const float* x, const uint8_t* dense,
                            int64_t batch, float* y, int threads, int level,
                            GossamerParallel parallel) {
    const Machine m = machine(threads, level, parallel);
    one_linear(m, *l, x, dense, batch, y);
}

// The same with the channels (channel-major) or outputs (output-major) given. axpy: x (batch, in),
// y (batch, out); dot: y (batch, count).
void gossamer_gather_index(const GossamerLinear* l, const float* x, const int32_t* index,
                           int64_t count, int64_t batch, float* y, int threads, int level,
                           GossamerParallel parallel) {
    const Machine m = machine(threads, level, parallel);
    Stage<Product> stage;
    Product p{l->weight, index, count, x, l->in, y, l->out, l->scale, l->bias, l->in, l->out,
              batch};
    if (l->channel_major) {
        float* packed = m.arena.take<float>(batch * (count + kPad));
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t k = 0; k < count; ++k)
                packed[b * (count + kPad) + k] = x[b * l->in + index[k]];
        p.x = packed;
        p.stride = count + kPad;
        stage.add(p, product_for<Axpy>(level, l->dtype, batch), l->out, 64, count * l->out * batch);
    } else {
        p.y_stride = count;
        stage.add(p, product_for<Dot>(level, l->dtype, batch), count, 4, count * l->in * batch);
    }
    stage.go(m);
}

// y (batch, out of down) = the gated MLP at x.
void gossamer_gather_mlp(const GossamerMlp* p, const float* x, const uint8_t* dense, int64_t batch,
                         float* y, int threads, int level, GossamerParallel parallel) {
    const Machine m = machine(threads, level, parallel);
    mlp(m, *p, x, dense, batch, y);
}

// One token through all blocks. hidden (batch, hidden) is overwritten; out: after the last norm.
// cos, sin (batch, rotary). Keys and values are written at place `past` of the caches.
void gossamer_gather_step(const GossamerModel* g, float* hidden, const float* cos, const float* sin,
                          const GossamerCache* caches, int64_t past, const uint8_t* mask,
                          const uint8_t* dense, int64_t batch, float* out, int threads, int level,
                          GossamerParallel parallel) {
    const Machine m = machine(threads, level, parallel);
    step(m, *g, hidden, cos, sin, caches, past, mask, dense, batch, out);
}

// The sum of n floats, read as fast as one thread can: what bandwidth is measured with.
float gossamer_gather_stream(const float* data, int64_t n, int level) {
    const Product p{data, nullptr, 4, nullptr, 0, nullptr, 0, nullptr, nullptr, n / 4, 4, 1};
    std::vector<float> ones(size_t(n / 4 < 4096 ? n / 4 : 4096), 1.0f);
    const int64_t width = int64_t(ones.size()), rows = n / width;
    std::vector<float> sums(static_cast<size_t>(rows));
    Product q = p;
    q.count = rows;
    q.x = ones.data();
    q.stride = q.in = width;
    q.out = rows;
    q.y = sums.data();
    q.y_stride = rows;
    product_for<Dot>(level, kFloat32, 1)(q, 0, rows);
    float all = 0;
    for (float s : sums) all += s;
    return all;
}
}
