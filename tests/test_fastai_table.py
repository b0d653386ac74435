"""What fastai exports that takes part in a fit, beside the callback: plain training's weights, or a refusal.

Each table names all that fastai has of a kind. Weights are equal bit for bit, where `JoCorCallback` is set to train
one network plainly (`as_plain`)."""
import contextlib, inspect, io, warnings, numpy as np, pandas as pd, pytest, torch
import fastai.callback.all, fastai.losses, fastai.optimizer, fastai.tabular.all, fastai.text.all, fastai.vision.all
from dataclasses import dataclass
from fastai.callback.fp16 import MixedPrecision
from fastai.text.all import ModelResetter, RNNCallback, RNNRegularizer, SortedDL
from fastai.vision.all import (L, Lookahead, ActivationStats, Adam, BCELossFlat, BCEWithLogitsLossFlat, BnFreeze,
    CSVLogger, Callback, ChannelsLast, CollectDataCallback, CrossEntropyLossFlat, CutMix, DataLoader, DataLoaders,
    DiceLoss, EarlyStoppingCallback, FetchPredsCallback, FocalLoss, FocalLossFlat, GradientAccumulation, GradientClip,
    HookCallback, L1LossFlat, Lamb, Larc, Learner, MCDropoutCallback, MSELossFlat, MixUp, OptimWrapper, Optimizer,
    ParamScheduler, ProgressCallback, QHAdam, RAdam, RMSProp, ReduceLROnPlateau, SGD, SaveModelCallback, SchedCos,
    ShortEpochCallback, ShowGraphCallback, SkipToEpoch, TerminateOnNaNCallback, TfmdDL, nn, partial, ranger, set_seed)
from fastai.callback.data import PartialDL, WeightedDL
from fastai.losses import LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat
from fastai.tabular.all import Categorify, CategoryBlock, TabDataLoader, TabWeightedDL, TabularPandas
from fastai_jocor.all import JoCorCallback
from fastai_jocor.peers import Peers
from learners import plain, quiet

MODULES = fastai.vision.all,fastai.text.all,fastai.tabular.all,fastai.callback.all
EXPORTED = {name: o for m in MODULES for name,o in vars(m).items()}

def exported(base):
    "Names of the classes of fastai that derive from another"
    of_fastai = lambda o: inspect.isclass(o) and o.__module__.split('.')[0] == 'fastai'
    return {name for name,o in EXPORTED.items() if of_fastai(o) and issubclass(o, base)}

def as_plain(): return JoCorCallback(k=1, forget_rate=0., rule='schedule')

@dataclass
class Case:
    "An entry of a table: what differs from the usual learner, and what comes of it"
    use:object = None # What is tried, called without arguments
    no_part:str = '' # Why there is nothing to try
    refused:str = '' # What the error says
    model:object = None # Makes the model
    several:bool = False # Whether an item has several labels

def net(): return nn.Sequential(nn.Conv2d(1,4,3,2,1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64,4))

class Recurrent(nn.Module):
    "A classifier that gives what it computed on the way, too"
    def __init__(self):
        super().__init__()
        self.rnn,self.head = nn.RNN(8, 8, batch_first=True),nn.Linear(8, 4)
    def reset(self): self.was_reset = True
    def forward(self, x):
        out = self.rnn(x[:,0])[0]
        return self.head(out[:,-1]),[out],[out*.9]

def learner(train=None, model=None, loss=None, several=False, **kwargs):
    set_seed(0)
    y = torch.randint(0, 4, (100,))
    x = torch.randn(100,1,8,8)+y.view(-1,1,1,1)
    items = list(zip(x, nn.functional.one_hot(y, 4).float() if several else y))
    train = DataLoader(items, bs=32, shuffle=True) if train is None else train(items)
    loss = CrossEntropyLossFlat() if loss is None else loss
    return quiet(Learner(DataLoaders(train, DataLoader(items, bs=32)), (model or net)(), loss_func=loss, **kwargs))

def two_epochs(learn, cbs): learn.fit(2, 1e-2, cbs=cbs)

def state(learn):
    model = learn.model.peer(0) if isinstance(learn.model, Peers) else learn.model
    return {name: plain(o).detach().clone() for name,o in model.state_dict().items()}

