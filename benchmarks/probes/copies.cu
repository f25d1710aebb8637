// How fast tiles of packed keys and values come into shared memory, and nothing else.
//
// One warp a program, as gluon_attend_token.py: STAGES tiles of BLOCK tokens, of which all but one
// are under way. Each method loads the same bytes.
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <algorithm>

enum Method { HALVES, ROWS, BULK, REGISTERS };

__device__ __forceinline__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem(to)), "l"(from));
}
__device__ __forceinline__ void bulk(void* to, const void* from, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(bar)) : "memory");
}
__device__ __forceinline__ void wait_bar(uint64_t* bar, int phase) {
  asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra L; }"
               ::"r"(smem(bar)), "r"(phase) : "memory");
}

template <int METHOD, int ROW, int BLOCK, int STAGES>
__global__ void copies(const char* key, const char* value, const char* ks, const char* vs, uint32_t* out,
                       int heads, int tokens, int shares, int side_by_side, int scales) {
  extern __shared__ __align__(128) char memory[];
  constexpr int WORDS = ROW * BLOCK, TILE = 2 * WORDS + 4 * BLOCK;
  __shared__ uint64_t bars[STAGES];
  int head = side_by_side ? blockIdx.x / shares : blockIdx.x % heads;
  int share = side_by_side ? blockIdx.x % shares : blockIdx.x / heads;
  int tiles = tokens / BLOCK / shares, lane = threadIdx.x;
  size_t first = (size_t)head * tokens + (size_t)share * tiles * BLOCK;
  uint32_t sum = 0;
  if (METHOD == REGISTERS) {
    for (int i = 0; i < tiles; i++) {
      size_t row = first + (size_t)i * BLOCK;
      uint4 x[2 * WORDS / 512];
      for (int j = 0; j < WORDS / 512; j++) {
        x[2 * j] = __ldcs((const uint4*)(key + row * ROW) + j * 32 + lane);
        x[2 * j + 1] = __ldcs((const uint4*)(value + row * ROW) + j * 32 + lane);
      }
      if (scales && lane < BLOCK / 8) {
        uint4 a = __ldcs((const uint4*)(ks + row * 2) + lane), b = __ldcs((const uint4*)(vs + row * 2) + lane);
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
      }
      for (int j = 0; j < 2 * WORDS / 512; j++) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
    }
  } else {
    if (METHOD == BULK) {
      if (lane == 0)
        for (int s = 0; s < STAGES; s++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(bars + s)));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      __syncwarp();
    }
    auto begin = [&](int i) {
      char* tile = memory + i % STAGES * TILE;
      size_t row = first + (size_t)i * BLOCK;
      const char *k = key + row * ROW, *v = value + row * ROW;
      if (METHOD == BULK) {
        if (lane == 0) {
          int bytes = 2 * WORDS + (scales ? 4 * BLOCK : 0);
          uint64_t* bar = bars + i % STAGES;
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(bar)), "r"(bytes));
          bulk(tile, k, WORDS, bar);
          bulk(tile + WORDS, v, WORDS, bar);
          if (scales) {
            bulk(tile + 2 * WORDS, ks + row * 2, 2 * BLOCK, bar);
            bulk(tile + 2 * WORDS + 2 * BLOCK, vs + row * 2, 2 * BLOCK, bar);
          }
        }
      } else {
        constexpr int PARTS = METHOD == HALVES ? ROW / 32 : 1, PIECE = ROW / PARTS / 16, STEP = 32 / PIECE;
        for (int side = 0; side < 2; side++)
          for (int p = 0; p < PARTS; p++)
            for (int t = 0; t < BLOCK; t += STEP) {
              int token = t + lane / PIECE, at = p * PIECE + lane % PIECE;
              cp16(tile + side * WORDS + p * (WORDS / PARTS) + token * PIECE * 16 + lane % PIECE * 16,
                   (side ? v : k) + token * ROW + at * 16);
            }
        if (scales && lane < BLOCK / 8) {
          cp16(tile + 2 * WORDS + lane * 16, ks + row * 2 + lane * 16);
          cp16(tile + 2 * WORDS + 2 * BLOCK + lane * 16, vs + row * 2 + lane * 16);
        }
        asm volatile("cp.async.commit_group;");
      }
    };
    for (int i = 0; i < STAGES - 1; i++) begin(i);
    for (int i = 0; i < tiles; i++) {
      if (METHOD == BULK) wait_bar(bars + i % STAGES, i / STAGES & 1);
      else { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory"); __syncwarp(); }
      for (int j = 0; j < 2 * WORDS; j += 2048) sum += *(volatile uint32_t*)(memory + i % STAGES * TILE + j + lane * 4);
      __syncwarp();
      if (i + STAGES - 1 < tiles) begin(i + STAGES - 1);
      else if (METHOD != BULK) asm volatile("cp.async.commit_group;");
    }
  }
  if (sum == 0x12345678) out[blockIdx.x] = sum;
}

