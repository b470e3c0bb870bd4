"""The benchmark at its smallest: gates that refuse, results that grow, tables and charts of what was measured."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import gate, harness, models, op_runs, ops, readme, trainer_loop
from bench.__main__ import app, main
from petune_kernels import cuda_graph
from petune_kernels.studies.errors import InputError, StudyError
from petune_kernels.studies.result import Files
from tests.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
CPU, QUIET = torch.device("cpu"), Console(quiet=True)
TINY = op_runs.Settings(("tiny",), ("float32",), (), 2, 8, "cpu", rounds=2, rotate=1)
CEILING = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": 1e10}
NORM, DROPOUT = (next(case for case in ops.CASES if case.op == op) for op in ("residual_norm", "dropout"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ops.CASES, ids=lambda case: f"{case.op} {case.use}")
def test_every_op_passes_its_gate_and_has_a_time(case: ops.OpCase, dtype: str) -> None:
    row = op_runs.measure_op(case, 64, dtype, TINY, CEILING)
    assert harness.OURS not in row["refused"], row["refused"]
    floor = set() if case.matmuls is None else {harness.MATMULS}
    assert row["gate"][harness.OURS]["p"] == case.p and set(row["seconds"]) == {harness.EAGER, harness.OURS} | floor
    assert set(row["refused"]) == set(case.peers)  # without a GPU none of them runs, and each says so
    assert row["speedup"][harness.OURS] == row["petune_over"][harness.EAGER]


@pytest.mark.parametrize(
    "broken",
    [
        lambda t, p, seed: 1.001 * NORM.ours(t, p, seed),
        lambda t, p, seed: NORM.ours({**t, "beta": t["beta"].detach() + 0 * t["beta"]}, p, seed),
        lambda t, p, seed: NORM.ours(t, p, seed) * float("nan"),
        lambda t, p, seed: (_ for _ in ()).throw(RuntimeError("no kernel")),
    ],
    ids=["output", "gradient", "nan", "error"],
)
def test_a_wrong_provider_gets_no_time(broken) -> None:
    row = op_runs.measure_op(dataclasses.replace(NORM, ours=broken), 64, "float32", TINY, CEILING)
    assert harness.OURS in row["refused"] and harness.OURS not in row["seconds"]
    json.dumps(row, allow_nan=False)


def test_the_gate_of_dropout_knows_the_mask_of_a_seed() -> None:
    other = dataclasses.replace(DROPOUT, ours=lambda t, p, seed: DROPOUT.ours(t, p, seed + 1))
    row = harness.new_row({})
    letters = ops.sizes(2, 8, 64, torch.float32)
    op_runs.check_op(other, {harness.EAGER: lambda t, p, seed: other.eagerly(t, p), harness.OURS: other.ours}, letters,
                     torch.float32, CPU, row)  # fmt: skip
    assert "wrong" in row["refused"][harness.OURS]


def test_shares_of_the_floor_by_hand() -> None:
    letters, seconds = ops.sizes(10, 10, 64, torch.float32), {"petune": {"median": 1e-3}, harness.MATMULS: None}

    def shares(moved: str, flops: str) -> dict:
        row = {"seconds": seconds}
        op_runs.amounts(row, moved, flops, letters)
        return op_runs.shares(row, CEILING)

    found = shares(NORM.bytes, NORM.flops)
    assert found["floor_seconds"] == pytest.approx(5 * 100 * 64 * 4 / 1e9)
    assert found["share_of_floor"] == found["share_of_copy"] == {"petune": pytest.approx(0.128)}
    assert found["rate"] == {"petune": "0.128 GB/s"}
    found = shares(NORM.bytes, "1000*T*H*s")
    assert found["share_of_floor"]["petune"] == pytest.approx(2.56) and found["rate"]["petune"] == "0.0256 TFLOP/s"
    assert found["share_of_copy"]["petune"] == pytest.approx(0.128)


def test_ceilings_are_of_one_copy_and_one_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BYTES", 4000), ("WIDTH", 10), ("CALLS", 10)):
        monkeypatch.setitem(getattr(op_runs, f"CEILING_{name}"), "cpu", value)
    monkeypatch.setattr(
        op_runs.measure, "interleave", lambda runs, *_: {name: [2.0] for name in runs if not runs[name]()}
    )
    found = op_runs.ceilings(CPU, torch.float32)  # ten in two seconds
    assert found == {"copy_bytes_per_second": 40_000.0, "matmul_flops_per_second": 10_000.0}


@pytest.mark.parametrize("case", ops.CASES, ids=lambda case: f"{case.op} {case.use}")
def test_backward_is_part_of_what_a_case_costs(case: ops.OpCase) -> None:
    """Forward reads every input and writes every output once; the rest of the formula is backward's."""
    letters = ops.sizes(2, 8, 64, torch.bfloat16)
    t = ops.inputs(case, letters, torch.bfloat16, CPU, seed=0)
    large = [t[name] for name, shape in case.shapes.items() if " " in shape and not {"r", "R"} & set(shape.split())]
    large += [out for out in gate.outputs(case.ours(t, 0.0, None)) if out.shape[0] > 1]  # no vectors, no factors
    forward = 2 * sum(x.numel() for x in large)
    whole, back = ops.evaluate(case.bytes, letters), ops.evaluate(case.back_bytes or "0", letters)
    assert whole - back == forward and bool(case.back_bytes) == any(x.requires_grad for x in t.values())
    assert 0 <= ops.evaluate(case.back_flops, letters) <= ops.evaluate(case.flops, letters)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    settings = models.Settings(
        regimes=("layernorm", "lora-qv p=0.1"), dtypes=("bfloat16",), batch=2, length=8, rounds=2, layers=3
    )
    return models.run(settings, Files.new(folder, "models"), QUIET) | {"folder": folder}


