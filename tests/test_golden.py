"""What training gives is what it gave before the rebuild, bit for bit.

A frozen copy of the library and the present one train side by side in one process, from the same seeds."""
import importlib, pkgutil, sys, pytest, torch
import numpy as np
import fastai_jocor, fastai_jocor.callback
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from fastai.vision.all import (Adam, BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataBlock, DataLoader,
    DataLoaders, Flatten, FocalLossFlat, GradientAccumulation, L, LabelSmoothingCrossEntropyFlat, Learner, OptimWrapper,
    ProgressCallback, RandomSplitter, Tensor, TfmdDL, TransformBlock, accuracy, accuracy_multi, nn, noop, params,
    set_seed)
from fastai.callback.data import WeightedDL
from fastai.callback.fp16 import AMPMode, MixedPrecision
from sklearn.datasets import load_digits

pytestmark = pytest.mark.filterwarnings('ignore')

# --- both libraries, each with its own patches of fastai

def present(name):
    "A name of the present library, wherever it lives"
    others = (m.name for m in pkgutil.walk_packages(fastai_jocor.__path__, 'fastai_jocor.'))
    for module in ('fastai_jocor.all', *others):
        if hasattr(importlib.import_module(module), name): return getattr(sys.modules[module], name)
    raise AttributeError(name)

NAMES = '''JoCorCallback CoTeachingCallback CoTeachingPlusCallback NoiseRecord Symmetric Asymmetric PairFlip
    InMemoryDataLoaders InstanceDependent NoisyCategoryBlock Peers'''.split()
PATCHED = Learner,TfmdDL,DataLoader,DataLoaders

def own_attributes(): return {cls: dict(vars(cls)) for cls in PATCHED}

now = SimpleNamespace(**{o: present(o) for o in NAMES})
attributes_now = own_attributes()
from frozen.jocor_before import all as _before
before = SimpleNamespace(**{o: getattr(_before, o) for o in NAMES})
attributes_before = own_attributes()

def put_attributes(wanted):
    "Put back what classes of fastai hold"
    for cls,attrs in wanted.items():
        for name in set(vars(cls)) - set(attrs): delattr(cls, name)
        for name,o in attrs.items():
            if vars(cls).get(name) is not o: setattr(cls, name, o)

put_attributes(attributes_now)

@contextmanager
def patches_of(lib):
    "fastai as one of the two libraries patches it"
    if lib is now: yield; return
    here = own_attributes()
    put_attributes(attributes_before)
    try: yield
    finally: put_attributes(here)

# --- small data

N,N_VALID,BS = 320,96,48

def arrays():
    "Digits in float32 with 40% of the training labels wrong, always the same"
    d,rng = load_digits(),np.random.RandomState(0)
    x,y = torch.tensor(d.data[:N+N_VALID]/16, dtype=torch.float32),torch.tensor(d.target[:N+N_VALID])
    noisy = y[:N].clone()
    flip = torch.as_tensor(rng.permutation(N)[:int(.4*N)])
    noisy[flip] = (noisy[flip] + torch.as_tensor(rng.randint(1, 10, len(flip)))) % 10
    return x[:N],y[:N],noisy,x[N:],y[N:]

X,Y,GIVEN,X_VALID,Y_VALID = arrays()

def loaders(lib, known=True, dtype=torch.float32, inputs=1, multi=False):
    "Plain fastai loaders of the digits; inputs=2 splits the pixels into two inputs"
    def rows(x, y):
        xs = x.to(dtype).split(64//inputs, 1)
        if multi: y = torch.stack([y % 2 == 1, y > 4, y % 3 == 0, y == 7], 1).float()
        return list(zip(*xs, y))
    train = DataLoader(rows(X, GIVEN), bs=BS, shuffle=True)
    dls = DataLoaders(train, DataLoader(rows(X_VALID, Y_VALID), bs=N_VALID))
    dls.n_inp = inputs
    if known: dls.noise = lib.NoiseRecord(Y.numpy(), GIVEN.numpy(), 10)
    return dls

class Net(nn.Module):
    "A perceptron of one or two inputs"
    def __init__(self, out=10, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 24), *[nn.BatchNorm1d(24), nn.Dropout(.2)]*norm, nn.ReLU())
        self.head = nn.Linear(24, out)
    def forward(self, *xs): return self.head(self.body(torch.cat(xs, 1)))

def body_and_head(m): return [params(m.body), params(m.head)]

adam = partial(OptimWrapper, opt=torch.optim.Adam)

class AutocastOnCPU(MixedPrecision):
    def __init__(self): super().__init__(AMPMode.BF16)
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)

