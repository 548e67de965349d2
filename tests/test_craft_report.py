"""craft-report: one page of runs in a real browser, its exit codes, and one clear line for wrong input."""
import csv
import json
import math
import re
import shutil
import sys

import pytest

from craft_nb import cli
from craft_nb.evaluate import rate
from craft_nb.report import Report

chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def step_row(i, k, plain):
    x = .5 + .4 * math.sin(i * (k + 1))
    own = dict(retention_loss=.05 * x, retention_losses={"action_logits": .05 * x}, epsilon=.05, cosine=x - .7,
               share=.3, projected=i % 4 == 0, retention=True)
    return dict(step=i, task_loss=2 / i**.5 + x / 9, retention_loss=None, epsilon=None, cosine=None, projected=False,
                grad_norm=1 + x, clipped=i % 2 == 0, lr=1e-7 * i,
                seconds=.1 + x, cache_type="hidden", retention=False, skipped="loss" if i == 7 else None,
                nonfinite=0) | {"lambda": None if plain else x} | ({} if plain else own)


def make_run(folder, k=0, plain=False, held_out=.04, policy="pi0_fast", steps=30):
    (last := folder / "checkpoints/last/pretrained_model").mkdir(parents=True)
    craft = None if plain else dict(method="craft", controller="share", lambda_max=10.,
                                    anchor_cache_dir=str(folder / "cache"))
    rows = [dict(event="start", step=0, steps=steps, craft=craft),
            *(step_row(i, k, plain) for i in range(1, steps + 1))]
    if not plain:
        rows.append(dict(event="certificate", step=steps, held_out=held_out, half_width=.001, budget=.05,
                         met=held_out <= .05, unit="nats per action token", of="shared",
                         views={}, anchors=64, episodes=8, seconds=1.))
    ((folder / "metrics.jsonl")
     .write_text("".join(json.dumps(r) + "\n" for r in [*rows, dict(event="end", step=steps, reason="done")])))
    ((last / "train_config.json")
     .write_text(json.dumps(dict(policy=dict(type=policy, pretrained_path=str(folder.parent / "teacher")), seed=k))))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Two runs and what was measured of them and of their teacher."
    d = tmp_path_factory.mktemp("report")
    make_run(d / "kept <b>", 0), make_run(d / "plain", 1, plain=True)
    made = dict(teacher=(d / "teacher", 19, 1), kept=(d / "kept <b>/checkpoints/last/pretrained_model", 18, 15),
                plain=(d / "plain/checkpoints/last/pretrained_model", 2, 16))
    for n, (policy, old, new) in made.items():
        ((d / f"{n}.json")
         .write_text(json.dumps(dict(policy=str(policy), success=dict(drawer=rate(old, 20), window=rate(new, 20))))))
    return d


def evals(d): return [d / f"{n}.json" for n in ("teacher", "kept", "plain")]


def steps_of(folder):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "event" not in r]


def as_written(x):
    return "" if x is None else {True: "true", False: "false"}.get(x, x) if isinstance(x, (bool, str)) else float(x)


