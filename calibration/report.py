"""The calibration report as one self-contained page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from calibration.canary import TRIGGERS
from calibration.finetune import Curve
from calibration.search import MARGIN
from models.guard import Judgement
from models.preprocessing import Preprocessing
from models.threshold import COUNTED, Threshold

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } .promise { font-size: 1.15rem; border-left: .3rem solid #0b6e4f; padding-left: 1rem; }
.warning { border-left: .3rem solid #b3541e; padding-left: 1rem; } figure { margin: 1rem 0; } figcaption { color: #55606e; }
svg { max-width: 100%; height: auto; } code { background: #eef1f4; padding: 0 .25em; } .quiet { color: #55606e; }
"""
_BLUE, _ORANGE, _GREEN = "#1f5fa8", "#c8641b", "#0b6e4f"


def render(report: dict[str, Any], judged: Judgement, labels: Tensor, threshold: Threshold, expert_curves: Sequence[Curve], auxiliary_curve: Curve) -> str:
    """The page. judged: the validation images' judgements; labels: their true classes, int64 [n]."""
    low, high = threshold.interval
    accuracy = report["clean_accuracy"]
    best = report["preprocessing"][0]
    rows = {
        "Guard": report["guard"],
        "Made": report["created"],
        "Made from": ", ".join(f"{name.replace('_', ' ')} {digest or '(a folder)'}" for name, digest in report["files"].items()) + " (SHA-256)",
        "Checkpoint": " ".join(report["checkpoint_notes"]) or "nothing to note",
        "Architecture": f"{report['architecture']}, {len(report['classes'])} classes",
        "Preset, seed": f"{report['preset']}, {report['seed']}",
        "Images": ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report["images"].items()),
        "Preprocessing found": f"{Preprocessing.from_json(best['preprocessing'])} (suspect {best['accuracy']:.1%} right)",
        "Clean accuracy, suspect": f"{accuracy['suspect']:.1%}, behind the guard {accuracy['guarded']:.1%}",
        "Clean accuracy, backdoor expert": ", ".join(f"{value:.1%}" for value in accuracy["experts"]),
        "Clean accuracy, auxiliary": f"{accuracy['auxiliary']:.1%}",
        "Threshold": f"{threshold.value:.4f}, of the score",
        "Signs of a backdoor": _signs(report),
        "Seconds": ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["stage_seconds"].items()),
        "Made on": ", ".join(f"{key} {value}" for key, value in report["environment"].items()),
    }
    warnings = "".join(f'<p class="warning"><b>{html.escape(warning["code"])}</b>: {html.escape(warning["detail"])}</p>' for warning in report["warnings"])
    table = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>" for key, value in rows.items())
    figures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for svg, caption in (
            (_histogram(judged, labels, threshold), "Scores of the validation images. What lies left of the line is rejected."),
            (_scatter(judged, labels, threshold), "Each validation image by the confidence of the backdoor expert and of the auxiliary model in the "
             "suspect's prediction. A triggered image would lie at the lower right: the expert still agrees, the auxiliary no longer does."),
            (_curves(expert_curves, auxiliary_curve), "Training: accuracy on held-back clean images where the preset looks at it, and loss."),
        )
    )  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Calibration of {html.escape(report['guard'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Calibration of {html.escape(report['guard'])}</h1>"
        f'<p class="promise">Of clean images like those it was calibrated on, a guard with {threshold.n} validation images and a target of '
        f"<b>{threshold.target_fpr:.2%}</b> rejects {threshold.expected:.2%} on average. This one rejects between <b>{low:.2%}</b> and <b>{high:.2%}</b> of "
        f"the next {COUNTED:,} with 90% probability.</p>"
        f"{warnings}<h2>What was calibrated</h2><table>{table}</table>{_canaries(report)}<h2>What it looks like</h2>{figures}"
        f'<p class="quiet">The promise is about clean images. How many triggered images are caught depends on the attack, and no clean set can tell.</p>'
        "</body></html>\n"
    )


def _signs(report: dict[str, Any]) -> str:
    """What in the suspect's file or in its answers to the clean set speaks for a backdoor; seldom anything does."""
    speaking = [warning["code"] for warning in report["warnings"] if warning["code"] in ("contamination", "names-code")]
    return f"see {', '.join(speaking)} above" if speaking else "none in its file or its answers to clean images, which does not prove that there is none"


def _canaries(report: dict[str, Any]) -> str:
    """What the guard's canaries tell of its power; nothing where none were planted."""
    if not report["canaries"]:
        return ""
    rows = "".join(
        f"<tr><td>{each['kind']}: {TRIGGERS[each['kind']]}</td><td>{_percent(each['asr'], each['images'])}</td>"
        f"<td>{_percent(each['power'], each['fooled']) if each['took'] else html.escape('does not count: ' + each['why_not'])}</td></tr>"
        for each in report["canaries"]
    )
    of_copy = report["canary_copy"]
    return (
        "<h2>What it would catch</h2><p>Backdoors that this calibration planted in a copy of the suspect, and what a guard of that copy rejects of the images "
        "that fool it, at the target rate. An attacker's own backdoor may be easier or harder to catch than these of a minute's training, of which a warp "
        "is caught seldom: they compare, they do not promise.</p>"
        f"<table><tr><th>planted trigger</th><th>fools the copy</th><th>is rejected</th></tr>{rows}</table>"
        f'<p class="quiet">Counted are images that the copy does not take for the target without a trigger, too: held-back ones, and for what is rejected '
        f"validation images. Of held-back images the copy gets {of_copy['accuracy']:.1%} right, the suspect {of_copy['suspect_accuracy']:.1%}.</p>"
        f"{_search(report)}"
    )


def _search(report: dict[str, Any]) -> str:
    """Each setting that was tried with what it caught of each kind of canary, and which was chosen."""
    chosen = report["chosen"]
    if not report["search"]:
        default = f"experts that stop at {chosen['expert_stop']:.0%} right, an auxiliary of a learning rate of {chosen['auxiliary_lr']:g} or less"
        return f"<p>Nothing of this could choose between settings. The guard has the default: {default}.</p>"
    kinds = list(report["search"][0]["caught"])
    rows = ""
    for tried in report["search"]:
        mark = "chosen" if all(tried[name] == value for name, value in chosen.items()) else ""
        cells = (f"{tried['expert_stop']:.0%} right", f"{tried['auxiliary_lr']:g}", *(_percent(tried["caught"][kind]) for kind in kinds), mark)
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return (
        "<h2>How its settings were chosen</h2><p>Each was tried on that copy: what a guard with it rejects of the held-back stamped images that fool the copy. "
        f"Chosen is the one whose worst-caught kind is caught most often; another than the default, where that is {MARGIN:.0%} more.</p>"
        "<table><tr><th>experts stop at</th><th>auxiliary's hottest learning rate</th>"
        f"{''.join(f'<th>{kind}</th>' for kind in kinds)}<th></th></tr>{rows}</table>"
    )


def _percent(share: float | None, of: int | None = None) -> str:
    """Of how many images, where that is to be told; those of a share that nobody can tell are too few."""
    said = "-" if share is None else f"{share:.1%}"
    return said if of is None else f"{said} of {of}" if share is not None else f"{said} (of {of})"


def _histogram(judged: Judgement, labels: Tensor, threshold: Threshold) -> str:
    scores = judged.score.clamp(threshold.value - 10, threshold.value + 15).numpy()
    right = (judged.prediction == labels).numpy()
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.hist([scores[right], scores[~right]], bins=60, stacked=True, color=[_BLUE, _ORANGE], label=["suspect right", "suspect wrong"])
    axes.axvline(threshold.value, color="black", linewidth=1.2, label="threshold")
    axes.set(xlabel="score", ylabel="images", yscale="symlog")
    axes.legend(frameon=False)
    return _svg(figure)


def _scatter(judged: Judgement, labels: Tensor, threshold: Threshold) -> str:
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    rejected = threshold.rejects(judged.score)
    for rows, color, name in ((~rejected, _BLUE, "accepted"), (rejected, _ORANGE, "rejected")):
        axes.scatter(judged.expert[rows], judged.auxiliary[rows], s=9, color=color, alpha=0.6, linewidths=0, label=name)
    axes.set(xlabel="confidence of the backdoor expert, x", ylabel="confidence of the auxiliary, y", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(frameon=False, loc="center right")
    return _svg(figure)


def _curves(expert_curves: Sequence[Curve], auxiliary_curve: Curve) -> str:
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, title, unit, curves in zip(
        figure.subplots(1, 2), ("backdoor expert", "auxiliary model"), ("step", "epoch"), (expert_curves, [auxiliary_curve]), strict=True
    ):
        for index, curve in enumerate(curves):
            first = index == 0
            if curve.accuracy:
                axes.plot(curve.steps, curve.accuracy, color=_BLUE, alpha=0.8, label="clean accuracy" if first else None)
            axes.plot(curve.steps, curve.loss, color=_ORANGE, alpha=0.8, label="loss" if first else None)
        axes.set(title=title, xlabel=unit, ylim=(0, None))
        axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element; fixed ids, so that the same figures give the same page."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "badexpert", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
