#include "cpu/maxsim.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/maxsim_int8.h"
#include "cpu/maxsim_pack.h"
#include "cpu/parallel.h"

namespace bagformer {

namespace {

// Packed texts of one pass over the images; and packed texts with their running maxima of one sweep
// over an image's panels, which stay in a second-level cache of 1 MB beside the image.
constexpr int64_t kGroupBytes = int64_t{32} << 20;
constexpr int64_t kBlockBytes = int64_t{384} << 10;
constexpr int64_t kItemsPerThread = 4;

const uint8_t* mask_row(const View& mask, int64_t i, int64_t j = 0) {
    return mask ? mask.at<const uint8_t>(i, mask.rank == 3 ? j : 0) : nullptr;
}

template <class E>
struct Texts {
    int64_t first = 0;
    std::vector<Places> places;
    std::vector<E> packed;  // [texts][N * depth], the tail of each unused where bags are masked
};

// What one thread needs for one image and one block of texts.
template <class T, class E>
struct Workspace {
    Places image;
    std::vector<E> panels;
    std::vector<T> scales;  // of the packed patches, up to whole panels; empty: none
    std::vector<T> row_best, lane_best, bag_best;
    std::vector<int32_t> row_panel, lane_row, bag_patch;
    std::vector<char> has_nan;
    Texts<E> own;  // the candidate form packs its text here
};

// In: the texts' type, E: what is packed, T: the scores' type, ImageIn: the images' type.
template <class In, class E, class T, class ImageIn = In>
class Forward {
  public:
    Forward(const MaxSimForward& call, const MaxSimKernels<T, E>& kernels, PackPanel quick)
        : call_(call),
          kernels_(kernels),
          quick_(quick),
          texts_(call.text.shape[0]),
          bags_(call.text.shape[1]),
          features_(call.text.shape[2]),
          depth_(Packed<E>::depth(features_)),
          candidates_(call.image.rank == 4),
          images_(call.image.shape[call.image.rank - 3]),
          patches_(call.image.shape[call.image.rank - 2]),
          argmax_(call.text_argmax || call.image_argmax) {}

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
        return std::max<int64_t>(1, bags_ * depth_ * static_cast<int64_t>(sizeof(E)));
    }

    // How many parts a loop of `outer` items with `inner` steps each is cut into, so that every
    // thread has work.
    int64_t parts(int64_t outer, int64_t inner) const {
        if (call_.n_threads <= 1) return 1;
        const int64_t wanted = kItemsPerThread * call_.n_threads;
        return std::clamp<int64_t>((wanted + outer - 1) / outer, 1, inner);
    }

    void pack_one(Texts<E>& into, int64_t slot, int64_t text) {
        Places& places = into.places[slot];
        places.find(mask_row(call_.text_mask, text), call_.text_mask.strides[1], bags_);
        const Rows<In> rows{call_.text.template at<const In>(text), call_.text.strides[1],
                            call_.text.strides[2], features_};
        pack_text(rows, places, kernels_.max_rows, into.packed.data() + slot * bags_ * depth_);
    }

    void run_all_pairs() {
        const int64_t group = std::clamp<int64_t>(kGroupBytes / text_bytes(), 1, texts_);
        Texts<E> packed;
        packed.places.resize(group);
        packed.packed.resize(group * bags_ * depth_);
        for (int64_t first = 0; first < texts_; first += group) {
            const int64_t count = std::min(group, texts_ - first);
            packed.first = first;
            parallel_for(count, call_.n_threads,
                         [&](int64_t slot, int) { pack_one(packed, slot, first + slot); });
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
            Workspace<T, E>& work = workers_[worker];
            const int64_t text = item / cuts, cut = item % cuts;
            work.own.first = text;
            work.own.places.resize(1);
            work.own.packed.resize(bags_ * depth_);
            pack_one(work.own, 0, text);
            for (int64_t k = images_ * cut / cuts; k < images_ * (cut + 1) / cuts; ++k)
                score_image(work.own, 0, 1, k, work);
        });
    }

