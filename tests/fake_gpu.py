"""A step on tensors that pretend to lie on a GPU: they have a shape and a device, but no values.

To mix them with tensors on the CPU is an error, and so is to read a value, or a shape that depends on one, and float64
where the GPU is one of Apple's, which do not have it."""
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from contextlib import nullcontext
from fastai_jocor import losses
from fastai_jocor.per_sample import cross_entropy_of
from fastai_jocor.step import SmallLoss

class NoFloat64(TorchDispatchMode):
    "Refuse tensors in float64 on a GPU"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == 'cuda': assert out.dtype != torch.float64, f
        return out

class FakeGPU:
    "Tensors of several objects as fake ones on a GPU, and back"
    def __init__(self):
        self.mode,self.twins,self.old = FakeTensorMode(),{},[]

    def twin(self, o):
        "The same on the GPU, for a tensor, or a list or tuple of them"
        if isinstance(o, (list,tuple)): return type(o)(map(self.twin, o))
        if not isinstance(o, Tensor): return o
        if id(o) not in self.twins: # with `o`, which keeps it alive, so that no `id` is used again
            with self.mode: self.twins[id(o)] = torch.empty(tuple(o.shape), dtype=o.dtype, device='cuda'),o
        return self.twins[id(o)][0]

    def move(self, d):
        "Move what a dictionary of attributes holds"
        self.old.append((d, dict(d)))
        d.update({name: self.twin(o) for name,o in d.items() if isinstance(o, (Tensor,list,tuple))})

    def back(self):
        for d,old in self.old[::-1]:
            d.clear()
            d.update(old)

def _step(part, loss, pred, yb, guard):
    "The loss of a batch and what is seen of it, on the fake GPU; gives the columns of what was seen"
    learn,owner,s = part.learn,part.owner,part.learn.selection
    gpu = FakeGPU()
    gpu.old.append((vars(learn), dict(vars(learn))))
    untold = None if s.evidence is None else s.evidence.untold
    for o in (s, owner.record.sightings, s.evidence, untold, owner.items, getattr(owner, 'early', None)):
        if o is not None: gpu.move(vars(o))
    for f in (s.per_sample, s.unweighted):
        ce = cross_entropy_of(f.args[0]) if f is not None and f.args else None
        if ce is not None: gpu.move(ce._buffers)
    behind,s.device = getattr(owner, 'behind', None),torch.device('cuda')
    try:
        with gpu.mode, guard():
            if behind is not None: owner.behind = gpu.twin(behind)
            learn.loss_grad = loss(part, gpu.twin(pred), *map(gpu.twin, yb))
            part.after_loss()
            owner.record.sightings.add()
            owner.record.sightings.fold()
            return owner.record.sightings.folded[-1]
    finally:
        if behind is not None: owner.behind = behind
        gpu.back()

def watch(monkeypatch, at=1, apples=False):
    "Let a step of each epoch run on a fake GPU, too, and then as it is; gives what was seen there, from each epoch"
    loss,seen = SmallLoss.loss,[]
    if apples: monkeypatch.setattr(losses, '_no_float64', ('cuda','cpu'))
    def both(self, pred, *yb):
        if self.learn.training and self.learn.iter == at:
            seen.append(_step(self, loss, pred, yb, NoFloat64 if apples else nullcontext))
            self.learn.loss_func = self.loss
        return loss(self, pred, *yb)
    monkeypatch.setattr(SmallLoss, 'loss', both)
    return seen
