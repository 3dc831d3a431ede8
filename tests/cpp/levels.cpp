// Runs every level of BAGFORMER_CPU_ISA that this processor has on made inputs and compares with
// the oracle. No Python, no torch: it runs under emulation. tests/test_neon.py builds it.
//
//     levels            all checks; prints a line for each level, exits 1 where one has failed
//     levels best       the name of the best level
//     levels threads N  all checks with N threads, and those of threads.h
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "backward.h"
#include "calls.h"
#include "cpu/dispatch.h"
#include "pool.h"
#include "threads.h"

namespace check {

namespace {

int failures = 0;

void fail(const std::string& level, const std::string& what) {
    if (++failures <= 20) std::printf("FAILED %s: %s\n", level.c_str(), what.c_str());
}

void fail(const std::string& level, const Case& of, const std::string& what) {
    fail(level, of.name() + ": " + what);
}

bool same(double a, double b) { return a == b || (a != a && b != b); }

// Rounding of sums over D, of the maxima's sum and, in bfloat16 products, of pairs to odd.
double room(const Case& of, double slack) {
    if (of.exact && !of.mean) return 0;
    const double unit = of.text == DType::f64 ? 0x1p-52 : 0x1p-23;
    return unit * (static_cast<double>(of.depth) + 40) * slack;
}

void compare_side(const std::string& level, const Case& of, const Side& side, double got,
                  Tensor* winners, int64_t first, const Scores& scores, bool turned) {
    const char* name = turned ? "image_to_text" : "text_to_image";
    const double allowed = of.exact && !of.mean ? 0 : room(of, side.slack) + 1e-6 * std::fabs(got);
    if (!same(got, side.score) && !(std::fabs(got - side.score) <= allowed))
        fail(level, of,
             std::string(name) + " is " + std::to_string(got) + ", expected " +
                 std::to_string(side.score));
    if (winners == nullptr) return;
    for (size_t token = 0; token < side.winner.size(); ++token) {
        const int64_t winner = winners->winner(first + static_cast<int64_t>(token));
        if (winner == side.winner[token]) continue;
        bool fine = false;
        const int64_t other =
            static_cast<int64_t>(turned ? scores.similar.size() : scores.similar[0].size());
        if (!of.exact && winner >= 0 && winner < other && side.winner[token] >= 0) {
            const double taken =
                turned ? scores.similar[winner][token] : scores.similar[token][winner];
            fine = std::fabs(taken - side.best[token]) <= room(of, side.token_slack[token]);
        }
        if (!fine)
            fail(level, of,
                 std::string(name) + ": token " + std::to_string(token) + " chose " +
                     std::to_string(winner) + ", expected " + std::to_string(side.winner[token]));
    }
}

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (bagformer::Isa level : bagformer::isa_levels())
        if (level <= bagformer::best_isa()) names.push_back(bagformer::isa_name(level));
    return names;
}

void use(const std::string& level) { setenv("BAGFORMER_CPU_ISA", level.c_str(), 1); }

// What the case gives on every level, against the oracle; and int8 with int8 to the bit.
void run(const Case& of) {
    const Input input(of);
    std::vector<Scores> oracle;
    for (int64_t i = 0; i < of.texts; ++i)
        for (int64_t j = 0; j < of.images; ++j) oracle.push_back(scores_of(input.pair(i, j)));
    std::unique_ptr<Answer> scalar;
    for (const std::string& level : levels()) {
        use(level);
        auto answer = std::make_unique<Answer>(input);
        for (int64_t i = 0; i < of.texts; ++i)
            for (int64_t j = 0; j < of.images; ++j) {
                const Scores& expected = oracle[i * of.images + j];
                const int64_t pair = i * of.images + j, turned = Answer::turned(of, i, j);
                compare_side(level, of, expected.text, answer->t2i->score(pair),
                             answer->text_argmax.get(), pair * of.bags, expected, false);
                compare_side(level, of, expected.image, answer->i2t->score(turned),
                             answer->image_argmax.get(), turned * of.patches, expected, true);
            }
        if (threads > 1 && !same_bits(*answer, Answer(input, 1)))
            fail(level, of, "threads change bits");
        if (!scalar) {
            scalar = std::move(answer);
        } else if (of.text == DType::i8 && of.poison == Poison::none) {
            if (!same_bits(scalar->t2i, answer->t2i) || !same_bits(scalar->i2t, answer->i2t))
                fail(level, of, "other bits than scalar");
        }
    }
}

// A pair alone, which is turned, has the bits that it has among others, where it is packed.
void run_alone(Case of) {
    of.exact = of.candidates = false;
    const Input whole(of);
    Case one = of;
    one.texts = one.images = 1;
    for (const std::string& level : levels()) {
        use(level);
        const Answer together(whole);
        for (int64_t i = 0; i < of.texts; ++i)
            for (int64_t j = 0; j < of.images; j += 2) {
                Input alone(one);
                for (int64_t k = 0; k < of.bags * of.depth; ++k)
                    alone.text->set(k, whole.text->values[i * of.bags * of.depth + k]);
                for (int64_t k = 0; k < of.patches * of.depth; ++k)
                    alone.image->set(k, whole.image->values[j * of.patches * of.depth + k]);
                if (whole.text_scales)
                    for (int64_t k = 0; k < of.bags; ++k)
                        alone.text_scales->set(k, whole.text_scales->values[i * of.bags + k]);
                if (whole.image_scales)
                    for (int64_t k = 0; k < of.patches; ++k)
                        alone.image_scales->set(k, whole.image_scales->values[j * of.patches + k]);
                const Answer single(alone);
                if (single.t2i->score(0) != together.t2i->score(i * of.images + j) ||
                    single.i2t->score(0) != together.i2t->score(j * of.texts + i))
                    fail(level, of, "a pair alone has other bits");
            }
    }
}

// The scores' bits, to be compared between processors whose levels multiply and add alike.
uint64_t digest(const std::string& level, DType text, DType image) {
    use(level);
    uint64_t hash = 1469598103934665603u;
    for (uint64_t seed = 1; seed <= 6; ++seed) {
        Case of{seed % 2 ? 1 : 5, 9, 3, 21, 33};
        of.text = text;
        of.image = image;
        of.exact = false;
        of.seed = seed;
        const Input input(of);
        const Answer answer(input);
        for (const Held* held : {&answer.t2i, &answer.i2t})
            for (char byte : (*held)->bytes)
                hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211u;
    }
    return hash;
}

struct Kind {
    DType text, image;
};
constexpr Kind kKinds[] = {
    {DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
    {DType::i8, DType::i8},   {DType::f32, DType::i8},    {DType::bf16, DType::i8},
    {DType::f32, DType::f8},  {DType::bf16, DType::f8},   {DType::f64, DType::f64}};

// Every height of a tile and one past, every place where a vector or a panel ends.
std::vector<Case> cases() {
    constexpr int64_t kBags[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 21, 25, 27};
    constexpr int64_t kPatches[] = {1, 3, 4, 5, 8, 9, 16, 17, 33};
    constexpr int64_t kDepths[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 31, 32, 33, 36, 67};
    constexpr int64_t kTexts[] = {1, 3, 11};
    std::vector<Case> made;
    uint64_t turn = 0;
    for (int64_t bags : kBags)
        for (int64_t patches : kPatches)
            for (int64_t texts : kTexts) {
                Random random(++turn);
                Case of{texts, bags, 1 + random.below(3), patches, kDepths[random.below(18)]};
                const Kind kind = kKinds[turn % 9];
                of.text = kind.text;
                of.image = kind.image;
                of.seed = turn;
                of.masks = static_cast<Masks>(random.below(3));
                of.candidates = random.below(3) == 0;
                of.zero = random.below(2) == 0;
                of.mean = random.below(4) == 0;
                of.argmax = random.below(2) == 0;
                of.exact = random.below(4) > 0;
                of.strided = random.below(6) == 0;
                of.shifted = turn % 5 < 2;
                if (of.exact && random.below(4) == 0)
                    of.poison = static_cast<Poison>(1 + random.below(2));
                made.push_back(of);
            }
    return made;
}

// Returns the number of cases.
int check_threads(const std::string& level) {
    const auto fail_case = [&](const Case& of, const std::string& what) { fail(level, of, what); };
    int count = 0;
    for (DType dtype : {DType::f32, DType::bf16, DType::i8}) {
        check_groups(dtype, fail_case);
        ++count;
    }
    for (const Kind& kind : kKinds)
        for (bool candidates : {false, true}) {
            Case of{5, 9, 4, 21, 36};
            of.text = kind.text;
            of.image = kind.image;
            of.masks = Masks::random;
            of.argmax = candidates;
            of.candidates = candidates;
            of.exact = false;
            check_callers(of, fail_case);
            ++count;
        }
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
        check_wide_pool(dtype, [&](const std::string& what) { fail(level, what); });
        ++count;
    }
    return count;
}

int check_all() {
    int count = 0;
    for (const Case& of : cases()) {
        run(of);
        ++count;
    }
    for (const Kind& kind : kKinds)
        for (int64_t bags : {3, 10, 13}) {
            Case of{7, bags, 3, 19, 37};
            of.text = kind.text;
            of.image = kind.image;
            of.seed = static_cast<uint64_t>(bags);
            run_alone(of);
            of.depth = 40;
            run_alone(of);
            count += 2;
        }
    for (const std::string& level : levels()) {
        use(level);
        count +=
            check_backward([&](const Case& of, const std::string& what) { fail(level, of, what); });
        count += check_pools([&](const std::string& what) { fail(level, what); });
        if (threads > 1) count += check_threads(level);
    }
    for (const std::string& level : levels()) {
        std::printf("level %s", level.c_str());
        for (const Kind& kind : kKinds)
            std::printf(" %016llx",
                        static_cast<unsigned long long>(digest(level, kind.text, kind.image)));
        std::printf("\n");
    }
    std::printf("%d cases, %d failures\n", count, failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace

}  // namespace check

int main(int argc, char** argv) {
    if (argc > 1 && std::string(argv[1]) == "best") {
        std::puts(bagformer::isa_name(bagformer::best_isa()));
        return 0;
    }
    if (argc > 2 && std::string(argv[1]) == "threads") check::threads = std::atoi(argv[2]);
    try {
        bagformer::active_isa();  // BAGFORMER_CPU_ISA may name what there is not
    } catch (const std::invalid_argument& error) {
        std::puts(error.what());
        return 2;
    }
    return check::check_all();
}
