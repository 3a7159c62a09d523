// y = clamp(W x + bias) for a W with few non-zeros and x with channels in rows, positions side by
// side: the lanes of a vector are positions, so one weight meets a whole vector of them.
// The definition is reference.py; the layout, the rules and the bytes are in README.md.
//
// A strip of positions stays in the first two caches while all output channels walk over it. For
// every output channel (or block of two or four) the accumulators begin at the bias; every stored
// weight adds its product with the strip of its channel, and a pre-computed number of bytes leads
// to the next. Strips that are read often are copied once, aligned and gap-free.
//
// Plain C interface, no dependency. Instruction sets are chosen at run time.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define GOSSAMER_X86 1
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif
#define INLINE static inline __attribute__((always_inline))
// Loops over accumulators must be unrolled, or the accumulators lie in memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

template <int W> struct Vector;
template <> struct Vector<4> {
    typedef float F __attribute__((vector_size(16)));
};
template <> struct Vector<8> {
    typedef float F __attribute__((vector_size(32)));
};
template <> struct Vector<16> {
    typedef float F __attribute__((vector_size(64)));
};

// Lanes and vectors of a strip, by instruction set and block: as many accumulators as registers
// hold beside the weights, and at least eight independent sums, which hide the latency.
struct Shape {
    int lanes, vectors;
};
Shape shape_of(int level, int block) {
    if (level == kAvx512) return {16, block == 1 ? 8 : block == 2 ? 6 : 4};
    return {level == kAvx2 ? 8 : 4, block == 1 ? 6 : block == 2 ? 4 : 2};
}

struct Job {
    const float* values;    // of every block: its biases, then its weights channel by channel
    const int32_t* deltas;  // bytes from one stored channel to the next, first from the strip's start
    const int64_t* start;   // where the channels of every block begin, blocks + singles + 1
    int64_t blocks, outputs, inputs, positions;
    int block;
    float low, high;
};

// One strip: positions [begin, end) of one image are written; loads begin at `first`.
struct Strip {
    const char* x;      // channel 0 at the first position loaded
    float* y;           // channel 0 of the image
    int64_t first, begin, end;
};

template <int W>
INLINE void store(const Job& job, const Strip& s, float* row, int64_t at,
                  typename Vector<W>::F sum) {
    using F = typename Vector<W>::F;
    // NaN fails both comparisons and stays.
    const F low = F{} + job.low, high = F{} + job.high;
    sum = sum < low ? low : sum;
    sum = sum > high ? high : sum;
    if (at >= s.begin && at + W <= s.end) {
        std::memcpy(row + at, &sum, sizeof sum);
        return;
    }
    const int64_t from = std::max(at, s.begin), to = std::min(at + W, s.end);
    float lanes[W];
    std::memcpy(lanes, &sum, sizeof sum);
    for (int64_t p = from; p < to; ++p) row[p] = lanes[p - at];
}

// B output channels that store the same input channels, on V vectors of positions.
template <int W, int V, int B>
INLINE void block_of(const Job& job, const Strip& s, const float* v, const int32_t* d, int64_t n,
                     float* row) {
    using F = typename Vector<W>::F;
    // Few accumulators take turns, so that one addition need not wait for the last.
    constexpr int U = V * B >= 8 ? 1 : V * B >= 4 ? 2 : 4;
    F sum[U][B][V];
    UNROLL for (int b = 0; b < B; ++b)
        UNROLL for (int j = 0; j < V; ++j) {
            sum[0][b][j] = F{} + v[b];
            UNROLL for (int u = 1; u < U; ++u) sum[u][b][j] = F{};
        }
    v += B;
    const char* x = s.x;
    const auto add = [&](F(&to)[B][V]) __attribute__((always_inline)) {
        x += *d++;
        F strip[V];
        UNROLL for (int j = 0; j < V; ++j) std::memcpy(&strip[j], x + j * sizeof(F), sizeof(F));
        UNROLL for (int b = 0; b < B; ++b)
            UNROLL for (int j = 0; j < V; ++j) to[b][j] += v[b] * strip[j];
        v += B;
    };
    int64_t i = 0;
    for (; i + U <= n; i += U)
        UNROLL for (int u = 0; u < U; ++u) add(sum[u]);
    if constexpr (U > 1)
        for (; i < n; ++i) add(sum[0]);
    UNROLL for (int b = 0; b < B; ++b)
        UNROLL for (int j = 0; j < V; ++j) {
            F total = sum[0][b][j];
            UNROLL for (int u = 1; u < U; ++u) total += sum[u][b][j];
            store<W>(job, s, row + b * job.positions, s.first + j * W, total);
        }
}

