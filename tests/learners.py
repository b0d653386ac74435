"Learners that several tests train"
import numpy as np, torch
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, ProgressCallback,
    accuracy, nn, noop, set_seed)
from fastai_jocor.all import Symmetric, digits_dls, jocor_mlp
from fastai_jocor.noise_record import NoiseRecord
from fastai_jocor.lab.run import fast_adam
from sklearn.datasets import load_digits

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def digits(noise=Symmetric(.5), seed=0, opt_func=fast_adam, bs=64, model=None, **kwargs):
    set_seed(seed)
    dls = digits_dls(noise=noise, seed=seed, bs=bs)
    return quiet(Learner(dls, model or jocor_mlp(dls.c, n_in=64), metrics=accuracy, opt_func=opt_func, **kwargs))

def digits64(weight=None, seed=0, bs=64, **kwargs):
    "Digits as float64 pixels in plain loaders, half of the labels wrong: no rounding decides which items are kept"
    set_seed(seed)
    d = load_digits()
    x,true,given = torch.as_tensor(d.data/16),d.target,Symmetric(.5).corrupt(d.target, 10)
    items = list(zip(x, torch.as_tensor(given)))
    dls = DataLoaders(DataLoader(items[:1200], bs=bs, shuffle=True), DataLoader(items[1200:], bs=bs))
    dls.noise = NoiseRecord(true[:1200], given[:1200], 10, Symmetric(.5))
    loss_func = nn.CrossEntropyLoss(weight)
    return quiet(Learner(dls, jocor_mlp(10, 64).double(), loss_func=loss_func, opt_func=fast_adam, **kwargs))

def mlps64(k):
    "Perceptrons for `digits64`"
    return [jocor_mlp(10, 64).double() for _ in range(k)]

def tensors(x, y, model, bs=32, loss_func=None, opt_func=fast_adam, shuffle=False, metrics=None, **kwargs):
    "A learner on tensors, which are the validation set too"
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items, bs=bs, shuffle=shuffle, **kwargs), DataLoader(items, bs=bs))
    loss_func = CrossEntropyLossFlat() if loss_func is None else loss_func
    return quiet(Learner(dls, model, loss_func=loss_func, opt_func=opt_func, metrics=metrics))

SCHEDULE = dict(rule='schedule', rounding='official') # the published rule of selection

def plain(t): return t.detach().clone().as_subclass(torch.Tensor)

class Record(Callback):
    "Keep the batches of a fit; `items` tells which they are from their pictures, where the data set is of tensors"
    run_valid = False
    def __init__(self,
        order=11 # Before batches are pruned; 20 for after that
    ): self.order,self.batches = order,[]
    def before_batch(self): self.batches.append((self.epoch, plain(self.xb[0]), plain(self.yb[0])))

    def items(self, learn):
        "Positions in the training set of the items of each batch"
        where = {x.numpy().tobytes(): i for i,(x,_) in enumerate(learn.dls.train.dataset)}
        return [np.array([where[o.numpy().tobytes()] for o in x]) for _,x,_ in self.batches]

class Step(Callback):
    "Call a function of the learner after the loss of each batch"
    order,run_valid = 8,False
    def __init__(self, f): self.f = f
    def after_loss(self): self.f(self.learn)

def weights(model): return [p.detach().clone().cpu() for p in model.parameters()]
def same(a, b): return len(a) == len(b) and all(torch.equal(p, q) for p,q in zip(a, b))
def finite(model):
    floats = [o for o in (*model.parameters(), *model.buffers()) if o.is_floating_point()]
    return all(o.isfinite().all() for o in floats)
