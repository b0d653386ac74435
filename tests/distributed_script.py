"Run by torch.distributed.run in two processes on the CPU: trains in float64, and writes what each rank sees."
import os, sys, torch
import numpy as np
os.environ['ACCELERATE_USE_CPU'] = 'true'
from dataclasses import replace
from pathlib import Path
from fastai.vision.all import Callback, Learner, OptimWrapper, nn, noop, rank_distrib
from fastai.distributed import *
from fastai_jocor.all import *
from fastai_jocor import record
from fastai_jocor.processes import loaders_talk_over_the_cpu

class Net(nn.Module):
    "A perceptron in float64, so that no rounding decides which items are kept"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,10)).double()
    def forward(self, x): return self.net(x.double())

def plain(t): return t.detach().clone().as_subclass(torch.Tensor)

class Keep(Callback):
    "The batches of this process, with their forget rate"
    order,run_valid = 20,False
    def __init__(self): self.batches = []
    def before_batch(self):
        self.batches.append([plain(self.xb[0]), plain(self.yb[0]), self.learn.selection.R])

class Sights(Callback):
    "What this process sees of each item, in order; which item it is tells its picture"
    order,run_valid = -20,False
    def __init__(self): self.seen,self.which = [],{}
    def before_train(self):
        dl = getattr(self.dls.train, 'dl', self.dls.train)
        pictures = np.asarray(dl.store.images[dl.pos])
        self.which = {x.tobytes(): i for i,x in enumerate(pictures)}
        self.seen.append([])

    def after_pred(self): self.logits = plain(self.pred)

    def after_loss(self):
        pictures = (plain(self.xb[0])*255).round().byte().permute(0,2,3,1).numpy()
        y,p = plain(self.yb[0]),self.logits.softmax(-1).mean(0)
        losses,votes = joint_loss(self.logits, y, .8),self.logits.argmax(-1)
        for j,picture in enumerate(pictures):
            item = self.which[np.ascontiguousarray(picture).tobytes()]
            agree = bool((votes[:,j] == votes[0,j]).all())
            self.seen[-1].append(dict(item=item, loss=losses[j].item(), prob=p[j,y[j]].item(), conf=p[j].max().item(),
                                      vote=int(p[j].argmax()), given=int(y[j]), agree=agree))

def weights(learn): return {name: o.clone() for name,o in learn.model.state_dict().items()}

def other_estimate_by_rank(own):
    "Let each process estimate another rate, so that it is seen whose counts"
    return lambda *args: replace(own(*args), rate=.1+.2*rank_distrib())

def main(out, select, n, method='JoCorCallback'):
    torch.manual_seed(100+rank_distrib())
    dls = digits_dls(noise=Symmetric(.4), bs=32, drop_last=False, valid=1-n/1797, device='cpu')
    learn = Learner(dls, Net(), opt_func=lambda ps, **kw: OptimWrapper(ps, opt=torch.optim.SGD, **kw))
    learn.logger = noop
    cb = globals()[method](k=3, select=select, num_gradual=0, rounding='official')
    keep,sights = Keep(),Sights()
    auto = JoCorCallback(k=3, select=select, num_gradual=0, forget_rate='auto', balance=.5)
    with learn.distrib_ctx(sync_bn=False), loaders_talk_over_the_cpu():
        if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
        learn.fit(1, 0., cbs=JoCorCallback(k=3, num_gradual=0))
        start,learn.opt = weights(learn),None
        learn.fit(2, .1, cbs=[cb, keep, sights])
        final,valid = weights(learn),learn.validate()
        record.estimate_noise = other_estimate_by_rank(record.estimate_noise)
        learn.fit(3, 1e-3, cbs=auto)
    found = dict(start=start, final=final, batches=keep.batches, history=cb.history.to_dict('list'), valid=list(valid),
        n=len(dls.train_ds), seen=sights.seen, items=cb.items.frame(), estimate=auto.estimate, behind=auto.behind,
        rates=auto.history.R.tolist())
    torch.save(found, Path(out)/f'rank{rank_distrib()}.pt')

if __name__ == '__main__': main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
