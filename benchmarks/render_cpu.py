"""The tables that come from cpu.json: of the README, and of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from rendering import RESULTS, caption, load, table

FILE = "cpu.json"
RIVALS = {
    "seed_loops": "the original's loops",
    "einsum": "einsum + amax",
    "compiled_einsum": "that, compiled",
    "per_image_matmul": "a matmul an image",
    "one_matmul": "one matmul",
}
PACKAGES = ("late_interaction_kernels", "maxsim_cpu", "numkong")


def _against(found: dict[str, Any], name: str) -> str:
    ratio = found.get(name, {}).get("over_ours")
    return "" if ratio is None else f"{ratio:.1f} x"


def _share(found: dict[str, Any], name: str) -> str:
    return "" if found.get(name) is None else f"{found[name]:.2f}"


def _label(row: dict[str, Any]) -> str:
    width = "" if "D=" in row["name"] else f", D={row['width']}"
    return f"{row['name']}{width}, {row['dtype']}"


def scores() -> str:
    """Every case of ``maxsim``: ours, and how many times as long the others take."""
    result, rows = load(RESULTS / FILE), []
    for row in (row for row in result["rows"] if row["op"] == "maxsim"):
        found = row["contenders"]
        ours = found["ours"]
        peaks = [found.get(name, {}).get("peak_extra_mb") for name in ("ours", "einsum")]
        rows.append(
            [_label(row), f"{ours['ms']:.1f} ms", _share(ours, "of_matmul")]
            + [_share(ours, "of_peak"), *(_against(found, name) for name in RIVALS)]
            + ["" if peak is None else f"{peak:.0f}" for peak in peaks]
        )
    head = ["texts x images", "`maxsim`", "of torch's matmul", "of the peak", *RIVALS.values()]
    return (
        f"Texts of 25 bags, pictures of 257 patches, both directions; a step is scores and "
        f"gradients. Medians, in turn within one run; rivals' columns are their time over ours. "
        f'"Of torch\'s matmul" is the rate of useful operations over that of a 2,048 x 2,048 x '
        f'2,048 product in the same run and dtype; "of the peak" over that of the '
        f"processor's multiply-adds from registers. {caption(result, FILE)}.\n\n"
        + table([*head, "extra MB", "einsum's"], rows)
        + "\n\n"
        + _goals(result["rows"])
    )


def _ceiling(row: dict[str, Any], goal: dict[str, Any]) -> str:
    """What a kernel at the processor's own rate would have reached of a missed ratio."""
    share = row["contenders"]["ours"].get("of_peak")
    if "least" not in goal or share is None:
        return ""
    most = goal["reached"] / share
    return f" (at {share:.2f} of the processor's peak; at the peak it would be {most:.2f})"


def _goals(rows: list[dict[str, Any]]) -> str:
    """The goals that were missed, or that none was."""
    judged = [(row, goal) for row in rows for goal in row["goals"] if goal["met"] is not None]
    missed = [
        f"{row['name']}, {row['dtype']}, {RIVALS.get(goal['against'], goal['against'])}: "
        f"{goal['reached']:.2f}, {'at most' if 'most' in goal else 'at least'} "
        f"{goal.get('most', goal.get('least')):.2f} was set{_ceiling(row, goal)}"
        for row, goal in judged
        if not goal["met"]
    ]
    words = "; ".join(missed) if missed else "none"
    return f"Of {len(judged)} goals set beforehand, missed: {words}."


def operations() -> str:
    """The other operations: ours, its share of the rate of copying, and the others' times."""
    result, rows = load(RESULTS / FILE), []
    for row in (row for row in result["rows"] if row["op"] != "maxsim"):
        found = dict(row["contenders"])
        ours = found.pop("ours")
        others = [f"{name} {_against(found, name)}" for name in found if _against(found, name)]
        rows.append(
            [
                f"{row['name']}, {row['dtype']}",
                f"{ours['ms']:.2f} ms",
                _share(ours, "of_copy"),
                ", ".join(others),
            ]
        )
    head = ["", "ours", "of the copy rate", "others, their time over ours"]
    return f"{table(head, rows)}\n\n{caption(result, FILE, '../')}."


def packages() -> str:
    """What became of every package on every case of ``maxsim``. Who ran in another process, at
    another time, is compared by rates, each over torch's product in its own process."""
    rows = []
    for row in (row for row in load(RESULTS / FILE)["rows"] if row["op"] == "maxsim"):
        told = []
        for name in PACKAGES:
            found = row["contenders"].get(name, {})
            if "ms" in found:
                ours = row["contenders"]["ours"]
                ratio = found.get("over_ours") or ours["of_matmul"] / found["of_matmul"]
                told.append(f"{ratio:.2f} x, error {found['error']:.1g}")
            else:
                told.append(found.get("skipped", ""))
        rows.append([_label(row), *told])
    return table(["", *(name.replace("_", "-") for name in PACKAGES)], rows)