def test_the_page_in_a_browser(place, tmp_path):
    assert chromium, "no Chromium: apt-get install chromium"
    from playwright.sync_api import sync_playwright
    r = Report([place / "kept <b>", place / "plain"], evals=evals(place))
    assert r.gate("kept>=.9,budget")
    file, asked, said = r.write(tmp_path / "r.html"), [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu",
                                                                    "--disable-background-networking"], timeout=180_000)
        try:
            context = browser.new_context(color_scheme="dark", viewport=dict(width=400, height=800), offline=True,
                                          accept_downloads=True)
            page = context.new_page()
            page.set_default_timeout(180_000)
            page.on("request", lambda q: asked.append(q.url))
            page.on("console", lambda m: said.append(m.text))
            page.on("pageerror", lambda e: said.append(str(e)))
            page.goto(file.as_uri())
            page.wait_for_selector("#chart-task_loss path")
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.emulate_media(color_scheme="light")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
            assert page.locator("h1").inner_text() == "kept <b>, plain" and page.locator(".verdict li").count() == 3

            # hover reads all runs at a step
            svg = page.locator("#chart-task_loss svg")
            svg.scroll_into_view_if_needed()
            box = svg.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
            tip = page.locator("#chart-task_loss .tip").inner_text()
            at = int(re.search(r"step (\d+)", tip)[1])
            shown = {n: float(x) for n, x in re.findall(r"(kept <b>|plain) ([\d.]+)", tip)}
            assert {n: pytest.approx(steps_of(place / n)[at - 1]["task_loss"], rel=1e-3)
                    for n in ("kept <b>", "plain")} == shown

            # a drag zooms all charts, a double click shows the whole again
            def axis(i="cosine"): return page.locator(f"#chart-{i} text.x").all_text_contents()
            whole = axis()
            page.mouse.move(box["x"] + .4 * box["width"], box["y"] + 80)
            page.mouse.down()
            page.mouse.move(box["x"] + .7 * box["width"], box["y"] + 90, steps=3)
            page.mouse.up()
            assert axis() != whole and int(axis()[-1]) < 30 and page.locator("#whole").is_enabled()
            svg.dblclick()
            assert axis() == whole

            # downloads hold what the log holds, to the last digit
            def load(selector, words):
                with page.expect_download() as d: page.locator(selector, has_text=words).first.click()
                return d.value.suggested_filename, d.value.path()
            for i, n in enumerate(("kept <b>", "plain")):
                name, path = load("#bar button.all", n)
                found, log = list(csv.DictReader(path.open())), steps_of(place / n)
                want = [{k: v for k, v in r.items() if k != "retention_losses"} | {
                    f"retention_losses.{k}": v for k, v in (r.get("retention_losses") or {}).items()} for r in log]
                assert name.endswith(".csv") and len(found) == len(want)
                for got, row in zip(found, want):
                    assert all((float(got[k]) if isinstance(as_written(v), float) else got[k]) == as_written(v)
                               for k, v in row.items() if k in got)
                    assert all(v is None for k, v in row.items() if k not in got)
            name, path = load("#chart-over_budget button", "CSV")
            found = list(csv.DictReader(path.open()))
            assert (name == "over_budget.csv" and [float(x["value"]) for x in found]
                    == [r["retention_loss"] / r["epsilon"] for r in steps_of(place / "kept <b>")])
            name, path = load("#chart-task_loss button", "SVG")
            assert (path.read_text().startswith("<svg") and "var(--" not in path.read_text()
                    and "kept &#60;b&#62;" in path.read_text())
            name, path = load("#chart-task_loss button", "PNG")
            assert name == "task_loss.png" and path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 3000

            # a notebook shows it in a frame of its own
            (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8>{r._repr_html_()}")
            page.goto((tmp_path / "notebook.html").as_uri())
            page.frame_locator("iframe").locator("#chart-task_loss path").first.wait_for()
        finally: browser.close()
    assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == [] and said == []


def run_report(*argv):
    "→ exit code, or what was said where it was refused."
    with pytest.raises(SystemExit) as stop: cli.report([str(a) for a in argv])
    return stop.value.code


@pytest.fixture(autouse=True)
def as_command(monkeypatch): monkeypatch.setattr(sys, "argv", ["craft-report"])


def test_a_gate_is_an_exit_code(place, tmp_path, capsys):
    out, runs = f"--out={tmp_path}/r.html", (place / "kept <b>", place / "plain")
    seen = [f"--eval={e}" for e in evals(place)]
    assert run_report(*runs, *seen, out, "--gate=kept>=.9,budget") == 0
    assert run_report(*runs, *seen, out, "--gate=kept>=.99,budget") == 2
    assert "FAIL  kept <b>: kept>=0.99, found 0.947" in capsys.readouterr().out
    assert (run_report(*runs, *seen, out, "--new=drawer", "--gate=kept>=2")
            == 0), "the share kept of window, which is then the old task"
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["tasks"] == dict(old=["window"], new=["drawer"])
            and found["gate"]["kept <b>: kept>=2"] == dict(value=15., passed=True))
    for gate, says in (("kpt>=.9", "there is no 'kpt'; there are budget, finished, kept"), ("kept", "kept is a number"),
                       ("budget<1", "budget is met or not")):
        assert says in run_report(*runs, out, f"--gate={gate}")
    for gate in "kept>=.1", "drift<=9", "action_error<1", "memory<1e12", "new>0", "mcq>0":
        assert f"not measured, so neither passed nor failed: {gate[:3]}" in run_report(*runs, out, f"--gate={gate}")


