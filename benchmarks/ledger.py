"""What the ledger of the items costs: the share of a step's time, and bytes an item.

    python benchmarks/ledger.py

Epochs of `JoCorCallback(k=3)` in one process on one thread. Measured is the processor time of all that the ledger
does: collect what each batch shows, work it out, and at the end of an epoch enter it and add up the figures for the
table. Given as a share of the time of the training batches of an epoch. The papers' 7-layer network on 32×32 images,
and their perceptron, whose step is so short that everything shows. Batches of 128. Writes results/ledger.json.
"""
import json, statistics, time, numpy as np, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Callback, Learner, ProgressCallback, noop
from fastai_jocor.all import *
from fastai_jocor.record import Record
from fastai_jocor.lab.run import fast_adam, machine

RESULTS = Path(__file__).resolve().parent/'results'

class Timed(Record):
    "Counts the seconds that go into the ledger"
    spent = 0.
    def count(self, f, *args):
        start = time.process_time()
        res = f(*args)
        self.spent += time.process_time()-start
        return res
    def after_loss(self): self.count(super().after_loss)
    def after_train(self): self.count(super().after_train)

class Clock(Callback):
    "Notes the seconds of each epoch's training, and those of the ledger among them"
    order,run_valid = 100,False
    def __init__(self, owner): self.owner,self.epochs = owner,[]
    def before_batch(self):
        if self.iter == 0: self.start,self.owner.spent = time.process_time(),0.
    def after_train(self): self.epochs.append((time.process_time()-self.start, self.owner.spent))

def measure(net, side, channels, steps, rounds):
    n,rs = 128*steps,np.random.RandomState(0)
    images = rs.randint(0, 256, (n+8,side,side,channels), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(images, np.arange(n+8)%10, valid=range(n, n+8), noise=Symmetric(.5), bs=128)
    learn = Learner(dls, net, opt_func=fast_adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    cb = JoCorCallback(k=3, forget_rate=.5, num_gradual=0)
    timed = Timed(cb)
    cb.parts[cb.parts.index(cb.record)] = cb.record = timed
    clock = Clock(timed)
    learn.fit(rounds+1, 1e-3, cbs=[cb, clock])
    seconds,spent = zip(*clock.epochs[1:])
    shares = [b/a for a,b in zip(seconds, spent)]
    return dict(items=n, epochs=rounds, step_ms=round(1000*statistics.median(seconds)/steps, 2),
                ledger_us=round(1e6*statistics.median(spent)/steps, 1),
                share_of_a_step=round(statistics.median(shares), 5), lowest=round(min(shares), 5),
                highest=round(max(shares), 5), bytes_per_item=sum(o.element_size() for o in cb.items.state().values()))

@call_parse
def main(
    rounds:int=9 # Epochs that are measured, after one that is not
):
    "Measure, print and write"
    torch.set_num_threads(1)
    out = dict(jocor_cnn=measure(jocor_cnn(), 32, 3, 2, rounds), jocor_mlp=measure(jocor_mlp(), 28, 1, 100, rounds),
               machine=machine())
    print(json.dumps(out, indent=1))
    (RESULTS/'ledger.json').write_text(json.dumps(out, indent=1)+'\n')
