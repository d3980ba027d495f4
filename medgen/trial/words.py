"""What came out, as a sentence, a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medgen.report.numbers import p_equals
from medgen.trial.analysis import ALPHA
from medgen.trial.arms import BASELINE, DUPLICATES

_MARGIN = 0.01  # a gain that would matter: one point
_COLORS = {"real": "#666666", "synthetic": "#b3541e"}


def points(value: float) -> str:
    """A difference in points of 100.

    Args:
        value: Share.

    Returns:
        With its sign and one decimal.
    """
    return f"{100 * value:+.1f}"


def verdict(result: dict[str, Any]) -> str:
    """One sentence: whether the synthetic scans help.

    Args:
        result: As ``utility.json`` holds it.

    Returns:
        The sentence.
    """
    arms, metric = result["arms"], result["metric"]
    tried = {name: arm for name, arm in arms.items() if "minus_duplicates" in arm}
    if not tried:
        return f"Without synthetic scans: {metric} {arms[BASELINE]['mean']:.3f} with classical augmentation."
    best = max(tried, key=lambda name: tried[name]["minus_baseline"]["mean"])
    gain, over = tried[best]["minus_baseline"], tried[best]["minus_duplicates"]
    p = gain["p_adjusted"]
    ends = f", 95 % interval {points(gain['interval'][0])} to {points(gain['interval'][1])}" if gain["interval"] else ""
    told = (
        f"{points(gain['mean'])} points of {metric} over classical augmentation alone ({tried[best]['words']}{ends}, "
        f"{p_equals(p)} after Holm)"
    )
    if gain["mean"] > 0 and p < ALPHA:
        if not (over["mean"] > 0 and over["p_adjusted"] < ALPHA):
            return (
                f"It is not sure to help more than copies of the real scans do: {told}, {points(over['mean'])} over "
                f"copies ({p_equals(over['p_adjusted'])})."
            )
        return f"It helps: {told}."
    if gain["interval"] is None:
        return f"It cannot be told with {result['test_patients']} test patient: {told}."
    gains = [arm["minus_baseline"] for arm in tried.values()]
    if all(gain["mean"] < 0 and gain["p_adjusted"] < ALPHA for gain in gains):
        return f"It hurts: the best arm with synthetic scans is {told}."
    if max(gain["interval"][1] for gain in gains) > _MARGIN:
        return f"No help is shown, and none ruled out: at best {told}."
    return f"It does not help: at best {told}."


def to_markdown(result: dict[str, Any]) -> str:
    """The table of arms and the low-data curve.

    Args:
        result: As ``utility.json`` holds it.

    Returns:
        Markdown.
    """
    metric = result["metric"]
    lines = [
        f"# Utility of {result['synthetic'] or 'no synthetic scans'} beside {result['real']}",
        "",
        f"**{result['verdict']}**",
        "",
        f"{result['train_scans']} real training scans of {result['train_patients']} patients, "
        f"{result['synthetic_scans']} synthetic scans, {result['test_scans']} real test scans of "
        f"{result['test_patients']} patients; {len(result['seeds'])} seeds, {result['recipe']['steps']} steps each.",
        "",
        f"| learned from | scans | {metric} | SD of seeds | points over classical | 95 % interval | p (Holm) | over "
        "copies | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in result["arms"].values():
        cells = [arm["words"], str(arm["scans"]), f"{arm['mean']:.4f}", f"±{arm['std']:.4f}"]
        gain = arm.get("minus_baseline")
        if gain is None:
            cells += [""] * 5
        else:
            ends, over = gain["interval"], arm.get("minus_duplicates")
            cells += [
                points(gain["mean"]),
                f"{points(ends[0])} to {points(ends[1])}" if ends else "",
                f"{gain['p_adjusted']:.4f}" if over else "",
                points(over["mean"]) if over else "",
                f"{over['p_adjusted']:.4f}" if over else "",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    if result["curve"]:
        lines += [
            "",
            f"| real patients | scans | {metric} with classical augmentation | SD of seeds |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {point['patients']} | {point['scans']:g} | {point['mean']:.4f} | ±{point['std']:.4f} |"
            for point in result["curve"]
        ]
    lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def draw_curve(result: dict[str, Any], path: Path) -> None:
    """Draw the low-data curve of real scans, and the arms with all of them.

    Args:
        result: As ``utility.json`` holds it.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    base = result["arms"][BASELINE]
    curve = [*result["curve"], {"patients": result["train_patients"], "mean": base["mean"], "std": base["std"]}]
    xs = [point["patients"] for point in curve]
    axes.errorbar(
        xs,
        [point["mean"] for point in curve],
        [point["std"] for point in curve],
        marker="o",
        color=_COLORS["real"],
        capsize=3,
        label="real scans, classical augmentation",
    )
    others = [(name, arm) for name, arm in result["arms"].items() if name != BASELINE]
    marks = iter("sD^v<>P*Xh")
    for place, (name, arm) in enumerate(others, start=1):
        synthetic = name not in ("real", DUPLICATES)
        axes.errorbar(
            [xs[-1] * (1 + 0.06 * place)],
            [arm["mean"]],
            [arm["std"]],
            marker=next(marks, "o"),
            linestyle="none",
            capsize=3,
            color=_COLORS["synthetic" if synthetic else "real"],
            fillstyle="full" if synthetic else "none",
            label=arm["words"],
        )
    axes.set_xscale("log")
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.set_xlabel("real training patients (beside the last point: ways to learn from all)")
    axes.set_ylabel(f"{result['metric']} on {result['test_scans']} test scans (bars: SD of seeds)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(path)
