"When things go wrong: bad numbers, bad data, dying workers, full disks, Ctrl-C."
import ast, copy, gc, os, random, signal, warnings, weakref, pytest, torch
import numpy as np
import torch.nn.functional as F
from fastai.vision.all import (Adam, Callback, CancelFitException, CancelValidException, CategoryBlock,
    CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, IndexSplitter, Learner, TransformBlock, accuracy, nn)
from fastai_jocor.all import *
from fastai_jocor.features import kept_features
from fastai_jocor.per_sample import per_sample_loss
from fastai_jocor.trainer import PeersCallback
from pathlib import Path
from learners import SCHEDULE, digits, fast_adam, finite, plain, quiet, tensors, weights

optimizers = pytest.mark.parametrize('opt_func', (Adam, fast_adam), ids=('fastai','torch'))

def images(n=128, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g),torch.randint(0, c, (n,), generator=g)

# --- bad numbers

@pytest.mark.parametrize('value', (float('nan'), float('inf'), -float('inf')))
@optimizers
@pytest.mark.parametrize('rule', ('evidence','schedule'))
def test_bad_images_are_never_kept(value, opt_func, rule):
    x,y = images()
    x[3],x[40,1,2,3],x[41,0],x[99,:,0] = value,value,value,value
    bad = torch.zeros(128, dtype=torch.bool)
    bad[[3,40,41,99]] = True
    learn = tensors(x, y, jocor_cnn(4), opt_func=opt_func)
    kw = dict(num_gradual=0, rounding='official') if rule == 'schedule' else {}
    cb = JoCorCallback(k=2, forget_rate=.1, **kw)
    learn.fit(2, 1e-3, cbs=cb)
    assert cb.history.non_finite.tolist() == [4,4] and finite(learn.model)
    assert not cb.items.kept[bad].any()
    if kw: assert cb.items.kept.sum() == 2*4*28
    else: assert (cb.items.kept[~bad] > 0).sum() > 100
    assert cb.items.last_loss[~bad].isfinite().all() and not cb.items.last_loss[bad].isfinite().any()

def test_bad_numbers_are_reported_once_in_a_fit():
    x,y = images()
    x[3],x[99] = float('nan'),float('inf')
    learn = tensors(x, y, jocor_cnn(4))
    learn.recorder.train_metrics = True
    with pytest.warns(UserWarning) as said: learn.fit(2, 1e-3, cbs=(cb := JoCorCallback(k=2)))
    told = [str(w.message) for w in said if 'infinite' in str(w.message)]
    assert len(told) == 1 and told[0].startswith('epoch 0: 2 of the 128 items')
    assert cb.history.non_finite.tolist() == [2,2] and 'non_finite' not in ' '.join(learn.recorder.metric_names)

def test_bad_numbers_while_a_learning_rate_is_looked_for():
    x,y = images()
    x[3] = float('nan')
    learn = tensors(x, y, jocor_cnn(4))
    learn.add_cb(JoCorCallback(k=2))
    with pytest.warns(UserWarning) as said:
        learn.lr_find(num_it=6, show_plot=False)
        warnings.warn('end')
    assert not [w for w in said if 'infinite' in str(w.message)]

@pytest.mark.filterwarnings('error:epoch')
def test_finite_batches_are_not_changed():
    x,y = images()
    class Same(Callback):
        order,run_valid = 30,False
        def before_batch(self):
            batch = plain(self.xb[0])
            assert torch.equal(batch, x[self.iter*32:(self.iter+1)*32]) and batch.dtype == torch.float32
    cb = JoCorCallback(k=2, forget_rate=.1)
    tensors(x, y, jocor_cnn(4)).fit(1, 1e-3, cbs=[cb, Same()])
    assert cb.history.non_finite.tolist() == [0]

def test_the_users_tensors_are_left_alone():
    x,y = images(32)
    x[5] = float('nan')
    tensors(x, y, jocor_cnn(4)).fit(1, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.1))
    assert x[5].isnan().all()

class Watch(Callback):
    "The weights after each batch"
    order,run_valid = 20,False
    def __init__(self): self.after = []
    def after_batch(self): self.after.append(torch.cat([p.flatten() for p in weights(self.model)]))

