"""
The Dockerfile, read; built and run where ENGINE_FOR_TESTS names docker or podman (minutes; see BASE_IMAGE):

    ENGINE_FOR_TESTS=docker python -m pytest tests_core/scripts/test_docker.py -n 0 -m slow
"""

import os
import re
import shutil
import subprocess
import tomllib

import numpy as np
import pytest

from tests.helpers import ROOT
from tests_core.scripts.projects import imports_of, make_template

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENGINE = os.environ.get("ENGINE_FOR_TESTS", "")
PACKAGES = ("dida_tools", "dida_core")
SECRET = r"(?i)token|secret|passw|key|credential"


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, without comments and line breaks; the last stage has the name ""."""
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
    commands = [rest for name in ancestors(stage) for word, rest in STAGES[name] if word == "RUN"]
    arguments = re.findall(r"install (--[^&;]*)", "; ".join(commands))
    return {word for one in arguments for word in one.split() if re.fullmatch(r"[a-z][a-z-]+", word)}


def imports_of_prediction() -> set[str]:
    """What the files import that run_prediction.py may import: no routines, leaves, pictures, TensorBoard."""
    unused = r"_training\.py$|/(search|export|doctor)/|/report/(curves|pictures|tensorboard)\.py$"
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return imports_of(ROOT / "run_prediction.py", *(one for one in files if not re.search(unused, str(one))))


def test_images_have_what_is_imported_in_them_and_run_as_nobody_special():
    for stage in ("train", "predict", "run", ""):
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(stage, "USER")), stage
    assert last("", "ENTRYPOINT") == last("predict", "ENTRYPOINT") == '["python", "run_prediction.py"]'
    assert last("train", "ENTRYPOINT") == '["python", "train.py"]'
    optional = {"pandas"}  # read_frame works where it is there
    assert installed("predict-packages") == imports_of_prediction() - optional
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert installed("train-packages") == {re.match(r"[a-z]+", one)[0] for one in dependencies}


def is_sent(path: str) -> bool:
    """Whether a file is sent to the build: the last pattern of .dockerignore that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if line and not line.startswith("#") and re.fullmatch(f"{pattern}(/.*)?", path):
            sent = line.startswith("!")
    return sent


SENT = [
    "LICENSE", "constraints.txt", "pyproject.toml", "train.py", "run_prediction.py", "my_script.py",
    *(str(path.relative_to(ROOT)) for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")),
    "weights/2026-01-02_some.run/best.pt", "logs/2026-01-02_some.run/config.json",
]  # fmt: skip
NOT_SENT = [
    ".git/config", ".env", ".venv/bin/python", ".netrc", "id_rsa", "secrets.json", "data/train/x/a.npy",
    "predictions/a.npy", "dida_tools/__pycache__/a.pyc", "dida_tools/models/__pycache__/a.pyc",
    "dida_tools/models/.env", "tests/conftest.py", "Dockerfile", "README.md",
    "weights/2026-01-02_some.run/last-00000004.pt", "logs/2026-01-02_some.run/journal.jsonl",
    "logs/2026-01-02_some.run/tensorboard/events", "logs/2026-01-02_some.run/environment.json",
]  # fmt: skip


def test_the_build_gets_the_code_and_nothing_else_and_copies_what_it_gets():
    assert [path for path in SENT if not is_sent(path)] == []
    assert [path for path in NOT_SENT if is_sent(path)] == []
    instructions = [one for stage in STAGES.values() for one in stage]
    copied = [rest.split()[:-1] for word, rest in instructions if word == "COPY"]
    for source in (source for sources in copied if not sources[0].startswith("--from") for source in sources):
        example = source.replace("${RUN}", "a.run").replace("*", "a")
        assert is_sent(f"{example}/a.py" if (ROOT / source).is_dir() else example), source
    assert set(PACKAGES) <= {source for sources in copied for source in sources}
    assert not [rest for word, rest in instructions if word in ("ARG", "ENV") and re.search(SECRET, rest)]
    installs = re.findall(r"pip [^&;]* install [^&;]*", re.sub(r"\s*\\\n\s*", " ", DOCKERFILE))
    assert len(installs) == 3 and all("--constraint constraints.txt" in command for command in installs)


# ----------------------------------------------------------------------------------------- built and run


def engine(*arguments: object) -> str:
    command = [ENGINE, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not ENGINE, reason="ENGINE_FOR_TESTS names no docker or podman: images are not built")
@pytest.mark.timeout(3600)
def test_a_run_trained_in_an_image_predicts_in_an_image_of_its_own(tmp_path):
    project = make_template(tmp_path / "project")
    for path in NOT_SENT:
        if not (project / path).exists():
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).touch()

    def make(*arguments: str) -> None:
        command = ["make", *arguments, f"DOCKER={ENGINE}", "IMAGE=dida-tools-test", "TORCH=cpu"]
        subprocess.run(command, cwd=project, check=True, stdin=subprocess.DEVNULL)

    make("docker-build")
    quick = "EPOCHS=1 MODEL_CONFIG.bulk_ch=8 MODEL_CONFIG.n_recursions=1"
    make("docker-run", f"ARGS={quick} DATASET_CONFIG.train.crops_per_image=1")
    [weights] = (project / "weights").glob("*/best.pt")
    found = engine("run", "--rm", "--entrypoint", "find", "dida-tools-test:train", "/project", "-type", "f")
    assert all(is_sent(path.removeprefix("/project/")) for path in found.split())
    assert weights.stat().st_uid == os.getuid()
    name = weights.parent.name
    make("docker-build", f"RUN={name}")
    shutil.rmtree(project / "weights")
    shutil.rmtree(project / "logs")
    [images] = (project / "data").glob("*/test/x")
    make("docker-run", f"RUN={name}", f"ARGS=-i {images.relative_to(project)} -o predictions")
    for image in images.iterdir():
        prediction = np.load(project / "predictions" / image.name)
        assert prediction.shape == np.load(image, mmap_mode="r").shape[:2] and prediction.max() < 5
    assert engine("run", "--rm", "--entrypoint", "id", f"dida-tools-test:{name}", "-u").strip() == "1000"
