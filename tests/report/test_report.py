"""The report: from the results alone to a page that draws, sorts and asks for nothing, and to Markdown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from results import DATA, METHODS, MODELS, OLD, make_failed, make_results

from visionpeft import cli, report
from visionpeft.errors import ConfigError
from visionpeft.report.charts import spread_labels, styles
from visionpeft.report.model import read_report
from visionpeft.report.rows import front
from visionpeft.report.summary import summarise

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FIGURES = 9  # of a section that has everything
HOSTILE = "</script><script>document.title='hit'</script>"
STEERS = "\x1b\x9b\u2028\u202e"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_results(tmp_path_factory.mktemp("sweep") / "RESULTS")
    make_failed(out, "the process was killed: memory was full")
    return out


@pytest.fixture(scope="module")
def page(results: Path) -> Path:
    return report.write(results)[0]


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; returns its exit code and what it said on stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out.strip(), said.err.strip()


class Text(HTMLParser):
    """What a page shows, without scripts and styles; and its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.data.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.data).split())


# ------------------------------------------------------------------------------------------------------- what the page says
def test_the_page_says_all_that_was_measured(results: Path, page: Path) -> None:
    said = Text(page.read_text())
    sections = read_report([results]).sections
    assert len(sections) == len(MODELS) * len(DATA)
    for section in sections:
        assert f"{section.model} on {section.data}" in said.text
        for row in section.rows:
            assert f"{row.score_mean:.3f} [{row.low:.3f}, {row.high:.3f}]" in said.text
            assert f"{row.trained_body:,}" in said.text
            for cell in row.cells:
                assert cell["command"] in said.text
    assert "1 failed" in said.text and "the process was killed: memory was full" in said.text
    assert "bn frozen · head keep · lean auto · freeze 0 · epochs 6 · seeds 2" in said.text
    for needed in ("takes two passes", "paired", "On a CPU there is no allocator's peak"):
        assert needed in said.text
    images = [attributes for tag, attributes in said.tags if tag == "img"]
    assert len(images) == len(sections) * (1 + len(METHODS)) * 4
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,/9j/") for image in images)