def test_whole_steps_are_gated_timed_and_written(step: dict) -> None:
    (path,) = step["folder"].glob("*.json")
    written = {name: value for name, value in step.items() if name != "folder"}
    assert json.loads(path.read_text()) == json.loads(json.dumps(written))
    assert step["complete"] and len(step["rows"]) == 2
    for row in step["rows"]:
        assert row["gate"]["petune"]["compared"] > 10 and row["targets"] == []
        assert row["gate"]["petune"]["training"]["moved"] > 0.01  # dropout is on
        saved = row["saved_bytes_per_token_per_layer"]
        assert saved["petune"] < saved["eager"]
    assert path.with_suffix(".png").stat().st_size > 10_000
    with path.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == ["eager", "petune"] * 2
    assert float(lines[1]["median"]) == step["rows"][0]["seconds"]["petune"]["median"]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(harness.table(step))
    assert "B/token/layer" in console.export_text()


def test_captured_layers_and_steps_are_timed_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a recorder of CPU ops."""
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    settings = models.Settings(
        regimes=("layernorm",), dtypes=("float32",), batch=2, length=32, rounds=2, layers=1, saved=False, graphs=True
    )
    (row,) = models.run(settings, Files.new(tmp_path, "models"), QUIET)["rows"]
    assert list(row["seconds"]) == [harness.EAGER, harness.OURS, models.GRAPHED, models.WHOLE] and not row["refused"]
    ours = row["losses"][harness.OURS]
    assert row["losses"][models.GRAPHED] == pytest.approx(ours, rel=1e-4)
    assert row["losses"][models.WHOLE] == pytest.approx(ours, rel=1e-4)
    assert re.search("1 of .* 36 calls replayed", row["graphs"]["bert.encoder"])  # 32 of them the gate's


def test_a_wrong_model_gets_no_time_and_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build

    def wrong(case, provider, *args):
        model = build(case, provider, *args)
        if provider == harness.OURS:
            next(p for p in model.parameters() if p.requires_grad).data.mul_(1.5)
        return model

    monkeypatch.setattr(models, "build", wrong)
    settings = models.Settings(
        regimes=("layernorm",), dtypes=("float32",), batch=2, length=8, rounds=2, layers=1, saved=False
    )
    with pytest.raises(StudyError, match="petune has no time in 1 cases"):
        models.run(settings, Files.new(tmp_path, "models"), QUIET)
    (path,) = tmp_path.glob("*.json")
    assert "wrong" in json.loads(path.read_text())["rows"][0]["refused"]["petune"]


def test_the_gate_sees_attention_that_is_uniform() -> None:
    case = models.Case("minilm", "layernorm", "bfloat16", 2, 32)
    stock, other = (models.build(case, harness.EAGER, CPU, 1) for _ in range(2))
    other.bert.encoder.layer[0].attention.self.scaling = 0.0
    assert "wrong: " in models.gate(stock, other, models.random_batch(case, CPU))[1]


@pytest.mark.parametrize("fault", ["without dropout", "another rate", "only on four rows"])
def test_the_gate_sees_training_mode_at_the_timed_size(fault: str) -> None:
    case = models.Case("minilm", "layernorm", "float32", 8, 32)
    batch = models.random_batch(case, CPU)
    built = {name: models.build(case, name, CPU, 1) for name in (harness.EAGER, harness.OURS, "peer")}
    for module in built["peer"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = {"without dropout": 0.0, "another rate": 0.4}.get(fault, module.p)
    if fault == "only on four rows":
        built["peer"].classifier.register_forward_hook(lambda module, args, made: 3 * made if len(made) > 4 else None)
    row = harness.new_row({})
    models.judge(built, batch, row)
    assert list(built) == [harness.EAGER, harness.OURS] and "wrong: in training" in row["refused"]["peer"]


def test_a_provider_that_raises_costs_no_other_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, warmed = models.build, []

    def runs_in_evaluation_only(model, args):
        warmed.append(1 / (not model.training))

    def breaks(case, provider, *args):
        if provider == models.WHOLE:
            raise RuntimeError("cannot be built")
        model = build(case, provider, *args)
        if provider == models.GRAPHED:
            model.register_forward_pre_hook(runs_in_evaluation_only)
        return model

    monkeypatch.setattr(models, "build", breaks)
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)
    settings = models.Settings(
        regimes=("layernorm",), dtypes=("float32",), batch=2, length=8, rounds=2, layers=1, saved=False, graphs=True
    )
    (row,) = models.run(settings, Files.new(tmp_path, "models"), QUIET)["rows"]
    assert list(row["seconds"]) == [harness.EAGER, harness.OURS] and warmed
    assert row["refused"] == {
        models.WHOLE: "RuntimeError: cannot be built", models.GRAPHED: "ZeroDivisionError: division by zero"
    }  # fmt: skip


def test_a_peer_is_compiled_for_the_shape_that_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for the gate's shape first, torch would take every size for one that varies. What was timed before
    compiling is on disk by then."""
    asked, (files, on_disk) = [], (Files.new(tmp_path, "models"), [])

    def compile(module, **options):
        asked.append(options)
        on_disk.append(list(json.loads(files.json.read_text())["rows"][0]["seconds"]))

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    settings = models.Settings(
        regimes=("layernorm",), dtypes=("float32",), batch=2, length=8, rounds=2, layers=1, saved=False,
        compile=("default", "reduce-overhead"),
    )  # fmt: skip
    (row,) = models.run(settings, files, QUIET)["rows"]
    assert list(row["seconds"]) == ["eager", "petune", "torch.compile", "torch.compile, reduce-overhead"]
    assert asked == [{"dynamic": False, "mode": "default"}, {"dynamic": False, "mode": "reduce-overhead"}]
    assert on_disk == [["eager", "petune"]] * 2


