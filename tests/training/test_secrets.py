"""No secret gets into anything that a run writes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dida_tools.utils.logging import read_log
from dida_tools.utils.redact import Redactor, is_secret_name

ROOT = Path(__file__).resolve().parents[2]
CANARIES = {
    "environment": "hunter2-environment", "url": "hunter2-url", "argument": "hunter2-argument",
    "config": "hunter2-config", "diff": "hunter2-diff", "error": "hunter2-environment2", "comment": "hunter2-comment",
}  # fmt: skip


def project_with_secrets(folder: Path) -> Path:
    """A repository whose changes, dataset and loss hold secrets."""
    folder.mkdir()
    for name in ("dida_tools", "train.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("logs/\nweights/\n__pycache__/\n")
    commit = ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "first"]
    for command in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", *command], cwd=folder, check=True)
    data = folder / "dida_tools" / "utils" / "data" / "datasets.py"
    data.write_text(data.read_text() + f'\nSTORAGE_PASSWORD = "{CANARIES["diff"]}"\n')
    (folder / "dida_tools" / "utils" / "secret_data.py").write_text(
        "import os\n"
        "from .data import NpyDataset\n"
        "from .loss import multi_class_dice_ce_sum\n"
        "class SecretDataset(NpyDataset):\n"
        "    def __init__(self, x_dir, y_dir, api_key='', url='', **more):\n"
        "        super().__init__(x_dir, y_dir, **more)\n"
        "        self.arguments = self.arguments | {'api_key': api_key, 'url': url}\n"
        "def failing_loss(pred, target):\n"
        "    if pred.requires_grad and os.environ.get('FAIL'):\n"
        "        raise RuntimeError('cannot reach with ' + os.environ['FAIL_TOKEN'])\n"
        "    return multi_class_dice_ce_sum(pred, target)\n"
    )
    return folder


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_of_a_run_holds_a_secret(tmp_path, pairs_dir, fails):
    project = project_with_secrets(tmp_path / "project")
    script = (
        "import sys, train\n"
        "from dida_tools.training import pytorch_training as routine\n"
        "from dida_tools.utils.secret_data import SecretDataset, failing_loss\n"
        "def small(config=routine.train_config):\n"
        "    config = config | {'DATASET': SecretDataset, 'LOSS': failing_loss, 'LOSS_CONFIG': {}, 'EPOCHS': 1}\n"
        "    config['MODEL_CONFIG'] = {'ch_in': 3, 'ch_out': 3, 'bulk_ch': 4, 'n_recursions': 1}\n"
        f"    secrets = {{'api_key': '{CANARIES['config']}', 'url': 'https://me:{CANARIES['url']}@example.org/x'}}\n"
        f"    parts = {{part: '{pairs_dir}/' + part for part in ('train', 'test')}}\n"
        "    config['DATASET_CONFIG'] = {\n"
        "        part: {'x_dir': place + '/x', 'y_dir': place + '/y'} | secrets for part, place in parts.items()\n"
        "    }\n"
        "    return config\n"
        "routine.VARIANTS['small'] = small\n"
        "sys.exit(train.main())\n"
    )
    (project / "run_it.py").write_text(script)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ROOT_PATH")}
    environment |= {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "MY_TOKEN": CANARIES["environment"]}
    environment |= {"COMMENT_SECRET": CANARIES["comment"], "FAIL_TOKEN": CANARIES["error"]}
    environment |= {"FAIL": "1"} if fails else {}
    overrides = [f"__COMMENT=with {CANARIES['comment']} inside", "DEVICE=cpu", "PRECISION=fp32"]
    overrides.append(f"SESSION_NAME=token={CANARIES['argument']}")
    command = [sys.executable, "run_it.py", *overrides]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if fails else 0), done.stderr
    written = [
        file for folder in ("logs", "weights") for file in (project / folder).rglob("*") if file.is_file()
    ]
    names = {file.name for file in written}
    assert {"config.json", "environment.json", "journal.jsonl", "experiments.csv"} <= names
    for file in written:
        content = file.read_bytes() + str(file).encode()
        found = [place for place, canary in CANARIES.items() if canary.encode() in content]
        assert not found, (file, found)
    row = read_log(project / "logs" / "experiments.csv")[0]
    assert (
        row["RERUNNABLE"].startswith("no: ")
        and "api_key" in row["RERUNNABLE"]
        and "secret" in row["RERUNNABLE"]
    )
    assert row["__COMMENT"] == "with [redacted] inside"
    assert row["STATUS"] == ("failed" if fails else "finished")
    if fails:
        assert row["ERROR"] == "RuntimeError: cannot reach with [redacted]"
    environment_text = next(project.glob("logs/*/environment.json")).read_text()
    assert (
        "STORAGE_PASSWORD" in environment_text and "[redacted]" in environment_text
    )  # the change itself is recorded


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASSWORD",
        "apiKey",
        "api-key",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "password",
        "githubAuth",
        "credentials",
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "num_tokens",
        "use_cls_token",
        "tokenizer",
        "author",
        "key",
        "max_token",
        "monkey",
        "SSH_AUTH_SOCK",
        "lr",
    ],
)
def test_names_of_what_is_no_secret(name):
    assert not is_secret_name(name)


def test_secrets_are_found_by_value_wherever_they_turn_up():
    variables = {"HF_TOKEN": "hunter2-a", "DATABASE": "postgres://me:hunter2-b@host/db", "SHORT_TOKEN": "abc"}
    redactor = Redactor(
        variables, ["train.py", "--api-key", "hunter2-c", "X.password=hunter2-d"], {"token": "hunter2-e"}
    )
    text = " ".join(f"<hunter2-{letter}>" for letter in "abcde")
    assert redactor.text(text) == " ".join(["<[redacted]>"] * 5)
    assert redactor.text("abcdef") == "abcdef"
    assert redactor.arguments(["t.py", "--api-key", "x", "EPOCHS=3"]) == [
        "t.py",
        "--api-key",
        "[redacted]",
        "EPOCHS=3",
    ]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:s3cret@host/x", "https://me:[redacted]@host/x"),
        ("password = 'abc'", "password = '[redacted]'"),
        ('{"token": "abc", "lr": 3}', '{"token": "[redacted]", "lr": 3}'),
        ("Authorization: Bearer abcdefghij", "Authorization: [redacted] [redacted]"),
        ("loss=0.5 num_tokens=512 f1: 0.3", "loss=0.5 num_tokens=512 f1: 0.3"),
        ("git@host:project.git http://host:8080/x", "git@host:project.git http://host:8080/x"),
    ],
)
def test_secrets_are_found_by_their_form(text, redacted):
    assert Redactor({}, []).text(text) == redacted


def test_the_working_directory_is_no_secret():
    redactor = Redactor({"PWD": "/home/me/crops", "DB_PWD": "hunter2-xyz"}, [])
    assert redactor.text("/home/me/crops/my_data, hunter2-xyz") == "/home/me/crops/my_data, [redacted]"


def test_data_keeps_its_shape():
    data = {"password": "x", "numbers": [1, 2.5, None, True], "nested": {"a": ("y", "z")}, "token": 5}
    assert Redactor({}, []).data(data) == data | {"password": "[redacted]"}