    // Packs image `image` (candidate form: of the one text) and scores texts [begin, end) with it.
    void score_image(const Texts<E>& texts, int64_t begin, int64_t end, int64_t image,
                     Workspace<T, E>& work) {
        pack_panels(texts.first, image, work);
        const int64_t lanes = kernels_.lanes, padded = panels(work) * lanes;
        const int64_t state = (bags_ * lanes + padded) * static_cast<int64_t>(sizeof(T));
        const int64_t block =
            std::clamp<int64_t>(kBlockBytes / (text_bytes() + state), 1, end - begin);
        work.row_best.resize(block * bags_ * lanes);
        work.lane_best.resize(block * padded);
        work.has_nan.resize(block);
        work.bag_best.resize(bags_);
        if (argmax_) {
            work.row_panel.resize(block * bags_ * lanes);
            work.lane_row.resize(block * padded);
            work.bag_patch.resize(bags_);
        }
        for (int64_t first = begin; first < end; first += block) {
            const int64_t count = std::min(block, end - first);
            std::fill(work.row_best.begin(), work.row_best.end(),
                      -std::numeric_limits<T>::infinity());
            std::fill(work.row_panel.begin(), work.row_panel.end(), 0);
            std::fill(work.has_nan.begin(), work.has_nan.end(), char{0});
            for (int64_t panel = 0; panel < panels(work); ++panel)
                for (int64_t slot = 0; slot < count; ++slot)
                    score_panel(texts, first + slot, slot, panel, padded, work);
            for (int64_t slot = 0; slot < count; ++slot)
                finish(texts, first + slot, slot, image, padded, work);
        }
    }

    int64_t panels(const Workspace<T, E>& work) const {
        return (work.image.count() + kernels_.lanes - 1) / kernels_.lanes;
    }

    void pack_panels(int64_t text, int64_t image, Workspace<T, E>& work) {
        const View& view = call_.image;
        const int64_t i = candidates_ ? text : image, j = candidates_ ? image : 0;
        work.image.find(mask_row(call_.image_mask, i, j), call_.image_mask.strides[view.rank - 2],
                        patches_);
        work.panels.resize(panels(work) * kernels_.lanes * depth_);
        const Rows<ImageIn> rows{view.template at<const ImageIn>(i, j), view.strides[view.rank - 2],
                                 view.strides[view.rank - 1], features_};
        const View& scales = call_.image_scales;
        if (scales) {
            work.scales.assign(panels(work) * kernels_.lanes, T(0));
            const float* first = scales.at<const float>(i, candidates_ ? j : 0);
            for (int32_t k = 0; k < work.image.count(); ++k)
                work.scales[k] = first[work.image.index[k] * scales.strides[scales.rank - 1]];
        }
        pack_image(rows, work.image, kernels_.lanes, quick_, work.panels.data());
    }

    void score_panel(const Texts<E>& texts, int64_t text, int64_t slot, int64_t panel,
                     int64_t padded, Workspace<T, E>& work) {
        const int64_t lanes = kernels_.lanes, state = slot * bags_ * lanes;
        PanelJob<T, E> job;
        job.panel = work.panels.data() + panel * lanes * depth_;
        job.rows = texts.packed.data() + text * bags_ * depth_;
        job.depth = depth_;
        job.scales = work.scales.empty() ? nullptr : work.scales.data() + panel * lanes;
        job.valid = static_cast<int32_t>(std::min(lanes, work.image.count() - panel * lanes));
        job.index = static_cast<int32_t>(panel);
        job.n_rows = texts.places[text].count();
        job.row_best = work.row_best.data() + state;
        job.row_panel = argmax_ ? work.row_panel.data() + state : nullptr;
        job.lane_best = work.lane_best.data() + slot * padded + panel * lanes;
        job.lane_row = argmax_ ? work.lane_row.data() + slot * padded + panel * lanes : nullptr;
        if (kernels_.panel(job)) work.has_nan[slot] = 1;
    }

    // Both scores of one pair from its maxima.
    void finish(const Texts<E>& texts, int64_t slot_in_group, int64_t slot, int64_t image,
                int64_t padded, Workspace<T, E>& work) {
        const Places& text = texts.places[slot_in_group];
        const int64_t i = texts.first + slot_in_group;
        const int64_t turned_i = candidates_ ? i : image, turned_j = candidates_ ? image : i;
        if (text.count() == 0 || work.image.count() == 0) {
            if (call_.t2i) *call_.t2i.template at<T>(i, image) = T(0);
            if (call_.i2t) *call_.i2t.template at<T>(turned_i, turned_j) = T(0);
            store_argmax(call_.text_argmax, i, image, text, nullptr);
            store_argmax(call_.image_argmax, turned_i, turned_j, work.image, nullptr);
            return;
        }
        const int64_t state = slot * bags_ * kernels_.lanes;
        const bool has_nan = work.has_nan[slot] != 0;
        RowsJob<T> rows;
        rows.row_best = work.row_best.data() + state;
        rows.row_panel = argmax_ ? work.row_panel.data() + state : nullptr;
        rows.n_rows = text.count();
        rows.best = work.bag_best.data();
        rows.patch = argmax_ ? work.bag_patch.data() : nullptr;
        kernels_.rows(rows, has_nan);
        if (call_.t2i || call_.text_argmax) {
            settle(rows.best, rows.patch, text, work.image);
            store_argmax(call_.text_argmax, i, image, text, rows.patch);
            if (call_.t2i) *call_.t2i.template at<T>(i, image) = score(rows.best, text, has_nan);
        }
        if (call_.i2t || call_.image_argmax) {
            T* best = work.lane_best.data() + slot * padded;
            int32_t* bag = argmax_ ? work.lane_row.data() + slot * padded : nullptr;
            settle(best, bag, work.image, text);
            store_argmax(call_.image_argmax, turned_i, turned_j, work.image, bag);
            if (call_.i2t)
                *call_.i2t.template at<T>(turned_i, turned_j) = score(best, work.image, has_nan);
        }
    }

