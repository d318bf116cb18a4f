// The order of work of quantize, the same for every instruction set; included by one file for each of them.
//
// Blocks that fit the cache are read for their amax (if they have no scale) and again, from the cache, to be encoded. A
// larger block is cut into pieces; where a scale is missing, one pass over memory finds the amax and a second encodes.
// A thread works on a contiguous range of blocks or pieces. Maxima and sums of integers do not depend on the order.
// With a carrier the codes are looked up in a table right after they were written, while the cache has them.
//
// `Kernel` gives, for one input type and one format:
//   T                                                        the element as it lies in memory
//   static uint32_t amax(const T* x, int64_t n)              the largest |x|, as bits of fp32
//   static void encode(const T* x, uint8_t* codes, int64_t n, const BlockScale& scale, bool stream, Tally& tally)
//   static void finish(bool stream)                          after the last encode() of a thread
//   static float widen(T)
#pragma once

#include <cstdint>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "quantize/quantize.h"

namespace fp8kernels {
namespace {

constexpr int64_t kPiece = 1 << 15;         // elements a large block is cut into
constexpr int64_t kBlockInCache = 1 << 16;  // elements; as fp32 with its codes a quarter of a 1 MiB L2 cache
constexpr int64_t kStrip = 1 << 17;         // elements of blocks that are worked on together
constexpr int64_t kStripBlocks = 64;        // and how many blocks at most
constexpr int64_t kStream = 16 << 20;       // codes in bytes; a larger result would not stay in the cache anyway

// What the encoder of one block needs to know.
struct BlockScale {
    float scale;
    bool saturate;
};

// What one thread has seen.
struct Tally {
    uint32_t amax = 0;  // of the piece at hand, bits of fp32
    int64_t saturated = 0, flushed = 0, nonfinite = 0;

