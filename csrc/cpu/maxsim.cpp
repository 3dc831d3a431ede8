#include "cpu/maxsim.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/maxsim_int8.h"
#include "cpu/maxsim_outcome.h"
#include "cpu/maxsim_pack.h"
#include "cpu/maxsim_texts.h"
#include "cpu/maxsim_turned.h"
#include "cpu/parallel.h"

namespace bagformer {

namespace {

// Packed texts of one pass over the images; and packed texts with their running maxima of one sweep
// over an image's panels, which stay in a second-level cache of 1 MB beside the image.
constexpr int64_t kGroupBytes = int64_t{32} << 20;
constexpr int64_t kBlockBytes = int64_t{384} << 10;
constexpr int64_t kItemsPerThread = 4;

// What one thread needs for one image and one block of texts.
template <class ImageIn, class E, class T>
struct Workspace {
    Places image;
    TurnedImage<ImageIn, E, T> turned;
    std::vector<E> panels;
    std::vector<T> scales;  // of the packed patches, up to whole panels; empty: none
    std::vector<T> row_best, lane_best, bag_best;
    std::vector<int32_t> row_panel, lane_row, bag_patch;
    std::vector<char> has_nan;
    Texts<E> own;  // the candidate form packs its text here
};

// In: the texts' type, E: what is packed, T: the scores' type, ImageIn: the images' type.
template <class In, class E, class T, class ImageIn>
class Forward {
  public:
    Forward(const MaxSimForward& call, const MaxSimKernels<T, E>& kernels)
        : call_(call),
          kernels_(kernels),
          texts_(call.text.shape[0]),
          bags_(call.text.shape[1]),
          features_(call.text.shape[2]),
          depth_(Packed<E>::depth(features_)),
          candidates_(call.image.rank == 4),
          images_(call.image.shape[call.image.rank - 3]),
          patches_(call.image.shape[call.image.rank - 2]),
          argmax_(call.text_argmax || call.image_argmax),
          turned_(takes_turned(candidates_ ? 1 : texts_, bags_, features_, kernels.lanes / 2)),
          room_((turned_ ? round_up(bags_, kernels.lanes) : bags_) * depth_),
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
    int64_t text_bytes() const {
        return std::max<int64_t>(1, room_ * static_cast<int64_t>(sizeof(E)));
    }

    // How many parts a loop of `outer` items with `inner` steps each is cut into, so that every
    // thread has work.
    int64_t parts(int64_t outer, int64_t inner) const {
        if (call_.n_threads <= 1) return 1;
        const int64_t wanted = kItemsPerThread * call_.n_threads;
        return std::clamp<int64_t>((wanted + outer - 1) / outer, 1, inner);
    }

    Rows<In> text_rows(int64_t text) const {
        return {call_.text.template at<const In>(text), call_.text.strides[1],
                call_.text.strides[2], features_};
    }

    // Packs texts [first, first + count) of the call.
    void pack_texts(Texts<E>& into, int64_t first, int64_t count, int n_threads) const {
        into.first = first;
        parallel_for(count, n_threads, [&](int64_t slot, int) {
            Places& places = into.places[slot];
            places.find(mask_row(call_.text_mask, first + slot), call_.text_mask.strides[1], bags_);
            if (turned_)
                pack_image(text_rows(first + slot), places, kernels_.lanes,
                           quick_pack<In>(kernels_), into.packed.data() + slot * room_);
        });
        if (turned_) return;
        into.bundle(count, kernels_.max_rows);
        parallel_for(std::ssize(into.bundles), n_threads, [&](int64_t k, int) {
            const Bundle& bundle = into.bundles[k];
            pack_bundle(
                into, bundle, kernels_.max_rows,
                [&](int64_t slot) { return text_rows(first + slot); },
                into.packed.data() + bundle.first * room_);
        });
    }

