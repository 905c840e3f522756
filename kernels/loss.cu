// The multi-class logistic loss over rows of K scores (eq. 2), K up to millions.
//
//   ℓ_n = -w_n Σ_{k in targets} log p_nk,   p_nk = exp s_nk / Σ_k' exp s_nk'
//   ∂ℓ/∂s_nk = w_n (T_n p_nk - [k in targets]),   T_n the number of targets
//
// A block takes a row: one pass finds the maximum and the sum of exponentials together, a second
// one writes the gradient over the scores. targets (N, T) holds columns of s, padded with -1: of
// all K words, or of those alone whose scores were computed. Called by gpu.softmax_loss.

// (most, sum) of two halves of a row: Σ exp(s - most)
__device__ void join(float& most, float& sum, float other_most, float other_sum)
{
    const float larger = fmaxf(most, other_most);
    if (larger == -INFINITY) return;                        // both halves are empty
    sum = sum * expf(most - larger) + other_sum * expf(other_most - larger);
    most = larger;
}

extern "C" __global__ void
softmax_loss(float* s, const int* targets, const float* weights, float* losses, int k, int slots)
{
    float* shared = shared_memory();                        // 2 × 32, a pair for each warp
    const int n = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* row = s + static_cast<long long>(n) * k;
    const int* mine = targets + static_cast<long long>(n) * slots;

    float most = -INFINITY, sum = 0;
    for (int col = threadIdx.x; col < k; col += blockDim.x) join(most, sum, row[col], 1);
    for (int step = 16; step; step /= 2) {
        const float other_most = __shfl_xor_sync(0xffffffffu, most, step);
        const float other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
        join(most, sum, other_most, other_sum);
    }
    if (lane == 0) {
        shared[warp] = most;
        shared[32 + warp] = sum;
    }
    __syncthreads();                                        // every warp's pair is there
    most = shared[0];
    sum = shared[32];
    for (int other = 1; other < blockDim.x / 32; other++)   // all threads, in the same order
        join(most, sum, shared[other], shared[32 + other]);

    int count = 0;
    float loss = 0;
    for (int slot = 0; slot < slots; slot++)
        if (mine[slot] >= 0) {
            count++;
            if (threadIdx.x == 0) loss += logf(sum) - (row[mine[slot]] - most);
        }
    if (threadIdx.x == 0) losses[n] = weights[n] * loss;
    __syncthreads();                                        // the targets' scores have been read
    const float scale = weights[n] * count / sum;
    for (int col = threadIdx.x; col < k; col += blockDim.x)
        row[col] = expf(row[col] - most) * scale;
    __syncthreads();                                        // the products are there
    for (int slot = threadIdx.x; slot < slots; slot += blockDim.x)
        if (mine[slot] >= 0) row[mine[slot]] -= weights[n];
}
