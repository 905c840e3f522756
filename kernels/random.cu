// Random numbers on the device: masks for dropout, and samples to train on. Both come from counters
// by Philox4x64-10, as philox.py says, so they are NumPy's to the bit.

typedef unsigned long long Word;
#define DRAWS 0                         // what the numbers are for: see philox.py
#define DROPOUT 1
#define LANES 16                        // numbers of 16 bits in a block

// Replaces a counter by its block of 256 random bits (Salmon 2011).
__device__ void philox(Word seed, Word (&counter)[4])
{
    Word key0 = seed, key1 = 0;
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

// y = x · mask / (1 - rate), x (N, E). A thread draws one block for 16 numbers of a row: counter
// (row·blocks + block, step, mask_id, DROPOUT), with `row` that of x[0]. Called by gpu.dropout.
extern "C" __global__ void
dropout(const float* x, float* y, unsigned total, int e, int blocks, unsigned threshold,
        float scale, Word seed, Word step, Word mask_id, Word row)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;   // of a block
    if (index >= total) return;
    Word lanes[4] = {row * blocks + index, step, mask_id, DROPOUT};
    philox(seed, lanes);
    const int begin = index % blocks * LANES;
    const long long start = index / blocks * e + begin;
#pragma unroll
    for (int lane = 0; lane < LANES && begin + lane < e; lane++) {
        const unsigned bits = lanes[lane / 4] >> (lane % 4 * 16) & 0xffff;
        y[start + lane] = bits >= threshold ? x[start + lane] * scale : 0;
    }
}

// Per-class uniform sampling (paper, §3): a thread draws row i of step t, from counter (i, t, 0,
// DRAWS): a word, one of its photos, and a crop. class_photos has the photos of word 0, then those
// of word 1, …; those of word k end at class_ends[k]. ⌊raw · n / 2^64⌋, the upper half of a
// product, is a number below n. Writes drawn (5, total): words, photos, top, left, flip. Called
// by gpu.sample_by_class.
extern "C" __global__ void
sample_by_class(const unsigned* class_photos, const long long* class_ends, long long* drawn,
                unsigned words, unsigned spare, Word seed, Word step, unsigned count,
                unsigned total)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= total) return;
    Word raw[4] = {index % count, step + index / count, 0, DRAWS};
    philox(seed, raw);
    const Word word = __umul64hi(raw[0], words);
    const long long start = word ? class_ends[word - 1] : 0;
    const Word photo = __umul64hi(raw[1], class_ends[word] - start);
    const Word crops = spare + 1;                           // places along one axis
    drawn[index] = word;
    drawn[total + index] = class_photos[start + photo];
    drawn[2 * total + index] = (raw[2] & 0xffff) * crops >> 16;
    drawn[3 * total + index] = (raw[2] >> 16 & 0xffff) * crops >> 16;
    drawn[4 * total + index] = raw[2] >> 32 & 1;
}