@optimizers
def test_a_batch_without_a_finite_loss_is_skipped_and_said_once(opt_func):
    x,y = images()
    x[32:64] = float('nan')
    learn,watch = tensors(x, y, jocor_cnn(4), opt_func=opt_func),Watch()
    with pytest.warns(UserWarning, match='no item has a finite loss') as said:
        learn.fit(2, 1e-3, cbs=[JoCorCallback(k=2, forget_rate=.1), watch])
    assert len([w for w in said if 'finite loss' in str(w.message)]) == 1
    moved = [not torch.equal(a, b) for a,b in zip(watch.after, watch.after[1:])]
    assert moved == [False,True,True,True,False,True,True]
    assert finite(learn.model) and np.isfinite(learn.recorder.values[-1][0])

class Explode(nn.Module):
    "Multiply the logits in some batches"
    def __init__(self, by, when=(2,)):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(768,4))
        self.by,self.when,self.n = by,when,0
    def forward(self, x):
        z = self.net(x)
        if not self.training: return z
        self.n += 1
        return z*self.by if self.n-1 in self.when else z

@pytest.mark.parametrize('by', (1e4, 1e20, 1e38, float('inf'), float('nan')))
def test_exploding_logits(by):
    learn = tensors(*images(), Explode(by))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.1, models=[Explode(by), Explode(by)]))
    assert finite(learn.model) and np.isfinite(learn.recorder.values[-1]).all()

class Scaled(nn.Module):
    "Logits times 100: softmax underflows to 0"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(768, 4)
    def forward(self, x): return 100*self.lin(x.flatten(1))

class FiniteGradients(Callback):
    order,run_valid = 20,False
    def __init__(self): self.steps = []
    def after_backward(self): self.steps.append(all(p.grad.isfinite().all() for p in self.model.parameters()))

def test_scaled_logits_for_2000_steps():
    "Where the official code's gradient becomes NaN"
    x,y = images(64)
    a,b = Scaled()(x).detach(),Scaled()(x).detach().requires_grad_()
    F.kl_div(F.log_softmax(a,-1), F.softmax(b,-1), reduction='sum').backward()
    assert (F.softmax(a,-1) == 0).any() and b.grad.isnan().any()
    learn,see = tensors(x, y, Scaled(), bs=8),FiniteGradients()
    learn.fit(250, 1e-3, cbs=[JoCorCallback(k=3, forget_rate=.2, models=Scaled), see])
    assert len(see.steps) == 2000 and all(see.steps) and finite(learn.model)

# --- bad data

def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(768,4))

@pytest.mark.parametrize('n', (33, 65))
def test_a_last_batch_of_one_item(n):
    cb = JoCorCallback(k=3, forget_rate=.4, **SCHEDULE)
    learn = tensors(*images(n), linear())
    learn.fit(3, 1e-3, cbs=cb)
    assert finite(learn.model) and cb.history.kept.iloc[-1] == pytest.approx((n//32*19+1)/n)
    learn.fit(3, 1e-3, cbs=(cb := JoCorCallback(k=3)))
    assert finite(learn.model) and cb.history.kept.iloc[-1] > 0 and (cb.ledger.seen == 3).all()

def test_a_class_with_one_item():
    x,y = images()
    y[:] = torch.arange(128) % 3
    y[7] = 3
    learn = tensors(x, y, linear())
    learn.fit(4, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.3))
    assert finite(learn.model) and learn.get_preds()[0].shape == (128,4)

def with_empty_validation(x, y):
    return DataLoaders(DataLoader(list(zip(x, y)), bs=32), DataLoader([], bs=32))

def without_validation(x, y):
    block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda i: x[i], get_y=lambda i: int(y[i]),
        splitter=IndexSplitter([]))
    return block.dataloaders(range(128), bs=32, num_workers=0)

def outcome(learn, cbs=None):
    "The kind of error with which a fit ends"
    try: learn.fit(1, cbs=cbs)
    except Exception as e: return type(e).__name__

@pytest.mark.parametrize('make', (with_empty_validation, without_validation))
def test_without_a_validation_set(make):
    "As without the callback"
    dls = make(*images())
    learn,single = [quiet(Learner(dls, jocor_cnn(4), CrossEntropyLossFlat(), metrics=accuracy)) for _ in range(2)]
    cb = JoCorCallback(k=2, forget_rate=.2)
    assert outcome(learn, cb) == outcome(single)
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
    train = DataLoader(Dies(x, y, 200, tmp_path/'die'), bs=32, num_workers=2, shuffle=False)
    dls = DataLoaders(train, DataLoader(list(zip(x[:32], y[:32])), bs=32))
    learn = quiet(Learner(dls, jocor_cnn(4), loss_func=CrossEntropyLossFlat()))
    (tmp_path/'die').write_text('')
    with pytest.raises(RuntimeError, match='worker'): learn.fit(2, 1e-3, cbs=JoCorCallback(k=2, forget_rate=.2))
    assert not any(isinstance(cb, PeersCallback) for cb in learn.cbs) and learn.get_preds()[0].shape == (32,4)
    learn.fit(2, 1e-3, cbs=(cb := JoCorCallback(k=2, forget_rate=.2)))
    assert len(cb.history) == 2 and finite(learn.model)