    void run_all_pairs() {
        const int64_t group = std::clamp<int64_t>(kGroupBytes / text_bytes(), 1, texts_);
        Texts<E> packed;
        packed.resize(group, room_);
        for (int64_t first = 0; first < texts_; first += group) {
            const int64_t count = std::min(group, texts_ - first);
            pack_texts(packed, first, count, call_.n_threads);
            const int64_t steps = turned_ ? count : std::ssize(packed.bundles);
            const int64_t cuts = parts(images_, steps);
            parallel_for(images_ * cuts, call_.n_threads, [&](int64_t item, int worker) {
                const int64_t cut = item % cuts;
                const int64_t begin = steps * cut / cuts, end = steps * (cut + 1) / cuts;
                if (turned_)
                    score_turned(packed, begin, end, item / cuts, workers_[worker]);
                else
                    score_image(packed, begin, end, item / cuts, workers_[worker]);
            });
        }
    }

    void run_candidates() {
        const int64_t cuts = parts(texts_, images_);
        parallel_for(texts_ * cuts, call_.n_threads, [&](int64_t item, int worker) {
            Workspace<ImageIn, E, T>& work = workers_[worker];
            const int64_t text = item / cuts, cut = item % cuts;
            work.own.resize(1, room_);
            pack_texts(work.own, text, 1, 1);
            for (int64_t k = images_ * cut / cuts; k < images_ * (cut + 1) / cuts; ++k)
                if (turned_)
                    score_turned(work.own, 0, 1, k, work);
                else
                    score_image(work.own, 0, 1, k, work);
        });
    }

    void find_patches(int64_t i, int64_t j, Places& into) const {
        const View& mask = call_.image_mask;
        into.find(mask_row(mask, i, j), mask.strides[call_.image.rank - 2], patches_);
    }

    Rows<ImageIn> image_rows(int64_t i, int64_t j) const {
        const View& view = call_.image;
        return {view.template at<const ImageIn>(i, j), view.strides[view.rank - 2],
                view.strides[view.rank - 1], features_};
    }

    // What the products of token 0 of an image are multiplied by; null: nothing.
    const float* first_scale(int64_t i, int64_t j) const {
        return call_.image_scales ? call_.image_scales.at<const float>(i, j) : nullptr;
    }

    int64_t scale_stride() const { return call_.image_scales.strides[call_.image.rank - 2]; }

    // Scores texts [begin, end) with image `image` (candidate form: of the one text), which is read
    // where it lies.
    void score_turned(const Texts<E>& texts, int64_t begin, int64_t end, int64_t image,
                      Workspace<ImageIn, E, T>& work) {
        const int64_t i = candidates_ ? texts.first : image, j = candidates_ ? image : 0;
        find_patches(i, j, work.image);
        const int64_t step = candidates_ ? 1 : std::max(1, call_.n_threads);
        const ImageIn* next = image + step >= images_ ? nullptr
                              : candidates_           ? image_rows(i, j + step).features
                                                      : image_rows(i + step, j).features;
        if (work.image.count() > 0) {
            work.turned.set(image_rows(i, j), work.image, next, kernels_);
            if (const float* scales = first_scale(i, j))
                work.turned.set_scales(scales, scale_stride(), work.image);
        }
        work.bag_best.resize(round_up(bags_, kernels_.lanes));
        if (argmax_) work.bag_patch.resize(work.bag_best.size());
        for (int64_t slot = begin; slot < end; ++slot) {
            const Places& bags = texts.places[slot];
            const bool any = bags.count() > 0 && work.image.count() > 0;
            Maxima<T> found{work.bag_best.data(), argmax_ ? work.bag_patch.data() : nullptr,
                            work.turned.patch_best(), nullptr, false};
            if (any)
                found.has_nan = work.turned.score(texts.packed.data() + slot * room_, bags.count(),
                                                  found.bag_best, found.bag_patch);
            if (argmax_) found.patch_bag = work.turned.patch_bag();
            outcome_.write(texts.first + slot, image, bags, work.image, any ? &found : nullptr);
        }
    }