def test_a_budget_that_is_not_met_or_not_judged(place, tmp_path):
    missed, out = make_run(tmp_path / "missed", held_out=.06), f"--out={tmp_path}/r.html"
    assert (run_report(missed, out, "--gate=budget") == 2
            and run_report(place / "kept <b>", missed, out, "--gate=budget") == 2)
    assert "not measured" in run_report(place / "plain", out, "--gate=budget")
    log = missed / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "certificate" not in line))
    assert ("not measured" in run_report(missed, out, "--gate=budget")
            and run_report(missed, out, "--gate=finished") == 0)


def wrong_inputs(d):
    "(arguments, words of the one line that refuses them)"
    (d / "empty").mkdir()
    (d / "torn_middle").mkdir()
    (d / "no_step").mkdir()
    good = (make_run(d / "a") / "metrics.jsonl").read_text()
    (d / "torn_middle/metrics.jsonl").write_text(good.replace('"lr": ', '"lr": {', 1))
    (d / "no_step/metrics.jsonl").write_text(good.splitlines()[0] + "\n")
    (d / "deep/runs/one").mkdir(parents=True)
    (d / "deep/runs/one/metrics.jsonl").write_text(good)
    (d / "binary.json").write_bytes(b"\xff\xfe\0")
    (d / "list.json").write_text("[1]")
    (d / "strange.json").write_text(json.dumps(dict(policy="/else", success=dict(x=rate(1, 2)))))
    for n, x in dict(cells=dict(success=dict(x=.5)), words=dict(success="all"), loss=dict(task_loss=dict(loss="low")),
                     shape=dict(drift=dict(relative_l2=[[1.]], layers=[-1], vectors=[]))).items():
        (d / f"{n}.json").write_text(json.dumps(dict(policy=str(d / "a/checkpoints/last")) | x))
    (d / "mine.html").write_text("mine")
    shutil.copytree(d / "a", d / "b/a")
    make_run(d / "act", policy="act")
    return [([d / "nowhere"], "no such folder"), ([d / "list.json"], "is a file"), ([d / "empty"], "is no run"),
            ([d / "deep"], f"give those: {d / 'deep/runs/one'}"),
            ([d / "torn_middle"], "metrics.jsonl:2: expected one JSON record a line"),
            ([d / "no_step"], "holds no step"), ([d / "a", d / "act"], "runs of different policies"),
            ([d / "a", d / "empty/../a"], "given twice"), ([], "1"),
            ([d / "a", "--eval=" + str(d / "gone.json")], "no such file"),
            ([d / "a", f"--eval={d / 'binary.json'}"], "cannot read it"),
            ([d / "a", f"--eval={d / 'list.json'}"], "found a list"),
            ([d / "a", f"--eval={d / 'strange.json'}"], "NAME one of a, teacher"),
            ([d / "a", f"--cache={d / 'gone'}"], "no folder"),
            *(([d / "a", f"--eval={d / n}.json"], f"{n}.json: {m}") for n, m in (
                ("cells", "success of x"), ("words", "success: expected"), ("loss", "task_loss"), ("shape", "drift"))),
            ([d / "a", f"--out={d / 'mine.html'}"], "not of craft-report"), ([d / "a", "--out=r.txt"], "ends in .html"),
            ([d / "a", f"--out={d / 'mine.html'}/x.html"], "mine.html"),
            ([d / "a", "--gates=x"], "there is no --gates"), ([d / "a", "--gate"], "expected --gate=VALUE"),
            ([d / "a", "--gate=,"], "expected conditions"), ([d / "a", "--new=x"], "'x' was not measured")]


def test_wrong_input_is_one_clear_line(tmp_path):
    for argv, says in wrong_inputs(tmp_path):
        said = run_report(*argv)
        assert says in str(said) and "Traceback" not in str(said) and len(str(said).splitlines()) <= 2, (argv, said)
    assert (tmp_path / "mine.html").read_text() == "mine" and not (tmp_path / "a/report.html").exists()


