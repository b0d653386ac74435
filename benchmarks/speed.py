"""How fast k peers train: against JoCoR as it is usually coded, and against a bare loop over k networks.

    python benchmarks/speed.py mnist --path FOLDER  # epochs of MNIST with the perceptron
    python benchmarks/speed.py cifar --path FOLDER  # epochs of a part of CIFAR-10 with the 7-layer network
    python benchmarks/speed.py step             # a step against the bare loop, k = 2, 3, 5, and where its time goes
    python benchmarks/speed.py loss             # the joint loss against a sum over pairs, and k = 16 against k = 2
    python benchmarks/speed.py prune            # pruned training against unpruned, k = 3, forget rates 0.5 and 0.8
    python benchmarks/speed.py ways             # what else was tried: stacked or compiled peers, optimizers, …
    python benchmarks/speed.py memory           # the peak of memory, k = 3, against the bare loop (Linux)

FOLDER holds MNIST/raw (torchvision's layout) or cifar10/train. The usual coding is in `usual.py`, with as many
workers as is fastest here: 0 or 2. Denormal numbers, which make any training of small networks slower after a
thousand steps, are flushed to zero on both sides. An epoch is its training part: all batches, with callbacks,
recorder and optimizer; nothing is evaluated in either. Two things are timed in turn, at least seven times; a ratio
is the median of the ratios of the pairs. Each part writes results/speed_PART.json, or into the folder of `--out`.
`approx` prunes at a forget rate of 0.5 and computes all losses in every fifth epoch.

To compare two versions of the library, run the same script with `PYTHONPATH` at a checkout of the other one;
results/before holds what 0.1.0 gave before its steps were made shorter.
"""
import copy, json, statistics, subprocess, sys, time, warnings, numpy as np, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Adam, partial
from fastai.callback.channelslast import ChannelsLast
from fastai_jocor.all import *
from fastai_jocor.lab.run import machine
from fastai_jocor.losses import joint_loss
from fastai_jocor.step import AutocastBF16
from fastai_jocor.events import call_listeners
from speed_ways import ways
from timing import RESULTS, Clock, bare_epoch, fitted, in_turn, learner, made_up, megabytes, ratio, seconds
from usual import pairwise_loss, usual

def without_validation(dls):
    "The validation set cut down to one batch, which is not timed; images, labels, and which of them are right"
    images,labels = dls.train.store.images.numpy(),dls.train.store.targets.numpy()
    idx = dls.train.pos.numpy()
    valid = np.setdiff1d(np.arange(len(images)), idx)[:128]
    small = InMemoryDataLoaders.from_arrays(images, labels, valid=valid, train=idx, bs=128)
    return small,images[idx].squeeze(),labels[idx],~dls.noise.flipped

def cheaper(f):
    "The same with float32 products in bfloat16 where the processor has it, by a switch of torch's"
    def run():
        torch.set_float32_matmul_precision('medium')
        try: return f()
        finally: torch.set_float32_matmul_precision('highest')
    return run

def mnist(path, rounds, n):
    dls,*data = without_validation(mnist_dls(path, 'symmetric:0.5', bs=128))
    base,workers = usual(*data, jocor_mlp, 2, .5)
    fs = {}
    for k in (2,3):
        fs[f'k{k}'] = fitted(dls, jocor_mlp, k, .5)
        fs[f'k{k}_bfloat16_products'] = cheaper(fitted(dls, jocor_mlp, k, .5))
        fs[f'k{k}_bfloat16_products_approx'] = cheaper(fitted(dls, jocor_mlp, k, .5, prune='approx'))
    runs = in_turn(dict(usual_k2=base, **fs), rounds)
    ratios = {f'{name}_against_usual_k2': ratio(runs[name], runs['usual_k2']) for name in fs}
    return dict(workers=workers, items=len(data[0]), **ratios)

