"""How fast k peers train: against JoCoR as it is usually coded, and against a bare loop over k networks.

    python benchmarks/speed.py mnist --path FOLDER  # epochs of MNIST with the perceptron
    python benchmarks/speed.py cifar --path FOLDER  # epochs of a part of CIFAR-10 with the 7-layer network
    python benchmarks/speed.py step             # a step against the bare loop, k = 2, 3, 5, and where its time goes
    python benchmarks/speed.py loss             # the joint loss against a sum over pairs, and k = 16 against k = 2
    python benchmarks/speed.py prune            # pruned training against unpruned, k = 3, forget rates 0.5 and 0.8
    python benchmarks/speed.py ways             # what else was tried: stacked or compiled peers, optimizers, …
    python benchmarks/speed.py memory           # the peak of memory, k = 3, against the bare loop (Linux)

FOLDER holds MNIST/raw (torchvision's layout) or cifar10/train. The usual coding is written down here from the
formulas of the papers: a data set that gives one image at a time through `ToTensor`, torch's `DataLoader` (with
as many workers as is fastest here: 0 or 2), contiguous float32, Adam, the divergences pair by pair, the losses
to the CPU, and numpy's argsort for each batch. Denormal numbers, which make any training of small networks
slower after a thousand steps, are flushed to zero on both sides. An epoch is its training part: all batches,
with callbacks, recorder and optimizer; nothing is evaluated in either. Two things are timed in turn, at least
seven times; a ratio is the median of the ratios of the pairs. Each part writes results/speed_PART.json.
`approx` prunes at a forget rate of 0.5 and computes all losses in every fifth epoch.
"""
import copy, json, statistics, subprocess, sys, time, warnings, numpy as np, torch
import torch.nn.functional as F
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Adam, Callback, Learner, ProgressCallback, accuracy, noop, partial
from fastai.callback.channelslast import ChannelsLast
from fastai_jocor.all import *
from fastai_jocor.lab.run import fast_adam, machine
from fastai_jocor.losses import joint_loss
from fastai_jocor.step import AutocastBF16, call_listeners
from fastai_jocor.lab.data import InMemoryDataLoaders

RESULTS = Path(__file__).resolve().parent/'results'

class PerItem(torch.utils.data.Dataset):
    "One image at a time, as a picture through `ToTensor`"
    def __init__(self, images, labels):
        from torchvision.transforms import ToTensor
        self.images,self.labels,self.tfm = images,labels,ToTensor()
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        from PIL import Image
        return self.tfm(Image.fromarray(self.images[i])),int(self.labels[i])

def pairwise_loss(zs, y, lam):
    "The joint loss per item, pair by pair"
    ce = sum(F.cross_entropy(z, y, reduction='none') for z in zs)
    def divergence(a, b): return F.kl_div(F.log_softmax(b,1), F.softmax(a,1), reduction='none').sum(1)
    kl = sum(divergence(a, b) for i,a in enumerate(zs) for j,b in enumerate(zs) if i != j)
    return (1-lam)*ce + lam*kl

def usual_epoch(nets, opt, loader, rate, lam=.9):
    for m in nets: m.train()
    for x,y in loader:
        loss = pairwise_loss([m(x) for m in nets], y, lam)
        order = np.argsort(loss.detach().cpu().numpy())
        kept = torch.as_tensor(order[:int((1-rate)*len(y))])
        opt.zero_grad()
        loss[kept].mean().backward()
        opt.step()

def bare_epoch(nets, opt, loader):
    for m in nets: m.train()
    for x,y in loader:
        x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
        sum(F.cross_entropy(m(x), y) for m in nets).backward()
        opt.step()
        opt.zero_grad()

class Clock(Callback):
    "Seconds of the training part of an epoch"
    order,run_valid = -100,False
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.seconds = time.perf_counter()-self.start

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

def usual(images, labels, make, k, rate):
    "The same for the usual coding, with the number of workers that is fastest"
    nets = [make() for _ in range(k)]
    opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=1e-3)
    ds = PerItem(images, labels)
    loaders = {w: torch.utils.data.DataLoader(ds, 128, shuffle=True, drop_last=True, num_workers=w) for w in (0,2)}
    times = {w: seconds(lambda: usual_epoch(nets, opt, dl, rate)) for w,dl in loaders.items()}
    best = min(times, key=times.get)
    print(f'usual coding: {times[0]:.1f} s with 0 workers, {times[2]:.1f} s with 2', flush=True)
    return lambda: seconds(lambda: usual_epoch(nets, opt, loaders[best], rate)), best

def without_validation(dls):
    "The validation set cut down to one batch, which is not timed"
    images,labels = dls.train.store.images.numpy(),dls.train.store.targets.numpy()
    idx = dls.train.pos.numpy()
    valid = np.setdiff1d(np.arange(len(images)), idx)[:128]
    small = InMemoryDataLoaders.from_arrays(images, labels, valid=valid, train=idx, bs=128)
    return small,images[idx].squeeze(),labels[idx]

def cheaper(f):
    "The same with float32 products in bfloat16 where the processor has it, by a switch of torch's"
    def run():
        torch.set_float32_matmul_precision('medium')
        try: return f()
        finally: torch.set_float32_matmul_precision('highest')
    return run

