"Run by torch.distributed.run in two processes: the default rule, also where one process alone has bad items."
import os, sys, torch
os.environ['ACCELERATE_USE_CPU'] = 'true'
from pathlib import Path
from fastai.vision.all import Callback, Learner, OptimWrapper, nn, noop, rank_distrib
from fastai.distributed import *
from fastai_jocor.all import *
from fastai_jocor.evidence import evidence_state
from fastai_jocor.processes import loaders_talk_over_the_cpu
from distributed_script import Net, plain, weights

class Spoil(Callback):
    "In some batches of one process, a picture with a NaN, or no label that is ignored"
    order,run_valid = -20,False
    def __init__(self, ignored): self.ignored = ignored
    def before_batch(self):
        if rank_distrib() != self.iter%3: return
        x,y = plain(self.xb[0]),plain(self.yb[0])
        x[0] = float('nan')
        self.learn.xb = (x,)
        if self.ignored: self.learn.yb = (y.masked_fill(y == 3, 4),)

class Keep(Callback):
    "How many items of this process are kept and there"
    order,run_valid = 8,False
    def __init__(self): self.counts = []
    def after_loss(self):
        s = self.learn.selection
        self.counts.append((float(s.kept.sum()), s.n))

def main(out, spoilt, plus):
    torch.manual_seed(100+rank_distrib())
    dls = digits_dls(noise=Symmetric(.5), bs=32, drop_last=True, valid=.2, device='cpu')
    loss = nn.CrossEntropyLoss(ignore_index=3) if spoilt == 1 else nn.CrossEntropyLoss()
    learn = Learner(dls, Net(), loss_func=loss, opt_func=lambda ps, **kw: OptimWrapper(ps, opt=torch.optim.SGD, **kw))
    learn.logger = noop
    cb,keep = JoCorCallback(k=3, seed=0, plus=plus or None),Keep()
    with learn.distrib_ctx(sync_bn=False), loaders_talk_over_the_cpu():
        if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
        learn.fit(8, .5, cbs=[cb, keep] + [Spoil(spoilt == 1)]*(spoilt > 0))
    found = dict(evidence=evidence_state(cb.evidence), history=cb.history.to_dict('list'), final=weights(learn),
                 counts=keep.counts, estimate=cb.estimate, rate=dls.noise.rate,
                 early=None if cb.early is None else cb.early.table)
    torch.save(found, Path(out)/f'rank{rank_distrib()}.pt')

if __name__ == '__main__': main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