class See(Callback):
    "Keep what a fit shows after each batch"
    order = 30
    def before_fit(self):
        if not hasattr(self, 'seen'): self.seen = []
    def after_batch(self):
        if self.training: self.seen += [self.learn.pred.detach().clone(), self.learn.loss.detach().clone()]

def learner(dls, model=None, loss_func=None, opt_func=adam, **kwargs):
    model = model or Net()
    loss_func = loss_func or CrossEntropyLossFlat()
    learn = Learner(dls, model, loss_func=loss_func, opt_func=opt_func, metrics=accuracy, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

# --- the same columns by either name

NEW_NAMES = dict(
    given='given_label', true='true_label', vote='predicted_label', suggested='predicted_label', forget_rate='R')

def columns(df): return {NEW_NAMES.get(name, name): df[name].to_numpy() for name in df}

def shown(learn, cb, see):
    "All that a training leaves behind, by name"
    res = {f'weight {i}': p for i,p in enumerate([*learn.model.parameters(), *learn.model.buffers()])}
    res |= {f'batch {i}': o for i,o in enumerate(see.seen)}
    res |= {f'ledger {o}': v for o,v in (columns(cb.items.frame()) if cb.items is not None else {}).items()}
    res |= {f'history {o}': v for o,v in columns(cb.history).items()}
    names = [NEW_NAMES.get(o, o) for o in learn.recorder.metric_names if o != 'time']
    res['columns of the table'] = np.array(names)
    res['table'] = np.array([list(row) for row in learn.recorder.values], dtype=float)
    res['estimate'] = np.array(str(cb.estimate))
    res['tau'] = np.array(cb.tau, dtype=float)
    res['random state'] = torch.get_rng_state()
    res['loader'] = np.array(str(learn.dls.train.rng.getstate() if hasattr(learn.dls.train, 'rng') else None))
    if hasattr(learn.dls.valid, 'new'): res['prediction'] = learn.get_preds()[0]
    return res

def plain(o): return o.detach().numpy() if isinstance(o, Tensor) else o

def same(a, b):
    a,b = plain(a),plain(b)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == 'f')

def assert_same(train):
    "Let both libraries train, and compare all that is left behind"
    runs = []
    for lib in (before,now):
        set_seed(0)
        with patches_of(lib): runs.append(shown(*train(lib)))
    old,new = runs
    assert not set(old) - set(new), f'missing: {sorted(set(old) - set(new))}'
    differ = [name for name in old if not same(old[name], new[name])]
    assert not differ, f'{len(differ)} of {len(old)} differ: {differ[:12]}'
    return old,new

def fit(lib, cb, epochs=2, dls=None, cbs=(), model=None, lr=5e-3, **kwargs):
    see = See()
    learn = learner(dls or loaders(lib), model, **kwargs)
    learn.fit(epochs, lr, cbs=[cb, see, *cbs])
    return learn,cb,see

# --- the product, thinned out

CONTRASTS = 'kl','kl_circular','ce','ce_circular'
several = pytest.mark.parametrize('k', (1,2,3))
some = pytest.mark.parametrize('k', (1,3))
two = pytest.mark.parametrize('k', (2,3))

@several
@pytest.mark.parametrize('contrast', CONTRASTS)
def test_plain(k, contrast): assert_same(lambda lib: fit(lib, lib.JoCorCallback(k, contrast=contrast, num_gradual=1)))

@pytest.mark.parametrize('co_lambda', (0.,.3,1.))
def test_weights_of_the_contrast(co_lambda):
    assert_same(lambda lib: fit(lib, lib.JoCorCallback(3, co_lambda, forget_rate=.3, num_gradual=1)))

@several
@pytest.mark.parametrize('prune', ('exact','approx'))
def test_prune(k, prune):
    def train(lib):
        cb = lib.JoCorCallback(k, forget_rate=.5, num_gradual=1, prune=prune, refresh=2)
        return fit(lib, cb, 3, model=Net(norm=True))
    assert_same(train)

@several
@pytest.mark.parametrize('prune', (None,'exact','approx'))
def test_balance(k, prune):
    assert_same(lambda lib: fit(lib, lib.JoCorCallback(k, balance=.7, num_gradual=1, prune=prune, refresh=2), 3))

def knowing_nets(k):
    "Networks that know the true labels well enough for an estimate"
    nets = [Net() for _ in range(k)]
    for net in nets:
        opt = torch.optim.Adam(net.parameters(), lr=2e-2)
        for _ in range(30):
            opt.zero_grad()
            nn.functional.cross_entropy(net(X), Y).backward()
            opt.step()
    return nets

