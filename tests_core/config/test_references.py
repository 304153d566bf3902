import contextlib
import dataclasses
import importlib
import os
import pkgutil
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from dida_core.config import references
from dida_core.config.references import ReferenceProblem
from dida_core.errors import ConfigError
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

import dida_tools.models.unet
import dida_tools.utils.path
from dida_tools.config.config import ALIASES
from dida_tools.models import UNET

from tests_core.config.configs import PROJECT, capture, record, restore

OUTSIDE = "is outside of what may be restored"
NAMED = """
.models.unet:UNET .layers.conv:ConvLayer .utils.loss:f1 .utils.loss:masked_f1 .utils.data.datasets:NpyDataset
.utils.data.transforms:flip torch.nn:ELU torch.nn:BCEWithLogitsLoss torch.optim:SGD torch:relu
torch.optim.lr_scheduler:OneCycleLR torch.utils.data:TensorDataset torch.nn.functional:relu
torch.nn.functional:gelu torch.nn.functional:cross_entropy torch.nn.functional:max_pool2d
torch:pixel_shuffle torch.nn.functional:logsigmoid builtins:dict .models.unet .training.pytorch_training
"""
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
.config.config:global_config .config.config dida_core.config.capture:restore dida_core.config.keys:KEYS
dida_core.config.references:importlib.import_module dida_core.config.references:resolve
dida_core.storage.files:write_atomic dida_core.data.facts:scan_files dida_core.runs.run:start_run
dida_core.search.storage:open_storage dida_core.search.study:Search dida_core.prediction.predict:predict
.training.routines:load_routine .training.routines:importlib.import_module .training.pytorch_training:train
.utils.path:create_dirs .utils.name:make_unique_dir .utils.logging:write_log .utils.logging.csv:write_log
.utils.notify.smtp:SMTPNotifier .utils.data.scenes:make_scenes .utils.torchutils:load_model
.utils.loss:torch.load .utils.loss:_dice .utils.loss:f1.__call__ .utils.loss:IGNORE_INDEX
.utils.loss:f1.__globals__.get .models:UNET.__init__ .models:UNET.load_state_dict .models:UNET.forward
.models:UNET.__subclasses__ ..os:system ...:x .:x torch/../os:system torch..nn:Linear torch.nn: torch.nn
torch.hub torchevil:x dida_tools_evil:x
"""
HOSTILE = ["", ":", ":system", " os:system", "os :system", "torch.nn\0:Linear", *HOSTILE_NAMES.split()]


def name_of(obj, project=PROJECT):
    return references.name_of(obj, project)


def resolve(name, trusted=False, project=PROJECT):
    return references.resolve(name, project, trusted)


def restored(value, *allowed, key="MODEL_CONFIG"):
    project = dataclasses.replace(PROJECT, allowed=allowed)
    return restore(record(**{key: {"x": value}}), project)[key]["x"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


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


@pytest.mark.parametrize("name", NAMED.split())
def test_an_object_has_this_name_and_the_name_gives_the_object(name):
    place, _, attribute = name.partition(":")
    module = importlib.import_module(f"dida_tools{place}" if place.startswith(".") else place)
    obj = getattr(module, attribute) if attribute else module
    assert name_of(obj) == name
    assert resolve(name) is obj


def test_all_public_layers_losses_functions_optimizers_and_schedules_have_names():
    homes = {nn: nn.Module, torch.optim: torch.optim.Optimizer, torch.optim.lr_scheduler: LRScheduler}
    public = [(home, obj) for home in homes for name, obj in vars(home).items() if not name.startswith("_")]
    found = [obj for home, obj in public if isinstance(obj, type) and issubclass(obj, homes[home])]
    places = ("torch", "torch.nn.functional", "torch._C._nn")
    functions = [obj for name, obj in vars(functional).items() if callable(obj) and not name.startswith("_")]
    found += [obj for obj in functions if obj.__module__ in places and not isinstance(obj, type)]
    assert len(found) > 250
    assert all(resolve(name_of(obj)) is obj for obj in found)


UNNAMED = [
    (lambda x: x, "a lambda has no name"),
    (UNET(1, 1, bulk_ch=1, n_recursions=1), "an instance of UNET cannot be recorded"),
    (np.float64(0.5), "an instance of float64 cannot be recorded: give a plain value"),
    (torch.ones(1), "an instance of Tensor cannot be recorded"),
    (dict.fromkeys, "dict.fromkeys is a bound method"),
    (nn.ReLU().forward, "ReLU.forward is a bound method"),
    (os.system, OUTSIDE),
    (eval, OUTSIDE),
    (torch.load, OUTSIDE),
    (nn.init.ones_, OUTSIDE),
    (references.resolve, "records name models, losses, metrics, datasets"),
    (dida_tools.utils.path.create_dirs, "it belongs to what runs the project, so define what a config names"),
    (references._find, "it is private, so give it another name"),
    (torch.hub, "only the project's own modules"),
    (os, "only the project's own modules"),
]


@pytest.mark.parametrize(("obj", "reason"), UNNAMED)
def test_what_no_record_may_hold_has_no_name(obj, reason):
    with pytest.raises(ReferenceProblem, match=reason):
        name_of(obj)


def test_a_closure_and_an_object_that_was_replaced_under_its_name_have_no_name(monkeypatch):
    with pytest.raises(ReferenceProblem, match="is defined inside a function: move it to the top"):
        name_of(type("Net", (), {"__qualname__": "test.<locals>.Net"}))
    monkeypatch.setattr(dida_tools.models.unet, "UNET", nn.Identity)
    with pytest.raises(ReferenceProblem, match="UNET is not found under its own name"):
        name_of(UNET)


# ---------------------------------------------------------------------------------------------------- hostile


def test_a_hostile_name_is_refused_wherever_it_stands():
    relu = {"@ref": "torch:relu"}
    for name in HOSTILE:
        with pytest.raises(ReferenceProblem):
            resolve(name)
        ref = {"@ref": name}
        for value in (
            *(ref, {"@module": name}, [{"@tuple": [ref]}], {"@dict": [[ref, 1]]}, {"@dict": [[1, ref]]}),
            {"@partial": ref, "args": ["true"], "kwargs": {}},
            {"@partial": relu, "args": [ref], "kwargs": {"x": ref}},
        ):
            with pytest.raises(ConfigError):
                restored(value)


def test_what_is_not_there_or_lies_behind_another_module_is_not_found():
    for name in (".models.unet:Nothing", ".models.nowhere:UNET", "torch.nn:Nothing"):
        with pytest.raises(ReferenceProblem, match="is not found"):
            resolve(name)
    for name in ("torch:nn.ELU", ".utils.loss:functional.relu", ".models:unet.UNET"):
        with pytest.raises(ReferenceProblem, match="is a module"):
            resolve(name)


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
        *("layers.conv", "models.unet", "training.config", "utils.loss", "utils.metrics"),
        *("utils.data.datasets", "utils.data.scenes", "utils.data.transforms"),
    }


def test_what_is_refused_is_not_even_imported(library, tmp_path):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').close()\ndef run(*args, **kwargs): ...\nclass Net: ...\n"
    for file in ("evil.py", "evil_package/__init__.py", "evil_package/part.py"):
        write(library / file, code)
    names = ["evil:run", "evil:os.system", "evil", "evil:", "evil_package.part:run", "evil_package"]
    names += ["this:s", "antigravity:webbrowser", "torch.utils.model_dump.__main__:main", "monai.bundle:run"]
    names += ["torch.utils.bottleneck:x", "torch.contrib._tensorboard_vis:visualize"]
    before = set(sys.modules)
    for name in names:
        ref, module = {"@ref": name}, {"@module": name}
        for value in (ref, module, {"@partial": ref, "args": [], "kwargs": {}}):
            for key in ("MODEL", "LOSS", "ROUTINE_NAME", "EPOCHS", "UNKNOWN", "@dict", ""):
                with pytest.raises(ConfigError):
                    restore(record(**{key: value}))
    assert not trace.exists()
    assert not {name.partition(":")[0] for name in names} & (set(sys.modules) - before)


def test_a_file_beside_the_package_is_a_library_like_any_other(library, monkeypatch):
    """Where a file lies makes it no more trusted: neither a script nor what bears the name of a library."""
    project = dataclasses.replace(PROJECT, root=library)
    code = "from os import system\ndef loss(a, b): ...\nclass Net: ...\nnet = Net()\n"
    write(library / "my_losses.py", code)
    write(library / "colorsys.py", "")
    for name in ("my_losses:loss", "my_losses", "colorsys:hls_to_rgb"):
        with pytest.raises(ReferenceProblem, match=OUTSIDE):
            resolve(name, project=project)
    allowed = dataclasses.replace(project, allowed=("my_losses",))
    net = resolve("my_losses:Net", project=allowed)
    assert name_of(net) == "my_losses:Net"
    for name in ("system", "net", "loss", "loss.__globals__", "Net.mro"):
        with pytest.raises(ReferenceProblem, match=OUTSIDE):
            resolve(f"my_losses:{name}", project=allowed)
    renamed = dataclasses.replace(allowed, aliases={"my_losses:Net": ".utils.loss:f1"})
    with pytest.raises(ReferenceProblem, match="is not found under its own name"):
        name_of(net, renamed)


# -------------------------------------------------------------------------------------------------- libraries

NETS = """
from torch import nn
class Net(nn.Module):
    class Inner(nn.Module): ...
    @classmethod
    def register(cls, path): ...