# --- losses that fail

def out_of_range(z, y): return z[:,9].mean()

def fails_unreduced(z, y, reduction='mean'):
    if reduction == 'none': raise KeyError('no table of losses')
    return F.cross_entropy(z, y)

LOSSES = [(nn.CrossEntropyLoss(weight=torch.ones(4, dtype=torch.float64)), RuntimeError, 'fails on .*expected scalar'),
    (nn.CrossEntropyLoss(weight=torch.ones(3)), RuntimeError, r'fails on logits of shape \(6, 4\) .*all 4 classes'),
    (out_of_range, IndexError, 'out_of_range.* fails on logits .*index 9 is out of bounds'),
    (fails_unreduced, KeyError, "with reduction='none', KeyError: 'no table of losses'"),
    (lambda z,y: z.mean(), TypeError, "per sample.*unexpected keyword argument 'reduction'"),
    (lambda z,y,reduction=None: 0., type(None), 'cannot be reduced per sample')]

@pytest.mark.parametrize('loss_func,cause,msg', LOSSES)
def test_a_loss_that_fails_says_why(loss_func, cause, msg):
    with pytest.raises(ValueError, match=msg) as told: per_sample_loss(loss_func, torch.randn(6,4), torch.arange(6) % 4)
    assert type(told.value.__cause__) is cause

def replaced_without_cause(source):
    "Lines on which a caught exception is replaced by another that does not name it as its cause"
    handlers = [o for o in ast.walk(ast.parse(source)) if isinstance(o, ast.ExceptHandler)]
    raises = [(h, o) for h in handlers for o in ast.walk(h) if isinstance(o, ast.Raise) and o.exc is not None]
    return [o.lineno for h,o in raises if not (isinstance(o.cause, ast.Name) and o.cause.id == h.name)]

def test_no_cause_is_swallowed():
    home = Path(per_sample_loss.__code__.co_filename).parent
    found = {p.name: replaced_without_cause(p.read_text(encoding='utf-8')) for p in home.rglob('*.py')}
    assert len(found) > 30 and not {name: o for name,o in found.items() if o}
    code = 'try: f()\nexcept OSError as e:\n  {}\n'
    assert replaced_without_cause(code.format('raise ValueError("no") from None')) == [3]
    assert replaced_without_cause(code.format('raise ValueError("no")')) == [3]
    assert not replaced_without_cause(code.format('raise ValueError("no") from e')+'  raise\n')

# --- full disks and interruptions

def fill_disk_at(monkeypatch, n):
    "`torch.save` writes a part of the file and fails, at the n-th file"
    save,count = torch.save,[0]
    def full(obj, f, *args, **kwargs):
        count[0] += 1
        if count[0] < n: return save(obj, f, *args, **kwargs)
        with open(f, 'wb') as o: o.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)

def test_a_full_disk_at_checkpoint_time(tmp_path, monkeypatch):
    def fit(learn):
        learn.fit(5, 4e-3, cbs=[cb := JoCorCallback(k=2), Checkpoint()])
        return cb
    learn = digits(path=tmp_path)
    with monkeypatch.context() as m:
        fill_disk_at(m, 3)
        with pytest.raises(OSError, match='No space'): fit(learn)
    assert [p.name for p in (tmp_path/'models').iterdir()] == ['checkpoint.pth']
    cb = fit(digits(path=tmp_path))
    assert len(cb.history) == 5 and cb.ledger.seen.max() == 5
    learn.fit(1, cbs=JoCorCallback(k=2))

