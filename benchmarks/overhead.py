"""What `JoCorCallback` itself costs: the time of a step, and the peak of memory.

    python benchmarks/overhead.py          # time and memory
    python benchmarks/overhead.py --k 2

A step with the callback on a learner (data, forward, joint loss, selection, backward, optimizer, table), by the
default and by the published rule, against a bare loop over k networks with one summed cross-entropy: on equal
batches with the same optimizer, in turn in one process. And the growth of resident memory over a fit with k peers
against k times that of the single model's, each in a process of its own. The papers' 7-layer network on 32×32 images
and their perceptron, batch 128. Writes results/overhead.json. Linux only, for the memory.
"""
import copy, json, statistics, subprocess, sys, time, numpy as np, torch
from collections import namedtuple
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Callback, Learner, ProgressCallback, noop
from fastai_jocor.lab.run import fast_adam, machine
from fastai_jocor.callback import JoCorCallback
from fastai_jocor.lab.data import InMemoryDataLoaders
from fastai_jocor.lab.datasets import jocor_cnn, jocor_mlp
from fastai_jocor.noise import Symmetric
from timing import megabytes

RESULTS = Path(__file__).resolve().parent/'results'

Net = namedtuple('Net', 'model shape steps')
nets = dict(cnn=Net(jocor_cnn, (32,32,3), 5), perceptron=Net(jocor_mlp, (28,28), 200))

def loaders(n, shape, bs=128):
    rs = np.random.RandomState(0)
    images = rs.randint(0, 256, (n+8,*shape), dtype=np.uint8)
    return InMemoryDataLoaders.from_arrays(images, np.arange(n+8)%10, valid=range(n, n+8), noise=Symmetric(.5), bs=bs)

def learner(net, steps):
    learn = Learner(loaders(128*(steps+1), net.shape), net.model(), opt_func=fast_adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

class Clock(Callback):
    "Seconds from the start of the second training batch to the end of the last"
    order,run_valid = -100,False
    def before_batch(self):
        if self.iter == 1: self.start = time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter()-self.start

def bare(models, opt, dl):
    for m in models: m.train()
    for i,(x,y) in enumerate(dl):
        if i == 1: start = time.perf_counter()
        x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
        sum(torch.nn.functional.cross_entropy(m(x), y) for m in models).backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    return time.perf_counter()-start

def fitted(net, cb):
    "A function that trains for one epoch with a callback, and gives the seconds; and the learner"
    learn,clock = learner(net, net.steps),Clock()
    def fit():
        learn.fit(1, 1e-3, cbs=[cb,clock])
        return clock.seconds
    return fit,learn

def looped(learn):
    "A function that trains copies of the learner's peers by a bare loop, and gives the seconds"
    models = copy.deepcopy(list(learn.model.peers))
    opt = torch.optim.Adam([p for m in models for p in m.parameters()], lr=1e-3, fused=True)
    return lambda: bare(models, opt, learn.dls.train)

def compared(a, b):
    "Median, lowest and highest ratio of two series"
    r = sorted(x/y for x,y in zip(a, b))
    return dict(ratio=round(statistics.median(r), 3), lowest=round(r[0], 3), highest=round(r[-1], 3))

def timing(name, k, rounds):
    "Seconds a step by the default, by the published rule, and of a bare loop, in turn"
    net,ways = nets[name],{}
    ways['default'],learn = fitted(net, JoCorCallback(k=k))
    ways['published'],_ = fitted(net, JoCorCallback.paper(k=k, forget_rate=.4, num_gradual=1))
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=k))
    ways['bare'] = looped(learn)
    for run in ways.values(): run()
    seconds = {o: [] for o in ways}
    for i in range(rounds):
        for way in list(ways)[::1 if i%2 else -1]: seconds[way].append(ways[way]()/net.steps)
        print(name, *(f'{way} {o[-1]*1000:.2f} ms' for way,o in seconds.items()), flush=True)
    res = {f'{way}_ms': round(1000*statistics.median(o), 2) for way,o in seconds.items()}
    res['default against bare'] = compared(seconds['default'], seconds['bare'])
    res['default against published'] = compared(seconds['default'], seconds['published'])
    return dict(steps=net.steps, **res)

def peak(k):
    "Megabytes that a fit with k peers (0: the single model, plainly) adds at its peak"
    learn = learner(nets['cnn'], 3)
    before = megabytes('VmRSS')
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=k) if k else None)
    return megabytes('VmHWM') - before

@call_parse
def main(
    k:int=3, # Number of peers
    rounds:int=9, # Alternations
    memory:int=-1 # Only print the megabytes that a fit with so many peers adds
):
    "Measure, print and write the ratios"
    torch.set_flush_denormal(True)
    if memory >= 0: return print(peak(memory))
    out = dict(k=k, rounds=rounds, **{name: timing(name, k, rounds) for name in nets}, machine=machine())
    def mb(k):
        command = [sys.executable, '-W', 'ignore', __file__, '--memory', str(k)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    one,many = zip(*[(mb(0),mb(k)) for _ in range(3)])
    out |= dict(single_mb=round(statistics.median(one)), peers_mb=round(statistics.median(many)),
                memory_ratio=round(statistics.median(m/(k*o) for o,m in zip(one,many)), 3))
    print(json.dumps(out, indent=1))
    (RESULTS/'overhead.json').write_text(json.dumps(out, indent=1)+'\n')
