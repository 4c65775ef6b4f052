"""The benchmarks run, refuse what is wrong, and report what they measured and nothing else."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import refuse

import detloss_triton as dt
from detloss_triton import cli
from detloss_triton.bench import cases, machine, measure, peers, providers, report, run
from detloss_triton.bench.batches import BUILDERS
from detloss_triton.engine import REGISTRY

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = run.Settings(CPU, quick=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run over one op and one criterion has left its files."""
    output = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--device", "cpu", "--only", "smooth_l1", "yolox"]
    before = measure.COPY_BYTES.copy()
    measure.COPY_BYTES["cpu"] = 2**20
    assert cli.main(["bench", *arguments, "--output", str(output)]) == 0
    measure.COPY_BYTES.update(before)
    return output


def test_a_run_reports_every_provider_or_why_not(written: Path) -> None:
    found = json.loads((written / "bench.json").read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["copy_gb_per_s"] > 0
    rows = [row for row in found["rows"] if row["name"] == "smooth_l1"]
    timed = {(row["provider"], row["pass"]) for row in rows if "ms" in row}
    assert timed == {(p, q) for p in ("ours torch", "torch.nn.functional") for q in run.PASSES}
    absent = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    assert absent.keys() == {"ours torch compiled", "ours Triton"}
    assert "needs a GPU" in absent["ours Triton"]
    for row in found["rows"]:
        if "ms" in row:
            assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
            assert row["error"] <= providers.CRITERION_TOLERANCE
    axes = {row["axis"] for row in found["rows"] if row["kind"] == "sweep"}
    assert axes == {"batch", "classes"}


def test_a_run_leaves_pictures_and_no_paths(written: Path) -> None:
    pictures = {"criteria.png", "roofline.png", "growth.png"}
    assert {path.name for path in written.iterdir()} == pictures | {"bench.json"}
    for name in pictures:
        assert (written / name).read_bytes().startswith(b"\x89PNG")
    assert str(ROOT) not in (written / "bench.json").read_text()


def test_table_and_comparison(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written / "bench.json"
    found = report.read(path)
    table = report.table(found)
    assert "smooth_l1" in table and "yolox" in table
    assert "ours Triton: needs a GPU" in table
    slow = json.loads(path.read_text())
    for row in slow["rows"]:
        if "ms" in row:
            row["ms"] = {key: value * 3 for key, value in row["ms"].items()}
    slow["rows"].pop()
    (written / "slow.json").write_text(json.dumps(slow))
    try:
        assert cli.main(["bench", "--compare", str(written / "slow.json"), str(path)]) == 0
    finally:
        (written / "slow.json").unlink()
    text = capsys.readouterr().out
    assert " 3.00" in text and "1 in the new only" in text


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.json")
    assert "none.json" in refuse(capsys, "bench", "--compare", missing, missing)
    other = tmp_path / "other.json"
    other.write_text("[1]")
    assert "format" in refuse(capsys, "bench", "--compare", str(other), str(other))
    assert "giou_loss" in refuse(capsys, "bench", "--only", "nothing")
    file = tmp_path / "file"
    file.touch()
    assert "--output" in refuse(capsys, "bench", "--output", str(file / "in"))
    if not torch.cuda.is_available():
        assert "cuda" in refuse(capsys, "bench", "--device", "cuda")


def test_kernels_are_not_compiled_by_the_interpreter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in refuse(capsys, "bench", "--aot", "--output", str(tmp_path))


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that is 1 % off, and one that raises, are rows with a reason and no time."""

    def off(task: providers.Task) -> providers.Run:
        return lambda tree: task.run(tree) * 1.01

    def broken(task: providers.Task) -> providers.Run:
        raise RuntimeError("no /home/someone/lib.so here")

    ours = [*providers.OURS[:1], providers.Provider("off", off)]
    monkeypatch.setattr(run, "OURS", [*ours, providers.Provider("broken", broken)])
    (case,) = (case for case in cases.op_cases() if case.name == "l1")
    rows = run.measure(run.op_job(case, QUICK), measure.Clock(), QUICK, 1.0)
    assert {row["provider"] for row in rows if "ms" in row} == {"ours torch", "torch.nn.functional"}
    reasons = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    assert reasons["off"].startswith("wrong: error 1.0e-02")
    assert reasons["broken"] == "fails: RuntimeError: no lib.so here"


def test_the_registry_and_the_criteria_are_walked() -> None:
    walked = {case.op.name for case in cases.op_cases()}
    assert walked == REGISTRY.keys()
    assert {case.builder for case in cases.CRITERIA.values()} == BUILDERS.keys()
    unnamed = cases._from_samples(REGISTRY["giou_loss"])
    task = providers.op_task(unnamed, 1, CPU)
    assert task.inputs["inputs"][0].shape == (8400, 4)
    assert task.differentiable


@pytest.mark.parametrize("name", ["detr", "dfine, no denoising", "matcher"])
def test_transformers_computes_the_same(name: str) -> None:
    pytest.importorskip("transformers")
    case = dataclasses.replace(
        cases.CRITERIA[name],
        arguments={**cases.CRITERIA[name].arguments, "queries": 40, "layers": 2, "boxes": 6},
    )
    task = providers.criterion_task(case, CPU, images=2)
    true = providers.truth(providers.criterion_task(case, CPU, torch.float64, images=2))
    (peer,) = (peer for peer in peers.peers_of(case) if peer.name == "transformers")
    try:
        run.checked(peer, task, true)
    except providers.Absent as absent:
        pytest.skip(str(absent))


@pytest.mark.parametrize("name", ["atss", "yolov9", "detr", "dfine"])
def test_otx_is_asked_by_our_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its criterion is made for the task's classes and sizes; we stand in for OTX."""
    for module in peers.OTX:
        monkeypatch.setitem(sys.modules, module, dt)
    changes = {"images": 2, "classes": 7} | (
        {"boxes": 3} if name in ("detr", "dfine") else {"size": 128}
    )
    task = providers.criterion_task(cases.CRITERIA[name], CPU, **changes)
    true = [x.double() for x in providers.results(providers.OURS[0], task.run, task)]
    (peer,) = (peer for peer in peers.peers_of(task.case) if peer.name == "OTX")
    run.checked(peer, task, true)
    if name == "dfine":
        task.inputs["outputs"].pop("pre_outputs")
        with pytest.raises(providers.Absent, match="before the decoder"):
            peer.make(task)


def test_counted_bytes() -> None:
    """Three passes over the logits of a loss, and no memory for what is broadcast."""
    logits, label = torch.zeros(10, 8), torch.zeros(10, dtype=torch.int64)
    out = torch.zeros(())
    inputs = [logits, label, torch.zeros(1).expand(10)]
    forward = 320 + 80 + 4 + 4
    assert measure.counted_bytes(inputs, [out], [logits], backward=False) == forward
    assert measure.counted_bytes(inputs, [out], [logits], backward=True) == forward + 404 + 320


def test_host_reads_are_counted() -> None:
    x = torch.arange(4.0)
    clock = measure.Clock()
    assert clock.reads(lambda: x * 2) == 0
    assert clock.reads(lambda: (x.sum().item(), x[x > 1], x.nonzero())) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_of_the_step_alone() -> None:
    held = torch.ones(16 * 2**20)
    peak = measure.Clock().peak_mib(lambda: torch.ones(8 * 2**20) + 1)
    assert peak is not None and 60 < peak < 90, peak
    del held


class FakeGpu:
    """Counts what a GPU's clock asks for; the n-th event is recorded at n^2 milliseconds."""

    def __init__(self) -> None:
        self.recorded = self.synchronized = 0
        self.mode = "default"
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                outer.recorded += 1
                self.at = outer.recorded**2

            def elapsed_time(self, end: Any) -> float:
                assert outer.synchronized, "read before the device was done"
                return float(end.at - self.at)

        self.Event = Event

    def get_device_name(self, device: torch.device) -> str:
        return "Fake"

    def get_device_properties(self, device: torch.device) -> Any:
        return type("Properties", (), {"L2_cache_size": 1000})

    def synchronize(self, device: torch.device) -> None:
        self.synchronized += 1

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def memory_allocated(self, device: torch.device) -> int:
        return 2 * measure.MIB

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        pass

    def max_memory_allocated(self, device: torch.device) -> int:
        return 5 * measure.MIB


def test_gpu_clock_dry_run() -> None:
    gpu = FakeGpu()
    clock = measure.GpuClock(CPU, gpu)
    calls: list[int] = []
    spreads = measure.alternate(
        {"a": lambda: calls.append(0), "b": lambda: calls.append(1)},
        clock,
        measure.Budget(rounds=2, seconds=0.0),
    )
    # Warm-up of each, then turns of several steps.
    turn = clock.turn
    warm = [0] * measure.WARM_UP + [1] * measure.WARM_UP
    assert calls == warm + ([0] * turn + [1] * turn) * 2
    assert spreads["a"].rounds == 2 * turn and spreads["a"].median > 0
    assert clock.time(lambda: None, 1) == [2 * gpu.recorded - 1]
    # Inputs rotate until they fill the cache three times over; a large set needs no other.
    assert clock.copies(100) == 31 and clock.copies(10_000) == 1
    assert clock.peak_mib(lambda: None) == 3.0

    def waits() -> None:
        import warnings

        assert gpu.mode == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    assert clock.reads(waits) == 1
    assert gpu.mode == "default"


def test_rotated_inputs_are_other_memory() -> None:
    (case,) = (case for case in cases.op_cases() if case.name == "l1")
    task = providers.op_task(case, 1, CPU)
    trees = task.copies(3)
    first = [tree["inputs"][0] for tree in trees]
    assert len({x.data_ptr() for x in first}) == 3
    assert all(x.requires_grad and x.is_leaf for x in first)


def test_head_of_a_report_names_no_user() -> None:
    head = machine.describe(CPU, measure.Clock())
    assert head["commit"] is None or len(head["commit"].partition("+")[0]) == 12
    assert "/" not in json.dumps(head)


def readme() -> Any:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "bench/readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_readmes_show_the_results_and_nothing_else(name: str) -> None:
    """Figures come from the reports alone: run `python bench/readme.py` after a new one."""
    assert readme().written(ROOT, name) == (ROOT / name).read_text(encoding="utf-8")


def test_tables_made_by_hand(written: Path) -> None:
    """What no run of the bench measures stands in a report with a word on how it was found."""
    found = report.read(written / "bench.json") | {"rows": [], "method": "By hand."}
    found["machine"]["device"] = "cuda"
    table = {"kind": "op", "title": "Assignment", "how": "In ms.", "columns": ["of", "ours", "x"]}
    found["tables"] = [table | {"rows": [["20 x 300", 0.124, None], ["300 x 20", 1076, 2.5]]}]
    text = report.results([found])
    assert text.endswith(
        """By hand.

Assignment. In ms.

| of | ours | x |
|---|---:|---:|
| 20 x 300 | 0.124 | - |
| 300 x 20 | 1076 | 2.5 |"""
    )
    assert "Assignment" not in report.results([found], ("criterion",))


def test_every_table_made_by_hand_is_shown_and_says_how() -> None:
    for path in ROOT.glob("bench/results/*/bench.json"):
        found = report.read(path)
        tables = found.get("tables", [])
        assert ("method" in found) == bool(tables)
        for table in tables:
            assert table["how"] and table["kind"] in readme().KINDS["bench/README.md"]
            assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_markdown_of_a_report(written: Path) -> None:
    found = report.read(written / "bench.json")
    text = report.results([found])
    assert "| smooth_l1 | SSD300 VGG16, 300 px, 80 classes, batch 1 |" in text
    assert "a quick run" in text and report.NO_GPU in text
    found["machine"]["device"] = "cuda"
    assert report.NO_GPU not in report.results([found])
    with pytest.raises(ValueError, match="marks"):
        report.placed("no marks", "results", text)
