"""
The Dockerfile, read; and built and run where ENGINE_FOR_TESTS names docker or podman:

    ENGINE_FOR_TESTS=docker python -m pytest tests/scripts/test_docker.py -n 0 -m slow      minutes; BASE_IMAGE counts
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENGINE = os.environ.get("ENGINE_FOR_TESTS", "")


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, without comments and line breaks; the last stage, without a name, as ""."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    name = "before"
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            name = rest.partition(" AS ")[2]
        if word:
            found.setdefault(name, []).append((word, rest))
    return found


STAGES = stages()
IMAGES = ("train", "predict", "run", "")


def ancestors(stage: str) -> list[str]:
    """A stage and those that it is made from."""
    base = STAGES[stage][0][1].split()[0]
    return [stage, *(ancestors(base) if base in STAGES else [])]


def last(stage: str, word: str) -> str:
    """The argument of an instruction that counts for a stage, its own or inherited."""
    found = [rest for name in reversed(ancestors(stage)) for one, rest in STAGES[name] if one == word]
    return found[-1] if found else ""


def installed(stage: str) -> set[str]:
    """What pip installs by name in a stage and before it."""
    names: set[str] = set()
    for name in ancestors(stage):
        commands = " ".join(rest for word, rest in STAGES[name] if word == "RUN")
        for arguments in re.findall(r"install (--[^&;]*)", commands):
            names |= {word for word in arguments.split() if re.fullmatch(r"[a-z][a-z-]+", word)}
    return names


def test_every_image_runs_as_nobody_special():
    for stage in IMAGES:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(stage, "USER")), stage


def test_the_image_without_a_target_predicts():
    assert last("", "ENTRYPOINT") == last("predict", "ENTRYPOINT") == '["python", "run_prediction.py"]'
    assert last("train", "ENTRYPOINT") == '["python", "train.py"]'


def test_python_is_slim_and_torch_without_cuda_unless_asked_for():
    assert ("ARG", "BASE_IMAGE=python:3.12-slim") in STAGES["before"]
    assert ("ARG", "TORCH=cpu") in STAGES["predict-packages"]


def test_all_that_pip_installs_is_constrained_and_leaves_no_cache():
    commands = [
        one for one in re.findall(r"pip [^&;]*", re.sub(r"\s*\\\n\s*", " ", DOCKERFILE)) if " install " in one
    ]
    assert len(commands) == 3
    for command in commands:
        assert "--no-cache-dir" in command
        assert "--constraint constraints.txt" in command
    assert "rm -rf /var/lib/apt/lists/*" in DOCKERFILE


def test_nothing_secret_is_given_to_a_build():
    for word, rest in (one for stage in STAGES.values() for one in stage):
        assert not (word in ("ARG", "ENV") and re.search(r"(?i)token|secret|passw|key|credential", rest)), (
            rest
        )
        assert not (word in ("COPY", "ADD") and rest.split()[0] in (".", "./")), "copies all there is"


def imports_of_prediction() -> set[str]:
    """What run_prediction.py imports, also later and by way of the project's modules, without the training routines."""
    todo, seen, found = [ROOT / "run_prediction.py"], set(), set()
    while todo:
        file = todo.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        package = file.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
                module = ".".join(filter(None, (parent, node.module)))
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.startswith("dida_tools"):
                    path = ROOT / name.replace(".", "/")
                    todo += [path.with_suffix(".py"), path / "__init__.py"]
                    todo += [
                        above / "__init__.py"
                        for above in path.parents
                        if above.is_relative_to(ROOT / "dida_tools")
                    ]
                elif (ROOT / f"{name.partition('.')[0]}.py").is_file():
                    todo.append(ROOT / f"{name.partition('.')[0]}.py")
                elif name.partition(".")[0] not in sys.stdlib_module_names:
                    found.add({"PIL": "pillow"}.get(name.partition(".")[0], name.partition(".")[0]))
    return found


def test_each_image_has_what_is_imported_in_it():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert installed("predict-packages") == imports_of_prediction() - {
        "pandas"
    }  # read_frame works where it is there
    assert installed("train-packages") == {re.match(r"[a-z]+", one)[0] for one in dependencies}


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern of .dockerignore fits a path or a folder that it is in."""
    expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.fullmatch(f"{expression}(/.*)?", path) is not None


def is_sent(path: str) -> bool:
    """Whether a file is sent to the build: the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and matches(line.removeprefix("!"), path):
            sent = line.startswith("!")
    return sent


