"When things go wrong: bad numbers, bad data, dying workers, full disks, Ctrl-C."
import os, random, signal, warnings, numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import (Adam, Callback, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, IndexSplitter, Learner, TransformBlock, CategoryBlock, accuracy, nn, set_seed)
from fastai_jocor.all import *
from fastai_jocor.lab.run import fast_adam
from learners import quiet

def tensors(x, y, model, bs=32, valid=None, opt=fast_adam, **kwargs):
    dl = DataLoader(list(zip(x, y)), bs=bs, shuffle=False)
    return quiet(Learner(DataLoaders(dl, DataLoader(valid if valid is not None else list(zip(x, y)), bs=bs)), model, loss_func=CrossEntropyLossFlat(), opt_func=opt, **kwargs))

def images(n=128, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g),torch.randint(0, c, (n,), generator=g)

def finite(model): return all(p.isfinite().all() for p in model.parameters()) and all(b.isfinite().all() for b in model.buffers() if b.is_floating_point())

@pytest.mark.parametrize('value', (float('nan'), float('inf'), -float('inf')))
@pytest.mark.parametrize('opt', (Adam, fast_adam))
def test_bad_images_are_never_kept(monkeypatch, value, opt):
    x,y = images()
    bad = torch.zeros(128, dtype=torch.bool); bad[[3,40,41,99]] = True
    x[3],x[40,1,2,3],x[41,0],x[99,:,0] = value,value,value,value
    seen = []
    import fastai_jocor.callback as m
    select = m.select_small
    monkeypatch.setattr(m, 'select_small', lambda l,r: seen.append((l.detach().clone(), select(l,r))) or seen[-1][1])
    learn = tensors(x, y, jocor_cnn(4), opt=opt)
    cb = JoCorCallback(k=2, forget_rate=.1, num_gradual=0)
    learn.fit(2, 1e-3, cbs=cb)
    assert cb.history.non_finite.tolist() == [4,4] and finite(learn.model)
    assert len(seen) == 8
    for i,(l,kept) in enumerate(seen):
        mine = bad[i%4*32:(i%4+1)*32]
        assert not mine[kept].any() and len(kept) == 28 and l[~mine].isfinite().all() and not l[mine].isfinite().any()

def test_finite_batches_are_not_changed():
    x,y = images()
    a = tensors(x, y, jocor_cnn(4))
    class Same(Callback):
        order,run_valid = 30,False
        def before_batch(self): assert torch.equal(self.xb[0].as_subclass(torch.Tensor), x[self.iter*32:(self.iter+1)*32]) and self.xb[0].dtype == torch.float32
    cb = JoCorCallback(k=2, forget_rate=.1)
    a.fit(1, 1e-3, cbs=[cb, Same()])
    assert cb.history.non_finite.tolist() == [0]

def test_the_users_tensors_are_left_alone():
    x,y = images(32)
    x[5] = float('nan')
    learn = tensors(x, y, jocor_cnn(4))
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.1))
    assert x[5].isnan().all()

@pytest.mark.parametrize('opt', (Adam, fast_adam))
def test_a_batch_without_a_finite_loss_is_skipped_and_said_once(opt):
    x,y = images()
    x[32:64] = float('nan')
    learn = tensors(x, y, jocor_cnn(4), opt=opt)
    weights = []
    class Watch(Callback):
        order,run_valid = 20,False
        def after_batch(self): weights.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
    with pytest.warns(UserWarning, match='no item has a finite loss') as rec: learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2, forget_rate=.1), Watch()])
    assert len([w for w in rec if 'finite loss' in str(w.message)]) == 1
    for i in (1,5): assert torch.equal(weights[i], weights[i-1])
    for i in (2,3,4,6,7): assert not torch.equal(weights[i], weights[i-1])
    assert finite(learn.model) and np.isfinite(learn.recorder.values[-1][0])

class Explode(nn.Module):
    "Multiply the logits in some batches"
    def __init__(self, by, when=(2,)): super().__init__(); self.net,self.by,self.when,self.n = nn.Sequential(nn.Flatten(), nn.Linear(768,4)),by,when,0
    def forward(self, x):
        z = self.net(x)
        if self.training:
            if self.n in self.when: z = z*self.by
            self.n += 1
        return z

@pytest.mark.parametrize('by', (1e4, 1e20, 1e38, float('inf'), float('nan')))
def test_exploding_logits(by):
    x,y = images()
    learn = tensors(x, y, Explode(by))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.1, models=[Explode(by), Explode(by)]))
    assert finite(learn.model) and np.isfinite(learn.recorder.values[-1]).all()

def test_scaled_logits_for_2000_steps():
    "Logits times 100: softmax underflows to 0, where the official code's gradient becomes NaN"
    x,y = images(64)
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(768, 4)
        def forward(self, x): return 100*self.lin(x.flatten(1))
    p = F.softmax(Scaled()(x), -1)
    z = (Scaled()(x).detach(), Scaled()(x).detach().requires_grad_())
    F.kl_div(F.log_softmax(z[0],-1), F.softmax(z[1],-1), reduction='sum').backward()
    assert (p == 0).any() and z[1].grad.isnan().any()
    steps = []
    class Finite(Callback):
        order,run_valid = 20,False
        def after_backward(self): steps.append(torch.stack([p.grad.isfinite().all() for p in self.model.parameters()]).all())
    learn = tensors(x, y, Scaled(), bs=8)
    learn.fit(250, 1e-3, cbs=[JoCorCallback(k=3, forget_rate=.2, models=Scaled), Finite()])
    assert len(steps) == 2000 and all(steps) and finite(learn.model)

