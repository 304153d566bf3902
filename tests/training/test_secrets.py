"""No secret gets into anything that a run writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from dida_tools.training.pytorch_training import train
from dida_tools.utils.logging import read_log
from dida_tools.utils.redact import Redactor, is_secret_name
from tests.helpers import PACKAGE, ROOT, rows_of

CANARIES = {
    "environment": "hunter2-environment", "url": "hunter2-url", "argument": "hunter2-argument",
    "config": "hunter2-config", "diff": "hunter2-diff", "error": "hunter2-environment2",
    "comment": "hunter2-comment",
}  # fmt: skip
SECRET_DATA = """
import os
from .data import NpyDataset
from .loss import multi_class_dice_ce_sum
class SecretDataset(NpyDataset):
    def __init__(self, x_dir, y_dir, api_key='', url='', **more):
        super().__init__(x_dir, y_dir, **more)
        self.arguments = self.arguments | {'api_key': api_key, 'url': url}
def failing_loss(pred, target):
    if pred.requires_grad and os.environ.get('FAIL'):
        raise RuntimeError('cannot reach with ' + os.environ['FAIL_TOKEN'])
    return multi_class_dice_ce_sum(pred, target)
"""
SCRIPT = f"""
import sys
from pathlib import Path
from {PACKAGE}.config.config import global_config
from {PACKAGE}.config.errors import exit_code
from {PACKAGE}.config.overrides import override
from {PACKAGE}.config.project import project_of
from {PACKAGE}.training.pytorch_training import train, train_config
from {PACKAGE}.utils.secret_data import SecretDataset, failing_loss
data, secrets = Path(sys.argv.pop(1)), {{'api_key': '{CANARIES["config"]}'}}
secrets['url'] = 'https://me:{CANARIES["url"]}@example.org/x'
config = train_config | {{'DATASET': SecretDataset, 'LOSS': failing_loss, 'LOSS_CONFIG': {{}}, 'EPOCHS': 1}}
config['MODEL_CONFIG'] = {{'ch_in': 3, 'ch_out': 3, 'bulk_ch': 4, 'n_recursions': 1}}
config = override(config, sys.argv[1:], project_of('{PACKAGE}'))
sets = [SecretDataset(data / split / 'x', data / split / 'y', **secrets) for split in ('train', 'test')]
sys.exit(exit_code(lambda: train(*sets, config, global_config) and 0))
"""


def project_with_secrets(folder: Path) -> Path:
    """A repository whose changes, dataset and loss hold secrets."""
    folder.mkdir()
    for name in (PACKAGE, "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("logs/\nweights/\n__pycache__/\n")
    commit = ["-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "first"]
    for command in (["init", "-q"], ["add", "-A"], commit):
        subprocess.run(["git", *command], cwd=folder, check=True)
    data = folder / PACKAGE / "utils" / "data" / "datasets.py"
    data.write_text(data.read_text() + f'\nSTORAGE_PASSWORD = "{CANARIES["diff"]}"\n')
    (folder / PACKAGE / "utils" / "secret_data.py").write_text(SECRET_DATA)
    (folder / "run_it.py").write_text(SCRIPT)
    return folder


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_file_of_a_run_holds_a_secret(tmp_path, pairs_dir, fails):
    project = project_with_secrets(tmp_path / "project")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ROOT_PATH")}
    environment |= {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "MY_TOKEN": CANARIES["environment"]}
    environment |= {"COMMENT_SECRET": CANARIES["comment"], "FAIL_TOKEN": CANARIES["error"]}
    environment |= {"FAIL": "1"} if fails else {}
    overrides = [f"__COMMENT=with {CANARIES['comment']} inside", "DEVICE=cpu", "PRECISION=fp32"]
    overrides.append(f"SESSION_NAME=token={CANARIES['argument']}")
    command = [sys.executable, "run_it.py", str(pairs_dir), *overrides]
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
    assert row["RERUNNABLE"].startswith("no: ") and "secret" in row["RERUNNABLE"]
    assert row["__COMMENT"] == "with [redacted] inside"
    assert row["STATUS"] == ("failed" if fails else "finished")
    assert not fails or row["ERROR"] == "RuntimeError: cannot reach with [redacted]"
    environment_text = next(project.glob("logs/*/environment.json")).read_text()
    assert (
        "STORAGE_PASSWORD" in environment_text and "[redacted]" in environment_text
    )  # the change is recorded


@pytest.mark.usefixtures("quick")
def test_an_error_is_recorded_without_the_secret_in_it(datasets, tiny_config, global_config, monkeypatch):
    monkeypatch.setenv("FAIL_TOKEN", "hunter2-error")

    def fail(run):
        raise RuntimeError("cannot reach with hunter2-error")

    with pytest.raises(RuntimeError, match="hunter2-error"):
        train(*datasets, tiny_config | {"AFTER_EPOCH": fail}, global_config)
    (row,) = rows_of(global_config)
    assert (row["STATUS"], row["ERROR"]) == ("failed", "RuntimeError: cannot reach with [redacted]")
    files = [file for file in Path(global_config["LOG_DIR"]).rglob("*") if file.is_file()]
    assert not [file for file in files if b"hunter2-error" in file.read_bytes()]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("DB_PASSWORD apiKey api-key HF_TOKEN AWS_SECRET_ACCESS_KEY password githubAuth credentials", True),
        ("num_tokens use_cls_token tokenizer author key max_token monkey SSH_AUTH_SOCK lr", False),
    ],
)
def test_names_of_secrets(names, expected):
    assert {is_secret_name(name) for name in names.split()} == {expected}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("PGPASSWORD OPENAI_KEY SMTP_PASS SSH_KEY SECRET_KEY_BASE HF_TOKEN_READ PASSWORD_PROD", True),
        ("GITHUB_PAT COOKIE API_TOKENS DB_PWD my_secret MY_PASSPHRASE", True),
        ("PWD PATH TOKENIZERS_PARALLELISM KEYBOARD COMPASS MONKEY SSH_AUTH_SOCK OMP_NUM_THREADS", False),
    ],
)
def test_variables_with_secrets_are_found_by_their_names(names, expected):
    for name in names.split():
        assert (Redactor({name: "hunter2"}, []).text("a hunter2 b") == "a [redacted] b") == expected, name


def test_secrets_are_found_by_value_wherever_they_turn_up():
    variables = {"HF_TOKEN": "hunter2-a", "DATABASE": "postgres://me:hunter2-b@host/db", "SHORT_TOKEN": "abc"}
    arguments = ["train.py", "--api-key", "hunter2-c", "X.password=hunter2-d"]
    redactor = Redactor(variables, arguments, {"token": "hunter2-e"})
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
    "secret", ["with 'both\" quotes", "ü&/? =+#", "back\\slash", "first line\nsecond line"]
)
@pytest.mark.parametrize("write", [str, repr, json.dumps, quote, lambda text: quote(text, safe="")])
def test_secrets_are_found_in_other_forms(secret, write):
    text = Redactor({"DB_PASSWORD": secret}, []).text(f"it is {write(secret)}.")
    assert "[redacted]" in text and not any(
        word in text for word in ("both", "slash", "line", "%C3", "ü", "\\u")
    )


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


def test_data_keeps_its_shape_and_a_config_without_secrets_stays():
    data = {"password": "x", "numbers": [1, 2.5, None, True], "nested": {"a": ("y", "z")}, "token": 5}
    assert Redactor({}, []).data(data) == data | {"password": "[redacted]"}
    config = {
        "MODEL": {"@ref": ".token:password"},
        "DATASET_CONFIG": [{"url": "https://a:b3@c/"}, {"x": "y"}],
    }
    config |= {"__COMMENT": "password=x"}
    redacted = Redactor({}, []).config(config)
    assert redacted["MODEL"] == config["MODEL"] and redacted["__COMMENT"] == "password=[redacted]"
    assert redacted["DATASET_CONFIG"] == [{"url": {"@unrecorded": "it holds a secret"}}, {"x": "y"}]
