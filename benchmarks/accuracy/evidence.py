"""Tables from the committed runs, in Markdown: `python -m benchmarks.accuracy.evidence` prints all with their names.

Pages call `table(name)`. Nothing here needs torch or timm.
"""

import csv
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.accuracy.runs import KEY, cell

RESULTS = Path(__file__).parents[1] / "results"
SETTING = [name for name in KEY if name not in ("seed", "teacher_epochs")]
SCENES = {
    "none": "student alone",
    "kd": "KD per pixel",
    "cwd": "CWD",
    "pkd": "PKD",
    "fitnet_map": "FitNets on maps",
    "rsd": "pooled term alone",
    "rsd_dense": "pooled and dense term",
    "rsd_dense:pooled=0.0": "dense term alone, last stages",
    "rsd_dense:pooled=0.0,teacher_stage=3": "dense term alone",
    "rsd_dense:pooled=0.0,student_stage=3": "dense term alone",
    "cwd_rsd_dense": "CWD and the dense term",
    "cwd_rsd_dense:cwd=9.0,dense=1.0,student_stage=3,teacher_stage=4": "CWD and the dense term",
}
# The student alone, under OFA and under RSD, as far as a public summary of the paper quotes its two tables.
PUBLISHED = {
    ("100", "Swin-T", "ResNet18"): ("74.01", "80.54", "83.92"),
    ("100", "ViT-S", "MobileNetV2"): ("73.68", "78.45", "81.68"),
    ("100", "ConvNeXt-T", "DeiT-T"): ("68.00", "75.76", "82.46"),
    ("100", "ConvNeXt-T", "ResMLP-S12"): ("66.56", "81.22", "84.21"),
    ("1000", "Swin-T", "ResNet18"): ("69.75", "71.85", "72.13"),
    ("1000", "ConvNeXt-T", "Swin-N"): ("75.53", "77.50", "77.70"),
    ("1000", "ConvNeXt-T", "ResMLP-S12"): ("76.65", "77.53", "78.41"),
}
Line = dict[str, str]


def read(name: str, **which: str) -> list[Line]:
    """The students' lines of a file that have these values."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return [x for x in csv.DictReader(file) if which.items() <= x.items() and x.get("method") != "teacher"]


def groups(lines: Iterable[Line], split: str = "test") -> list[list[Line]]:
    """Runs that differ in the seed only, the best setting first."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        found.setdefault(tuple(line[name] for name in SETTING), []).append(line)
    return sorted(found.values(), key=lambda group: -statistics.mean(scores(group, split)))


def scores(group: list[Line], split: str = "test") -> list[float]:
    return [float(line[split]) for line in group]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def both(group: list[Line]) -> str:
    return " / ".join(spread(scores(group, split)) for split in ("validation", "test")) if group else "-"


