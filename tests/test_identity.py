"What a callback knows belongs to these items with these labels, and not to as many others."
import pickle, numpy as np, pandas as pd, pytest, torch
from fastai.tabular.all import Normalize, TabularPandas
from fastai.vision.all import (Callback, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders,
    IndexSplitter, Learner, RandomSplitter, TransformBlock, nn, noop, set_seed)
from fastai_jocor.all import *
from fastai_jocor.cleaning import SuspectsLearner
from fastai_jocor.evidence import Evidence, forget_margins, look_at_batch
from fastai_jocor.ledger import Ledger
from fastai_jocor.state import class_names_of, item_names, ItemSource
from learners import SCHEDULE, digits, fast_adam, quiet, same, weights
from sklearn.datasets import load_digits
from torch.utils.data import Subset, TensorDataset

D = load_digits()
X,TRUE = (D.images*15).astype(np.uint8),D.target
WRONG = np.random.RandomState(0).rand(len(TRUE)) < .2
Y = np.where(WRONG, (TRUE+np.random.RandomState(1).randint(1, 10, len(TRUE))) % 10, TRUE)

def pairs(at, y=Y): return [(torch.tensor(X[i]/240).float()[None], torch.tensor(int(y[i]))) for i in at]
def loaders(ds, bs=32): return DataLoaders(DataLoader(ds, bs=bs, shuffle=True), DataLoader(ds, bs=bs))
def learner(dls): return quiet(Learner(dls, jocor_mlp(10, 64), loss_func=CrossEntropyLossFlat(), opt_func=fast_adam))

# --- other items, as many

def trained_on_both(anew):
    "Six epochs on some items and three on others, with the same callback or a new one"
    set_seed(0)
    learn,cb = learner(loaders(pairs(range(600)))),JoCorCallback(k=2, seed=0)
    learn.fit(6, 1e-2, cbs=cb)
    learn.dls = loaders(pairs(range(600, 1200)))
    if anew: cb = JoCorCallback(k=2, seed=0)
    torch.manual_seed(1)
    learn.fit(3, 1e-2, cbs=cb)
    return learn,cb

@pytest.mark.filterwarnings('ignore:.*trained on other items')
def test_other_items_start_over():
    (learn,cb),(_,new) = (trained_on_both(anew) for anew in (False,True))
    found = WRONG[600:1200][cb.suspects().index]
    assert found.mean() > .8 and .5 < found.sum()/WRONG[600:1200].sum()
    pd.testing.assert_frame_equal(cb.ledger, new.ledger)
    assert cb.estimate == new.estimate and cb.evidence.rows == new.evidence.rows
    assert len(cb.history) == 9 and cb.done == 3

@pytest.mark.filterwarnings('error:.*has trained')
def test_the_same_items_go_on():
    learn,cb = learner(loaders(pairs(range(200)))),JoCorCallback(k=2)
    learn.fit(1, 1e-2, cbs=cb)
    learn.dls = loaders(pairs(range(200)), bs=50)
    learn.fit(1, 1e-2, cbs=cb)
    assert (cb.items.seen == 2).all() and len(cb.evidence.rows) == 2

def test_the_schedule_starts_over_on_other_items():
    learn,cb = learner(loaders(pairs(range(200)))),JoCorCallback(k=2, forget_rate=.3, balance=.5, num_gradual=2)
    learn.fit(3, 1e-2, cbs=cb)
    for at in (range(200, 400), range(200, 300)):
        learn.dls = loaders(pairs(at))
        with pytest.warns(UserWarning, match='this JoCorCallback has trained on other items: forget schedule'):
            learn.fit(1, 1e-2, cbs=cb)
        assert cb.R == 0 and (cb.items.seen == 1).all()

class Bare:
    "A data set that tells its length alone"
    def __init__(self, at): self.pairs = pairs(at)
    def __len__(self): return len(self.pairs)
    def __getitem__(self, i): return self.pairs[i]

@pytest.mark.parametrize('kw', (dict(), dict(rule='schedule', num_gradual=1)))
def test_other_items_that_only_the_first_epoch_tells_apart(kw):
    learn,cb = learner(loaders(Bare(range(300)))),JoCorCallback(k=2, **kw)
    learn.fit(3, 1e-2, cbs=cb)
    before = cb.estimate
    assert before is not None
    learn.dls = loaders(Bare(range(300, 600)))
    learn.fit(1, 1e-2, cbs=cb)
    assert cb.estimate is not before and (cb.items.given_label.numpy() == Y[300:600]).all()
    assert not cb.by_evidence or len(cb.evidence.rows) == 1
    assert .8 < (cb.items.seen == 1).float().mean() < 1

# --- which differ

def in_memory(at, y=Y, x=X, vocab=None, **kwargs):
    return InMemoryDataLoaders.from_arrays(x[list(at)], y[list(at)], vocab, valid=list(range(20)), **kwargs)