    void raise(uint32_t bits) { amax = bits > amax ? bits : amax; }
};

void raise_shared(float* where, uint32_t bits) {
    auto* shared = reinterpret_cast<uint32_t*>(where);
    uint32_t seen = __atomic_load_n(shared, __ATOMIC_RELAXED);
    while (bits > seen && !__atomic_compare_exchange_n(shared, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

template <class Kernel>
class Driver {
    using T = typename Kernel::T;

    const QuantizeArgs& args_;
    const T* x_;
    int64_t stride_, block_rows_, block_cols_, grid_cols_, blocks_;
    int64_t cols_;
    bool stream_;
    bool carried_;
    Carrier carrier_;

    // A rectangle of x inside one block.
    struct Piece {
        int64_t block, row, col, rows, cols;
    };

    uint32_t amax(const Piece& piece) const {
        uint32_t bits = 0;
        for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) {
            const uint32_t row = Kernel::amax(x_ + r * stride_ + piece.col, piece.cols);
            bits = row > bits ? row : bits;
        }
        return bits;
    }

    // The largest finite |x|: only asked of a block that holds Inf or NaN.
    float finite_amax(const Piece& piece) const {
        uint32_t most = 0;
        for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) {
            for (int64_t c = piece.col; c < piece.col + piece.cols; ++c) {
                const uint32_t bits = bits_from_float(Kernel::widen(x_[r * stride_ + c])) & kMagnitude;
                if (bits < kInfBits && bits > most) most = bits;
            }
        }
        return float_from_bits(most);
    }

    float own_scale(uint32_t amax_bits, const Piece& whole) const {
        const float amax = amax_bits < kInfBits ? float_from_bits(amax_bits) : finite_amax(whole);
        return usable(scale_from_amax(amax, args_.target, args_.rule));
    }

    float usable(float scale) const { return carried_ ? usable_scale(scale, args_.carrier) : scale; }

    void encode(const T* x, uint8_t* codes, int64_t n, float scale, Tally& tally) const {
        const BlockScale block{scale, args_.saturate};
        if (!carried_) return Kernel::encode(x, codes, n, block, stream_, tally);
        int64_t saturated = tally.saturated, flushed = 0;
        Kernel::encode(x, codes, n, block, stream_, tally);
        for (int64_t i = 0; i < n; ++i) {
            saturated += carrier_.above[codes[i]];  // what overflowed HiF8 is among them
            flushed += carrier_.below[codes[i]];
            codes[i] = carrier_.code[codes[i]];
        }
        tally.saturated = saturated;
        tally.flushed += flushed;
    }

    void encode(const Piece& piece, float scale, Tally& tally) const {
        for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) {
            encode(x_ + r * stride_ + piece.col, args_.codes + r * cols_ + piece.col, piece.cols, scale, tally);
        }
    }

    // The end of a thread's work.
    void finish(const Tally& tally) const {
        Kernel::finish(stream_);
        __atomic_fetch_add(&args_.counts[1], tally.saturated, __ATOMIC_RELAXED);
        __atomic_fetch_add(&args_.counts[2], tally.flushed, __ATOMIC_RELAXED);
        __atomic_fetch_add(&args_.counts[3], tally.nonfinite, __ATOMIC_RELAXED);
    }

    Piece block(int64_t index) const {
        return {index, index / grid_cols_ * block_rows_, index % grid_cols_ * block_cols_, block_rows_, block_cols_};
    }

    // Blocks side by side, `count` of them from `b` on. Reading whole rows of the strip, rather than one block after
    // the other, keeps the processor's prefetcher on the track.
    void run_strip(int64_t b, int64_t count, Tally& tally) const {
        const Piece strip = block(b);
        const float* given = args_.scale_in + b;
        float* scale = args_.scale_out + b;
        uint32_t seen[kStripBlocks] = {};
        bool missing = false;
        for (int64_t i = 0; i < count; ++i) missing = missing || given[i] == 0.0f;
        if (missing) {
            for (int64_t r = strip.row; r < strip.row + block_rows_; ++r) {
                const T* x = x_ + r * stride_ + strip.col;
                for (int64_t i = 0; i < count; ++i, x += block_cols_) {
                    const uint32_t bits = Kernel::amax(x, block_cols_);
                    seen[i] = bits > seen[i] ? bits : seen[i];
                }
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            scale[i] = given[i] == 0.0f ? own_scale(seen[i], block(b + i)) : usable(given[i]);
            seen[i] = 0;
        }
        for (int64_t r = strip.row; r < strip.row + block_rows_; ++r) {
            const T* x = x_ + r * stride_ + strip.col;
            uint8_t* codes = args_.codes + r * cols_ + strip.col;
            for (int64_t i = 0; i < count; ++i, x += block_cols_, codes += block_cols_) {
                tally.amax = seen[i];
                encode(x, codes, block_cols_, scale[i], tally);
                seen[i] = tally.amax;
            }
        }
        for (int64_t i = 0; i < count; ++i) args_.amax[b + i] = float_from_bits(seen[i]);
    }

    void run_small() const {
        const int64_t elements = block_rows_ * block_cols_;
        int64_t wide = kStrip / elements;  // blocks in a strip
        wide = wide < 1 ? 1 : wide > kStripBlocks ? kStripBlocks : wide;
        wide = wide < grid_cols_ ? wide : grid_cols_;
        const int64_t strips = (grid_cols_ + wide - 1) / wide;  // in one row of the grid
        const int64_t grain = elements * wide < kPiece ? kPiece / (elements * wide) : 1;
        parallel_ranges(args_.threads, blocks_ / grid_cols_ * strips, grain, [&](int64_t begin, int64_t end) {
            Tally tally;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t first = i % strips * wide;
                run_strip(i / strips * grid_cols_ + first, grid_cols_ - first < wide ? grid_cols_ - first : wide,
                          tally);
            }
            finish(tally);
        });
    }

    void run_large() const {
        const int64_t piece_cols = block_cols_ < kPiece ? block_cols_ : kPiece;
        const int64_t piece_rows = kPiece / piece_cols;
        const int64_t across = (block_cols_ + piece_cols - 1) / piece_cols;
        const int64_t down = (block_rows_ + piece_rows - 1) / piece_rows;
        const auto piece = [&](int64_t index) {
            const Piece whole = block(index / (across * down));
            const int64_t row = index % (across * down) / across * piece_rows;
            const int64_t col = index % across * piece_cols;
            const int64_t rows = block_rows_ - row < piece_rows ? block_rows_ - row : piece_rows;
            const int64_t cols = block_cols_ - col < piece_cols ? block_cols_ - col : piece_cols;
            return Piece{whole.block, whole.row + row, whole.col + col, rows, cols};
        };
        const int64_t pieces = blocks_ * across * down;
        bool missing = false;
        for (int64_t b = 0; b < blocks_; ++b) {
            args_.amax[b] = 0.0f;
            args_.scale_out[b] = usable(args_.scale_in[b]);
            missing = missing || args_.scale_in[b] == 0.0f;
        }
        if (missing) {
            parallel_ranges(args_.threads, pieces, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    const Piece p = piece(i);
                    if (args_.scale_in[p.block] == 0.0f) raise_shared(&args_.amax[p.block], amax(p));
                }
            });
            for (int64_t b = 0; b < blocks_; ++b) {
                if (args_.scale_in[b] == 0.0f) args_.scale_out[b] = own_scale(bits_from_float(args_.amax[b]), block(b));
            }
        }
        parallel_ranges(args_.threads, pieces, 1, [&](int64_t begin, int64_t end) {
            Tally tally;
            for (int64_t i = begin; i < end; ++i) {
                const Piece p = piece(i);
                tally.amax = 0;
                encode(p, args_.scale_out[p.block], tally);
                raise_shared(&args_.amax[p.block], tally.amax);
            }
            finish(tally);
        });
    }

