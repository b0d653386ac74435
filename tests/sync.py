"Watch that nothing in a training step waits for the device."
import pytest, torch
from contextlib import contextmanager
from torch.utils._python_dispatch import TorchDispatchMode
from fastai_jocor import batch
from fastai_jocor.batch import Selection
from fastai_jocor.events import Part
from fastai_jocor.step import SmallLoss

aten = torch.ops.aten
READS = aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default
METHODS = 'cpu', 'numpy', 'tolist', 'item', '__float__', '__bool__'
STEP = 'before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch'

class NoReads(TorchDispatchMode):
    "Refuse operations that read a value, or give a tensor whose shape depends on one"
    def __init__(self, seen):
        super().__init__()
        self.seen = seen
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.seen.append(f)
        assert f not in READS, f
        by_mask = f is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, f
        assert 'device' not in (kwargs or {}) or f.overloadpacket is not aten._to_copy, f
        return f(*args, **(kwargs or {}))

@contextmanager
def no_reads(seen):
    "`.cpu()` and the like leave no trace in the dispatcher on a CPU tensor, so they are refused themselves"
    def refuse(name): return lambda *args, **kwargs: pytest.fail(f'Tensor.{name} inside the step')
    with NoReads(seen), pytest.MonkeyPatch.context() as m:
        for name in METHODS: m.setattr(torch.Tensor, name, refuse(name))
        yield

def guard_steps(monkeypatch, guard, first=0):
    "Let all parts of a callback, and its loss, act within `guard()` in each step from the `first` of an epoch on"
    call,loss = Part.__call__,SmallLoss.loss
    def in_step(part): return part.learn.training and part.learn.iter >= first
    def guarded_call(self, event):
        if event not in STEP or not in_step(self): return call(self, event)
        with guard(): return call(self, event)
    def guarded_loss(self, *args):
        if not in_step(self): return loss(self, *args)
        with guard(): return loss(self, *args)
    monkeypatch.setattr(Part, '__call__', guarded_call)
    monkeypatch.setattr(SmallLoss, 'loss', guarded_loss)

def as_on_a_gpu(monkeypatch, seen):
    "What a callback does on a GPU, on a CPU; a GPU has tests of its own, by `set_sync_debug_mode`"
    if torch.cuda.is_available(): pytest.skip('acts on a CPU as on a GPU')
    monkeypatch.setattr(Selection, 'reads_are_free', False)
    monkeypatch.setattr(batch, '_on_cpu', lambda t: False)
    guard_steps(monkeypatch, lambda: no_reads(seen))
