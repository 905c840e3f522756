// Passes over memory: photos to pixels, dropout, bias and ReLU, turned filters, column sums.
//
// Each of them reads and writes every number once; their limit is the memory's bandwidth.

__device__ unsigned index_of_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ------------------------------------------------------------------------------------ photos
// uint8 photos (N, S, S, 3) -> cropped, mirrored (x - mean) / deviation, (N, crop, crop, 4); the
// fourth channel is zero, so that a pixel is one load of 16 bytes. A block takes one photo. The
// sums are of integers, hence exact whatever their order. Called by gpu.prepare.

extern "C" __global__ void
prepare(const unsigned char* photos, const int* top, const int* left, const unsigned char* flip,
        float* y, int size, int crop)
{
    unsigned long long* sums = reinterpret_cast<unsigned long long*>(shared_memory());
    const int n = blockIdx.x, pixels = crop * crop;
    const unsigned char* photo =
        photos + ((static_cast<long long>(n) * size + top[n]) * size + left[n]) * 3;
    unsigned long long sum = 0, squares = 0;
    for (int at = threadIdx.x; at < pixels; at += blockDim.x) {
        const unsigned char* pixel = photo + (at / crop * size + at % crop) * 3;
        for (int c = 0; c < 3; c++) {
            sum += pixel[c];
            squares += pixel[c] * pixel[c];
        }
    }
    sums[threadIdx.x] = sum;
    sums[blockDim.x + threadIdx.x] = squares;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();                                    // the sums to be added are there
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            sums[blockDim.x + threadIdx.x] += sums[blockDim.x + threadIdx.x + half];
        }
    }
    __syncthreads();                                        // sums[0] is the whole
    const double count = 3.0 * pixels, mean = sums[0] / count;
    const double variance = sums[blockDim.x] / count - mean * mean;
    const float scale = 1 / fmaxf(sqrtf(static_cast<float>(variance)), 1.0f), shift = mean;
    for (int at = threadIdx.x; at < pixels; at += blockDim.x) {
        const int i = at / crop, j = flip[n] ? crop - 1 - at % crop : at % crop;
        const unsigned char* pixel = photo + (i * size + j) * 3;
        reinterpret_cast<float4*>(y)[static_cast<long long>(n) * pixels + at] = make_float4(
            (pixel[0] - shift) * scale, (pixel[1] - shift) * scale, (pixel[2] - shift) * scale, 0);
    }
}

// ----------------------------------------------------------------------------------- dropout
// y = x · mask / (1 - rate). A thread draws one Philox4x64-10 block, 64 bytes, for 16 numbers of
// a row: counter (row·blocks + block, step, layer, 1), key (seed, 0). The same masks as NumPy's
// Philox gives. `mask` multiplies dx by the ReLU's derivative. Called by gpu.dropout.

#define LANES 16

__device__ void philox(unsigned long long key, unsigned long long (&counter)[4])
{
    unsigned long long key0 = key, key1 = 0;
    for (int round = 0; round < 10; round++) {
        const unsigned long long a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const unsigned long long high0 = __umul64hi(a, counter[0]), low0 = a * counter[0];
        const unsigned long long high1 = __umul64hi(b, counter[2]), low1 = b * counter[2];
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[3] = low0;
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
}

extern "C" __global__ void
dropout(const float* x, const float* mask, float* y, unsigned total, int e, int blocks,
        unsigned threshold, float scale, unsigned long long seed, unsigned long long step,
        unsigned long long layer, unsigned long long row)
{
    const unsigned index = index_of_thread();              // one Philox block
    if (index >= total) return;
    unsigned long long lanes[4] = {row * blocks + index, step, layer, 1};
    philox(seed, lanes);
    const int begin = index % blocks * LANES;
    const long long start = index / blocks * e + begin;
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
        if (begin + lane >= e) break;
        const unsigned bits = lanes[lane / 4] >> (lane % 4 * 16) & 0xffff;
        const bool keep = bits >= threshold && (!mask || mask[start + lane] > 0);
        y[start + lane] = keep ? x[start + lane] * scale : 0;
    }
}

// ------------------------------------------------------------------------------ bias and ReLU