   public:
    explicit Driver(const QuantizeArgs& args) : args_(args), x_(static_cast<const T*>(args.x)) {
        stride_ = args.row_stride;
        cols_ = args.cols;
        grid_cols_ = args.grid_cols;
        block_rows_ = args.rows / args.grid_rows;
        block_cols_ = args.cols / args.grid_cols;
        blocks_ = args.grid_rows * args.grid_cols;
        carried_ = args.carrier != kNoCarrier;
        if (carried_) carrier_ = Carrier::make<HiF8>(args.carrier);
        stream_ = !carried_ && args.rows * args.cols >= kStream;
        if (grid_cols_ == 1 && (stride_ == cols_ || block_rows_ == 1)) {  // a block is one run of memory
            stride_ = block_rows_ == 1 ? stride_ : stride_ * block_rows_;
            block_cols_ = cols_ = cols_ * block_rows_;
            block_rows_ = 1;
        }
    }

    void run() const {
        args_.counts[0] = args_.rows * args_.cols;
        args_.counts[1] = args_.counts[2] = args_.counts[3] = 0;
        if (args_.counts[0] >= kStream) advise_huge_pages(args_.codes, static_cast<size_t>(args_.counts[0]));
        if (block_rows_ * block_cols_ <= kBlockInCache) {
            run_small();
        } else {
            run_large();
        }
        if (carried_) {
            for (int64_t b = 0; b < blocks_; ++b) args_.scale_out[b] *= carrier_step(args_.carrier);
        }
    }
};

// Calls the driver of the right kernel: Kernel<Input, Format>, with the three inputs of one instruction set.
template <template <class, class> class Kernel, class Fp32, class Bf16, class Fp16, class Fmt>
void run_format(const QuantizeArgs& args) {
    switch (args.type) {
        case InputType::fp32: return Driver<Kernel<Fp32, Fmt>>(args).run();
        case InputType::bf16: return Driver<Kernel<Bf16, Fmt>>(args).run();
        case InputType::fp16: return Driver<Kernel<Fp16, Fmt>>(args).run();
    }
}

}  // namespace
}  // namespace fp8kernels
