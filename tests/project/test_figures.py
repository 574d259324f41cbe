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
    """Mean, standard deviation, and how many seeds if they are not three; KD and RSD also ran at a second weight.

    A seed that ran in both precisions counts once.
    """
    second = {("kd", "0.9"), ("rsd", "0.2")}
    seeds = {}
    for line in lines:
        if (line["method"], line["weight"]) not in second:
            seeds.setdefault(line["seed"], []).append(float(line["test"]))
    values = [statistics.mean(tests) for tests in seeds.values()]
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
    "ResNet trained on the task, 512 features": "resnet_wide",
    "ViT trained on the task, 192 features": "vit",
}


def redundancy(**which):
    """Lines of a batch of 128 and ten epochs, but for what is asked for."""
    which = {"batch": "128", "epochs": "10"} | which
    return [line for line in results("redundancy") if which.items() <= line.items()]


def test_tables_of_the_weight_on_the_mean():
    for epochs, shown in (("10", "1 3 10 25 100 400"), ("30", "1 25 100")):
        lines = redundancy(pair="vit_coarse", method="rsd", kappa="0", epochs=epochs)
        for title, teacher in TEACHERS.items():
            own = [x for x in lines if x["teacher"] == teacher]
            cells = [cell([x for x in own if x["weight"] == weight]) for weight in shown.split()]
            assert not own or f"\n| {' | '.join([title, *cells])} |\n" in page("settings")
        alone = redundancy(pair="vit_coarse", method="none", epochs=epochs)
        assert f"alone {cell(alone)}" in " ".join(page("settings").split())


def changes(**which):
    """Kappa R to the teachers and changes of accuracy against kappa = 0 with the same teacher, seed and precision."""
    known = {(x["teacher"], x["precision"], x["batch"]): x["redundancy"] for x in results("redundancy_teachers")}
    lines = redundancy(**{"pair": "vit_coarse", "method": "rsd", "weight": "25"} | which)
    none = {(x["teacher"], x["seed"], x["precision"]): float(x["test"]) for x in lines if x["kappa"] == "0"}
    found = {}
    for x in lines:
        share = float(x["kappa"]) * float(known[x["teacher"], x["precision"], x["batch"]])
        change = float(x["test"]) - none[x["teacher"], x["seed"], x["precision"]]
        found.setdefault(round(share, 2), []).append((x["teacher"], change))
    return found


def test_table_of_kappa():
    columns = []
    for share, runs in sorted(changes().items())[1:]:
        values = [change for _, change in runs]
        text = f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f}"
        columns.append([f"{share:g}", text, str(len(values))])
    for title, cells in zip(("kappa R", "change, points", "runs"), zip(*columns, strict=True), strict=True):
        assert f"\n| {' | '.join([title, *cells])} |\n" in page("settings")


def test_other_batches_epochs_and_students():
    text = " ".join(page("settings").split())
    costs = [
        -statistics.mean(change for _, change in changes(teacher="raw1280", batch=batch)[0.3])
        for batch in ("64", "128", "256")
    ]
    assert "a kappa R of 0.3 costs {:.1f}, {:.1f} and {:.1f} points".format(*costs) in text
    for told, which in (
        ("After 30 epochs, 0.1 changed it by {:+.1f} points and 0.3 by {:+.1f} ({} runs", {"epochs": "30"}),
        ("with an MLP student, by {:+.1f} and {:+.1f} ({} runs", {"pair": "resmlp_coarse"}),
    ):
        tenth, third = ([change for _, change in changes(**which)[share]] for share in (0.1, 0.3))
        assert told.format(statistics.mean(tenth), statistics.mean(third), len(tenth)) in text
        assert len(third) == len(tenth)
    small = [redundancy(pair="resmlp_coarse", teacher="raw1280", method="rsd", weight=weight, kappa="0")
             for weight in ("10", "25", "100")]  # fmt: skip
    alone = cell(redundancy(pair="resmlp_coarse", method="none"))
    assert "had {}, {} and {} at 10, 25 and 100 (alone {})".format(*map(cell, small), alone) in text


def test_table_of_teachers():
    """Some ran in two precisions; the page shows one."""
    names = ("redundancy", "eigenvalue", "accuracy")
    lines = [x for x in results("redundancy_teachers") if x["batch"] == "128" and x["eigenvalue"]]
    known = {f"{int(x['features']):,} | {' | '.join(f'{float(x[name]):.1f}' for name in names)}" for x in lines}
    shown = re.findall(r"\| ([\d,]+(?: \| [\d.]+){3}) \|$", page("evidence"), re.MULTILINE)
    assert len(shown) == len({x["teacher"] for x in lines})
    assert {*shown} <= known


def test_what_the_harm_follows():
    ratios = {}
    for x in results("redundancy_teachers"):
        if x["batch"] == "128" and x["eigenvalue"]:
            ratios[x["teacher"]] = float(x["eigenvalue"]) / float(x["redundancy"])
    by_redundancy, by_eigenvalue, harm = [], [], []
    for share, runs in changes().items():
        for teacher in {teacher for teacher, _ in runs} & ratios.keys() if share >= 0.3 else ():
            by_redundancy.append(share)
            by_eigenvalue.append(share * ratios[teacher])
            harm.append(statistics.mean(change for name, change in runs if name == teacher))
    missed = []
    for x in (by_redundancy, by_eigenvalue):
        slope, intercept = statistics.linear_regression(x, harm)
        squares = [(intercept + slope * at - change) ** 2 for at, change in zip(x, harm, strict=True)]
        missed.append(f"{statistics.mean(squares) ** 0.5:.1f} points")
    text = " ".join(page("evidence").split())
    assert f"by {missed[0]} (rms) over kappa R, and by {missed[1]} over kappa times the eigenvalue" in text
    assert f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f} times R" in text


def test_table_of_a_pretrained_teacher():
    names = {"KD": "kd", "DIST": "dist", "FitNets": "fitnet"}
    names |= {"RSD": "rsd", "RSD on positions": "rsd_positions", "both": "rsd_both"}
    rows = re.findall(r"^\| (\w[\w ]*), ([\d.]+) \| (.*) \|$", page("evidence"), re.MULTILINE)
    weights = {"KD": "9 1", "DIST": "1", "FitNets": "100 10", **dict.fromkeys(list(names)[3:], "10 25")}
    assert [row[:2] for row in rows] == [(name, weight) for name in names for weight in weights[name].split()]
    for name, weight, cells in rows:
        lines = [x for x in redundancy(method=names[name], weight=weight) if x["kappa"] in ("", "0")]
        columns = (("vit_coarse", "raw1280"), ("vit_coarse", "adapted256"), ("resmlp_coarse", "raw1280"))
        own = [cell([x for x in lines if (x["pair"], x["teacher"]) == column]) for column in columns]
        assert cells == " | ".join(own), (name, weight)
    vit, mlp = (cell(redundancy(method="none", pair=pair)) for pair in ("vit_coarse", "resmlp_coarse"))
    assert f"\n| student alone | {vit} | {vit} | {mlp} |\n" in page("evidence")
