"""Train many runs of the same method side by side, as one stack of perceptrons

Each place of the stack is a run: it has its own items, labels, weights, order of items, λ, forget rate and selection,
and shares only the arithmetic. A small network spends most of a step outside of it, so twelve runs take little longer
than a few.
"""
import numpy as np, torch
from collections import namedtuple
from fastai.basics import *
from fastai_jocor.all import CoTeachingCallback, CoTeachingPlusCallback, jocor_mlp, JoCorCallback
from fastai_jocor.heads import fused_adam
from fastai_jocor.losses import joint_loss
from fastai_jocor.selection import small_loss_mask
from torch.utils.data import TensorDataset
from everyday_data import ArrayDL

# What a run trains on: a `Source`, the given labels, the seed, λ, and the share to drop in the end
Run = namedtuple('Run', 'source labels seed co_lambda tau')

class Stack(nn.Module):
    "Perceptrons side by side, one a run: a batch holds as many items of each run, run by run"
    def __init__(self, nets): # Of `jocor_mlp`
        super().__init__()
        both = [[net[i] for net in nets] for i in (1,3)]
        self.weights = nn.ParameterList([torch.stack([o.weight.detach().t() for o in layer]) for layer in both])
        self.biases = nn.ParameterList([torch.stack([o.bias.detach()[None] for o in layer]) for layer in both])

    def forward(self, x):
        x = x.unflatten(0, (len(self.biases[0]), -1))
        for i,(w,b) in enumerate(zip(self.weights, self.biases)): x = torch.baddbmm(b, x.relu() if i else x, w)
        return x.flatten(0, 1)

    def single(self, x, at):
        "Logits of the items by the network at one place of the stack"
        for i,(w,b) in enumerate(zip(self.weights, self.biases)): x = (x.relu() if i else x) @ w[at] + b[at]
        return x

class RunItems:
    "The items of all runs, run by run; runs of one source share its inputs"
    def __init__(self, runs):
        each = {id(o.source.x): o.source.x for o in runs}
        starts = dict(zip(each, np.cumsum([0, *map(len, each.values())])))
        self.x,self.y = torch.cat(list(each.values())),torch.as_tensor(np.concatenate([o.labels for o in runs]))
        self.at = torch.cat([starts[id(o.source.x)]+torch.arange(len(o.labels)) for o in runs])
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return self.x[self.at[i]],self.y[i]

class StackDL(ArrayDL):
    "Shuffle the items of each run by its seed"
    def __init__(self, runs, bs):
        self.rngs,self.each = [np.random.default_rng(o.seed) for o in runs],bs
        super().__init__(RunItems(runs), bs=len(runs)*bs, shuffle=True, drop_last=True, num_workers=0)

    def get_idxs(self):
        n = len(self.dataset)//len(self.rngs)
        full = n//self.each*self.each
        orders = np.stack([i*n + rng.permutation(n)[:full] for i,rng in enumerate(self.rngs)])
        return orders.reshape(len(orders), -1, self.each).swapaxes(0, 1).ravel().tolist()

class ByRun:
    "Select among the items of each run by its own forget rate, and add the runs' losses"
    def set_runs(self, runs):
        "`forget_rate` is the largest of the runs, and each drops its part of that"
        self.forget_rate = max(o.tau for o in runs)
        self.parts_of_R = torch.tensor([o.tau/(self.forget_rate or 1) for o in runs], dtype=torch.double)
        self.lambdas = torch.tensor([o.co_lambda for o in runs], dtype=torch.double)
        return self

    def of_runs(self, t): return t.unflatten(-1, (len(self.lambdas), -1))

    def small_mask(self, by, R, among=None):
        rows = self.of_runs(by).flatten(0, 1)
        among = torch.ones_like(rows, dtype=torch.bool) if among is None else self.of_runs(among).flatten(0, 1)
        keep = 1-R*self.parts_of_R.repeat(len(by))
        mask = small_loss_mask(rows, R, among, (keep*among.sum(-1)+1e-9).long()).view_as(by)
        return mask, mask.sum(-1)

    def mean_kept(self, losses, times, n):
        losses,times = self.of_runs(losses),self.of_runs(times)
        return ((losses*times).sum(-1)/times.sum(-1).clamp(min=1)).sum(-1)

    def keep_small(self, losses, R, by=None):
        mask,n = self.small_mask(losses[None], R)
        return self.mean_kept(losses, mask[0], n), mask[0], losses

class JoCorByRun(ByRun, JoCorCallback):
    "JoCoR by the published rule"
    def joint_losses(self, logits, log_probs, targ):
        fit,apart = (joint_loss(logits, targ, o, self.contrast, log_probs=log_probs) for o in (0,1))
        lam = self.lambdas.to(fit.dtype).repeat_interleave(len(targ)//len(self.lambdas))
        losses = (1-lam)*fit + lam*apart if self.k > 1 else fit
        return losses, losses

class CoTeachingByRun(ByRun, CoTeachingCallback): "Co-teaching"
class CoTeachingPlusByRun(ByRun, CoTeachingPlusCallback): "Co-teaching+"

@torch.no_grad()
def accuracies(model, at, x, y, counts):
    "Mean accuracy of the first peers and accuracy of their ensemble, for one run; a row for each of `counts`"
    nets = getattr(model, 'peers', [model])
    probs = torch.stack([net.single(x, at).softmax(-1) for net in nets])
    right = (probs.argmax(-1) == y).double().mean(-1)
    both = [(right[:n].mean(), (probs[:n].mean(0).argmax(-1) == y).double().mean()) for n in counts]
    return torch.tensor(both)

class Curves(Callback):
    "Note the accuracies of each run after each epoch on a part of the test items, in place of validation"
    def __init__(self, n_runs, x, y, counts, every=5):
        self.n_runs,self.x,self.y,self.counts = n_runs,x,y,counts
        self.every,self.epochs = every,[]

    def found(self, every=1):
        x,y = self.x[::every],self.y[::every]
        return torch.stack([accuracies(self.learn.model, i, x, y, self.counts) for i in range(self.n_runs)])

    def before_validate(self):
        self.epochs.append(self.found(self.every))
        raise CancelValidException()

    def after_fit(self): self.end = self.found()

def new_net(seed, i, n_out, n_in):
    torch.manual_seed(100*i+seed)
    return jocor_mlp(n_out, n_in)

def train(runs, cb, counts=None, epochs=10, lr=3e-3, bs=128):
    """Train runs side by side

    Gives the accuracies after each epoch (epochs, runs, counts, 2) and in the end (runs, counts, 2)"""
    d = runs[0].source
    sizes = len(d.names),d.x.shape[1]
    cb.models = [Stack([new_net(o.seed, i, *sizes) for o in runs]) for i in range(cb.k)]
    test = d.x_test,torch.as_tensor(d.y_test)
    dls = DataLoaders(StackDL(runs, bs), ArrayDL(TensorDataset(*test), bs=1000, num_workers=0))
    learn = Learner(dls, cb.models[0], loss_func=CrossEntropyLossFlat(), opt_func=fused_adam)
    curves = Curves(len(runs), *test, counts or [cb.k])
    set_seed(runs[0].seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=[cb, curves])
    return torch.stack(curves.epochs),curves.end