// Blocks [from, to) of the output, where those from job.blocks on are single channels.
template <int W, int V, int B> struct Blocks {
    INLINE void run(const Job& job, const Strip& s, int64_t from, int64_t to) {
        int64_t o = from;
        for (; o < std::min(to, job.blocks); ++o) {
            const int64_t at = job.start[o];
            block_of<W, V, B>(job, s, job.values + B * (at + o), job.deltas + at,
                              job.start[o + 1] - at, s.y + o * B * job.positions);
        }
        const int64_t before = job.start[job.blocks];
        const float* singles = job.values + B * (before + job.blocks);
        for (; o < to; ++o) {
            const int64_t at = job.start[o], k = o - job.blocks;
            block_of<W, V, 1>(job, s, singles + at - before + k, job.deltas + at,
                              job.start[o + 1] - at, s.y + (job.blocks * B + k) * job.positions);
        }
    }
};

using Run = void (*)(const Job&, const Strip&, int64_t, int64_t);

template <int W, int V, int B>
void portable(const Job& job, const Strip& s, int64_t from, int64_t to) {
    Blocks<W, V, B>::run(job, s, from, to);
}
#ifdef GOSSAMER_X86
template <int W, int V, int B>
TARGET_AVX2 void avx2(const Job& job, const Strip& s, int64_t from, int64_t to) {
    Blocks<W, V, B>::run(job, s, from, to);
}
template <int W, int V, int B>
TARGET_AVX512 void avx512(const Job& job, const Strip& s, int64_t from, int64_t to) {
    Blocks<W, V, B>::run(job, s, from, to);
}
#endif

template <int V, int B> Run compiled_for(int level) {
#ifdef GOSSAMER_X86
    if (level == kAvx512) return avx512<16, V, B>;
    if (level == kAvx2) return avx2<8, V, B>;
#endif
    (void)level;
    return portable<4, V, B>;
}

template <int B> Run run_of(int level, int vectors) {
    switch (vectors) {
        case 1: return compiled_for<1, B>(level);
        case 2: return compiled_for<2, B>(level);
        case 3: return compiled_for<3, B>(level);
        case 4: return compiled_for<4, B>(level);
        default: break;
    }
    if constexpr (B <= 2) {
        if (vectors == 5) return compiled_for<5, B>(level);
        if (vectors == 6) return compiled_for<6, B>(level);
    }
    if constexpr (B == 1) {
        if (vectors == 7) return compiled_for<7, B>(level);
        return compiled_for<8, B>(level);
    }
    return nullptr;
}

Run run_for(int level, int vectors, int block) {
    if (block == 1) return run_of<1>(level, vectors);
    return block == 2 ? run_of<2>(level, vectors) : run_of<4>(level, vectors);
}

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

// ---- copying a strip ---------------------------------------------------------------------------

// From channels in rows: the rest of the last vectors is zero.
void copy_rows(const float* x, int64_t channels, int64_t positions, int64_t begin, int64_t count,
               int64_t width, float* to) {
    for (int64_t c = 0; c < channels; ++c, to += width) {
        std::memcpy(to, x + c * positions + begin, count * sizeof(float));
        std::fill(to + count, to + width, 0.0f);
    }
}

// From channels side by side (NHWC): transposed four by four.
void copy_transposed(const float* x, int64_t channels, int64_t begin, int64_t count, int64_t width,
                     float* to) {
    typedef float F __attribute__((vector_size(16)));
    typedef int I __attribute__((vector_size(16)));
    const int64_t whole = channels & ~int64_t(3), quads = count & ~int64_t(3);
    for (int64_t c = 0; c < whole; c += 4)
        for (int64_t p = 0; p < quads; p += 4) {
            F r[4];
            for (int k = 0; k < 4; ++k)
                std::memcpy(&r[k], x + (begin + p + k) * channels + c, sizeof(F));
            const I low{0, 4, 1, 5}, high{2, 6, 3, 7}, left{0, 1, 4, 5}, right{2, 3, 6, 7};
            const auto mix = [](F a, F b, I at) {
                F out;
                for (int k = 0; k < 4; ++k) out[k] = at[k] < 4 ? a[at[k]] : b[at[k] - 4];
                return out;
            };
            const F a = mix(r[0], r[1], low), b = mix(r[2], r[3], low);
            const F e = mix(r[0], r[1], high), f = mix(r[2], r[3], high);
            const F t[4] = {mix(a, b, left), mix(a, b, right), mix(e, f, left), mix(e, f, right)};
            for (int k = 0; k < 4; ++k) std::memcpy(to + (c + k) * width + p, &t[k], sizeof(F));
        }
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = c < whole ? quads : 0; p < count; ++p)
            to[c * width + p] = x[(begin + p) * channels + c];
        std::fill(to + c * width + count, to + (c + 1) * width, 0.0f);
    }
}

// Memory that stays: fresh pages cost more than filling them.
template <class T> T* scratch(int64_t count) {
    static thread_local std::vector<T> kept;
    if (int64_t(kept.size()) < count + 64) kept.resize(count + 64);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<T*>((address + 63) & ~uintptr_t(63));
}

