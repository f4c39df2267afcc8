// NF4 -> bf16, fp16 or fp32, by hand: what kernels/nf4.py::_dequantize_kernel does, written for the machine.
//
//     scale  = code2[absmax[b]] * absmax2[b / 256] + offset        two roundings (plain scales: absmax[b])        (1)
//     out[i] = codebook[code[i]] * scale                           one more, to the type of out                   (2)
//
// A weight comes in as half a byte and leaves as two: four fifths of the traffic are stores, so they decide the layout.
// A thread turns one 32-bit word, 8 codes, into 16 bytes of bf16. A warp then reads 128 bytes in a row and writes 512 in
// a row, with 128-bit stores. (128-bit loads would give a thread 32 weights, and each of its four stores would lie 64
// bytes from its neighbour's: half of every 32-byte sector.) To have as many bytes under way, a thread loads WORDS words
// before it decodes the first.
//
// The file reads top to bottom:
//
//     1. arithmetic   one word, on the CPU or the GPU: tests/test_nf4.py runs it on a CPU and compares bits
//     2. kernel       who decodes which word
//     3. launcher     picks the template
//     4. binding      for torch's extension loader; left out where the file is compiled by itself
//
// Lesson: lessons/08_four_bits.md       Tests: tests/test_nf4.py

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nf4 {

struct Quantised {
    const uint8_t* codes;   // (ceil(n / 2)) two codes a byte, the first in the high half; on a multiple of 4
    const void* absmax;     // (b) float, or uint8_t when nested
    const float* absmax2;   // (ceil(b / 256)), when nested
    const float* code2;     // (256), when nested
    const float* offset;    // (1), when nested
    const float* codebook;  // (16)
    int64_t n;              // weights
    int log2_block;         // 6 for blocks of 64 weights
};

// ----------------------------------------------------------------------------
// 1. arithmetic

// The compiler may fuse a * b + c into one instruction with one rounding, which is not what (1) says. __fmul_rn and
// __fadd_rn are never fused. On a CPU the test compiles with -ffp-contract=off.
__host__ __device__ inline float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

__host__ __device__ inline float add(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

template <bool NESTED>
__host__ __device__ inline float scale_of(const Quantised& q, int64_t b) {
    if (!NESTED) return static_cast<const float*>(q.absmax)[b];
    const float stored = q.code2[static_cast<const uint8_t*>(q.absmax)[b]];
    return add(multiply(stored, q.absmax2[b >> 8]), *q.offset);
}

__host__ __device__ inline void put(float value, float& out) { out = value; }
__host__ __device__ inline void put(float value, __half& out) { out = __float2half_rn(value); }
__host__ __device__ inline void put(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

constexpr int PER_WORD = 8;  // weights in 32 bits; a block has at least 32, so a word never straddles two

template <typename T>
struct alignas(16) Eight {  // stored as one (fp32: two) 128-bit writes
    T value[PER_WORD];
};

// Weights 8 * word to 8 * word + 7. `codes` holds their bytes, the first in the lowest (both CPUs and GPUs are little-
// endian): weight j is in byte j / 2, in its high half if j is even.
template <typename T, bool NESTED>
__host__ __device__ inline void decode(const Quantised& q, const float* codebook, int64_t word, uint32_t codes, T* out) {
    const float scale = scale_of<NESTED>(q, word >> (q.log2_block - 3));
    Eight<T> eight;
#pragma unroll
    for (int j = 0; j < PER_WORD; ++j) {
        const uint32_t code = (codes >> (8 * (j / 2) + (j % 2 ? 0 : 4))) & 15;
        put(multiply(codebook[code], scale), eight.value[j]);
    }
    const int64_t first = word * PER_WORD;
    if (first + PER_WORD <= q.n) {
        *reinterpret_cast<Eight<T>*>(out + first) = eight;
    } else {
#pragma unroll
        for (int j = 0; j < PER_WORD; ++j)  // unrolled, or `eight` would be an array in memory and not 8 registers
            if (first + j < q.n) out[first + j] = eight.value[j];
    }
}

// The last word may reach beyond the codes: then byte by byte.
__host__ __device__ inline uint32_t load(const Quantised& q, int64_t word) {
    const int64_t first = word * 4, bytes = (q.n + 1) / 2;
    if (first + 4 <= bytes) return *reinterpret_cast<const uint32_t*>(q.codes + first);
    uint32_t codes = 0;
    for (int64_t i = first; i < bytes; ++i) codes |= static_cast<uint32_t>(q.codes[i]) << (8 * (i - first));
    return codes;
}

// ----------------------------------------------------------------------------
// 2. kernel

constexpr int THREADS = 256;
constexpr int WORDS = 4;  // a thread: 16 bytes of codes on their way, as with one 128-bit load

template <typename T, bool NESTED>
__global__ void __launch_bounds__(THREADS) dequantize_kernel(Quantised q, T* out) {
    // 16 floats in 16 banks of shared memory: lanes that want different ones are served at once, lanes that want the
    // same one share it. In constant memory different addresses would be served one after the other.
    __shared__ float codebook[16];
    if (threadIdx.x < 16) codebook[threadIdx.x] = q.codebook[threadIdx.x];
    __syncthreads();
    const int64_t words = (q.n + PER_WORD - 1) / PER_WORD;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (THREADS * WORDS) + threadIdx.x;
    uint32_t codes[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
        if (first + i * THREADS < words) codes[i] = load(q, first + i * THREADS);
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
        if (first + i * THREADS < words) decode<T, NESTED>(q, codebook, first + i * THREADS, codes[i], out);
}

// ----------------------------------------------------------------------------
// 3. launcher

template <typename T>
inline cudaError_t launch(const Quantised& q, bool nested, T* out, cudaStream_t stream) {
    const int64_t words = (q.n + PER_WORD - 1) / PER_WORD;
    const auto blocks = static_cast<unsigned>((words + THREADS * WORDS - 1) / (THREADS * WORDS));
    if (nested)
        dequantize_kernel<T, true><<<blocks, THREADS, 0, stream>>>(q, out);
    else
        dequantize_kernel<T, false><<<blocks, THREADS, 0, stream>>>(q, out);
    return cudaGetLastError();
}

// type: 0 bf16, 1 fp16, 2 fp32
inline cudaError_t dequantize(const Quantised& q, bool nested, int type, void* out, cudaStream_t stream) {
    if (type == 0) return launch(q, nested, static_cast<__nv_bfloat16*>(out), stream);
    if (type == 1) return launch(q, nested, static_cast<__half*>(out), stream);
    return launch(q, nested, static_cast<float*>(out), stream);
}

}  // namespace nf4

// ----------------------------------------------------------------------------
// 4. binding

#ifdef TORCH_EXTENSION_NAME  // set by torch.utils.cpp_extension
// Addresses come in as integers, so that pybind11 is all that is included: torch's own headers take a minute.
#include <pybind11/pybind11.h>

#include <stdexcept>

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void dequantize(uintptr_t codes, uintptr_t absmax, uintptr_t absmax2, uintptr_t code2, uintptr_t offset,
                uintptr_t codebook, int64_t n, int log2_block, bool nested, int type, uintptr_t out, uintptr_t stream) {
    const nf4::Quantised q{pointer<uint8_t>(codes), pointer<void>(absmax),    pointer<float>(absmax2),
                           pointer<float>(code2),   pointer<float>(offset),   pointer<float>(codebook),
                           n,                       log2_block};
    const cudaError_t error = nf4::dequantize(q, nested, type, pointer<void>(out), pointer<CUstream_st>(stream));
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("dequantize", &dequantize); }
#else
// Compiled by itself, nothing calls the templates: ask for all six, so that there is something to look at.
template __global__ void nf4::dequantize_kernel<__nv_bfloat16, true>(nf4::Quantised, __nv_bfloat16*);
template __global__ void nf4::dequantize_kernel<__nv_bfloat16, false>(nf4::Quantised, __nv_bfloat16*);
template __global__ void nf4::dequantize_kernel<__half, true>(nf4::Quantised, __half*);
template __global__ void nf4::dequantize_kernel<__half, false>(nf4::Quantised, __half*);
template __global__ void nf4::dequantize_kernel<float, true>(nf4::Quantised, float*);
template __global__ void nf4::dequantize_kernel<float, false>(nf4::Quantised, float*);
#endif