def table(at, y=Y):
    df = pd.DataFrame(D.data[list(at)], columns=[f'p{i}' for i in range(64)]).assign(y=[f'n{o}' for o in y[list(at)]])
    splits = list(range(150)),list(range(150, len(df)))
    return TabularPandas(df, [Normalize], cont_names=list(df)[:64], y_names='y', y_block=CategoryBlock(),
                         splits=splits).dataloaders(50)

def block(at, y=Y):
    "Items that are numbers"
    read = dict(get_x=lambda i: torch.tensor(X[i]/240).float(), get_y=lambda i: int(y[i]))
    parts = IndexSplitter(range(20))
    return DataBlock((TransformBlock,CategoryBlock), splitter=parts, **read).dataloaders(at, bs=32, num_workers=0)

class Own:
    "A data set of one's own, as torchvision's are"
    def __init__(self, at, y=Y, transform=noop): self.at,self.targets,self.transform = at,y[list(at)].tolist(),transform
    def __len__(self): return len(self.at)
    def __getitem__(self, i): return self.transform(torch.tensor(X[self.at[i]]/240).float()),self.targets[i]

def own(at, y=Y, **kwargs): return loaders(Own(at, y, **kwargs))
def subset(at, y=Y): return loaders(Subset(pairs(range(400), y), list(at)))
def of_tensors(at, y=Y): return loaders(TensorDataset(torch.tensor(X[list(at)]), torch.tensor(y[list(at)])))

SORTED = np.argsort(Y, kind='stable') # labels alone do not tell the first half of a class from the second
FEW,MOST = (np.where(np.random.RandomState(2).rand(len(Y)) < p, (Y+1)%10, Y) for p in (.2, .8))
A,B = range(200),range(200, 400)
DOUBLE = X.repeat(2, 1).repeat(2, 2)

def source(dls): return ItemSource(dls.train.dataset, class_names_of(dls), 10)

DIFFER = [(make, (A,), (B,), 'items') for make in (subset, in_memory, table, block, of_tensors)]
DIFFER += [(make, (SORTED[::2][:200],), (SORTED[1::2][:200],), 'items') for make in (in_memory, table, of_tensors)]
DIFFER += [(make, (A, Y), (A, y), want) for make in (subset, in_memory, table, block, of_tensors, own)
           for y,want in ((Y, ''), (FEW, ''), (MOST, 'labels'))]
DIFFER += [(own, (A,), (B,), 'labels'), (own, (A,), (range(150),), 'items'), (in_memory, (A, Y, X), (A, Y, DOUBLE), ''),
           (in_memory, (A, Y, X, list('abcdefghij')), (A, Y, X, list('abcdefghik')), 'classes')]

@pytest.mark.parametrize('make,old,new,want', DIFFER)
def test_what_differs(make, old, new, want):
    old,new = source(make(*old)),source(make(*new))
    again = pickle.loads(pickle.dumps(old))
    assert again.ds is None and [new.other_than(o) for o in (old,again)] == [want]*2
    assert again.names == old.names and len(again) == len(old) and old.other_than(old) == ''

def test_a_new_augmentation_is_not_another_data_set():
    crop = lambda x: torch.roll(x, int(torch.randint(4, ())), 0)
    old,new = source(own(A)),source(own(A, transform=crop))
    assert new.other_than(old) == ''
    some = [(torch.rand(3), o) for o in Y[:200].tolist()]
    class Random(list):
        def __getitem__(self, i): return torch.rand(3),list.__getitem__(self, i)[1]
    assert source(loaders(Random(some))).inputs is None

def test_noise_that_was_drawn_again():
    dls = lambda seed: digits_dls('symmetric:0.5', seed=seed)
    assert source(dls(1)).other_than(source(dls(0))) == 'labels' and source(dls(0)).other_than(source(dls(0))) == ''

# --- labels that were changed

def test_figures_against_another_label_no_longer_count():
    items,idx = Ledger(3),torch.arange(3)
    def see(labels):
        ones,yes = torch.ones(3),torch.ones(3, dtype=torch.bool)
        items.update(idx, ones, ones/2, torch.tensor([0,1,2]), yes, yes, ones, ones/2, torch.tensor(labels))
    see([0,1,2])
    see([0,2,2])
    assert items.seen.tolist() == [2,1,2] and items.loss.tolist() == [2,1,2] and items.lead.tolist() == [2,1,2]
    assert items.given_label.tolist() == [0,2,2] and items.scored.tolist() == [2,1,2]

def test_margins_against_another_label_are_forgotten():
    e,idx = Evidence(4, 2, 3),torch.tensor([3,1,0])
    e.margin = torch.tensor([1.,2.,3.,4.])
    kept = forget_margins(e, torch.tensor([2,1,0]), idx, torch.tensor([2,0,-1]))
    assert kept.isnan().tolist() == [False,True,False]
    look_at_batch(e, torch.zeros(3, 3), torch.tensor([2,1,0]), idx, torch.tensor([True,False,True]), kept)
    assert e.margin.tolist()[::2] == [.5,3.] and e.margin[1].isnan() and e.margin[3] == 2