    // Winners as the caller counts tokens; in zero mode masked tokens of the other side compete.
    void settle(T* best, int32_t* winner, const Places& own, const Places& other) const {
        const int32_t masked = call_.zero_mode ? other.first_masked : -1;
        for (int32_t k = 0; k < own.count(); ++k) {
            if (winner != nullptr) winner[k] = other.index[winner[k]];
            if (masked < 0) continue;
            if (winner != nullptr && (best[k] < T(0) || (best[k] == T(0) && masked < winner[k])))
                winner[k] = masked;
            if (best[k] < T(0)) best[k] = T(0);
        }
    }

    T score(const T* best, const Places& own, bool has_nan) const {
        if (has_nan) return std::numeric_limits<T>::quiet_NaN();
        const T total = ordered_sum(best, own.count());
        return call_.mean ? total / static_cast<T>(own.count()) : total;
    }

    const MaxSimForward& call_;
    const MaxSimKernels<T, E>& kernels_;
    PackPanel quick_;
    int64_t texts_, bags_, features_, depth_;
    bool candidates_;
    int64_t images_, patches_;
    bool argmax_;
    std::vector<Workspace<T, E>> workers_;
};

// Images of eight-bit numbers. Their products with the text run as those of the text's own type do;
// both are exact in it, and the scale comes afterwards.
template <class ImageIn>
void forward_quantized(const MaxSimForward& call, const CpuKernels& kernels,
                       PackPanel MaxSimKernels<float>::* quick,
                       PackPanel MaxSimKernels<float, BFloat16Pair>::* quick_pairs) {
    const MaxSimKernels<float>& f32 = kernels.f32;
    switch (call.text.dtype) {
        case DType::f64:
            return Forward<double, double, double, ImageIn>(call, scalar_f64_kernels(), nullptr)
                .run();
        case DType::f16:
            return Forward<Half, float, float, ImageIn>(call, f32, f32.*quick).run();
        case DType::bf16:
            if (kernels.pairs != nullptr)
                return Forward<BFloat16, BFloat16Pair, float, ImageIn>(call, *kernels.pairs,
                                                                       kernels.pairs->*quick_pairs)
                    .run();
            return Forward<BFloat16, float, float, ImageIn>(call, f32, f32.*quick).run();
        default:
            return Forward<float, float, float, ImageIn>(call, f32, f32.*quick).run();
    }
}

}  // namespace

void maxsim_forward(const MaxSimForward& call) {
    if (call.text.dtype == DType::i8) return maxsim_int8_forward(call);
    using Singles = MaxSimKernels<float>;
    using Pairs = MaxSimKernels<float, BFloat16Pair>;
    const CpuKernels& kernels = kernels_of(active_isa());
    const MaxSimKernels<float>& f32 = kernels.f32;
    if (call.image.dtype == DType::i8)
        return forward_quantized<int8_t>(call, kernels, &Singles::pack_i8, &Pairs::pack_i8);
    if (call.image.dtype == DType::f8)
        return forward_quantized<Float8>(call, kernels, &Singles::pack_f8, &Pairs::pack_f8);
    switch (call.text.dtype) {
        case DType::f64:
            return Forward<double, double, double>(call, scalar_f64_kernels(), nullptr).run();
        case DType::f16:
            return Forward<Half, float, float>(call, f32, f32.pack_f16).run();
        case DType::bf16:
            if (kernels.pairs != nullptr)
                return Forward<BFloat16, BFloat16Pair, float>(call, *kernels.pairs,
                                                              kernels.pairs->pack_bf16)
                    .run();
            return Forward<BFloat16, float, float>(call, f32, f32.pack_bf16).run();
        default:
            return Forward<float, float, float>(call, f32, f32.pack_f32).run();
    }
}

}  // namespace bagformer
