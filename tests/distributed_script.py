"Run by torch.distributed.run in two processes on the CPU: trains, and writes what each rank sees."
import json, os, sys, torch, numpy as np
from pathlib import Path
os.environ['ACCELERATE_USE_CPU'] = 'true'
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn, noop, num_distrib, rank_distrib, set_seed
from fastai.distributed import *
from fastai_jocor.all import *
from fastai.optimizer import OptimWrapper

def net(): return jocor_mlp(10, 64, 32)

class Keep(Callback):
    order,run_valid = 20,False
    def __init__(self, cb): self.cb,self.batches = cb,[]
    def before_batch(self): self.batches.append([self.xb[0].clone().as_subclass(torch.Tensor), self.yb[0].clone().as_subclass(torch.Tensor), self.cb.rate])

def main(out, select, n, method='JoCorCallback'):
    torch.manual_seed(100+rank_distrib())
    dls = digits_dls(noise=Symmetric(.4), bs=32, drop_last=False, valid=1-n/1797, device='cpu')
    learn = Learner(dls, net(), opt_func=lambda ps, **kw: OptimWrapper(ps, opt=torch.optim.SGD, **kw))
    learn.logger = noop
    cb = globals()[method](k=3, select=select, num_gradual=0)
    keep = Keep(cb)
    with learn.distrib_ctx(sync_bn=False):
        learn.remove_cb(learn.progress) if hasattr(learn,'progress') else None
        learn.fit(1, 0., cbs=JoCorCallback(k=3, num_gradual=0))
        start = {k: v.clone() for k,v in learn.model.state_dict().items() if k != 'run_state'}
        learn.opt = None
        learn.fit(2, .1, cbs=[cb,keep])
        final = {k: v.clone() for k,v in learn.model.state_dict().items() if k != 'run_state'}
        valid = learn.validate()
    torch.save(dict(start=start, final=final, batches=keep.batches, history=cb.history.to_dict('list'), valid=list(valid), n=len(dls.train_ds), idxs=None), Path(out)/f'rank{rank_distrib()}.pt')

if __name__ == '__main__': main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
