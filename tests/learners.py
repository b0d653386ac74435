"Learners that several tests train"
import torch
from fastai.vision.all import Callback, DataLoader, DataLoaders, Learner, ProgressCallback, accuracy, nn, noop, set_seed
from fastai_jocor.all import Symmetric, digits_dls, jocor_mlp
from fastai_jocor.lab.run import fast_adam

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def digits(noise=Symmetric(.5), seed=0, opt_func=fast_adam, **kwargs):
    set_seed(seed)
    dls = digits_dls(noise=noise, seed=seed)
    return quiet(Learner(dls, jocor_mlp(dls.c, n_in=64), metrics=accuracy, opt_func=opt_func, **kwargs))

def digits64(weight=None):
    "Digits as float64 pixels in plain loaders, half of the labels wrong: no rounding decides which items are kept"
    from sklearn.datasets import load_digits
    d = load_digits()
    x,y = torch.as_tensor(d.data/16),torch.as_tensor(Symmetric(.5).corrupt(d.target, 10))
    dls = DataLoaders(DataLoader(list(zip(x[:1200],y[:1200])), bs=64, shuffle=True), DataLoader(list(zip(x[1200:],y[1200:])), bs=64))
    return quiet(Learner(dls, jocor_mlp(10,64).double(), loss_func=nn.CrossEntropyLoss(weight=weight), opt_func=fast_adam))

class Record(Callback):
    "Keep the batches of a fit"
    order,run_valid = 20,False
    def __init__(self): self.batches = []
    def before_batch(self): self.batches.append((self.epoch, self.xb[0].clone(), self.yb[0].clone()))
