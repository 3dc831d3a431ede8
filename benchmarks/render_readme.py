"""Write the figures of the README and of two pages from the JSON files that hold them.

python benchmarks/render_readme.py [--check]

What stands between the markers ``<!-- figures:begin NAME -->`` and ``<!-- figures:end -->`` is
replaced. With ``--check`` nothing is written, and the exit status is 1 if a page is out of date.
"""

from __future__ import annotations

import re
import sys

import render_cpu
from rendering import RESULTS, ROOT, caption, load, table

PAGES = tuple(ROOT / page for page in ("README.md", "docs/maxsim.md", "docs/benchmarks.md"))
DTYPES, DOCS = ("float32", "bfloat16"), "../"


def tiny() -> str:
    """Recall of the shipped model, from what its training script measured."""
    path = ROOT / "bagformer" / "assets" / "tiny" / "metrics.json"
    metrics = load(path)
    names = {
        "sample": "pairs of words that training never joined",
        "sample_unseen": "words that training never saw",
    }
    rows = [
        [f"{label}: {metrics[kind]['queries']} queries"]
        + [f"{metrics[kind][f'R@{k}']:.1f} %" for k in (1, 5, 10)]
        for kind, label in names.items()
    ]
    return (
        f"The shipped model was trained from nothing in minutes on one core, on the other themes "
        f"of the same icons. Text to picture, among {metrics['sample']['pictures']} pictures "
        f"([metrics.json]({path.relative_to(ROOT)}), which `bagformer demo` measures again):\n\n"
        + table(["", "R@1", "R@5", "R@10"], rows)
    )


def learning() -> str:
    """Recall of four interactions, mean and spread over seeds."""
    file = "learning.json"
    result, rows = load(RESULTS / file), []
    for row in result["summary"]:
        rows.append(
            [row["variant"]]
            + [
                f"{row[key]['mean']:.1f} ± {row[key]['spread']:.1f}"
                for key in ("valid R@1", "valid R@10", "valid_unseen R@1", "valid_unseen R@10")
            ]
        )
    steps = result["settings"]
    return (
        f"Recall in percent among 2,000 pictures, mean and standard deviation of three seeds; the "
        f"same encoders, drawings, objective and budget ({steps['words']['steps']} and "
        f"{steps['pictures']['steps']} steps, a quarter of the shipped model's or fewer, and none "
        f"of its imitation). "
        f"{caption(result, file)}.\n\n"
        + table(["", "pairs R@1", "R@10", "unseen words R@1", "R@10"], rows)
    )


def loss() -> str:
    """Memory and speed of the loss against autograd of einsum."""
    file = "loss_cpu.json"
    result, rows = load(RESULTS / file), []
    for dtype, part in result["results"].items():
        ours, eager = part["ours"], part["eager"]
        peaks = [f"{side['peak_extra_mb']:,.0f} MB" for side in (ours, eager)]
        share = f"{100 * part['share_of_eager_peak']:.1f} %"
        rows.append([dtype, f"{part['times_as_fast']:.1f} x", *peaks, share])
    shape = result["shape"]
    return (
        f"The loss of {shape['batch']} texts and {shape['batch']} pictures and its gradients, "
        f"against autograd through einsum. {caption(result, file)}.\n\n"
        + table(["", "as fast", "extra memory", "einsum's", "share"], rows)
    )


