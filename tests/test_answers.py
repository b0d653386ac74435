"What the library says where something else was meant: errors and warnings that name the remedy."
import inspect, warnings, numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from contextlib import contextmanager
from fastai.vision.all import (BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader,
    DataLoaders, Learner, MSELossFlat, RandomSplitter, TransformBlock, nn)
from fastai.callback.data import WeightedDL
from fastai.tabular.all import Categorify, TabularPandas, tabular_learner
from fastai.text.all import TextLearner
from fastai_jocor.all import *
from fastai_jocor.trainer import PeersCallback
from learners import digits, quiet, tensors, weights, same

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    learn = digits(path=tmp_path_factory.mktemp('models'))
    learn.save('single')
    learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    learn.save('peers')
    return learn

# --- the model

def test_layers_are_taken_from_one_peer(trained):
    with pytest.raises(TypeError, match=r'holds k=2 peers.*learn\.model\.peer\(0\)\[1\].*learn\.to_single'):
        trained.model[1]
    assert trained.model.peer(0)[1].weight.shape == (256, 64)
    for f in (TextLearner.save_encoder, TextLearner.load_encoder):
        with pytest.raises(TypeError, match=r'learn\.to_single'): f(trained, 'encoder')

def test_weights_of_a_single_model_do_not_fit_peers(trained):
    for strict in (True, False):
        with pytest.raises(RuntimeError, match='of a single model.*k=2 peers.*before its first fit'):
            trained.load('single', strict=strict)
    three = digits(path=trained.path).to_peers(3)
    with pytest.raises(RuntimeError, match='of k=2 peers.*holds k=3'): three.load('peers')
    own = weights(trained.model)
    new = digits(path=trained.path, seed=7).to_peers(2).load('peers')
    assert same(own, weights(new.model))

# --- arguments

def test_arguments_that_are_not_known():
    with pytest.raises(TypeError, match=r"JoCorCallback\(\).*'lamda'.*did you mean 'co_lambda'"):
        JoCorCallback(lamda=.5)
    with pytest.raises(TypeError, match=r"CoTeachingCallback\(\).*'forgetrate'.*did you mean 'forget_rate'"):
        CoTeachingCallback(forgetrate=.5)
    class Own(JoCorCallback):
        def __init__(self, shy=.5, **kwargs): super().__init__(**kwargs)
    with pytest.raises(TypeError, match=r"Own\(\).*'shi'.*did you mean 'shy'"): Own(shi=1)
    with pytest.raises(TypeError, match="'xyzzy'.*choose one of k, co_lambda"): JoCorCallback(xyzzy=1)

@pytest.mark.parametrize('kw,msg', ((dict(forget_rate='aut'),"'auto', None or a number"),
    (dict(rule='evidense'),"did you mean 'evidence'"), (dict(contrast='kl_circ'),"did you mean 'kl_circular'"),
    (dict(init='heads'),"did you mean 'head'"), (dict(without=('memorizing',)),"did you mean 'memorising'")))
def test_values_that_are_not_known(kw, msg):
    with pytest.raises(ValueError, match=f'{next(iter(kw))}=.*{msg}'): JoCorCallback(**kw)

@pytest.mark.parametrize('noise,near', (('symetric:0.2','symmetric'), ('pair:0.2','pairflip'), ('non','none')))
def test_noise_that_is_not_known(noise, near):
    with pytest.raises(ValueError, match=f"noise='{noise}' must be.*did you mean '{near}'"): make_noise(noise)
    with pytest.raises(ValueError) as e: make_noise('symmetric:much')
    assert 'did you mean' not in str(e.value)

@pytest.mark.parametrize('cls', (JoCorCallback, CoTeachingCallback, CoTeachingPlusCallback))
def test_the_signature_shows_every_argument(cls):
    own = inspect.signature(cls).parameters
    assert set(inspect.signature(PeersCallback).parameters) - set(own) <= {'unknown'} and 'kwargs' not in own
    assert {'seed','models','rounding'} < set(own)
    assert {'seed','models','balance'} < set(inspect.signature(JoCorCallback.paper).parameters)