def cifar(path, rounds, n):
    dls,*data = without_validation(cifar10_dls(path, 'symmetric:0.5', bs=128, subset=n, progress=False))
    base,workers = usual(*data, jocor_cnn, 2, .5)
    fs = dict(k2_float32=fitted(dls, jocor_cnn, 2, .5, [ChannelsLast()]),
              k2_float32_exact=fitted(dls, jocor_cnn, 2, .5, [ChannelsLast()], prune='exact'),
              k3_bfloat16=fitted(dls, jocor_cnn, 3, .5, [ChannelsLast(), AutocastBF16()]))
    runs = in_turn(dict(usual_k2=base, **fs), rounds)
    ratios = {f'{name}_against_usual_k2': ratio(runs[name], runs['usual_k2']) for name in fs}
    return dict(workers=workers, items=len(data[0]), **ratios)

def one_step(make, shape, k, steps, rounds):
    dls = made_up(128*steps, shape)
    ours = fitted(dls, make, k, .5)
    nets = [make() for _ in range(k)]
    opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=1e-3, fused=True)
    bare = lambda: seconds(lambda: bare_epoch(nets, opt, dls.train))
    bare()
    runs = in_turn(dict(ours=ours, bare=bare), rounds)
    return dict(k=k, steps=steps, **ratio(runs['ours'], runs['bare']))

def parts(k=3, steps=100):
    "Where the time of a step of the perceptron goes, in microseconds; watching costs some for each part"
    dls,spent = made_up(128*steps, (28,28)),{}
    learn,cb = learner(dls, jocor_mlp()),JoCorCallback(k=k, forget_rate=.5, num_gradual=0)
    learn.fit(1, 1e-3, cbs=cb)
    def watch(obj, name, part, when=lambda *a: True):
        f = getattr(obj, name)
        def timed(*args, **kwargs):
            if not when(*args): return f(*args, **kwargs)
            start = time.perf_counter()
            try: return f(*args, **kwargs)
            finally: spent[part] = spent.get(part, 0.) + time.perf_counter()-start
        setattr(obj, name, timed)
    training = lambda *a: learn.training
    watch(learn.model, 'forward', 'forward', training)
    watch(learn, '_backward', 'backward')
    watch(learn, '_step', 'optimizer')
    watch(cb, 'batch_loss', 'loss')
    for part in cb.parts:
        for event in ('before_batch','after_pred','after_loss','before_step'):
            if hasattr(type(part), event): watch(part, event, 'callback')
    watch(learn.recorder, 'after_batch', 'recorder', training)
    class Whole(Clock):
        def after_train(self): spent['whole'] = time.perf_counter()-self.start
    learn.fit(1, 1e-3, cbs=[cb,Whole()])
    spent['data'] = seconds(lambda: [0 for _ in dls.train])
    us = {k: round(v/steps*1e6) for k,v in spent.items()}
    return us | dict(events_and_the_rest=us['whole']-sum(v for k,v in us.items() if k != 'whole'))

def fastai_overhead(rounds, steps=200):
    "A plain learner's step beyond the bare loop: all callbacks called at every event, or only those that listen"
    dls = made_up(128*steps, (28,28))
    learn,clock,net = learner(dls, jocor_mlp()),Clock(),jocor_mlp()
    opt = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    def before():
        learn.fit(1, 1e-3, cbs=clock)
        return clock.seconds
    def after():
        learn._call_one = partial(call_listeners, learn, {})
        try: return before()
        finally: del learn._call_one
    slow = learner(dls, jocor_mlp(), Adam)
    def python_adam():
        slow.fit(1, 1e-3, cbs=clock)
        return clock.seconds
    def bare(): return seconds(lambda: bare_epoch([net], opt, dls.train))
    runs = in_turn(dict(before=before, after=after, bare=bare, fastai_adam=python_adam), rounds)
    us = {k: statistics.median(v)/steps*1e6 for k,v in runs.items()}
    return dict(unit='microseconds a step', every_event=round(us['before']-us['bare']),
                only_those_that_listen=round(us['after']-us['bare']), step_fused_adam=round(us['before']),
                step_fastai_adam=round(us['fastai_adam']))

def step(path, rounds, n):
    out = {f'perceptron k={k}': one_step(jocor_mlp, (28,28), k, 200, rounds) for k in (2,3,5)}
    out |= {f'7-layer network k={k}': one_step(jocor_cnn, (32,32,3), k, 3, rounds) for k in (2,3,5)}
    return out | {'parts of a step, perceptron k=3': parts(), "fastai's own overhead": fastai_overhead(rounds)}