def trained(make, fit, cbs):
    "The weights before and after a fit"
    learn = make()
    before = state(learn)
    set_seed(1)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn, cbs)
    return before,state(learn),learn

def check(make, fit=two_epochs, cbs=lambda: [], refused=''):
    "Fit plainly, and as peers"
    if refused:
        with pytest.raises(ValueError, match=refused): trained(make, fit, L(cbs()) + as_plain())
        return
    before,want,alone = trained(make, fit, L(cbs()))
    _,got,learn = trained(make, fit, L(cbs()) + as_plain())
    assert isinstance(learn.model, Peers) and list(want) == list(got)
    assert any(not torch.equal(before[name], o) for name,o in want.items())
    assert not [name for name,o in want.items() if not torch.equal(o, got[name])]
    losses = [sum((list(row[:2]) for row in o.recorder.values), []) for o in (alone,learn)]
    np.testing.assert_allclose(*losses, rtol=1e-5)

def names(table): return [name for name,case in table.items() if not case.no_part]

# --- callbacks

class Spread(HookCallback):
    "Something to hook"
    def hook(self, m, i, o): return o.std()

of_rnns = Case(lambda: [ModelResetter(), RNNCallback(), RNNRegularizer(2., 1.)], model=Recurrent)
always,base = Case(no_part='is on every learner'),Case(no_part='is a base class')
needs_gpu = Case(no_part='asserts that there is a GPU')
mixes = 'mixes the labels of two items'

CALLBACKS = dict(
    ActivationStats=Case(lambda: ActivationStats(with_hist=True)), BnFreeze=Case(BnFreeze), CSVLogger=Case(CSVLogger),
    Callback=base, CastToTensor=always, ChannelsLast=Case(ChannelsLast), CollectDataCallback=Case(CollectDataCallback),
    CutMix=Case(CutMix, refused=mixes), EarlyStoppingCallback=Case(lambda: EarlyStoppingCallback(min_delta=9.)),
    FetchPredsCallback=Case(FetchPredsCallback), GatherPredsCallback=Case(no_part='is how predictions are gathered'),
    GradientAccumulation=Case(lambda: GradientAccumulation(64)), GradientClip=Case(lambda: GradientClip(.1)),
    HookCallback=Case(Spread), LRFinder=Case(no_part='belongs to `lr_find`, which leaves no trace'),
    MCDropoutCallback=Case(MCDropoutCallback), MixHandler=base, MixUp=Case(MixUp, refused=mixes),
    MixedPrecision=Case(MixedPrecision), ModelResetter=of_rnns, ModelToHalf=needs_gpu,
    NonNativeMixedPrecision=needs_gpu, ParamScheduler=Case(lambda: ParamScheduler(dict(lr=SchedCos(1e-2, 1e-4)))),
    ProgressCallback=Case(ProgressCallback), RNNCallback=of_rnns, RNNRegularizer=of_rnns, Recorder=always,
    ReduceLROnPlateau=Case(lambda: ReduceLROnPlateau(min_delta=9., patience=0)),
    SaveModelCallback=Case(SaveModelCallback), ShortEpochCallback=Case(lambda: ShortEpochCallback(.5)),
    ShowGraphCallback=Case(lambda: [ProgressCallback(), ShowGraphCallback()]), SkipToEpoch=Case(lambda: SkipToEpoch(1)),
    TerminateOnNaNCallback=Case(TerminateOnNaNCallback), TrackerCallback=base, TrainEvalCallback=always)

@pytest.mark.parametrize('name', names(CALLBACKS))
def test_callbacks(name, tmp_path):
    case = CALLBACKS[name]
    check(lambda: learner(path=tmp_path, model=case.model), cbs=case.use, refused=case.refused)

# --- ways to fit

FITS = dict(fit=two_epochs, fit_one_cycle=lambda learn,cbs: learn.fit_one_cycle(2, 1e-2, cbs=cbs),
    fit_flat_cos=lambda learn,cbs: learn.fit_flat_cos(2, 1e-2, cbs=cbs),
    fit_sgdr=lambda learn,cbs: learn.fit_sgdr(2, 1, 1e-2, cbs=cbs),
    fine_tune=lambda learn,cbs: learn.fine_tune(1, 1e-2, cbs=cbs))

@pytest.mark.parametrize('name', FITS)
def test_ways_to_fit(name): check(learner, FITS[name])

