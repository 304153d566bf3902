"""What a stranger's run folder, weights or data hold leads nowhere: each command refuses it in a sentence."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dida_core.runs.lookup import read_record, run_names, write_record
from dida_core.storage.journal import to_line
from dida_core.storage.weights import load_weights, save_weights

from tests.helpers import rows_of, run_script, write_run

pytestmark = pytest.mark.usefixtures("quick")
COMMANDS: dict[str, tuple[str, ...]] = {
    "rerun": ("train.py", "--rerun", "NAME"),
    "resume": ("train.py", "--resume", "NAME", "EPOCHS=3"),
    "predict": ("run_prediction.py", "NAME", "-i", "IMAGES", "-o", "OUT"),
    "list": ("runs.py", "list"),
    "show": ("runs.py", "show", "NAME"),
    "weights": ("runs.py", "weights", "NAME"),
    "delete": ("runs.py", "delete", "NAME", "--yes"),
}
ESCAPE = "\x1b]0;owned\x07\x9b31m\u202e"
CONTROLS = set("\x1b\x07\x9b\u202e")


class Place:
    """A run of somebody else in a project, and files beside it that nobody may touch."""

    def __init__(self, root: Path, name: str, images: Path) -> None:
        self.root, self.name, self.images, self.outside = root, name, images, root.parent / "outside"
        self.log, self.weights = root / "logs" / name, root / "weights" / name
        self.outside.mkdir()
        (self.outside / "victim").write_text("as it was")

    def edit(self, **changes: Any) -> None:
        """Give the record other values, with a digest that is right."""
        record = read_record(self.log)
        write_record(self.log, record | {"config": record["config"] | changes})

    def run(self, command: str) -> tuple[int, str]:
        """Return the exit code and all that was printed; nothing outside may have changed."""
        words = {"NAME": self.name, "IMAGES": str(self.images), "OUT": str(self.root / "maps")}
        script, *arguments = [words.get(word, word) for word in COMMANDS[command]]
        done = run_script(script, *arguments, root=self.root)
        assert [path.name for path in self.outside.iterdir()] == ["victim"]
        assert (self.outside / "victim").read_text() == "as it was"
        assert sorted(path.name for path in self.root.parent.iterdir()) == ["outside", "project"]
        text = done.stdout + done.stderr
        assert not set(text) & CONTROLS, "control characters reach the terminal"
        return done.returncode, text


@pytest.fixture
def place(first: dict[str, Any], global_config: dict, pairs_dir: Path) -> Place:
    return Place(Path(global_config["ROOT_PATH"]), first["NAME"], pairs_dir / "test" / "x" / "image_00.npy")


# ---------------------------------------------------------------------------------------------------- records


def partial(name: str, *arguments: Any) -> dict[str, Any]:
    return {"@partial": {"@ref": name}, "args": list(arguments), "kwargs": {}}


MODEL_CONFIG = {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 1, "dropout": 0.1}
CALLED = {
    "a script": partial("new_project:replace", {"@path": "OUTSIDE/x"}, "a", "b"),
    "another script": {"@ref": "train:main"},
    "the library": partial("dida_core.data.facts:scan_files", [], None, {"@path": "OUTSIDE/x"}),
    "a lock": partial("dida_core.storage.locks:locked", "OUTSIDE/victim"),
    "a dataset that writes": partial(".utils.data.scenes:SceneDataset", "train", "OUTSIDE"),
    "a function that writes": partial(".utils.data.scenes:make_scenes", "OUTSIDE"),
    "a folder": partial(".utils.path:create_dirs", "OUTSIDE/x"),
    "mail": partial(".utils.notify.smtp:SMTPNotifier", "evil@example.org"),
    "a tracker": partial(".utils.logging.csv:write_log", "OUTSIDE/x", {"NAME": "x"}),
    "a routine": {"@ref": ".training.pytorch_training:train"},
    "a helper": partial(".utils.torchutils:load_model", "OUTSIDE/victim"),
    "an optimizer": {"@ref": "torch.optim:SGD"},
    "a library": {"@ref": "monai.networks.nets.flexible_unet:FlexUNetEncoderRegister"},
    "its method": {"@ref": "monai.networks.nets.flexible_unet:FlexUNetEncoderRegister.register_class"},
    "torch.save": partial("torch:save", {}, "OUTSIDE/x"),
    "torch.hub": partial("torch.hub:load", "a/b", "c"),
    "an importer": partial("importlib:import_module", "payload"),
    "a tensor from a file": partial("torch:from_file", "OUTSIDE/x", True, 10),
}


def within(value: Any, outside: Path) -> Any:
    return json.loads(json.dumps(value).replace("OUTSIDE", str(outside)))


def test_no_command_calls_what_a_record_names_where_another_kind_belongs(place: Place) -> None:
    for name, called in CALLED.items():
        called = within(called, place.outside)
        for value in (called, [called], {"@tuple": [called]}, partial("torch.nn:ReLU", called)):
            place.edit(MODEL_CONFIG=MODEL_CONFIG | {"activ": value})
            for command in ("predict", "rerun") if value is called else ("predict",):
                code, text = place.run(command)
                assert code == 1 and "ConfigError: " in text and "MODEL_CONFIG.activ" in text, (name, text)
    assert run_names(place.log.parent) == [place.name]


NONSENSE = {
    "MODEL_CONFIG": [{"ch_in": "x"}, {}, [], {"ch_in": 3, "ch_out": 3, "activ": {"@ref": "builtins:dict"}}],
    "DATASET_CONFIG": [{"train": {"x_dir": 5, "y_dir": []}}, {"train": {}}, 3],
    "INIT_WEIGHTS": ["/dev/zero", "/proc/self/mem", "\0", ESCAPE, "OUTSIDE/victim"],
    "EPOCHS": ["3", {"@float": "nan"}, {"@path": "x"}],
    ESCAPE: [ESCAPE, 1],
    "__COMMENT": [[ESCAPE]],
    "SESSION_NAME": [5, {"@path": "/"}],
    "ROUTINE_NAME": [{"@module": "os"}, {"@module": "train"}],
    "DATASET": [{"@ref": "torch.utils.data:TensorDataset"}],
    "MASK_VALUES": [{"@dict": [[[1], 2]]}],
}  # fmt: skip


@pytest.mark.parametrize("key", NONSENSE, ids=[repr(key) for key in NONSENSE])
def test_what_no_record_of_ours_holds_is_refused_in_a_sentence(place: Place, key: str) -> None:
    for value in within(NONSENSE[key], place.outside):
        place.edit(**{key: value})
        code, text = place.run("rerun")
        assert code == 1 and "Error: " in text, (value, text)
        place.run("predict")  # some of it matters to training alone
        assert place.run("show")[0] == place.run("list")[0] == 0
    assert run_names(place.log.parent) == [place.name]


def test_what_acts_outside_of_a_run_is_not_taken_from_its_record(place: Place) -> None:
    write_run(place.root / "logs", "another", {})
    before = {path: path.read_bytes() for path in (place.root / "logs" / "another").iterdir()}
    names = {"SESSION_NAME": "../../outside/" + ESCAPE, "DATE": "/tmp/x", "__COMMENT": f"{ESCAPE}\nimport os"}
    acting = {"LOGFILE": "../../outside/x.pth", "NOTIFY": "evil@example.org", "RESUME": "another"}
    acting |= {"RERUN_OF": "../../outside", "AFTER_EPOCH": {"@ref": ".utils.loss:f1"}}
    place.edit(**names, **acting)
    code, text = place.run("rerun")
    assert code == 0 and "identical: " in text
    before_after = {path: path.read_bytes() for path in before}
    assert before_after == before
    (new,) = set(run_names(place.log.parent)) - {place.name, "another"}
    row = {row["NAME"]: row for row in rows_of({"LOG_DIR": str(place.log.parent)})}[new]
    assert (row["RERUN_OF"], row["NOTIFY"], row["LOGFILE"]) == (place.name, None, "experiments.csv")
    assert not set(str(row)) & CONTROLS
    for wanted in ("..", "../../outside", "nothing", "/"):
        done = run_script("train.py", "--resume", new, f"RERUN_OF={wanted}", root=place.root)
        assert done.returncode == 1 and "there is no such run" in done.stderr


# ------------------------------------------------------------------------------------------------ run folders


def link(place: Place, path: Path, target: Path) -> None:
    """Put a link in place of a file or folder."""
    if path.exists():
        path.rename(place.root / "moved")
    path.symlink_to(target)


LINKS: dict[str, Callable[[Place], Path]] = {
    "the journal": lambda place: place.log / "journal.jsonl",
    "the lock": lambda place: place.log / ".lock",
    "the row": lambda place: place.log / ".row.json",
    "the record": lambda place: place.log / "config.json",
    "the environment": lambda place: place.log / "environment.json",
    "the picture": lambda place: place.log / "picture.png",
    "a folder in it": lambda place: place.log / "tensorboard",
    "a checkpoint": lambda place: place.weights / "last-00000099.pt",
    "the weights": lambda place: place.weights,
    "the log": lambda place: place.log,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LINKS)
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_nothing_is_written_through_a_link(place: Place, what: str, kind: str) -> None:
    targets = {"file": "victim", "folder": ".", "nothing": "new"}
    path = LINKS[what](place)
    if kind == "pipe":
        if path.exists():
            path.rename(place.root / "moved")
        os.mkfifo(path)
    else:
        link(place, path, place.outside / targets[kind])
    for command in ("list", "show", "resume", "delete"):
        code, text = place.run(command)
        if command == "resume":
            assert code == 1 and len(text) < 2000, text


def event(**content: Any) -> bytes:
    return to_line(content)


def line(text: str) -> bytes:
    """A line that is no event, with a checksum that is right."""
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


START = {
    "event": "start",
    "name": "x",
    "version": 1,
    "config": {},
    "host": "h",
    "pid": 1,
    "time": 1.0,
    "epoch": 0,
}
START |= {"best_epoch": None, "device": "cpu", "precision": "fp32", "not_rerunnable": ""}
JOURNALS = {
    "no event": event(a=1),
    "no dict": line("[1]"),
    "deep": line("[" * 5000 + "]" * 5000),
    "a long number": line('{"event": ' + "9" * 5000 + "}"),
    "a step of no number": event(event="step", step=[1]) + event(event="epoch", epoch={}),
    "an empty start": event(event="start"),
    "an empty end": event(event="test") + event(event="end") + event(event="epoch"),
    "a time": event(**START | {"time": 1e300}),
    "no time": event(**START | {"time": "x"}),
    "lists in the row": event(**START | {"config": {"LOGFILE": "experiments.csv", "MONITOR": 3}, "pid": [1]}),
    "tags": event(**START | {"config": {"LOSS": {"@partial": 1}, "MODEL": {"@tuple": 5}, "A": {"@dict": 1}}}),
    "another name": event(**START | {"name": "../../outside", "config": {"LOGFILE": "experiments.csv"}}),
    "control characters": event(**START | {"config": {"LOGFILE": "experiments.csv", ESCAPE: ESCAPE}}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", JOURNALS)
@pytest.mark.parametrize("is_all", [True, False])
def test_a_journal_that_holds_what_none_of_ours_does(place: Place, what: str, is_all: bool) -> None:
    journal = place.log / "journal.jsonl"
    journal.write_bytes(JOURNALS[what] + (b"" if is_all else journal.read_bytes()))
    write_run(place.root / "logs", "another", {})
    for command in ("list", "show"):
        assert place.run(command)[0] == 0
    text = place.run("list")[1]
    assert "another" in text and "outside" not in text


def test_a_row_and_an_environment_that_somebody_has_written(place: Place) -> None:
    about = (place.log / "journal.jsonl").stat()
    row = {
        "journal": [1, about.st_size, about.st_mtime_ns],
        "LOGFILE": "experiments.csv",
        "STATUS": "running",
    }
    rows = [
        row,
        row | {"NAME": "../../outside", "STARTED": "x"},
        row | {"HEARTBEAT": "x", "HOST": "y", "STARTED": []},
    ]
    for one in rows:
        (place.log / ".row.json").write_bytes(to_line(one | {ESCAPE: ESCAPE, "test.f1": {"a": [1]}}))
        for command in ("list", "show"):
            assert place.run(command)[0] == 0
    assert place.run("delete")[0] == 0 and not place.log.exists() and not place.weights.exists()


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"packages": [], "data": 3}', json.dumps({"python": ESCAPE, "arguments": [1, ESCAPE]})],
)
def test_an_environment_of_another_form(place: Place, content: str) -> None:
    (place.log / "environment.json").write_text(content)
    assert place.run("show")[0] == 0
    code, text = place.run("rerun")
    assert code == 0 and "Not as it was" in text


@pytest.mark.parametrize(
    "name", [".", "..", "/", "", "\0", "a\nb", "x" * 5000, "../logs", "search", ESCAPE, "~", "*"]
)
def test_no_name_leads_out_of_the_folder_of_runs(place: Place, name: str) -> None:
    (place.root / "logs" / "search").mkdir()
    (place.root / "weights" / "search").mkdir()
    (place.root / "logs" / "experiments.csv").write_text(f'NAME,"{ESCAPE}"\n"{name}",{ESCAPE}\n')
    write_run(place.root / "logs", "another", {})
    for command in COMMANDS:
        words = [name if word == "NAME" else word for word in COMMANDS[command]]
        if command != "list":
            done = run_script(*words, root=place.root, OUT="x")
            assert done.returncode in (0, 1, 2) and not set(done.stderr + done.stdout) & CONTROLS
            assert command == "delete" or done.returncode
        place.run("list")
    assert (place.root / "logs" / "search").is_dir() and (place.root / "weights" / "search").is_dir()
    assert place.log.is_dir() and place.weights.is_dir()


# ---------------------------------------------------------------------------------------------------- weights

CONTRACTS: list[Any] = [None, {}, {"channels": "3"}, {"channels": 3, "tile_size": 10**9, "scale": "x"}, [1]]
CONTRACTS += [
    {"channels": 3, "class_names": ESCAPE, "task": ESCAPE},
    {"channels": 3, "mean": [ESCAPE] * 3, "std": [0.0]},
]


@pytest.mark.parametrize("number", range(len(CONTRACTS)))
def test_a_contract_of_another_form_is_refused(place: Place, number: int) -> None:
    best = place.weights / "best.pt"
    save_weights(best, load_weights(best) | {"contract": CONTRACTS[number]})
    code, text = place.run("predict")
    assert code == 1 and "contract is damaged" in text, text


STATES: dict[str, dict[str, Any]] = {
    "nothing": dict.fromkeys(("model", "optimizer", "state", "contract", "history", "epochs")),
    "a state": {"state": {"evil": 1}},
    "a history": {"history": [1, {"epoch": []}]},
    "an optimizer": {"optimizer": {"state": 5, "param_groups": "x"}},
    "a model": {"model": {1: 2}},
    "numbers": {"state": {"step": "x", "epoch": ESCAPE}},
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_a_checkpoint_of_another_form_is_refused(place: Place, what: str) -> None:
    newest = max(place.weights.glob("last-*.pt"))
    save_weights(newest, load_weights(newest) | STATES[what])
    code, text = place.run("resume")
    assert code == 1 and "Error: " in text, text
