"""What `JoCorCallback` itself costs: the time of a step, and the peak of memory.

    python benchmarks/overhead.py          # time and memory
    python benchmarks/overhead.py --k 2

A step with the callback on a learner (data, forward, joint loss, selection, backward, optimizer, table) against
a bare loop over k networks with one summed cross-entropy, on the same batches with the same optimizer, in turn
in one process; and the growth of resident memory over a fit with k peers against k times that of the single
model's, each in a process of its own. The papers' 7-layer network, 32×32 images, batch 128. Writes
results/overhead.json. Linux only, for the memory.
"""
import copy, json, statistics, subprocess, sys, time, numpy as np, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Callback, Learner, ProgressCallback, noop
from fastai_jocor.lab.run import fast_adam, machine
from fastai_jocor.callback import JoCorCallback
from fastai_jocor.lab.data import InMemoryDataLoaders
from fastai_jocor.lab.datasets import jocor_cnn
from fastai_jocor.noise import Symmetric
from timing import megabytes

RESULTS = Path(__file__).resolve().parent/'results'

def loaders(n, bs=128):
    rs = np.random.RandomState(0)
    images = rs.randint(0, 256, (n+8,32,32,3), dtype=np.uint8)
    return InMemoryDataLoaders.from_arrays(images, np.arange(n+8)%10, valid=range(n, n+8), noise=Symmetric(.5), bs=bs)

def learner(dls):
    learn = Learner(dls, jocor_cnn(), opt_func=fast_adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

class Clock(Callback):
    "Seconds from the start of the second training batch to the end of the last"
    order,run_valid = -100,False
    def before_batch(self):
        if self.iter == 1: self.start = time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter()-self.start

def bare(nets, opt, dl):
    for m in nets: m.train()
    for i,(x,y) in enumerate(dl):
        if i == 1: start = time.perf_counter()
        x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
        sum(torch.nn.functional.cross_entropy(m(x), y) for m in nets).backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    return time.perf_counter()-start

def timing(k, steps, rounds):
    learn,clock,cb = learner(loaders(128*(steps+1))),Clock(),JoCorCallback(k=k)
    learn.fit(1, 1e-3, cbs=[cb,clock])
    nets = copy.deepcopy(list(learn.model.peers))
    opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=1e-3, fused=True)
    bare(nets, opt, learn.dls.train)
    runs = []
    for i in range(rounds):
        def ours(): learn.fit(1, 1e-3, cbs=[cb,clock]); return clock.seconds/steps
        def loop(): return bare(nets, opt, learn.dls.train)/steps
        if i%2: b,a = loop(),ours()
        else: a,b = ours(),loop()
        runs.append((a,b))
        print(f'  {a:.3f} s with the callback, {b:.3f} s bare: {a/b:.3f}', flush=True)
    r = sorted(a/b for a,b in runs)
    own,bare_ = (statistics.median(o) for o in zip(*runs))
    return dict(k=k, steps=steps, rounds=rounds, seconds_per_step=own, bare_seconds_per_step=bare_,
                ratio=round(statistics.median(r), 3), lowest=round(r[0], 3), highest=round(r[-1], 3))

def peak(k):
    "Megabytes that a fit with k peers (0: the single model, plainly) adds at its peak"
    learn = learner(loaders(128*4))
    before = megabytes('VmRSS')
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=k) if k else None)
    return megabytes('VmHWM') - before

@call_parse
def main(
    k:int=3, # Number of peers
    steps:int=5, # Steps that are timed in a round
    rounds:int=9, # Alternations
    memory:int=-1 # Only print the megabytes that a fit with so many peers adds
):
    "Measure, print and write the ratios"
    if memory >= 0: return print(peak(memory))
    out = dict(timing(k, steps, rounds), machine=machine())
    def mb(k):
        command = [sys.executable, '-W', 'ignore', __file__, '--memory', str(k)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    one,many = zip(*[(mb(0),mb(k)) for _ in range(3)])
    out |= dict(single_mb=round(statistics.median(one)), peers_mb=round(statistics.median(many)),
                memory_ratio=round(statistics.median(m/(k*o) for o,m in zip(one,many)), 3))
    print(f"k={k}: {out['ratio']} times a bare loop (lowest {out['lowest']}, highest {out['highest']} of {rounds}); "
          f"memory {out['peers_mb']} MB, {out['memory_ratio']} times k single models of {out['single_mb']} MB")
    (RESULTS/'overhead.json').write_text(json.dumps(out, indent=1)+'\n')
