import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import dida_tools.models.unet
from dida_tools.config import references
from dida_tools.config.capture import ConfigError, restore
from dida_tools.config.config import global_config
from dida_tools.config.references import ALIASES, ReferenceProblem, is_project_module, name_of, resolve
from dida_tools.layers import ConvLayer
from dida_tools.models import UNET
from dida_tools.utils.loss import f1, masked_f1, precision, smooth_dice_loss

CHECKOUT = Path(__file__).parents[2]

NAMED = {
    ".models.unet:UNET": UNET,
    ".layers.conv:ConvLayer": ConvLayer,
    ".utils.loss:smooth_dice_loss": smooth_dice_loss,
    ".utils.loss:f1": f1,
    ".utils.loss:precision": precision,
    ".utils.loss:masked_f1": masked_f1,
    "torch.nn:ELU": nn.ELU,
    "torch.nn:BatchNorm2d": nn.BatchNorm2d,
    "torch.nn:BCEWithLogitsLoss": nn.BCEWithLogitsLoss,
    "torch.optim:SGD": torch.optim.SGD,
    "torch.optim.lr_scheduler:OneCycleLR": torch.optim.lr_scheduler.OneCycleLR,
    "torch.utils.data:TensorDataset": torch.utils.data.TensorDataset,
    "torch:relu": torch.relu,
    "torch:sigmoid": torch.sigmoid,
    "torch.nn.functional:relu": functional.relu,
    "torch.nn.functional:gelu": functional.gelu,
    "torch.nn.functional:cross_entropy": functional.cross_entropy,
    "torch.nn.functional:max_pool2d": functional.max_pool2d,
    "torch.nn.functional:logsigmoid": functional.logsigmoid,
    "torch:pixel_shuffle": functional.pixel_shuffle,
    "torch.nn.functional:avg_pool2d": functional.avg_pool2d,
    "builtins:int": int,
    "builtins:dict": dict,
}

