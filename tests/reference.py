"The training rules, written out: one pair of peers after the other, and sorted by numpy."
import numpy as np, torch
import torch.nn.functional as F
from functools import partial

cross_entropy = partial(F.cross_entropy, reduction='none')

def kl(a, b):
    "Divergence of each item, from logits (N, C)"
    a,b = a.log_softmax(-1),b.log_softmax(-1)
    return (a.exp()*(a-b)).sum(-1)

def kl_of_labels(a, b):
    "Divergence of each of several labels of an item, from logits (N, C)"
    p,q = a.sigmoid(),b.sigmoid()
    return p*(p/q).log() + (1-p)*((1-p)/(1-q)).log()

def joint_losses(zs, y, co_lambda=.8, loss=cross_entropy, divergence=kl):
    "Loss of each item, from the logits of k peers"
    own = sum(loss(z, y) for z in zs)
    k = len(zs)
    if k == 1: return own
    contrast = sum(divergence(zs[m], zs[n]) for m in range(k) for n in range(k) if m != n)
    return (1-co_lambda)*own + co_lambda*contrast/(k-1)

def n_kept(rate, n): return max(int((1-rate)*n), 1)

def smallest(losses, rate):
    "Places of the items with the smallest losses"
    order = np.argsort(losses.detach().numpy(), kind='stable')
    return torch.as_tensor(order[:n_kept(rate, len(losses))])

def step(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()

def adam(nets, lr): return torch.optim.Adam([p for m in nets for p in m.parameters()], lr=lr)

def train(nets, batches, rates, lr, losses=joint_losses, weight=None):
    "Train peers on batches `(epoch, x, y)`, with class weights in the mean only; gives the kept places of each batch"
    opt,kept = adam(nets, lr),[]
    for epoch,x,y in batches:
        loss = losses([m(x) for m in nets], y)
        kept.append(smallest(loss, rates[epoch]))
        step(opt, mean_of(loss, kept[-1], None if weight is None else weight[y]))
    return kept

def train_carried(nets, batches, rates, lr, losses=joint_losses):
    "As `train`, but what is left of `R*n` goes to the next batch; gives the kept places of each batch"
    opt,kept,owed,was = adam(nets, lr),[],0.,-1
    for epoch,x,y in batches:
        loss = losses([m(x) for m in nets], y)
        owed,was = (owed if epoch == was else 0.)+rates[epoch]*len(y),epoch
        n = int(owed+1e-6)
        owed -= n
        kept.append(torch.as_tensor(np.argsort(loss.detach().numpy(), kind='stable')[:len(y)-n]))
        step(opt, loss[kept[-1]].mean())
    return kept

# --- Co-teaching

def taught(zs, y, rate, plus):
    "For each peer the items that the next one chooses for it, among those on which the two disagree with `plus`"
    k,n = len(zs),len(y)
    losses = [[cross_entropy(z[i:i+1], y[i:i+1]).item() for i in range(n)] for z in zs]
    best = [z.argmax(-1).tolist() for z in zs]
    chosen = []
    for m in range(k):
        teacher = 0 if m == k-1 else m+1
        among = [i for i in range(n) if not plus or best[m][i] != best[teacher][i]]
        order = sorted(among, key=lambda i: losses[teacher][i])
        chosen.append(order[:n_kept(rate, len(among))])
    return chosen

def mean_of(losses, idx, weight=None):
    "Mean loss over some items, weighted or not; 0 without one"
    if not len(idx): return losses.sum()*0
    idx = torch.as_tensor(idx)
    return losses[idx].mean() if weight is None else (weight*losses)[idx].sum()/weight[idx].sum()

def co_teach(nets, batches, rates, lr, plus, weight=None):
    "Train each peer on what the next one chose; gives `(epoch, items kept by a peer, items)` of each batch"
    opts,shares = [adam([m], lr) for m in nets],[]
    for epoch,x,y in batches:
        zs = [m(x) for m in nets]
        chosen = taught([z.detach() for z in zs], y, rates[epoch], plus)
        shares.append((epoch, sum(map(len, chosen))/len(nets), len(y)))
        by_label = None if weight is None else weight[y]
        for opt,z,idx in zip(opts, zs, chosen): step(opt, mean_of(cross_entropy(z, y), idx, by_label))
    return shares

def assert_same_weights(nets, others, atol=1e-5):
    "Equal but for rounding, which Adam enlarges where a gradient is close to 0"
    for a,b in zip(nets, others, strict=True):
        for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, atol=atol, rtol=0)
