"""What the speed benchmarks share: learners on made-up images, things that are timed in turn, and their ratios."""
import statistics, time, numpy as np
import torch.nn.functional as F
from pathlib import Path
from fastai.vision.all import Callback, Learner, ProgressCallback, Tensor, accuracy, noop
from fastai_jocor.all import InMemoryDataLoaders, JoCorCallback
from fastai_jocor.lab.run import fast_adam

RESULTS = Path(__file__).resolve().parent/'results'

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def in_turn(fs, rounds):
    "Times of each of several functions, called in turn and in changing order"
    runs = {k: [] for k in fs}
    for i in range(rounds):
        for k in (list(fs) if i%2 else list(fs)[::-1]): runs[k].append(fs[k]())
        print('  '.join(f'{k} {v[-1]:.4g} s' for k,v in runs.items()), flush=True)
    return runs

def ratio(a, b):
    r = sorted(x/y for x,y in zip(a,b))
    own,other = (float(f'{statistics.median(o):.4g}') for o in (a,b))
    return dict(ratio=round(statistics.median(r),3), lowest=round(r[0],3), highest=round(r[-1],3), rounds=len(r),
                seconds=own, other_seconds=other)

class Clock(Callback):
    "Seconds of the training part of an epoch"
    order,run_valid = -100,False
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter()-self.start

def learner(dls, model, opt_func=fast_adam, cbs=None):
    learn = Learner(dls, model, opt_func=opt_func, metrics=accuracy, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fitted(dls, make, k, rate, cbs=None, **kwargs):
    "A function that trains k peers for an epoch and gives its seconds, after one epoch to warm up"
    learn,clock = learner(dls, make(), cbs=cbs),Clock()
    cb = JoCorCallback(k=k, forget_rate=rate, num_gradual=0, **kwargs)
    def epoch():
        learn.fit(1, 1e-3, cbs=[cb,clock])
        return clock.seconds
    epoch()
    return epoch

def made_up(n, shape, bs=128):
    images = np.random.RandomState(0).randint(0, 256, (n+bs,*shape), dtype=np.uint8)
    return InMemoryDataLoaders.from_arrays(images, np.arange(n+bs)%10, valid=range(n,n+bs), bs=bs)

def bare_epoch(nets, opt, loader):
    "An epoch of a plain loop over k networks, with one summed cross-entropy"
    for m in nets: m.train()
    for x,y in loader:
        x,y = x.as_subclass(Tensor),y.as_subclass(Tensor)
        sum(F.cross_entropy(m(x), y) for m in nets).backward()
        opt.step()
        opt.zero_grad()

def megabytes(key):
    "A figure of the process, such as its peak `VmHWM` (Linux)"
    return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith(key)))/1024