    // Packs image `image` (candidate form: of the one text) and scores bundles [begin, end) with
    // it.
    void score_image(const Texts<E>& texts, int64_t begin, int64_t end, int64_t image,
                     Workspace<ImageIn, E, T>& work) {
        pack_panels(texts.first, image, work);
        work.bag_best.resize(bags_);
        if (argmax_) work.bag_patch.resize(bags_);
        const int64_t row_bytes = depth_ * sizeof(E) + kernels_.lanes * sizeof(T);
        const int64_t text_bytes = panels(work) * kernels_.lanes * sizeof(T);
        while (begin < end) {
            int64_t last = begin, bytes = 0;
            do {
                const Bundle& bundle = texts.bundles[last];
                bytes += bundle.rows * row_bytes + bundle.texts * text_bytes;
            } while (++last < end && bytes < kBlockBytes);
            score_block(texts, begin, last, image, work);
            begin = last;
        }
    }

    // Of each bundle [begin, end): the bundle, its first row and its first text within the block.
    template <class Use>
    void each_bundle(const Texts<E>& texts, int64_t begin, int64_t end, Use&& use) const {
        int64_t row = 0, text = 0;
        for (int64_t k = begin; k < end; ++k) {
            const Bundle& bundle = texts.bundles[k];
            use(bundle, row, text);
            row += bundle.rows;
            text += bundle.texts;
        }
    }

    void score_block(const Texts<E>& texts, int64_t begin, int64_t end, int64_t image,
                     Workspace<ImageIn, E, T>& work) {
        const int64_t lanes = kernels_.lanes, padded = panels(work) * lanes;
        int64_t n_rows = 0, n_texts = 0;
        each_bundle(texts, begin, end, [&](const Bundle& bundle, int64_t row, int64_t text) {
            n_rows = row + bundle.rows;
            n_texts = text + bundle.texts;
        });
        work.row_best.assign(n_rows * lanes, -std::numeric_limits<T>::infinity());
        work.lane_best.resize(n_texts * padded);
        work.has_nan.assign(n_texts, 0);
        if (argmax_) {
            work.row_panel.assign(n_rows * lanes, 0);
            work.lane_row.resize(n_texts * padded);
        }
        for (int64_t panel = 0; panel < panels(work); ++panel)
            each_bundle(texts, begin, end, [&](const Bundle& bundle, int64_t row, int64_t text) {
                score_panel(texts, bundle, row, text, panel, padded, work);
            });
        each_bundle(texts, begin, end, [&](const Bundle& bundle, int64_t row, int64_t text) {
            for (int64_t k = 0; k < bundle.texts; ++k) {
                const int64_t slot = bundle.first + k;
                const int64_t start = row + texts.ends[slot] - texts.places[slot].count();
                finish(texts, slot, start, text + k, image, padded, work);
            }
        });
    }

    int64_t panels(const Workspace<ImageIn, E, T>& work) const {
        return (work.image.count() + kernels_.lanes - 1) / kernels_.lanes;
    }

    void pack_panels(int64_t text, int64_t image, Workspace<ImageIn, E, T>& work) {
        const int64_t i = candidates_ ? text : image, j = candidates_ ? image : 0;
        find_patches(i, j, work.image);
        work.panels.resize(panels(work) * kernels_.lanes * depth_);
        if (const float* first = first_scale(i, j)) {
            work.scales.assign(panels(work) * kernels_.lanes, T(0));
            for (int32_t k = 0; k < work.image.count(); ++k)
                work.scales[k] = first[work.image.index[k] * scale_stride()];
        }
        pack_image(image_rows(i, j), work.image, kernels_.lanes, quick_pack<ImageIn>(kernels_),
                   work.panels.data());
    }

