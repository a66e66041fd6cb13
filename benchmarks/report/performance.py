"""The text of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.detectors.scale_up import ScaleUp
from benchmarks.detectors.strip import Strip
from benchmarks.records import Record
from benchmarks.report.tables import row
from benchmarks.report.tried import TRIED

SERVERS = {"badexpert": "ours", "mosec": "mosec", "litserve": "LitServe", "ray": "Ray Serve"}
SERVED = {"guard": "guard", "naive": "naive guard", "alone": "suspect alone"}
WAYS = {
    "unguarded": "unguarded",
    "unguarded_traced": "unguarded, traced",
    "unguarded_onnx": "unguarded, ONNX Runtime",
    "unguarded_recorded": "unguarded, CUDA graphs",
    "guarded": "guarded, clean traffic",
    "guarded_all_attack": "guarded, attacks only",
    "naive": "naive guard",
}
DETECTORS = {each.name: each.title for each in (ScaleUp, Strip)}
BUDGETS = {"quick": "`auto`, budget `quick`", "standard": "`auto`, budget `standard`", "thorough": "`auto`, budget `thorough`", "paper": "`paper`"}
RUNTIMES = {
    "eager": "step by step",
    "torchscript": "as a traced program",
    "onnxruntime": "as a program with the suspect in ONNX Runtime",
    "cudagraphs": "as CUDA graphs",
}
INTRODUCTION = """# Performance

Written by `python -m benchmarks.report` from `benchmarks/results/engine.json`, which `python -m benchmarks.serving.engine --record` makes; a test checks that
they agree. Side by side in one process, turn by turn: the suspect without a guard, our guard on clean images, our guard where every image reaches the gate
(an attacker who sends nothing else), and the naive guard of three whole networks for every image. Shares are of what the unguarded network does in the
same time, over all rounds (the records of GPUs are older: of the median round, step by step, with three experts, and with a gate at a tenth).
The unguarded network runs as PyTorch runs it, in float32; how it does when it is served in the ways that serve our guard, with norms folded and traced or in
ONNX Runtime, stands beside it. A record names the commit that was measured; what had another score or another gate then is told in [the results](results.md).
The AVX2 machine's storm over HTTP is from before a queue that stays was halved and the event loop went first.

## What was tried

Written down by hand when it was measured, on machines of the time; no records were kept of this table's figures.

{tried}

