"""How time and memory grow: with the number of peers, the batch size, the number of classes, and the number of items.

    python benchmarks/scaling.py                 # all four, some minutes on one thread
    python benchmarks/scaling.py --only items    # one of peers, batch, classes, items

Peers, batch and classes: the training part of an epoch of a real learner with `JoCorCallback`, the papers'
perceptron, made-up images 28×28; each size in a process of its own, on one thread without denormal numbers,
whose growth of resident memory is the memory. Items: what the loader and the ledger do for each item in an
epoch (the order of the items, gathering their batches, noting what was seen, entering it), without a network,
on images of one pixel. A law is the line t = a + b·x through the medians by least squares (for the time against
the batch size, x is the number of batches in an epoch), and the slope in a plot of logarithms over the upper
half of the sizes: 1 is linear. Writes results/scaling.json and .png. Linux only, for the memory.
"""
import json, statistics, subprocess, sys, time, warnings, numpy as np, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from pathlib import Path
from fastcore.script import call_parse
from fastai_jocor.all import *
from fastai_jocor.lab.run import machine
from fastai_jocor.order import ItemOrder
from fastai_jocor.batch import Selection
from fastai_jocor.lab.data import InMemoryDataLoaders
from fastai_jocor.ledger import Ledger
from fastai_jocor.record import Sightings
from timing import Clock, learner, megabytes

RESULTS = Path(__file__).resolve().parent/'results'
SIZES = dict(peers=(1,2,3,5,8,16), batch=(32,64,128,256,512,1024), classes=(10,100,1000,10000),
             items=(10_000,100_000,1_000_000,10_000_000))
LABELS = dict(peers='peers k', batch='items per batch', classes='classes', items='items of the training set')

def train(k=3, bs=128, c=10, n=12800, rounds=5):
    "Seconds of an epoch, and megabytes that the fit adds"
    images = np.random.RandomState(0).randint(0, 256, (n+c,28,28), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(images, np.arange(n+c)%c, valid=range(n,n+c), bs=bs)
    learn,clock,cb = learner(dls, jocor_mlp(c)),Clock(),JoCorCallback(k=k, forget_rate=.5, num_gradual=0)
    before,times = megabytes('VmRSS'),[]
    for _ in range(rounds+1):
        learn.fit(1, 1e-3, cbs=[cb,clock])
        times.append(clock.seconds)
    return statistics.median(times[1:]),megabytes('VmHWM')-before

def bookkeeping(n, bs=128, rounds=3):
    "Seconds that the loader and the ledger take for an epoch of n items, and megabytes that both hold and use"
    images = np.zeros((n+10,1,1), np.uint8)
    dls = InMemoryDataLoaders.from_arrays(images, np.arange(n+10)%10, valid=range(n,n+10), bs=bs)
    ledger,times = Ledger(n),[]
    loss,logits,kept,targ = torch.rand(bs),torch.randn(3, bs, 10),torch.arange(bs//2),torch.zeros(bs, dtype=torch.long)
    pred = logits.softmax(-1).mean(0).log()
    order = dls.train.get_idxs = ItemOrder(dls.train.get_idxs, n)
    before = megabytes('VmRSS')
    for _ in range(rounds):
        start,s = time.perf_counter(),Selection(n=bs, kept=kept, targ=targ)
        seen = Sightings(s)
        for i,_ in enumerate(dls.train):
            if i == 0: s.items = torch.as_tensor(order.idxs)
            s.at,s.losses,s.logits,s.pred = i*bs,loss.clone(),logits.clone(),pred.clone()
            seen.add()
        columns = seen.columns()
        del columns['repeated']
        ledger.update(**columns)
        times.append(time.perf_counter()-start)
    return statistics.median(times),megabytes('VmHWM')-before

def one(kind, x):
    if kind == 'items': return bookkeeping(x, rounds=3 if x < 10**7 else 1)
    fewer = dict(n=1280*max(x//1000,1), rounds=3) if kind == 'classes' and x > 1000 else {}
    return train(**{dict(peers='k', batch='bs', classes='c')[kind]: x}, **fewer)

def in_its_own_process(kind, x):
    command = [sys.executable, '-W', 'ignore', __file__, '--only', kind, '--size', str(x)]
    return [float(o) for o in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]

def per_item(kind, x, t): return t/(12800 if kind != 'classes' or x <= 1000 else 1280*(x//1000))

def law(xs, ys):
    b,a = np.polyfit(xs, ys, 1)
    half = len(xs)//2
    exponent = np.polyfit(np.log(xs[half:]), np.log(ys[half:]), 1)[0]
    return dict(intercept=float(f'{a:.3g}'), slope=float(f'{b:.3g}'), exponent=round(float(exponent), 2))

def plot(out):
    fig,axs = plt.subplots(2, 4, figsize=(15,6.4), layout='constrained')
    for col,kind in enumerate(o for o in SIZES if o in out):
        r = out[kind]
        for ax,name,unit in ((axs[0,col],'time','s an epoch'),(axs[1,col],'memory','MB')):
            ax.plot(r['x'], r[name], 'o-')
            l = r[f'{name}_law']
            title = f"{l['intercept']:.3g} + {l['slope']:.3g}·x, exponent {l['exponent']}"
            ax.set(xlabel=LABELS[kind], ylabel=unit, xscale='log', yscale='log', title=title)
            ax.grid(alpha=.3)
    fig.savefig(RESULTS/'scaling.png', dpi=90)

@call_parse
def main(
    only:str=None, # peers, batch, classes or items; all without it
    size:int=None # Only print seconds and megabytes of this size
):
    "Measure, print, and write the laws and the plot"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if size: return print(*one(only, size))
    path = RESULTS/'scaling.json'
    out = json.loads(path.read_text()) if path.exists() and only else {}
    for kind in [only] if only else SIZES:
        t,mb = zip(*[in_its_own_process(kind, x) for x in SIZES[kind]])
        if kind == 'classes': t = [per_item(kind, x, o)*12800 for x,o in zip(SIZES[kind], t)]
        t,mb = [round(o, 4) for o in t],[round(o, 1) for o in mb]
        time_law = law([12800/o for o in SIZES[kind]][::-1], t[::-1]) if kind == 'batch' else law(SIZES[kind], t)
        out[kind] = dict(x=list(SIZES[kind]), time=t, memory=mb, time_law=time_law, memory_law=law(SIZES[kind], mb))
        print(kind, json.dumps(out[kind]), flush=True)
    out['machine'] = machine()
    path.write_text(json.dumps(out, indent=1)+'\n')
    plot(out)
