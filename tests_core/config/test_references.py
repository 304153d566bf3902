import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.config import references
from dida_core.config.references import ReferenceProblem
from dida_core.errors import ConfigError
from torch import nn
from torch.nn import functional

import dida_tools.models.unet
from dida_tools.config.config import ALIASES, global_config
from dida_tools.layers import ConvLayer
from dida_tools.models import UNET
from dida_tools.training import pytorch_training
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import flip
from dida_tools.utils.loss import f1, masked_f1, smooth_dice_loss

from tests_core.config import configs
from tests_core.config.configs import PROJECT, record

CHECKOUT = Path(dida_tools.__file__).parents[1]
OUTSIDE = "is outside of what may be restored"
NAMED = {
    ".models.unet:UNET": UNET,
    ".layers.conv:ConvLayer": ConvLayer,
    ".utils.loss:smooth_dice_loss": smooth_dice_loss,
    ".utils.loss:f1": f1,
    ".utils.loss:masked_f1": masked_f1,
    ".utils.data.datasets:NpyDataset": NpyDataset,
    ".utils.data.transforms:flip": flip,
    "torch.nn:ELU": nn.ELU,
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
    ".models.unet": dida_tools.models.unet,
    ".training.pytorch_training": pytorch_training,
}
HOSTILE_NAMES = """
torch:os.system torch:os torch:sys.modules torch:load torch:save torch:from_file torch:compile
torch:set_num_threads torch:frombuffer torch:classes.load_library torch:ops.load_library
torch:_initExtension torch:_C._initExtension torch:builtins.eval torch:__builtins__.eval torch:__dict__.get
torch:__loader__.exec_module torch:__getattribute__ torch:importlib.import_module torch:hub.load
torch.hub:load torch.hub:download_url_to_file torch.serialization:load torch.serialization:pickle.loads
torch.storage:_load_from_bytes torch.jit:load torch.package:PackageImporter
torch.utils.cpp_extension:load_inline torch.utils.model_zoo:load_url torch.utils.model_dump.__main__:main
torch.distributed.rpc:rpc_sync torch.distributed.run:main torch.multiprocessing:spawn
torch.nn.functional:importlib.import_module torch.nn.functional:_add_docstr
torch.nn.functional:has_torch_function torch.nn.functional:handle_torch_function
torch.nn.functional:relu.__globals__ torch.nn.functional:relu.__globals__.get
torch.nn.functional:relu.__class__ torch.nn.functional:relu.__code__
torch.nn.functional:relu.__builtins__.get torch.nn:Module.load_state_dict torch.nn:Module.__subclasses__
torch.nn:Module.__init__.__globals__.get torch.nn:Module.__reduce_ex__ torch.nn.modules.module:torch.load
torch.optim.optimizer:warnings.warn torch.nn.modules.module:register_module_forward_hook torch.nn.init:ones_
torch.nn.utils:clip_grad_norm_ torch.utils.data:get_worker_info torch.utils.data.dataloader:os.system
torch.utils.data.datapipes.utils.decoder:basichandlers torch.utils.data.datapipes.utils.decoder:pickle.loads
torch.utils.data.datapipes.utils.decoder:Decoder
torch.utils.data.datapipes.iter.routeddecoder:RoutedDecoderIterDataPipe builtins:eval builtins:exec
builtins:compile builtins:open builtins:getattr builtins:__import__ builtins:breakpoint builtins:type
builtins:object builtins:bytes.fromhex builtins:str.format os:system posix:system os.path:join
subprocess:Popen subprocess:run shutil:rmtree pickle:loads importlib:import_module runpy:run_path
functools:partial operator:methodcaller ctypes:CDLL sys:exit numpy:load monai.bundle:ConfigParser
monai.bundle.scripts:run monai.networks.utils:save_state torchvision.datasets.utils:download_url
torchvision.io:write_file timm.utils.summary:update_summary timm.models._helpers:load_checkpoint
__main__:main train:main runs:main new_project:main

.config.config:os.system .config.config:os.environ.get .config.config:make_global_config .config.config:Path
.config.config:global_config .config.capture:restore .config.capture:functools.partial .config.keys:KEYS
.config.overrides:ast.literal_eval .config.references:importlib.import_module .config.references:resolve
.config.references:sys.exit .config.references:FunctionType .config.references:_module
.config.references:_find .utils.path:create_dirs .utils.name:make_unique_dir .utils.weights:save_weights
.utils.logging:write_log .utils.logging.csv:write_log .training.checkpoint:save_checkpoint
.utils.logging.journal:Journal .utils.notify.smtp:SMTPNotifier .training.pytorch_training:train
.training.run:start_run .utils.data.scenes:make_scenes .utils.data.facts:scan_files
.utils.data.facts:_write_cache .utils.files:write_atomic .search.storage:open_storage .search.study:Search
.prediction.predict:predict .utils.loss:torch.load .utils.loss:_dice .utils.loss:f1.__call__
.models:UNET.__init__ .utils.loss:f1.__globals__.get .utils.loss:IGNORE_INDEX .models:UNET.load_state_dict
.models:UNET.forward .models:UNET.__subclasses__ ..os:system ...:x .:x torch/../os:system torch..nn:Linear
.utils.torchutils:load_model torch.nn: torch.nn torch.hub torchevil:x dida_tools_evil:x .config.config
.search.study
"""
HOSTILE = ["", ":", ":system", " os:system", "os :system", "torch.nn\0:Linear", *HOSTILE_NAMES.split()]


