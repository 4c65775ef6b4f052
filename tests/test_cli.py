"""The command line as a user runs it: what it prints, what it leaves behind, how it refuses."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import environment
from PIL import ExifTags, Image

from detloss_triton import backend, cli, selfcheck

COMMAND = [sys.executable, "-m", "detloss_triton"]
# The least work that still goes through every part of a run.
TINY = ["--device", "cpu", "--batch-size", "8", "--image-size", "64"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Training in this process sets the number of threads: give the other tests theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process, expect a refusal, return its one line."""
    try:
        code: Any = cli.main(arguments)
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    assert code == 2, output
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    assert "Traceback" not in output.err
    return output.err


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A directory `images` with ten images of one rectangle each, and `coco.json` beside it."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for index in range(10):
        width, height = (96, 64) if index % 2 else (50, 80)
        pixels = rng.integers(0, 80, (height, width, 3), np.uint8)
        x, y, w, h = (int(v) for v in rng.integers(4, 24, 4))
        pixels[y : y + h, x : x + w] = (250, 200, 40)
        name = f"{index}.{'jpg' if index % 3 else 'png'}"
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": 100 + index, "file_name": name, "width": width, "height": height})
        if index == 0:
            continue
        annotations.append(
            {"id": index, "image_id": 100 + index, "category_id": 7, "bbox": [x, y, w, h]}
        )
    annotations.append({"image_id": 101, "category_id": 9, "bbox": [0, 0, 500, 500], "iscrowd": 1})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "brick"}, {"id": 9, "name": "heap"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path


def arguments_for(coco: Path) -> list[str]:
    """The arguments that train on the images of the fixture, writing beside them."""
    paths = {"--images": "images", "--annotations": "coco.json", "--output": "out"}
    return ["train", *TINY, *(part for k, v in paths.items() for part in (k, str(coco / v)))]


def test_info_names_versions_and_backend(tmp_path: Path) -> None:
    result = run("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    assert "detloss_triton" in result.stdout
    assert "cpu" in result.stdout


def test_version_names_what_a_report_of_a_fault_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("--version", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    versions = backend.versions()
    assert result.stdout.splitlines() == [
        f"{name} {version or 'cannot be imported'}" for name, version in versions.items()
    ]
    assert list(versions) == ["detloss_triton", "python", "torch", "triton"]

    monkeypatch.setattr(backend, "_no_triton", "gone")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert "triton cannot be imported\n" in capsys.readouterr().out


def test_check_reports_each_row_and_fails_on_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [selfcheck.Row("giou", "torch", "float16", 1e-4, 1e-3, True)]
    monkeypatch.setattr(selfcheck, "check", lambda device: rows)
    assert cli.main(["check", "--device", "cpu"]) == 0
    assert "float16" in capsys.readouterr().out

    rows.append(selfcheck.Row("ciou", "triton", "float32", float("nan"), 1e-5, False))
    assert cli.main(["check", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["check", "--device", "cpu", "--backend", "torch"]) == 0
    assert "ciou" not in capsys.readouterr().out


def test_train_writes_pictures_and_metrics(tmp_path: Path) -> None:
    result = run("train", *TINY, "--steps", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "loss=" in result.stderr
    (output,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in output.iterdir()} == {
        "loss.png",
        "predictions.png",
        "metrics.json",
    }
    for picture in output.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 400
    metrics = json.loads((output / "metrics.json").read_text())
    for measure in ("ap50", "ap"):
        assert all(0 <= metrics[measure][when] <= 1 for when in ("before", "after"))
    assert set(metrics["losses"]["last"]) == {"loss_cls", "loss_df", "loss_iou", "total_loss"}
    assert metrics["settings"]["steps"] == 3
    assert metrics["settings"]["backend"] == "torch"
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["seconds"]["total"] >= metrics["seconds"]["training"] > 0


def test_train_on_coco_images(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments_for(coco), "--steps", "2"]) == 0
    capsys.readouterr()
    metrics = json.loads((coco / "out" / "metrics.json").read_text())
    assert metrics["classes"] == ["brick", "heap"]
    assert metrics["validation_images"] == 2
    assert (coco / "out" / "predictions.png").stat().st_size > 0


def test_same_seed_gives_same_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for run_number, seed in enumerate((5, 5, 6)):
        output = tmp_path / str(run_number)
        arguments = ["--steps", "3", "--seed", str(seed), "--output", str(output)]
        assert cli.main(["train", *TINY, *arguments]) == 0
        losses.append(json.loads((output / "metrics.json").read_text())["losses"])
    capsys.readouterr()
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_interrupt_ends_cleanly(tmp_path: Path) -> None:
    # A shell makes what it runs in the background ignore SIGINT, and so all that this starts.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "train", *TINY, "--steps", "100000"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        # Not the terminal's process group: a SIGINT for the test run must not reach it.
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, ours)
    assert process.stderr is not None
    seen = b""
    while b"training:" not in seen:
        byte = os.read(process.stderr.fileno(), 1)
        assert byte, seen
        seen += byte
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in rest
    assert b"interrupted" in rest
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("missing", ["matplotlib", "PIL", "pycocotools", "tqdm"])
def test_missing_extra_is_named(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is there before is put back behind this test, with its own kinds of errors.
    importlib.import_module("detloss_triton.demo.train")
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("detloss_triton.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    line = refuse(capsys, "train")
    assert missing in line
    assert 'pip install "detloss_triton[demo]"' in line


def test_info_needs_nothing_optional(tmp_path: Path) -> None:
    code = (
        "import sys; names = 'PIL', 'matplotlib', 'pycocotools', 'tqdm'; "
        "sys.modules.update(dict.fromkeys(names)); "
        "from detloss_triton import cli; sys.exit(cli.main(['info']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["train", "--steps", "0"], "--steps: expected a positive whole number"),
        (["train", "--steps", "many"], "--steps: expected a positive whole number"),
        (["train", "--batch-size", "-1"], "--batch-size: expected a positive whole number"),
        (["train", "--image-size", "100"], "--image-size: expected a multiple of 32"),
        (["train", "--image-size", "32"], "--image-size: expected a multiple of 32"),
        (["train", "--threads", "0"], "--threads: expected a positive whole number"),
        (["train", "--seed", "-1"], "--seed: expected a whole number"),
        (["train", "--backend", "cuda"], "--backend"),
        (["train", "--criterion", "none"], "--criterion"),
        (["train", "--device", "meta"], "--device: expected a device"),
        (["train", "--device", "nowhere"], "--device: expected a device"),
        (["train", "--images", "."], "--images also needs --annotations"),
        (["train", "--annotations", "x"], "--annotations also needs --images"),
        (["train", "--output", __file__], "--output: expected a directory"),
        (["check", "--device", "nowhere"], "--device: expected a device"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refuse(capsys, *arguments)


@pytest.mark.parametrize("command", [["info"], ["check"], ["train", *TINY]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("DETLOSS_BACKEND", "auto, triton, torch"),
        ("DETLOSS_VALIDATE", "1, true, yes, on, 0, false, no, off, or empty"),
    ],
)
def test_a_wrong_environment_is_refused(
    command: list[str], variable: str, words: str, tmp_path: Path
) -> None:
    result = subprocess.run(
        [*COMMAND, *command],
        cwd=tmp_path,
        env=environment(**{variable: "gpu"}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    expected = f"{variable} must be one of {words}, got 'gpu'"
    assert result.stderr.splitlines() == [f"detloss {command[0]}: error: {expected}"]


def test_triton_that_cannot_run_is_refused(tmp_path: Path) -> None:
    for command in (["train", *TINY], ["check", "--device", "cpu"]):
        result = subprocess.run(
            [*COMMAND, *command, "--backend", "triton"],
            cwd=tmp_path,
            env=environment(TRITON_INTERPRET=None),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert "--backend" in result.stderr


Change = Callable[[dict[str, Any]], object]


def _set_box(*box: Any) -> Change:
    return lambda content: content["annotations"][0].update(bbox=list(box))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("categories"), "the key 'categories'"),
        (lambda c: c["images"].clear(), "'images' to be a list that is not empty"),
        (lambda c: c["annotations"].clear(), "'annotations' to be a list that is not empty"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotations[0]: expected the key 'bbox'"),
        (lambda c: c["images"][3].pop("width"), "images[3]: expected the key 'width'"),
        (lambda c: c["images"][3].update(height=0), "images[3]: expected 'width' and 'height'"),
        (lambda c: c["images"][3].update(id=100), "images[3]: expected a unique 'id'"),
        (lambda c: c["images"].__setitem__(0, 5), "images[0]: expected an object, got 5"),
        (lambda c: c["annotations"][0].update(image_id=9), "'image_id' to be one of the ids"),
        (lambda c: c["annotations"][0].update(category_id=[1]), "'category_id' to be one of"),
        (_set_box(1, 2, 3), "annotations[0]: expected 'bbox' to be [x, y, width, height]"),
        (_set_box(1, 2, "3", 4), "annotations[0]: expected 'bbox' to be [x, y, width, height]"),
        (_set_box(1, 2, float("nan"), 4), "expected 'bbox' to be [x, y, width, height]"),
        (_set_box(1, 2, 10**400, 4), "expected 'bbox' to be [x, y, width, height]"),
        (_set_box(1, 2, 0, 4), "'bbox' to have a positive width and height"),
        (_set_box(1, 2, 5, -4), "'bbox' to have a positive width and height"),
        (_set_box(80, 2, 40, 4), "'bbox' to lie inside its image of 96x64 pixels"),
        (_set_box(-30, 2, 10, 4), "'bbox' to lie inside its image of 96x64 pixels"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "at least 2 images with"),
    ],
)
def test_wrong_annotations_are_refused(
    coco: Path, change: Change, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = coco / "coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    line = refuse(capsys, *arguments_for(coco))
    assert "--annotations" in line
    assert expected in line
    assert not (coco / "out").exists()


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 100_000, "\udcff"])
def test_what_is_not_coco_is_refused(
    coco: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "coco.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "--annotations" in refuse(capsys, *arguments_for(coco))


def test_missing_files_are_refused(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = arguments_for(coco)
    image = coco / "images" / "4.jpg"
    content = image.read_bytes()

    image.write_bytes(content[:100])
    assert "--images: expected an image in" in refuse(capsys, *arguments)

    Image.new("RGB", (8, 9)).save(image)
    assert "has 8x9 pixels, expected" in refuse(capsys, *arguments)

    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 80)).save(image, exif=sideways)
    line = refuse(capsys, *arguments)
    assert str(image) in line and "has 80x50 pixels when turned upright" in line
    assert "expected 50x80" in line

    image.unlink()
    line = refuse(capsys, *arguments)
    assert "--images" in line and "'4.jpg'" in line

    image.write_bytes(content)
    for each in (coco / "images").iterdir():
        # Headers are whole, so that this shows when pictures are looked at.
        each.write_bytes(each.read_bytes()[:-200])
    assert "--images: expected an image in" in refuse(capsys, *arguments)
    assert not (coco / "out").exists()

    (coco / "coco.json").unlink()
    assert "--annotations" in refuse(capsys, *arguments)

    arguments[arguments.index("--images") + 1] = str(coco / "nowhere")
    assert "--images: expected a directory" in refuse(capsys, *arguments)