# --- losses

one_number = 'cannot be reduced per sample'
indices = 'must be class indices'
WEIGHT = torch.tensor([1.,2.,.5,3.])

LOSSES = dict(BaseLoss=base, CrossEntropyLossFlat=Case(CrossEntropyLossFlat), FocalLoss=Case(FocalLoss),
    FocalLossFlat=Case(FocalLossFlat), BCEWithLogitsLossFlat=Case(BCEWithLogitsLossFlat, several=True),
    BCELossFlat=Case(BCELossFlat, several=True, refused=indices, model=lambda: nn.Sequential(*net(), nn.Sigmoid())),
    MSELossFlat=Case(MSELossFlat, several=True, refused=indices),
    L1LossFlat=Case(L1LossFlat, several=True, refused=indices),
    LabelSmoothingCrossEntropy=Case(LabelSmoothingCrossEntropy), DiceLoss=Case(DiceLoss, refused=one_number),
    LabelSmoothingCrossEntropyFlat=Case(LabelSmoothingCrossEntropyFlat))

ARGUMENTS = dict(weight=dict(weight=WEIGHT), ignore_index=dict(ignore_index=1), smooth=dict(label_smoothing=.1))

@pytest.mark.parametrize('name', ARGUMENTS)
def test_arguments_of_cross_entropy(name):
    check(lambda: learner(loss=nn.CrossEntropyLoss(**ARGUMENTS[name])))

@pytest.mark.parametrize('name', names(LOSSES))
def test_losses(name):
    case = LOSSES[name]
    check(lambda: learner(loss=case.use(), model=case.model, several=case.several), refused=case.refused)

# --- optimizers

OPTIMIZERS = dict(SGD=partial(SGD, mom=.9), RMSProp=RMSProp, Adam=Adam, RAdam=RAdam, QHAdam=QHAdam, Larc=Larc,
    Lamb=Lamb, ranger=ranger, Lookahead=lambda params,**kwargs: Lookahead(Adam(params, **kwargs)),
    Optimizer=partial(Optimizer, cbs=[fastai.optimizer.sgd_step]),
    OptimWrapper=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers(name): check(lambda: learner(opt_func=OPTIMIZERS[name]))

# --- loaders

def loader(cls, **kwargs): return Case(lambda items: cls(items, bs=32, num_workers=0, **kwargs))

def table_learner(cls):
    "A table of two columns, one of numbers, and a loader of its own"
    set_seed(0)
    df = pd.DataFrame(dict(a=np.random.choice(list('pqr'), 100), x=np.random.randn(100)))
    df['y'] = np.where(df.x > 0, 'yes', 'no')
    to = TabularPandas(df, [Categorify], ['a'], ['x'], 'y', y_block=CategoryBlock())
    kwargs = dict(wgts=np.arange(100)) if cls is TabWeightedDL else {}
    train = cls(to, bs=32, shuffle=True, **kwargs)
    return quiet(fastai.tabular.all.tabular_learner(DataLoaders(train, TabDataLoader(to, bs=32)), layers=[8]))

LOADERS = dict(DataLoader=loader(DataLoader, shuffle=True), TfmdDL=loader(TfmdDL, shuffle=True, drop_last=True),
    SortedDL=loader(SortedDL, sort_func=lambda o: float(o[0].sum()), shuffle=True),
    WeightedDL=loader(WeightedDL, shuffle=True, wgts=np.arange(100)),
    PartialDL=loader(PartialDL, shuffle=True, partial_n=64), LMDataLoader=Case(no_part='is for language models'),
    TabDataLoader=Case(TabDataLoader), TabWeightedDL=Case(TabWeightedDL))

@pytest.mark.parametrize('name', names(LOADERS))
def test_loaders(name):
    use = LOADERS[name].use
    check((lambda: table_learner(use)) if name.startswith('Tab') else lambda: learner(use))

# --- the tables are whole

def test_everything_is_named():
    assert exported(Callback) == set(CALLBACKS) and exported(DataLoader) == set(LOADERS)
    assert set(fastai.losses.__all__) == set(LOSSES)
    assert {name for name in fastai.optimizer.__all__ if name[0].isupper()} | {'ranger'} == set(OPTIMIZERS)
    assert {name for name in dir(Learner) if name.startswith(('fit','fine_'))} == set(FITS)
