"What selection throws away is not computed, and what is left is the same."
import copy, pytest, torch
import numpy as np
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, GradientAccumulation, Learner, nn
from fastai_jocor.all import *
from fastai_jocor.order import same_buffers
from fastai_jocor.prune import take_items
from learners import digits, digits64, finite, plain, quiet, tensors, weights
from sync import as_on_a_gpu

class Sizes(Callback):
    "How many items each training batch brings, and how many the model sees in its pass with gradients"
    order,run_valid = 20,False
    def __init__(self): self.sizes = []
    def after_loss(self): self.sizes.append((self.epoch, self.learn.selection.n, len(self.pred)))

@pytest.mark.parametrize('rounding', ('official','carried'))
@pytest.mark.parametrize('k', (1,3))
def test_exact_gives_the_same_weights(k, rounding):
    "Without layers that mix items, the gradient of the kept items is that of the whole batch"
    found = []
    for prune in (None,'exact'):
        learn,sizes = digits64(),Sizes()
        cb = JoCorCallback(k=k, co_lambda=.8, forget_rate=.6, prune=prune, seed=1, rule='schedule', rounding=rounding)
        learn.fit(4, 1e-3, cbs=[cb, sizes])
        found.append((weights(learn.model), cb.history, cb.items.frame()))
        for epoch,n,m in sizes.sizes:
            want = n if prune is None or epoch == 0 else int(.4*n)
            assert m == want if rounding == 'official' else want <= m <= want+1
    (w,history,ledger),(w2,history2,ledger2) = found
    for a,b in zip(w, w2): torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    np.testing.assert_allclose(history2, history, atol=1e-6)
    np.testing.assert_allclose(ledger2, ledger, atol=1e-4)

def test_one_step_has_the_same_gradient():
    "Along a training of the whole batches: the pass over the kept items alone gives the gradient of the step"
    class Grad(Callback):
        order,run_valid = 80,False
        def before_fit(self): self.grads = []
        def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])
    found = []
    for prune in (None,'exact'):
        cb = JoCorCallback(k=3, forget_rate=.8, num_gradual=0, prune=prune, seed=1)
        grad = Grad()
        digits64().fit(1, 0., cbs=[cb, grad])
        found.append(grad.grads)
    assert len(found[0]) > 10
    for a,b in zip(*found, strict=True):
        for p,q in zip(a, b): torch.testing.assert_close(p, q, atol=1e-9, rtol=0)

def normed(): return nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,10))

class SameRunningMeans(Callback):
    "The running means of the first peer are those that a copy has after the kept items alone"
    order,run_valid = 20,False
    def __init__(self): self.n = 0
    def before_batch(self): self.kept,self.twin = plain(self.xb[0]),copy.deepcopy(self.model.peers[0][:3])
    def after_pred(self):
        self.twin(self.kept)
        for a,b in zip(self.twin[2].buffers(), self.model.peers[0][2].buffers()): torch.testing.assert_close(a, b)
        assert self.twin[2].num_batches_tracked == self.iter+1 and len(self.kept) == int(.5*self.learn.selection.n)
        self.n += 1

def test_running_means_are_those_of_the_kept_items():
    learn,see = digits(model=normed()),SameRunningMeans()
    learn.fit(1, 1e-3, cbs=[JoCorCallback(k=2, num_gradual=0, prune='exact', rounding='official'), see])
    assert see.n == len(learn.dls.train)

class Chosen(Callback):
    "The items of each batch, their last losses, and the places of those that are left"
    order,run_valid = 20,False
    def __init__(self, cb): self.cb,self.batches = cb,[]
    def before_batch(self):
        s = self.learn.selection
        idx,pruned = s.idx.clone(),None if s.pruned is None else s.pruned.clone()
        self.batches.append((self.epoch, idx, self.cb.items.last_loss[idx].clone(), pruned, plain(self.yb[0])))

