"""LightningCLI: every callback from YAML with plain types, as the recipes have them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml

from examples import cli
from lightning_compress import (
    Annealing,
    Archive,
    Factorize,
    FeatureDistillation,
    KnowledgeDistillation,
    LogitDistillation,
    MagnitudePruning,
    OnnxExport,
    QuantizationAwareTraining,
    WeightClustering,
    load_compressed,
)
from tests.compatibility.runs import LIGHTNING_NOISE
from tests.compatibility.table import works

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "examples" / "recipes").glob("*.yaml"))

pytestmark = [pytest.mark.filterwarnings(*LIGHTNING_NOISE), pytest.mark.filterwarnings("ignore:.*LeafSpec")]


def small(recipe: str, folder: Path) -> Path:
    """Write the recipe with few images of scikit-learn's digits and fewer epochs; return the file."""

    def shrink(node: Any) -> Any:
        if isinstance(node, list):
            return [shrink(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: shrink(value) for key, value in node.items()}
        if "n_train" in node:
            node.update(n_train=300, batch_size=30, source="digits")
        if "checkpoint" in node:
            node.update(max_epochs=1, width=8)
        if "max_epochs" in node:
            node["max_epochs"] = min(node["max_epochs"], 3)
        return node

    config = shrink(yaml.safe_load((ROOT / "examples" / "recipes" / f"{recipe}.yaml").read_text()))
    path = folder / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own
    monkeypatch.setattr(sys, "argv", ["cli.py", *arguments])
    cli.main()


def int8_kernels(path: Path) -> int:
    weights = onnx.load(path).graph.initializer
    return sum(weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 4 for weight in weights)


@works("LightningCLI", "every callback from YAML, with plain types", "`examples/recipes`")
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name in ("distill", "prune", "quantize")])
def test_a_recipe_leaves_a_file(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "fit", "-c", str(small(recipe, tmp_path)))
    file = tmp_path / "demo_output" / recipe / "model.onnx"
    assert int8_kernels(file) == (9 if recipe == "quantize" else 0)
    assert (tmp_path / "demo_output" / "teacher.pt").exists() == (recipe == "distill")


def test_the_recipe_that_stores_leaves_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "fit", "-c", str(small("store", tmp_path)))
    weights = load_compressed(tmp_path / "demo_output" / "store" / "model.lcz")
    kernels = [weight for weight in weights.values() if weight.dim() == 4]
    assert len(kernels) == 9
    assert max(int(torch.unique(weight).numel()) for weight in kernels) <= 17


def test_the_binary_recipe_leaves_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "fit", "-c", str(small("binary", tmp_path)))
    weights = load_compressed(tmp_path / "demo_output" / "binary" / "model.lcz")
    kernels = [weight for weight in weights.values() if weight.dim() == 4]
    magnitudes = [kernel.abs().flatten(1) for kernel in kernels]
    assert sum(torch.equal(rows.amin(1), rows.amax(1)) for rows in magnitudes) == 8  # all but the first
    assert (tmp_path / "demo_output" / "binary" / "model.onnx").exists()


def test_the_recipe_in_frequencies_leaves_their_coefficients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "fit", "-c", str(small("frequencies", tmp_path)))
    table = json.loads((tmp_path / "demo_output" / "frequencies" / "model.lcz.json").read_text())
    forms = [tensor["form"] for tensor in table["tensors"] if len(tensor["shape"]) == 4]
    assert sum(form.endswith("frequencies") for form in forms) >= 7


def test_the_recipe_with_everything_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "cli.py"), "fit", "-c", str(small("all", tmp_path))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "teacher: epoch 1/1" in done.stdout
    assert "sparsity                  80.0 %" in done.stdout
    assert int8_kernels(tmp_path / "demo_output" / "all" / "model.onnx") == 9