class Importer:
    def __init__(self, path): ...
register = Net.register
def loss(a, b): ...
"""


def test_an_added_module_gives_the_classes_of_the_wanted_kind_that_it_defines_and_nothing_else(library):
    write(library / "somelib" / "__init__.py", "from os import system\nimport subprocess\n")
    write(library / "somelib" / "nets.py", NETS)
    write(
        library / "somelib" / "bundle.py", "from .nets import Net\ndef run(): ...\nclass Runner(Net): ...\n"
    )
    write(library / "somelib_evil.py", "def run(): ...\n")
    wanted = "if you trust 'somelib.nets', add it to ALLOWED_ROOTS in dida_tools/config/config.py"
    for name in ("Net", "loss"):
        with pytest.raises(ConfigError, match=f"MODEL_CONFIG.x: .*{wanted}"):
            restored({"@ref": f"somelib.nets:{name}"})
    assert "somelib" not in sys.modules
    for name in ("somelib.nets:Net", "somelib.nets:Net.Inner"):
        obj = resolve(name, trusted=True)
        assert name_of(obj) == name and restored({"@ref": name}, "somelib.nets") is obj
        with pytest.raises(ConfigError, match=f"MODEL_CONFIG.x cannot be recorded: .*{wanted}"):
            capture({"MODEL_CONFIG": {"x": obj}})
        noted = []
        assert capture({"MODEL_CONFIG": {"x": obj}}, noted)["config"]["MODEL_CONFIG"]["x"] == {"@ref": name}
        assert len(noted) == 1
    partial = {"@partial": {"@ref": "somelib.nets:Net"}, "args": [1], "kwargs": {}}
    assert restored(partial, "somelib.nets").func is resolve("somelib.nets:Net", trusted=True)
    for name in ("loss", "register", "Net.register", "Importer", "nn"):
        with pytest.raises(ConfigError):
            restored({"@ref": f"somelib.nets:{name}"}, "somelib.nets")
        with pytest.raises(ConfigError):
            restored({"@ref": f"somelib.nets:{name}"}, "somelib.nets", key="METRICS")
    # Neither what lies below or above an added module, nor what it has from elsewhere.
    for name in ("somelib.bundle:Runner", "somelib.bundle:Net", "somelib.nets:nn.Module", "somelib:nets.Net"):
        for allowed in ("somelib.nets", "somelib"):
            with pytest.raises(ConfigError):
                restored({"@ref": name}, allowed)
    for name in ("system", "subprocess.Popen", "subprocess", "Net.register", "run"):
        for module in ("somelib", "somelib.nets"):
            with pytest.raises(ReferenceProblem):
                resolve(f"{module}:{name}", trusted=True)
    assert resolve(name_of(np.mean), trusted=True) is np.mean
    with pytest.raises(ConfigError, match="a library gives its classes alone"):
        restored({"@ref": name_of(np.mean)}, np.mean.__module__)
    own = "dida_tools.utils.torchutils:forward"
    assert callable(restored({"@ref": own.removeprefix("dida_tools")}, ".utils.torchutils"))
    with pytest.raises(ConfigError, match=r"if you trust '\.utils\.torchutils', add it to ALLOWED_ROOTS"):
        restored({"@ref": own})


def test_a_library_that_fails_to_import_is_reported_by_name(library):
    codes = ["raise RuntimeError('no GPU')", "import sys; sys.exit(1)", "def", "import nowhere_to_be_found"]
    for number, code in enumerate(codes):
        write(library / f"brittle{number}.py", code)
        with pytest.raises(ConfigError, match=rf"MODEL_CONFIG.x: 'brittle{number}:Net' is not found"):
            restored({"@ref": f"brittle{number}:Net"}, f"brittle{number}")
    with pytest.raises(ReferenceProblem, match=r"is not found \(No module named 'not_installed'\): install"):
        resolve("not_installed:Net", trusted=True)


def test_an_alias_gives_the_object_under_its_new_name_and_is_no_way_around_the_rules():
    aliases = {"old_project.nets:OldUNET": ".models.unet:UNET", "old:x": "os:system"}
    project = dataclasses.replace(PROJECT, aliases=aliases)
    assert resolve("old_project.nets:OldUNET", project=project) is UNET
    with pytest.raises(ReferenceProblem, match=OUTSIDE):
        resolve("old:x", project=project)
    assert all(resolve(old) is resolve(new) and old.lstrip(".") == new[1:] for old, new in ALIASES.items())


# ---------------------------------------------------------------------- renamed packages, scripts and prompts


def test_a_record_survives_a_renamed_package(library):
    write(
        library / "renamed_project" / "models" / "unet.py",
        "from torch import nn\nclass UNET(nn.Module): ...\n",
    )
    captured = capture({"MODEL": UNET, "ROUTINE_NAME": dida_tools.models.unet})
    renamed = dataclasses.replace(PROJECT, package="renamed_project")
    config = restore(captured, renamed)
    assert config["MODEL"].__module__ == config["ROUTINE_NAME"].__name__ == "renamed_project.models.unet"
    assert name_of(config["MODEL"], renamed) == ".models.unet:UNET"


def main_module(monkeypatch, **attributes):
    """Make a module the running script, or a notebook where it has no file, with a model in it."""
    module = types.ModuleType("__main__")
    vars(module).update(attributes, Net=type("Net", (nn.Module,), {"__module__": "__main__"}))
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module.Net


def test_an_object_of_the_running_script_is_recorded_under_the_scripts_name(monkeypatch):
    spec = ModuleSpec("my_train", None)
    for attributes in ({"__file__": "/somewhere/my_train.py"}, {"__file__": "", "__spec__": spec}):
        net = main_module(monkeypatch, **attributes)
        captured = capture({"MODEL": net}, [])
        assert captured["config"]["MODEL"] == {"@ref": "my_train:Net"}
        assert restore(captured, dataclasses.replace(PROJECT, allowed=("my_train",)))["MODEL"] is net
        with pytest.raises(ConfigError, match="if you trust 'my_train', add it to ALLOWED_ROOTS"):
            restore(captured)
    with pytest.raises(
        ReferenceProblem, match="it is defined in a notebook or at the prompt: move it to a mod"
    ):
        name_of(main_module(monkeypatch))