def timed_loss(f, k, n, c, at_least=.3):
    z,y = torch.randn(k,n,c, requires_grad=True),torch.randint(0, c, (n,))
    def once():
        f(z, y).mean().backward()
        z.grad = None
    once()
    def many():
        times,start = 0,time.perf_counter()
        while time.perf_counter()-start < at_least: once(); times += 1
        return (time.perf_counter()-start)/times
    return many

def loss(path, rounds, n):
    def ours(z, y): return joint_loss(z, y, .9)
    def pairs(z, y): return pairwise_loss(list(z), y, .9)
    cases = dict(ours=(ours,10), pairs=(pairs,10), k16=(ours,16), k2=(ours,2))
    runs = in_turn({name: timed_loss(f, k, 256, 1000) for name,(f,k) in cases.items()}, rounds)
    return {'k=10, N=256, C=1000 against pairs': ratio(runs['ours'], runs['pairs']),
            'k=16 against k=2, N=256, C=1000': ratio(runs['k16'], runs['k2'])}

def prune_ratios(make, shape, rate, steps, rounds, cbs):
    "Five epochs, which is as often as `approx` computes all losses, with each way of pruning against none"
    dls = made_up(128*steps, shape)
    def five(prune):
        learn,clock = learner(dls, make(), cbs=cbs()),Clock()
        cb = JoCorCallback(k=3, forget_rate=rate, num_gradual=0, prune=prune, refresh=5)
        def run():
            total = 0
            for _ in range(5):
                learn.fit(1, 1e-4, cbs=[cb,clock])
                total += clock.seconds
            return total
        run()
        return run
    runs = in_turn({str(o): five(o) for o in (None,'exact','approx')}, rounds)
    return {o: ratio(runs[o], runs['None']) for o in ('exact','approx')}

def prune(path, rounds, n):
    def half(): return [ChannelsLast(), AutocastBF16()]
    out = {}
    for r in (.5,.8):
        out[f'perceptron, forget rate {r}'] = prune_ratios(jocor_mlp, (28,28), r, 100, rounds, list)
        out[f'7-layer network in bfloat16, forget rate {r}'] = prune_ratios(jocor_cnn, (32,32,3), r, 2, rounds, half)
    return out

def peak(which, k=3):
    "Megabytes that four steps add at their peak, in a process of its own"
    dls = made_up(128*4, (32,32,3))
    if which == 'ours':
        learn,cb = learner(dls, jocor_cnn()),JoCorCallback(k=k, forget_rate=.5, num_gradual=0)
        before = megabytes('VmRSS')
        learn.fit(1, 1e-3, cbs=cb)
    else:
        net = jocor_cnn()
        before = megabytes('VmRSS')
        nets = [net] + [copy.deepcopy(net) for _ in range(k-1)]
        opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=1e-3, fused=True)
        bare_epoch(nets, opt, dls.train)
    return megabytes('VmHWM') - before

def memory(path, rounds, n):
    def mb(which):
        command = [sys.executable, '-W', 'ignore', __file__, f'peak_{which}']
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    runs = {o: [mb(o) for _ in range(rounds)] for o in ('ours','bare')}
    r = ratio(runs['ours'], runs['bare'])
    return dict(k=3, ratio=r['ratio'], lowest=r['lowest'], highest=r['highest'], rounds=rounds,
                megabytes=r['seconds'], bare_megabytes=r['other_seconds'])

@call_parse
def main(
    part:str, # mnist, cifar, step, loss, prune, ways or memory
    path:str=None, # Folder of the data, for mnist and cifar
    rounds:int=7, # Alternations, at least 7
    n:int=1536, # Images of CIFAR-10
    threads:int=0, # Processor threads; 0 for torch's default
    out:str=None # Folder of the results; `None` for `benchmarks/results`
):
    "Measure one part, print it and write speed_PART.json"
    warnings.simplefilter('ignore')
    torch.set_flush_denormal(True)
    if threads: torch.set_num_threads(threads)
    if part.startswith('peak_'): return print(peak(part[5:]))
    text = json.dumps(dict(globals()[part](path, rounds, n), machine=machine()), indent=1)
    print(text)
    name = f'speed_{part}_threads{threads}' if threads else f'speed_{part}'
    folder = RESULTS if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{name}.json').write_text(text+'\n')