@pytest.mark.parametrize("stage", ("compile", "trainer"))
def test_what_fails_later_costs_no_time_that_is_there(stage: str, tmp_path: Path, monkeypatch) -> None:
    def fails(*args, **options):
        raise RuntimeError("later")

    if stage == "trainer":
        monkeypatch.setattr(trainer_loop, "times", fails)
    else:  # in the turns, where no provider is to blame
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda module, **_: monkeypatch.setattr(harness, "turns", fails)
        )
    settings = models.Settings(
        regimes=("layernorm",), dtypes=("float32",), batch=2, length=8, rounds=2, layers=1, saved=False,
        compile=("default",) if stage == "compile" else (), trainer=2 if stage == "trainer" else 0,
    )  # fmt: skip
    (row,) = models.run(settings, Files.new(tmp_path, "models"), QUIET)["rows"]
    assert list(row["seconds"]) == ["eager", "petune"] and row["speedup"]["petune"]
    assert row["refused"] == {"torch.compile" if stage == "compile" else "trainer": "RuntimeError: later"}


def test_all_parts_of_a_gpu_file_are_shown(step: dict, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    part = {name: value for name, value in step.items() if name != "folder"}
    share = {"share_of_floor": {"petune": 0.875}}
    graph = {"seconds": {"petune": {"median": 0.002}}, "share_of_floor": {"petune": 0.95}}
    row = part["rows"][0] | share | {"backward": share, "graph": graph}
    cut = part | {"rows": [row, harness.new_row({"n": 1})], "complete": False, "command": "python -m bench other"}
    (tmp_path / "bench" / "results" / "2026-01-01-gpu_02.json").write_text(json.dumps({"parts": [part, cut]}))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    shown = readme.render_bench()
    assert shown.count("| case | eager | petune |") == 2 and shown.count("Cut short by its time limit.") == 1
    titles = ("CUDA graph", "CUDA graph, share of floor", "share of floor", "backward alone, share")
    assert f"| {' | '.join(f'petune, {title}' for title in titles)} |" in shown
    assert shown.count("| 2 | 95 % | 88 % | 88 % |") == 1 and shown.count("Only backward alone has a cold floor") == 1


def test_steps_inside_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_loop, "TURNS", {"cpu": 2})
    settings = models.Settings(
        regimes=("layernorm",), dtypes=("float32",), batch=2, length=8, rounds=2, layers=1, saved=False, trainer=2
    )
    found = models.run(settings, Files.new(tmp_path, "models"), QUIET)
    (row,) = found["rows"]
    assert set(row["trainer"]["seconds"]) == {"eager", "petune"} and row["trainer"]["speedup"]["petune"]["n"] == 2
    assert "in Trainer" in harness._also(row, "petune") and not row["refused"]


