// The two losses over rows of K scores, K up to millions; a block takes a row.
//
//   multi-class logistic (eq. 2)   ℓ_n = -Σ_k w_nk log p_nk,  p_nk = exp s_nk / Σ exp s_n
//                                  ∂ℓ/∂s_nk = (Σ_k w_nk) p_nk - w_nk,  w_nk 0 but for targets
//   one-versus-all (eq. 1)         ℓ_n = w_n Σ_k (y_nk a_k log(1 + exp -s_nk)
//                                                 + (1 - y_nk) b_k log(1 + exp s_nk))
//                                  ∂ℓ/∂s_nk = w_n (y_nk -a_k σ(-s_nk) + (1 - y_nk) b_k σ(s_nk))
//
// targets (N, T) holds columns of s, padded with -1: of all K words, or of those alone whose scores
// were computed. Gradients go to ds. Called by gpu.softmax_loss and gpu.one_vs_all_loss.

__device__ bool is_target(const int* targets, int slots, int col)
{
    for (int slot = 0; slot < slots; slot++)
        if (targets[slot] == col) return true;
    return false;
}

// (most, sum) of two halves of a row: Σ exp(s - most)
__device__ void join(float& most, float& sum, float other_most, float other_sum)
{
    const float larger = fmaxf(most, other_most);
    if (larger == -INFINITY) return;                        // both halves are empty
    sum = sum * expf(most - larger) + other_sum * expf(other_most - larger);
    most = larger;
}

// One pass finds the maximum and the sum of exponentials together, a second one writes the
// gradient. `shift`, if it is not null, is added to all scores but the targets'. weights (N, T).
extern "C" __global__ void
softmax_loss(const float* s, const int* targets, const float* weights, const float* shift,
             float* losses, float* ds, int k, int slots)
{
    float* shared = shared_memory();                        // 2 × 32, a pair for each warp
    const int n = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    s += static_cast<long long>(n) * k;                     // this row's, from here on
    ds += static_cast<long long>(n) * k;
    targets += static_cast<long long>(n) * slots;
    weights += static_cast<long long>(n) * slots;
    const auto score = [&](int col) {
        return shift && !is_target(targets, slots, col) ? s[col] + shift[col] : s[col];
    };

    float most = -INFINITY, sum = 0;
    for (int col = threadIdx.x; col < k; col += blockDim.x) join(most, sum, score(col), 1);
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

    float weight = 0, loss = 0;
    for (int slot = 0; slot < slots; slot++)
        if (targets[slot] >= 0) {
            weight += weights[slot];
            loss += weights[slot] * (logf(sum) - (s[targets[slot]] - most));
        }
    if (threadIdx.x == 0) losses[n] = loss;
    const float scale = weight / sum;
    for (int col = threadIdx.x; col < k; col += blockDim.x)
        ds[col] = expf(score(col) - most) * scale;
    __syncthreads();                                        // the products are there
    for (int slot = threadIdx.x; slot < slots; slot += blockDim.x)
        if (targets[slot] >= 0) ds[targets[slot]] -= weights[slot];
}

// One pass: each score gives its term and its derivative. Nothing overflows, for exp is taken of
// -|s| alone. weights (N,).
extern "C" __global__ void
one_vs_all_loss(const float* s, const int* targets, const float* weights, const float* positive,
                const float* negative, float* losses, float* ds, int k, int slots)
{
    float* shared = shared_memory();                        // 32, a sum for each warp
    const int n = blockIdx.x;
    s += static_cast<long long>(n) * k;                     // this row's, from here on
    ds += static_cast<long long>(n) * k;
    targets += static_cast<long long>(n) * slots;

    float loss = 0;
    for (int col = threadIdx.x; col < k; col += blockDim.x) {
        const bool carried = is_target(targets, slots, col);
        const float z = carried ? -s[col] : s[col];         // the term is log(1 + exp z)
        const float scale = weights[n] * (carried ? positive[col] : negative[col]);
        const float small = expf(-fabsf(z)), sigmoid = (z > 0 ? 1 : small) / (1 + small);
        loss += scale * ((z > 0 ? z : 0) + log1pf(small));
        ds[col] = scale * (carried ? -sigmoid : sigmoid);
    }
    for (int step = 16; step; step /= 2) loss += __shfl_xor_sync(0xffffffffu, loss, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = loss;
    __syncthreads();                                        // every warp's sum is there
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < blockDim.x / 32; warp++) loss += shared[warp];
        losses[n] = loss;
    }
}
