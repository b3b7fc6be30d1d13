"""`inspect-graph` as a command: what it shows, what it writes, what it refuses; the report in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import Result, Run, command, write_images

from irgdistill.io.tensors import read_metadata
from irgdistill.training.similarity import nearest_neighbours

CLASSES = ("blue & co", "green", "<b>red")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, a teacher, a student alone and a distilled one, all through the command line, one epoch each."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "data" / "train", dict.fromkeys(CLASSES, 12))
    write_images(root / "data" / "val", dict(zip(CLASSES, (8, 8, 5), strict=True)), seed=1)
    small = ["--input-size", 16, "--workers", 0, "--batch-size", 12, "--epochs", 1, "--data", root / "data"]
    taught = ["--teacher-checkpoint", root / "teacher" / "last.safetensors", "--skip-teacher-check"]
    for name, options in (
        ("teacher", ["--student", "cifar_resnet20", "--method", "none"]),
        ("alone", ["--student", "cifar_resnet14_x0_5", "--method", "none"]),
        ("taught", ["--student", "cifar_resnet14_x0_5", *taught]),
        ("two-levels", ["--student", "cifar_resnet14_x0_5", *taught, "--levels", 2]),
    ):
        assert command("distill", *options, *small, "--output", root / name) == 0
    return root


@pytest.fixture(scope="module")
def seen(made: Path) -> Path:
    """The distilled student inspected beside the one alone."""
    options = [made / "taught", "--compare", made / "alone", "--images", 18, "--neighbours", 3, "--workers", 0]
    assert command("inspect-graph", *options) == 0
    return made / "taught" / "graphs"


def small(run: Run, *options: object) -> Result:
    return run("inspect-graph", "--workers", 0, "--images", 6, "--neighbours", 2, *options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_folder_is_enough(seen: Path) -> None:
    assert set(files(seen)) == {
        *(f"edges-stage-{number}.png" for number in (1, 2, 3)),
        *("edges-logits.png", "transformations.png", "overview.png"),
        *("graph.json", "graph.safetensors", "report.html"),
    }
    facts = json.loads((seen / "graph.json").read_text())
    assert facts["teacher"]["architecture"] == "cifar_resnet20"
    assert [student["label"] for student in facts["students"]] == ["taught", "alone"]
    assert facts["classes"] == sorted(CLASSES) and len(facts["plan"]["pairs"]) == 3 and facts["seed"] == 0
    labels = [image["label"] for image in facts["images"]]
    assert labels == sorted(labels) and sorted(map(labels.count, range(3))) == [5, 6, 7]
    assert facts["images"][0]["name"] == "val/<b>red/000.png"
    assert {"torch", "timm", "irgdistill"} <= set(facts["versions"])
    assert [stage["name"] for stage in facts["stages"]] == ["/1", "/2", "/4", "logits"]
    for name in files(seen):
        if name.endswith(".png"):
            assert min(Image.open(seen / name).size) > 300


def test_the_numbers_are_those_of_the_matrices(seen: Path) -> None:
    facts, tensors = json.loads((seen / "graph.json").read_text()), load_file(seen / "graph.safetensors")
    assert tensors["labels"].tolist() == [image["label"] for image in facts["images"]]
    for key, stage in zip(("1", "2", "3", "logits"), facts["stages"], strict=True):
        teacher = tensors[f"edges.{key}.teacher"]
        assert teacher.shape == (18, 18) and teacher.max() == 1
        for role, name in (("student", "taught"), ("compare", "alone")):
            numbers = stage["numbers"][name]
            student = tensors[f"edges.{key}.{role}"]
            assert numbers["edges"]["mse"] == pytest.approx(float((teacher - student).square().mean()), rel=1e-5)
            if key == "logits":
                assert numbers["transformation"] is None
                continue
            moved = [tensors[f"transformation.{key}.{who}"] for who in ("teacher", role)]
            expected = float((moved[0] - moved[1]).square().mean())
            assert numbers["transformation"]["mse"] == pytest.approx(expected, rel=1e-5)


def test_a_seed_fixes_every_byte(run: Run, made: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 0), ("b", 2)):
        shown = small(run, made / "two-levels", "--output", tmp_path / name, "--workers", workers, "--seed", 4)
        assert shown.code == 0, shown.err
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.usefixtures("no_figures")
def test_json_and_the_training_split(run: Run, made: Path, tmp_path: Path) -> None:
    shown = small(run, made / "taught", "--output", tmp_path / "c", "--seed", 5, "--json", "--split", "train")
    facts = json.loads((tmp_path / "c" / "graph.json").read_text())
    assert facts["images"][0]["name"].startswith("train/") and facts["seed"] == 5
    values = json.loads(shown.out)
    assert values["stages"] == facts["stages"] and values["images"] == 6
    assert values["output"] == str(tmp_path / "c")


@pytest.mark.usefixtures("no_figures")
def test_two_networks_that_have_not_met(run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = ("--teacher-checkpoint", made / "teacher" / "best.safetensors", "--data", made / "data")
    monkeypatch.setenv("COLUMNS", "80")
    shown = small(run, *teacher, "--student", "cifar_resnet14_x0_5", "--input-size", 16, "--format", "svg")
    headings = ["stage", "edges", "r", "ρ", "near@2", "CKA", "transform", "r", "positions"]  # none is wrapped
    assert headings in [line.split() for line in shown.out.splitlines()]
    assert shown.code == 0, shown.err
    assert "cifar_resnet14_x0_5 untrained: untrained, seed 0" in shown.err and "matched stages" in shown.out
    folder = tmp_path / "graphs" / "cifar_resnet20-cifar_resnet14_x0_5"
    assert (folder / "overview.svg").read_bytes().startswith(b"<?xml") and not (folder / "overview.png").exists()

    weights = made / "alone" / "last.safetensors"
    shown = small(run, *teacher, "--student-checkpoint", weights, "--format", "pdf", "--terminal")
    assert shown.code == 0, shown.err
    assert f"alone/last: {weights}" in shown.err and "▒" in shown.out
    assert not list(folder.glob("*.svg")), "what an earlier inspection drew is not mixed with this one"
    assert (folder / "overview.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.usefixtures("no_figures")
def test_runs_of_a_comparison_are_named_by_method_and_seed(run: Run, made: Path, tmp_path: Path) -> None:
    for method in ("kd", "none"):
        shutil.copytree(made / "taught", tmp_path / method / "0", ignore=shutil.ignore_patterns("graphs"))
    shown = small(run, tmp_path / "kd" / "0", "--compare", tmp_path / "none" / "0", "--output", tmp_path / "graphs")
    assert shown.code == 0, shown.err
    facts = json.loads((tmp_path / "graphs" / "graph.json").read_text())
    assert [student["label"] for student in facts["students"]] == ["kd/0", "none/0"]


def test_the_untrained_student_is_the_one_a_run_begins_with(run: Run, made: Path, tmp_path: Path) -> None:
    from irgdistill.commands.inspect.networks import known_networks, open_networks
    from irgdistill.commands.requests import InspectRequest
    from irgdistill.config.loading import load_config
    from irgdistill.training.setup import prepare

    flags = {"student.name": "cifar_resnet14_x0_5", "student.input_size": 16, "data.source": str(made / "data")}
    flags |= {"teacher.checkpoint": made / "teacher", "seed": 7}
    config = load_config(flags=flags)
    request = InspectRequest(config, frozenset(flags), images=4, neighbours=3)
    own = open_networks(request, known_networks(request)).students[0].network.model
    other = prepare(config).student.model
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.usefixtures("no_figures")
def test_a_lone_checkpoint_knows_its_teacher(run: Run, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student.safetensors"
    shutil.copy(made / "taught" / "best.safetensors", copy)
    assert small(run, copy, "--output", tmp_path / "a").code == 0
    metadata = read_metadata(copy)
    assert metadata is not None and metadata["teacher"]["checkpoint"].endswith("last.safetensors")


def test_the_plan_of_a_run_needs_no_weights(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("irgdistill.models.weights.read_weights", None)
    shown = run("inspect-graph", made / "taught", "--plan-only")
    assert shown.code == 0 and "layer3.2" in shown.out and "layer3.1" in shown.out
    plan = json.loads(run("inspect-graph", made / "two-levels" / "last.safetensors", "--plan-only", "--json").out)
    assert len(plan["pairs"]) == 2 and plan["student_input_size"] == [16, 16]


@pytest.mark.usefixtures("no_figures")
def test_unreadable_images_are_named_and_left_out(run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "green" / "003.png").write_bytes(b"broken")
    shown = small(run, made / "taught", "--data", tmp_path / "data", "--images", 100, "--output", tmp_path / "a")
    assert shown.code == 0 and "only 21 images" in shown.err and "003.png" in shown.err
    facts = json.loads((tmp_path / "a" / "graph.json").read_text())
    assert len(facts["images"]) == 20 and facts["unreadable"] == [str(tmp_path / "data/val/green/003.png")]
    assert "val/green/003.png" not in [image["name"] for image in facts["images"]]


@pytest.mark.usefixtures("no_figures")
def test_files_of_others_are_left_alone(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "overview.png").write_bytes(b"mine")
    refused = small(run, made / "taught", "--output", tmp_path)
    assert refused.code == 2 and "overview.png was not written by inspect-graph; give another --output" in refused.err
    assert files(tmp_path) == {"overview.png": b"mine"}
    (tmp_path / "overview.png").rename(tmp_path / "mine.png")
    (tmp_path / "graph.json").write_text('{"kind": "another", "files": ["mine.png"]}')
    assert small(run, made / "taught", "--output", tmp_path).code == 2
    (tmp_path / "graph.json").unlink()
    for _ in range(2):
        assert small(run, made / "taught", "--output", tmp_path).code == 0
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no student: give a run folder or checkpoint, or two networks"),
        (("--plan-only", "--student", "resnet18"), "no teacher: give a run folder"),
        (("--plan-only",), "no student: give"),
        (("nowhere",), "no run folder or checkpoint 'nowhere'"),
        (("nowhere.safetensors",), "no file nowhere.safetensors"),
        (("{made}/taught", "--student", "cifar_resnet20"), "is the student: leave out --student"),
        (("{made}/taught", "--student-pretrained"), "leave out --student-pretrained"),
        (("{made}/taught", "--teacher", "resnet18"), "was taught by a cifar_resnet20, not by a resnet18"),
        (
            ("{made}/taught", "--teacher-checkpoint", "{made}/alone"),
            "by a cifar_resnet20, not by a cifar_resnet14",
        ),
        (("{made}/alone",), "does not record its teacher, or had none: give --teacher"),
        (("{made}/alone", "--plan-only"), "does not record its teacher, or had none"),
        (("{made}/taught", "--teacher-checkpoint", "x.safetensors"), "the teacher of"),
        (("{made}/taught", "--compare", "{made}/teacher"), "holds a cifar_resnet20, taught is a cifar_resnet14_x0_5"),
        (("{made}/taught", "--compare", "{made}/two-levels"), "was trained at other stages"),
        (("{made}/taught", "--compare", "nowhere"), "no run folder or checkpoint 'nowhere'"),
        (("{made}/taught", "--images", 1), "--images 1: a graph has 2 to"),
        (("{made}/taught", "--images", 99999), "--images 99999"),
        (("{made}/taught", "--images", 6, "--neighbours", 6), "--neighbours 6: expected 1 to 5"),
        (("{made}/taught", "--images", 500, "--neighbours", 30), "only 21 images could be read"),
        (("{made}/taught", "--neighbours", 0), "--neighbours 0"),
        (("{made}/taught", "--format", "jpg"), "--format jpg: expected png, svg or pdf"),
        (("{made}/taught", "--split", "vall"), "did you mean val"),
        (("{made}/taught", "--data", "nowhere"), "no data folder 'nowhere'"),
        (("{made}/taught", "--data", "digits"), "the class names of digits are not those"),
        (("{made}/taught", "--output", "{made}/taught/config.yaml/x"), "config.yaml is a file"),
        (("{made}/taught", "--batch-size", 0), "data.eval_batch_size = 0"),
        (("{teacher}", "--student", "cifar_resnet20"), "no data: give --data"),
        (("{teacher}", "--student", "cifar_resnet2O", "--data", "digits"), "did you mean cifar_resnet20"),
        (
            ("{teacher}", "--student", "resnet18", "--student-pretrained", "--student-checkpoint", "x"),
            "one or the other",
        ),
        (("{foreign}",), "does not name its network"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, made: Path, arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = made / "foreign.safetensors"
    save_file({"x": torch.ones(1)}, foreign)
    words: list[object] = []
    for argument in arguments:
        if argument == "{teacher}":
            words += ["--teacher-checkpoint", made / "teacher" / "best.safetensors"]
        else:
            words.append(str(argument).format(made=made, foreign=foreign))
    result = run("inspect-graph", "--workers", 0, *words)
    lines = [line for line in result.err.strip().splitlines() if line.startswith("irgdistill: ")]
    assert result.code == 2 and "Traceback" not in result.err
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_asks_nobody_and_escapes_names(seen: Path) -> None:
    page = (seen / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page) and "@import" not in page
    assert "default-src 'none'" in page and "<b>red" not in page and "\\u003cb\\u003ered" in page
    assert page.count("</script>") == 2
    embedded = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    data = json.loads(embedded)
    assert data["facts"]["classes"] == sorted(CLASSES)
    tensors = load_file(seen / "graph.safetensors")
    steps = torch.frombuffer(bytearray(base64.b64decode(data["stages"][0]["edges"]["taught"])), dtype=torch.uint16)
    rows, columns = torch.triu_indices(18, 18, offset=1)
    expected = tensors["edges.1.student"][rows, columns]
    assert torch.allclose(steps.float() / data["levels"], expected, atol=0.5001 / data["levels"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium of this machine, without any download."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    chosen = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion")
    for argument in (*chosen, "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, seen: Path) -> Any:
    browser.get((seen / "report.html").as_uri())
    return browser


def all_of(page: Any, selector: str) -> list[Any]:
    found: list[Any] = page.find_elements("css selector", selector)
    return found


def test_the_page_loads_without_a_complaint(page: Any) -> None:
    assert page.get_log("browser") == []
    assert page.title.startswith("cifar_resnet20 → taught, alone")
    assert len(all_of(page, "#grid button")) == 18 and len(all_of(page, "canvas.map")) == 5
    headings = [heading.text for heading in all_of(page, "#grid h3")]
    assert headings == sorted(CLASSES) and not all_of(page, "#grid h3 b")
    assert len(all_of(page, "#numbers-table tbody tr")) == 8 and len(all_of(page, "#plan-table tbody tr")) == 6
    assert page.execute_script("return document.getElementById('overview-figure').naturalWidth") > 500


def test_a_click_on_an_image_shows_its_neighbours(page: Any, seen: Path) -> None:
    tensors = load_file(seen / "graph.safetensors")
    keys = {"stage /1": "1", "stage /2": "2", "stage /4": "3", "logits": "logits"}
    roles = {"cifar_resnet20": "teacher", "taught": "student", "alone": "compare"}
    for chosen in (0, 7, 17):
        all_of(page, "#grid button")[chosen].click()
        shown = page.execute_script(
            "return [...document.querySelectorAll('#neighbours .row')].map(row => [row.dataset.stage, "
            "row.dataset.network, [...row.querySelectorAll('button')].map(b => [+b.dataset.image, b.innerText])])"
        )
        assert len(shown) == 12
        for stage, network, tiles in shown:
            edges = tensors[f"edges.{keys[stage]}.{roles[network]}"]
            near = nearest_neighbours(edges, 3)[chosen].tolist()
            assert [image for image, _ in tiles] == near
            for image, text in tiles:
                value = float(re.findall(r"\d\.\d{4}", text)[0])
                assert value == pytest.approx(float(edges[chosen, image]), abs=1e-4)


def test_a_cell_tells_its_value(page: Any, seen: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    tensors = load_file(seen / "graph.safetensors")

    def reading() -> dict[str, float]:
        values = page.execute_script(
            "return [...document.querySelectorAll('#reading .value')].map(v => [v.dataset.network, "
            "v.querySelector('b').textContent])"
        )
        return {name: float(value.replace("−", "-")) for name, value in values}

    all_of(page, "#stages button")[1].click()
    canvas = next(canvas for canvas in all_of(page, "canvas.map") if canvas.get_attribute("data-map") == "taught")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width = canvas.size["width"] / 18
    row, column = 4, 11
    offset = [round((place + 0.5) * width - canvas.size["width"] / 2) for place in (column, row)]
    ActionChains(page).move_to_element_with_offset(canvas, *offset).perform()

    def expected(row: int, column: int) -> dict[str, float]:
        teacher, taught, alone = (
            float(tensors[f"edges.2.{r}"][row, column]) for r in ("teacher", "student", "compare")
        )
        values = {"cifar_resnet20": teacher, "taught": taught, "alone": alone}
        return values | {"taught − teacher": taught - teacher, "alone − teacher": alone - teacher}

    assert reading() == pytest.approx(expected(row, column), abs=1.1e-4)
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert reading() == pytest.approx(expected(row + 1, column + 1), abs=1.1e-4)
    canvas.send_keys(Keys.ENTER)
    assert "pinned" in all_of(page, "#reading")[0].text
    ActionChains(page).move_to_element(all_of(page, "h1")[0]).perform()
    assert reading() == pytest.approx(expected(row + 1, column + 1), abs=1.1e-4)
    all_of(page, "#reading button")[1].click()
    assert all_of(page, "#grid button")[column + 1].get_attribute("aria-pressed") == "true"


def test_the_keyboard_walks_through_the_images(page: Any) -> None:
    from selenium.webdriver import Keys

    tiles = all_of(page, "#grid button")
    tiles[0].click()
    tiles[0].send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("data-image") == "1"
    page.switch_to.active_element.send_keys(Keys.END)
    assert page.switch_to.active_element.get_attribute("data-image") == "17"
    assert [tile.get_attribute("tabindex") for tile in tiles].count("0") == 1
    assert page.get_log("browser") == []
