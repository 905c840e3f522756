// Passes over memory: photos to pixels, dropout, sums with ReLU's derivative.
// Each of them reads and writes every number once; their limit is the memory's bandwidth. With
// `round` results are rounded to TF32, for the tensor cores that read them: see conv.cu.

typedef unsigned long long Word;
__device__ unsigned index_of_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ------------------------------------------------------------------------------------ photos
// uint8 photos (N, S, S, 3) -> cropped, mirrored (x - mean) / deviation, (N, crop, crop, 4); the
// fourth channel is zero, so that a pixel is one load of 16 bytes. A block takes one photo. The
// sums are of integers, hence exact whatever their order. Called by gpu.prepare.
extern "C" __global__ void
prepare(const unsigned char* photos, const int* places, float* y, int batch, int size, int crop,
        int round)
{
    Word* sums = reinterpret_cast<Word*>(shared_memory());
    const int n = blockIdx.x, pixels = crop * crop;
    const int top = places[n], left = places[batch + n], flip = places[2 * batch + n];
    const unsigned char* photo =
        photos + ((static_cast<long long>(n) * size + top) * size + left) * 3;
    Word sum = 0, squares = 0;
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
        const int i = at / crop, j = flip ? crop - 1 - at % crop : at % crop;
        const unsigned char* pixel = photo + (i * size + j) * 3;
        reinterpret_cast<float4*>(y)[static_cast<long long>(n) * pixels + at] = make_float4(
            rounded((pixel[0] - shift) * scale, round), rounded((pixel[1] - shift) * scale, round),
            rounded((pixel[2] - shift) * scale, round), 0);
    }
}

// ----------------------------------------------------------------------------------- dropout
// y = x · mask / (1 - rate). A thread draws one Philox4x64-10 block, 64 bytes, for 16 numbers of a
// row: counter (row·blocks + block, step, layer, DROPOUT = 1 of philox.py), key (seed, 0). The same
// masks as NumPy's Philox gives. Called by gpu.dropout.
#define LANES 16

__device__ void philox(Word key, Word (&counter)[4])
{
    Word key0 = key, key1 = 0;
    for (int round = 0; round < 10; round++) {
        const Word a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        const Word high0 = __umul64hi(a, counter[0]), low0 = a * counter[0];
        const Word high1 = __umul64hi(b, counter[2]), low1 = b * counter[2];
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[3] = low0;
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
}

extern "C" __global__ void
dropout(const float* x, float* y, unsigned total, int e, int blocks, unsigned threshold,
        float scale, Word seed, Word step, Word layer, Word row)
{
    const unsigned index = index_of_thread();              // one Philox block
    if (index >= total) return;
    Word lanes[4] = {row * blocks + index, step, layer, 1};
    philox(seed, lanes);
    const int begin = index % blocks * LANES;
    const long long start = index / blocks * e + begin;
#pragma unroll
    for (int lane = 0; lane < LANES && begin + lane < e; lane++) {
        const unsigned bits = lanes[lane / 4] >> (lane % 4 * 16) & 0xffff;
        y[start + lane] = bits >= threshold ? x[start + lane] * scale : 0;
    }
}

// -------------------------------------------------------------------------- filters and sums
// sum += a + b + c, any of which may be null, and 0 where a gate, if there is one, is not positive:
// the derivative of a ReLU. Called by gpu.sum_gradients.
extern "C" __global__ void
sum_gradients(float* sum, const float* a, const float* b, const float* c, const float* gate,
              unsigned total, int round)
{
    const unsigned at = index_of_thread();
    if (at >= total) return;
    float number = sum[at];
    if (a) number += a[at];
    if (b) number += b[at];
    if (c) number += c[at];
    sum[at] = gate && !(gate[at] > 0) ? 0 : rounded(number, round);
}

// Filters w (taps, C, F) as right operands of convolutions: (taps, wide, F), zeros from channel C
// on, and turned round, (taps, F, C), the last tap first. A row of the table says where the filters
// are in `weights` and where the two go in `forms`. blockIdx.y is the row, whose numbers the blocks
// of x share. Called by gpu._forms.
extern "C" __global__ void
filters(const float* weights, float* forms, const int* table, int round)
{
    const int* row = table + blockIdx.y * 7;
    const int taps = row[1], c = row[2], f = row[3], wide = row[4];
    const float* w = weights + row[0];
    for (int at = index_of_thread(); at < taps * wide * f; at += gridDim.x * blockDim.x) {
        const int filter = at % f, channel = at / f % wide, tap = at / f / wide;
        const float number = channel < c ? rounded(w[(tap * c + channel) * f + filter], round) : 0;
        forms[row[5] + at] = number;
        if (channel < c) forms[row[6] + ((taps - 1 - tap) * f + filter) * c + channel] = number;
    }
}

// y = Σ_z parts[z] in the order of z, + bias, 0 where a gate (total) is not positive, then with
// relu max(y, 0), where a NaN stays; parts (Z, total). The threads beyond total add the rows of
// `sums` (shares, cols), which go to db. The end of a split convolution, of a filter gradient, of a
// product, which is one part and stays in place, and gpu.column_sums. Called by gpu._reduce.
extern "C" __global__ void
reduce(const float* parts, float* y, const float* bias, const float* gate, const float* sums,
       float* db, unsigned threads, unsigned total, int count, int cols, int pitch, int shares,
       int relu, int round)
{
    const unsigned index = index_of_thread();
    if (index >= threads) return;
    const bool own = index < total;
    const float* from = own ? parts + index : sums + (index - total);
    float sum = 0;
    for (int z = 0; z < (own ? count : shares); z++)
        sum += from[static_cast<long long>(z) * (own ? total : cols)];
    if (!own) {
        db[index - total] = sum;
        return;
    }
    if (bias) sum += bias[index % cols];
    if (gate && !(gate[index] > 0)) sum = 0;
    y[static_cast<long long>(index / cols) * pitch + index % cols] =
        rounded(relu && sum < 0 ? 0 : sum, round);
}