class Margins(Callback):
    "The margins after the first batch"
    order,run_valid = 20,False
    def after_batch(self):
        if self.epoch or self.iter: return
        self.seen = self.learn.selection.idx,self.learn.jo_cor.evidence.margin.clone()

@pytest.mark.filterwarnings('error:.*has trained')
def test_relabelled_items_begin_again_and_others_go_on():
    learn,cb,see = digits(Symmetric(.3)),JoCorCallback(k=2),Margins()
    learn.add_cb(cb)
    learn.fit(5, 1e-2)
    s,before = cb.suspects(),cb.estimate
    learn.dls = cleaned(learn.dls, s, 'relabel')
    old = cb.evidence.margin.clone()
    learn.fit(0, 1e-3)
    learn.fit(1, 1e-3, cbs=see)
    f,changed = cb.ledger,np.isin(np.arange(len(old)), s.index)
    came = (cb.items.given_label.numpy() == learn.dls.train.labels) # the last batch is dropped if it is smaller
    assert came.mean() > .95 and (f.seen[changed & came] == 1).all() and (f.seen[~changed] >= 4).all()
    idx,now = see.seen
    mine = idx[changed[idx]]
    assert len(mine) > 5 and (old[mine] > 3).float().mean() > .7 and (now[mine] < 1).float().mean() > .8
    learn.fit(2, 1e-3)
    assert cb.estimate.rate < before.rate/2 and cb.estimate.high < before.high

def test_an_item_that_was_relabelled_is_not_pruned_for_its_old_label():
    x,y = torch.randn(64,8),torch.arange(64) % 4
    cb = JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune='approx', refresh=9)
    net = lambda: nn.Linear(8,4)
    learn = quiet(Learner(loaders(list(zip(x, y))), net(), loss_func=CrossEntropyLossFlat()))
    learn.fit(1, 1e-2, cbs=cb)
    worst = cb.items.last_loss.topk(8).indices
    y[worst] = (y[worst]+1) % 4
    learn.dls = loaders(list(zip(x, y)))
    seen = []
    class Look(Callback):
        order,run_valid = 20,False
        def before_batch(self): seen.extend(self.learn.selection.idx[self.learn.selection.pruned].tolist())
    learn.fit(1, 1e-2, cbs=[cb, Look()])
    assert set(worst.tolist()) <= set(seen) and len(seen) == 32

# --- nothing is said of other items

def test_lr_find_on_other_items_leaves_no_trace():
    learn,cb = learner(in_memory(A)),JoCorCallback(k=2)
    learn.add_cb(cb)
    learn.fit(2, 1e-2)
    own,before = learn.dls,cb.ledger
    learn.dls = in_memory(B, noise='symmetric:0.4')
    learn.lr_find(num_it=5, show_plot=False)
    pd.testing.assert_frame_equal(cb.ledger, before)
    assert cb.source.ds is own.train.dataset and cb.noise is None
    with pytest.raises(ValueError, match='class indices'):
        learn.dls = loaders([(x, torch.rand(3)) for x,_ in pairs(B)])
        learn.fit(1)
    pd.testing.assert_frame_equal(cb.ledger, before)
    learn.dls = own
    learn.fit(1, 1e-2)
    assert cb.ledger.seen.max() == 3

def test_true_labels_of_other_items_are_not_told():
    learn,cb = digits(Symmetric(.3)),JoCorCallback(k=2)
    learn.add_cb(cb)
    learn.fit(1, 1e-2)
    before = cb.ledger
    learn.dls = digits_dls('symmetric:0.5', seed=3)
    pd.testing.assert_frame_equal(cb.ledger, before)

def test_the_cleaner_refuses_as_many_other_items():
    dls = block(A)
    learn,cb = learner(dls),JoCorCallback(k=2)
    cb.source,cb.items = source(dls),Ledger(180)
    learn.dls = block(B)
    with pytest.raises(ValueError, match='180 training items, but the ledger is of 180 others'):
        SuspectsLearner(learn, cb).get_preds(dl=learn.dls.train)

class Interrupt(Callback):
    def before_epoch(self):
        if self.epoch == 2: raise KeyboardInterrupt

def test_a_checkpoint_of_other_items_is_left_alone(tmp_path):
    def fit(at, cbs=None, n=3):
        learn = learner(block(at))
        learn.path = tmp_path
        learn.fit(n, 1e-2, cbs=[cb := JoCorCallback(k=2, forget_rate=.2), Checkpoint()]+(cbs or []))
        return cb
    with pytest.raises(KeyboardInterrupt): fit(A, [Interrupt()])
    with pytest.warns(UserWarning, match='of another run .items=.180 items, digest .* instead of .180 items'):
        assert fit(B).items.seen.max() == 3
    with pytest.raises(KeyboardInterrupt): fit(A, [Interrupt()])
    cb = fit(A)
    assert len(cb.history) == 3