// ---- strips and threads ------------------------------------------------------------------------

// A strip pays its copy when its channels are read this often on average, and either begin inside
// lines of the cache (every read takes two) or all at one place of the first cache.
constexpr int64_t kReads = 6, kLine = 64, kWay = 4096;

bool better_copied(int64_t stored, int64_t inputs, int64_t positions) {
    const int64_t row = positions * int64_t(sizeof(float));
    return stored >= kReads * inputs && (row % kLine != 0 || row % kWay == 0);
}

struct Work {
    Job job;
    const float* x;
    float* y;
    int64_t images, strips, parts, vectors, extra;  // the first `extra` strips have one vector more
    int lanes, level;
    bool copied, last;  // last: channels side by side in x
    std::atomic<int64_t> next{0};

    int64_t tasks() const { return images * strips * parts; }

    void task(int64_t number) const {
        const int64_t part = number % parts, strip = number / parts % strips;
        const int64_t image = number / parts / strips;
        const int64_t size = vectors + (strip < extra);
        const int64_t begin = (strip * vectors + std::min(strip, extra)) * lanes;
        const int64_t end = std::min(job.positions, begin + size * lanes);
        const float* source = x + image * job.inputs * job.positions;
        Strip s{nullptr, y + image * job.outputs * job.positions, begin, begin, end};
        if (copied) {
            const int64_t width = (vectors + (extra > 0)) * lanes;
            float* to = scratch<float>(job.inputs * width);
            if (last) copy_transposed(source, job.inputs, begin, end - begin, width, to);
            else copy_rows(source, job.inputs, job.positions, begin, end - begin, width, to);
            s.x = reinterpret_cast<const char*>(to);
        } else {
            // The last strip reaches back, so that no load leaves the image.
            s.first = std::min(begin, job.positions - size * lanes);
            s.x = reinterpret_cast<const char*>(source + s.first);
        }
        const int64_t all = job.blocks + job.outputs - job.blocks * job.block;
        run_for(level, int(size), job.block)(job, s, all * part / parts, all * (part + 1) / parts);
    }

    static void run(void* self) {
        auto& w = *static_cast<Work*>(self);
        for (int64_t t = w.next++; t < w.tasks(); t = w.next++) w.task(t);
    }
};

// void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags)
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

void spread(Work& work, int threads, Parallel parallel) {
    if (threads <= 1) return Work::run(&work);
    if (parallel) return parallel(Work::run, &work, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(Work::run, &work);
    Work::run(&work);
    for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

// The instruction set this machine offers: 2 AVX-512, 1 AVX2, 0 portable.
int gossamer_conv_level() { return best_level(); }

// y (images, outputs, positions) = clamp of W x + bias; x (images, inputs, positions), or (images,
// positions, inputs) when `last`. steps: channels from one stored weight to the next; copies: 1
// copies every strip, 0 none that can be read in place, -1 chooses. parallel: the address of
// GOMP_parallel in the caller's thread pool, or null for threads of our own.
void gossamer_sparse_conv(const float* values, const int32_t* steps, const int64_t* start,
                          int64_t blocks, int64_t outputs, int64_t inputs, int block, float low,
                          float high, const float* x, float* y, int64_t images, int64_t positions,
                          int last, int copies, int threads, int level, Parallel parallel) {
    if (!images || !outputs || !positions) return;
    const Shape shape = shape_of(level, block);
    const int64_t lanes = shape.lanes, vectors = (positions + lanes - 1) / lanes;
    const int64_t strips = (vectors + shape.vectors - 1) / shape.vectors;
    Work work;
    work.x = x, work.y = y, work.images = images, work.strips = strips;
    work.vectors = vectors / strips, work.extra = vectors % strips;
    work.lanes = shape.lanes, work.level = level, work.last = last;
    const int64_t singles = outputs - blocks * block, stored = start[blocks + singles];
    const bool must = last || positions < (work.vectors + (work.extra > 0)) * lanes;
    work.copied = must || (copies < 0 ? better_copied(stored, inputs, positions) : copies > 0);
    const int64_t width = work.copied ? (work.vectors + (work.extra > 0)) * lanes : positions;
    int32_t* deltas = scratch<int32_t>(stored);
    for (int64_t i = 0; i < stored; ++i) deltas[i] = steps[i] * int32_t(width * sizeof(float));
    work.job = {values, deltas, start, blocks, outputs, inputs, positions, block, low, high};
    // Below some tens of microseconds of work, waking threads costs more than they save.
    const int64_t products = stored * block * positions * images;
    if (products < (1 << 19)) threads = 1;
    // Every thread gets a few tasks: one held up by another program holds up little.
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    work.parts = std::min(std::max<int64_t>(1, wanted / (images * strips)), blocks + singles);
    spread(work, threads, parallel);
}
}