def test_a_torn_last_line_is_left_out_and_said(tmp_path, capsys):
    log = make_run(tmp_path / "run") / "metrics.jsonl"
    for cut in 20, 400, 1:
        text = log.read_text()
        log.write_text(text[:-cut])
        assert run_report(tmp_path / "run") == 0
        assert ("the last line of its log is torn and left out" in capsys.readouterr().out) == (cut > 1)
        log.write_text(text)


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    a, b = make_run(tmp_path / "x/run"), make_run(tmp_path / "y/run", 1)
    r = Report([a, b])
    assert (r.names == ["x/run", "y/run"] and r.differ["seed"] == {"x/run": 0, "y/run": 1}
            and {*r.differ} == {"seed", "policy.pretrained_path", "craft.anchor_cache_dir"})


def test_drift_is_measured_now(work, tmp_path, capsys):
    "A real run: its records, its certificate, and its drift on a cache that it was not trained on, and on its own."
    import kill_training as K
    from craft_nb.lerobot import train
    from test_commands import run_config
    _, cache = K.prepare(tmp_path, work)
    cfg = run_config(work, tmp_path / "run", anchor_cache_dir=str(cache), views="pooled", controller="share", budget=9.,
                     heldout_fraction=.25, check=False)
    cfg.save_checkpoint, cfg.save_freq = True, 3
    train(cfg, quiet=True)
    cli.build_cache([f"--policy.path={work.policy_path}", f"--dataset.repo_id={work.root}",
                     f"--out_dir={tmp_path / 'held'}", "--num_anchors=8", "--seed=5", "--views=pooled"])
    assert (run_report(tmp_path / "run", f"--cache={tmp_path / 'held'}", "--gate=drift<=1e9,drift>=0,budget,finished")
            == 0)
    found = json.loads((tmp_path / "run/report.json").read_text())
    d = found["measured"]["run"]["drift"]
    assert (d["losses"]["pooled"] > 0 and len(d["by_instruction"]) == 2 and found["policy"] == "pi0_fast_small"
            and found["runs"]["run"]["certificate"]["met"])
    page = (tmp_path / "run/report.html").read_text()
    assert "Where the network moved" in page and all(f">{t}</th>" in page for t in d["by_instruction"])
    shutil.copytree(cache, tmp_path / "copy")
    for own in cache, tmp_path / "copy":
        assert "not measured" in run_report(tmp_path / "run", f"--cache={own}",
                                            "--gate=drift<=1e9"), "anchors that were trained on are not held out"
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert "has no checkpoint" in run_report(tmp_path / "run", f"--cache={tmp_path / 'held'}")


def test_the_arms_of_a_demo_are_runs(tmp_path):
    from dataclasses import replace
    from craft_nb.demo import SIZES, Run, runs_page
    settings = replace(SIZES["tiny"], old="drawer", new="window", arms="sft,craft:action_logits")
    run = Run(tmp_path, settings)
    paths = {a: str(make_run(tmp_path / "runs" / a.replace(":", "-"), plain=a == "sft")
                    / "checkpoints/last/pretrained_model") for a in settings.arm_names}
    (tmp_path / "stages").mkdir()
    for name, result in dict(teacher=dict(path=str(tmp_path / "teacher")), finetune=paths).items():
        run.marker(name).write_text(json.dumps(dict(settings={}, seconds=1., result=result)))
    def cells(*n): return dict(zip(("teacher", "sft", "craft:action_logits"), (rate(x, 20) for x in n)))
    r = runs_page(run, dict(success=dict(drawer=cells(20, 1, 19), window=cells(0, 18, 17)), drift={}))
    assert (r.tasks == dict(old=["drawer"], new=["window"]) and r.shares["craft-action_logits"]["ratio"] == .95
            and r.gate("kept>=.9,budget,new>=.8"))


def test_what_is_not_finite_or_not_recorded(tmp_path):
    log = make_run(tmp_path / "run") / "metrics.jsonl"
    rows = [json.loads(x) for x in log.read_text().splitlines()]
    for r in rows: r.pop("clipped", None)
    rows[3]["task_loss"], rows[4]["task_loss"] = math.nan, math.inf
    log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    r = Report(tmp_path / "run")
    assert r.facts["run"]["clipped"] is None and math.isfinite(r.facts["run"]["task_loss"]["mean"])
    inside = re.search(r'id="data">(.*?)</script>', r.html())[1]
    json.loads(inside, parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