def test_a_run_of_fits_of_different_lengths_goes_on(tmp_path):
    class Count(Callback):
        order = 90
        def __init__(self, stop_after): self.n,self.stop_after = 0,stop_after
        def after_epoch(self):
            self.n += 1
            if self.n == self.stop_after: raise KeyboardInterrupt
    def run(stop_after):
        learn,cb,count = digits(path=tmp_path),JoCorCallback(k=2, seed=0),Count(stop_after)
        checkpoint = Checkpoint()
        for epochs in (1,3): learn.fit(epochs, 4e-3, cbs=[cb, checkpoint, count])
        return count.n
    with pytest.raises(KeyboardInterrupt): run(3)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*training starts from scratch')
        assert run(None) == 2 # one epoch of the second fit was done, and the first fit is not repeated

@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='the disk cannot be asked for room')
def test_a_full_disk_for_features(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    labels = (np.arange(40)%2).astype(str)
    dl = InMemoryDataLoaders.from_arrays(np.zeros((40,4,4), np.uint8), labels, valid=.5, bs=8).train
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    want = kept_features(body, dl, progress=False)
    with monkeypatch.context() as m:
        m.setattr(os, 'posix_fallocate', full)
        with pytest.warns(UserWarning, match='cannot be written .*No space left.*in memory only'):
            got = kept_features(body, dl, tmp_path, progress=False)
    assert np.array_equal(got, want) and not list(tmp_path.glob('*.npy'))
    assert np.array_equal(kept_features(body, dl, tmp_path, progress=False), want) and list(tmp_path.glob('*.npy'))

class Peek(Callback):
    "Remember what belongs to each batch without keeping it, and raise in the second epoch"
    order,run_valid = 90,False
    kinds = 'log_probs','logits','pred','losses','targ','kept'
    def __init__(self, event, error):
        self.seen,self.error = [],error
        setattr(self, event, self.stop)
    def after_loss(self):
        s = self.learn.selection
        self.seen += [weakref.ref(getattr(s, kind)) for kind in self.kinds]
        self.seen += [weakref.ref(o) for o in (self.learn.xb[0], self.learn.loss_grad)]
    def stop(self):
        if self.epoch == 1 and (self.iter == 2 or not self.training): raise self.error('now')

ENDS = [('before_validate', CancelValidException), ('after_batch', CancelFitException),
    ('after_pred', KeyboardInterrupt), ('after_backward', RuntimeError), ('after_epoch', KeyboardInterrupt),
    ('before_validate', RuntimeError)]

@pytest.mark.parametrize('kw', (dict(), dict(prune='exact', forget_rate=.3)))
@pytest.mark.parametrize('event,error', ENDS)
def test_nothing_of_a_batch_outlives_the_fit(event, error, kw):
    learn,peek = digits(cbs=(cb := JoCorCallback(k=2, **kw))),Peek(event, error)
    try: learn.fit(2, 1e-3, cbs=peek)
    except (KeyboardInterrupt, RuntimeError) as e: assert type(e) is error
    gc.collect()
    assert peek.seen and not [o() for o in peek.seen if o() is not None]
    assert not {'_with_events','_call_one','selection'} & set(vars(learn))
    assert learn.loss_grad is None and learn.pred is None and cb.record.sightings is None
    twin = copy.deepcopy(learn)
    twin.fit(1, 1e-3)
    assert len(twin.jo_cor.history) == len(cb.history)+1 and isinstance(learn.loss_func, CrossEntropyLossFlat)

class Interrupt(Callback):
    "A real SIGINT at the n-th event"
    def __init__(self, n, order): self.n,self.order,self.events = n,order,0
    def __call__(self, name):
        self.events += 1
        if self.events == self.n: signal.raise_signal(signal.SIGINT)

@pytest.fixture
def ctrl_c_is_heard():
    "A process in the background may ignore SIGINT"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)

@pytest.mark.parametrize('seed', range(10))
def test_ctrl_c_at_random_points(seed, ctrl_c_is_heard):
    learn,rng = digits(),random.Random(seed)
    at = Interrupt(rng.randrange(20, 1500), rng.choice((-20,-4,0,30,58,100)))
    with pytest.raises(KeyboardInterrupt): learn.fit(20, 1e-3, cbs=[JoCorCallback(k=2), at])
    assert len(learn.cbs) == 3 and isinstance(learn.loss_func, CrossEntropyLossFlat)
    assert len(learn.validate()) == 2 and learn.get_preds()[0].shape[1] == 10
    learn.fit_one_cycle(2, 3e-3, cbs=(again := JoCorCallback(k=2)))
    assert len(again.history) == 2 and finite(learn.model) and np.isfinite(learn.recorder.values[-1][0])
    with pytest.raises(RuntimeError, match='cbs=JoCorCallback'): learn.fit(1)
