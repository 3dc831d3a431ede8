#include "cpu/maxsim_int8.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/maxsim_int8_pack.h"
#include "cpu/maxsim_outcome.h"
#include "cpu/maxsim_pack.h"
#include "cpu/parallel.h"

namespace bagformer {

namespace {

// As in maxsim.cpp: packed texts of one pass over the images, and of one sweep over an image.
constexpr int64_t kGroupBytes = int64_t{32} << 20;
constexpr int64_t kBlockBytes = int64_t{384} << 10;
constexpr int64_t kItemsPerThread = 4;
// Fewer texts than these score an image where it lies, if they can.
constexpr int64_t kManyTexts = 2;

const Int8Kernels& int8_kernels_of(Isa isa) {
#if BAGFORMER_X86
    if (isa >= Isa::avx512vnni) return avx512vnni_int8_kernels();
    if (isa == Isa::avx512) return avx512_int8_kernels();
    if (isa == Isa::avx2) return avx2_int8_kernels();
#elif BAGFORMER_ARM64
#if BAGFORMER_ARM64_EXTENSIONS
    if (isa >= Isa::neondotprod) return neondotprod_int8_kernels();
#endif
    if (isa == Isa::neon) return neon_int8_kernels();
#endif
    (void)isa;
    return scalar_int8_kernels();
}

class Int8Forward {
  public:
    Int8Forward(const MaxSimForward& call, const Int8Kernels& kernels)
        : call_(call),
          kernels_(kernels),
          texts_(call.text.shape[0]),
          bags_(call.text.shape[1]),
          features_(call.text.shape[2]),
          depth_((features_ + kernels.features_in_word() - 1) / kernels.features_in_word()),
          candidates_(call.image.rank == 4),
          images_(call.image.shape[call.image.rank - 3]),
          patches_(call.image.shape[call.image.rank - 2]),
          argmax_(call.text_argmax || call.image_argmax),
          turned_(kernels.turned != nullptr && !argmax_ && (candidates_ || texts_ < kManyTexts) &&
                  call.image.strides[call.image.rank - 1] == 1 &&
                  features_ % kernels.features_in_word() == 0),
          room_(turned_ ? round_up(bags_, kernels.lanes) : bags_),
          outcome_(call) {}

    void run() {
        if (texts_ == 0 || images_ == 0) return;
        workers_.resize(std::max(1, call_.n_threads));
        if (candidates_)
            run_candidates();
        else
            run_all_pairs();
    }

  private:
    int64_t text_bytes() const { return std::max<int64_t>(1, room_ * (depth_ + 2) * 4); }

    int64_t parts(int64_t outer, int64_t inner) const {
        if (call_.n_threads <= 1) return 1;
        const int64_t wanted = kItemsPerThread * call_.n_threads;
        return std::clamp<int64_t>((wanted + outer - 1) / outer, 1, inner);
    }

    void pack_text(Int8Texts& into, int64_t slot, int64_t text) const {
        Places& places = into.places[slot];
        places.find(mask_row(call_.text_mask, text), call_.text_mask.strides[1], bags_);
        const int32_t count = places.count();
        for (int32_t row = 0, tile = 0; row < count; ++tile) {
            const int height = turned_ ? std::min(kernels_.lanes, count - row)
                                       : tile_height(count, tile, kernels_.max_rows);
            pack_rows(into, slot, text, row, height, turned_ ? kernels_.lanes : height);
            row += height;
        }
    }

    // `height` bags from place `row` on, side by side in rows of `width` words.
    void pack_rows(Int8Texts& into, int64_t slot, int64_t text, int32_t row, int height,
                   int width) const {
        const uint32_t plus = turned_ && kernels_.word == Int8Word::quad ? kPlus128 : 0;
        const int64_t stride = call_.text.strides[2];
        const float* scales = call_.text_scales.at<const float>(text);
        uint32_t* words = into.words.data() + (slot * room_ + row) * depth_;
        for (int r = 0; r < height; ++r) {
            const int64_t bag = into.places[slot].index[row + r], at = slot * room_ + row + r;
            const int8_t* numbers = call_.text.at<const int8_t>(text, bag);
            for (int64_t d = 0; d < depth_; ++d)
                words[d * width + r] = plus ^ word_of(numbers, stride, d, features_, kernels_.word);
            into.scales[at] = scales[bag * call_.text_scales.strides[1]];
            into.starts[at] = start_of(numbers, stride);
        }
    }

    int32_t start_of(const int8_t* numbers, int64_t stride) const {
        if (kernels_.word != Int8Word::quad) return 0;
        int32_t sum = 0;
        for (int64_t d = 0; d < features_; ++d) sum += numbers[d * stride];
        return -128 * sum;
    }