def test_the_page_asks_for_nothing(page: Path) -> None:
    said = Text(page.read_text())
    for tag, attributes in said.tags:
        for name in ("src", "href", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for tag, a in said.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy and "http" not in policy


def test_the_answer_is_the_least_memory_near_to_full(results: Path) -> None:
    for section in read_report([results]).sections:
        taken = {row.method: row.live_bytes for row in section.rows}
        scores = {row.method: row.score_mean for row in section.rows}
        near = [m for m in METHODS if scores[m] >= 0.95 * scores["full"]]
        assert section.summary.row.method == min(near, key=lambda m: taken[m])
    rows = section.rows
    alone = summarise([row for row in rows if row.method in ("full", "head")], section.memory, "full")
    assert alone.row.method == "full" and "No other keeps 95 %" in alone.reason and "head: 0." in alone.reason
    assert alone.compared and alone.compared.method == "head" and dict(alone.shares)["score"] < 0.95
    without = summarise([row for row in rows if row.method != "full"], section.memory, "full")
    assert "no full here to compare it with" in without.reason and not without.compared


def test_the_answer_compares_scores_of_the_same_seeds(results: Path) -> None:
    section = read_report([results]).sections[0]
    full, head = ({row.method: row for row in section.rows}[name] for name in ("full", "head"))
    first, second = full.score_by_seed
    full = replace(full, score_by_seed={first: 0.5, second: 0.9}, score_mean=0.7)
    head = replace(head, score_by_seed={first: 0.49}, score_mean=0.49, difference=-0.01)
    found = summarise([full, head], section.memory, "full")
    assert found.row.method == "head" and "0.490 mAP50-95 against 0.500 of full" in found.reason
    assert dict(found.shares)["score"] == pytest.approx(0.98)
    other = summarise([full, replace(head, score_by_seed={7: 0.49})], section.memory, "full")  # no seed in common: the means
    assert other.row.method == "full" and "against 0.700 of full" in other.reason


def test_the_front_is_what_nothing_beats(results: Path) -> None:
    section = read_report([results]).sections[0]
    best = front(section.rows, section.memory)
    for row in section.rows:
        beaten = [
            o
            for o in section.rows
            if o.score_mean >= row.score_mean and o.live_bytes <= row.live_bytes and o is not row  # type: ignore[operator]
        ]
        assert (row.method in best) == (not beaten)
    assert best


def test_several_folders_are_one_report(tmp_path: Path) -> None:
    first = make_results(tmp_path / "a", models=["yolov8n"], data=["road_signs"])
    second = make_results(tmp_path / "b", models=["yolov8n"], data=["aerial_airport"])
    again = make_results(tmp_path / "c", models=["yolov8n"], data=["road_signs"])
    whole = read_report([first, second, again])
    assert [s.data for s in whole.sections] == ["aerial_airport", "road_signs"]
    assert len(whole.cells) == 2 * len(METHODS) * 2  # those of the third are those of the first
    make_failed(second, "it ran out", method="full", seed=0)  # finished in the first
    assert not read_report([first, second]).failed


def test_a_gpu_has_its_own_peak(tmp_path: Path) -> None:
    out = make_results(tmp_path / "gpu", models=["yolov8n"], data=["road_signs"], cuda=True)
    section = read_report([out]).sections[0]
    assert section.memory.name == "peak GPU memory"
    row = section.rows[0]
    assert section.memory.of(row) == row.cells[0]["run"]["measured"]["cuda"]["allocated"]
    said = Text(report.write(out)[0].read_text()).text
    assert "GPU peak" in said and "On a CPU" not in said


@pytest.mark.parametrize(
    ("without", "figures"),
    [
        (("pictures",), FIGURES),
        (("retained",), FIGURES - 2),
        (("evidence",), FIGURES),
        (("saved_by_stage", "saved_by_cause", "seconds_by_part", "state_bytes", "live_bytes", "cuda"), FIGURES - 4),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_cells_that_lack_something_give_a_page(tmp_path: Path, without: tuple[str, ...], figures: int) -> None:
    out = make_results(tmp_path / "r", models=["yolov8n"], data=["road_signs"], seeds=[0], without=without)
    html = report.write(out, markdown=tmp_path / "t.md", out=tmp_path / "p.html")[0].read_text()
    said = Text(html)
    assert len([1 for tag, _ in said.tags if tag == "figure"]) == figures
    assert ("[0." in said.text) == ("evidence" not in without)
    assert "A row of one seed has an interval over images only" in said.text
    assert ("bytes saved" in said.text) == ("live_bytes" in without)


def test_an_older_run_gives_a_page(tmp_path: Path) -> None:
    """What run.json held before there was a benchmark, and no optional key at all."""
    out = make_results(tmp_path / "r", models=["yolov8n"], data=["road_signs"], seeds=[0])
    for file in (out / "cells").iterdir():
        cell = json.loads(file.read_text())
        for key in ("pictures", "retained", "environment", "command", "task"):
            del cell[key]
        kept = ("saved_bytes", "peak_bytes", "peak_measure", "step_seconds")
        cell["run"]["measured"] = {k: cell["run"]["measured"][k] for k in kept}
        cell["run"]["history"] = []
        file.write_text(json.dumps(cell))
    (out / "benchmark.json").unlink()
    said = Text(report.write(out)[0].read_text())
    assert len([1 for tag, _ in said.tags if tag == "figure"]) == 2


# ---------------------------------------------------------------------------------------------------------------- bad input
def test_names_stay_text(tmp_path: Path) -> None:
    out = make_results(tmp_path / "r", ["yolov8n"], ["road_signs"], seeds=[0], classes=[*OLD, HOSTILE, "a|b`c"])
    for file in (out / "cells").iterdir():
        cell = json.loads(file.read_text())
        cell["names"]["data"] = cell["command"] = f"{HOSTILE}|x{STEERS}"
        cell["states"]["bn"] = HOSTILE
        if cell["names"]["method"] != "full":
            cell["names"]["method"] += f"{HOSTILE}|{STEERS}"
        cell["pictures"]["after"][0] = f'"><img src=x onerror="{HOSTILE}'  # no picture
        file.write_text(json.dumps(cell))
    about = json.loads((out / "benchmark.json").read_text())
    (out / "benchmark.json").write_text(json.dumps({**about, "name": HOSTILE}))
    make_failed(out, HOSTILE)
    html = report.write(out, tmp_path / "p.html", tmp_path / "t.md")[0].read_text()
    said = Text(html)
    assert [a for tag, a in said.tags if tag == "script"] == [{"type": "application/json", "id": "specs"}, {}, {}]
    assert said.text.count(HOSTILE) > 4 and HOSTILE not in html
    assert not [a for tag, a in said.tags if tag == "img" and not str(a["src"]).startswith("data:")]
    markdown = (tmp_path / "t.md").read_text()
    [specs] = re.findall(r'id="specs">(.*?)</script>', html, re.DOTALL)
    drawn = json.dumps(json.loads(specs), ensure_ascii=False)  # where U+2028 is, no figure is drawn
    assert "\\u2028" in drawn and not any(sign in drawn + said.text + markdown for sign in STEERS)
    assert "<script>" not in markdown.replace("\\<", "")
    assert all(line.count(" | ") == 17 for line in markdown.splitlines() if line.startswith("| "))


def spoil(folder: Path, text: str, kind: str = "cells") -> Path:
    file = sorted((folder / kind).iterdir())[0]
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", ["", '{"format": 1, "cel', "[1, 2]", '{"name": "something else"}', '{"format": 2}', "null"])
def test_foreign_and_truncated_files_are_named(tmp_path: Path, capsys, text: str) -> None:
    out = make_results(tmp_path / "r", ["yolov8n"], ["road_signs"], seeds=[0])
    file = spoil(out, text)
    code, _, said = run(capsys, out)
    assert code == 2 and str(file) in said and "\n" not in said
    assert not (out / "report.html").exists()


@pytest.mark.parametrize("part", ["run", "names", "states", "run.after", "run.parameters", "names.model", "score"])
def test_a_cell_that_lacks_a_part_is_named(tmp_path: Path, capsys, part: str) -> None:
    out = make_results(tmp_path / "r", ["yolov8n"], ["road_signs"], seeds=[0])
    file = sorted((out / "cells").iterdir())[0]
    cell = json.loads(file.read_text())
    *inside, key = part.split(".")
    owner = cell[inside[0]] if inside else cell
    owner[key] = "mAP" if key == "score" else None
    if inside:
        del owner[key]
    file.write_text(json.dumps(cell))
    code, _, said = run(capsys, out)
    assert code == 2 and str(file) in said and "\n" not in said


def test_evidence_that_is_none_is_named(tmp_path: Path, capsys) -> None:
    out = make_results(tmp_path / "r", ["yolov8n"], ["road_signs"], seeds=[0])
    file = sorted((out / "cells").iterdir())[0]
    file.write_text(json.dumps({**json.loads(file.read_text()), "evidence": {"kind": "classify", "data": "AAAA"}}))
    code, _, said = run(capsys, out)
    assert code == 2 and file.name in said and "\n" not in said


def test_a_foreign_benchmark_json_is_named(tmp_path: Path, capsys) -> None:
    out = make_results(tmp_path / "r", ["yolov8n"], ["road_signs"], seeds=[0])
    for text in ("{", "[]", "3"):
        (out / "benchmark.json").write_text(text)
        code, _, said = run(capsys, out)
        assert code == 2 and "benchmark.json" in said and "\n" not in said


def test_no_results(tmp_path: Path, capsys) -> None:
    assert run(capsys, tmp_path / "none")[::2] == (
        2,
        f"visionpeft: there are no results in {tmp_path / 'none'}; give the folder that a benchmark wrote into",
    )
    code, _, said = run(capsys, tmp_path)
    assert code == 2 and "there is no finished cell" in said and "visionpeft benchmark" in said
    code, _, said = run(capsys)
    assert code == 2 and "name the folder" in said
    make_failed(tmp_path, "it ran out of memory")
    assert "(1 failed)" in run(capsys, tmp_path)[2]


def test_results_with_two_references_are_refused(tmp_path: Path) -> None:
    one = make_results(tmp_path / "a", ["yolov8n"], ["road_signs"], seeds=[0])
    two = make_results(tmp_path / "b", ["yolov8n"], ["aerial_airport"], seeds=[0])
    about = json.loads((two / "benchmark.json").read_text())
    (two / "benchmark.json").write_text(json.dumps({**about, "defaults": {"against": "head"}}))
    with pytest.raises(ConfigError, match="compared with full and head"):
        read_report([one, two])


def test_without_the_extra_markdown_is_written(results: Path, tmp_path: Path, lacking, capsys) -> None:
    lacking("altair")
    code, _, said = run(capsys, results, "--out", tmp_path / "p.html")
    assert code == 2 and "pip install 'visionpeft[report]'" in said
    assert run(capsys, results, "--markdown", tmp_path / "t.md")[0] == 0


def test_a_folder_that_cannot_be_written(results: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    code, _, said = run(capsys, results, "--markdown", tmp_path / "file" / "t.md")
    assert code == 2 and "cannot write" in said and "\n" not in said
    for option in ("--out", "--markdown"):
        code, _, said = run(capsys, results, option, tmp_path)
        assert code == 2 and "is a folder; name the file" in said and "\n" not in said


# ----------------------------------------------------------------------------------------------------------------- markdown
def test_markdown_says_how_it_was_made(results: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "table.md"
    assert run(capsys, results, "--markdown", file)[:2] == (0, str(file))
    text = file.read_text()
    assert f"`visionpeft report {results} --markdown {file}`" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    sections = read_report([results]).sections
    assert len(lines) == len(sections) * (len(METHODS) + 2)
    for section in sections:
        for row in section.rows:
            assert any(line.startswith(f"| {row.method} | {row.score_mean:.3f} |") for line in lines)
    assert run(capsys, results, "--markdown", file)[0] == 0 and file.read_text() == text


# ------------------------------------------------------------------------------------------------------------------- charts
def test_labels_stand_apart() -> None:
    wanted = {"a": 0.5, "b": 0.5, "c": 0.52, "d": 0.9, "e": 0.1}
    placed = spread_labels(wanted, 0.05)
    order = sorted(placed.values())
    assert all(high - low >= 0.05 - 1e-12 for low, high in zip(order, order[1:], strict=False))
    assert sorted(placed, key=placed.__getitem__) == sorted(wanted, key=wanted.__getitem__)
    assert placed["d"] == 0.9 and placed["e"] == 0.1
    assert abs(sum(placed[k] - wanted[k] for k in "abc")) < 1e-12  # none is favoured


def test_methods_look_different() -> None:
    methods = [f"method {i}" for i in range(20)]
    made = styles(methods)
    assert len({(s.colour, s.shape) for s in made.values()}) == len({(s.colour, *s.dash) for s in made.values()}) == 20
    assert styles(methods[:3]) == {m: made[m] for m in methods[:3]}


# ------------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        yield (opened := driver.chromium.launch(executable_path=CHROMIUM))
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page, waits until all is drawn, and checks at the end that nothing was asked for and nothing went wrong."""
    wrong: list[str] = []
    asked: list[str] = []

    def go(file: Path, width: int = 1280, **options: Any) -> Any:
        tab = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        tab.on("console", lambda message: "spec uses Vega v5" in message.text or wrong.append(message.text))  # Altair 5's
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-drawn]", timeout=30_000)
        return tab

    yield go
    assert not wrong
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn(visit: Any, page: Path, width: int, scheme: str) -> None:
    tab = visit(page, width, color_scheme=scheme)
    sizes = tab.evaluate(
        """() => [...document.querySelectorAll("figure")].map((figure) => {
            const svg = figure.querySelector(".plot svg"), box = svg?.getBoundingClientRect();
            const marks = svg?.querySelectorAll(".mark-symbol path, .mark-rect path, .mark-line path").length;
            return [box?.width ?? 0, box?.height ?? 0, marks ?? 0, figure.getBoundingClientRect().width];
        })"""
    )
    assert len(sizes) == FIGURES * len(MODELS) * len(DATA)
    for wide, tall, marks, room in sizes:
        assert 200 < wide <= room + 1 and tall > 80 and marks >= len(METHODS)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    named = tab.evaluate("""() => [...document.querySelectorAll(".plot[data-spec$='-0']")].map((plot) =>
        [...plot.querySelectorAll(".labels_marks text")].filter((t) => t.getAttribute("opacity") !== "0").length)""")
    assert named == [len(METHODS)] * len(MODELS) * len(DATA)  # no label lacks a place
    paper, ink = tab.evaluate(
        "[document.documentElement, document.body].map((e, i) => i ? getComputedStyle(e).color : "
        "getComputedStyle(e).backgroundColor)"
    )
    light = [sum(map(int, re.findall(r"\d+", colour))) for colour in (paper, ink)]
    assert (light[0] > light[1]) == (scheme == "light")


def test_the_table_sorts(visit: Any, page: Path) -> None:
    tab = visit(page)
    table = tab.locator("table.methods").first
    heads = table.locator("thead th")

    def column(index: int) -> list[float]:
        cells = table.locator(f"tbody tr > :nth-child({index + 1})").evaluate_all(
            "cells => cells.map((c) => c.dataset.sort)"
        )
        return [float(c) if re.fullmatch(r"-?[\d.e+-]+", c) else c for c in cells]

    names = [name.strip() for name in heads.all_inner_texts()]
    assert column(1) == sorted(column(1), reverse=True)  # the best first, as it comes
    for name in ("body", "saved"):
        index = next(i for i, n in enumerate(names) if n.startswith(name))
        heads.nth(index).locator("button").click()
        assert column(index) == sorted(column(index), reverse=True) and len(set(column(index))) > 1
        assert heads.nth(index).get_attribute("aria-sort") == "descending"
        heads.nth(index).locator("button").click()
        assert column(index) == sorted(column(index))
    heads.nth(0).locator("button").click()
    assert column(0) == sorted(METHODS)
    difference = names.index(next(n for n in names if n.startswith("difference")))
    heads.nth(difference).locator("button").click()
    assert table.locator("tbody tr").last.locator("th").get_attribute("data-sort") == "full"  # it has none: last


def test_theme_and_print(visit: Any, page: Path) -> None:
    tab = visit(page, color_scheme="dark")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = tab.evaluate(paper)
    tab.locator("#theme").click()
    assert tab.evaluate(paper) == "rgb(255, 255, 255)" != dark
    tab.locator("#theme").click()
    assert tab.evaluate(paper) == dark
    tab.emulate_media(media="print")
    assert tab.evaluate(paper) == "rgb(255, 255, 255)"
    assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_a_hostile_name_does_nothing(visit: Any, tmp_path: Path) -> None:
    methods = {"full": METHODS["full"], HOSTILE: METHODS["lora"], STEERS: METHODS["norm"]}
    out = make_results(tmp_path / "r", ["yolov8n"], ["road_signs"], methods, [0], [*OLD, HOSTILE])
    tab = visit(report.write(out)[0])
    assert tab.title() == "synthetic: fine-tuning compared"
    points = tab.locator(".plot .mark-symbol path")
    for i in range(points.count()):
        points.nth(i).hover(force=True)
    assert tab.title() == "synthetic: fine-tuning compared"
    assert tab.locator("figure svg", has_text=HOSTILE).count() > 0