What limits it. On a CPU the convolutions of suspect and experts: the interpreter has little part in it since a guard is served as a program
([decision 11](decisions/0011-what-serves-is-a-program-of-the-guard.md)). On a GPU with small networks or small batches it was the launches of
kernels: the guard made three times as many as the suspect alone, and until the batch fills the card each takes the same time whatever it computes, so that the
guard was no faster than the naive one there. CUDA graphs are meant to take that away ([decision 18](decisions/0018-on-a-gpu-a-guard-is-recorded.md)), which no
GPU has shown yet. Over HTTP, of 3.0 ms of CPU time a request on two cores with AVX2, at 500 images/s, the event loop takes .9, decoding of small images
included, the networks the rest; that is 1.5 cores, and what is left goes into waiting for one another. On two cores with AVX-512 and bfloat16, of 2.2 ms at
700 images/s, it takes .8. In a storm of 4,500 images/s on two cores of AVX-512 without AMX the event loop has .6 of a core and waits for one the rest of the
time, the networks have 1.04, and the load that is measured with .2: nearly all that there is, so that a process of its own for the front would move work and
not take any away.
"""


def over_http(record: Record) -> list[str]:
    """The section on whole servers."""
    others = [SERVERS[name] for name in SERVERS if name != "badexpert" and any(each["name"] == name for each in record["servers"])]
    lines = [
        *("", f"## Over HTTP, {record['hardware']}", ""),
        f"`python -m benchmarks.serving.http`, at commit {record['commit']}: the example suspect, 32x32 PNGs, an open-loop load with times from when a request",
        "was due. The knee is the highest rate of which 99% are answered, right and within 100 ms; in the storm five times as much is sent, and what is",
        f"answered within a second counts. The load is made on the same cores. The others ({', '.join(others)}) run with one worker, and with one a core.",
        "",
        row("server", "what it serves", "workers", "knee, images/s", "p50 / p99 there, ms", "goodput in the storm, images/s", "of its knee"),
        row(*["---"] * 7),
    ]
    for each in record["servers"]:
        times = f"{each['p50_ms']:.0f} / {each['p99_ms']:.0f}"
        share = "-" if each["storm_share"] is None else f"{each['storm_share']:.2f}"
        name, served = SERVERS[each["name"]], SERVED[each["way"]]
        lines.append(row(name, served, str(each["workers"]), f"{each['knee']:.0f}", times, f"{each['storm_goodput']:.0f}", share))
    idle = next(each["idle_cpu"] for each in record["servers"] if "idle_cpu" in each)
    return [
        *lines,
        "",
        f"Our service carries {record['of_best_naive']:.2f} times what the best of the others carries with the naive guard, and",
        f"{record['of_best_alone']:.2f} times what the best of them carries with the suspect alone: medians of what each round gives. The others run the",
        f"networks as PyTorch does, ours as the program that it serves, so that this compares both at once. Asked nothing, it takes {idle:.1%} of a core.",
        *by_round(record["servers"]),
        "",
    ]


def by_round(servers: Sequence[Record]) -> list[str]:
    """What is to be said of those that were measured more than once."""
    again = [each for each in servers if len(each.get("knees", ())) > 1]
    knees = [f"{SERVERS[each['name']]} ({SERVED[each['way']]}) {', '.join(f'{knee:.0f}' for knee in each['knees'])}" for each in again]
    return [f"Measured in every round, turn by turn, and told by the medians, the others in the first alone: {'; '.join(knees)} images/s."] if knees else []


def against_fastest(record: Record) -> str:
    """How the guard does beside the suspect alone, served in the fastest of the ways that were measured."""
    ways = record["batches"][str(record["best_batch"])]
    alone = {way: ways[way]["images_per_second"] for way in ways if way.startswith("unguarded_")}
    if not alone:
        return ""
    fastest = max(alone, key=alone.__getitem__)
    unknown = record.get("runtime") == "onnxruntime" and "unguarded_onnx" not in alone
    return (
        f" Of the suspect alone as we would serve it ({WAYS[fastest]}) it does {ways['guarded']['images_per_second'] / alone[fastest]:.1%}"
        f"{'; the suspect alone in ONNX Runtime, where the guard runs its own, was not measured then' if unknown else ''}."
    )


def _beside(record: Record) -> list[str]:
    """What the guard does where a share of the traffic is attacked, and what other detectors do."""
    if "detectors" not in record:
        return []
    naive, guard = record["attacked_share"]["naive"], [(name, value) for name, value in record["attacked_share"].items() if name[0].isdigit()]
    shares = ", ".join(f"{float(share):.0%}: {value:.2f}" for share, value in guard)
    others = ", ".join(f"{DETECTORS[name]} {value:.2f}" for name, value in record["detectors"].items() if name in DETECTORS)
    return [
        f"By the share of images that an attacker chose so that they reach the gate, of the unguarded rate at batch {record['best_batch']}: {shares}; naive "
        f"guard {naive:.2f}. Detectors that look at each image many times, at batch {record['detectors_batch']}: {others}.",
        "",
    ]


def over_activations(records: Sequence[Record]) -> list[str]:
    """The section on memory."""
    lines = [
        *("## Memory over activations", ""),
        "`python -m benchmarks.serving.activations`: a server loads, verifies and compiles the example suspect's guard again and again, and judges an image",
        "after each time. Growth is the median slope over the last three quarters.",
        "",
        row("machine", "activations", "resident at first, MiB", "after a quarter", "after half", "at last", "growth, KiB an activation"),
        row(*["---"] * 7),
    ]
    for each in records:
        seen = each["resident_mib"]
        at = [f"{seen[round(share * (len(seen) - 1))]:.0f}" for share in (0, 0.25, 0.5, 1)]
        lines.append(row(each["hardware"], str(each["activations"]), *at, f"{each['growth_kib']:.0f}"))
    return [*lines, ""]


def over_calibrations(records: Sequence[Record]) -> list[str]:
    """The section on what a user waits for; nothing where that was not measured."""
    lines = []
    for each in records:
        seconds = [row(BUDGETS[name], f"{made['seconds']:.0f}", f"{made['of_paper']:.2f}") for name, made in each["calibrate"].items()]
        one = each["predict_batch_1"]
        lines += [
            *(f"## What a user waits for, {each['hardware']}", ""),
            "`python -m benchmarks.waiting`: one `badexpert calibrate` after the other on the example suspect, and then an image at a time over HTTP.",
            *("", row("preset", "seconds", "of `paper`"), row(*["---"] * 3), *seconds, ""),
            f"An image takes {one['http_ms']:.1f} ms over HTTP, of which {one['server_forwards_ms']:.1f} ms are the networks (`paper`).",
            "",
        ]
    return lines


def performance(found: Sequence[Record], http: Sequence[Record] = (), activations: Sequence[Record] = (), waited: Sequence[Record] = ()) -> str:
    """docs/performance.md, from the records of the engine, of whole servers, of their memory, and of calibrations."""
    tried = [row("change", "predicted", "measured, share of the unguarded rate", "verdict"), row(*["---"] * 4), *(row(*each) for each in TRIED)]
    lines = [INTRODUCTION.format(tried="\n".join(tried))]
    for record in sorted(found, key=lambda each: (each["hardware"], each["architecture"], each["size"])):
        size, best = record["size"], record["best_batch"]
        caught = f" It catches {record['tpr']:.1%} of {record['suspect']} at a realised FPR of {record['realised_fpr']:.2%}." if "suspect" in record else ""
        shown = {way: title for way, title in WAYS.items() if way in record["batches"][str(best)]}
        lines += [
            f"## {record['architecture']} at {size}x{size}, {record['hardware']}",
            "",
            f"At commit {record['commit']}. "
            f"At the unguarded network's best batch ({best}) the guard does {record['guarded_of_unguarded']:.1%} of its rate, the naive guard "
            f"{record['naive_of_unguarded']:.1%}; under attacks only, {record['attacked_of_naive']:.2f} times the naive guard's. A single image takes "
            f"{record['batch_1_latency']:.2f} times as long. Weights: {record['weights_of_suspect']:.2f} times the suspect's. "
            f"The guard runs {RUNTIMES[record.get('runtime', 'eager')]}.{against_fastest(record)}{caught}",
            "",
            row("batch", *(f"{title}, images/s" for title in shown.values()), "guarded p50 / p99, ms", "guarded, share", "naive, share"),
            row(*["---"] * (len(shown) + 4)),
        ]
        for batch, ways in record["batches"].items():
            guarded, rates = ways["guarded"], [f"{ways[way]['images_per_second']:.0f}" for way in shown]
            lines.append(
                row(
                    batch,
                    *rates,
                    f"{guarded['p50_ms']:.1f} / {guarded['p99_ms']:.1f}",
                    f"{guarded['of_unguarded']:.2f}",
                    f"{ways['naive']['of_unguarded']:.2f}",
                )
            )
        lines += ["", *_beside(record)]
    for record in http:
        lines[-1:] = over_http(record)
    if activations:
        lines += over_activations(activations)
    lines += over_calibrations(waited)
    return "\n".join(lines)