@several
@pytest.mark.parametrize('known', (True,False))
def test_estimated_rate(k, known):
    def train(lib):
        cb = lib.JoCorCallback(k, forget_rate='auto', num_gradual=4, models=knowing_nets(k))
        return fit(lib, cb, 5, dls=loaders(lib, known=known), lr=5e-4)
    old,_ = assert_same(train)
    assert .2 < old['history R'][-1] < .6

def test_estimate_where_nothing_is_known_of_the_noise():
    assert_same(lambda lib: fit(lib, lib.JoCorCallback(3, num_gradual=4), 6, dls=loaders(lib, known=False)))

@several
@pytest.mark.parametrize('contrast', CONTRASTS)
def test_several_labels_an_item(k, contrast):
    def train(lib):
        cb = lib.JoCorCallback(k, forget_rate=.3, num_gradual=1, contrast=contrast)
        dls = loaders(lib, known=False, multi=True)
        learn,see = learner(dls, Net(4), BCEWithLogitsLossFlat()),See()
        learn.metrics = L(accuracy_multi)
        learn.fit(2, 5e-3, cbs=[cb, see])
        return learn,cb,see
    assert_same(train)

@two
@pytest.mark.parametrize('prune', (None,'exact'))
def test_several_inputs(k, prune):
    assert_same(lambda lib: fit(lib, lib.JoCorCallback(k, num_gradual=1, prune=prune), dls=loaders(lib, inputs=2)))

@several
@pytest.mark.parametrize('prune', (None,'exact'))
def test_autocast(k, prune):
    def train(lib): return fit(lib, lib.JoCorCallback(k, num_gradual=1, prune=prune), cbs=[AutocastOnCPU()])
    assert_same(train)

@two
def test_gradient_accumulation(k):
    assert_same(lambda lib: fit(lib, lib.JoCorCallback(k, num_gradual=1), cbs=[GradientAccumulation(96)]))

@two
@pytest.mark.parametrize('method', ('CoTeachingCallback','CoTeachingPlusCallback'))
def test_other_methods(k, method):
    assert_same(lambda lib: fit(lib, getattr(lib, method)(k, num_gradual=1), 3))

@two
def test_other_methods_estimate_too(k):
    assert_same(lambda lib: fit(lib, lib.CoTeachingCallback(k, forget_rate='auto', num_gradual=4), 5))

@several
@pytest.mark.parametrize('restart', (False,True))
def test_second_fit(k, restart):
    def train(lib):
        learn,cb,see = fit(lib, lib.JoCorCallback(k, num_gradual=3, restart=restart))
        learn.fit(2, 1e-3, cbs=[cb, see])
        return learn,cb,see
    assert_same(train)

@several
@pytest.mark.parametrize('init', ('head','all'))
def test_fine_tuning_with_a_frozen_group(k, init):
    def train(lib):
        cb,see = lib.JoCorCallback(k, init=init),See()
        learn = learner(loaders(lib), Net(norm=True), splitter=body_and_head)
        learn.pretrained = True
        learn.fine_tune(2, 5e-3, freeze_epochs=1, cbs=[cb, see])
        return learn,cb,see
    assert_same(train)

@two
@pytest.mark.parametrize('opt', (Adam,adam), ids=('fastai','torch'))
def test_rate_finder_before(k, opt, tmp_path):
    def train(lib):
        learn,cb,see = learner(loaders(lib), opt_func=opt, path=tmp_path),lib.JoCorCallback(k, num_gradual=1),See()
        learn.add_cb(cb)
        learn.lr_find(num_it=10, show_plot=False)
        learn.fit(2, 5e-3, cbs=see)
        return learn,cb,see
    assert_same(train)

@two
def test_validation_between_fits(k):
    def train(lib):
        cb,see = lib.JoCorCallback(k, num_gradual=1),See()
        learn = learner(loaders(lib), cbs=cb)
        learn.fit(1, 5e-3, cbs=see)
        learn.validate()
        learn.get_preds(ds_idx=0)
        learn.fit_one_cycle(2, 5e-3, cbs=see)
        return learn,cb,see
    assert_same(train)

# --- losses, loaders and bad items

LOSSES = dict(
    smoothing=LabelSmoothingCrossEntropyFlat,
    focal=FocalLossFlat,
    weights=lambda: nn.CrossEntropyLoss(torch.arange(1., 11)))

@pytest.mark.parametrize('loss', LOSSES)
@some
def test_losses(k, loss):
    assert_same(lambda lib: fit(lib, lib.JoCorCallback(k, num_gradual=1), loss_func=LOSSES[loss]()))