SENT = [
    "LICENSE", "constraints.txt", "pyproject.toml", "train.py", "run_prediction.py", "my_script.py",
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("dida_tools/**/*.py")),
    "weights/2026-01-02_some.run/best.pt", "logs/2026-01-02_some.run/config.json",
]  # fmt: skip
NOT_SENT = [
    ".git/config", ".env", ".venv/bin/python", ".netrc", "id_rsa", "secrets.json", "data/train/x/a.npy",
    "predictions/a.npy", "dida_tools/__pycache__/a.pyc", "dida_tools/models/__pycache__/a.pyc",
    "dida_tools/models/.env", "tests/conftest.py", "Dockerfile", "README.md",
    "weights/2026-01-02_some.run/last-00000004.pt", "logs/2026-01-02_some.run/journal.jsonl",
    "logs/2026-01-02_some.run/tensorboard/events", "logs/2026-01-02_some.run/environment.json",
]  # fmt: skip


def test_the_build_gets_the_code_and_nothing_else():
    assert [path for path in SENT if not is_sent(path)] == []
    assert [path for path in NOT_SENT if is_sent(path)] == []


def test_all_that_is_copied_is_sent():
    for stage in STAGES.values():
        for word, rest in stage:
            if word == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    example = source.replace("${RUN}", "a.run").replace("*", "a")
                    assert is_sent(
                        example if "." in example or example == "LICENSE" else f"{example}/a.py"
                    ), source


needs_engine = pytest.mark.skipif(
    shutil.which(ENGINE or "docker") is None or not ENGINE,
    reason="ENGINE_FOR_TESTS names no docker or podman: images are not built",
)


def engine(*arguments: object) -> str:
    return subprocess.run(
        [ENGINE, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.mark.slow
@needs_engine
def test_the_engine_sends_what_dockerignore_says(tmp_path):
    for path in SENT + NOT_SENT:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    (tmp_path / "Dockerfile").write_text(
        "ARG BASE_IMAGE=python:3.12-slim\nFROM ${BASE_IMAGE}\nCOPY . /context\nENTRYPOINT find /context -type f\n"
    )
    base = ["--build-arg", f"BASE_IMAGE={os.environ['BASE_IMAGE']}"] if "BASE_IMAGE" in os.environ else []
    engine("build", *base, "--tag", "dida-tools:context-of-test", tmp_path)
    try:
        sent = engine("run", "--rm", "--network", "none", "dida-tools:context-of-test").split()
        assert {path.removeprefix("/context/") for path in sent} - {"Dockerfile", ".dockerignore"} == set(
            SENT
        )
    finally:
        engine("rmi", "dida-tools:context-of-test")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with images for prediction and training."""
    folder = tmp_path_factory.mktemp("docker") / "project"
    unwanted = shutil.ignore_patterns(".git", ".venv", ".*_cache", "data", "logs", "weights", "predictions")
    shutil.copytree(ROOT, folder, ignore=lambda at, names: unwanted(at, names) if Path(at) == ROOT else set())
    make(folder, "docker-build")
    return folder


def make(folder: Path, *arguments: str) -> None:
    command = ["make", *arguments, f"DOCKER={ENGINE}", "IMAGE=dida-tools-test", "TORCH=cpu"]
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
@needs_engine
@pytest.mark.timeout(3600)
def test_a_run_trained_in_an_image_predicts_in_an_image_of_its_own(project):
    quick = (
        "EPOCHS=1 MODEL_CONFIG.bulk_ch=8 MODEL_CONFIG.n_recursions=1 DATASET_CONFIG.train.crops_per_image=1"
    )
    make(project, "docker-run", f"ARGS={quick}")
    [weights] = (project / "weights").glob("*/best.pt")
    assert weights.stat().st_uid == os.getuid()
    name = weights.parent.name
    make(project, "docker-build", f"RUN={name}")
    shutil.rmtree(project / "weights")
    shutil.rmtree(project / "logs")
    [images] = (project / "data").glob("*/test/x")
    make(project, "docker-run", f"RUN={name}", f"ARGS=-i {images.relative_to(project)} -o predictions")
    for image in images.iterdir():
        prediction = np.load(project / "predictions" / image.name)
        assert prediction.shape == np.load(image, mmap_mode="r").shape[:2]
        assert prediction.max() < 5
    user = engine("run", "--rm", "--entrypoint", "id", f"dida-tools-test:{name}", "-u")
    assert user.strip() == "1000"