    void score_panel(const Texts<E>& texts, const Bundle& bundle, int64_t row, int64_t text,
                     int64_t panel, int64_t padded, Workspace<ImageIn, E, T>& work) {
        const int64_t lanes = kernels_.lanes, at = text * padded + panel * lanes;
        PanelJob<T, E> job;
        job.panel = work.panels.data() + panel * lanes * depth_;
        job.rows = texts.packed.data() + bundle.first * room_;
        job.depth = depth_;
        job.scales = work.scales.empty() ? nullptr : work.scales.data() + panel * lanes;
        job.valid = static_cast<int32_t>(std::min(lanes, work.image.count() - panel * lanes));
        job.index = static_cast<int32_t>(panel);
        job.n_rows = bundle.rows;
        job.row_best = work.row_best.data() + row * lanes;
        job.row_panel = argmax_ ? work.row_panel.data() + row * lanes : nullptr;
        job.lane_best = work.lane_best.data() + at;
        job.lane_row = argmax_ ? work.lane_row.data() + at : nullptr;
        char* has_nan = work.has_nan.data() + text;
        if (bundle.texts == 1)
            *has_nan |= static_cast<char>(kernels_.panel(job));
        else
            kernels_.shared({job, texts.ends.data() + bundle.first,
                             static_cast<int32_t>(bundle.texts), padded, has_nan});
    }

    // Both scores of text `slot` of the group, whose maxima are those of rows from `row` on and of
    // text `text` of the block.
    void finish(const Texts<E>& texts, int64_t slot, int64_t row, int64_t text, int64_t image,
                int64_t padded, Workspace<ImageIn, E, T>& work) {
        const Places& bags = texts.places[slot];
        const int64_t i = texts.first + slot;
        if (bags.count() == 0 || work.image.count() == 0)
            return outcome_.write(i, image, bags, work.image, nullptr);
        const Maxima<T> found{work.bag_best.data(), argmax_ ? work.bag_patch.data() : nullptr,
                              work.lane_best.data() + text * padded,
                              argmax_ ? work.lane_row.data() + text * padded : nullptr,
                              work.has_nan[text] != 0};
        RowsJob<T> rows;
        rows.row_best = work.row_best.data() + row * kernels_.lanes;
        rows.row_panel = argmax_ ? work.row_panel.data() + row * kernels_.lanes : nullptr;
        rows.n_rows = bags.count();
        rows.best = found.bag_best;
        rows.patch = found.bag_patch;
        kernels_.rows(rows, found.has_nan);
        outcome_.write(i, image, bags, work.image, &found);
    }

    const MaxSimForward& call_;
    const MaxSimKernels<T, E>& kernels_;
    int64_t texts_, bags_, features_, depth_;
    bool candidates_;
    int64_t images_, patches_;
    bool argmax_;
    bool turned_;   // texts are packed for the turned kernel
    int64_t room_;  // of one packed text
    Outcome<T> outcome_;
    std::vector<Workspace<ImageIn, E, T>> workers_;
};

// Images of ImageIn with texts of TextIn. Products with eight-bit numbers run as those of the
// text's own type do; both are exact in it, and the scale comes afterwards.
template <class TextIn, class ImageIn>
void forward(const MaxSimForward& call, const CpuKernels& kernels) {
    if constexpr (std::is_same_v<TextIn, double>)
        return Forward<double, double, double, ImageIn>(call, scalar_f64_kernels()).run();
    if constexpr (std::is_same_v<TextIn, BFloat16>)
        if (kernels.pairs != nullptr)
            return Forward<BFloat16, BFloat16Pair, float, ImageIn>(call, *kernels.pairs).run();
    if constexpr (!std::is_same_v<TextIn, double>)
        Forward<TextIn, float, float, ImageIn>(call, kernels.f32).run();
}

}  // namespace

void maxsim_forward(const MaxSimForward& call) {
    if (call.text.dtype == DType::i8) return maxsim_int8_forward(call);
    const CpuKernels& kernels = kernels_of(call.isa);
    with_float_type(call.text.dtype, [&]<class In>(const In*) {
        if (call.image.dtype == DType::i8) return forward<In, int8_t>(call, kernels);
        if (call.image.dtype == DType::f8) return forward<In, Float8>(call, kernels);
        forward<In, In>(call, kernels);
    });
}

}  // namespace bagformer