    void run_all_pairs() {
        const int64_t group = std::clamp<int64_t>(kGroupBytes / text_bytes(), 1, texts_);
        Int8Texts packed;
        packed.resize(group, room_, depth_);
        for (int64_t first = 0; first < texts_; first += group) {
            const int64_t count = std::min(group, texts_ - first);
            packed.first = first;
            parallel_for(count, call_.n_threads,
                         [&](int64_t slot, int) { pack_text(packed, slot, first + slot); });
            const int64_t cuts = parts(images_, count);
            parallel_for(images_ * cuts, call_.n_threads, [&](int64_t item, int worker) {
                const int64_t cut = item % cuts;
                score_image(packed, count * cut / cuts, count * (cut + 1) / cuts, item / cuts,
                            workers_[worker]);
            });
        }
    }

    void run_candidates() {
        const int64_t cuts = parts(texts_, images_);
        parallel_for(texts_ * cuts, call_.n_threads, [&](int64_t item, int worker) {
            Int8Workspace& work = workers_[worker];
            const int64_t text = item / cuts, cut = item % cuts;
            work.own.first = text;
            work.own.resize(1, room_, depth_);
            pack_text(work.own, 0, text);
            for (int64_t k = images_ * cut / cuts; k < images_ * (cut + 1) / cuts; ++k)
                score_image(work.own, 0, 1, k, work);
        });
    }

    int64_t panels(const Int8Workspace& work) const {
        return (work.image.count() + kernels_.lanes - 1) / kernels_.lanes;
    }

    // The patches that count and their scales, up to a multiple of `step`.
    void find_patches(int64_t i, int64_t j, int64_t step, Int8Workspace& work) const {
        const View &view = call_.image, &scales = call_.image_scales;
        Places& places = work.image;
        places.find(mask_row(call_.image_mask, i, j), call_.image_mask.strides[view.rank - 2],
                    patches_);
        work.scales.assign(round_up(places.count(), step), 0.0f);
        const float* given = scales.at<const float>(i, candidates_ ? j : 0);
        for (int32_t k = 0; k < places.count(); ++k)
            work.scales[k] = given[places.index[k] * scales.strides[scales.rank - 1]];
    }

    void pack_image(int64_t i, int64_t j, Int8Workspace& work) const {
        const View& view = call_.image;
        const Places& places = work.image;
        const int64_t lanes = kernels_.lanes, count = places.count();
        work.panels.resize(panels(work) * lanes * depth_);
        const int8_t* numbers = view.at<const int8_t>(i, j);
        const int64_t token = view.strides[view.rank - 2], stride = view.strides[view.rank - 1];
        const bool quick =
            kernels_.pack && stride == 1 && features_ % kernels_.features_in_word() == 0;
        const uint32_t plus = kernels_.word == Int8Word::quad ? kPlus128 : 0;
        for (int64_t first = 0; first < count; first += lanes) {
            const int32_t valid = static_cast<int32_t>(std::min(lanes, count - first));
            const int32_t* chosen = places.index.data() + first;
            uint32_t* panel = work.panels.data() + first * depth_;
            if (quick) {
                kernels_.pack(numbers, token, chosen, valid, depth_, panel);
                continue;
            }
            for (int64_t d = 0; d < depth_; ++d)
                for (int32_t lane = 0; lane < lanes; ++lane)
                    panel[d * lanes + lane] =
                        lane < valid ? plus ^ word_of(numbers + chosen[lane] * token, stride, d,
                                                      features_, kernels_.word)
                                     : 0;
        }
    }

    // Packs image `image` (candidate form: of the one text) and scores texts [begin, end) with it.
    void score_image(const Int8Texts& texts, int64_t begin, int64_t end, int64_t image,
                     Int8Workspace& work) const {
        const int64_t i = candidates_ ? texts.first : image, j = candidates_ ? image : 0;
        if (turned_) return score_turned(texts, begin, end, i, j, image, work);
        find_patches(i, j, kernels_.lanes, work);
        pack_image(i, j, work);
        const int64_t lanes = kernels_.lanes, padded = panels(work) * lanes;
        const int64_t state = (bags_ * lanes + padded) * 4;
        const int64_t block =
            std::clamp<int64_t>(kBlockBytes / (text_bytes() + state), 1, end - begin);
        work.row_best.resize(block * bags_ * lanes);
        work.lane_best.resize(block * padded);
        work.bag_best.resize(bags_);
        if (argmax_) {
            work.row_panel.resize(block * bags_ * lanes);
            work.lane_row.resize(block * padded);
            work.bag_patch.resize(bags_);
        }
        for (int64_t first = begin; first < end; first += block) {
            const int64_t count = std::min(block, end - first);
            std::fill(work.row_best.begin(), work.row_best.end(),
                      -std::numeric_limits<float>::infinity());
            std::fill(work.row_panel.begin(), work.row_panel.end(), 0);
            work.has_nan.assign(block, 0);
            for (int64_t panel = 0; panel < panels(work); ++panel)
                for (int64_t slot = 0; slot < count; ++slot)
                    score_panel(texts, first + slot, slot, panel, padded, work);
            for (int64_t slot = 0; slot < count; ++slot)
                finish(texts, first + slot, slot, image, padded, work);
        }
    }