@some
@pytest.mark.parametrize('prune', (None,'exact','approx'))
def test_double_precision(k, prune):
    def train(lib):
        cb = lib.JoCorCallback(k, num_gradual=1, prune=prune, refresh=2)
        return fit(lib, cb, 3, dls=loaders(lib, dtype=torch.float64), model=Net().double())
    assert_same(train)

@two
@pytest.mark.parametrize('prune', (None,'exact','approx'))
def test_items_that_are_not_finite(k, prune):
    def train(lib):
        dls = loaders(lib)
        for i in range(0, N, 7): dls.train.dataset[i] = (torch.full((64,), torch.nan), *dls.train.dataset[i][1:])
        return fit(lib, lib.JoCorCallback(k, forget_rate=.4, num_gradual=1, prune=prune, refresh=2), 3, dls=dls)
    assert_same(train)

@two
def test_an_item_given_several_times(k):
    def train(lib):
        dls = loaders(lib)
        dls.loaders[0] = WeightedDL(dls.train.dataset, bs=BS, shuffle=True, wgts=np.arange(N) < 60)
        return fit(lib, lib.JoCorCallback(k, num_gradual=1), dls=dls)
    assert_same(train)

@two
def test_a_loader_that_does_not_tell(k):
    def train(lib):
        rows,TorchDL = list(zip(X, GIVEN)),torch.utils.data.DataLoader
        dls = DataLoaders(TorchDL(rows, BS, shuffle=True), TorchDL(rows[:96], 96))
        return fit(lib, lib.JoCorCallback(k, forget_rate=.3, num_gradual=1), dls=dls)
    assert_same(train)

@two
@pytest.mark.parametrize('noise', ('symmetric:0.4','pairflip:0.3','instance:0.3'))
def test_loaders_of_arrays(k, noise):
    def train(lib):
        images,targets = (load_digits().images[:400]*15).astype(np.uint8),load_digits().target[:400]
        dls = lib.InMemoryDataLoaders.from_arrays(images, targets, noise=noise, seed=1, bs=BS)
        return fit(lib, lib.JoCorCallback(k, num_gradual=1), 2, dls=dls, model=nn.Sequential(Flatten(), Net(norm=True)))
    assert_same(train)

def test_labels_of_a_data_block():
    def train(lib):
        images,targets = (load_digits().images[:200]*15).astype(np.uint8),load_digits().target[:200]
        block = DataBlock((TransformBlock, lib.NoisyCategoryBlock('symmetric:0.4', seed=2)),
            get_x=lambda i: torch.as_tensor(images[i].ravel()/15, dtype=torch.float32),
            get_y=lambda i: int(targets[i]),
            splitter=RandomSplitter(.2, seed=0))
        dls = block.dataloaders(list(range(200)), bs=32, num_workers=0)
        return fit(lib, lib.JoCorCallback(2, num_gradual=1), 2, dls=dls)
    assert_same(train)

# --- suspects by name

@two
def test_suspects_and_the_ledger_by_name(k):
    def train(lib):
        images,targets = (load_digits().images[:400]*15).astype(np.uint8),load_digits().target[:400]
        names = [f'digit {i}' for i in range(10)]
        dls = lib.InMemoryDataLoaders.from_arrays(images, targets, names, noise='symmetric:0.4', seed=1, bs=BS)
        return fit(lib, lib.JoCorCallback(k, num_gradual=1), 3, dls=dls, model=nn.Sequential(Flatten(), Net()))
    tables = []
    for lib in (before,now):
        set_seed(0)
        with patches_of(lib):
            _,cb,_ = train(lib)
            tables.append([columns(cb.ledger), columns(cb.suspects())])
    for old,new in zip(*tables):
        assert len(next(iter(old.values()))) > 20
        for name,o in old.items():
            if o.dtype.kind == 'f': assert same(o, new[name]), name
            elif name != 'evidence': assert list(o) == list(new[name]), name

# --- the net itself

def test_the_libraries_are_two():
    assert before.JoCorCallback is not now.JoCorCallback and before.Peers is not now.Peers
    with patches_of(before): assert Learner.to_peers.__globals__['__name__'].startswith('frozen')
    if hasattr(Learner, 'to_peers'): assert Learner.to_peers.__globals__['__name__'].startswith('fastai_jocor')

def test_a_small_difference_is_seen():
    with pytest.raises(AssertionError, match='differ'):
        assert_same(lambda lib: fit(lib, lib.JoCorCallback(2, .8 if lib is now else .8000001, num_gradual=1)))