HOSTILE = [
    "torch:os.system",
    "torch:os",
    "torch:sys.modules",
    "torch:load",
    "torch:save",
    "torch:from_file",
    "torch:compile",
    "torch:set_num_threads",
    "torch:frombuffer",
    "torch:classes.load_library",
    "torch:ops.load_library",
    "torch:_initExtension",
    "torch:_C._initExtension",
    "torch:builtins.eval",
    "torch:__builtins__.eval",
    "torch:__dict__.get",
    "torch:__loader__.exec_module",
    "torch:__getattribute__",
    "torch:importlib.import_module",
    "torch:hub.load",
    "torch.hub:load",
    "torch.hub:download_url_to_file",
    "torch.serialization:load",
    "torch.serialization:pickle.loads",
    "torch.storage:_load_from_bytes",
    "torch.jit:load",
    "torch.package:PackageImporter",
    "torch.utils.cpp_extension:load_inline",
    "torch.utils.model_zoo:load_url",
    "torch.utils.model_dump.__main__:main",
    "torch.distributed.rpc:rpc_sync",
    "torch.distributed.run:main",
    "torch.multiprocessing:spawn",
    "torch.nn.functional:importlib.import_module",
    "torch.nn.functional:_add_docstr",
    "torch.nn.functional:has_torch_function",
    "torch.nn.functional:handle_torch_function",
    "torch.nn.functional:relu.__globals__",
    "torch.nn.functional:relu.__globals__.get",
    "torch.nn.functional:relu.__class__",
    "torch.nn.functional:relu.__code__",
    "torch.nn.functional:relu.__builtins__.get",
    "torch.nn:Module.load_state_dict",
    "torch.nn:Module.__subclasses__",
    "torch.nn:Module.__init__.__globals__.get",
    "torch.nn:Module.__reduce_ex__",
    "torch.nn.modules.module:torch.load",
    "torch.optim.optimizer:warnings.warn",
    "torch.utils.data:get_worker_info",
    "torch.utils.data.dataloader:os.system",
    "torch.utils.data.datapipes.utils.decoder:basichandlers",
    "torch.utils.data.datapipes.utils.decoder:pickle.loads",
    "torch.utils.data.datapipes.utils.decoder:Decoder",
    "torch.utils.data.datapipes.iter.routeddecoder:RoutedDecoderIterDataPipe",
    "builtins:eval",
    "builtins:exec",
    "builtins:compile",
    "builtins:open",
    "builtins:getattr",
    "builtins:__import__",
    "builtins:breakpoint",
    "builtins:type",
    "builtins:object",
    "builtins:bytes.fromhex",
    "builtins:str.format",
    "os:system",
    "posix:system",
    "os.path:join",
    "subprocess:Popen",
    "subprocess:run",
    "shutil:rmtree",
    "pickle:loads",
    "importlib:import_module",
    "runpy:run_path",
    "functools:partial",
    "operator:methodcaller",
    "ctypes:CDLL",
    "sys:exit",
    "numpy:load",
    "monai.bundle:ConfigParser",
    "monai.bundle.scripts:run",
    "monai.networks.utils:save_state",
    "torchvision.datasets.utils:download_url",
    "torchvision.io:write_file",
    "timm.utils.summary:update_summary",
    "timm.models._helpers:load_checkpoint",
    "__main__:main",
    ".config.config:os.system",
    ".config.config:os.environ.get",
    ".config.config:make_global_config",
    ".config.config:Path",
    ".config.config:global_config",
    ".config.capture:ast.literal_eval",
    ".config.capture:restore",
    ".config.capture:functools.partial",
    ".config.keys:KEYS",
    ".config.references:importlib.import_module",
    ".config.references:resolve",
    ".config.references:sys.exit",
    ".config.references:FunctionType",
    ".config.references:_module",
    ".config.references:_find",
    ".utils.path:write_atomic",
    ".utils.path:create_dirs",
    ".utils.name:make_unique_dir",
    ".utils.weights:save_weights",
    ".utils.logging:write_log",
    ".utils.logging.csv:write_log",
    ".training.checkpoint:save_checkpoint",
    ".utils.logging.journal:Journal",
    ".training.pytorch_training:train",
    ".utils.data.facts:_write_cache",
    ".utils.loss:torch.load",
    ".utils.loss:_dice",
    ".utils.loss:f1.__call__",
    ".models:UNET.__init__",
    ".utils.loss:f1.__globals__.get",
    ".utils.loss:IGNORE_INDEX",
    ".models:UNET.load_state_dict",
    ".models:UNET.__subclasses__",
    "..os:system",
    "...:x",
    ".:x",
    ":system",
    ":",
    "",
    " os:system",
    "os :system",
    "torch/../os:system",
    "torch.nn\0:Linear",
    "torch..nn:Linear",
    "torch.nn:",
    "torch.nn",
    "torch.hub",
    "torchevil:x",
    "dida_tools_evil:x",
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(arguments, cwd, *python_path, root_path=None):
    kept = {key: value for key, value in os.environ.items() if key not in global_config}
    env = kept | {"PYTHONPATH": os.pathsep.join(map(str, python_path)), "OMP_NUM_THREADS": "1"}
    if root_path:
        env["ROOT_PATH"] = str(root_path)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder on sys.path, as site-packages is; its modules are forgotten afterwards."""
    known = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A ROOT_PATH of its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setitem(global_config, "ROOT_PATH", str(folder))
    return folder


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMED)
def test_an_object_has_this_name_and_the_name_gives_the_object(name):
    assert name_of(NAMED[name]) == name
    assert resolve(name) is NAMED[name]


def test_every_public_layer_loss_optimizer_and_schedule_has_a_name():
    for home, base in (
        (nn, nn.Module),
        (torch.optim, torch.optim.Optimizer),
        (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
    ):
        for obj in vars(home).values():
            if isinstance(obj, type) and issubclass(obj, base) and not obj.__name__.startswith("_"):
                assert resolve(name_of(obj)) is obj


def test_every_public_function_of_torch_nn_functional_has_a_name():
    homes = ("torch", "torch.nn.functional", "torch._C._nn")
    public = {
        name: found
        for name, found in vars(functional).items()
        if not name.startswith("_") and callable(found)
    }
    functions = [f for f in public.values() if f.__module__ in homes and not isinstance(f, type)]
    assert len(functions) > 100
    for function in functions:
        assert resolve(name_of(function)) is function


def test_a_module_of_the_package_is_named_relative_to_it():
    assert name_of(dida_tools.models.unet) == ".models.unet"
    assert resolve(".models.unet") is dida_tools.models.unet


def test_a_nested_class_is_found(project, library, monkeypatch):
    write(project / "parts.py", "class Outer:\n    class Inner: ...\n")
    monkeypatch.syspath_prepend(project)
    import parts

    assert name_of(parts.Outer.Inner) == "parts:Outer.Inner"
    assert resolve("parts:Outer.Inner") is parts.Outer.Inner
    del sys.modules["parts"]


class Local:
    def method(self): ...

    @classmethod
    def make(cls): ...


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        (lambda x: x, "a lambda has no name"),
        (UNET(1, 1, bulk_ch=1, n_recursions=1), "an instance of UNET cannot be recorded"),
        (object(), "an instance of object cannot be recorded"),
        ({1, 2}, "an instance of set cannot be recorded: give a plain value"),
        (np.float64(0.5), "an instance of float64 cannot be recorded: give a plain value"),
        (torch.ones(1), "an instance of Tensor cannot be recorded"),
        (Local().method, "Local.method is a bound method"),
        (Local.make, "Local.make is a bound method"),
        (nn.ReLU().forward, "ReLU.forward is a bound method"),
        (os.system, "outside of what may be restored"),
        (eval, "outside of what may be restored"),
        (torch.load, "outside of what may be restored|not found under its own name"),
        (torch.nn.init.ones_, "outside of what may be restored"),
        (references.resolve, "it belongs to what runs the project, so define what a config names elsewhere"),
        (references._find, "it is private, so give it another name"),
        (torch.hub, "only the project's own modules"),
        (os, "only the project's own modules"),
    ],
)
def test_what_no_record_may_hold_has_no_name(obj, reason):
    with pytest.raises(ReferenceProblem, match=reason):
        name_of(obj)


def test_a_closure_has_no_name():
    def closure(): ...

    with pytest.raises(
        ReferenceProblem, match=r"closure is defined inside a function: move it to the top of a module"
    ):
        name_of(closure)


def test_an_object_that_was_replaced_under_its_name_has_no_name(monkeypatch):
    monkeypatch.setattr(dida_tools.models.unet, "UNET", nn.Identity)
    with pytest.raises(ReferenceProblem, match=r"UNET is not found under its own name"):
        name_of(UNET)


@pytest.mark.parametrize(
    "name", [".models.unet:Nothing", ".models.nowhere:UNET", "torch.nn:Nothing", "torchvision_x:f"]
)
def test_a_name_of_nothing_is_refused(name):
    with pytest.raises(ReferenceProblem, match=r"is not found|outside of what may be restored"):
        resolve(name)


def test_an_object_that_an_alias_leads_away_from_has_no_name(project, monkeypatch):
    write(project / "my_losses.py", "def loss(a, b): ...\n")
    monkeypatch.syspath_prepend(project)
    loss = resolve("my_losses:loss")
    assert name_of(loss) == "my_losses:loss"
    monkeypatch.setitem(ALIASES, "my_losses:loss", ".utils.loss:f1")
    with pytest.raises(ReferenceProblem, match="is not found under its own name"):
        name_of(loss)
    del sys.modules["my_losses"]


# -------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused(name):
    with pytest.raises(ReferenceProblem):
        resolve(name)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["MODEL_CONFIG", "METRICS"])
def test_a_hostile_record_is_refused(name, key):
    for value in (
        {"@ref": name},
        {"@module": name},
        [{"@tuple": [{"@ref": name}]}],
        {"@partial": {"@ref": name}, "args": ["true"], "kwargs": {}},
        {"@partial": {"@ref": "torch:relu"}, "args": [{"@ref": name}], "kwargs": {"x": {"@ref": name}}},
        {"@dict": [[{"@ref": name}, 1]]},
        {"@dict": [[1, {"@ref": name}]]},
    ):
        with pytest.raises(ConfigError):
            restore({"version": 1, "config": {key: {"x": value}}})


def test_nothing_outside_of_the_allow_list_is_imported(library, tmp_path):
    trace = tmp_path / "trace"
    write(
        library / "evil.py",
        f"open({str(trace)!r}, 'w').close()\ndef run(*args, **kwargs): ...\nclass Net: ...\n",
    )
    write(library / "evil_package" / "__init__.py", f"open({str(trace)!r}, 'w').close()\n")
    write(library / "evil_package" / "part.py", "def run(): ...\n")
    before = set(sys.modules)
    names = [
        "evil:run",
        "evil:Net",
        "evil:os.system",
        "evil",
        "evil:",
        "evil_package.part:run",
        "evil_package.part",
    ]
    for name in names:
        for value in (
            {"@ref": name},
            {"@module": name},
            {"@partial": {"@ref": name}, "args": [], "kwargs": {}},
        ):
            for key in ("MODEL", "LOSS", "ROUTINE_NAME", "EPOCHS", "UNKNOWN", "@dict", ""):
                with pytest.raises(ConfigError):
                    restore({"version": 1, "config": {key: value}})
    with pytest.raises(ConfigError):
        restore({"version": 1, "config": {"@ref": "evil:run"}})
    assert not trace.exists()
    assert not any(name.startswith("evil") for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("this:s", "this"),
        ("antigravity:webbrowser", "antigravity"),
        ("torch.utils.model_dump.__main__:main", "torch.utils.model_dump.__main__"),
        ("torch.utils.bottleneck:x", "torch.utils.bottleneck"),
        ("torch.contrib._tensorboard_vis:visualize", "torch.contrib._tensorboard_vis"),
        ("monai.bundle:run", "monai"),
    ],
)
def test_a_refused_module_is_not_even_imported(name, module, monkeypatch):
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ReferenceProblem, match="outside of what may be restored"):
        resolve(name)
    assert module not in sys.modules


def test_a_record_cannot_make_the_project_import_or_write_for_it(library, tmp_path):
    trace = tmp_path / "trace"
    write(library / "evil.py", f"open({str(trace)!r}, 'w').close()\n")
    for function, arguments in (
        (".config.references:resolve", ["evil:run", ["evil"]]),
        (".config.references:_module", ["evil"]),
        (".config.capture:restore", [{"version": 1, "config": {"MODEL": {"@ref": "evil:run"}}}, ["evil"]]),
        (".utils.path:create_dirs", [str(trace)]),
        (".utils.path:write_atomic", [str(trace)]),
        (".utils.name:make_unique_dir", [str(tmp_path), "trace"]),
        (".utils.logging.csv:write_log", [str(trace), {"a": 1}]),
        (".utils.weights:save_weights", [str(trace), {}]),
        (".utils.logging.journal:Journal", [str(trace)]),
    ):
        record = {"activ": {"@partial": {"@ref": function}, "args": arguments, "kwargs": {}}}
        with pytest.raises(ConfigError, match=r"MODEL_CONFIG.activ: .* is outside of what may be restored"):
            restore({"version": 1, "config": {"MODEL_CONFIG": record}})
    assert not trace.exists()


def test_a_file_that_bears_the_name_of_a_library_does_not_admit_the_library(project):
    write(project / "colorsys.py", "")
    write(project / "pickle.py", "")
    write(project / "time.py", "")
    for name in ("colorsys:hls_to_rgb", "pickle:loads", "time:sleep"):
        assert not is_project_module(name.partition(":")[0])
        with pytest.raises(ReferenceProblem, match="outside of what may be restored"):
            resolve(name)


def test_a_function_that_a_project_file_merely_imports_is_refused(project, monkeypatch):
    write(
        project / "my_losses.py", "from os import system\nfrom subprocess import Popen\ndef loss(a, b): ...\n"
    )
    monkeypatch.syspath_prepend(project)
    assert resolve("my_losses:loss").__name__ == "loss"
    for name in ("system", "Popen", "loss.__globals__"):
        with pytest.raises(ReferenceProblem, match="outside of what may be restored"):
            resolve(f"my_losses:{name}")
    del sys.modules["my_losses"]


def test_an_instance_in_a_project_file_is_refused(project, monkeypatch):
    write(project / "my_things.py", "class Thing: ...\nthing = Thing()\n")
    monkeypatch.syspath_prepend(project)
    assert isinstance(resolve("my_things:Thing"), type)
    with pytest.raises(ReferenceProblem, match="outside of what may be restored"):
        resolve("my_things:thing")
    del sys.modules["my_things"]


@pytest.mark.parametrize("name", ["torch:nn.ELU", ".utils.loss:functional.relu", ".models:unet.UNET"])
def test_a_name_does_not_lead_through_another_module(name):
    with pytest.raises(ReferenceProblem, match="is a module"):
        resolve(name)


def test_a_folder_of_the_project_that_is_no_package_is_not_its_module(project):
    write(project / "data" / "script.py", "")
    assert not is_project_module("data.script")
    assert not is_project_module("no such name")
    assert is_project_module("dida_tools.models.unet")
    assert not is_project_module("dida_toolsx")


# ------------------------------------------------------------------------------------------------------------ libraries


@pytest.fixture
def somelib(library):
    write(library / "somelib" / "__init__.py", "from os import system\nimport subprocess\n")
    write(library / "somelib" / "nets.py", "class Net: ...\ndef loss(a, b): ...\n")
    write(library / "somelib" / "bundle.py", "def run(): ...\n")
    write(library / "somelib_evil.py", "def run(): ...\n")
    return library


@pytest.mark.parametrize("name", ["somelib.nets:Net", "somelib.nets:loss"])
def test_a_foreign_library_is_refused_and_the_message_says_how_to_extend(somelib, name):
    wanted = r"if you trust 'somelib', add it to ALLOWED_ROOTS in dida_tools/config/config.py"
    with pytest.raises(ReferenceProblem, match=wanted):
        resolve(name)
    with pytest.raises(ConfigError, match=f"MODEL_CONFIG.x: .*{wanted}"):
        restore({"version": 1, "config": {"MODEL_CONFIG": {"x": {"@ref": name}}}})
    assert "somelib" not in sys.modules


@pytest.mark.parametrize("name", ["somelib.nets:Net", "somelib.nets:loss"])
def test_an_added_library_gives_its_functions_and_classes(somelib, name, monkeypatch):
    obj = resolve(name, roots=["somelib"])
    assert name_of(obj) == name
    record = {"version": 1, "config": {"MODEL_CONFIG": {"x": {"@ref": name}}}}
    assert restore(record, roots=["somelib"])["MODEL_CONFIG"]["x"] is obj
    monkeypatch.setattr(references, "ALLOWED_ROOTS", ("somelib",))
    assert restore(record)["MODEL_CONFIG"]["x"] is obj


def test_an_added_library_does_not_lend_its_name_to_what_it_imports(somelib):
    for name in ("somelib:system", "somelib:subprocess.Popen", "somelib:subprocess", "somelib_evil:run"):
        with pytest.raises(ReferenceProblem):
            resolve(name, roots=["somelib"])


def test_a_part_of_a_library_can_be_added(somelib):
    assert resolve("somelib.nets:Net", roots=["somelib.nets"]).__name__ == "Net"
    with pytest.raises(ReferenceProblem, match="if you trust 'somelib'"):
        resolve("somelib.bundle:run", roots=["somelib.nets"])


def test_functions_of_numpy_once_it_is_added():
    assert resolve("numpy:mean", roots=["numpy"]) is np.mean
    assert resolve(name_of(np.mean), roots=["numpy"]) is np.mean


@pytest.mark.parametrize(
    "code",
    ["raise RuntimeError('no GPU')", "import sys; sys.exit(1)", "def", "1 / 0", "import nowhere_to_be_found"],
)
def test_a_library_that_fails_to_import_is_reported_by_name(library, code):
    write(library / "brittle.py", code)
    with pytest.raises(ConfigError, match=r"MODEL_CONFIG.x: 'brittle:Net' is not found"):
        restore({"version": 1, "config": {"MODEL_CONFIG": {"x": {"@ref": "brittle:Net"}}}}, roots=["brittle"])


def test_an_allowed_library_that_is_not_installed_is_reported_so(monkeypatch):
    monkeypatch.setattr(references, "ALLOWED_ROOTS", ("not_installed_at_all",))
    with pytest.raises(
        ReferenceProblem, match=r"is not found \(No module named 'not_installed_at_all'\): install"
    ):
        resolve("not_installed_at_all:Net")


# -------------------------------------------------------------------------------------------------------------- aliases


def test_an_alias_gives_the_object_under_its_new_name(monkeypatch):
    monkeypatch.setitem(ALIASES, "old_project.nets:OldUNET", ".models.unet:UNET")
    record = {"version": 1, "config": {"MODEL": {"@ref": "old_project.nets:OldUNET"}}}
    assert restore(record) == {"MODEL": UNET}


@pytest.mark.parametrize("name", list(ALIASES))
def test_every_shipped_alias_leads_somewhere(name):
    assert callable(resolve(name))


def test_an_alias_is_no_way_around_the_rules(monkeypatch):
    monkeypatch.setitem(ALIASES, "old:x", "os:system")
    with pytest.raises(ReferenceProblem, match="outside of what may be restored"):
        resolve("old:x")


# ------------------------------------------------------------------------------------- other packages, scripts, prompts

RESTORE_UNET = """
import json, sys
from renamed_project.config.capture import capture, restore
from renamed_project.models import UNET
from renamed_project.utils.loss import f1

record = json.loads(sys.argv[1])
config = restore(record)
assert config["MODEL"] is UNET and config["METRICS"]["f1"] is f1
assert UNET.__module__ == "renamed_project.models.unet"
assert config["ROUTINE_NAME"].__name__ == "renamed_project.models.unet"
assert capture(config) == record
assert not any(name.partition(".")[0] == "dida_tools" for name in sys.modules)
print("restored")
"""

SCRIPT = """
import json
from torch import nn
from dida_tools.config.capture import capture, check, restore

class Net(nn.Module): ...

def loss(prediction, target): ...

config = {"MODEL": Net, "LOSS": loss, "MODEL_CONFIG": {"activ": Net}}

if __name__ == "__main__":
    record = json.dumps(capture(config))
    restored = restore(json.loads(record))
    assert restored["MODEL"] is Net and restored["LOSS"] is loss and restored["MODEL_CONFIG"]["activ"] is Net
    print(record)
"""

RESTORE_SCRIPT = """
import json, sys
from dida_tools.config.capture import capture, restore

record = json.loads(sys.argv[1])
config = restore(record)
import my_train
assert config == my_train.config and config["MODEL"] is my_train.Net
assert capture(config) == record
print("restored")
"""

PROMPT = """
from torch import nn
from dida_tools.config.capture import capture, check, ConfigError
class Net(nn.Module): ...
try:
    capture({"MODEL": Net})
except ConfigError as error:
    print(error)
problems = []
record = capture({"MODEL": Net}, problems)
assert len(problems) == 1 and "@unrecorded" in record["config"]["MODEL"]
"""


def test_a_record_survives_a_renamed_package(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "dida_tools", tmp_path / "renamed_project", ignore=ignored)
    objects = {"MODEL": UNET, "METRICS": {"f1": f1}, "ROUTINE_NAME": dida_tools.models.unet}
    record = json.dumps({"version": 1, "config": references_of(objects)})
    assert run(["-c", RESTORE_UNET, record], tmp_path, tmp_path) == "restored"


def references_of(objects):
    return {
        "MODEL": {"@ref": name_of(objects["MODEL"])},
        "METRICS": {"f1": {"@ref": name_of(objects["METRICS"]["f1"])}},
        "ROUTINE_NAME": {"@module": name_of(objects["ROUTINE_NAME"])},
    }


def test_an_object_of_the_running_script_is_recorded_under_the_scripts_name(tmp_path):
    script = write(tmp_path / "my_train.py", SCRIPT)
    record = run([script], tmp_path, CHECKOUT, root_path=tmp_path)
    config = json.loads(record)["config"]
    assert config["MODEL"] == {"@ref": "my_train:Net"}
    assert config["LOSS"] == {"@ref": "my_train:loss"}
    assert run(["-c", RESTORE_SCRIPT, record], tmp_path, CHECKOUT, tmp_path, root_path=tmp_path) == "restored"


def test_a_script_run_with_m_has_the_same_name(tmp_path):
    write(tmp_path / "my_train.py", SCRIPT)
    record = run(["-m", "my_train"], tmp_path, CHECKOUT, root_path=tmp_path)
    assert json.loads(record)["config"]["MODEL"] == {"@ref": "my_train:Net"}


def test_an_object_typed_at_the_prompt_is_refused_with_the_remedy(tmp_path):
    message = run(["-c", PROMPT], tmp_path, CHECKOUT)
    assert message == (
        "the config has 1 problem: MODEL cannot be recorded: "
        "it is defined in a notebook or at the prompt: move it to a module."
    )
