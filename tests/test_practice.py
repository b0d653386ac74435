"What practitioners do around a fit: stop early, switch the loss, merge labels, start from a pretrained model."
import copy, warnings, numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import TabularDataLoaders, tabular_learner
from fastai.vision.all import (Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders,
    ItemTransform, Learner, TfmdDL, nn, set_seed)
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from fastai_jocor.all import JoCorCallback, jocor_mlp, Symmetric
from fastai_jocor.copies import has_learned
from fastai_jocor.state import item_names
from learners import digits, quiet, same, tensors, weights

D = load_digits()
X,Y = torch.tensor(D.data/16).float(),torch.tensor(D.target)
NOT_LEARNED = 'ignore:the peers have not learned'

# --- fits that are stopped

class Stop(Callback):
    order = 90
    def __init__(self, after, error): self.after,self.error = after,error
    def after_epoch(self):
        if self.epoch == self.after-1: raise self.error

def one_class_lost(epochs, *cbs):
    "A rare digit is not learned in six epochs"
    set_seed(0)
    some = np.flatnonzero((D.target != 1) | (np.arange(len(D.target)) < 70))
    y = np.where(D.target[some] == 1, 1, Symmetric(.4).corrupt(D.target[some], 10))
    y = np.where((D.target[some] != 1) & (y == 1), 0, y)
    learn,cb = tensors(X[some], torch.tensor(y), jocor_mlp(10, 64), bs=64, shuffle=True),JoCorCallback(k=3, seed=0)
    try: learn.fit(epochs, 7e-4, cbs=[cb, *cbs])
    except KeyboardInterrupt: pass
    return cb

@pytest.mark.parametrize('error', (None, CancelFitException, KeyboardInterrupt))
def test_lost_classes_of_a_fit_that_is_stopped(error):
    with pytest.warns(UserWarning, match="have not learned the class '1'"):
        cb = one_class_lost(6) if error is None else one_class_lost(50, Stop(6, error()))
    assert not cb.estimate.trusted and len(cb.history) == 6

# --- a loss that changes

W = torch.linspace(.1, 3, 10)

class Switch(Callback):
    "From the second epoch on, another loss, or other class weights in the same one"
    def __init__(self, in_place): self.in_place = in_place
    def before_epoch(self):
        if self.epoch == 0: return
        if self.in_place: self.learn.loss_func.func.weight = W
        else: self.learn.loss_func = CrossEntropyLossFlat(weight=W)

@pytest.mark.parametrize('in_place', (False,True))
def test_a_loss_that_another_callback_switches(in_place):
    "One network that drops nothing is the plain one"
    def trained(*cbs):
        set_seed(1)
        learn = tensors(X, Y, jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat(weight=torch.ones(10)))
        learn.fit(3, 1e-2, cbs=list(cbs))
        return (learn.model.peer(0) if hasattr(learn.model, 'peers') else learn.model)[-1].weight
    cb = JoCorCallback(k=1, rule='schedule', forget_rate=0.)
    plain,ours,without = trained(Switch(in_place)),trained(cb, Switch(in_place)),trained()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert (plain-without).abs().max() > 1e-2

# --- labels that are merged on the way, batches that are dicts

class Coarse:
    def __init__(self, a, b): self.targets,self.x = D.target[a:b],X[a:b]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],int(self.targets[i] >= 5)

class Merge(ItemTransform):
    def encodes(self, b): return b[0],(b[1] >= 5).long()

def merged_later():
    items = list(zip(X, Y))
    return [TfmdDL(o, bs=64, shuffle=True, after_batch=[Merge()]) for o in (items[:600], items[600:800])]

def merged_by_the_set(): return [DataLoader(o, bs=64, shuffle=True) for o in (Coarse(0, 600), Coarse(600, 800))]

@pytest.mark.parametrize('loaders', (merged_later, merged_by_the_set))
@pytest.mark.filterwarnings('error:the training loader yields other items')
def test_merged_labels(loaders):
    learn = quiet(Learner(DataLoaders(*loaders()), jocor_mlp(2, 64), loss_func=CrossEntropyLossFlat()))
    learn.fit(2, 1e-2, cbs=(cb := JoCorCallback(k=2)))
    assert len(cb.history) == 2 and set(cb.items.frame().given_label) == {0,1}

class Dicts(Coarse):
    def __getitem__(self, i): return dict(x=self.x[i], label=int(self.targets[i]))

class DictLearner(Learner):
    def _split(self, b): self.xb,self.yb = (b['x'],),(b['label'],)

def test_batches_that_are_dicts():
    dls = DataLoaders(*[DataLoader(o, bs=64, shuffle=True) for o in (Dicts(0, 600), Dicts(600, 800))])
    learn = quiet(DictLearner(dls, jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat()))
    learn.fit(2, 1e-2, cbs=(cb := JoCorCallback(k=2)))
    assert (cb.items.frame().given_label == D.target[:600]).all()

# --- copies in a fit

class KeepBest(Callback):
    order = 70
    def after_epoch(self): self.best = copy.deepcopy(self.learn)

def test_a_copy_of_the_learner_in_a_fit():
    learn = digits()
    learn.fit(2, 1e-2, cbs=[JoCorCallback(k=2), keep := KeepBest()])
    assert same(weights(keep.best.model), weights(learn.model))

# --- models that have been trained before

def normed(): return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

def trained_before(model, epochs=3):
    learn = tensors(X, Y, model, shuffle=True)
    learn.fit(epochs, 1e-2)
    return learn