def mnist(path, rounds, n):
    dls,images,labels = without_validation(mnist_dls(path, 'symmetric:0.5', bs=128))
    base,workers = usual(images, labels, jocor_mlp, 2, .5)
    fs = {}
    for k in (2,3):
        fs[f'k{k}'] = fitted(dls, jocor_mlp, k, .5)
        fs[f'k{k}_bfloat16_products'] = cheaper(fitted(dls, jocor_mlp, k, .5))
        fs[f'k{k}_bfloat16_products_approx'] = cheaper(fitted(dls, jocor_mlp, k, .5, prune='approx'))
    runs = in_turn(dict(usual_k2=base, **fs), rounds)
    ratios = {f'{name}_against_usual_k2': ratio(runs[name], runs['usual_k2']) for name in fs}
    return dict(workers=workers, items=len(images), **ratios)

def cifar(path, rounds, n):
    dls,images,labels = without_validation(cifar10_dls(path, 'symmetric:0.5', bs=128, subset=n, progress=False))
    base,workers = usual(images, labels, jocor_cnn, 2, .5)
    fs = dict(k2_float32=fitted(dls, jocor_cnn, 2, .5, [ChannelsLast()]),
              k2_float32_exact=fitted(dls, jocor_cnn, 2, .5, [ChannelsLast()], prune='exact'),
              k3_bfloat16=fitted(dls, jocor_cnn, 3, .5, [ChannelsLast(), AutocastBF16()]))
    runs = in_turn(dict(usual_k2=base, **fs), rounds)
    ratios = {f'{name}_against_usual_k2': ratio(runs[name], runs['usual_k2']) for name in fs}
    return dict(workers=workers, items=len(images), **ratios)

def made_up(n, shape, bs=128):
    images = np.random.RandomState(0).randint(0, 256, (n+bs,*shape), dtype=np.uint8)
    return InMemoryDataLoaders.from_arrays(images, np.arange(n+bs)%10, valid=range(n,n+bs), bs=bs)

def one_step(make, shape, k, steps, rounds):
    dls = made_up(128*steps, shape)
    ours,plain = fitted(dls, make, k, .5),learner(dls, make())
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

def stacked_step(nets, x, y):
    "Forward and backward over k networks as one, by `torch.func`"
    from torch.func import functional_call, stack_module_state
    ps,bs = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to('meta')
    f = torch.vmap(lambda p,b,x: functional_call(base, (p,b), (x,)), in_dims=(0,0,None), randomness='different')
    def step():
        F.cross_entropy(f(ps, bs, x).flatten(0,1), y.repeat(len(nets))).backward()
        for p in ps.values(): p.grad = None
    return step

def looped_step(nets, x, y, half=False):
    def step():
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=half): zs = torch.stack([m(x) for m in nets])
        F.cross_entropy(zs.float().flatten(0,1), y.repeat(len(nets))).backward()
        for m in nets:
            for p in m.parameters(): p.grad = None
    return step

def ways_of(make, x, k, rounds, times):
    y,nets = torch.randint(0, 10, (len(x),)),[make() for _ in range(k)]
    last = lambda ms: [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in ms]
    xl = x.to(memory_format=torch.channels_last)
    fs = dict(loop=looped_step(nets, x, y), stacked=stacked_step(nets, x, y),
              channels_last=looped_step(last(nets), xl, y),
              channels_last_bfloat16=looped_step(last(nets), xl, y, True))
    try:
        compiled = looped_step([torch.compile(m) for m in last(nets)], xl, y)
        first = seconds(compiled)
        fs['channels_last_compiled'] = compiled
    except Exception as e: first = f'no compiler: {type(e).__name__}'
    many = lambda f: lambda: seconds(lambda: [f() for _ in range(times)])/times
    for f in fs.values(): f()
    runs = in_turn({name: many(f) for name,f in fs.items()}, rounds)
    ratios = {f'{name} against loop': ratio(runs[name], runs['loop']) for name in fs if name != 'loop'}
    return dict(k=k, seconds_to_compile=first, **ratios)

def optimizers(rounds, k=3):
    nets = [jocor_mlp() for _ in range(k)]
    ps = [p for m in nets for p in m.parameters()]
    for p in ps: p.grad = torch.randn_like(p)*1e-3
    fs = dict(fused=fast_adam(ps, lr=1e-3), foreach=torch.optim.Adam(ps, lr=1e-3, foreach=True),
              fastai=Adam(ps, lr=1e-3))
    def many(o): return lambda: seconds(lambda: [o.step() for _ in range(100)])/100
    for o in fs.values(): o.step()
    runs = in_turn({name: many(o) for name,o in fs.items()}, rounds)
    return {f'{name} Adam against fused': ratio(runs[name], runs['fused']) for name in ('foreach','fastai')}

def ways(path, rounds, n):
    return {'perceptron, batch 128': ways_of(jocor_mlp, torch.rand(128,1,28,28), 3, rounds, 30),
            '7-layer network, batch 64': ways_of(jocor_cnn, torch.rand(64,3,32,32), 3, rounds, 1),
            'optimizer, perceptron k=3': optimizers(rounds)}

def megabytes(key): return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith(key)))/1024
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
    threads:int=0 # Processor threads; 0 for torch's default
):
    "Measure one part, print it and write results/speed_PART.json"
    warnings.simplefilter('ignore')
    torch.set_flush_denormal(True)
    if threads: torch.set_num_threads(threads)
    if part.startswith('peak_'): return print(peak(part[5:]))
    out = dict(globals()[part](path, rounds, n), machine=machine())
    print(json.dumps(out, indent=1))
    name = f'speed_{part}_threads{threads}' if threads else f'speed_{part}'
    (RESULTS/f'{name}.json').write_text(json.dumps(out, indent=1)+'\n')