def test_what_a_callback_shows_of_itself():
    assert repr(JoCorCallback()) == 'JoCorCallback(k=2, λ by evidence, τ not known yet, 0 epochs)'
    assert repr(CoTeachingCallback(forget_rate=.25)) == 'CoTeachingCallback(k=2, τ=0.25, 0 epochs)'
    learn,cb = digits(),JoCorCallback(k=3)
    learn.fit(3, 1e-2, cbs=cb)
    est = cb.estimate
    assert repr(cb) == f'JoCorCallback(k=3, λ={cb.lam:.2g}, τ from {est.low:.2f} to {est.high:.2f}, 3 epochs)'
    learn.fit(1, 1e-2, cbs=(cb := JoCorCallback(k=3, rule='schedule')))
    assert repr(cb) == 'JoCorCallback(k=3, λ=0.8, τ=0.5, 1 epoch)'

# --- targets

X = torch.randn(96, 8)
FLOATS,ONE_HOT = torch.rand(96),F.one_hot(torch.arange(96) % 4, 4)
CODES = torch.where(torch.arange(96) % 8 == 0, -1, torch.arange(96) % 4)

@pytest.mark.parametrize('y,c,loss,msg', (
    (FLOATS, 1, MSELossFlat(), 'one output.*two outputs'),
    (FLOATS[:,None], 1, MSELossFlat(), 'one output.*two outputs'),
    (FLOATS.round(), 1, BCEWithLogitsLossFlat(), 'one output.*two outputs'),
    ((FLOATS > .5).long(), 1, CrossEntropyLossFlat(), 'one output.*two outputs'),
    (FLOATS.round(), 4, CrossEntropyLossFlat(), r'y\.long\(\)'),
    (ONE_HOT.float(), 4, nn.CrossEntropyLoss(), r'y\.argmax\(1\)'),
    (ONE_HOT, 4, nn.CrossEntropyLoss(), r'y\.argmax\(1\)'),
    (CODES, 4, CrossEntropyLossFlat(), '4 of the 32 labels of a batch are -1.*leave.*-100')))
def test_targets_that_are_no_classes(y, c, loss, msg):
    learn = tensors(X, y, nn.Linear(8, c), loss_func=loss)
    with pytest.raises(ValueError, match=msg): learn.fit(1, cbs=JoCorCallback(forget_rate=.1))

def table(missing, block=CategoryBlock):
    df = pd.DataFrame(dict(a=list('pqr')*32, x=np.linspace(-1, 1, 96)))
    df['kind'] = np.where(df.x > 0, 'yes', 'no').astype(object)
    df.loc[df.index % 10 < missing, 'kind'] = None
    to = TabularPandas(df, [Categorify], ['a'], ['x'], 'kind', y_block=block(), splits=RandomSplitter(seed=0)(df))
    return quiet(tabular_learner(to.dataloaders(bs=16), layers=[8]))

def test_missing_labels_of_a_table():
    learn = table(2)
    n = sum(i % 10 < 2 for i in learn.dls.train.dataset.items.index)
    says = rf"{n} of the 77 training labels in column 'kind' are missing.*dropna\(subset=\['kind'\]\)"
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=JoCorCallback(k=2))
    with pytest.raises(ValueError, match=r"20 of the 96 labels in column 'kind' are missing.*dropna"):
        table(2, lambda: NoisyCategoryBlock('symmetric:0.2'))
    table(0).fit(1, cbs=JoCorCallback(k=2))

# --- settings without effect, items that are never seen

@contextmanager
def said():
    "The texts of the warnings"
    texts = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        yield texts
    texts += [str(o.message) for o in found]

def fit(learn, cb, n_epoch=2):
    with said() as texts: learn.fit(n_epoch, 1e-3, cbs=cb)
    return texts

def learner(n, bs, loader=DataLoader, **kwargs):
    x,y = torch.randn(n, 8),torch.arange(n) % 4
    items = list(zip(x, y))
    dls = DataLoaders(loader(items, bs=bs, num_workers=0, **kwargs), DataLoader(items, bs=64))
    return quiet(Learner(dls, nn.Linear(8, 4), loss_func=CrossEntropyLossFlat()))