@works(
    "LightningCLI",
    "lists of losses by class path, weights that change over the run",
    "the student as its own teacher too",
)
def test_losses_and_teachers_are_given_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(small("distill", tmp_path).read_text())
    (distillation,) = (item for item in config["trainer"]["callbacks"] if "Distillation" in item["class_path"])
    distillation["init_args"] = {
        "teacher": "self",
        "losses": [
            {
                "class_path": "lightning_compress.LogitDistillation",
                "init_args": {"temperature": 2.0, "weight": {"initial": 0.0, "final": 0.7, "end": 0.5}},
            },
            {"class_path": "lightning_compress.FeatureDistillation", "init_args": {"layers": ["network.blocks.2"]}},
        ],
    }
    path = tmp_path / "losses.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    seen: list[KnowledgeDistillation] = []
    monkeypatch.setattr(KnowledgeDistillation, "on_fit_end", lambda self, *_: seen.append(self), raising=False)
    run(monkeypatch, "fit", "-c", str(path))
    assert seen[0].losses == (
        LogitDistillation(temperature=2.0, weight=Annealing(0.0, 0.7, end=0.5)),
        FeatureDistillation(layers=["network.blocks.2"]),
    )
    assert (tmp_path / "demo_output" / "distill" / "model.onnx").exists()


def test_the_recipes_are_those_of_the_readme() -> None:
    assert RECIPES == ["all", "binary", "distill", "factorize", "frequencies", "prune", "quantize", "store"]


@works("LightningCLI", "`--print_config=comments`", "tells what every argument means")
@pytest.mark.parametrize(
    "kind",
    [
        KnowledgeDistillation,
        MagnitudePruning,
        QuantizationAwareTraining,
        WeightClustering,
        Factorize,
        OnnxExport,
        Archive,
    ],
)
def test_the_printed_configuration_explains_every_argument(
    kind: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {WeightClustering: "store.yaml", Archive: "store.yaml", Factorize: "factorize.yaml"}.get(kind, "all.yaml")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "fit", "-c", str(ROOT / "examples" / "recipes" / recipe), "--print_config=comments")
    assert caught.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    titles = [number for number, line in enumerate(printed) if "class_path: lightning_compress." in line]
    begin = next(number for number in titles if printed[number].endswith(f".{kind.__name__}"))
    own = printed[begin : min((number for number in titles if number > begin), default=len(printed))]
    for name in list(inspect.signature(kind).parameters):
        line = next(number for number, text in enumerate(own) if text.strip().startswith(f"{name}:"))
        assert own[line - 1].strip().startswith("#"), name


def test_whole_numbers_in_yaml_stay_optimizer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small("prune", tmp_path)
    config = yaml.safe_load(path.read_text())
    pruning = next(item for item in config["trainer"]["callbacks"] if item["class_path"].endswith("MagnitudePruning"))
    pruning["init_args"].update(start=2, end=20)
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        run(monkeypatch, "fit", "-c", str(path), "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    found = next(item for item in printed["trainer"]["callbacks"] if item["class_path"].endswith("MagnitudePruning"))
    assert (found["init_args"]["start"], found["init_args"]["end"]) == (2, 20)
    assert isinstance(found["init_args"]["start"], int)


def test_ranks_in_yaml_stay_numbers_or_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small("factorize", tmp_path)
    config = yaml.safe_load(path.read_text())
    factors = next(item for item in config["trainer"]["callbacks"] if item["class_path"].endswith("Factorize"))
    factors["init_args"].update(rank=8, overrides={"network.blocks.1": 0.5, "network.blocks.2": 4})
    path.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    seen: list[Factorize] = []
    monkeypatch.setattr(Factorize, "on_fit_end", lambda self, *_: seen.append(self), raising=False)
    run(monkeypatch, "fit", "-c", str(path), "--trainer.fast_dev_run=true")
    ranks = {name.removeprefix("network.blocks."): rank for name, (_, rank) in seen[0].ranks.items()}
    assert (ranks["0.conv1"], ranks["1.conv1"], ranks["2.conv1"]) == (8, 16, 4)


def test_a_trained_teacher_is_read_again(tmp_path: Path) -> None:
    data = cli.SmallImages("digits", n_train=100, batch_size=20)
    first = cli.trained_teacher(str(tmp_path / "teacher.pt"), data, width=8, max_epochs=1)
    again = cli.trained_teacher(str(tmp_path / "teacher.pt"), data, width=8, max_epochs=1)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
