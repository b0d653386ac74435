"""Parts `protocol` and `mnist` of gpu.py: whole runs, side by side, which go on where the last call stopped.

The runs are those of the grids cifar_protocol and mnist_protocol (there with five seeds, and all methods with each of
them), all of the first seed first. Each is one process, with images, batches and optimizer on the GPU; the perceptrons
of several runs are not stacked. A run that the time limit stops leaves a checkpoint, from which the next call goes on.
"""
import multiprocessing, os, tarfile, time, numpy as np
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
import torch
from fastai.vision.all import Callback, default_device
from fastai_jocor.all import Checkpoint
from fastai_jocor.graphs import Graphs
from fastai_jocor.lab import datasets
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.results import finished, pack, run_dir
from fastai_jocor.lab.run import run
from fastai_jocor.lab.spec import read_grid
from gpu_step import DeviceLoss

class TimeUp(BaseException): "The time limit has come"

class Until(Callback):
    "Leave a checkpoint and stop before the first epoch that begins too late"
    order,run_valid = -99,False # after `Checkpoint`
    def __init__(self, until): self.until = until
    def before_epoch(self):
        if time.time() < self.until: return
        saved = next(cb for cb in self.learn.cbs if isinstance(cb, Checkpoint))
        if self.epoch > saved.first_epoch: saved.save()
        raise TimeUp

# --- data

def unpack(path):
    "Take out the data that were packed"
    for name,there in {'cifar10.tgz': 'cifar10', 'mnist.tgz': 'MNIST', 'clothing_small.tgz': 'clothing'}.items():
        if not (path/name).exists() or (path/there).exists(): continue
        with tarfile.open(path/name) as tar: tar.extractall(path, filter='data')

def decode(path):
    "Decode the images of CIFAR-10 once, for all processes"
    file = path/'cifar10.npz'
    if file.exists(): return
    names = 'images','labels','n_train','classes'
    *data,keys = datasets._read_folders(path/'cifar10', datasets.cifar10_classes, False)
    if keys is not None: raise ValueError(f'path={str(path)!r}: the images of cifar10 must have numbers as names')
    np.savez(path/'part.npz', **dict(zip(names, data)))
    (path/'part.npz').replace(file)

def _from_file(file, read, root, classes, progress):
    if root != file.parent/'cifar10' or not file.exists(): return read(root, classes, progress)
    f = np.load(file)
    return f['images'],f['labels'],int(f['n_train']),f['classes'].tolist(),None

# --- a run

class WithGraphs(RunConfig):
    "A run whose peers' passes are replayed as CUDA graphs"
    def callback(self):
        cb = super().callback()
        if hasattr(cb, 'parts'): cb.parts.append(Graphs(cb))
        return cb

def begin(path, device):
    "What a process does before its first run"
    default_device(device == 'cuda')
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    if not path.is_dir(): return
    os.chdir(path) # where the grid looks for the human labels
    datasets._read_folders = partial(_from_file, path/'cifar10.npz', datasets._read_folders)

def train(folder, path, until, cfg):
    "Do a run, or a part of it; gives its result, what went wrong, or `None`"
    if time.time() > until: return None
    d = run_dir(folder, cfg)
    if default_device().type == 'cuda': cfg = WithGraphs(**vars(cfg))
    try: return run(cfg, d, path, verbose=False, extras=False, resume=True, cbs=[Until(until), DeviceLoss()])[2]
    except TimeUp: return None
    except Exception as e: return f'{type(e).__name__}: {e}'[:300]

def side_by_side(args, job, cfgs):
    "Runs and their results as they come, from `args.procs` processes"
    if not args.procs:
        yield from ((cfg, job(cfg)) for cfg in cfgs)
        return
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(args.procs, spawn, begin, (args.path, args.device)) as pool:
        jobs = {pool.submit(job, cfg): cfg for cfg in cfgs}
        yield from ((jobs[o], o.result()) for o in as_completed(jobs))

def runs(args, note, cfgs, folder):
    "Do the runs that are not done yet, and note each"
    todo = [cfg for cfg in cfgs if not finished(run_dir(folder, cfg), cfg)]
    note('done before', runs=len(cfgs)-len(todo), of=len(cfgs))
    spare = 2 if args.tiny else 15 # for the epochs at hand, and for checkpoints
    job = partial(train, folder, args.path, args.until-spare)
    for cfg,res in side_by_side(args, job, todo):
        what = f'{cfg.name} {cfg.noise} seed {cfg.seed}'
        if isinstance(res, str): note(what, error=res)
        if not isinstance(res, dict): continue
        note(what, accuracy=round(res['ensemble_accuracy'], 4), seconds=res['seconds'])
        pack(folder)

# --- the parts

def digits_grid(method, **fields):
    "Short runs on data that are always there"
    cells = [dict(method='standard'), dict(method=method, **fields)]
    return [RunConfig(epochs=2, seed=s, **o) for s in (0,1) for o in cells]

def check_data(path, what):
    if not (path/what).is_dir():
        raise FileNotFoundError(f'path={str(path)!r} holds no {what}, and nothing to unpack it from: '
                                'make the folder with `python benchmarks/gpu.py pack`')

def protocol(args, note):
    if not args.tiny:
        unpack(args.path)
        check_data(args.path, 'cifar10')
        decode(args.path)
    begin(args.path, args.device)
    cfgs = digits_grid('jocor', k=2) if args.tiny else read_grid('cifar_protocol')
    runs(args, note, cfgs, args.out/'protocol')

def mnist(args, note):
    if not args.tiny:
        unpack(args.path)
        check_data(args.path, 'MNIST')
    begin(args.path, args.device)
    cfgs = digits_grid('co_teaching') if args.tiny else read_grid('mnist_protocol', seed='0-4')
    runs(args, note, cfgs, args.out/'mnist')