char *key, *value, *ks, *vs;
uint32_t* out;

template <int METHOD, int ROW, int BLOCK, int STAGES>
void run(const char* name, int heads, int tokens, int shares, int side, int scales, int programs) {
  auto kernel = copies<METHOD, ROW, BLOCK, STAGES>;
  int bytes = METHOD == REGISTERS ? 0 : STAGES * (2 * ROW * BLOCK + 4 * BLOCK);
  int room = std::max(bytes, 227 * 1024 / programs - 1280) & ~127;  // so many programs a multiprocessor
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32, room);
  std::vector<float> times;
  for (int r = 0; r < 9; r++) {
    cudaEvent_t a, b;
    cudaEventCreate(&a), cudaEventCreate(&b);
    cudaEventRecord(a);
    kernel<<<heads * shares, 32, room>>>(key, value, ks, vs, out, heads, tokens, shares, side, scales);
    cudaEventRecord(b), cudaEventSynchronize(b);
    float ms;
    cudaEventElapsedTime(&ms, a, b);
    times.push_back(ms * 1e3f);
  }
  std::sort(times.begin(), times.end());
  double total = (double)heads * tokens * (2 * ROW + (scales ? 4 : 0));
  printf("%-9s row %d tile %3d stages %d shares %2d %s %s programs %2d: %6.1f us %.2f TB/s %s\n", name, ROW, BLOCK,
         STAGES, shares, side ? "side by side" : "heads first ", scales ? "scales" : "words ", resident, times[4],
         total / times[4] / 1e6, cudaGetErrorString(cudaGetLastError()));
  fflush(stdout);
}

__global__ void fill(uint32_t* p, size_t n) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint32_t x = (uint32_t)i * 2654435761u;
    p[i] = x ^ x >> 15;
  }
}

int main() {
  int heads = 1024, tokens = 8192;
  size_t words = (size_t)heads * tokens * 64, params = (size_t)heads * tokens * 2;
  cudaMalloc(&key, words), cudaMalloc(&value, words), cudaMalloc(&ks, params), cudaMalloc(&vs, params), cudaMalloc(&out, 1 << 20);
  for (auto [p, n] : {std::pair{key, words}, {value, words}, {ks, params}, {vs, params}}) fill<<<1024, 256>>>((uint32_t*)p, n / 4);
  for (int side = 0; side < 2; side++)
    for (int shares : {1, 4, 8}) {
      if (side && shares == 1) continue;
      run<HALVES, 64, 64, 3>("halves", heads, tokens, shares, side, 1, 8);
      run<HALVES, 64, 64, 2>("halves", heads, tokens, shares, side, 1, 8);
      run<ROWS, 64, 64, 3>("rows", heads, tokens, shares, side, 1, 8);
      run<ROWS, 64, 32, 3>("rows", heads, tokens, shares, side, 1, 8);
      run<ROWS, 64, 64, 3>("rows", heads, tokens, shares, side, 0, 8);
      run<BULK, 64, 64, 3>("bulk", heads, tokens, shares, side, 1, 8);
      run<BULK, 64, 64, 2>("bulk", heads, tokens, shares, side, 1, 8);
      run<BULK, 64, 128, 2>("bulk", heads, tokens, shares, side, 1, 6);
      run<BULK, 64, 64, 3>("bulk", heads, tokens, shares, side, 0, 8);
      run<REGISTERS, 64, 64, 1>("registers", heads, tokens, shares, side, 1, 8);
      run<REGISTERS, 64, 64, 1>("registers", heads, tokens, shares, side, 1, 16);
      run<ROWS, 32, 128, 2>("rows", heads, tokens, shares, side, 1, 8);
      run<BULK, 32, 128, 2>("bulk", heads, tokens, shares, side, 1, 8);
    }
}