def markdown(headings: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [headings.split(" | "), ["---"] * (headings.count(" | ") + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def over_none(group: list[Line], lines: list[Line], value: str, of: Callable[[float, float], float]) -> list[float]:
    """Each run against the student alone with the same seed, where there is one."""
    same = {name: group[0][name] for name in ("data", "pair", "epochs", "batch", "views")} if group else {}
    alone = {x["seed"]: float(x[value]) for x in lines if x["method"] == "none" and same.items() <= x.items()}
    return [of(float(line[value]), alone[line["seed"]]) for line in group if line["seed"] in alone]


def methods(pair: str) -> str:
    """Test accuracy of each method and setting."""
    lines, steps, rows = read("distill", pair=pair), read("distill_steps", pair=pair), []
    for group in groups(lines):
        first = group[0]
        gains = over_none(group, lines, "test", lambda a, b: a - b) if first["method"] != "none" else []
        timed = [line for line in steps if all(line[name] == first[name] for name in ("method", "batch"))]
        ratios = over_none(timed, steps, "step_ms", lambda a, b: a / b)
        row = [first["method"], spread(scores(group)), f"{statistics.mean(gains):+.1f}" if gains else ""]
        row += [*(first[name] for name in ("epochs", "weight", "kappa")), str(len(group))]
        row += [f"{int(first['added_parameters']):,}", f"x {statistics.median(ratios):.2f}" if ratios else ""]
        rows.append(row)
    headings = "method | test accuracy, % | gain | epochs | weight | kappa | seeds | parameters added | step time"
    return markdown(headings, rows)


def variants(file: str, **which: str) -> str:
    """Validation and test of each method with its settings, the best on validation first."""
    found = groups(read(file, **which), "validation")
    names = ["weight", "kappa"] if len({group[0]["epochs"] for group in found}) < 2 else ["epochs", "weight", "kappa"]
    rows = []
    for group in found:
        name, *settings = re.split("[:,]", group[0]["method"])
        row = [", ".join([f"`{name}`", *(re.sub("[_=]", " ", setting) for setting in settings)])]  # can be wrapped
        row += [spread(scores(group, split)) for split in ("validation", "test")]
        rows.append([*row, *(group[0][name] for name in names), str(len(group))])
    return markdown(f"method | validation, % | test, % | {' | '.join(names)} | seeds", rows)


def scenes() -> str:
    """Validation / test of each method at the weight that is best on validation with the first seed."""
    best: dict[str, dict[str, list[Line]]] = {}
    for group in groups(line for line in read("segment", labelled="8") if line["method"] in SCENES):
        here, pair = best.setdefault(SCENES[group[0]["method"]], {}), group[0]["pair"]
        here[pair] = max(group, here.get(pair, group), key=lambda runs: float(runs[0]["validation"]))
    rows = []
    for name, found in sorted(best.items(), key=lambda item: -float(item[1]["cnn_vit"][0]["validation"])):
        runs = [found.get(pair, []) for pair in ("cnn_vit", "vit_cnn")]
        rows.append([name, *(both(group) for group in runs), ", ".join(str(len(group)) for group in runs)])
    return markdown("method | ResNet to ViT | ViT to ResNet | seeds", rows)


def widths() -> str:
    """Validation / test of rsd_wide by width, weight and kappa; 0.1 and 0.01 are those of 256 features."""
    rows = []
    for width, weight in ((64, 0.1), (64, 0.4), (256, 0.1), (1024, 0.1), (1024, 0.025), (2048, 0.1), (2048, 0.0125)):
        here = read("width", method=f"rsd_wide:width={width}", weight=cell(weight))
        by_kappa = ([x for x in here if x["kappa"] == cell(kappa)] for kappa in (0.0, 0.01, 2.56 / width))
        rows.append([f"{width}, {weight}", *(both(group) for group in by_kappa)])
    return markdown("features, weight | kappa 0 | kappa 0.01 | kappa 2.56 / D", rows)


def weights() -> str:
    """Test accuracy at the weight that is best on validation, and validation by weight; kappa is 0.01."""
    found: dict[str, list[Line]] = {}
    for line in read("sensitivity", pair="small_cnn_coarse", batch="256"):
        if line["kappa"] in ("", "0.01") and line["warmup"] != "0.3":  # tried with RSD only
            found.setdefault(line["method"], []).append(line)
    best = {name: max(group, key=lambda line: float(line["validation"])) for name, group in found.items()}
    rows = []
    for name in sorted(found, key=lambda name: -float(best[name]["validation"])):
        ordered = sorted(found[name], key=lambda line: float(line["weight"]))
        by_weight = "; ".join(f"{line['weight']}: {float(line['validation']):.1f}" for line in ordered)
        rows.append([name, f"{float(best[name]['test']):.1f}", by_weight])
    return markdown("method | test accuracy at the best, % | validation accuracy, %, by weight", rows)


def parameters(classes: str) -> str:
    """Millions of trainable parameters, and their share of the student's."""
    rows = []
    for line in read("overhead", classes=classes):
        added = (f"{int(line[f'{x}_added']) / 1e6:.2f} ({line[f'{x}_percent']} %)" for x in ("rsd", "ofa"))
        rows.append([f"{line['teacher']} to {line['student']}", *added, f"{int(line['student_parameters']) / 1e6:.2f}"])
    return markdown("pair | RSD adds | OFA adds | student", rows)


def paper(classes: str) -> str:
    """What the papers report, and an estimate of the hours on an H100 at a tenth of its peak."""
    images, rows = 50_000 if classes == "100" else 1_281_167, []
    for line in read("overhead", classes=classes):
        alone, ofa, rsd = PUBLISHED.get((classes, line["teacher"], line["student"]), ("-",) * 3)
        epochs = 100 if classes == "1000" and line["student"] in ("ResNet18", "MobileNetV2") else 300
        operations = epochs * images * (3 * int(line["student_operations"]) + int(line["teacher_operations"]))
        hours = operations / (0.1 * 989e12) / 3600
        rows.append([f"{line['teacher']} to {line['student']}", rsd, ofa, alone, f"{hours:.2g}"])
    return markdown("pair | RSD | OFA | alone | hours on one H100", rows)


TABLES: dict[str, Callable[[], str]] = {"segmentation": scenes, "weights": weights, "widths": widths}
for pair in ("cnn_vit", "cnn_mlp", "vit_cnn", "cnn_cnn"):
    TABLES[f"methods-{pair}"] = lambda pair=pair: methods(pair)
for pair in ("small_cnn_coarse", "small_cnn_vit", "vit_cnn", "cnn_cnn"):
    TABLES[f"dense-{pair}"] = lambda pair=pair: variants("dense", pair=pair)
for pair in ("cnn_vit", "vit_cnn"):
    TABLES[f"segmentation-{pair}-few"] = lambda pair=pair: variants("segment", pair=pair, labelled="8")
    TABLES[f"segmentation-{pair}-all"] = lambda pair=pair: variants("segment", pair=pair, labelled="1")
for classes in ("100", "1000"):
    TABLES[f"parameters-{classes}"] = lambda classes=classes: parameters(classes)
    TABLES[f"paper-{classes}"] = lambda classes=classes: paper(classes)


def table(name: str) -> str:
    """The Markdown of one of TABLES."""
    return TABLES[name]()


if __name__ == "__main__":
    for name in TABLES:
        print(f"\n{name}\n\n{table(name)}")
