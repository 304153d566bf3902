"""No secret gets into anything that a run writes."""

import json
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from dida_core.runs import environment
from dida_core.runs.redaction import Redactor, is_secret_name

from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset

from tests.helpers import rows_of

KINDS = ("variable", "error", "comment", "url", "argument", "session", "config", "diff")
CANARIES = {kind: f"hunter2-{kind}" for kind in KINDS}


class SecretDataset(NpyDataset):
    def __init__(self, x_dir, y_dir, api_key="", url="", **more) -> None:
        super().__init__(x_dir, y_dir, **more)
        self.arguments = self.arguments | {"api_key": api_key, "url": url}


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_of_a_run_holds_a_secret(pairs_dir, tiny_config, global_config, monkeypatch, fails):
    for name in ("variable", "error", "comment"):
        monkeypatch.setenv(f"{name}_token".upper(), CANARIES[name])
    monkeypatch.setattr(sys, "argv", ["train.py", "--api-key", CANARIES["argument"]])
    diff = f'+STORAGE_PASSWORD = "{CANARIES["diff"]}"\n+print("{CANARIES["variable"]}")'
    monkeypatch.setattr(
        environment, "_git", lambda folder, command, *_: diff if command == "diff" else command
    )
    secrets = {"api_key": CANARIES["config"], "url": f"https://me:{CANARIES['url']}@example.org/x"}
    sets = [
        SecretDataset(pairs_dir / split / "x", pairs_dir / split / "y", **secrets)
        for split in ("train", "test")
    ]
    config = tiny_config | {"__COMMENT": f"with {CANARIES['comment']} inside", "EPOCHS": 1}
    config |= {"SESSION_NAME": f"token={CANARIES['session']}"}

    def after_epoch(run):
        if fails:
            raise RuntimeError(f"cannot reach with {CANARIES['error']}")

    try:
        train(*sets, config | {"AFTER_EPOCH": after_epoch}, global_config)
    except RuntimeError as error:
        assert fails and CANARIES["error"] in str(error)
    files = [file for file in Path(global_config["ROOT_PATH"]).rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"config.json", "environment.json", "journal.jsonl", "experiments.csv", "best.pt"} <= names
    for file in files:
        content = file.read_bytes() + str(file).encode()
        assert not [kind for kind, canary in CANARIES.items() if canary.encode() in content], file
    (row,) = rows_of(global_config)
    assert row["RERUNNABLE"].startswith("no: ") and "secret" in row["RERUNNABLE"]
    assert row["__COMMENT"] == "with [redacted] inside"
    error = "RuntimeError: cannot reach with [redacted]" if fails else None
    assert (row["STATUS"], row["ERROR"]) == ("failed" if fails else "finished", error)
    described = json.loads(next(file for file in files if file.name == "environment.json").read_bytes())
    assert described["git_diff"] == '+STORAGE_PASSWORD = "[redacted]"\n+print("[redacted]")'
    assert described["arguments"] == ["train.py", "--api-key", "[redacted]"]


SECRETS = "DB_PASSWORD apiKey api-key HF_TOKEN AWS_SECRET_ACCESS_KEY password githubAuth credentials"
HARMLESS = "num_tokens use_cls_token tokenizer author key max_token monkey SSH_AUTH_SOCK lr"
# In the environment one such word is enough; the working directory is no secret.
VARIABLES = "PGPASSWORD OPENAI_KEY SMTP_PASS SSH_KEY SECRET_KEY_BASE HF_TOKEN_READ PASSWORD_PROD "
VARIABLES += "GITHUB_PAT COOKIE API_TOKENS DB_PWD my_secret MY_PASSPHRASE"
NO_VARIABLES = "PWD PATH TOKENIZERS_PARALLELISM KEYBOARD COMPASS MONKEY SSH_AUTH_SOCK OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("secret", "harmless", "is_secret"),
    [
        (SECRETS, HARMLESS, is_secret_name),
        (
            VARIABLES,
            NO_VARIABLES,
            lambda name: Redactor({name: "hunter2"}, []).text("a hunter2") != "a hunter2",
        ),
    ],
)
def test_names_of_secrets(secret, harmless, is_secret):
    assert [name for name in f"{secret} {harmless}".split() if is_secret(name)] == secret.split()


def test_secrets_are_found_by_value_wherever_they_turn_up():
    variables = {"HF_TOKEN": "hunter2-a", "DATABASE": "postgres://me:hunter2-b@host/db", "SHORT_TOKEN": "abc"}
    arguments = ["train.py", "--api-key", "hunter2-c", "X.password=hunter2-d"]
    redactor = Redactor(variables, arguments, {"token": "hunter2-e"})
    text = " ".join(f"<hunter2-{letter}>" for letter in "abcde")
    assert redactor.text(text) == " ".join(["<[redacted]>"] * 5)
    assert redactor.text("abcdef") == "abcdef"
    words = ["t.py", "--api-key", "x", "EPOCHS=3"]
    assert redactor.arguments(words) == ["t.py", "--api-key", "[redacted]", "EPOCHS=3"]


@pytest.mark.parametrize(
    "secret", ["with 'both\" quotes", "ü&/? =+#", "back\\slash", "one line\nanother line"]
)
def test_secrets_are_found_in_other_forms(secret):
    for write in (str, repr, json.dumps, quote, quote_plus, lambda text: quote(text, safe="")):
        text = Redactor({"DB_PASSWORD": secret}, []).text(f"it is {write(secret)}.")
        parts = ("both", "slash", "line", "%C3", "ü", "\\u")
        assert "[redacted]" in text and not any(part in text for part in parts), text


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:s3cret@host/x", "https://me:[redacted]@host/x"),
        ("password = 'abc'", "password = '[redacted]'"),
        ('{"token": "abc", "lr": 3}', '{"token": "[redacted]", "lr": 3}'),
        ("Authorization: Bearer abcdefghij", "Authorization: [redacted]"),
        ("loss=0.5 num_tokens=512 f1: 0.3", "loss=0.5 num_tokens=512 f1: 0.3"),
        ("git@host:project.git http://host:8080/x", "git@host:project.git http://host:8080/x"),
    ],
)
def test_secrets_are_found_by_their_form(text, redacted):
    assert Redactor({}, []).text(text) == redacted


def test_data_keeps_its_shape_and_a_config_without_secrets_stays():
    data = {"password": "x", "numbers": [1, 2.5, None, True], "nested": {"a": ("y", "z")}, "token": 5}
    assert Redactor({}, []).data(data) == data | {"password": "[redacted]"}
    config = {"MODEL": {"@ref": ".token:password"}, "__COMMENT": "password=x"}
    config |= {"DATASET_CONFIG": [{"url": "https://a:b3@c/"}, {"x": "y"}]}
    redacted = Redactor({}, []).config(config)
    assert redacted["MODEL"] == config["MODEL"] and redacted["__COMMENT"] == "password=[redacted]"
    assert redacted["DATASET_CONFIG"] == [{"url": {"@unrecorded": "it holds a secret"}}, {"x": "y"}]
