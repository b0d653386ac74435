"What a test may change in the process, and how all of it is put back."
import builtins, contextlib, importlib, inspect, os, pkgutil, random, sys, torch
import numpy as np
import matplotlib, pandas as pd
from functools import partial
import fastai.vision.all, fastai.text.all, fastai.tabular.all, fastai.distributed
from fastai.vision.all import (Callback, DataBlock, DataLoader, DataLoaders, Datasets, L, Learner, Recorder, TfmdDL,
    Transform, defaults, plt)
from fastai.distributed import DistributedDL
import fastai_jocor

PATCHED = (Learner, Recorder, Callback, DataBlock, DataLoader, TfmdDL, DistributedDL, DataLoaders, Datasets, L,
    Transform, type(defaults))

def import_all():
    "Import all modules of the project, so that what they patch at import is there before the first test"
    for m in pkgutil.walk_packages(fastai_jocor.__path__, 'fastai_jocor.'):
        with contextlib.suppress(ImportError): importlib.import_module(m.name)

def project_modules(): return [m for name,m in list(sys.modules.items()) if name.split('.')[0] == 'fastai_jocor']

def owners():
    "All modules and classes of the project, and the classes of fastai that are patched"
    modules = project_modules()
    mine = lambda o: inspect.isclass(o) and o.__module__.split('.')[0] == 'fastai_jocor'
    classes = {o for m in modules for o in vars(m).values() if mine(o)}
    return [*modules, *classes, *PATCHED, defaults]

def content(o):
    "A copy of a registry, by its type"
    return o.copy() if isinstance(o, (dict,list,set)) else None

def module_of(o):
    "Where a patch was written"
    if isinstance(o, property): o = o.fget
    if isinstance(o, partial): o = o.func
    return getattr(getattr(o, '__func__', o), '__module__', None)

def put_content(o, old):
    if o == old: return
    o.clear()
    (o.extend if isinstance(o, list) else o.update)(old)

SKIPPED = {'__doc__','__dict__','__weakref__','__abstractmethods__','_abc_impl','__annotations__','__annotate_func__'}

class Attributes:
    "What modules and classes hold, the content of registries included"
    def __init__(self):
        self.modules = set(sys.modules)
        self.held = [(o, dict(vars(o))) for o in owners()]
        registries = {id(v): v for m in project_modules() for k,v in vars(m).items() if not k.startswith('__')}
        self.registries = [(v, content(v)) for v in registries.values() if isinstance(v, (dict,list,set))]

    def restore(self):
        for o,old in self.held:
            for name,v in list(vars(o).items()):
                if name not in old and not self._came_with_a_module(v): delattr(o, name)
            for name,v in old.items():
                if name not in SKIPPED and vars(o).get(name, self) is not v: setattr(o, name, v)
        for o,old in self.registries: put_content(o, old)

    def _came_with_a_module(self, o):
        "Whether a new attribute is a module, or the patch of one, that this test was the first to import"
        if inspect.ismodule(o): return True
        name = module_of(o)
        return name in sys.modules and name not in self.modules

def flushes_denormal():
    "Whether this thread takes denormal numbers for 0, which torch can set but not tell"
    return (torch.tensor(1e-40)*.5).item() == 0

class Process:
    "Random states, folder, environment, device and displays"
    def __init__(self):
        self.random = random.getstate(),np.random.get_state(),torch.get_rng_state()
        self.cwd,self.path,self.environ = os.getcwd(),list(sys.path),dict(os.environ)
        self.threads = torch.get_num_threads()
        self.dtype,self.device = torch.get_default_dtype(),torch.get_default_device()
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.cudnn = torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark
        self.matmul = torch.get_float32_matmul_precision()
        self.flush = flushes_denormal()
        self.distributed = torch.distributed.is_initialized()
        self.rc = dict(matplotlib.rcParams)
        self.display = {o: pd.get_option(o) for o in ('display.max_rows','display.max_columns','display.width',
            'display.max_colwidth','display.precision','display.float_format')}
        self.print = builtins.print

    def restore(self):
        python,numpy,own = self.random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
        os.chdir(self.cwd)
        sys.path[:] = self.path
        for name in set(os.environ) - set(self.environ): del os.environ[name]
        os.environ.update(self.environ)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        if torch.get_default_device() != self.device: torch.set_default_device(self.device)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark = self.cudnn
        torch.set_float32_matmul_precision(self.matmul)
        torch.set_flush_denormal(self.flush)
        if torch.distributed.is_initialized() and not self.distributed: torch.distributed.destroy_process_group()
        plt.close('all')
        changed = {k: v for k,v in self.rc.items() if k != 'backend' and matplotlib.rcParams[k] != v}
        if changed: matplotlib.rcParams.update(changed)
        for name,v in self.display.items():
            if pd.get_option(name) != v: pd.set_option(name, v)
        builtins.print = self.print

@contextlib.contextmanager
def nothing_leaks():
    "Put back what the block changes in the process"
    parts = Process(),Attributes()
    try: yield
    finally:
        for part in parts: part.restore()