def name_of(obj, project=PROJECT):
    return references.name_of(obj, project)


def resolve(name, roots=(), project=PROJECT):
    return references.resolve(name, project, roots)


def restored(value, roots=(), project=PROJECT):
    config = configs.capturing.restore(record(MODEL_CONFIG={"x": value}), project, roots)
    return config["MODEL_CONFIG"]["x"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(arguments, cwd, *python_path):
    kept = {key: value for key, value in os.environ.items() if key not in global_config}
    env = kept | {"PYTHONPATH": os.pathsep.join(map(str, python_path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
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


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", NAMED)
def test_an_object_has_this_name_and_the_name_gives_the_object(name):
    assert name_of(NAMED[name]) == name
    assert resolve(name) is NAMED[name]


def test_every_public_layer_loss_optimizer_and_schedule_has_a_name():
    homes = {nn: nn.Module, torch.optim: torch.optim.Optimizer}
    for home, base in (homes | {torch.optim.lr_scheduler: torch.optim.lr_scheduler.LRScheduler}).items():
        for obj in vars(home).values():
            if isinstance(obj, type) and issubclass(obj, base) and not obj.__name__.startswith("_"):
                assert resolve(name_of(obj)) is obj


def test_every_public_function_of_torch_nn_functional_has_a_name():
    homes = ("torch", "torch.nn.functional", "torch._C._nn")
    public = [
        found for name, found in vars(functional).items() if not name.startswith("_") and callable(found)
    ]
    functions = [found for found in public if found.__module__ in homes and not isinstance(found, type)]
    assert len(functions) > 100
    for function in functions:
        assert resolve(name_of(function)) is function


class Local:
    class Inner: ...

    def method(self): ...

    @classmethod
    def make(cls): ...


UNNAMED = [
    (lambda x: x, "a lambda has no name"),
    (UNET(1, 1, bulk_ch=1, n_recursions=1), "an instance of UNET cannot be recorded"),
    (object(), "an instance of object cannot be recorded"),
    ({1, 2}, "an instance of set cannot be recorded: give a plain value"),
    (np.float64(0.5), "an instance of float64 cannot be recorded: give a plain value"),
    (torch.ones(1), "an instance of Tensor cannot be recorded"),
    (Local().method, "Local.method is a bound method"),
    (Local.make, "Local.make is a bound method"),
    (nn.ReLU().forward, "ReLU.forward is a bound method"),
    (os.system, OUTSIDE),
    (eval, OUTSIDE),
    (torch.load, OUTSIDE),
    (torch.nn.init.ones_, OUTSIDE),
    (references.resolve, "it belongs to what runs the project, so define what a config names in models"),
    (references._find, "it is private, so give it another name"),
    (torch.hub, "only the project's own modules"),
    (os, "only the project's own modules"),
]


@pytest.mark.parametrize(("obj", "reason"), UNNAMED)
def test_what_no_record_may_hold_has_no_name(obj, reason):
    with pytest.raises(ReferenceProblem, match=reason):
        name_of(obj)


def test_a_closure_and_an_object_that_was_replaced_under_its_name_have_no_name(monkeypatch):
    def closure(): ...

    with pytest.raises(ReferenceProblem, match="closure is defined inside a function: move it to the top"):
        name_of(closure)
    monkeypatch.setattr(dida_tools.models.unet, "UNET", nn.Identity)
    with pytest.raises(ReferenceProblem, match="UNET is not found under its own name"):
        name_of(UNET)


@pytest.mark.parametrize("name", [".models.unet:Nothing", ".models.nowhere:UNET", "torch.nn:Nothing"])
def test_a_name_of_nothing_is_not_found(name):
    with pytest.raises(ReferenceProblem, match="is not found"):
        resolve(name)


# ---------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_wherever_it_stands(name):
    with pytest.raises(ReferenceProblem):
        resolve(name)
    relu, ref = {"@ref": "torch:relu"}, {"@ref": name}
    for value in (
        *(ref, {"@module": name}, [{"@tuple": [ref]}], {"@dict": [[ref, 1]]}, {"@dict": [[1, ref]]}),
        {"@partial": ref, "args": ["true"], "kwargs": {}},
        {"@partial": relu, "args": [ref], "kwargs": {"x": ref}},
    ):
        for key in ("MODEL_CONFIG", "METRICS"):
            with pytest.raises(ConfigError):
                configs.restore(record(**{key: {"x": value}}))


def test_of_the_project_a_record_may_name_these_modules_alone():
    """Whoever adds a file to the project decides here whether a record, which is not trusted, may name it."""
    found = set()
    modules = pkgutil.walk_packages(dida_tools.__path__, "dida_tools.")
    for module in (module for module in modules if not module.name.endswith("_training")):
        with contextlib.suppress(ImportError, ReferenceProblem):
            for name in vars(importlib.import_module(module.name)):
                with contextlib.suppress(ReferenceProblem):
                    found.add(resolve(f"{module.name}:{name}").__module__)
    assert {name.partition(".")[2] for name in found if name.startswith("dida_tools.")} == {
        *("layers.conv", "models.unet", "training.config", "utils.loss", "utils.metrics", "utils.torchutils"),
        *("utils.data.datasets", "utils.data.scenes", "utils.data.transforms"),
    }


def test_nothing_outside_of_the_allow_list_is_imported(library, tmp_path):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()\ndef run(*args, **kwargs): ...\nclass Net: ...\n"
    for file in ("evil.py", "evil_package/__init__.py", "evil_package/part.py"):
        write(library / file, code)
    before = set(sys.modules)
    for name in (
        "evil:run",
        "evil:Net",
        "evil:os.system",
        "evil",
        "evil:",
        "evil_package.part:run",
        "evil_package",
    ):
        ref, module = {"@ref": name}, {"@module": name}
        for value in (ref, module, {"@partial": ref, "args": [], "kwargs": {}}):
            for key in ("MODEL", "LOSS", "ROUTINE_NAME", "EPOCHS", "UNKNOWN", "@dict", ""):
                with pytest.raises(ConfigError):
                    configs.restore(record(**{key: value}))
    assert not trace.exists()
    assert not any(name.startswith("evil") for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    "name",
    [
        *("this:s", "antigravity:webbrowser", "torch.utils.model_dump.__main__:main", "monai.bundle:run"),
        *(
            "torch.utils.bottleneck:x",
            "torch.contrib._tensorboard_vis:visualize",
            "torch.utils.data.datapipes:x",
        ),
    ],
)
def test_a_refused_module_is_not_even_imported(name, monkeypatch):
    module = name.partition(":")[0]
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ReferenceProblem, match=OUTSIDE):
        resolve(name)
    assert module not in sys.modules


def test_a_file_beside_the_package_is_a_library_like_any_other(library, monkeypatch):
    """Where a file lies makes it no more trusted: neither a script nor what bears the name of a library."""
    project = dataclasses.replace(PROJECT, root=library)
    write(
        library / "my_losses.py", "from os import system\ndef loss(a, b): ...\nclass Net: ...\nnet = Net()\n"
    )
    write(library / "colorsys.py", "")
    for name in ("my_losses:loss", "my_losses", "colorsys:hls_to_rgb"):
        with pytest.raises(ReferenceProblem, match=OUTSIDE):
            resolve(name, project=project)
    allowed = dataclasses.replace(project, allowed=("my_losses",))
    loss = resolve("my_losses:loss", project=allowed)
    assert name_of(loss) == "my_losses:loss"  # so a run trains, and its row says what restoring it needs
    for name in ("system", "net", "loss.__globals__", "Net.mro"):
        with pytest.raises(ReferenceProblem, match=OUTSIDE):
            resolve(f"my_losses:{name}", project=allowed)
    renamed = dataclasses.replace(allowed, aliases={"my_losses:loss": ".utils.loss:f1"})
    with pytest.raises(ReferenceProblem, match="is not found under its own name"):
        name_of(loss, renamed)


@pytest.mark.parametrize("name", ["torch:nn.ELU", ".utils.loss:functional.relu", ".models:unet.UNET"])
def test_a_name_does_not_lead_through_another_module(name):
    with pytest.raises(ReferenceProblem, match="is a module"):
        resolve(name)


# -------------------------------------------------------------------------------------------------- libraries


@pytest.fixture
def somelib(library):
    write(library / "somelib" / "__init__.py", "from os import system\nimport subprocess\n")
    net = "class Net:\n    @classmethod\n    def register(cls, path): ...\n    class Inner: ...\n"
    write(library / "somelib" / "nets.py", net + "def loss(a, b): ...\n")
    write(library / "somelib" / "bundle.py", "def run(): ...\n")
    write(library / "somelib_evil.py", "def run(): ...\n")


def test_a_foreign_library_is_refused_and_the_message_says_how_to_extend(somelib):
    wanted = "if you trust 'somelib', add it to ALLOWED_ROOTS in dida_tools/config/config.py"
    with pytest.raises(ReferenceProblem, match=wanted):
        resolve("somelib.nets:Net")
    with pytest.raises(ConfigError, match=f"MODEL_CONFIG.x: .*{wanted}"):
        restored({"@ref": "somelib.nets:loss"})
    assert "somelib" not in sys.modules


@pytest.mark.parametrize("name", ["somelib.nets:Net", "somelib.nets:loss", "somelib.nets:Net.Inner"])
def test_an_added_library_gives_its_functions_and_classes(somelib, name):
    obj = resolve(name, roots=["somelib"])
    assert name_of(obj) == name
    assert restored({"@ref": name}, roots=["somelib"]) is obj
    assert restored({"@ref": name}, project=dataclasses.replace(PROJECT, allowed=("somelib.nets",))) is obj
    with pytest.raises(ReferenceProblem, match="if you trust 'somelib'"):
        resolve("somelib.bundle:run", roots=["somelib.nets"])


@pytest.mark.parametrize("name", ["system", "subprocess.Popen", "subprocess", "nets.Net.register"])
def test_an_added_library_lends_its_name_neither_to_what_it_imports_nor_to_methods(somelib, name):
    for module in ("somelib", "somelib.nets", "somelib_evil"):
        with pytest.raises(ReferenceProblem):
            resolve(f"{module}:{name.removeprefix('nets.')}", roots=["somelib"])


def test_a_folder_of_the_project_can_be_added_relative_to_it():
    name = ".config.config:make_global_config"
    assert resolve(name, project=dataclasses.replace(PROJECT, allowed=(".config",))).__name__ in name


def test_functions_of_numpy_once_it_is_added():
    assert resolve("numpy:mean", roots=["numpy"]) is np.mean
    assert resolve(name_of(np.mean), roots=["numpy"]) is np.mean


BRITTLE = [
    "raise RuntimeError('no GPU')",
    "import sys; sys.exit(1)",
    "def",
    "1 / 0",
    "import nowhere_to_be_found",
]


@pytest.mark.parametrize("code", BRITTLE)
def test_a_library_that_fails_to_import_is_reported_by_name(library, code):
    write(library / "brittle.py", code)
    with pytest.raises(ConfigError, match=r"MODEL_CONFIG.x: 'brittle:Net' is not found"):
        restored({"@ref": "brittle:Net"}, roots=["brittle"])
    with pytest.raises(ReferenceProblem, match=r"is not found \(No module named 'not_installed'\): install"):
        resolve("not_installed:Net", roots=["not_installed"])


def test_an_alias_gives_the_object_under_its_new_name_and_is_no_way_around_the_rules():
    aliases = {"old_project.nets:OldUNET": ".models.unet:UNET", "old:x": "os:system"}
    project = dataclasses.replace(PROJECT, aliases=aliases)
    assert resolve("old_project.nets:OldUNET", project=project) is UNET
    with pytest.raises(ReferenceProblem, match=OUTSIDE):
        resolve("old:x", project=project)
    assert all(callable(resolve(name)) for name in ALIASES)


# --------------------------------------------------------------------------- other packages, scripts, prompts

RESTORE_UNET = """
import json, sys
from renamed_project.config.capture import capture, restore
from renamed_project.config.project import project_of
from renamed_project.models import UNET
from renamed_project.utils.loss import f1

record, project = json.loads(sys.argv[1]), project_of("renamed_project.models")
config = restore(record, project)
assert config["MODEL"] is UNET and config["METRICS"]["f1"] is f1
assert UNET.__module__ == "renamed_project.models.unet"
assert config["ROUTINE_NAME"].__name__ == "renamed_project.models.unet"
assert capture(config, project) == record
assert not any(name.partition(".")[0] == "dida_tools" for name in sys.modules)
"""


def test_a_record_survives_a_renamed_package(tmp_path):
    shutil.copytree(
        CHECKOUT / "dida_tools", tmp_path / "renamed_project", ignore=shutil.ignore_patterns("__pyc*")
    )
    objects = {"MODEL": UNET, "METRICS": {"f1": f1}, "ROUTINE_NAME": dida_tools.models.unet}
    run(["-c", RESTORE_UNET, json.dumps(configs.capture(objects))], tmp_path, tmp_path)


def main_module(monkeypatch, **attributes):
    """Make a module the running script, or a notebook where it has no file, with a model in it."""
    module = types.ModuleType("__main__")
    vars(module).update(attributes, Net=type("Net", (nn.Module,), {"__module__": "__main__"}))
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


@pytest.mark.parametrize(
    "attributes",
    [{"__file__": "/somewhere/my_train.py"}, {"__file__": "", "__spec__": ModuleSpec("my_train", None)}],
)
def test_an_object_of_the_running_script_is_recorded_under_the_scripts_name(attributes, monkeypatch):
    main = main_module(monkeypatch, **attributes)
    captured = configs.capture({"MODEL": main.Net})
    assert captured["config"]["MODEL"] == {"@ref": "my_train:Net"}
    assert configs.restore(captured, ["my_train"])["MODEL"] is main.Net
    with pytest.raises(ConfigError, match="if you trust 'my_train', add it to ALLOWED_ROOTS"):
        configs.restore(captured)


def test_an_object_typed_at_the_prompt_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(
        ReferenceProblem, match="it is defined in a notebook or at the prompt: move it to a mod"
    ):
        name_of(main_module(monkeypatch).Net)
