"""No secret gets into anything that a run writes."""

import json
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from dida_core.runs import environment, record
from dida_core.runs.redaction import DROPPED, Redactor, is_secret_name

from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.notify import smtp

from tests.helpers import rows_of
from tests_core.runs.test_rerun import commit
from tests_core.runs.test_secret_forms import CODE, TEXT

CHANNELS = ("diff", "deleted", "untracked", "arguments", "comment", "error", "session", "config")


def texts_with(channel: str) -> tuple[str, str]:
    """Return code and text with a secret of this channel's own, {channel}-hunter2-x, in each form."""
    return tuple(
        "\n".join(one.format(*[f"{channel}-hunter2-x"] * 9) for one in forms) for forms in (CODE, TEXT)
    )


@pytest.fixture
def repository(tmp_path):
    """A project with secrets in what is removed since the commit, in what is changed, and in new files."""
    folder = tmp_path / "code"
    (folder / "package").mkdir(parents=True)
    old, new, untracked = (texts_with(channel) for channel in ("deleted", "diff", "untracked"))
    (folder / "package" / "a.py").write_text(f"x = 1\n{old[0]}\n")
    (folder / "package" / "a.yaml").write_text(f"x: 1\n{old[1]}\n")
    commit(folder)
    (folder / "package" / "a.py").write_text(f"x = 2\n{new[0]}\n")
    (folder / "package" / "a.yaml").write_text(f"x: 2\n{new[1]}\n")
    (folder / "new.py").write_text(f"y = 1\n{untracked[0]}\n")
    (folder / "new.sh").write_text(f"y=1\n{untracked[1]}\n")
    (folder / ".env").write_text("HARMLESS=untracked-hunter2-x")
    return folder


class SecretDataset(NpyDataset):
    def __init__(self, x_dir, y_dir, **more) -> None:
        super().__init__(x_dir, y_dir)
        self.arguments = self.arguments | more


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_of_a_run_holds_a_secret(
    pairs_dir, tiny_config, global_config, monkeypatch, repository, fails
):
    for name in VARIABLES.split():
        monkeypatch.setenv(name, f"{name}-of-variable")
    echoed = " ".join(f"{name}-of-variable" for name in VARIABLES.split())
    forms = [form for channel in ("arguments",) for text in texts_with(channel) for form in text.split("\n")]
    monkeypatch.setattr(sys, "argv", ["train.py", "--api-key", "arguments-hunter2-x", *forms, echoed])
    describe = environment.describe_environment
    monkeypatch.setattr(record, "describe_environment", lambda _, *about: describe(repository, *about))
    mails = []
    monkeypatch.setattr(smtp.SMTPNotifier, "__init__", lambda self, receivers: None)
    monkeypatch.setattr(smtp.SMTPNotifier, "notify", lambda self, *mail: mails.append(mail[:2]))
    monkeypatch.setattr(smtp.SMTPNotifier, "close", lambda self: None)
    secrets = {"api_key": "config-hunter2-x", "echoed": echoed, "texts": list(texts_with("config"))}
    secrets |= {"numbers": {"password": 19283746, "lr": 3}, "auth": ["me", "config-hunter2-y"]}
    sets = [
        SecretDataset(pairs_dir / split / "x", pairs_dir / split / "y", **secrets)
        for split in ("train", "test")
    ]
    config = tiny_config | {"__COMMENT": "\n".join(texts_with("comment")), "EPOCHS": 1, "NOTIFY": "a@b.org"}
    config |= {"SESSION_NAME": f"token=session-hunter2-x {echoed}"[:60]}

    def after_epoch(run):
        if fails:
            raise RuntimeError("\n".join([echoed, *texts_with("error")]))

    try:
        train(*sets, config | {"AFTER_EPOCH": after_epoch}, global_config)
    except RuntimeError as error:
        assert fails and "error-hunter2-x" in str(error)
    files = [file for file in Path(global_config["ROOT_PATH"]).rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"config.json", "environment.json", "journal.jsonl", "experiments.csv", "best.pt"} <= names
    assert [mail[1].partition(":")[0] for mail in mails] == ["started", "failed" if fails else "finished"]
    left = {str(file): file.read_bytes() + str(file).encode() for file in files}
    for place, content in (left | {"mail": repr(mails).encode()}).items():
        for secret in (b"-hunter2-", b"-of-variable", b"19283746"):
            assert secret not in content, (place, content[max(0, content.find(secret) - 300) :][:400])
    (row,) = rows_of(global_config)
    assert row["RERUNNABLE"].startswith("no: ") and "secret" in row["RERUNNABLE"]
    assert "uncommitted files are not recorded: package/a.py (" in row["RERUNNABLE"]
    assert row["STATUS"] == ("failed" if fails else "finished")
    described = json.loads(next(file for file in files if file.name == "environment.json").read_bytes())
    assert all(line in described["git_diff"] for line in ("\n-x = 1\n", "\n+x = 2\n", f"\n+{DROPPED}\n"))
    assert described["untracked_files"].keys() == {"new.py", "new.sh"}
    assert described["untracked_files"]["new.py"]["text"].startswith(f"y = 1\n{DROPPED}\n")


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
