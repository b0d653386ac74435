"Run by torch.distributed.run in two processes on the CPU: trains, and writes what each rank sees."
import os, sys, torch, numpy as np
from dataclasses import replace
from pathlib import Path
os.environ['ACCELERATE_USE_CPU'] = 'true'
from fastai.vision.all import Callback, Learner, noop, rank_distrib
from fastai.distributed import *
from fastai_jocor.all import *
from fastai_jocor import record
from fastai_jocor.batch import loaders_talk_over_the_cpu
from fastai.optimizer import OptimWrapper

def net(): return jocor_mlp(10, 64, 32)

class Keep(Callback):
    order,run_valid = 20,False
    def __init__(self, cb): self.cb,self.batches = cb,[]
    def before_batch(self): self.batches.append([self.xb[0].clone().as_subclass(torch.Tensor), self.yb[0].clone().as_subclass(torch.Tensor), self.cb.R])

class Sights(Callback):
    "What this process sees of each item, in order; which item it is tells its picture"
    order,run_valid = -4.9,False
    def before_train(self):
        dl = getattr(self.dls.train, 'dl', self.dls.train)
        if self.epoch == 0: self.which,self.seen = {x.tobytes(): i for i,x in enumerate(np.asarray(dl.store.images[dl.pos]))},[]
        self.seen.append([])
    def after_pred(self): self.logits = self.pred.detach().as_subclass(torch.Tensor).double()
    def after_loss(self):
        x,y = (self.xb[0].as_subclass(torch.Tensor)*255).round().byte().permute(0,2,3,1).numpy(),self.yb[0].as_subclass(torch.Tensor)
        losses,p = joint_loss(self.logits, y, .8),self.logits.softmax(-1).mean(0)
        votes = self.logits.argmax(-1)
        self.seen[-1] += [dict(item=self.which[np.ascontiguousarray(x[j]).tobytes()], loss=losses[j].item(), prob=p[j,y[j]].item(), conf=p[j].max().item(), vote=int(p[j].argmax()), given=int(y[j]), agree=bool((votes[:,j] == votes[0,j]).all())) for j in range(len(y))]

def main(out, select, n, method='JoCorCallback'):
    torch.manual_seed(100+rank_distrib())
    dls = digits_dls(noise=Symmetric(.4), bs=32, drop_last=False, valid=1-n/1797, device='cpu')
    learn = Learner(dls, net(), opt_func=lambda ps, **kw: OptimWrapper(ps, opt=torch.optim.SGD, **kw))
    learn.logger = noop
    cb = globals()[method](k=3, select=select, num_gradual=0)
    keep,sights = Keep(cb),Sights()
    auto = JoCorCallback(k=3, select=select, num_gradual=0, forget_rate='auto', balance=.5)
    with learn.distrib_ctx(sync_bn=False), loaders_talk_over_the_cpu():
        learn.remove_cb(learn.progress) if hasattr(learn,'progress') else None
        learn.fit(1, 0., cbs=JoCorCallback(k=3, num_gradual=0))
        start = {k: v.clone() for k,v in learn.model.state_dict().items()}
        learn.opt = None
        learn.fit(2, .1, cbs=[cb,keep,sights])
        final = {k: v.clone() for k,v in learn.model.state_dict().items()}
        valid = learn.validate()
        own = record.estimate_noise
        record.estimate_noise = lambda *args: replace(own(*args), rate=.1+.2*rank_distrib())
        learn.fit(3, 1e-3, cbs=auto)
    torch.save(dict(start=start, final=final, batches=keep.batches, history=cb.history.to_dict('list'), valid=list(valid), n=len(dls.train_ds), idxs=None,
        seen=sights.seen, items=cb.items.frame(), estimate=auto.estimate, behind=auto.behind, rates=auto.history.R.tolist()), Path(out)/f'rank{rank_distrib()}.pt')

if __name__ == '__main__': main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