@pytest.mark.parametrize('kw', (dict(), dict(forget_rate=.4), dict(forget_rate=.4, rule='schedule')))
def test_batches_of_one_item_drop_nothing(kw):
    says = [o for o in fit(learner(24, 1, shuffle=True), JoCorCallback(**kw), 1) if 'bs=1' in o]
    assert len(says) == 1 and 'nothing is dropped' in says[0] and 'larger bs' in says[0]

def test_batches_of_one_item_where_nothing_is_to_be_dropped():
    assert not fit(learner(24, 1), JoCorCallback(forget_rate=0., rule='schedule'), 1)

@pytest.mark.parametrize('n,bs,kw,msg', (
    (1000, 64, dict(shuffle=False, drop_last=True), 'leaves the same 40 of 1000 items out of every epoch'),
    (100, 64, dict(shuffle=True, drop_last=True), 'leaves 36 of 100 items out of each epoch')))
def test_items_that_are_left_out(n, bs, kw, msg):
    says = [o for o in fit(learner(n, bs, **kw), JoCorCallback()) if 'leaves' in o]
    assert len(says) == 1 and msg in says[0] and 'drop_last=False' in says[0]

@pytest.mark.parametrize('n,bs,kw', ((1000, 64, dict(shuffle=True, drop_last=True)), (100, 64, dict(shuffle=True)),
    (128, 64, dict(drop_last=True)), (100, 64, dict())))
def test_loaders_that_are_as_usual(n, bs, kw):
    assert not [o for o in fit(learner(n, bs, **kw), JoCorCallback()) if 'leaves' in o]

def test_a_loader_that_chooses_its_items_is_left_alone():
    learn = learner(100, 64, WeightedDL, shuffle=True, drop_last=True, wgts=np.ones(100))
    assert not [o for o in fit(learn, JoCorCallback()) if 'leaves' in o]

class Vectors(DataBlock):
    "Items that are positions, every fifth without a label"
    def __init__(self, block, every=5):
        label = lambda i: None if i % every == 0 else 'pqr'[i % 3]
        super().__init__((TransformBlock(), block), get_x=lambda i: torch.full((8,), i/100.), get_y=label,
                         splitter=RandomSplitter(.2, seed=0))

def of_vectors(block, **kwargs):
    dls = Vectors(block).dataloaders(list(range(100)), bs=16, num_workers=0)
    return quiet(Learner(dls, nn.Linear(8, 4), loss_func=CrossEntropyLossFlat(**kwargs)))

def test_missing_labels_that_would_be_a_class():
    learn = of_vectors(CategoryBlock(vocab=list('pqr'), add_na=True))
    n = sum(i % 5 == 0 for i in learn.dls.train.items)
    says = [o for o in fit(learn, JoCorCallback(k=2), 1) if '#na#' in o]
    assert len(says) == 1 and f"{n} of the 80 training items" in says[0] and 'ignore_index=0' in says[0]
    ignored = of_vectors(CategoryBlock(vocab=list('pqr'), add_na=True), ignore_index=0)
    assert not [o for o in fit(ignored, JoCorCallback(k=2), 1) if '#na#' in o]

class ByLogit(nn.Module):
    "A loss of the logit of the given class alone"
    reduction = 'mean'
    def forward(self, z, y):
        losses = (1-z.gather(1, y[:,None])[:,0]).relu()
        return losses if self.reduction == 'none' else losses.mean()

@pytest.mark.parametrize('loss,n', ((ByLogit(), 1), (nn.MultiMarginLoss(margin=20.), 0), (CrossEntropyLossFlat(), 0)))
def test_a_loss_that_is_another_one_in_validation(loss, n):
    "The peers answer with a log-probability; a loss that compares logits with each other does not see that"
    learn = tensors(X, torch.arange(96) % 4, nn.Linear(8, 4), loss_func=loss)
    says = [o for o in fit(learn, JoCorCallback(k=2, forget_rate=.1), 1) if 'valid_loss' in o]
    assert len(says) == n and all('ByLogit' in o and 'metric' in o for o in says)