def test_approx_selects_by_the_losses_of_earlier_epochs():
    learn,cb = digits(),JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune='approx', refresh=3,
        rounding='official')
    see,times,full = Chosen(cb),np.zeros(len(learn.dls.train_ds)),np.zeros(len(learn.dls.train_ds))
    learn.fit(7, 1e-3, cbs=[cb, see])
    for epoch,idx,last,pruned,y in see.batches:
        assert (pruned is None) == (epoch in (0,3,6))
        left = idx if pruned is None else idx[pruned]
        times[left.numpy()] += 1
        full[idx.numpy()] += 1
        if pruned is None: continue
        order = np.argsort(np.nan_to_num(last.numpy(), nan=-1e9), kind='stable')
        assert set(pruned.tolist()) == set(order[:len(idx)//2].tolist())
        assert torch.equal(y, torch.as_tensor(learn.dls.noise.noisy[left.numpy()]))
    assert (cb.items.scored.numpy() == times).all() and (cb.items.seen.numpy() == full).all()
    assert cb.history.kept.round(1).tolist() == [.5]*7
    assert cb.history.label_precision.between(0,1).all() and cb.history.agreement.between(0,1).all()

def test_an_item_without_a_loss_is_taken():
    learn,cb = digits(),JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune='approx')
    learn.fit(1, 1e-3, cbs=cb)
    cb.items.last_loss[:64] = torch.nan
    see,new = Chosen(cb),set(range(64))
    learn.fit(1, 1e-3, cbs=[cb, see])
    taken = {int(i) for _,idx,_,pruned,_ in see.batches for i in idx[pruned]}
    given = set(np.flatnonzero(cb.items.seen.numpy() == 2))
    assert len(taken & new) > .9*len(given & new) and not cb.items.last_loss[list(taken)].isnan().any()

@pytest.mark.parametrize('prune', ('exact','approx'))
def test_bad_items_are_not_taken(prune):
    x,y = torch.randn(256,4),torch.randint(0,3,(256,))
    x[::7] = torch.nan
    valid = DataLoader(list(zip(torch.zeros(9,4), y)), bs=9)
    dls = DataLoaders(DataLoader(list(zip(x,y)), bs=32, shuffle=True), valid)
    learn = quiet(Learner(dls, nn.Linear(4,3), loss_func=CrossEntropyLossFlat()))
    cb = JoCorCallback(k=2, forget_rate=.5, num_gradual=0, prune=prune)
    learn.fit(3, 1e-2, cbs=cb)
    assert finite(learn.model)
    assert (cb.items.kept[::7] == 0).all() and cb.items.kept.sum() == 3*128
    assert cb.history.non_finite.iloc[0] == len(x[::7])

@pytest.mark.parametrize('prune', ('exact','approx'))
def test_learns_as_well(prune):
    def accuracy(prune):
        learn = digits()
        learn.fit_one_cycle(30, 2e-2, cbs=JoCorCallback(k=3, prune=prune, seed=3, rule='schedule'))
        return learn.recorder.values[-1][2]
    assert accuracy(prune) > accuracy(None)-.1 > .5

BAD_ARGUMENTS = (dict(prune='all'), "prune='all'"), (dict(refresh=0), 'refresh=0'), (dict(refresh=1.5), 'refresh=1.5')

@pytest.mark.parametrize('kw,msg', BAD_ARGUMENTS)
def test_bad_arguments(kw, msg):
    with pytest.raises(ValueError, match=msg): JoCorCallback(**kw)

def test_gradient_accumulation_is_refused():
    learn = digits()
    model = learn.model
    with pytest.raises(ValueError, match='GradientAccumulation'):
        learn.fit(1, cbs=[JoCorCallback(prune='exact'), GradientAccumulation(128)])
    assert learn.model is model

def test_a_loader_that_does_not_tell():
    items = list(zip(torch.randn(64,4), torch.randint(0,3,(64,))))
    dl = torch.utils.data.DataLoader(items, batch_size=16)
    learn = quiet(Learner(DataLoaders(dl, dl), nn.Linear(4,3), loss_func=CrossEntropyLossFlat()))
    with pytest.raises(ValueError, match="prune='approx' needs to know"):
        learn.fit(1, cbs=JoCorCallback(forget_rate=.2, prune='approx'))
    learn.fit(1, cbs=JoCorCallback(forget_rate=.2, num_gradual=0, prune='exact'))

def test_inputs_that_cannot_be_cut():
    with pytest.raises(ValueError, match='type list'): take_items(['a','b'], torch.tensor([0]), 2)

def test_same_buffers_also_after_an_error():
    m = normed().train()
    before = [b.clone() for b in m.buffers()]
    with pytest.raises(RuntimeError), torch.no_grad(), same_buffers(m):
        m(torch.randn(8,64))
        raise RuntimeError
    for a,b in zip(before, m.buffers()): assert torch.equal(a, b)

@pytest.mark.parametrize('prune', ('exact','approx'))
def test_plain_tensors_on_a_gpu(prune, monkeypatch):
    "Nothing is pruned by a label that says that there is none: the first loss of such an item tells what is wrong"
    def fit(y, **kwargs):
        learn = tensors(torch.randn(96,8), y, nn.Linear(8,4))
        learn.fit(3, 1e-2, cbs=(cb := JoCorCallback(forget_rate=.3, prune=prune, refresh=2, seed=1)))
        return cb.ledger
    y = torch.randint(0,4,(96,))
    with monkeypatch.context() as m:
        as_on_a_gpu(m, [])
        assert (fit(y).seen == 3).all()
    y[90] = -100
    with pytest.raises(ValueError, match='targets from -100 to 3 must lie in'): fit(y)
