"""The figures that docs/{evidence,reproducing,speed}.md write out are those of the committed results."""

import csv
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def results(name):
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


METHODS = {
    "student alone": "none",
    "**RSD**": "rsd",
    "**RSD + dense**": "rsd_dense",
    "RSD + stages": "rsd_stages",
    "KD + RSD": "kd_rsd",
    "DIST + RSD": "dist_rsd",
    "RSD, kappa 0": "rsd_kappa0",
    "RSD, linear projector": "rsd_noproj",
    "RSD on logits": "rsd_logits",
    "OFA with RSD": "ofa_rsd",
    **{name: name.lower() for name in ("KD", "DKD", "DIST", "FitNets", "OFA", "SDD")},
    "FitNets": "fitnet",
}


def cell(lines):
    """Mean, standard deviation, and how many seeds if they are not three; KD and RSD also ran at a second weight."""
    second = {("kd", "0.9"), ("rsd", "0.2")}
    values = [float(line["test"]) for line in lines if (line["method"], line["weight"]) not in second]
    text = f"{statistics.mean(values):.1f}" if values else ""
    text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return text + (f" ({len(values)})" if len(values) in (1, 2) else "")


def test_table_of_methods():
    lines = [line for line in results("distill") if line["epochs"] == "15"]
    shown = {line["method"] for line in lines} & set(METHODS.values())
    assert shown == set(METHODS.values())
    for title, method in METHODS.items():
        own = [line for line in lines if line["method"] == method]
        cells = [cell([x for x in own if x["pair"] == pair]) for pair in ("cnn_vit", "cnn_mlp", "vit_cnn", "cnn_cnn")]
        assert f"\n| {' | '.join([title, *cells])} |\n" in page("evidence")


def test_table_of_weights():
    setting = {"pair": "small_cnn_coarse", "batch": "256"}
    for title in ("RSD", "DIST", "DKD", "KD", "student alone", "FitNets"):
        lines = [x for x in results("sensitivity") if setting.items() <= x.items() and x["kappa"] in ("", "0.01")]
        lines = [x for x in lines if x["method"] == METHODS.get(title, "rsd")]
        warmup = min(line["warmup"] for line in lines)  # of RSD, runs with a warm-up are there, too
        lines = sorted((x for x in lines if x["warmup"] == warmup), key=lambda x: float(x["weight"]))
        best = max(lines, key=lambda line: float(line["validation"]))
        cells = [f"{float(best[split]):.1f}" for split in ("test", "validation")]
        weights = [best["weight"], f"{lines[0]['weight']} to {lines[-1]['weight']}"] if len(lines) > 1 else ["", ""]
        assert f"\n| {' | '.join([title, *cells, *weights])} |\n" in page("evidence")


def test_hours_of_the_papers_pairs():
    """Three forward passes of the student and one of the teacher, at a tenth of an H100's 989 TFLOPS."""
    hours = {"100": [], "1000": []}
    for line in results("overhead"):
        short = line["student"] in ("ResNet18", "MobileNetV2")
        images = 300 * 50_000 if line["classes"] == "100" else (100 if short else 300) * 1_281_167
        operations = images * (3 * int(line["student_operations"]) + int(line["teacher_operations"]))
        text = f"{operations / 0.1 / 989e12 / 3600:.2g}"
        hours[line["classes"]].append(text)
        name = f"{line['teacher'].lower()}_{line['student'].lower()}".replace("mixer-b/16", "mixer-b16")
        part = page("reproducing").split("| *ImageNet* |")[line["classes"] == "1000"]
        for found in re.findall(rf"^\| `{name}` .* ([\d.]+) \|$", part, re.MULTILINE):
            assert found == text, name
    for classes in hours.values():
        assert f"{min(classes, key=float)} to {max(classes, key=float)}" in page("reproducing")


def test_ranges_of_speed():
    """Of time against the fastest other implementation and of memory against the same, eager and compiled."""
    wide, tall = page("speed").split("- **More ")[1:3]
    lines = [line for line in results("throughput_cpu") if line["mode"] == "value_and_grad" and line["median_ms"]]
    for compiled in ("False", "True"):
        for part, is_tall in ((wide, False), (tall, True)):
            speed, memory = [], []
            for fused in (x for x in lines if x["contestant"] == "fused" and x["compiled"] == compiled):
                same = [x for x in lines if all(x[k] == fused[k] for k in ("rows", "features", "compiled"))]
                best = min((x for x in same if x is not fused), key=lambda x: float(x["median_ms"]))
                if is_tall == (int(fused["features"]) <= int(fused["rows"])):
                    speed.append(float(best["median_ms"]) / float(fused["median_ms"]))
                    memory.append(100 * int(fused["peak_bytes"]) / int(best["peak_bytes"]))
            for x in (min(speed), max(speed)):
                assert re.search(rf"\b{round(x, 2 if x < 10 else None):g}\b", part), (x, part)
            if is_tall or compiled == "False":  # the page leaves out the memory of wide inputs compiled
                assert f"{min(memory):.0f} to {max(memory):.0f} %" in part


TEACHERS = {
    "ImageNet network as it is, 1,280 features": "raw1280",
    "adapted to the task, 256 features": "adapted256",
    "adapted to the task, 1,280 features": "adapted1280",
    "ResNet trained on the task, 256 features": "resnet",
}


def test_table_of_the_weight_on_the_mean():
    lines = [x for x in results("redundancy") if x["method"] == "rsd" and x["batch"] == "128" and x["kappa"] == "0"]
    for title, teacher in TEACHERS.items():
        own = [x for x in lines if x["teacher"] == teacher]
        cells = [cell([x for x in own if x["weight"] == weight]) for weight in ("1", "3", "10", "25", "100", "400")]
        assert f"\n| {' | '.join([title, *cells])} |\n" in page("settings")


def test_change_at_each_share_of_the_redundancy():
    """Against kappa = 0 with the same teacher and seed, over all teachers."""
    known = {x["teacher"]: float(x["redundancy"]) for x in results("redundancy_teachers") if x["batch"] == "128"}
    lines = [x for x in results("redundancy") if (x["method"], x["batch"], x["weight"]) == ("rsd", "128", "25")]
    none = {(x["teacher"], x["seed"]): float(x["test"]) for x in lines if x["kappa"] == "0"}
    changes = {}
    for line in lines:
        share = round(float(line["kappa"]) * known[line["teacher"]], 2)
        changes.setdefault(share, []).append(float(line["test"]) - none[line["teacher"], line["seed"]])
    for share in (0.1, 0.3, 1.0):
        values = changes[share]
        text = f"by {statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f} points ({len(values)} runs)"
        assert re.search(rf"at .*\b{share:g} .*{re.escape(text)}", " ".join(page("settings").split()))


def test_table_of_a_pretrained_teacher():
    lines = [x for x in results("redundancy") if x["batch"] == "128" and x["kappa"] in ("", "0")]
    others = {"KD": ("kd", "9"), "DIST": ("dist", "1"), "FitNets": ("fitnet", "100")}
    ours = {"RSD": ("rsd", "25"), "RSD on positions": ("rsd_positions", "10"), "both": ("rsd_both", "10")}
    for title, which in {**others, **ours}.items():
        own = [x for x in lines if (x["method"], x["weight"]) == which]
        cells = [cell([x for x in own if x["teacher"] == teacher]) for teacher in ("raw1280", "adapted256")]
        assert f"\n| {' | '.join([title, *cells])} |\n" in page("evidence")
    alone = cell([x for x in lines if x["method"] == "none"])
    assert f"\n| student alone | {alone} | {alone} |\n" in page("evidence")