@pytest.mark.parametrize('n', (33, 65))
def test_a_last_batch_of_one_item(n):
    x,y = images(n)
    learn = tensors(x, y, nn.Sequential(nn.Flatten(), nn.Linear(768,4)))
    cb = JoCorCallback(k=3, forget_rate=.4)
    learn.fit(3, 1e-3, cbs=cb)
    assert finite(learn.model) and cb.history.kept.iloc[-1] == pytest.approx((n//32*19+1)/n)

def test_a_class_with_one_item():
    x,y = images()
    y[:] = torch.arange(128) % 3
    y[7] = 3
    learn = tensors(x, y, nn.Sequential(nn.Flatten(), nn.Linear(768,4)))
    learn.fit(4, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.3))
    assert finite(learn.model) and learn.get_preds()[0].shape == (128,4)

@pytest.mark.parametrize('valid', ([], None), ids=('empty','none'))
def test_without_a_validation_set(valid):
    x,y = images()
    dl = DataLoader(list(zip(x, y)), bs=32)
    dls = DataLoaders(dl, DataLoader([], bs=32)) if valid is not None else DataBlock((TransformBlock, CategoryBlock), get_x=lambda i: x[i], get_y=lambda i: int(y[i]), splitter=IndexSplitter([])).dataloaders(range(128), bs=32, num_workers=0)
    learn = quiet(Learner(dls, jocor_cnn(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    plain = quiet(Learner(dls, jocor_cnn(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    def outcome(f):
        try: f()
        except Exception as e: return type(e).__name__
    want = outcome(lambda: plain.fit(1))
    cb = JoCorCallback(k=2, forget_rate=.2)
    assert outcome(lambda: learn.fit(1, cbs=cb)) == want
    assert len(cb.history) == 1 and finite(learn.model)

class Dies:
    "An item whose reader kills its process once"
    def __init__(self, x, y, at, flag): self.x,self.y,self.at,self.flag = x,y,at,flag
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if i == self.at and self.flag.exists() and torch.utils.data.get_worker_info() is not None:
            self.flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i],self.y[i]

def test_workers_that_die(tmp_path):
    x,y = images(256)
    ds = Dies(x, y, 200, tmp_path/'die')
    dl = DataLoader(ds, bs=32, num_workers=2, shuffle=False)
    learn = quiet(Learner(DataLoaders(dl, DataLoader(list(zip(x[:32],y[:32])), bs=32)), jocor_cnn(4), loss_func=CrossEntropyLossFlat()))
    (tmp_path/'die').write_text('')
    with pytest.raises(RuntimeError, match='worker'): learn.fit(2, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.2))
    assert not any(isinstance(cb, PeersCallback) for cb in learn.cbs) and learn.get_preds()[0].shape == (32,4)
    cb = JoCorCallback(k=2, forget_rate=.2)
    learn.fit(2, 1e-3, cbs=cb)
    assert len(cb.history) == 2 and finite(learn.model)

def digits(path=None, **kwargs):
    set_seed(0)
    return quiet(Learner(digits_dls(noise=Symmetric(.4)), jocor_mlp(10, 64), metrics=accuracy, path=path, **kwargs))

def test_a_full_disk_at_checkpoint_time(tmp_path, monkeypatch):
    "torch.save writes a part of the file and fails, at the third checkpoint"
    learn,count,save = digits(tmp_path),[0],torch.save
    def full(obj, f, *a, **k):
        count[0] += 1
        if count[0] < 3: return save(obj, f, *a, **k)
        with open(f, 'wb') as o: o.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    def fit(learn, cb): learn.fit(5, 4e-3, cbs=[cb, Checkpoint()])
    with pytest.raises(OSError, match='No space'): fit(learn, JoCorCallback(k=2))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path/'models').iterdir()] == ['checkpoint.pth']
    cb = JoCorCallback(k=2)
    fit(digits(tmp_path), cb)
    assert len(cb.history) == 5 and cb.ledger.seen.max() == 5
    learn.fit(1, cbs=JoCorCallback(k=2))

@pytest.mark.parametrize('seed', range(10))
def test_ctrl_c_at_random_points(seed):
    "A real SIGINT at a random point of the fit, then another fit"
    old = signal.signal(signal.SIGINT, signal.default_int_handler) # a process in the background may ignore it
    try: interrupt_and_go_on(seed)
    finally: signal.signal(signal.SIGINT, old)

def interrupt_and_go_on(seed):
    rng = random.Random(seed)
    learn = digits()
    events = []
    at = rng.randrange(20, 1500)
    class Interrupt(Callback):
        order = rng.choice((-20,-4,0,30,58,100))
        def __call__(self, name):
            events.append(name)
            if len(events) == at: signal.raise_signal(signal.SIGINT)
    cb = JoCorCallback(k=2)
    with pytest.raises(KeyboardInterrupt): learn.fit(20, 1e-3, cbs=[cb, Interrupt()])
    assert len(learn.cbs) == 3 and isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape[1] == 10
    again = JoCorCallback(k=2)
    learn.fit_one_cycle(2, 3e-3, cbs=again)
    assert len(again.history) == 2 and finite(learn.model) and learn.recorder.values[-1][0] < 4
    with pytest.raises(RuntimeError, match='cbs=JoCorCallback'): learn.fit(1)
