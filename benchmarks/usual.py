"""JoCoR as it is usually coded, which `speed.py` compares with.

Written down from the formulas of the papers, with the steps of the authors' training loop: a data set that gives one
image at a time through PIL and `ToTensor`, torch's `DataLoader`, contiguous float32, Adam without further options,
the divergences pair by pair, the losses to the CPU, numpy's argsort for each batch; and in each batch the accuracy of
each network and the share of right labels among those that are kept. What it does not do is print.
"""
import numpy as np, torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import ToTensor
from timing import seconds

class PerItem(torch.utils.data.Dataset):
    "One image at a time, as a picture through `ToTensor`, with its label and its place"
    def __init__(self, images, labels): self.images,self.labels,self.tfm = images,labels,ToTensor()
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.tfm(Image.fromarray(self.images[i])),int(self.labels[i]),i

def pairwise_loss(zs, y, lam):
    "The joint loss per item, pair by pair"
    ce = sum(F.cross_entropy(z, y, reduction='none') for z in zs)
    def divergence(a, b): return F.kl_div(F.log_softmax(b,1), F.softmax(a,1), reduction='none').sum(1)
    kl = sum(divergence(a, b) for i,a in enumerate(zs) for j,b in enumerate(zs) if i != j)
    return (1-lam)*ce + lam*kl

def usual_epoch(nets, opt, loader, rate, right=None, lam=.9):
    "Train for an epoch; accuracies of the networks, and shares of right labels among the kept, of each batch"
    for m in nets: m.train()
    accs,pure = [],[]
    for x,y,*idx in loader:
        zs = [m(x) for m in nets]
        accs.append([(z.argmax(1) == y).float().mean() for z in zs])
        loss = pairwise_loss(zs, y, lam)
        order = np.argsort(loss.detach().cpu().numpy())
        kept = torch.as_tensor(order[:int((1-rate)*len(y))])
        if right is not None: pure.append(right[idx[0][kept].numpy()].mean())
        loss = loss[kept].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return accs,pure

def usual(images, labels, right, make, k, rate):
    "A function that trains for an epoch and gives its seconds, with 0 or 2 workers, whichever is faster; and which"
    nets = [make() for _ in range(k)]
    opt = torch.optim.Adam([p for m in nets for p in m.parameters()], lr=1e-3)
    ds = PerItem(images, labels)
    loaders = {w: torch.utils.data.DataLoader(ds, 128, shuffle=True, drop_last=True, num_workers=w) for w in (0,2)}
    times = {w: seconds(lambda: usual_epoch(nets, opt, dl, rate, right)) for w,dl in loaders.items()}
    best = min(times, key=times.get)
    print(f'usual coding: {times[0]:.1f} s with 0 workers, {times[2]:.1f} s with 2', flush=True)
    return lambda: seconds(lambda: usual_epoch(nets, opt, loaders[best], rate, right)), best