def test_all_peers_go_on_from_a_pretrained_body():
    "A plain `Learner` does not say that its model is pretrained"
    body = trained_before(normed()).model
    assert has_learned(body) and not has_learned(normed()) and not has_learned(jocor_mlp(10, 64))
    learn = tensors(X, Y, copy.deepcopy(body))
    a,b,c = learn.to_peers(3, seed=0).model.peers
    assert all(same(weights(o[:3]), weights(body[:3])) for o in (a,b,c))
    assert same(weights(a[3]), weights(body[3])) and len({o[3].weight.sum().item() for o in (a,b,c)}) == 3
    anew = tensors(X, Y, copy.deepcopy(body)).to_peers(2, init='all', seed=0).model.peer(1)
    assert not same(weights(anew[0]), weights(body[0]))

@pytest.mark.parametrize('make', (normed, lambda: jocor_mlp(10, 64)))
def test_peers_that_start_anew_beside_a_trained_one_are_said(make):
    learn = trained_before(make())
    with pytest.warns(UserWarning, match="only the first peer goes on from it"): learn.fit(1, cbs=JoCorCallback(k=2))

@pytest.mark.filterwarnings('error:the learner has trained its model before')
def test_a_search_for_a_learning_rate_trains_nothing():
    learn = tensors(X, Y, normed(), shuffle=True)
    learn.lr_find(show_plot=False, num_it=5)
    learn.fit(1, cbs=JoCorCallback(k=2))

# --- names

class Folder:
    "As torchvision's `ImageFolder`"
    samples = [('a/1.png', 0), ('b/2.png', 1)]
    def __len__(self): return 2
    def __getitem__(self, i): return X[i],self.samples[i][1]

def test_names_of_an_image_folder(): assert item_names(Folder()) == ['a/1.png','b/2.png']

@pytest.mark.filterwarnings(NOT_LEARNED)
def test_an_estimate_of_peers_that_know_nothing():
    y = torch.arange(800) % 200
    learn,cb = tensors(X[:800], y, jocor_mlp(200, 64), shuffle=True),JoCorCallback(k=3)
    learn.fit(2, 1e-3, cbs=cb)
    assert (cb.estimate.low, cb.estimate.high) == (0,1)
    assert str(cb.estimate).startswith('between 0% and 100%') and 'τ from 0.00 to 1.00' in repr(cb)

# --- callbacks and labels

def test_a_new_callback_on_trained_peers_is_said_to_know_nothing():
    learn,cb = digits(),JoCorCallback(k=2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for _ in range(2): learn.fit(2, 1e-2, cbs=cb)
    with pytest.warns(UserWarning, match='peers were trained before, and this callback knows nothing of that'):
        learn.fit(1, 1e-2, cbs=JoCorCallback(k=2))

@pytest.mark.parametrize('make', [lambda x, y: TensorDataset(x, y), lambda x, y: list(zip(x, y))])
@pytest.mark.parametrize('label, message', [(10, 'such as 10 at position 599'), (-1, 'code them as -100')])
def test_a_label_that_is_no_class_is_found_before_training(make, label, message):
    x,y = torch.randn(600, 64),torch.arange(600) % 10
    y[599] = label
    dl = DataLoader(make(x, y), bs=20)
    learn = quiet(Learner(DataLoaders(dl, dl), jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat()))
    model = learn.model
    with pytest.raises(ValueError, match=rf'1 of the 600 training labels lie outside \[0, 10\).*{message}'):
        learn.fit(1, 1e-3, cbs=JoCorCallback(k=2))
    assert learn.model is model

def test_labels_that_cross_entropy_ignores_are_no_error():
    x,y = torch.randn(100, 64),torch.arange(100) % 10
    y[70:] = -100
    dl = DataLoader(TensorDataset(x, y), bs=20)
    learn = quiet(Learner(DataLoaders(dl, dl), jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat()))
    learn.fit(1, cbs=JoCorCallback(k=2))

def test_a_table_whose_classes_fastai_took_for_numbers():
    df = pd.DataFrame(dict(x=np.random.default_rng(0).normal(size=200), y=np.arange(200) % 2))
    learn = quiet(tabular_learner(TabularDataLoaders.from_df(df, y_names='y', cont_names=['x'], bs=32), layers=[8]))
    with pytest.raises(ValueError, match='y_block=CategoryBlock'): learn.fit(1, cbs=JoCorCallback(k=2))

def test_labels_of_items_that_the_loader_never_draws_may_be_missing():
    x,y = torch.randn(100, 64),torch.arange(100) % 10
    y[50:] = -1
    dl = DataLoader(TensorDataset(x, y), bs=10, get_idxs=lambda: list(range(50)))
    learn = quiet(Learner(DataLoaders(dl, dl), jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat()))
    learn.fit(1, cbs=JoCorCallback(k=2))

def test_other_items_after_a_fit_that_was_interrupted_in_its_first_epoch():
    def loaders(n):
        dl = DataLoader(TensorDataset(X[:n], Y[:n]), bs=16)
        return DataLoaders(dl, dl)
    class Stop(Callback):
        order = 70
        def after_batch(self): raise KeyboardInterrupt
    learn,cb = quiet(Learner(loaders(64), jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat())),JoCorCallback(k=2)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[cb, Stop()])
    learn.dls = loaders(120)
    learn.fit(1, cbs=cb)
    assert cb.items.n == 120
