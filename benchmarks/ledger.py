"""What the ledger of the items costs: the share of an epoch's time, and bytes an item.

    python benchmarks/ledger.py

An epoch with `JoCorCallback(k=3)` against one with the same callback that notes nothing, in turn in one process on one thread: the papers' 7-layer
network on 32×32 images, and the papers' perceptron, whose step is so short that everything shows. Writes results/ledger.json.
"""
import json, statistics, time, numpy as np, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Callback, Learner, ProgressCallback, noop
from fastai_jocor.all import *
from fastai_jocor.bench import fast_adam, machine

RESULTS = Path(__file__).resolve().parent/'results'

class Without(JoCorCallback):
    "Notes nothing of the items"
    def _record(self, *args): pass
    def _close_epoch(self, seen): return [0.]*len(self.columns)

class Clock(Callback):
    "Seconds from the start of an epoch's first batch to the end of its bookkeeping"
    order,run_valid = 100,False
    def before_batch(self):
        if self.iter == 0: self.start = time.process_time()
    def after_train(self): self.seconds = time.process_time()-self.start

def measure(net, side, channels, n, rounds):
    rs = np.random.RandomState(0)
    images = rs.randint(0, 256, (n+8,side,side,channels), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(images, np.arange(n+8)%10, valid=range(n, n+8), noise=Symmetric(.5), bs=128)
    learn = Learner(dls, net, opt_func=fast_adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    clock,ways,ratios = Clock(),[cls(k=3, forget_rate=.5, num_gradual=0) for cls in (JoCorCallback, Without)],[]
    for i in range(rounds+1):
        took = {}
        for cb in ways if i%2 else ways[::-1]:
            learn.fit(1, 1e-3, cbs=[cb, clock])
            took[cb] = clock.seconds
        if i: ratios.append(took[ways[0]]/took[ways[1]])
    r = sorted(ratios)
    return dict(items=n, rounds=rounds, step_ms=round(1000*took[ways[0]]/(n//128), 2), share_of_a_step=round(statistics.median(r)-1, 4), lowest=round(r[0]-1, 4), highest=round(r[-1]-1, 4),
                bytes_per_item=sum(o.element_size() for o in ways[0].items.state().values()))

@call_parse
def main(
    rounds:int=9 # Alternations
):
    "Measure, print and write"
    torch.set_num_threads(1)
    out = dict(jocor_cnn=measure(jocor_cnn(), 32, 3, 128*4, rounds), jocor_mlp=measure(jocor_mlp(), 28, 1, 128*100, rounds), machine=machine())
    print(json.dumps(out, indent=1))
    (RESULTS/'ledger.json').write_text(json.dumps(out, indent=1)+'\n')