def test_targets_hold_where_they_were_set_and_say_what_is_missing() -> None:
    case, settings = models.Case("minilm", "bitfit", "bfloat16", 16, 128), models.Settings()
    row = {"petune_over": {"eager": {"median": 1.5}}, "speedup": {}}
    (found,) = models.targets(case, settings, row)
    assert found["target"] == 1.9 and found["short_by"] == pytest.approx(0.4) and found["of"] == "petune"
    assert models.targets(dataclasses.replace(case, length=64), settings, row) == []


def test_targets_on_a_gpu() -> None:
    settings = models.Settings(device="cuda")
    row = {
        "petune_over": {"eager": {"median": 2.0}, "torch.compile, reduce-overhead": {"median": 1.1}},
        "speedup": {models.GRAPHED: {"median": 3.0}}, "trainer": {"speedup": {"petune": {"median": 1.6}}},
    }  # fmt: skip
    large = models.targets(models.Case("roberta-large", "layernorm", "bfloat16", 32, 512), settings, row)
    assert [(t["over"], round(t["short_by"], 2)) for t in large] == [
        ("eager", -0.5), ("torch.compile, reduce-overhead", 0.05)
    ]  # fmt: skip
    small = models.targets(models.Case("bert-base", "layernorm", "bfloat16", 16, 128), settings, row)
    assert [(t["of"], round(t["short_by"], 2)) for t in small] == [("petune", -0.1), (models.GRAPHED, 1.0)]


def test_a_result_is_on_disk_after_every_case_and_never_half(tmp_path: Path) -> None:
    result = harness.Result(Files.new(tmp_path, "ops"), "ops", {}, CPU)
    row = harness.new_row({"n": 1})
    result.add(row)
    result.data["settings"]["n"] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        result.add(row)
    found = json.loads(result.files.json.read_text())
    assert found["rows"] == [row] and not found["complete"]
    assert main("collect", str(tmp_path), str(tmp_path / "all.json")) == 0
    assert json.loads((tmp_path / "all.json").read_text())["parts"] == [found]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--regime", "lora"], "--regime is 'lora'; accepted are layernorm"),
        (["models", "--shape", "bert"], "--shape is 'bert'"),
        (["models", "--length", "1024"], "--length is 1024, but minilm has 512 positions"),
        (["layers", "--shape", "roberta-large", "--length", "513"], "but roberta-large has 512 positions"),
        (["packed", "--length", "1024"], "--length is 1024, but minilm has 512 positions"),
        (["memory", "--length", "1024"], "--length is 1024, but bert-base has 512 positions"),
        (["ops", "--op", "norm"], "--op is 'norm'; accepted are residual_norm"),
        (["ops", "--dtype", "float16"], "--dtype is 'float16'"),
        (["layers", "--device", "tpu"], "--device is 'tpu'"),
        (["layers", "--compile-mode", "fast"], "--compile-mode is 'fast'; accepted are default, reduce-overhead"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, tmp_path: Path, capsys) -> None:
    assert main(*arguments, "--out", str(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_readme_tables_come_from_results_and_need_their_place(step: dict, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    result = {name: value for name, value in step.items() if name != "folder"}
    file = tmp_path / "bench" / "results" / "2026-01-01-bench-models.json"
    file.write_text(json.dumps(result))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    shown = readme.render_bench()
    assert "| case | eager | petune | petune over eager |" in shown and shown.count("| minilm ") == 2
    file.write_text(json.dumps(result | {"complete": False}))
    assert readme.render_bench() == ""
    assert readme.replaced("a <!-- x:begin -->old<!-- x:end --> b", "x", "new\n") == (
        "a <!-- x:begin -->\nnew\n<!-- x:end --> b"
    )
    with pytest.raises(SystemExit, match="0 places"):
        readme.replaced("nothing", "bench", shown)


def test_plain_pytest_does_not_collect_the_benchmark_and_the_gpu_script_parses() -> None:
    assert re.search(r'^testpaths = \["tests"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    script = (ROOT / "bench" / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")]).returncode == 0
    commands = re.findall(r'"\$\{BENCH\[@\]\}" ((?:.|\\\n)*?) "\$\{COMMON', script)
    assert len(commands) >= 7
    for command in commands:  # the options exist and are of the right type: the bad device is what is refused
        arguments = shlex.split(command.replace("\\\n", " "))
        done = CliRunner().invoke(app, [*arguments, "--device", "none"])
        assert isinstance(done.exception, InputError) and "--device is 'none'" in str(done.exception), command


def test_names_are_checked() -> None:
    with pytest.raises(InputError, match="accepted are a, b"):
        harness.check_names("--x", ["c"], ["a", "b"])