// y += x; a thread adds four numbers. Called by gpu.add.
extern "C" __global__ void add(float* y, const float* x, unsigned total)
{
    const unsigned index = index_of_thread() * 4;
    if (index + 4 <= total) {
        float4 sum = *reinterpret_cast<float4*>(y + index);
        const float4 more = *reinterpret_cast<const float4*>(x + index);
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
        *reinterpret_cast<float4*>(y + index) = sum;
    } else {
        for (unsigned at = index; at < total; at++) y[at] += x[at];
    }
}

// y += b, then with relu max(y, 0), in place; y (M, E). Called by gpu.add_bias.
extern "C" __global__ void
add_bias(float* y, const float* b, unsigned total, int e, int relu)
{
    const unsigned index = index_of_thread();
    if (index >= total) return;
    const float value = y[index] + b[index % e];
    y[index] = relu && value < 0 ? 0 : value;               // a NaN stays
}

// dx = dy · (x > 0), where dx may be dy. Called by gpu.relu_backward.
extern "C" __global__ void
relu_backward(const float* dy, const float* x, float* dx, unsigned total)
{
    const unsigned index = index_of_thread();
    if (index < total) dx[index] = x[index] > 0 ? dy[index] : 0;
}

// ----------------------------------------------------------------------------------- filters
// w (KH*KW, C, F) -> turned (KH*KW, F, C), taps in reverse order: what the input gradient
// multiplies dy with. Tiles of 32×32 pass through shared memory, so that reading and writing are
// both coalesced. Called by gpu.conv_backward_input.

extern "C" __global__ void turn(const float* w, float* turned, int taps, int c, int f)
{
    float* tile = shared_memory();                          // 32 × 33: columns differ in bank
    const int tap = blockIdx.z, f0 = blockIdx.x * 32, c0 = blockIdx.y * 32;
    for (int i = threadIdx.y; i < 32; i += blockDim.y)
        if (c0 + i < c && f0 + threadIdx.x < f)
            tile[i * 33 + threadIdx.x] =
                w[(static_cast<long long>(tap) * c + c0 + i) * f + f0 + threadIdx.x];
    __syncthreads();                                        // the tile is there
    for (int i = threadIdx.y; i < 32; i += blockDim.y)
        if (f0 + i < f && c0 + threadIdx.x < c)
            turned[(static_cast<long long>(taps - 1 - tap) * f + f0 + i) * c + c0 + threadIdx.x] =
                tile[threadIdx.x * 33 + i];
}

// -------------------------------------------------------------------------------------- sums

// y = Σ_z parts[z], in the order of z, then bias, ReLU and mask as in conv.cu; parts
// (Z, rows, cols). Called by gpu for the parts of a split convolution and of column sums.
extern "C" __global__ void
reduce(const float* parts, float* y, const float* bias, const float* mask, int count, int rows,
       int cols, int y_pitch, int mask_pitch, int relu)
{
    const unsigned index = index_of_thread(), total = rows * cols;
    if (index >= total) return;
    const long long row = index / cols;
    const int col = index % cols;
    float sum = 0;
    for (int z = 0; z < count; z++) sum += parts[static_cast<long long>(z) * total + index];
    if (bias) sum += bias[col];
    if (relu && sum < 0) sum = 0;                           // a NaN stays
    if (mask && !(mask[row * mask_pitch + col] > 0)) sum = 0;
    y[row * y_pitch + col] = sum;
}

// parts[z, e] = Σ of x[m, e] over the z-th share of the rows m; x (M, E). A block of 32×8 threads
// takes 32 columns; its eight sums a column are added in a fixed order. Called by gpu.column_sums.
extern "C" __global__ void
column_sums(const float* x, float* parts, int m, int e, int pitch, int share)
{
    float* sums = shared_memory();                          // 8 × 32
    const int col = blockIdx.x * 32 + threadIdx.x, begin = blockIdx.y * share;
    float sum = 0;
    if (col < e)
        for (int row = begin + threadIdx.y; row < min(m, begin + share); row += 8)
            sum += x[static_cast<long long>(row) * pitch + col];
    sums[threadIdx.y * 32 + threadIdx.x] = sum;
    __syncthreads();                                        // the eight sums are there
    if (threadIdx.y == 0 && col < e) {
        for (int y = 1; y < 8; y++) sum += sums[y * 32 + threadIdx.x];
        parts[static_cast<long long>(blockIdx.y) * e + col] = sum;
    }
}
