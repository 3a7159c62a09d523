// Training with stored connections only: y = W x, x' = W^T d, and (d x^T) at the connections of W.
// W is in CSR; activations have one feature a row, so the lanes of a vector are samples of the
// batch and one weight, spread over a vector, meets a row of activations. The definition is
// reference.py; layout and bytes are in README.md.
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

namespace {

enum Op : int { kProduct = 0, kTransposed = 1, kGradient = 2 };
enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

struct Job {
    int op, dtype;
    const void* values;
    const int32_t* columns;
    const int64_t* start;
    int64_t rows;
    const void* a;  // x of the product, d of the other two
    const void* b;  // x of the gradient
    void* out;
    int64_t batch;
};

constexpr int kBytes = 64;  // of a vector; narrower machines take several instructions
constexpr int kMost = 4;    // vectors of samples held in registers at once; more compile for long

template <class T>
struct Vector {
    // Not aligned: rows begin wherever the batch size puts them.
    typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
    static constexpr int lanes = kBytes / sizeof(T);
};

template <class T>
INLINE T total(const T* lanes) {
    // Halved until four are left: a chain of additions would wait for each other.
    constexpr int kLanes = Vector<T>::lanes;
    typedef T Half __attribute__((vector_size(kBytes / 2), aligned(alignof(T)), may_alias));
    typedef T Quarter __attribute__((vector_size(kBytes / 4), aligned(alignof(T)), may_alias));
    const Half half = *(const Half*)lanes + *(const Half*)(lanes + kLanes / 2);
    T low[kLanes / 2];
    std::memcpy(low, &half, sizeof half);
    const Quarter quarter = *(const Quarter*)low + *(const Quarter*)(low + kLanes / 4);
    T sum = 0;
    for (int i = 0; i < kLanes / 4; ++i) sum += quarter[i];
    return sum;
}

// Samples [at, at + wide) with N vectors. The last vector reaches back over samples that the one
// before it covers, so that no load leaves the row; `last` is its offset.
template <class T, int N>
INLINE void product(const Job& job, int64_t from, int64_t to, int64_t at, int64_t last) {
    using V = typename Vector<T>::type;
    constexpr int kLanes = Vector<T>::lanes;
    const T* values = static_cast<const T*>(job.values);
    const T* x = static_cast<const T*>(job.a) + at;
    T* y = static_cast<T*>(job.out) + at;
    for (int64_t r = from; r < to; ++r) {
        V sum[N] = {};
        for (int64_t k = job.start[r]; k < job.start[r + 1]; ++k) {
            const T w = values[k];
            const T* row = x + job.columns[k] * job.batch;
#pragma GCC unroll 4
            for (int i = 0; i < N - 1; ++i) sum[i] += w * *(const V*)(row + i * kLanes);
            sum[N - 1] += w * *(const V*)(row + last);
        }
        T* out = y + r * job.batch;
#pragma GCC unroll 4
        for (int i = 0; i < N - 1; ++i) *(V*)(out + i * kLanes) = sum[i];
        *(V*)(out + last) = sum[N - 1];
    }
}

// The d of one row, lanes that another vector covers set to zero.
#define LOAD_DELTA(row)                                                              \
    V d[N];                                                                          \
    for (int i = 0; i < N - 1; ++i) d[i] = *(const V*)((row) + i * kLanes);          \
    T edge[kLanes];                                                                  \
    for (int i = 0; i < kLanes; ++i)                                                 \
        edge[i] = last + i < (N - 1) * kLanes ? T(0) : (row)[last + i];              \
    d[N - 1] = *(const V*)edge;

template <class T, int N>
INLINE void transposed(const Job& job, int64_t at, int64_t last) {
    using V = typename Vector<T>::type;
    constexpr int kLanes = Vector<T>::lanes;
    const T* values = static_cast<const T*>(job.values);
    const T* delta = static_cast<const T*>(job.a) + at;
    T* x = static_cast<T*>(job.out) + at;
    for (int64_t r = 0; r < job.rows; ++r) {
        if (job.start[r] == job.start[r + 1]) continue;
        const T* mine = delta + r * job.batch;
        LOAD_DELTA(mine)
        for (int64_t k = job.start[r]; k < job.start[r + 1]; ++k) {
            const T w = values[k];
            T* row = x + job.columns[k] * job.batch;
#pragma GCC unroll 4
            for (int i = 0; i < N - 1; ++i) *(V*)(row + i * kLanes) += w * d[i];
            *(V*)(row + last) += w * d[N - 1];
        }
    }
}

template <class T, int N>
INLINE void gradient(const Job& job, int64_t from, int64_t to, int64_t at, int64_t last) {
    using V = typename Vector<T>::type;
    constexpr int kLanes = Vector<T>::lanes;
    const T* delta = static_cast<const T*>(job.a) + at;
    const T* x = static_cast<const T*>(job.b) + at;
    T* out = static_cast<T*>(job.out);
    for (int64_t r = from; r < to; ++r) {
        if (job.start[r] == job.start[r + 1]) continue;
        const T* mine = delta + r * job.batch;
        LOAD_DELTA(mine)
        for (int64_t k = job.start[r]; k < job.start[r + 1]; ++k) {
            const T* row = x + job.columns[k] * job.batch;
            V sum = d[N - 1] * *(const V*)(row + last);
#pragma GCC unroll 4
            for (int i = 0; i < N - 1; ++i) sum += d[i] * *(const V*)(row + i * kLanes);
            T lanes[kLanes];
            std::memcpy(lanes, &sum, sizeof lanes);
            out[k] += total<T>(lanes);
        }
    }
}

// A batch shorter than a vector.
template <class T>
INLINE void short_batch(const Job& job, int64_t from, int64_t to) {
    const T* values = static_cast<const T*>(job.values);
    const T *a = static_cast<const T*>(job.a), *b = static_cast<const T*>(job.b);
    T* out = static_cast<T*>(job.out);
    const int64_t n = job.batch;
    for (int64_t r = from; r < to; ++r)
        for (int64_t k = job.start[r]; k < job.start[r + 1]; ++k) {
            const int64_t c = job.columns[k];
            for (int64_t i = 0; i < n; ++i) {
                if (job.op == kProduct) out[r * n + i] += values[k] * a[c * n + i];
                if (job.op == kTransposed) out[c * n + i] += values[k] * a[r * n + i];
                if (job.op == kGradient) out[k] += a[r * n + i] * b[c * n + i];
            }
        }
}

template <class T, int N>
INLINE void block(const Job& job, int64_t from, int64_t to, int64_t at, int64_t last) {
    if (job.op == kProduct) product<T, N>(job, from, to, at, last);
    if (job.op == kTransposed) transposed<T, N>(job, at, last);
    if (job.op == kGradient) gradient<T, N>(job, from, to, at, last);
}

// Rows [from, to) of samples [low, high); the range is at least a vector wide.
template <class T>
INLINE void samples(const Job& job, int64_t from, int64_t to, int64_t low, int64_t high) {
    constexpr int kLanes = Vector<T>::lanes;
    for (int64_t at = low; at < high; at += kMost * kLanes) {
        const int64_t left = std::min<int64_t>(high - at, kMost * kLanes);
        const int64_t last = left - kLanes;
        switch ((left + kLanes - 1) / kLanes) {
            case 1: block<T, 1>(job, from, to, at, last); break;
            case 2: block<T, 2>(job, from, to, at, last); break;
            case 3: block<T, 3>(job, from, to, at, last); break;
            default: block<T, 4>(job, from, to, at, last); break;
        }
    }
}

// Part `part` of `parts`: of the rows, or for W^T d, where rows add to common places, of samples.
template <class T>
INLINE void typed(const Job& job, int part, int parts) {
    constexpr int kLanes = Vector<T>::lanes;
    const int64_t n = job.batch;
    if (job.op == kTransposed) {
        if (n < kLanes) {
            if (part == 0) short_batch<T>(job, 0, job.rows);
            return;
        }
        const int64_t vectors = n / kLanes;
        const int64_t low = vectors * part / parts * kLanes;
        const int64_t high = part + 1 == parts ? n : vectors * (part + 1) / parts * kLanes;
        if (low < high) samples<T>(job, 0, job.rows, low, high);
        return;
    }
    // Equal shares of the connections: rows may differ much in length.
    const int64_t* end = job.start + job.rows + 1;
    const int64_t all = job.start[job.rows];
    const auto edge = [&](int p) -> int64_t {
        if (p == 0) return 0;
        if (p == parts) return job.rows;
        return std::lower_bound(job.start, end, all * p / parts) - job.start;
    };
    const int64_t from = edge(part), to = edge(part + 1);
    if (n < kLanes) return short_batch<T>(job, from, to);
    samples<T>(job, from, to, 0, n);
}

INLINE void generic(const Job& job, int part, int parts) {
    if (job.dtype == 0) return typed<float>(job, part, parts);
    typed<double>(job, part, parts);
}

void run_portable(const Job& job, int part, int parts) { generic(job, part, parts); }
#ifdef GOSSAMER_X86
TARGET_AVX2 void run_avx2(const Job& job, int part, int parts) { generic(job, part, parts); }
TARGET_AVX512 void run_avx512(const Job& job, int part, int parts) { generic(job, part, parts); }
#endif

// void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags)
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Work {
    const Job& job;
    void (*run)(const Job&, int, int);
    int parts;
    std::atomic<int> next{0};

    static void all(void* self) {
        auto& work = *static_cast<Work*>(self);
        for (int part; (part = work.next++) < work.parts;) work.run(work.job, part, work.parts);
    }
};

}  // namespace

extern "C" {

int gossamer_training_level() {
#ifdef GOSSAMER_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPortable;
}

// op 0: out (rows, batch) = W a; 1: out (columns, batch) += W^T a; 2: out (connections) += a b^T.
// `out` starts as zeros. parallel: GOMP_parallel of the caller's thread pool, or null.
void gossamer_training(int op, const void* values, const int32_t* columns, const int64_t* start,
                       int64_t rows, const void* a, const void* b, void* out, int64_t batch,
                       int dtype, int threads, int level, Parallel parallel) {
    const Job job{op, dtype, values, columns, start, rows, a, b, out, batch};
    auto* run = run_portable;
#ifdef GOSSAMER_X86
    if (level == kAvx2) run = run_avx2;
    if (level == kAvx512) run = run_avx512;
#endif
    if (threads <= 1) return run(job, 0, 1);
    Work work{job, run, threads};
    if (parallel) return parallel(Work::all, &work, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(Work::all, &work);
    Work::all(&work);
    for (auto& thread : others) thread.join();
}

}  // extern "C"