    void score_panel(const Int8Texts& texts, int64_t text, int64_t slot, int64_t panel,
                     int64_t padded, Int8Workspace& work) const {
        const int64_t lanes = kernels_.lanes, state = slot * bags_ * lanes;
        Int8Job job;
        job.panel = work.panels.data() + panel * lanes * depth_;
        job.rows = texts.words.data() + text * room_ * depth_;
        job.depth = depth_;
        job.starts = texts.starts.data() + text * room_;
        job.row_scales = texts.scales.data() + text * room_;
        job.lane_scales = work.scales.data() + panel * lanes;
        job.valid = static_cast<int32_t>(std::min(lanes, work.image.count() - panel * lanes));
        job.index = static_cast<int32_t>(panel);
        job.n_rows = texts.places[text].count();
        job.row_best = work.row_best.data() + state;
        job.row_panel = argmax_ ? work.row_panel.data() + state : nullptr;
        job.lane_best = work.lane_best.data() + slot * padded + panel * lanes;
        job.lane_row = argmax_ ? work.lane_row.data() + slot * padded + panel * lanes : nullptr;
        if (kernels_.panel(job)) work.has_nan[slot] = 1;
    }

    // Image (i, j), read where it lies.
    void score_turned(const Int8Texts& texts, int64_t begin, int64_t end, int64_t i, int64_t j,
                      int64_t image, Int8Workspace& work) const {
        find_patches(i, j, 1, work);
        const int64_t count = work.image.count();
        work.rows.resize(count + kernels_.max_rows);
        work.starts.resize(count);
        work.row_best.resize(count);
        work.lane_best.resize(room_);
        const int8_t* numbers = call_.image.at<const int8_t>(i, j);
        const int64_t token = call_.image.strides[call_.image.rank - 2];
        for (int64_t k = 0; k < count; ++k) work.rows[k] = numbers + work.image.index[k] * token;
        const bool last = image + 1 == images_;
        const int8_t* next =
            last ? numbers
                 : call_.image.at<const int8_t>(candidates_ ? i : i + 1, candidates_ ? j + 1 : j);
        for (int64_t k = 0; k < kernels_.max_rows; ++k) work.rows[count + k] = next + k * token;
        Int8TurnedJob job;
        job.rows = work.rows.data();
        job.row_scales = work.scales.data();
        job.starts = work.starts.data();
        job.n_rows = static_cast<int32_t>(count);
        job.depth = depth_;
        job.lane_best = work.lane_best.data();
        job.row_best = call_.i2t ? work.row_best.data() : nullptr;
        for (int64_t text = begin; text < end; ++text) {
            job.panels = texts.words.data() + text * room_ * depth_;
            job.lane_scales = texts.scales.data() + text * room_;
            job.n_lanes = texts.places[text].count();
            const bool has_nan = kernels_.turned(job);
            write(texts, text, image, work,
                  {job.lane_best, nullptr, job.row_best, nullptr, has_nan});
        }
    }

    // The maxima of one text's bags from those of the lanes.
    void finish(const Int8Texts& texts, int64_t text, int64_t slot, int64_t image, int64_t padded,
                Int8Workspace& work) const {
        const int64_t state = slot * bags_ * kernels_.lanes;
        const bool has_nan = work.has_nan[slot] != 0;
        RowsJob<float> rows;
        rows.row_best = work.row_best.data() + state;
        rows.row_panel = argmax_ ? work.row_panel.data() + state : nullptr;
        rows.n_rows = padded > 0 ? texts.places[text].count() : 0;
        rows.best = work.bag_best.data();
        rows.patch = argmax_ ? work.bag_patch.data() : nullptr;
        kernels_.rows(rows, has_nan);
        write(texts, text, image, work,
              {rows.best, rows.patch, work.lane_best.data() + slot * padded,
               argmax_ ? work.lane_row.data() + slot * padded : nullptr, has_nan});
    }

    void write(const Int8Texts& texts, int64_t slot, int64_t image, const Int8Workspace& work,
               const Maxima<float>& found) const {
        const Places& text = texts.places[slot];
        const bool scored = text.count() > 0 && work.image.count() > 0;
        outcome_.write(texts.first + slot, image, text, work.image, scored ? &found : nullptr);
    }

    const MaxSimForward& call_;
    const Int8Kernels& kernels_;
    int64_t texts_, bags_, features_, depth_;
    bool candidates_;
    int64_t images_, patches_;
    bool argmax_, turned_;
    int64_t room_;  // rows of a packed text
    Outcome<float> outcome_;
    std::vector<Int8Workspace> workers_;
};

}  // namespace

void maxsim_int8_forward(const MaxSimForward& call) {
    Int8Forward(call, int8_kernels_of(call.isa)).run();
}

}  // namespace bagformer