def segmentation() -> str:
    """Cutting texts into bags, ours against the walks of three others."""
    file = "segmentation.json"
    result = load(RESULTS / file)
    names = [name for name in result["build_s"] if name not in result["skipped"]]
    rows = []
    for kind, label in (("full_texts", "25 tokens"), ("short_texts", "a query in 25 tokens")):
        times = [result[kind][name]["us_per_text"] for name in names]
        told = [f"{time:.2f} µs ({time / times[0]:.0f} x)" for time in times[1:]]
        rows.append([f"a text, {label}", f"{times[0]:.2f} µs", *told])
    rows.append(["building", *(f"{result['build_s'][name]:.2f} s" for name in names)])
    rows.append(["opening the saved file", f"{result['reopen_ms']:.1f} ms"] + [""] * len(names[1:]))
    threads = result["threads"]
    return (
        f"Bags of {result['texts']:,} texts over {result['entities']:,} entities. The others walk "
        f"the same ids by their own search, a call a text, without making bags of it; two of them "
        f"match strings, whose characters then stand for ids, and jieba's walk finds every entity "
        f"from each token. Two threads took {threads['texts']:,} texts {threads['speedup']:.2f} "
        f"times as fast as one. {caption(result, file)}.\n\n" + table(["", *names], rows)
    )


def quantized() -> str:
    """Features in eight bits: accuracy, bytes and speed of each form, in docs/maxsim.md."""
    file = "quantized.json"
    result, rows = load(RESULTS / file), []
    forms = [result[kind]["forms"] for kind in ("sample", "random")]
    times = [
        result["times"][name]["forms"] for name in ("one text with many pictures", "all pairs")
    ]
    for name in forms[0]:
        found = [form[name]["text_to_image"] for form in forms]
        kept = [f"{100 * way['top10_overlap']:.1f} %" for way in found]
        lost = [f"{100 * way['error_over_spread']:.1f} %" for way in found]
        recall = f"{forms[0][name]['recall']['R@1']:.2f} %"
        rows.append(
            [name, f"{forms[1][name]['bytes_per_picture']:,}", recall, kept[0], lost[0]]
            + [kept[1], lost[1]]
            + [f"{timed[name]['speed_over_float32']:.2f} x" for timed in times]
        )
    head = ["", "bytes of a picture", "R@1, sample", "top 10 kept", "error", "top 10 kept, random"]
    head += ["error", "one text, 512 pictures", "64 texts, 64 pictures"]
    return f"{table(head, rows)}\n\n{caption(result, file, DOCS)}."


def screen() -> str:
    """What an int8 screen skips and takes, in docs/benchmarks.md."""
    file = "screen.json"
    result, rows = load(RESULTS / file), []
    for name, found in result["sets"].items():
        count, patches, width = found["shape"]["pictures"]
        label = f"{name}: {count:,} x {patches} x {width}, {found['shape']['bags']:g} bags"
        shares, times = found["shares"], found["times"]
        for k in (1, 10, 100):
            rows.append(
                [f"{label}, k={k}", f"{100 * shares[f'images skipped, cheap, k={k}']:.1f} %"]
                + [f"{100 * shares['tiles skipped, rows alone']:.1f} %"]
                + [f"{times['ms'][f'{way}, k={k}']:.2f} ms" for way in ("float32", "screened")]
                + [f"{times[f'screened over {dtype}, k={k}']:.2f} x" for dtype in DTYPES]
            )
    head = ["", "skipped", "tiles", "`maxsim_topk`", "screened", "faster", "than bfloat16"]
    return f"{table(head, rows)}\n\n{caption(result, file, DOCS)}."


def render(text: str) -> str:
    """``text`` with every marked part written anew. Raises KeyError for an unknown name."""
    parts = {
        "tiny": tiny,
        "cpu": render_cpu.scores,
        "operations": render_cpu.operations,
        "packages": render_cpu.packages,
        "quantized": quantized,
        "screen": screen,
        "segmentation": segmentation,
        "learning": learning,
        "loss": loss,
    }
    return re.sub(
        r"(<!-- figures:begin (\w+) -->\n).*?(<!-- figures:end -->)",
        lambda found: f"{found[1]}{parts[found[2]]()}\n{found[3]}",
        text,
        flags=re.S,
    )


def main() -> int:
    stale = []
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(path)
            if "--check" not in sys.argv[1:]:
                path.write_text(new, encoding="utf-8")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
